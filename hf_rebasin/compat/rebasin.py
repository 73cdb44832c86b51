"""`PermutationCoordinateDescent` and `MergeMany`: `align` on modules, with the interface of the package `rebasin`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoints.model_classes import copied
from ..errors import OptionError
from ..modules.forward import Inputs
from ..solving.align import align
from ..solving.solution import Solution
from .in_memory import Device, merged, overwrite, refuse_unless_alike


class PermutationCoordinateDescent:
    """Bring a module into the coordinates of another, in place; its function stays the same.

    Args:
        model_a: the module that stays; it is never changed.
        model_b: the module that is moved. `apply_permutations` writes into its own parameters and buffers, so that
            optimizers, ties and references to it stay valid; nothing else about it changes.
        input_data: one batch of inputs on the device of the models: a tensor, a tuple or list of positional
            arguments, or a mapping of keyword arguments.
        device_a: where `model_a` is.
        device_b: where `model_b` is; if this is another device, a copy of `model_a` is made there.
        verbose: show progress bars (on a terminal).
        seed: of everything random in the solver.
        options: more of `align`, such as `starts=1` or `spec=`.

    Attributes:
        solution: what the last `calculate_permutations` found, a `Solution`; None before.

    Raises:
        OptionError: `apply_permutations` with nothing to apply, or an option that `align` does not know.
        MismatchError, SpecError, CheckpointError: what `align` refuses.

    Example:
        >>> pcd = PermutationCoordinateDescent(model_a, model_b, next(iter(train_dl))[0])
        >>> pcd.calculate_permutations()  # changes nothing yet
        >>> pcd.apply_permutations()  # now model_b lies in the basin of model_a, and computes what it did
        >>> pcd.solution.status
        <Status.CONVERGED: 'converged: no symmetry can be improved by itself'>
    """

    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        input_data: Inputs,
        device_a: Device = None,
        device_b: Device = None,
        verbose: bool = False,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.model_a, self.model_b, self.input_data = model_a, model_b, input_data
        self.device_a, self.device_b, self.verbose = device_a, device_b, verbose
        self.seed, self.options = seed, options
        self.solution: Solution | None = None
        self._to_apply: Solution | None = None

    def calculate_permutations(self, max_iterations: int = 100) -> None:
        """Find the permutations; `max_iterations` bounds the sweeps over all of them. Neither module changes."""
        fixed = self.model_a
        if self.device_a != self.device_b:
            fixed = copied(fixed).to(self.device_b)
        options = {"inputs": self.input_data, "seed": self.seed, "progress": self.verbose} | self.options
        self.solution = self._to_apply = align(
            fixed, self.model_b, max_sweeps=max_iterations, groups="permutation", **options
        )

    def apply_permutations(self) -> None:
        """Move `model_b`, once for every calculation: applied again, permutations would move it away."""
        if self._to_apply is None:
            state = "not calculated" if self.solution is None else "applied already"
            raise OptionError(f"permutations {state}: call calculate_permutations() before apply_permutations()")
        overwrite(self.model_b, self._to_apply.apply(self.model_b))
        self._to_apply = None

    def rebasin(self, max_iterations: int = 100) -> None:
        """`calculate_permutations`, then `apply_permutations`."""
        self.calculate_permutations(max_iterations)
        self.apply_permutations()


class MergeMany:
    """Merge any number of modules: align each to the mean of the others until none moves, then average.

    This is MergeMany of Git Re-Basin (arXiv 2209.04836, algorithm 3), but for its first sweep, where the mean is taken
    over those that have been aligned already, beginning with the first: of models in unrelated coordinates it would be
    a mean of nothing. Parameters and statistics are averaged in float64, whole numbers are those of the first model.
    BatchNorm statistics of a merge are best recomputed afterwards (`hf_rebasin.merging.recalibration`).

    Args:
        models: two modules or more; they are never changed.
        working_model: a module like them, but none of them; the merge is written into its own tensors.
        input_data: one batch of inputs on the device of the models: a tensor, a tuple or list of positional
            arguments, or a mapping of keyword arguments.
        device: where to work, on copies of the models; by default where they are, and only what moves is copied.
        verbose: show progress bars (on a terminal).
        seed: of the order of the models and everything random in the solver.
        options: more of `align`, such as `starts=1` or `spec=`.

    Attributes:
        merged_model: `working_model`, once `run` is done.

    Raises:
        OptionError: fewer than two models, no modules, or a working model that is one of them.
        MismatchError: models whose tensors differ in names or shapes.
        SpecError, CheckpointError: what `align` refuses.

    Example: three models that are one model in different coordinates merge into that model, in those of the first.

        >>> merge = MergeMany([model_a, model_b, model_c], Net(), next(iter(train_dl))[0])
        >>> merge.run() is merge.working_model
        True
    """

    merged_model: nn.Module

    def __init__(
        self,
        models: Sequence[nn.Module],
        working_model: nn.Module,
        input_data: Inputs,
        device: Device = None,
        verbose: bool = False,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        refuse_unless_alike(models)
        refuse_unless_alike([models[0], working_model])
        if any(model is working_model for model in models):
            raise OptionError("working_model is one of the models, and would be overwritten; give a module of its own")
        self.models, self.working_model, self.input_data = models, working_model, input_data
        self.device, self.verbose, self.seed, self.options = device, verbose, seed, options

    def run(self, max_iterations: int = 100, max_iterations_pcd: int = 100) -> nn.Module:
        """Merge.

        Args:
            max_iterations: how often every model is aligned to the others at most.
            max_iterations_pcd: sweeps of each of these alignments at most.

        Returns:
            The working model, which is the merge now.
        """
        models = [m if self.device is None else copied(m).to(self.device) for m in self.models]
        generator = torch.Generator().manual_seed(self.seed)
        options = {"inputs": self.input_data} | self.options
        placed = {0}
        for _ in range(max_iterations):
            improved = False
            for i in torch.randperm(len(models), generator=generator).tolist():
                if others := [models[j] for j in sorted(placed - {i})]:
                    mean = merged(others, "linear")
                    solution = align(
                        mean,
                        models[i],
                        seed=self.seed,
                        progress=self.verbose,
                        max_sweeps=max_iterations_pcd,
                        groups="permutation",
                        **options,
                    )
                    options = self.options | {"spec": solution.alignment.spec}  # the symmetries are the same for all
                    if solution.history and solution.objective > solution.history[0]:
                        models[i], improved = solution.apply(models[i]), True
                    placed.add(i)
            if not improved:
                break
        overwrite(self.working_model, merged(models, "linear"))
        self.merged_model = self.working_model
        return self.working_model
