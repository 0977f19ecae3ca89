"""`ties-peft convert`: one adapter to LoRA, to another rank, dtype or loader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..adapters import TARGETS, sources
from ..merging.options import read_flag
from .base import Json, complete_from, print_json, print_loading, print_rich, print_text, print_warnings, progress_bar

if TYPE_CHECKING:
    from ..merging.merged import Merged

Part = Annotated[
    str | None, typer.Option(help="The part of a pipeline's LoRA to convert: unet, text_encoder, …", show_default=False)
]
Base = Annotated[
    str | None,
    typer.Option(
        help="The base model: for DoRA, whose task vectors depend on it, and for the module names of a kohya file.",
        show_default=False,
    ),
]
Modules = Annotated[
    Path | None,
    typer.Option(
        help="A text file with the base model's module names, one a line, in place of --base.", show_default=False
    ),
]
Alpha = Annotated[float | None, typer.Option(help="lora_alpha, if the file does not state it.", show_default=False)]
BaseName = Annotated[
    str | None, typer.Option(help="The name of the base model in the result's config.", show_default="the input's")
]
Heads = Annotated[
    str, typer.Option(help="drop leaves out whole layers (heads, embeddings, biases).", show_default="kept")
]
Target = Annotated[
    str | None,
    typer.Option(
        help=f"The program that is to load the result: {', '.join(TARGETS)}.",
        show_default="peft",
        autocompletion=complete_from(TARGETS),
    ),
]


def convert(
    adapter: Annotated[str, typer.Argument(help="Folder, file or Hub id, of PEFT, diffusers, kohya, ComfyUI or MLX.")],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    rank: Annotated[
        str | None, typer.Option(help="The rank of the result: a whole number, max or auto.", show_default="max")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="The dtype of the tensors: float32, float16 or bfloat16.", show_default="the input's"),
    ] = None,
    target: Target = None,
    part: Part = None,
    base: Base = None,
    modules: Modules = None,
    alpha: Alpha = None,
    base_name: BaseName = None,
    heads: Heads = "error",
    device: Annotated[str, typer.Option(help="The device that computes.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that ties-peft wrote.")] = False,
    as_json: Json = False,
) -> None:
    """Convert one adapter to a LoRA, another rank, dtype or target."""
    from ..adapters.writer import check_output_folder
    from ..merging.convert import convert as convert_adapter

    path = sources.local_path(adapter)
    check_output_folder(out, force, [path] if path else [])
    with progress_bar() as tell:
        made = convert_adapter(
            adapter,
            read_flag("rank", rank),
            dtype,
            target,
            device,
            part=part,
            base=base,
            modules=modules,
            alpha=alpha,
            base_model=base_name,
            heads=heads,
            progress=tell,
        )
    made.save(out, force)
    _show(made, out, as_json)


def _show(made: Merged, out: Path, as_json: bool) -> None:
    print_warnings(made.report.warnings)
    lost = 1 - made.report.energy
    if as_json:
        print_json({"out": str(out), "lost": lost, "recipe": made.recipe.to_dict(), "report": made.report.to_dict()})
        return
    print_rich(made.report.tables())
    rounding = (
        f", rounding to {made.report.dtype} {made.report.rounding:.1e} of the norm" if made.report.rounding else ""
    )
    print_text(f"\nlost: {lost:.2%} of the energy{rounding}")
    print_loading(made.loading, out)
