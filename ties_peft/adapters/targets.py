"""Targets: what a loader accepts of an adapter, and what has to change for it.

    peft       whatever is written here

    vllm       as vLLM 0.33.0 loads adapters:
      layers   LoRA on linear layers and embeddings; experts that are fused into one parameter only with `gate_up_proj`
               and `down_proj` together (from 0.12 on); no convolution, no bias of lora_B, no DoRA, no layer_replication
      whole    one layer, named `score` or `classifier`, that is one linear layer, for a server that runs the base as a
               classifier (from 0.31 on; none before). The tensor of trained tokens (trainable_token_indices) is no
               LoRA weight to it, and it refuses the file, in 0.33.0 as in every release before
      scaling  alpha/r or alpha/√r; rank_pattern and alpha_pattern are followed from 0.32 on
      rank     up to the server's --max-lora-rank, 16 by default, one of `VLLM_RANKS`

    llama.cpp  as convert_lora_to_gguf.py (commit 0b03ada) converts and src/llama-adapter.cpp (commit 0650ea8) loads:
      layers   LoRA on linear layers and embeddings; no convolution, no bias of lora_B, no DoRA, no fused experts, no
               layer_replication
      whole    none: the converter takes norms, but they are left out when the file is loaded
      scaling  lora_alpha over each tensor's own rank, so that rank_pattern is followed, and rsLoRA and alpha_pattern are not
      base     its config.json is looked up by the base model's name

What is written is plain already: one rank, alpha = r, no patterns. So there is little to fit, and what
cannot be fitted is refused before any work where it can be known.

Source: vllm/lora/peft_helper.py, lora_model.py, utils.py, model_manager.py, vllm/config/lora.py (0.11 to 0.33.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from ..errors import CompatibilityError, RecipeError, unknown

PEFT, VLLM, LLAMA_CPP = "peft", "vllm", "llama.cpp"
TARGETS = (PEFT, VLLM, LLAMA_CPP)
AS_OF = {VLLM: "vLLM 0.33.0", LLAMA_CPP: "llama.cpp"}  # whose rules these are
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes; 16 if it is not given
VLLM_DEFAULT = 16
VLLM_HEADS = ("score", "classifier")
PLAIN = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight|base_model\.model\..+\.lora_embedding_[AB]")
VLLM_HEAD = re.compile(rf"base_model\.model\.({'|'.join(VLLM_HEADS)})\.(weight|bias)")
UNDER = ".base_layer."
NESTED = re.compile(r"\.base_layer\.|\.experts\.lora_[AB]\.")  # one parameter of several in a module: experts
FUSED = re.compile(r"base_model\.model\.(.+\.experts)(\.base_layer)?\.lora_[AB]\.weight")
FUSED_PARAMETERS = {"gate_up_proj", "down_proj"}
SEVERAL = "belong to one parameter of several in a module, as experts have them"
SETTINGS = {  # of adapter_config.json, that a loader refuses or does not follow
    VLLM: ("use_dora", "lora_bias", "layer_replication"),
    LLAMA_CPP: ("use_dora", "lora_bias", "layer_replication", "use_rslora", "alpha_pattern", "modules_to_save"),
}


class Adapted(Protocol):
    """What is asked of a module."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its task vector."""

    @property
    def layer_type(self) -> str:
        """What it is the task vector of."""

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Of a convolution."""

    @property
    def path(self) -> str:
        """Of PEFT's layer."""


