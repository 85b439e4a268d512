"""Which model a device runs, and how it comes to run another. Pure values; nothing here touches a disk.

    ABSENT → FETCHING → VERIFIED → PROBED → [SHADOW] → TRIAL(n) → COMMITTED ⇄ PREVIOUS
                 └──────────┴─────────┴─────────┴─────────┴──▶ QUARANTINED

What must survive a power cut is a `SlotState`: the committed model, the one before it, and the candidate on probation.
The phases before that leave nothing behind but an immutable blob, so they are repeated after a restart. `TRANSITIONS`
has every step that a function here makes a model take. A step towards a new model is durable before it has an effect;
one back to a verified model has its effect even when the disk refuses to remember it.

Law: once one model is committed a device always has a verified, runnable one. A candidate stands beside the committed
model until `commit`; `previous` is dropped only by a later `commit`, or when its blob cannot be loaded.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from edge_runtime.contract import ids
from edge_runtime.contract.codec import latency_body, read_latency
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import DeviceId, Digest, ModelName, RolloutId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import OUTCOMES
from edge_runtime.contract.release import Release, ShadowGate, TrialGate, desired
from edge_runtime.core.budget import surely_above

MAX_QUARANTINE: Final = 64
MAX_REASON: Final = 500
"""Characters kept of a reason. What a child printed may be long; the state must stay readable at the next start."""


class Phase(StrEnum):
    """Where a model is in its life on a device. The child's phases are not durable: after a restart it is `ABSENT`."""

    ABSENT = "absent"
    FETCHING = "fetching"
    VERIFIED = "verified"
    PROBED = "probed"
    SHADOW = "shadow"
    TRIAL = "trial"
    COMMITTED = "committed"
    PREVIOUS = "previous"
    QUARANTINED = "quarantined"


_OUT: Final = (Phase.ABSENT, Phase.QUARANTINED, Phase.PREVIOUS, Phase.COMMITTED)
"""Where a candidate is when it is none any more: where it was before, or in quarantine."""
_KEPT: Final = (Phase.QUARANTINED, Phase.PREVIOUS, Phase.COMMITTED)

