"""Which licence a merge has: that of its models where all say one and the same, else the one its publisher names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

# As the Hub writes them: apache-2.0, cc-by-nc-sa-4.0, llama3.1, c-uda.
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


@dataclass(frozen=True)
class Licence:
    """What a model card says.

    Args:
        licence: the Hub's word for it, as `apache-2.0`; `other` for what has none.
        name: what it is called, where that is `other`.
        link: where it can be read.
    """

    licence: str
    name: str | None = None
    link: str | None = None

    @property
    def known(self) -> bool:
        """Whether it says which licence it is: `other` alone does not, and neither does `unknown`."""
        return self.licence != "unknown" and (self.licence != "other" or self.name is not None)

    def same(self, other: Licence) -> bool:
        """Whether both are one licence; where it is called `other`, by its name."""
        return (self.licence, self.name if self.licence == "other" else None) == (
            other.licence,
            other.name if other.licence == "other" else None,
        )

    def __str__(self) -> str:
        return f"{self.licence} ({self.name})" if self.name else self.licence


@dataclass(frozen=True)
class Unreadable:
    """A model card that says something of which no licence can be read, and why."""

    why: str

    def __str__(self) -> str:
        return f"cannot be read ({self.why})"


Said = Licence | Unreadable | None


@dataclass(frozen=True)
class Outcome:
    """Which licence a merge has.

    Args:
        licence: that licence; None if it was to be named, and was not.
        text: why, with what every model says.
        named: whether the publisher named it.
    """

    licence: Licence | None
    text: str
    named: bool = False

    @property
    def refused(self) -> bool:
        return self.licence is None


def licence_of(model: Checkpoint | Path, made_of: Mapping[str, Said] | None = None) -> Said:
    """The licence of a model: the one that its card names, else the one that follows from what it was made of.

    Args:
        model: which; its folder.
        made_of: what the models say of which it was made, where there is a record of them.

    Returns:
        None where nothing says any.
    """
    said = _of_card(model if isinstance(model, Path) else model.folder)
    return outcome(made_of).licence if said is None and made_of else said


def _of_card(folder: Path | None) -> Said:
    card = None if folder is None else folder / "README.md"
    if card is None or not card.is_file():
        return None
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        said = metadata_load(card) or {}
    except YAMLError:
        return Unreadable("the metadata of its model card is no YAML")
    except (OSError, ValueError, RecursionError) as error:
        return Unreadable(f"its model card: {str(error).splitlines()[0]}")
    return _read(said)


def _read(said: Mapping[str, Any]) -> Said:
    licences = said.get("license")
    if isinstance(licences, list) and len(licences) == 1:
        (licences,) = licences
    if licences is None or licences == []:
        return None
    identifier = licences.strip().lower() if isinstance(licences, str) else ""
    if not IDENTIFIER.fullmatch(identifier):
        return Unreadable(f"its model card says license: {licences!r}")
    name, link = (said.get(key) for key in ("license_name", "license_link"))
    return Licence(identifier, str(name) if name else None, str(link) if link else None)


def outcome(models: Mapping[str, Said], named: str | Licence | None = None) -> Outcome:
    """Which licence a merge of models has.

    Args:
        models: what each of them says, by its name.
        named: what the publisher names; an identifier of the Hub, or a whole licence for `other`.

    Raises:
        OptionError: what is named is no identifier, or `other` without its name.
    """
    inputs = ", ".join(f"{model}: {'none said' if one is None else one}" for model, one in models.items())
    if named is not None:
        chosen = _named(named)
        return Outcome(chosen, f"inputs: {inputs}; named by the publisher: {chosen}", named=True)
    licences = [one for one in models.values() if isinstance(one, Licence) and one.known]
    if licences and len(licences) == len(models) and all(one.same(licences[0]) for one in licences):
        return Outcome(licences[0], f"{licences[0]}, as all models have it")
    why = "not all models say which licence they have" if len(licences) < len(models) else "the licences differ"
    return Outcome(None, f"{why} ({inputs}), so the merge has none until you name one that they all allow")


def _named(named: str | Licence) -> Licence:
    licence = Licence(named.strip().lower()) if isinstance(named, str) else named
    if not IDENTIFIER.fullmatch(licence.licence):
        raise OptionError(f"licence {licence.licence!r} is no identifier of the Hub, such as apache-2.0")
    if not licence.known:
        raise OptionError(f"licence {licence.licence!r} does not say which; give its name and link, too")
    return licence
