"""Matrix methods and the spaces core and knots, against their definitions in float64 NumPy on dense task vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling import covering

import ties_peft
from ties_peft.methods import TaskVectors, method_classes
from ties_peft.spaces import find_space
from ties_peft.task_vectors.singular_values import polar as polar_factor
from ties_peft.task_vectors.singular_values import spectrum

Array = np.ndarray
Factors = Mapping[str, tuple[Array, Array]]
PREFIX = "base_model.model."
SHAPES = {"layers.0.q": (12, 10), "layers.0.up": (20, 12), "layers.1.q": (12, 10)}
SPECTRAL = ("tsv", "flat_tsv", "dual", "iso_c", "iso_cts", "boosting", "svc", "wudi", "lego")
FINISHING = ("iso_c", "boosting", "svc")
KEEPS_ONE = ("tsv", "flat_tsv", "dual", "pico", "svc", "wudi", "lego")
DETERMINISTIC = (*SPECTRAL, "pico", "karcher", "model_stock", "ties", "task_arithmetic", "average")


# adapters


def write(folder: Path, modules: Factors, alpha: float | None = None) -> Path:
    """An adapter's folder with these factors; lora scaling alpha/r, 1 by default."""
    rank = max(B.shape[1] for B, _ in modules.values())
    tensors = {}
    for name, (B, A) in modules.items():
        pad = rank - B.shape[1]
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.tensor(np.pad(B, ((0, 0), (0, pad)))).float().contiguous()
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.tensor(np.pad(A, ((0, pad), (0, 0)))).float().contiguous()
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": rank, "lora_alpha": alpha or rank}
    config["target_modules"] = sorted({name.rsplit(".", 1)[-1] for name in modules})
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def factors(folder: Path) -> dict[str, tuple[Array, Array]]:
    """(B, A) of every module in float64, the lora scaling in B."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {key: t.double().numpy() for key, t in load_file(folder / "adapter_model.safetensors").items()}
    names = sorted({key.removeprefix(PREFIX).split(".lora_")[0] for key in tensors})
    scaling = config["lora_alpha"] / config["r"]
    return {n: (scaling * tensors[f"{PREFIX}{n}.lora_B.weight"], tensors[f"{PREFIX}{n}.lora_A.weight"]) for n in names}


def random_factors(rank: int, seed: int, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> Factors:
    draw = np.random.default_rng(seed)
    return {n: (draw.normal(size=(o, rank)), draw.normal(size=(rank, i))) for n, (o, i) in shapes.items()}


def crowded_factors(rank: int, seed: int) -> Factors:
    """All of it within five common input and output directions."""
    own, common = np.random.default_rng(seed), np.random.default_rng(99)
    return {
        n: (
            common.normal(size=(o, 5)) @ own.normal(size=(5, rank)),
            own.normal(size=(rank, 5)) @ common.normal(size=(5, i)),
        )
        for n, (o, i) in SHAPES.items()
    }


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Sets of adapters: of mixed ranks with a module missing, more directions than rows, and sharing their span."""
    at = tmp_path_factory.mktemp("families")
    fewer = {name: shape for name, shape in SHAPES.items() if name != "layers.1.q"}
    return {
        "mixed": [
            write(at / "a", random_factors(4, 1), 8),
            write(at / "b", random_factors(2, 2)),
            write(at / "c", random_factors(3, 3, fewer), 1.5),
        ],
        "wide": [write(at / f"w{r}", random_factors(r, 10 + r)) for r in (6, 5, 4, 3)],
        "crowded": [write(at / f"s{r}", crowded_factors(r, 20 + r)) for r in (4, 3, 2)],
    }


def merged(folders: Sequence[Path], method: str, space: str = "delta", **asked: Any) -> dict[str, Array]:
    """What a method makes at full rank, with λ = 1, for which the laws and definitions hold."""
    result = ties_peft.merge(list(folders), method=method, space=space, **{"rank": "max", "scale": 1.0, **asked})
    return {name: result.delta(name).double().numpy() for name in result.modules}


def task_vectors(
    folders: Sequence[Path], weights: Sequence[float] | None = None
) -> dict[str, list[tuple[float, Array]]]:
    """(w, w·Δ) of the adapters that have a module, by module."""
    found: dict[str, list[tuple[float, Array]]] = {}
    for folder, weight in zip(folders, weights or [1.0] * len(folders), strict=True):
        for name, (B, A) in factors(folder).items():
            found.setdefault(name, []).append((weight, weight * B @ A))
    return found


