"""A real daemon killed at named points, by SIGKILL before or after a call: nothing is lost but the open window.

Each point must be reached: the process says so with its last breath.
"""

import contextlib
import io
import json
import signal

import pytest

from edge_runtime import skiffd
from edge_runtime.adapters.slots import Slots
from edge_runtime.adapters.status_socket import read_status
from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.messages import Window
from edge_runtime.contract.release import TrialGate
from edge_runtime.contract.topics import Topics
from edge_runtime.core import lifecycle
from tests.support import chaos
from tests.support.chaos import COHORT, FLEET, MODEL, NEW, OLD, everything, install, provision
from tests.support.device import release, signed
from tests.support.doomed import EVENT
from tests.support.tiny_models import laborious

pytestmark = pytest.mark.sampled(2)

BEFORE_BEGIN = ""
KILLED = "killed"
STOPPED = "stopped"
OPEN_SECONDS = 10.0
"""How long a window of 0.2 s may have been open on a machine that does other things, too."""

START, TRIAL, ROLL_BACK, TIGHT = "start", "trial", "roll_back", "tight"
STATUS, UPDATE, TERM = "status", "update", "term"


def both(target, *, nth=1, how=START, said=KILLED, said_after=None, fast=""):
    """The points before and after the ``nth`` call of a function; ``fast`` names the one for every run of the tests."""
    for when in ("before", "after"):
        marks = [] if when == fast else [pytest.mark.slow]
        told = said if when == "before" or said_after is None else said_after
        name = f"{target.rpartition(':')[2]}-{nth}-{when}" + ("" if how == START else f"-{how}")
        yield pytest.param(target, when, nth, how, told, id=name, marks=marks)


