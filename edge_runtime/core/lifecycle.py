"""Which model a device runs, and how it comes to run another. Pure values; nothing here touches a disk.

    IDLE → FETCHING → VERIFIED → PROBED → TRIAL(n) → COMMITTED
                └─────────┴────────┴─────────┴──▶ ROLLED_BACK (digest quarantined)

What must survive a power cut is a `SlotState`: the committed model, the one before it, and the trial. The phases
before a trial leave nothing behind but an immutable blob, so they are repeated after a restart.

Law: once one model is committed a device always has a verified, runnable one. `begin_trial` keeps the
committed model beside the candidate until `commit`; `previous` is dropped only by a later `commit`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from edge_runtime.contract import ids
from edge_runtime.contract.codec import latency_body, read_latency
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import DeviceId, Digest, ModelName, RolloutId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import OUTCOMES
from edge_runtime.contract.release import Release, TrialGate, desired

MAX_QUARANTINE: Final = 64
MAX_REASON: Final = 500
"""Characters kept of a reason. What a child printed may be long; the state must stay readable at the next start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate that serves on probation.

    ``starts_left`` activations without progress remain; ``progressed`` tells whether the last activation made
    any, so that a device switched off every night does not condemn a good model. ``cpu`` has the CPU time of its
    calls over all activations: a slow model is not judged afresh after every restart.
    """

    digest: Digest
    attempt: int
    gate: TrialGate
    starts_left: int
    progressed: bool = False
    predictions: int = 0
    seconds: float = 0.0
    cpu: LatencyHistogram = field(default_factory=LatencyHistogram)

    @property
    def passed(self) -> bool:
        """Whether the gate's predictions and seconds were reached."""
        return self.predictions >= self.gate.predictions and self.seconds >= self.gate.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """The durable state of one model family on a device.

    ``floors`` holds the highest revision accepted per cohort; ``release`` is the payload of the release that was last
    verified; ``outcome`` says how the last candidate ended here.
    """

    model: ModelName
    committed: Digest | None = None
    previous: Digest | None = None
    trial: Trial | None = None
    quarantine: tuple[tuple[Digest, int], ...] = ()
    floors: tuple[tuple[str, int], ...] = ()
    rollout: str = ""
    revision: int = 0
    outcome: str = ""
    outcome_digest: Digest | None = None
    reason: str = ""

    @property
    def serving(self) -> Digest | None:
        """The digest that answers predictions: the trial's, else the committed one."""
        return self.trial.digest if self.trial else self.committed

    @property
    def known(self) -> tuple[Digest, ...]:
        """Digests whose blobs must be kept: committed, previous and trial."""
        found = (self.committed, self.previous, self.trial.digest if self.trial else None)
        return tuple(d for d in found if d is not None)

    def floor(self, cohort: str) -> int:
        """The highest revision accepted from ``cohort``; 0 when there was none."""
        return dict(self.floors).get(cohort, 0)


def needs(
    release: Release,
    device: DeviceId,
    *,
    serving: Digest | None,
    have: Collection[Digest],
    quarantine: Mapping[Digest, int],
) -> tuple[str, Digest | None]:
    """What a verified release asks of a device: ``keep``, ``switch``, ``install`` or ``skip_quarantined``.

    ``switch`` goes to a model that was committed here before; ``install`` has to be fetched and proven first.
    A quarantine is lifted only by a release with a higher attempt.
    """
    wanted = desired(release, device)
    if wanted is None or wanted == serving:
        return "keep", wanted
    if quarantine.get(wanted, 0) >= release.attempt:
        return "skip_quarantined", wanted
    return ("switch", wanted) if wanted in have else ("install", wanted)


