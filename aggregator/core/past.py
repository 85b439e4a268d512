"""What is known of devices whose world had not moved: each one's usual values, their noise, and the hours of the day.

A device is compared with itself. From known-good looks the past learns, per device and component, the mean (of pooled
counts, so that nothing is weighed twice), how far one look strays from it, and what all devices do together: the cycle
of the day and of the week, as harmonics, where the looks cover one and leaving a look out says that it predicts
(W. S. Cleveland and S. J. Devlin, "Calendar effects in monthly time series", JASA 1982, fit such regressors).

What the fleet does together beyond that is not evidence that the world has moved, because it did so when all was well:
`Past.common` is by how much the fleet's mean strays more from look to look than its devices' own noise explains, and
`Past.freedom` how many looks say so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aggregator.core.components import LOCATION, SHAPE, Components, Matrix, stretches
from aggregator.looks import Reading, Slice
from edge_runtime.contract.ids import DeviceId

DAY_SECONDS: Final = 86_400.0
WEEK_SECONDS: Final = 7.0 * DAY_SECONDS
HARMONICS: Final = (1, 2, 4)
BETTER: Final = 0.8
"""A cycle is believed when, leaving out one look, it leaves at most this share of the variance unexplained."""
COVERED: Final = 0.8
PRIOR_LOOKS: Final = 4.0
"""How many looks a common value is worth where a single one has been seen in few."""
COLUMN_LOOKS: Final = 12.0
"""How many looks of one component are worth what all components of its column say of the noise."""
VOTE: Final = 3.0
"""No device's deviation counts for more than this many times its noise."""
DENSITY: Final = 0.4
"""The normal density's largest value: so much of a standard deviation a distribution function moves by."""
FEWEST_LOOKS: Final = 3
LEAST_VARIANCE: Final = 1e-18
MOST_FOLLOWING: Final = 0.9


@dataclass(frozen=True, kw_only=True, eq=False)
class Deviations:
    """How far devices are from their own past now.

    ``devices`` are those that have one. ``away`` (n, K) is the difference, NaN where there is nothing to compare;
    ``variance`` (n, K) what it has while nothing moves; ``usual`` (n, K) what was expected; ``grain`` (n, columns) is
    what one row is worth.
    """

    devices: tuple[DeviceId, ...]
    away: Matrix
    variance: Matrix
    usual: Matrix
    grain: Matrix

    @cached_property
    def votes(self) -> Matrix:
        """(n, K) deviations in units of noise, none larger than `VOTE`; 0 where there is nothing to compare."""
        found = np.empty_like(self.away)
        for part in stretches(*found.shape):
            found[part] = capped(self.away[part] / np.sqrt(self.variance[part]))
        return found


def capped(deviations: Matrix) -> Matrix:
    """Deviations in units of noise as votes; the array is used up."""
    found: Matrix = np.clip(deviations, -VOTE, VOTE, out=deviations)
    if np.isnan(found.sum()):
        found = np.where(np.isnan(found), 0.0, found)
    return found


def fleet_statistic(votes: Matrix) -> Matrix:
    """(K,) Student's t of the mean vote, its standard deviation taken as at least 1: the noise is known to be that."""
    n = len(votes)
    mean = votes.mean(axis=0)
    variance = (np.einsum("ij,ij->j", votes, votes) - n * mean * mean) / max(1, n - 1)
    found: Matrix = mean * math.sqrt(n) / np.sqrt(np.maximum(variance, 1.0))
    return found


def harmonics(seconds: Matrix, order: tuple[int, int]) -> Matrix:
    """(n, p) cosines and sines of the first harmonics of the day and of the week."""
    columns = []
    for period, many in zip((DAY_SECONDS, WEEK_SECONDS), order, strict=True):
        for k in range(1, many + 1):
            phase = 2.0 * math.pi * k * seconds / period
            columns += [np.cos(phase), np.sin(phase)]
    return np.stack(columns, axis=1) if columns else np.empty((len(seconds), 0))


