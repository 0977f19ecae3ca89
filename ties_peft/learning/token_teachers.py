"""TokenTeacher: compares a student with an adapter of a causal model by their predictions of the next token.

Of each prediction the probabilities of the adapter's `TOP_K` likeliest tokens are kept one by one, and those of all
other tokens, the rest, as one sum. By the data-processing inequality the divergence of these is at most that of the
whole distributions. Log-probabilities are kept in float16, with an error of at most |log p|/2048, and are normalised
when they are used. Token ids take two bytes up to a vocabulary of 65,536, else four.

If the adapter writes an answer to each row (see `written_rows`), only the predictions of the answers' tokens are compared.
Only the positions that are compared go through the output matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..evaluation import BATCH_SIZE
from ..evaluation.causal_passes import selected_logits
from ..evaluation.loaded_model import Bench
from ..merging.plan import Progress
from .teachers import Comparison, Teacher, kl_divergence
from .written_rows import AnswerWriter, RowWriter, Writer, Written, WrittenCount

TOP_K = 128
SHORT_VOCABULARY = 1 << 16  # tokens whose ids fit into two bytes
MAX_LOGITS = 1 << 26  # in memory at once
PART_TOKENS = {"cpu": 256, "cuda": 16384}  # run at once, with padding; they bound the memory for gradients


class TokenTeacher(Teacher):
    """A teacher that predicts a distribution over the next token at some positions of a row.

    Args:
        writer: lets the adapter write rows or answers; None where it writes nothing.
        choices: the first token of each choice of the task; the distribution over them at the first position is compared
            as well. Empty for none.
        starts: where the answer begins in each sequence, if the sequences hold given answers. Without writer and starts
            every position is compared.
    """

    def __init__(
        self,
        bench: Bench,
        adapter: Adapter | None,
        sequences: Sequence[Sequence[int]],
        name: str,
        origin: str,
        writer: Writer | None = None,
        choices: Sequence[int] = (),
        starts: list[int] | None = None,
    ) -> None:
        super().__init__(bench, adapter, sequences, name, origin)
        self.choices = list(choices)
        self._writer = writer
        self._starts = starts  # None where all positions are compared
        self.settings = f"{TOP_K} float16 {writer} {self.choices} {None if writer else starts}"
        self._tokens: list[Tensor] = []
        self._log_p: list[Tensor] = []
        self._choices_log_p = torch.empty(0)

    @property
    def cache_bytes(self) -> int:
        """For each position the token ids and two bytes a log-probability; for each row four bytes a choice."""
        kept, rest = self._kept, self._kept < self._vocabulary
        each = kept * (2 if self._vocabulary <= SHORT_VOCABULARY else 4) + 2 * (kept + rest)
        rows = range(len(self.sequences))
        return each * sum(len(self._positions(place)) for place in rows) + 4 * len(self.choices) * len(rows)

    @property
    def kept_probability(self) -> float:
        """The probability of the tokens kept one by one, in the mean over positions."""
        log_p = torch.cat(self._log_p).float().log_softmax(-1)
        return float(log_p[:, : self._kept].exp().sum(-1).mean())

    def write(self, progress: Progress | None = None) -> dict[str, Any]:
        """Let the adapter write its rows or answers, and return them for `set_written`."""
        if self._writer is None:
            return {}
        with self.bench.applied(self.adapter), torch.no_grad():
            written = self._writer.write(self.bench, self.given, self.adapter_digest, progress)
        return {"sequences": written.sequences, "starts": written.starts}

    def set_written(self, written: Mapping[str, Any]) -> None:
        """Take the rows that `write` returned, now or in an earlier run."""
        if written:
            self.sequences, self._starts = written["sequences"], written["starts"]

    @property
    def matched(self) -> str:
        """The tokens of the answers, or all tokens of the rows, with the answers that the adapter wrote."""
        if self._starts is None:
            return "rows"
        if self._writer is not None and not self._writer.prompted:
            return "rows and answers" if isinstance(self._writer, AnswerWriter) else "rows"
        return "answers and choices" if self.choices else "answers"

    def count_written(self) -> WrittenCount | None:
        """Count the distinct and the empty rows, where the adapter wrote whole rows."""
        if not isinstance(self._writer, RowWriter) or self._starts is None:
            return None
        return self._writer.count(self.bench, self.given[0], Written(self.sequences, self._starts))

    def parts(self, places: Sequence[int], size: int = BATCH_SIZE) -> list[list[int]]:
        """Divide rows into parts of similar length, the longest first, with bounded numbers of tokens and logits."""
        most = min(PART_TOKENS.get(self.bench.device.type, PART_TOKENS["cpu"]), MAX_LOGITS // self._vocabulary)
        found: list[list[int]] = []
        for place in sorted(places, key=lambda place: -len(self.sequences[place])):
            full = not found or len(found[-1]) == size
            if full or (len(found[-1]) + 1) * len(self.sequences[found[-1][0]]) > most:
                found.append([])
            found[-1].append(place)
        return found

    def predict(self) -> dict[str, Tensor]:
        """Run the adapter and return its predictions, for `set_predictions`.

        Returns: `tokens`, the likeliest at the compared positions, row after row, (positions, kept); `log_p`, their
            log-probabilities and that of the rest, (positions, kept + 1), without the rest if the whole vocabulary is kept;
            `choices`, the log-probabilities of the choices among themselves, (rows, choices), float32.
        """
        tokens: dict[int, Tensor] = {}
        log_p: dict[int, Tensor] = {}
        chosen: dict[int, Tensor] = {}
        short = torch.int16 if self._vocabulary <= SHORT_VOCABULARY else torch.int32
        with self.bench.applied(self.adapter), torch.no_grad():
            for places in self.parts(range(len(self.sequences))):
                for place, logits in self._logits_of_rows(places):
                    top = logits.log_softmax(-1).topk(self._kept)
                    tokens[place], log_p[place] = top.indices.to(short).cpu(), self._with_rest(top.values).half().cpu()
                    chosen[place] = logits[0, self.choices].log_softmax(-1).cpu()
        rows = range(len(self.sequences))
        parts = {"tokens": tokens, "log_p": log_p}
        joined = {name: torch.cat([found[place] for place in rows]) for name, found in parts.items()}
        return joined | {"choices": torch.stack([chosen[place] for place in rows])}

    def set_predictions(self, predictions: dict[str, Tensor]) -> None:
        """Take the predictions that `predict` returned."""
        lengths = [len(self._positions(place)) for place in range(len(self.sequences))]
        self._tokens = list(torch.split(predictions["tokens"], lengths))
        self._log_p = list(torch.split(predictions["log_p"], lengths))
        self._choices_log_p = predictions["choices"].to(self.bench.device)

    def compare(self, places: Sequence[int]) -> Comparison:
        """Return for each row KL over the kept tokens and the rest, in the mean over the compared positions.

        With choices, KL over them is added, and a row agrees if the likeliest choice is the same.
        """
        divergences, agreements = [], []
        for place, logits in self._logits_of_rows(places):
            tokens = self._tokens[place].to(self.bench.device).long()
            if self._vocabulary <= SHORT_VOCABULARY:
                tokens = tokens & (SHORT_VOCABULARY - 1)  # int16 holds ids from 32,768 up as negative numbers
            log_p = self._log_p[place].to(self.bench.device).float().log_softmax(-1)
            log_q = self._with_rest(logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True))
            divergence = kl_divergence(log_p, log_q).mean()
            agreement = (logits.argmax(-1) == tokens[:, 0]).float().mean()
            if self.choices:
                log_p, log_q = self._choices_log_p[place], logits[0, self.choices].log_softmax(-1)
                divergence = divergence + kl_divergence(log_p, log_q)
                agreement = (log_p.argmax() == log_q.argmax()).float()
            divergences.append(divergence)
            agreements.append(agreement)
        return Comparison(torch.stack(divergences), torch.stack(agreements))

    def outputs(self, places: Sequence[int]) -> Tensor:
        """Return the logits at the compared positions of some rows, (positions, vocabulary), row after row, float32."""
        inputs = self.bench.pad_batch([self.sequences[place] for place in places])
        compared = [(row, at) for row, place in enumerate(places) for at in self._positions(place)]
        rows, positions = torch.tensor(compared, device=self.bench.device).unbind(1)
        logits, _ = selected_logits(self.bench.model, inputs, rows, positions, use_cache=False)
        return logits.float()

    def _logits_of_rows(self, places: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield each row with its logits, (compared positions, vocabulary)."""
        logits = torch.split(self.outputs(places), [len(self._positions(place)) for place in places])
        yield from zip(places, logits, strict=True)

    def _positions(self, place: int) -> range:
        """Return the positions of a row at which predictions are compared: all, or those that predict the answer."""
        length = len(self.sequences[place])
        if self._starts is None:
            return range(length)
        return range(self._starts[place] - 1, max(self._starts[place], length - 1))

    @cached_property
    def _vocabulary(self) -> int:
        size: int = self.bench.model.get_output_embeddings().weight.shape[0]
        return size

    @property
    def _kept(self) -> int:
        """The number of tokens kept one by one."""
        return min(TOP_K, self._vocabulary)

    def _with_rest(self, log_p: Tensor) -> Tensor:
        """Append the log-probability of the rest, at least log 1e-6, unless all tokens are kept."""
        if self._kept == self._vocabulary:
            return log_p
        rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-6)
        return torch.cat([log_p, rest.log()], -1)
