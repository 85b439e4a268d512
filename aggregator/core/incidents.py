"""What looks in a row mean: warnings, incidents, and when they end.

A look that moved is a ``warning``; ``confirmations`` of them in a row open one incident per (artifact,
cohort, kind), with the columns inside, and the verdict is ``drifted`` until the incident closes. It closes
after ``clear_confirmations`` looks in a row whose p lies above ``clear_p``, a threshold of its own, so that
it does not flap. A look that could not judge changes nothing.

Error budget: without drift one look moves with probability of at most alpha (per kind), so an incident needs
an event of at most that probability, however the looks depend on each other; where looks are independent
given the devices it is alpha ** confirmations. L looks a year therefore open at most L * alpha incidents
falsely on average.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from aggregator.config import DriftConfig
from aggregator.core.drift import INSUFFICIENT, KINDS, MOVED, Findings, Look
from aggregator.records import DeviceRecord, Judgement, Trail, Verdict
from edge_runtime.contract.ids import DeviceId, Digest, ModelName

OPENED: Final = "opened"
CLOSED: Final = "closed"


def advance(
    before: Trail | None, judgement: Judgement, config: DriftConfig
) -> tuple[str, int, int, bool, str]:
    """(outcome, streak, clear, incident, changed) after one more look."""
    streak = before.streak if before else 0
    clear = before.clear if before else 0
    incident = before.incident if before else False
    if judgement.outcome == INSUFFICIENT:
        return ("drifted" if incident else INSUFFICIENT), streak, clear, incident, ""
    if judgement.outcome == MOVED:
        streak, clear = streak + 1, 0
    else:
        streak = 0
        clear = clear + 1 if judgement.p > config.clear_p else 0
    if not incident and streak >= config.confirmations:
        return "drifted", streak, clear, True, OPENED
    if incident and clear >= config.clear_confirmations:
        return "stable", streak, clear, False, CLOSED
    if incident:
        return "drifted", streak, clear, True, ""
    return ("warning" if streak else "stable"), streak, clear, False, ""


def verdicts(
    model: ModelName,
    look: Look,
    findings: Findings,
    *,
    before: Mapping[tuple[str, str], Trail],
    left_out: tuple[tuple[DeviceId, str], ...],
    config: DriftConfig,
    now_ns: int,
) -> tuple[Verdict, ...]:
    """The verdicts after ``look``, given those before by (cohort, kind)."""
    found = []
    numbers = {block.device: (block.first, block.last) for block in look.blocks}
    for (cohort, kind), judgement in findings.judgements.items():
        devices = findings.devices[cohort]
        outcome, streak, clear, incident, changed = advance(before.get((cohort, kind)), judgement, config)
        name, _, value = cohort.partition("=")
        found.append(
            Verdict(
                kind=kind,
                model=model,
                digest=look.digest,
                cohort=cohort,
                at_ns=now_ns,
                outcome=outcome,
                reason=judgement.reason,
                judgement=judgement,
                devices=devices,
                left_out=tuple(
                    (device, why)
                    for device, why in left_out
                    if not value or look.attributes.get(device, {}).get(name) == value
                ),
                streak=streak,
                clear=clear,
                incident=incident,
                changed=changed,
                first=min((numbers[d][0] for d in devices), default=0),
                last=max((numbers[d][1] for d in devices), default=0),
            )
        )
    found.sort(key=lambda verdict: (verdict.cohort != "fleet", verdict.cohort, KINDS.index(verdict.kind)))
    return tuple(found)


def retired(trails: Iterable[Trail], devices: Iterable[DeviceRecord]) -> tuple[Trail, ...]:
    """Open incidents whose artifact no online device of the cohort serves any more, while some serve another
    one of the same model: the fleet has moved on, and no look will ever clear them.
    """
    online = [record for record in devices if record.online]
    found = []
    for trail in trails:
        if trail.incident:
            serving = _serving(trail, online)
            if serving and trail.digest not in serving:
                found.append(trail)
    return tuple(found)


def _serving(trail: Trail, online: Iterable[DeviceRecord]) -> set[Digest]:
    name, _, value = trail.cohort.partition("=")
    found = set()
    for record in online:
        report = record.report(trail.model)
        if report and report.serving and (not value or record.attribute(name) == value):
            found.add(report.serving)
    return found
