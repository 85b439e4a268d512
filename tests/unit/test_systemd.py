"""What a service manager hears, through a real datagram socket."""

import logging
import os
import socket
import uuid

import pytest

from edge_runtime.adapters.systemd import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """A socket that listens as systemd does, and the name it announces."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@skiff-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1))
        listener.settimeout(5.0)
        yield listener, name


def test_what_is_said_arrives_as_one_datagram_each(manager):
    listener, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready()
    notifier.alive()
    notifier.status("serves abc\nsince today")
    notifier.stopping()
    heard = [listener.recv(4096) for _ in range(4)]
    assert heard == [b"READY=1", b"WATCHDOG=1", b"STATUS=serves abc since today", b"STOPPING=1"]
    notifier.close()
    notifier.ready()
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.recv(4096)


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_without_a_manager_nothing_is_said(environ, monkeypatch):
    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket", refuse)
    notifier = Notifier({**environ, "WATCHDOG_USEC": "30000000"})
    for say in (notifier.ready, notifier.alive, notifier.stopping, notifier.close):
        say()
    notifier.status("nobody hears")
    assert notifier.watchdog_seconds == 0.0


def test_a_manager_that_went_away_is_told_once_and_taken_back(tmp_path, caplog):
    name = str(tmp_path / "notify")
    notifier = Notifier({"NOTIFY_SOCKET": name})
    with caplog.at_level(logging.WARNING):
        notifier.alive()
        notifier.alive()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(name)
            listener.settimeout(5.0)
            notifier.alive()
            assert listener.recv(4096) == b"WATCHDOG=1"
        notifier.alive()
    assert caplog.text.count("manager_unreachable") == 2
    notifier.close()


def test_a_manager_that_does_not_read_blocks_nobody(tmp_path, caplog):
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, caplog.at_level(logging.WARNING):
        listener.bind(name)
        notifier = Notifier({"NOTIFY_SOCKET": name})
        for _ in range(10_000):  # far beyond net.unix.max_dgram_qlen
            notifier.alive()
        notifier.close()
    assert "manager_unreachable" in caplog.text


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getppid())}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_needed(environ, seconds):
    notifier = Notifier({"NOTIFY_SOCKET": "/nowhere", **environ})
    assert notifier.watchdog_seconds == seconds
    notifier.close()
