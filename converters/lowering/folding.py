"""Folds the steps before a split into its threshold, so that the graph takes raw columns and rounds nothing on the way.

Scikit-learn scales in float64, casts to float32 where its trees want that, and compares with a float64 threshold. Steps
that work column by column and never reverse an order leave each split a largest raw value that goes left. That one is
found by bisection over all floats in order, both infinities among them, asking the fitted steps themselves; it is the
raw threshold, and being a value of the input's own type it is exact in the graph. Trees that were trained on missing
values have splits at ``inf``: all numbers go left, the infinities too, and only NaN may go right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context

from converters.signature import by_position

if TYPE_CHECKING:
    from converters.lowering.graph import Fold, Lowering, Value, Wide

Keys = NDArray[np.int64]
_SIGNED: Final[dict[str, type[np.signedinteger[Any]]]] = {"float32": np.int32, "float64": np.int64}

LARGEST_KEYS: Final[dict[str, int]] = {
    "float32": int(np.float32(np.finfo(np.float32).max).view(np.int32)),
    "float64": int(np.float64(np.finfo(np.float64).max).view(np.int64)),
}
"""Finite values have the keys ``-LARGEST_KEYS[dtype] … LARGEST_KEYS[dtype]``, in order; the infinities are next."""


def float_of(keys: Keys, dtype: str | np.dtype[np.floating]) -> NDArray[np.floating]:
    """The values of ``dtype``, float32 or float64, that ``keys`` stand for; both zeros have the key 0."""
    magnitude = np.abs(keys).astype(_SIGNED[np.dtype(dtype).name]).view(dtype)
    return np.where(keys < 0, -magnitude, magnitude)


def key_of(values: NDArray[np.floating]) -> Keys:
    """The place of each value among all of its type in order; `float_of` reverses it. NaN has none."""
    bits = np.ascontiguousarray(np.abs(values)).view(_SIGNED[values.dtype.name]).astype(np.int64)
    return np.where(values < 0, -bits, bits)


def largest_left(
    fold: Fold,
    column: NDArray[np.int64],
    threshold: Wide,
    dtype: str,
    *,
    narrow: bool,
    width: int,
) -> NDArray[np.floating]:
    """Per split (S,), the largest raw value of ``dtype`` that goes left, an infinity perhaps.

    Where none does it is ``-inf``, too: a split that even ``-inf`` passes on the right was learned from missing values
    that a step fills, and such a step refuses infinities.

    Args:
        fold: how the columns come from the raw ones.
        column: (S,) the folded column that is compared; it must have a source.
        threshold: (S,) what it is compared with: at most that goes left.
        dtype: the type of the raw values.
        narrow: whether the column is cast to float32 first, as `sklearn.tree` does.
        width: F, the number of raw columns.
    """
    pairs, back = np.unique(np.stack([column, threshold], axis=1), axis=0, return_inverse=True)
    column = pairs[:, 0].astype(np.int64)
    source = fold.sources[column]
    assert (source >= 0).all(), "a split over a column without a source"
    # One column of cells per raw column; cells left over hold 0 and are ignored.
    order = np.argsort(source, kind="stable")
    cell = np.empty(len(source), np.int64)
    cell[order] = np.arange(len(source)) - np.searchsorted(source[order], source[order])
    infinity = LARGEST_KEYS[dtype] + 1
    low = np.full(len(source), -infinity - 1, np.int64)
    high = np.full(len(source), infinity + 1, np.int64)
    raw = np.zeros((int(cell.max(initial=-1)) + 1, width))
    while (open_ := low + 1 < high).any():
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # the sum of two float64 keys has no room
        raw[:] = 0.0
        raw[cell, source] = float_of(np.clip(middle, -infinity, infinity), dtype)
        left = _made(fold, raw, narrow=narrow)[cell, column] <= pairs[:, 1]
        low = np.where(open_ & left, middle, low)
        high = np.where(open_ & ~left, middle, high)
    return float_of(np.maximum(low, -infinity), dtype).astype(dtype)[back.reshape(-1)]


def missing_left(
    fold: Fold,
    column: NDArray[np.int64],
    threshold: Wide,
    otherwise: NDArray[np.bool_],
    *,
    narrow: bool,
    width: int,
) -> NDArray[np.bool_]:
    """Per split (S,), whether a raw NaN goes left: ``otherwise`` where it is still NaN when it gets there."""
    try:
        made = _made(fold, np.full((1, width), np.nan), narrow=narrow)[0]
    except ValueError:  # a step refuses NaN: no row with one gets this far
        return otherwise
    return np.where(np.isnan(made[column]), otherwise, made[column] <= threshold)


def note_edges(g: Lowering, x: Value, column: int, values: Any, *, narrow: bool = False) -> None:
    """Notes that a step changes its answer at ``values`` of a column of ``x``, so that the proof tries rows there.

    Columns that do not come from one raw column, in order, have no such rows, and nothing is noted.
    """
    edges = np.unique(np.asarray(values, np.float64).reshape(-1))
    edges = edges[np.isfinite(edges)]
    if x.fold is None or x.fold.sources[column] < 0 or not edges.size:
        return
    at = np.full(len(edges), column, np.int64)
    raw = np.unique(largest_left(x.fold, at, edges, g.dtype, narrow=narrow, width=g.width))
    if (raw := raw[np.isfinite(raw)]).size:
        g.edges.append((int(x.fold.sources[column]), raw))


def _made(fold: Fold, raw: Wide, *, narrow: bool) -> Wide:
    # Huge values may overflow on the way: that is an answer too, and checks for it would raise.
    with by_position(), config_context(assume_finite=True):
        made = np.asarray(fold.apply(raw.copy()), np.float64)
        return made.astype(np.float32).astype(np.float64) if narrow else made
