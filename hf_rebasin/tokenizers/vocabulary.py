"""Vocabularies: which row of a model each token has, and whether two folders give their tokens the same rows."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from ..checkpoints.folder import list_tokenizer_files
from ..checkpoints.json_files import read_json
from ..errors import CheckpointError

FAST = "tokenizer.json"  # transformers reads it wherever it is, and the other files only without it
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
EXTRA = "pip install 'hf-rebasin[tokenizers]'"
# Modules that are not installed with this package, the files that transformers reads with them, and how to get them.
READERS = (
    ("sentencepiece", ("*.model", "*.spm"), EXTRA),
    ("google.protobuf", ("*.model", "*.spm"), EXTRA),
    ("tiktoken", ("*tiktoken*",), EXTRA),
    ("mistral_common", ("*tekken*.json",), "pip install mistral-common"),
)


def open_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder without running code from it.

    Raises:
        CheckpointError: it cannot be loaded; if a package is missing, the message names it and how to install it.
    """
    from transformers import AutoTokenizer

    missing = list(_missing_readers(folder))
    try:
        with _quiet_transformers() if missing else nullcontext():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # broken files raise errors of any type
        if missing:
            file, module, command = missing[0]
            raise CheckpointError(
                f"the tokenizer in {folder} is in {file}, which is read with {module}, and that is not installed: "
                f"{command}"
            ) from error
        if "trust_remote_code" in str(error):
            raise CheckpointError(f"the tokenizer in {folder} has code of its own, which is not run here") from error
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded ({error!r})") from error


