"""Findings against the devices' own past: of a cohort as one, of a few devices among many, of devices one by one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from aggregator.config import DriftConfig
from aggregator.core.cohorts import FLEET
from aggregator.core.components import ACCURACY, LOCATION, REPEATED, SCALE, SHAPE, Components, Matrix
from aggregator.core.evidence import DeviceTest, FleetTest, Flips, test_devices, test_fleet, without_strongest
from aggregator.core.findings import (
    EFFECTS,
    fault_as_evidence,
    figures_as_evidence,
    floors,
    key_of,
    kind_of,
    led_by,
    movement,
    probability,
)
from aggregator.core.past import Deviations, Past
from aggregator.core.speaking import loud, showing, speaker
from aggregator.looks import Familiar, Finding
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import ArtifactInfo

Indices = NDArray[np.int64]

INPUT_SHARE: Final = 0.4
OUTPUT_SHARE: Final = 0.2
TRUTH_SHARE: Final = 0.1
REFUSED_SHARE: Final = 0.05
SENSOR_SHARE: Final = 0.25
"""How the error budget of a look is shared out."""
BROADER: Final = 1.25
"""Of the few's greatest number, so many times may be beyond their thresholds before it is the fleet that moved: honest
devices among liars must not make them more than few."""
SURE: Final = 1.5
"""A device this far beyond its threshold is named at once, another when it comes back in the next look."""
REPEATS_VARY: Final = 0.2
"""By this share of p (1 - p) repeated values may vary where a share p of them is usual: categories, whole numbers."""
NEAR_STRONGEST: Final = 0.7
"""A component speaks for its column when its score is at least this share of the column's largest."""
FLIPS_SHARE: Final = 5
"""Flips only anchor the tail, so a fifth of the permutations that a p-value needs is enough."""


@dataclass(frozen=True)
class Terms:
    """What every finding on one artifact is held to."""

    info: ArtifactInfo
    components: Components
    config: DriftConfig
    looks: int

    @cached_property
    def _common_repeats(self) -> Matrix:
        """(K,) what is added to the floors of repeated values: where they are common they are no fault, and vary."""
        usual = np.nan_to_num(self.components.sample([self.info.reference.total]).values[0])
        varying: Matrix = REPEATS_VARY * usual * (1.0 - usual)
        return np.where(self.components.nature == REPEATED, varying, 0.0)

    @cached_property
    def floors(self) -> Matrix:
        """(K,) the least movement of a fleet that matters."""
        c = self.config
        return self._common_repeats + floors(
            self.components,
            shape=c.cdf_floor,
            fault=c.fault_floor,
            prediction=c.prediction_floor,
            accuracy=c.accuracy_floor,
        )

    @cached_property
    def sensor_floors(self) -> Matrix:
        """(K,) the least movement of one device that matters."""
        c = self.config
        return self._common_repeats + floors(
            self.components,
            shape=c.sensor_floor,
            fault=max(c.fault_floor, c.sensor_floor / 2.0),
            prediction=c.prediction_floor,
            accuracy=c.accuracy_floor,
        )

    def few(self, devices: int) -> float:
        """How many of ``devices`` are few enough to be a matter of sensors."""
        return BROADER * self.config.few_share * devices

    def of(self, owner: int) -> Indices:
        """The components of a column."""
        return np.flatnonzero(self.components.owners == owner)

    def feature(self, owner: int) -> str | None:
        """The column's name, None for an output."""
        return self.components.names[owner] if owner < self.components.features else None


# ── a cohort as one ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cohort:
    """The devices of ``name``: indices ``chosen`` of the deviations; ``level`` is the cohort's budget in this look."""

    name: str
    chosen: Indices
    level: float
    seed: int


