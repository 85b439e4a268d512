"""The staged spread of a candidate over a cohort, as a table.

    draft ──begin──▶ running(1) ──advance──▶ running(n) ──finish──▶ completed
                       │   ▲
                  pause▼   │resume
                      paused            halt ──▶ halted        roll_back ──▶ rolled_back

A device runs the candidate when ``stage_hash(device, rollout)`` lies below the release's threshold. A stage
of k devices sets the threshold just above the k-th smallest hash of the cohort's online devices, so a stage
is a count with a floor: never an empty canary. Hashes of one rollout do not change, so each stage contains
the ones before it. The last stage is everyone, devices that join later too.

Laws: (1) when a threshold is set, at most ``cap`` online devices lie below it; when devices come online below
it later, `tighten` lowers it again, and nothing but `begin` and `advance` raises it. (2) Every change of a
release carries a higher revision. (3) halted and rolled_back are final and expose nobody: threshold 0, the
incumbent as before. (4) Only ``completed`` makes the candidate the incumbent.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from aggregator.records import DeviceRecord, Rollout
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import FleetId
from edge_runtime.contract.release import EVERYONE, Release, stage_hash

DRAFT: Final = "draft"
RUNNING: Final = "running"
PAUSED: Final = "paused"
COMPLETED: Final = "completed"
HALTED: Final = "halted"
ROLLED_BACK: Final = "rolled_back"

TRANSITIONS: Final[dict[tuple[str, str], str]] = {
    (DRAFT, "begin"): RUNNING,
    (DRAFT, "halt"): HALTED,
    (DRAFT, "roll_back"): ROLLED_BACK,
    (RUNNING, "advance"): RUNNING,
    (RUNNING, "finish"): COMPLETED,
    (RUNNING, "pause"): PAUSED,
    (RUNNING, "halt"): HALTED,
    (RUNNING, "roll_back"): ROLLED_BACK,
    (PAUSED, "resume"): RUNNING,
    (PAUSED, "halt"): HALTED,
    (PAUSED, "roll_back"): ROLLED_BACK,
    (COMPLETED, "roll_back"): ROLLED_BACK,
}
ACTIVE: Final = (DRAFT, RUNNING, PAUSED)
NO_CAP: Final = -1
ENDED: Final = (
    "devices were told already to run what they ran before; to run something else, start another rollout"
)


def step(rollout: Rollout, verb: str) -> str:
    """The state after ``verb``; raises `ContractError` when it is not allowed in this state."""
    after = TRANSITIONS.get((rollout.state, verb))
    if after is None:
        allowed = [v.replace("_", " ") for s, v in TRANSITIONS if s == rollout.state]
        instead = f"what is left to do is {' or '.join(allowed)}" if allowed else ENDED
        raise ContractError(
            f"rollout {rollout.rollout} is {rollout.state}, so it cannot {verb.replace('_', ' ')}: {instead}"
        )
    return after


def eligible(rollout: Rollout, devices: Iterable[DeviceRecord]) -> list[DeviceRecord]:
    """The known devices that follow the rollout's cohort and have its model family, online or not."""
    return [d for d in devices if d.cohort == rollout.cohort and d.report(rollout.model) is not None]


def draft_note(rollout: Rollout, devices: Iterable[DeviceRecord]) -> str:
    """Why a draft waits; says so when nobody can ever begin it as things stand, for its cohort may be mistyped."""
    found = list(devices)
    known = eligible(rollout, found)
    if known:
        return f"waits for one of {len(known)} devices to be online"
    cohorts = sorted({d.cohort for d in found if d.report(rollout.model) is not None})
    others = f", only in {', '.join(cohorts[:5])}" if cohorts else ""
    return (
        f"no device of cohort {rollout.cohort} with model {rollout.model} is known{others}: it waits for one"
    )


def members(rollout: Rollout, devices: Iterable[DeviceRecord]) -> list[DeviceRecord]:
    """The eligible devices that the rollout tells to run the candidate."""
    return [
        d for d in eligible(rollout, devices) if stage_hash(d.device, rollout.rollout) < rollout.threshold
    ]