def accept(slots: SlotState, release: Release) -> SlotState:
    """Remembers a verified release: its revision becomes the floor of its cohort.

    A new rollout starts with a clean slate: how the last one ended here is not how this one did.
    """
    if release.rollout != slots.rollout:
        slots = replace(slots, outcome="", outcome_digest=None, reason="")
    floors = {**dict(slots.floors), release.cohort: max(release.revision, slots.floor(release.cohort))}
    return replace(
        slots, floors=tuple(sorted(floors.items())), rollout=release.rollout, revision=release.revision
    )


def begin_trial(slots: SlotState, digest: Digest, *, attempt: int, gate: TrialGate) -> SlotState:
    """The candidate was fetched, verified and probed: it serves from the next activation on.

    What was held against it before is forgotten when it commits, not when it is tried again.
    """
    trial = Trial(digest=digest, attempt=attempt, gate=gate, starts_left=gate.starts)
    return replace(slots, trial=trial, outcome="", outcome_digest=digest, reason="")


def activate(slots: SlotState) -> SlotState:
    """To be made durable before the serving model is loaded, at every start and every switch.

    An activation without progress since the last one uses up a start; with none left the trial is over.
    """
    trial = slots.trial
    if trial is None:
        return slots
    if trial.progressed:
        return replace(slots, trial=replace(trial, progressed=False))
    if trial.starts_left == 0:
        return fail(slots, f"made no progress in {trial.gate.starts} starts")
    return replace(slots, trial=replace(trial, starts_left=trial.starts_left - 1))


def progress(slots: SlotState, *, predictions: int, seconds: float, cpu: LatencyHistogram) -> SlotState:
    """Adds what the trial has served since the last call; ``cpu`` replaces the CPU times known so far."""
    if slots.trial is None or predictions <= 0:
        return slots
    trial = replace(
        slots.trial,
        progressed=True,
        predictions=slots.trial.predictions + predictions,
        seconds=slots.trial.seconds + seconds,
        cpu=cpu,
    )
    return replace(slots, trial=trial)


def commit(slots: SlotState) -> SlotState:
    """The trial passed: its model is the committed one, the old one is kept to go back to."""
    if slots.trial is None:
        return slots
    return _install(slots, slots.trial.digest)


def _install(slots: SlotState, digest: Digest) -> SlotState:
    return replace(
        slots,
        committed=digest,
        previous=slots.committed,
        trial=None,
        quarantine=tuple((d, a) for d, a in slots.quarantine if d != digest),
        outcome="committed",
        outcome_digest=digest,
        reason="",
    )


def _quarantined(slots: SlotState, digest: Digest, attempt: int) -> tuple[tuple[Digest, int], ...]:
    rest = tuple((d, a) for d, a in slots.quarantine if d != digest)
    return (*rest, (digest, max(attempt, dict(slots.quarantine).get(digest, 0))))[-MAX_QUARANTINE:]


def brief(text: str) -> str:
    """``text`` short enough to keep and fit for the wire: at most `MAX_REASON` characters, no lone surrogates."""
    return text[:MAX_REASON].encode("utf-8", "replace").decode()


def _ended(slots: SlotState, outcome: str, digest: Digest, reason: str) -> SlotState:
    return replace(slots, outcome=outcome, outcome_digest=digest, reason=brief(reason))


def fail(slots: SlotState, reason: str) -> SlotState:
    """The trial broke a gate: back to the committed model, and the candidate is quarantined."""
    if slots.trial is None:
        return slots
    digest, attempt = slots.trial.digest, slots.trial.attempt
    back = replace(slots, trial=None, quarantine=_quarantined(slots, digest, attempt))
    return _ended(back, "rolled_back", digest, reason)


def refuse(slots: SlotState, digest: Digest, *, attempt: int, reason: str) -> SlotState:
    """A candidate did not get as far as a trial: it is quarantined, and what serves goes on."""
    held = replace(slots, quarantine=_quarantined(slots, digest, attempt))
    return _ended(held, "refused", digest, reason)


def withdraw(slots: SlotState) -> SlotState:
    """The release no longer asks for the trial's model: back to the committed one, nothing held against it."""
    if slots.trial is None:
        return slots
    return replace(slots, trial=None, outcome="", outcome_digest=None, reason="")


