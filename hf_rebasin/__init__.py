"""Merge Hugging Face checkpoints that were trained apart."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alignment import Alignment
    from .api import align, compare, infer_spec, merge, spec_for
    from .carrying_out import run_recipe
    from .checking import Check, check
    from .checkpoint import Checkpoint
    from .comparing import Comparison, Verdict
    from .coordinate_descent import MergeMany, PermutationCoordinateDescent
    from .data import DataSettings, open_data
    from .errors import RebasinError
    from .evaluating import evaluate
    from .line import between, interpolate
    from .loss import DistCosineLoss, DistL1Loss, DistL2Loss, MidLoss, RndLoss
    from .merge_methods.distil import distil
    from .merge_methods.refit import refit
    from .objective import Problem
    from .publishing import publish
    from .rebasin_net import RebasinNet, matching
    from .recalibrating import recalibrate, repair
    from .recipe import Recipe
    from .report import Report
    from .solving import Solution, Status
    from .spec import Spec
    from .table import Table
    from .verifying import verify

__version__ = "0.1.0"
__all__ = [
    "Alignment",
    "Check",
    "Checkpoint",
    "Comparison",
    "DataSettings",
    "DistCosineLoss",
    "DistL1Loss",
    "DistL2Loss",
    "MergeMany",
    "MidLoss",
    "PermutationCoordinateDescent",
    "Problem",
    "RebasinError",
    "RebasinNet",
    "Recipe",
    "Report",
    "RndLoss",
    "Solution",
    "Spec",
    "Status",
    "Table",
    "Verdict",
    "align",
    "between",
    "check",
    "compare",
    "distil",
    "evaluate",
    "infer_spec",
    "interpolate",
    "matching",
    "merge",
    "open_data",
    "publish",
    "recalibrate",
    "refit",
    "repair",
    "run_recipe",
    "spec_for",
    "verify",
]

# Where each name lives; a module is imported when its name is first used, so that `import hf_rebasin` is light.
_HOME = {
    "Alignment": "alignment",
    "Check": "checking",
    "Checkpoint": "checkpoint",
    "Comparison": "comparing",
    "DataSettings": "data",
    "DistCosineLoss": "loss",
    "DistL1Loss": "loss",
    "DistL2Loss": "loss",
    "MergeMany": "coordinate_descent",
    "MidLoss": "loss",
    "PermutationCoordinateDescent": "coordinate_descent",
    "Problem": "objective",
    "RebasinError": "errors",
    "RebasinNet": "rebasin_net",
    "Recipe": "recipe",
    "Report": "report",
    "RndLoss": "loss",
    "Solution": "solving",
    "Spec": "spec",
    "Status": "solving",
    "Table": "table",
    "Verdict": "comparing",
    "align": "api",
    "between": "line",
    "check": "checking",
    "compare": "api",
    "distil": "merge_methods.distil",
    "evaluate": "evaluating",
    "infer_spec": "api",
    "interpolate": "line",
    "matching": "rebasin_net",
    "merge": "api",
    "open_data": "data",
    "publish": "publishing",
    "recalibrate": "recalibrating",
    "refit": "merge_methods.refit",
    "repair": "recalibrating",
    "run_recipe": "carrying_out",
    "spec_for": "api",
    "verify": "verifying",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
