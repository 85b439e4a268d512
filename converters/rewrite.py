"""Folds scalers into the estimator, so that the graph takes raw float32 columns and rounds nothing on the way.

Forests: scikit-learn scales in float64, casts to float32 and compares with a float64 threshold. Scalers work
column by column and never reverse an order, so each split sends left exactly the raw float32 values up to some largest
one. That one is found by bisection over the float32 values in order, asking the fitted scalers themselves; it
is the raw threshold, and being a float32 it is exact in the graph.

Linear models: a chain of scalers is a·x + b per column; it is folded into coefficients and intercept in float64.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler

from converters.signature import Signature, Step, by_position, trees

Keys = NDArray[np.int64]

LARGEST_KEY: Final = int(np.float32(np.finfo(np.float32).max).view(np.int32))
"""Finite float32 values have the keys ``-LARGEST_KEY … LARGEST_KEY``, in order; the next ones are the infinities."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Splits:
    """Every split of a forest, in raw feature space.

    Attributes:
        tree: (S,) index of the tree.
        node: (S,) index of the node in its tree.
        feature: (S,) input column.
        threshold: (S,) float32, the largest raw value that goes left.
    """

    tree: NDArray[np.int64]
    node: NDArray[np.int64]
    feature: NDArray[np.int64]
    threshold: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Folded:
    """An estimator of the same kind that takes raw float32 rows and whose classes are 0 … C-1.

    For a forest it answers bit for bit what the pipeline answers on widened float32 rows. ``splits`` is None for a
    linear model.
    """

    estimator: Any
    splits: Splits | None


def fold(signature: Signature) -> Folded:
    """The estimator with all scalers folded in; the pipeline is left as it is.

    Raises `UnsupportedPipeline` when a linear model stands behind a scaler that clips.
    """
    estimator = copy.deepcopy(signature.estimator.fitted)
    if signature.labels:
        estimator.classes_ = np.arange(len(signature.labels))
    if signature.family == "linear":
        _fold_linear(signature, estimator)
        return Folded(estimator=estimator, splits=None)
    return Folded(estimator=estimator, splits=_fold_forest(signature, estimator))


def float_of(keys: Keys) -> NDArray[np.float32]:
    """The float32 values of ``keys``; both zeros have the key 0."""
    bits = np.where(keys >= 0, keys, -keys | 0x80000000)
    return bits.astype(np.uint32).view(np.float32)


def key_of(values: NDArray[np.float32]) -> Keys:
    """The place of each finite float32 value among all of them in order; `float_of` reverses it."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def largest_left(
    scalers: Sequence[Step], feature: NDArray[np.int64], threshold: NDArray[np.float64], width: int
) -> NDArray[np.float32]:
    """Per split (S,), the largest raw float32 value that scikit-learn sends left.

    ``-inf`` where none goes left. ``width`` is F, the number of columns the scalers were fitted on.
    """
    pairs, back = np.unique(np.stack([feature, threshold], axis=1), axis=0, return_inverse=True)
    column = pairs[:, 0].astype(np.int64)
    # One column of cells per feature, as the scalers want them; cells left over hold 0 and are ignored.
    first = np.searchsorted(column, np.arange(width))
    cell = np.arange(len(column)) - first[column]
    low = np.full(len(column), -LARGEST_KEY - 1, np.int64)
    high = np.full(len(column), LARGEST_KEY + 1, np.int64)
    raw = np.zeros((int(cell.max(initial=-1)) + 1, width))
    while (open_ := high - low > 1).any():
        middle = (low + high) // 2
        raw[:] = 0.0
        raw[cell, column] = float_of(np.clip(middle, -LARGEST_KEY, LARGEST_KEY))
        with by_position():
            scaled = _through(scalers, raw.copy())[cell, column].astype(np.float32)
        left = scaled <= pairs[:, 1]
        low = np.where(open_ & left, middle, low)
        high = np.where(open_ & ~left, middle, high)
    return float_of(low)[back.reshape(-1)]


def _through(scalers: Sequence[Step], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    for step in scalers:
        rows = np.asarray(step.fitted.transform(rows), np.float64)
    return rows


def _fold_forest(signature: Signature, estimator: Any) -> Splits:
    members = trees(estimator)
    inner = [np.flatnonzero(tree.children_left >= 0) for tree in members]
    feature = np.concatenate([tree.feature[at] for tree, at in zip(members, inner, strict=True)]).astype(
        np.int64
    )
    threshold = np.concatenate([tree.threshold[at] for tree, at in zip(members, inner, strict=True)])
    raw = largest_left(signature.scalers, feature, threshold.astype(np.float64), signature.width)
    start = 0
    for tree, at in zip(members, inner, strict=True):
        tree.threshold[at] = raw[start : start + len(at)]
        start += len(at)
    return Splits(
        tree=np.repeat(np.arange(len(members)), [len(at) for at in inner]),
        node=np.concatenate(inner).astype(np.int64),
        feature=feature,
        threshold=raw,
    )


def _fold_linear(signature: Signature, estimator: Any) -> None:
    slope, offset = np.ones(signature.width), np.zeros(signature.width)
    for step in signature.scalers:
        a, b = _affine(step, signature.width)
        slope, offset = a * slope, a * offset + b
    coef = np.asarray(estimator.coef_, np.float64).reshape(-1, signature.width)
    intercept = np.broadcast_to(np.asarray(estimator.intercept_, np.float64).reshape(-1), (len(coef),))
    estimator.coef_ = coef * slope
    estimator.intercept_ = np.array(
        [math.fsum([b, *(w * offset).tolist()]) for w, b in zip(coef, intercept, strict=True)]
    )


def _affine(step: Step, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``a`` and ``b`` (F,) of a scaler that maps x to a·x + b."""
    scaler = step.fitted
    if isinstance(scaler, MinMaxScaler):
        if scaler.clip:
            raise step.refuse("clips, which a linear model cannot absorb", "fit with clip=False")
        return np.asarray(scaler.scale_, np.float64), np.asarray(scaler.min_, np.float64)
    centre, scale = None, None
    if isinstance(scaler, StandardScaler):
        centre, scale = scaler.mean_ if scaler.with_mean else None, scaler.scale_
    elif isinstance(scaler, RobustScaler):
        centre, scale = scaler.center_, scaler.scale_
    elif isinstance(scaler, MaxAbsScaler):
        scale = scaler.scale_
    else:
        raise step.refuse("has no known affine form")
    slope = np.ones(width) if scale is None else 1.0 / np.asarray(scale, np.float64)
    offset = np.zeros(width) if centre is None else -np.asarray(centre, np.float64) * slope
    return slope, offset
