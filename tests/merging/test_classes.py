"""Every class that transformers can build small merges with a fine-tune of itself, and nothing of it is lost.

No table, tokenizer or processor is needed for that: a folder has all files that the classes of its type name.
"""

import json
import random
import sys

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from safetensors.torch import load_file
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from hf_rebasin import Recipe, run_recipe

SAMPLES = 12  # classes in the plain run; all with --slow
PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "audio_tokenizer_config.json"),
)
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


def list_classes(architecture):
    """All classes of the type of a tiny model, with heads of all kinds."""
    owner = getattr(transformers, ARCHITECTURES[architecture][0])
    members = vars(sys.modules[owner.__module__]).items()
    return [
        member
        for name, member in sorted(members)
        if isinstance(member, type)
        and issubclass(member, transformers.PreTrainedModel)
        and not name.endswith("PreTrainedModel")
        and getattr(transformers, name, None) is member
        and member.config_class is owner.config_class
    ]


def build(owner, architecture):
    """Return a tiny model of a class; None where the settings of its type do not fit this head."""
    torch.manual_seed(0)
    try:
        model = owner(owner.config_class(**ARCHITECTURES[architecture][1]))
        model.state_dict()
    except Exception:
        return None
    return model if any(True for _ in model.parameters()) else None


def names_of_side_files(config):
    """Names of all files that the tokenizers and processors of a type store, in the words of transformers."""
    names = [*TOKENIZER_FILES, *PROCESSOR_FILES]
    for classes in [TOKENIZER_MAPPING[type(config)]] if type(config) in TOKENIZER_MAPPING else []:
        for tokenizer in classes if isinstance(classes, list | tuple) else (classes,):
            names += getattr(tokenizer, "vocab_files_names", {}).values() if tokenizer is not None else ()
    if config.model_type in PROCESSOR_MAPPING_NAMES:
        names += ["speaker_embeddings_path.json"]
    return [name for name in dict.fromkeys(names) if name]


def check(model, tmp_path):
    a, b, out = (tmp_path / folder for folder in ("a", "b", "out"))
    model.save_pretrained(a)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a step of training
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    model.save_pretrained(b)
    files = names_of_side_files(model.config)
    for folder in (a, b):
        for file in files:
            if not (folder / file).exists():
                (folder / file).write_text(json.dumps({"written for": file}))
    run_recipe(Recipe.from_dict({"models": [str(a), str(b)], "align": False}), out)
    first, second, merged = (load_file(folder / "model.safetensors") for folder in (a, b, out))
    assert merged.keys() == first.keys()
    for key, tensor in merged.items():
        x, y = first[key], second[key]
        expected = ((x.double() + y.double()) / 2).to(x.dtype) if x.is_floating_point() else x
        assert tensor.dtype == x.dtype
        assert torch.equal(tensor, expected), key
    assert (out / "config.json").read_bytes() == (a / "config.json").read_bytes()
    assert [file for file in files if (out / file).read_bytes() != (a / file).read_bytes()] == []
    infos = []
    for folder in (a, out):
        for file in ("generation_config.json", *PROCESSOR_FILES):
            (folder / file).unlink(missing_ok=True)  # what was written for the test is no configuration
        _, info = type(model).from_pretrained(folder, output_loading_info=True)
        infos.append({kind: sorted(map(str, keys)) for kind, keys in info.items() if keys})
    assert infos[1] == infos[0], "it loads as the first model does"


@pytest.mark.parametrize("architecture", random.Random(0).sample(list(ARCHITECTURES), SAMPLES))
def test_a_class_merges_with_a_fine_tune_of_itself(architecture, tmp_path):
    check(build(getattr(transformers, ARCHITECTURES[architecture][0]), architecture), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_class_of_a_type_merges_with_a_fine_tune_of_itself(architecture, tmp_path):
    for owner in list_classes(architecture):
        model = build(owner, architecture)
        if model is not None:
            check(model, tmp_path / owner.__name__)


@pytest.mark.slow
def test_there_are_many_classes(capsys):
    built = {
        owner.__name__
        for architecture in ARCHITECTURES
        for owner in list_classes(architecture)
        if build(owner, architecture) is not None
    }
    with capsys.disabled():
        print(f"\n{len(built)} classes of {len(ARCHITECTURES)} tiny models are merged")
    assert len(built) >= 120
