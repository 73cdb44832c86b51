"""The import path of the losses in Sinkhorn re-basin."""

from .compat.sinkhorn_rebasin_losses import *  # noqa: F403
