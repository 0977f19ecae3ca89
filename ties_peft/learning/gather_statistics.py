"""Gather the statistics of an adapter that Fisher merging and RegMean need, from rows of text and the base model.

    gram     G = mean of x·xᵀ over all tokens of all rows, x the input of the module
    fisher   F = mean over rows of E_y (∂ log p(y | row) / ∂τ)², entry by entry: τ = Δ for LoRA, l for (IA)³

The adapter is applied to the model. y is the label of a row, and `labels` says where it comes from: `expected` takes
the mean over all labels by the model's own probabilities; `sampled` draws one label from these; `given` takes the row's
own label (the empirical Fisher). Texts of language models have too many possible answers for `expected`.

The model runs one row at a time, so that there is no padding and each row has its own gradient. The gradient with
respect to Δ of a module with output x·Δᵀ is Σ g·xᵀ over tokens, g the gradient with respect to the output; no gradient
of a weight is computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.statistics import Statistics
from ..errors import CompatibilityError, MethodError, RecipeError, unknown, warn_caller
from ..evaluation.causal_passes import Pair
from ..evaluation.evaluate import find_base
from ..evaluation.language_models import Continuation
from ..evaluation.loaded_model import Bench, transposed
from ..evaluation.scorers import Classification, check_form, form_for
from ..evaluation.task import GENERATED, Task, TaskSource, read_task
from ..merging.plan import Progress
from ..task_vectors.random_numbers import stream_key, uniform
from . import STATISTICS

LABELS = ("expected", "sampled", "given")


def gather_statistics(
    adapter: str | Path | Adapter,
    task: TaskSource,
    kind: str = "gram",
    base: str | Path | None = None,
    device: str = "cpu",
    *,
    labels: str | None = None,
    seed: int = 0,
    bench: Bench | None = None,
    save: bool = True,
    again: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Return the statistics of an adapter for method `fisher` (kind `fisher`) or `regmean` (kind `gram`).

    A few hundred rows are enough.

    Args:
        adapter: its folder or Hub id, or an `Adapter`.
        task: rows of text, as for `evaluate`; their labels are used for `given` only.
        kind: `fisher` or `gram`.
        base: the base model; by default the task's, else the adapter's.
        device: where the model runs.
        labels: for `fisher`: `expected`, `sampled` or `given`; by default `expected` where a row has one of a few labels,
            else `sampled`.
        seed: of sampled labels.
        bench: a loaded base to use again.
        save: whether to write the statistics beside the adapter, where a merge finds them.
        again: whether to gather statistics again that exist already.
        progress: called as progress(stage, done, of).
    Returns: the statistics, which are attached to the adapter too.
    Raises: TiesPeftError, before the model is run.
    """
    if kind not in STATISTICS:
        raise RecipeError(unknown("kind of statistics", str(kind), STATISTICS))
    opened = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    existing = None if again else _existing(opened, kind)
    asked = read_task(task)
    labels = _choose_labels(labels, asked)
    provenance: dict[str, Any] = {"task": asked.name, "rows digest": asked.digest()}
    if kind == "fisher":
        provenance |= {"labels": labels, **({"seed": seed} if labels == "sampled" else {})}
    if existing is not None:
        named = str(base or asked.base or "") if bench is None else bench.base
        _warn_if_different(opened, existing, {**provenance, **({"base": named} if named else {})})
        return existing
    _check(opened, asked, kind, save)
    if bench is None:
        bench = Bench.load(find_base([opened], [asked], base), form_for(asked), device)
    check_form(bench, asked)
    bench.check_all(opened)
    rows = _row_likelihoods(bench, asked, labels)
    sums = _accumulate(bench, opened, rows, kind, labels, seed, progress)
    made = Statistics.make(kind, opened.digest, sums, len(rows), base=bench.base, **provenance)
    opened.attach_statistics(made)
    if save and opened.folder is not None:
        made.save(opened.folder)
    return made


def _existing(adapter: Adapter, kind: str) -> Statistics | None:
    """Return the statistics beside the adapter; None if there are none, or those of another adapter."""
    try:
        return adapter.statistics(kind)
    except CompatibilityError:
        return None


def _warn_if_different(adapter: Adapter, existing: Statistics, asked: Mapping[str, Any]) -> None:
    """Warn that existing statistics are used which were gathered with other rows, labels or base than asked for."""
    facts = dict(existing.metadata)
    if "base" in asked:  # one base may have several paths
        asked, facts = ({**found, "base": Path(str(found.get("base"))).name} for found in (asked, facts))
    other = [name.removesuffix(" digest") for name, value in asked.items() if facts.get(name) != value]
    if other:
        provenance = f"{existing.metadata.get('rows')} rows of {existing.metadata.get('task')}"
        warn_caller(
            [
                f"adapter '{adapter.label}' already has {existing.kind} statistics of {provenance}, made with another "
                f"{', another '.join(other)} than asked for. They are used; to gather them again, give again=True (--again)."
            ]
        )


