"""Tiny pipelines of diffusers with random weights, LoRAs for them, and writers of the formats that are independent of the package.

The names of kohya's files are written out here from the published trainers (sd-scripts) and module trees, not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Loras = dict[str, dict[str, tuple[Tensor, Tensor, float]]]  # part → module → (A, B, alpha)

TEXT = ["text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc2"]
TRANSFORMER_LAYERS = ("attn1.to_q", "attn2.to_k", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
SDXL_BLOCKS = {  # diffusers → the LDM code, with kohya's underscores
    "down_blocks.0.resnets.0": "input_blocks_1_0",
    "down_blocks.0.resnets.1": "input_blocks_2_0",
    "down_blocks.0.downsamplers.0": "input_blocks_3_0",
    "down_blocks.1.resnets.0": "input_blocks_4_0",
    "down_blocks.1.attentions.0": "input_blocks_4_1",
    "down_blocks.1.attentions.1": "input_blocks_5_1",
    "down_blocks.2.attentions.0": "input_blocks_7_1",
    "down_blocks.2.attentions.1": "input_blocks_8_1",
    "mid_block.resnets.0": "middle_block_0",
    "mid_block.attentions.0": "middle_block_1",
    "mid_block.resnets.1": "middle_block_2",
    "up_blocks.0.attentions.0": "output_blocks_0_1",
    "up_blocks.0.attentions.2": "output_blocks_2_1",
    "up_blocks.0.upsamplers.0": "output_blocks_2_2",
    "up_blocks.1.attentions.1": "output_blocks_4_1",
    "up_blocks.2.resnets.1": "output_blocks_7_0",
}
SDXL_ENDS = {"downsamplers.0.conv": "op", "upsamplers.0.conv": "conv"}
SDXL_OTHERS = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
FLUX_LAYERS = {  # kohya's name → the modules whose rows it stacks
    "double_blocks_0_img_attn_qkv": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_v",
    ],
    "double_blocks_0_txt_attn_qkv": [
        "transformer_blocks.0.attn.add_q_proj",
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.0.attn.add_v_proj",
    ],
    "double_blocks_0_img_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks_0_txt_attn_proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks_0_img_mlp_0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks_0_txt_mlp_2": ["transformer_blocks.0.ff_context.net.2"],
    "double_blocks_0_img_mod_lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks_0_linear1": [
        "single_transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_k",
        "single_transformer_blocks.0.attn.to_v",
        "single_transformer_blocks.0.proj_mlp",
    ],
    "single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
    "single_blocks_0_modulation_lin": ["single_transformer_blocks.0.norm.linear"],
}
SD3_LAYERS = {
    "joint_blocks_0_x_block_attn_qkv": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_v",
    ],
    "joint_blocks_1_x_block_attn_qkv": [
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.to_k",
        "transformer_blocks.1.attn.to_v",
    ],
    "joint_blocks_0_x_block_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
    "joint_blocks_0_context_block_attn_qkv": [
        "transformer_blocks.0.attn.add_q_proj",
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.0.attn.add_v_proj",
    ],
    "joint_blocks_0_context_block_mlp_fc1": ["transformer_blocks.0.ff_context.net.0.proj"],
    "joint_blocks_0_x_block_mlp_fc2": ["transformer_blocks.0.ff.net.2"],
    "joint_blocks_0_x_block_adaLN_modulation_1": ["transformer_blocks.0.norm1.linear"],
}
TEXT_PREFIXES = {
    "sd": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "flux": {"text_encoder": "lora_te1"},
}
ARCHITECTURES = tuple(TEXT_PREFIXES)


def clip(projection: bool = False, size: int = 32) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=size,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        projection_dim=size,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def unet(levels: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    plain, crossed = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    order = [crossed] * (levels - 1) + [plain] if not more else [plain] + [crossed] * (levels - 1)
    return UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 64)[:levels],
        layers_per_block=2,
        sample_size=8,
        down_block_types=tuple(down for down, _ in order),
        up_block_types=tuple(up for _, up in reversed(order)),
        norm_num_groups=8,
        attention_head_dim=4,
        **({"cross_attention_dim": 32} | more),
    )


def pipeline(name: str) -> Any:
    """A pipeline of one architecture, without the parts that take no LoRA."""
    import diffusers

    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler()
    if name == "sd":
        return diffusers.StableDiffusionPipeline(
            vae=None, text_encoder=clip(), tokenizer=None, unet=unet(4), scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    if name == "sdxl":
        own = unet(
            3, cross_attention_dim=64, transformer_layers_per_block=(1, 2, 2), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        )  # fmt: skip
        return diffusers.StableDiffusionXLPipeline(
            vae=None, text_encoder=clip(), text_encoder_2=clip(True), tokenizer=None, tokenizer_2=None, unet=own,
            scheduler=scheduler,
        )  # fmt: skip
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    if name == "sd3":
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        )  # fmt: skip
        return diffusers.StableDiffusion3Pipeline(
            transformer=transformer, scheduler=flow, vae=None, text_encoder=clip(True), tokenizer=None,
            text_encoder_2=clip(True), tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=transformer, scheduler=flow, vae=None, text_encoder=clip(), tokenizer=None, text_encoder_2=None,
        tokenizer_2=None,
    )  # fmt: skip


def modules(name: str) -> dict[str, list[str]]:
    """The modules to adapt, by part."""
    text = dict.fromkeys(TEXT_PREFIXES[name], TEXT)
    inner = [f"transformer_blocks.0.{layer}" for layer in TRANSFORMER_LAYERS] + ["proj_in", "proj_out"]
    if name == "sd":
        blocks = ("down_blocks.0.attentions.1", "mid_block.attentions.0", "up_blocks.3.attentions.2")
        others = [
            "down_blocks.3.resnets.0.conv1",
            "up_blocks.1.upsamplers.0.conv",
            "conv_in",
            "time_embedding.linear_1",
        ]
        return {"unet": [f"{block}.{one}" for block in blocks for one in inner] + others, **text}
    if name == "sdxl":
        found = [
            f"{block}.{one}"
            for block in SDXL_BLOCKS
            if "attentions" in block
            for one in (*inner, "transformer_blocks.1.attn1.to_v")
        ]
        found += [f"{block}.{one}" for block in SDXL_BLOCKS if "resnets" in block for one in ("conv1", "time_emb_proj")]
        found += [
            "down_blocks.0.downsamplers.0.conv",
            "up_blocks.0.upsamplers.0.conv",
            "down_blocks.1.resnets.0.conv_shortcut",
        ]
        return {"unet": [*found, *SDXL_OTHERS], **text}
    layers = FLUX_LAYERS if name == "flux" else SD3_LAYERS
    return {"transformer": [one for own in layers.values() for one in own], **text}


def weight(pipe: Any, part: str, module: str) -> Tensor:
    model = getattr(pipe, part)
    known = dict(model.named_modules())
    return known[module if module in known else module.removeprefix("text_model.")].weight


def draw(pipe: Any, name: str, seed: int, rank: int = 3, alpha: float = 1.5) -> Loras:
    """A LoRA of all parts with other values for each seed; the modules of one layer of kohya's share A."""
    random = torch.Generator().manual_seed(seed)
    layers = {one: own[0] for own in (FLUX_LAYERS if name == "flux" else SD3_LAYERS).values() for one in own}
    shared: Tensors = {}
    found: Loras = {}
    for part, names in modules(name).items():
        for module in names:
            shape = weight(pipe, part, module).shape
            ones = (1,) * (len(shape) - 2)
            A = torch.randn(rank, *shape[1:], generator=random) * 0.3
            if part == "transformer":
                A = shared.setdefault(layers[module], A)
            B = torch.randn(shape[0], rank, *ones, generator=random) * 0.3
            found.setdefault(part, {})[module] = A, B, alpha
    return found


