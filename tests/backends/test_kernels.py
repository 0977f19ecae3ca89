"""The compiled kernels against float64 on the CPU: numba's, and Triton's by its interpreter; Triton's compiler compiles them too.

What that cannot show is speed, and a device's own scheduling. Both of Triton want an environment that is set before Triton is
imported, and so a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling import covering

import ties_peft
from ties_peft.task_vectors.kernels.backends import load_kernels

Run = Callable[..., Any]
Factors = list[tuple[np.ndarray, np.ndarray]]
SMALL = (4, 32)  # rows and columns of a block: the interpreter walks through every entry of it
SHAPES = [  # rows, columns, ranks
    (1, 1, [1]),
    (3, 5, [1, 2]),
    (4, 32, [4, 4, 4]),  # one block, whole
    (5, 33, [1, 5, 16, 3, 2, 7, 1, 33]),
    (6, 31, [33, 40, 50]),  # more columns than a side
    (7, 50, [7] * 9),
    (37, 70, [3] * 5),
]
KINDS = ["smooth", "repeated", "zeros"]
TYPES = {
    "multiply": {"B": "*fp32", "A": "*fp32", "out": "*fp32"},
    "count": {"B": "*fp32", "A": "*fp32", "low": "fp32", "high": "fp32", "counts": "*i32", "found": "*fp32"},
    "merge": {"factors": "*i64", "limits": "*fp32", "out": "*fp32", "counts": "*i32", "MEAN": "constexpr"},
}


@contextmanager
def own_process(folder: Path, interpret: bool) -> Iterator[Run]:
    """Calls a function in a process where Triton interprets, or compiles, whatever it does in this one."""
    before = dict(os.environ)
    os.environ.update(TRITON_INTERPRET=str(int(interpret)), TRITON_CACHE_DIR=str(folder), OMP_NUM_THREADS="1")
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), shrink if interpret else None) as pool:
            yield lambda work, *given: pool.submit(work, *given).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def shrink() -> None:
    """In that process: the blocks are small ones."""
    from ties_peft.task_vectors.kernels import triton_kernels

    triton_kernels.ROWS, triton_kernels.COLUMNS = SMALL


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    pytest.importorskip("triton", reason="the extra gpu is not installed")
    with own_process(tmp_path_factory.mktemp("interpreted"), interpret=True) as run:
        yield run


@pytest.fixture(scope="module")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    pytest.importorskip("triton", reason="the extra gpu is not installed")
    with own_process(tmp_path_factory.mktemp("compiled"), interpret=False) as run:
        yield run


@pytest.fixture(params=["numba", "triton"])
def run(request: pytest.FixtureRequest) -> Run:
    """Call a function with the name of a compiler before its arguments: numba's here, Triton's interpreter's in its process."""
    name = request.param
    pytest.importorskip(name)
    if name == "numba":
        return lambda work, *given: work(name, *given)
    interpreted = request.getfixturevalue("interpreted")
    return lambda work, *given: interpreted(work, name, *given)


def multiply(compiler: str, factors: Factors) -> list[np.ndarray]:
    made = []
    for B, A in factors:
        out = torch.full((len(B), A.shape[1]), torch.nan)
        load_kernels(compiler, "cpu").multiply(torch.from_numpy(B), torch.from_numpy(A), out)
        made.append(out.numpy())
    return made


def count(compiler: str, B: np.ndarray, A: np.ndarray, low: float, high: float) -> tuple[int, np.ndarray]:
    return load_kernels(compiler, "cpu").count(torch.from_numpy(B), torch.from_numpy(A), low, high)


def merge(
    compiler: str, factors: Factors, below: list[float], weights: list[float], mean: bool
) -> tuple[np.ndarray, tuple[int, int]]:
    out = torch.full((len(factors[0][0]), factors[0][1].shape[1]), torch.nan)
    pairs = [(torch.from_numpy(B), torch.from_numpy(A)) for B, A in factors]
    counts = load_kernels(compiler, "cpu").merge(pairs, below, weights, mean, out)
    return out.numpy(), counts


def draw(rows: int, columns: int, ranks: list[int], kind: str) -> Factors:
    """Factors that are random; or of ±1, so that products are whole, exact and often alike; or with zeros."""
    source = np.random.default_rng(len(ranks) * columns + rows)
    made = []
    for n, rank in enumerate(ranks):
        B, A = (source.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, columns)))
        if kind == "repeated":
            B, A = np.sign(B), np.sign(A)
        if kind == "zeros":
            B, A = B * np.float32(n != 0), A * (np.arange(columns) % 3 > 0).astype(np.float32)
        made.append((B, A))
    return made


