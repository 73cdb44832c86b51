"""Loading: what does not fit when transformers loads a model into the class that its configuration names."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, listed
from .model_classes import build_without_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What does not fit when transformers loads a model.

    Args:
        owner: name of the class.
        missing: tensors of the class, by module keys, that are newly initialised.
        unexpected: tensors that the class has no use for.
        mismatched: `{module key: (shape, shape that the class has)}`.
        failed: module keys of tensors that cannot be converted.
    """

    owner: str
    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    failed: frozenset[str]

    def to_answer(self) -> dict[str, Any]:
        """Return it in values that can be written as JSON."""
        shapes = {key: [list(shape) for shape in pair] for key, pair in self.mismatched.items()}
        sets = {name: sorted(getattr(self, name)) for name in ("missing", "unexpected", "failed")}
        return {"owner": self.owner, "mismatched": shapes, **sets}

    @staticmethod
    def from_answer(answer: Any) -> Loading | None:
        """Read what `to_answer` returned; None if it is anything else."""
        try:
            shapes = {key: (tuple(shape), tuple(expected)) for key, (shape, expected) in answer["mismatched"].items()}
            sets = {name: frozenset(answer[name]) for name in ("missing", "unexpected", "failed")}
            return Loading(owner=str(answer["owner"]), mismatched=shapes, **sets)
        except (TypeError, ValueError, KeyError, AttributeError):
            return None


def describe_misfit(loading: Loading, config: Any) -> str:
    """Describe the tensors that cannot be loaded, with the setting that gives the first of them another shape."""
    if not loading.mismatched:
        return f"transformers cannot make {listed(sorted(loading.failed))} of its tensors"
    key, (shape, expected) = min(loading.mismatched.items())
    more = f" (and {len(loading.mismatched) - 1} more do not fit)" if len(loading.mismatched) > 1 else ""
    setting = next(_settings_that_fit(key, shape, expected, config), None)
    cause = (
        "its config.json makes it" if setting is None else f"with {setting[0]} {setting[1]} its config.json makes it"
    )
    return f"{key} is {shape}{more}, and {cause} {expected}; correct the one or the other"


def _settings_that_fit(
    key: str, shape: tuple[int, ...], expected: tuple[int, ...], config: Any
) -> Iterator[tuple[str, int]]:
    """Yield (setting, value) of a configuration that would give a tensor its shape with another value."""
    if len(shape) != len(expected):
        return
    pairs = {(own, other) for own, other in zip(expected, shape, strict=True) if own != other}
    for path, value in _numbers(config.to_dict()):
        for own, other in pairs:
            if value != own:
                continue
            changed = copy.deepcopy(config)
            part = changed
            for name in path[:-1]:
                part = getattr(part, name)
            setattr(part, path[-1], other)
            with suppress(CheckpointError):
                if tuple(build_without_weights(changed, 0).state_dict()[key].shape) == shape:
                    yield ".".join(path), value


def _numbers(settings: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield (path, value) of the integers of a configuration and of the configurations in it."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and name.endswith("config"):
            yield from _numbers(value, (*path, name))
        elif type(value) is int:
            yield (*path, name), value


def refuse_worse_loading(loading: Loading, before: Loading, config: Any, out: str, origin: str) -> None:
    """Raise CheckpointError for a written model that is loaded less well than the model it was made of.

    What both lack, or have too much, is noted.

    Args:
        loading: what does not fit in what was written.
        before: what does not fit in the model it was made of.
        config: configuration of what was written.
        out: name of what was written.
        origin: name of the model it was made of.
    """
    problems = []
    if missing := sorted(loading.missing - before.missing):
        problems.append(f"it lacks {listed(missing)}")
    if unexpected := sorted(loading.unexpected - before.unexpected):
        problems.append(f"it has {listed(unexpected)}, which the class has not")
    if loading.mismatched or loading.failed:
        problems.append(describe_misfit(loading, config))
    if problems:
        raise CheckpointError(
            f"{out} was not written, as it would not load into {loading.owner} as {origin} does: {'; '.join(problems)}"
        )
    notes = [f"{listed(sorted(loading.missing))} newly initialised"] if loading.missing else []
    notes += [f"{listed(sorted(loading.unexpected))} left out"] if loading.unexpected else []
    if notes:
        logger.info("%s is loaded by %s with %s, as %s is", out, loading.owner, " and ".join(notes), origin)
