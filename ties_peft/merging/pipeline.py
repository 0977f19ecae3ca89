"""Merges of LoRAs of image models: which parts of a pipeline they adapt, which target they are written for, and its files.

Every module's name begins with its part (`unet.…`, `text_encoder.…`), so that one merge holds all parts. With scope `adapter`
each part is ranked by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters import DIFFUSERS, IMAGE_TARGETS, KOHYA, PEFT
from ..adapters.adapter import Adapter
from ..adapters.formats.base import Origin
from ..adapters.image_files import (
    TEXT_PREFIXES,
    ModuleLora,
    describe_metadata,
    diffusers_file,
    kohya_file,
    shared_metadata,
)
from ..adapters.image_models import LOADED, NATIVE, SD, TEXT_ENCODERS, architecture_of, layers_of, part_of
from ..adapters.module_names import TEXT_TOWER
from ..adapters.placement import BARE_TEXT
from ..adapters.types import ModuleInfo
from ..adapters.types.base import CONV, LINEAR
from ..adapters.writer import Content
from ..errors import CompatibilityError, some
from .loading import PLACEHOLDER, Loading

OTHER_PARTS = ("unet", "transformer", "transformer_2", *TEXT_ENCODERS[:2])  # that diffusers loads for other models


@dataclass(frozen=True)
class Pipeline:
    """The image model of a merge.

    Attributes:
        target: of `IMAGE_TARGETS`.
        architecture: as in `image_models`; empty if it is unknown.
        parts: that are adapted, sorted.
        metadata: of the inputs' files, by the name of the input.
    """

    target: str
    architecture: str
    parts: tuple[str, ...]
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def trainings(self) -> dict[str, dict[str, str]]:
        """Return what the files of the inputs say of their training, by the name of the input."""
        found = {name: describe_metadata(own) for name, own in self.metadata.items()}
        return {name: facts for name, facts in found.items() if facts}

    def file(self, adapter: Adapter, compress: bool) -> dict[str, Content]:
        """Return the file of weights of a result by its name.

        Args:
            adapter: the result.
            compress: whether layers that hold several modules are written at the rank of their values.
        """
        loras = loras_of(adapter)
        if self.target == DIFFUSERS:
            return {IMAGE_TARGETS[DIFFUSERS]: diffusers_file(loras)}
        metadata = shared_metadata(list(self.metadata.values()))
        return {IMAGE_TARGETS[KOHYA]: kohya_file(self.architecture, loras, compress, metadata)}

    def loading(self, config: Mapping[str, Any]) -> Loading:
        """Return how the result of a merge is loaded, given its config."""
        why = "it is a LoRA of an image model"
        base = config.get("base_model_name_or_path")
        return PipelineLoading(base, "DiffusionPipeline", why, "diffusers", target=self.target)

    def without_absent_parts(
        self, modules: dict[str, ModuleInfo], weighs: Mapping[str, bool]
    ) -> tuple[Pipeline, dict[str, ModuleInfo]]:
        """Return the pipeline and the modules without the parts on which every weight is 0.

        Args:
            modules: of the result.
            weighs: for each module, whether any adapter has a weight other than 0 on it.
        """
        kept = sorted({name.partition(".")[0] for name in modules if weighs[name]})
        left = {name: module for name, module in modules.items() if name.partition(".")[0] in kept}
        return replace(self, parts=tuple(kept)), left

    def check(self, modules: Mapping[str, ModuleInfo]) -> None:
        """Refuse modules that the target cannot hold.

        Args:
            modules: that would be written, by name.
        Raises: CompatibilityError naming them and the way out.
        """
        other = [name for name, module in modules.items() if module.layer_type not in (LINEAR, CONV)]
        if other:
            reason = "are embeddings, experts or biases; the format holds linear layers and convolutions"
            raise self._refusal(other, reason)
        by_part: dict[str, dict[str, tuple[int, int]]] = {}
        for name, module in modules.items():
            part, _, path = name.partition(".")
            by_part.setdefault(part, {})[path] = (module.shape[0], module.shape[1])
        for part, own in by_part.items():
            known = self.architecture or "a model of unknown architecture"
            if self.target == DIFFUSERS and part not in LOADED.get(self.architecture, OTHER_PARTS):
                reason = (
                    f"belong to {part!r}, of which load_lora_weights of {known} loads no LoRA. Leave that part out "
                    f'(--weights-for {part}=0) or choose --target kohya (target="kohya")'
                )
                raise self._refusal([f"{part}.{path}" for path in own], reason)
            if self.target == KOHYA:
                self._check_kohya(part, own)

    def _check_kohya(self, part: str, modules: Mapping[str, tuple[int, int]]) -> None:
        """Refuse modules that have no name in kohya's format."""
        if part == NATIVE or part in TEXT_ENCODERS[: len(TEXT_PREFIXES[self.architecture or SD])]:
            return
        if self.architecture and part in LOADED[self.architecture] and part not in TEXT_ENCODERS:
            lacking = [name for name, shape in modules.items() if layers_of(self.architecture, {name: shape}) is None]
            reason = f"have no name in kohya's files of {self.architecture}"
        else:
            lacking = list(modules)
            reason = (
                "are of no model whose names in kohya's files are known here (Stable Diffusion, SDXL, SD3, Flux). If they are of "
                "one of these, name the base with --base-name (base_model=…); otherwise choose --target diffusers "
                '(target="diffusers")'
            )
        if lacking:
            raise self._refusal([f"{part}.{name}" for name in lacking], reason)

    def _refusal(self, names: Sequence[str], reason: str) -> CompatibilityError:
        return CompatibilityError(f"target {self.target}: {len(names)} modules ({some(names)}) {reason}.")


