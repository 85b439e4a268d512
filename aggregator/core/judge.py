"""Has the world moved in a way that matters, and where? The judge of one artifact's looks, one after the other.

The unit is the device, never the row. Six kinds:

- ``drift``: the inputs of the fleet against the devices' own past; ``quality`` where the faults among them moved
  (missing, infinite, repeated values, unseen categories); ``prediction`` and ``performance`` the same for the outputs
  and the accuracy, known or estimated.
- ``sensor``: one or a few devices against what the rest of the fleet does.
- ``skew``: devices against the training's groups, where no known-good past was given.

How: `past` (what a device usually does), `evidence` and `own_past` (against it), `skew` (against other units), `truth`
(known answers), `book` (what looks in a row mean).

Error budget: without drift the probability of any alarm in the looks that the judge was made for is at most
``DriftConfig.alpha`` for what is judged against the past, shared out over looks, kinds and cohorts (Bonferroni), and
``DriftConfig.skew_alpha`` a look for skew, where looks are not independent: groups and devices stay the same units.
"""

import math
from collections import deque
from collections.abc import KeysView, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from aggregator.config import DriftConfig
from aggregator.core import cohorts
from aggregator.core.accuracy import estimate
from aggregator.core.book import FLEET_KINDS, Book
from aggregator.core.cohorts import FLEET
from aggregator.core.components import components_of
from aggregator.core.familiar import Reader, Shares
from aggregator.core.findings import EFFECTS, is_broken
from aggregator.core.firsts import FirstLooks
from aggregator.core.newcomers import Arms, newcomer_findings
from aggregator.core.own_past import (
    REFUSED_SHARE,
    SENSOR_SHARE,
    TRUTH_SHARE,
    Cohort,
    DeviceFindings,
    Terms,
    device_findings,
    fleet_findings,
)
from aggregator.core.past import DAY_SECONDS, Deviations, Past
from aggregator.core.skew import Newcomers, Shared, skew_findings, some_of
from aggregator.core.truth import Tallies, nothing_lost
from aggregator.looks import Alarm, Familiar, Finding, Look, Reading, Slice, Trace, Wish, merge
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import ArtifactInfo

PERSISTS: Final = 2
"""A better model is asked for when the inputs have moved in so many looks in a row."""
BROAD: Final = 0.6
"""Where devices are judged one by one, this share of them makes a movement of all."""
MOST_BLOCK_LOOKS: Final = 24


