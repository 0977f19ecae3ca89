"""Generate text greedily with a language model, and score it: exact match, chrF, BLEU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..merging.plan import Progress
from . import BATCH_SIZE
from .loaded_model import Bench, unwrapped
from .score import Score
from .scorers import Scorer, batches, with_progress
from .task import Task

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "decoder_start_token_id")  # kept of the base's generation_config


class Generation(Scorer):
    """Measures `exact_match`, `chrf` and `bleu`: greedy text against the row's label."""

    def __init__(self, bench: Bench, task: Task) -> None:
        super().__init__(bench, task)
        self._metrics = None if task.measure == "exact_match" else _import_metrics(task)
        rows, texts = self.read()
        if task.label is None:
            raise RecipeError(f"{task.where}: measure {task.measure!r} needs a label. Name its key (label: KEY).")
        self.labels = torch.empty(0, dtype=torch.int64)
        self.answers = [answer.strip() for answer in task.target_texts(rows)]
        most = min(task.max_tokens, bench.max_length - task.new_tokens)
        if most < 1:
            raise RecipeError(
                f"task {task.name!r}: new_tokens is {task.new_tokens}; expected fewer than the {bench.max_length} positions "
                f"of '{bench.base}'. Ask for fewer."
            )
        found = bench.all_token_ids(texts)
        self.refuse_empty(found)
        self.cut = sum(len(ids) > most for ids in found)
        self.rows = len(found)
        self.sequences = [ids[:most] if bench.form == "seq2seq" else ids[-most:] for ids in found]

    def scored(self, progress: Progress | None, size: int) -> Score:
        """Return the share of rows whose generated text is the label, and chrF and BLEU where one of them is asked for."""
        texts = self.generated(progress, size)
        right = tuple(text == answer for text, answer in zip(texts, self.answers, strict=True))
        found = {} if self._metrics is None else self._compare(self._metrics, texts)
        return self.made(right, None, texts=tuple(texts), **found)

    def _compare(self, metrics: Any, texts: list[str]) -> dict[str, Any]:
        """Return chrF and BLEU of all texts together, and each text's own by the measure that is asked for."""
        bleu = self.task.measure == "bleu"
        # a short text has no n-grams of high orders: effective_order leaves these out of its own BLEU
        own = metrics.BLEU(effective_order=True) if bleu else metrics.CHRF()
        pairs = zip(texts, self.answers, strict=True)
        return {
            "chrf": float(metrics.CHRF().corpus_score(texts, [self.answers]).score),
            "bleu": float(metrics.BLEU().corpus_score(texts, [self.answers]).score),
            "text_scores": tuple(float(own.sentence_score(text, [answer]).score) for text, answer in pairs),
        }

    def generated(self, progress: Progress | None = None, size: int = BATCH_SIZE) -> list[str]:
        """Return what the model generates for each row, cut at `stop` and stripped."""
        texts = [""] * self.rows
        causal = self.bench.form == "causal"
        divided = batches([len(ids) for ids in self.sequences], size)
        with torch.no_grad():
            for places in with_progress(divided, progress, self.task.name, self.rows):
                inputs = self.bench.pad_batch([self.sequences[place] for place in places], left=causal)
                made = generate(self.bench, inputs, self.task.new_tokens)
                answers = made[:, inputs["input_ids"].shape[1] :] if causal else made
                for place, ids in zip(places, answers, strict=True):
                    texts[place] = self._clean(self.bench.tokenizer.decode(ids, skip_special_tokens=True))
        return texts

    def _clean(self, text: str) -> str:
        text = text.strip()
        return text.partition(self.task.stop)[0].strip() if self.task.stop else text


def generate(
    bench: Bench, inputs: dict[str, Tensor], most: int, ends: list[int] | None = None, processors: Any = None
) -> Tensor:
    """Return what a model generates greedily, as token ids, (rows, tokens); after the inputs if it is a causal model.

    Of the base's own generation_config only the special tokens are kept. It is replaced meanwhile, because `generate`
    takes from it what its arguments do not set: beams, sampling, penalties, a minimum length.

    Args:
        bench: the model.
        inputs: input_ids and attention_mask.
        most: new tokens, at most.
        ends: the tokens that end a row, in place of the base's own.
        processors: of `generate`; they change the scores of the next token before the largest is taken.
    """
    from transformers import GenerationConfig

    model = unwrapped(bench.model)
    original = model.generation_config
    tokens = {name: getattr(original, name, None) for name in SPECIAL_TOKENS}
    if ends is not None:
        tokens["eos_token_id"] = ends or None
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=most, do_sample=False, num_beams=1, pad_token_id=bench.pad_token_id, **tokens
    )
    try:
        model.generation_config = greedy
        made: Tensor = bench.model.generate(**inputs, generation_config=greedy, logits_processor=processors)
    finally:
        model.generation_config = original
    return made


def _import_metrics(task: Task) -> Any:
    """Return the module of sacrebleu that has its metrics."""
    try:
        from sacrebleu import metrics
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"task {task.name!r}: measure {task.measure!r} needs the module {str(error.name)!r}, which is not installed. Install "
            "the extra `metrics`: pip install 'ties-peft[metrics]'."
        ) from None
    return metrics