def _missing_readers(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (file, module that reads it and is not installed, command that installs it) of a tokenizer."""
    names = sorted(list_tokenizer_files(folder))
    for module, patterns, command in READERS if FAST not in names else ():
        file = next((name for name in names if any(fnmatch(name, pattern) for pattern in patterns)), None)
        if file is not None and not _is_installed(module):
            yield file, module, command


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the warnings of transformers about packages, which say less than the error that follows."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_tokens(folder: Path) -> Mapping[str, int]:
    """Return `{token: row}` of the tokenizer in a folder, with all tokens that were added.

    Raises:
        CheckpointError: the tokenizer cannot be loaded.
    """
    return _read_tokens(folder, _file_states(folder))


FileStates: TypeAlias = tuple[tuple[str, int, int], ...]  # what is read of a folder is read again when these change


def _file_states(folder: Path) -> FileStates:
    """Return (name, size, time of the last change) of the files of a tokenizer."""
    stats = {name: (folder / name).stat() for name in list_tokenizer_files(folder)}
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items()))


@lru_cache(maxsize=8)
def _read_tokens(folder: Path, states: FileStates) -> Mapping[str, int]:
    return dict(open_tokenizer(folder).get_vocab())


@dataclass(frozen=True, kw_only=True)
class VocabularyFiles:
    """What the files of a tokenizer say about its tokens, without loading it.

    Args:
        files: `{name: content}` of the files that number tokens.
        tokens: `{token: number}` as these files number them.
        numbered: (token, number) of the tokens that are added with a number.
        named: the tokens that settings name without a number, in their order.
        settings: the other settings.
        owner: name of the class that reads them; empty where none is named.
    """

    files: Mapping[str, Any]
    tokens: Mapping[str, int]
    numbered: frozenset[tuple[str, int]]
    named: tuple[str, ...]
    settings: Mapping[str, Any]
    owner: str

    @property
    def added(self) -> tuple[frozenset[tuple[str, int]], tuple[str, ...]]:
        """The tokens that the settings add to those of the files."""
        numbered = frozenset(item for item in self.numbered if self.tokens.get(item[0]) != item[1])
        known = self.tokens.keys() | {token for token, _ in self.numbered}
        return numbered, tuple(token for token in self.named if token not in known)


def same_vocabulary(a: Path, b: Path) -> bool:
    """Whether the files of two folders show that every token has the same row in both; no tokenizer is loaded.

    How a file is written, chat templates and other settings that number no tokens may differ. False does not mean that
    the vocabularies differ: then the tokenizers have to be loaded.
    """
    try:
        first, second = (_read_files(folder, _file_states(folder)) for folder in (a, b))
    except (CheckpointError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return False  # loading will say what is broken
    return (
        (first.owner == second.owner or not first.owner or not second.owner)
        and first.files == second.files
        and first.added == second.added
        and not any(
            _numbers_tokens(key, first.owner or second.owner) for key in _differing(first.settings, second.settings)
        )
    )


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]


def _numbers_tokens(key: str, owner: str) -> bool:
    """Whether a setting may change the numbers of tokens: all that the class itself reads are taken to do so."""
    from transformers import PreTrainedTokenizerBase

    if f'"{key}"' in inspect.getsource(PreTrainedTokenizerBase.__init__):
        return False
    tokenizer_class = _find_tokenizer_class(owner)
    return tokenizer_class is None or key in inspect.signature(tokenizer_class.__init__).parameters


def _find_tokenizer_class(name: str) -> Any:
    """Return the tokenizer class of a name; None for one that is not known or whose packages are missing."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    owner = tokenizer_class_from_name(name) or tokenizer_class_from_name(f"{name}Fast") if name else None
    return owner if isinstance(owner, type) and issubclass(owner, PreTrainedTokenizerBase) else None


@lru_cache(maxsize=4)
def _read_files(folder: Path, states: FileStates) -> VocabularyFiles:
    """Read the files of a tokenizer.

    Raises:
        CheckpointError: one is not JSON.
        LookupError, TypeError, ValueError: one has another structure than transformers writes.
    """
    names = [name for name, *_ in states]
    config, special, added = (read_json(folder / name) for name in SETTINGS)
    decoder = config.get("added_tokens_decoder") or {}
    numbered = {(_content(token), int(number)) for number, token in decoder.items()}
    numbered |= {(token, int(number)) for token, number in added.items()}
    named = [token for settings in (config, special) for token in _named_tokens(settings)]
    files: dict[str, Any] = {}
    tokens: dict[str, int] = {}
    if FAST in names:
        tokens = _read_fast(folder / FAST)
        files = {FAST: tokens}
    else:
        for name in names:
            if name not in SETTINGS and not name.startswith("chat_template"):
                files[name] = (folder / name).read_bytes()
                tokens |= _read_numbering(name, files[name])
    return VocabularyFiles(
        files=files,
        tokens=tokens,
        numbered=frozenset(numbered),
        named=tuple(dict.fromkeys(named)),
        settings={key: value for key, value in config.items() if not _names_tokens(key) and not _is_flag(value)},
        owner=str(config.get("tokenizer_class") or "").removesuffix("Fast"),
    )


def _is_flag(value: Any) -> bool:
    """Whether a value switches something on or off, which never changes the number of a token."""
    return value is None or isinstance(value, bool)


def _names_tokens(key: str) -> bool:
    return key in ("added_tokens_decoder", "tokenizer_class") or key.endswith(("_token", "special_tokens"))


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _named_tokens(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tokens that settings name, by the names of the settings."""
    for key in sorted(settings):
        value = settings[key]
        if key.endswith("_token") and value is not None and not isinstance(value, bool):
            yield _content(value)
        elif key.endswith("special_tokens") and value:
            yield from map(_content, value.values() if isinstance(value, Mapping) else value)


def _read_fast(file: Path) -> dict[str, int]:
    """Return `{token: number}` of a `tokenizer.json`, in which a vocabulary is a mapping or a list."""
    content = read_json(file)
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, Mapping):
        vocabulary = {token: number for number, (token, *_) in enumerate(vocabulary)}
    added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or ()}
    return {**vocabulary, **added}


def _read_numbering(name: str, content: bytes) -> dict[str, int]:
    """Return `{token: number}` as a file numbers them; empty for other files."""
    if name.endswith(".json"):
        entries = json.loads(content)
        plain = isinstance(entries, dict) and all(isinstance(number, int) for number in entries.values())
        return dict(entries) if plain else {}
    if name.endswith(".txt") and name != "merges.txt":
        return {token: number for number, token in enumerate(content.decode().splitlines())}
    if name.endswith((".model", ".spm")):
        return {piece: number for number, piece in enumerate(_read_pieces(content))}
    return {}


def _read_pieces(content: bytes) -> list[str]:
    """Return the pieces of a SentencePiece model, field 1 of each message in field 1; none of anything else."""
    pieces: list[str] = []
    try:
        for number, message in _read_fields(content):
            if number == 1 and isinstance(message, bytes):
                texts = (value for inner, value in _read_fields(message) if inner == 1 and isinstance(value, bytes))
                pieces += [text.decode() for text in texts]
    except (IndexError, ValueError):
        return []
    return pieces


def _read_fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield (field, value) of a message of protocol buffers; values of a fixed width are bytes.

    Raises:
        IndexError, ValueError: it is not a message.
    """
    at = 0

    def read_number() -> int:
        nonlocal at
        number = shift = 0
        while True:
            byte = content[at]
            at, number, shift = at + 1, number | (byte & 127) << shift, shift + 7
            if byte < 128:
                return number

    while at < len(content):
        tag = read_number()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, read_number()
            continue
        size = read_number() if kind == 2 else {1: 8, 5: 4}.get(kind, -1)
        if size < 0 or at + size > len(content):
            raise ValueError(f"a message has no field of kind {kind} at byte {at}")
        yield tag >> 3, content[at : at + size]
        at += size
