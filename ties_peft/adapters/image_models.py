"""Module names of image models: those of diffusers, and those of the models' own code, which trainers use.

A LoRA is merged under diffusers' names. A file may use others:

    SD1, SD2     diffusers' own (`down_blocks.0.attentions.0…`)
    SDXL         often those of the LDM code: `input_blocks.4.1…`, where a block's number counts layers over all levels
    SD3          `joint_blocks.0.x_block.attn.qkv`: queries, keys and values are one layer, its rows stacked
    Flux         `double_blocks.0.img_attn.qkv`, `single_blocks.0.linear1`: the same, also with a first feed-forward layer

kohya's trainers write each of these with underscores for dots. Names that contain underscores themselves are told apart by
the words that occur in them. `Layer` says which modules of diffusers a layer of a file holds, and `layers_of` which
layers hold some modules of diffusers.

Sources: the conversion scripts of diffusers, the module trees of CompVis' stable-diffusion, Stability AI's
generative-models and sd3-ref, and Black Forest Labs' flux.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SD, SDXL, SD3, FLUX = "Stable Diffusion", "SDXL", "SD3", "Flux"
UNET, TRANSFORMER, NATIVE = "unet", "transformer", "diffusion_model"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
LOADED = {  # the parts of which diffusers' load_lora_weights loads a LoRA
    SD: (UNET, "text_encoder"),
    SDXL: (UNET, "text_encoder", "text_encoder_2"),
    SD3: (TRANSFORMER, "text_encoder", "text_encoder_2"),
    FLUX: (TRANSFORMER, "text_encoder"),
}
LEVELS, BLOCK = 4, 3  # of the UNets of SD1, SD2 and SDXL; the layers of a level: two, and one that changes the size
FLUX_BLOCKS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
WIDTHS = {1536: SD3, 2432: SD3, 3072: FLUX}  # of the attention of published models

UNET_WORDS = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj conv_shortcut "
    "conv_in conv_out time_embedding add_embedding linear_1 linear_2 attentions resnets downsamplers upsamplers attn1 attn2 "
    "ff net proj conv conv1 conv2"
)
TRANSFORMER_WORDS = (
    "transformer_blocks single_transformer_blocks to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj "
    "ff_context norm1_context proj_mlp proj_out norm_out x_embedder context_embedder time_text_embed timestep_embedder "
    "text_embedder guidance_embedder pos_embed linear_1 linear_2 attn attn2 norm norm1 linear ff net proj"
)
TEXT_WORDS = (
    "text_model text_projection self_attn q_proj k_proj v_proj out_proj token_embedding position_embedding encoder layers mlp "
    "fc1 fc2 embeddings block layer SelfAttention DenseReluDense wi_0 wi_1 wi wo q k v o"
)
CONVOLUTIONS = frozenset(["conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out"])
POINTWISE = "pos_embed.proj"

FLUX_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d{1,4})\..+")
LDM_LAYERS = {  # name in the LDM code: name in diffusers
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    **{f"input_blocks.{BLOCK * at + 3}.0.op": f"down_blocks.{at}.downsamplers.0.conv" for at in range(LEVELS)},
    **{
        f"output_blocks.{BLOCK * at + 2}.{place}.conv": f"up_blocks.{at}.upsamplers.0.conv"
        for at in range(LEVELS)
        for place in (1, 2)  # 2 after an attention, which the levels have that are written
    },
}
LDM_BLOCKS = {  # the same for what holds the layers of LDM_RESNET, or an attention, whose layers have diffusers' names
    **{
        f"{block}_blocks.{BLOCK * level + layer + first}.{place}": f"{side}_blocks.{level}.{holder}.{layer}"
        for block, side, first, layers in (("input", "down", 1, BLOCK - 1), ("output", "up", 0, BLOCK))
        for level in range(LEVELS)
        for layer in range(layers)
        for place, holder in enumerate(("resnets", "attentions"))
    },
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
LDM_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
LDM_DOTS = {name.replace(".", "_"): name for name in (*LDM_LAYERS, *LDM_RESNET)}
IN_LDM_BLOCK = re.compile(r"((?:input_blocks[._]\d+|output_blocks[._]\d+|middle_block)[._]\d+)[._](.+)")
IN_UNET_BLOCK = re.compile(r"((?:down_blocks\.\d+|up_blocks\.\d+|mid_block)\.\w+\.\d+)\.(.+)")

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
EMBEDDER = "time_text_embed.{}_embedder.linear_{}"
FLUX_LAYERS: Mapping[str, tuple[str, ...]] = {  # name in the model's code: names in diffusers; # stands for a number
    **{
        f"double_blocks.#.{native}": tuple(f"transformer_blocks.#.{name}" for name in names)
        for native, names in {
            "img_attn.qkv": ATTENTION,
            "txt_attn.qkv": ADDED,
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
        }.items()
    },
    **{
        f"single_blocks.#.{native}": tuple(f"single_transformer_blocks.#.{name}" for name in names)
        for native, names in {
            "linear1": (*ATTENTION, "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        }.items()
    },
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": (EMBEDDER.format("timestep", 1),),
    "time_in.out_layer": (EMBEDDER.format("timestep", 2),),
    "vector_in.in_layer": (EMBEDDER.format("text", 1),),
    "vector_in.out_layer": (EMBEDDER.format("text", 2),),
    "guidance_in.in_layer": (EMBEDDER.format("guidance", 1),),
    "guidance_in.out_layer": (EMBEDDER.format("guidance", 2),),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SD3_LAYERS: Mapping[str, tuple[str, ...]] = {
    **{
        f"joint_blocks.#.{native}": tuple(f"transformer_blocks.#.{name}" for name in names)
        for native, names in {
            "x_block.attn.qkv": ATTENTION,
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.attn.qkv": ADDED,
            "context_block.attn.proj": ("attn.to_add_out",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
            "context_block.adaLN_modulation.1": ("norm1_context.linear",),
        }.items()
    },
    "x_embedder.proj": (POINTWISE,),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": (EMBEDDER.format("timestep", 1),),
    "t_embedder.mlp.2": (EMBEDDER.format("timestep", 2),),
    "y_embedder.mlp.0": (EMBEDDER.format("text", 1),),
    "y_embedder.mlp.2": (EMBEDDER.format("text", 2),),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
TABLES = {FLUX: FLUX_LAYERS, SD3: SD3_LAYERS}
STACKED_IN = {  # for each table: name in diffusers: name in the model's code
    architecture: {name: native for native, names in table.items() for name in names}
    for architecture, table in TABLES.items()
}
Shape = tuple[int, int]
NUMBER = re.compile(r"[0-9]{1,4}")


@dataclass(frozen=True)
class Layer:
    """A layer as a file holds it.

    Attributes:
        name: in the model's own code, with dots.
        modules: those of diffusers whose rows it stacks, in order.
        swapped: whether the two halves of its rows (scale and shift) stand in the other order in diffusers.
    """

    name: str
    modules: tuple[str, ...]
    swapped: bool = False

    def heights(self, out: int, width: int) -> list[int]:
        """Return how many of `out` rows belong to each module; queries, keys and values have equally many.

        Args:
            out: rows of the whole layer.
            width: columns of the layer.
        """
        count = len(self.modules)
        return [width, width, width, out - 3 * width] if count > 3 else [out // count] * count

    def whole_heights(self, known: Mapping[str, int], width: int) -> list[int]:
        """Return how many rows each module has, given those of some of them and the columns of the layer."""
        count = len(self.modules)
        others = [width, width, width, 4 * width] if count > 3 else [next(iter(known.values()))] * count
        return [known.get(name, other) for name, other in zip(self.modules, others, strict=True)]


def split_words(name: str, words: str) -> str | None:
    """Return a name with underscores for dots as a path; None if it has other words than these.

    >>> split_words("mid_block_attentions_0_proj_in", UNET_WORDS)
    'mid_block.attentions.0.proj_in'
    """
    known, parts = set(words.split()), name.split("_")
    path, start = [], 0
    while start < len(parts):
        ends = range(min(len(parts), start + 3), start, -1)
        word = next((w for end in ends if (w := "_".join(parts[start:end])) in known or NUMBER.fullmatch(w)), None)
        if word is None:
            return None
        path.append(word)
        start += word.count("_") + 1
    return ".".join(path)


def find_layers(shapes: Mapping[str, Shape], joined: bool) -> tuple[str, dict[str, Layer]] | None:
    """Return the architecture of a denoiser, empty if several have these names, and the layer of each name.

    Args:
        shapes: (out, in) of each layer, by its name in the file.
        joined: whether the names have underscores for dots.
    Returns: None if no known architecture has all of the names.
    """
    ldm = {name: _ldm_layer(name, joined) for name in shapes}
    found: list[tuple[str, dict[str, Layer | None]]] = [(SDXL, ldm)]
    for architecture, table in TABLES.items():
        known = {(key.replace(".", "_") if joined else key): key for key in table}
        own = {name: _table_layer(name, known, table, shape, architecture) for name, shape in shapes.items()}
        found.append((architecture, own))
    for words in (UNET_WORDS, TRANSFORMER_WORDS) if joined else ():
        paths = {name: split_words(name, words) for name in shapes}
        found.append(("", {name: path and Layer(path, (path,)) for name, path in paths.items()}))  # type: ignore[misc]
    for architecture, layers in found:
        complete = {name: layer for name, layer in layers.items() if layer is not None}
        if len(complete) == len(shapes):
            modules = [module for layer in complete.values() for module in layer.modules]
            return architecture if architecture in TABLES else architecture_of(dict.fromkeys(modules)), complete
    return None


def _ldm_layer(name: str, joined: bool) -> Layer | None:
    """Return the layer of a UNet's name in the LDM code."""
    dots = LDM_DOTS if joined else {}
    whole = dots.get(name, name)
    if whole in LDM_LAYERS:
        return Layer(whole, (LDM_LAYERS[whole],))
    match = IN_LDM_BLOCK.fullmatch(name)
    native = "" if match is None else re.sub(r"[._](?=\d)", ".", match[1])
    if match is None or native not in LDM_BLOCKS:
        return None
    block, inner = LDM_BLOCKS[native], dots.get(match[2], match[2])
    if ".resnets." in block:
        return Layer(f"{native}.{inner}", (f"{block}.{LDM_RESNET[inner]}",)) if inner in LDM_RESNET else None
    path = split_words(inner, UNET_WORDS) if joined else inner
    return None if path is None else Layer(f"{native}.{path}", (f"{block}.{path}",))