def _choose_labels(labels: str | None, task: Task) -> str:
    chosen = labels or ("expected" if task.classifies else "sampled")
    if chosen not in LABELS:
        raise RecipeError(unknown("kind of labels", str(labels), LABELS))
    if chosen == "expected" and not task.classifies:
        raise MethodError(
            f"labels is 'expected', but the texts of measure '{task.measure}' have too many possible answers. Choose sampled "
            "or given."
        )
    return chosen


def _check(adapter: Adapter, task: Task, kind: str, save: bool) -> None:
    if task.measure in GENERATED:
        raise RecipeError(
            f"task {task.name!r}: measure {task.measure!r} gives no probabilities. Use measure: loss for the same rows."
        )
    if kind == "gram" and any(len(module.shape) != 2 for module in adapter.layout.values()):
        raise MethodError(
            f"adapter '{adapter.label}': gram statistics are of matrices, and {adapter.peft_type.title} is of vectors. "
            "Gather fisher, for method 'fisher'."
        )
    vectors = [name for name, module in adapter.layout.items() if len(module.shape) == 1]
    with_zeros = [name for name in vectors if not (1 + adapter.delta(name)).all()]
    if with_zeros:
        raise CompatibilityError(
            f"adapter '{adapter.label}', module {with_zeros[0]!r}: an entry of its vector is 0, so the gradient cannot be "
            "computed from the output. Leave the adapter out, or merge by another method."
        )
    if save and adapter.folder is None:
        raise RecipeError("the adapter is in memory, so there is no folder to save statistics in. Give save=False.")


@dataclass(frozen=True)
class RowLikelihood:
    """One row and its likelihood under the model.

    Attributes:
        log_probabilities: runs the model and returns log p, (steps, answers): one step over a few labels, or one step over
            the vocabulary for each token of a text.
        answers: the row's own answer at each step; None where they are not needed.
    """

    log_probabilities: Callable[[], Tensor]
    answers: Tensor | None


def _row_likelihoods(bench: Bench, task: Task, labels: str) -> list[RowLikelihood]:
    """Tokenize and check the rows of a task."""
    if task.measure in ("descriptions", "head"):
        scorer = Classification(bench, task, labelled=labels == "given")
        return [
            RowLikelihood(partial(_label_log_probabilities, scorer, place), scorer.labels[place : place + 1])
            for place in range(scorer.rows)
        ]
    if task.choices is not None and labels != "given":  # these rows need no labels
        task = replace(task, rows=tuple({**row, str(task.label): 0} for row in task.read()))
    scored = Continuation(bench, task)
    if task.choices is None:
        return [
            RowLikelihood(partial(_step_log_probabilities, bench, pair), torch.tensor(_predicted_tokens(bench, pair)))
            for pair in scored.pairs
        ]
    count = len(task.choices)
    return [
        RowLikelihood(
            partial(_choice_log_probabilities, bench, scored.pairs[place * count : (place + 1) * count], task.mean),
            scored.labels[place : place + 1],
        )
        for place in range(scored.rows)
    ]


def _label_log_probabilities(scorer: Classification, place: int) -> Tensor:
    """Return log p of each label of one row, (1, labels)."""
    return scorer.logits([place]).log_softmax(-1)


def _choice_log_probabilities(bench: Bench, pairs: Sequence[Pair], mean: bool) -> Tensor:
    """Return log p of each choice among them, (1, choices)."""
    totals = []
    for pair in pairs:
        asked = torch.tensor(_predicted_tokens(bench, pair), device=bench.device).unsqueeze(1)
        chosen = _step_log_probabilities(bench, pair).gather(1, asked)
        totals.append(chosen.mean() if mean else chosen.sum())
    return torch.stack(totals).log_softmax(-1).unsqueeze(0)


def _predicted_tokens(bench: Bench, pair: Pair) -> list[int]:
    """Return the tokens that are predicted: all, or all but the first if nothing stands before it."""
    return pair.continuation[1:] if bench.form == "causal" and not pair.prompt else pair.continuation


def _step_log_probabilities(bench: Bench, pair: Pair) -> Tensor:
    """Return log p of every token at each predicted position, (predicted, vocabulary)."""
    if bench.form == "seq2seq":
        inputs = bench.pad_batch([pair.prompt])
        logits = bench.model(**inputs, labels=bench.pad_batch([pair.continuation])["input_ids"]).logits[0]
    else:
        logits = bench.model(**bench.pad_batch([[*pair.prompt, *pair.continuation]])).logits[0]
        logits = logits[-len(_predicted_tokens(bench, pair)) - 1 : -1]
    found: Tensor = logits.float().log_softmax(-1)
    return found


@dataclass
class ModuleCall:
    """One forward pass of a module.

    Attributes:
        module: its name.
        inputs: (tokens, in).
        outputs: (tokens, out), with the adapter applied.
        probe: zeros that were added to the output, whose gradient is that of the output; None where it is not needed.
    """

    module: str
    inputs: Tensor
    outputs: Tensor
    probe: Tensor | None


