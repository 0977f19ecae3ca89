"""Say in plain sentences what the figures of an analysis mean for a merge, each with its figure and the option that acts on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..merging.measure import LOW_ENERGY, LOW_PROJECTION, SAME_COSINE
from ..merging.members import UNEQUAL
from ..merging.options import Options
from ..merging.report import EVALUATE
from .method_figures import MethodResult

INFO, WARNING = "info", "warning"
SAME_START = 0.5  # cosine of two factors A above which they started from the same one; two random ones have about 0
EXCESS = 0.05  # sign conflict beyond what the cosine predicts; more of it is reported
SPREAD_OUT = 0.6  # share of the squared norm in the largest 20 % of entries; less is reported; Gaussian entries: 0.65
NEARLY_ALL = 0.99  # of the energy: a rank that keeps it is large enough
LISTED = 4  # names in a sentence


@dataclass(frozen=True)
class Advice:
    """One sentence of advice.

    Attributes:
        text: the sentence, with its figure.
        option: the flag of `ties-peft merge` that acts on it; None where there is none.
        severity: `info` or `warning`.
    """

    text: str
    option: str | None
    severity: str

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """What the advice is made from.

    Attributes:
        names: of the adapters.
        adapters, pairs: the figures of whole adapters, see `figures.Measured`.
        density: of the trim.
        shared: how many modules all adapters have.
        modules: how many there are.
        methods: the results of the methods, the first one preferred where they do equally well.
        causal_lm: whether they are adapters of a causal language model, on which no figure predicts accuracy.
    """

    names: Sequence[str]
    adapters: Mapping[str, np.ndarray]
    pairs: Mapping[str, np.ndarray]
    density: float
    shared: int
    modules: int
    methods: Sequence[MethodResult]
    causal_lm: bool = False

    def selected(self, chosen: np.ndarray) -> list[tuple[int, int]]:
        """Return the pairs (i, j), i < j, that a matrix of truth values selects."""
        return [(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(chosen, 1)), strict=True)]

    def listed(self, places: Sequence[int]) -> str:
        """Return the names of some adapters as text."""
        more = f" and {len(places) - LISTED} more" if len(places) > LISTED else ""
        return ", ".join(self.names[place] for place in places[:LISTED]) + more


def advise(facts: Facts) -> list[Advice]:
    """Return the advice, warnings first."""
    rules: tuple[Callable[[Facts], Iterator[Advice]], ...] = (
        _zero,
        _duplicates,
        _unequal_norms,
        _little_left,
        _low_energy,
        _missing_modules,
        _excess_conflict,
        _spread_out,
        _smaller_rank,
        _same_start,
    )
    found = [advice for rule in rules for advice in rule(facts)]
    return sorted(found, key=lambda advice: advice.severity != WARNING)


def _zero(facts: Facts) -> Iterator[Advice]:
    for place in np.flatnonzero(facts.adapters["norm"] == 0).tolist():
        yield Advice(
            f"{facts.names[place]} changes nothing: the norm of its task vector is 0. Leave it out.", None, WARNING
        )


def _duplicates(facts: Facts) -> Iterator[Advice]:
    """Name adapters that are nearly the same, each with those before it."""
    same = facts.selected(facts.pairs["cosine"] > SAME_COSINE)
    groups: list[set[int]] = []
    for i, j in same:
        joined = [group for group in groups if group & {i, j}]
        groups = [group for group in groups if group not in joined] + [set().union({i, j}, *joined)]
    for group in groups:
        members = sorted(group)
        least = min(facts.pairs["cosine"][i, j] for i, j in same if i in group)
        weights = [f"{1 / len(group):.3g}" if place in group else "1" for place in range(len(facts.names))]
        yield Advice(
            f"{facts.listed(members)} are nearly the same adapter (cosine {least:.3f} or more), and together they count "
            f"{len(group)} times. Leave out all but one, or give each 1/{len(group)} of the weight.",
            f"--weights {','.join(weights)}",
            WARNING,
        )


def _unequal_norms(facts: Facts) -> Iterator[Advice]:
    norms = facts.adapters["norm"]
    there = np.flatnonzero(norms > 0)
    if len(there) < 2:
        return
    large, small = there[norms[there].argmax()], there[norms[there].argmin()]
    if round(norms[large] / norms[small], 1) >= UNEQUAL:
        yield Advice(
            f"The norm of {facts.names[large]} ({norms[large]:.3g}) is {norms[large] / norms[small]:.1f} times that of "
            f"{facts.names[small]} ({norms[small]:.3g}), of which a method that elects signs loses most entries. If they count "
            "equally, bring them to one norm.",
            "--weights norm",
            WARNING,
        )


def _little_left(facts: Facts) -> Iterator[Advice]:
    """Name the adapters of which a method leaves little, and the method that leaves most of the worst.

    On a causal language model, where the projection does not predict accuracy, say instead how to measure it.
    """
    if facts.causal_lm:
        if facts.methods:
            yield Advice(
                f"The projections advise no method here. Merge, and measure the accuracy: {EVALUATE}", None, INFO
            )
        return
    least = [_least(result) for result in facts.methods]
    for result, worst in zip(facts.methods, least, strict=True):
        places = [i for i, value in enumerate(result.projection) if value is not None and value < LOW_PROJECTION]
        if not places:
            continue
        best = facts.methods[int(np.argmax(least))]
        better = best is not result and max(least) >= LOW_PROJECTION
        instead = f" {best.method} leaves at least {max(least):.2f} of each." if better else ""
        option = (
            f"--method {best.method}" if better else "--weights norm" if len(places) < len(facts.names) else "--scale"
        )
        yield Advice(
            f"{result.method} leaves little of {facts.listed(places)} (projection {worst:.2f}; under {LOW_PROJECTION} "
            f"most adapters of a sentence encoder had lost over half of their gain in accuracy).{instead}",
            option,
            WARNING,
        )


def _least(result: MethodResult) -> float:
    return min((value for value in result.projection if value is not None), default=0.0)


def _low_energy(facts: Facts) -> Iterator[Advice]:
    for result in facts.methods:
        if result.rank is not None and result.energy < 0.9:
            yield Advice(
                f"Rank {result.rank} keeps {result.energy:.0%} of the energy of what {result.method} makes; a larger rank "
                "keeps more.",
                _rank_option(result, "max" if result.energy < LOW_ENERGY else 2 * result.rank),
                WARNING if result.energy < LOW_ENERGY else INFO,
            )


def _smaller_rank(facts: Facts) -> Iterator[Advice]:
    """Name a smaller rank, at least that of every adapter, for the methods whose spectrum falls."""
    for result in facts.methods:
        enough = result.rank_for(NEARLY_ALL)
        if enough is None or result.rank is None or result.flat:
            continue
        enough = max(enough, int(facts.adapters["rank"].max()))
        if 2 * enough <= result.rank:
            yield Advice(
                f"Rank {enough} keeps {result.energies[enough - 1]:.1%} of the energy of what {result.method} makes; rank "
                f"{result.rank} is not needed.",
                _rank_option(result, enough),
                INFO,
            )


def _rank_option(result: MethodResult, rank: int | str) -> str:
    """Return the flags that merge by a method at a rank; the default method is not named."""
    return f"--rank {rank}" if result.method == Options.method else f"--method {result.method} --rank {rank}"


def _missing_modules(facts: Facts) -> Iterator[Advice]:
    if facts.shared < facts.modules:
        yield Advice(
            f"{facts.modules - facts.shared} of {facts.modules} modules belong to only some of the adapters; the others "
            "contribute a zero task vector there.",
            None,
            INFO if facts.shared else WARNING,
        )


def _excess_conflict(facts: Facts) -> Iterator[Advice]:
    excess = np.nan_to_num(facts.pairs["excess_conflict"])
    found = facts.selected(excess > EXCESS)
    if not found:
        return
    i, j = max(found, key=lambda pair: excess[pair])
    others = f" (and so for {len(found) - 1} more)" if len(found) > 1 else ""
    yield Advice(
        f"The signs of {facts.names[i]} and {facts.names[j]} differ in {facts.pairs['sign_conflict'][i, j]:.0%} of the entries "
        f"that both keep, {100 * excess[i, j]:.0f} points more than their cosine of {facts.pairs['cosine'][i, j]:.2f} "
        f"predicts{others}: they disagree where their entries are large. A method that elects signs keeps one of the two there.",
        None if facts.causal_lm else "--method ties",
        INFO,
    )


def _spread_out(facts: Facts) -> Iterator[Advice]:
    held = facts.adapters["redundancy"]
    places = [i for i, share in enumerate(held) if share < SPREAD_OUT]
    if places and facts.density <= 0.2:
        yield Advice(
            f"The largest 20 % of the entries hold {np.nanmin(held):.0%} of the squared norm of {facts.listed(places)}, less "
            "than of Gaussian entries (65 %): a trim to a low density loses the rest.",
            "--density 0.4",
            INFO,
        )


def _same_start(facts: Facts) -> Iterator[Advice]:
    found = facts.selected(np.nan_to_num(facts.pairs["initial_cosine"]) > SAME_START)
    if found:
        places = sorted({place for pair in found for place in pair})
        mean = np.mean([facts.pairs["initial_cosine"][pair] for pair in found])
        yield Advice(
            f"{facts.listed(places)} were trained from the same initial A (mean cosine of their A {mean:.2f}; about 0 for "
            "unrelated ones), so an overlap of their row spaces says nothing about their tasks.",
            None,
            INFO,
        )
