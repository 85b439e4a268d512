"""The daemon's eye on itself: limits, how the process before ended, and what it has done since it started."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from edge_runtime.adapters.last_exit import FIRST_START, LastExit
from edge_runtime.adapters.probes import Probes
from edge_runtime.config import DaemonConfig
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.messages import Health
from edge_runtime.core import budget
from edge_runtime.core import events as core
from edge_runtime.engine import trim_memory
from edge_runtime.runtime import Observation, Runtime

if TYPE_CHECKING:
    from edge_runtime.adapters.status_report import LimitsReport, Rows

log = logging.getLogger("skiffd")


class Watch:
    """Not thread-safe, but `rows`, `limits` and `newest` may be read from any thread.

    Attributes:
        last_exit: what the process before ended of, "" when this is the first start.
        crashed: whether it was killed, or ended with an error.
        restarts: starts in a row after no clean stop.
        starts: all of them.
        newest: the newest readings.
        tired: why the daemon should end and be started again: nothing brought it back below its hard limit. Else "".
    """

    def __init__(self, config: DaemonConfig) -> None:
        self._probes: Final = Probes()
        self._exits: Final = LastExit(config.state_dir / "last_exit.json")
        limits = config.limits.within(self._probes.memory_limit_bytes())
        self._guard: Final = budget.Guard(limits, max_batch=config.max_batch)
        self._shedding = False
        self._max_batch = config.max_batch
        self._answered = self._failed = self._labelled = self._correct = 0
        self._refused: Counter[str] = Counter()
        self.crashed: Final = self._exits.crashed
        self.last_exit: Final = "" if self._exits.before == FIRST_START else self._exits.before
        self.restarts: Final = self._exits.restarts
        self.starts: Final = self._exits.starts
        self.newest = self._probes.health()
        self.tired = ""

    def begin(self, session: str) -> None:
        """The process is at work; until `end` whoever starts after it knows that it did not stop cleanly."""
        log.info("started_after last_exit=%s restarts=%d", self.last_exit or FIRST_START, self.restarts)
        self._exits.begin(session)

    def end(self, error: BaseException | None = None) -> None:
        """The process stops: cleanly, or because of ``error``."""
        if error is None:
            self._exits.end()
        else:
            self._exits.failed(error)

    def tick(self, runtime: Runtime | None, trial: Digest | None) -> list[core.AgentEvent]:
        """Compares the process with its limits, limits ``runtime`` where it must, and says what the agent should know.

        ``trial`` is the model on trial, if there is one and another to go back to.
        """
        health = self._probes.glance()
        known = {name: value for name in Health.__slots__ if (value := getattr(health, name))}
        self.newest = replace(self.newest, **known)
        was = self._guard.over
        told: list[core.AgentEvent] = []
        for decision in self._guard.observe(health, on_trial=trial is not None):
            told += self._perform(decision, runtime, trial)
        if runtime is not None:
            self.hold(runtime)
        if self._guard.over == "hard":
            trim_memory()  # what large requests left free in the heap counts as resident until it is given back
        if self._guard.over != was:
            self.note()
        return told

    def _perform(
        self, decision: budget.Decision, runtime: Runtime | None, trial: Digest | None
    ) -> Iterator[core.AgentEvent]:
        match decision:
            case budget.LimitPassed():
                log.warning("limit_passed limit=%s reason=%s", decision.limit, decision.reason)
                yield core.Noticed(f"limit_{decision.limit}_passed", (("reason", decision.reason),))
            case budget.LimitKept():
                log.info("limit_kept limit=%s reason=%s", decision.limit, decision.reason)
                yield core.Noticed(f"limit_{decision.limit}_kept", (("reason", decision.reason),))
            case budget.Shed():
                self._shedding = decision.on
            case budget.SetBatch():
                self._max_batch = decision.rows
            case budget.Lighten():
                if runtime is not None:
                    runtime.let_incumbent_go()
            case budget.EndTrial():
                if trial is not None:
                    yield core.ServeFailed(trial, decision.reason)
            case budget.GiveUp():
                self.tired = decision.reason

    def hold(self, runtime: Runtime) -> None:
        """Applies what was decided to ``runtime``."""
        if runtime.shedding != self._shedding:
            runtime.shedding = self._shedding
        runtime.max_batch = self._max_batch

    def note(self) -> None:
        """Writes down how things stand: what happens next may leave no time for it.

        Also when a child was killed: the kernel's count of kills for want of memory rose then, and not for us.
        """
        self._exits.note(
            over=self._guard.over,
            rss_bytes=self.newest.rss_bytes,
            limit_bytes=self._guard.limits.rss_bytes,
        )

    def rss_bytes(self) -> int:
        """Resident memory now."""
        return self._probes.rss_bytes()

    def health(self) -> Health:
        """All readings, for a window."""
        self.newest = self._probes.health()
        return self.newest

    def count(self, seen: Observation) -> None:
        """Adds what a window held to the totals since the start."""
        self._answered += seen.rows
        self._failed += seen.failed
        self._refused.update(dict(seen.refused))
        self._labelled += seen.labelled
        self._correct += seen.correct

    @property
    def rows(self) -> "Rows":
        """Rows of closed windows since the start, by outcome."""
        from edge_runtime.adapters.status_report import Rows  # noqa: PLC0415 (the first answer does without)

        return Rows(
            answered=self._answered,
            failed=self._failed,
            refused=tuple(sorted(self._refused.items())),
            labelled=self._labelled,
            correct=self._correct,
        )

    @property
    def limits(self) -> "LimitsReport":
        """The limits in force and what is done about them."""
        from edge_runtime.adapters.status_report import LimitsReport  # noqa: PLC0415 (the first answer does without)

        limits = self._guard.limits
        return LimitsReport(
            rss_soft_bytes=limits.rss_soft_bytes,
            rss_bytes=limits.rss_bytes,
            cpu_soft_ppm=limits.cpu_soft_ppm,
            temperature_soft_mc=limits.temperature_soft_mc,
            on_hard=limits.on_hard,
            over=self._guard.over,
            shedding=self._shedding,
            max_batch=self._max_batch,
        )
