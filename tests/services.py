"""Real services for tests: a Mosquitto that can be stopped, killed and started again on the same port and data."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

HOST = "127.0.0.1"
START_TIMEOUT_SECONDS = 15.0
STOP_TIMEOUT_SECONDS = 10.0
POLL_SECONDS = 0.01

# Debian installs the broker where an ordinary user's PATH does not look.
SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")


def missing_service(what: str) -> NoReturn:
    """Skip the test, or fail it where CI promises the service (``SKIFF_REQUIRE_SERVICES=1``)."""
    if os.environ.get("SKIFF_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what}, and SKIFF_REQUIRE_SERVICES=1 forbids skipping", pytrace=False)
    pytest.skip(what)


class ServiceError(RuntimeError):
    """A test service did not do what it was told; the message ends with the service's own log."""


def find_mosquitto() -> str | None:
    """Path of the Mosquitto binary, or None."""
    return shutil.which("mosquitto", path=os.pathsep.join((os.environ.get("PATH", ""), *SYSTEM_FOLDERS)))


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    """Whether something on the loopback ``port`` accepts a connection."""
    try:
        with socket.create_connection((HOST, port), timeout=1.0):
            return True
    except OSError:
        return False


class Mosquitto:
    """A broker on one loopback port with one data folder.

    `extra_config` is appended to the configuration, e.g. ``max_queued_messages 100000`` or ``acl_file …``.
    """

    def __init__(self, binary: str, folder: Path, *, extra_config: str = "") -> None:
        self._binary = binary
        self._folder = folder
        self._extra_config = extra_config
        self._process: subprocess.Popen[bytes] | None = None
        self.host = HOST
        self.port = 0

    @property
    def log(self) -> str:
        """What the broker has written so far, over all its starts."""
        path = self._folder / "mosquitto.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start, on the same port and data as before if there was a before; return when the port accepts."""
        if self._process is not None:
            raise ServiceError("the broker is running already; stop() or kill() it first")
        if self.port:
            self._launch()
            return
        for attempts_left in (4, 3, 2, 1, 0):  # another process may take the free port first
            self.port = free_port()
            try:
                self._launch()
            except ServiceError:
                if not attempts_left or "Address already in use" not in self.log:
                    raise
            else:
                return

    def save(self) -> None:
        """Have the broker write its persistent state now, and wait until the file is replaced."""
        database = self._folder / "mosquitto.db"
        before = database.stat().st_ino if database.exists() else None
        self._running().send_signal(signal.SIGUSR1)
        self._wait(
            lambda: database.exists() and database.stat().st_ino != before,
            "save its state",
            START_TIMEOUT_SECONDS,
        )

    def stop(self) -> None:
        """End the broker in order: it writes its state and closes its connections."""
        self._end(signal.SIGTERM)

    def saved_since(self, moment: float) -> bool:
        """Whether it has written what it retains since ``moment`` (seconds since 1970): killed before, it forgets."""
        database = self._folder / "mosquitto.db"
        return database.exists() and database.stat().st_mtime > moment

    def kill(self) -> None:
        """End the broker as a power cut would: what it had not written is lost."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """End the broker if it is running."""
        if self._process is not None:
            self.kill()

    def command(self) -> list[str]:
        """How it is started, its configuration written; called before every start, with `port` set."""
        config = self._folder / "mosquitto.conf"
        lines = [
            f"listener {self.port} {HOST}",
            f"user {getpass.getuser()}",  # started by root it would else drop to a user that can't write here
            "allow_anonymous true",
            "set_tcp_nodelay true",
            "persistence true",
            f"persistence_location {self._folder}/",
            "autosave_interval 1",
            "log_dest stderr",
            "log_type all",
            self._extra_config,
        ]
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [self._binary, "-c", str(config)]

    def _launch(self) -> None:
        command = self.command()
        with (self._folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._wait(lambda: accepts(self.port), f"accept on port {self.port}", START_TIMEOUT_SECONDS)
        except ServiceError:
            self.close()
            raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServiceError("the broker is not running; start() it first")
        return self._process

    def _end(self, how: signal.Signals) -> None:
        process = self._running()
        self._process = None
        process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ServiceError(
                f"mosquitto did not end on {how.name} within {STOP_TIMEOUT_SECONDS} s\n{self.log}"
            ) from None

    def _wait(self, condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
        process = self._running()
        deadline = time.monotonic() + timeout_seconds
        while True:
            code = process.poll()
            if code is not None:
                raise ServiceError(f"mosquitto ended with code {code} before it could {what}\n{self.log}")
            if condition():
                return
            if time.monotonic() > deadline:
                raise ServiceError(f"mosquitto did not {what} within {timeout_seconds} s\n{self.log}")
            time.sleep(POLL_SECONDS)
