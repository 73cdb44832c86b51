"""The model card of what is published: metadata for the Hub, and a page for whoever decides whether to trust it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..alignment.alignment import Alignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import is_weights
from ..checkpoints.licences import Outcome
from ..checkpoints.provenance import Provenance
from ..errors import OptionError
from ..reports.measurements import Row
from ..reports.page import NONE, table_of, templates_of
from ..reports.pairs import Pair
from ..reports.report import Report
from .record import RECIPE
from .usage import Usage, usage

GENERATED = "<!-- Written by hf-rebasin; it is written anew with every `hf-rebasin publish`. -->"
SENTENCES = {
    "merge": "A merge of {count} models that were trained apart, brought to the same coordinates first.",
    "align": "The second of the models below in the coordinates of the first. It computes what it computed before.",
    "apply": "The model below in other coordinates. It computes what it computed before.",
    "recalibrate": "The model below with statistics of activations taken anew.",
    "interpolate": "A model on the line between the two below.",
}


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Args:
        repository: where it is published.
        checkpoint: what is published.
        provenance: how it came about.
        licence: that it has, and what those of the inputs are.
        report: what was measured; None if nothing was.
        revision: the branch it is published to; None for the main one.
    """

    repository: str
    checkpoint: Checkpoint
    provenance: Provenance
    licence: Outcome
    report: Report | None = None
    revision: str | None = None

    @property
    def pair(self) -> Pair | None:
        return self.report.pairs[0] if self.report is not None and self.report.pairs else None

    @property
    def merged(self) -> Row | None:
        """The row of what is published; None where nothing was measured."""
        rows = () if self.pair is None else self.pair.rows
        return next((row for row in rows if self.pair and row.name == self.pair.result), None)

    @property
    def base_models(self) -> list[str]:
        """Ids on the Hub of what it was made of; where an input is not there, of what that was made of."""
        places = [place for one in self.provenance.inputs for place in ([one.place] if one.commit else one.made_of)]
        found = [re.fullmatch(r"(.+)@[0-9a-f]{40}", place) for place in places]
        return list(dict.fromkeys(one[1] for one in found if one))

    @property
    def is_merge(self) -> bool:
        return self.provenance.verb in ("merge", "interpolate") or any(one.made_of for one in self.provenance.inputs)


def card(subject: Subject, template: Path | None = None) -> str:
    """The text of README.md.

    Args:
        subject: what it is about.
        template: a Jinja2 template instead of ours; what it may name is in `publishing/templates/card.md.j2`.

    Raises:
        OptionError: the template cannot be read, or names what there is not.
    """
    use = usage(subject.checkpoint, subject.repository, subject.revision)
    said = yaml.safe_dump(metadata(subject, use), sort_keys=False, allow_unicode=True)
    try:
        body = _template(template).render(
            subject=subject,
            name=subject.repository.rpartition("/")[2],
            provenance=subject.provenance,
            report=subject.report,
            pair=subject.pair,
            merged=subject.merged,
            licence=subject.licence,
            usage=use,
            table=_table(subject.pair),
            images=[] if subject.report is None else list(subject.report.images("report")),
            recipe=_recipe(subject),
            sentence=_sentence(subject.provenance),
            limits=limits(subject),
        )
    except Exception as error:  # whatever somebody's template stumbles on
        where = "" if template is None else f"{template}: "
        raise OptionError(f"{where}the template of the card cannot be rendered: {error}") from error
    return f"---\n{said}---\n\n{GENERATED}\n\n{body.strip()}\n"


