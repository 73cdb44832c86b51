"""A merge, judged: what it and the controls are worth on held-out data, and what was moved, as a report.

The controls are there whenever there are data: the same merge of the models as they are, and that merge refitted (or
repaired, if the recipe says so). What does not beat them was not worth the trouble, and the verdict says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import cast

import torch
import yaml
from torch import Tensor, nn

from ..alignment.exactness import outputs
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.provenance import versions
from ..data.batches import Batches
from ..errors import MismatchError
from ..evaluation.interpolation import interpolate
from ..evaluation.metrics import evaluate
from ..merging.recalibration import has_statistics, recalibrate
from ..modules.forward import evaluating, example_inputs
from ..modules.functional import Device, there
from ..reports.measurements import Consumed, Exactness, Likeness, Line, Moved, Row, with_excess
from ..reports.pairs import Pair
from ..reports.report import Report
from ..solving.problem import matched_tensors
from ..solving.solution import Clock, Solution
from ..text import family_of
from .recipe import Recipe, RefitSettings, finishes
from .runner import Merged, Opened, looking, merged, what_was_done

SHOWN = ("hf_rebasin", "torch", "transformers", "datasets", "numpy", "scipy")
AVERAGES = {"linear": "average", "lerp": "average"}  # what the result of a merge method is called


def judged(
    recipe: Recipe,
    result: Merged,
    saved: Checkpoint,
    *,
    created: str = "",
    command: str = "",
    device: Device = None,
    progress: bool = False,
) -> Report:
    """What a recipe came to.

    Args:
        recipe: says on what the merge is measured; if on nothing, the report says what was moved, and no more.
        result: of running it.
        saved: the merge as it was written; this is what is measured.
        created: a date.
        command: that does it again.
        device: where it is computed.
        progress: show progress bars.
    """
    first, *others = result.models
    judge = _Judge(recipe, result, device, progress)
    (made, result_row), ends, lines = judge.rows(saved), judge.ends(), judge.lines()
    barriers = {line.role: line.barrier for line in lines}
    rows = [replace(row, barrier=barriers.get(role)) for role, row in made]
    pair = Pair(
        fixed=first.name,
        moving=", ".join(other.name for other in others),
        ends=tuple(ends),
        rows=with_excess(ends, rows),
        result=result_row,
        lines=tuple(lines),
        likeness=judge.likeness(),
        moved=tuple(moved_in(result.solutions)),
        exactness=judge.exactness(saved, ends) if result.solutions else None,
        seconds={**result.seconds, **judge.clock.seconds},
        status="; ".join(dict.fromkeys(solution.status.value for solution in result.solutions)),
        notes=tuple(dict.fromkeys(note for solution in result.solutions for note in solution.notes)),
        architecture="" if first.config is None else type(first.config).__name__.removesuffix("Config"),
    )
    said = recipe.model_dump(mode="json", exclude_defaults=True)
    return Report(
        title=f"{pair.fixed} and {pair.moving}",
        pairs=(pair,),
        recipe=yaml.safe_dump(said, sort_keys=False, allow_unicode=True),
        data=looked_at(result.opened),
        versions=dict(versions(SHOWN)),
        command=command,
        created=created,
    )


def looked_at(found: Opened, settled: Callable[[Batches], Batches] = lambda batches: batches) -> str:
    """On what a merge was measured, and what was looked at while it was made, in a line."""
    looked = {"": found.evaluation, "looked at while merging: ": found.data}
    return "; ".join(f"{what}{settled(one).describe()}" for what, one in looked.items() if one is not None)


@dataclass(frozen=True)
class _Judge:
    """Measures models, those that were merged and those that might have been."""

    recipe: Recipe
    result: Merged
    device: Device
    progress: bool
    clock: Clock = field(default_factory=Clock)

    def measured(self, checkpoint: Checkpoint, row: Row) -> Row:
        """A row with the loss and the metrics of a model; as it is, where there is nothing to measure on."""
        evaluation = self.result.opened.evaluation
        if evaluation is None or self.recipe.evaluate is None:
            return row
        with self.clock("evaluating"):
            module: nn.Module = checkpoint.model().to(self.device)
            found = evaluate(module, evaluation, metrics=self.recipe.evaluate.metrics, progress=self.progress)
        return replace(row, loss=found.loss, metrics=dict(found.metrics))

    def ends(self) -> list[Row]:
        if self.result.opened.evaluation is None:
            return []
        found = self.result.opened
        models = [found.models[0], *found.lined]  # their labels are in the order of the first one's
        whole = models[:1] if self.recipe.backbone_only else models  # others have other heads
        return [self.measured(model, Row(named.name)) for model, named in zip(whole, found.models, strict=False)]

    def rows(self, saved: Checkpoint) -> tuple[list[tuple[str, Row]], str]:
        """(role, row) of the merge and of the controls, and the name of the merge's."""
        if self.result.opened.evaluation is None:
            return [], ""
        plain, finished = _unfinished(self.recipe), self.recipe
        with_data = self.result.opened.data is not None
        if finished == plain:
            finished = plain.model_copy(update={"refit": RefitSettings()})
        did = what_was_done(finished)
        what = AVERAGES.get(plain.merge_method, plain.merge_method)
        as_they_are = [self.result.models[0], *self.result.opened.lined]
        controls = [("plain", plain, Row(f"plain {what}", control=True))]
        if with_data:
            row = Row(f"plain {what}, {did}", consumed="unlabelled inputs", control=True)
            controls.append(("control", finished, row))
        aligned_at_all = bool(self.result.solutions)
        found = [
            (role, self.tried(recipe, as_they_are, row))
            if aligned_at_all or recipe != self.recipe
            else (role, self.measured(saved, row))
            for role, recipe, row in controls
        ]
        if not aligned_at_all:  # the merge is one of the controls
            return found, next((row.name for _, recipe, row in controls if recipe == self.recipe), "")
        consumed = _consumed(self.recipe, self.result.opened.data)
        aligned = [self.result.models[0], *self.result.moved]
        if self.recipe == plain:
            last = ("aligned", self.measured(saved, Row(f"aligned {what}", consumed)))
            return [*found, last], last[1].name
        found.append(("aligned", self.tried(plain, aligned, Row(f"aligned {what}", consumed))))
        more: Consumed = "unlabelled inputs" if consumed == "nothing" else consumed
        last = ("refit", self.measured(saved, Row(f"aligned {what}, {did}", more)))
        return [*found, last], last[1].name

    def tried(self, recipe: Recipe, models: Sequence[Checkpoint], row: Row) -> Row:
        """Another merge, made and measured."""
        clock = Clock()
        out = merged(recipe, models, self.result.opened.data, clock, device=self.device, progress=self.progress)
        self.clock.seconds["controls"] = self.clock.seconds.get("controls", 0.0) + sum(clock.seconds.values())
        return self.measured(out, row)

    def lines(self) -> list[Line]:
        """From the first model to the second, as it is and as it was moved."""
        evaluate_on, evaluation = self.recipe.evaluate, self.result.opened.evaluation
        if evaluation is None or evaluate_on is None or not evaluate_on.points or len(self.result.models) != 2:
            return []
        if self.recipe.backbone_only:  # the second model has no head on these data
            return []
        (first, _), (other,), data = self.result.models, self.result.opened.lined, self.result.opened.data
        renewed = data is not None and self.recipe.recalibrate is not None and has_statistics(first)
        ends = [("plain", other), *(("aligned", moved) for moved in self.result.moved if self.result.solutions)]
        lines = []
        with self.clock("interpolating"):
            for role, end in ends:
                curve = interpolate(
                    first,
                    end,
                    partial(evaluate, data=evaluation, metrics=evaluate_on.metrics),
                    points=evaluate_on.points,
                    prepare=partial(recalibrate, batches=data, device=self.device) if renewed and data else None,
                    device=self.device,
                    progress=self.progress,
                )
                lines.append(Line(role, role, curve.at, curve.loss, dict(curve.metrics)))
        return lines

    def likeness(self) -> tuple[Likeness, ...]:
        """Of two models, before the second was moved and after."""
        if len(self.result.solutions) != 1:
            return ()
        found, opened = self.result, self.result.opened
        return tuple(likeness(found.solutions[0], opened.models[0], opened.lined[0], found.moved[0]))

    def exactness(self, saved: Checkpoint, ends: Sequence[Row]) -> Exactness:
        """Whether the moved models compute what they did, and the merge has what the first model has."""
        first, (before, *_), (after, *_) = self.result.models[0], self.result.opened.lined, self.result.moved
        mine = {key: (part.shape, part.dtype) for key, part in first.parts.items()}
        there = {key: (part.shape, part.dtype) for key, part in saved.parts.items()}
        both = mine.keys() & there.keys()
        said = Exactness(
            keys=mine.keys() == there.keys(),
            shapes=all(mine[key][0] == there[key][0] for key in both),
            dtypes=self.recipe.dtype is None and all(mine[key][1] == there[key][1] for key in both),
        )
        if self.recipe.backbone_only:
            return said
        batch = self._inputs(before)
        if batch is None:
            return said
        answers = []
        for checkpoint in (before, after):
            module: nn.Module = checkpoint.model(checkpoint.wide)
            with evaluating(module):
                answers.append(outputs(module, batch)[0])
        difference = (answers[0] - answers[1]).abs().max().item()
        loss = ends[1].loss if ends else None
        again = self.measured(after, Row("")).loss
        return replace(said, difference=difference, before=loss, after=again, dtype=_short(before.wide))

    def _inputs(self, checkpoint: Checkpoint) -> Mapping[str, Tensor] | None:
        """A batch of the data, or random inputs."""
        for data in (self.result.opened.evaluation, self.result.opened.data):
            if data is not None:
                (batch,) = islice(iter(data), 1)
                inputs = {name: x for name, x in batch.items() if name != "labels"}
                return cast("Mapping[str, Tensor]", there(inputs, None, checkpoint.wide))
        try:
            found = example_inputs(checkpoint.config, torch.Generator().manual_seed(0))
        except MismatchError:
            return None
        return {name: x.to(checkpoint.wide) if x.is_floating_point() else x for name, x in found.items()}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unfinished(recipe: Recipe) -> Recipe:
    """The same without what comes after the merge but statistics of BatchNorm layers."""
    update: dict[str, object] = {"refit": None, "recalibrate": recipe.recalibrate and "statistics"}
    if finishes(recipe.merge_method):
        kept = {name: value for name, value in recipe.parameters.items() if name == "weights"}
        update |= {"merge_method": "linear", "parameters": kept}
    return recipe.model_copy(update=update)


