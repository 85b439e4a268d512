"""The shadow as the daemon sees it: rows out, counts back; its memory and its faults are never the daemon's."""

import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from edge_runtime.adapters.child import Child
from edge_runtime.adapters.marker import Marker
from edge_runtime.adapters.slots import Slots
from edge_runtime.config import DaemonConfig
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest
from edge_runtime.core import events as core
from edge_runtime.engine import Rows

PACKET_BYTES: Final = 16 * 1024
"""Rows of one packet: some hundred of most models."""
DEATHS: Final = 3
"""A child that ends so often without a word while the candidate is at work is the candidate's fault."""
FAULTS: Final = 3
"""After so many faults of others in a row, without a row compared, the candidate is without company."""
SHORT: Final = (-signal.SIGKILL, -1)
"""Killed from outside, as the kernel does when memory runs out, or not even started: that is the device's fault."""
FIRST_PAUSE_SECONDS: Final = 2.0
MAX_REASON: Final = 300
LONGEST_PAUSE_SECONDS: Final = 300.0

log = logging.getLogger("skiffd")


class _Way:
    """The way of rows to one child; a thread that comes late finds the closed one of the child before.

    ``hungry``: the child has answered what it was given.
    """

    __slots__ = ("_socket", "hungry")

    def __init__(self, sender: socket.socket) -> None:
        self._socket = sender
        self.hungry = False

    def send(self, packet: memoryview) -> None:
        self.hungry = False  # before: the child may have answered, and been heard, when `send` returns
        try:
            self._socket.send(packet, socket.MSG_DONTWAIT)
        except OSError:  # too large for the kernel, or closed by another thread: a row more or less
            self.hungry = True

    def close(self) -> None:
        self.hungry = False
        self._socket.close()


class Shadowing:
    """At most one child that compares a candidate with the model in service. Not thread-safe, but for `offer`.

    ``wake`` is called when it has spoken.
    """

    def __init__(self, config: DaemonConfig, slots: Slots, *, wake: Callable[[], None]) -> None:
        self._config = config
        self._slots = slots
        self._wake = wake
        self._candidate: Digest | None = None
        self._incumbent: Digest | None = None
        self._child: Child | None = None
        self._way: _Way | None = None
        self._marker: Marker | None = None
        self._deaths = 0
        self._faults = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._again_at: float | None = None

    @property
    def candidate(self) -> Digest | None:
        """Who is in the shadow."""
        return self._candidate

    @property
    def pid(self) -> int:
        """The child's process, 0 when there is none."""
        return self._child.pid if self._child is not None else 0

    def follow(self, candidate: Digest | None, incumbent: Digest | None) -> None:
        """Compares these two from now on; nobody, when one of them is None."""
        if candidate != self._candidate:
            self._deaths = 0
        unchanged = (candidate, incumbent) == (self._candidate, self._incumbent)
        if not unchanged:
            self._faults, self._pause_seconds = 0, FIRST_PAUSE_SECONDS
        self._candidate, self._incumbent = candidate, incumbent
        if not unchanged or self._child is None:
            self.stop()
            if candidate is not None and incumbent is not None:
                self._start(candidate, incumbent)

    def stop(self) -> None:
        """Ends the child at once, if there is one."""
        self._again_at = None
        if self._way is not None:
            self._way.close()
            self._way = None
        if self._marker is not None:
            self._marker.close()
            self._marker = None
        if self._child is not None:
            self._child.kill()
            self._child = None

    def offer(self, rows: Rows) -> None:
        """Rows (n, F) that the model in service has answered; those that come while the child has some are let go."""
        way = self._way
        if way is None or not way.hungry or not len(rows):
            return
        most = max(1, PACKET_BYTES // (rows.shape[1] * rows.itemsize))
        step = -(-len(rows) // most)
        way.send(np.ascontiguousarray(rows[::step]).data)

    def listen(self) -> Iterator[core.AgentEvent]:
        """What the child has said since the last call, added up."""
        if self._again_at is not None and time.monotonic() >= self._again_at:
            self.follow(self._candidate, self._incumbent)
        child, candidate, way = self._child, self._candidate, self._way
        if child is None or candidate is None or way is None:
            return
        rows = disagreed = 0
        while (line := child.poll()) is not None:
            f = Fields(line, "shadow")
            try:
                if "ready" in line:
                    way.hungry = True
                elif "rows" in line:
                    way.hungry = True
                    rows += f.integer("rows")
                    disagreed += f.integer("disagreed")
                    if rows:
                        self._faults = 0
                elif "failed" in line:
                    self.stop()
                    yield core.Shadowed(
                        digest=candidate,
                        rows=rows,
                        disagreed=disagreed,
                        failed=f.text("failed") or "no reason",
                    )
                    return
                elif "incomparable" in line:
                    self.stop()
                    yield self._not_compared(candidate, f.text("incomparable"))
                    break
                elif "exit" in line:
                    yield from self._ended(candidate, line["exit"], line["stderr"][-300:])
                    break
            except ContractError as e:
                log.warning("shadow_misspoke reason=%s", e)
        if rows:
            yield core.Shadowed(digest=candidate, rows=rows, disagreed=disagreed)

    def _ended(self, candidate: Digest, code: int, words: str) -> Iterator[core.AgentEvent]:
        at_work = self._marker is not None and self._marker.is_set
        self.stop()
        log.warning("shadow_died candidate=%s at_work=%s code=%d words=%s", candidate, at_work, code, words)
        if code in SHORT:
            self._pause()
            yield _interrupted(code, words)
            return
        if not at_work:
            yield self._not_compared(
                candidate, f"the process that compares ended with code {code}: {words}", code
            )
            return
        self._deaths += 1
        if self._deaths < DEATHS:
            self.follow(candidate, self._incumbent)
            return
        reason = f"ended {self._deaths} times with code {code} while it answered in the shadow: {words}"
        yield core.ServeFailed(candidate, reason)

    def _not_compared(self, candidate: Digest, reason: str, code: int = 0) -> core.AgentEvent:
        """What others are to blame for is tried again for as long as the candidate is in the shadow."""
        self._pause()
        self._faults += 1
        log.warning("shadow_fault candidate=%s faults=%d reason=%s", candidate, self._faults, reason)
        if self._faults < FAULTS:
            return _interrupted(code, reason)
        return core.Shadowed(digest=candidate, rows=0, disagreed=0, alone=reason)

    def _pause(self) -> None:
        self._again_at = time.monotonic() + self._pause_seconds
        self._pause_seconds = min(2.0 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _start(self, candidate: Digest, incumbent: Digest) -> None:
        config = self._config
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._way, self._marker = _Way(ours), Marker.make()
        with theirs:
            self._child = Child(
                "edge_runtime.shadow",
                {
                    "incumbent": str(self._slots.blob(incumbent)),
                    "incumbent_digest": incumbent,
                    "candidate": str(self._slots.blob(candidate)),
                    "candidate_digest": candidate,
                    "rows_fd": theirs.fileno(),
                    "marker_fd": self._marker.handle,
                    "cpu_share": config.shadow_cpu_share,
                    "address_space_bytes": config.probe_address_space_bytes,
                    "run_limit_seconds": config.run_limit_seconds,
                },
                wake=self._wake,
                pass_fds=(theirs.fileno(), self._marker.handle),
            )
        log.info("shadow_started candidate=%s incumbent=%s", candidate, incumbent)


def _interrupted(code: int, reason: str) -> core.Noticed:
    return core.Noticed("shadow_interrupted", (("code", str(code)), ("reason", reason[:MAX_REASON])))
