"""What the command line shows: solutions, plans, comparisons and symmetries as lines of text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..evaluation.comparison import Comparison, Standing, Verdict
from ..evaluation.interpolation import Curve
from ..evaluation.metrics import Measured
from ..publishing.upload import Published, planned_publishing, refuse_unlicensed
from ..publishing.verification import Verification
from ..recipes.plan import planned
from ..recipes.recipe import Recipe
from ..reports.report import Report
from ..solving.solution import Solution
from ..symmetries.spec import Spec
from ..text import columns, family_of, spread

PARTS = 14  # so many layers of a comparison are shown, first and last among them


def solved(solution: Solution, model: str) -> Iterator[str]:
    """What an alignment came to."""
    moved, of = len(solution.alignment.moved), len(solution.alignment.elements)
    seconds = sum(solution.seconds.values())
    gain = f", objective {solution.history[0]:.5g} → {solution.objective:.5g}" if solution.history else ""
    yield f"aligned {model}: {moved} of {of} symmetries moved{gain}, {seconds:.0f} s"
    yield f"  {solution.status.value}"
    for note in solution.notes:
        yield f"  {note}"


def plan(recipe: Recipe, out: Path) -> Iterator[str]:
    """What a merge would do and take, after every check that it would make before it writes; see `planned`."""
    to = recipe.publish
    publishing = [] if to is None else [planned_publishing(to, recipe.evaluate is not None, recipe.align is not None)]
    found = planned(recipe, out, licence=None if to is None else to.license, publishing=publishing)
    if to is not None:
        refuse_unlicensed(found.licence)
    table = [("model", "commit", "tensors", "size", "to download")]
    for one in found.models:
        missing = "nothing, it is here" if not one.to_download else amount(one.to_download)
        table.append((one.name, (one.commit or "")[:12], str(one.tensors), amount(one.size), missing))
    yield from columns(table, right=(2,))
    if elsewhere := [one.name for one in found.models if not one.here]:
        yield f"NaN and Inf in {', '.join(elsewhere)} are looked for while merging, when the values are here"
    if found.moves is not None:
        others = ", ".join(one.name for one in found.models[1:])
        yield f"would align {others} to {found.models[0].name} by {found.moves.solver}:"
        for line in (*found.moves.notes, *symmetries(found.moves.spec, every=False)):
            yield f"  {line}"
        if found.moves.apart:
            yield f"  if the two are not of one base: {found.moves.apart} (--keep-tied permutes that stream instead)"
    for what, data in found.looks.items():
        yield f"would {what} {data}"
    free = "" if found.memory_free is None else f", {amount(found.memory_free)} are free now"
    yield f"memory: about {amount(found.memory)} at the peak{free}"
    yield f"disk: at most {amount(found.size)} for the merge, {amount(found.disk_free)} are free there"
    yield f"licence: {found.licence.text}"
    yield (
        f"would merge {len(found.models)} models by {recipe.merge_method} to {out}/, with the keys, the configuration "
        f"and the tokenizer of {found.models[0].name}"
    )
    yield from found.publishing


def judged(report: Report) -> Iterator[str]:
    """The rows of a report, and its verdict."""
    for pair in report.pairs:
        measured = [*pair.ends, *pair.rows]
        if measured:
            names = list(dict.fromkeys(name for row in measured for name in row.metrics))
            table = [("", "loss", *names, "excess", "÷ plain", "barrier", "looked at")]
            for row in measured:
                numbers = [row.loss, *(row.metrics.get(name) for name in names), row.excess, row.ratio, row.barrier]
                shown = ["" if number is None else f"{number:.4g}" for number in numbers]
                looked = "" if row in pair.ends else f"{row.consumed}{' (control)' * row.control}"
                table.append((row.name, *shown, looked))
            yield ""
            yield from columns(table, right=range(1, len(table[0]) - 1))
    yield f"\nverdict: {report.verdict.text}"


def published(found: Published, dry_run: bool = False) -> Iterator[str]:
    """What was sent to the Hub, or would be, with the card."""
    if dry_run:
        yield from found.card.splitlines()
        yield f"\nwould publish to {found.repository}: {', '.join([*found.files, 'README.md'])}"
        if found.deleted:
            yield f"would delete there, as it would be loaded with this model: {', '.join(found.deleted)}"
        return
    yield f"{'published' if found.changed else 'nothing has changed'}: {found.url}"


def verified(found: Verification) -> Iterator[str]:
    """What looking at a folder came to; what holds in one line for each kind, what does not in one each."""
    yield from found.notes
    held: dict[str, list[str]] = {}
    for finding in found.findings:
        if finding.holds:
            held.setdefault(finding.kind, []).append(finding.what)
        else:
            yield f"WRONG: {finding}"
    for kind, names in held.items():
        yield f"{kind}: {', '.join(names)}"
    number = sum(map(len, held.values()))
    yield f"{found.name}: {'all' if found.holds else f'{number} of'} {len(found.findings)} checks hold"


def measured(found: Mapping[str, Measured], as_json: bool) -> Iterator[str]:
    """Losses and metrics of models."""
    if as_json:
        yield json.dumps({name: asdict(one) for name, one in found.items()}, indent=1)
        return
    names = list(dict.fromkeys(name for one in found.values() for name in one.metrics))
    table = [("model", "loss", *names, "labels")]
    for model, one in found.items():
        table.append((model, f"{one.loss:.4f}", *(f"{one.metrics[name]:.4f}" for name in names), str(one.samples)))
    yield from columns(table, right=range(1, len(table[0])))


def curve(line: Curve, as_json: bool) -> Iterator[str]:
    """What was measured along a line."""
    if as_json:
        said = {"barrier": line.barrier, "area": line.area, "best": line.best}
        yield json.dumps({**asdict(line), **said}, indent=1)
        return
    table = [("λ", "loss", *line.metrics)]
    for i, (t, loss) in enumerate(zip(line.at, line.loss, strict=True)):
        table.append((f"{t:.3g}", f"{loss:.4f}", *(f"{values[i]:.4f}" for values in line.metrics.values())))
    yield from columns(table, right=range(len(table[0])))
    yield f"\nbarrier {line.barrier:.4f}, area {line.area:.4f}, lowest loss at λ = {line.best:.3g}"


def side_by_side(a: Checkpoint, b: Checkpoint, comparison: Comparison) -> Iterator[str]:
    """A comparison on one screen."""
    yield from columns([("A", a.name, size(a)), ("B", b.name, size(b))])
    yield ""
    yield from columns(list(comparison.findings.items()))
    if comparison.parts:
        rows = [("weights", "‖A − B‖ ÷ ‖A‖", "cosine", "numbers")]
        for name, near in (*spread(list(comparison.parts.items()), PARTS), ("all matrices", comparison.whole)):
            if near is not None:
                rows.append((name, f"{near.distance:.3g}", f"{near.cosine:.3f}", f"{near.elements:,}"))
        yield ""
        yield from columns(rows, right=(1, 2, 3))
    if comparison.standings:
        families: dict[str, list[Standing]] = {}
        for name, standing in comparison.standings.items():
            families.setdefault(family_of(name), []).append(standing)
        table = [("symmetry", "looked at", "units", "best where they are", "by chance", "identity ÷ best")]
        for name, those in families.items():
            units, own, chance = (sum(getattr(s, what) for s in those) for what in ("units", "own", "chance"))
            worth = f"{sum(s.ratio for s in those) / len(those):.2f}"
            table.append((name, str(len(those)), str(units), f"{own / units:.0%}", f"{chance / units:.0%}", worth))
        yield ""
        yield from columns(table, right=(1, 2, 3, 4, 5))
    yield f"\nverdict: {comparison.advice}"
    command = f"hf-rebasin merge {a.name} {b.name} -o merged" + " --backbone-only" * comparison.backbone_only
    if comparison.verdict is Verdict.SAME_BASE:
        yield f"         {command} --no-align"
    elif comparison.verdict in (Verdict.TRAINED_APART, Verdict.BETWEEN):
        yield f"         {command}"


def symmetries(spec: Spec, every: bool) -> Iterator[str]:
    """The symmetries as a table, those of one family (`ff.0`, `ff.1`, …) in one line."""
    families: dict[tuple[str, str, str], list[str]] = {}
    for name, symmetry in spec.symmetries.items():
        family, group = name, symmetry.group
        if not every:
            family, group = family_of(name), family_of(symmetry.group)
        families.setdefault((family, group if symmetry.moves else "held", str(symmetry.size)), []).append(name)
    rows = [("symmetry", "group", "size", "how many", "tensors each", "such as")]
    for (family, group, n), names in families.items():
        tensors = [t for t in spec.tensors if names[0] in t.names]
        rows.append((family, group, n, str(len(names)), str(len(tensors)), tensors[0].key))
    yield from columns(rows, right=(2, 3, 4))
    for name, why in spec.table.reasons.items():
        if name in spec.free:
            yield f"{name} is only permuted: {why}"


def held(spec: Spec) -> Iterator[str]:
    """Why the axes that do not move are held, those of one reason in one line."""
    reasons: dict[str, list[str]] = {}
    for key, axes in spec.pins.items():
        for why in axes:
            if why is not None:
                reasons.setdefault(family_of(why), []).append(key)
    if not reasons:
        return
    rows = [("held because of", "axes", "such as")]
    rows += [(why, str(len(keys)), keys[0]) for why, keys in reasons.items()]
    yield ""
    yield from columns(rows, right=(1,))


def size(checkpoint: Checkpoint) -> str:
    """How many tensors, how large: `147 tensors, 1.0 GB`."""
    return f"{len(checkpoint.parts)} tensors, {amount(sum(part.nbytes for part in checkpoint.parts.values()))}"


def amount(total: int) -> str:
    """Bytes: `1.0 GB`."""
    unit, scale = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6) if total >= 1e6 else ("kB", 1e3)
    return f"{total / scale:.1f} {unit}"
