"""The device's control plane: ``handle(event) -> actions``, without a socket, a clock or a disk.

The daemon performs the actions in order and reports what happened as further events. The fleet simulator runs
this same class by the hundred over a lossy link and a virtual clock.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edge_runtime.contract import ids, topics
from edge_runtime.contract.codec import decode, encode
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, FleetId, ModelName, SessionId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import (
    Ack,
    Command,
    Event,
    Health,
    ModelReport,
    SignedRelease,
    Status,
    Window,
)
from edge_runtime.contract.profile import Profile
from edge_runtime.contract.release import from_payload
from edge_runtime.core import lifecycle
from edge_runtime.core.backoff import next_delay_seconds
from edge_runtime.core.budget import Budget, breaches
from edge_runtime.core.lifecycle import SlotState

MAX_IN_FLIGHT: Final = 20
ACK_TIMEOUT_SECONDS: Final = 10.0
TRIAL_MIN_SAMPLES: Final = 200
REFUSAL_NOTE_SECONDS: Final = 60.0
"""Bad messages are noted this often at most, so that a flood of them cannot push windows out of the outbox."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who the device is."""

    fleet: FleetId
    device: DeviceId
    cohort: CohortId
    session: SessionId
    model: ModelName
    attributes: tuple[tuple[str, str], ...] = ()


# ── events: what happened ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Started:
    """The daemon is up; the agent was built from the state on disk."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The link to the broker is up and subscribed."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The link is down."""


@dataclass(frozen=True, slots=True)
class MessageArrived:
    """Bytes came in on a topic this device subscribed to."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowClosed:
    """The data plane closed a window."""

    digest: Digest
    start_ns: int
    end_ns: int
    synced: bool
    profile: Profile
    latency: LatencyHistogram
    health: Health
    refused: tuple[tuple[str, int], ...] = ()
    failed: int = 0
    labelled: int = 0
    correct: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """Records of the outbox were handed to the link."""

    keys: tuple[tuple[SessionId, int], ...]


@dataclass(frozen=True, slots=True)
class UpdatePhase:
    """The update child reached a phase: ``fetching``, ``verified`` or ``probed``."""

    phase: str
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateEnded:
    """The update child's last word.

    ``release`` is the payload whose signature was verified, empty when none was. ``ok`` with a desired model that is
    not here yet means: fetched, verified, probed and installed.
    """

    ok: bool
    release: bytes = b""
    stage: str = ""
    reason: str = ""
    retry: bool = False
    digest: Digest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the serving model did since the last report; ``cpu_p99_ns`` over ``samples`` predictions."""

    digest: Digest
    predictions: int
    failed: int
    seconds: float
    samples: int
    cpu_p99_ns: float
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class ServeFailed:
    """The model could not be loaded from its blob."""

    digest: Digest
    reason: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


AgentEvent = (
    Started
    | Connected
    | Disconnected
    | MessageArrived
    | WindowClosed
    | Sent
    | UpdatePhase
    | UpdateEnded
    | Served
    | ServeFailed
    | Ticked
)


# ── actions: what to do about it ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Save:
    """Make the state durable before the next action is performed."""

    slots: SlotState


@dataclass(frozen=True, slots=True)
class Serve:
    """Load this model and answer predictions with it; None stops serving. Failure comes back as `ServeFailed`."""

    digest: Digest | None