def quantile(values: np.ndarray, share: float) -> np.float32:
    """One of the magnitudes, so that the comparison is with an entry that is there to the bit."""
    sizes = np.sort(np.abs(values).reshape(-1))
    return sizes[int(share * (sizes.size - 1))]


CASES = [(kind, *shape) for kind, shape in product(KINDS, SHAPES)]


def shape_and_kind(case: Any) -> tuple[Any, ...]:
    return case[0], repr(case[1:4]), *case[4:]


@pytest.mark.parametrize(("kind", "rows", "columns", "ranks"), covering(CASES, shape_and_kind, "product"))
def test_a_product_is_that_of_float64_within_rounding(
    run: Run, rows: int, columns: int, ranks: list[int], kind: str
) -> None:
    factors = draw(rows, columns, ranks, kind)
    for (B, A), made in zip(factors, run(multiply, factors), strict=True):
        exact = B.astype(np.float64) @ A.astype(np.float64)
        bound = B.shape[1] * 2.0**-23 * (np.abs(B).astype(np.float64) @ np.abs(A))
        assert (np.abs(made - exact) <= bound).all()
        assert kind != "repeated" or np.array_equal(made, exact)


@pytest.mark.parametrize(("kind", "rows", "columns", "ranks"), covering(CASES, shape_and_kind, "count"))
def test_counts_are_those_of_the_product(run: Run, rows: int, columns: int, ranks: list[int], kind: str) -> None:
    """The ends of the bracket are entries: one that rounded otherwise would be missing."""
    factors = draw(rows, columns, ranks, kind)
    for (B, A), values in list(zip(factors, run(multiply, factors), strict=True))[-2:]:
        sizes = np.abs(values)
        for low, high in ((0.8, 0.85), (0.5, 0.5), (0.0, 1.0)):
            ends = quantile(values, low), quantile(values, high)
            above, inside = run(count, B, A, *ends)
            assert above == np.count_nonzero(sizes > ends[1])
            assert np.array_equal(np.sort(inside), np.sort(sizes[(sizes >= ends[0]) & (sizes <= ends[1])]))
        above, inside = run(count, B, A, 0.0, np.inf)
        assert (above, len(inside)) == (0, sizes.size)


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "ranks", "mean"),
    covering([(*case, mean) for case, mean in product(CASES, [True, False])], shape_and_kind, "merge"),
)
def test_a_merge_is_the_definition_in_float64_on_the_product(
    run: Run, rows: int, columns: int, ranks: list[int], kind: str, mean: bool
) -> None:
    """The largest magnitude that is cut is an entry's: one that rounded otherwise would be kept."""
    factors = draw(rows, columns, ranks, kind)
    values = [made.astype(np.float64) for made in run(multiply, factors)]
    shares = [(0.0, 0.7, 0.8)[n % 3] for n in range(len(ranks))]
    below = [0.0 if share == 0 else float(quantile(each, share)) for each, share in zip(values, shares, strict=True)]
    below[-1] = np.inf if len(ranks) == 8 else below[-1]  # one that nothing is kept of
    weights = [(1.0, 2.0, 0.25)[n % 3] for n in range(len(ranks))]
    kept = np.stack([np.where(np.abs(each) > least, each, 0.0) for each, least in zip(values, below, strict=True)])
    positive, negative = np.maximum(kept, 0).sum(0), np.minimum(kept, 0).sum(0)
    lead = positive + negative
    agree = np.sign(kept) == np.where(lead >= 0, 1.0, -1.0)
    expected = (kept * agree).sum(0)
    if mean:
        expected /= np.maximum((agree * np.array(weights)[:, None, None]).sum(0), 1e-30)
    out, counts = run(merge, factors, below, weights, mean)
    clear = (lead == 0) | (np.abs(lead) > 1e-5)  # a sum that is nearly zero may round to either side
    np.testing.assert_allclose(out[clear], expected[clear], rtol=2e-6, atol=1e-30)
    assert clear.all() or clear.mean() > 0.98
    assert counts == (((positive > 0) & (negative < 0)).sum(), ((kept != 0).sum(0) > 1).sum())