def switch(slots: SlotState, digest: Digest) -> SlotState:
    """Goes to a model that was committed here before; needs no network."""
    if digest == slots.committed:
        return withdraw(slots)
    if digest != slots.previous:
        raise ContractError(
            f"cannot switch to {digest}: it is neither the committed model nor the one before"
        )
    return _install(slots, digest)


def broken(slots: SlotState, digest: Digest, reason: str) -> SlotState:
    """The blob of ``digest`` cannot be loaded (a worn disk, no memory): fall back to what is left.

    A committed model with nothing behind it stays: loading it may work later, and forgetting it never helps.
    """
    if slots.trial is not None and slots.trial.digest == digest:
        return fail(slots, reason)
    if digest == slots.committed and slots.previous is not None:
        back = replace(slots, committed=slots.previous, previous=None)
        return _ended(back, "rolled_back", digest, reason)
    if digest == slots.previous:
        return replace(slots, previous=None)
    return slots


def to_document(slots: SlotState) -> dict[str, Any]:
    """The state as plain JSON data."""
    trial = slots.trial
    return {
        "schema": 1,
        "model": slots.model,
        "committed": slots.committed or "",
        "previous": slots.previous or "",
        "trial": trial
        and {
            "digest": trial.digest,
            "attempt": trial.attempt,
            "gate": {
                "predictions": trial.gate.predictions,
                "seconds": trial.gate.seconds,
                "starts": trial.gate.starts,
            },
            "starts_left": trial.starts_left,
            "progressed": trial.progressed,
            "predictions": trial.predictions,
            "seconds": trial.seconds,
            "cpu": latency_body(trial.cpu),
        },
        "quarantine": [{"digest": d, "attempt": a} for d, a in slots.quarantine],
        "floors": dict(slots.floors),
        "rollout": slots.rollout,
        "revision": slots.revision,
        "outcome": slots.outcome,
        "outcome_digest": slots.outcome_digest or "",
        "reason": slots.reason,
    }


def from_document(document: Mapping[str, object], model: ModelName) -> SlotState:
    """Reads what `to_document` wrote; raises `ContractError` naming the field, or that it belongs to another model."""
    f = Fields(document, "slots")
    if f.integer("schema") != 1:
        raise f.fail("schema", "is not 1: this state was written by a newer skiffd")
    if f.text("model") != model:
        raise f.fail(
            "model", f"is {f.text('model')!r}, the configuration says {model!r}: use another state_dir"
        )
    return SlotState(
        model=model,
        committed=_digest(f.text("committed", "")),
        previous=_digest(f.text("previous", "")),
        trial=_trial(f.section("trial")) if document.get("trial") else None,
        quarantine=tuple(
            (ids.digest(q.text("digest")), q.integer("attempt")) for q in f.sections("quarantine", ())
        ),
        floors=f.counts("floors", {}),
        rollout=RolloutId(f.text("rollout", "")),
        revision=f.integer("revision", 0),
        outcome=f.text("outcome", "", choices=OUTCOMES),
        outcome_digest=_digest(f.text("outcome_digest", "")),
        reason=f.text("reason", "", max_length=4096),
    )


def _digest(text: str) -> Digest | None:
    return ids.digest(text) if text else None


def _trial(f: Fields) -> Trial:
    gate = f.section("gate")
    return Trial(
        digest=ids.digest(f.text("digest")),
        attempt=f.integer("attempt"),
        gate=TrialGate(
            predictions=gate.integer("predictions"),
            seconds=gate.number("seconds"),
            starts=gate.integer("starts"),
        ),
        starts_left=f.integer("starts_left"),
        progressed=f.flag("progressed"),
        predictions=f.integer("predictions"),
        seconds=f.number("seconds"),
        cpu=read_latency(f.section("cpu", {})),
    )