@dataclass(frozen=True, slots=True)
class Collect:
    """Delete every blob but these."""

    keep: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish now; lost when the link is down (retained status is published again on connect)."""

    topic: str
    payload: bytes
    delivery: topics.Delivery


@dataclass(frozen=True, slots=True)
class Append:
    """Put a message into the durable outbox."""

    session: SessionId
    seq: int
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Send:
    """Publish up to ``room`` records of the outbox, leaving out those in flight; answer with `Sent`."""

    room: int
    skip: frozenset[tuple[SessionId, int]]


@dataclass(frozen=True, slots=True)
class Trim:
    """The aggregator has stored these: forget them."""

    session: SessionId
    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUpdate:
    """Start the update child on a release that nobody has verified yet."""

    release: bytes
    floor: int
    serving: Digest | None
    have: tuple[Digest, ...]
    quarantine: tuple[tuple[Digest, int], ...]


Action = Save | Serve | Collect | Publish | Append | Send | Trim | StartUpdate


class Agent:
    """One device's control plane for one model family.

    ``slots`` is the state as it was last saved. Not thread-safe: one loop owns it.
    """

    def __init__(self, identity: Identity, slots: SlotState, budget: Budget, rng: random.Random) -> None:
        self._me = identity
        self._topics = topics.Topics(identity.fleet)
        self._slots = slots
        self._budget = budget
        self._rng = rng
        self._seq = 0
        self._connected = False
        self._phase: tuple[str, Digest] | None = None
        self._in_flight: dict[tuple[SessionId, int], float] = {}
        self._reported: tuple[ModelReport, ...] | None = None
        self._release = b""
        self._handled = b""
        self._updating = b""
        self._attempt = 0
        self._retry_at: float | None = None
        self._refusals = 0
        self._refusal_noted_at: float | None = None

    @property
    def slots(self) -> SlotState:
        """The state as it was last handed out in a `Save`."""
        return self._slots

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
        status = Status(device=self._me.device, session=self._me.session, seq=2**62, online=False)
        return Publish(self._topics.status(self._me.device), encode(status), topics.STATUS)

    def handle(self, event: AgentEvent, now_seconds: float, wall_ns: int) -> list[Action]:
        """What to do about ``event``, in order. ``now_seconds`` is monotonic, ``wall_ns`` since 1970."""
        return self._decide(event, now_seconds, wall_ns) + self._follow_up(event, now_seconds)

    def _decide(  # noqa: PLR0911 (one per event)
        self, event: AgentEvent, now_seconds: float, wall_ns: int
    ) -> list[Action]:
        match event:
            case Started():
                return self._started(wall_ns)
            case Connected():
                self._connected = True
                self._reported = None
                return []
            case Disconnected():
                self._connected = False
                self._in_flight.clear()
                return []
            case MessageArrived():
                return self._arrived(event, now_seconds, wall_ns)
            case WindowClosed():
                return [self._window(event)]
            case Sent():
                self._in_flight.update(dict.fromkeys(event.keys, now_seconds + ACK_TIMEOUT_SECONDS))
                return []
            case UpdatePhase():
                self._phase = (event.phase, event.digest)
                return []
            case UpdateEnded():
                return self._update_ended(event, now_seconds, wall_ns)
            case Served():
                return self._served(event, wall_ns)
            case ServeFailed():
                return self._serve_failed(event, wall_ns)
            case Ticked():
                return []

    def _follow_up(self, event: AgentEvent, now_seconds: float) -> list[Action]:
        actions: list[Action] = []
        if self._connected:
            waiting = self._retry_at is not None and now_seconds < self._retry_at
            if self._release != self._handled and not self._updating and not waiting:
                actions.append(self._start_update())
            actions += self._birth()
            for key in [k for k, deadline in self._in_flight.items() if deadline <= now_seconds]:
                del self._in_flight[key]
            room = MAX_IN_FLIGHT - len(self._in_flight)
            if room and isinstance(event, Connected | WindowClosed | MessageArrived | Ticked):
                actions.append(Send(room, frozenset(self._in_flight)))
        return actions

    # ── what leaves ────────────────────────────────────────────────────────────────────────────────────

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def _report(self) -> ModelReport:
        s = self._slots
        if self._phase is not None:
            state, candidate = self._phase
        elif s.trial is not None:
            state, candidate = "trial", s.trial.digest
        else:
            candidate = None
            state = s.outcome if s.outcome == "rolled_back" else "committed" if s.committed else "idle"
        return ModelReport(
            model=s.model,
            state=state,
            serving=s.serving,
            previous=s.previous,
            candidate=candidate,
            rollout=s.rollout,
            revision=s.revision,
            outcome=s.outcome,
            outcome_digest=s.outcome_digest if s.outcome else None,
            reason=s.reason[:500],
            quarantined=tuple(d for d, _ in s.quarantine),
        )

    def _birth(self) -> list[Action]:
        models = (self._report(),)
        if models == self._reported:
            return []
        self._reported = models
        status = Status(
            device=self._me.device,
            session=self._me.session,
            seq=self._next_seq(),
            online=True,
            attributes=tuple(sorted({**dict(self._me.attributes), "cohort": self._me.cohort}.items())),
            models=models,
        )
        return [Publish(self._topics.status(self._me.device), encode(status), topics.STATUS)]

    def _note(self, name: str, wall_ns: int, **detail: str) -> Append:
        event = Event(
            device=self._me.device,
            session=self._me.session,
            seq=self._next_seq(),
            wall_ns=wall_ns,
            name=name,
            detail=tuple(sorted((k, v[:500]) for k, v in detail.items())),
        )
        return Append(event.session, event.seq, self._topics.event(event.device), encode(event))

    def _window(self, e: WindowClosed) -> Append:
        seq = self._next_seq()
        window = Window(
            device=self._me.device,
            session=self._me.session,
            seq=seq,
            seq_lo=seq,
            model=self._me.model,
            digest=e.digest,
            start_ns=e.start_ns,
            end_ns=e.end_ns,
            synced=e.synced,
            profile=e.profile,
            latency=e.latency,
            health=e.health,
            refused=e.refused,
            failed=e.failed,
            labelled=e.labelled,
            correct=e.correct,
        )
        topic = self._topics.window(window.device, window.model)
        return Append(window.session, seq, topic, encode(window))

    # ── what arrives ───────────────────────────────────────────────────────────────────────────────────

    def _started(self, wall_ns: int) -> list[Action]:
        before = self._slots.trial
        actions: list[Action] = [self._note("started", wall_ns, serving=self._slots.serving or "")]
        actions += self._activate()
        if before is not None and self._slots.trial is None:
            actions.append(self._ended_note("rolled_back", before.digest, wall_ns))
        return actions

    def _arrived(self, event: MessageArrived, now_seconds: float, wall_ns: int) -> list[Action]:
        try:
            message = decode(event.payload)
            match message:
                case Ack() if message.device == self._me.device:
                    for seq in message.seqs:
                        self._in_flight.pop((message.session, seq), None)
                    return [Trim(message.session, message.seqs)]
                case Command() if message.device == self._me.device:
                    self._reported = None
                    return []
                case SignedRelease():
                    if event.payload != self._release:
                        self._release = event.payload
                        self._attempt, self._retry_at = 0, None
                    return []
                case _:
                    problem = f"a {type(message).__name__} does not belong here"
        except ContractError as e:
            problem = str(e)
        self._refusals += 1
        noted = self._refusal_noted_at
        if noted is not None and now_seconds < noted + REFUSAL_NOTE_SECONDS:
            return []
        self._refusal_noted_at = now_seconds
        count = str(self._refusals)
        return [self._note("message_refused", wall_ns, topic=event.topic, reason=problem, count=count)]

    # ── updates ────────────────────────────────────────────────────────────────────────────────────────

    def _start_update(self) -> StartUpdate:
        self._updating = self._release
        s = self._slots
        return StartUpdate(
            release=self._release,
            floor=s.floor(self._me.cohort),
            serving=s.serving,
            have=tuple(d for d in (s.committed, s.previous) if d is not None),
            quarantine=s.quarantine,
        )

    def _update_ended(self, event: UpdateEnded, now_seconds: float, wall_ns: int) -> list[Action]:
        of, self._updating, self._phase = self._updating, b"", None
        if not event.ok and event.retry:
            self._attempt += 1
            delay = next_delay_seconds(self._attempt, self._rng)
            self._retry_at = now_seconds + delay
            note = self._note("update_delayed", wall_ns, stage=event.stage, reason=event.reason)
            return [note] if self._attempt == 1 else []
        self._handled, self._retry_at = of, None
        if not event.release:
            return [self._note("release_refused", wall_ns, stage=event.stage, reason=event.reason)]
        release = from_payload(event.release)
        self._slots = lifecycle.accept(self._slots, release)
        if not event.ok:
            if event.digest is not None:
                self._slots = lifecycle.refuse(
                    self._slots, event.digest, attempt=release.attempt, reason=event.reason
                )
                return [Save(self._slots), self._ended_note("refused", event.digest, wall_ns)]
            return [
                Save(self._slots),
                self._note("release_refused", wall_ns, stage=event.stage, reason=event.reason),
            ]
        return self._follow(event, wall_ns)

    def _follow(self, event: UpdateEnded, wall_ns: int) -> list[Action]:
        release = from_payload(event.release)
        s = self._slots
        action, digest = lifecycle.needs(
            release,
            self._me.device,
            serving=s.serving,
            have=[d for d in (s.committed, s.previous) if d is not None],
            quarantine=dict(s.quarantine),
        )
        if action == "switch" and digest is not None:
            self._slots = lifecycle.switch(s, digest)
            return [
                *self._activate(),
                self._note("switched", wall_ns, digest=digest, rollout=release.rollout),
            ]
        if action == "install" and digest is not None:
            if event.digest != digest:
                # The device's own state moved while the child worked (a trial ended): ask again.
                self._handled = b""
                return [Save(s)]
            self._slots = lifecycle.begin_trial(s, digest, attempt=release.attempt, gate=release.trial)
            return [*self._activate(), self._note("trial", wall_ns, digest=digest, rollout=release.rollout)]
        return [Save(s)]

    def _activate(self) -> list[Action]:
        """Durable first, then load: a crash while loading is counted against the trial."""
        self._slots = lifecycle.activate(self._slots)
        return [Save(self._slots), Serve(self._slots.serving)]

    def _served(self, event: Served, wall_ns: int) -> list[Action]:
        trial = self._slots.trial
        if trial is None or trial.digest != event.digest:
            return []
        problems = [f"{event.failed} predictions failed in the engine"] if event.failed else []
        if event.samples >= TRIAL_MIN_SAMPLES:
            problems += breaches(self._budget, predict_p99_ns=event.cpu_p99_ns, rss_bytes=event.rss_bytes)
        if problems:
            return self._roll_back("; ".join(problems), trial.digest, wall_ns)
        before = self._slots
        self._slots = lifecycle.progress(before, predictions=event.predictions, seconds=event.seconds)
        if self._slots == before:
            return []
        if self._slots.trial is not None and self._slots.trial.passed:
            self._slots = lifecycle.commit(self._slots)
            return [
                Save(self._slots),
                Collect(self._slots.known),
                self._ended_note("committed", trial.digest, wall_ns),
            ]
        return [Save(self._slots)]

    def _roll_back(self, reason: str, digest: Digest, wall_ns: int) -> list[Action]:
        self._slots = lifecycle.fail(self._slots, reason)
        return [
            Save(self._slots),
            Serve(self._slots.serving),
            self._ended_note("rolled_back", digest, wall_ns),
        ]

    def _serve_failed(self, event: ServeFailed, wall_ns: int) -> list[Action]:
        self._slots = lifecycle.broken(self._slots, event.digest, event.reason)
        # Whatever the release wants may have to be fetched again.
        self._handled = b""
        return [
            Save(self._slots),
            self._note("model_broken", wall_ns, digest=event.digest, reason=event.reason),
            *([Serve(self._slots.serving)] if self._slots.serving != event.digest else []),
        ]

    def _ended_note(self, how: str, digest: Digest, wall_ns: int) -> Append:
        return self._note(how, wall_ns, digest=digest, reason=self._slots.reason, rollout=self._slots.rollout)


def update_ended(result: Mapping[str, object]) -> UpdateEnded:
    """Reads the update child's result; raises `ContractError` when it is not one."""
    f = Fields(result, "update")
    ok = f.flag("ok")
    name = "desired" if ok else "digest"
    digest = f.text(name, "")
    return UpdateEnded(
        ok=ok,
        release=bytes.fromhex(f.text("release", "", max_length=1 << 18)),
        stage=f.text("stage", ""),
        reason=f.text("reason", "", max_length=1 << 16),
        retry=f.flag("retry", False),
        digest=ids.digest(digest) if digest else None,
    )