def relative_error(seen: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """The largest relative error over the modules."""
    assert seen.keys() == wanted.keys()
    return max(float(np.linalg.norm(seen[n] - wanted[n]) / max(np.linalg.norm(wanted[n]), 1e-30)) for n in wanted)


# definitions


def svd(matrix: Array, share: float = 1e-6) -> tuple[Array, Array, Array]:
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    r = int((share * S[0] < S).sum()) if len(S) else 0
    return U[:, :r], S[:r], Vt[:r]


def polar(matrix: Array) -> Array:
    """M·(MᵀM)^(−½) on the support."""
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    there = values > 1e-10 * values[-1]
    return matrix @ (vectors[:, there] / np.sqrt(values[there])) @ vectors[:, there].T


def orthogonalised(parts: Sequence[tuple[Array, Array, Array]]) -> Array:
    left, right = polar(np.hstack([U for U, _, _ in parts])), polar(np.hstack([Vt.T for _, _, Vt in parts]))
    return left @ np.diag(np.concatenate([S for _, S, _ in parts])) @ right.T


def tsv(deltas: Sequence[Array], directions: int | None = None) -> Array:
    found = [svd(delta) for delta in deltas]
    return orthogonalised([(U[:, :directions], S[:directions], Vt[:directions]) for U, S, Vt in found])


def flat_tsv(deltas: Sequence[Array]) -> Array:
    f, parts = 1 - 1 / len(deltas), []
    for delta in deltas:
        U, S, Vt = svd(delta)
        level = np.linalg.norm(delta) / np.sqrt(len(S))
        parts.append((U, S ** (1 - f) * level**f, Vt))
    return orthogonalised(parts)


def dual(deltas: Sequence[Array], flatten: float | None = None) -> Array:
    """By eigenvalues of the Gram matrices of rows and columns; an adapter without the module is a matrix of zeros."""
    total, N = sum(np.sum(d**2) for d in deltas), len(deltas)
    deltas = [delta for delta in deltas if delta.any()]
    n = max(1, min(2 * N, N * total / np.sum(sum(deltas) ** 2)))
    f, a = 1 - 1 / n if flatten is None else flatten, 1 - 1 / n**2
    found = [svd(delta) for delta in deltas]
    S = np.concatenate([S ** (1 - f) * np.linalg.norm(S) / np.linalg.norm(S ** (1 - f)) for _, S, _ in found])

    def divided(stack: Array) -> Array:
        values, vectors = np.linalg.eigh(stack @ stack.T)
        there = values > 0.2**2
        return (vectors[:, there] * values[there] ** -a) @ vectors[:, there].T @ stack

    made = divided(np.hstack([U for U, _, _ in found])) @ np.diag(S) @ divided(np.hstack([Vt.T for *_, Vt in found])).T
    return made * np.sqrt((3 - 2 / n) * total / N) / np.linalg.norm(made)


def iso_c(deltas: Sequence[Array]) -> Array:
    U, S, Vt = svd(sum(deltas))
    return S.mean() * U @ Vt


def iso_cts(deltas: Sequence[Array], common: float = 0.8) -> Array:
    """The published procedure on coordinates of the adapters' span, where min(out, in) is the rank of the sum."""
    L, R = svd(np.hstack(deltas))[0], svd(np.vstack(deltas))[2].T
    cores = [L.T @ delta @ R for delta in deltas]
    U, S, Vt = svd(sum(cores))
    size = len(S)
    own = round((size - int(size * common)) / len(deltas))
    k = size - own * len(deltas)
    left, values, right = [U[:, :k]], [S[:k]], [Vt[:k].T]
    for core in cores:
        rest = svd(core - U[:, :k] @ U[:, :k].T @ core, 1e-6)
        left.append(rest[0][:, :own])
        values.append(rest[1][:own])
        right.append(rest[2][:own].T)
    return L @ (np.concatenate(values).mean() * polar(np.hstack(left)) @ polar(np.hstack(right)).T) @ R.T


def boosting_of(matrix: Array, beta: float = 0.01) -> Array:
    U, S, Vt = svd(matrix)
    seen = 0.0
    for value in S:
        seen += value
        if seen >= beta * S.sum() * (1 - 1e-12):
            return U @ np.diag([max(s, value) for s in S]) @ Vt
    return matrix


def svc_of(matrix: Array, deltas: Sequence[Array], alpha: float = 0.1) -> Array:
    U, S, Vt = svd(matrix)
    total = np.zeros_like(matrix)
    for r in range(len(S)):
        whole, shares = U[:, r] @ matrix, []
        for delta in deltas:
            own = U[:, r] @ delta
            shares.append(max(alpha, (whole @ own) / (own @ own)))
        total += len(deltas) / sum(shares) * S[r] * np.outer(U[:, r], Vt[r])
    return total


def wudi(deltas: Sequence[Array], ridge: float = 0.1) -> Array:
    """By stacked least squares instead of normal equations."""
    total = sum(deltas)
    gram = sum(d.T @ d / np.sum(d**2) for d in deltas)
    values = np.linalg.eigvalsh(gram)
    hold = np.sqrt(ridge * values[values > 1e-9 * values[-1]].mean())
    left = [d / np.linalg.norm(d) for d in deltas] + [hold * np.eye(total.shape[1])]
    right = [d @ d.T / np.linalg.norm(d) for d in deltas] + [hold * total.T]
    return np.linalg.lstsq(np.vstack(left), np.vstack(right), rcond=1e-8)[0].T


def calibrated(deltas: Sequence[Array]) -> list[Array]:
    """Pico's operator on the whole output space, applied to every task vector."""
    B = np.hstack([U * np.sqrt(S) for U, S, _ in map(svd, deltas)])
    U, S, _ = np.linalg.svd(B, full_matrices=False)
    a = 1 / (1 + (len(deltas) - 1) * S**2 / np.sum(S**2))
    operator = np.eye(len(B)) + U @ np.diag(a - 1) @ U.T
    return [operator @ delta for delta in deltas]


def with_mean_norm(matrix: Array, deltas: Sequence[Array]) -> Array:
    return matrix * np.mean([np.linalg.norm(d) for d in deltas]) / np.linalg.norm(matrix)


def ties(weighted: Sequence[tuple[float, Array]], density: float) -> Array:
    kept = []
    for _, x in weighted:
        order = np.argsort(-np.abs(x), axis=None, kind="stable")
        mask = np.zeros(x.size, dtype=bool)
        mask[order[: int(density * x.size)]] = True
        kept.append(np.where(mask.reshape(x.shape), x, 0))
    sign = np.where(sum(kept) >= 0, 1, -1)
    agree = [np.where(np.sign(x) == sign, x, 0) for x in kept]
    loads = sum(abs(w) * (x != 0) for (w, _), x in zip(weighted, agree, strict=True))
    return sum(agree) / np.where(loads > 0, loads, 1)


def core_of(deltas: Sequence[Array]) -> tuple[Array, list[Array], Array]:
    """The balanced core: bases from the singular vectors of all U·√S and all √S·Vᵀ."""
    found = [svd(delta) for delta in deltas]
    L = svd(np.hstack([U * np.sqrt(S) for U, S, _ in found]))[0]
    R = svd(np.vstack([np.sqrt(S)[:, None] * Vt for _, S, Vt in found]))[2].T
    return L, [L.T @ delta @ R for delta in deltas], R


DEFINITIONS: dict[str, tuple[str, dict[str, Any], Callable[[Sequence[Array]], Array]]] = {
    "tsv": ("tsv", {}, tsv),
    "tsv, two directions": ("tsv", {"directions": 2}, lambda ds: tsv(ds, 2)),
    "flat_tsv": ("flat_tsv", {}, flat_tsv),
    "dual": ("dual", {}, dual),
    "dual, spectra as they are": ("dual", {"flatten": 0.0}, lambda ds: dual(ds, 0.0)),
    "iso_c": ("iso_c", {}, iso_c),
    "iso_cts": ("iso_cts", {}, iso_cts),
    "iso_cts, half": ("iso_cts", {"common": 0.5}, lambda ds: iso_cts(ds, 0.5)),
    "boosting": ("boosting", {"beta": 0.6}, lambda ds: boosting_of(sum(ds), 0.6)),
    "boosting, default": ("boosting", {}, lambda ds: boosting_of(sum(ds))),
    "svc": ("svc", {}, lambda ds: svc_of(sum(ds), ds)),
    "svc, alpha 1": ("svc", {"alpha": 1.0}, lambda ds: svc_of(sum(ds), ds, 1.0)),
    "wudi": ("wudi", {}, wudi),
    "wudi, more ridge": ("wudi", {"ridge": 2.0}, lambda ds: wudi(ds, 2.0)),
    "pico": ("pico", {}, lambda ds: with_mean_norm(sum(calibrated(ds)), ds)),
    "pico+task_arithmetic": (
        "pico+task_arithmetic",
        {"scale": 1.0},
        lambda ds: with_mean_norm(sum(calibrated(ds)), ds),
    ),
    "pico+tsv": ("pico+tsv", {}, lambda ds: with_mean_norm(tsv(calibrated(ds)), ds)),
    "tsv+iso_c": ("tsv+iso_c", {}, lambda ds: iso_c([tsv(ds)])),
    "tsv+svc": ("tsv+svc", {}, lambda ds: svc_of(tsv(ds), ds)),
    "task_arithmetic+boosting": (
        "task_arithmetic+boosting",
        {"scale": 1.0, "beta": 0.5},
        lambda ds: boosting_of(sum(ds), 0.5),
    ),
}
WEIGHTS = {"mixed": [1.0, -2.0, 0.5], "wide": [1.0, 0.3, -1.0, 2.0], "crowded": [0.7, 1.5, 1.0]}


@pytest.mark.parametrize(
    ("case", "family", "weighted"),
    covering(
        product(DEFINITIONS, ["mixed", "wide", "crowded"], [False, True]), lambda case: ((case[0], case[2]), case[1:])
    ),
    ids=lambda value: {False: "even", True: "weighted"}.get(value, value),
)
def test_equals_its_definition_in_delta_and_in_core(
    families: dict[str, list[Path]], case: str, family: str, weighted: bool
) -> None:
    method, parameters, definition = DEFINITIONS[case]
    weights = WEIGHTS[family] if weighted else None
    deltas = {name: [d for _, d in found] for name, found in task_vectors(families[family], weights).items()}
    if method == "dual":  # alone to count the adapters that lack the module
        count = len(families[family])
        deltas = {name: found + [0 * found[0]] * (count - len(found)) for name, found in deltas.items()}
    wanted = {name: definition(found) for name, found in deltas.items()}
    for space in ("delta", "core"):
        assert relative_error(merged(families[family], method, space, weights=weights, **parameters), wanted) < 1e-4, (
            space
        )


@pytest.mark.parametrize("family", ["mixed", "wide"])
def test_pico_before_ties_is_ties_of_the_calibrated(families: dict[str, list[Path]], family: str) -> None:
    wanted = {}
    for name, found in task_vectors(families[family], WEIGHTS[family]).items():
        deltas = [delta for _, delta in found]
        prepared = [(w, own) for (w, _), own in zip(found, calibrated(deltas), strict=True)]
        wanted[name] = with_mean_norm(ties(prepared, 0.3), deltas)
    asked = {"weights": WEIGHTS[family], "density": 0.3, "scope": "module"}
    assert relative_error(merged(families[family], "pico+ties", **asked), wanted) < 1e-4


@pytest.mark.parametrize("after", FINISHING)
@pytest.mark.parametrize("family", ["mixed", "wide"])
def test_a_method_after_ties_in_core(families: dict[str, list[Path]], family: str, after: str) -> None:
    change = {"iso_c": lambda m, ms: iso_c([m]), "boosting": lambda m, ms: boosting_of(m, 0.4), "svc": svc_of}[after]
    wanted = {}
    for name, found in task_vectors(families[family]).items():
        L, cores, R = core_of([delta for _, delta in found])
        wanted[name] = L @ change(ties([(1.0, core) for core in cores], 0.5), cores) @ R.T
    asked = {"density": 0.5, "scope": "module", **({"beta": 0.4} if after == "boosting" else {})}
    assert relative_error(merged(families[family], f"ties+{after}", "core", **asked), wanted) < 1e-4


@pytest.mark.parametrize("family", ["mixed", "wide", "crowded"])
def test_ties_in_core_and_in_knots_are_their_dense_definitions(families: dict[str, list[Path]], family: str) -> None:
    core, knots = {}, {}
    for name, found in task_vectors(families[family], WEIGHTS[family]).items():
        plain = [delta / w for w, delta in found]
        L, cores, R = core_of(plain)
        core[name] = L @ ties([(w, w * m) for (w, _), m in zip(found, cores, strict=True)], 0.3) @ R.T
        U, S, Vt = svd(np.hstack(plain))
        blocks = np.split(np.diag(S) @ Vt, len(plain), axis=1)
        knots[name] = U @ ties([(w, w * block) for (w, _), block in zip(found, blocks, strict=True)], 0.3)
    asked = {"weights": WEIGHTS[family], "density": 0.3, "scope": "module"}
    assert relative_error(merged(families[family], "ties", "core", **asked), core) < 1e-4
    assert relative_error(merged(families[family], "ties", "knots", **asked), knots) < 1e-4


# laws of the spaces


@pytest.mark.parametrize("family", ["mixed", "wide", "crowded"])
@pytest.mark.parametrize("space", ["core", "core, as published", "knots"])
def test_decoding_what_was_encoded_gives_every_adapter_back(
    families: dict[str, list[Path]], family: str, space: str
) -> None:
    name, *published = space.split(",")
    made = find_space(name)(**({"balanced": False} if published else {}))
    adapters = [ties_peft.Adapter.load(folder) for folder in families[family]]
    for module in SHAPES:
        deltas = [a.read(module) for a in adapters if module in a.layout]
        encoding = made.encode(deltas)
        for delta, parts in zip(deltas, encoding.parts, strict=True):
            assert torch.dist(encoding.decode(parts, None).delta.dense(), delta.dense()) < 1e-5 * delta.dense().norm()


@pytest.mark.parametrize("method", ["task_arithmetic", "average", "pico", "karcher", "model_stock"])
@pytest.mark.parametrize("family", ["mixed", "wide", "crowded"])
def test_linear_rules_are_the_same_in_every_space(families: dict[str, list[Path]], family: str, method: str) -> None:
    wanted = merged(families[family], method)
    assert max(relative_error(merged(families[family], method, space), wanted) for space in ("core", "knots")) < 1e-5


def spaces_of(method: str) -> list[str]:
    classes = [method_classes()[name] for name in method.split("+")]
    if any(cls.spectral for cls in classes) and any(cls.entrywise for cls in classes):
        return ["core"]
    return [space for space in ("delta", "core", "knots") if all(space in cls.spaces for cls in classes)]


def other_factors(folders: Sequence[Path], at: Path) -> list[Path]:
    """The same adapters in other factors, (B·G, G⁻¹·A), some of them with their scale moved."""
    draw, made = np.random.default_rng(5), []
    for number, folder in enumerate(folders):
        own = {}
        for name, (B, A) in factors(folder).items():
            G = draw.normal(size=(B.shape[1], B.shape[1])) * 10.0 ** (2 * number - 2)
            own[name] = B @ G, np.linalg.solve(G, A)
        made.append(write(at / str(number), own))
    return made


@pytest.mark.parametrize(
    ("method", "family"),
    covering(
        product([*DETERMINISTIC, "pico+ties", "ties+iso_c", "ties+svc", "pico+tsv"], ["mixed", "crowded"]),
        lambda case: case,
    ),
)
def test_neither_factors_nor_order_matter(
    families: dict[str, list[Path]], tmp_path: Path, method: str, family: str
) -> None:
    others = other_factors(families[family], tmp_path)
    for space in spaces_of(method):
        wanted = merged(families[family], method, space)
        assert relative_error(merged(others, method, space), wanted) < 1e-3, space
        assert relative_error(merged(families[family][::-1], method, space), wanted) < 1e-5, space


@pytest.mark.parametrize("method", [*SPECTRAL, "pico", "karcher", "ties"])
def test_an_adapter_in_other_factors_is_a_copy_of_itself(
    families: dict[str, list[Path]], tmp_path: Path, method: str
) -> None:
    folders = families["mixed"][:2]
    for space in spaces_of(method):
        wanted = merged([*folders, folders[0]], method, space)
        assert (
            relative_error(merged([*folders, other_factors(folders, tmp_path / space)[0]], method, space), wanted)
            < 1e-3
        ), space


def test_the_published_core_space_depends_on_the_factors(families: dict[str, list[Path]], tmp_path: Path) -> None:
    own = factors(families["mixed"][0])
    moved = write(tmp_path / "moved", {n: (B / 30, 30 * A) for n, (B, A) in own.items()})
    others = families["mixed"][1:]
    for balanced, changes in ((True, False), (False, True)):
        before = merged([families["mixed"][0], *others], "ties", "core", balanced=balanced)
        after = merged([moved, *others], "ties", "core", balanced=balanced)
        assert (relative_error(after, before) > 0.1) == changes


def test_knots_stands_an_adapter_whose_scale_sits_in_one_factor(
    families: dict[str, list[Path]], tmp_path: Path
) -> None:
    own = factors(families["mixed"][0])
    moved = write(tmp_path / "moved", {n: (B / 1e6, 1e6 * A) for n, (B, A) in own.items()})
    others = families["mixed"][1:]
    for method in ("ties", "task_arithmetic"):
        assert (
            relative_error(merged([moved, *others], method, "knots"), merged(families["mixed"], method, "knots")) < 1e-4
        )


def agreement(result: Mapping[str, Array], folders: Sequence[Path]) -> float:
    """The mean cosine between the result and the adapters."""
    cosines = [
        np.sum(result[n] * d) / np.linalg.norm(result[n]) / np.linalg.norm(d)
        for n, found in task_vectors(folders).items()
        for _, d in found
    ]
    return float(np.mean(cosines))


@pytest.mark.parametrize("method", ["iso_c", "flat_tsv"])
def test_compressing_first_keeps_what_cutting_a_flat_spectrum_loses(tmp_path: Path, method: str) -> None:
    draw, shape = np.random.default_rng(0), (48, 40)
    P, Q = draw.normal(size=(shape[0], 6)), draw.normal(size=(6, shape[1]))
    folders = []
    for i in range(6):
        B, A = P @ draw.normal(size=(6, 8)), draw.normal(size=(8, 6)) @ Q
        B, A = B + 2 * draw.normal(size=B.shape), A + 2 * draw.normal(size=A.shape)
        folders.append(write(tmp_path / str(i), {"q": (B * 0.7 ** np.arange(8), A)}))
    cut = merged(folders, method, "core", rank=4)
    first = merged(folders, method, "core", rank=4, compress_first=True)
    assert len(svd(first["q"], 1e-5)[1]) == 4
    assert agreement(first, folders) > 1.2 * agreement(cut, folders)


def test_the_subspace_that_compressing_finds_holds_more_than_that_of_the_sum(families: dict[str, list[Path]]) -> None:
    adapters = [ties_peft.Adapter.load(folder) for folder in families["wide"]]
    deltas = [adapter.read("layers.0.up") for adapter in adapters]
    encoding = find_space("core")(compress_first=True, norm_blend=1.0).encode(deltas, 4)
    held = sum(float(parts[0].dense().square().sum()) for parts in encoding.parts)
    dense = [delta.dense().double().numpy() for delta in deltas]
    U, _, Vt = np.linalg.svd(sum(dense))
    assert held > 1.02 * sum(np.sum((U[:, :4].T @ delta @ Vt[:4].T) ** 2) for delta in dense)


# laws of the methods


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("zeros")
    return write(at / "zeros", {n: (0 * B, A) for n, (B, A) in random_factors(2, 9).items()})


@pytest.mark.parametrize("space", ["delta", "core"])
@pytest.mark.parametrize("method", KEEPS_ONE)
def test_one_adapter_comes_back(families: dict[str, list[Path]], method: str, space: str) -> None:
    for folder in (*families["mixed"], families["crowded"][0]):
        wanted = {n: -B @ A for n, (B, A) in factors(folder).items()}
        assert relative_error(merged([folder], method, space, weights=[-1.0]), wanted) < 1e-5


@pytest.mark.parametrize("method", [*SPECTRAL, "pico"])
def test_zeros_are_absent_and_weights_are_factors(families: dict[str, list[Path]], zeros: Path, method: str) -> None:
    wanted = merged(families["mixed"], method)
    if method != "dual":  # which counts them
        assert relative_error(merged([*families["mixed"], zeros], method), wanted) < 1e-5
    tripled = merged(families["mixed"], method, weights=[-3.0] * 3)
    assert relative_error({n: delta / -3 for n, delta in tripled.items()}, wanted) < 1e-5


EDGED = [*DETERMINISTIC, "slerp", "pico+ties", "ties+iso_c", "ties+svc", "ties+boosting"]


@pytest.mark.parametrize(
    ("method", "space"),
    covering([(method, space) for method in EDGED for space in spaces_of(method)], lambda case: case),
)
def test_edges_are_finite(
    families: dict[str, list[Path]], zeros: Path, tmp_path: Path, method: str, space: str
) -> None:
    first = families["mixed"][0]
    dot = write(tmp_path / "dot", random_factors(1, 0, {"layers.0.q": (1, 1)}))
    opposite = write(tmp_path / "opposite", {n: (-B, A) for n, (B, A) in factors(first).items()})
    nothing = write(tmp_path / "nothing", {n: (0 * B, 0 * A) for n, (B, A) in random_factors(2, 0).items()})
    for folders in ([first] * 2, [zeros] * 2, [nothing, zeros], [first, zeros], [dot], [dot] * 2, [first, opposite]):
        assert all(np.isfinite(delta).all() for delta in merged(folders, method, space).values())


def test_directions_that_stand_apart_are_summed_by_tsv(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    U, V = np.linalg.qr(draw.normal(size=(20, 6)))[0], np.linalg.qr(draw.normal(size=(16, 6)))[0]
    S = np.array([5, 3, 1, 4, 2, 0.5])
    folders = [write(tmp_path / str(i), {"q": (U[:, i : i + 3] * S[i : i + 3], V[:, i : i + 3].T)}) for i in (0, 3)]
    assert relative_error(merged(folders, "tsv"), {"q": (U * S) @ V.T}) < 1e-5
    flat = merged(folders, "flat_tsv")["q"]
    level = np.concatenate([np.full(3, np.sqrt(np.mean(part**2))) for part in (S[:3], S[3:])])
    assert relative_error({"q": flat}, {"q": (U * np.sqrt(S * level)) @ V.T}) < 1e-5
    assert np.linalg.norm(flat) < np.linalg.norm(S) * 1.0001
    for alpha in (0.1, 0.5):
        assert relative_error(merged(folders, "svc", alpha=alpha), {"q": 2 / (1 + alpha) * (U * S) @ V.T}) < 1e-4


def test_spectra_are_what_they_are_said_to_be(families: dict[str, list[Path]]) -> None:
    folders = families["mixed"]
    total = {n: svd(sum(d for _, d in found))[1] for n, found in task_vectors(folders).items()}
    for name, delta in merged(folders, "iso_c").items():
        assert np.allclose(svd(delta, 1e-4)[1], total[name].mean(), rtol=1e-4)
    for delta in merged(folders, "iso_cts").values():
        assert np.ptp(svd(delta, 1e-4)[1]) < 1e-4 * np.linalg.norm(delta, 2)
    for name, delta in merged(folders, "boosting", beta=0.5).items():
        assert (svd(delta, 1e-6)[1] >= total[name] * 0.9999).all()
    assert relative_error(merged(folders, "boosting", beta=1.0), merged(folders, "task_arithmetic", scale=1.0)) < 1e-5


def test_iso_cts_is_iso_c_where_nothing_is_an_adapters_own(families: dict[str, list[Path]]) -> None:
    assert relative_error(merged(families["wide"], "iso_cts", common=1.0), merged(families["wide"], "iso_c")) < 1e-5
    alone = families["wide"][:1]
    assert relative_error(merged(alone, "iso_cts"), merged(alone, "iso_c")) < 1e-5


def test_dual_acts_on_each_adapters_directions_as_that_adapter_does() -> None:
    """UᵢᵀτVⱼ → 0 for i ≠ j as a → 1, while the sum and TSV mix them: many adapters that share an output direction."""
    rng = np.random.default_rng(0)
    shared, deltas = rng.normal(size=40), []
    for _ in range(8):
        u = shared + rng.normal(size=40)  # cosine about ½ with each other
        v = rng.normal(size=60)
        deltas.append(np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v)))
    made = {name: method_classes()[name]().merge(TaskVectors.of([torch.tensor(d) for d in deltas])).double().numpy()
            for name in ("tsv", "dual")}  # fmt: skip
    made["sum"] = sum(deltas)
    leak = {}
    for name, matrix in made.items():
        found = [svd(d) for d in deltas]
        U, V = np.hstack([u for u, *_ in found]), np.hstack([v.T for *_, v in found])
        answers = U.T @ matrix @ V
        leak[name] = np.linalg.norm(answers - np.diag(np.diag(answers))) / np.linalg.norm(np.diag(answers))
    assert leak["dual"] < 0.1 < leak["tsv"] < leak["sum"], leak


