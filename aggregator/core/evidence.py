"""Tests against the devices' own past: of a fleet as one, with the device as the unit, and of single devices.

Fleet: each device has one vote per component, its deviation in units of its own noise, capped. Under no change a
device's present and its past can be swapped, which flips the sign of its votes; the largest studentised mean vote over
all components is held against those of such flips (max-T; P. H. Westfall and S. S. Young, Resampling-Based Multiple
Testing, 1993). Flips say how many independent tests the components are worth; beyond what flips can resolve the tail is
Student's. A common movement that the past has shown too takes its share off, with as few degrees of freedom as there
were looks that showed it.

Device: the deviation from what the fleet's median does now, in units of the device's noise, or of how far devices
stray from each other now where that is more. Counts of rare values come in bursts, so a row more has a weight too.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from aggregator.core.components import Components, Matrix, stretches
from aggregator.core.past import Deviations, Past, fleet_statistic

CHUNK_ELEMENTS: Final = 1 << 18
MEDIAN_DEVICES: Final = 400
"""A median over more devices than these is taken over the first so many of a fixed shuffle."""
_ANCHOR: Final = 0.05
_NORMAL: Final = 1e6
"""Student's distribution with so many degrees of freedom is the normal one."""
_LEAST_LOG: Final = -700.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FleetTest:
    """``z`` (K,) each component's standard normal score, signed; ``p`` (owners,) adjusted for all components tested.

    ``exact`` is False where p was bounded without flips, because it cannot be small.
    """

    z: Matrix
    p: Matrix
    worth: float
    exact: bool
    tested: int

    def independent(self, components: int) -> float:
        """How many independent tests so many of the components are worth."""
        return max(1.0, self.worth * components / max(1, self.tested))


def to_normal(statistic: Matrix, freedom: Matrix | float) -> Matrix:
    """Standard normal scores with the same tail probability as Student's ``statistic``."""
    with np.errstate(divide="ignore"):
        tail = np.log(special.stdtr(np.clip(freedom, 1.0, _NORMAL), -np.abs(statistic)))
    found: Matrix = -special.ndtri_exp(np.clip(tail, _LEAST_LOG, -math.log(2.0))) * np.sign(statistic)
    return found


def student(freedom: float, tail: float) -> float:
    """The value that Student's t passes with probability ``tail``."""
    return -float(special.stdtrit(min(freedom, _NORMAL), tail))


def without_strongest(values: Matrix, share: float) -> Matrix:
    """``values`` (n, …), sorted along the first axis, without the largest ``share`` of them: a quorum must be left."""
    left: Matrix = np.sort(values, axis=0)[: len(values) - math.ceil(share * len(values) - 1e-9)]
    return left


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """``samples`` random flips of at most ``limit`` devices."""

    samples: int
    limit: int
    seed: int


def test_fleet(
    deviations: Deviations,
    chosen: NDArray[np.int64],
    past: Past,
    components: Components,
    tested: NDArray[np.bool_],
    *,
    level: float,
    flips: Flips,
) -> FleetTest:
    """Tests the devices ``chosen`` (indices into ``deviations``) over the components ``tested`` (K,).

    ``flips`` are looked at only when p could reach ``level``.
    """
    votes = deviations.votes if len(chosen) == len(deviations.devices) else deviations.votes[chosen]
    n = len(votes)
    own = past.common * past.common * (n - 1.0)
    with np.errstate(divide="ignore"):
        freedom = 1.0 / (1.0 / own + 1.0 / past.freedom)
    z = np.where(tested, to_normal(fleet_statistic(votes) / np.sqrt(past.common), freedom), 0.0)
    owners = len(components.names)
    strongest = np.zeros(owners)
    np.maximum.at(strongest, components.owners, np.abs(z))
    tail = 2.0 * special.ndtr(-strongest)
    many = float(tested.sum())
    if float(tail.min()) > level:
        return FleetTest(z=z, p=np.minimum(1.0, many * tail), worth=many, exact=False, tested=int(many))
    samples = flips.samples
    some = votes[np.random.default_rng(flips.seed).permutation(n)[: flips.limit]][:, tested]
    largest = np.sort(to_normal(_flipped(some, samples, flips.seed), len(some) - 1.0))
    at = largest[max(0, math.ceil((1.0 - _ANCHOR) * samples) - 1)]
    worth = min(many, max(1.0, _ANCHOR / float(2.0 * special.ndtr(-at))))
    reached = samples - np.searchsorted(largest, strongest, side="left")
    drawn = (1.0 + reached) / (1.0 + samples)
    return FleetTest(
        z=z,
        p=np.where(reached >= 10, drawn, np.minimum(drawn, worth * tail)),
        worth=worth,
        exact=True,
        tested=int(many),
    )