def merge_folders(paths: list[Path], compiled: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """In that process: a merge by Triton's kernels on the CPU, or by torch, in tiles of a few rows; what matters of it."""
    from ties_peft.merging import thresholds as survey
    from ties_peft.task_vectors import threshold, tiles
    from ties_peft.task_vectors.kernels import backends as fast

    torch.set_num_threads(1)  # the interpreter is not made for more
    tiles.TILE, fast.MIN_ENTRIES, survey.SORTED_SIZE, threshold.SORTED_SIZE = 400, 1 << 62, 50, 50
    made = fast.load_kernels("triton", "cpu") if compiled else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("ties_peft.merging.loop"), "select_kernels", lambda entries, device: made)
        merged = ties_peft.merge(paths, rank=24, **asked)
    report = merged.report
    kept = [line.kept for line in report.adapters]
    deltas = {name: merged.delta(name).numpy() for name in merged.modules}
    return {"loops": report.loops, "kept": kept, "conflict": report.conflict, "deltas": deltas}


@pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
@pytest.mark.parametrize(
    ("asked", "whole"),
    [
        ({}, False),
        ({}, True),
        ({"weights": [1, 2, 0.5], "scope": "module"}, False),
        ({"weights": [1, 2, -1], "normalize": False, "disjoint": "sum"}, False),
        ({"disjoint": "max"}, True),
        ({"method": "breadcrumbs_ties"}, True),
        ({"method": "dare_ties"}, False),
    ],
)
def test_a_merge_is_that_of_torch(
    interpreted: Run, make_lora: Callable[..., Path], asked: dict[str, Any], whole: bool
) -> None:
    paths = [make_lora(f"a{n}", rank=2 + n, seed=n, shapes={"l.q": (24, 21), "l.up": (31, 40)}) for n in range(3)]
    for path in paths if whole else []:  # many values alike, cut by position
        file = path / "adapter_model.safetensors"
        save_file({name: tensor.sign() for name, tensor in load_file(file).items()}, file)
    plain, made = (interpreted(merge_folders, paths, compiled, asked) for compiled in (False, True))
    assert (plain.pop("loops"), made.pop("loops").split()[0]) == ("torch", "triton")
    for name, delta in made.pop("deltas").items():
        np.testing.assert_allclose(delta, plain["deltas"][name], rtol=1e-4, atol=1e-5)
    assert made == {"kept": plain["kept"], "conflict": plain["conflict"]}


def test_triton_is_used_on_a_gpu_for_large_merges(compiling: Run) -> None:
    for entries, device, name in ((1 << 33, "cuda", "triton"), (1 << 29, "cuda", None), (1 << 33, "mps", None)):
        compiler = compiling(selected, entries, device)
        assert name == (compiler and compiler.split()[0])


def selected(entries: int, device: str) -> str | None:
    """In that process: what compiles the kernels of a merge."""
    from ties_peft.task_vectors.kernels import backends as fast

    return getattr(fast.select_kernels(entries, device), "name", None)


def assemble(name: str, capability: int, aligned: bool, mean: bool) -> tuple[str, str]:
    """In a process where it compiles: a kernel's PTX, and what it takes of a multiprocessor, as its tools tell."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ties_peft.task_vectors.kernels import triton_kernels

    kernel = getattr(triton_kernels, f"{name}_kernel")
    whole = {"ROWS": triton_kernels.ROWS, "COLUMNS": triton_kernels.COLUMNS}
    signature = {key: TYPES[name].get(key, "constexpr" if key in whole else "i32") for key in kernel.arg_names}
    constants = {**whole, **({"MEAN": mean} if name == "merge" else {})}
    places = [n for n, (key, sort) in enumerate(signature.items()) if sort.startswith("*") or key == "width"]
    hints = {(place,): [["tt.divisibility", 16]] for place in places} if aligned else {}
    source = ASTSource(kernel, signature, constants, hints)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=triton_kernels.OPTIONS)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return made.asm["ptx"], told


@pytest.mark.parametrize(
    ("name", "mean", "capability", "aligned"),
    covering(
        [
            (*kernel, capability, aligned)
            for kernel in [("multiply", False), ("count", False), ("merge", True), ("merge", False)]
            for capability, aligned in product([80, 90], [True, False])
        ],
        lambda case: case,
    ),
)
def test_every_kernel_compiles_for_a_gpu_without_spilling_in_full_precision(
    compiling: Run, name: str, mean: bool, capability: int, aligned: bool
) -> None:
    ptx, told = compiling(assemble, name, capability, aligned, mean)
    assert f".target sm_{capability}" in ptx
    assert "fma.rn.f32" in ptx and "tf32" not in ptx and "mma" not in ptx
    assert not re.search(r"(atom|red)\S*\.f(16|32|64)", ptx)  # their order would show
    assert ("ld.global.v4" in ptx) == aligned  # four numbers at once only where every row of A starts at 16 bytes
    used = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told)
    assert used is not None
    registers, stack, local = map(int, used.groups())
    assert registers <= 168 and (stack, local) == (0, 0)  # three blocks of four warps a multiprocessor, none spilled