@contextmanager
def _recorded_calls(bench: Bench, adapter: Adapter, probed: bool) -> Iterator[list[ModuleCall]]:
    """Record the forward passes of an adapter's modules in a list, within a `with` block."""
    calls: list[ModuleCall] = []

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(layer: nn.Module, given: Any, output: Any) -> Any:
            probe = torch.zeros_like(output, requires_grad=True) if probed else None
            calls.append(ModuleCall(name, given[0].detach(), output.detach(), probe))
            return output if probe is None else output + probe

        return hook

    with ExitStack() as stack:
        for name in adapter.modules:
            stack.callback(bench.layer(name).register_forward_hook(recorder(name)).remove)
        yield calls


def _accumulate(
    bench: Bench,
    adapter: Adapter,
    rows: Sequence[RowLikelihood],
    kind: str,
    labels: str,
    seed: int,
    progress: Progress | None,
) -> dict[str, Tensor]:
    """Return the statistic of every module, float32, on the CPU: the mean over tokens (gram) or rows (fisher)."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = defaultdict(int)
    with bench.applied(adapter), _recorded_calls(bench, adapter, kind == "fisher") as calls:
        for place, row in enumerate(rows):
            calls.clear()
            if kind == "gram":
                terms = _grams(row, calls, tokens)
            else:
                row_seed = stream_key(seed, "fisher", place, adapter.digest)
                terms = _squared_gradients(bench, adapter, row, calls, labels, row_seed)
            for name, term in terms:
                _add(sums, name, term)
            if progress is not None:
                progress(kind, place + 1, len(rows))
    unused = sorted(set(adapter.modules) - sums.keys())
    if unused:
        raise CompatibilityError(
            f"adapter '{adapter.label}': {len(unused)} of its modules never ran, such as {unused[0]!r}. Choose a measure that "
            "uses the whole model."
        )
    return {name: (total / (tokens[name] or len(rows))).cpu() for name, total in sums.items()}


def _grams(row: RowLikelihood, calls: list[ModuleCall], tokens: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yield (module, x·xᵀ) of a row, and count the tokens of each module."""
    with torch.no_grad():
        row.log_probabilities()
    grams: dict[Any, Tensor] = {}  # query, key and value share one input
    for call in calls:
        place = (call.inputs.data_ptr(), call.inputs.shape)
        if place not in grams:
            x = _token_matrix(call.inputs, call.module)
            grams[place] = x.T @ x
        tokens[call.module] += call.inputs.shape[:-1].numel()
        yield call.module, grams[place]


def _squared_gradients(
    bench: Bench, adapter: Adapter, row: RowLikelihood, calls: list[ModuleCall], labels: str, row_seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield (module, p(y)·(∂ log p(y) / ∂τ)²) of a row for each label y."""
    with torch.enable_grad():
        log_p = row.log_probabilities()
    probes = [call.probe for call in calls if call.probe is not None]
    for weight, answer in _answers(row, log_p.detach(), labels, row_seed):
        with torch.enable_grad():
            chosen = log_p.gather(1, answer.to(log_p.device).unsqueeze(1)).sum()
        found = torch.autograd.grad(chosen, probes, retain_graph=True, allow_unused=True)
        gradients: dict[str, Tensor] = {}
        for call, gradient in zip(calls, found, strict=True):
            if gradient is not None:
                _add(gradients, call.module, _task_vector_gradient(bench, adapter, call, gradient))
        yield from ((name, weight * gradient.square()) for name, gradient in gradients.items())


def _answers(row: RowLikelihood, log_p: Tensor, labels: str, row_seed: int) -> Iterator[tuple[float, Tensor]]:
    """Yield (weight, answer at each step) of a row."""
    if labels == "given" and row.answers is not None:
        yield 1.0, row.answers
    elif labels == "expected":
        for answer, weight in enumerate(log_p[0].exp().tolist()):
            yield weight, torch.tensor([answer])
    else:
        threshold = uniform(row_seed, 0, (len(log_p), 1)).to(log_p.device)
        yield 1.0, (log_p.exp().cumsum(1) < threshold).sum(1).clamp_max(log_p.shape[1] - 1)


def _task_vector_gradient(bench: Bench, adapter: Adapter, call: ModuleCall, gradient: Tensor) -> Tensor:
    """Return the gradient with respect to τ of one forward pass of a module."""
    module, layer = adapter.module(call.module), bench.layer(call.module)
    g = gradient.reshape(-1, gradient.shape[-1])
    x = _token_matrix(call.inputs, call.module)
    if len(module.shape) == 2:
        return g.T @ x
    scaled = call.outputs.reshape(g.shape) * g
    if module.on_input:
        weight = cast(Tensor, layer.weight).detach()
        scaled = (g @ (weight.T if transposed(layer) else weight)) * x
    return scaled.sum(0) / (1 + adapter.delta(call.module).to(scaled.device))


def _token_matrix(inputs: Tensor, module: str) -> Tensor:
    """Return the inputs as (tokens, in), float32."""
    if not inputs.dtype.is_floating_point or inputs.dim() not in (2, 3):
        raise CompatibilityError(
            f"module {module!r} takes {inputs.dtype} of {inputs.dim()} dimensions; expected a linear layer, because statistics "
            "of embeddings and convolutions are not defined. Merge by another method."
        )
    return inputs.reshape(-1, inputs.shape[-1]).float()


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value.clone()
