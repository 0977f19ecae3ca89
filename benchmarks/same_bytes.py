"""Compare the bytes of many merges between two versions of the code, on one machine.

    python benchmarks/same_bytes.py --write before.json     # with one version
    python benchmarks/same_bytes.py --against before.json   # with another; exit status 1 if anything differs

The merges cover every method in every space that it has, for LoRA and (IA)³, with weights, densities, scopes, dtypes, ranks,
prepared merges, pairs of methods, merges large enough for the compiled loops, and the sample adapters. Each merge is
saved, and the digests of the tensors in `adapter_model.safetensors`, by name, and of `adapter_config.json` are compared.
Merges that only one version can make are listed. Digests depend on the machine and its libraries, so none are in the
repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import synthetic
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ties_peft

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.mlp.down_proj": (16, 40),
    "model.layers.1.self_attn.q_proj": (24, 16),
    "model.layers.10.mlp.up_proj": (40, 16),
}
SAMPLES = Path(__file__).resolve().parent.parent / "adapters"
Case = tuple[str, Callable[[], Any]]


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Write an adapter's folder."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def lora(folder: Path, seed: int, rank: int, **extra: Any) -> Path:
    """Write a random LoRA."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in SHAPES.items():
        tensors[f"{synthetic.PREFIX}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=draw)
        tensors[f"{synthetic.PREFIX}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=draw)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(SHAPES), **extra}
    return write_adapter(folder, config, tensors)


def ia3(folder: Path, seed: int) -> Path:
    """Write a random (IA)³ adapter."""
    draw = torch.Generator().manual_seed(seed)
    vectors = {"layers.0.k": (12, False), "layers.0.down": (20, True), "layers.1.k": (12, False)}
    tensors = {}
    for name, (length, on_input) in vectors.items():
        vector = 1 + torch.randn(length, generator=draw) / 4
        tensors[f"{synthetic.PREFIX}{name}.ia3_l"] = vector.reshape((1, -1) if on_input else (-1, 1))
    feedforward = [name for name, (_, on_input) in vectors.items() if on_input]
    config = {"peft_type": "IA3", "target_modules": sorted(vectors), "feedforward_modules": feedforward}
    return write_adapter(folder, config, tensors)


def attach_statistics(path: Path, seed: int) -> None:
    """Write random statistics beside an adapter, as `fisher` and `regmean` read them."""
    adapter = ties_peft.Adapter.load(path)
    draw = torch.Generator().manual_seed(seed)
    for kind in ("fisher", "gram"):
        found = {}
        for name in adapter.modules:
            shape = tuple(adapter.delta(name).shape)
            x = torch.randn(40, shape[-1], generator=draw)
            if kind == "gram" and len(shape) == 2:
                found[name] = x.T @ x / 40
            elif kind == "fisher":
                found[name] = torch.randn(shape, generator=draw).square()
        facts = {"kind": kind, "adapter": adapter.digest, "rows": 40, "same": {}}
        save_file(found, path / f"{kind}.safetensors", metadata={"ties_peft": json.dumps(facts)})


def every_method(loras: list[Path], even: list[Path], vectors: list[Path]) -> Iterator[Case]:
    """Yield each method in each space, with its defaults and with weights, for two and for three adapters."""
    for info in ties_peft.methods():
        for kind in info.kinds:
            for space in info.spaces if kind == "lora" else ("delta",):
                paths = vectors if kind == "ia3" else even if space == "factors" else loras
                for count in (2, 3):
                    given = [1.0, 0.5, 2.0][:count]
                    asked = {"method": info.name, "space": space}
                    name = f"{info.name} {space} {kind} {count}"
                    yield name, lambda a=asked, p=paths[:count]: ties_peft.merge(p, **a)
                    yield (
                        f"{name} weighted",
                        lambda a=asked, p=paths[:count], w=given: ties_peft.merge(p, weights=w, **a),
                    )


def options(loras: list[Path], vectors: list[Path], mixed: list[Path]) -> Iterator[Case]:
    """Yield TIES and a few other methods with each option."""
    asked: list[dict[str, Any]] = [
        *({"density": density, "scope": scope} for density in (0.05, 0.5, 1.0) for scope in ("adapter", "module")),
        *({"elect": elect, "disjoint": "sum"} for elect in ("mass", "count", "none")),
        *({"disjoint": by} for by in ("mean", "max", "mean_elected", "mean_all")),
        {"normalize": False, "weights": [3, 1, 1]},
        {"weights": "norm"},
        {"weights": [1, -1, 0.5]},
        {"sign_from": str(loras[0])},
        {"scale": 0.5, "rank": 3},
        {"rank": "max"},
        {"rank": 2, "restore_norm": True},
        *({"dtype": dtype} for dtype in ("bfloat16", "float16")),
        {"method": "dare_ties", "seed": 5},
        *({"method": pair} for pair in ("dare+ties", "ties+iso_c", "pico+ties", "dare+task_arithmetic")),
        {"method": "task_arithmetic", "rank": "max", "scale": 1.0},
    ]
    for given in asked:
        for space in ("delta", "core", "knots"):
            name = str(given).replace(str(loras[0]), "the first")  # a temporary folder has another name each time
            yield (
                f"{name} {space}",
                lambda g=given, s=space: ties_peft.merge(loras, **{"method": "ties", "space": s, **g}),
            )
    yield "factors", lambda: ties_peft.merge(mixed[:2], space="factors", scope="module", density=0.4)
    yield "mixed", lambda: ties_peft.merge(mixed, density=0.4)
    yield "vectors", lambda: ties_peft.merge(vectors, density=0.4, weights=[1, 2, 0.5])
    for space in ("delta", "core", "knots"):

        def prepared(space: str = space) -> Any:
            plan = ties_peft.prepare(loras, space=space)
            plan.merge(method="ties", density=0.5)
            return plan.merge(method="ties", density=0.3, weights=[2, 1, 1])

        yield f"prepared {space}", prepared


def large(folder: Path) -> Iterator[Case]:
    """Yield merges that are large enough for the compiled loops, of one module and of two."""
    one = synthetic.write_adapters(folder / "one", 4, {"layers.0.q": (4096, 4096)}, 8)
    two = synthetic.write_adapters(folder / "two", 4, {"layers.0.q": (4096, 2048), "layers.1.q": (2048, 4096)}, 8)
    for name, paths in (("one", one), ("two", two)):
        for asked in (
            {"scope": "module"},
            {"scope": "adapter"},
            {"scope": "module", "weights": [1, 2, 3, 4]},
            {"scope": "module", "method": "magnitude_prune"},
            {"space": "core"},
            {"space": "knots"},
        ):
            yield (
                f"large {name} {asked}",
                lambda p=paths, a=asked: ties_peft.merge(p, rank=8, **{"method": "ties", **a}),
            )


def samples() -> Iterator[Case]:
    """Yield merges of the sample adapters."""
    for kind in ("lora", "ia3"):
        paths = sorted((SAMPLES / kind).iterdir())
        for method in ("ties", "average", "task_arithmetic", *(("tsv", "iso_c", "flat_tsv") if kind == "lora" else ())):
            for space in ("delta", "core") if kind == "lora" else ("delta",):
                yield (
                    f"samples {kind} {method} {space}",
                    lambda p=paths, m=method, s=space: ties_peft.merge(p, method=m, space=s),
                )


def digest(merge: Callable[[], Any], folder: Path) -> str:
    """Return the digest of a merge as it is saved, or the error that refuses it."""
    try:
        merged = merge()
    except ties_peft.TiesPeftError as error:
        return f"refused: {type(error).__name__}"
    merged.save(folder, force=True)
    made = hashlib.sha256((folder / "adapter_config.json").read_bytes())
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).contiguous()
            made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            made.update(tensor.view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def measure() -> dict[str, str]:
    """Return the digest of every case, by its name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loras = [lora(folder / f"lora{n}", n, rank=4 + 2 * n) for n in range(3)]
        mixed = [lora(folder / f"mixed{n}", 10 + n, rank=4, use_rslora=bool(n % 2)) for n in range(3)]
        vectors = [ia3(folder / f"ia3{n}", n) for n in range(3)]
        for n, path in enumerate([*loras, *vectors]):
            attach_statistics(path, n)
        cases = [
            *every_method(loras, mixed, vectors),
            *options(loras, vectors, mixed),
            *large(folder),
            *samples(),
        ]
        found: dict[str, str] = {}
        for case, merge in cases:
            found[case] = digest(merge, folder / "merged")
        return found


def main() -> int:
    """Write the digests, or compare them with those of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--write", type=Path, metavar="FILE", help="write the digests there")
    either.add_argument("--against", type=Path, metavar="FILE", help="compare with the digests there")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    found = measure()
    refused = sum(value.startswith("refused") for value in found.values())
    print(f"{len(found)} merges, {refused} of them refused")
    if asked.write:
        asked.write.write_text(json.dumps(found, indent=1), encoding="utf-8")
        return 0
    before: dict[str, str] = json.loads(asked.against.read_text(encoding="utf-8"))
    differing = [name for name in sorted(before.keys() & found.keys()) if before[name] != found[name]]
    for title, names in (
        ("differ", differing),
        ("only before", sorted(before.keys() - found.keys())),
        ("only now", sorted(found.keys() - before.keys())),
    ):
        print(f"{len(names)} {title}")
        for name in names:
            print(f"  {name}: {before.get(name, '-')[:24]} {found.get(name, '-')[:24]}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
