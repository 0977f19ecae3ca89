"""`ties-peft convert`: convert one adapter to a LoRA, another rank, dtype or file format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..merging.options import DEVICE, read_flag
from .base import Force, Json, Out, check_output, print_result, print_warnings, progress_bar, takes_merge_options

Part = Annotated[
    str | None,
    typer.Option(help="The part of an image model's LoRA to convert: unet, text_encoder, …", show_default=False),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub id of the base model, for DoRA, whose task vectors depend on its weights, and for the module "
        "names of a kohya file.",
        show_default=False,
    ),
]
Modules = Annotated[
    Path | None,
    typer.Option(
        help="A text file with the base model's module names, one per line, in place of --base.", show_default=False
    ),
]
Alpha = Annotated[float | None, typer.Option(help="lora_alpha, if the file does not state it.", show_default=False)]
Heads = Annotated[
    str, typer.Option(help="drop leaves out whole layers (heads, embeddings, biases).", show_default="kept")
]


@takes_merge_options("rank", ("dtype", "target", "base_model"))
def convert(
    adapter: Annotated[str, typer.Argument(help="Folder, file or Hub id, of PEFT, diffusers, kohya, ComfyUI or MLX.")],
    out: Out,
    rank: Annotated[
        str | None, typer.Option(help="The rank of the result: a whole number, max or auto.", show_default="max")
    ] = None,
    part: Part = None,
    base: Base = None,
    modules: Modules = None,
    alpha: Alpha = None,
    heads: Heads = "error",
    device: Annotated[str, typer.Option(help="The device that computes.")] = DEVICE,
    force: Force = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Convert one adapter to a LoRA, another rank, dtype or file format."""
    from ..merging.convert import convert as convert_adapter

    check_output(out, force, [adapter])
    with progress_bar() as progress:
        made = convert_adapter(
            adapter,
            read_flag("rank", rank),
            device=device,
            part=part,
            base=base,
            modules=modules,
            alpha=alpha,
            heads=heads,
            progress=progress,
            **options,
        )
    made.save(out, force)
    report, lost = made.report, 1 - made.report.energy
    print_warnings(report.warnings)
    rounding = f", rounding to {report.dtype} {report.rounding:.1e} of the norm" if report.rounding else ""
    remark = f"\nlost: {lost:.2%} of the energy{rounding}\n"
    print_result(made, out, {"lost": lost, "recipe": made.recipe.to_dict()}, as_json, remark)
