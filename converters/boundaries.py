"""Rows on both sides of where a pipeline's answer changes, found by asking the pipeline itself.

Between two training rows with different answers lies an edge. It is found by bisection, first over the columns, then
over the values of one column in their order, always in the half with the larger change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from converters.lowering.folding import LARGEST_KEYS, float_of, key_of
from converters.reference import Answers
from converters.table import Rows

Ask = Callable[[Rows], Answers]
Index = NDArray[np.int64]

_PAIRS: Final = 64
_LABEL: Final = 10.0  # a change of label outweighs one of probabilities
_BESIDE: Final = (-2, -1, 0)


def find(rows: Rows, numbers: Index, ask: Ask, seed: int) -> Rows:
    """(k, F) rows at the last value before a change, the first one after it, and two values beyond each.

    ``rows`` (n, F) are training rows, ``numbers`` the columns that hold numbers, ``ask`` the pipeline.
    """
    rng = np.random.default_rng([seed, 104_729])
    pairs = min(_PAIRS, len(rows))
    low, high = rows[rng.integers(len(rows), size=pairs)], rows[rng.integers(len(rows), size=pairs)]
    if not numbers.size:
        return low[:0]
    order = rng.permutation(numbers)

    def mixed(pair: Index, count: Index) -> Rows:
        """``low`` with the first ``count`` columns of ``order`` taken from ``high``."""
        made = low[pair]
        taken = np.arange(len(order)) < count[:, None]
        made[:, order] = np.where(taken, high[pair][:, order], made[:, order])
        return made

    every = np.arange(pairs)
    first, last = _narrowed(ask, mixed, np.zeros(pairs, np.int64), np.full(pairs, len(order)))
    column = order[first]
    start, stop = mixed(every, first), mixed(every, last)
    finite = np.isfinite(start[every, column]) & np.isfinite(stop[every, column])
    start, stop, column, every = start[finite], stop[finite], column[finite], every[: int(finite.sum())]

    def placed(pair: Index, key: Index) -> Rows:
        made: Rows = start[pair]
        made[np.arange(len(pair)), column[pair]] = float_of(key, rows.dtype.name)
        return made

    ends = np.sort([key_of(start[every, column]), key_of(stop[every, column])], axis=0)
    a, b = _narrowed(ask, placed, ends[0], ends[1])
    limit = LARGEST_KEYS[rows.dtype.name]
    keys = [*(a + offset for offset in _BESIDE), *(b - offset for offset in reversed(_BESIDE))]
    return np.concatenate([placed(every, np.clip(key, -limit, limit)) for key in keys])


def _narrowed(
    ask: Ask, rows_at: Callable[[Index, Index], Rows], low: Index, high: Index
) -> tuple[Index, Index]:
    """Neighbouring numbers (k,) per pair, with the change between them; ``rows_at(pair, number)`` gives the rows.

    What the ends answer is remembered, so that each step asks for the middles alone.
    """
    low, high = low.copy(), high.copy()
    every = np.arange(len(low))
    near, far = _Said(ask, rows_at(every, low)), _Said(ask, rows_at(every, high))
    while (open_ := np.flatnonzero(low + 1 < high)).size:
        a, b = low[open_], high[open_]
        middle = (a >> 1) + (b >> 1) + (a & b & 1)  # the sum of two float64 keys has no room
        said = _Said(ask, rows_at(open_, middle))
        first = near.change(said, open_) >= far.change(said, open_)
        high[open_[first]], low[open_[~first]] = middle[first], middle[~first]
        far.take(said, open_, first)
        near.take(said, open_, ~first)
    return low, high


class _Said:
    """What the pipeline answers for some rows; a score that it does not give counts as 0."""

    def __init__(self, ask: Ask, rows: Rows) -> None:
        found = ask(rows)
        self._scores = np.nan_to_num(found.scores)
        self._labels = found.labels.copy()

    def change(self, other: _Said, at: Index) -> NDArray[np.float64]:
        """(m,) how far the answers ``at`` (m,) lie from those of ``other`` (m,)."""
        with np.errstate(over="ignore"):
            apart = np.abs(self._scores[at] - other._scores).max(axis=1)
        return np.asarray(apart + _LABEL * (self._labels[at] != other._labels).any(axis=1))

    def take(self, other: _Said, at: Index, chosen: NDArray[np.bool_]) -> None:
        """Replaces the ``chosen`` of the answers ``at`` (m,) by those of ``other`` (m,)."""
        if self._scores.shape[1] < other._scores.shape[1]:  # so far every row was refused
            self._scores = np.repeat(self._scores, other._scores.shape[1], axis=1)
        self._scores[at[chosen]] = other._scores[chosen]
        self._labels[at[chosen]] = other._labels[chosen]
