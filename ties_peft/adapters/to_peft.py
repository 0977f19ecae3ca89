"""Read a LoRA of diffusers, kohya, ComfyUI or MLX as the PEFT adapter that computes exactly the same.

How names, factors and scalings of each format are read is in `formats`, which modules an image model's names stand for in
`placement`. Only names and shapes are read; the tensors are views (`converted`). What cannot be converted exactly is refused.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..errors import AdapterError, RecipeError
from .base_model import BaseModel
from .contents import PREFIX, Contents
from .converted import ConvertedTensors, Span, View, split_rows
from .formats import LoraFile, LoraModule
from .formats.base import DORA, LOHA, LOKR, Origin
from .image_models import CONVOLUTIONS, POINTWISE, Layer, Shape
from .placement import CHECKPOINT_PREFIXES, BaseNames, ConversionOptions, Placed, place
from .tensors import SafetensorsFile, TensorSource

PEFT_TYPES = {LOHA: "LOHA", LOKR: "LOKR"}
INCOMPLETE = "The file is incomplete: get it again."


class Converted(NamedTuple):
    """An adapter of another format in PEFT's terms.

    Attributes:
        config: of PEFT.
        tensors: by PEFT's names.
        origin: the file that it was read from.
    """

    config: dict[str, Any]
    tensors: TensorSource
    origin: Origin


def read_as_peft(
    file: LoraFile, config: Mapping[str, Any] | None, options: ConversionOptions, label: str, all_parts: bool
) -> Converted:
    """Read a plain LoRA of another format.

    Args:
        file: a plain LoRA.
        config: adapter_config.json beside it, if there is one.
        options: of the user.
        label: the adapter's name in messages.
        all_parts: whether all parts of an image model are read, each before the names of its modules (`unet.…`). Otherwise one
            part is read, and the names are those inside it.
    Raises: AdapterError if it cannot be converted exactly; RecipeError for options that do not apply to it.
    """
    return _Conversion(file, config or {}, options, label, all_parts).run()


class _Conversion:
    """The conversion of one file; its attributes are the arguments of `read_as_peft`."""

    def __init__(
        self, file: LoraFile, config: Mapping[str, Any], options: ConversionOptions, label: str, all_parts: bool
    ) -> None:
        self.file, self.config, self.options, self.label, self.all_parts = file, config, options, label, all_parts
        self.format = file.format
        self.base = BaseModel.load(options.base) if isinstance(options.base, str) else options.base
        self.views: dict[str, View] = {}
        self.alphas: dict[str, float | None] = {}
        self.ranks: dict[str, int] = {}

    def run(self) -> Converted:
        """Return the adapter in PEFT's terms."""
        architecture, placed = self.places()
        placed, remarks = self.choose_part(placed)
        renamed: list[str] = []
        names = BaseNames(self.file, self.options, self.base, self.label, self.all_parts)
        for part in sorted({one.part for one in placed}):
            found, said = names.find(part, [one for one in placed if one.part == part])
            renamed += said
            for one, layer in found:
                self.add(one.module, f"{part}." if self.all_parts else "", layer)
        parts = tuple(sorted({one.part for one in placed}))
        alphas, remark, assumed = self.find_alphas(parts)
        scaling = by_module(alphas)
        written = sorted(self.alphas)
        config = {
            "peft_type": PEFT_TYPES.get(self.file.kind, "LORA"),
            **({"use_dora": True} if self.file.kind == DORA else {}),
            "base_model_name_or_path": self.base_name(),
            "target_modules": written,
            **({"fan_in_fan_out": True} if self.base is not None and any(map(self.base.is_conv1d, written)) else {}),
            **({"r": 1, "alpha": scaling.pop("lora_alpha")} if self.file.kind in PEFT_TYPES else {}),
            **scaling,
        }
        of = f" of {', '.join(parts)}" if any(parts) else ""
        what = f"{self.file.path.name} was {self.file.title}, {len(written)} modules{of}; {remark}."
        origin = Origin(
            self.file.title,
            architecture,
            parts if self.all_parts else (),
            (what, *renamed, *remarks),
            (f"{self.label}: {remark}.",) if assumed else (),
            self.metadata(),
        )
        return Converted(config, ConvertedTensors(self.file.tensors, self.views, self.file.path), origin)

    def metadata(self) -> Mapping[str, str]:
        """Return the metadata of the file."""
        return self.file.tensors.metadata if isinstance(self.file.tensors, SafetensorsFile) else {}

    def base_name(self) -> str | None:
        """Return the base model's name to write."""
        own = self.config.get("model")  # MLX-LM stores it there
        return self.options.base_model or (own if isinstance(own, str) else None)

    def places(self) -> tuple[str, list[Placed]]:
        """Return the architecture and the place of each module."""
        for module in self.file.modules:
            self.check_module(module)
        if self.format.is_image:
            shapes = {module: self.shape(module) for module in self.file.modules}
            names = [] if self.base is None else self.base.modules
            native = any(name.startswith(CHECKPOINT_PREFIXES) for name in names)
            architecture, placed = place(self.file.modules, shapes, not self.format.has_base_names, native)
            return architecture, [one if one.part else replace(one, part=self.part_of_all()) for one in placed]
        modules = self.file.modules
        if self.format.part_is_prefix and self.options.part:
            modules = tuple(_without_prefix(module, self.options.part) for module in modules)
        return "", [Placed(m, m.part, Layer(m.module, (m.module,))) for m in modules]

    def part_of_all(self) -> str:
        """Return the part that was asked for, for a file whose names do not say it."""
        if self.options.part is None and self.all_parts:
            raise AdapterError(
                f"adapter '{self.label}': the names in {self.file.path.name}, such as {self.file.modules[0].module!r}, do not "
                "tell to which part of a pipeline they belong (unet, transformer, text_encoder, …). Name it: "
                f"ties-peft convert {self.label} --part PART --target diffusers."
            )
        return self.options.part or ""

    def where(self, module: LoraModule) -> str:
        """Return a module's name in messages."""
        return f"adapter '{self.label}', module {module.module!r}"

    def check_module(self, module: LoraModule) -> None:
        """Refuse a module whose tensors are missing or do not fit each other."""
        where, tensors = self.where(module), self.file.tensors
        if module.kind in PEFT_TYPES:
            return
        for side, word in (("A", "down (lora_A)"), ("B", "up (lora_B)")):
            if side not in module.keys:
                raise AdapterError(f"{where}: there is no {word} tensor. {INCOMPLETE}")
        A, B = (tensors.info(module.keys[side]).shape for side in ("A", "B"))
        fault = self.format.factors_fault(A, B, module.module)
        if fault is not None:
            raise AdapterError(f"{where} {fault}")
        A, B = (A[::-1], B[::-1]) if self.format.transposed else (A, B)
        if len(A) < 2 or len(B) < 2 or A[0] != B[1] or 0 in (*A, *B):
            raise AdapterError(
                f"{where}: the tensors are {list(A)} and {list(B)}; expected [r, in] and [out, r] with the same "
                "r. The file is damaged: get it again."
            )

    def shape(self, module: LoraModule) -> Shape:
        """Return (out, in) of a module."""
        if module.kind in PEFT_TYPES:
            return lycoris_shape({side: self.file.tensors.info(key).shape for side, key in module.keys.items()})
        A, B = (View.of(self.file.tensors, module.keys[side], self.format.transposed).shape for side in ("A", "B"))
        return B[0], A[1]

    def choose_part(self, placed: list[Placed]) -> tuple[list[Placed], list[str]]:
        """Return the modules of the part that was asked for, and a remark on the others; all if none was asked for."""
        asked = self.options.part
        parts = Counter(one.part for one in placed)
        if asked is not None and asked not in parts:
            raise AdapterError(self._no_part(asked, parts))
        if asked is None and (len(parts) < 2 or self.all_parts):
            return placed, []
        if asked is None:
            raise AdapterError(
                f"adapter '{self.label}': {self.file.path.name} holds adapters for {len(parts)} part(s): "
                f"{_list_parts(parts)}; each becomes an adapter of its own. Say which: --part {max(parts)} "
                f"(part={max(parts)!r}). Or write all of them in one file: --target diffusers or --target kohya (target=…)."
            )
        others = [f"{name or 'no part'} ({count} modules)" for name, count in sorted(parts.items()) if name != asked]
        remarks = (
            [f"not converted, being adapters of their own: {', '.join(others)} (--part, part=…)."] if others else []
        )
        return [one for one in placed if one.part == asked], remarks

    def _no_part(self, part: str, parts: Counter[str]) -> str:
        known = Counter({name: count for name, count in parts.items() if name})
        if self.format.part_is_prefix:  # then the beginnings of the module names can be named as parts
            known = Counter(module.module.partition(".")[0] for module in self.file.modules)
        has = (
            f"It has {_list_parts(known)}. Name one of them with --part (part=…)"
            if known
            else "It has no parts. Leave --part (part=…) out"
        )
        return f"adapter '{self.label}': {self.file.path.name} has no part {part!r}. {has}."

    def add(self, module: LoraModule, prefix: str, layer: Layer) -> None:
        """Add the views of a module's tensors, for each module of the base that it stands for."""
        if module.kind in PEFT_TYPES:
            self._add_lycoris(module, prefix, layer)
            return
        A, B = (View.of(self.file.tensors, module.keys[side], self.format.transposed) for side in ("A", "B"))
        alpha = self._alpha(module)
        if len(layer.modules) == 1:
            self._add_pair(prefix, layer.modules[0], A, replace(B, swapped=layer.swapped), alpha)
            self._add_magnitude(module, prefix, layer.modules[0], None)
            return
        if len(A.shape) > 2 and {*A.shape[2:], *B.shape[2:]} == {1}:
            A, B = A.reshaped(A.shape[:2]), B.reshaped(B.shape[:2])
        heights = layer.heights(B.shape[0], A.shape[1])
        if min(heights) < 1 or len(A.shape) > 2:
            raise AdapterError(
                f"{self.where(module)}: it holds {B.shape[0]} rows for {', '.join(layer.modules)}, which do not fit. Is it of "
                "another model?"
            )
        spans = split_rows(self.file.tensors.read(B.key).flatten(1), heights)
        for name, span in zip(layer.modules, spans, strict=True):
            if span is not None:
                rows, columns = span
                share = None if alpha is None else alpha * (columns[1] - columns[0]) / A.shape[0]
                self._add_pair(prefix, name, A.part(columns, None), B.part(rows, columns), share)
                self._add_magnitude(module, prefix, name, rows)

    def _add_magnitude(self, module: LoraModule, prefix: str, name: str, rows: Span | None) -> None:
        """Add the view of a DoRA's magnitudes, one for each row, as PEFT has them."""
        if module.kind != DORA:
            return
        view, out = View.of(self.file.tensors, module.keys["magnitude"]), self.shape(module)[0]
        if view.shape[:1] != (out,) or math.prod(view.shape) != out:
            raise AdapterError(
                f"{self.where(module)}: its dora_scale is {list(view.shape)}, expected {[out, 1]}, one number for each output. "
                "PEFT's DoRA has no other. Leave it out."
            )
        part = view.reshaped((out, 1)).part(rows, None)
        self.views[f"{PREFIX}{prefix}{name}.lora_magnitude_vector"] = part.reshaped(part.shape[:1])

    def _add_lycoris(self, module: LoraModule, prefix: str, layer: Layer) -> None:
        """Add the views of the factors of a LoHa or a LoKr."""
        views = {side: View.of(self.file.tensors, key) for side, key in module.keys.items() if side != "alpha"}
        shared = [side for side in views if side in ("hada_w1_a", "hada_w2_a")]
        if (len(layer.modules) > 1 and (module.kind == LOKR or "hada_t1" in views)) or layer.swapped:
            raise AdapterError(
                f"{self.where(module)}: it is a {module.kind} of a layer that diffusers holds as {', '.join(layer.modules)}. Its "
                "factors cannot be taken apart. Leave it out."
            )
        kernel = any(len(view.shape) > 2 for view in views.values())
        if self.base is None and not kernel and layer.modules[0].rpartition(".")[2] in CONVOLUTIONS:
            raise AdapterError(
                f"{self.where(module)}: whether it is a convolution, and of which size, only the base tells. Name it with "
                "--base (base=…)."
            )
        alpha = self._alpha(module)
        rank = next((views[side].shape[0] for side in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b") if side in views), None)
        if module.kind == LOKR:  # PEFT divides by r even where no factor has a rank
            alpha, rank = 1.0 if rank is None or alpha is None else alpha / rank, 1
        out, width = self.shape(module)
        end = 0
        for name, height in zip(layer.modules, layer.heights(out, width), strict=True):
            start, end = end, end + height
            for side, view in views.items():
                cut = view.part((start, end), None) if side in shared and len(layer.modules) > 1 else view
                self.views[f"{PREFIX}{prefix}{name}.{side}"] = cut
            self.alphas[f"{prefix}{name}"], self.ranks[f"{prefix}{name}"] = alpha, rank or 1

    def _add_pair(self, prefix: str, name: str, A: View, B: View, alpha: float | None) -> None:
        A, B = self._fit_dimensions(A, B, prefix, name)
        path = f"{prefix}{name}"
        if path in self.alphas:
            raise AdapterError(
                f"adapter '{self.label}': two modules of the file are {path!r}. Remove one of them from it."
            )
        self.views[f"{PREFIX}{path}.lora_A.weight"], self.views[f"{PREFIX}{path}.lora_B.weight"] = A, B
        self.alphas[path], self.ranks[path] = alpha, A.shape[0]

    def _alpha(self, module: LoraModule) -> float | None:
        if "alpha" not in module.keys:
            return None
        key = module.keys["alpha"]
        one = math.prod(self.file.tensors.info(key).shape) == 1
        value = float(self.file.tensors.read(key).item()) if one else math.nan
        if not math.isfinite(value):
            seen = value if one else f"of shape {list(self.file.tensors.info(key).shape)}"
            raise AdapterError(
                f"{self.where(module)}: alpha is {seen}; expected one finite number. The file is damaged: get it again."
            )
        return value

    def _fit_dimensions(self, A: View, B: View, prefix: str, name: str) -> tuple[View, View]:
        """Return A and B with as many dimensions as the layer's weight has, which trainers may store as a convolution."""
        shape = self._base_shape(prefix, name)
        pointwise = all(size == 1 for size in (*A.shape[2:], *B.shape[2:], *(shape or ())[2:]))
        if shape is None:
            linear = name.rpartition(".")[2] not in CONVOLUTIONS and name != POINTWISE
            if self.format.is_image and pointwise and linear and len(A.shape) > 2:
                return A.reshaped(A.shape[:2]), B.reshaped(B.shape[:2])
            return A, B
        if pointwise and len(A.shape) != len(shape):
            ones = (1,) * (len(shape) - 2)
            A, B = A.reshaped((*A.shape[:2], *ones)), B.reshaped((*B.shape[:2], *ones))
        if (B.shape[0], *A.shape[1:]) != shape:
            raise AdapterError(
                f"adapter '{self.label}', module {name!r}: it changes a weight of {[B.shape[0], *A.shape[1:]]}, the "
                f"base's is {list(shape)}. Is it the base that the adapter was trained on?"
            )
        return A, B

    def _base_shape(self, prefix: str, name: str) -> tuple[int, ...] | None:
        """Return the shape of a module's weight in the base; None if it is not there under this name."""
        if self.base is None:
            return None
        found = self.base.find(f"{prefix}{name}.weight")
        if found is None:  # a newer name may stand for several modules of an older checkpoint
            return None
        shape = self.base.info(found).shape
        return shape[::-1] if self.base.is_conv1d(name) else shape

    def find_alphas(self, parts: Sequence[str]) -> tuple[Mapping[str, float], str, bool]:
        """Return the alpha with which alpha/r is the scaling of each module, its source in words, and whether it is assumed."""
        asked, label = self.options.alpha, self.label
        ranks = self.ranks
        own = {name: alpha for name, alpha in self.alphas.items() if alpha is not None}
        noted = {part: self.format.metadata(self.metadata(), part) for part in parts}
        if (own or any(noted.values())) and asked is not None:
            raise RecipeError(f"alpha (--alpha) is {asked:g}, but '{label}' states its alpha itself. Leave it out.")
        if self.file.kind != DORA and any(found.get("use_dora") for found in noted.values()):
            raise AdapterError(f"adapter '{label}' is a DoRA by its metadata, which is no plain LoRA. Leave it out.")
        if own:
            lacking = len(ranks) - len(own)
            said = "alpha from the file" + (f", scaling 1 for {lacking} without" if lacking else "")
            return {name: own.get(name, float(rank)) for name, rank in ranks.items()}, said, lacking > 0
        if parts and all("lora_alpha" in found for found in noted.values()):
            return self._noted_alphas(noted, ranks), "alpha from the file's metadata", False
        if asked is not None:
            return dict.fromkeys(ranks, asked), f"alpha {asked:g} as given", False
        scale = self.format.config_scale(self.config, label)
        if scale is not None:
            return {name: scale * rank for name, rank in ranks.items()}, f"scaling {scale:g} from its config", False
        reason = self.format.needs_alpha(list(ranks.values()))
        if reason is not None:
            raise AdapterError(
                f"adapter '{label}': the file gives no alpha (ranks {', '.join(map(str, sorted(set(ranks.values()))))}), "
                f"and {reason}. Give the lora_alpha of its training, in `ties-peft convert`: --alpha NUMBER (alpha=NUMBER)."
            )
        return {name: float(rank) for name, rank in ranks.items()}, self.format.without_alpha, True

    def _noted_alphas(self, noted: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, int]) -> dict[str, float]:
        """Return the alpha with which alpha/r is the scaling of each module, by the configs in the file's metadata."""
        alphas = {}
        for path, rank in ranks.items():
            part = path.partition(".")[0] if self.all_parts else next(iter(noted))
            name = path.removeprefix(f"{part}.") if self.all_parts else path
            metadata = Contents(noted[part], self.file.tensors, self.label)
            alpha = metadata.number("lora_alpha", "alpha_pattern", name, 8)
            alphas[path] = alpha * math.sqrt(rank) if noted[part].get("use_rslora") else alpha
        return alphas


def lycoris_shape(shapes: Mapping[str, Sequence[int]]) -> Shape:
    """Return (out, in) of a LoHa or a LoKr by the shapes of its factors; a kernel counts as columns. (1, 1) if some lack."""
    if "hada_w1_a" in shapes and "hada_w1_b" in shapes:
        return shapes["hada_w1_a"][-1 if "hada_t1" in shapes else 0], shapes["hada_w1_b"][-1]
    sides = {}
    for which in ("lokr_w1", "lokr_w2"):
        whole, left, right = (shapes.get(which + end) for end in ("", "_a", "_b"))
        if whole is None and (left is None or right is None):
            return 1, 1
        core = which == "lokr_w2" and "lokr_t2" in shapes
        sides[which] = whole[:2] if whole is not None else (left[-1 if core else 0], right[-1])  # type: ignore[index]
    (out, width), (out2, width2) = sides.values()
    return out * out2, width * width2


def _without_prefix(module: LoraModule, part: str) -> LoraModule:
    """Return a module with the part, if its name begins with it, taken out of the name."""
    if not module.module.startswith(f"{part}."):
        return module
    return LoraModule(part, module.module[len(part) + 1 :], module.keys)


def _list_parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'no name'} ({count} modules)" for name, count in sorted(parts.items()))


def by_module(alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return the config's lora_alpha, the most frequent one, and an alpha_pattern for the modules that have another."""
    (common, _), *_ = Counter(alphas.values()).most_common(1)
    groups: dict[float, list[str]] = {}
    for name, alpha in sorted(alphas.items()):
        if alpha != common:
            groups.setdefault(alpha, []).append(re.escape(name))
    patterns = {f"^({'|'.join(names)})": alpha for alpha, names in groups.items()}
    return {"lora_alpha": common, **({"alpha_pattern": patterns} if patterns else {})}