def _to_ldm(module: str) -> Layer | None:
    """Return the layer of the LDM code that is a module of a UNet of diffusers."""
    whole, blocks, resnet = ({ours: native for native, ours in t.items()} for t in (LDM_LAYERS, LDM_BLOCKS, LDM_RESNET))
    if module in whole:
        return Layer(whole[module], (module,))
    match = IN_UNET_BLOCK.fullmatch(module)
    if match is None or match[1] not in blocks:
        return None
    inner = resnet.get(match[2]) if ".resnets." in match[1] else match[2]
    return None if inner is None else Layer(f"{blocks[match[1]]}.{inner}", (module,))


def _template(name: str) -> tuple[str, str]:
    """Return a name with # for the number of its block, as the tables have it, and the number; empty if it has none."""
    number = re.search(r"(?<=blocks[._])\d+", name)
    return (name, "") if number is None else (f"{name[: number.start()]}#{name[number.end() :]}", number[0])


def _table_layer(
    name: str, known: Mapping[str, str], table: Mapping[str, tuple[str, ...]], shape: Shape, architecture: str
) -> Layer | None:
    """Return the layer of a name in a table of templates, if its shape is one of that architecture."""
    template, number = _template(name)
    if template not in known:
        return None
    native = known[template]
    swapped = _is_swapped(table[native][0], shape)
    layer = _numbered(native, number, table[native], swapped)
    return layer if _fits(layer, shape, architecture) else None


