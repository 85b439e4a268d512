"""A whole `Daemon` in this process whose clocks the test turns: days pass in seconds, and clocks are set as they are.

Only the functions that read the time are replaced, in the daemon's own module. Its loop, its outbox on disk and its
link are real. A script says, one turn of the loop after another, what happens meanwhile.
"""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.config import load
from edge_runtime.contract.profile import Binner, Profile
from edge_runtime.daemon import Daemon
from edge_runtime.engine import Engine
from edge_runtime.uplink import Uplink
from tests.support.chaos import OLD, Home

ONLINE_SECONDS = 0.05
LONGEST_SECONDS = 60.0
"""What a script may really wait for its link, all in all."""
Turns = Iterator[bool]
"""What a script yields once a turn: whether the loop then waits for the link, as long as it really takes."""


class Clocks:
    """Takes the place of the module `time`: two clocks that stand still until they are told."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self, wall_ns: int) -> None:
        self.wall_ns = wall_ns
        self.boot_ns = 10**12
        self.synced: bool | None = True

    def time_ns(self) -> int:
        return self.wall_ns

    def monotonic(self) -> float:
        return self.boot_ns / 1e9

    def clock_gettime_ns(self, clock: int) -> int:
        assert clock == self.CLOCK_BOOTTIME
        return self.boot_ns

    def go_on(self, seconds: float) -> None:
        """Time passes."""
        self.wall_ns += round(seconds * 1e9)
        self.boot_ns += round(seconds * 1e9)


class Played:
    """A daemon, its clocks, and everything that it was asked; see the module."""

    def __init__(self, home: Home, monkeypatch: pytest.MonkeyPatch, *, wall_ns: int) -> None:
        self.clocks = Clocks(wall_ns)
        monkeypatch.setattr("edge_runtime.daemon.time", self.clocks)
        monkeypatch.setattr("edge_runtime.daemon.clock.is_synced", lambda: self.clocks.synced)
        monkeypatch.setattr("edge_runtime.daemon.next_delay_seconds", lambda *_: 0.05)
        self.daemon = Daemon(load(home.config))
        self.rows = 0
        engine = Engine(OLD.artifact)
        self._spec = engine.info.reference.spec
        self._seen = Binner(self._spec, probabilities=True)
        self._random = np.random.default_rng(0)
        self._monkeypatch = monkeypatch

    def play(self, script: Turns) -> None:
        """Runs the daemon until the script ends; then it is stopped as SIGTERM does."""
        stop = threading.Event()
        listen = Uplink.poll
        waited = 0.0

        def poll(link: Uplink, timeout_seconds: float) -> object:
            nonlocal waited
            waiting = next(script, None)
            if waiting is None:
                stop.set()
            if not waiting:
                return None
            before = time.monotonic()
            event = listen(link, min(timeout_seconds, ONLINE_SECONDS))
            took = time.monotonic() - before
            self.clocks.go_on(took)
            waited += took
            assert waited < LONGEST_SECONDS, "what the script waits for does not come"
            return event

        self._monkeypatch.setattr(Uplink, "poll", poll)
        self.daemon.run(stop)

    def ask(self, rows: int) -> None:
        """An application has ``rows`` random rows answered, in one call."""
        runtime = self.daemon._runtime
        assert runtime is not None
        asked: NDArray[np.float32] = self._random.normal(size=(rows, len(OLD.features))).astype(np.float32)
        answer = runtime.predict(asked)
        assert isinstance(answer.raw, np.ndarray)
        self._seen.observe(asked, answer.raw, answer.score)
        self.rows += rows

    def pass_time(self, seconds: float, *, rows: int = 1, turn_seconds: float = 20.0) -> Turns:
        """So long nothing happens but ``rows`` rows a turn."""
        for _ in range(round(seconds / turn_seconds)):
            self.ask(rows)
            self.clocks.go_on(turn_seconds)
            yield False

    def profile(self) -> Profile:
        """What the windows together must hold."""
        return self._seen.take()
