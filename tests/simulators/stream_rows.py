"""What simulated rows are made of: correlated noise, columns of many shapes, and the model that reads them."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.stats import norm

Values = NDArray[np.float32]

CATEGORIES: Final = ("c0", "c1", "c2", "c3", "c4")
LABELS: Final = ("no", "yes")
SHAPES: Final = ("binary", "integer", "constant", "heavy", "zeros", "category")
_WEIGHTS: Final = (1.2, -0.8)
_INTERACTION: Final = 1.5
_CUTS: Final = norm.ppf(np.cumsum([0.4, 0.3, 0.15, 0.1])).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Some windows of one unit: ``values`` (F, windows, rows), ``labels`` (windows, rows) of 0 and 1.

    ``first`` is the number of its first window; history has negative ones. ``seconds`` (windows, rows) count from
    the start of window 0. ``luck`` (windows, rows) in [0, 1) decides with the values on the labels.
    """

    first: int
    values: Values
    labels: NDArray[np.int64]
    seconds: NDArray[np.float64]
    luck: Values

    def settle(self) -> None:
        """Draws the labels that the values make likely."""
        self.labels[:] = self.luck < probability(self.values)


def probability(values: Values, sureness: float = 1.0) -> Values:
    """The model: the probability of ``yes`` for values (F, …); what is missing counts as 0.

    With a ``sureness`` above 1 it is surer than it is right: that many times the logit.
    """
    a, b, c, d = np.nan_to_num(values[:4], nan=0.0)
    logit = _WEIGHTS[0] * a + _WEIGHTS[1] * b + _INTERACTION * c * d
    found: Values = 1 / (1 + np.exp(-(np.float32(sureness) * logit).clip(-30, 30), dtype=np.float32))
    return found


def answer(values: Values, sureness: float = 1.0) -> tuple[NDArray[np.int64], Values]:
    """The model's labels (…) and scores (…, 2) for values (F, …); `probability` tells what ``sureness`` is."""
    yes = probability(values, sureness)
    return (yes > 0.5).astype(np.int64), np.stack([1 - yes, yes], axis=-1)


class Source:
    """Rows of unit variance that go on from one call to the next."""

    def __init__(self, rng: np.random.Generator, features: int, *, ar: float, factor: float) -> None:
        self._rng = rng
        self._ar = ar
        self._features = features
        self._blocks = -(-features // 5) if factor else 0
        self._factor = np.float32(factor)
        self._last = rng.standard_normal((self._blocks + features, 1), dtype=np.float32)

    def take(self, n: int) -> Values:
        """(F, n) of the next rows."""
        z: Values = self._rng.standard_normal((len(self._last), n), dtype=np.float32)
        if self._ar:
            gain = np.asarray([np.sqrt(1 - self._ar**2)], np.float32)
            back = np.asarray([1, -self._ar], np.float32)
            z, _ = lfilter(gain, back, z, axis=1, zi=-back[1] * self._last)
            self._last = z[:, -1:].copy()
        if not self._blocks:
            return z
        own: Values = z[self._blocks :] * np.sqrt(1 - self._factor)
        own += np.repeat(z[: self._blocks], 5, axis=0)[: self._features] * np.sqrt(self._factor)
        return own


def shaped(shape: str, values: Values) -> Values:
    """Values of another shape from plain ones."""
    found: NDArray[Any] = values
    match shape:
        case "binary":
            found = values > 1
        case "integer":
            found = np.rint(values * np.float32(1.5))
        case "constant":
            found = np.full_like(values, 3.0)
        case "heavy":
            found = np.exp(np.float32(1.5) * values)
        case "zeros":
            found = np.maximum(values - np.float32(0.5), 0)
        case "category":
            found = np.searchsorted(_CUTS, values)
    return found.astype(np.float32)
