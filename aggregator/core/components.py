"""Profiles as vectors: what the tests compare, one number per component, each linear in the counts.

Of a numeric column: its distribution function at every edge, then its location and its scale as scores. Those are
normal scores of the cells, van der Waerden's, so that a shift that moves every edge a little is seen at once (J.
Hájek and Z. Šidák, Theory of Rank Tests, 1967). Of a column of categories: the share of every cell. Of both, the
shares of missing, non-finite and repeated values. Of the outputs: the score as a numeric column, the share of each
class, and the mean of the largest probability, which estimates the share of right answers where probabilities are
calibrated.

Shares are without bias whatever the number of rows, so that a long past and a short window can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
        units = len(counts)
        values = np.empty((units, self.size))
        all_finite, all_rows = np.empty((units, len(self._blocks))), np.empty((units, len(self._blocks)))
        with np.errstate(invalid="ignore", divide="ignore"):
            for j, block in enumerate(self._blocks):
                mine = counts[:, block.start : block.stop].astype(np.float64)
                finite = mine[:, : block.cells].sum(axis=1)
                rows = finite + mine[:, block.cells] + mine[:, block.cells + 1]
                all_finite[:, j], all_rows[:, j] = finite, rows
                mine[:, : block.cells] /= np.where(finite > 0, finite, np.nan)[:, None]
                mine[:, block.cells :] /= np.where(rows > 0, rows, np.nan)[:, None]
                values[:, block.first : block.last - BESIDE] = mine[:, : block.cells] @ block.weights
                values[:, block.last - BESIDE : block.last] = mine[:, block.cells :]
            at = self._blocks[-1].last
            of = np.where(all_rows[:, -1:] > 0, all_rows[:, -1:], np.nan)
            classes = counts[:, self._blocks[-1].stop :]
            values[:, at : at + classes.shape[1]] = classes / of
            if self.estimates:
                values[:, -1:] = sums[:, :1] / FIXED_POINT / of
        return Sample(values=values, finite=all_finite, rows=all_rows)

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
    of     all rows.
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
