"""Shares of rows that are counted beside the profiles, against the devices' own past: right answers, refused rows.

The device is the unit. Rows of one look resemble each other, so a device's share strays further than independent rows
would: by the design effect that the past shows. What all devices do together from look to look takes its share off.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import special

from aggregator.core.components import Matrix
from aggregator.core.evidence import student, to_normal, without_strongest
from aggregator.core.past import capped, fleet_statistic
from aggregator.looks import Reading, Slice
from edge_runtime.contract.ids import DeviceId

Counted = Callable[[Reading], tuple[int, int]]
"""(rows, good ones among them) of a reading."""

FEWEST_ROWS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RateTest:
    """Shares are means over devices, ``half`` the half width of the present one's 95 % interval; ``p`` is that of a
    drop. ``rest`` is the drop without the few devices that dropped most.
    """

    before: float
    now: float
    half: float
    devices: int
    p: float
    rest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRate:
    """A device's share ``before`` and ``now``; ``p`` is that of so great a drop."""

    device: DeviceId
    before: float
    now: float
    p: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Counts:
    """(n,) rows and shares of good ones, of devices now and in their past."""

    devices: list[DeviceId]
    rows: Matrix
    now: Matrix
    past: Matrix
    before: Matrix

    @property
    def away(self) -> Matrix:
        found: Matrix = self.now - self.before
        return found

    def variances(self) -> Matrix:
        """Binomial variances of the deviations, good rows drawn a row towards a half."""
        shares = (self.before * self.rows + 0.5) / (self.rows + 1.0)
        found: Matrix = shares * (1.0 - shares) * (1.0 / self.rows + 1.0 / self.past)
        return found


class Rates:
    """Each device's share of good rows in known-good looks, and how it varied from look to look.

    Devices with fewer than ``least`` rows in all are not known.
    """

    def __init__(self, looks: Sequence[Slice], counted: Counted, *, least: int) -> None:
        self._counted = counted
        self._fewest = min(least, FEWEST_ROWS)
        totals: dict[DeviceId, list[int]] = {}
        for one in looks:
            for reading in one.readings:
                seen = totals.setdefault(reading.device, [0, 0])
                rows, good = counted(reading)
                seen[0] += rows
                seen[1] += good
        self._past = {d: (n, good / n) for d, (n, good) in totals.items() if n >= least}
        known = [counts for one in looks if (counts := self._counts(one.readings)).devices]
        self._effect, self._freedom = self._design_effect(known)
        self._common = self._shared(known)

    @property
    def known(self) -> Mapping[DeviceId, tuple[int, float]]:
        """(rows, share of good ones) of each device with enough of them."""
        return self._past

    def judged(self, readings: Sequence[Reading]) -> int:
        """How many of the devices are known and have rows enough now."""
        return len(self._counts(readings).devices)

    def _counts(self, readings: Sequence[Reading]) -> _Counts:
        devices, found = [], []
        for reading in readings:
            past = self._past.get(reading.device)
            if past is not None:
                rows, good = self._counted(reading)
                if rows >= self._fewest:
                    devices.append(reading.device)
                    found.append((rows, good / rows, *past))
        table = np.array(found, np.float64).reshape(-1, 4).T
        return _Counts(devices=devices, rows=table[0], now=table[1], past=table[2], before=table[3])

    def _design_effect(self, known: Sequence[_Counts]) -> tuple[float, float]:
        """The effect, and how many readings beyond the devices' means have shown it."""
        if not known:
            return 1.0, 1.0
        ratios = np.concatenate([counts.away**2 / counts.variances() for counts in known])
        return max(1.0, float(ratios.mean())), max(1.0, float(ratios.size - len(self._past)))

    def _scores(self, counts: _Counts) -> Matrix:
        """Deviations in units of their noise."""
        found: Matrix = counts.away / np.sqrt(self._effect * counts.variances())
        return found

    def _shared(self, known: Sequence[_Counts]) -> float:
        found = [
            float(fleet_statistic(capped(self._scores(counts))[:, None])[0]) ** 2
            for counts in known
            if len(counts.devices) > 2
        ]
        return max(1.0, float(np.mean(found))) if found else 1.0

    def test(self, readings: Sequence[Reading], few_share: float) -> RateTest | None:
        """Whether the share dropped against the devices' own past; None without two devices that are known."""
        counts = self._counts(readings)
        n = len(counts.devices)
        if n < 2:
            return None
        statistic = fleet_statistic(capped(self._scores(counts))[:, None]) / math.sqrt(self._common)
        z = float(to_normal(statistic, max(1.0, n - 1.0))[0])
        half = student(n - 1, 0.025) * float(counts.now.std(ddof=1)) / math.sqrt(n)
        return RateTest(
            before=float(counts.before.mean()),
            now=float(counts.now.mean()),
            half=half,
            devices=n,
            p=float(special.ndtr(z)),
            rest=float(without_strongest(-counts.away, few_share).mean()),
        )

    def each(self, readings: Sequence[Reading]) -> tuple[DeviceRate, ...]:
        """Every known device against its own past."""
        counts = self._counts(readings)
        p = special.stdtr(self._freedom, self._scores(counts))
        return tuple(
            DeviceRate(device=device, before=float(a), now=float(b), p=float(q))
            for device, a, b, q in zip(counts.devices, counts.before, counts.now, p, strict=True)
        )