def write_diffusers(pipe: Any, loras: Loras, folder: Path, metadata: bool) -> Path:
    """By diffusers' own `save_lora_weights`."""
    layers, configs = {}, {}
    for part, own in loras.items():
        layers[f"{part}_lora_layers"] = {
            f"{module}.lora_{side}.weight": (tensor if metadata or side == "A" else tensor * alpha / A.shape[0]).clone()
            for module, (A, B, alpha) in own.items()
            for side, tensor in (("A", A), ("B", B))
        }
        (rank, alpha), *_ = {(A.shape[0], alpha) for A, _, alpha in own.values()}
        names = sorted(own)
        configs[f"{part}_lora_adapter_metadata"] = {"r": rank, "lora_alpha": alpha, "target_modules": names}
    type(pipe).save_lora_weights(str(folder), **layers, **(configs if metadata else {}))
    return folder / "pytorch_lora_weights.safetensors"


def sdxl_name(module: str) -> str:
    if module in SDXL_OTHERS:
        return SDXL_OTHERS[module]
    block = next(one for one in SDXL_BLOCKS if module.startswith(f"{one}."))
    rest = module[len(block) + 1 :]
    end = next((ldm for name, ldm in SDXL_ENDS.items() if module.endswith(name)), None)
    return f"{SDXL_BLOCKS[block]}_{end or RESNET.get(rest, rest.replace('.', '_'))}"


