"""Profiles as vectors, and the familiar figures of drift, computed from the same cells.

Every unit (a training group, a device) weighs the same, however many rows it has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.profile import CellSpec, Profile

Matrix = NDArray[np.float64]

SHARE_FLOOR: Final = 1e-4
"""Cell shares below this count as this in PSI, which is infinite on an empty cell otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """Units as vectors: ``values`` (units, components) in [0, 1]; ``owners`` (components,) index into ``names``."""

    names: tuple[str, ...]
    values: Matrix
    owners: NDArray[np.int64]


def _counts(profiles: Sequence[Profile]) -> Matrix:
    return np.stack([profile.counts for profile in profiles]).astype(np.float64)


def _shares(counts: Matrix, spec: CellSpec, column: int) -> tuple[Matrix, Matrix]:
    """(units, cells) shares among finite values and (units, 2) shares of missing and non-finite among all rows.

    A unit without one finite value has NaN shares.
    """
    start = int(spec.offsets[column])
    cells = spec.columns[column].cells
    inside = counts[:, start : start + cells]
    beside = counts[:, start + cells : start + cells + 2]
    finite = inside.sum(axis=1, keepdims=True)
    rows = finite + beside.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return inside / np.where(finite > 0, finite, np.nan), beside / np.maximum(rows, 1.0)


def _filled(values: Matrix) -> Matrix:
    """NaN replaced by the column's mean over the units that have it (0.5 when none has): it speaks for neither side."""
    known = ~np.isnan(values)
    n = known.sum(axis=0)
    mean = np.where(n > 0, np.where(known, values, 0.0).sum(axis=0) / np.maximum(n, 1), 0.5)
    return np.where(known, values, mean)


def input_columns(spec: CellSpec, profiles: Sequence[Profile]) -> Columns:
    """Per feature: its distribution function at every edge, then the shares of missing and of non-finite values."""
    counts = _counts(profiles)
    parts = []
    for j in range(len(spec.features)):
        shares, beside = _shares(counts, spec, j)
        parts.append(np.concatenate([_filled(np.cumsum(shares, axis=1)[:, :-1]), beside], axis=1))
    sizes = [part.shape[1] for part in parts]
    return Columns(
        names=tuple(feature.name for feature in spec.features),
        values=np.concatenate(parts, axis=1),
        owners=np.repeat(np.arange(len(parts)), sizes),
    )


def output_columns(spec: CellSpec, profiles: Sequence[Profile], labels: Sequence[object]) -> Columns:
    """The score's distribution function at every edge, then the share of each predicted class, each its own name."""
    counts = _counts(profiles)
    shares, _ = _shares(counts, spec, len(spec.features))
    parts = [_filled(np.cumsum(shares, axis=1)[:, :-1])]
    owners = [np.zeros(parts[0].shape[1], np.int64)]
    if spec.classes:
        classes = counts[:, int(spec.offsets[-1]) :]
        parts.append(classes / np.maximum(classes.sum(axis=1, keepdims=True), 1.0))
        owners.append(np.arange(1, 1 + spec.classes))
    return Columns(
        names=("score", *(f"class {label}" for label in labels)),
        values=np.concatenate(parts, axis=1),
        owners=np.concatenate(owners),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnFigures:
    """One column, reference against fleet, both as the mean of their units; see `aggregator.records.Figure`."""

    psi: float
    ks: float
    js_bits: float
    wasserstein_sd: float
    mean_shift_sd: float
    missing: tuple[float, float]
    cut: float
    below: tuple[float, float]
    broad: float


def column_figures(
    spec: CellSpec, column: int, reference: Sequence[Profile], fleet: Sequence[Profile]
) -> ColumnFigures:
    """The familiar figures of column ``column`` (the score is column F).

    PSI is Σ (q−p) ln(q/p) with shares of at least `SHARE_FLOOR`; KS the largest difference of the
    distribution functions at an edge, so at most the raw one; Jensen–Shannon the divergence in bits.
    Wasserstein-1 and the shift of the mean put every value at the middle of its cell, and values of the two
    open cells at their edge; both are in standard deviations of the reference so placed (0 when the reference
    does not vary).
    """
    shares_r, beside_r = _shares(_counts(reference), spec, column)
    shares_f, beside_f = _shares(_counts(fleet), spec, column)
    p, q = _mean_shares(shares_r), _mean_shares(shares_f)
    cdf_p, cdf_q = np.cumsum(p)[:-1], np.cumsum(q)[:-1]
    gap = cdf_q - cdf_p
    at = int(np.abs(gap).argmax())
    edges = np.asarray(spec.columns[column].edges, np.float64)
    places = np.concatenate([edges[:1], (edges[1:] + edges[:-1]) / 2.0, edges[-1:]])
    mean = float(p @ places)
    deviation = math.sqrt(max(0.0, float(p @ (places - mean) ** 2)))
    distance = float(np.abs(gap) @ np.diff(places))
    unit_cdf = np.cumsum(shares_f, axis=1)[:, at]
    side = (unit_cdf - cdf_p[at]) * np.sign(gap[at]) > 0.0
    a, b = np.maximum(p, SHARE_FLOOR), np.maximum(q, SHARE_FLOOR)
    return ColumnFigures(
        psi=float(((b - a) * np.log(b / a)).sum()),
        ks=float(np.abs(gap).max()),
        js_bits=_jensen_shannon_bits(p, q),
        wasserstein_sd=distance / deviation if deviation else 0.0,
        mean_shift_sd=(float(q @ places) - mean) / deviation if deviation else 0.0,
        missing=(float(beside_r[:, 0].mean()), float(beside_f[:, 0].mean())),
        cut=float(edges[at]),
        below=(float(cdf_p[at]), float(cdf_q[at])),
        broad=float(side.mean()),
    )


def _mean_shares(shares: Matrix) -> NDArray[np.float64]:
    """The mean over the units that have finite values; all equal when none has."""
    known = ~np.isnan(shares[:, 0])
    if not known.any():
        return np.full(shares.shape[1], 1.0 / shares.shape[1])
    mean: NDArray[np.float64] = shares[known].mean(axis=0)
    return mean


def _jensen_shannon_bits(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    middle = (p + q) / 2.0

    def divergence(a: NDArray[np.float64]) -> float:
        some = a > 0
        return float((a[some] * np.log2(a[some] / middle[some])).sum())

    return max(0.0, (divergence(p) + divergence(q)) / 2.0)


def share_figures(reference: NDArray[np.float64], fleet: NDArray[np.float64]) -> ColumnFigures:
    """The figures of one share in [0, 1] (a class, an accuracy), from its value in each unit of either side.

    PSI and Jensen–Shannon are those of the two cells share and rest; KS is the difference; ``below`` holds
    the two shares; the figures that need a scale are 0.
    """
    p, q = float(reference.mean()), float(fleet.mean())
    one, other = np.array([p, 1.0 - p]), np.array([q, 1.0 - q])
    a, b = np.maximum(one, SHARE_FLOOR), np.maximum(other, SHARE_FLOOR)
    return ColumnFigures(
        psi=float(((b - a) * np.log(b / a)).sum()),
        ks=abs(q - p),
        js_bits=_jensen_shannon_bits(one, other),
        wasserstein_sd=0.0,
        mean_shift_sd=0.0,
        missing=(0.0, 0.0),
        cut=0.0,
        below=(p, q),
        broad=float(((fleet - p) * np.sign(q - p) > 0.0).mean()),
    )