E = "edge_runtime"
POINTS = [
    # Coming up.
    *both(f"{E}.watch:Watch.__init__", said=BEFORE_BEGIN),
    *both(f"{E}.adapters.slots:Slots.__init__", said=BEFORE_BEGIN),
    *both(f"{E}.adapters.outbox_file:open_file", said=BEFORE_BEGIN),
    *both(f"{E}.adapters.outbox_file:_prepare", said=BEFORE_BEGIN),
    *both(f"{E}.core.agent:Agent.__init__", said=BEFORE_BEGIN),
    *both(f"{E}.daemon:Daemon.__init__", said=BEFORE_BEGIN),
    *both(f"{E}.adapters.last_exit:LastExit.begin", said=BEFORE_BEGIN, said_after=KILLED, fast="after"),
    *both(f"{E}.adapters.disk:replace_file", said=BEFORE_BEGIN, said_after=KILLED),
    *both("os:replace", said=BEFORE_BEGIN, said_after=KILLED),
    *both(f"{E}.core.agent:Agent.handle", nth=2),
    *both(f"{E}.daemon:Daemon._save"),
    *both(f"{E}.daemon:Daemon._serve"),
    *both(f"{E}.engine:Engine.__init__"),
    *both(f"{E}.runtime:Runtime.__init__"),
    *both(f"{E}.feed:Feed.attach"),
    *both(f"{E}.adapters.sources.unix:UnixSource._accept"),
    *both(f"{E}.adapters.status_socket:StatusSocket.start"),
    *both(f"{E}.adapters.systemd:Notifier.ready"),
    # The link.
    *both(f"{E}.link:Link.start"),
    *both(f"{E}.mqtt.client:Client.open"),
    *both(f"{E}.link:Link._on_connect"),
    *both(f"{E}.core.voice:Voice.birth"),
    *both(f"{E}.link:Link.publish"),
    *both(f"{E}.link:Link.publish", nth=4, fast="after"),
    # Rows and windows.
    *both(f"{E}.runtime:Runtime.predict", nth=100),
    *both(f"{E}.runtime:Runtime.take_window"),
    *both(f"{E}.daemon:Daemon._close_window", nth=2),
    *both(f"{E}.daemon:close_window", nth=2),
    *both(f"{E}.core.voice:Voice.window", nth=2),
    *both(f"{E}.keeper:Keeper.append", nth=3),
    *both(f"{E}.adapters.outbox:Outbox.append", nth=3),
    *both(f"{E}.adapters.outbox:Outbox._insert", nth=3, fast="after"),
    *both(f"{E}.adapters.outbox:Outbox._make_room", nth=3),
    *both(f"{E}.daemon:Daemon._send", nth=3),
    *both(f"{E}.adapters.outbox:Outbox.pending", nth=3),
    *both(f"{E}.adapters.outbox:Outbox.mark_sent", nth=3),
    *both(f"{E}.adapters.outbox:Outbox._write_sent", nth=2, fast="after"),
    *both(f"{E}.adapters.outbox:Outbox.trim", nth=2, fast="before"),
    *both(f"{E}.adapters.outbox:Outbox._trim", nth=2),
    *both(f"{E}.daemon:Daemon._tick", nth=5),
    *both(f"{E}.daemon:Daemon._prove_alive"),
    *both(f"{E}.watch:Watch.tick", nth=2),
    # A model on trial: counted, committed, rolled back.
    *both(f"{E}.daemon:Daemon._save", how=TRIAL),
    *both(f"{E}.adapters.slots:Slots.write_record", how=TRIAL, fast="after"),
    *both("os:replace", nth=2, how=TRIAL),
    *both("os:fsync", nth=5, how=TRIAL),
    *both(f"{E}.daemon:Daemon._serve", how=TRIAL),
    *both(f"{E}.engine:Engine.__init__", how=TRIAL),
    *both(f"{E}.trials:Trials.report", nth=3, how=TRIAL),
    *both(f"{E}.core.lifecycle:commit", how=TRIAL),
    *both(f"{E}.adapters.slots:Slots.write_record", nth=3, how=TRIAL),
    *both(f"{E}.adapters.slots:Slots.collect", how=TRIAL),
    *both(f"{E}.core.lifecycle:fail", how=ROLL_BACK),
    *both(f"{E}.runtime:Runtime.swap", how=ROLL_BACK, fast="after"),
    *both(f"{E}.adapters.slots:Slots.collect", how=ROLL_BACK),
    # What seldom happens.
    *both(f"{E}.adapters.last_exit:LastExit.note", how=TIGHT),
    *both(f"{E}.adapters.status_socket:StatusSocket._answer", how=STATUS),
    *both(f"{E}.updates:Updates.start", how=UPDATE),
    *both(f"{E}.adapters.child:Child.__init__", how=UPDATE),
    # Going down.
    *both(f"{E}.daemon:Daemon._shut_down", how=TERM),
    *both(f"{E}.adapters.status_socket:StatusSocket.stop", how=TERM),
    *both(f"{E}.link:Link.stop", how=TERM),
    *both(f"{E}.adapters.outbox:Outbox.close", how=TERM),
    *both(f"{E}.adapters.last_exit:LastExit.end", how=TERM, said_after=STOPPED),
]

GATE = TrialGate(predictions=100, seconds=0.3, starts=100)
STATES = {
    TRIAL: "",
    ROLL_BACK: "[budgets]\npredict_p99_us = 0.001\n",
    TIGHT: "[budgets]\nrss_soft_mb = 1\n",
}


SLOW = laborious(NEW)


def prepared(tmp_path, mosquitto, how):
    """A device in the state that the point needs."""
    slots = lifecycle.SlotState(model=MODEL, committed=OLD.digest)
    if how in (TRIAL, ROLL_BACK):
        candidate = NEW if how == TRIAL else SLOW
        slots = lifecycle.begin_trial(slots, candidate.digest, attempt=1, gate=GATE)
    home = provision(tmp_path / "d", mosquitto.host, mosquitto.port, slots=slots, more=STATES.get(how, ""))
    install(Slots(home.state), SLOW)
    return home


def provoke(how, doomed, home, centre):
    """Brings about what does not happen by itself."""
    match how:
        case "status":
            centre.wait_birth(doomed.session)
            with contextlib.suppress(SkiffError):  # it dies while it answers
                read_status(home.state / "status.sock")
        case "update":
            offered = signed(release(NEW.digest, OLD.digest, cohort=COHORT, fleet=FLEET, model=MODEL))
            centre.publish(Topics(FLEET).release(COHORT, MODEL), offered)
        case "term":
            centre.wait_windows(home.device, doomed.session)
            doomed.send(signal.SIGTERM)


