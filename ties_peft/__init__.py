"""Merge many PEFT adapters into one, by TIES-Merging and its rivals."""

from .adapter import Adapter
from .bench import Bench
from .convert import convert
from .distil import distil
from .distilled import Distilled
from .errors import (
    AdapterError,
    CompatibilityError,
    MethodError,
    RecipeError,
    TiesPeftError,
    TiesPeftWarning,
)
from .evaluate import evaluate
from .exam import Score
from .gather import gather_statistics
from .harness import harness
from .live import add_merged_adapter
from .merge import merge
from .merged import Merged
from .methods import methods
from .prepare import Prepared, prepare
from .push import push
from .recipe import Recipe
from .report import Report
from .search import Found, search
from .signs import few_shot_signs
from .task import Task

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterError",
    "Bench",
    "CompatibilityError",
    "Distilled",
    "Found",
    "Merged",
    "MethodError",
    "Prepared",
    "Recipe",
    "RecipeError",
    "Report",
    "Score",
    "Task",
    "TiesPeftError",
    "TiesPeftWarning",
    "add_merged_adapter",
    "convert",
    "distil",
    "evaluate",
    "few_shot_signs",
    "gather_statistics",
    "harness",
    "merge",
    "methods",
    "prepare",
    "push",
    "search",
]
