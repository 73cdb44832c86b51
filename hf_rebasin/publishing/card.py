"""Model cards: metadata for the Hub, and a page for readers who decide whether to trust a model."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..alignment.alignment import Alignment
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.folder import CARD, RECIPE, is_weights, write_atomically
from ..checkpoints.licences import LicenceOutcome, merged_licence
from ..checkpoints.provenance import Provenance
from ..errors import OptionError
from ..reports.measurements import TableRow
from ..reports.page import MISSING, load_templates, table_columns
from ..reports.pairs import Pair
from ..reports.report import Report
from .usage import Usage, describe_usage

REPORT_STEM = "report"  # what the names of its pictures begin with
GENERATED = "<!-- Written by hf-rebasin; it is written anew with every `hf-rebasin publish`. -->"
SENTENCES = {
    "merge": "A merge of {count} models that were trained apart, brought to the same coordinates first.",
    "align": "The second of the models below in the coordinates of the first. It computes what it computed before.",
    "apply": "The model below in other coordinates. It computes what it computed before.",
    "recalibrate": "The model below with statistics of activations taken anew.",
    "interpolate": "A model on the line between the two below.",
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Model that a card is about.

    Args:
        repository: repository it is published to, or the name of its folder.
        checkpoint: the model.
        provenance: record of how it was made.
        licence: its licence, and those of its inputs.
        report: measurements; None if nothing was measured.
        revision: branch it is published to; None for the main one.
    """

    repository: str
    checkpoint: Checkpoint
    provenance: Provenance
    licence: LicenceOutcome
    report: Report | None = None
    revision: str | None = None

    @property
    def pair(self) -> Pair | None:
        return self.report.pairs[0] if self.report is not None and self.report.pairs else None

    @property
    def merged(self) -> TableRow | None:
        """Row of the report for the published model; None where nothing was measured."""
        rows = () if self.pair is None else self.pair.rows
        return next((row for row in rows if self.pair and row.name == self.pair.result), None)

    @property
    def images(self) -> list[str]:
        """Paths of the report's pictures within the folder."""
        names = () if self.report is None else self.report.images(REPORT_STEM)
        return [path for path in map(self.provenance.recorded_path, names) if path is not None]

    @property
    def base_models(self) -> list[str]:
        """Ids on the Hub of its inputs; for an input that is not on the Hub, of the models it was made of."""
        inputs = self.provenance.inputs
        references = [name for model in inputs for name in ([model.reference] if model.commit else model.made_of)]
        matches = [re.fullmatch(r"(.+)@[0-9a-f]{40}", reference) for reference in references]
        return list(dict.fromkeys(match[1] for match in matches if match))

    @property
    def is_merge(self) -> bool:
        """Whether it is a merge, or has an input that was made of other models."""
        return self.provenance.verb in ("merge", "interpolate") or any(
            model.made_of for model in self.provenance.inputs
        )


def render_card(subject: Subject, template: Path | None = None) -> str:
    """Render the text of README.md.

    Args:
        subject: model it is about.
        template: Jinja2 template, instead of ours; `publishing/templates/card.md.j2` lists its variables.

    Raises:
        OptionError: the template cannot be read or rendered.
    """
    use = describe_usage(subject.checkpoint, subject.repository, subject.revision)
    head = yaml.safe_dump(card_metadata(subject, use), sort_keys=False, allow_unicode=True)
    try:
        body = _load_template(template).render(
            subject=subject,
            name=subject.repository.rpartition("/")[2],
            provenance=subject.provenance,
            report=subject.report,
            pair=subject.pair,
            merged=subject.merged,
            licence=subject.licence,
            usage=use,
            table=_measurement_table(subject.pair),
            images=subject.images,
            recipe=_recipe_text(subject),
            sentence=_sentence(subject.provenance),
            limits=list_limits(subject),
        )
    except Exception as error:  # a user's template may raise anything
        where = "" if template is None else f"{template}: "
        raise OptionError(f"{where}the template of the card cannot be rendered: {error}") from error
    return f"---\n{head}---\n\n{GENERATED}\n\n{body.strip()}\n"


def write_card(folder: Path, provenance: Provenance, name: str, report: Report | None = None) -> None:
    """Write the card of a model that is not published yet into its folder.

    Args:
        folder: folder of the model, with everything else in it.
        provenance: record of how it was made.
        name: name that the folder has in the end.
        report: measurements; None if nothing was measured.
    """
    subject = Subject(
        repository=name.encode(errors="replace").decode(),  # names of files need not be text
        checkpoint=Checkpoint.open(folder),
        provenance=provenance,
        licence=merged_licence(provenance.licences),
        report=report,
    )
    write_atomically(folder / CARD, render_card(subject).encode())


