"""Rows equally far from several training rows, where a search among these decides by its own order.

They are tried for every pipeline with such a step. Nothing is known of the steps before it, so the rows are equally far
in the raw columns: halfway between two training rows, or mixtures of two. Apart from these there are rows so far away
that distances round to equal ones.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from converters.table import Rows, spread

Index = NDArray[np.int64]

_SEEN: Final = 512
"""Training rows among which the neighbours of one are looked for."""

_LARGEST: Final = float(np.finfo(np.float32).max)


def find(rows: Rows, numbers: Index, rng: np.random.Generator, count: int) -> Rows:
    """``count`` rows (count, F) built from training ``rows`` (n, F); ``numbers`` are the columns without codes."""
    sorts = (_halfway, _mixed, _between_values) if numbers.size else (_mixed,)
    share = np.full(len(sorts), count // len(sorts))
    share[: count % len(sorts)] += 1
    parts = [sort(rows, numbers, rng, size) for sort, size in zip(sorts, share.tolist(), strict=True)]
    return np.concatenate(parts)


def _pairs(rows: Rows, numbers: Index, rng: np.random.Generator, count: int) -> tuple[Rows, Rows]:
    """(count, F) twice: training rows, and for each of them one of its nearest, or any other."""
    seen = rows[rng.permutation(len(rows))[:_SEEN]]
    first = rng.integers(len(seen), size=count)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = seen[:, numbers].astype(np.float64) / spread(seen)[numbers]
    scaled = np.nan_to_num(scaled, posinf=0.0, neginf=0.0)  # a column that never changes tells no rows apart
    squares = (scaled * scaled).sum(axis=1)
    apart = squares[first, None] - 2 * scaled[first] @ scaled.T + squares
    rank = np.minimum(rng.geometric(0.25, size=count), len(seen) - 1)
    near = np.take_along_axis(np.argsort(apart, axis=1), rank[:, None], axis=1)[:, 0]
    any_ = rng.integers(len(seen), size=count)
    return seen[first], seen[np.where(rng.random(count) < 0.75, near, any_)]


def _halfway(rows: Rows, numbers: Index, rng: np.random.Generator, count: int) -> Rows:
    """Halfway between two training rows in every column, or in those of a random half."""
    one, other = _pairs(rows, numbers, rng, count)
    middle = one.astype(np.float64) / 2 + other.astype(np.float64) / 2
    moved = (rng.random((count, rows.shape[1])) < 0.5) | (np.arange(count) % 2 == 0)[:, None]
    moved &= np.isin(np.arange(rows.shape[1]), numbers)
    return np.where(moved, middle, one).astype(rows.dtype)


def _mixed(rows: Rows, numbers: Index, rng: np.random.Generator, count: int) -> Rows:
    """Some columns of one training row and some of another: for columns of few values, equally far from many."""
    one, other = _pairs(rows, numbers, rng, count)
    return np.where(rng.random((count, rows.shape[1])) < rng.random((count, 1)), one, other)


def _between_values(rows: Rows, numbers: Index, rng: np.random.Generator, count: int) -> Rows:
    """Training rows with some columns halfway between a value that the column takes and the next one."""
    made = rows[rng.integers(len(rows), size=count)]
    chosen = rng.random((count, len(numbers))) < rng.random((count, 1))
    for place, column in enumerate(numbers.tolist()):
        values = np.unique(rows[np.isfinite(rows[:, column]), column]).astype(np.float64)
        if len(values) < 2:
            continue
        at = np.minimum(np.searchsorted(values, made[:, column]), len(values) - 2)
        middle = (values[at] / 2 + values[at + 1] / 2).astype(rows.dtype)
        made[:, column] = np.where(chosen[:, place], middle, made[:, column])
    return made


def far(rows: Rows, numbers: Index, rng: np.random.Generator, count: int) -> Rows:
    """Training rows with one column so far out that distances to the training rows round to few values."""
    made = rows[rng.integers(len(rows), size=count)]
    column = numbers[rng.integers(len(numbers), size=count)]
    with np.errstate(invalid="ignore"):
        wide = np.nan_to_num(spread(rows)[column], nan=1.0)
    away = np.where(rng.random(count) < 0.5, -1.0, 1.0) * wide * np.exp2(rng.integers(4, 72, size=count))
    made[np.arange(count), column] = np.clip(away, -_LARGEST, _LARGEST)
    return made