TRANSITIONS: Final[Mapping[str, Mapping[Phase, tuple[Phase, ...]]]] = {
    "begin_shadow": {
        Phase.ABSENT: (Phase.SHADOW,),
        Phase.QUARANTINED: (Phase.SHADOW,),  # with a higher attempt
        Phase.PREVIOUS: (Phase.SHADOW,),  # its blob was lost, and fetched again
        Phase.SHADOW: _OUT,  # another candidate takes its place
        Phase.TRIAL: _OUT,
    },
    "leave_shadow": {Phase.SHADOW: (Phase.TRIAL,)},
    "begin_trial": {
        Phase.ABSENT: (Phase.TRIAL,),
        Phase.QUARANTINED: (Phase.TRIAL,),
        Phase.PREVIOUS: (Phase.TRIAL,),
        Phase.SHADOW: _OUT,
        Phase.TRIAL: _OUT,
    },
    "commit": {
        Phase.TRIAL: (Phase.COMMITTED,),
        Phase.COMMITTED: (Phase.PREVIOUS,),
        Phase.PREVIOUS: (Phase.ABSENT, Phase.QUARANTINED),
    },
    "switch": {
        Phase.PREVIOUS: (Phase.COMMITTED,),
        Phase.COMMITTED: (Phase.PREVIOUS,),
        Phase.SHADOW: _OUT,
        Phase.TRIAL: _OUT,
    },
    "activate": {Phase.SHADOW: _KEPT, Phase.TRIAL: _KEPT},  # without progress, and no start is left
    "fail": {Phase.SHADOW: _KEPT, Phase.TRIAL: _KEPT},
    "refuse": {Phase.ABSENT: (Phase.QUARANTINED,)},
    "withdraw": {Phase.SHADOW: _OUT, Phase.TRIAL: _OUT},
    "broken": {
        Phase.SHADOW: _KEPT,
        Phase.TRIAL: _KEPT,
        Phase.COMMITTED: (Phase.ABSENT, Phase.QUARANTINED),
        Phase.PREVIOUS: (Phase.ABSENT, Phase.QUARANTINED, Phase.COMMITTED),
    },
}
"""By function and phase before, the phases that a model may be in after it; it may also stay where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate on probation: first in the shadow, where ``shadow`` asks for it, then serving.

    In the shadow the committed model serves, and the candidate answers some of the same rows; nobody hears its answers,
    ``compared`` and ``disagreed`` count them. ``starts_left`` activations without progress remain; ``progressed`` tells
    whether the last activation made any, so that a device switched off every night does not condemn a good model.
    ``cpu`` has the CPU time of its calls over all activations: a slow model is not judged afresh after every restart.
    ``refused`` counts the calls that it refused and the committed model answers; they are no progress.
    """

    digest: Digest
    attempt: int
    gate: TrialGate
    starts_left: int
    shadow: ShadowGate | None = None
    compared: int = 0
    disagreed: int = 0
    progressed: bool = False
    predictions: int = 0
    refused: int = 0
    seconds: float = 0.0
    cpu: LatencyHistogram = field(default_factory=LatencyHistogram)

    @property
    def refuses(self) -> bool:
        """Whether it surely refuses more of the calls that the committed model answers than the gate allows."""
        return surely_above(self.refused, self._asked, self.gate.max_refused)

    @property
    def _asked(self) -> int:
        return self.refused + self.cpu.count

    @property
    def passed(self) -> bool:
        """Whether the gate's predictions and seconds were reached, with no more calls refused than it allows."""
        long_enough = self.predictions >= self.gate.predictions and self.seconds >= self.gate.seconds
        return long_enough and self.refused <= self.gate.max_refused * self._asked


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """The durable state of one model family on a device.

    ``floors`` holds the highest revision accepted per cohort; ``rollout`` and ``revision`` name the release that was
    last verified; ``outcome`` says how the last candidate ended here, ``shadow_rows`` how many live rows it answered in
    the shadow before, and ``shadow_disagreed`` how many of them otherwise than the committed model.
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
    shadow_rows: int = 0
    shadow_disagreed: int = 0

    @property
    def serving(self) -> Digest | None:
        """The digest that answers predictions: the trial's, else the committed one."""
        return self.trial.digest if self.on_trial and self.trial else self.committed

    @property
    def on_trial(self) -> bool:
        """Whether a candidate serves on probation."""
        return self.trial is not None and self.trial.shadow is None

    @property
    def shadowing(self) -> Digest | None:
        """The candidate that answers in the shadow of the committed model."""
        return self.trial.digest if self.trial is not None and self.trial.shadow is not None else None

    def phase(self, digest: Digest) -> Phase:
        """Where ``digest`` is, as far as the disk knows."""
        if self.trial is not None and self.trial.digest == digest:
            return Phase.SHADOW if self.trial.shadow else Phase.TRIAL
        if digest == self.committed:
            return Phase.COMMITTED
        if digest == self.previous:
            return Phase.PREVIOUS
        return Phase.QUARANTINED if digest in dict(self.quarantine) else Phase.ABSENT

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
    shadowing: Digest | None = None,
) -> tuple[str, Digest | None]:
    """What a verified release asks of a device: ``keep``, ``switch``, ``install`` or ``skip_quarantined``.

    ``switch`` goes to a model that was committed here before; ``install`` has to be fetched and proven first.
    A quarantine is lifted only by a release with a higher attempt.
    """
    wanted = desired(release, device)
    if wanted is None or wanted in (serving, shadowing):
        return "keep", wanted
    if quarantine.get(wanted, 0) >= release.attempt:
        return "skip_quarantined", wanted
    return ("switch", wanted) if wanted in have else ("install", wanted)


def accept(slots: SlotState, release: Release) -> SlotState:
    """Remembers a verified release: its revision becomes the floor of its cohort, also when it is lower.

    It was verified against the floor in force, which a new director key starts anew: else whoever stole the old one
    could have raised it beyond reach.

    A new rollout starts with a clean slate: how the last one ended here is not how this one did.
    """
    if release.rollout != slots.rollout:
        slots = replace(slots, outcome="", outcome_digest=None, reason="", shadow_rows=0, shadow_disagreed=0)
    floors = {**dict(slots.floors), release.cohort: release.revision}
    return replace(
        slots, floors=tuple(sorted(floors.items())), rollout=release.rollout, revision=release.revision
    )


def begin_trial(slots: SlotState, digest: Digest, *, attempt: int, gate: TrialGate) -> SlotState:
    """The candidate was fetched, verified and probed: it serves from the next activation on.

    What was held against it before is forgotten when it commits, not when it is tried again.
    """
    trial = Trial(digest=digest, attempt=attempt, gate=gate, starts_left=gate.starts)
    return _begun(slots, trial)


def begin_shadow(
    slots: SlotState, digest: Digest, *, attempt: int, gate: TrialGate, shadow: ShadowGate
) -> SlotState:
    """As `begin_trial`, but before it serves it answers rows in the shadow of the committed model."""
    trial = Trial(digest=digest, attempt=attempt, gate=gate, starts_left=gate.starts, shadow=shadow)
    return _begun(slots, trial)


