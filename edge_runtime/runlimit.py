"""Ends runs that take too long, from one thread that looks at them now and then."""

import threading
import time
import weakref
from collections.abc import Callable
from typing import Final

from edge_runtime.contract.errors import BudgetExceeded

LOOKS: Final = 8
"""So often a run is looked at within its limit: it ends at most an eighth of the limit too late."""

Run = Callable[[], object]


class RunLimit:
    """At most ``seconds`` for each run of one engine, on the clock ``clock_ns``.

    A timer for each run would cost a thread each; a run here costs one look at the clock and one lock. The thread ends
    when nobody holds the limit any more.
    """

    __slots__ = ("__weakref__", "_changing", "_limit_ns", "_watched", "clock_ns", "seconds")

    def __init__(self, seconds: float, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.seconds: Final = seconds
        self.clock_ns: Final = clock_ns
        self._limit_ns: Final = int(seconds * 1e9)
        self._changing: Final = threading.Lock()
        self._watched: Final[weakref.WeakSet[Watched]] = weakref.WeakSet()
        name = "skiff-run-limit"
        threading.Thread(
            target=_look, args=(weakref.ref(self), seconds / LOOKS), name=name, daemon=True
        ).start()

    def watch(self, terminate: Callable[[bool], None]) -> "Watched":
        """Something to run under the limit; ``terminate`` asks its run to end, and takes that back."""
        made = Watched(self, terminate)
        with self._changing:
            self._watched.add(made)
        return made

    def look(self, now_ns: int) -> None:
        """Ends every run that began more than the limit before ``now_ns``."""
        with self._changing:
            watched = list(self._watched)
        for each in watched:
            each.end_if_started_before(now_ns - self._limit_ns)


class Watched:
    """Runs one thing after another, each within the limit; not thread-safe."""

    __slots__ = ("__weakref__", "_ending", "_expired", "_limit", "_started_ns", "_terminate")

    def __init__(self, limit: RunLimit, terminate: Callable[[bool], None]) -> None:
        self._limit: Final = limit  # kept alive with its thread
        self._terminate: Final = terminate
        self._ending: Final = threading.Lock()
        self._started_ns = 0
        self._expired = False

    def __call__(self, run: Run) -> object:
        """What ``run`` returns; raises `BudgetExceeded` when it took longer than the limit."""
        self._started_ns = self._limit.clock_ns()
        try:
            found = run()
        except Exception as e:
            if self._end():
                raise self._exceeded() from e
            raise
        if self._end():
            raise self._exceeded()
        return found

    def end_if_started_before(self, then_ns: int) -> None:
        """Asks the run to end; the lock keeps the wish from the next run."""
        with self._ending:
            if not self._expired and 0 < self._started_ns < then_ns:
                self._expired = True
                self._terminate(True)

    def _end(self) -> bool:
        """Whether the run was asked to end; nothing runs after this."""
        with self._ending:
            self._started_ns = 0
            if not self._expired:
                return False
            self._expired = False
            self._terminate(False)
            return True

    def _exceeded(self) -> BudgetExceeded:
        return BudgetExceeded(f"a run took longer than {self._limit.seconds:g} s and was ended")


def _look(limit: weakref.ref[RunLimit], period_seconds: float) -> None:
    while (found := limit()) is not None:
        found.look(found.clock_ns())
        del found
        time.sleep(period_seconds)
