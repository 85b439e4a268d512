"""Which of a device's models answers rows, and which candidate is on its way there: the decisions behind `lifecycle`.

Every decision is made durable before its effect, but a step back to a verified model, which waits for no disk.
"""

import math
import random
from collections.abc import Callable
from typing import Final

from edge_runtime.contract.ids import Digest
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.release import Release
from edge_runtime.core import lifecycle
from edge_runtime.core.backoff import next_delay_seconds
from edge_runtime.core.budget import Budget, breaches, on_trial, surest_p99_ns
from edge_runtime.core.events import Action, Append, Save, Serve, Served, ServeFailed, Shadowed
from edge_runtime.core.lifecycle import SlotState

TRIAL_MIN_SAMPLES: Final = 200
PROGRESS_SECONDS: Final = 10.0
"""A trial's progress is made durable at once when it begins, then this often: flash memory wears."""
SAVE_SECONDS: Final = 10.0
"""A disk that refused the state is asked again after this long."""


class Probation:
    """The models of one family on one device. Its owner says what happens, and performs what is returned, in order.

    Without ``shadows`` a candidate goes to its trial at once, whatever the release says. ``note`` makes a message for
    the centre of a name, the wall time in nanoseconds and details.
    """

    def __init__(
        self,
        slots: SlotState,
        budget: Budget,
        rng: random.Random,
        *,
        shadows: bool,
        note: Callable[..., Append],
    ) -> None:
        self.slots = slots
        self.garbage = False
        """Whether there may be blobs that nobody needs any more."""
        self.reload_at: float | None = None
        """When what serves is loaded again, in monotonic seconds."""
        self._budget = budget
        self._rng = rng
        self._shadows = shadows
        self._note = note
        # The trial's CPU times before this activation, and when its progress was last saved.
        self._cpu_before = LatencyHistogram()
        self._progress_saved_at = -math.inf
        self._broken: set[Digest] = set()
        self._load_failures = 0
        # A trial that could not be counted on disk waits for its activation; a commit waits for the disk.
        self._uncounted = False
        self._commit_at = -math.inf
        self.remember()

    def remember(self) -> None:
        """From here on something is decided, to which `unsaved` goes back."""
        self._before = (self.slots, self._cpu_before, self._uncounted)

    # ── how it stands ──────────────────────────────────────────────────────────────────────────────────

    @property
    def tried(self) -> Digest | None:
        """The candidate that answers rows on trial."""
        return self.slots.serving if self.slots.on_trial and not self._uncounted else None

    @property
    def shadowing(self) -> Digest | None:
        """The candidate that is to be in the shadow now."""
        return None if self._uncounted else self.slots.shadowing

    @property
    def answering(self) -> Digest | None:
        """What answers rows; None while it cannot be loaded."""
        return None if self._in_service in self._broken else self._in_service

    @property
    def have(self) -> tuple[Digest, ...]:
        """The models that are here and can be loaded, as far as is known."""
        kept = (self.slots.committed, self.slots.previous, self.slots.shadowing)
        return tuple(d for d in kept if d is not None and d not in self._broken)

    @property
    def can_go_back(self) -> bool:
        """Whether a candidate that nobody asks for any more can leave its place to the committed model."""
        return self.slots.committed is not None and self.slots.committed not in self._broken

    @property
    def _in_service(self) -> Digest | None:
        """What answers rows, or is to be loaded again and again until it does."""
        return self.slots.committed if self._uncounted else self.slots.serving

    # ── what a release asks for ────────────────────────────────────────────────────────────────────────

    def keep(self) -> Save:
        """What steps back to a verified model, or only remembers, does not wait for the disk."""
        return Save(self.slots, needed=False)

    def withdraw(self, release: Release, wall_ns: int) -> list[Action]:
        """Nobody asks for the candidate in the shadow any more."""
        gone = self.slots.shadowing or ""
        self.slots, self.garbage = lifecycle.withdraw(self.slots), True
        return [self.keep(), self._note("withdrawn", wall_ns, digest=gone, rollout=release.rollout)]

    def switch(self, digest: Digest, release: Release, wall_ns: int) -> list[Action]:
        """To a model that was committed here before, or is."""
        return self._change("switched", lifecycle.switch(self.slots, digest), release, wall_ns)

    def installed(self, digest: Digest, release: Release, wall_ns: int) -> list[Action]:
        """The model was fetched and proven.

        A candidate's probation begins in the shadow, where there is somebody to be compared with.
        """
        self._broken.discard(digest)
        s, gate = self.slots, release.trial
        if digest == s.committed:
            return self._change("repaired", lifecycle.withdraw(s), release, wall_ns)
        if release.shadow.rows and self._shadows and self.answering and self.answering == s.committed:
            self.slots = lifecycle.begin_shadow(
                s, digest, attempt=release.attempt, gate=gate, shadow=release.shadow
            )
            self.garbage = True
            note = self._note("shadow", wall_ns, digest=digest, rollout=release.rollout)
            return [*self._activate(load=False), note]
        trial = lifecycle.begin_trial(s, digest, attempt=release.attempt, gate=gate)
        return self._change("trial", trial, release, wall_ns)

    def refuse(self, digest: Digest, attempt: int, reason: str, wall_ns: int) -> list[Action]:
        """The model that the release wants is not to be had. A trial is over then, where one can go back: that of the
        same model (it was revoked meanwhile), and that of another, which nobody asks for any more.
        """
        before = self._in_service
        left = lifecycle.withdraw(self.slots) if self.can_go_back else self.slots
        self.slots = lifecycle.refuse(left, digest, attempt=attempt, reason=reason)
        self.garbage = True
        return [self.keep(), *self._serve_if_not(before), self._ended_note(digest, wall_ns)]

    # ── what happens to it ─────────────────────────────────────────────────────────────────────────────

    def started(self, wall_ns: int, *, crashed: bool) -> list[Action]:
        """The process is up; to serve comes first, for keeping a record waits for the disk."""
        before = self.slots.trial
        actions = self._resume(crashed=crashed)
        actions.append(self._note("started", wall_ns, serving=self.slots.serving or ""))
        if before is not None and self.slots.trial is None:
            self.garbage = True
            actions.append(self._ended_note(before.digest, wall_ns))
        return actions

    def served(self, event: Served, now_seconds: float, wall_ns: int) -> list[Action]:
        """A model answered rows: a trial goes on, ends, or passes."""
        before = self.slots.trial
        if before is None or not self.slots.on_trial or before.digest != event.digest:
            return []
        self.slots = lifecycle.progress(
            self.slots,
            predictions=event.predictions,
            seconds=event.seconds,
            cpu=self._cpu_before.merge(event.cpu),
            refused=event.refused,
        )
        trial = self.slots.trial or before
        judged = trial.cpu.count >= min(TRIAL_MIN_SAMPLES, trial.gate.predictions)
        problems = [f"{event.failed} predictions failed in the engine"] if event.failed else []
        if trial.refuses:
            problems.append(
                f"had no answer for {trial.refused} calls that the model before it answers, and one for "
                f"{trial.cpu.count}; {100.0 * trial.gate.max_refused:.3g} % are allowed"
            )
        if judged:
            declared = Budget(predict_p99_ns=event.declared_p99_ns)
            allowed = on_trial(self._budget.tightest(declared), event.incumbent_cpu)
            p99_ns = surest_p99_ns(trial.cpu)
            problems += breaches(allowed, predict_p99_ns=p99_ns, rss_bytes=event.rss_bytes)
        if problems:
            return self._roll_back("; ".join(problems), trial.digest, wall_ns)
        if judged and trial.progressed and trial.passed and now_seconds >= self._commit_at:
            self.slots, self.garbage = lifecycle.commit(self.slots), True
            return [Save(self.slots), self._ended_note(trial.digest, wall_ns)]
        return [] if trial == before else self._progressed(now_seconds)

    def shadowed(self, event: Shadowed, now_seconds: float, wall_ns: int) -> list[Action]:
        """A candidate answered rows in the shadow: it goes on, is refused, or goes to its trial."""
        digest = event.digest
        if self.slots.shadowing != digest:
            return []
        before = self.slots
        self.slots = lifecycle.compare(before, rows=event.rows, disagreed=event.disagreed)
        trial = self.slots.trial
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
            self.slots = lifecycle.leave_shadow(self.slots)
            told = {"rows": str(trial.compared), "disagreed": str(trial.disagreed)}
            if event.alone:
                told["reason"] = event.alone
            note = self._note("trial", wall_ns, digest=digest, rollout=self.slots.rollout, **told)
            return [*self._activate(), note]
        return [] if self.slots == before else self._progressed(now_seconds)

    def failed(self, event: ServeFailed, now_seconds: float, wall_ns: int) -> list[Action]:
        """A model cannot be loaded: what is left serves. With nothing left it is tried again at `reload_at`."""
        actions: list[Action] = []
        if event.digest not in self._broken:
            actions.append(self._note("model_broken", wall_ns, digest=event.digest, reason=event.reason))
        self._broken.add(event.digest)
        self.slots = lifecycle.broken(self.slots, event.digest, event.reason)
        if self._in_service != event.digest:
            self.garbage = True
            return [self.keep(), Serve(self._in_service), *actions]
        if self.reload_at is None:  # who says so again and again must not put it off
            self._load_failures += 1
            self.reload_at = now_seconds + next_delay_seconds(self._load_failures, self._rng)
        if self.slots.shadowing not in (None, *self._broken):  # with nobody to be compared with, it serves
            self.slots = lifecycle.leave_shadow(self.slots)
            actions = [*self._activate(), *actions]
        return actions

    def roll_back(self, event: ServeFailed, wall_ns: int) -> list[Action] | None:
        """The same of a candidate on probation; None when it is of none."""
        trial = self.slots.trial
        if trial is None or trial.digest != event.digest:
            return None
        return self._roll_back(event.reason, event.digest, wall_ns)

    def unsaved(self, now_seconds: float) -> list[Action]:
        """What was decided did not happen: it is as it was before that, and is tried again later."""
        wanted, self.garbage = self.slots, False
        self.slots, self._cpu_before, self._uncounted = self._before
        trial, again = self.slots.trial, now_seconds + SAVE_SECONDS
        if trial is not None and wanted.committed == trial.digest:
            self._commit_at = again
        elif self._shadows and self.slots.shadowing is not None and wanted.on_trial:
            self._commit_at = again  # it stays in the shadow until then
        elif trial is not None and wanted.trial is not None and wanted.trial.digest == trial.digest:
            # A start that the disk did not count could be repeated for ever: what was committed serves meanwhile.
            serves, self._uncounted, self.reload_at = self._uncounted, True, again
            return [] if serves else [Serve(self.slots.committed)]
        return []

    def loaded(self, digest: Digest) -> None:
        """The model answers."""
        if digest == self._in_service:
            self._broken.discard(digest)
            self._load_failures = 0
            if not self._uncounted:
                self.reload_at = None

    def ticked(self, now_seconds: float) -> list[Action]:
        """Loads again what it is time for."""
        if self.reload_at is None or now_seconds < self.reload_at:
            return []
        self.reload_at = None
        if self._uncounted and self.slots.trial is not None:
            return self._resume(load=False)
        return [Serve(self._in_service)]

    # ── steps ──────────────────────────────────────────────────────────────────────────────────────────

    def _change(self, how: str, slots: SlotState, release: Release, wall_ns: int) -> list[Action]:
        self.slots, self.garbage = slots, True
        note = self._note(how, wall_ns, digest=slots.serving or "", rollout=release.rollout)
        return [*self._activate(), note]

    def _resume(self, *, load: bool = True, crashed: bool = False) -> list[Action]:
        """Goes on with what the state says; without ``load`` the committed model serves already."""
        if self.slots.shadowing is not None and not (self._shadows and self.can_go_back):
            self.slots = lifecycle.leave_shadow(
                self.slots
            )  # begun under another configuration, or beside nobody
        return self._activate(load=load or self.slots.on_trial, crashed=crashed)

    def _activate(self, *, load: bool = True, crashed: bool = False) -> list[Action]:
        """Durable first, then load: a crash while loading is counted against the candidate.

        What was committed before and serves without a candidate waits for no disk.
        """
        self._uncounted = False
        self.slots = lifecycle.activate(self.slots, crashed=crashed)
        trial = self.slots.trial
        self._cpu_before = trial.cpu if trial else LatencyHistogram()
        self._progress_saved_at = -math.inf
        was, _, _ = self._before
        saved = Save(self.slots, needed=trial is not None or self.slots.committed != was.committed)
        return [saved, Serve(self.slots.serving)] if load else [saved]

    def _progressed(self, now_seconds: float) -> list[Action]:
        if now_seconds < self._progress_saved_at + PROGRESS_SECONDS:
            return []
        self._progress_saved_at = now_seconds
        return [self.keep()]

    def _roll_back(self, reason: str, digest: Digest, wall_ns: int) -> list[Action]:
        before = self._in_service
        self.slots, self.garbage = lifecycle.fail(self.slots, reason), True
        return [self.keep(), *self._serve_if_not(before), self._ended_note(digest, wall_ns)]

    def _serve_if_not(self, before: Digest | None) -> list[Action]:
        """What a step back loads."""
        return [] if self._in_service == before else [Serve(self._in_service)]

    def _ended_note(self, digest: Digest, wall_ns: int) -> Append:
        s = self.slots
        counts: dict[str, str] = {}
        if s.shadow_rows:
            counts = {"rows": str(s.shadow_rows), "disagreed": str(s.shadow_disagreed)}
        return self._note(s.outcome, wall_ns, digest=digest, reason=s.reason, rollout=s.rollout, **counts)
