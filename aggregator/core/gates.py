"""Whether a stage may go on, has to wait, or has to be halted.

Evidence comes from what devices report about themselves and from windows, by arm: the candidate's windows
since the stage began against the incumbent's since ``control_seconds`` before the rollout (the same devices'
own past and the rest's present). A stage is *ready* when ``min_online_share`` of its devices can be heard
(online, or decided already) and ``committed_share`` of those have committed; it passes after ``bake_seconds``
of readiness. Devices that went offline do not hold it up, but a stage that is not through after
``timeout_seconds`` is paused for a person to look at.

Looking often must not add false halts, so a halt needs evidence that a longer look would not take back: a
device's own refusal or rollback, or a bound. For accuracy that is Wilson's upper bound at three standard
errors, on counts divided by ``design_effect`` because neighbouring rows repeat each other. To go on, the
plain estimates must be within their limits.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from aggregator.records import DeviceRecord, DeviceTotals, Gates, Rollout
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import ModelReport

HALT_ERRORS: Final = 3.0
MIN_LATENCIES: Final = 200
MIN_ROWS_FOR_RATE: Final = 100
LATENCY_QUANTILE: Final = 0.5
"""The median: the tail of wall time on a busy device belongs to its neighbours. CPU time gates the tail on
the device."""

NAMED: Final = 3
"""So many of the devices that a stage waits for are named."""

GO: Final = "go"
WAIT: Final = "wait"
HALT: Final = "halt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Windows by arm: totals per device, and all latencies of the arm together."""

    candidate: tuple[DeviceTotals, ...] = ()
    control: tuple[DeviceTotals, ...] = ()
    candidate_latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    control_latency: LatencyHistogram = field(default_factory=LatencyHistogram)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a stage's devices stand: ``present`` can be heard or have decided, ``failed`` refused or rolled back.

    ``waiting`` are the present ones that have neither committed nor failed.
    In the shadow their candidate answered ``shadow_rows`` live rows, ``shadow_disagreed`` of them otherwise than the
    model in service. How much of that is too much is each device's to say, see `Release.shadow`.
    """

    members: int
    present: int
    committed: int
    failed: tuple[tuple[str, str], ...]
    waiting: tuple[str, ...] = ()
    shadow_rows: int = 0
    shadow_disagreed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``go``, ``wait`` or ``halt``, and why. ``ready`` tells whether the stage's devices have committed."""

    action: str
    why: str
    ready: bool = False


def committed(record: DeviceRecord, rollout: Rollout) -> bool:
    """Whether the device runs the candidate for good, and because this rollout told it to.

    One that runs it for another reason does not follow the rollout yet, and may refuse to.
    """
    report = _report(record, rollout)
    return report is not None and report.serving == rollout.candidate and report.state != "trial"


def failure(record: DeviceRecord, rollout: Rollout) -> str:
    """Why the device refused or rolled back this rollout's candidate; empty when it did not.

    Only an outcome reported under this rollout counts. A quarantine alone does not: this rollout's attempt may lift it,
    and a device whose quarantine stands refuses the candidate when it is asked to run it.
    """
    report = _report(record, rollout)
    if report is None:
        return ""
    if report.outcome in ("refused", "rolled_back") and report.outcome_digest == rollout.candidate:
        return f"{report.outcome}: {report.reason or 'no reason given'}"
    return ""


def _report(record: DeviceRecord, rollout: Rollout) -> ModelReport | None:
    """What the device says since it follows this rollout; None while it does not.

    Any revision counts from the rollout's first on: who has not heard of the last one follows it as well.
    """
    report = record.report(rollout.model)
    follows = report is not None and report.rollout == rollout.rollout and report.revision >= rollout.revision
    return report if follows else None


def standing(rollout: Rollout, members: Iterable[DeviceRecord]) -> Standing:
    """Counts the stage's devices."""
    total = present = done = rows = disagreed = 0
    failed, waiting = [], []
    for record in members:
        total += 1
        reason = failure(record, rollout)
        has = not reason and committed(record, rollout)
        done += has
        present += bool(record.online or has or reason)
        if reason:
            failed.append((str(record.device), reason))
        elif record.online and not has:
            waiting.append(str(record.device))
        report = _report(record, rollout)
        if report is not None:
            rows, disagreed = rows + report.shadow_rows, disagreed + report.shadow_disagreed
    return Standing(
        members=total,
        present=present,
        committed=done,
        failed=tuple(failed),
        waiting=tuple(waiting),
        shadow_rows=rows,
        shadow_disagreed=disagreed,
    )


def too_many_failed(rollout: Rollout, stand: Standing) -> str:
    """Who failed, when that is more than the gate allows; else empty."""
    if len(stand.failed) <= rollout.gates.max_failures:
        return ""
    who = "; ".join(f"{device} {reason}" for device, reason in stand.failed[:3])
    count = len(stand.failed)
    return (
        f"{count} {'device' if count == 1 else 'devices'} failed, {rollout.gates.max_failures} allowed: {who}"
    )