def fleet_findings(
    terms: Terms,
    past: Past,
    deviations: Deviations,
    cohort: Cohort,
    *,
    figures: Mapping[str, Familiar],
    beyond: Mapping[int, frozenset[DeviceId]],
    truth_known: bool,
) -> list[Finding]:
    """One finding for every column; ``beyond`` names the devices that are beyond their own threshold, by column."""
    components, config, chosen = terms.components, terms.config, cohort.chosen
    flips = Flips(samples=config.samples // FLIPS_SHARE, limit=config.max_devices, seed=cohort.seed)
    tests = [
        test_fleet(
            deviations,
            chosen,
            past,
            components,
            tested,
            level=cohort.level * share,
            flips=flips,
        )
        for tested, share in ((components.inputs, INPUT_SHARE), (~components.inputs, OUTPUT_SHARE))
    ]
    which = slice(None) if len(chosen) == len(deviations.devices) else chosen  # all need not be copied
    away, usual = _mean(deviations.away[which]), _mean(deviations.usual[which])
    now = usual + away
    sure = _sure(tests[0], cohort.level * INPUT_SHARE) & (np.abs(away) >= terms.floors)
    found = []
    for owner, name in enumerate(components.names):
        if (mine := terms.of(owner)).size:
            outputs = owner >= components.features
            psi = figures[name].psi if name in figures and not outputs else 0.0
            at, large = _speaker(terms, tests[outputs], owner, away, psi)
            told = speaker(components, mine, at, away[mine], sure[mine])
            kind = kind_of(components, told, own="drift")
            if kind == "performance" and truth_known:
                continue
            level = cohort.level * (OUTPUT_SHARE if outputs else INPUT_SHARE)
            p = float(tests[outputs].p[owner])
            moved = p <= level and large and not (kind == "performance" and away[at] > 0)
            sign = float(np.sign(tests[outputs].z[at]))
            once = level / tests[outputs].independent(mine.size)
            votes = deviations.votes[chosen, at] * sign
            rest = without_strongest(votes, config.few_share)
            moved = moved and _lingers(rest, float(past.common[at]), once)
            named = beyond.get(owner, frozenset())
            part = [d for i in chosen if (d := deviations.devices[i]) in named] if named else []
            devices = ()
            if moved:
                toward = _scores(deviations, chosen, told) * np.sign(tests[outputs].z[told])
                named_now = loud(votes) if outputs else showing(toward)
                devices = tuple(deviations.devices[i] for i in chosen[named_now])
            if not moved and len(part) > terms.few(len(chosen)):
                moved, p, devices = True, cohort.level * SENSOR_SHARE, tuple(part)
            words = movement(terms.info, components, told, usual, now)
            found.append(
                Finding(
                    kind=kind,
                    cohort=cohort.name,
                    key=key_of(kind, name),
                    feature=terms.feature(owner),
                    moved=moved,
                    clear=p > config.clear_p or not _lasts(terms, away, owner, psi),
                    at_once=True,
                    p=p,
                    devices=devices,
                    judged=len(chosen),
                    why=f"{words}, in {len(devices)} of {len(chosen)} devices ({probability(p)})",
                    evidence=(
                        ("p", p),
                        ("z", float(tests[outputs].z[told])),
                        ("from", float(usual[told])),
                        ("to", float(now[told])),
                        *fault_as_evidence(components, told),
                        *(figures_as_evidence(figures[name]) if name in figures else ()),
                    ),
                    grave=kind in EFFECTS,
                )
            )
    return found


def _mean(values: Matrix) -> Matrix:
    mean: Matrix = values.mean(axis=0)
    lacking = np.isnan(mean)
    if lacking.any():
        known = ~np.isnan(values[:, lacking])
        mean[lacking] = np.where(known, values[:, lacking], 0.0).sum(axis=0) / np.maximum(
            known.sum(axis=0), 1
        )
    return mean


def _sure(test: FleetTest, level: float) -> NDArray[np.bool_]:
    """(K,) whether a component moved surely by itself."""
    found: NDArray[np.bool_] = 2.0 * test.worth * special.ndtr(-np.abs(test.z)) <= level
    return found


def _scores(deviations: Deviations, chosen: Indices, at: int) -> Matrix:
    """The deviations in units of noise, as large as they are."""
    found: Matrix = deviations.away[chosen, at] / np.sqrt(deviations.variance[chosen, at])
    return found


def _speaker(terms: Terms, test: FleetTest, owner: int, away: Matrix, psi: float) -> tuple[int, bool]:
    """The component that says best what column ``owner`` did, and whether that is large enough to matter."""
    mine = terms.of(owner)
    z = np.abs(test.z[mine])
    matters = (z >= NEAR_STRONGEST * z.max()) & (np.abs(away[mine]) >= terms.floors[mine])
    if matters.any():
        return _plainest(terms.components, mine, np.where(matters, z, 0.0)), True
    return int(mine[z.argmax()]), psi >= terms.config.psi_floor


def _plainest(components: Components, mine: Indices, strength: Matrix) -> int:
    """The strongest component, or the column's location or scale where nearly as strong: they say most to people."""
    strongest = int(mine[strength.argmax()])
    if components.nature[strongest] == SHAPE:
        for score in (LOCATION, SCALE):
            place = np.flatnonzero(components.cells[mine] == score)
            if place.size and strength[place[0]] >= NEAR_STRONGEST * strength.max():
                return int(mine[place[0]])
    return strongest


def _lasts(terms: Terms, away: Matrix, owner: int, psi: float) -> bool:
    """Whether an open incident still matters: half of what opens one, so that it does not flap at the floor."""
    mine = terms.of(owner)
    return bool((np.abs(away[mine]) >= terms.floors[mine] / 2.0).any()) or psi >= terms.config.psi_floor / 2.0


def _lingers(rest: Matrix, common: float, level: float) -> bool:
    """Whether a movement is still there in the votes of the ``rest``, without the few devices that show it most.

    Had only these moved, the others' votes would add up to noise, whose size is known: they pass with probability
    ``level``. ``common`` is `Past.common`.
    """
    z = float(rest.sum()) / math.sqrt(len(rest) * common)
    return z >= -float(special.ndtri(level))


# ── devices ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFindings:
    """``findings`` on single devices, and ``beyond``: by column, all devices that are past their threshold."""

    findings: tuple[Finding, ...]
    beyond: Mapping[int, frozenset[DeviceId]]


def device_findings(
    terms: Terms,
    past: Past,
    deviations: Deviations,
    judged: Sequence[int],
    before: Mapping[int, frozenset[DeviceId]],
    *,
    level: float,
    against_fleet: bool,
) -> DeviceFindings:
    """Each device by itself, ``judged`` by index; ``before`` is what the look before found `DeviceFindings.beyond`.

    ``against_fleet`` takes off what the fleet's median does, and calls what is left ``sensor``, where few show it.
    Else nobody knows whether it is the sensor or the world, and the finding is called as a fleet's would be.
    """
    components = terms.components
    tested = (
        np.where(components.inputs, terms.sensor_floors, np.nan) if against_fleet else terms.sensor_floors
    )
    result = test_devices(deviations, past, tested, against_fleet=against_fleet, level=level)
    found, beyond = [], {}
    owners = components.features if against_fleet else len(components.names)
    for owner in range(owners):
        mine = terms.of(owner)
        if not mine.size:
            continue
        hits = _hits(components, deviations, result, judged, mine)
        beyond[owner] = frozenset(deviations.devices[hit.device] for hit in hits)
        again = before.get(owner, frozenset())
        sure = [
            hit
            for hit in hits
            if deviations.devices[hit.device] in again or abs(hit.u) >= SURE * result.threshold
        ]
        few = not against_fleet or len(hits) <= terms.few(len(judged))
        most = max(sure or hits, key=lambda hit: abs(hit.u), default=None)
        kind = kind_of(components, most.told if most else int(mine[0]), own="drift")
        why, evidence = _told(terms, deviations, result.threshold, sure, against_fleet=against_fleet)
        found.append(
            Finding(
                kind="sensor" if against_fleet else kind,
                cohort=FLEET,
                key=key_of(kind, components.names[owner]),
                feature=terms.feature(owner),
                moved=few and bool(sure),
                clear=not hits,
                at_once=True,
                p=level if sure else 1.0,
                devices=tuple(deviations.devices[hit.device] for hit in sure),
                one_by_one=True,
                judged=len(judged),
                grave=kind in EFFECTS,
                why=why,
                evidence=evidence,
            )
        )
    return DeviceFindings(findings=tuple(found), beyond=beyond)


@dataclass(frozen=True, slots=True)
class _Hit:
    """A device beyond its threshold, by index: how far its surest component is, which is told, and how far that is."""

    device: int
    u: float
    told: int
    told_u: float


def _hits(
    components: Components, deviations: Deviations, result: DeviceTest, judged: Sequence[int], mine: Indices
) -> list[_Hit]:
    found = []
    known = set(judged)
    for k in np.flatnonzero(result.beyond[:, mine].any(axis=1)).tolist():
        device = int(result.hit[k])
        if device in known:
            strength = np.where(result.beyond[k, mine], np.abs(result.u[k, mine]), 0.0)
            at = _plainest(components, mine, strength)
            if components.nature[at] != ACCURACY or deviations.away[device, at] < 0:
                told = speaker(components, mine, at, deviations.away[device, mine], result.beyond[k, mine])
                found.append(_Hit(device, float(result.u[k, at]), told, float(result.u[k, told])))
    return found


def _told(
    terms: Terms, deviations: Deviations, threshold: float, sure: Sequence[_Hit], *, against_fleet: bool
) -> tuple[str, tuple[tuple[str, float | str], ...]]:
    if not sure:
        return "", ()
    most = max(sure, key=lambda hit: abs(hit.u))
    device, at = deviations.devices[most.device], most.told
    usual = deviations.usual[most.device]
    now = usual + deviations.away[most.device]
    words = movement(terms.info, terms.components, at, usual, now)
    than = "from what the other devices do" if against_fleet else "from its own past"
    what = f"{words}, {abs(most.told_u):.0f} times its usual noise {than}"
    why = led_by(device, [deviations.devices[hit.device] for hit in sure], what)
    numbers = (
        ("u", most.told_u),
        ("threshold", threshold),
        ("from", float(usual[at])),
        ("to", float(now[at])),
    )
    return why, (*numbers, *fault_as_evidence(terms.components, at))
