"""Compare a student with a causal model's adapter by the next token at the positions of rows.

Of the predictions only the adapter's `TOP_K` likeliest tokens and the sum of the other probabilities, the rest, are kept. By
the data-processing inequality the divergence of what is kept is at most that of the whole. Log-probabilities are kept in
float16, so they are wrong by at most |log p|/2048, and are normalised when they are used. Token numbers take two bytes
up to a vocabulary of 65,536, else four.

Where the adapter writes an answer to each row (see `written_rows`), only the tokens of the answers are judged. Only the
positions that are judged go through the output matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..evaluation.causal_passes import selected_logits
from ..evaluation.loaded_model import Bench
from ..evaluation.scorers import BATCH, Progress
from .teachers import Comparison, Teacher
from .written_rows import Writer

TOP_K = 128
SHORT_VOCABULARY = 1 << 16  # of which a token number fits into two bytes
MAX_LOGITS = 1 << 26  # in memory at once
PART_TOKENS = {"cpu": 256, "cuda": 16384}  # run at once, padding included: they bound the memory for gradients


class TokenTeacher(Teacher):
    """A teacher that predicts a distribution over the next token at each judged position of a row.

    Args:
        writer: lets the adapter write what is to be judged; None to judge every position of the sequences.
        choices: the first token of each choice of the task; the distribution over them at the first judged position is
            compared as well. Empty for none.
        starts: where the answer in each sequence begins, for sequences that hold one already.
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
        self._starts = starts  # None where all positions are judged
        self._tokens: list[Tensor] = []
        self._log_p: list[Tensor] = []
        self._choices_log_p = torch.empty(0)

    @property
    def settings(self) -> str:
        """What is written and kept, and how."""
        return f"{TOP_K} float16 {self._writer} {self.choices} {None if self._writer else self._starts}"

    @property
    def cache_bytes(self) -> int:
        """Of each position the token numbers, and two bytes for each log-probability; four for each choice of a row."""
        kept, rest = self._kept, self._kept < self._vocabulary
        each = kept * (2 if self._vocabulary <= SHORT_VOCABULARY else 4) + 2 * (kept + rest)
        rows = range(len(self.sequences))
        return each * sum(len(self._judged(place)) for place in rows) + 4 * len(self.choices) * len(rows)

    @property
    def kept_probability(self) -> float:
        """The mean over positions of the probability of the tokens kept one by one."""
        log_p = torch.cat(self._log_p).float().log_softmax(-1)
        return float(log_p[:, : self._kept].exp().sum(-1).mean())

    def write(self, progress: Progress | None = None) -> dict[str, Any]:
        """Let the adapter write what its writer asks for, and return it, for `set_written`."""
        if self._writer is None:
            return {}
        with self.bench.applied(self.adapter), torch.no_grad():
            written = self._writer.write(self.bench, self.given, self.adapter_digest, progress)
        return {"sequences": written.sequences, "starts": written.starts}

    def set_written(self, written: Mapping[str, Any]) -> None:
        """Set the rows to those that `write` returned, now or in an earlier run."""
        if written:
            self.sequences, self._starts = written["sequences"], written["starts"]

    def parts(self, places: Sequence[int], size: int = BATCH) -> list[list[int]]:
        """Return some rows in parts of similar length, the longest first, of a bounded number of tokens and of logits."""
        most = min(PART_TOKENS.get(self.bench.device.type, PART_TOKENS["cpu"]), MAX_LOGITS // self._vocabulary)
        found: list[list[int]] = []
        for place in sorted(places, key=lambda place: -len(self.sequences[place])):
            full = not found or len(found[-1]) == size
            if full or (len(found[-1]) + 1) * len(self.sequences[found[-1][0]]) > most:
                found.append([])
            found[-1].append(place)
        return found

    def predict(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """Return the likeliest tokens at the judged positions, row after row, (positions, kept), and log-probabilities.

        After those of the tokens stands the rest's, (positions, kept + 1), unless the whole vocabulary is kept. `choices`
        holds the log-probabilities of the choices among each other, (rows, choices), float32.
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
                if progress is not None:
                    progress(self.name, len(tokens), len(self.sequences))
        rows = range(len(self.sequences))
        parts = {"tokens": tokens, "log_p": log_p}
        joined = {name: torch.cat([found[place] for place in rows]) for name, found in parts.items()}
        return joined | {"choices": torch.stack([chosen[place] for place in rows])}

    def set_predictions(self, predictions: dict[str, Tensor]) -> None:
        """Set the tokens and log-probabilities."""
        lengths = [len(self._judged(place)) for place in range(len(self.sequences))]
        self._tokens = list(torch.split(predictions["tokens"], lengths))
        self._log_p = list(torch.split(predictions["log_p"], lengths))
        self._choices_log_p = predictions["choices"].to(self.bench.device)

    def compare(self, places: Sequence[int]) -> Comparison:
        """Return for each row the mean over judged positions of KL over the kept tokens and the rest.

        Where there are choices, KL over them is added. A row then agrees if the likeliest choice is the same.
        """
        divergences, agreements = [], []
        for place, logits in self._logits_of_rows(places):
            tokens = self._tokens[place].to(self.bench.device).long()
            if self._vocabulary <= SHORT_VOCABULARY:
                tokens = tokens & (SHORT_VOCABULARY - 1)  # int16 holds numbers from 32,768 up as negative ones
            log_p = self._log_p[place].to(self.bench.device).float().log_softmax(-1)
            log_q = self._with_rest(logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True))
            divergence = _divergence(log_p, log_q).mean()
            agreement = (logits.argmax(-1) == tokens[:, 0]).float().mean()
            if self.choices:
                log_p, log_q = self._choices_log_p[place], logits[0, self.choices].log_softmax(-1)
                divergence = divergence + _divergence(log_p, log_q)
                agreement = (log_p.argmax() == log_q.argmax()).float()
            divergences.append(divergence)
            agreements.append(agreement)
        return Comparison(torch.stack(divergences), torch.stack(agreements))

    def outputs(self, places: Sequence[int]) -> Tensor:
        """Return the logits at the judged positions of some rows, (positions, vocabulary), row after row, float32."""
        inputs = self.bench.pad_batch([self.sequences[place] for place in places])
        judged = [(row, at) for row, place in enumerate(places) for at in self._judged(place)]
        rows, positions = torch.tensor(judged, device=self.bench.device).unbind(1)
        logits, _ = selected_logits(self.bench.model, inputs, rows, positions, use_cache=False)
        return logits.float()

    def _logits_of_rows(self, places: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield each row with its logits, (judged positions, vocabulary)."""
        logits = torch.split(self.outputs(places), [len(self._judged(place)) for place in places])
        yield from zip(places, logits, strict=True)

    def _judged(self, place: int) -> range:
        """Return the positions of a row whose next token is judged: all, or those that predict the answer."""
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
        """How many tokens are kept one by one."""
        return min(TOP_K, self._vocabulary)

    def _with_rest(self, log_p: Tensor) -> Tensor:
        """Append the log-probability of all tokens that are not kept, at least log 1e-6, unless all are kept."""
        if self._kept == self._vocabulary:
            return log_p
        rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-6)
        return torch.cat([log_p, rest.log()], -1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