def test_copies_are_counted_once(families: dict[str, list[Path]]) -> None:
    first = families["mixed"][0]
    one = {n: B @ A for n, (B, A) in factors(first).items()}
    for method in ("tsv", "svc", "dual"):
        assert relative_error(merged([first] * 3, method), one) < 1e-5
    for name, delta in merged([first] * 3, "flat_tsv").items():
        U, S, Vt = svd(one[name])
        level = np.sqrt(np.mean(S**2))
        assert relative_error({name: delta}, {name: (U * (S ** (1 / 3) * level ** (2 / 3))) @ Vt}) < 1e-5


def test_wudi_without_ridge_answers_every_adapters_inputs(families: dict[str, list[Path]]) -> None:
    result = merged(families["mixed"], "wudi", ridge=0)
    for name, found in task_vectors(families["mixed"]).items():
        for _, delta in found:
            assert np.linalg.norm((result[name] - delta) @ delta.T) < 1e-3 * np.linalg.norm(delta @ delta.T)
    held = merged(families["mixed"], "wudi", ridge=1e6)
    assert relative_error(held, merged(families["mixed"], "task_arithmetic", scale=1.0)) < 1e-4


def test_pico_has_the_mean_norm_times_the_scale(families: dict[str, list[Path]]) -> None:
    for method in ("pico", "pico+ties", "pico+tsv"):
        result = merged(families["mixed"], method, scale=0.5)
        for name, found in task_vectors(families["mixed"]).items():
            mean = np.mean([np.linalg.norm(delta) for _, delta in found])
            assert np.isclose(np.linalg.norm(result[name]), 0.5 * mean, rtol=1e-4)


