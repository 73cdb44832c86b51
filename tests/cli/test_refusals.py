"""Unfit models are refused with a message that says what was found and what to do, and nothing is written."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_rebasin import merge
from hf_rebasin.cli.main import main
from hf_rebasin.errors import CheckpointError, MismatchError

BERT = dict(
    vocab_size=51,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
)


def save(folder, kind="BertForSequenceClassification", seed=0, **other):
    owner = getattr(transformers, kind)
    torch.manual_seed(seed)
    owner(owner.config_class(**BERT | other)).save_pretrained(folder)
    return folder


def with_settings(folder, **settings):
    """Change settings in the configuration of a folder."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.fixture
def whole(tmp_path):
    return save(tmp_path / "whole")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Merge folders in Python and on the command line, and return the message; nothing may be written."""

    def call(*folders, error=(CheckpointError, MismatchError)):
        with pytest.raises(error) as caught:
            merge(folders).save(tmp_path / "out")
        arguments = ["hf-rebasin", "merge", *map(str, folders), "-o", str(tmp_path / "out"), "--no-align"]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as end:
            main()
        output = capsys.readouterr()
        assert end.value.code == 1
        assert "Traceback" not in output.out + output.err
        # the same message, wherever the terminal wraps it
        assert "".join(str(caught.value).split()) in "".join((output.out + output.err).split())
        assert not [path.name for path in tmp_path.iterdir() if "out" in path.name], "nothing is written"
        return str(caught.value)

    return call


@pytest.fixture
def adapter(tmp_path):
    """Write a folder as peft does for LoRA: low-rank factors beside a file that names the base model."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "somebody/base", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["query"]}))
    layer = "base_model.model.bert.encoder.layer.0.attention.self.query"
    save_file(
        {f"{layer}.lora_A.weight": torch.randn(2, 16), f"{layer}.lora_B.weight": torch.randn(16, 2)},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return folder


@pytest.mark.parametrize("order", ["adapter whole", "whole adapter", "adapter adapter"])
def test_adapters_have_to_be_merged_into_their_base_first(adapter, whole, refused, order):
    """The product of means is not the mean of products: (A + A')(B + B') has terms that neither model has."""
    words = refused(*({"adapter": adapter, "whole": whole}[one] for one in order.split()))
    assert str(adapter) in words
    assert "adapter" in words.replace(str(adapter), "")
    assert "merge_and_unload" in words, "what to do"
    assert "somebody/base" in words, "with what"


QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 8},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 8},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [8, 8]},
}


@pytest.mark.parametrize("model_type", ["bert", "of-tomorrow"])
@pytest.mark.parametrize("settings", QUANTISED.values(), ids=QUANTISED)
def test_quantised_models_are_known_by_their_configuration(tmp_path, whole, refused, settings, model_type):
    other = with_settings(save(tmp_path / "quantised", seed=1), quantization_config=settings)
    for folder in (other, whole):
        with_settings(folder, model_type=model_type)
    for models in ((other, other), (other, whole), (whole, other)):
        words = refused(*models, error=CheckpointError)
        assert f"{other} is quantised" in words
        assert "original" in words, "what to do"


def packed(kind, seed):
    """Return the tensors of a quantised linear map of 16 inputs and 16 outputs, as the libraries store them."""
    g = torch.Generator().manual_seed(seed)
    half = torch.rand(2, 16, generator=g).half()

    def whole(*shape):
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=g, dtype=torch.int32)

    nibbles = torch.randint(0, 255, (128, 1), generator=g, dtype=torch.uint8)
    table = torch.linspace(-1, 1, 16)
    order = torch.arange(16, dtype=torch.int32) // 8
    eight = torch.randint(-127, 127, (16, 16), generator=g, dtype=torch.int8)
    return {
        "gptq": {"qweight": whole(2, 16), "qzeros": whole(2, 2), "scales": half, "g_idx": order},
        "awq": {"qweight": whole(16, 2), "qzeros": whole(2, 2), "scales": half},
        "nf4": {
            "weight": nibbles,
            "weight.absmax": half[0].float(),
            "weight.quant_map": table,
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8),
        },
        "int8": {"weight": eight, "SCB": half[0].float()},
        "fp8": {"weight": half.float().to(torch.float8_e4m3fn), "weight_scale_inv": half[:1, :1].float()},
        "compressed": {"weight_packed": whole(16, 2), "weight_scale": half.T.contiguous()},
    }[kind]