def kohya_tensors(name: str, loras: Loras) -> Tensors:
    """The tensors of a file of kohya's trainers."""
    found: Tensors = {}

    def put(key: str, A: Tensor, B: Tensor, alpha: float) -> None:
        found[f"{key}.lora_down.weight"], found[f"{key}.lora_up.weight"] = A.clone(), B.clone()
        found[f"{key}.alpha"] = torch.tensor(alpha)

    for part, own in loras.items():
        if part in TEXT_PREFIXES[name]:
            for module, factors in own.items():
                put(f"{TEXT_PREFIXES[name][part]}_{module.replace('.', '_')}", *factors)
        elif name in ("sd", "sdxl"):
            for module, factors in own.items():
                put(f"lora_unet_{sdxl_name(module) if name == 'sdxl' else module.replace('.', '_')}", *factors)
        else:
            for layer, stacked in (FLUX_LAYERS if name == "flux" else SD3_LAYERS).items():
                A, _, alpha = own[stacked[0]]
                put(f"lora_unet_{layer}", A, torch.cat([own[module][1] for module in stacked]), alpha)
    return found


def write_kohya(name: str, loras: Loras, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    save_file(kohya_tensors(name, loras), path, metadata=dict(metadata or {}))
    return path


def outputs(pipe: Any, name: str) -> dict[str, Tensor]:
    """What the denoiser and each text encoder compute of fixed inputs."""
    random = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    with torch.no_grad():
        found = {
            part: getattr(pipe, part)(torch.arange(7)[None])[0]
            for part in ("text_encoder", "text_encoder_2")
            if getattr(pipe, part, None) is not None
        }
        if name in ("sd", "sdxl"):
            more = (
                {"added_cond_kwargs": {"text_embeds": noise(1, 32), "time_ids": noise(1, 6)}} if name == "sdxl" else {}
            )
            found["unet"] = pipe.unet(noise(1, 4, 8, 8), 3, noise(1, 7, 64 if more else 32), **more)[0]
        elif name == "sd3":
            found["transformer"] = pipe.transformer(
                noise(1, 4, 8, 8),
                encoder_hidden_states=noise(1, 7, 32),
                pooled_projections=noise(1, 64),
                timestep=torch.tensor([3]),
            )[0]
        else:
            found["transformer"] = pipe.transformer(
                noise(1, 16, 4), encoder_hidden_states=noise(1, 7, 32), pooled_projections=noise(1, 32),
                timestep=torch.tensor([0.3]), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(7, 3),
            )[0]  # fmt: skip
    return found


@dataclass
class Patched:
    """Weights of a pipeline with deltas added; the old ones come back at the end."""

    pipe: Any
    terms: list[tuple[float, Loras]]

    def __enter__(self) -> None:
        self.old: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for factor, loras in self.terms:
                for part, own in loras.items():
                    for module, (A, B, alpha) in own.items():
                        into = weight(self.pipe, part, module)
                        self.old.append((into, into.clone()))
                        delta = B.double().flatten(1) @ A.double().flatten(1)
                        into += (factor * alpha / A.shape[0] * delta).reshape(into.shape).float()

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for into, old in reversed(self.old):
                into.copy_(old)