def _consumed(recipe: Recipe, data: Batches | None) -> Consumed:
    """What aligning looked at."""
    solvers = looking(recipe)
    if data is None or not solvers:
        return "nothing"
    unlabelled = all(getattr(solver, "NEEDS_DATA", False) for solver in solvers)
    return "unlabelled inputs" if unlabelled or not data.labelled else "labels"


def moved_in(solutions: Sequence[Solution]) -> Iterator[Moved]:
    """The symmetries of all solutions by family."""
    families: dict[tuple[str, str, int], list[bool]] = {}
    for solution in solutions:
        found = solution.alignment
        for name, element in found.elements.items():
            symmetry = found.spec.symmetries[name]
            key = (family_of(name), family_of(symmetry.group), symmetry.size)
            families.setdefault(key, []).append(not element.is_identity())
    for (family, group, size), moved in families.items():
        yield Moved(family, group, len(moved), size, sum(moved))


def likeness(solution: Solution, fixed: Checkpoint, before: Checkpoint, after: Checkpoint) -> Iterator[Likeness]:
    """Cosines of the weights along every symmetry, before and after; of one that goes all the way down, by layers."""
    spec = solution.alignment.spec
    states = [checkpoint.state(spec.table.prefix) for checkpoint in (fixed, before, after)]
    sums: dict[tuple[str, str], Tensor] = {}
    for tensor in matched_tensors(spec):
        if not all(key in state for key in tensor.keys.values() for state in states):
            continue
        a, *pair = (tensor.gather(state).double().reshape(-1) for state in states)
        found = torch.stack([torch.stack([a @ b, a @ a, b @ b]) for b in pair])
        for name in tensor.names & spec.free:
            for place in (name, _layer(tensor.key)):
                key = (name, place)
                sums[key] = sums[key] + found if key in sums else found
    families: dict[str, list[str]] = {}
    for name in spec.symmetries:
        if (name, name) in sums:
            families.setdefault(family_of(name), []).append(name)
    for family, names in families.items():
        places = [(name, name) for name in names] if len(names) > 1 else [k for k in sums if k[0] == names[0] != k[1]]
        yield Likeness(family, tuple((place, *_cosines(sums[name, place])) for name, place in places))


def _cosines(sums: Tensor) -> tuple[float, float]:
    """Before and after, of ⟨a, b⟩, ‖a‖², ‖b‖² for both."""
    before, after = (float(dot / (x * y).sqrt()) if x * y > 0 else 0.0 for dot, x, y in sums)
    return before, after


def _layer(key: str) -> str:
    """`h.3` of `h.3.attn.c_attn.weight`; the whole key where no layer is numbered."""
    found = re.match(r"(.*?\.?\d+)\.", key)
    return found[1] if found else key.removesuffix(".weight")
