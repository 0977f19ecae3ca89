"""The result of a merge: an adapter with its report and recipe."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..adapters import sources, writer
from ..adapters.adapter import Adapter
from ..adapters.formats.base import Origin
from ..adapters.tensors import MemoryTensors
from ..adapters.tokenizer_files import TokenizerFiles
from .card import merge_card
from .loading import Loading
from .recipes.recipe import Recipe, yaml_value
from .report import Report

if TYPE_CHECKING:
    from .pipeline import Pipeline


class Merged(Adapter):
    """A merged adapter, with the report of the merge and the recipe that made it.

    Attributes:
        report: what the merge did; prints as tables.
        recipe: what was asked for, with YAML round trip.
        loading: the class of the base model, and the lines of Python that load the adapter on it.
        tokenizer_files: that are saved with it.
        pipeline: the image model that it is a LoRA of; None for an adapter in PEFT's format. Its modules' names begin with
            their part, and `save` writes one file for all parts.
    """

    def __init__(
        self,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        report: Report,
        recipe: Recipe,
        loading: Loading,
        tokenizer_files: TokenizerFiles | None = None,
        pipeline: Pipeline | None = None,
        compress: bool = True,
    ) -> None:
        origin = None if pipeline is None else Origin("a merge", pipeline.architecture, pipeline.parts)
        super().__init__(config, MemoryTensors(tensors), origin=origin)
        self.report = report
        self.recipe = recipe
        self.loading = loading
        self.tokenizer_files = tokenizer_files or TokenizerFiles()
        self.pipeline, self._compress = pipeline, compress

    def files(self) -> dict[str, writer.Content]:
        """Return all files by name: config, weights, card, recipe, provenance and tokenizer files."""
        recipe = self.recipe.to_yaml()
        provenance = {
            "versions": versions(),
            "recipe": self.recipe.to_dict(),
            "report": self.report.to_dict(),
            writer.COPIED: self.tokenizer_files.digests,
        }
        weights = super().files() if self.pipeline is None else self.pipeline.file(self, self._compress)
        trainings = {} if self.pipeline is None else self.pipeline.trainings()
        return {
            **self.tokenizer_files.files,
            **weights,
            "README.md": merge_card(self.report, self.recipe.to_dict(), self.loading, trainings),
            "recipe.yaml": recipe,
            writer.PROVENANCE: writer.json_text(provenance),
        }

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write a folder that `PeftModel.from_pretrained` loads; it appears completely or not at all.

        A LoRA of an image model is written as one file for all of its parts: `pytorch_lora_weights.safetensors`, which
        diffusers' `load_lora_weights` loads, or with target `kohya` `lora.safetensors`.

        Args:
            folder: must not exist, or be empty.
            force: replace an existing folder, if it contains only files that ties_peft writes and is no input.
        Raises: RecipeError if the folder exists or cannot be written.
        """
        return writer.write_folder(Path(folder), self.files(), force, inputs(self.recipe))

    def __repr__(self) -> str:
        return (
            f"Merged({self.report.method}, {self.peft_type.name}, {len(self.layout)} modules, rank {self.report.rank})"
        )


def inputs(recipe: Recipe) -> list[Path]:
    """Return the folders on this machine that a recipe reads."""
    named = [*recipe.adapters, recipe.base, yaml_value(recipe.parameters.get("sign_from"))]
    return [path for path in (sources.local_path(name) for name in named if isinstance(name, str)) if path is not None]


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("ties_peft", "torch", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
