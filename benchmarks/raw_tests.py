"""What one gets from the raw rows themselves, all devices pooled: the tests that need what no device sends.

Each statistic compares one column of one window with the reference rows. Thresholds come from drift-free runs of the
same scenario (`threshold`), so that these tests alarm as rarely as they should, which at their textbook levels they
do not. Missing values are left out, as the tests' definitions have it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.simulators.stream_rows import Stretch, Values, answer
from tests.simulators.streams import Fleet

REFERENCE_ROWS: Final = 20_000
TESTS: Final = ("KS", "Wasserstein", "Anderson-Darling")
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """All devices' rows together, (K, n) each: the features asked for, then the score.

    ``training`` are the training units' rows, ``history`` the devices' own before window 0, thinned.
    """

    training: Values
    history: Values
    windows: tuple[Values, ...]


class Pool:
    """Takes the rows of ``columns`` and the score from the stretches that pass, of windows from ``start`` on."""

    def __init__(self, fleet: Fleet, columns: Sequence[int], *, start: int = 0) -> None:
        self._fleet = fleet
        self._columns = list(columns)
        self._start = start
        self._windows: list[list[Values]] = [[] for _ in range(start, fleet.windows)]
        self._past: list[Values] = [np.empty((len(self._columns) + 1, 0), np.float32)]
        total = sum(fleet.rows_of(i) for i in range(fleet.devices)) * fleet.reference_windows
        self._step = max(1, total // REFERENCE_ROWS)

    def take(self, stretch: Stretch) -> None:
        """The rows of one stretch of one device."""
        for i in range(stretch.values.shape[1]):
            window = stretch.first + i
            if window >= self._start:
                self._windows[window - self._start].append(self._rows(stretch.values[:, i]))
            elif window < 0:
                self._past.append(self._rows(stretch.values[:, i, :: self._step]))

    def _rows(self, values: Values) -> Values:
        score: Values = answer(values)[1].max(axis=-1)[None]
        return np.concatenate([values[self._columns], score])

    @property
    def pooled(self) -> Pooled:
        """What was taken, beside the training's rows."""
        training = [self._rows(rows.T) for rows, _ in self._fleet.training]
        return Pooled(
            training=np.concatenate(training, axis=1),
            history=np.concatenate(self._past, axis=1),
            windows=tuple(np.concatenate(part, axis=1) for part in self._windows),
        )


class Before:
    """One column's reference: ``values`` (m,) sorted, and what many windows need of it."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self._spread = float(values.std(dtype=np.float64))
        halves = np.arange(2 * len(values) + 1) / 2
        # Of the distribution function, at each half rank.
        self._logs = np.log((halves + 0.5) / (len(values) + 1))
        self._quantiles: dict[int, Numbers] = {}

    def compare(self, window: Values) -> tuple[float, float, float]:
        """The statistics of `TESTS` for values (n,) that are sorted.

        Kolmogorov-Smirnov: the largest difference of the two distribution functions. Wasserstein: the mean distance of
        equal quantiles, in standard deviations of the reference. Anderson-Darling: A² of the window under the
        reference's distribution function, over its rows (T. W. Anderson and D. A. Darling, A Test of Goodness of Fit,
        1954).
        """
        m, n = len(self._values), len(window)
        low, high = self._ranks(window)
        steps = np.arange(n + 1)
        ks = max((steps[1:] / n - high / m).max(), (low / m - steps[:-1] / n).max())
        both = low + high
        weights = 2 * steps[1:] - 1
        squared = -1 - weights @ (self._logs[both] + self._logs[2 * m - both[::-1]]) / n**2
        return float(ks), self._wasserstein(window), float(squared)

    def _ranks(self, window: Values) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many of the reference are below each value, and how many are not above it."""
        m, n = len(self._values), len(window)
        order = np.concatenate([self._values, window]).argsort(kind="stable")  # merges two runs, ours first
        high = np.flatnonzero(order >= m) - np.arange(n)
        low = high.copy()
        tied = np.flatnonzero(self._values[np.maximum(high, 1) - 1] == window)
        low[tied] = self._values.searchsorted(window[tied], "left")
        return low, high

    def _wasserstein(self, window: Values) -> float:
        m, n = len(self._values), len(window)
        if n not in self._quantiles:
            at = (np.arange(n) + 0.5) / n
            self._quantiles[n] = np.interp(at * m - 0.5, np.arange(m), self._values)
        return float(np.abs(window - self._quantiles[n]).mean()) / self._spread if self._spread else 0.0


def statistics(reference: Values, windows: Sequence[Values]) -> dict[str, Numbers]:
    """``(windows, K)`` of each test; 0 where a window has no value."""
    found = np.zeros((len(TESTS), len(windows), len(reference)))
    for j, column in enumerate(reference):
        before = Before(np.sort(column[np.isfinite(column)]))
        for w, window in enumerate(windows):
            values = np.sort(window[j][np.isfinite(window[j])])
            if values.size:
                found[:, w, j] = before.compare(values)
    return dict(zip(TESTS, found, strict=True))


def threshold(maxima: Sequence[float], level: float) -> float:
    """What a run's largest statistic passes in a share of at most ``level`` of the drift-free runs.

    As in a permutation test: with n runs it is the largest but floor(level (n + 1)) - 1; the largest of all with
    too few runs for the level.
    """
    ordered = sorted(maxima, reverse=True)
    return ordered[max(0, int(level * (len(ordered) + 1)) - 1)]
