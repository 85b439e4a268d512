"""The ranges in which a model is proven and used: a row outside of them is refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edge_runtime.contract.manifest import Feature


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """The smallest and the largest value of each column, both allowed.

    ``low`` and ``high`` are (F,) of the rows' dtype, an infinity where there is no limit.
    """

    low: NDArray[np.floating]
    high: NDArray[np.floating]

    @classmethod
    def of(cls, features: Sequence[Feature], dtype: DTypeLike) -> Self | None:
        """The limits that ``features`` declare; None where there are none."""
        if not any(feature.ranged for feature in features):
            return None
        low = [-np.inf if feature.low is None else feature.low for feature in features]
        high = [np.inf if feature.high is None else feature.high for feature in features]
        return cls(np.array(low, dtype), np.array(high, dtype))

    @property
    def ranged(self) -> NDArray[np.bool_]:
        """(F,) which columns have a limit."""
        return np.asarray(np.isfinite(self.low) | np.isfinite(self.high))

    def outside(self, rows: NDArray[Any]) -> NDArray[np.bool_]:
        """(n, F) which values of ``rows`` (n, F) are too small or too large; a missing one (NaN) is neither."""
        return np.asarray((rows < self.low) | (rows > self.high))

    def text(self, column: int) -> str:
        """One column's range as an interval, in as few digits as its dtype needs."""
        low, high = self.low[column], self.high[column]
        start = f"[{low!s}" if np.isfinite(low) else "(-inf"
        return f"{start}, {high!s}]" if np.isfinite(high) else f"{start}, inf)"
