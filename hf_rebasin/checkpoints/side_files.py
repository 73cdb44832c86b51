"""Side files: which files of a model go along into a merge of it, decided by their names and sizes alone.

Every file goes along unless it is known to be left over from something else: weights in another format, the state of a
training run, the card and its pictures, caches. The same rule selects from a folder and from a repository of the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from ..text import byte_size

# Bytes of an unknown file, or of all in an unknown folder, above which it does not go along; a tokenizer is smaller.
LARGE = 200_000_000

# Weights in any format, by their names. The model's own are merged, all others are of another format.
WEIGHT_FILES = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.ckpt.*", "*.distcp", "*.index.json", "*.dduf"),
    *("*.h5", "*.keras", "*.msgpack", "*.pb", "*.pdparams", "*.params", "*.ot", "*.nemo", "*.mlmodel"),
    *("*.gguf", "*.ggml", "*.llamafile", "*.onnx", "*.onnx_data*", "*.onnx.data", "*.tflite", "*.engine"),
)
# Files in the formats of weights that only a training run reads.
TRAINING_STATE = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "training_args*")
# Weights that are left without a word: those of formats and states that everybody knows.
KNOWN_WEIGHTS = (
    *("model*", "pytorch_model*", "tf_model*", "flax_model*", "rust_model*", "openvino_*", "consolidated*"),
    *("weights*", "alignment*.safetensors", "*.gguf", "*.ggml", "*.onnx*", "adapter_model*", *TRAINING_STATE),
)
# Objects of Python that go along as they are, such as the classifier of a SetFit model, which scikit-learn fitted.
PICKLED_FILES = ("*.pkl", "*.pickle", "*.joblib")
# What training and other tools leave beside a model, and what describes it for people.
LEFTOVER_FILES = (
    *("trainer_state.json", "trainer_log.*", "training_args.*", "training_log.*", "running_log.txt"),
    *("*_results.json", "*_results*.csv", "*_results.txt", "*.tfevents.*", "*.log", "*.out"),
    *("zero_to_fp32.py", "latest", "latest_checkpointed_iteration.txt", "mergekit_config.*", "adapter_config.json"),
    *("*.pyc", "*.partial", "*.lock", "*.incomplete", "*.tmp", "*~", "thumbs.db"),
    *("readme", "readme.*", "readme[_-]*.md", "model_card.*", "modelcard.*"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4"),
)
LEFTOVER_FOLDERS = (
    *(".*", "__pycache__", "*.egg-info", "checkpoint-*", "global_step*", "runs", "wandb", "mlruns", "logs"),
    *("tensorboard", "onnx", "openvino", "coreml", "original", "gguf", "ggml", "tflite", "*.mlpackage"),
)
# Folders in which processors of transformers store data of their own; files there are no weights, however large.
DATA_FOLDERS = ("language_model", "speaker_embeddings")

# Names that belong to models, so that they may be overwritten with one, and deleted where another model left them.
KNOWN_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "*tokenizer*",
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "*processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "*processing_*.py",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
)
# A tokenizer can be loaded from any of the first; the others also affect what its tokens mean.
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "tokenizer.model.*", "*.tiktoken", "*tekken*.json")
TOKENIZER_EXTRAS = (
    *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "merges.txt", "normalizer.json"),
)


@cache
def tokenizer_names() -> frozenset[str]:
    """Names of all files that a tokenizer class of the installed transformers reads.

    They are looked up in its source files, in about 20 ms; importing all these classes would take seconds.
    """
    spec = find_spec("transformers")
    (root, *_) = (spec.submodule_search_locations if spec else None) or [""]
    names: set[str] = set()
    for pattern in ("tokenization_*.py", "models/*/tokenization_*.py", "integrations/mistral/*.py"):
        for file in Path(root).glob(pattern) if root else ():
            text = file.read_text(encoding="utf-8")
            for body in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", text, re.DOTALL):
                names.update(re.findall(r""":\s*["']([^"']+)["']""", body))
            names.update(re.findall(r"""^[A-Z_]+_(?:FILE|NAME)\s*=\s*["']([\w-]+\.[\w.-]+)["']""", text, re.MULTILINE))
    return frozenset(names)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name matches a pattern, in upper or lower case."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def is_known_side_file(name: str) -> bool:
    """Whether a file of this name is one that transformers or sentence-transformers writes beside weights."""
    return _matches(name, KNOWN_SIDE_FILES) or name in tokenizer_names()


def is_tokenizer_file(name: str) -> bool:
    """Whether a tokenizer can be loaded from a file of this name."""
    return _matches(name, TOKENIZER_FILES) or (name in tokenizer_names() and not _matches(name, TOKENIZER_EXTRAS))


def affects_tokens(name: str) -> bool:
    """Whether a file of this name defines the tokens of a model, alone or with others."""
    return _matches(name, (*TOKENIZER_FILES, *TOKENIZER_EXTRAS, "*tokenizer*")) or name in tokenizer_names()


def is_leftover_folder(path: str) -> bool:
    """Whether a folder, given by its path inside the model's, never has anything that goes along."""
    return any(_matches(name, LEFTOVER_FOLDERS) for name in PurePosixPath(path).parts)


def is_leftover(path: str) -> bool:
    """Whether a file is left behind because of its name alone."""
    place = PurePosixPath(path)
    return is_leftover_folder(str(place.parent)) or place.name.startswith(".") or _matches(place.name, LEFTOVER_FILES)


def holds_weights(path: str) -> bool:
    """Whether a file holds weights, of whatever format, or says where they are."""
    place = PurePosixPath(path)
    if place.parts[0] in DATA_FOLDERS:
        return False
    return _matches(place.name, WEIGHT_FILES) or (not place.parent.parts and _matches(place.name, ("*.npz",)))


def is_pickled(name: str) -> bool:
    """Whether a file of this name holds objects of Python, which may have been fitted to the model's outputs."""
    return _matches(name, PICKLED_FILES)


def is_training_state(name: str) -> bool:
    """Whether a file of this name holds the state of a training run, in a format of weights."""
    return _matches(name, TRAINING_STATE)


def select_files(sizes: Mapping[str, int], modules: Collection[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Select the files of a model besides its weights.

    Args:
        sizes: `{path inside the model's folder: bytes}` of its files.
        modules: sub-folders whose weights are a part of the model, which `modules.json` names.

    Returns:
        The paths that go along, sorted, and `{path: why}` of what is left although its name does not tell that it
        belongs to something else.
    """
    candidates = sorted(path for path in sizes if not is_leftover(path))
    weights = [path for path in candidates if holds_weights(path)]
    others = {folder for folder in map(folder_of, weights) if folder and not is_within(folder, modules)}
    left = {folder: "has weights of its own" for folder in others if not is_within(folder, others - {folder})}
    left |= {path: "is of another format" for path in weights if _is_strange(path, modules)}
    kept = [path for path in candidates if not holds_weights(path) and not is_within(path, others)]
    totals: dict[str, int] = {}
    for path in kept:
        entry = PurePosixPath(path).parts[0]
        totals[entry] = totals.get(entry, 0) + sizes[path]
    for entry in [entry for entry, total in totals.items() if total > LARGE]:
        unknown = [path for path in kept if is_within(path, [entry]) and not _is_known(path, modules)]
        total = sum(sizes[path] for path in unknown)
        if total > LARGE:
            left[entry] = f"has {byte_size(total)}"
            kept = sorted(set(kept).difference(unknown))
    return kept, left


def select_weights(names: Iterable[str]) -> list[str]:
    """Select the weights that transformers would read from the files of one folder; empty where there are none.

    Files of several shards come with their index.
    """
    present = set(names)
    for pattern, single in (("model*.safetensors", "model.safetensors"), ("pytorch_model*.bin", "pytorch_model.bin")):
        shards = sorted(name for name in present if fnmatchcase(name, pattern))
        index = f"{single}.index.json"
        if single in present or index in present:
            return [single] if single in present else [index, *shards]
    return []


def folders_with_weights(paths: Iterable[str], modules: Collection[str]) -> list[str]:
    """List the folders in which modules of a model have weights: those that `modules.json` names, or within them."""
    folders = {folder_of(path) for path in paths if holds_weights(path) and not is_leftover(path)}
    return sorted(folder for folder in folders if is_within(folder, modules))


def folder_of(path: str) -> str:
    """Return the folder of a file; empty for one at the top of the model's folder."""
    parent = PurePosixPath(path).parent.as_posix()
    return "" if parent == "." else parent


def is_within(path: str, folders: Collection[str]) -> bool:
    """Whether a path is one of these folders or inside one."""
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _is_strange(path: str, modules: Collection[str]) -> bool:
    """Whether weights are such that people may not expect them to be left."""
    place = PurePosixPath(path)
    beside = not place.parent.parts or is_within(folder_of(path), modules)
    return beside and not _matches(place.name, (*KNOWN_WEIGHTS, "*.index.json"))


def _is_known(path: str, modules: Collection[str]) -> bool:
    """Whether a file is known to belong to the model, and goes along whatever its size."""
    place = PurePosixPath(path)
    return is_known_side_file(place.name) or place.parts[0] in DATA_FOLDERS or is_within(path, modules)
