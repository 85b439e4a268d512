"""Values worth trying in a column: beside edges, at the ends of ranges, infinities, categories, extremes."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from converters.lowering.folding import LARGEST_KEYS, float_of, key_of
from converters.reference import Acceptance
from converters.table import Rows
from edge_runtime.contract.ranges import Limits

OFFSETS: Final = (0, 1, -1, 2, -2)
"""Distances from an edge, in floating-point values."""

LARGEST: Final = float(np.finfo(np.float32).max)

EXTREMES: Final = 12
"""How many values `extremes` gives."""


def _value_kind(dtype: np.dtype[np.floating]) -> np.dtype[np.void]:
    return np.dtype([("column", np.int64), ("value", dtype)])


def around(edges: list[tuple[int, NDArray[np.floating]]], dtype: np.dtype[np.floating]) -> NDArray[np.void]:
    """The values at and beside each edge, as (column, value) records without repetition."""
    kind = _value_kind(dtype)
    found = []
    for column, values in edges:
        finite = np.unique(values[np.isfinite(values)]).astype(dtype)
        for offset in OFFSETS:
            key = np.clip(key_of(finite) + offset, -LARGEST_KEYS[dtype.name], LARGEST_KEYS[dtype.name])
            part = np.empty(len(finite), kind)
            part["column"], part["value"] = column, float_of(key, dtype.name)
            found.append(part)
    return np.unique(np.concatenate(found)) if found else np.empty(0, kind)


def allowed(limits: Limits | None, values: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which of the (column, value) records lie inside the column's range."""
    if limits is None:
        return np.ones(len(values), np.bool_)
    low, high = limits.low[values["column"]], limits.high[values["column"]]
    return np.asarray((values["value"] >= low) & (values["value"] <= high))


def ends(limits: Limits | None, numbers: NDArray[np.int64], dtype: np.dtype[np.floating]) -> NDArray[np.void]:
    """The ends of each range and the values beside them inside it, as (column, value) records."""
    if limits is None:
        return np.empty(0, _value_kind(dtype))
    every = around([(int(j), np.array([limits.low[j], limits.high[j]])) for j in numbers], dtype)
    return every[allowed(limits, every)]


def endless(limits: Limits | None, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The columns of ``numbers`` whose range has no end on one side at least."""
    if limits is None:
        return numbers
    both = np.isfinite(limits.low) & np.isfinite(limits.high)
    return np.asarray(numbers[~both[numbers]])


def infinities(takes: Acceptance) -> NDArray[np.void]:
    """Both infinities of each column that takes them and whose range does not exclude them."""
    found = [(j, value) for j in np.flatnonzero(takes.infinite).tolist() for value in (-np.inf, np.inf)]
    every = np.array(found, _value_kind(np.dtype(np.float64)))
    return every[allowed(takes.limits, every)]


def categories(vocabulary: NDArray[np.int64], unseen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(k, 2) every (column, code), with -1 where the pipeline takes values it has not seen."""
    found = [
        (j, code)
        for j, size in enumerate(vocabulary.tolist())
        for code in range(-int(unseen[j]) if size else 0, size)
    ]
    return np.array(found, np.int64).reshape(-1, 2)


def extremes(column: Rows) -> Rows:
    """(12,) values at the ends of a column's range, beyond them, and around zero."""
    finite = column[np.isfinite(column)].astype(np.float64)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    span = high - low or max(1.0, abs(low))
    ends = np.clip(
        [low, high, low - span, high + span, low - 100 * span, high + 100 * span], -LARGEST, LARGEST
    )
    near = ends.astype(column.dtype)
    steps = np.nextafter(near[:2], np.array([-np.inf, np.inf], column.dtype))
    tiny = np.finfo(column.dtype).smallest_subnormal
    return np.concatenate([near, steps, np.array([0.0, -0.0, tiny, -tiny], column.dtype)])
