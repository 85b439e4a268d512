"""A short-lived child process that speaks JSON lines; its memory is never the daemon's."""

import json
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

MAX_LINE_BYTES: Final = 1 << 20
_KEPT_STDERR_LINES: Final = 20


class Child:
    """Runs ``python -m module`` with one JSON document on stdin; every line it prints is a JSON object.

    ``wake`` is called from a thread of this class when something can be read with `poll`. The child is killed
    after ``deadline_seconds``.
    """

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        *,
        wake: Callable[[], None],
        deadline_seconds: float,
    ) -> None:
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._errors: deque[str] = deque(maxlen=_KEPT_STDERR_LINES)
        self._wake = wake
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._timer = threading.Timer(deadline_seconds, self._process.kill)
        self._timer.daemon = True
        self._timer.start()
        self._stderr = threading.Thread(target=self._read_errors, daemon=True)
        self._stderr.start()
        threading.Thread(target=self._read, args=(json.dumps(job).encode(),), daemon=True).start()

    def poll(self) -> dict[str, Any] | None:
        """The next line, or None when there is none yet. The last one has the key ``exit``: code and last words."""
        try:
            return self._lines.get_nowait()
        except queue.Empty:
            return None

    def kill(self) -> None:
        """Ends the child at once; its last line follows as usual."""
        self._process.kill()

    def _read(self, job: bytes) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(job)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died before it read its job: the exit line below says so
        while line := process.stdout.readline(MAX_LINE_BYTES):
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if isinstance(found, dict):
                self._put(found)
            else:
                self._errors.append(f"not JSON: {line[:200]!r}")
        code = process.wait()
        self._timer.cancel()
        self._stderr.join(timeout=1.0)
        process.stdout.close()
        self._put({"exit": code, "stderr": "\n".join(self._errors)})

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line.decode("utf-8", "replace").rstrip()[:500])
        self._process.stderr.close()

    def _put(self, line: dict[str, Any]) -> None:
        self._lines.put(line)
        self._wake()
