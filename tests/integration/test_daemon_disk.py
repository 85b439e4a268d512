"""A real daemon whose disk is full or read-only: it answers, says what is wrong, and gives up no window."""

from contextlib import ExitStack, contextmanager

import pytest

from edge_runtime.adapters.status_report import render
from edge_runtime.adapters.status_socket import read_status
from edge_runtime.contract.messages import Window
from tests.support import chaos
from tests.support.chaos import everything, provision
from tests.support.disks import filled, may_mount, no_writing, read_only, tmpfs

pytestmark = pytest.mark.sampled(3)


@contextmanager
def full(home, process):
    """ENOSPC from a real file system."""
    with filled(home.state):
        yield


@contextmanager
def broken(home, process):
    """Every write is refused."""
    with no_writing(process.pid):
        yield


@contextmanager
def made_read_only(home, process):
    """Nothing can be opened for writing, made or renamed, and what is open takes no writes."""
    with read_only(home.state), no_writing(process.pid):
        yield


needs_mount = pytest.mark.skipif(not may_mount(), reason="mounting file systems needs CAP_SYS_ADMIN")
WAYS = [pytest.param(full, marks=needs_mount), broken, made_read_only]


@pytest.mark.parametrize("refuse", WAYS, ids=lambda way: way.__name__)
def test_a_disk_that_refuses_while_the_daemon_runs_costs_no_row_and_no_window(tmp_path, mosquitto, refuse):
    with ExitStack() as stack:
        if refuse is full:
            stack.enter_context(tmpfs(tmp_path / "d" / "disk"))
        home = provision(
            tmp_path / "d", mosquitto.host, mosquitto.port, state_dir="disk",
            device_more='status_socket = "status.sock"',
        )  # fmt: skip
        centre, application = stack.enter_context(everything(mosquitto, home))
        process = home.start()
        stack.callback(process.close)
        centre.wait_windows("d", process.session, 2)
        with refuse(home, process):
            process.wait_line("outbox_trouble")
            application.wait_answers(150)
            status = read_status(home.folder / "status.sock")
            assert "outbox.db" in status["outbox"]["trouble"]
            assert status["outbox"]["records"] > 0
            assert status["outbox"]["trouble"] in render(status)
        session = process.session
        event = centre.wait_event("outbox_trouble")
        assert "outbox.db" in dict(event.detail)["reason"]
        centre.wait_windows("d", session, len(chaos.windows_closed(process)))
        application.wait_answers(1)
        status = read_status(home.folder / "status.sock")
        assert status["outbox"]["trouble"] == ""
        assert status["outbox"]["lost"] == 0
        assert process.stop() == 0, "".join(process.text)
        application.wait_gone()
        assert application.refused(0) == []
        waiting = {k: w for k, w in home.outbox().items() if isinstance(w, Window)}
        rows = sum(w.profile.rows for w in {**waiting, **centre.windows}.values())
        assert application.answered(0) <= rows <= application.answered(0) + 1
        assert centre.conflicts == []
        assert len([c for c in application.connections if c.answers]) == 1, "it was never sent away"
        home.check_state()


def test_a_disk_that_is_read_only_from_the_start_and_writable_later(tmp_path, mosquitto):
    home = provision(tmp_path / "d", mosquitto.host, mosquitto.port, state_dir="disk")
    place = home.state / "status.sock"  # where it cannot be made: the daemon answers elsewhere
    with everything(mosquitto, home) as (centre, application), ExitStack() as stack:
        with read_only(home.state):
            process = home.start()
            stack.callback(process.close)
            session = process.session
            centre.wait_windows("d", session, 3)  # what memory keeps does leave
            event = centre.wait_event("outbox_trouble")
            assert "records are in memory" in dict(event.detail)["reason"]
            assert process.said("last_exit_unsaved")
            assert process.said("status_elsewhere")
            status = read_status(place)
            assert "records are in memory" in status["outbox"]["trouble"]
            assert centre.wait_birth(session).last_exit == ""
            assert not (home.state / "outbox.db").exists()
        # The next record that is kept looks for the disk again.
        centre.wait_windows("d", session, len(chaos.windows_closed(process)) + 2)
        assert (home.state / "outbox.db").exists()
        assert read_status(place)["outbox"]["trouble"] == ""
        assert process.stop() == 0
        application.wait_gone()
        assert application.refused(0) == []
        waiting = {k: w for k, w in home.outbox().items() if isinstance(w, Window)}
        rows = sum(w.profile.rows for w in {**waiting, **centre.windows}.values())
        assert application.answered(0) <= rows <= application.answered(0) + 1
        application.phase = 1
        again = home.start()
        stack.callback(again.close)
        assert centre.wait_birth(again.session).last_exit == "stopped"
        assert place.is_socket()
        assert read_status(place)["outbox"]["trouble"] == ""
        assert again.stop() == 0


@needs_mount
def test_a_disk_that_is_full_from_the_start_still_serves(tmp_path, mosquitto):
    """Also without room for SQLite's files: the daemon comes up, and its windows leave."""
    with tmpfs(tmp_path / "d" / "disk"):
        home = provision(
            tmp_path / "d", mosquitto.host, mosquitto.port, state_dir="disk",
            device_more='status_socket = "status.sock"',
        )  # fmt: skip
        with everything(mosquitto, home) as (centre, application), ExitStack() as stack:
            with filled(home.state):
                process = home.start()
                stack.callback(process.close)
                centre.wait_windows("d", process.session, 2)
                centre.wait_event("outbox_trouble")
                assert read_status(home.folder / "status.sock")["outbox"]["trouble"]
            centre.wait_windows("d", process.session, len(chaos.windows_closed(process)) + 2)
            assert process.stop() == 0
            assert application.refused(0) == []
            assert centre.conflicts == []
