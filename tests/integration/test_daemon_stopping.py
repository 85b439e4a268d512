"""How a daemon tells its manager that it is well, and how it goes: with its window kept, and a goodbye."""

import shutil
import signal
import socket
import time
from contextlib import ExitStack, closing, suppress
from typing import Any

import numpy as np
import psutil
import pytest

from edge_runtime.contract.messages import Event, Window
from edge_runtime.contract.topics import Topics
from edge_runtime.engine import Engine
from tests.publisher import signed
from tests.services import free_port
from tests.support.chaos import COHORT, FLEET, MODEL, NEW, OLD, WAIT_SECONDS, everything, provision
from tests.support.device import release
from tests.support.loop import wait_for
from tests.support.played import Played
from trainer.publish import Repository

pytestmark = pytest.mark.sampled(2)

STOP_SECONDS = 5.0
WALL_NS = 1_780_272_000 * 10**9


@pytest.fixture
def manager(tmp_path):
    """A service manager's socket, as systemd has it."""
    path = tmp_path / "notify"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as found:
        found.bind(str(path))
        found.settimeout(WAIT_SECONDS)
        yield found


def environment(manager, watchdog_seconds):
    """What a manager gives its service."""
    return {
        "NOTIFY_SOCKET": manager.getsockname(),
        "WATCHDOG_USEC": str(round(watchdog_seconds * 1e6)),
        "WATCHDOG_PID": "",
    }


def heard(manager):
    """What has come so far, without waiting."""
    found = []
    manager.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            found.append(manager.recv(4096).decode())
    manager.settimeout(WAIT_SECONDS)
    return found


def windows(home, centre):
    """Those that are stored or wait for it."""
    found = {**home.outbox(), **centre.windows}
    return [message for message in found.values() if isinstance(message, Window)]


# ── the goodbye ────────────────────────────────────────────────────────────────────────────────────────


def test_on_sigterm_the_open_window_is_kept_and_a_goodbye_is_said_but_no_last_will(tmp_path, mosquitto):
    home = provision(tmp_path / "d", mosquitto.host, mosquitto.port, window_seconds=3600.0, min_rows=20)
    with everything(mosquitto, home) as (centre, application), ExitStack() as stack:
        process = home.start()
        stack.callback(process.close)
        application.wait_answers(40)
        centre.wait_birth(process.session)
        before = time.monotonic()
        assert process.stop() == 0, "".join(process.text)
        assert time.monotonic() - before < STOP_SECONDS
        application.wait_gone()
        centre.wait(lambda: any(not s.online for s in centre.statuses), "the goodbye")
        (window,) = windows(home, centre)
        assert application.answered(0) <= window.profile.rows <= application.answered(0) + 1
        assert "Received DISCONNECT from d\n" in mosquitto.log
        assert [s.online for s in centre.statuses].count(False) == 1
        killed = home.start()
        stack.callback(killed.close)
        centre.wait_birth(killed.session)
        killed.kill()
        centre.wait(lambda: not centre.statuses[-1].online, "the last will")
        assert mosquitto.log.count("Received DISCONNECT from d\n") == 1


def test_on_sigterm_a_window_of_too_few_rows_is_not_kept(tmp_path, mosquitto):
    """A histogram of one row is that row."""
    home = provision(tmp_path / "d", mosquitto.host, mosquitto.port, window_seconds=3600.0, min_rows=10**6)
    with everything(mosquitto, home) as (centre, application), ExitStack() as stack:
        process = home.start()
        stack.callback(process.close)
        application.wait_answers(5)
        assert process.stop() == 0
        assert process.said("window_withheld")
        assert not any(isinstance(m, Window) for m in home.outbox().values())
        assert not centre.windows