class Judge:
    """Judges looks at one artifact, in order.

    ``looks`` is how many looks the error budget is to last for (`DriftConfig.budget_looks` when 0). ``history`` are
    known-good looks of the same devices; without it the first `DriftConfig.baseline_looks` looks of a device are its
    past, and devices are held against the training from look ``settle`` on: `DriftConfig.baseline_looks` where one look
    need not cover what devices do in a cycle. ``block_looks`` are then compared together; 0 means as many as a day has.
    ``remembered``, ``traces`` and ``suspects`` are `Judge.first_looks`, `Book.traces` and the last `Look.suspects` of
    another judge, which this one goes on from.
    """

    def __init__(  # noqa: PLR0913 (what is known, what is remembered, how to judge: all but two may be left out)
        self,
        info: ArtifactInfo,
        config: DriftConfig,
        *,
        looks: int = 0,
        history: Sequence[Slice] = (),
        attributes: Mapping[DeviceId, Mapping[str, str]] | None = None,
        settle: int | None = None,
        block_looks: int = 0,
        remembered: Sequence[Slice] = (),
        traces: Sequence[Trace] = (),
        suspects: Mapping[str, Sequence[DeviceId]] | None = None,
    ) -> None:
        self._config = config
        self.attributes: Mapping[DeviceId, Mapping[str, str]] = attributes or {}
        self._terms = Terms(info, components_of(info), config, looks or config.budget_looks)
        self._reader = Reader(info.reference.spec)
        self._given = bool(history)
        self._settle = config.baseline_looks if settle is None else settle
        self._block_looks = block_looks
        self._book = Book(config, traces)
        self._closed: list[Alarm] = []
        self._wishes: list[Wish] = []
        self._notes: dict[str, str] = {}
        owners = self._terms.components.names
        self._beyond: Mapping[int, frozenset[DeviceId]] = {
            owners.index(name): frozenset(devices) for name, devices in (suspects or {}).items()
        }
        self._recent: deque[Slice] = deque(maxlen=MOST_BLOCK_LOOKS)
        self._history = list(history)
        self._first = FirstLooks(config.baseline_looks)
        self._past: Past | None = None
        self._tallies: Tallies | None = None
        self._judged = self._few = 0
        self._fewest = config.min_devices
        self._alone = False
        reference = info.reference
        self._training = self._reader.shares([p for _, p in reference.groups if p.rows] or [reference.total])
        self._usual = self._training
        if history:
            self._learn()
        for one in remembered:
            self._remember(one)

    # ── what is asked of a judge ───────────────────────────────────────────────────────────────────────

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """Every incident so far, by the look that opened it."""
        found = [*self._closed, *self._book.open]
        return tuple(
            sorted(found, key=lambda alarm: (alarm.opened_window, alarm.cohort, alarm.feature or ""))
        )

    @property
    def wishes(self) -> tuple[Wish, ...]:
        """The requests for a better model so far: at most one for a cohort."""
        return tuple(self._wishes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be judged, and why."""
        few = [_few(self._fewest, self._config.min_devices, self._few, self._judged)] if self._few else []
        return (*few, *self._notes.values())

    @property
    def book(self) -> Book:
        """The incidents."""
        return self._book

    @property
    def first_looks(self) -> tuple[Slice, ...]:
        """The looks that are the devices' past, as far as none was given."""
        return () if self._given else tuple(self._history)

    def look(self, one: Slice) -> Look:
        """Judges ``one``, the look after the last."""
        layout = self._terms.info.manifest.layout
        readings = tuple(
            r
            for r in one.readings
            if r.profile.layout == layout and (r.profile.rows or r.refused or r.labelled)
        )
        if not readings:
            return Look(index=one.index, figures={}, suspects=self._suspects())
        whole, one = replace(one, readings=readings), replace(one, readings=_with_rows(readings))
        figures: Mapping[str, Familiar] = {}
        level = self._config.alpha / self._terms.looks
        findings = self._tallies.findings(whole, self._members(whole), level) if self._tallies else []
        if one.readings:
            self._recent.append(one)
            fleet = self._reader.shares([r.profile for r in one.readings])
            figures = self._figures(self._usual if self._given else self._training, fleet)
            against = figures if self._given else self._figures(self._usual, fleet)
            findings += self._find(one, against)
        opened, closed = self._book.advance(one.index, findings)
        self._closed += closed
        wish = self._wish(whole, findings)
        self._remember(one)
        return Look(
            index=one.index,
            devices=len(readings),
            rows=sum(r.profile.rows for r in readings),
            figures=figures,
            estimate=estimate(readings),
            findings=tuple(findings),
            opened=opened,
            closed=closed,
            wish=wish,
            suspects=self._suspects(),
        )

    def _suspects(self) -> dict[str, tuple[DeviceId, ...]]:
        names = self._terms.components.names
        return {names[owner]: tuple(sorted(devices)) for owner, devices in self._beyond.items() if devices}

    def _figures(self, reference: Shares, now: Shares) -> Mapping[str, Familiar]:
        *inputs, score = self._reader.read(reference, now)
        names = (feature.name for feature in self._terms.info.manifest.features)
        found = dict(zip(names, inputs, strict=True))
        found.setdefault("score", score)
        return found

    # ── the past ───────────────────────────────────────────────────────────────────────────────────────

    def _learn(self) -> None:
        """Learns from the looks at devices whose past is whole."""
        looks = []
        for one in self._history:
            readings = tuple(r for r in one.readings if self._first.whole(r.device))
            if readings:
                looks.append(replace(one, readings=readings))
        try:
            self._past = Past(self._terms.components, looks)
        except ValueError as e:
            self._notes["past"] = f"no device's own past is known: {e}"
            return
        self._notes.pop("past", None)
        self._tallies = Tallies(self._terms, looks)
        self._usual = self._reader.shares([r.profile for one in looks for r in _with_rows(one.readings)])

    def _remember(self, one: Slice) -> None:
        """A device without a past gets one from its first looks; it is not judged against it before they are over."""
        fresh = tuple(r for r in one.readings if self._first.wants(r, self._past))
        if not fresh:
            return
        self._history.append(replace(one, readings=fresh))
        if self._first.add(fresh, self._past):
            self._learn()
        if self._past is None:
            seen, need = self._first.most, self._config.baseline_looks
            self._notes["past"] = (
                f"look {seen} of the {need} that make the devices' own past: no drift can be seen yet"
            )
        else:
            self._notes.pop("past", None)

    def _has_past(self, device: DeviceId) -> bool:
        return self._past is not None and device in self._past

    def _mature(self, deviations: Deviations) -> list[int]:
        """The devices whose past is whole: all that came with the history, others after their first looks."""
        return [i for i, device in enumerate(deviations.devices) if self._first.whole(device)]

    # ── findings ───────────────────────────────────────────────────────────────────────────────────────

    def _find(self, one: Slice, figures: Mapping[str, Familiar]) -> list[Finding]:
        members = self._members(one)
        found = self._against_past(one, members, figures)
        if not self._given and one.index >= self._settle:
            found += self._against_training(one, members)
            found += self._against_others(one, members)
        return found

    def _members(self, one: Slice) -> Mapping[str, Sequence[DeviceId]]:
        return cohorts.split([r.device for r in one.readings], self.attributes, self._config.attributes)

    def _against_past(
        self, one: Slice, members: Mapping[str, Sequence[DeviceId]], figures: Mapping[str, Familiar]
    ) -> list[Finding]:
        past = self._past
        deviations = past.deviations(one.readings) if past is not None else None
        if past is None or deviations is None:
            return []
        mature = self._mature(deviations)
        if not mature:
            return []
        level = self._config.alpha / self._terms.looks
        fleet = len(mature) >= self._config.min_devices
        share = SENSOR_SHARE if fleet else 1.0 - TRUTH_SHARE - REFUSED_SHARE
        single: DeviceFindings = device_findings(
            self._terms, past, deviations, mature, self._beyond, level=level * share, against_fleet=fleet
        )
        self._beyond = single.beyond
        self._judged += 1
        self._alone = not fleet
        if not fleet:
            self._few += 1
            self._fewest = min(self._fewest, len(mature))
            return list(single.findings)
        found = list(single.findings)
        for cohort, devices in members.items():
            inside = set(devices)
            chosen = np.array([i for i in mature if deviations.devices[i] in inside], np.int64)
            if len(chosen) >= self._config.min_devices:
                found += fleet_findings(
                    self._terms,
                    past,
                    deviations,
                    Cohort(name=cohort, chosen=chosen, level=level / len(members), seed=one.index),
                    figures=figures,
                    beyond=single.beyond,
                    truth_known=self._tallies is not None and self._tallies.judges(devices),
                )
        return found

    def _against_training(self, one: Slice, members: Mapping[str, Sequence[DeviceId]]) -> list[Finding]:
        found = []
        looks = self._block_looks or _looks_a_day(one)
        for cohort, devices in members.items():
            block = _pooled(list(self._recent)[-looks:], set(devices))
            if not block:
                continue
            figures = [
                self._figures(self._training, self._reader.shares([reading.profile for reading in part]))
                for part in (block.values(), [r for r in one.readings if r.device in block])
            ]
            none = np.zeros(self._terms.components.size)
            shared = Shared(variance=none, freedom=none + np.inf)
            if self._past is not None:
                shared = Shared(variance=self._past.shared_variance(len(block)), freedom=self._past.freedom)
            who = Newcomers(
                cohort=cohort,
                devices={device: reading.profile for device, reading in block.items()},
                level=self._config.skew_alpha / len(members),
                seed=one.index,
            )
            findings, note = skew_findings(self._terms, who, shared, *figures)
            found += findings
            self._notes.pop(f"skew {cohort}", None)
            if note:
                self._notes[f"skew {cohort}"] = note
        return found

    def _against_others(self, one: Slice, members: Mapping[str, Sequence[DeviceId]]) -> list[Finding]:
        """Devices that came later than others, and have no past of their own yet.

        Those with an open incident of what they answer stay among them: the past they have by then began with it.
        """
        open_effects = [alarm for alarm in self._book.open if alarm.kind in EFFECTS]
        concerned = {device for alarm in open_effects for device in alarm.devices}
        if all(self._has_past(r.device) and r.device not in concerned for r in one.readings):
            return []
        since: dict[DeviceId, int] = {}
        for past in self._history:
            for reading in past.readings:
                since.setdefault(reading.device, past.index)
        found: list[Finding] = []
        told: list[KeysView[DeviceId]] = []
        for cohort, devices in reversed(
            list(members.items())
        ):  # the fleet last: newcomers of one cohort are named once
            inside = set(devices)
            named = {d for alarm in open_effects if alarm.cohort == cohort for d in alarm.devices}
            fresh = {
                r.device: r
                for r in one.readings
                if r.device in inside
                and since.get(r.device, one.index) > 0
                and (not self._has_past(r.device) or r.device in named)
            }
            first = min((since.get(device, one.index) for device in fresh), default=0)
            earlier = {device for device, index in since.items() if index < first}
            others = _pooled(self._history, set(some_of(earlier, self._config.max_devices)))
            if others and not (cohort == FLEET and fresh.keys() in told):
                told.append(fresh.keys())
                level = self._config.skew_alpha / len(members)
                arms = Arms(
                    cohort=cohort,
                    newcomers=fresh,
                    others=others,
                    level=level,
                    seed=one.index,
                    worse=not named.isdisjoint(fresh),
                )
                found += newcomer_findings(self._terms, arms)
        return found

    # ── a better model ─────────────────────────────────────────────────────────────────────────────────

    def _wish(self, one: Slice, findings: Sequence[Finding]) -> Wish | None:
        """Wished for as long as the inputs of a cohort keep moving and its predictions or its accuracy have moved.

        Values that are missing or repeated make no better model.
        Where the truth is known, and says that nothing was lost, what is predicted may move as it will.
        """
        for cohort in sorted({alarm.cohort for alarm in self._book.open}):
            found = self._book.persisting(cohort, FLEET_KINDS, PERSISTS)
            moving = tuple(alarm for alarm in found if not is_broken(alarm))
            floor = self._config.accuracy_floor
            effects = [
                alarm
                for alarm in self._book.open
                if alarm.cohort == cohort
                and alarm.kind in EFFECTS
                and not (alarm.kind == "prediction" and nothing_lost(findings, alarm.devices, floor))
            ]
            if self._alone:
                moving, effects = self._broad(moving, one), list(self._broad(effects, one))
            if moving and effects:
                why = "; ".join([moving[0].why, *(alarm.why for alarm in effects)])
                wish = Wish(window=one.index, cohort=cohort, why=why)
                if all(cohort != before.cohort for before in self._wishes):
                    self._wishes.append(wish)
                return wish
        return None

    def _broad(self, alarms: Sequence[Alarm], one: Slice) -> tuple[Alarm, ...]:
        """Those that concern so many of the devices that it is not a matter of one."""
        return tuple(alarm for alarm in alarms if len(alarm.devices) >= BROAD * len(one.readings))


def _few(have: int, need: int, few: int, looks: int) -> str:
    devices = "1 device" if have == 1 else f"{have} devices"
    if few < looks:
        what = f"{few} of {looks} looks had fewer than {need} devices with a past, at the least {have}: there"
    else:
        what = f"{devices} with a past: a fleet verdict needs {need}, so"
    return f"{what} each is judged against its own past alone, and a broken sensor cannot be told from a changed world"


def _with_rows(readings: Sequence[Reading]) -> tuple[Reading, ...]:
    return tuple(r for r in readings if r.profile.rows)


def _looks_a_day(one: Slice) -> int:
    seconds = max(1e-9, float(np.median([r.end_ns - r.start_ns for r in one.readings])) / 1e9)
    return max(1, min(MOST_BLOCK_LOOKS, math.ceil(DAY_SECONDS / seconds)))


def _pooled(looks: Sequence[Slice], devices: set[DeviceId]) -> dict[DeviceId, Reading]:
    found: dict[DeviceId, list[Reading]] = {}
    for one in looks:
        for reading in one.readings:
            if reading.device in devices:
                found.setdefault(reading.device, []).append(reading)
    return {device: merge(parts) for device, parts in found.items()}
