"""What one gets from the raw rows themselves, all devices pooled: the tests that need what no device sends.

Each statistic compares one column of one window with the reference rows. Thresholds come from drift-free runs of the
same scenario (`threshold`), so that these tests alarm as rarely as they should, which at their textbook levels they
do not. Missing values are left out, as the tests' definitions have it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.simulators.stream_rows import Values, answer
from tests.simulators.streams import Fleet

REFERENCE_ROWS: Final = 20_000
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """All devices' rows together, (K, n) each: the features asked for, then the score.

    ``training`` are the training units' rows, ``history`` the devices' own before window 0, thinned.
    """

    training: Values
    history: Values
    windows: tuple[Values, ...]


def pooled(fleet: Fleet, columns: Sequence[int], *, start: int = 0) -> Pooled:
    """The rows of all windows from ``start`` on, and what they are compared with."""
    chosen = list(columns)
    parts: list[list[Values]] = [[] for _ in range(start, fleet.windows)]
    past: list[Values] = [np.empty((len(chosen) + 1, 0), np.float32)]
    total = sum(fleet.rows_of(i) for i in range(fleet.devices)) * fleet.reference_windows
    step = max(1, total // REFERENCE_ROWS)
    for device in range(fleet.devices):
        for stretch in fleet.stream(device):
            values = np.concatenate([stretch.values[chosen], _score(stretch.values)])
            for i in range(values.shape[1]):
                window = stretch.first + i
                if window >= start:
                    parts[window - start].append(values[:, i])
                elif window < 0:
                    past.append(values[:, i, ::step])
    training = [np.concatenate([rows.T[chosen], _score(rows.T)]) for rows, _ in fleet.training]
    return Pooled(
        training=np.concatenate(training, axis=1),
        history=np.concatenate(past, axis=1),
        windows=tuple(np.concatenate(part, axis=1) for part in parts),
    )


def _score(values: Values) -> Values:
    return np.asarray(answer(values)[1].max(axis=-1)[None])


def kolmogorov_smirnov(reference: Values, window: Values) -> float:
    """The largest difference of the two distribution functions; both arguments (n,) sorted."""
    n, m = len(window), len(reference)
    at = np.arange(n + 1) / n
    above = at[1:] - reference.searchsorted(window, "right") / m
    below = reference.searchsorted(window, "left") / m - at[:-1]
    return float(max(above.max(), below.max()))


def wasserstein(reference: Values, window: Values) -> float:
    """The mean distance of equal quantiles, in standard deviations of the reference; both arguments (n,) sorted."""
    at = (np.arange(len(window)) + 0.5) / len(window)
    quantiles = np.interp(at * len(reference) - 0.5, np.arange(len(reference)), reference)
    spread = float(reference.std())
    return float(np.abs(window - quantiles).mean()) / spread if spread else 0.0


def anderson_darling(reference: Values, window: Values) -> float:
    """A² of the window under the reference's distribution function, over its rows; both arguments (n,) sorted.

    T. W. Anderson and D. A. Darling, A Test of Goodness of Fit, 1954.
    """
    n = len(window)
    low, high = reference.searchsorted(window, "left"), reference.searchsorted(window, "right")
    under = ((low + high) / 2 + 0.5) / (len(reference) + 1)
    weights = 2 * np.arange(1, n + 1) - 1
    return float(-1 - (weights * (np.log(under) + np.log1p(-under[::-1]))).sum() / n**2)


TESTS: Final[Mapping[str, Callable[[Values, Values], float]]] = {
    "KS": kolmogorov_smirnov,
    "Wasserstein": wasserstein,
    "Anderson-Darling": anderson_darling,
}


def statistics(reference: Values, windows: Sequence[Values]) -> dict[str, Numbers]:
    """``(windows, K)`` of each test; 0 where a window has no value."""
    references = [np.sort(column[np.isfinite(column)]) for column in reference]
    found = {name: np.zeros((len(windows), len(references))) for name in TESTS}
    for w, window in enumerate(windows):
        for j, before in enumerate(references):
            values = np.sort(window[j][np.isfinite(window[j])])
            if values.size:
                for name, test in TESTS.items():
                    found[name][w, j] = test(before, values)
    return found


def threshold(maxima: Sequence[float], level: float) -> float:
    """What a run's largest statistic passes in a share of at most ``level`` of the drift-free runs.

    As in a permutation test: with n runs it is the largest but floor(level (n + 1)) - 1; the largest of all with
    too few runs for the level.
    """
    ordered = sorted(maxima, reverse=True)
    return ordered[max(0, int(level * (len(ordered) + 1)) - 1)]