class Shaped(Protocol):
    """What is asked of a tensor that is written whole."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""


class Whole(Protocol):
    """What is asked of a layer that is written whole."""

    @property
    def module(self) -> str:
        """Its path in the base model."""

    @property
    def role(self) -> str:
        """What it is: a layer, or rows of trained tokens."""

    @property
    def tensors(self) -> Mapping[str, Shaped]:
        """Its tensors by name."""


def check_name(target: str | None) -> None:
    """Refuse what is no target.

    Raises: RecipeError.
    """
    if target is not None and target not in TARGETS:
        raise RecipeError(unknown("target", str(target), TARGETS))


def fit_rank(target: str | None, rank: int | None, asked: int | str, kind: str, warnings: list[str]) -> int | None:
    """The rank of the output that a target can load; what it means or changes is added to `warnings`.

    Args:
        target: one of `TARGETS`; None for peft.
        rank: that was settled; None for a kind that has none.
        asked: as the user said it: a number, `max` or `auto`.
        kind: of the adapters, such as LoRA.
    Raises: CompatibilityError where nothing can be fitted; RecipeError for what is no target.
    """
    check_name(target)
    if target in (None, PEFT):
        return rank
    if rank is None:
        raise CompatibilityError(
            f"target {target}: it loads LoRA alone, and these are {kind}. Merge them for --target peft, and apply the "
            "result to the base model there (PeftModel.merge_and_unload)."
        )
    if target == LLAMA_CPP or rank <= VLLM_DEFAULT:
        return rank
    largest = VLLM_RANKS[-1]
    if rank > largest and isinstance(asked, int):
        raise CompatibilityError(
            f"target vllm: rank {rank} is over {largest}, the most it serves. Ask for --rank {largest}."
        )
    if rank > largest:
        warnings.append(f"target vllm: rank {largest} in place of {rank}, the most it serves.")
        rank = largest
    needed = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    warnings.append(
        f"target vllm: rank {rank} needs a server started with --max-lora-rank {needed} (its default is "
        f"{VLLM_DEFAULT}); --rank {VLLM_DEFAULT} does without, and keeps less."
    )
    return rank


def check_modules(
    target: str | None, modules: Mapping[str, Adapted], base: str | None, replicates: bool, warnings: list[str]
) -> None:
    """Refuse modules that a target cannot load, and say what else it wants to know.

    Args:
        target: one of `TARGETS`; None for peft.
        modules: by name.
        base: the base model's name that is written.
        replicates: whether the adapters repeat layers of the base (layer_replication).
    Raises: CompatibilityError naming the modules.
    """
    if target in (None, PEFT):
        return
    _refuse_settings(target, ["layer_replication"] if replicates else [])
    fused = _fused_whole(modules) if target == VLLM else frozenset()
    faults = {name: fault for name, module in modules.items() if (fault := _fault(module, fused)) is not None}
    if faults:
        first = next(iter(faults.values()))
        raise _cannot(target, [name for name, fault in faults.items() if fault == first], first)
    if fused:
        warnings.append(
            "target vllm: the experts are fused into one parameter each. vLLM from 0.12 on loads them for models whose "
            "experts it keeps fused, such as gpt-oss; for others 0.33.0 needs --enable-mixed-moe-lora-format, and "
            "is_3d_lora_weight in the request."
        )
    if target == LLAMA_CPP and base is None:
        warnings.append(
            "target llama.cpp: the adapters name no base model, which its convert_lora_to_gguf.py looks up; "
            "name it here with --base-name, or there with --base."
        )


def _fused_whole(modules: Mapping[str, Adapted]) -> frozenset[str]:
    """The layers of fused experts of which both parameters are adapted, which vLLM asks for."""
    found: dict[str, set[str]] = {}
    for name, module in modules.items():
        if module.layer_type == "expert" and module.path.endswith(".experts"):
            found.setdefault(module.path, set()).add(name.removeprefix(f"{module.path}.").partition("[")[0])
    return frozenset(path for path, parameters in found.items() if parameters == FUSED_PARAMETERS)


def _fault(module: Adapted, fused: frozenset[str]) -> str | None:
    """Why a target does not load a module; None where it does."""
    if len(module.shape) != 2 or module.kernel_size:
        return "are no linear layers"
    if module.layer_type == "bias":
        return "are biases of lora_B"
    if module.layer_type == "expert" and module.path in fused:
        return None
    return SEVERAL if module.layer_type == "expert" or UNDER in module.path else None


def check_heads(target: str | None, layers: Sequence[Whole], warnings: list[str]) -> None:
    """Refuse whole layers that a target does not load, and say what the others need.

    Args:
        target: one of `TARGETS`; None for peft.
        layers: those that would be written.
        warnings: what the server needs is added.
    Raises: CompatibilityError naming them.
    """
    if target in (None, PEFT) or not layers:
        return
    heads = [layer for layer in layers if target == VLLM and _is_vllm_head(layer)]
    others = [layer.module for layer in layers if layer not in heads]
    if others:
        tokens = "rows of trained tokens or " if any(layer.role == "tokens" for layer in layers) else ""
        raise _cannot(target, others, f"are {tokens}whole layers; leave them out (--heads drop)")
    if len(heads) > 1:
        raise _cannot(target, [layer.module for layer in heads], "are two heads, where it takes one")
    outputs = heads[0].tensors["weight"].shape[0]
    warnings.append(
        f"target vllm: the head '{heads[0].module}' needs vLLM 0.31 or newer, and a server that runs the base as a "
        f"classifier; where the base's own head has fewer than {outputs} outputs, also --max-lora-cls-labels {outputs}."
    )


def _is_vllm_head(layer: Whole) -> bool:
    """Whether it is one linear layer under a name that vLLM knows."""
    tensors = {name: rider.shape for name, rider in layer.tensors.items()}
    return (
        layer.module in VLLM_HEADS
        and {"weight"} <= set(tensors) <= {"weight", "bias"}
        and len(tensors["weight"]) == 2
        and tensors.get("bias", tensors["weight"][:1]) == tensors["weight"][:1]
    )


def check_written(target: str | None, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a result that a target would load wrongly or not at all: the last word, on what is written.

    Args:
        target: one of `TARGETS`; None for peft.
        config: adapter_config.json.
        names: of the tensors.
    Raises: CompatibilityError naming what is in the way.
    """
    if target is None or target == PEFT:
        return
    found = list(names)
    switched = [key for key in SETTINGS[target] if config.get(key)]
    switched += ["bias"] if config.get("bias") not in (None, "none") else []
    switched += ["modules_to_save"] if set(config.get("modules_to_save") or ()) - set(VLLM_HEADS) else []
    _refuse_settings(target, list(dict.fromkeys(switched)))
    whole = [name for name in found if not PLAIN.fullmatch(name) and not (target == VLLM and VLLM_HEAD.fullmatch(name))]
    if whole:
        raise _cannot(target, whole, "are no lora_A or lora_B; leave them out (--heads drop)")
    pairs = _pairs(found) if target == VLLM else set()
    nested = [name for name in found if NESTED.search(name) and name not in pairs]
    if nested:
        raise _cannot(target, nested, SEVERAL)


def _pairs(names: Iterable[str]) -> set[str]:
    """The tensors of fused experts, of layers that have them for both parameters."""
    layers: dict[str, list[str]] = {}
    for name in names:
        if match := FUSED.fullmatch(name):
            layers.setdefault(match[1], []).append(name)
    return {name for own in layers.values() if len(own) == 4 for name in own}


def _refuse_settings(target: str | None, settings: list[str]) -> None:
    if settings:
        raise CompatibilityError(
            f"target {target}: the result needs {', '.join(settings)}, which {AS_OF[str(target)]} does not load. Write it "
            "for --target peft, or apply it to the base model there (PeftModel.merge_and_unload)."
        )


def _cannot(target: str | None, names: list[str], why: str) -> CompatibilityError:
    some = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return CompatibilityError(
        f"target {target}: {AS_OF[str(target)]} cannot load {len(names)} of what would be written, which {why}: {some}. "
        "Write it for --target peft, or apply it to the base model there (PeftModel.merge_and_unload)."
    )
