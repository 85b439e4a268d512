"""The composition root where the disk is in the way; whole daemons are tried in tests/integration."""

import errno
import logging
import time
from dataclasses import replace

import pytest

from edge_runtime.adapters import child
from edge_runtime.contract.codec import decode
from edge_runtime.contract.errors import InputError, SkiffError
from edge_runtime.contract.ids import Digest, SessionId
from edge_runtime.contract.messages import Window
from edge_runtime.contract.release import TrialGate
from edge_runtime.core import lifecycle
from edge_runtime.core.events import (
    Append,
    GapFound,
    Noticed,
    Save,
    Saved,
    Started,
    StartUpdate,
    Trim,
    Unsaved,
    UpdateEnded,
)
from edge_runtime.core.windowing import WindowPolicy
from edge_runtime.daemon import Daemon
from edge_runtime.keeper import GAP_SECONDS, MAX_UNKEPT, Keeper
from edge_runtime.runtime import Runtime
from edge_runtime.skiffd import main
from edge_runtime.updates import Updates
from tests.support.chaos import configured
from tests.support.tiny_models import classifier

DIGEST = Digest("ab" * 32)
TINY = classifier()
TINY_SPEC = Runtime(TINY.artifact).engine.info.reference.spec
GATE = TrialGate(predictions=10, seconds=1.0, starts=1)


@pytest.fixture
def config(tmp_path):
    return configured(tmp_path)


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def committed(config):
    return lifecycle.SlotState(model=config.model, committed=DIGEST)


def test_a_state_that_is_on_disk_already_needs_no_disk(config, monkeypatch):
    daemon = Daemon(config)
    assert daemon._perform(Save(committed(config)))
    again = Daemon(config)
    monkeypatch.setattr(again._slots, "write_record", no_space)
    assert again._perform(Save(committed(config)))
    assert list(again._events) == [Saved()]
    assert again._agent.slots.committed == DIGEST


@pytest.mark.parametrize("copy", ["record.a.json", "record.b.json"])
def test_a_quarantine_outlives_the_loss_of_either_copy_of_the_state(config, copy):
    daemon = Daemon(config)
    assert daemon._perform(Save(committed(config)))
    condemned = lifecycle.refuse(committed(config), Digest("cd" * 32), attempt=2, reason="slow")
    assert daemon._perform(Save(condemned, needed=False))
    (config.state_dir / copy).write_bytes(b"worn")
    assert dict(Daemon(config)._agent.slots.quarantine) == {Digest("cd" * 32): 2}


def test_a_full_disk_leaves_the_state_before_and_stops_what_needs_the_new_one(config, monkeypatch):
    daemon = Daemon(config)
    daemon._perform(Save(committed(config), needed=False))
    with monkeypatch.context() as full:
        full.setattr(daemon._slots, "write_record", no_space)
        wanted = replace(committed(config), previous=Digest("cd" * 32))
        assert not daemon._perform(Save(wanted))
        (refused,) = daemon._events
        assert isinstance(refused, Unsaved)
        assert "free some space" in refused.reason
        assert Daemon(config)._agent.slots == committed(config)
        assert daemon._perform(Save(wanted, needed=False)), "what only remembers does not stop the rest"
    daemon._agent._models.slots = wanted
    daemon._tick(time.monotonic() + 60.0)
    assert Daemon(config)._agent.slots == wanted, "it is tried again when the disk has space"


def test_what_was_decided_is_not_done_when_the_disk_refuses_it(config, monkeypatch):
    """A trial of one start: what cannot be counted on disk is not begun, and the committed model serves."""
    trial = lifecycle.begin_trial(committed(config), Digest("cd" * 32), attempt=1, gate=GATE)
    Daemon(config)._perform(Save(trial))
    daemon = Daemon(config)
    monkeypatch.setattr(daemon._slots, "write_record", no_space)
    served: list[Digest | None] = []
    monkeypatch.setattr(daemon, "_serve", served.append)
    daemon._handle(Started())
    assert served == [DIGEST]
    assert Daemon(config)._agent.slots == trial


