"""Merge many PEFT adapters into one, by TIES-Merging and other methods.

Every public name except the errors is imported when it is first used, so that `import ties_peft` is quick. Where a
function and a module have the same name, such as `search`, `ties_peft.search` is the function; import other names of the
module by `from ties_peft.search import ...`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import AdapterError, CompatibilityError, MethodError, RecipeError, TiesPeftError, TiesPeftWarning

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .analysis.analysis import Analysis
    from .analysis.analyze import analyze
    from .evaluation.evaluate import evaluate
    from .evaluation.harness import harness
    from .evaluation.loaded_model import Bench
    from .evaluation.score import Score
    from .evaluation.task import Task
    from .learning.distil import distil
    from .learning.distilled import Distilled
    from .learning.gather_statistics import gather_statistics
    from .learning.signs import few_shot_signs
    from .merging.convert import convert
    from .merging.live import add_merged_adapter
    from .merging.merge import merge
    from .merging.merged import Merged
    from .merging.prepare import Prepared, prepare
    from .merging.push import push
    from .merging.recipes.recipe import Recipe
    from .merging.report import Report
    from .methods import methods
    from .search.found import Found
    from .search.search import search

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterError",
    "Analysis",
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
    "analyze",
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

# The module of each name that is imported when it is first used. Type checkers read the block above instead.
_MODULES = {
    "Adapter": "adapters.adapter",
    "Analysis": "analysis.analysis",
    "Bench": "evaluation.loaded_model",
    "Distilled": "learning.distilled",
    "Found": "search.found",
    "Merged": "merging.merged",
    "Prepared": "merging.prepare",
    "Recipe": "merging.recipes.recipe",
    "Report": "merging.report",
    "Score": "evaluation.score",
    "Task": "evaluation.task",
    "add_merged_adapter": "merging.live",
    "analyze": "analysis.analyze",
    "convert": "merging.convert",
    "distil": "learning.distil",
    "evaluate": "evaluation.evaluate",
    "few_shot_signs": "learning.signs",
    "gather_statistics": "learning.gather_statistics",
    "harness": "evaluation.harness",
    "merge": "merging.merge",
    "methods": "methods",
    "prepare": "merging.prepare",
    "push": "merging.push",
    "search": "search.search",
}

if not TYPE_CHECKING:  # with this function a type checker would accept every name

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The type of this package, in which a public function is not replaced by a module of the same name.

    The import system sets each imported module as an attribute of its package, so that `import ties_peft.search` would
    replace the function `search`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