def _numbered(native: str, number: str, modules: Iterable[str], swapped: bool) -> Layer:
    """Return the layer that an entry of a table stands for in one block."""
    return Layer(native.replace("#", number), tuple(module.replace("#", number) for module in modules), swapped)


def _is_swapped(module: str, shape: Shape) -> bool:
    """Return whether a layer gives a scale and a shift, which diffusers has in the other order."""
    last = module.endswith("norm1_context.linear") and shape[0] == 2 * shape[1]  # of SD3's last block
    return last or module == "norm_out.linear"


def _fits(layer: Layer, shape: Shape, architecture: str) -> bool:
    out, width = shape
    if architecture == FLUX and layer.name.endswith((".img_mlp.0", ".txt_mlp.0")):
        return out == 4 * width
    if architecture == FLUX and layer.name.endswith(".linear1"):
        return out == 7 * width
    if architecture == FLUX and not _within_flux(layer.modules):
        return False
    return out % len(layer.modules) == 0


def _within_flux(modules: Iterable[str]) -> bool:
    blocks = [FLUX_BLOCK.fullmatch(module) for module in modules if module.startswith(tuple(FLUX_BLOCKS))]
    return all(block is not None and int(block[2]) < FLUX_BLOCKS[block[1]] for block in blocks)


def part_of(modules: Iterable[str]) -> str | None:
    """Return the part of a pipeline that some modules of diffusers or transformers belong to; None if the names do not say it."""
    names = list(modules)
    starts = {name.partition(".")[0] for name in names}
    if starts <= {"down_blocks", "up_blocks", "mid_block", "conv_in", "conv_out", "time_embedding", "add_embedding"}:
        return UNET
    if starts & {"transformer_blocks", "single_transformer_blocks"}:
        return TRANSFORMER
    if all(re.match(r"(text_model\.)?encoder\.layers\.\d|text_model\.|text_projection", name) for name in names):
        return TEXT_ENCODERS[0]
    return None


