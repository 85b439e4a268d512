"""Rows over a real Unix socket: several clients, those that misbehave among them."""

import errno
import json
import socket
import stat
import threading
import tracemalloc

import numpy as np
import pytest

from edge_runtime.adapters.sources import unix as unix_source
from edge_runtime.adapters.sources.ndjson import Answer, Refusal
from edge_runtime.adapters.sources.unix import MAX_UNSENT_BYTES, UnixSource

WAIT_SECONDS = 15.0


class Served:
    """A source that runs in a thread and answers each row with its first value as the score."""

    def __init__(self, path, *, wide=1, **options):
        self.path = path
        self.source = UnixSource(path, **options)
        self.stop = threading.Event()
        self.asked = 0
        self.refused: list[str] = []
        self.wide = wide
        self.reached: dict[int, threading.Event] = {}
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            self.source.serve(self.answer, self.stop)
        except BaseException as e:
            self.errors.append(e)
            raise

    def answer(self, asked):
        self.asked += 1
        if self.asked in self.reached:
            self.reached[self.asked].set()
        if isinstance(asked, Refusal):
            self.refused.append(asked.reason)
            return asked
        return Answer(None, np.full(self.wide, asked.rows[0], np.float32), "m")

    def connect(self) -> "Client":
        wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        wire.settimeout(WAIT_SECONDS)
        wire.connect(str(self.path))
        return Client(wire)

    def close(self):
        self.stop.set()
        self.thread.join(WAIT_SECONDS)
        assert not self.thread.is_alive()
        assert not self.errors


class Client:
    def __init__(self, wire):
        self.wire = wire
        self.lines = wire.makefile("rb")

    def send(self, data: bytes):
        self.wire.sendall(data)

    def read(self):
        line = self.lines.readline()
        return json.loads(line) if line else None

    def score(self):
        return self.read()["score"][0]

    def end(self):
        self.wire.shutdown(socket.SHUT_WR)

    def close(self):
        self.lines.close()
        self.wire.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def serve(tmp_path):
    made: list[Served] = []

    def start(**options) -> Served:
        made.append(Served(tmp_path / f"{len(made)}.sock", **options))
        return made[-1]

    yield start
    for one in made:
        one.close()
        assert not one.path.exists()


# ── clients ────────────────────────────────────────────────────────────────────────────────────────────


def test_each_client_has_its_answers_in_order(serve):
    served = serve()
    with served.connect() as one, served.connect() as two:
        one.send(b"".join(b"[%d]\n" % i for i in range(0, 200, 2)))
        two.send(b"".join(b"[%d]\n" % i for i in range(1, 200, 2)))
        assert [one.score() for _ in range(100)] == list(range(0, 200, 2))
        assert [two.score() for _ in range(100)] == list(range(1, 200, 2))
        one.send(b'{"row": [7], "id": "again"}\n')
        assert one.read() == {"id": "again", "label": None, "score": [7.0], "model": "m"}


def test_a_bad_line_is_answered_and_the_stream_goes_on(serve):
    served = serve(max_line_bytes=100)
    with served.connect() as one:
        one.send(b"nope\n\n" + b"[" + b" " * 200 + b"]\n[3]\n")
        assert one.read()["error"]["reason"] == "json"
        assert one.read()["error"]["reason"] == "too_long"
        assert one.score() == 3
    assert served.refused == ["json", "too_long"]


def test_a_line_may_come_in_pieces(serve):
    with serve().connect() as one:
        for piece in (b"[", b"4", b"2", b"]"):
            one.send(piece)
        one.send(b"\n")
        assert one.score() == 42


def test_a_client_that_ended_its_input_gets_every_answer(serve):
    with serve().connect() as one:
        one.send(b"[1]\n[2]\n[3]")  # no newline
        one.end()
        assert [one.score() for _ in range(3)] == [1, 2, 3]
        assert one.read() is None


def test_an_idle_client_and_one_that_left_disturb_nobody(serve):
    served = serve()
    with served.connect(), served.connect() as gone, served.connect() as one:
        gone.send(b"[1]\n" * 1000)
        gone.close()
        one.send(b"[5]\n")
        assert one.score() == 5


