"""The import path of `LerpSimple` in the rebasin package."""

from .compat.rebasin_interpolation import LerpSimple as LerpSimple