@pytest.mark.parametrize("same", [False, True], ids=["other integers", "the same integers"])
@pytest.mark.parametrize("kind", ["gptq", "awq", "nf4", "int8", "fp8", "compressed"])
def test_quantised_models_are_recognised_by_their_keys(tmp_path, refused, kind, same):
    """Without a configuration; with equal integers and different scales a mean would look right, and be wrong."""
    folders = []
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        tensors = packed(kind, seed)
        if same:
            tensors |= {k: t for k, t in packed(kind, 0).items() if not t.is_floating_point() or t.itemsize == 1}
        tensors = {f"layers.0.up.{key}": tensor for key, tensor in tensors.items()} | {"norm.weight": torch.ones(16)}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        folders.append(tmp_path / name)
    words = refused(*folders, error=CheckpointError)
    assert f"{folders[0]} is quantised" in words
    assert "original" in words, "what to do"


@pytest.mark.parametrize("configuration", [True, False], ids=["with configuration", "weights alone"])
def test_other_numbers_of_classes(tmp_path, refused, configuration):
    a, b = (save(tmp_path / f"{n}-classes", num_labels=n) for n in (2, 3))
    if not configuration:
        for folder in (a, b):
            (folder / "config.json").unlink()
    words = refused(a, b, error=MismatchError)
    assert "classifier.weight" in words
    assert "(3, 16)" in words
    assert "(2, 16)" in words
    assert ("--backbone-only" in words) == configuration, "what to do, where a class tells heads from backbones"


def test_other_numbers_of_heads(tmp_path, refused):
    """All shapes are equal, so only the configuration shows it."""
    a, b = (save(tmp_path / f"{n}-heads", num_attention_heads=n) for n in (2, 4))
    assert {k: t.shape for k, t in load_file(a / "model.safetensors").items()} == {
        k: t.shape for k, t in load_file(b / "model.safetensors").items()
    }
    assert "num_attention_heads is 4, not 2" in refused(a, b, error=MismatchError)


def test_other_numbers_of_heads_of_a_type_that_nobody_knows(tmp_path, refused):
    a, b = (with_settings(save(tmp_path / str(n), num_attention_heads=n), model_type="of-tomorrow") for n in (2, 4))
    assert "num_attention_heads is 4, not 2" in refused(a, b, error=MismatchError)


@pytest.mark.parametrize(
    ("setting", "one", "other", "key", "shapes"),
    [
        ("hidden_size", 16, 24, "bert.embeddings.LayerNorm.weight", ("(24,)", "(16,)")),
        ("intermediate_size", 24, 20, "bert.encoder.layer.0.intermediate.dense.bias", ("(20,)", "(24,)")),
        ("vocab_size", 51, 53, "bert.embeddings.word_embeddings.weight", ("(53, 16)", "(51, 16)")),
        ("num_hidden_layers", 2, 3, "bert.encoder.layer.2", ()),
    ],
)
def test_other_sizes(tmp_path, refused, setting, one, other, key, shapes):
    """By the configuration if there is one, and otherwise by keys and shapes."""
    a, b = (save(tmp_path / f"{setting}-{n}", **{setting: n}) for n in (one, other))
    tokens = f"{b} has {other} rows of tokens, and {a} has {one}"
    said = tokens if setting == "vocab_size" else f"{setting} is {other}, not {one}"
    assert said in refused(a, b, error=MismatchError)
    for folder in (a, b):
        (folder / "config.json").unlink()
    words = refused(a, b, error=MismatchError)
    if setting != "hidden_size":  # nearly all tensors differ, so only the first few are named
        assert key in words
        assert all(shape in words for shape in shapes)
    assert all(str(folder) in words for folder in (a, b))


def test_other_architectures(tmp_path, refused, whole):
    other = save(tmp_path / "electra", "ElectraForSequenceClassification", embedding_size=16)
    assert "model_type is electra, not bert" in refused(whole, other, error=MismatchError)
