"""What stands after a look, for people: a verdict for each cohort and kind; and incidents that nobody can clear."""

from collections.abc import Iterable, Sequence
from typing import Final

from aggregator.core.cohorts import FLEET
from aggregator.looks import Alarm, Finding, Look, Trace, Verdict
from aggregator.records import DeviceRecord
from edge_runtime.contract.ids import Digest, ModelName

KINDS: Final = ("skew", "drift", "sensor", "quality", "prediction", "performance")
STABLE: Final = "stable"
WARNING: Final = "warning"
DRIFTED: Final = "drifted"
INSUFFICIENT: Final = "insufficient"
TOLD: Final = 3
"""A verdict's reason tells of so many columns; the incidents tell of the others."""


def verdicts(
    model: ModelName,
    digest: Digest,
    look: Look,
    open_alarms: Iterable[Alarm],
    notes: Iterable[str],
    *,
    left_out: tuple[tuple[str, str], ...],
    at_ns: int,
) -> tuple[Verdict, ...]:
    """A verdict for every cohort and kind that the look judged or that has an open incident.

    A column that moved, but not for long enough to open an incident, is a warning.
    """
    alarms: dict[tuple[str, str], list[Alarm]] = {}
    for alarm in open_alarms:
        alarms.setdefault((alarm.cohort, alarm.kind), []).append(alarm)
    found: dict[tuple[str, str], list[Finding]] = {}
    for finding in look.findings:
        found.setdefault((finding.cohort, finding.kind), []).append(finding)
    texts = tuple(notes)
    result = []
    for cohort, kind in sorted(alarms.keys() | found.keys(), key=_order):
        findings = found.get((cohort, kind), [])
        moved = [f for f in findings if f.moved]
        mine = alarms.get((cohort, kind), [])
        if mine:
            outcome, reason = DRIFTED, _told([alarm.why for alarm in mine])
        elif moved:
            outcome, reason = WARNING, _told([f.why for f in sorted(moved, key=lambda f: f.p)])
        else:
            calm = min(findings, key=lambda f: f.p)
            outcome, reason = STABLE, f"nothing moved in {calm.judged} devices"
        result.append(
            Verdict(
                kind=kind,
                model=model,
                digest=digest,
                cohort=cohort,
                at_ns=at_ns,
                outcome=outcome,
                reason=reason,
                p=min((f.p for f in findings), default=1.0),
                look=look.index,
                judged=max((f.judged for f in findings), default=0),
                moved=tuple(dict.fromkeys([*(a.feature or a.kind for a in mine), *(f.key for f in moved)])),
                devices=tuple(
                    sorted(
                        {d for alarm in mine for d in alarm.devices} | {d for f in moved for d in f.devices}
                    )
                ),
                left_out=left_out,
            )
        )
    if not any(v.kind == "skew" and v.cohort == FLEET for v in result) and texts:
        result.append(
            Verdict(
                kind="skew",
                model=model,
                digest=digest,
                cohort=FLEET,
                at_ns=at_ns,
                outcome=INSUFFICIENT,
                reason="; ".join(texts),
                look=look.index,
                left_out=left_out,
            )
        )
    return tuple(result)


def _told(reasons: Sequence[str]) -> str:
    shown = "; ".join(reasons[:TOLD])
    return shown if len(reasons) <= TOLD else f"{shown}; and {len(reasons) - TOLD} more"


def _order(key: tuple[str, str]) -> tuple[bool, str, int]:
    cohort, kind = key
    return cohort != FLEET, cohort, KINDS.index(kind)


def retired(
    digest: Digest, model: ModelName, traces: Iterable[Trace], devices: Iterable[DeviceRecord]
) -> tuple[Trace, ...]:
    """Traces with an open incident whose artifact no online device of the cohort serves any more, while some serve
    another one of the same model: the fleet has moved on, and no look will ever clear them.
    """
    online = [record for record in devices if record.online]
    found = []
    for trace in traces:
        if trace.alarm is not None:
            serving = _serving(trace.cohort, model, online)
            if serving and digest not in serving:
                found.append(trace)
    return tuple(found)


def _serving(cohort: str, model: ModelName, online: Iterable[DeviceRecord]) -> set[Digest]:
    name, _, value = cohort.partition("=")
    found = set()
    for record in online:
        report = record.report(model)
        if report and report.serving and (not value or record.attribute(name) == value):
            found.add(report.serving)
    return found