def metadata(subject: Subject, use: Usage) -> dict[str, Any]:
    """What stands at the head of a card, as the Hub knows it."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=use.task,
            dataset_type=said["dataset"],
            dataset_name=said["dataset"],
            dataset_config=said.get("name"),
            dataset_split=said.get("split"),
            dataset_revision=said.get("revision"),
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for said in [subject.provenance.recipe.get("evaluate") or {}]
        for name, value in _measured(subject.merged)
        if "dataset" in said and use.task
    ]
    data = ModelCardData(
        base_model=subject.base_models or None,
        base_model_relation="merge" if subject.is_merge and subject.base_models else None,
        library_name="transformers",
        license=said.licence if (said := subject.licence.licence) else None,
        license_name=said.name if said else None,
        license_link=said.link if said else None,
        pipeline_tag=use.task or None,
        tags=["merge", "rebasin"] if subject.is_merge else ["rebasin"],
        metrics=[name for name, _ in _measured(subject.merged)] or None,
        model_name=subject.repository.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return {key: value for key, value in data.to_dict().items() if value is not None}


def _measured(row: Row | None) -> list[tuple[str, float]]:
    return (
        []
        if row is None or row.loss is None
        else [("loss", float(row.loss)), *((n, float(v)) for n, v in row.metrics.items())]
    )


def _table(pair: Pair | None) -> list[list[str]]:
    """The ends, the controls and the merges, as they are in the report."""
    if pair is None or not pair.rows:
        return []
    columns = [column for column in table_of(pair) if column.title != "seconds"]
    lines = [["", *(column.title for column in columns), "looked at"]]
    for i, row in enumerate([*pair.ends, *pair.rows]):
        looked = "" if i < len(pair.ends) else row.consumed + " (control)" * row.control
        lines.append([row.name, *(column.cells[i] for column in columns), looked])
    return lines


def _recipe(subject: Subject) -> str:
    """As it is beside the weights; the settings of what has none."""
    file = (subject.checkpoint.folder or Path()) / RECIPE
    if subject.provenance.verb == "merge" and file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        return "\n".join(line for line in lines if not line.startswith("# hf-rebasin")).strip()
    said = {key: value for key, value in subject.provenance.recipe.items() if value not in (None, {}, [])}
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True).strip() if said else ""


def _sentence(provenance: Provenance) -> str:
    """What it is."""
    if provenance.verb == "merge" and not provenance.recipe.get("align"):
        return f"A merge of {len(provenance.inputs)} models as they are."
    return SENTENCES[provenance.verb].format(count=len(provenance.inputs))


def limits(subject: Subject) -> list[str]:
    """What is to be kept in mind, in sentences."""
    found = []
    row, inputs = subject.merged, subject.provenance.inputs
    if row is None:
        found.append("Nothing was measured on this model: how good it is is not known.")
    else:
        found.append(
            "It was measured on the data named above and on nothing else. What its inputs were trained on, and what "
            "they get wrong, is said in their own cards, and holds for it, too."
        )
    if subject.report is not None and subject.report.verdict.kind == "control":
        found.append("A control that was made without aligning does as well or better on these data; see the table.")
    local = [one.name for one in inputs if one.commit is None]
    if local:
        found.append(
            f"{', '.join(local)}: not on the Hub, so nobody without {'it' if len(local) == 1 else 'them'} can make "
            "this model again."
        )
    found += subject.provenance.notes
    return found


def _template(path: Path | None, ours: str = "card.md.j2") -> Any:
    markdown = templates_of(__package__, keep_trailing_newline=True, autoescape=False)  # which the Hub cleans
    markdown.filters.update(row=_row, is_weights=is_weights)
    markdown.globals.update(NONE=NONE)
    if path is None:
        return markdown.get_template(ours)
    return markdown.from_string(path.read_text(encoding="utf-8"))


def _row(cells: list[object]) -> str:
    """A line of a table in Markdown; a bar in a name does not end a cell."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def alignment_card(alignment: Alignment, repository: str, licence: str | None) -> str:
    """The card of an alignment by itself."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(license=licence, tags=["rebasin", "alignment"], library_name="hf-rebasin")
    head = {key: value for key, value in data.to_dict().items() if value is not None}
    groups = dict.fromkeys(symmetry.kind for symmetry in alignment.spec.symmetries.values())
    body = _template(None, "alignment.md.j2").render(
        name=repository.rpartition("/")[2],
        repository=repository,
        alignment=alignment,
        groups=", ".join(groups),
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{GENERATED}\n\n{body.strip()}\n"
