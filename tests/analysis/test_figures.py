"""`analyze` against its definitions in NumPy and float64, which know nothing of Gram matrices and tiles."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli.run_command import run
from conftest import SHAPES
from oracles import definition

import ties_peft
from ties_peft.analysis.entry_figures import LARGEST
from ties_peft.analysis.gaussian import opposite_share
from ties_peft.task_vectors.factorise import squared_singular_values

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]
Vectors = definition.Vectors
EXTRA = {**SHAPES, "layers.1.up": (20, 12)}


@pytest.fixture
def loras(make_lora: Make) -> list[Path]:
    """Three adapters of unlike ranks and modules."""
    return [
        make_lora("a", rank=4, seed=1),
        make_lora("b", rank=2, alpha=3, seed=2, shapes=EXTRA, use_rslora=True),
        make_lora("c", rank=6, seed=3, shapes=EXTRA, rank_pattern={"layers.0.q": 3}, gain=2),
    ]


def largest_square(vectors: Vectors) -> float:
    """The share of the squared norm in the largest 20 % of all entries."""
    squares = np.sort(np.concatenate([v.reshape(-1) for v in vectors.values()]) ** 2)[::-1]
    return float(squares[: definition.kept_count(LARGEST, len(squares))].sum() / squares.sum())


def effective_rank(matrix: np.ndarray) -> float:
    share = np.linalg.svd(matrix, compute_uv=False) ** 2
    share = share[share > 1e-24 * share.max()] / share.sum()
    return math.exp(-(share * np.log(share)).sum())


def overlap(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """‖UᵀV‖²/min(r₁, r₂) of the column spaces, and the smallest principal angle."""
    bases = []
    for matrix in (first, second):
        U, S, _ = np.linalg.svd(matrix, full_matrices=False)
        bases.append(U[:, 1e-9 * S[0] < S])
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return float((cosines**2).sum() / len(cosines)), math.degrees(math.acos(min(1.0, cosines[0])))


def signs(first: Vectors, second: Vectors) -> tuple[float | None, float | None]:
    """The sign conflict and the overlap of what two trimmed task vectors keep."""
    one, two = definition.matrix([first, second])
    both = (one != 0) & (two != 0)
    either = (one != 0) | (two != 0)
    conflict = (np.sign(one) != np.sign(two))[both].mean() if both.any() else None
    return conflict, both.sum() / either.sum() if either.any() else None


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_whole_adapters_and_pairs_have_the_defined_figures(loras: list[Path], density: float) -> None:
    found = ties_peft.analyze(loras, density, methods=[]).to_dict()
    vectors = [definition.read(folder) for folder in loras]
    for line, own, rank in zip(found["adapters"], vectors, (4, 2, 6), strict=True):
        squares = {name: (value**2).sum() for name, value in own.items()}
        ranks = {name: effective_rank(value) for name, value in own.items()}
        wanted = {
            "norm": math.sqrt(sum(squares.values())),
            "rank": rank,
            "effective_rank": sum(squares[n] * ranks[n] for n in own) / sum(squares.values()),
            "redundancy": largest_square(own),
        }
        assert {key: line[key] for key in wanted} == pytest.approx(wanted, rel=2e-5)
    trimmed = [definition.trim(own, density, "adapter") for own in vectors]
    lines = iter(found["pairs"])
    for i, j in itertools.combinations(range(3), 2):
        line, (one, two) = next(lines), definition.matrix([vectors[i], vectors[j]])
        conflict, kept = signs(trimmed[i], trimmed[j])
        common = sorted(vectors[i].keys() & vectors[j].keys())
        spaces_out = [overlap(vectors[i][name], vectors[j][name]) for name in common]
        spaces_in = [overlap(vectors[i][name].T, vectors[j][name].T) for name in common]
        wanted = {
            "cosine": one @ two / np.linalg.norm(one) / np.linalg.norm(two),
            "sign_conflict": conflict,
            "kept_overlap": kept,
            "overlap_in": np.mean([space[0] for space in spaces_in]),
            "overlap_out": np.mean([space[0] for space in spaces_out]),
            "angle_in": np.mean([space[1] for space in spaces_in]),
            "angle_out": np.mean([space[1] for space in spaces_out]),
        }
        assert (line["a"], line["b"]) == ("abc"[i], "abc"[j])
        assert {key: line[key] for key in wanted} == pytest.approx(wanted, rel=2e-5, abs=1e-6)


def pair_of_module(first: np.ndarray, second: np.ndarray, trimmed: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """The figures of a pair on one module, but those of the stored factors."""
    one, two = first.reshape(-1), second.reshape(-1)
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    conflict, kept = signs({"x": trimmed[0]}, {"x": trimmed[1]})
    shares = [np.array((cut != 0).mean()) for cut in trimmed]
    predicted = float(opposite_share(np.array(cosine), *shares))
    (overlap_out, angle_out), (overlap_in, angle_in) = overlap(first, second), overlap(first.T, second.T)
    return {
        "cosine": cosine,
        "sign_conflict": conflict,
        "predicted_conflict": predicted if conflict is not None else None,
        "excess_conflict": conflict - predicted if conflict is not None else None,
        "kept_overlap": kept,
        "overlap_in": overlap_in,
        "overlap_out": overlap_out,
        "angle_in": angle_in,
        "angle_out": angle_out,
    }


def test_every_module_has_the_same_figures_of_its_own(loras: list[Path]) -> None:
    found = ties_peft.analyze(loras, methods=[]).to_dict()
    vectors = [definition.read(folder) for folder in loras]
    trimmed = [definition.trim(own, 0.2, "adapter") for own in vectors]
    largest = [definition.trim(own, LARGEST, "adapter") for own in vectors]
    assert [module["name"] for module in found["modules"]] == sorted(EXTRA)
    for module in found["modules"]:
        name = module["name"]
        held = [i for i, own in enumerate(vectors) if name in own]
        assert [line["name"] for line in module["adapters"]] == ["abc"[i] for i in held]
        for line, i in zip(module["adapters"], held, strict=True):
            own = vectors[i][name]
            wanted = {
                "norm": np.linalg.norm(own),
                "rank": np.linalg.matrix_rank(own),
                "effective_rank": effective_rank(own),
                "redundancy": (largest[i][name] ** 2).sum() / (own**2).sum(),
            }
            assert {key: line[key] for key in wanted} == pytest.approx(wanted, rel=2e-5)
        for line, (i, j) in zip(module["pairs"], itertools.combinations(held, 2), strict=True):
            wanted = pair_of_module(vectors[i][name], vectors[j][name], (trimmed[i][name], trimmed[j][name]))
            defined = {key: value for key, value in wanted.items() if value is not None}
            assert {key for key in wanted if line[key] is not None} == set(defined)
            assert {key: line[key] for key in defined} == pytest.approx(defined, rel=2e-5, abs=2e-6)


def test_the_predicted_conflict_of_adapters_counts_each_module_by_what_both_keep(loras: list[Path]) -> None:
    found = ties_peft.analyze(loras, methods=[]).to_dict()
    trimmed = [definition.trim(definition.read(folder), 0.2, "adapter") for folder in loras]
    for pair in found["pairs"]:
        i, j = "abc".index(pair["a"]), "abc".index(pair["b"])
        predicted, weights = [], []
        for module in found["modules"]:
            lines = [line for line in module["pairs"] if (line["a"], line["b"]) == (pair["a"], pair["b"])]
            if lines and lines[0]["predicted_conflict"] is not None:
                predicted.append(lines[0]["predicted_conflict"])
                cuts = [own[module["name"]] != 0 for own in (trimmed[i], trimmed[j])]
                weights.append((cuts[0] & cuts[1]).sum())
        assert pair["predicted_conflict"] == pytest.approx(np.average(predicted, weights=weights))
        assert pair["excess_conflict"] == pytest.approx(pair["sign_conflict"] - pair["predicted_conflict"])


def test_a_depth_is_the_sum_of_its_modules(loras: list[Path]) -> None:
    found = ties_peft.analyze(loras, methods=[]).to_dict()
    vectors = [definition.read(folder) for folder in loras]
    trimmed = [definition.trim(own, 0.2, "adapter") for own in vectors]
    assert [depth["layer"] for depth in found["depths"]] == ["0", "1"]
    for depth in found["depths"]:
        own, cut = (
            [{n: v for n, v in one.items() if f".{depth['layer']}." in n} for one in all_]
            for all_ in (vectors, trimmed)
        )
        rows = definition.matrix(own)
        assert [line["norm"] for line in depth["adapters"]] == pytest.approx(np.linalg.norm(rows, axis=1), rel=1e-5)
        for line, (i, j) in zip(depth["pairs"], itertools.combinations(range(3), 2), strict=True):
            wanted = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
            assert line["cosine"] == pytest.approx(wanted, abs=1e-6)
            assert (line["sign_conflict"], line["kept_overlap"]) == pytest.approx(signs(cut[i], cut[j]))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_methods_leave_what_the_result_as_written_holds(
    kind: str, loras: list[Path], make_ia3: Make, tmp_path: Path
) -> None:
    folders = loras if kind == "lora" else [make_ia3(name, seed=seed) for seed, name in enumerate("abc")]
    methods = ["ties", "task_arithmetic", "auto", *(["iso_c"] if kind == "lora" else ["average"])]
    found = ties_peft.analyze(folders, rank=3 if kind == "lora" else "auto", methods=methods).to_dict()
    vectors = [definition.read(folder) for folder in folders]
    for line in found["methods"]:
        rank = {"rank": 3} if kind == "lora" else {}
        merged = ties_peft.merge(folders, line["name"], **rank)
        assert line["chosen"] == merged.report.method
        merged.save(tmp_path / line["name"])
        result = definition.read(tmp_path / line["name"])
        for own, vector in zip(line["adapters"], vectors, strict=True):
            wanted = definition.retention(result, vector)
            assert [own[key] for key in ("projection", "cosine", "others")] == pytest.approx(wanted, rel=1e-4)
        assert line["energy"] == pytest.approx(merged.report.energy)
        for module in found["modules"]:
            name, left = module["name"], module["methods"][methods.index(line["name"])]
            held = [vector[name] for vector in vectors if name in vector]
            for own, vector in zip(left["adapters"], held, strict=True):
                wanted = definition.retention({"x": result[name]}, {"x": vector})
                assert (own["projection"], own["cosine"]) == pytest.approx(wanted[:2], rel=1e-4, abs=1e-6)


def test_energy_by_rank_is_that_of_the_singular_values_before_truncation(loras: list[Path], tmp_path: Path) -> None:
    found = ties_peft.analyze(loras, rank=5, methods=["task_arithmetic"]).to_dict()["methods"][0]
    result = definition.task_arithmetic([definition.read(folder) for folder in loras], (1, 1, 1))
    for rank, share in enumerate(found["energy_by_rank"], start=1):
        sums = np.sum([definition.energies(matrix, rank) for matrix in result.values()], axis=0)
        assert share == pytest.approx(sums[0] / sums[1], rel=1e-5)
    assert len(found["energy_by_rank"]) == found["rank"] == 5
    assert found["energy"] == pytest.approx(found["energy_by_rank"][-1])


def test_merges_side_by_side_give_the_figures_of_one_after_the_other(
    loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    together = ties_peft.analyze(loras, progress=lambda *stage: told.append(stage)).to_dict()
    assert told[-1] == ("methods", 5, 5)
    monkeypatch.setattr(sys.modules["ties_peft.analysis.method_figures"], "SIDE_BY_SIDE", 0)
    told.clear()
    alone = ties_peft.analyze(loras, progress=lambda *stage: told.append(stage)).to_dict()
    assert told[-1][0] == "merge"
    for found in (together, alone):
        found.pop("seconds", None)
    assert json.dumps(together) == json.dumps(alone)


@pytest.mark.parametrize("full", [True, False])
def test_squared_singular_values_come_from_gram_matrices_of_any_rank(full: bool) -> None:
    draw = np.random.default_rng(0)
    B, A = draw.normal(size=(7, 3)), draw.normal(size=(3, 9))
    if not full:
        A[1] = 0.0
    expected = np.linalg.svd(B @ A, compute_uv=False)[: 3 if full else 2] ** 2
    found = squared_singular_values(torch.from_numpy(B.T @ B), torch.from_numpy(A @ A.T))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_by_default_no_method_is_compared_where_each_takes_minutes(
    loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["ties_peft.analysis.analyze"]
    layouts = [ties_peft.Adapter.load(folder).layout for folder in loras]
    shapes = {name: module.shape for each in layouts for name, module in each.items()}
    columns = {name: sum(each[name].rank for each in layouts if name in each) for name in shapes}
    work = sum(columns[name] ** 2 * sum(shape) for name, shape in shapes.items())
    monkeypatch.setattr(module, "MOST_WORK", work)
    every = ties_peft.analyze(loras)
    assert [result.method for result in every.methods] == ["auto", *module.COMPARED]
    monkeypatch.setattr(module, "MOST_WORK", work - 1)
    found = ties_peft.analyze(loras)
    assert found.methods == []
    assert any("--methods auto,ties,task_arithmetic,iso_c,tsv" in warning for warning in found.warnings)
    assert [result.method for result in ties_peft.analyze(loras, methods=["tsv"]).methods] == ["tsv"]


def test_ia3_has_no_spaces_and_a_rank_of_one(make_ia3: Make) -> None:
    folders = [make_ia3(name, seed=seed) for seed, name in enumerate("ab")]
    found = ties_peft.analyze(folders).to_dict()
    one, two = definition.matrix([definition.read(folder) for folder in folders])
    (pair,) = found["pairs"]
    assert pair["cosine"] == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two), abs=1e-6)
    vectors = [definition.read(folder) for folder in folders]
    wanted = signs(*(definition.trim(own, 0.2, "adapter") for own in vectors))
    assert (pair["sign_conflict"], pair["kept_overlap"]) == pytest.approx(wanted)
    for line, own in zip(found["adapters"], vectors, strict=True):
        norm = np.linalg.norm(np.concatenate(list(own.values())))
        assert (line["norm"], line["redundancy"]) == pytest.approx((norm, largest_square(own)), rel=1e-5)
    assert pair["overlap_in"] is None and pair["overlap_out"] is None
    assert {line["rank"] for line in found["adapters"]} == {1}
    assert [line["effective_rank"] for line in found["adapters"]] == pytest.approx([1, 1])
    assert "ties" in [line["name"] for line in found["methods"]]


def test_the_gauge_of_an_adapter_changes_no_figure_but_that_of_a(make_lora: Make, tmp_path: Path) -> None:
    """B·G and G⁻¹·A are the same adapter."""
    from safetensors.torch import load_file, save_file

    folders = [make_lora(name, seed=seed) for seed, name in enumerate("ab")]
    before = ties_peft.analyze(folders, methods=[]).to_dict()
    file = folders[0] / "adapter_model.safetensors"
    tensors = {key: t * (4 if "lora_A" in key else 0.25) for key, t in load_file(file).items()}
    save_file({key: t.flip(0 if "lora_A" in key else 1).contiguous() for key, t in tensors.items()}, file)
    after = ties_peft.analyze(folders, methods=[]).to_dict()
    for line, other in zip(before["adapters"] + before["pairs"], after["adapters"] + after["pairs"], strict=True):
        numbers = [key for key, value in line.items() if isinstance(value, float) and key != "initial_cosine"]
        assert len(numbers) >= 3 and {key: line[key] for key in numbers} == pytest.approx(
            {key: other[key] for key in numbers}, rel=1e-4, abs=1e-5
        )


def test_a_shared_start_of_a_is_seen(make_lora: Make) -> None:
    from safetensors.torch import load_file, save_file

    folders = [make_lora(name, seed=seed) for seed, name in enumerate("abc")]
    first = load_file(folders[0] / "adapter_model.safetensors")
    file = folders[1] / "adapter_model.safetensors"
    save_file({k: 1.5 * first[k] if "lora_A" in k else t for k, t in load_file(file).items()}, file)
    analysis = ties_peft.analyze(folders, methods=[])
    cosines = [pair["initial_cosine"] for pair in analysis.to_dict()["pairs"]]
    assert cosines[0] == pytest.approx(1, abs=1e-6) and max(map(abs, cosines[1:])) < 0.5
    (text,) = [one.text for one in analysis.advice if "same initial A" in one.text]
    assert "a, b" in text and "1.00" in text


@pytest.mark.parametrize("cosine", [-0.9, -0.2, 0.0, 0.3, 0.99])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.2, 0.2), (0.05, 0.6)])
def test_the_predicted_conflict_is_that_of_gaussian_entries(cosine: float, shares: tuple[float, float]) -> None:
    found = float(opposite_share(np.array(cosine), np.array(shares[0]), np.array(shares[1])))
    if shares == (1.0, 1.0):
        assert found == pytest.approx(math.acos(cosine) / math.pi, abs=1e-9)
    draw = np.random.default_rng(0)
    x = draw.standard_normal(400_000)
    y = cosine * x + math.sqrt(1 - cosine**2) * draw.standard_normal(len(x))
    both = (np.abs(x) > np.quantile(np.abs(x), 1 - shares[0])) & (np.abs(y) > np.quantile(np.abs(y), 1 - shares[1]))
    assert found == pytest.approx((x * y < 0)[both].mean(), abs=0.01)


def test_a_part_of_the_rows_estimates_what_all_of_them_give(make_lora: Make) -> None:
    shapes = {"layers.0.q": (2000, 40), "layers.1.q": (1500, 40)}
    folders = [make_lora(name, seed=seed, shapes=shapes) for seed, name in enumerate("ab")]
    whole, part = (ties_peft.analyze(folders, methods=[], exact=exact) for exact in (True, False))
    assert (whole.counted, part.counted) == (1.0, 0.1) and "estimate" in str(part)
    one, other = whole.to_dict(), part.to_dict()
    for key in ("sign_conflict", "kept_overlap"):
        assert other["pairs"][0][key] == pytest.approx(one["pairs"][0][key], abs=0.05)
        assert other["pairs"][0][key] != one["pairs"][0][key]
    assert other["adapters"][0]["redundancy"] == pytest.approx(one["adapters"][0]["redundancy"], abs=0.03)
    assert other["adapters"][0]["norm"] == one["adapters"][0]["norm"]


# The command, and how the result prints

KEYS = {
    "adapters": {"name", "norm", "rank", "effective_rank", "redundancy"},
    "pairs": {"a", "b", "cosine", "sign_conflict", "kept_overlap", "overlap_in", "overlap_out"},
    "advice": {"text", "option", "severity"},
    "methods": {"name", "energy", "adapters"},
    "modules": {"name", "adapters", "pairs"},
}


def test_the_command_prints_the_keys_of_the_contract(loras: list[Path]) -> None:
    done = run("analyze", *loras, "--json", "--methods", "ties,iso_c", "--rank", 4)
    found = json.loads(done.out)
    assert done.code == 0
    for key, names in KEYS.items():
        assert found[key] and all(names <= line.keys() for line in found[key]), key
    assert [line["name"] for line in found["methods"]] == ["ties", "iso_c"]
    assert {line["rank"] for line in found["methods"]} == {4}
    assert all(
        {"projection", "cosine", "others"} <= own.keys() for line in found["methods"] for own in line["adapters"]
    )
    assert found == ties_peft.analyze(loras, rank=4, methods=["ties", "iso_c"]).to_dict()


def test_the_command_prints_tables(loras: list[Path]) -> None:
    done = run("analyze", *loras, "--methods", "none")
    assert done.code == 0
    for words in ("3 LoRA adapters, 4 modules", "sign conflict", "1 and 2", "estimate"):
        assert (words in done.out) == (words != "estimate")
    assert "the share of each adapter that the merged one holds" not in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--density", "1.5"], "density"),
        (["--rank", "many"], "--rank"),
        (["--methods", "tys"], "unknown method 'tys'"),
    ],
)
def test_bad_arguments_are_refused(loras: list[Path], arguments: list[str], words: str) -> None:
    done = run("analyze", *loras, *arguments)
    assert done.code == 2 and words in done.err and not done.out


def test_too_many_adapters_for_all_pairs_are_refused(make_lora: Make) -> None:
    folder = make_lora("a")
    with pytest.raises(ties_peft.RecipeError, match="2080 pairs"):
        ties_peft.analyze([folder] * 65)


def test_tables_for_pandas(loras: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each adapter, pair, pair on a module, and method and adapter, with the values of `to_dict`."""
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    analysis = ties_peft.analyze(loras, methods=["ties"])
    found, tables = analysis.to_dict(), analysis.to_pandas()
    assert tables["adapters"] == found["adapters"] and tables["pairs"] == found["pairs"]
    assert [(row["module"], row["a"], row["b"], row["cosine"]) for row in tables["modules"]] == [
        (module["name"], pair["a"], pair["b"], pair["cosine"])
        for module in found["modules"]
        for pair in module["pairs"]
    ]
    assert [(row["method"], row["projection"]) for row in tables["methods"]] == [
        ("ties", line["projection"]) for line in found["methods"][0]["adapters"]
    ]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ties_peft.RecipeError, match="pip install pandas"):
        analysis.to_pandas()
