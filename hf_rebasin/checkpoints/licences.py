"""Licence of a merge: the one that all its models share, else the one its publisher names."""

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
    """Licence declared in a model card.

    Args:
        licence: the Hub's identifier, such as `apache-2.0`; `other` for a licence without one.
        name: name of an `other` licence.
        link: where its text can be read.
    """

    licence: str
    name: str | None = None
    link: str | None = None

    @property
    def known(self) -> bool:
        """Whether it identifies a licence, which `unknown` and a nameless `other` do not."""
        return self.licence != "unknown" and (self.licence != "other" or self.name is not None)

    def same(self, other: Licence) -> bool:
        """Whether both are the same licence; an `other` licence is compared by its name."""
        return (self.licence, self.name if self.licence == "other" else None) == (
            other.licence,
            other.name if other.licence == "other" else None,
        )

    def __str__(self) -> str:
        return f"{self.licence} ({self.name})" if self.name else self.licence


@dataclass(frozen=True)
class UnreadableLicence:
    """Licence metadata that cannot be interpreted, and why."""

    why: str

    def __str__(self) -> str:
        return f"cannot be read ({self.why})"


DeclaredLicence = Licence | UnreadableLicence | None


@dataclass(frozen=True)
class LicenceOutcome:
    """Licence of a merge.

    Args:
        licence: the licence; None if the publisher has to name one and has not.
        text: the reason, with the licence of every model.
        named: whether the publisher named it.
    """

    licence: Licence | None
    text: str
    named: bool = False

    @property
    def refused(self) -> bool:
        return self.licence is None


def find_licence(model: Checkpoint | Path, made_of: Mapping[str, DeclaredLicence] | None = None) -> DeclaredLicence:
    """Return the licence in a model's card, else the one that follows from the models it was made of.

    Args:
        model: the model, or its folder.
        made_of: licences of the models it was made of, where there is a record of them.

    Returns:
        The licence, or None where none is declared.
    """
    declared = _read_card(model if isinstance(model, Path) else model.folder)
    return merged_licence(made_of).licence if declared is None and made_of else declared


def _read_card(folder: Path | None) -> DeclaredLicence:
    card = None if folder is None else folder / "README.md"
    if card is None or not card.is_file():
        return None
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        metadata = metadata_load(card) or {}
    except YAMLError:
        return UnreadableLicence("the metadata of its model card is no YAML")
    except (OSError, ValueError, RecursionError) as error:
        return UnreadableLicence(f"its model card: {str(error).splitlines()[0]}")
    return _parse_metadata(metadata)


def _parse_metadata(metadata: Mapping[str, Any]) -> DeclaredLicence:
    raw = metadata.get("license")
    if isinstance(raw, list) and len(raw) == 1:
        (raw,) = raw
    if raw is None or raw == []:
        return None
    identifier = raw.strip().lower() if isinstance(raw, str) else ""
    if not IDENTIFIER.fullmatch(identifier):
        return UnreadableLicence(f"its model card says license: {raw!r}")
    name, link = (metadata.get(key) for key in ("license_name", "license_link"))
    return Licence(identifier, str(name) if name else None, str(link) if link else None)


def merged_licence(models: Mapping[str, DeclaredLicence], named: str | Licence | None = None) -> LicenceOutcome:
    """Determine the licence of a merge from those of its models.

    Args:
        models: licence of each model, by its name.
        named: licence named by the publisher; an identifier of the Hub, or a whole licence for `other`.

    Raises:
        OptionError: the named licence is not an identifier, or is `other` without a name.
    """
    inputs = ", ".join(f"{model}: {'none said' if licence is None else licence}" for model, licence in models.items())
    if named is not None:
        chosen = _parse_choice(named)
        return LicenceOutcome(chosen, f"inputs: {inputs}; named by the publisher: {chosen}", named=True)
    known = [licence for licence in models.values() if isinstance(licence, Licence) and licence.known]
    if known and len(known) == len(models) and all(licence.same(known[0]) for licence in known):
        return LicenceOutcome(known[0], f"{known[0]}, as all models have it")
    why = "not all models say which licence they have" if len(known) < len(models) else "the licences differ"
    return LicenceOutcome(None, f"{why} ({inputs}), so the merge has none until you name one that they all allow")


def _parse_choice(named: str | Licence) -> Licence:
    licence = Licence(named.strip().lower()) if isinstance(named, str) else named
    if not IDENTIFIER.fullmatch(licence.licence):
        raise OptionError(f"licence {licence.licence!r} is not an identifier of the Hub, such as apache-2.0")
    if not licence.known:
        raise OptionError(f"licence {licence.licence!r} does not identify one; give its name and link, too")
    return licence
