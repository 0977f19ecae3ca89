"""Targets: which adapters a program can load, and what has to change so that it loads the result of a merge.

    peft       loads everything that is written here

    vllm       as vLLM 0.33.0 loads adapters:
      layers   LoRA on linear layers and embeddings; experts fused into one parameter only with `gate_up_proj` and
               `down_proj` together (from 0.12 on); no convolution, no bias of lora_B, no DoRA, no layer_replication
      whole    one linear layer named `score` or `classifier`, on a server that runs the base as a classifier (from 0.31
               on). A file with a tensor of trained tokens (trainable_token_indices) is refused by every release
      scaling  alpha/r or alpha/√r; rank_pattern and alpha_pattern are followed from 0.32 on
      rank     up to the server's --max-lora-rank: one of `VLLM_RANKS`, 16 by default

    llama.cpp  as convert_lora_to_gguf.py (commit 0b03ada) converts and src/llama-adapter.cpp (commit 0650ea8) loads:
      layers   LoRA on linear layers and embeddings; no convolution, no bias of lora_B, no DoRA, no fused experts, no
               layer_replication
      whole    none: the converter accepts norms, but loading ignores them
      scaling  lora_alpha over each tensor's own rank: rank_pattern is followed, rsLoRA and alpha_pattern are not
      base     its config.json is looked up by the base model's name

    diffusers, kohya   LoRAs of image models, whose modules `merging.pipeline` checks; no whole layers

A merge writes one rank, alpha = r and no patterns, so only the rank may have to change. Everything else that a target
cannot load is refused, before any work if it is known then.

Sources: vllm/lora/peft_helper.py, lora_model.py, utils.py, model_manager.py, vllm/config/lora.py (0.11 to 0.33.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import CompatibilityError, some
from . import IMAGE_TARGETS, LLAMA_CPP, PEFT, VLLM
from .extra_layers import ExtraLayer
from .extra_tensors import TOKENS, UNDER
from .types.base import BIAS, EXPERT, ModuleInfo

RELEASE = {VLLM: "vLLM 0.33.0", LLAMA_CPP: "llama.cpp", **{one: f"the format of {one}" for one in IMAGE_TARGETS}}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
VLLM_DEFAULT = 16  # its default
VLLM_HEADS = ("score", "classifier")
FUSED_PARAMETERS = {"gate_up_proj", "down_proj"}
SEVERAL = "adapt one of several parameters of a module, as for fused experts"
OTHERWISE = (
    'Write it for --target peft (target="peft"), or apply it to the base model there (PeftModel.merge_and_unload).'
)


def fit_rank(target: str | None, rank: int | None, asked: int | str, title: str, warnings: list[str]) -> int | None:
    """Return the rank of the output that a target can load.

    Args:
        target: one of `TARGETS`; None for peft.
        rank: of the output so far; None for a PEFT type without a rank.
        asked: the rank that the user asked for: a number, `max` or `auto`.
        title: of the adapters' PEFT type, such as LoRA.
        warnings: extended by what the target needs, and by a change of the rank.
    Raises: CompatibilityError if no rank fits.
    """
    if target in (None, PEFT):
        return rank
    if rank is None:
        raise CompatibilityError(
            f'target {target}: it loads only LoRA, and these adapters are {title}. Merge them for --target peft (target="peft"), '
            "and apply the result to the base model there (PeftModel.merge_and_unload)."
        )
    if target == LLAMA_CPP or target in IMAGE_TARGETS or rank <= VLLM_DEFAULT:
        return rank
    largest = VLLM_RANKS[-1]
    if rank > largest and isinstance(asked, int):
        raise CompatibilityError(
            f"target vllm: rank {rank} is over {largest}, the largest that it serves. Ask for --rank {largest} (rank={largest})."
        )
    if rank > largest:
        warnings.append(f"target vllm: rank {largest} instead of {rank}, because it serves no larger one.")
        rank = largest
    needed = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    warnings.append(
        f"target vllm: rank {rank} needs a server started with --max-lora-rank {needed} (its default is {VLLM_DEFAULT}). "
        f"A merge with --rank {VLLM_DEFAULT} (rank={VLLM_DEFAULT}) does not; its report says what it keeps."
    )
    return rank


def check_modules(
    target: str | None, modules: Mapping[str, ModuleInfo], base: str | None, replicates: bool, warnings: list[str]
) -> None:
    """Refuse modules that a target cannot load.

    Args:
        target: one of `TARGETS`; None for peft.
        modules: by name.
        base: the base model's name that is written.
        replicates: whether the adapters repeat layers of the base (layer_replication).
        warnings: extended by what else the target needs.
    Raises: CompatibilityError naming the modules.
    """
    if target in (None, PEFT, *IMAGE_TARGETS):
        return
    assert target is not None
    if replicates:
        raise CompatibilityError(
            f"target {target}: the result needs layer_replication, which {RELEASE[target]} does not load. {OTHERWISE}"
        )
    fused = _fused_experts(modules) if target == VLLM else frozenset()
    reasons = {name: reason for name, module in modules.items() if (reason := _reason(module, fused)) is not None}
    if reasons:
        first = next(iter(reasons.values()))
        raise _cannot_load(target, [name for name, reason in reasons.items() if reason == first], first)
    if fused:
        warnings.append(
            "target vllm: the experts are fused into one parameter each. vLLM from 0.12 on loads them for models whose "
            "experts it keeps fused, such as gpt-oss; for other models 0.33.0 needs --enable-mixed-moe-lora-format, and "
            "is_3d_lora_weight in the request."
        )
    if target == LLAMA_CPP and base is None:
        warnings.append(
            "target llama.cpp: the adapters name no base model, which its convert_lora_to_gguf.py looks up; "
            "name it here with --base-name (base_model=…), or there with --base."
        )


def _fused_experts(modules: Mapping[str, ModuleInfo]) -> frozenset[str]:
    """Return the paths of the fused experts of which both parameters are adapted, as vLLM requires."""
    found: dict[str, set[str]] = {}
    for name, module in modules.items():
        if module.layer_type == EXPERT and module.path.endswith(".experts"):
            found.setdefault(module.path, set()).add(name.removeprefix(f"{module.path}.").partition("[")[0])
    return frozenset(path for path, parameters in found.items() if parameters == FUSED_PARAMETERS)


def _reason(module: ModuleInfo, fused: frozenset[str]) -> str | None:
    """Return why only peft loads a module, as the end of a sentence on several modules; None if other targets load it too."""
    if len(module.shape) != 2 or module.kernel_size:
        return "are no linear layers"
    if module.layer_type == BIAS:
        return "are biases of lora_B"
    if module.layer_type == EXPERT and module.path in fused:
        return None
    return SEVERAL if module.layer_type == EXPERT or UNDER in module.path else None


def check_heads(target: str | None, layers: Sequence[ExtraLayer], warnings: list[str]) -> None:
    """Refuse whole layers that a target does not load.

    Args:
        target: one of `TARGETS`; None for peft.
        layers: that would be written.
        warnings: extended by what the others need.
    Raises: CompatibilityError naming them.
    """
    if target is None or target == PEFT or not layers:
        return
    heads = [layer for layer in layers if target == VLLM and _is_vllm_head(layer)]
    others = [layer.module for layer in layers if layer not in heads]
    if others:
        tokens = "rows of trained tokens or " if any(layer.role == TOKENS for layer in layers) else ""
        raise _cannot_load(target, others, f"are {tokens}whole layers; leave them out (--heads drop, heads='drop')")
    if len(heads) > 1:
        raise _cannot_load(target, [layer.module for layer in heads], "are two heads, and it loads one")
    outputs = heads[0].tensors["weight"].shape[0]
    warnings.append(
        f"target vllm: the head '{heads[0].module}' needs vLLM 0.31 or newer, and a server that runs the base as a "
        f"classifier; if the base's own head has fewer than {outputs} outputs, also --max-lora-cls-labels {outputs}."
    )


def _is_vllm_head(layer: ExtraLayer) -> bool:
    """Return whether a layer is one linear layer with a name that vLLM knows."""
    shapes = {name: extra.shape for name, extra in layer.tensors.items()}
    return (
        layer.module in VLLM_HEADS
        and {"weight"} <= set(shapes) <= {"weight", "bias"}
        and len(shapes["weight"]) == 2
        and shapes.get("bias", shapes["weight"][:1]) == shapes["weight"][:1]
    )


def _cannot_load(target: str, names: list[str], reason: str) -> CompatibilityError:
    return CompatibilityError(
        f"target {target}: {RELEASE[target]} cannot load {len(names)} of what would be written, which {reason}: {some(names)}. "
        f"{OTHERWISE}"
    )
