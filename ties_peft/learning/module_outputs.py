"""Find the LoRA whose modules' outputs are nearest to the adapters' on their own rows, in closed form.

For each module, over all Δ of rank r:

    min Σᵢ wᵢ · mean over the tokens x of adapter i's rows of ‖(Δ − Δᵢ)·x‖²

With the Gram matrices Gᵢ = mean of x·xᵀ and G = Σᵢ wᵢGᵢ the best Δ of any rank is C·G⁻¹, C = Σᵢ wᵢΔᵢGᵢ, and the best of
rank r has the r largest singular directions of C·L⁻ᵀ, G = L·Lᵀ (reduced-rank regression). A share `RIDGE` of the mean of G's
diagonal is added to it, because few rows determine few directions. RegMean multiplies the entries off the diagonal by a
factor under 1 for this purpose. The two were compared once, on validation rows of one language model, where this ridge
alone did better than the factor 0.8 with a smaller ridge. x is the input with adapter i applied to the model.

Sources: Jin, Ren, Preotiuc-Pietro and Cheng, Dataless Knowledge Fusion by Merging Weights of Language Models (ICLR 2023):
RegMean; Izenman, Reduced-Rank Regression for the Multivariate Linear Model (J. Multivariate Analysis, 1975).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..evaluation.loaded_model import Bench, weight_shape
from ..merging.plan import Progress
from ..task_vectors.delta import LowRank
from .checkpoint import Checkpoint
from .fitting import Fit, FitOptions
from .student import FACTORS, Student
from .teachers import Teacher

RIDGE = 1e-2
MAX_BYTES = 2 << 30  # of all Gram matrices


class ModuleInputs:
    """The sums over tokens that the closed form needs, gathered while adapters run on their rows.

    Args:
        bench: the base model.
        modules: of the result, linear layers.
    """

    def __init__(self, bench: Bench, modules: Sequence[str]) -> None:
        self.bench, self.modules = bench, modules
        self._owners: dict[str, str] = {}  # of modules that share an input, as query, key and value do, the first
        self._grams: dict[str, Tensor] = {}  # Σ wᵢGᵢ, (in, in), of each owner
        self._targets: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}  # (Bᵢ, wᵢAᵢGᵢ)
        self._is_token: Tensor | None = None  # for each position of the batch; others are padding
        self._latest: tuple[Tensor, str, Tensor] | None = None  # the last input, its owner, its tokens, (tokens, in)

    @staticmethod
    def bytes_needed(bench: Bench, modules: Sequence[str]) -> int:
        """Return the bytes of one Gram matrix for each module; modules that share an input need less."""
        return sum(4 * weight_shape(bench.layer(name))[1] ** 2 for name in modules)

    @contextmanager
    def gathered(self, adapter: Adapter | None, weight: float, tokens: int) -> Iterator[None]:
        """Add the inputs of the modules within a `with` block, in which an adapter runs once on its rows.

        Args:
            adapter: that is applied; None for the base model, whose Δ is 0.
            weight: wᵢ.
            tokens: the number in all of its rows.
        """
        share = weight / tokens
        deltas = {} if adapter is None else {name: adapter.read(name) for name in adapter.modules}
        with ExitStack() as stack:
            stack.callback(self.bench.model.register_forward_pre_hook(self._keep_mask, with_kwargs=True).remove)
            for name in self.modules:
                delta = deltas.get(name)
                hook = self._recorder(name, delta if isinstance(delta, LowRank) else None, share)
                stack.callback(self.bench.layer(name).register_forward_pre_hook(hook).remove)
            yield
        self._is_token = self._latest = None

    def best(self, rank: int) -> dict[str, LowRank]:
        """Return the best Δ of every module, B: (out, rank) and A: (rank, in), float32, on the CPU."""
        found: dict[str, LowRank] = {}
        roots: dict[str, Tensor] = {}
        for name in sorted(self.modules, key=lambda name: self._owners.get(name, "")):
            owner = self._owners.get(name)
            if owner is None:  # the model never ran it, so its Δ has no effect
                rows, columns = weight_shape(self.bench.layer(name))
                found[name] = LowRank(torch.zeros(rows, rank), torch.zeros(rank, columns))
                continue
            if owner not in roots:
                roots = {owner: _root(self._grams[owner])}  # one at a time, because they are large in float64
            found[name] = _reduced_rank(self._targets[name], roots[owner], rank)
        return found

    def _keep_mask(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._is_token = kwargs["attention_mask"].bool()

    def _recorder(self, name: str, delta: LowRank | None, share: float) -> Any:
        """Return a hook that adds the inputs of one module."""
        if delta is None:
            return lambda _, inputs: self._add_input(name, inputs[0], share)
        A = delta.A.to(self.bench.device)
        sums = torch.zeros_like(A)
        self._targets[name].append((delta.B, sums))

        def record(_: Any, inputs: tuple[Tensor, ...]) -> None:
            self._add_input(name, inputs[0], share)
            assert self._latest is not None
            x = self._latest[2]
            sums.addmm_((x @ A.T).T, x, alpha=share)

        return record

    def _add_input(self, name: str, value: Tensor, share: float) -> None:
        """Add an input of a module to its Gram matrix, unless the module before has added the same input."""
        if self._latest is None or self._latest[0] is not value:
            x = value[self._is_token].float()
            if name not in self._grams:
                self._grams[name] = x.new_zeros(x.shape[-1], x.shape[-1])
            self._grams[name].addmm_(x.T, x, alpha=share)
            self._latest = (value, name, x)
        self._owners[name] = self._latest[1]


def has_closed_form(student: Student, teachers: Sequence[Teacher]) -> bool:
    """Return whether the closed form applies: factors of LoRAs of a causal model are fitted, and the matrices are small."""
    adapters = [teacher.adapter for teacher in teachers if teacher.adapter is not None]
    fits = student.fit == FACTORS and student.bench.form == "causal"
    lora = all(adapter.peft_type.has_rank for adapter in adapters)
    return fits and lora and ModuleInputs.bytes_needed(student.bench, student.start.modules) <= MAX_BYTES


def write_rows(teachers: Sequence[Teacher], checkpoint: Checkpoint, progress: Progress) -> None:
    """Let every teacher write what its rows lack, or read what an earlier run saved."""
    for number, teacher in enumerate(teachers):
        written = checkpoint.read(f"rows {number}")
        if written is None:
            written = teacher.write(progress)
            if written:
                checkpoint.write(f"rows {number}", written)
        teacher.set_written(written)


def run_teachers(
    teachers: Sequence[Teacher],
    checkpoint: Checkpoint,
    progress: Progress,
    inputs: ModuleInputs | None = None,
    weights: Sequence[float] = (),
) -> None:
    """Set the predictions of every teacher, from one run of it or as an earlier run saved them.

    Args:
        teachers: with complete rows.
        checkpoint: where predictions are saved and read.
        progress: called as progress(stage, done, of).
        inputs: gathers the inputs of the modules; then every teacher runs, also where its predictions are saved.
        weights: of each teacher, for `inputs`.
    """
    progress("teachers", 0, len(teachers))
    for number, teacher in enumerate(teachers):
        predictions = None if inputs else checkpoint.read(f"teacher {number}")
        if predictions is None:
            tokens = sum(map(len, teacher.sequences))
            with inputs.gathered(teacher.adapter, weights[number], tokens) if inputs else nullcontext():
                predictions = teacher.predict()
            checkpoint.write(f"teacher {number}", predictions)
        teacher.set_predictions(predictions)
        progress("teachers", number + 1, len(teachers))


def better_start(
    student: Student,
    teachers: Sequence[Teacher],
    options: FitOptions,
    checkpoint: Checkpoint,
    progress: Progress,
) -> tuple[Student, bool]:
    """Run the teachers, and return the student as it is or from the closed form, whichever diverges less on held-out rows.

    Returns: the student, and whether it starts with the closed form.
    """
    saved = checkpoint.read("start")
    inputs = ModuleInputs(student.bench, student.start.modules) if saved is None else None
    run_teachers(teachers, checkpoint, progress, inputs, options.shares(len(teachers)))
    if inputs is not None:
        found = student.started_from(inputs.best(student.start.ranks[-1]))
        before, after = (Fit(one, teachers, options).divergence() for one in (student, found))
        saved = {"tensors": found.state_dict() if after < before else {}}
        checkpoint.write("start", saved)
    if not saved["tensors"]:
        return student, False
    factors = saved["tensors"]
    names = student.start.modules
    return student.started_from(
        {name: LowRank(factors[f"{name}.B"].cpu(), factors[f"{name}.A"].cpu()) for name in names}
    ), True


def _root(gram: Tensor) -> Tensor:
    """Return L, lower triangular, of G + ridge = L·Lᵀ, (in, in), float64, on the CPU."""
    whole = gram.cpu().double()
    whole.diagonal().add_(RIDGE * whole.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    root: Tensor = torch.linalg.cholesky(whole)
    return root


def _reduced_rank(targets: Sequence[tuple[Tensor, Tensor]], root: Tensor, rank: int) -> LowRank:
    """Return the Δ of a rank that minimises the loss of one module.

    Args:
        targets: (Bᵢ, wᵢAᵢGᵢ) of each adapter that has the module.
        root: L.
        rank: r; where Δ has a smaller one, the other directions are 0.
    """
    B = torch.cat([one.cpu().double() for one, _ in targets], 1)
    C = torch.cat([one.cpu().double() for _, one in targets])
    Q, R = torch.linalg.qr(B)
    inner, triangle = torch.linalg.qr(torch.linalg.solve_triangular(root, C.T, upper=False))  # L⁻¹·Cᵀ
    U, S, Vh = torch.linalg.svd(R @ triangle.T)
    r = min(rank, len(S))
    strengths = S[:r].sqrt()
    left = Q @ (U[:, :r] * strengths)
    right = torch.linalg.solve_triangular(root.T, inner @ Vh[:r].T * strengths, upper=True).T
    balance = (left.norm(dim=0) / right.norm(dim=1).clamp_min(1e-300)).sqrt().clamp_min(1e-150)
    B, A = torch.zeros(len(left), rank), torch.zeros(rank, right.shape[1])
    B[:, :r], A[:r] = left / balance, right * balance.unsqueeze(1)
    return LowRank(B, A)