def test_neither_an_update_child_nor_a_stuck_client_keeps_it_from_stopping(tmp_path, mosquitto):
    home = provision(tmp_path / "d", mosquitto.host, mosquitto.port)
    repository = Repository.create(tmp_path / "repository")
    shutil.copy(repository.pinned_root, home.folder / "root.json")
    with everything(mosquitto, home) as (centre, application), ExitStack() as stack:
        process = home.start()
        stack.callback(process.close)
        application.wait_answers(10)
        stuck = stack.enter_context(closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
        stuck.connect(str(home.socket))
        stuck.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                stuck.send(b"[0.1, 0.2, 0.3]\n" * 1000)
        wanted = release(NEW.digest, OLD.digest, cohort=COHORT, fleet=FLEET, model=MODEL)
        centre.publish(Topics(FLEET).release(COHORT, MODEL), signed(repository, wanted))
        daemon = psutil.Process(process.pid)
        wait_for(lambda: "edge_runtime.updater" in str(child_of(daemon)), "the update child")
        children = daemon.children(recursive=True)
        application.wait_answers(10)
        before = time.monotonic()
        assert process.stop() == 0, "".join(process.text)
        assert time.monotonic() - before < STOP_SECONDS
        assert not process.said("update_died")
        assert not process.said("update_failed"), "it was at work until the end"
        _, alive = psutil.wait_procs(children, timeout=STOP_SECONDS)
        assert alive == []
        centre.wait(lambda: not centre.statuses[-1].online, "the goodbye")
        assert "Received DISCONNECT from d\n" in mosquitto.log


def child_of(daemon):
    """The command of the daemon's child; it may be gone, or not be itself yet."""
    try:
        return [child.cmdline() for child in daemon.children()]
    except psutil.Error:
        return []


@pytest.mark.slow
def test_a_broker_that_has_gone_silent_does_not_keep_it_from_stopping(tmp_path, mosquitto):
    home = provision(tmp_path / "d", mosquitto.host, mosquitto.port)
    with everything(mosquitto, home) as (centre, application), ExitStack() as stack:
        process = home.start()
        stack.callback(process.close)
        centre.wait_windows("d", process.session)
        mosquitto._process.send_signal(signal.SIGSTOP)
        stack.callback(mosquitto._process.send_signal, signal.SIGCONT)
        application.wait_answers(50)
        before = time.monotonic()
        assert process.stop() == 0, "".join(process.text)
        assert time.monotonic() - before < STOP_SECONDS
        application.wait_gone()
        rows = sum(w.profile.rows for w in windows(home, centre))
        assert application.answered(0) <= rows <= application.answered(0) + 1


# ── the manager ────────────────────────────────────────────────────────────────────────────────────────


def test_a_manager_hears_that_it_is_ready_alive_and_stopping(tmp_path, mosquitto, manager):
    home = provision(tmp_path / "d", mosquitto.host, mosquitto.port)
    with everything(mosquitto, home) as (_, application), ExitStack() as stack:
        process = home.start(environment=environment(manager, 0.5))
        stack.callback(process.close)
        assert manager.recv(100) == b"READY=1"
        application.wait_answers(1)
        assert application.refused(0) == [], "ready means that rows are answered"
        assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        assert process.stop() == 0
        *alive, last = heard(manager)
        assert set(alive) <= {"WATCHDOG=1"}
        assert last == "STOPPING=1"


@pytest.fixture
def played(tmp_path, monkeypatch, manager):
    """Makes a daemon in this process whose manager wants a word every half second."""
    for name, value in environment(manager, 1.0).items():
        monkeypatch.setenv(name, value)

    def make(**models):
        home = provision(tmp_path / "d", "127.0.0.1", free_port(), source="none", **models)
        return home, Played(home, monkeypatch, wall_ns=WALL_NS)

    return make


def corrupt(kind, monkeypatch):
    """From now on answers are a little off: those of one engine, or of a whole class of them."""
    run = kind.run

    def wrong(*asked: Any, **options: Any) -> Any:
        labels, scores = run(*asked, **options)
        return labels, np.asarray(scores + 0.01, np.float32)

    monkeypatch.setattr(kind, "run", wrong)


def corrupt_all(model, monkeypatch):
    """So are those of every engine that is made of ``model``, as on a processor that computes wrongly."""
    made = Engine.__init__

    def make(engine: Engine, *given: Any, **options: Any) -> None:
        made(engine, *given, **options)
        if engine.digest == model.digest:
            corrupt(engine, monkeypatch)

    monkeypatch.setattr(Engine, "__init__", make)


def turn(played):
    played.clocks.go_on(0.5)
    yield False


def events(home, name):
    return [dict(m.detail) for m in home.outbox().values() if isinstance(m, Event) and m.name == name]


def test_a_model_that_went_wrong_in_memory_is_loaded_anew_before_it_answers_another_row(
    played, monkeypatch, manager
):
    """It is the only one there is, and its file is whole."""
    home, device = played(committed=OLD)
    daemon = device.daemon
    before: list[Any] = []
    heard_then: list[str] = []

    def script():
        nonlocal heard_then
        yield from turn(device)
        assert heard(manager) == ["READY=1", "WATCHDOG=1"]
        device.ask(5)
        before.append(daemon._runtime)
        corrupt(daemon._runtime.engine, monkeypatch)
        yield from turn(device)
        heard_then = heard(manager)
        assert daemon._runtime is not before[0]
        assert daemon._runtime.digest == OLD.digest
        assert daemon._runtime.engine.golden_problem() == ""
        device.ask(5)

    device.play(script())
    assert heard_then == ["WATCHDOG=1"], "a model answers rightly again"
    found = [m for m in home.outbox().values() if isinstance(m, Window)]
    assert sum(m.profile.rows for m in found) == 10, "what the one before had seen is kept"
    (told,) = events(home, "golden_row_failed")
    assert told["digest"] == OLD.digest
    assert "golden rows are answered differently" in told["reason"]
    assert events(home, "model_broken") == []
    assert home.check_state().committed == OLD.digest


def test_no_row_is_answered_while_a_model_that_went_wrong_is_loaded_anew(tmp_path, monkeypatch):
    home = provision(tmp_path / "d", "127.0.0.1", free_port())
    device = Played(home, monkeypatch, wall_ns=WALL_NS)
    daemon = device.daemon
    feed = daemon._feed
    assert feed is not None
    attached: list[bool] = []
    made = Engine.__init__

    def make(engine: Engine, *given: Any, **options: Any) -> None:
        attached.append(feed._runtime is not None)
        made(engine, *given, **options)

    def script():
        monkeypatch.setattr(Engine, "__init__", make)
        assert daemon._runtime is not None
        corrupt(daemon._runtime.engine, monkeypatch)
        device.clocks.go_on(61.0)
        yield False
        assert feed._runtime is daemon._runtime is not None

    device.play(script())
    assert attached == [False]


def test_a_model_that_stays_wrong_is_left_for_the_one_before(played, monkeypatch, manager):
    home, device = played(committed=OLD, previous=NEW)
    daemon = device.daemon
    said: list[list[str]] = []

    def script():
        for _ in range(3):
            yield from turn(device)
        said.append(heard(manager))
        assert daemon._runtime.digest == OLD.digest
        corrupt(daemon._runtime.engine, monkeypatch)
        corrupt_all(OLD, monkeypatch)
        yield from turn(device)
        said.append(heard(manager))
        assert daemon._runtime.digest == NEW.digest
        yield from turn(device)
        said.append(heard(manager))

    device.play(script())
    assert said == [["READY=1", *["WATCHDOG=1"] * 3], ["WATCHDOG=1"], ["WATCHDOG=1"]]
    assert heard(manager)[-1] == "STOPPING=1"
    state = home.check_state()
    assert (state.committed, state.previous, state.outcome) == (NEW.digest, None, "rolled_back")
    assert "golden rows are answered differently" in state.reason
    (event,) = events(home, "model_broken")
    assert event["digest"] == OLD.digest


def test_an_only_model_that_stays_wrong_serves_nothing_and_starves_the_watchdog_until_it_is_right(
    played, monkeypatch, manager
):
    home, device = played(committed=OLD)
    daemon = device.daemon
    after: list[str] = []

    def script():
        nonlocal after
        yield from turn(device)
        assert heard(manager) == ["READY=1", "WATCHDOG=1"]
        device.ask(5)
        with monkeypatch.context() as sick:
            corrupt(daemon._runtime.engine, sick)
            corrupt_all(OLD, sick)
            for _ in range(20):  # a closed window, or the next try, must not bring it back
                yield from turn(device)
                assert daemon._runtime is None
            assert daemon._agent.report.serving is None
        assert heard(manager) == []
        for _ in range(1000):
            yield from turn(device)
            if daemon._runtime is not None:
                break
        yield from turn(device)
        assert daemon._runtime.digest == OLD.digest
        after = heard(manager)

    device.play(script())
    assert after
    assert set(after) == {"WATCHDOG=1"}
    assert home.check_state().committed == OLD.digest


def test_a_model_that_answers_wrongly_from_the_start_never_serves(played, monkeypatch):
    corrupt_all(OLD, monkeypatch)
    home, device = played(committed=OLD, previous=NEW)
    served: list[str] = []

    def script():
        served.append(device.daemon._runtime.digest)
        yield False

    device.play(script())
    assert served == [NEW.digest]
    assert home.check_state().committed == NEW.digest


def test_without_a_model_the_watchdog_is_fed(played, manager):
    """A device that waits for its first model is well."""
    _, device = played(committed=None)

    def script():
        for _ in range(2):
            yield from turn(device)

    device.play(script())
    assert heard(manager) == ["READY=1", *["WATCHDOG=1"] * 2, "STOPPING=1"]
