"""Profiles as vectors: what the tests compare, one number per component, each linear in the counts.

Of a numeric column: its distribution function at every edge, then its location and its scale as scores. Those are
normal scores of the cells, van der Waerden's, so that a shift that moves every edge a little is seen at once (J.
Hájek and Z. Šidák, Theory of Rank Tests, 1967). Of a column of categories: the share of every cell. Of both, the
shares of missing, non-finite and repeated values. Of the outputs: the score as a numeric column, the share of each
class, and the mean of the largest probability, which estimates the share of right answers where probabilities are
calibrated.

Shares are without bias whatever the number of rows, so that a long past and a short window can be compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from edge_runtime.contract.manifest import ArtifactInfo
from edge_runtime.contract.profile import BESIDE, FIXED_POINT, Profile

Matrix = NDArray[np.float64]
Indices = NDArray[np.int64]

SHAPE: Final = 0
MISSING: Final = 1
NON_FINITE: Final = 2
REPEATED: Final = 3
UNSEEN: Final = 4
CLASS: Final = 5
ACCURACY: Final = 6
"""What a component tells of its owner."""

FAULTS: Final = (MISSING, NON_FINITE, REPEATED, UNSEEN)
FAULT_WORDS: Final = {
    MISSING: "missing values",
    NON_FINITE: "infinite values",
    REPEATED: "repeated values",
    UNSEEN: "unseen categories",
}
LOCATION: Final = -1
SCALE: Final = -2
_LEAST_RANK: Final = 5e-4
_STRETCH: Final = 1 << 17
"""So many numbers are worked on at a time: they fit a processor's cache."""


