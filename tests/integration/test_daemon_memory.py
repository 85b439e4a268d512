"""A real daemon above its memory limit: it sheds or only says so, recovers, and a kill in between is told."""

import json
import socket
from contextlib import ExitStack, closing, contextmanager

import pytest

from edge_runtime.adapters.status_report import render
from edge_runtime.adapters.status_socket import read_status
from tests.support.chaos import WAIT_SECONDS, everything, provision

MB = 10**6
HELD_BYTES = 14 * MB
"""Of a request that is not finished yet; a line may be 16 MiB."""
CLIENTS = 6


def idle_rss_bytes(home):
    """What the daemon needs when nobody asks much of it."""
    process = home.start()
    try:
        process.wait_line("window_closed")
        found = read_status(home.state / "status.sock")["health"]["rss_bytes"]
        assert process.stop() == 0
    finally:
        process.close()
    return found


@contextmanager
def huge_batches(path, row):
    """Batches whose last byte is missing: the daemon holds them until it comes, or the client leaves."""
    rows = b", ".join([json.dumps(row).encode()] * 1000)
    line = b'{"rows": [' + rows.ljust(HELD_BYTES)
    with ExitStack() as stack:
        wires = []
        for _ in range(CLIENTS):
            wire = stack.enter_context(closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
            wire.settimeout(WAIT_SECONDS)
            wire.connect(str(path))
            wire.sendall(line)
            wires.append(wire)
        yield wires


@pytest.fixture
def limited(tmp_path, mosquitto):
    """Makes a device whose hard limit is ``room_mb`` above what it needs idle."""

    def make(room_mb, action):
        def with_limits(more):
            return provision(tmp_path / "d", mosquitto.host, mosquitto.port, more=more)

        home = with_limits("")
        with everything(mosquitto, home):
            idle = idle_rss_bytes(home)
        limit_mb = idle / MB + room_mb
        soft_mb = idle / MB + room_mb / 2 if room_mb > 0 else limit_mb
        limits = f"rss_mb = {limit_mb:.1f}\nrss_soft_mb = {soft_mb:.1f}\n"
        home.config.write_text(
            home.config.read_text(encoding="utf-8") + f'[budgets]\n{limits}on_hard_limit = "{action}"\n',
            encoding="utf-8",
        )
        return home

    return make


def test_above_its_hard_limit_a_daemon_sheds_says_so_and_recovers(limited, mosquitto):
    home = limited(40, "shed")
    with everything(mosquitto, home) as (centre, application), ExitStack() as stack:
        process = home.start()
        stack.callback(process.close)
        application.wait_answers(10)  # the model serves before the socket is there
        application.wait((home.state / "status.sock").exists, "the status socket")
        assert read_status(home.state / "status.sock")["limits"]["over"] == ""
        with huge_batches(home.socket, [0.1, 0.2, 0.3]) as wires:
            event = centre.wait_event("limit_rss_passed")
            assert "is above the hard limit of" in dict(event.detail)["reason"]
            centre.wait_event("limit_rss_soft_passed")
            application.wait(lambda: application.refused(0), "rows that are shed")
            assert set(application.refused(0)) == {"unavailable"}
            status = read_status(home.state / "status.sock")
            assert (status["limits"]["over"], status["limits"]["shedding"]) == ("hard", True)
            assert "rows are answered with an error" in render(status)
            wires[0].sendall(b"]}\n")
            with wires[0].makefile("rb") as answers:
                assert json.loads(answers.readline())["error"]["reason"] == "unavailable"
        centre.wait_event("limit_rss_kept")
        application.wait_answers(50)
        status = read_status(home.state / "status.sock")
        assert status["limits"]["over"] != "hard"
        assert not status["limits"]["shedding"]
        assert process.stop() == 0
        application.wait_gone()
        shed = sum(dict(w.refused).get("shed", 0) for w in centre.of("d", process.session))
        waiting = [w for k, w in home.outbox().items() if k not in centre.windows and k[1] == process.session]
        shed += sum(dict(getattr(w, "refused", ())).get("shed", 0) for w in waiting)
        assert shed >= len(application.refused(0)), "refused rows are counted"


@pytest.mark.slow
def test_told_to_report_it_goes_on_answering_and_a_kill_in_between_is_told_at_the_next_birth(
    limited, mosquitto
):
    home = limited(-8, "report")
    with everything(mosquitto, home) as (centre, application), ExitStack() as stack:
        process = home.start()
        stack.callback(process.close)
        centre.wait_event("limit_rss_passed")
        application.wait_answers(50)
        status = read_status(home.state / "status.sock")
        assert (status["limits"]["over"], status["limits"]["shedding"]) == ("hard", False)
        assert application.refused(0) == []
        process.kill()
        application.wait_gone()
        again = home.start()
        stack.callback(again.close)
        birth = centre.wait_birth(again.session)
        assert birth.last_exit.startswith("over its hard limit (RSS was last seen at ")
        assert birth.last_exit.endswith("), then killed")
        assert birth.restarts == 1
        assert read_status(home.state / "status.sock")["last_exit"] == birth.last_exit
        assert again.stop() == 0
        third = home.start()
        stack.callback(third.close)
        birth = centre.wait_birth(third.session)
        assert (birth.last_exit, birth.restarts) == ("stopped", 0)
        assert third.stop() == 0


def test_a_smaller_batch_is_what_it_does_where_it_is_told_so(limited, mosquitto):
    home = limited(-8, "smaller_batch")
    with everything(mosquitto, home) as (centre, application), ExitStack() as stack:
        process = home.start()
        stack.callback(process.close)
        centre.wait_event("limit_rss_passed")
        status = read_status(home.state / "status.sock")
        assert 0 < status["limits"]["max_batch"] < 4096
        assert not status["limits"]["shedding"]
        application.wait_answers(20)
        assert application.refused(0) == []
        assert process.stop() == 0
