"""Merge many PEFT adapters into one, by TIES-Merging and its rivals."""

from .adapter import Adapter
from .convert import convert
from .errors import (
    AdapterError,
    CompatibilityError,
    MethodError,
    RecipeError,
    TiesPeftError,
    TiesPeftWarning,
)
from .live import add_merged_adapter
from .merge import merge
from .merged import Merged
from .methods import methods
from .prepare import Prepared, prepare
from .push import push
from .recipe import Recipe
from .report import Report

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterError",
    "CompatibilityError",
    "Merged",
    "MethodError",
    "Prepared",
    "Recipe",
    "RecipeError",
    "Report",
    "TiesPeftError",
    "TiesPeftWarning",
    "add_merged_adapter",
    "convert",
    "merge",
    "methods",
    "prepare",
    "push",
]
