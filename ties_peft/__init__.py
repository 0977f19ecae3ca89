"""Merge many PEFT adapters into one, by TIES-Merging and its rivals.

Every name in `__all__` but the errors is imported when it is first used, so that `import ties_peft` is quick. Where a
function and a module of this package have one name, such as `merge`, the name in this package is the function; the
module's other names are had by `from ties_peft.merge import ...`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import (
    AdapterError,
    CompatibilityError,
    MethodError,
    RecipeError,
    TiesPeftError,
    TiesPeftWarning,
)

if TYPE_CHECKING:
    from .adapter import Adapter
    from .bench import Bench
    from .convert import convert
    from .distil import distil
    from .distilled import Distilled
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

# The module of each name that is imported when it is first used; type checkers read the block above instead.
_MODULES = {
    "Adapter": "adapter",
    "Bench": "bench",
    "Distilled": "distilled",
    "Found": "search",
    "Merged": "merged",
    "Prepared": "prepare",
    "Recipe": "recipe",
    "Report": "report",
    "Score": "exam",
    "Task": "task",
    "add_merged_adapter": "live",
    "convert": "convert",
    "distil": "distil",
    "evaluate": "evaluate",
    "few_shot_signs": "signs",
    "gather_statistics": "gather",
    "harness": "harness",
    "merge": "merge",
    "methods": "methods",
    "prepare": "prepare",
    "push": "push",
    "search": "search",
}

if not TYPE_CHECKING:  # a type checker would take every unknown name for one that this function gives

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package as a module that keeps a function's name for the function.

    The import system sets each imported submodule as an attribute of its package, which would hide the function `merge`
    as soon as the module `ties_peft.merge` was imported.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