def _threshold(rollout: Rollout, online: list[DeviceRecord], cap: int) -> int:
    """Just above the ``cap``-th smallest hash of ``online``; above the largest when there are fewer."""
    hashes = sorted(stage_hash(d.device, rollout.rollout) for d in online)[:cap]
    return hashes[-1] + 1 if hashes else 0


def _enter(rollout: Rollout, stage: int, devices: Iterable[DeviceRecord], now_ns: int) -> Rollout | None:
    """The rollout in ``stage``; None when nobody is online to be its canary."""
    size = rollout.stages[stage - 1]
    online = [d for d in eligible(rollout, devices) if d.online]
    if stage == len(rollout.stages):
        cap, threshold = NO_CAP, EVERYONE
    elif not online:
        return None
    else:
        # A stage never falls back behind the one before, however many devices went offline meanwhile: when they
        # come back they would push each other out of what they have committed.
        cap = max(rollout.cap, size if isinstance(size, int) else max(1, math.ceil(size * len(online))))
        threshold = max(rollout.threshold, _threshold(rollout, online, cap))
        exposed = sum(stage_hash(d.device, rollout.rollout) < threshold for d in online)
        cap = max(cap, exposed) if threshold == rollout.threshold else cap
    return replace(
        rollout,
        state=RUNNING,
        stage=stage,
        cap=cap,
        threshold=threshold,
        stage_since_ns=now_ns,
        ready_since_ns=None,
        note=describe(rollout, stage, cap),
    )


def describe(rollout: Rollout, stage: int, cap: int) -> str:
    """A stage in words."""
    who = "everyone" if cap == NO_CAP else "1 device" if cap == 1 else f"{cap} devices"
    return f"stage {stage} of {len(rollout.stages)}: {who}"


def begin(rollout: Rollout, devices: Iterable[DeviceRecord], now_ns: int) -> Rollout:
    """The rollout in its first stage; the draft itself while nobody is online to begin with."""
    step(rollout, "begin")
    return _enter(rollout, 1, devices, now_ns) or rollout


def advance(rollout: Rollout, devices: Iterable[DeviceRecord], now_ns: int) -> Rollout:
    """The rollout in its next stage, or unchanged while nobody is online; raises `ContractError` after the last."""
    step(rollout, "advance")
    if rollout.stage >= len(rollout.stages):
        raise ContractError(f"rollout {rollout.rollout} is in its last stage: finish it")
    return _enter(rollout, rollout.stage + 1, devices, now_ns) or rollout


def tighten(rollout: Rollout, devices: Iterable[DeviceRecord]) -> Rollout:
    """Lowers the threshold when more online devices than the cap lie below it, because some joined or came back."""
    if rollout.state not in (RUNNING, PAUSED) or rollout.cap == NO_CAP:
        return rollout
    online = [d for d in members(rollout, devices) if d.online]
    if len(online) <= rollout.cap:
        return rollout
    return replace(rollout, threshold=_threshold(rollout, online, rollout.cap))


def end(rollout: Rollout, verb: str, note: str) -> Rollout:
    """The rollout halted, rolled back or finished: nobody is in a stage any more."""
    return replace(rollout, state=step(rollout, verb), threshold=0, note=note)


def pause(rollout: Rollout, note: str) -> Rollout:
    """The rollout where it stands; nobody moves."""
    return replace(rollout, state=step(rollout, "pause"), note=note)


def resume(rollout: Rollout, note: str, now_ns: int) -> Rollout:
    """A paused rollout goes on in its stage, with the stage's time limit running anew."""
    return replace(
        rollout, state=step(rollout, "resume"), note=note, stage_since_ns=now_ns, ready_since_ns=None
    )


def release_of(rollout: Rollout, fleet: FleetId, revision: int) -> Release:
    """The release that says what the rollout's state means."""
    completed = rollout.state == COMPLETED
    ended = completed or rollout.state in (HALTED, ROLLED_BACK)
    return Release(
        fleet=fleet,
        cohort=rollout.cohort,
        model=rollout.model,
        rollout=rollout.rollout,
        revision=revision,
        threshold=rollout.threshold,
        candidate=None if ended else rollout.candidate,
        incumbent=rollout.candidate if completed else rollout.incumbent,
        attempt=rollout.attempt,
        trial=rollout.trial,
        shadow=rollout.shadow,
    )