def recorded(home, centre, session):
    """Rows of the windows of a session by number, of those that are stored and those that wait for it."""
    waiting = {k: m for k, m in home.outbox().items() if isinstance(m, Window)}
    both_have = waiting.keys() & centre.windows.keys()
    assert all(waiting[key] == centre.windows[key] for key in both_have)
    found = {**waiting, **centre.windows}
    return {seq: window.profile.rows for (_, of, seq), window in sorted(found.items()) if of == session}


def check_rows(home, centre, application, process, session, *, phase, clean):
    """Nothing twice, nothing missing but the open window; that it was killed is the only excuse."""
    answered = application.answered(phase)
    have = recorded(home, centre, session)
    closed, kept = chaos.windows_closed(process), chaos.windows_kept(process)
    assert kept.items() <= have.items(), "a window that was kept is gone"
    rows = list(have.values())
    assert closed[: len(rows)] == rows, "the windows are others than those that were closed"
    # The answer to the last row may be lost on its way.
    assert sum(rows) <= answered + 1, "rows were counted twice"
    if clean:
        assert closed == rows
        assert sum(rows) >= answered
        return
    assert len(closed) - len(rows) in (0, 1), "more than the open window is lost"
    assert len(have) - len(kept) in (0, 1)
    times = [at for c in application.connections if c.phase == phase for at in c.answers]
    if len(times) > sum(rows):
        assert times[-1] - times[sum(rows)] < OPEN_SECONDS, "more than an open window is lost"


def ask_status(home):
    """What ``skiffd --status --json`` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert skiffd.main([str(home.config), "--status", "--json"]) == 0
    return json.loads(out.getvalue())


def session_of(process):
    kept = process.said("record_kept")
    return kept[0].values["session"] if kept else ""


def test_there_are_points_enough():
    assert len({(p.values[0], p.values[1]) for p in POINTS}) >= 100
    assert 6 <= sum(not p.marks for p in POINTS) <= 9


@pytest.mark.parametrize(("target", "when", "nth", "how", "said"), POINTS)
def test_killed_at_a_point_a_daemon_comes_back_and_counts_every_row_once(
    tmp_path, mosquitto, target, when, nth, how, said
):
    home = prepared(tmp_path, mosquitto, how)
    with everything(mosquitto, home) as (centre, application):
        doomed = home.start_doomed(target, when, nth)
        try:
            provoke(how, doomed, home, centre)
            code = doomed.wait_end()
        finally:
            doomed.close()
        assert code == -signal.SIGKILL, "".join(doomed.text)
        assert doomed.lines[-1].event == EVENT, "killed elsewhere"
        assert doomed.lines[-1].values == {"point": target, "when": when}
        application.wait_gone()
        state = home.check_state()
        assert state.committed in (OLD.digest, NEW.digest)
        assert state.serving is not None
        before = session_of(doomed)
        if before:
            check_rows(home, centre, application, doomed, before, phase=0, clean=False)

        application.phase = 1
        again = home.start()
        try:
            assert again.wait_line("serving").values["digest"] == state.serving
            session = again.session
            birth = centre.wait_birth(session)
            assert birth.last_exit == said
            assert birth.restarts == (1 if said == KILLED else 0)
            centre.wait_windows(home.device, session)
            status = ask_status(home)
            assert status["session"] == session
            assert status["last_exit"] == (said or "first start")
            assert status["link"]["connected"]
            assert status["models"][0]["serving"] in application.models(1) | {OLD.digest, NEW.digest}
            assert again.stop() == 0, "".join(again.text)
        finally:
            again.close()
        application.wait_gone()
        assert application.refused(1) == []
        assert state.serving in application.models(1)
        check_rows(home, centre, application, again, session, phase=1, clean=True)
        if before:
            check_rows(home, centre, application, doomed, before, phase=0, clean=False)
        assert {w.device for w in centre.windows.values()} == {home.device}
        assert {w.session for w in centre.windows.values()} <= {before, session}
        assert centre.conflicts == []
        home.check_state()
