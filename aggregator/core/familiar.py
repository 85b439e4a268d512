"""The familiar figures of drift of every column at once, from shares of cells. For reading: no verdict is made of them.

PSI is Σ (q - p) ln (q / p), with shares of at least `SHARE_FLOOR`. KS is the largest difference of the distribution
functions at an edge, so at most the raw one. Chi-square is Pearson's statistic of the fleet's counts against the same
shares of the reference. Jensen-Shannon is the distance, the root of the divergence in bits. Wasserstein-1 and the
shift of the mean put every value at the middle of its cell, and values of the two open cells at their edge; both are
in standard deviations of the reference so placed (0 where it does not vary). All of these are NaN where one of the
two has no finite value of the column.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aggregator.core.components import stretches
from aggregator.looks import Familiar
from edge_runtime.contract.profile import BESIDE, CellSpec, Profile

Vector = NDArray[np.float64]

SHARE_FLOOR: Final = 1e-4
"""Cell shares below this count as this in PSI, and empty cells of the reference in chi-square where the fleet has rows:
they are infinite on an empty cell otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shares:
    """The mean of some units: ``cells`` (S,) shares among finite values, column after column, NaN where there is none;
    ``beside`` (J, 3) of all rows; ``counts`` (S,) and ``finite`` (J,) values of all units together.
    """

    cells: Vector
    beside: Vector
    counts: Vector
    finite: Vector


@dataclass(frozen=True)
class Reader:
    """Reads figures under one layout."""

    spec: CellSpec

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.array([column.cells for column in self.spec.columns])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self._sizes)[:-1]])

    @cached_property
    def _owners(self) -> NDArray[np.int64]:
        """(S,) the column of each cell."""
        return np.repeat(np.arange(len(self._sizes)), self._sizes)

    @cached_property
    def _cells(self) -> NDArray[np.int64]:
        """(S,) the counter of each cell."""
        return np.arange(len(self._owners)) + BESIDE * self._owners

    @cached_property
    def _beside(self) -> NDArray[np.int64]:
        """(J * BESIDE,) the counters beside each column's cells."""
        first = self._starts + self._sizes + BESIDE * np.arange(len(self._sizes))
        return (first[:, None] + np.arange(BESIDE)).ravel()

    @cached_property
    def _places(self) -> Vector:
        """(S,) the value that a cell's rows are put at."""
        found = []
        for column in self.spec.columns:
            edges = np.asarray(column.edges, np.float64)
            found.append(np.concatenate([edges[:1], (edges[1:] + edges[:-1]) / 2.0, edges[-1:]]))
        return np.concatenate(found)

    @cached_property
    def _widths(self) -> Vector:
        """(S,) how far the next cell's place is; 0 behind a column's last."""
        widths = np.diff(self._places, append=0.0)
        widths[self._starts[1:] - 1] = 0.0
        widths[-1] = 0.0
        return widths

    def shares(self, profiles: Sequence[Profile]) -> Shares:
        """The mean shares of the units, each weighing the same; one without a finite value of a column is left out."""
        return self.shares_of(np.stack([profile.counts for profile in profiles]))

    def shares_of(self, counts: NDArray[np.int64]) -> Shares:
        """`shares` of units with these ``counts`` (units, size)."""
        columns = len(self._sizes)
        cells, totals = np.zeros(len(self._owners)), np.zeros(len(self._owners))
        beside, finite, known = np.zeros((columns, BESIDE)), np.zeros(columns), np.zeros(columns)
        for part in stretches(len(counts), counts.shape[1]):
            found = counts[part].astype(np.float64)
            inside = np.add.reduceat(found[:, self._cells], self._starts, axis=1)
            around = found[:, self._beside].reshape(len(found), columns, BESIDE)
            rows = np.maximum(inside + around[:, :, 0] + around[:, :, 1], 1.0)
            each = np.where(inside > 0, 1.0 / np.maximum(inside, 1.0), 0.0)
            cells += np.einsum("us,us->s", found[:, self._cells], each[:, self._owners])
            totals += found[:, self._cells].sum(axis=0)
            beside += np.einsum("ujb,uj->jb", around, 1.0 / rows)
            finite += inside.sum(axis=0)
            known += (inside > 0).sum(axis=0)
        return Shares(
            cells=cells / np.where(known > 0, known, np.nan)[self._owners],
            beside=beside / len(counts),
            counts=totals,
            finite=finite,
        )

    def read(self, reference: Shares, fleet: Shares) -> tuple[Familiar, ...]:
        """The figures of every feature, then of the score."""
        p, q = np.nan_to_num(reference.cells), np.nan_to_num(fleet.cells)
        owners, starts, places = self._owners, self._starts, self._places
        known = ~np.isnan(reference.cells + fleet.cells)[starts]
        a, b = np.maximum(p, SHARE_FLOOR), np.maximum(q, SHARE_FLOOR)
        psi = np.add.reduceat((b - a) * np.log(b / a), starts)
        gap = np.cumsum(q - p)
        gap -= np.concatenate([[0.0], gap[starts[1:] - 1]])[owners]
        expected = np.where((p == 0) & (fleet.counts > 0), SHARE_FLOOR, p) * fleet.finite[owners]
        with np.errstate(invalid="ignore", divide="ignore"):
            chi2 = np.add.reduceat(
                np.where(expected > 0, (fleet.counts - expected) ** 2 / expected, 0.0), starts
            )
            middle = (p + q) / 2.0
            bits = np.where(p > 0, p * np.log2(p / middle), 0.0) + np.where(
                q > 0, q * np.log2(q / middle), 0.0
            )
        js = np.sqrt(np.maximum(np.add.reduceat(bits, starts) / 2.0, 0.0))
        means = [np.add.reduceat(x * places, starts) for x in (p, q)]
        deviations = [
            np.sqrt(np.maximum(np.add.reduceat(x * (places - mean[owners]) ** 2, starts), 0.0))
            for x, mean in zip((p, q), means, strict=True)
        ]
        scale = np.where(deviations[0] > 0, deviations[0], np.inf)
        moved = np.add.reduceat(np.abs(gap) * self._widths, starts) / scale
        shift = (means[1] - means[0]) / scale
        below = np.cumsum(p)
        below -= np.concatenate([[0.0], below[starts[1:] - 1]])[owners]
        found = []
        for j, column in enumerate(self.spec.columns):
            edges = slice(int(starts[j]), int(starts[j]) + column.cells - 1)
            at = int(np.abs(gap[edges]).argmax())
            under = float(below[edges][at])
            beside = [(float(reference.beside[j, k]), float(fleet.beside[j, k])) for k in range(3)]
            one = Familiar(
                psi=float(psi[j]),
                ks=float(abs(gap[edges][at])),
                chi2=float(chi2[j]),
                js=float(js[j]),
                wasserstein_sd=float(moved[j]),
                mean_shift_sd=float(shift[j]),
                sd_ratio=float(deviations[1][j] / scale[j]) if np.isfinite(scale[j]) else 1.0,
                cut=float(column.edges[at]),
                below=(_share(under), _share(under + float(gap[edges][at]))),
                missing=beside[0],
                non_finite=beside[1],
                repeated=beside[2],
            )
            found.append(one if known[j] else _without_values(one))
        return tuple(found)


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def _without_values(found: Familiar) -> Familiar:
    nan = math.nan
    return replace(
        found,
        psi=nan,
        ks=nan,
        chi2=nan,
        js=nan,
        wasserstein_sd=nan,
        mean_shift_sd=nan,
        sd_ratio=nan,
        cut=nan,
        below=(nan, nan),
    )
