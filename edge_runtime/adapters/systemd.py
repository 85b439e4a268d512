"""Telling systemd that the service is up and well, over its datagram socket, without libsystemd.

Source: the protocol of sd_notify(3) and sd_watchdog_enabled(3),
https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html.
"""

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final

log = logging.getLogger(__name__)


class Notifier:
    """Speaks to the manager that set ``NOTIFY_SOCKET`` in ``environ``; does nothing where there is none.

    Never blocks and never raises: a manager that is gone or busy costs one line in the log, until it is back.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address: Final = _address(environ.get("NOTIFY_SOCKET", ""))
        self._socket: Final = _open() if self._address else None
        self._lost = False
        self.watchdog_seconds: Final = _watchdog_seconds(environ) if self._address else 0.0
        """How often `alive` is wanted: half of what the manager tolerates (``WatchdogSec=``); 0.0 for never."""

    def ready(self) -> None:
        """The service has started: what depends on it may start too."""
        self._send("READY=1")

    def alive(self) -> None:
        """The service works; the manager restarts it when it hears nothing for twice `watchdog_seconds`."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The service shuts down on purpose."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for people, shown by ``systemctl status``."""
        self._send(f"STATUS={' '.join(text.split())}")

    def close(self) -> None:
        """Gives the socket back; later calls do nothing."""
        if self._socket is not None:
            self._socket.close()

    def _send(self, message: str) -> None:
        if self._socket is None or self._socket.fileno() < 0:
            return
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as e:
            if not self._lost:
                log.warning("manager_unreachable message=%s reason=%s", message, e)
            self._lost = True
        else:
            self._lost = False


def _open() -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    found.setblocking(False)
    return found


def _address(name: str) -> bytes:
    """The socket's address: a path, or an abstract name written with ``@``. Others (``vsock:``) are for machines."""
    if name.startswith("@") and len(name) > 1:
        return b"\0" + os.fsencode(name[1:])
    return os.fsencode(name) if name.startswith("/") else b""


def _watchdog_seconds(environ: Mapping[str, str]) -> float:
    pid, microseconds = environ.get("WATCHDOG_PID", ""), environ.get("WATCHDOG_USEC", "")
    if pid and pid != str(os.getpid()):  # inherited from a parent, whom it is meant for
        return 0.0
    return int(microseconds) / 2e6 if microseconds.isdecimal() else 0.0