def architecture_of(widths: Mapping[str, int | None], parts: Iterable[str] = (), base: str | None = None) -> str:
    """Return the architecture that some modules of a denoiser belong to; empty if it is not known.

    Args:
        widths: the columns of each module, by its name in diffusers, where they are known.
        parts: of the file.
        base: the base model's name.
    """
    names = list(widths)
    if not names:
        return _by_name(base) or (SDXL if TEXT_ENCODERS[1] in parts else "")
    if part_of(names) == UNET:
        large = any(re.search(r"transformer_blocks\.[1-9]|^add_embedding", name) for name in names)
        return SDXL if large or TEXT_ENCODERS[1] in parts else SD
    fitting = [one for one, known in STACKED_IN.items() if all(_template(name)[0] in known for name in names)]
    if not _within_flux(names):
        fitting = [one for one in fitting if one != FLUX]
    if any(name.startswith("single_transformer_blocks.") for name in names):
        return FLUX if FLUX in fitting else ""
    if any("attn2." in name or name.startswith("pos_embed") for name in names):
        return SD3 if SD3 in fitting else ""
    width = next((w for name, w in widths.items() if w and name.endswith((".to_q", ".add_q_proj"))), 0)
    guess = _by_name(base) or WIDTHS.get(width, SD3)  # other widths are those of small test models
    return guess if guess in fitting else ""


def _by_name(base: str | None) -> str:
    name = (base or "").lower()
    marks = {"flux": FLUX, "stable-diffusion-3": SD3, "sd3": SD3, "xl": SDXL}
    return next((architecture for mark, architecture in marks.items() if mark in name), "")


def layers_of(architecture: str, modules: Mapping[str, Shape]) -> list[Layer] | None:
    """Return the layers, in the spelling of an architecture's own code, that hold some modules of diffusers.

    Args:
        architecture: one of those above; Stable Diffusion's own names are those of diffusers.
        modules: (out, in) of each.
    Returns: None if the architecture has not all of the modules.
    """
    if architecture == SD:
        return [Layer(name, (name,)) for name in modules]
    if architecture == SDXL:
        found = [_to_ldm(name) for name in modules]
        return [layer for layer in found if layer is not None] if None not in found else None
    layers: dict[str, Layer] = {}
    for name, shape in modules.items():
        template, number = _template(name)
        native = STACKED_IN[architecture].get(template)
        if native is None:
            return None
        layer = _numbered(native, number, TABLES[architecture][native], _is_swapped(name, shape))
        layers[layer.name] = layer
    return list(layers.values())
