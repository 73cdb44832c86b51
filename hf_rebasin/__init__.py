"""Merge Hugging Face checkpoints that were trained apart."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alignment.alignment import Alignment
    from .alignment.exactness import Check, check
    from .checkpoints.checkpoint import Checkpoint
    from .compat.rebasin import MergeMany, PermutationCoordinateDescent
    from .compat.sinkhorn_rebasin import RebasinNet, matching
    from .compat.sinkhorn_rebasin_losses import DistCosineLoss, DistL1Loss, DistL2Loss, MidLoss, RndLoss
    from .data.batches import DataSettings, open_data
    from .errors import RebasinError
    from .evaluation.comparison import Comparison, Verdict, compare
    from .evaluation.interpolation import between, interpolate
    from .evaluation.metrics import evaluate
    from .merging.merge import merge
    from .merging.methods.distil import distil
    from .merging.methods.refit import refit
    from .merging.recalibration import recalibrate, repair
    from .modules.distributed import OwnBatches
    from .pipeline import run_recipe
    from .publishing.upload import publish
    from .publishing.verification import verify
    from .recipes.recipe import Recipe
    from .reports.report import Report
    from .solving.align import align
    from .solving.problem import Problem
    from .solving.solution import Solution, Status
    from .symmetries.detection import infer_spec, spec_for
    from .symmetries.spec import Spec
    from .symmetries.table import Table

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
    "OwnBatches",
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
    "Alignment": "alignment.alignment",
    "Check": "alignment.exactness",
    "Checkpoint": "checkpoints.checkpoint",
    "Comparison": "evaluation.comparison",
    "DataSettings": "data.batches",
    "DistCosineLoss": "compat.sinkhorn_rebasin_losses",
    "DistL1Loss": "compat.sinkhorn_rebasin_losses",
    "DistL2Loss": "compat.sinkhorn_rebasin_losses",
    "MergeMany": "compat.rebasin",
    "MidLoss": "compat.sinkhorn_rebasin_losses",
    "OwnBatches": "modules.distributed",
    "PermutationCoordinateDescent": "compat.rebasin",
    "Problem": "solving.problem",
    "RebasinError": "errors",
    "RebasinNet": "compat.sinkhorn_rebasin",
    "Recipe": "recipes.recipe",
    "Report": "reports.report",
    "RndLoss": "compat.sinkhorn_rebasin_losses",
    "Solution": "solving.solution",
    "Spec": "symmetries.spec",
    "Status": "solving.solution",
    "Table": "symmetries.table",
    "Verdict": "evaluation.comparison",
    "align": "solving.align",
    "between": "evaluation.interpolation",
    "check": "alignment.exactness",
    "compare": "evaluation.comparison",
    "distil": "merging.methods.distil",
    "evaluate": "evaluation.metrics",
    "infer_spec": "symmetries.detection",
    "interpolate": "evaluation.interpolation",
    "matching": "compat.sinkhorn_rebasin",
    "merge": "merging.merge",
    "open_data": "data.batches",
    "publish": "publishing.upload",
    "recalibrate": "merging.recalibration",
    "refit": "merging.methods.refit",
    "repair": "merging.recalibration",
    "run_recipe": "pipeline",
    "spec_for": "symmetries.detection",
    "verify": "publishing.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
