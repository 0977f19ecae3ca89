"""Where a constant or a comparison of the matrix methods and the bricks decides, and nothing else would tell."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from methods.test_spectral import factors, merged, random_factors, relative_error, write

import ties_peft
from ties_peft.spaces import find_space
from ties_peft.spaces.core import CompressedEncoding, CoreEncoding
from ties_peft.task_vectors.collection import TaskVectors
from ties_peft.task_vectors.delta import LowRank
from ties_peft.task_vectors.singular_values import Spectrum, orthogonalised, spectrum
from ties_peft.task_vectors.subspace import directions
from ties_peft.task_vectors.threshold import kth_largest
from ties_peft.task_vectors.trim import find_cut

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Maker = Callable[..., Path]
MODULES = [name for _, name, _ in pkgutil.walk_packages(ties_peft.__path__, "ties_peft.") if "__main__" not in name]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the bricks


@pytest.mark.parametrize("count", [1, 700, 100_000, 199_999, 200_000])
def test_the_kth_largest_is_that_of_the_sorted_values(count: int) -> None:
    values = noise(400, 500)
    assert kth_largest(values.numpy(), count) == float(np.sort(values.numpy(), axis=None)[-count])


def test_the_largest_are_as_many_as_asked_and_the_first_of_equals() -> None:
    values = torch.tensor([1.0, 2.0, 2.0, 3.0, 2.0])
    found = [find_cut(values, count, [(0, 5)]).apply_(values.clone()) > 0 for count in (2, 3)]
    assert [mask.tolist() for mask in found] == [
        [False, True, False, True, False],
        [False, True, True, True, False],
    ]


def test_a_trim_of_many_equal_magnitudes_keeps_the_first() -> None:
    values = torch.tensor([1.0, -1.0]).repeat(500)
    (kept,) = TaskVectors.of([values]).trim(0.3)
    assert kept.nonzero().flatten().tolist() == list(range(300))


def test_a_direction_is_there_by_its_singular_value_not_by_its_square() -> None:
    assert len(directions(torch.diag(torch.tensor([1.0, 1e-4, 1e-20]).double() ** 2))[0]) == 2


def test_what_is_left_is_measured_by_what_it_was_left_of() -> None:
    rest = 1e-9 * noise(6, 5)
    assert (len(spectrum(rest)), len(spectrum(rest, at_least=1.0))) == (5, 0)


def test_two_modules_of_one_shape_draw_their_own_numbers(make_ia3: Maker) -> None:
    folder = make_ia3("a", vectors={"x.k": (400, False), "y.k": (400, False)})
    kept = ties_peft.merge([folder], method="dare", density=0.5)
    masks = [kept.delta(name) != 0 for name in kept.modules]
    assert 140 < int((masks[0] ^ masks[1]).sum()) < 260


# matrix methods, where directions are shared or next to nothing


def nested_adapters(at: Path, first: np.ndarray, small: float) -> list[Path]:
    """Two adapters in the same three directions; the second has next to none of one of them."""
    draw = np.random.default_rng(0)
    U, V = np.linalg.qr(draw.normal(size=(12, 3)))[0], np.linalg.qr(draw.normal(size=(10, 3)))[0]
    values = (first, np.array([1.0, 2.0, small]))
    return [write(at / str(n), {"q": (U * own, V.T)}) for n, own in enumerate(values)]


def test_iso_cts_takes_no_direction_from_rounding(tmp_path: Path) -> None:
    """The second adapter has nothing of its own beside the common direction, but for rounding."""
    first, second = nested_adapters(tmp_path, np.array([5.0, 3.0, 1.0]), 0.0)
    (B, A) = factors(second)["q"]
    second = write(tmp_path / "lone", {"q": (B[:, :1], A[:1])})
    result = merged([first, second], "iso_cts", common=0.4)["q"]
    (B, A) = factors(first)["q"]
    level = (6 + 3) / 2
    assert relative_error({"q": result}, {"q": level * (B[:, :2] / np.linalg.norm(B[:, :2], axis=0)) @ A[:2]}) < 1e-4


@pytest.mark.parametrize(("angle", "count"), [(5e-5, 1), (1e-3, 2)])
def test_directions_that_depend_on_each_other_to_within_1e_4_count_as_one(angle: float, count: int) -> None:
    """What iso_cts, tsv and flat_tsv stand on."""
    parts = []
    for turn in (0.0, angle):
        u, v = torch.zeros(2, 5, dtype=torch.float64)
        u[:2] = v[2:4] = torch.tensor([math.cos(turn), math.sin(turn)])
        parts.append(Spectrum(u.unsqueeze(1), torch.ones(1, dtype=torch.float64), v.unsqueeze(0)))
    values = torch.linalg.svdvals(orthogonalised(parts))
    assert values[:count].tolist() == pytest.approx([1.0] * count)
    assert values[count:].tolist() == pytest.approx([0.0] * (5 - count), abs=1e-6)


def test_svc_counts_no_answer_that_is_rounding(tmp_path: Path) -> None:
    """In the third direction the second adapter answers by next to nothing: it counts α there, not its inverse."""
    folders = nested_adapters(tmp_path, np.array([3.0, 2.0, 1.0]), 5e-6)
    result = merged(folders, "svc", "core", alpha=0.5)["q"]
    (B, A) = factors(folders[0])["q"]
    u, v = B[:, 2] / np.linalg.norm(B[:, 2]), A[2]
    assert u @ result @ v == pytest.approx(2 / (1 + 0.5), rel=1e-3)


def test_wudi_asks_nothing_of_inputs_that_nobody_knows(tmp_path: Path) -> None:
    """Two adapters in the same rows: the least-squares answer, not one blown up by a null direction."""
    folders = nested_adapters(tmp_path, np.array([3.0, 2.0, 1.0]), 0.0)
    assert np.linalg.norm(merged(folders, "wudi", ridge=0.0)["q"]) < 20


def test_lego_of_copies_has_a_heap_for_each_unit(tmp_path: Path) -> None:
    one = write(tmp_path / "one", random_factors(3, 1, {"q": (12, 10)}))
    for clusters in (3, 6):
        whole = {"q": 2**0.5 * factors(one)["q"][0] @ factors(one)["q"][1]}
        assert relative_error(merged([one, one], "lego", clusters=clusters), whole) < 1e-5


# core space


def test_the_published_core_keeps_directions_of_small_factors(tmp_path: Path) -> None:
    """One adapter's B is a ten-thousandth of the other's, its A as much larger."""
    B, A = random_factors(3, 1, {"q": (12, 10)})["q"]
    deltas = [LowRank(torch.tensor(B / g).float(), torch.tensor(A * g).float()) for g in (1.0, 1e4)]
    deltas[1] = LowRank(deltas[1].B.flip(0).contiguous(), deltas[1].A.flip(1).contiguous())
    encoding = find_space("core")(balanced=False).encode(deltas)
    for delta, parts in zip(deltas, encoding.parts, strict=True):
        assert torch.dist(encoding.decode(parts, None).delta.dense(), delta.dense()) < 1e-3 * delta.dense().norm()


def compressed(blend: float) -> tuple[CompressedEncoding, list[np.ndarray]]:
    """Two adapters, the second a hundred times as long, in a shared subspace of rank 3."""
    deltas = [LowRank(g * noise(14, 3, seed=s), noise(3, 11, seed=s + 5)) for s, g in ((0, 1.0), (1, 100.0))]
    core = CoreEncoding(deltas)
    return CompressedEncoding(core, 3, blend), [parts[0].dense().double().numpy() for parts in core.parts]


def energy_held(encoding: CompressedEncoding, matrices: list[np.ndarray]) -> list[float]:
    """The share of each adapter's energy in the subspace."""
    left, right = encoding.left.numpy(), encoding.right.numpy()
    return [float(np.sum((left.T @ M @ right) ** 2) / np.sum(M**2)) for M in matrices]


def test_the_blend_says_whether_long_adapters_take_the_subspace() -> None:
    apart, equal = energy_held(*compressed(1.0)), energy_held(*compressed(0.0))
    assert apart[0] < 0.5 < 0.99 < apart[1]
    assert equal[0] > apart[0] + 0.05


def test_the_subspace_is_the_best_that_alternating_finds() -> None:
    """At equal norms no step of either side alone holds more."""
    encoding, matrices = compressed(0.0)
    units = [M / np.linalg.norm(M) for M in matrices]
    left, right = encoding.left.numpy(), encoding.right.numpy()
    total = sum(np.sum((left.T @ M @ right) ** 2) for M in units)
    best = np.linalg.eigvalsh(sum(M @ right @ right.T @ M.T for M in units))[-3:].sum()
    assert total == pytest.approx(best, rel=1e-4)
