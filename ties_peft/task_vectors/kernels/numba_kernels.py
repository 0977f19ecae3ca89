"""Loops: what numba compiles. Imported by `fast` alone, and only where numba is installed.

A task vector B·A is multiplied out a few rows of a panel of columns at a time, into memory that stays in a
core's first cache, and used where it lies: counted for a threshold, or trimmed and voted on. Both passes
call `multiply` on the same rows and panels; each entry is a chain of fused multiply-adds in the order of k,
so that what the first pass counts is to the bit what the second one cuts.

Arrays are float32 and lie row by row.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .numba_product import PANEL, pair, pointer

ROWS = 32  # rows that are worked on together, even
GROUP = 4  # task vectors that vote together
WORD = 8  # marks of a byte each that are looked at together
MIN_DIVISOR = np.float32(1e-30)  # as in `elect`

carray: Any = numba.carray  # type: ignore[attr-defined]
compiled: Any = numba.njit(nogil=True, cache=True)


def _cast(values: np.ndarray, positive: np.ndarray, negative: np.ndarray, plus: np.ndarray, minus: np.ndarray) -> None:
    """One vote, see `SignedSums.cast`; arrays are flat."""
    none, one = np.float32(0.0), np.float32(1.0)
    for place in range(len(values)):
        value = values[place]
        positive[place] += max(none, value)
        negative[place] += min(none, value)
        plus[place] += one if value > none else none
        minus[place] += one if value < none else none


def _count(
    values: np.ndarray, low: np.float32, high: np.float32, room: np.ndarray, marks: np.ndarray
) -> tuple[int, int]:
    """How many |values| exceed `high`, and how many lie in [low, high], written into `room` in order.

    `room` has an entry more than `values`, which are flat, and `marks` a byte for each.
    """
    above: Any = np.int32(0)  # one that fits beside float32 lanes
    inside: Any = 0
    whole = len(values) // WORD * WORD
    for place in range(len(values)):
        size = abs(values[place])
        marks[place] = np.uint8((size >= low) & (size <= high))
    for place in range(len(values)):  # apart, for lanes of bytes and of numbers together are slow
        above += np.int32(abs(values[place]) > high)
    words = marks[:whole].view(np.uint64)
    for word in range(len(words)):  # most hold no mark at all
        if words[word]:
            for place in range(WORD * word, WORD * (word + 1)):
                room[inside] = abs(values[place])  # the next overwrites it unless it counts
                inside += np.int64(marks[place])
    for place in range(whole, len(values)):
        room[inside] = abs(values[place])
        inside += np.int64(marks[place])
    return above, inside


def _within(
    values: np.ndarray, found: int, low: np.ndarray, high: np.ndarray, room: np.ndarray, marks: np.ndarray
) -> np.ndarray:
    """Of each row's first so many values the magnitudes in [low, high], one row after another in `room`; how many."""
    counts, total = np.zeros(len(values), np.int64), 0
    for row in range(len(values)):
        _, counts[row] = count(values[row, :found], low[row], high[row], room[total:], marks)
        total += counts[row]
    return counts


def _pack(A: np.ndarray, start: int, columns: int, panel: np.ndarray) -> None:
    """Columns of A side by side, filled up with zeros: far apart they would drive each other out of the cache."""
    for k in range(len(A)):
        there, here = A[k, start : start + columns], panel[k]
        for column in range(columns):
            here[column] = there[column]
        here[columns:] = np.float32(0.0)


def _multiply(B: np.ndarray, panel: np.ndarray, first: int, rows: int, out: np.ndarray) -> None:
    """Rows first, first + 1, … of B times a panel, into `out` (ROWS, PANEL)."""
    for row in range(0, rows, 2):
        pair(B, first + row, first + min(row + 1, rows - 1), panel, out[row:])  # an odd last row is done twice


def _read(B: np.ndarray, A: np.ndarray, panel: np.ndarray, block: np.ndarray, out: np.ndarray) -> None:
    """B·A into `out`, with the bits that `census` and `vote` see."""
    width = A.shape[1]
    for start in range(0, width, PANEL):
        columns = min(PANEL, width - start)
        pack(A, start, columns, panel)
        for first in range(0, len(B), ROWS):
            rows = min(ROWS, len(B) - first)
            multiply(B, panel, first, rows, block)
            for row in range(rows):
                there, here = block[row], out[first + row, start : start + columns]
                for column in range(columns):
                    here[column] = there[column]