# lego


def lego_of(units: Sequence[Array], clusters: Sequence[Sequence[int]]) -> tuple[float, Array]:
    """What k-means loses with these clusters of rank-one matrices, and the merge that they make."""
    loss, total = 0.0, np.zeros_like(units[0])
    for cluster in clusters:
        own = [units[i] for i in cluster]
        mean = sum(own) / len(own)
        loss += sum(np.sum((unit - mean) ** 2) for unit in own)
        U, _, Vt = svd(mean)
        total += np.mean([np.linalg.norm(unit) for unit in own]) * np.outer(U[:, 0], Vt[0])
    return loss, np.sqrt(len(units) / len(clusters)) * total


@pytest.mark.parametrize("seed", range(5))
def test_lego_finds_the_best_clusters(tmp_path: Path, seed: int) -> None:
    """Two adapters of two directions each, alike in pairs, among all ways to sort four units into two clusters."""
    draw = np.random.default_rng(seed)
    U, V = np.linalg.qr(draw.normal(size=(14, 2)))[0], np.linalg.qr(draw.normal(size=(11, 2)))[0]
    folders, units = [], []
    for i in (0, 1):
        B, A = (U + 0.05 * draw.normal(size=U.shape)) * [3, 1], (V + 0.05 * draw.normal(size=V.shape)).T
        folders.append(write(tmp_path / str(i), {"q": (B, A)}))
        L, S, Rt = svd(np.matmul(*factors(folders[-1])["q"]))
        units += [S[j] * np.outer(L[:, j], Rt[j]) for j in (0, 1)]
    pairs = [((i,), tuple({0, 1, 2, 3} - {i})) for i in range(4)] + [
        ((0, i), tuple({1, 2, 3} - {i})) for i in (1, 2, 3)
    ]
    best = min((lego_of(units, clusters) for clusters in pairs), key=lambda found: found[0])[1]
    assert relative_error(merged(folders, "lego"), {"q": best}) < 1e-4


