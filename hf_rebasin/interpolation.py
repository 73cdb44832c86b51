"""The import path that the rebasin package gives `LerpSimple`."""

from .compat.rebasin_interpolation import LerpSimple as LerpSimple
