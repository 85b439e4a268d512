"""The device's control plane: ``handle(event) -> actions``, without a socket, a clock or a disk.

The daemon performs the actions in order and reports what happened as further events. The fleet simulator runs
this same class by the hundred over a lossy link and a virtual clock.
"""

import math
import random
from typing import Final

from edge_runtime.contract import topics
from edge_runtime.contract.codec import decode
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, SessionId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Ack, Command, ModelReport, SignedRelease
from edge_runtime.contract.release import Release, from_payload
from edge_runtime.core import lifecycle
from edge_runtime.core.backoff import next_delay_seconds
from edge_runtime.core.budget import Budget, breaches, on_trial, surest_p99_ns
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
    Serve,
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
from edge_runtime.core.offers import Offers
from edge_runtime.core.voice import Identity, Voice

MAX_IN_FLIGHT: Final = 20
ACK_TIMEOUT_SECONDS: Final = 10.0
TRIAL_MIN_SAMPLES: Final = 200
COMPLAINT_SECONDS: Final = 60.0
"""What a peer can provoke is noted this often at most, so that a flood of it cannot push windows out of the outbox."""
PROGRESS_SECONDS: Final = 10.0
"""A trial's progress is made durable at once when it begins, then this often: flash memory wears."""
SAVE_SECONDS: Final = 10.0
"""A disk that refused the state is asked again after this long."""


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
        self._slots = slots
        self._budget = budget
        self._rng = rng
        self._shadows = shadows
        self._shadowing: Digest | None = None
        self._clock = ""
        self._connected = False
        self._phase: tuple[str, Digest] | None = None
        self._in_flight: dict[tuple[SessionId, int], float] = {}
        self._reported: tuple[str, ModelReport] | None = None
        self._complaints: dict[str, tuple[float, int]] = {}
        self._offers = Offers(rng)
        # The trial's CPU times before this activation, and when its progress was last saved.
        self._cpu_before = LatencyHistogram()
        self._progress_saved_at = -math.inf
        self._garbage = False
        self._broken: set[Digest] = set()
        self._load_failures = 0
        self._reload_at: float | None = None
        # A trial that could not be counted on disk waits for its activation; a commit waits for the disk.
        self._uncounted = False
        self._commit_at = -math.inf
        self._before = (slots, self._cpu_before, self._uncounted)

    @property
    def slots(self) -> SlotState:
        """The state now; what the last `Save` held differs from it at most by a trial's latest progress."""
        return self._slots

    @property
    def tried(self) -> Digest | None:
        """The candidate that answers rows on trial."""
        return self._slots.serving if self._slots.on_trial and not self._uncounted else None

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
            self._before = (self._slots, self._cpu_before, self._uncounted)
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
                return self._started(wall_ns)
            case UpdateEnded():
                return self._update_ended(event, now_seconds, wall_ns)
            case Served():
                self._loaded(event.digest)
                return self._served(event, now_seconds, wall_ns)
            case Shadowed():
                return self._shadowed(event, now_seconds, wall_ns)
            case ServeFailed():
                return self._serve_failed(event, now_seconds, wall_ns)
            case Unsaved():
                return self._unsaved(event, now_seconds, wall_ns)
            case Ticked():
                return self._reload(now_seconds)
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
                self._loaded(event.digest)
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
        wanted = None if self._uncounted else self._slots.shadowing
        if wanted != self._shadowing:
            self._shadowing = wanted
            actions.append(Shadow(wanted))
        if self._garbage and not self._offers.working:  # a blob the child has just installed is not known yet
            self._garbage = False
            actions.append(Collect(self._slots.known))
        if self._connected:
            if (offered := self._offers.next(now_seconds)) is not None:
                actions.append(self._start_update(offered))
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
        s = self._slots
        if (
            s.trial is not None
        ):  # also while the next one is fetched: whoever counts commits must not count this
            state, candidate = ("trial" if s.on_trial else "shadow"), s.trial.digest
        elif self._phase is not None:
            state, candidate = self._phase
        else:
            candidate = None
            settled = "committed" if self._answering else "idle"
            state = s.outcome if s.outcome == "rolled_back" else settled
        return ModelReport(
            model=s.model,
            state=state,
            serving=self._answering,
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

    def _started(self, wall_ns: int) -> list[Action]:
        before = self._slots.trial
        # To serve comes first: keeping a record waits for the disk.
        actions = self._resume()
        actions.append(self._note("started", wall_ns, serving=self._slots.serving or ""))
        if before is not None and self._slots.trial is None:
            self._garbage = True
            actions.append(self._ended_note(before.digest, wall_ns))
        return actions

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

    def _start_update(self, offered: bytes) -> StartUpdate:
        return StartUpdate(
            release=offered,
            floor=self._slots.floor(self._me.cohort),
            serving=self._answering,
            have=self._have,
            quarantine=self._slots.quarantine,
        )

    @property
    def _answering(self) -> Digest | None:
        return None if self._in_service in self._broken else self._in_service

    @property
    def _in_service(self) -> Digest | None:
        """What answers rows, or is to be loaded again and again until it does."""
        return self._slots.committed if self._uncounted else self._slots.serving

    @property
    def _can_go_back(self) -> bool:
        """Whether a candidate that nobody asks for any more can leave its place to the committed model."""
        return self._slots.committed is not None and self._slots.committed not in self._broken

    @property
    def _have(self) -> tuple[Digest, ...]:
        kept = (self._slots.committed, self._slots.previous, self._slots.shadowing)
        return tuple(d for d in kept if d is not None and d not in self._broken)

    def _update_ended(self, event: UpdateEnded, now_seconds: float, wall_ns: int) -> list[Action]:
        self._phase = None
        why = {"stage": event.stage, "reason": event.reason}
        if not event.ok and event.retry:
            return (
                [self._note("update_delayed", wall_ns, **why)]
                if self._offers.interrupted(now_seconds, doubted=event.stage == "release")
                else []
            )
        release = event.release
        if release is None:
            self._offers.refuse(now_seconds)
            return self._complain("release_refused", now_seconds, wall_ns, **why)
        self._offers.follow(release.revision)
        self._slots = lifecycle.accept(self._slots, release)
        if event.ok:
            return self._follow(release, event, now_seconds, wall_ns)
        if event.digest is None:
            return [self._keep(), *self._complain("release_refused", now_seconds, wall_ns, **why)]
        return self._refuse(event.digest, release.attempt, event.reason, wall_ns)

    def _refuse(self, digest: Digest, attempt: int, reason: str, wall_ns: int) -> list[Action]:
        """The model that the release wants is not to be had. A trial is over then, where one can go back: that of the
        same model (it was revoked meanwhile), and that of another, which nobody asks for any more.
        """
        before = self._in_service
        left = lifecycle.withdraw(self._slots) if self._can_go_back else self._slots
        self._slots = lifecycle.refuse(left, digest, attempt=attempt, reason=reason)
        self._garbage = True
        return [self._keep(), *self._serve_if_not(before), self._ended_note(digest, wall_ns)]

    def _serve_if_not(self, before: Digest | None) -> list[Action]:
        """What a step back loads."""
        return [] if self._in_service == before else [Serve(self._in_service)]

    def _follow(self, release: Release, event: UpdateEnded, now_seconds: float, wall_ns: int) -> list[Action]:
        s = self._slots
        action, digest = lifecycle.needs(
            release,
            self._me.device,
            serving=self._answering,
            have=self._have,
            quarantine=dict(s.quarantine),
            shadowing=s.shadowing,
        )
        if action == "keep" and s.shadowing is not None and digest != s.shadowing:
            self._slots, self._garbage = lifecycle.withdraw(s), True
            return [
                self._keep(),
                self._note("withdrawn", wall_ns, digest=s.shadowing, rollout=release.rollout),
            ]
        if digest is None and s.trial is not None and self._can_go_back:
            # Nothing is asked for, so the trial isn't either: what stays is the committed model.
            action, digest = "switch", s.committed
        if action == "switch" and digest is not None:
            return self._change("switched", lifecycle.switch(s, digest), release, wall_ns)
        if action == "install" and digest is not None:
            return self._installed(digest, release, event, now_seconds, wall_ns)
        if action == "skip_quarantined" and digest is not None and s.outcome_digest != digest:
            return self._refuse(digest, release.attempt, "quarantined here by an earlier rollout", wall_ns)
        return [self._keep()]

    def _installed(
        self, digest: Digest, release: Release, event: UpdateEnded, now_seconds: float, wall_ns: int
    ) -> list[Action]:
        if not event.installed or event.digest != digest:
            # The device's own state moved while the child worked (a trial ended): ask again.
            self._offers.repeat(release.revision)
            self._offers.put_off(now_seconds)
            return [self._keep()]
        self._broken.discard(digest)
        if digest == self._slots.committed:
            return self._change("repaired", lifecycle.withdraw(self._slots), release, wall_ns)
        return self._begin(digest, release, wall_ns)

    def _begin(self, digest: Digest, release: Release, wall_ns: int) -> list[Action]:
        """A candidate's probation: in the shadow first, where there is somebody to be compared with."""
        s, gate = self._slots, release.trial
        if release.shadow.rows and self._shadows and self._answering and self._answering == s.committed:
            self._slots = lifecycle.begin_shadow(
                s, digest, attempt=release.attempt, gate=gate, shadow=release.shadow
            )
            self._garbage = True
            note = self._note("shadow", wall_ns, digest=digest, rollout=release.rollout)
            return [*self._activate(load=False), note]
        trial = lifecycle.begin_trial(s, digest, attempt=release.attempt, gate=gate)
        return self._change("trial", trial, release, wall_ns)

    def _change(self, how: str, slots: SlotState, release: Release, wall_ns: int) -> list[Action]:
        self._slots, self._garbage = slots, True
        note = self._note(how, wall_ns, digest=slots.serving or "", rollout=release.rollout)
        return [*self._activate(), note]

    def _resume(self, *, load: bool = True) -> list[Action]:
        """Goes on with what the state says; without ``load`` the committed model serves already."""
        if self._slots.shadowing is not None and not (self._shadows and self._can_go_back):
            self._slots = lifecycle.leave_shadow(
                self._slots
            )  # begun under another configuration, or beside nobody
        return self._activate(load=load or self._slots.on_trial)

    def _activate(self, *, load: bool = True) -> list[Action]:
        """Durable first, then load: a crash while loading is counted against the candidate.

        What was committed before and serves without a candidate waits for no disk.
        """
        self._uncounted = False
        self._slots = lifecycle.activate(self._slots)
        trial = self._slots.trial
        self._cpu_before = trial.cpu if trial else LatencyHistogram()
        self._progress_saved_at = -math.inf
        saved = Save(
            self._slots, needed=trial is not None or self._slots.committed != self._before[0].committed
        )
        return [saved, Serve(self._slots.serving)] if load else [saved]

    def _keep(self) -> Save:
        """What steps back to a verified model, or only remembers, does not wait for the disk."""
        return Save(self._slots, needed=False)

    def _unsaved(self, event: Unsaved, now_seconds: float, wall_ns: int) -> list[Action]:
        """What was decided did not happen: it is as it was before, and it is tried again later."""
        wanted, self._garbage = self._slots, False
        self._slots, self._cpu_before, self._uncounted = self._before
        noted = self._complain("state_unsaved", now_seconds, wall_ns, reason=event.reason)
        if self._offers.repeat(wanted.revision):  # what the disk has may be older than the last release, too
            self._offers.put_off(now_seconds)
        trial, again = self._slots.trial, now_seconds + SAVE_SECONDS
        if trial is not None and wanted.committed == trial.digest:
            self._commit_at = again
        elif self._shadows and self._slots.shadowing is not None and wanted.on_trial:
            self._commit_at = again  # it stays in the shadow until then
        elif trial is not None and wanted.trial is not None and wanted.trial.digest == trial.digest:
            # A start that the disk did not count could be repeated for ever: what was committed serves meanwhile.
            serves, self._uncounted, self._reload_at = self._uncounted, True, again
            return noted if serves else [Serve(self._slots.committed), *noted]
        return noted

    # ── what serves ────────────────────────────────────────────────────────────────────────────────────

    def _served(self, event: Served, now_seconds: float, wall_ns: int) -> list[Action]:
        before = self._slots.trial
        if before is None or not self._slots.on_trial or before.digest != event.digest:
            return []
        self._slots = lifecycle.progress(
            self._slots,
            predictions=event.predictions,
            seconds=event.seconds,
            cpu=self._cpu_before.merge(event.cpu),
        )
        trial = self._slots.trial or before
        judged = trial.cpu.count >= min(TRIAL_MIN_SAMPLES, trial.gate.predictions)
        problems = [f"{event.failed} predictions failed in the engine"] if event.failed else []
        if judged:
            allowed = on_trial(self._budget, event.incumbent_cpu)
            p99_ns = surest_p99_ns(trial.cpu)
            problems += breaches(allowed, predict_p99_ns=p99_ns, rss_bytes=event.rss_bytes)
        if problems:
            return self._roll_back("; ".join(problems), trial.digest, wall_ns)
        if judged and trial.progressed and trial.passed and now_seconds >= self._commit_at:
            self._slots, self._garbage = lifecycle.commit(self._slots), True
            return [Save(self._slots), self._ended_note(trial.digest, wall_ns)]
        return [] if trial == before else self._progressed(now_seconds)

    def _progressed(self, now_seconds: float) -> list[Action]:
        if now_seconds < self._progress_saved_at + PROGRESS_SECONDS:
            return []
        self._progress_saved_at = now_seconds
        return [self._keep()]

    def _shadowed(self, event: Shadowed, now_seconds: float, wall_ns: int) -> list[Action]:
        digest = event.digest
        if self._slots.shadowing != digest:
            return []
        before = self._slots
        self._slots = lifecycle.compare(before, rows=event.rows, disagreed=event.disagreed)
        trial = self._slots.trial
        assert trial is not None
        assert trial.shadow is not None
        allowed = trial.shadow.max_disagreement * max(trial.shadow.rows, trial.compared)
        if event.failed:
            return self._roll_back(f"failed in the shadow: {event.failed}", digest, wall_ns)
        if trial.disagreed > allowed:
            reason = (
                f"answered {trial.disagreed} of {trial.compared} live rows otherwise than the model in service; "
                f"{trial.shadow.max_disagreement:.0%} are allowed"
            )
            return self._roll_back(reason, digest, wall_ns)
        if (event.alone or trial.compared >= trial.shadow.rows) and now_seconds >= self._commit_at:
            self._slots = lifecycle.leave_shadow(self._slots)
            told = {"rows": str(trial.compared), "disagreed": str(trial.disagreed)}
            if event.alone:
                told["reason"] = event.alone
            note = self._note("trial", wall_ns, digest=digest, rollout=self._slots.rollout, **told)
            return [*self._activate(), note]
        return [] if self._slots == before else self._progressed(now_seconds)

    def _roll_back(self, reason: str, digest: Digest, wall_ns: int) -> list[Action]:
        before = self._in_service
        self._slots, self._garbage = lifecycle.fail(self._slots, reason), True
        return [self._keep(), *self._serve_if_not(before), self._ended_note(digest, wall_ns)]

    def _serve_failed(self, event: ServeFailed, now_seconds: float, wall_ns: int) -> list[Action]:
        trial = self._slots.trial
        if trial is not None and trial.digest == event.digest:
            return self._roll_back(event.reason, event.digest, wall_ns)
        if event.digest not in self._slots.known:
            return []
        actions: list[Action] = []
        if event.digest not in self._broken:
            actions.append(self._note("model_broken", wall_ns, digest=event.digest, reason=event.reason))
        self._broken.add(event.digest)
        self._slots = lifecycle.broken(self._slots, event.digest, event.reason)
        if self._in_service == event.digest:
            # Nothing to fall back to: load it again after a while, and have it fetched again meanwhile.
            if self._reload_at is None:  # who says so again and again must not put it off
                self._load_failures += 1
                self._reload_at = now_seconds + next_delay_seconds(self._load_failures, self._rng)
                self._offers.wait_until(self._reload_at)
            if self._slots.shadowing not in (
                None,
                *self._broken,
            ):  # with nobody to be compared with, it serves
                self._slots = lifecycle.leave_shadow(self._slots)
                actions = [*self._activate(), *actions]
        else:
            self._garbage = True
            actions = [self._keep(), Serve(self._in_service), *actions]
        self._offers.repeat(self._slots.revision)
        return actions

    def _loaded(self, digest: Digest) -> None:
        """The model answers."""
        if digest == self._in_service:
            self._broken.discard(digest)
            self._load_failures = 0
            if not self._uncounted:
                self._reload_at = None

    def _reload(self, now_seconds: float) -> list[Action]:
        if self._reload_at is None or now_seconds < self._reload_at:
            return []
        self._reload_at = None
        if self._uncounted and self._slots.trial is not None:
            return self._resume(load=False)
        return [Serve(self._in_service)]

    def _ended_note(self, digest: Digest, wall_ns: int) -> Append:
        s = self._slots
        counts: dict[str, str] = {}
        if s.shadow_rows:
            counts = {"rows": str(s.shadow_rows), "disagreed": str(s.shadow_disagreed)}
        return self._note(s.outcome, wall_ns, digest=digest, reason=s.reason, rollout=s.rollout, **counts)
