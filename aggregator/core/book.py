"""What looks in a row mean: one incident per (cohort, column), from the look that opens it to the one that closes it.

A finding that is proof enough opens at once; another has to come back in the looks after, as often as
`DriftConfig.confirmations` says. An incident ends after `DriftConfig.clear_confirmations` looks in a row in which the
column looks as it always did, a threshold of its own, so that it does not flap. A look that could not judge changes
nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from aggregator.config import DriftConfig
from aggregator.core.findings import EFFECTS, is_broken, some
from aggregator.looks import Alarm, Finding, Trace

FLEET_KINDS: Final = ("skew", "drift", "quality")
_RANK: Final = {"performance": 0, "prediction": 1, "quality": 2, "drift": 3, "skew": 4, "sensor": 5}


class Book:
    """All incidents of one artifact. `advance` is the only way to change them."""

    def __init__(self, config: DriftConfig, traces: Iterable[Trace] = ()) -> None:
        self._config = config
        self._traces = {(trace.cohort, trace.key): trace for trace in traces}

    @property
    def traces(self) -> tuple[Trace, ...]:
        """What to keep, so that another book goes on where this one is."""
        return tuple(self._traces[key] for key in sorted(self._traces))

    @property
    def open(self) -> tuple[Alarm, ...]:
        """The open incidents."""
        return tuple(trace.alarm for trace in self.traces if trace.alarm is not None)

    def advance(self, index: int, findings: Sequence[Finding]) -> tuple[tuple[Alarm, ...], tuple[Alarm, ...]]:
        """(opened, closed) by the findings of look ``index``; the open alarms are brought up to date."""
        best: dict[tuple[str, str], Finding] = {}
        for finding in findings:
            key = (finding.cohort, finding.key)
            if key not in best or _weight(finding) < _weight(best[key]):
                best[key] = finding
        opened, closed = [], []
        for key, finding in sorted(best.items()):
            before = self._traces.get(key, Trace(cohort=finding.cohort, key=finding.key))
            after = self._next(index, before, finding)
            if before.alarm is None and after.alarm is not None:
                opened.append(key)
            if before.alarm is not None and after.alarm is None:
                closed.append(replace(before.alarm, closed_window=index))
            self._traces[key] = after
        self._escalate()
        found = [self._traces[key].alarm for key in opened]
        return tuple(alarm for alarm in found if alarm is not None), tuple(closed)

    def _next(self, index: int, before: Trace, finding: Finding) -> Trace:
        if finding.moved:
            alarm = before.alarm
            # What a few sensors do is proof at once, and says nothing of how long the fleet has moved.
            streak = 0 if finding.kind == "sensor" else before.streak + 1
            proven = finding.at_once or streak >= self._config.confirmations
            if alarm is not None:
                if alarm.kind == finding.kind:
                    alarm = _renewed(alarm, finding)
                elif alarm.kind == "sensor" and proven:  # it was the first of many
                    alarm = replace(_told_now(alarm, finding), kind=finding.kind, devices=finding.devices)
            elif proven:
                alarm = Alarm(
                    kind=finding.kind,
                    feature=finding.feature,
                    cohort=finding.cohort,
                    opened_window=index,
                    closed_window=None,
                    devices=finding.devices,
                    severity="page" if finding.grave else "ticket",
                    why=finding.why,
                    evidence=finding.evidence,
                )
            return replace(before, streak=streak, clear=0, alarm=alarm)
        clear = before.clear + 1 if finding.clear and before.alarm is not None else 0
        if clear >= self._config.clear_confirmations:
            return replace(before, streak=0, clear=0, alarm=None)
        return replace(before, streak=0, clear=clear)

    def _escalate(self) -> None:
        """What moves the answers is worth waking somebody for."""
        moved = {alarm.cohort for alarm in self.open if alarm.kind in EFFECTS}
        for key, trace in self._traces.items():
            alarm = trace.alarm
            if (
                alarm is not None
                and alarm.kind in FLEET_KINDS
                and alarm.cohort in moved
                and alarm.severity != "page"
            ):
                self._traces[key] = replace(trace, alarm=replace(alarm, severity="page"))

    def retire(self, trace: Trace) -> None:
        """Ends an incident that no look will ever clear."""
        self._traces[trace.cohort, trace.key] = Trace(cohort=trace.cohort, key=trace.key)

    def persisting(self, cohort: str, kinds: Sequence[str], looks: int) -> tuple[Alarm, ...]:
        """The cohort's open alarms of these kinds whose column moved in the last ``looks`` looks, and moves now."""
        return tuple(
            trace.alarm
            for trace in self.traces
            if trace.alarm is not None
            and trace.cohort == cohort
            and trace.alarm.kind in kinds
            and trace.streak >= looks
        )


def _renewed(alarm: Alarm, finding: Finding) -> Alarm:
    """The open incident with what a look says of it now, as of one that is still of the same kind.

    Whom a movement of the answers concerns stays what it was when it opened: newcomers are judged by it.
    """
    if finding.one_by_one:
        earlier = [device for device in alarm.devices if device not in finding.devices]
        also = f"; earlier {some(earlier)}" if earlier else ""
        found = replace(_told_now(alarm, finding), devices=tuple(sorted({*alarm.devices, *finding.devices})))
        found = replace(found, why=finding.why + also)
    elif finding.kind in EFFECTS:
        return alarm
    else:
        found = replace(_told_now(alarm, finding), devices=finding.devices)
    # Whether a better model could help stays what it was, too.
    return found if is_broken(found) == is_broken(alarm) else replace(alarm, devices=found.devices)


def _told_now(alarm: Alarm, finding: Finding) -> Alarm:
    severity = "page" if finding.grave else alarm.severity
    return replace(alarm, severity=severity, why=finding.why, evidence=finding.evidence)


def _weight(finding: Finding) -> tuple[bool, int, float]:
    return not finding.moved, _RANK[finding.kind], finding.p