def _census(
    B: np.ndarray,
    A: np.ndarray,
    low: np.float32,
    high: np.float32,
    room: np.ndarray,
    marks: np.ndarray,
    panel: np.ndarray,
    block: np.ndarray,
) -> tuple[int, int]:
    """`count` of the entries of B·A, which is not made; panel by panel."""
    width = A.shape[1]
    above: Any = 0
    inside: Any = 0
    for start in range(0, width, PANEL):
        columns = min(PANEL, width - start)
        pack(A, start, columns, panel)
        for first in range(0, len(B), ROWS):
            rows = min(ROWS, len(B) - first)
            multiply(B, panel, first, rows, block)
            flat = block.reshape(-1)
            at_once, step = (1, rows * PANEL) if columns == PANEL else (rows, columns)
            for row in range(at_once):
                larger, found = count(flat[row * PANEL : row * PANEL + step], low, high, room[inside:], marks)
                above += larger
                inside += found
    return above, inside


def _voted(
    value: Any, least: Any, weight: Any, up: Any, down: Any, weight_up: Any, weight_down: Any
) -> tuple[Any, ...]:
    """Both sides of an entry's ballot after one more vote, if `value` exceeds `least` in magnitude."""
    none = np.float32(0.0)
    return (
        up + (value if value > least else none),
        down + (value if value < -least else none),
        weight_up + (weight if value > least else none),
        weight_down + (weight if value < -least else none),
    )


def _poll(block: np.ndarray, below: np.ndarray, weights: np.ndarray, ballot: np.ndarray, places: int) -> None:
    """The votes of GROUP task vectors in the first places: what exceeds `below` in magnitude, and its weight, on the side of its sign."""
    positive, negative, plus, minus = ballot[0], ballot[1], ballot[2], ballot[3]
    v1, v2, v3, v4 = block[0], block[1], block[2], block[3]
    t1, t2, t3, t4 = below[0], below[1], below[2], below[3]
    w1, w2, w3, w4 = weights[0], weights[1], weights[2], weights[3]
    for place in range(places):  # written out four times: a loop over the four would leave the registers
        sides = positive[place], negative[place], plus[place], minus[place]
        sides = voted(v1[place], t1, w1, *sides)
        sides = voted(v2[place], t2, w2, *sides)
        sides = voted(v3[place], t3, w3, *sides)
        sides = voted(v4[place], t4, w4, *sides)
        positive[place], negative[place], plus[place], minus[place] = sides


def _reach(block: np.ndarray, least: np.ndarray, votes: np.ndarray, places: int) -> None:
    """How many of GROUP task vectors exceed `least` in magnitude, at each place."""
    v1, v2, v3, v4 = block[0], block[1], block[2], block[3]
    t1, t2, t3, t4 = least[0], least[1], least[2], least[3]
    for place in range(places):
        some = plus_one(votes[place], abs(v1[place]) > t1)
        some = plus_one(some, abs(v2[place]) > t2)
        some = plus_one(some, abs(v3[place]) > t3)
        votes[place] = plus_one(some, abs(v4[place]) > t4)


def _doubt(
    block: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    votes: np.ndarray,
    reached: np.ndarray,
    above: np.ndarray,
    places: int,
) -> None:
    """How many of GROUP task vectors exceed `high` in magnitude and how many reach `low`, at each place; `high` of each."""
    v1, v2, v3, v4 = block[0], block[1], block[2], block[3]
    l1, l2, l3, l4 = low[0], low[1], low[2], low[3]
    h1, h2, h3, h4 = high[0], high[1], high[2], high[3]
    n1 = n2 = n3 = n4 = np.int32(0)
    for place in range(places):
        one, two, three, four = abs(v1[place]), abs(v2[place]), abs(v3[place]), abs(v4[place])
        n1, n2, n3, n4 = (
            plus_one(n1, one > h1),
            plus_one(n2, two > h2),
            plus_one(n3, three > h3),
            plus_one(n4, four > h4),
        )
        some = plus_one(plus_one(votes[place], one > h1), two > h2)
        votes[place] = plus_one(plus_one(some, three > h3), four > h4)
        some = plus_one(plus_one(reached[place], one >= l1), two >= l2)
        reached[place] = plus_one(plus_one(some, three >= l3), four >= l4)
    above[0] += n1
    above[1] += n2
    above[2] += n3
    above[3] += n4


