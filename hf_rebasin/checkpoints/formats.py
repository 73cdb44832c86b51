"""Formats: folders and files that are not a model as transformers saves it, each with what makes one of them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, listed
from .side_files import holds_weights, is_training_state

POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that git lfs has not fetched
PIPELINE = "model_index.json"  # of diffusers
ADAPTER_CONFIG = "adapter_config.json"
# The class that loads the base model of an adapter, by the task that its configuration names.
ADAPTED_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# Adapters that change what a model reads and not its weights.
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")
# What PEFT adds to the keys of the layers that it wraps.
ADAPTER_KEY = re.compile(r"(^|\.)(base_layer|lora_(A|B|embedding_A|embedding_B|magnitude_vector))(\.|$)")
PEFT_PREFIX = "base_model.model."
VARIANT = re.compile(r"^(?:model|pytorch_model)(?:-\d+-of-\d+)?\.(\w+)\.(?:safetensors|bin)$")


def refuse_pointers(folder: Path, files: Iterable[Path]) -> None:
    """Raise CheckpointError for files that git lfs has not fetched: a clone without it has pointers in their place."""
    pointers = [file.relative_to(folder).as_posix() for file in dict.fromkeys(files) if _is_pointer(file)]
    if pointers:
        raise CheckpointError(
            f"{listed(pointers)} of {folder} {'is a pointer' if len(pointers) == 1 else 'are pointers'} of git lfs, "
            f"with the contents still to be fetched: git -C {shlex.quote(str(folder))} lfs pull"
        )


def _is_pointer(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > 1024:
        return False
    with file.open("rb") as opened:
        return opened.read(len(POINTER)) == POINTER


def explain_missing_weights(
    name: str, files: Collection[str], adapter: Callable[[], Mapping[str, Any]]
) -> CheckpointError:
    """Return the error for a model without weights that are read here, with what is there and what helps.

    Args:
        name: folder or Hub id.
        files: its files, those of its sub-folders as `folder/file`.
        adapter: reads its `adapter_config.json`.
    """
    top = sorted(file for file in files if "/" not in file)
    models = sorted(
        file.rpartition("/")[0]
        for file in files
        if file.count("/") == 1 and file.endswith(("/model.safetensors", "/model.safetensors.index.json"))
    )
    if PIPELINE in top:
        parts = f"; those that transformers loads are merged one by one: {_example(name, models[0])}" if models else ""
        return CheckpointError(
            f"{name} is a pipeline of diffusers ({PIPELINE}), not one model: its parts are models of their own{parts}"
        )
    if ADAPTER_CONFIG in top:
        return explain_adapter(name, adapter())
    seen = [file for file in top if holds_weights(file) and not is_training_state(file)]
    advice = _advise(name, seen, models)
    return CheckpointError(
        f"{name} has no weights that can be merged: no model.safetensors and no model.safetensors.index.json, "
        f"{f'only {listed(seen or top)}' if top else 'and no other file'}; {advice}"
    )


def _example(name: str, part: str) -> str:
    return f"hf-rebasin merge {shlex.quote(f'{name}/{part}')} OTHER/{part} -o OUT"


def _advise(name: str, seen: Collection[str], models: Collection[str]) -> str:
    """Return what turns the weights of a model that were seen, or are in its sub-folders, into some that are read."""
    variants = [match[1] for file in seen if (match := VARIANT.match(file))]
    if any(file.endswith(".gguf") for file in seen):
        return (
            "GGUF is the format of llama.cpp, mostly quantised, and such weights cannot be moved or averaged; use the "
            "original that it was converted from"
        )
    if any(file.endswith((".h5", ".msgpack")) for file in seen):
        kind = "from_tf" if any(file.endswith(".h5") for file in seen) else "from_flax"
        needed = "tensorflow" if kind == "from_tf" else "flax"
        return (
            f"transformers 5 reads them no more, but 4 converts them (pip install 'transformers<5' {needed}): "
            f"AutoModel.from_pretrained({name!r}, {kind}=True).save_pretrained('OUT'), with the class of its head"
        )
    if any(re.match(r"consolidated.*\.(pth|safetensors)$", file) for file in seen):
        return (
            "these are in the layout of their makers, which the scripts convert_*_weights_to_hf.py in the repository "
            "of transformers convert (src/transformers/models)"
        )
    if variants:
        return (
            f"they are the variant {variants[0]!r}; save it under the usual name: "
            f"AutoModel.from_pretrained({name!r}, variant={variants[0]!r}).save_pretrained('OUT'), with the class of "
            "its head"
        )
    if any(re.match(r"(pytorch_)?model-\d+-of-\d+\.", file) for file in seen):
        return "the index that says which tensor is in which of these files is missing; fetch it from their source too"
    if len(seen) == 1:
        (file,) = seen
        usual = "model.safetensors" if file.endswith(".safetensors") else "pytorch_model.bin"
        if file.endswith((".safetensors", ".pth", ".pt", ".ckpt", ".bin")):
            return f"if {file} holds the tensors of the whole model, rename it to {usual}"
    if models:
        return f"its sub-folders {listed(models)} have some; name one of them"
    return "save the model with save_pretrained of transformers to get one"


def explain_adapter(name: str, config: Mapping[str, Any]) -> CheckpointError:
    """Return the error for an adapter of PEFT that was given as a model, with the call that makes one of it."""
    base, kind = config.get("base_model_name_or_path", "its base model"), config.get("peft_type", "LORA")
    if kind in PROMPTS:
        return CheckpointError(
            f"{name} is an adapter of {base}, not a model, and of a kind ({kind}) that has no share in the weights; "
            f"merge {base} itself"
        )
    return CheckpointError(
        f"{name} is an adapter of {base}, not a model: merge it into that model first, with peft: "
        f"{_merging_call(config, repr(base), repr(name))}"
    )


def _merging_call(config: Mapping[str, Any], base: str, adapter: str) -> str:
    """Return the Python expression that merges an adapter into its base model and saves the result."""
    owner = ADAPTED_CLASSES.get(str(config.get("task_type")), "AutoModel")
    return (
        f"PeftModel.from_pretrained({owner}.from_pretrained({base}), {adapter}).merge_and_unload()"
        ".save_pretrained('OUT')"
    )


def explain_adapter_beside(source: str, config: Mapping[str, Any], commit: str | None = None) -> CheckpointError:
    """Return the error for a whole model with an adapter beside it: which of them is meant has to be said.

    Args:
        source: folder, or id of a repository.
        config: the adapter's configuration.
        commit: commit of the repository; None for a folder.
    """
    if commit is None:
        model, place = source, "the folder"
        apart = f"mkdir ADAPTER && mv {shlex.quote(str(Path(source).expanduser()))}/adapter_* ADAPTER/"
    else:
        model, fetch = "MODEL", f"hf download {source} --revision {commit}"
        place = model
        apart = f"{fetch} --exclude 'adapter_*' --local-dir MODEL; {fetch} --include 'adapter_*' --local-dir ADAPTER"
    return CheckpointError(
        f"{source} holds a whole model and an adapter beside it ({ADAPTER_CONFIG}), which from_pretrained would put "
        f"on; keep them apart ({apart}), and give {place} for the model alone, or merge the adapter into it first: "
        f"{_merging_call(config, repr(model), repr('ADAPTER'))}"
    )


def refuse_unmerged(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError for a model with matrices of an adapter that are not merged into its weights."""
    keys = [key for key in shapes if ADAPTER_KEY.search(key)]
    if not keys:
        return
    inputs = {key: shape for key, shape in shapes.items() if ".lora_A." in key}
    targets = sorted({key.partition(".lora_A.")[0].rpartition(".")[2] for key in inputs})
    rank = min((shape[0] for shape in inputs.values() if shape), default="R")
    inner = "" if any(key.startswith(PEFT_PREFIX) for key in keys) else ".base_model.model"
    raise CheckpointError(
        f"{name} has matrices of an adapter that are not merged into its weights ({listed(keys, 3)}); merge them with "
        f"peft first: model = get_peft_model(BASE, LoraConfig(r={rank}, lora_alpha=ALPHA, target_modules={targets})); "
        f"model{inner}.load_state_dict(STATE); model.merge_and_unload().save_pretrained('OUT')"
    )


