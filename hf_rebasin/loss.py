"""The import path that Sinkhorn re-basin gives its losses."""

from .compat.sinkhorn_rebasin_losses import *  # noqa: F403
