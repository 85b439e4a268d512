"""Runs a configured command, one at a time, without waiting for it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

OUTPUT_TAIL_BYTES: Final = 4096
KILL_GRACE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HookResult:
    """How a hook ended: its exit code (negative: the signal's number) and the tail of what it wrote."""

    number: int
    exit_code: int
    output: str


class Hook:
    """The command, given the path of a document in place of ``{what}``, by default ``{request}``.

    Its standard output and error go to a file beside the document.

    Not thread-safe; `poll` is called from the owner's loop.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        what: str = "request",
    ) -> None:
        self._what = what
        self._command = tuple(command)
        self._folder = folder
        self._timeout = timeout_seconds
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._number = 0
        self._deadline = 0.0
        self._timed_out = False

    @property
    def busy(self) -> bool:
        """Whether a command is running."""
        return self._process is not None

    def start(self, number: int, document: str) -> HookResult | None:
        """Writes the document and starts the command on it; a result at once when it cannot be started."""
        if self._process is not None:
            raise RuntimeError("a hook is running already; poll() it to its end first")
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._what}-{number}.json"
        path.write_text(document, encoding="utf-8")
        command = [str(path) if word == f"{{{self._what}}}" else word for word in self._command]
        output = path.with_suffix(".log").open("w+b")
        try:
            # A process group of its own, so that a timeout ends what the command started too.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as e:
            output.close()
            return HookResult(
                number=number, exit_code=127, output=f"cannot start {command[0]!r}: {e.strerror}"
            )
        self._output = output
        self._number, self._deadline, self._timed_out = number, self._clock() + self._timeout, False
        return None

    def poll(self) -> HookResult | None:
        """The result when the command has ended since the last call; ends it when its time is over."""
        if self._process is None:
            return None
        code = self._process.poll()
        if code is not None:
            return self._ended(code)
        now = self._clock()
        if now >= self._deadline + KILL_GRACE_SECONDS:
            self._signal(signal.SIGKILL)
        elif now >= self._deadline and not self._timed_out:
            self._timed_out = True
            self._signal(signal.SIGTERM)
        return None

    def stop(self) -> HookResult | None:
        """Ends a running command now and returns its result."""
        if self._process is None:
            return None
        self._signal(signal.SIGTERM)
        try:
            code = self._process.wait(KILL_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            code = self._process.wait()
        return self._ended(code)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _ended(self, code: int) -> HookResult:
        assert self._output is not None
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - OUTPUT_TAIL_BYTES))
        text = self._output.read().decode("utf-8", errors="replace")
        if self._timed_out:
            text += f"\n(ended after {self._timeout:.0f} s)"
        self._output.close()
        self._process = self._output = None
        return HookResult(number=self._number, exit_code=code, output=text)