def judge(rollout: Rollout, stand: Standing, evidence: Evidence, now_ns: int) -> Outcome:
    """The stage's outcome now."""
    gates = rollout.gates
    checks = (
        _bad_rows(gates, evidence),
        _accuracy(gates, rollout.incumbent, evidence),
        _latency(gates, evidence),
    )
    failed = too_many_failed(rollout, stand)
    halts = [failed] if failed else [why for action, why in checks if action == HALT]
    if halts:
        return Outcome(action=HALT, why=halts[0])
    waiting = _not_ready(gates, stand)
    if waiting:
        return Outcome(action=WAIT, why=waiting)
    waits = [
        *_not_baked(rollout, sum(t.rows for t in evidence.candidate), now_ns),
        *(why for action, why in checks if action == WAIT),
    ]
    if waits:
        return Outcome(action=WAIT, why=waits[0], ready=True)
    why = f"{stand.committed} of {stand.members} devices committed, every gate passed"
    if stand.shadow_rows:
        why += f"; {stand.shadow_disagreed} of {stand.shadow_rows} rows were answered otherwise in the shadow"
    return Outcome(action=GO, why=why, ready=True)


def _not_baked(rollout: Rollout, rows: int, now_ns: int) -> list[str]:
    gates = rollout.gates
    since = rollout.ready_since_ns if rollout.ready_since_ns is not None else now_ns
    baked = (now_ns - since) / 1e9
    if baked < gates.bake_seconds:
        return [f"baking: {baked:.0f} of {gates.bake_seconds:.0f} s"]
    if rows < gates.min_rows:
        return [f"{rows} of {gates.min_rows} rows were seen by the candidate"]
    return []


def _not_ready(gates: Gates, stand: Standing) -> str:
    if not stand.present or stand.present < gates.min_online_share * stand.members:
        return f"{stand.present} of {stand.members} devices can be heard; {gates.min_online_share:.0%} are needed"
    needed = math.ceil(gates.committed_share * (stand.present - len(stand.failed)) - 1e-9)
    if stand.committed < max(1, needed):
        return (
            f"{stand.committed} of {stand.present} devices committed; {max(1, needed)} are needed"
            f"{_awaited(stand.waiting)}"
        )
    return ""


def _awaited(waiting: Sequence[str]) -> str:
    named = ", ".join(sorted(waiting)[:NAMED])
    more = f" and {len(waiting) - NAMED} more" if len(waiting) > NAMED else ""
    return f", so it waits for {named}{more}" if named else ""


def _bad_rows(gates: Gates, evidence: Evidence) -> tuple[str, str]:
    """Rows refused or failed, candidate's rate against control's; halts from `MIN_ROWS_FOR_RATE` rows on."""
    bad, rows = _bad(evidence.candidate)
    control_bad, control_rows = _bad(evidence.control)
    rate = bad / rows if rows else 0.0
    control = control_bad / control_rows if control_rows else 0.0
    if rate - control <= gates.max_bad_row_rate:
        return GO, ""
    why = (
        f"{rate:.1%} of the candidate's {rows} rows were refused or failed, {control:.1%} of the incumbent's"
    )
    return (HALT if rows >= MIN_ROWS_FOR_RATE else WAIT), why


def _bad(totals: Sequence[DeviceTotals]) -> tuple[int, int]:
    bad = sum(t.failed + t.refused for t in totals)
    return bad, bad + sum(t.rows for t in totals)


def _latency(gates: Gates, evidence: Evidence) -> tuple[str, str]:
    now, control = evidence.candidate_latency, evidence.control_latency
    if min(now.count, control.count) < MIN_LATENCIES or not gates.max_latency_ratio:
        return GO, ""
    median, before = now.quantile_ns(LATENCY_QUANTILE), control.quantile_ns(LATENCY_QUANTILE)
    if median <= gates.max_latency_ratio * before:
        return GO, ""
    return HALT, (
        f"median latency {median / 1e3:.0f} µs is {median / max(before, 1.0):.1f} times the incumbent's; "
        f"{gates.max_latency_ratio:g} are allowed"
    )


def _accuracy(gates: Gates, incumbent: Digest | None, evidence: Evidence) -> tuple[str, str]:
    """The candidate's accuracy against the incumbent's on the same devices, else on the others."""
    now = {t.device: (t.labelled, t.correct) for t in evidence.candidate if t.labelled}
    labelled, right = sum(n for n, _ in now.values()), sum(c for _, c in now.values())
    if incumbent is None or labelled < gates.min_labelled:
        return GO, ""
    known = [t for t in evidence.control if t.labelled]
    own = [t for t in known if t.device in now]
    control = own if sum(t.labelled for t in own) >= gates.min_labelled else known
    if sum(t.labelled for t in control) < gates.min_labelled:
        return GO, ""
    before = sum(t.correct for t in control) / sum(t.labelled for t in control)
    limit = before - gates.max_accuracy_drop
    accuracy = right / labelled
    if accuracy >= limit:
        return GO, ""
    upper = wilson_upper(right / gates.design_effect, labelled / gates.design_effect, HALT_ERRORS)
    where = "on the same devices" if control is own else "elsewhere"
    why = f"accuracy {accuracy:.3f} of {labelled} answers, {before:.3f} of the incumbent {where}"
    return (HALT if upper < limit else WAIT), why


def wilson_upper(right: float, total: float, errors: float) -> float:
    """Wilson's upper bound of a proportion at ``errors`` standard errors (E. B. Wilson, JASA 1927)."""
    if total <= 0:
        return 1.0
    share, square = right / total, errors * errors
    middle = share + square / (2.0 * total)
    half = errors * math.sqrt(share * (1.0 - share) / total + square / (4.0 * total * total))
    return (middle + half) / (1.0 + square / total)
