"""Score text that a language model generates greedily: exact match, chrF, BLEU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from .loaded_model import Bench
from .score import Score
from .scorers import BATCH, Progress, Scorer, batches
from .task import Task


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
                f"task {task.name!r}: new_tokens is {task.new_tokens}, and '{bench.base}' has room for "
                f"{bench.max_length} tokens in all. Ask for fewer."
            )
        found = bench.all_token_ids(texts)
        self.refuse_empty(found)
        self.cut = sum(len(ids) > most for ids in found)
        self.sequences = [ids[:most] if bench.form == "seq2seq" else ids[-most:] for ids in found]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.sequences)

    def scored(self, progress: Progress | None, size: int) -> Score:
        """Return the share of rows whose generated text is the label, and chrF and BLEU where one of them is asked for."""
        texts = self.written(progress, size)
        right = tuple(text == answer for text, answer in zip(texts, self.answers, strict=True))
        found = {} if self._metrics is None else self._compare(self._metrics, texts)
        return self.made(right, None, texts=tuple(texts), **found)

    def _compare(self, metrics: Any, texts: list[str]) -> dict[str, Any]:
        """Return chrF and BLEU of all texts together, and each text's own by the measure that is asked for."""
        bleu = self.task.measure == "bleu"
        # a short text has no n-grams of high orders, and its own BLEU is that of the orders that it has
        own = metrics.BLEU(effective_order=True) if bleu else metrics.CHRF()
        pairs = zip(texts, self.answers, strict=True)
        return {
            "chrf": float(metrics.CHRF().corpus_score(texts, [self.answers]).score),
            "bleu": float(metrics.BLEU().corpus_score(texts, [self.answers]).score),
            "text_scores": tuple(float(own.sentence_score(text, [answer]).score) for text, answer in pairs),
        }

    def written(self, progress: Progress | None = None, size: int = BATCH) -> list[str]:
        """Return what the model generates for each row, cut at `stop` and stripped."""
        texts = [""] * self.rows
        done, causal = 0, self.bench.form == "causal"
        with torch.no_grad():
            for places in batches([len(ids) for ids in self.sequences], size):
                inputs = self.bench.pad_batch([self.sequences[place] for place in places], left=causal)
                made = _greedy(self.bench, inputs, self.task.new_tokens)
                fresh = made[:, inputs["input_ids"].shape[1] :] if causal else made
                for place, ids in zip(places, fresh, strict=True):
                    texts[place] = self._clean(self.bench.tokenizer.decode(ids, skip_special_tokens=True))
                done += len(places)
                if progress is not None:
                    progress(self.task.name, done, self.rows)
        return texts

    def _clean(self, text: str) -> str:
        text = text.strip()
        return text.partition(self.task.stop)[0].strip() if self.task.stop else text


def _greedy(bench: Bench, inputs: dict[str, Tensor], most: int) -> Tensor:
    """Generate greedily, up to the end token or `most` new tokens: token ids, (rows, tokens).

    Of the base's own generation_config only the special tokens are kept: it may ask for beams, sampling, penalties or a
    minimum length, and `generate` takes from it what its own arguments do not set.
    """
    from transformers import GenerationConfig

    model = bench.model.get_base_model() if hasattr(bench.model, "get_base_model") else bench.model
    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "decoder_start_token_id")}
    settings = {
        "max_new_tokens": most,
        "do_sample": False,
        "num_beams": 1,
        "pad_token_id": bench.pad_token_id,
        **tokens,
    }
    plain = GenerationConfig(**settings)  # type: ignore[no-untyped-call]
    try:
        model.generation_config = plain
        made: Tensor = bench.model.generate(**inputs, generation_config=plain)
    finally:
        model.generation_config = own
    return made


def _import_metrics(task: Task) -> Any:
    """Return the module of sacrebleu that has its metrics."""
    try:
        from sacrebleu import metrics
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"task {task.name!r}: measure {task.measure!r} needs the extra `metrics` (there is no module "
            f"{str(error.name)!r}): pip install 'ties-peft[metrics]'."
        ) from None
    return metrics
