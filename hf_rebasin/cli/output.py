"""Describe solutions, plans, measurements, comparisons and symmetries as lines of text for the command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..errors import RebasinError
from ..evaluation.barrier import Curve
from ..evaluation.comparison import Comparison, Standing, Verdict
from ..evaluation.metrics import Measured
from ..publishing.upload import Published, plan_publishing, refuse_unlicensed
from ..publishing.verification import Verification
from ..recipes.plan import make_plan
from ..recipes.recipe import Recipe
from ..recipes.runner import decide_alignment, open_models
from ..reports.report import Report
from ..solving.solution import Solution
from ..symmetries.spec import Spec
from ..text import byte_size, columns, family_of, spread, without_advice

COMPARED_LAYERS = 14  # layers of a comparison that are shown, the first and last among them


def describe_solution(solution: Solution, model: str) -> Iterator[str]:
    """Describe the solution of an alignment."""
    moved, total = len(solution.alignment.moved), len(solution.alignment.elements)
    seconds = sum(solution.seconds.values())
    gain = f", objective {solution.history[0]:.5g} → {solution.objective:.5g}" if solution.history else ""
    yield f"aligned {model}: {moved} of {total} symmetries moved{gain}, {seconds:.0f} s"
    yield f"  {solution.status.value}"
    for note in solution.notes:
        yield f"  {note}"


def describe_plan(recipe: Recipe, out: Path) -> Iterator[str]:
    """Describe what a merge would do and need, after all checks that it makes before it writes; see `make_plan`."""
    to = recipe.publish
    publishing = [] if to is None else [plan_publishing(to, recipe.evaluate is not None, recipe.align is not None)]
    plan = make_plan(recipe, out, licence=None if to is None else to.license, publishing=publishing)
    if to is not None:
        refuse_unlicensed(plan.licence)
    table = [("model", "commit", "tensors", "size", "to download")]
    for model in plan.models:
        missing = "nothing, it is local" if not model.to_download else byte_size(model.to_download)
        table.append((model.name, (model.commit or "")[:12], str(model.tensors), byte_size(model.size), missing))
    yield from columns(table, right=(2,))
    if remote := [model.name for model in plan.models if not model.is_local]:
        yield f"{', '.join(remote)}: checked for NaN and Inf while merging, once the values are downloaded"
    if plan.alignment is not None:
        yield f"would align {', '.join(plan.alignment.models)} to {plan.models[0].name} by {plan.alignment.solver}:"
        for line in (*plan.alignment.notes, *describe_symmetries(plan.alignment.spec, every=False)):
            yield f"  {line}"
        if plan.alignment.untied:
            untied = plan.alignment.untied
            yield f"  unless they have the same base: {untied} (--keep-tied permutes that stream instead)"
    for use, data in plan.data.items():
        yield f"would {use} {data}"
    for remark in plan.remarks:
        yield f"note: {remark}"
    free = "" if plan.memory_free is None else f", {byte_size(plan.memory_free)} are free now"
    yield f"memory: about {byte_size(plan.memory)} at the peak{free}"
    yield f"disk: at most {byte_size(plan.size)} for the merge, {byte_size(plan.disk_free)} are free there"
    yield f"licence: {plan.licence.text}"
    first = plan.models[0].name
    count = len(plan.models) - len({entry.base for entry in recipe.in_order() if entry.base is not None})
    merged = f"the differences of {count - 1} models from {first}" if recipe.merges_differences else f"{count} models"
    yield (
        f"would merge {merged} by {recipe.merge_method} to {out}/, with the keys, the configuration and the tokenizer "
        f"of {first}"
    )
    yield from plan.publishing


def describe_report(report: Report) -> Iterator[str]:
    """Describe the rows of a report, and its verdict."""
    for pair in report.pairs:
        measured = [*pair.ends, *pair.rows]
        if measured:
            names = list(dict.fromkeys(name for row in measured for name in row.metrics))
            table = [("", "loss", *names, "excess", "÷ plain", "barrier", "looked at")]
            for row in measured:
                numbers = [row.loss, *(row.metrics.get(name) for name in names), row.excess, row.ratio, row.barrier]
                cells = ["" if number is None else f"{number:.4g}" for number in numbers]
                consumed = "" if row in pair.ends else f"{row.consumed}{' (control)' * row.control}"
                table.append((row.name, *cells, consumed))
            yield ""
            yield from columns(table, right=range(1, len(table[0]) - 1))
    yield f"\nverdict: {report.verdict.text}"


def describe_publication(published: Published, dry_run: bool = False) -> Iterator[str]:
    """Describe what was sent to the Hub; in a dry run, what would be sent, with the card."""
    if dry_run:
        yield from published.card.splitlines()
        yield f"\nwould publish to {published.repository}: {', '.join([*published.files, 'README.md'])}"
        if published.deleted:
            yield f"would delete there, as it would be loaded with this model: {', '.join(published.deleted)}"
        return
    yield f"{'published' if published.changed else 'nothing has changed'}: {published.url}"


def describe_verification(verification: Verification) -> Iterator[str]:
    """Describe the checks of a folder: one line for each kind that holds, and one for every check that fails."""
    yield from verification.notes
    held: dict[str, list[str]] = {}
    for finding in verification.findings:
        if finding.holds:
            held.setdefault(finding.kind, []).append(finding.what)
        else:
            yield f"WRONG: {finding}"
    for kind, names in held.items():
        yield f"{kind}: {', '.join(names)}"
    number = sum(map(len, held.values()))
    total = len(verification.findings)
    yield f"{verification.name}: {'all' if verification.holds else f'{number} of'} {total} checks hold"


def describe_measurements(measurements: Mapping[str, Measured], as_json: bool) -> Iterator[str]:
    """Describe the losses and metrics of models."""
    if as_json:
        yield json.dumps({name: asdict(scores) for name, scores in measurements.items()}, indent=1)
        return
    names = list(dict.fromkeys(name for scores in measurements.values() for name in scores.metrics))
    table = [("model", "loss", *names, "labels")]
    for model, scores in measurements.items():
        metrics = (f"{scores.metrics[name]:.4f}" for name in names)
        table.append((model, f"{scores.loss:.4f}", *metrics, str(scores.samples)))
    yield from columns(table, right=range(1, len(table[0])))


def describe_curve(curve: Curve, as_json: bool) -> Iterator[str]:
    """Describe the losses and metrics along a line."""
    if as_json:
        summary = {"barrier": curve.barrier, "area": curve.area, "best": curve.best}
        yield json.dumps({**asdict(curve), **summary}, indent=1)
        return
    table = [("λ", "loss", *curve.metrics)]
    for i, (t, loss) in enumerate(zip(curve.at, curve.loss, strict=True)):
        table.append((f"{t:.3g}", f"{loss:.4f}", *(f"{values[i]:.4f}" for values in curve.metrics.values())))
    yield from columns(table, right=range(len(table[0])))
    yield f"\nbarrier {curve.barrier:.4f}, area {curve.area:.4f}, lowest loss at λ = {curve.best:.3g}"


def describe_comparison(a: Checkpoint, b: Checkpoint, comparison: Comparison) -> Iterator[str]:
    """Describe a comparison of two models on one screen."""
    yield from columns([("A", a.name, describe_size(a)), ("B", b.name, describe_size(b))])
    yield ""
    yield from columns(list(comparison.findings.items()))
    if comparison.parts:
        rows = [("weights", "‖A − B‖ ÷ ‖A‖", "cosine", "numbers")]
        layers = spread(list(comparison.parts.items()), COMPARED_LAYERS)
        for name, nearness in (*layers, ("all matrices", comparison.whole)):
            if nearness is not None:
                rows.append((name, f"{nearness.distance:.3g}", f"{nearness.cosine:.3f}", f"{nearness.elements:,}"))
        yield ""
        yield from columns(rows, right=(1, 2, 3))
    if comparison.standings:
        families: dict[str, list[Standing]] = {}
        for name, standing in comparison.standings.items():
            families.setdefault(family_of(name), []).append(standing)
        table = [("symmetry", "compared", "units", "best in place", "by chance", "identity ÷ best")]
        for name, standings in families.items():
            units, own, chance = (sum(getattr(s, field) for s in standings) for field in ("units", "own", "chance"))
            ratio = f"{sum(s.ratio for s in standings) / len(standings):.2f}"
            table.append((name, str(len(standings)), str(units), f"{own / units:.0%}", f"{chance / units:.0%}", ratio))
        yield ""
        yield from columns(table, right=(1, 2, 3, 4, 5))
    yield f"\nverdict: {comparison.advice}"
    if comparison.verdict is Verdict.EQUAL:
        return
    align = comparison.alignable and comparison.verdict is not Verdict.SAME_BASE
    merging = _advise_merge(a, b, comparison, align)
    if comparison.verdict is Verdict.DIFFERENT:  # the verdict says why already
        advice = merging.removeprefix(without_advice(merging))
        merging = f"a merge is refused{advice}" if advice else ""
    if merging:
        yield f"         {merging}"


def _advise_merge(a: Checkpoint, b: Checkpoint, comparison: Comparison, align: bool) -> str:
    """Return the command that merges two models, or why it would be refused."""
    settings = {"align": align, "backbone_only": comparison.backbone_only, "vocabulary": comparison.vocabulary}
    try:
        recipe = Recipe.from_dict({"models": [a.name, b.name], **settings}, name="the command")
        opened = open_models(recipe, values=False)
        if align:
            decide_alignment(recipe, opened)
    except RebasinError as error:
        return f"a merge is refused: {error}"
    options = [
        *(["--backbone-only"] if comparison.backbone_only else []),
        *([] if comparison.vocabulary is None else ["--vocabulary", comparison.vocabulary]),
        *([] if align else ["--no-align"]),
    ]
    return shlex.join(["hf-rebasin", "merge", a.name, b.name, "-o", "merged", *options])


def describe_symmetries(spec: Spec, every: bool) -> Iterator[str]:
    """Describe symmetries in a table, with one line per family (`ff.0`, `ff.1`, …) unless `every` one is asked for."""
    families = spec.families()
    if every:
        families = {
            (name, symmetry.group if symmetry.moves else "held", symmetry.size): [name]
            for name, symmetry in spec.symmetries.items()
        }
    rows = [("symmetry", "group", "size", "count", "tensors each", "example")]
    for (family, group, size), names in families.items():
        tensors = [t for t in spec.tensors if names[0] in t.names]
        rows.append((family, group, str(size), str(len(names)), str(len(tensors)), tensors[0].key))
    yield from columns(rows, right=(2, 3, 4))
    for name, reason in spec.table.reasons.items():
        if name in spec.free:
            yield f"{name} is only permuted: {reason}"


def describe_held_axes(spec: Spec) -> Iterator[str]:
    """Describe in a table why axes are held, with one line per reason."""
    reasons: dict[str, list[str]] = {}
    for key, axes in spec.pins.items():
        for reason in axes:
            if reason is not None:
                reasons.setdefault(family_of(reason), []).append(key)
    if not reasons:
        return
    rows = [("held because of", "axes", "example")]
    rows += [(reason, str(len(keys)), keys[0]) for reason, keys in reasons.items()]
    yield ""
    yield from columns(rows, right=(1,))


def describe_size(checkpoint: Checkpoint) -> str:
    """Return the number and size of the tensors of a model: `147 tensors, 1.0 GB, and 2 in 2_Dense`."""
    size = f"{len(checkpoint.parts)} tensors, {byte_size(sum(part.nbytes for part in checkpoint.parts.values()))}"
    return size + "".join(f", and {len(sub.parts)} in {path}" for path, sub in checkpoint.submodels.items())
