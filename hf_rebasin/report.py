"""The import path of reports."""

from .reports.report import *  # noqa: F403