def _plus_one(number: Any, also: Any) -> Any:
    """A count, of 32 bits at every step: it fits beside float32 lanes."""
    return np.int32(number + np.int32(also))


def _decide(
    ballot: np.ndarray, votes: np.ndarray, reached: np.ndarray, mean: bool, out: np.ndarray, places: int
) -> tuple[int, int]:
    """The elected mean or sum of the first places, into `out`; the numbers that `SignedSums.conflicts` gives.

    Places in doubt, where not all that `reached` have a vote, are not counted.
    """
    positive, negative, plus, minus = ballot[0], ballot[1], ballot[2], ballot[3]
    conflicting: Any = np.int32(0)
    shared: Any = np.int32(0)
    none = np.float32(0.0)
    for place in range(places):  # all is loaded first: a choice between two loads would be a branch
        up, down, weight_up, weight_down = positive[place], negative[place], plus[place], minus[place]
        lead, count = up + down >= none, votes[place]
        agreed, weight = (up if lead else down), (weight_up if lead else weight_down)
        out[place] = agreed / max(weight, MIN_DIVISOR) if mean else agreed
        sure = reached[place] == count
        conflicting = plus_one(conflicting, (up > none) & (down < none) & sure)
        shared = plus_one(shared, (count > 1) & sure)
    return conflicting, shared


def _note(
    block: np.ndarray,
    votes: np.ndarray,
    reached: np.ndarray,
    shape: tuple[int, int],
    corner: int,
    width: int,
    spots: np.ndarray,
    places: np.ndarray,
    values: np.ndarray,
) -> Any:
    """Write down the places in doubt of a block, flat in what it is cut from, and all values there; how many."""
    found: Any = 0
    for row in range(shape[0]):
        for spot in range(row * PANEL, row * PANEL + shape[1]):
            spots[found] = spot  # the next overwrites it unless it counts
            found += np.int64(votes[spot] != reached[spot])
    for place in range(found):
        places[place] = corner + spots[place] // PANEL * width + spots[place] % PANEL
    for member in range(len(values)):
        there, here = block[member], values[member]
        for place in range(found):
            here[place] = there[spots[place]]
    return found