def stretches(units: int, width: int) -> Iterator[slice]:
    """Consecutive ``units`` of ``width`` numbers each, as many at a time as are worked on fastest."""
    step = max(16, _STRETCH // max(1, width))
    return (slice(start, min(units, start + step)) for start in range(0, units, step))


def _or_nan(counts: Matrix) -> Matrix:
    """``counts`` to divide by: NaN where there is nothing."""
    return np.where(counts > 0, counts, np.nan)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """What units say: ``values`` (units, K), NaN where a unit has nothing to say.

    ``finite`` and ``rows`` (units, J) are how many values of each column they are shares of: finite ones, and all.
    """

    values: Matrix
    finite: Matrix
    rows: Matrix


@dataclass(frozen=True, eq=False)
class Components:
    """The components of one artifact's profiles.

    ``owners`` (K,) counts features from 0; the score is F, the predicted class F + 1, the estimated accuracy F + 2.
    ``nature`` (K,) says what a component tells; ``cells`` (K,) is the cell that an edge closes, or a class's number; it
    is `LOCATION` or `SCALE` for a score.
    """

    names: tuple[str, ...]
    features: int
    owners: Indices
    nature: Indices
    cells: Indices
    _blocks: tuple["_Block", ...]

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.owners)

    @property
    def estimates(self) -> bool:
        """Whether the last component is the estimated accuracy."""
        return bool(self.nature[-1] == ACCURACY)

    @property
    def inputs(self) -> NDArray[np.bool_]:
        """(K,) whether a component tells of an input."""
        found: NDArray[np.bool_] = self.owners < self.features
        return found

    def sample(self, profiles: Sequence[Profile]) -> Sample:
        """The units' vectors."""
        counts = np.stack([profile.counts for profile in profiles])
        return self.of_counts(counts, np.stack([profile.sums for profile in profiles]))

    def of_counts(self, counts: NDArray[np.int64], sums: NDArray[np.int64]) -> Sample:
        """The vectors of units with these ``counts`` (units, size) and ``sums`` (units, 1 + classes)."""
        units, many = len(counts), len(self._blocks)
        found = Sample(
            values=np.empty((units, self.size)), finite=np.empty((units, many)), rows=np.empty((units, many))
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            for part in stretches(units, counts.shape[1]):
                self._fill(found, part, counts[part].astype(np.float64))
            if self.estimates:
                found.values[:, -1] = sums[:, 0] / FIXED_POINT / _or_nan(found.rows[:, -1])
        return found

    def _fill(self, found: Sample, part: slice, counts: Matrix) -> None:
        values, last = found.values[part], self._blocks[-1]
        finite = np.stack([counts[:, b.start : b.start + b.cells].sum(axis=1) for b in self._blocks], axis=1)
        # Of what lies beside the cells, the repeated values, which come last, are among the finite ones.
        rows = finite + counts[:, self._beside[0::BESIDE]] + counts[:, self._beside[1::BESIDE]]
        found.finite[part], found.rows[part] = finite, rows
        each = 1.0 / _or_nan(finite)
        for j, b in enumerate(self._blocks):
            shares = counts[:, b.start : b.start + b.cells] * each[:, j : j + 1]
            values[:, b.first : b.last - BESIDE] = shares @ b.weights
        beside = counts[:, self._beside] / np.repeat(_or_nan(rows), BESIDE, axis=1)
        values[:, self._beside_values] = beside
        classes = counts[:, last.stop :]
        values[:, last.last : last.last + classes.shape[1]] = classes / _or_nan(rows[:, -1:])

    @cached_property
    def _beside(self) -> Indices:
        """(J * BESIDE,) the counters beside each column's cells."""
        return np.concatenate([np.arange(b.stop - BESIDE, b.stop) for b in self._blocks])

    @cached_property
    def _beside_values(self) -> Indices:
        return np.concatenate([np.arange(b.last - BESIDE, b.last) for b in self._blocks])

    def rows_behind(self, sample: Sample) -> Matrix:
        """(units, K) how many rows each value is a share of."""
        columns = np.minimum(self.owners, self.features)
        of_rows = np.isin(self.nature, (MISSING, NON_FINITE, REPEATED, CLASS, ACCURACY))
        return np.where(of_rows, sample.rows[:, columns], sample.finite[:, columns])

    def variance_of_a_row(self, values: Matrix) -> Matrix:
        """(…, K) the variance of one independent row, where its mean is ``values``: p (1 - p), or 1 for a score."""
        shares = np.clip(values, 0.0, 1.0)
        return np.where(self.cells < 0, 1.0, shares * (1.0 - shares))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """One column: its counters ``start`` to ``stop``, the first ``cells`` of which partition it, and its components
    ``first`` to ``last``: its cells' shares of the finite values times ``weights``, then the counters beside as shares
    of all rows.
    """

    start: int
    stop: int
    cells: int
    first: int
    last: int
    weights: Matrix


def components_of(info: ArtifactInfo) -> Components:
    """The components of ``info``'s layout, its scores taken from the training's shares."""
    spec = info.reference.spec
    total = info.reference.total.counts.astype(np.float64)
    categories = [feature.kind == "category" for feature in info.manifest.features] + [False]
    blocks, parts = [], []
    first = 0
    for j, column in enumerate(spec.columns):
        start, cells = int(spec.offsets[j]), column.cells
        if categories[j]:
            inner = np.eye(cells)
            found = [(j, UNSEEN if cell == 0 else SHAPE, cell) for cell in range(cells)]
        else:
            scores = _scores(total[start : start + cells])
            inner = np.column_stack([np.triu(np.ones((cells, cells)))[:, :-1], *scores])
            found = [(j, SHAPE, cell) for cell in range(cells - 1)] + [
                (j, SHAPE, LOCATION),
                (j, SHAPE, SCALE),
            ]
        found += [(j, nature, cells) for nature in (MISSING, NON_FINITE, REPEATED)]
        blocks.append(
            _Block(
                start=start,
                stop=start + cells + BESIDE,
                cells=cells,
                first=first,
                last=first + len(found),
                weights=inner,
            )
        )
        parts += found
        first += len(found)
    score = len(spec.columns) - 1
    parts += [(score + 1, CLASS, label) for label in range(spec.classes)]
    parts += [(score + 2, ACCURACY, 0)] if info.manifest.probabilities else []
    owners, nature, cell = np.array(parts, np.int64).T
    return Components(
        names=(*(f.name for f in spec.features), "score", "predicted class", "estimated accuracy"),
        features=len(spec.features),
        owners=owners,
        nature=nature,
        cells=cell,
        _blocks=tuple(blocks),
    )


def _scores(counts: Matrix) -> tuple[Matrix, Matrix]:
    """Location and scale scores of a column's cells: of mean 0 and variance 1 under the training's ``counts``."""
    total = counts.sum()
    shares = counts / total if total else np.full(counts.size, 1.0 / counts.size)
    ranks = np.clip(np.cumsum(shares) - shares / 2.0, _LEAST_RANK, 1.0 - _LEAST_RANK)
    location = _standardised(ndtri(ranks), shares)
    return location, _standardised(location * location, shares)


def _standardised(scores: Matrix, shares: Matrix) -> Matrix:
    centred = scores - float(shares @ scores)
    deviation = float(shares @ (centred * centred)) ** 0.5
    standard: Matrix = centred / deviation if deviation > 0 else np.zeros_like(centred)
    return standard
