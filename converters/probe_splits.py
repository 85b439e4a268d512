"""The splits of a pipeline's trees, each with a training row that bears witness to it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from converters import witness
from converters.lowering.folding import LARGEST_KEYS, key_of
from converters.lowering.graph import Ensemble
from converters.reference import Acceptance
from converters.table import Rows
from edge_runtime.contract.ranges import Limits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Splits:
    """All splits of all ensembles: column, key of the threshold, a training row that reaches it (-1: none).

    ``low`` and ``high`` are the keys of the ends of the column's range.
    """

    column: NDArray[np.int64]
    key: NDArray[np.int64]
    base: NDArray[np.int64]
    decisive: NDArray[np.bool_]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    largest: int

    def held(self, offset: int) -> NDArray[np.bool_]:
        """(S,) whether the value ``offset`` floats above the threshold lies inside the range.

        A split that sends all numbers one way can be tried in any range.
        """
        one_way = (self.key >= self.largest) | (self.key < -self.largest)
        return one_way | ((self.key + offset >= self.low) & (self.key + offset <= self.high))

    def open_to_infinity(self, takes: Acceptance) -> "Splits":
        """Those that send every finite number left, where a training row comes by and the column may hold ``inf``.

        Rows that are merely drawn seldom reach one of them, and only there does it matter on which side ``inf`` stands.
        """
        free = takes.infinite & (True if takes.limits is None else np.isposinf(takes.limits.high))
        return self.at((self.key >= self.largest) & (self.base >= 0) & free[self.column])

    def at(self, chosen: NDArray[np.bool_]) -> "Splits":
        """The ``chosen`` (S,) splits."""
        return Splits(
            column=self.column[chosen],
            key=self.key[chosen],
            base=self.base[chosen],
            decisive=self.decisive[chosen],
            low=self.low[chosen],
            high=self.high[chosen],
            largest=self.largest,
        )


def read(ensembles: list[Ensemble], rows: Rows, takes: Acceptance) -> Splits:
    """Those whose threshold lies inside its column's range: beside the others no row can stand."""
    parts = []
    for ensemble in ensembles:
        inner = np.flatnonzero(ensemble.left >= 0)
        base, decisive = witness.find(ensemble, rows, takes.missing)
        parts.append((ensemble.feature[inner], key_of(ensemble.threshold[inner]), base, decisive))
    low, high = _end_keys(takes.limits, rows.shape[1])
    none = np.zeros(0, np.int64)
    column, key, base, decisive = (
        (np.concatenate(each) for each in zip(*parts, strict=True))
        if parts
        else (none, none, none, none.astype(np.bool_))
    )
    found = Splits(
        column=column,
        key=key,
        base=base,
        decisive=decisive,
        low=low[column],
        high=high[column],
        largest=LARGEST_KEYS[rows.dtype.name],
    )
    return found.at(found.held(0))


def _end_keys(limits: Limits | None, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(F,) twice: the keys of the ends of each range, or the first and last key of all where there is no end."""
    least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    if limits is None:
        return np.full(width, least), np.full(width, most)
    low = np.where(np.isfinite(limits.low), key_of(limits.low), least)
    return low, np.where(np.isfinite(limits.high), key_of(limits.high), most)