def card_metadata(subject: Subject, use: Usage) -> dict[str, Any]:
    """Return the metadata at the head of a card, in the Hub's format."""
    from huggingface_hub import EvalResult, ModelCardData

    evaluation = subject.provenance.recipe.get("evaluate") or {}
    licence = subject.licence.licence
    values = _measured_values(subject.merged)
    results = [
        EvalResult(
            task_type=use.task,
            dataset_type=evaluation["dataset"],
            dataset_name=evaluation["dataset"],
            dataset_config=evaluation.get("name"),
            dataset_split=evaluation.get("split"),
            dataset_revision=evaluation.get("revision"),
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in values
        if "dataset" in evaluation and use.task
    ]
    data = ModelCardData(
        base_model=subject.base_models or None,
        base_model_relation="merge" if subject.is_merge and subject.base_models else None,
        library_name="transformers",
        license=licence.licence if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        pipeline_tag=use.task or None,
        tags=["merge", "rebasin"] if subject.is_merge else ["rebasin"],
        metrics=[name for name, _ in values] or None,
        model_name=subject.repository.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return {key: value for key, value in data.to_dict().items() if value is not None}


def _measured_values(row: TableRow | None) -> list[tuple[str, float]]:
    if row is None or row.loss is None:
        return []
    return [("loss", float(row.loss)), *((name, float(value)) for name, value in row.metrics.items())]


def _measurement_table(pair: Pair | None) -> list[list[str]]:
    """Return the table of the report, with the ends, the controls and the merges."""
    if pair is None or not pair.rows:
        return []
    columns = [column for column in table_columns(pair) if column.title != "seconds"]
    lines = [["", *(column.title for column in columns), "looked at"]]
    for i, row in enumerate([*pair.ends, *pair.rows]):
        data = "" if i < len(pair.ends) else row.consumed + " (control)" * row.control
        lines.append([row.name, *(column.cells[i] for column in columns), data])
    return lines


def _recipe_text(subject: Subject) -> str:
    """Return the recipe as it is stored next to the weights, else the settings of the verb."""
    file = (subject.checkpoint.folder or Path()) / RECIPE
    if subject.provenance.verb == "merge" and file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        return "\n".join(line for line in lines if not line.startswith("# hf-rebasin")).strip()
    settings = {key: value for key, value in subject.provenance.recipe.items() if value not in (None, {}, [])}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip() if settings else ""


def _sentence(provenance: Provenance) -> str:
    """Describe in one sentence how a model was made."""
    if provenance.verb == "merge" and not provenance.recipe.get("align"):
        return f"A merge of {len(provenance.inputs)} models as they are."
    return SENTENCES[provenance.verb].format(count=len(provenance.inputs))


def list_limits(subject: Subject) -> list[str]:
    """List the limitations of a model, as sentences."""
    sentences = []
    row, inputs = subject.merged, subject.provenance.inputs
    if row is None:
        sentences.append("Nothing was measured on this model: how good it is is not known.")
    else:
        sentences.append(
            "It was measured on the data named above and on nothing else. What its inputs were trained on, and what "
            "they get wrong, is said in their own cards, and holds for it, too."
        )
    if subject.report is not None and subject.report.verdict.kind == "control":
        sentences.append(
            "A control that was made without aligning does as well or better on these data; see the table."
        )
    local = [model.name for model in inputs if model.commit is None]
    if local:
        sentences.append(
            f"{', '.join(local)}: not on the Hub, so nobody without {'it' if len(local) == 1 else 'them'} can make "
            "this model again."
        )
    sentences += subject.provenance.notes
    return sentences


def _load_template(path: Path | None, ours: str = "card.md.j2") -> Any:
    markdown = load_templates(__package__, keep_trailing_newline=True, autoescape=False)  # the Hub sanitises it
    markdown.filters.update(row=_markdown_row, is_weights=is_weights, shell=shlex.quote)
    markdown.globals.update(NONE=MISSING)
    if path is None:
        return markdown.get_template(ours)
    return markdown.from_string(path.read_text(encoding="utf-8"))


def _markdown_row(cells: list[object]) -> str:
    """Format a row of a Markdown table, with the bars in its cells escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def render_alignment_card(alignment: Alignment, repository: str, licence: str | None) -> str:
    """Render the card of an alignment that is published by itself."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(license=licence, tags=["rebasin", "alignment"], library_name="hf-rebasin")
    head = {key: value for key, value in data.to_dict().items() if value is not None}
    groups = dict.fromkeys(symmetry.kind for symmetry in alignment.spec.symmetries.values())
    body = _load_template(None, "alignment.md.j2").render(
        name=repository.rpartition("/")[2],
        repository=repository,
        alignment=alignment,
        groups=", ".join(groups),
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{GENERATED}\n\n{body.strip()}\n"