def test_one_client_too_many_is_told(serve):
    served = serve(max_clients=2)
    with served.connect() as one, served.connect() as two:
        for client in (one, two):
            client.send(b"[1]\n")
            assert client.score() == 1
        with served.connect() as three:
            refused = three.read()["error"]
            assert refused["reason"] == "unavailable"
            assert "2 clients are connected already" in refused["message"]
            assert three.read() is None
        two.end()
        assert two.read() is None  # closed on the other side too: there is room again
        with served.connect() as four:
            four.send(b"[4]\n")
            assert four.score() == 4


# ── back-pressure ──────────────────────────────────────────────────────────────────────────────────────


def test_a_client_that_reads_nothing_is_held_back_and_nobody_else(serve):
    served = serve(wide=100)
    with served.connect() as stuck, served.connect() as one:
        stuck.wire.setblocking(False)
        sent = 0
        line = (b"[1" + b" " * 396 + b"]\n") * 10
        # Until the kernel's buffers are full in both directions, while the other is served.
        for _ in range(300):
            sent += push(stuck.wire, line)
            one.send(b"[2]\n")
            assert one.score() == 2
        while moved := push(stuck.wire, line):
            sent += moved
        client = max(served.source._clients, key=lambda client: len(client.unsent))
        assert MAX_UNSENT_BYTES <= len(client.unsent) < MAX_UNSENT_BYTES + 2000
        answered = served.asked - 300
        assert 0 < answered < sent // 400
        # It reads at last: nothing is lost.
        stuck.wire.settimeout(WAIT_SECONDS)
        whole = sent // 400
        for _ in range(whole):
            assert stuck.score() == 1


def push(wire, data):
    """Bytes that a socket took without waiting."""
    try:
        return wire.send(data)
    except BlockingIOError:
        return 0


def test_a_line_of_100_mb_takes_no_memory(serve):
    served = serve()
    chunk = b"x" * (1 << 16)
    with served.connect() as one:
        one.send(b"[1]\n")
        assert one.score() == 1
        traced = tracemalloc.is_tracing()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        try:
            for _ in range(100 * 16):
                one.send(chunk)
            assert one.read()["error"]["reason"] == "too_long"
            one.send(b"\n[2]\n")
            assert one.score() == 2
            _, peak = tracemalloc.get_traced_memory()
        finally:
            if not traced:
                tracemalloc.stop()
    assert peak - before < 4 << 20


def test_turns_are_short(serve):
    """A client with a single row waits for a few rows of a busy one, not for all it has sent."""
    served = serve()
    first, second = threading.Event(), threading.Event()
    answer, order = served.answer, []

    def slow(asked):
        order.append(asked.rows[0])
        if len(order) == 1:
            first.set()
            assert second.wait(WAIT_SECONDS)
        return answer(asked)

    served.answer = slow
    served.stop.set()
    served.thread.join(WAIT_SECONDS)
    served.stop.clear()
    served.source = UnixSource(served.path)
    served.thread = threading.Thread(target=served._run)
    served.thread.start()
    with served.connect() as busy, served.connect() as one:
        busy.send(b"[1]\n" * 1000)
        assert first.wait(WAIT_SECONDS)
        one.send(b"[2]\n")
        second.set()
        assert one.score() == 2
    assert order.index(2) <= 2 * unix_source.TURN_LINES


def test_without_descriptors_the_others_go_on(serve, monkeypatch, caplog):
    monkeypatch.setattr(unix_source, "RETRY_ACCEPT_SECONDS", 0.01)
    served = serve()
    with served.connect() as one:
        one.send(b"[1]\n")
        assert one.score() == 1

        class Full:
            def __init__(self, listening):
                self._listening = listening
                self.refusals = 3

            def accept(self):
                if self.refusals:
                    self.refusals -= 1
                    raise OSError(errno.EMFILE, "Too many open files")
                return self._listening.accept()

            def fileno(self):
                return self._listening.fileno()

            def close(self):
                self._listening.close()

        served.source._listener.socket = Full(served.source._listener.socket)
        with served.connect() as two:
            one.send(b"[2]\n")
            assert one.score() == 2
            two.send(b"[3]\n")
            assert two.score() == 3
    assert caplog.text.count("client_not_accepted") == 3


# ── the socket's file ──────────────────────────────────────────────────────────────────────────────────


def test_permissions_are_as_told(tmp_path):
    for mode in (0o600, 0o660, 0o666):
        source = UnixSource(tmp_path / "rows.sock", mode=mode)
        assert stat.S_IMODE(source._listener.path.stat().st_mode) == mode
        source.close()
        assert not source._listener.path.exists()