def _vote(
    factors: np.ndarray,
    ranks: np.ndarray,
    below: np.ndarray,
    weights: np.ndarray,
    mean: bool,
    panels: np.ndarray,
    block: np.ndarray,
    ballot: np.ndarray,
    tallies: np.ndarray,
    decided: np.ndarray,
    out: np.ndarray,
    low: Any,
    above: Any,
    spots: Any,
    places: Any,
    values: Any,
) -> tuple[int, int, int]:
    """The disjoint mean or sum of trimmed task vectors, elected by mass, into `out`; see `SignedSums`.

    With `low` it is a glance: where the magnitude of any of them lies in [low, below], `out` is not yet decided,
    and all values there are noted.

    Args:
        factors: (N, 2), the addresses of B (rows, r) and A (r, columns) of each; N is filled up to a multiple of
            GROUP with anything that lies still, whose `below` is infinite.
        ranks: r of each, 0 for what fills up.
        below: (N,), the largest magnitude that is cut.
        weights: (N,), what a vote adds to the divisor.
        panels, block, ballot, tallies, decided: room: (Σr, PANEL), (GROUP, ROWS, PANEL), or (N, …) for a glance,
            (4, ROWS·PANEL), (2, ROWS·PANEL) of int32, (ROWS·PANEL,).
        out: (rows, columns).
        low: (N,), NaN for one that is never in doubt; None, as are the next four, if nothing is.
        above: (N,), int64, to which is added how many magnitudes exceed `below`.
        spots: room: (ROWS·PANEL + 1,), int32.
        places: (L + ROWS·PANEL,), int32, the flat place in `out` of those noted.
        values: (M, L + ROWS·PANEL), the values of the first M there.
    Returns: how many entries have votes of both signs, how many have several votes, doubtful ones apart, and how many
        are noted; more than L if there was no room for all.
    """
    rows, width = out.shape
    conflicting: Any = 0
    shared: Any = 0
    found: Any = 0
    flat = block.reshape(len(block), ROWS * PANEL)
    votes, reached = tallies[0], tallies[1]
    for start in range(0, width, PANEL):
        columns = min(PANEL, width - start)
        at = 0
        for place in range(len(ranks)):
            A = carray(pointer(factors[place, 1]), (ranks[place], width), np.float32)
            pack(A, start, columns, panels[at:])
            at += ranks[place]
        for first in range(0, rows, ROWS):
            some = min(ROWS, rows - first)
            whole = some * PANEL
            ballot[:] = np.float32(0.0)
            tallies[:] = np.int32(0)
            at = 0
            for group in range(0, len(ranks), GROUP):
                base = group % len(block)
                for member in range(GROUP):
                    rank = ranks[group + member]
                    B = carray(pointer(factors[group + member, 0]), (rows, rank), np.float32)
                    multiply(B, panels[at : at + rank], first, some, block[base + member])
                    at += rank
                poll(flat[base:], below[group:], weights[group:], ballot, whole)
                if low is None:
                    reach(flat[base:], below[group:], votes, whole)
                else:
                    doubt(flat[base:], low[group:], below[group:], votes, reached, above[group:], whole)
            both, several = decide(ballot, votes, votes if low is None else reached, mean, decided, whole)
            conflicting += both
            shared += several
            for row in range(some):
                there, here = decided[row * PANEL : row * PANEL + columns], out[first + row, start : start + columns]
                for column in range(columns):
                    here[column] = there[column]
            if low is not None and found + ROWS * PANEL <= len(places):
                corner, shape = first * width + start, (some, columns)
                found += note(flat, votes, reached, shape, corner, width, spots, places[found:], values[:, found:])
    return conflicting, shared, found


def _settle(
    places: np.ndarray,
    values: np.ndarray,
    below: np.ndarray,
    weights: np.ndarray,
    mean: bool,
    block: np.ndarray,
    ballot: np.ndarray,
    tallies: np.ndarray,
    decided: np.ndarray,
    out: np.ndarray,
) -> tuple[int, int]:
    """Decide what a glance left in doubt, as `vote` would have, now that the cuts are known.

    Args:
        places: (L,), flat in `out`.
        values: (M, L), the values of M task vectors there.
        below, weights: (N,), N ≥ M filled up as for `vote`.
        block: room, (GROUP, ROWS·PANEL); ballot, tallies, decided: as there.
        out: flat.
    Returns: how many of them have votes of both signs, how many several votes.
    """
    conflicting: Any = 0
    shared: Any = 0
    for start in range(0, len(places), ROWS * PANEL):
        end = min(start + ROWS * PANEL, len(places))
        ballot[:] = np.float32(0.0)
        tallies[:] = np.int32(0)
        for group in range(0, len(values), GROUP):
            for member in range(min(GROUP, len(values) - group)):
                block[member, : end - start] = values[group + member, start:end]
            poll(block, below[group:], weights[group:], ballot, end - start)
            reach(block, below[group:], tallies[0], end - start)
        both, several = decide(ballot, tallies[0], tallies[0], mean, decided, end - start)
        for place in range(start, end):
            out[places[place]] = decided[place - start]
        conflicting += both
        shared += several
    return conflicting, shared


pack = compiled(_pack)
multiply = compiled(_multiply)
count = compiled(_count)
within = compiled(_within)
cast = compiled(_cast)
voted = compiled(_voted)
poll = compiled(_poll)
reach = compiled(_reach)
plus_one = compiled(_plus_one)
doubt = compiled(_doubt)
note = compiled(_note)
decide = compiled(_decide)
read = compiled(_read)
census = compiled(_census)
vote = compiled(_vote)
settle = compiled(_settle)
