"""Assess a merge: measure it and its controls on held-out data, and report what was moved.

There are always controls if there are data: the same merge of the models as they are, and that merge refitted (or
repaired, if the recipe says so). If a merge does not beat them, the verdict says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import cast

import torch
import yaml
from torch import Tensor, nn

from ..alignment.exactness import compute_outputs
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.provenance import package_versions
from ..data.batches import Batches
from ..errors import MismatchError
from ..evaluation.interpolation import interpolate
from ..evaluation.metrics import evaluate
from ..merging.recalibration import has_statistics, recalibrate
from ..modules.forward import evaluation_mode, example_inputs
from ..modules.functional import Device, move_batch
from ..reports.measurements import Consumed, Exactness, Likeness, Line, Moved, TableRow, with_excess
from ..reports.pairs import Pair
from ..reports.report import Report
from ..solving.problem import matched_tensors
from ..solving.solution import Clock, Solution
from ..symmetries.table import canonical_view
from ..text import family_of, layer_name
from .mistakes import fits_whole_models
from .recipe import Recipe, RefitSettings
from .runner import MergeResult, OpenedRecipe, describe_finishing, merge_models, solvers_with_data

REPORTED_PACKAGES = ("hf_rebasin", "torch", "transformers", "datasets", "numpy", "scipy")
RESULT_NAMES = {"linear": "average", "lerp": "average"}  # names for the results of merge methods


def assess(
    recipe: Recipe,
    result: MergeResult,
    saved: Checkpoint,
    *,
    created: str = "",
    command: str = "",
    device: Device = None,
    progress: bool = False,
) -> Report:
    """Measure the result of a recipe and its controls, and return the report.

    Args:
        recipe: the recipe; if it names no data to measure on, the report only says what was moved.
        result: result of running the recipe.
        saved: the merge as it was written, which is measured.
        created: date that the report states.
        command: command that repeats the run.
        device: device of the computation.
        progress: show progress bars.
    """
    first, *others = result.models
    assessor = _Assessor(recipe=recipe, result=result, device=device, progress=progress)
    (rows_by_role, result_row), ends, lines = assessor.rows(saved), assessor.ends(), assessor.lines()
    barriers = {line.role: line.barrier for line in lines}
    rows = [replace(row, barrier=barriers.get(role)) for role, row in rows_by_role]
    pair = Pair(
        fixed=first.name,
        moving=", ".join(other.name for other in others),
        ends=tuple(ends),
        rows=with_excess(ends, rows),
        result=result_row,
        lines=tuple(lines),
        likeness=assessor.likeness(),
        moved=tuple(moved_families(result.solutions)),
        exactness=assessor.exactness(saved, ends) if result.solutions else None,
        seconds={**result.seconds, **assessor.clock.seconds},
        status="; ".join(dict.fromkeys(solution.status.value for solution in result.solutions)),
        notes=result.notes,
        architecture="" if first.config is None else type(first.config).__name__.removesuffix("Config"),
    )
    settings = recipe.model_dump(mode="json", exclude_defaults=True)
    return Report(
        title=f"{pair.fixed} and {pair.moving}",
        pairs=(pair,),
        recipe=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        data=describe_data(result.opened),
        versions=dict(package_versions(REPORTED_PACKAGES)),
        command=command,
        created=created,
    )


def describe_data(opened: OpenedRecipe, pin: Callable[[Batches], Batches] = lambda batches: batches) -> str:
    """Describe in a line the data that a merge was measured on, and those that were used to make it."""
    data = {"": opened.evaluation, "looked at while merging: ": opened.data}
    return "; ".join(f"{use}{pin(batches).describe()}" for use, batches in data.items() if batches is not None)


@dataclass(frozen=True, kw_only=True)
class _Assessor:
    """Measurements of the merged models, of the merge and of its controls."""

    recipe: Recipe
    result: MergeResult
    device: Device
    progress: bool
    clock: Clock = field(default_factory=Clock)

    def measure(self, checkpoint: Checkpoint, row: TableRow) -> TableRow:
        """Fill in the loss and the metrics of a model in its row, if there are data to measure on."""
        evaluation = self.result.opened.evaluation
        if evaluation is None or self.recipe.evaluate is None:
            return row
        with self.clock("evaluating"):
            module: nn.Module = checkpoint.model().to(self.device)
            scores = evaluate(module, evaluation, metrics=self.recipe.evaluate.metrics, progress=self.progress)
        return replace(row, loss=scores.loss, metrics=dict(scores.metrics))

    def ends(self) -> list[TableRow]:
        """Measure the models that were merged; with `backbone_only` only the first one, as the heads differ."""
        opened = self.result.opened
        if opened.evaluation is None:
            return []
        models = [opened.models[0], *opened.matched]  # their labels are in the order of the first one's
        measured = models[:1] if self.recipe.backbone_only else models
        return [self.measure(model, TableRow(m.name)) for model, m in zip(measured, opened.models, strict=False)]

    def rows(self, saved: Checkpoint) -> tuple[list[tuple[str, TableRow]], str]:
        """Measure the merge and its controls.

        Returns:
            (role, row) of each, and the name of the row of the merge.
        """
        if self.result.opened.evaluation is None:
            return [], ""
        plain, finished = _without_finishing(self.recipe), self.recipe
        with_data = self.result.opened.data is not None
        if finished == plain:
            finished = plain.model_copy(update={"refit": RefitSettings()})
        finishing = describe_finishing(finished)
        name = RESULT_NAMES.get(plain.merge_method, plain.merge_method)
        unmoved = [self.result.models[0], *self.result.opened.matched]
        controls = [("plain", plain, TableRow(f"plain {name}", control=True))]
        if with_data:
            row = TableRow(f"plain {name}, {finishing}", consumed="unlabelled inputs", control=True)
            controls.append(("control", finished, row))
        was_aligned = bool(self.result.solutions)
        rows = [
            (role, self.merge_and_measure(recipe, unmoved, row))
            if was_aligned or recipe != self.recipe
            else (role, self.measure(saved, row))
            for role, recipe, row in controls
        ]
        if not was_aligned:  # the merge is one of the controls
            return rows, next((row.name for _, recipe, row in controls if recipe == self.recipe), "")
        consumed = _consumed_by_alignment(self.recipe, self.result.opened.data)
        aligned = [self.result.models[0], *self.result.moved]
        if self.recipe == plain:
            last = ("aligned", self.measure(saved, TableRow(f"aligned {name}", consumed)))
            return [*rows, last], last[1].name
        rows.append(("aligned", self.merge_and_measure(plain, aligned, TableRow(f"aligned {name}", consumed))))
        consumed_by_both: Consumed = "unlabelled inputs" if consumed == "nothing" else consumed
        last = ("refit", self.measure(saved, TableRow(f"aligned {name}, {finishing}", consumed_by_both)))
        return [*rows, last], last[1].name

    def merge_and_measure(self, recipe: Recipe, models: Sequence[Checkpoint], row: TableRow) -> TableRow:
        """Make another merge, and fill in its row."""
        clock, data = Clock(), self.result.opened.data
        merged = merge_models(recipe, models, data, clock, device=self.device, progress=self.progress)
        self.clock.seconds["controls"] = self.clock.seconds.get("controls", 0.0) + sum(clock.seconds.values())
        return self.measure(merged, row)

    def lines(self) -> list[Line]:
        """Measure the curves from the first model to the second, as it is and as it was moved."""
        evaluate_on, evaluation = self.recipe.evaluate, self.result.opened.evaluation
        if evaluation is None or evaluate_on is None or not evaluate_on.points or len(self.result.models) != 2:
            return []
        if self.recipe.backbone_only:  # the second model has no head for these data
            return []
        (first, _), (other,), data = self.result.models, self.result.opened.matched, self.result.opened.data
        recalibrates = data is not None and self.recipe.recalibrate is not None and has_statistics(first)
        ends = [("plain", other), *(("aligned", moved) for moved in self.result.moved if self.result.solutions)]
        lines = []
        with self.clock("interpolating"):
            for role, end in ends:
                curve = interpolate(
                    first,
                    end,
                    partial(evaluate, data=evaluation, metrics=evaluate_on.metrics),
                    points=evaluate_on.points,
                    prepare=partial(recalibrate, batches=data, device=self.device) if recalibrates and data else None,
                    device=self.device,
                    progress=self.progress,
                )
                lines.append(Line(role, role, at=curve.at, loss=curve.loss, metrics=dict(curve.metrics)))
        return lines

    def likeness(self) -> tuple[Likeness, ...]:
        """Compare the weights of two models, before the second was moved and after; with more models, nothing."""
        if len(self.result.solutions) != 1:
            return ()
        (solution,), (moved,), opened = self.result.solutions, self.result.moved, self.result.opened
        return tuple(weight_similarities(solution, opened.models[0], opened.matched[0], moved))

    def exactness(self, saved: Checkpoint, ends: Sequence[TableRow]) -> Exactness:
        """Check that the moved model computes what it did, and that the merge has the tensors of the first model."""
        first, (before, *_), (after, *_) = self.result.models[0], self.result.opened.matched, self.result.moved
        expected = {key: (part.shape, part.dtype) for key, part in first.parts.items()}
        written = {key: (part.shape, part.dtype) for key, part in saved.parts.items()}
        common = expected.keys() & written.keys()
        exactness = Exactness(
            keys=expected.keys() == written.keys(),
            shapes=all(expected[key][0] == written[key][0] for key in common),
            dtypes=self.recipe.result_dtype is None and all(expected[key][1] == written[key][1] for key in common),
        )
        if self.recipe.backbone_only:
            return exactness
        batch = self._inputs(before)
        if batch is None:
            return exactness
        results = []
        for checkpoint in (before, after):
            module: nn.Module = checkpoint.model(checkpoint.compute_dtype)
            with evaluation_mode(module):
                results.append(compute_outputs(module, batch)[0])
        return replace(
            exactness,
            difference=(results[0] - results[1]).abs().max().item(),
            before=ends[1].loss if ends else None,
            after=self.measure(after, TableRow("")).loss,
            dtype=_dtype_name(before.compute_dtype),
        )

    def _inputs(self, checkpoint: Checkpoint) -> Mapping[str, Tensor] | None:
        """Return a batch of the data, or random inputs; None if no inputs are known for the model."""
        for data in (self.result.opened.evaluation, self.result.opened.data):
            if data is not None:
                (batch,) = islice(iter(data), 1)
                inputs = {name: x for name, x in batch.items() if name != "labels"}
                return cast("Mapping[str, Tensor]", move_batch(inputs, None, checkpoint.compute_dtype))
        try:
            examples = example_inputs(checkpoint.config, torch.Generator().manual_seed(0))
        except MismatchError:
            return None
        return {name: x.to(checkpoint.compute_dtype) if x.is_floating_point() else x for name, x in examples.items()}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _without_finishing(recipe: Recipe) -> Recipe:
    """Return a recipe that merges and recomputes BatchNorm statistics, but fits and repairs nothing."""
    update: dict[str, object] = {"refit": None, "recalibrate": recipe.recalibrate and "statistics"}
    if fits_whole_models(recipe.merge_method):
        weights = {name: value for name, value in recipe.parameters.items() if name == "weights"}
        update |= {"merge_method": "linear", "parameters": weights}
    return recipe.model_copy(update=update)


def _consumed_by_alignment(recipe: Recipe, data: Batches | None) -> Consumed:
    """Return what the alignment used of the data."""
    solvers = solvers_with_data(recipe)
    if data is None or not solvers:
        return "nothing"
    unlabelled = all(solver.data == "required" for solver in solvers)
    return "unlabelled inputs" if unlabelled or not data.labelled else "labels"


def moved_families(solutions: Sequence[Solution]) -> Iterator[Moved]:
    """Count the symmetries of all solutions, and how many were moved, by family."""
    families: dict[tuple[str, str, int], list[bool]] = {}
    for solution in solutions:
        alignment = solution.alignment
        for name, element in alignment.elements.items():
            symmetry = alignment.spec.symmetries[name]
            key = (family_of(name), family_of(symmetry.group), symmetry.size)
            families.setdefault(key, []).append(not element.is_identity())
    for (family, group, size), moved in families.items():
        yield Moved(family=family, group=group, count=len(moved), size=size, moved=sum(moved))


def weight_similarities(
    solution: Solution, fixed: Checkpoint, before: Checkpoint, after: Checkpoint
) -> Iterator[Likeness]:
    """Compute cosines between the weights of two models, before the second was moved and after.

    There is a value for every symmetry of a family; for a family of one, such as the residual stream, for every layer.
    """
    spec = solution.alignment.spec
    states = [canonical_view(checkpoint, spec.table).state for checkpoint in (fixed, before, after)]
    sums: dict[tuple[str, str], Tensor] = {}
    for tensor in matched_tensors(spec):
        if not all(key in state for key in tensor.keys.values() for state in states):
            continue
        a, *pair = (tensor.gather(state).double().reshape(-1) for state in states)
        products = torch.stack([torch.stack([a @ b, a @ a, b @ b]) for b in pair])
        for name in tensor.names & spec.free:
            for label in (name, layer_name(tensor.key)):
                key = (name, label)
                sums[key] = sums[key] + products if key in sums else products
    families: dict[str, list[str]] = {}
    for name in spec.symmetries:
        if (name, name) in sums:
            families.setdefault(family_of(name), []).append(name)
    for family, names in families.items():
        keys = [(name, name) for name in names] if len(names) > 1 else [k for k in sums if k[0] == names[0] != k[1]]
        yield Likeness(family, tuple((label, *_cosines(sums[name, label])) for name, label in keys))


def _cosines(sums: Tensor) -> tuple[float, float]:
    """Return the cosines before and after, from ⟨a, b⟩, ‖a‖², ‖b‖² of each."""
    before, after = (float(dot / (x * y).sqrt()) if x * y > 0 else 0.0 for dot, x, y in sums)
    return before, after
