"""Find the LoRA whose modules' outputs are nearest to the adapters' on their own rows, in closed form.

For each module, over all Δ of rank r:

    min Σᵢ wᵢ · mean over the tokens x of adapter i's rows of ‖(Δ − Δᵢ)·x‖²

With the Gram matrices Gᵢ = mean of x·xᵀ and G = Σᵢ wᵢGᵢ the best Δ of any rank is C·G⁻¹, C = Σᵢ wᵢΔᵢGᵢ, and the best of
rank r has the r largest singular directions of C·L⁻ᵀ, G = L·Lᵀ (reduced-rank regression). A share `RIDGE` of the mean of G's
diagonal is added to it, since few rows determine few directions; RegMean shrinks the entries off the diagonal instead, which
was worse here. x is the input with adapter i applied to the model.

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
from ..evaluation.scorers import Progress
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
        self._owners: dict[str, str] = {}  # of the modules that share an input, as query, key and value do, the first
        self._grams: dict[str, Tensor] = {}  # Σ wᵢGᵢ, (in, in), of each owner
        self._targets: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}  # (Bᵢ, wᵢAᵢGᵢ)
        self._tokens: Tensor | None = None  # whether each place of the batch is a token

    @staticmethod
    def bytes_needed(bench: Bench, modules: Sequence[str]) -> int:
        """Return the size of one Gram matrix for each module; less is needed where modules share an input."""
        return sum(4 * weight_shape(bench.layer(name))[1] ** 2 for name in modules)

    @contextmanager
    def gathered(self, adapter: Adapter | None, weight: float, tokens: int) -> Iterator[None]:
        """Add what the modules of the model read within a `with` block, in which an adapter runs once on its rows.

        Args:
            adapter: that is applied; None for the base model, whose Δ is 0.
            weight: wᵢ.
            tokens: in all of its rows.
        """
        share = weight / tokens
        deltas = {} if adapter is None else {name: adapter.read(name) for name in adapter.modules}
        with ExitStack() as stack:
            stack.callback(self.bench.model.register_forward_pre_hook(self._keep_mask, with_kwargs=True).remove)
            previous: list[Any] = [None, "", None]  # the input, the module that owns it, its tokens
            for name in self.modules:
                delta = deltas.get(name)
                hook = self._recorder(name, delta if isinstance(delta, LowRank) else None, share, previous)
                stack.callback(self.bench.layer(name).register_forward_pre_hook(hook).remove)
            yield
        self._tokens = None

    def best(self, rank: int) -> dict[str, LowRank]:
        """Return the best Δ of every module, B: (out, rank) and A: (rank, in), float32, on the CPU."""
        found: dict[str, LowRank] = {}
        roots: dict[str, Tensor] = {}
        for name in sorted(self.modules, key=lambda name: self._owners.get(name, "")):
            owner = self._owners.get(name)
            if owner is None:  # the model never ran it, so that its Δ does not matter
                rows, columns = weight_shape(self.bench.layer(name))
                found[name] = LowRank(torch.zeros(rows, rank), torch.zeros(rank, columns))
                continue
            if owner not in roots:
                roots = {owner: _root(self._grams[owner])}  # one at a time: in float64 they are large
            found[name] = _reduced_rank(self._targets[name], roots[owner], rank)
        return found

    def _keep_mask(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._tokens = kwargs["attention_mask"].bool()

    def _recorder(self, name: str, delta: LowRank | None, share: float, previous: list[Any]) -> Any:
        """Return a hook that adds what one module reads."""
        device = self.bench.device
        A = None if delta is None else delta.A.to(device)
        sums = torch.zeros_like(A) if A is not None else None
        if delta is not None and sums is not None:
            self._targets[name].append((delta.B, sums))

        def record(_: Any, inputs: tuple[Tensor, ...]) -> None:
            if previous[0] is not inputs[0]:
                previous[:] = [inputs[0], name, inputs[0][self._tokens].float()]
                if name not in self._grams:
                    width = inputs[0].shape[-1]
                    self._grams[name] = torch.zeros(width, width, device=device)
                self._grams[name].addmm_(previous[2].T, previous[2], alpha=share)
            self._owners[name] = previous[1]
            if A is not None and sums is not None:
                x = previous[2]
                sums.addmm_((x @ A.T).T, x, alpha=share)

        return record


def has_closed_form(student: Student, teachers: Sequence[Teacher]) -> bool:
    """Return whether there is a closed form: factors of a LoRA of a causal model, all adapters LoRAs, and memory for it."""
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
    """Run every teacher once and set its predictions, or those that an earlier run saved.

    Args:
        teachers: their rows must be complete.
        checkpoint: where predictions are saved, and read from unless `inputs` are wanted, for which all must run.
        progress: called as progress(stage, done, of).
        inputs: where to add what the modules read; None for nowhere.
        weights: of each teacher, for `inputs`.
    """
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
    """Run the teachers; return the student with the lower divergence on the held-out rows: as it is, or by the closed form.

    Returns: the student, and whether it begins with the closed form.
    """
    saved = checkpoint.read("start")
    inputs = ModuleInputs(student.bench, student.start.modules) if saved is None else None
    run_teachers(teachers, checkpoint, progress, inputs, options.shares(len(teachers)))
    if inputs is not None:
        found = student.begun_with(inputs.best(student.start.ranks[-1]))
        before, after = (Fit(one, teachers, options).divergence() for one in (student, found))
        saved = {"tensors": found.state_dict() if after < before else {}}
        checkpoint.write("start", saved)
    if not saved["tensors"]:
        return student, False
    factors = saved["tensors"]
    names = student.start.modules
    return student.begun_with(
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