def _flipped(votes: Matrix, samples: int, seed: int) -> Matrix:
    """(samples,) the largest statistic of the votes with random signs."""
    n, size = votes.shape
    rng = np.random.default_rng(seed)
    squares = np.einsum("ij,ij->j", votes, votes)
    step = max(1, CHUNK_ELEMENTS // max(1, size))
    found = np.empty(samples)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        signs = rng.integers(0, 2, size=(rows, n)).astype(np.float64) * 2.0 - 1.0
        means = signs @ votes / n
        variance = np.maximum((squares - n * means * means) / max(1, n - 1), 1.0)
        found[start : start + rows] = (np.abs(means) * math.sqrt(n) / np.sqrt(variance)).max(axis=1)
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceTest:
    """The ``hit`` (h,) devices that are past the threshold in any component, by index, in order.

    ``u`` (h, K) are their deviations from the reference in units of noise, 0 where there is nothing to compare;
    ``beyond`` (h, K) says which of these are past the threshold.
    """

    hit: NDArray[np.int64]
    u: Matrix
    beyond: NDArray[np.bool_]
    threshold: float


def test_devices(
    deviations: Deviations, past: Past, floors: Matrix, *, against_fleet: bool, level: float
) -> DeviceTest:
    """Tests every device; ``floors`` (K,) are the least deviations that matter, NaN where a component is not tested.

    ``level`` is for all devices and components together.
    """
    away, owners = deviations.away, past.components.owners
    middle, spread = np.zeros(away.shape[1]), np.zeros(away.shape[1])
    if against_fleet:
        some = away[np.random.default_rng(0).permutation(len(away))[:MEDIAN_DEVICES]]
        with np.errstate(invalid="ignore"):
            middle = np.nan_to_num(_median(some))
            spread = 1.4826 * np.nan_to_num(_median(np.abs(some - middle)))
    tested = ~np.isnan(floors)
    threshold = student(past.device_freedom, level / (2.0 * max(1, len(away) * int(tested.sum()))))
    hits, us, beyonds = [], [], []
    for part in stretches(*away.shape):
        gap = away[part] - middle
        variance = np.maximum(past.long_variance(deviations.variance[part]), spread * spread)
        grain = deviations.grain[part]
        variance += (grain * grain)[:, owners]
        squares = gap * gap
        with np.errstate(invalid="ignore"):
            far = np.flatnonzero((squares >= threshold * threshold * variance).any(axis=1))
            if not far.size:
                continue
            u = gap[far] / np.sqrt(variance[far])
            beyond = (np.abs(u) >= threshold) & (np.abs(gap[far]) >= floors)
        hits.append(far + part.start)
        us.append(np.where(np.isnan(u), 0.0, u))
        beyonds.append(beyond)
    size = away.shape[1]
    u = np.concatenate([np.empty((0, size)), *us])
    beyond = np.concatenate([np.empty((0, size), np.bool_), *beyonds])
    kept = beyond.any(axis=1)
    hit = np.concatenate([np.empty(0, np.int64), *hits])
    return DeviceTest(hit=hit[kept], u=u[kept], beyond=beyond[kept], threshold=threshold)


def _median(values: Matrix) -> Matrix:
    if np.isnan(values).any():
        known = np.where(np.isnan(values), np.inf, values)
        count = (~np.isnan(values)).sum(axis=0)
        found = np.take_along_axis(np.sort(known, axis=0), np.maximum(count - 1, 0)[None, :] // 2, axis=0)[0]
        return np.where(count > 0, found, np.nan)
    middle: Matrix = np.median(values, axis=0)
    return middle