@dataclass(frozen=True)
class PipelineLoading(Loading):
    """How a LoRA of an image model is loaded into a pipeline of diffusers.

    Attributes:
        target: of the pipeline, which names the file.
    """

    target: str = DIFFUSERS

    def lines(self, folder: str) -> list[str]:
        """Return the lines of Python that load the LoRA from a folder."""
        lines = [
            "from diffusers import DiffusionPipeline",
            f"pipe = DiffusionPipeline.from_pretrained({self.base or PLACEHOLDER!r})",
            f"pipe.load_lora_weights({folder!r}, weight_name={IMAGE_TARGETS[self.target]!r})",
        ]
        if self.target == KOHYA:
            lines.append(f"# ComfyUI: copy {IMAGE_TARGETS[KOHYA]} to models/loras; A1111 and Forge: to models/Lora")
        return lines


def choose_pipeline(
    target: str | None, adapters: Sequence[Adapter], base: str | None, warnings: list[str]
) -> tuple[list[Adapter], Pipeline | None]:
    """Return the adapters with their parts in their modules' names, and the pipeline; None if the result is PEFT's.

    Args:
        target: that was asked for; by default diffusers, if an adapter is a file of an image model.
        adapters: of the merge.
        base: the base model's name.
        warnings: extended by what was assumed.
    Raises: CompatibilityError where the target cannot hold the parts, or an adapter's part is not known.
    """
    own = {part for adapter in adapters if adapter.origin for part in adapter.origin.parts}
    if target is not None and target not in (PEFT, *IMAGE_TARGETS):
        raise CompatibilityError(
            f"target {target}: the adapters are LoRAs of an image model ({', '.join(sorted(own))}), which it does not load. "
            f"Choose one of {', '.join((*IMAGE_TARGETS, PEFT))}."
        )
    if target == PEFT:
        return _without_part(adapters, own), None
    found = [_with_part(adapter) for adapter in adapters]
    modules = {name: info.shape[1] for adapter in found for name, info in adapter.layout.items()}
    parts = tuple(sorted({name.partition(".")[0] for name in modules}))
    if target is None:
        warnings.append(
            f"the result is written for diffusers ({IMAGE_TARGETS[DIFFUSERS]}). For A1111, Forge, ComfyUI or kohya's trainers choose "
            '--target kohya (target="kohya").'
        )
    metadata = {adapter.label: adapter.origin.metadata for adapter in adapters if adapter.origin}
    return found, Pipeline(target or DIFFUSERS, _architecture(adapters, modules, parts, base), parts, metadata)


def _without_part(adapters: Sequence[Adapter], parts: set[str]) -> list[Adapter]:
    """Return the adapters of one part under the names of modules inside it."""
    if len(parts) > 1:
        raise CompatibilityError(
            f"target peft: the adapters adapt {', '.join(sorted(parts))}, and a folder of PEFT is for one model. Write all "
            "parts with --target diffusers or --target kohya (target=… in Python), or convert one of them: ties-peft convert "
            "FILE --part PART."
        )
    prefix = f"{next(iter(parts))}."
    return [
        adapter.renamed({name: name.removeprefix(prefix) for name in adapter.modules}) if adapter.origin else adapter
        for adapter in adapters
    ]


def _with_part(adapter: Adapter) -> Adapter:
    """Return an adapter with its part before the names of its modules."""
    if adapter.origin is not None and adapter.origin.parts:
        return adapter
    part = part_of(adapter.modules)
    if part is None:
        raise CompatibilityError(
            f"adapter '{adapter.label}': its modules, such as {adapter.modules[0]!r}, do not tell to which part of a pipeline "
            "they belong (unet, transformer, text_encoder, …). Name it: ties-peft convert ADAPTER --part PART --target diffusers."
        )
    return named_part(adapter, part)


def named_part(adapter: Adapter, part: str) -> Adapter:
    """Return an adapter of PEFT's with a part before the names of its modules."""
    names = {*adapter.modules, *(module.path for module in adapter.layout.values())}
    tower = {name: TEXT_TOWER if part in TEXT_ENCODERS and name.startswith(BARE_TEXT) else "" for name in names}
    return adapter.renamed(
        {name: f"{part}.{tower[name]}{name}" for name in names}, Origin("an adapter of PEFT", parts=(part,))
    )


def _architecture(
    adapters: Sequence[Adapter], modules: Mapping[str, int], parts: Sequence[str], base: str | None
) -> str:
    """Return the architecture that the files tell, or the names of all modules together."""
    told = {adapter.origin.architecture for adapter in adapters if adapter.origin and adapter.origin.architecture}
    if len(told) == 1 and told != {SD}:
        return told.pop()
    denoiser = [name for name in modules if name.partition(".")[0] not in TEXT_ENCODERS]
    widths = {name.partition(".")[2]: modules[name] for name in denoiser}
    named = next((a.base_name for a in adapters if a.base_name), None)
    return architecture_of(widths, parts, base or named)


def loras_of(adapter: Adapter) -> list[ModuleLora]:
    """Return the LoRA of each module of an adapter whose modules' names begin with their parts, as it is stored."""
    loras = []
    for name, module in adapter.layout.items():
        part, _, path = name.partition(".")
        A, B = (adapter.tensors.read(key) for key in module.keys)
        loras.append(ModuleLora(part, path, A, B, stored_alpha(module)))
    return loras


def stored_alpha(module: ModuleInfo) -> float:
    """Return the alpha with which alpha/r is a module's scaling."""
    return float(f"{module.scaling * module.rank:.12g}")  # alpha/r · r may differ from alpha in the last bit
