"""The device's control plane: ``handle(event) -> actions``, without a socket, a clock or a disk.

The daemon performs the actions in order and reports what happened as further events. The fleet simulator runs
this same class by the hundred over a lossy link and a virtual clock.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from edge_runtime.contract import topics
from edge_runtime.contract.codec import decode
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, SessionId
from edge_runtime.contract.messages import Ack, Command, ModelReport, SignedRelease
from edge_runtime.contract.release import Release, from_payload
from edge_runtime.core import lifecycle
from edge_runtime.core.budget import Budget
from edge_runtime.core.events import (
    Action,
    AgentEvent,
    Append,
    ClockChanged,
    Collect,
    Connected,
    Disconnected,
    GapFound,
    MessageArrived,
    Noticed,
    Publish,
    Save,
    Send,
    Sent,
    Served,
    ServeFailed,
    Shadow,
    Shadowed,
    Started,
    StartUpdate,
    Ticked,
    Trim,
    Unsaved,
    UpdateEnded,
    UpdatePhase,
    WindowClosed,
)
from edge_runtime.core.lifecycle import SlotState
from edge_runtime.core.offers import SUSPECTED, UNPUBLISHED, WRONG_BYTES, Offers, Pause
from edge_runtime.core.probation import Probation
from edge_runtime.core.voice import Identity, Voice

MAX_IN_FLIGHT: Final = 20
ACK_TIMEOUT_SECONDS: Final = 10.0
SUSPICIONS: Final = 3
"""A model whose trial by the update child ended so often without a verdict is refused."""
COMPLAINT_SECONDS: Final = 60.0
"""What a peer can provoke is noted this often at most, so that a flood of it cannot push windows out of the outbox."""


class Agent:
    """One device's control plane for one model family. Not thread-safe: one loop owns it.

    Without ``shadows`` a candidate goes to its trial at once, whatever the release says.
    """

    def __init__(
        self,
        identity: Identity,
        slots: SlotState,
        budget: Budget,
        rng: random.Random,
        *,
        shadows: bool = True,
    ) -> None:
        self._me = identity
        self._topics = topics.Topics(identity.fleet)
        self._voice = Voice(identity)
        self._models = Probation(slots, budget, rng, shadows=shadows, note=self._voice.note)
        self._shadowing: Digest | None = None
        self._clock = ""
        self._connected = False
        self._phase: tuple[str, Digest] | None = None
        self._in_flight: dict[tuple[SessionId, int], float] = {}
        self._reported: tuple[str, ModelReport] | None = None
        self._complaints: dict[str, tuple[float, int]] = {}
        self._offers = Offers(rng)
        self._suspect: tuple[tuple[Digest, int] | None, int] = (None, 0)
        self._kept: tuple[Digest, ...] | None = None

    @property
    def slots(self) -> SlotState:
        """The state now; what the last `Save` held differs from it at most by a trial's latest progress."""
        return self._models.slots

    @property
    def tried(self) -> Digest | None:
        """The candidate that answers rows on trial."""
        return self._models.tried

    @property
    def subscriptions(self) -> tuple[str, ...]:
        """The exact topics this device reads."""
        return (
            self._topics.ack(self._me.device),
            self._topics.command(self._me.device),
            self._topics.release(self._me.cohort, self._me.model),
        )

    def death(self) -> Publish:
        """The last will of this session."""
        return self._voice.death()

    def handle(self, event: AgentEvent, now_seconds: float, wall_ns: int) -> list[Action]:
        """What to do about ``event``, in order. ``now_seconds`` is monotonic, ``wall_ns`` since 1970."""
        if not isinstance(event, Unsaved):
            self._models.remember()
        decided = self._decide(event, now_seconds, wall_ns)
        if any(isinstance(action, Save) and action.needed for action in decided):
            return decided  # what follows from a state waits until it is `Saved`
        return decided + self._follow_up(event, now_seconds)

    def _decide(  # noqa: PLR0911 (one per event)
        self, event: AgentEvent, now_seconds: float, wall_ns: int
    ) -> list[Action]:
        """What concerns the models: which one serves, is tried or is fetched."""
        match event:
            case Started():
                return self._models.started(wall_ns, crashed=event.crashed)
            case UpdateEnded():
                return self._update_ended(event, now_seconds, wall_ns)
            case Served():
                self._models.loaded(event.digest)
                return self._models.served(event, now_seconds, wall_ns)
            case Shadowed():
                return self._models.shadowed(event, now_seconds, wall_ns)
            case ServeFailed():
                return self._serve_failed(event, now_seconds, wall_ns)
            case Unsaved():
                return self._unsaved(event, now_seconds, wall_ns)
            case Ticked():
                return self._models.ticked(now_seconds)
            case _:
                return self._tell(event, now_seconds, wall_ns)

    def _tell(self, event: AgentEvent, now_seconds: float, wall_ns: int) -> list[Action]:
        """What is said, heard or remembered."""
        match event:
            case Connected():
                self._connected = True
                self._reported = None
            case Disconnected():
                self._connected = False
                self._in_flight.clear()
            case MessageArrived():
                return self._arrived(event, now_seconds, wall_ns)
            case WindowClosed():
                self._models.loaded(event.digest)
                return self._window(event, now_seconds, wall_ns)
            case Sent():
                self._in_flight.update(dict.fromkeys(event.keys, now_seconds + ACK_TIMEOUT_SECONDS))
            case UpdatePhase():
                self._phase = (event.phase, event.digest)
            case Noticed():
                return self._complain(event.name, now_seconds, wall_ns, **dict(event.detail))
            case GapFound():
                return [self._note(event.name, wall_ns, **dict(event.detail))]
            case ClockChanged():
                self._clock = "synced" if event.synced else "unsynced"
        return []

    def _follow_up(self, event: AgentEvent, now_seconds: float) -> list[Action]:
        actions: list[Action] = []
        wanted = self._models.shadowing
        if wanted != self._shadowing:
            self._shadowing = wanted
            actions.append(Shadow(wanted))
        idle = not self._offers.working  # a blob that the child has just installed is not known yet
        offered = self._offers.next(now_seconds) if self._connected else None
        if idle:
            actions += self._collect(begins=offered is not None)
        if offered is not None:
            actions.append(self._start_update(offered))
        if self._connected:
            actions += self._birth()
            for key in [k for k, deadline in self._in_flight.items() if deadline <= now_seconds]:
                del self._in_flight[key]
            room = MAX_IN_FLIGHT - len(self._in_flight)
            if room and isinstance(event, Connected | WindowClosed | MessageArrived | Ticked):
                actions.append(Send(room, frozenset(self._in_flight)))
        return actions

    # ── what leaves ────────────────────────────────────────────────────────────────────────────────────

    @property
    def report(self) -> ModelReport:
        """How the model stands; may be read from any thread."""
        s, answering = self._models.slots, self._models.answering
        if (
            s.trial is not None
        ):  # also while the next one is fetched: whoever counts commits must not count this
            state, candidate = ("trial" if s.on_trial else "shadow"), s.trial.digest
        elif self._phase is not None:
            state, candidate = self._phase
        else:
            candidate = None
            settled = "committed" if answering else "idle"
            state = s.outcome if s.outcome == "rolled_back" else settled
        return ModelReport(
            model=s.model,
            state=state,
            serving=answering,
            previous=s.previous,
            candidate=candidate,
            rollout=s.rollout,
            revision=s.revision,
            outcome=s.outcome,
            outcome_digest=s.outcome_digest if s.outcome else None,
            reason=s.reason,
            quarantined=tuple(d for d, _ in s.quarantine if d != s.serving),
            shadow_rows=s.shadow_rows,
            shadow_disagreed=s.shadow_disagreed,
        )

    def _birth(self) -> list[Action]:
        reported = (self._clock, self.report)
        if reported == self._reported:
            return []
        self._reported = reported
        clock, report = reported
        return [self._voice.birth((report,), clock)]

    def _note(self, name: str, wall_ns: int, **detail: str) -> Append:
        return self._voice.note(name, wall_ns, **detail)

    def _complain(self, name: str, now_seconds: float, wall_ns: int, **detail: str) -> list[Action]:
        noted_at, count = self._complaints.get(name, (-math.inf, 0))
        due = now_seconds >= noted_at + COMPLAINT_SECONDS
        self._complaints[name] = (now_seconds if due else noted_at, count + 1)
        return [self._note(name, wall_ns, count=str(count + 1), **detail)] if due else []

    def _window(self, seen: WindowClosed, now_seconds: float, wall_ns: int) -> list[Action]:
        try:
            return [self._voice.window(seen)]
        except ContractError as e:
            return self._complain("window_dropped", now_seconds, wall_ns, reason=str(e))

    # ── what arrives ───────────────────────────────────────────────────────────────────────────────────

    def _arrived(self, event: MessageArrived, now_seconds: float, wall_ns: int) -> list[Action]:
        try:
            return self._message(event)
        except ContractError as e:
            detail = {"topic": event.topic, "reason": str(e)}
            return self._complain("message_refused", now_seconds, wall_ns, **detail)

    def _message(self, event: MessageArrived) -> list[Action]:
        message, me = decode(event.payload), self._me
        match message:
            case Ack() if event.topic == self._topics.ack(me.device) and message.device == me.device:
                for seq in message.seqs:
                    self._in_flight.pop((message.session, seq), None)
                return [Trim(message.session, message.seqs)]
            case Command() if event.topic == self._topics.command(me.device) and message.device == me.device:
                self._reported = None
                return []
            case SignedRelease() if event.topic == self._topics.release(me.cohort, me.model):
                self._offer(event.payload, message.payload)
                return []
        raise ContractError(f"{type(message).__name__} does not belong on this topic of this device")

    # ── updates ────────────────────────────────────────────────────────────────────────────────────────

    def _offer(self, signed: bytes, payload: bytes) -> None:
        """Puts a release in line for the child. Nothing is verified yet: what it claims only orders the line."""
        claimed, me = from_payload(payload), self._me
        if (claimed.fleet, claimed.cohort, claimed.model) != (me.fleet, me.cohort, me.model):
            raise ContractError(
                f"release: is for {claimed.fleet}/{claimed.cohort}/{claimed.model}, "
                f"not for {me.fleet}/{me.cohort}/{me.model}"
            )
        self._offers.put(signed, claimed.revision)

    def _collect(self, *, begins: bool) -> list[Action]:
        """Makes room, also before an update ``begins`` that wants something else than the one before.

        What releases in line ask for is kept, whoever made them up: what is here of it need not be fetched again.
        """
        models = self._models
        if not models.garbage and not begins:
            return []
        keep = tuple(dict.fromkeys((*models.slots.known, *self._wanted())))
        if not models.garbage and keep == self._kept:
            return []
        models.garbage, self._kept = False, keep
        return [Collect(keep)]

    def _wanted(self) -> Iterator[Digest]:
        for signed in self._offers.line:
            message = decode(signed)
            assert isinstance(message, SignedRelease), "it was read before it was put in line"
            action, digest = self._needs(from_payload(message.payload))
            if action == "install" and digest is not None:
                yield digest

    def _needs(self, release: Release) -> tuple[str, Digest | None]:
        models = self._models
        return lifecycle.needs(
            release,
            self._me.device,
            serving=models.answering,
            have=models.have,
            quarantine=dict(models.slots.quarantine),
            shadowing=models.slots.shadowing,
        )

    def _start_update(self, offered: bytes) -> StartUpdate:
        models = self._models
        return StartUpdate(
            release=offered,
            floor=models.slots.floor(self._me.cohort),
            serving=models.answering,
            have=models.have,
            quarantine=models.slots.quarantine,
        )

    def _update_ended(self, event: UpdateEnded, now_seconds: float, wall_ns: int) -> list[Action]:
        self._phase = None
        if not event.ok and event.retry:
            if not self._is_condemned(event):
                return self._interrupted(event, now_seconds, wall_ns)
            event = replace(event, reason=f"{event.reason}, {SUSPICIONS} times")
        why = {"stage": event.stage, "reason": event.reason}
        release = event.release
        if release is None:
            self._offers.refuse(now_seconds)
            return self._complain("release_refused", now_seconds, wall_ns, **why)
        self._offers.follow(release.revision)
        models = self._models
        models.slots = lifecycle.accept(models.slots, release)
        if event.ok:
            return self._follow(release, event, now_seconds, wall_ns)
        if event.digest is None:
            return [models.keep(), *self._complain("release_refused", now_seconds, wall_ns, **why)]
        return models.refuse(event.digest, release.attempt, event.reason, wall_ns)

    def _is_condemned(self, event: UpdateEnded) -> bool:
        """Whether what the child holds against a model, and may be the device's fault, happened too often."""
        if event.release is None or event.digest is None:
            return False
        who, (before, count) = (event.digest, event.release.attempt), self._suspect
        self._suspect = (who, count + 1 if who == before else 1)
        return self._suspect[1] >= SUSPICIONS

    def _interrupted(self, event: UpdateEnded, now_seconds: float, wall_ns: int) -> list[Action]:
        """The child came to no end, and is to try again."""
        self._models.garbage = True  # the disk may be full
        release, pause = event.release, _pause(event)
        first = self._offers.interrupted(
            now_seconds,
            doubted=event.stage == "release" and release is None,
            revision=release.revision if release is not None else None,
            pause=pause,
        )
        why = {"stage": event.stage, "reason": event.reason}
        return [self._note("update_delayed", wall_ns, **why)] if first else []

    def _follow(self, release: Release, event: UpdateEnded, now_seconds: float, wall_ns: int) -> list[Action]:
        models = self._models
        s = models.slots
        action, digest = self._needs(release)
        if action == "keep" and s.shadowing is not None and digest != s.shadowing:
            return models.withdraw(release, wall_ns)
        if digest is None and s.trial is not None and models.can_go_back:
            # Nothing is asked for, so the trial isn't either: what stays is the committed model.
            action, digest = "switch", s.committed
        if action == "switch" and digest is not None:
            return models.switch(digest, release, wall_ns)
        if action == "install" and digest is not None:
            if event.installed and event.digest == digest:
                return models.installed(digest, release, wall_ns)
            # The device's own state moved while the child worked (a trial ended): ask again.
            self._offers.repeat(release.revision)
            self._offers.put_off(now_seconds)
        if action == "skip_quarantined" and digest is not None and s.outcome_digest != digest:
            return models.refuse(digest, release.attempt, "quarantined here by an earlier rollout", wall_ns)
        return [models.keep()]

    def _serve_failed(self, event: ServeFailed, now_seconds: float, wall_ns: int) -> list[Action]:
        models = self._models
        back = models.roll_back(event, wall_ns)
        if back is not None:
            return back
        if event.digest not in models.slots.known:
            return []
        waits = models.reload_at is not None
        actions = models.failed(event, now_seconds, wall_ns)
        if models.reload_at is not None and not waits:
            self._offers.wait_until(models.reload_at)
        self._offers.repeat(models.slots.revision)
        return actions

    def _unsaved(self, event: Unsaved, now_seconds: float, wall_ns: int) -> list[Action]:
        wanted = self._models.slots.revision
        actions = self._models.unsaved(now_seconds)
        if self._offers.repeat(wanted):  # what is kept may be older than the last release, too
            self._offers.put_off(now_seconds)
        return actions + self._complain("state_unsaved", now_seconds, wall_ns, reason=event.reason)


def _pause(event: UpdateEnded) -> Pause | None:
    """How long this release waits by itself; None where the network is absent, which all of them wait for."""
    if event.stage == "verify":
        return WRONG_BYTES
    if event.digest is not None:
        return SUSPECTED
    if event.stage == "release" and event.release is not None:
        return UNPUBLISHED
    return None
