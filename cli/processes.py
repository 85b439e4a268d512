"""Processes that belong to a command: started together, restarted when they die, ended together."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from edge_runtime.contract.errors import SkiffError

RESTART_SECONDS: Final = 0.5
STOP_SECONDS: Final = 8.0
_POLL_SECONDS: Final = 0.1


class ProcessDied(SkiffError):
    """A process ended although it should run; the message ends with the last lines of its log."""


@dataclass(slots=True)
class _Managed:
    name: str
    command: tuple[str, ...]
    log: Path
    environment: dict[str, str]
    restart: bool
    process: subprocess.Popen[bytes]
    starts: int = 1
    due: float = 0.0
    codes: list[int] = field(default_factory=list)


class Processes:
    """A small supervisor, as systemd would be on a device: what is started with ``restart`` comes back when it dies.

    Use as a context manager; leaving it ends every process, gently first. Logs go to ``folder``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._managed: dict[str, _Managed] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        restart: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts ``command`` under ``name``; its output goes to ``{name}.log``."""
        log = self._folder / f"{name}.log"
        env = {**os.environ, **(environment or {})}
        process = _spawn(command, log, env)
        with self._lock:
            self._managed[name] = _Managed(name, tuple(command), log, env, restart, process)

    def alive(self, name: str) -> bool:
        """Whether the process runs now."""
        with self._lock:
            return self._managed[name].process.poll() is None

    def pid(self, name: str) -> int:
        """The process id of the current start."""
        with self._lock:
            return self._managed[name].process.pid

    def restarts(self) -> dict[str, int]:
        """How often each process had to be started again, where that is not 0."""
        with self._lock:
            return {m.name: m.starts - 1 for m in self._managed.values() if m.starts > 1}

    def check(self) -> None:
        """Raises `ProcessDied` when one that is not restarted has failed."""
        with self._lock:
            for m in self._managed.values():
                code = m.process.poll()
                if code and not m.restart:
                    raise ProcessDied(f"{m.name} ended with code {code}:\n{tail(m.log)}")

    def stop(self) -> None:
        """Ends every process: SIGTERM, and SIGKILL for what does not listen. The last started goes first."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            managed = list(self._managed.values())[::-1]
            self._managed.clear()
        last, rest = managed[-1:], managed[:-1]
        for group in (rest, last):  # the broker was started first and is needed by the others' goodbyes
            for m in group:
                if m.process.poll() is None:
                    m.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            for m in group:
                try:
                    m.process.wait(max(0.05, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    m.process.kill()
                    m.process.wait()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            now = time.monotonic()
            with self._lock:
                for m in self._managed.values():
                    code = m.process.poll()
                    if code is None or not m.restart:
                        continue
                    if not m.due:
                        m.codes.append(code)
                        m.due = now + RESTART_SECONDS
                    elif now >= m.due:
                        m.process, m.due, m.starts = (
                            _spawn(m.command, m.log, m.environment),
                            0.0,
                            m.starts + 1,
                        )


def _spawn(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,
        )


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:])


def wait_until(
    condition: Callable[[], bool],
    *,
    timeout_seconds: float,
    what: str,
    check: Callable[[], None],
    poll_seconds: float = 0.2,
) -> float:
    """Waits until ``condition`` holds and returns the seconds it took.

    ``check`` is called each time and may raise. Raises `SkiffError` naming ``what`` when the time is up.
    """
    start = time.monotonic()
    while not condition():
        check()
        if time.monotonic() - start > timeout_seconds:
            raise SkiffError(f"{what}: not seen within {timeout_seconds:.0f} s")
        time.sleep(poll_seconds)
    return time.monotonic() - start
