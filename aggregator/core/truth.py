"""Accuracy where the truth is known: rows whose right answer devices, or late labels, told."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from aggregator.core.components import Matrix
from aggregator.core.evidence import student, to_normal, without_strongest
from aggregator.core.findings import key_of, probability
from aggregator.core.own_past import Terms
from aggregator.core.past import capped, fleet_statistic
from aggregator.looks import Finding, Reading, Slice
from edge_runtime.contract.ids import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class TruthTest:
    """Accuracies are means over devices, ``half`` the half width of the present one's 95 % interval; ``p`` is that of a
    drop. ``rest`` is the drop without the few devices that dropped most.
    """

    before: float
    now: float
    half: float
    devices: int
    p: float
    rest: float


class Truth:
    """Each device's accuracy in known-good looks, and how it varied from look to look."""

    def __init__(self, looks: Sequence[Slice], *, least: int) -> None:
        self._least = least
        totals: dict[DeviceId, list[int]] = {}
        for one in looks:
            for reading in one.readings:
                seen = totals.setdefault(reading.device, [0, 0])
                seen[0] += reading.labelled
                seen[1] += reading.correct
        self._past = {d: (n, right / n) for d, (n, right) in totals.items() if n >= least}
        self._effect = self._design_effect(looks)
        self._common = self._shared(looks)

    @property
    def known(self) -> Mapping[DeviceId, tuple[int, float]]:
        """(labelled rows, accuracy) of each device with enough of them."""
        return self._past

    def _devices(self, one: Slice) -> list[Reading]:
        return [r for r in one.readings if r.device in self._past and r.labelled >= min(self._least, 10)]

    def _variances(self, readings: Sequence[Reading]) -> Matrix:
        """Binomial variances of readings against their past, right answers drawn a row towards a half."""
        shares = np.array(
            [(self._past[r.device][1] * r.labelled + 0.5) / (r.labelled + 1.0) for r in readings]
        )
        sizes = np.array([1.0 / r.labelled + 1.0 / self._past[r.device][0] for r in readings])
        found: Matrix = shares * (1.0 - shares) * sizes
        return found

    def _away(self, readings: Sequence[Reading]) -> Matrix:
        return np.array([r.correct / r.labelled - self._past[r.device][1] for r in readings])

    def _design_effect(self, looks: Sequence[Slice]) -> float:
        ratios = []
        for one in looks:
            readings = self._devices(one)
            if readings:
                ratios.append(self._away(readings) ** 2 / self._variances(readings))
        return max(1.0, float(np.concatenate(ratios).mean())) if ratios else 1.0

    def _votes(self, readings: Sequence[Reading]) -> Matrix:
        return capped(self._away(readings) / np.sqrt(self._effect * self._variances(readings)))

    def _shared(self, looks: Sequence[Slice]) -> float:
        found = []
        for one in looks:
            readings = self._devices(one)
            if len(readings) > 2:
                found.append(float(fleet_statistic(self._votes(readings)[:, None])[0]) ** 2)
        return max(1.0, float(np.mean(found))) if found else 1.0

    def test(self, one: Slice, few_share: float) -> TruthTest | None:
        """Whether accuracy dropped against the devices' own past; None without two devices whose truth is known."""
        readings = self._devices(one)
        if len(readings) < 2:
            return None
        now = np.array([r.correct / r.labelled for r in readings])
        before = np.array([self._past[r.device][1] for r in readings])
        statistic = fleet_statistic(self._votes(readings)[:, None]) / math.sqrt(self._common)
        n = len(readings)
        z = float(to_normal(statistic, max(1.0, n - 1.0))[0])
        half = student(n - 1, 0.025) * float(now.std(ddof=1)) / math.sqrt(n)
        return TruthTest(
            before=float(before.mean()),
            now=float(now.mean()),
            half=half,
            devices=n,
            p=float(special.ndtr(z)),
            rest=float(without_strongest(before - now, few_share).mean()),
        )


def performance_finding(terms: Terms, truth: Truth, cohort: str, one: Slice, level: float) -> Finding | None:
    """Whether the known accuracy of the devices in ``one`` dropped; None where too little truth is known."""
    test = truth.test(one, terms.config.few_share)
    if test is None:
        return None
    floor = terms.config.accuracy_floor
    dropped = test.before - test.now >= floor and test.rest >= floor / 2.0
    return Finding(
        kind="performance",
        cohort=cohort,
        key=key_of("performance", ""),
        feature=None,
        moved=test.p <= level and dropped,
        clear=test.p > terms.config.clear_p or not dropped,
        at_once=True,
        p=test.p,
        devices=tuple(sorted(r.device for r in one.readings if r.device in truth.known)),
        judged=test.devices,
        why=(
            f"accuracy is {test.now:.3f} ± {test.half:.3f} over {test.devices} devices, {test.before:.3f} before "
            f"({probability(test.p)})"
        ),
        evidence=(("p", test.p), ("from", test.before), ("to", test.now), ("half_width", test.half)),
        grave=True,
    )