class Past:
    """What ``looks`` (oldest first) tell of the devices in them.

    Raises:
        ValueError: there are fewer than two looks.
    """

    def __init__(self, components: Components, looks: Sequence[Slice]) -> None:
        if len(looks) < 2:
            raise ValueError(f"a past of {len(looks)} looks says nothing about noise; two are needed")
        self.components = components
        found: dict[DeviceId, int] = {}
        for one in looks:
            for reading in one.readings:
                found[reading.device] = found.get(reading.device, 0) + 1
        self._at = {device: i for i, device in enumerate(sorted(d for d, n in found.items() if n > 1))}
        self._sum_up(looks)
        self._together = self._broad(looks)
        self.looks = len(self._together)
        span = max((one.end_ns for one in self._together), default=0) - min(
            (one.start_ns for one in self._together), default=0
        )
        self._day = span / 1e9 >= COVERED * DAY_SECONDS
        self._learn_cycle(self._together)
        self._learn_noise(looks)

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """The devices that have a past, sorted."""
        return tuple(self._at)

    def __contains__(self, device: object) -> bool:
        """Whether a device has a past."""
        return device in self._at

    def _known(self, one: Slice) -> tuple[list[Reading], NDArray[np.int64]]:
        readings = [r for r in one.readings if r.device in self._at and r.profile.rows]
        return readings, np.array([self._at[r.device] for r in readings], np.int64)

    def _broad(self, looks: Sequence[Slice]) -> list[Slice]:
        """The looks that say what all do together: those of at least half as many devices as any look has.

        Devices that came later have looks of their own.
        """
        counts = [sum(r.device in self._at for r in one.readings) for one in looks]
        return [one for one, n in zip(looks, counts, strict=True) if n and 2 * n >= max(counts)]

    def _sum_up(self, looks: Sequence[Slice]) -> None:
        n = len(self._at)
        self._windows = np.zeros(n)
        self._rows = np.zeros(n)
        sums: NDArray[np.int64] | None = None
        counts: NDArray[np.int64] | None = None
        for one in looks:
            readings, at = self._known(one)
            for reading, i in zip(readings, at, strict=True):
                profile = reading.profile
                if counts is None or sums is None:
                    counts = np.zeros((n, profile.counts.size), np.int64)
                    sums = np.zeros((n, profile.sums.size), np.int64)
                counts[i] += profile.counts
                sums[i] += profile.sums
                self._windows[i] += 1
                self._rows[i] += profile.rows
        if counts is None or sums is None:
            raise ValueError("no device has two looks of the past")
        self._counts, self._sums = counts, sums
        self._mean = self.components.of_counts(counts, sums)

    def _without(self, readings: Sequence[Reading], at: NDArray[np.int64]) -> Matrix:
        """(n, K) the devices' means over all looks but the one of ``readings``."""
        counts = self._counts[at] - np.stack([r.profile.counts for r in readings])
        sums = self._sums[at] - np.stack([r.profile.sums for r in readings])
        return self.components.of_counts(counts, sums).values

    # ── what all devices do together ───────────────────────────────────────────────────────────────────

    def _learn_cycle(self, looks: Sequence[Slice]) -> None:
        self.order = (0, 0)
        self._cycle = np.zeros((0, self.components.size))
        rows, times, lengths = [], [], []
        for one in looks:
            readings, at = self._known(one)
            if readings:
                sample = self.components.sample([r.profile for r in readings])
                with np.errstate(invalid="ignore"):
                    away = sample.values - self._mean.values[at]
                known = ~np.isnan(away)
                rows.append(np.where(known, away, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1))
                times.append(float(np.mean([_middle(r) for r in readings])))
                lengths.append(float(np.median([r.end_ns - r.start_ns for r in readings])) / 1e9)
        means, seconds = np.stack(rows), np.array(times)
        known = ~np.isnan(self._mean.values)
        usual = np.where(known, self._mean.values, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        scale = np.sqrt(self.components.variance_of_a_row(usual) + 1e-9)
        means = means / scale
        best = _left_out(means, np.empty((len(means), 0)))
        for order in _orders(seconds, float(np.median(lengths))):
            design = harmonics(seconds, order)
            if design.shape[1] + 2 < len(means) and (left := _left_out(means, design)) < BETTER * best:
                best, self.order = left, order
        if self.order != (0, 0):
            design = np.column_stack([np.ones(len(means)), harmonics(seconds, self.order)])
            self._design_inverse = np.linalg.pinv(design)
            self._cycle = (self._design_inverse @ means)[1:] * scale

    def _expected(self, readings: Sequence[Reading]) -> Matrix:
        """(n, K), or (1, 1) zero: what the hour adds to the devices' means."""
        if self.order == (0, 0):
            return np.zeros((1, 1))
        return harmonics(np.array([_middle(r) for r in readings]), self.order) @ self._cycle

    # ── noise ──────────────────────────────────────────────────────────────────────────────────────────

    def _learn_noise(self, looks: Sequence[Slice]) -> None:
        components = self.components
        n, size = len(self._at), components.size
        squares, seen = np.zeros((n, size)), np.zeros((n, size))
        last, followed, products = np.full((n, size), np.nan), np.zeros(size), np.zeros(size)
        for one in looks:
            readings, at = self._known(one)
            if not readings:
                continue
            sample = components.sample([r.profile for r in readings])
            away = sample.values - self._without(readings, at) - self._expected(readings)
            # Leaving the look out makes its deviation larger by what the mean of the others lacks.
            others = np.maximum(self._windows[at] - 1.0, 1.0)
            shrink = (others / (others + 1.0))[:, None]
            known = ~np.isnan(away)
            squares[at] += np.where(known, away * away * shrink, 0.0)
            seen[at] += known
            pairs = known & ~np.isnan(last[at])
            products += np.where(pairs, away * last[at], 0.0).sum(axis=0)
            followed += np.where(pairs, away * away, 0.0).sum(axis=0)
            last[at] = away
        self._per_window = self._rows / np.maximum(self._windows, 1.0)
        expected = components.variance_of_a_row(
            _smoothed(self._mean.values, components.rows_behind(self._mean))
        )
        expected /= np.maximum(self._per_window, 1.0)[:, None]
        # Rows of a sensor follow each other: a window is worth fewer of them, by a factor that each column has.
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where((seen > 0) & (expected > 0), squares / np.maximum(seen, 1.0) / expected, np.nan)
        effects = np.ones((n, len(components.names)))
        for owner in range(len(components.names)):
            mine = ratio[:, components.owners == owner]
            known = ~np.isnan(mine)
            if known.any():
                common = max(1.0, float(mine[known].mean()))
                own = np.where(known, mine, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
                looks_seen = np.where(known.any(axis=1), self._windows, 0.0)
                effects[:, owner] = (PRIOR_LOOKS * common + looks_seen * own) / (PRIOR_LOOKS + looks_seen)
        self.design_effects = np.maximum(1.0, effects)
        effect = self.design_effects[:, components.owners]
        self._grain = self.design_effects / np.maximum(self._per_window, 1.0)[:, None]
        self._variance = (COLUMN_LOOKS * effect * expected + squares) / (COLUMN_LOOKS + seen)
        self.device_freedom = COLUMN_LOOKS + max(1.0, self.looks - 1.0)
        self.wander = self._wander(products, followed)
        self._learn_tails()
        self._learn_common(self._together)

    def _wander(self, products: Matrix, squares: Matrix) -> Matrix:
        """(K,) by how much a device's variance over a long time exceeds what its looks have shown.

        What strays from look to look in steps that follow each other goes further than so few looks can tell: by
        (1 + r) / (1 - r), r being the correlation of each look with the one before, of all devices' column as one. By
        the square of it where the looks are less than a day and know no cycle: what they saw of one may be its calmest
        hours.
        """
        owners, many = self.components.owners, len(self.components.names)
        one = np.bincount(owners, products, many) / np.maximum(np.bincount(owners, squares, many), 1e-300)
        follows = np.clip(one, 0.0, MOST_FOLLOWING)[owners]
        found: Matrix = (1.0 + follows) / (1.0 - follows)
        return found if self._day or self.order != (0, 0) else found * found

    def long_variance(self, variance: Matrix) -> Matrix:
        """(n, K) what devices' deviations vary by over a long time, where single looks vary by ``variance`` (n, K).

        Where less than a day is known, the tails of a column have hardly moved, but move with its middle: by its
        standard deviation times the density, `DENSITY` at most.
        """
        found: Matrix = variance * self.wander
        if self._tails.size:
            found[:, self._tails] += variance[:, self._middles] * self._carry
        return found

    def _learn_tails(self) -> None:
        components = self.components
        places = np.flatnonzero((components.cells == LOCATION) & (components.nature == SHAPE))
        middle = np.full(len(components.names), -1)
        middle[components.owners[places]] = places
        short = not self._day and self.order == (0, 0)
        shapes = (components.nature == SHAPE) & (middle[components.owners] >= 0) & (components.cells >= 0)
        self._tails = np.flatnonzero(shapes & (self.wander > 1.0) & short)
        self._middles = middle[components.owners[self._tails]]
        self._carry = DENSITY * DENSITY * (self.wander[self._tails] - 1.0)

    def _learn_common(self, looks: Sequence[Slice]) -> None:
        """How much more the fleet's statistic varies from look to look than its devices' noise explains."""
        components = self.components
        statistics = []
        # The cycle was fitted to these looks, which it is closer to than to those to come: their variance is (1 - h)
        # and (1 + h) times what it is about the true cycle, h being the terms a look.
        terms = 2.0 * sum(self.order)
        leverage = (self.looks + terms) / max(1.0, self.looks - 1.0 - terms)
        for one in looks:
            readings, at = self._known(one)
            if len(readings) > 2:
                sample = components.sample([r.profile for r in readings])
                away = sample.values - self._without(readings, at) - self._expected(readings)
                noise = np.sqrt(
                    self._variance[at] * (1.0 + 1.0 / np.maximum(self._windows[at] - 1.0, 1.0))[:, None]
                )
                statistics.append(fleet_statistic(capped(away / noise)))
        self.common = np.ones(components.size)
        self.freedom = np.full(components.size, np.inf)
        if len(statistics) < FEWEST_LOOKS:
            return
        found = np.stack(statistics)
        squares = found * found * leverage
        own = squares.mean(axis=0)
        inputs = range(components.features)
        by_owner = np.array(
            [
                float(squares[:, mine].mean()) if (mine := components.owners == owner).any() else 1.0
                for owner in range(len(components.names))
            ]
        )
        looks_seen = float(len(found))
        self.common = (PRIOR_LOOKS * by_owner[components.owners] + looks_seen * own) / (
            PRIOR_LOOKS + looks_seen
        )
        # Where most columns move together, so will one that has not shown it yet.
        self.common = np.maximum(self.common, max(1.0, float(np.median(by_owner[list(inputs)]))))
        worth = max(2.0, (looks_seen - 1.0) * _independent(found))
        extra = self.common - 1.0
        with np.errstate(divide="ignore"):
            self.freedom = np.where(extra > 0, worth * (self.common / np.maximum(extra, 1e-12)) ** 2, np.inf)

    def shared_variance(self, devices: int) -> Matrix:
        """(K,) the variance that the mean of so many devices has because of what they do together."""
        found: Matrix = (self.common - 1.0) * self._variance.mean(axis=0) / max(1, devices)
        return found

    # ── now ────────────────────────────────────────────────────────────────────────────────────────────

    def deviations(self, readings: Sequence[Reading]) -> Deviations | None:
        """How far the devices of ``readings`` that have a past are from it; None when none has."""
        known = [r for r in readings if r.device in self._at and r.profile.rows]
        if not known:
            return None
        at = np.array([self._at[r.device] for r in known], np.int64)
        whole = len(at) == len(self._at) and bool((np.diff(at) == 1).all())
        which = slice(None) if whole else at  # ten thousand devices need not be copied
        usual = self._mean.values[which]
        if self.order != (0, 0):
            usual = usual + self._expected(known)
        rows = np.array([float(r.profile.rows) for r in known])
        # A window of fewer rows is noisier; one of more is not believed to be calmer than the past has shown.
        fewer = np.maximum(1.0, self._per_window[which] / rows)
        factor = (fewer + 1.0 / np.maximum(self._windows[which], 1.0))[:, None]
        away, variance = self.components.sample([r.profile for r in known]).values, self._variance[which]
        noise = np.empty_like(away)
        for part in stretches(*away.shape):
            away[part] -= usual[part]
            np.maximum(variance[part] * factor[part], LEAST_VARIANCE, out=noise[part])
        return Deviations(
            devices=tuple(r.device for r in known),
            away=away,
            variance=noise,
            usual=usual,
            grain=self._grain[which] * fewer[:, None],
        )


def _middle(reading: Reading) -> float:
    return (reading.start_ns + reading.end_ns) / 2e9


def _orders(seconds: Matrix, length: float) -> list[tuple[int, int]]:
    """The cycles worth trying, fewest terms first: those that the looks cover, with harmonics that they resolve."""
    found = []
    if length < DAY_SECONDS / 4.0 and _covers(seconds, DAY_SECONDS):
        found = [(many, 0) for many in HARMONICS]
        if _covers(seconds, WEEK_SECONDS) and np.ptp(seconds) >= 2.0 * WEEK_SECONDS:
            found += [(many, k) for many in HARMONICS for k in HARMONICS]
    elif (
        length < WEEK_SECONDS / 4.0
        and _covers(seconds, WEEK_SECONDS)
        and np.ptp(seconds) >= 2.0 * WEEK_SECONDS
    ):
        found = [(0, many) for many in HARMONICS]
    return found


def _covers(seconds: Matrix, period: float) -> bool:
    """Whether the looks lie all around the cycle: no gap of more than a fifth of it."""
    if np.ptp(seconds) < COVERED * period:
        return False
    phases = np.sort(seconds % period)
    gaps = np.diff(np.concatenate([phases, phases[:1] + period]))
    return bool(gaps.max() <= (1.0 - COVERED) * period)


def _left_out(values: Matrix, design: Matrix) -> float:
    """The mean square of what a fit with an intercept leaves of ``values`` (n, K) when the row itself is left out."""
    x = np.column_stack([np.ones(len(values)), design])
    hat = x @ np.linalg.pinv(x)
    left = values - hat @ values
    weight = np.maximum(1.0 - np.diag(hat), 0.05)[:, None]
    return float(np.mean((left / weight) ** 2))


def _smoothed(values: Matrix, rows: Matrix) -> Matrix:
    """Shares drawn a row towards a half, so that a cell nobody has hit yet still has some noise."""
    with np.errstate(invalid="ignore"):
        found: Matrix = np.nan_to_num((values * rows + 0.5) / (rows + 1.0), nan=0.5)
    return found


def _independent(statistics: Matrix) -> float:
    """The share of looks that are as good as independent, from the correlation of each with the next."""
    centred = statistics - statistics.mean(axis=0)
    total = float((centred * centred).sum())
    rho = float((centred[1:] * centred[:-1]).sum()) / total if total > 0 else 0.0
    return min(1.0, max(0.1, (1.0 - rho) / (1.0 + rho)))
