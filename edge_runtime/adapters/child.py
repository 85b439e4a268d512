"""A short-lived child process that speaks JSON lines; its memory is never the daemon's."""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

MAX_LINE_BYTES: Final = 1 << 20
_KEPT_STDERR_LINES: Final = 20


class Child:
    """Runs ``python -m module`` with one JSON document on stdin; every line it prints is a JSON object.

    ``wake`` is called from a thread of this class when something can be read with `poll`. The child is killed
    after ``deadline_seconds``, where given, and with it every process it started; else it lives until `kill`. It
    inherits ``pass_fds``. A child that cannot even be started says so in its last line, like any other end.
    """

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        *,
        wake: Callable[[], None],
        deadline_seconds: float | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._errors: deque[str] = deque(maxlen=_KEPT_STDERR_LINES)
        self._wake = wake
        self._process: subprocess.Popen[bytes] | None = None
        document = json.dumps(job).encode()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except OSError as e:
            self._put({"exit": -1, "stderr": f"cannot be started: {e}"})
            return
        self._process = process
        self._timer: threading.Timer | None = None
        if deadline_seconds is not None:
            self._timer = threading.Timer(deadline_seconds, self._expire, (deadline_seconds,))
            self._timer.daemon = True
            self._timer.start()
        self._stderr = threading.Thread(target=self._read_errors, args=(process,), daemon=True)
        self._stderr.start()
        threading.Thread(target=self._write, args=(process, document), daemon=True).start()
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    @property
    def pid(self) -> int:
        """The process, 0 when it could not be started."""
        return self._process.pid if self._process is not None else 0

    def poll(self) -> dict[str, Any] | None:
        """The next line, or None when there is none yet. The last one has the key ``exit``: code and last words."""
        try:
            return self._lines.get_nowait()
        except queue.Empty:
            return None

    def kill(self) -> None:
        """Ends the child and its children at once; its last line follows as usual."""
        process = self._process
        if process is not None and process.returncode is None:
            # Until it is waited for, its process group keeps this number.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _expire(self, deadline_seconds: float) -> None:
        self._errors.append(f"killed: it was not done in {deadline_seconds:g} s")
        self.kill()

    @staticmethod
    def _write(process: subprocess.Popen[bytes], job: bytes) -> None:
        assert process.stdin is not None
        # A child that dies before it has read its job says so by its exit.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while line := process.stdout.readline(MAX_LINE_BYTES):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict):
                self._put(found)
            else:
                self._errors.append(f"not a JSON object: {line[:200]!r}")
        process.stdout.close()
        code = process.wait()
        if self._timer is not None:
            self._timer.cancel()
        self._stderr.join(timeout=1.0)
        self._put({"exit": code, "stderr": "\n".join(self._errors)})

    def _read_errors(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self._errors.append(line.decode("utf-8", "replace").rstrip()[:500])
        process.stderr.close()

    def _put(self, line: dict[str, Any]) -> None:
        self._lines.put(line)
        self._wake()


def give_way() -> None:
    """For the child: when memory runs out the kernel kills it, and what it starts, before the daemon.

    Source: proc(5), ``/proc/pid/oom_score_adj``; to raise one's own needs no privilege.
    """
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError as e:  # a container may hide it
        sys.stderr.write(f"oom_score_adj cannot be raised: {e}\n")


def end_with_reader() -> None:
    """For the child: ends it, and every process of its group that it leads, as soon as nobody can read its stdout.

    A daemon that is killed cannot end its child, which would hold the update lock for as long as its deadline allows.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # POLLERR and POLLHUP are always told
        poll.poll()
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
