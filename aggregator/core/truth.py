"""Findings from what is counted beside the profiles: known accuracy, and rows that the model refuses.

Rows whose right answer devices, or late labels, told give the accuracy. Rows that were answered with an error are in no
histogram: a sensor that died under a model which takes no missing values is seen here, and only here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from aggregator.core.cohorts import FLEET
from aggregator.core.findings import key_of, led_by, percent, probability
from aggregator.core.own_past import REFUSED_SHARE, TRUTH_SHARE, Terms
from aggregator.core.rates import Rates
from aggregator.looks import Finding, Reading, Slice
from edge_runtime.contract.ids import DeviceId

FEWEST_REFUSED: Final = 100
"""A device has a past of refused rows when so many rows, refused or not, are known of it."""
MOST: Final = 0.5
"""Where more than this share of the rows is refused it is worth waking somebody: nobody is answered."""
REFUSED: Final = "refused rows"


def right(reading: Reading) -> tuple[int, int]:
    """(labelled rows, right answers)."""
    return reading.labelled, reading.correct


def answered(reading: Reading) -> tuple[int, int]:
    """(rows, answered ones)."""
    rows = reading.profile.rows
    return rows + sum(n for _, n in reading.refused), rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measure:
    """What is counted: ``floor`` is the fleet's least drop that matters, ``own_floor`` that of a single device; a
    device among many is judged by itself ``always``, or only where they are too few for a fleet verdict.
    """

    kind: Literal["performance", "quality"]
    key: str
    rates: Rates
    share: float
    floor: float
    own_floor: float
    always: bool


class Tallies:
    """The devices' own past of what is counted beside the profiles, by their known-good ``looks``."""

    def __init__(self, terms: Terms, looks: Sequence[Slice]) -> None:
        config = terms.config
        self._terms = terms
        self._measures = (
            _Measure(
                kind="performance",
                key=key_of("performance", ""),
                rates=Rates(looks, right, least=config.min_labelled),
                share=TRUTH_SHARE,
                floor=config.accuracy_floor,
                own_floor=config.accuracy_floor,
                always=False,
            ),
            _Measure(
                kind="quality",
                key=REFUSED,
                rates=Rates(looks, answered, least=FEWEST_REFUSED),
                share=REFUSED_SHARE,
                floor=config.fault_floor,
                own_floor=max(config.fault_floor, config.sensor_floor / 2.0),
                always=True,
            ),
        )

    def judges(self, devices: Sequence[DeviceId]) -> bool:
        """Whether right answers are known of enough of ``devices`` to judge them as a whole, in this look or another:
        what is known needs no estimate, and a calm estimate must not end what known answers opened.
        """
        known = self._measures[0].rates.known
        return sum(device in known for device in devices) >= min(self._terms.config.min_devices, len(devices))

    def findings(self, one: Slice, members: Mapping[str, Sequence[DeviceId]], level: float) -> list[Finding]:
        """What one look says; ``level`` is its budget, `TRUTH_SHARE` and `REFUSED_SHARE` of which are used."""
        found = []
        least = self._terms.config.min_devices
        for measure in self._measures:
            rates, half = measure.rates, level * measure.share / 2.0
            known = rates.judged(one.readings)
            many = known >= least
            if known and (not many or measure.always):
                found.append(self._devices(measure, one, half, among_many=many))
            for cohort, devices in members.items():
                inside = set(devices)
                part = replace(one, readings=tuple(r for r in one.readings if r.device in inside))
                # Two that know are not the fleet, unless they are all there are.
                if rates.judged(part.readings) >= min(least, len(part.readings)):
                    found.append(self._fleet(measure, cohort, part, half / len(members)))
        return [finding for finding in found if finding is not None]

    def _fleet(self, measure: _Measure, cohort: str, one: Slice, level: float) -> Finding | None:
        """Whether the share of good rows dropped in the devices of ``one`` as a whole."""
        config = self._terms.config
        test = measure.rates.test(one.readings, config.few_share)
        if test is None:
            return None
        dropped = test.before - test.now >= measure.floor and test.rest >= measure.floor / 2.0
        words = _told(measure.kind, test.before, test.now, one.readings, half=test.half)
        return Finding(
            kind=measure.kind,
            cohort=cohort,
            key=measure.key,
            feature=None,
            moved=test.p <= level and dropped,
            clear=test.p > config.clear_p or not dropped,
            at_once=True,
            p=test.p,
            devices=tuple(sorted(r.device for r in one.readings if r.device in measure.rates.known)),
            judged=test.devices,
            why=f"{words}, over {test.devices} devices ({probability(test.p)})",
            evidence=(("p", test.p), ("from", test.before), ("to", test.now), ("half_width", test.half)),
            grave=measure.kind == "performance" or test.now < 1.0 - MOST,
        )

    def _devices(self, measure: _Measure, one: Slice, level: float, *, among_many: bool) -> Finding | None:
        """Devices whose own share dropped; what a few among many do is called ``sensor``, more are the fleet's."""
        each = measure.rates.each(one.readings)
        if not each:
            return None
        far = [r for r in each if r.p <= level / len(each) and r.before - r.now >= measure.own_floor]
        clear_p = self._terms.config.clear_p / len(each)
        doubtful = any(r.p <= clear_p and r.before - r.now >= measure.own_floor / 2.0 for r in each)
        worst = min(far or each, key=lambda r: r.p)
        names = tuple(sorted(r.device for r in far))
        words = _told(
            measure.kind, worst.before, worst.now, [r for r in one.readings if r.device == worst.device]
        )
        return Finding(
            kind="sensor" if among_many else measure.kind,
            cohort=FLEET,
            key=measure.key,
            feature=None,
            moved=bool(far) and not (among_many and len(far) > self._terms.few(len(each))),
            clear=not doubtful,
            at_once=True,
            p=min(1.0, worst.p * len(each)),
            devices=names,
            one_by_one=True,
            judged=len(each),
            why=led_by(worst.device, names, f"{words} ({probability(worst.p)})") if far else "",
            evidence=(("p", worst.p), ("from", worst.before), ("to", worst.now)),
            grave=measure.kind == "performance" or sum(r.now for r in each) < (1.0 - MOST) * len(each),
        )


def nothing_lost(findings: Sequence[Finding], devices: Sequence[DeviceId], floor: float) -> bool:
    """Whether the known accuracy of ``devices``, among others, dropped by less than ``floor``: 97.5 % confidence."""
    for finding in findings:
        evidence = dict(finding.evidence)
        if finding.key == key_of("performance", "") and "half_width" in evidence:
            least, lost = float(evidence["half_width"]), float(evidence["from"]) - float(evidence["to"])
            if not finding.moved and lost + least < floor and set(devices) <= set(finding.devices):
                return True
    return False


def _told(kind: str, before: float, now: float, readings: Sequence[Reading], *, half: float = 0.0) -> str:
    if kind == "performance":
        within = f" ± {half:.3f}" if half else ""
        return f"accuracy is {now:.3f}{within}, {before:.3f} before"
    reasons: Counter[str] = Counter()
    for reading in readings:
        reasons.update(dict(reading.refused))
    named = ", ".join(f"{reason} {rows}" for reason, rows in reasons.most_common())
    return f"the model refuses {percent(1.0 - now)} of rows, {percent(1.0 - before)} before ({named or 'none now'})"