def _begun(slots: SlotState, trial: Trial) -> SlotState:
    clean = replace(slots, outcome="", reason="", shadow_rows=0, shadow_disagreed=0)
    return replace(clean, trial=trial, outcome_digest=trial.digest)


def compare(slots: SlotState, *, rows: int, disagreed: int) -> SlotState:
    """Adds rows that the candidate answered in the shadow since the last call, ``disagreed`` of them otherwise."""
    trial = slots.trial
    if trial is None or trial.shadow is None or rows <= 0:
        return slots
    compared, otherwise = trial.compared + rows, trial.disagreed + disagreed
    return replace(slots, trial=replace(trial, progressed=True, compared=compared, disagreed=otherwise))


def leave_shadow(slots: SlotState) -> SlotState:
    """The candidate has answered enough: it serves from the next activation on, with all of its starts."""
    if slots.trial is None:
        return slots
    trial = replace(slots.trial, shadow=None, starts_left=slots.trial.gate.starts, progressed=False)
    return replace(slots, trial=trial, shadow_rows=trial.compared, shadow_disagreed=trial.disagreed)


def activate(slots: SlotState, *, crashed: bool = False) -> SlotState:
    """To be made durable before the serving model is loaded, at every start and every switch.

    An activation without progress since the last one uses up a start; so does one after the process ``crashed`` while
    the candidate served in the place of another, whatever it had answered until then. With none left the trial is over.
    """
    trial = slots.trial
    if trial is None:
        return slots
    blamed = crashed and slots.on_trial and slots.committed is not None
    if trial.progressed and not blamed:
        return replace(slots, trial=replace(trial, progressed=False))
    if trial.starts_left == 0:
        why = "the process crashed while it served" if blamed else "made no progress"
        return fail(slots, f"{why} in {trial.gate.starts} starts")
    return replace(slots, trial=replace(trial, starts_left=trial.starts_left - 1, progressed=False))


def progress(
    slots: SlotState, *, predictions: int, seconds: float, cpu: LatencyHistogram, refused: int = 0
) -> SlotState:
    """Adds what the trial has served since the last call, and ``refused``, see `Trial`.

    ``cpu`` replaces the CPU times known so far.
    """
    if slots.trial is None or (predictions <= 0 and refused <= 0):
        return slots
    counted = replace(slots.trial, refused=slots.trial.refused + refused)
    if predictions <= 0:
        return replace(slots, trial=counted)
    trial = replace(
        counted,
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
    """The candidate broke a gate: the committed model serves, and the candidate is quarantined.

    What never served is ``refused``, not ``rolled_back``.
    """
    trial = slots.trial
    if trial is None:
        return slots
    back = replace(
        slots,
        trial=None,
        quarantine=_quarantined(slots, trial.digest, trial.attempt),
        shadow_rows=trial.compared,
        shadow_disagreed=trial.disagreed,
    )
    return _ended(back, "rolled_back" if slots.on_trial else "refused", trial.digest, reason)


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
                "max_refused": trial.gate.max_refused,
            },
            "shadow": trial.shadow
            and {"rows": trial.shadow.rows, "max_disagreement": trial.shadow.max_disagreement},
            "compared": trial.compared,
            "disagreed": trial.disagreed,
            "starts_left": trial.starts_left,
            "progressed": trial.progressed,
            "predictions": trial.predictions,
            "refused": trial.refused,
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
        "shadow_rows": slots.shadow_rows,
        "shadow_disagreed": slots.shadow_disagreed,
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
        shadow_rows=f.integer("shadow_rows", 0),
        shadow_disagreed=f.integer("shadow_disagreed", 0),
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
            max_refused=gate.number("max_refused", TrialGate().max_refused, low=0.0, high=1.0),
        ),
        shadow=_shadow(f),
        compared=f.integer("compared", 0),
        disagreed=f.integer("disagreed", 0),
        starts_left=f.integer("starts_left"),
        progressed=f.flag("progressed"),
        predictions=f.integer("predictions"),
        refused=f.integer("refused", 0),
        seconds=f.number("seconds"),
        cpu=read_latency(f.section("cpu", {})),
    )


def _shadow(f: Fields) -> ShadowGate | None:
    if f.peek("shadow") is None:  # a state of before there were shadows, too
        return None
    shadow = f.section("shadow")
    return ShadowGate(
        rows=shadow.integer("rows"), max_disagreement=shadow.number("max_disagreement", low=0.0, high=1.0)
    )