def test_lego_with_one_cluster_for_every_unit_is_the_sum(families: dict[str, list[Path]]) -> None:
    whole = merged(families["mixed"], "task_arithmetic", scale=1.0)
    assert relative_error(merged(families["mixed"], "lego", clusters=99), whole) < 1e-5
    for clusters in (1, 3):
        result = merged(families["mixed"], "lego", clusters=clusters)
        assert {len(svd(delta, 1e-5)[1]) for delta in result.values()} == {clusters}


# the linear algebra


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_the_polar_factor_turns_with_its_matrix_and_ignores_what_is_not_there(shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(1)
    M, E = (
        torch.tensor(draw.normal(size=shape)),
        torch.linalg.qr(torch.tensor(draw.normal(size=(shape[1], shape[1]))))[0],
    )
    factor = polar_factor(M)
    assert torch.allclose(polar_factor(M @ E), factor @ E) and torch.allclose(polar_factor(factor), factor)
    twice = polar_factor(torch.cat([M, M], 1))
    assert torch.allclose(twice, torch.cat([factor, factor], 1) / 2**0.5)
    assert len(spectrum(0 * M)) == 0 and torch.allclose(spectrum(M).dense(), M)


# what else stands before and after


@pytest.mark.parametrize("method", ["tsv", "flat_tsv", "iso_c", "pico", "wudi"])
def test_dropping_at_random_goes_before(families: dict[str, list[Path]], method: str) -> None:
    if "dare" not in method_classes():
        pytest.skip("there is no dare")
    kept = merged(families["mixed"], f"dare+{method}", "core", density=1.0)
    assert relative_error(kept, merged(families["mixed"], method, "core")) < 1e-5
    dropped = [merged(families["mixed"], f"dare+{method}", "core", density=0.5, seed=seed) for seed in (0, 0, 1)]
    assert relative_error(dropped[0], dropped[1]) == 0 < relative_error(dropped[2], dropped[1])


def test_entries_and_singular_vectors_go_together_in_core_alone(families: dict[str, list[Path]]) -> None:
    for method in ("ties+iso_c", "dare+tsv"):
        with pytest.raises(ties_peft.MethodError, match="space core"):
            ties_peft.merge(families["mixed"], method=method)


def test_matrix_methods_are_refused_where_there_is_no_matrix(make_ia3: Callable[..., Path]) -> None:
    folders = [make_ia3("a", seed=1), make_ia3("b", seed=2)]
    for method in (*SPECTRAL, "pico"):
        with pytest.raises(ties_peft.TiesPeftError, match=rf"'{method}' is not for.*Methods that are:.*karcher.*slerp"):
            ties_peft.merge(folders, method=method)