def dequantising_call(name: str, config: Mapping[str, Any], narrow: bool) -> str | None:
    """Return the Python expression that writes a quantised model in a wider dtype; None where transformers has none.

    Args:
        name: the model.
        config: its configuration.
        narrow: whether it has floating-point tensors of 8 bits.
    """
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    owner = next((name for name in config.get("architectures") or () if name.isidentifier()), "AutoModel")
    load = f"{owner}.from_pretrained({name!r}, dtype=torch.bfloat16"
    if method == "fp8":
        return f"{load}, quantization_config=FineGrainedFP8Config(dequantize=True)).save_pretrained('OUT')"
    return f"{load}).save_pretrained('OUT')" if narrow and settings is None else None


def explain_pickle(path: Path, problem: str, nested: str | None = None) -> CheckpointError:
    """Return the error for a pickle with other things than named tensors in it, with the command that leaves them out.

    Args:
        path: the file.
        problem: what is in it.
        nested: key under which it has the tensors; None if they would have to be unpickled with code.
    """
    file = json.dumps(str(path))
    if nested is not None:
        script = f"import torch; torch.save(torch.load({file})[{json.dumps(nested)}], {file})"
        return CheckpointError(
            f"{path} is not a state dict, but has one under {nested!r}: write that one alone: "
            f"python -c {shlex.quote(script)}"
        )
    script = (
        f'import torch; state = torch.load({file}, weights_only=False, map_location="cpu"); '
        f"torch.save({{k: v for k, v in state.items() if isinstance(v, torch.Tensor)}}, {file})"
    )
    return CheckpointError(
        f"{path} {problem}. If you trust its source, as its code will run, write its tensors alone: "
        f"python -c {shlex.quote(script)}"
    )
