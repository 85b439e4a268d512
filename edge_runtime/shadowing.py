"""The shadow as the daemon sees it: rows out, counts back; its memory and its faults are never the daemon's."""

import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from edge_runtime.adapters.child import Child
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
"""A child that ends so often without a word is the candidate's fault."""
SHORT: Final = (-signal.SIGKILL, -1)
"""Killed from outside, as the kernel does when memory runs out, or not even started: that is the device's fault."""
FIRST_PAUSE_SECONDS: Final = 2.0
LONGEST_PAUSE_SECONDS: Final = 300.0

log = logging.getLogger("skiffd")


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
        self._rows: socket.socket | None = None
        self._hungry = False
        self._deaths = 0
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
            self._deaths, self._pause_seconds = 0, FIRST_PAUSE_SECONDS
        unchanged = (candidate, incumbent) == (self._candidate, self._incumbent)
        self._candidate, self._incumbent = candidate, incumbent
        if not unchanged or self._child is None:
            self.stop()
            if candidate is not None and incumbent is not None:
                self._start(candidate, incumbent)

    def stop(self) -> None:
        """Ends the child at once, if there is one."""
        self._again_at, self._hungry = None, False
        if self._rows is not None:
            self._rows.close()
            self._rows = None
        if self._child is not None:
            self._child.kill()
            self._child = None

    def offer(self, rows: Rows) -> None:
        """Rows (n, F) that the model in service has answered; those that come while the child has some are let go."""
        sink = self._rows
        if sink is None or not self._hungry or not len(rows):
            return
        most = max(1, PACKET_BYTES // (rows.shape[1] * rows.itemsize))
        step = -(-len(rows) // most)
        packet = np.ascontiguousarray(rows[::step])
        # Too large for the kernel, or closed by another thread: a row more or less.
        with contextlib.suppress(OSError):
            sink.send(packet.data, socket.MSG_DONTWAIT)
            self._hungry = False

    def listen(self) -> Iterator[core.AgentEvent]:
        """What the child has said since the last call, added up."""
        if self._again_at is not None and time.monotonic() >= self._again_at:
            self.follow(self._candidate, self._incumbent)
        child, candidate = self._child, self._candidate
        if child is None or candidate is None:
            return
        rows = disagreed = 0
        while (line := child.poll()) is not None:
            f = Fields(line, "shadow")
            try:
                if "ready" in line:
                    self._hungry = True
                elif "rows" in line:
                    self._hungry = True
                    rows += f.integer("rows")
                    disagreed += f.integer("disagreed")
                elif "failed" in line:
                    self.stop()
                    yield core.Shadowed(
                        digest=candidate,
                        rows=rows,
                        disagreed=disagreed,
                        failed=f.text("failed") or "no reason",
                    )
                    return
                elif "exit" in line:
                    yield from self._ended(candidate, line["exit"], line["stderr"][-300:])
                    break
            except ContractError as e:
                log.warning("shadow_misspoke reason=%s", e)
        if rows:
            yield core.Shadowed(digest=candidate, rows=rows, disagreed=disagreed)

    def _ended(self, candidate: Digest, code: int, words: str) -> Iterator[core.AgentEvent]:
        self.stop()
        log.warning("shadow_died candidate=%s code=%d words=%s", candidate, code, words)
        if code in SHORT:
            yield core.Noticed("shadow_interrupted", (("code", str(code)), ("reason", words)))
            self._again_at = time.monotonic() + self._pause_seconds
            self._pause_seconds = min(2.0 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
            return
        self._deaths += 1
        if self._deaths < DEATHS:
            self.follow(candidate, self._incumbent)
            return
        reason = f"ended {self._deaths} times with code {code} while it answered in the shadow: {words}"
        yield core.ServeFailed(candidate, reason)

    def _start(self, candidate: Digest, incumbent: Digest) -> None:
        config = self._config
        self._rows, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._child = Child(
                "edge_runtime.shadow",
                {
                    "incumbent": str(self._slots.blob(incumbent)),
                    "incumbent_digest": incumbent,
                    "candidate": str(self._slots.blob(candidate)),
                    "candidate_digest": candidate,
                    "rows_fd": theirs.fileno(),
                    "cpu_share": config.shadow_cpu_share,
                    "address_space_bytes": config.probe_address_space_bytes,
                    "run_limit_seconds": config.run_limit_seconds,
                },
                wake=self._wake,
                pass_fds=(theirs.fileno(),),
            )
        log.info("shadow_started candidate=%s incumbent=%s", candidate, incumbent)