def test_a_record_that_the_disk_refuses_waits_for_it_in_memory(config, monkeypatch, caplog):
    keeper = Keeper(config)

    def refuse(*_):
        raise SkiffError("disk full")

    with monkeypatch.context() as full, caplog.at_level(logging.ERROR, logger="skiffd"):
        full.setattr(keeper._outbox, "append", refuse)
        for seq in range(MAX_UNKEPT + 1):
            keeper.append(Append(SessionId("0" * 16), seq, "topic", b"payload"))
    assert "outbox_trouble reason=disk full" in caplog.text
    assert "record_lost seq=0 topic=topic" in caplog.text
    assert caplog.text.count("outbox_trouble") == 1
    assert keeper.report.records == MAX_UNKEPT
    assert keeper.report.lost == 1
    assert list(keeper.tick(0.0)) == [Noticed("outbox_trouble", (("reason", "disk full"),))], (
        "over by now, and told"
    )
    assert list(keeper.tick(1.0)) == []
    assert [record.seq for record in keeper._outbox.pending(MAX_UNKEPT)] == list(range(1, MAX_UNKEPT + 1))


def test_gaps_are_told_once_somebody_listens_and_then_settled(config):
    small = replace(config, outbox_bytes=1200)
    keeper = Keeper(small)
    topic = "skiff/1/f/d/d1/event"
    for seq in range(1, 9):
        keeper.append(Append(SessionId("0" * 16), seq, topic, bytes(100)))
    assert list(keeper.tick(0.0)) == [], "nobody has stored anything: telling would only fill it more"
    (oldest, *_) = keeper._outbox.pending(1)
    keeper.trim(Trim(oldest.session, (oldest.seq,)))
    (gap,) = keeper.tick(1.0)
    assert isinstance(gap, GapFound)
    assert gap.name == "records_dropped"
    assert dict(gap.detail)["topic"] == topic
    assert int(dict(gap.detail)["records"]) == keeper.report.lost > 0
    assert list(keeper.tick(GAP_SECONDS + 2.0)) == []


def test_the_command_names_what_is_wrong_with_its_file(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(
        '[device]\nid = "d1"\nfleet = "f"\nstate_dirr = "s"\n[model]\nname = "m"\ntrust_root = "r"\n[broker]\n',
        encoding="utf-8",
    )
    assert main([str(path)]) == 2
    assert "device.state_dir: is missing (is 'state_dirr' meant for it?)" in capsys.readouterr().err


def test_a_device_that_refuses_every_row_is_not_silent(config):
    """No row answered means no histogram to protect: the window leaves with what was refused."""
    daemon = Daemon(replace(config, window=WindowPolicy(period_ns=1, min_rows=30)))
    runtime = daemon._runtime = Runtime(TINY.artifact)
    daemon._window = daemon._open_window()
    daemon._tick(time.monotonic())
    assert daemon._keeper.report.records == 0, "nothing was asked"
    for _ in range(3):
        with pytest.raises(InputError):
            runtime.predict([float("nan")] * 3)
    daemon._tick(time.monotonic())
    (record,) = daemon._keeper._outbox.pending(2)
    window = decode(record.payload)
    assert isinstance(window, Window)
    assert (window.profile.rows, window.refused) == (0, (("missing", 3),))
    window.profile.check(TINY_SPEC)
    runtime.predict([0.0, 0.0, 0.0])
    daemon._tick(time.monotonic())
    assert daemon._keeper.report.records == 1, "one row would be readable"


@pytest.mark.parametrize(("code", "noted"), [(-9, 1), (1, 0)])
def test_an_update_child_that_was_killed_is_noted_and_its_update_tried_again(
    config, monkeypatch, code, noted
):
    lines = [{"exit": code, "stderr": "last words"}]

    class Ended:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def poll(self):
            return lines.pop() if lines else None

    monkeypatch.setattr(child, "Child", Ended)
    notes: list[int] = []
    updates = Updates(config, wake=lambda: None, killed=lambda: notes.append(1))
    updates.start(StartUpdate(release=b"", floor=0, serving=None, have=(), quarantine=()))
    assert updates.running
    (ended,) = updates.listen()
    assert isinstance(ended, UpdateEnded)
    assert (ended.ok, ended.retry) == (False, True)
    assert ended.reason == f"the update child ended with {code}: last words"
    assert len(notes) == noted
    assert not updates.running


def test_no_update_begins_once_the_daemon_stops(config, monkeypatch):
    started: list[object] = []
    monkeypatch.setattr(child, "Child", lambda *args, **_: started.append(args))
    updates = Updates(config, wake=lambda: None, killed=lambda: None)
    updates.kill()
    updates.start(StartUpdate(release=b"", floor=0, serving=None, have=(), quarantine=()))
    assert (started, updates.running) == ([], False)
