"""`PermutationCoordinateDescent` and `MergeMany`: `align` for modules, with the interface of the `rebasin` package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoints.model_classes import copy_module
from ..errors import OptionError
from ..modules.forward import Inputs
from ..modules.functional import Device
from ..solving.align import align
from ..solving.solution import Solution
from .in_memory import merge_modules, overwrite, refuse_unless_alike


class PermutationCoordinateDescent:
    """Permute a module's units to match another module, in place, without changing its function.

    Args:
        model_a: the fixed module; it is never changed.
        model_b: the moving module. `apply_permutations` writes into its own parameters and buffers, so optimizers,
            ties and references stay valid; nothing else about the module changes.
        input_data: one batch of inputs on the device of the models: a tensor, a tuple or list of positional
            arguments, or a mapping of keyword arguments.
        device_a: device of `model_a`.
        device_b: device of `model_b`; if it is not `device_a`, `model_a` is copied to it.
        verbose: show progress bars (on a terminal).
        seed: seed of all randomness in the solver.
        options: further options of `align`, such as `starts=1` or `spec=`.

    Attributes:
        solution: the `Solution` of the last `calculate_permutations`; None before.

    Raises:
        OptionError: `apply_permutations` has nothing to apply, or `align` does not have such an option.
        MismatchError, SpecError, CheckpointError: `align` refuses the models.

    Example:
        >>> pcd = PermutationCoordinateDescent(model_a, model_b, next(iter(train_dl))[0])
        >>> pcd.calculate_permutations()  # changes nothing yet
        >>> pcd.apply_permutations()  # model_b is now in the basin of model_a, and is the same function as before
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
        """Find the permutations in at most `max_iterations` sweeps over all of them; neither module changes."""
        fixed = self.model_a
        if self.device_a != self.device_b:
            fixed = copy_module(fixed).to(self.device_b)
        options = {"inputs": self.input_data, "seed": self.seed, "progress": self.verbose} | self.options
        self.solution = self._to_apply = align(
            fixed, self.model_b, max_sweeps=max_iterations, groups="permutation", **options
        )

    def apply_permutations(self) -> None:
        """Permute `model_b`, once per calculation: applied again, the permutations would move it away."""
        if self._to_apply is None:
            state = "not calculated yet" if self.solution is None else "already applied"
            raise OptionError(f"permutations {state}: call calculate_permutations() before apply_permutations()")
        overwrite(self.model_b, self._to_apply.apply(self.model_b))
        self._to_apply = None

    def rebasin(self, max_iterations: int = 100) -> None:
        """Call `calculate_permutations`, then `apply_permutations`."""
        self.calculate_permutations(max_iterations)
        self.apply_permutations()


class MergeMany:
    """Merge any number of modules: align each to the mean of the others until none changes, then average.

    This is MergeMany of Git Re-Basin (arXiv 2209.04836, algorithm 3) except for the first sweep, where the mean is
    taken only over the models aligned so far, starting from the first: the mean of models in unrelated coordinates
    would be meaningless. Parameters and statistics are averaged in float64; integers are the first model's. It is best
    to recompute the BatchNorm statistics of the merge afterwards (`hf_rebasin.merging.recalibration`).

    Args:
        models: two or more modules; they are never changed.
        working_model: another module of the same kind; the merge is written into its own tensors.
        input_data: one batch of inputs on the device of the models: a tensor, a tuple or list of positional
            arguments, or a mapping of keyword arguments.
        device: device to work on, with copies of the models; by default the models' own, copying only what changes.
        verbose: show progress bars (on a terminal).
        seed: seed of the order of the models and of all randomness in the solver.
        options: further options of `align`, such as `starts=1` or `spec=`.

    Attributes:
        merged_model: `working_model`, after `run`.

    Raises:
        OptionError: there are fewer than two models, some are not modules, or the working model is one of them.
        MismatchError: the models' tensors differ in names or shapes.
        SpecError, CheckpointError: `align` refuses the models.

    Example: three permuted copies of one model merge into that model, in the first copy's coordinates.

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
            raise OptionError("working_model is one of the models and would be overwritten; give a separate module")
        self.models, self.working_model, self.input_data = models, working_model, input_data
        self.device, self.verbose, self.seed, self.options = device, verbose, seed, options

    def run(self, max_iterations: int = 100, max_iterations_pcd: int = 100) -> nn.Module:
        """Align the models to one another, and write their average into the working model.

        Args:
            max_iterations: how many times at most each model is aligned to the others.
            max_iterations_pcd: maximum number of sweeps in each of these alignments.

        Returns:
            The working model, which now holds the merge.
        """
        models = [m if self.device is None else copy_module(m).to(self.device) for m in self.models]
        generator = torch.Generator().manual_seed(self.seed)
        options = {"inputs": self.input_data} | self.options
        aligned = {0}
        for _ in range(max_iterations):
            improved = False
            for i in torch.randperm(len(models), generator=generator).tolist():
                if others := [models[j] for j in sorted(aligned - {i})]:
                    mean = merge_modules(others, "linear")
                    solution = align(
                        mean,
                        models[i],
                        seed=self.seed,
                        progress=self.verbose,
                        max_sweeps=max_iterations_pcd,
                        groups="permutation",
                        **options,
                    )
                    options = self.options | {"spec": solution.alignment.spec}  # all models have the same symmetries
                    if solution.history and solution.objective > solution.history[0]:
                        models[i], improved = solution.apply(models[i]), True
                    aligned.add(i)
            if not improved:
                break
        overwrite(self.working_model, merge_modules(models, "linear"))
        self.merged_model = self.working_model
        return self.working_model
