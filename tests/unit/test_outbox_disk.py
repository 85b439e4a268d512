"""Disks that are full, read-only or broken: nothing accepted is lost, nothing ends the daemon, and it heals."""

import os
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from edge_runtime.adapters.outbox import VOLATILE_BYTES, Outbox, Record
from edge_runtime.contract import ids
from edge_runtime.contract.codec import encode
from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.messages import Window
from edge_runtime.core import rollup
from tests.support import disks, history
from tests.support.disks import may_mount, read_only, tmpfs
from tests.support.history import History, read_windows, session, total

ONE = ids.session_id(f"{1:016x}")
TOPIC = "skiff/1/f/d/dev/event"


def keys(outbox):
    return [record.seq for record in outbox.pending(10_000)]


# ── ways to refuse a write ─────────────────────────────────────────────────────────────────────────────


@contextmanager
def file_system_full(outbox, folder):
    """ENOSPC from a real file system."""
    with disks.filled(folder):
        yield


@contextmanager
def database_full(outbox, folder):
    """SQLITE_FULL from SQLite itself."""
    pages = outbox._database.execute("PRAGMA page_count").fetchone()[0]
    outbox._database.execute(f"PRAGMA max_page_count = {pages}")
    yield
    outbox._database.execute("PRAGMA max_page_count = 1000000")


@contextmanager
def no_writing(outbox, folder):
    """EFBIG from every write: SQLITE_IOERR."""
    with disks.no_writing(os.getpid()):
        yield


REFUSALS = [database_full, no_writing, *([file_system_full] if may_mount() else [])]


@pytest.fixture(params=REFUSALS, ids=lambda way: way.__name__)
def refusing(request, tmp_path):
    """A folder, and what makes its disk refuse."""
    folder = tmp_path / "disk"
    if request.param is file_system_full:
        with tmpfs(folder):
            yield folder, request.param
    else:
        yield folder, request.param


def test_a_disk_that_refuses_loses_nothing_accepted_and_later_appends_work(refusing):
    folder, refuse = refusing
    outbox = Outbox(folder / "outbox.db")
    outbox.append(ONE, 0, TOPIC, b"first")
    outbox.append(ONE, 1, TOPIC, b"second")
    size = outbox.size_bytes
    with refuse(outbox, folder):
        for _ in range(3):
            with pytest.raises(SkiffError, match=r"outbox\.db: (database or disk is full|disk I/O error)"):
                outbox.append(ONE, 2, TOPIC, bytes(200_000))
        assert keys(outbox) == [0, 1]
        assert (len(outbox), outbox.size_bytes, outbox.dropped) == (2, size, 0)
        assert outbox.set_aside == outbox.volatile == ""
    outbox.append(ONE, 2, TOPIC, bytes(100_000))
    assert outbox.trim(ONE, [0]) == 1
    assert keys(outbox) == [1, 2]
    outbox.close()
    again = Outbox(folder / "outbox.db")
    assert [(r.seq, len(r.payload)) for r in again.pending(9)] == [(1, 6), (2, 100_000)]
    assert again.set_aside == again.volatile == ""
    again.close()


def test_a_full_outbox_on_a_disk_that_refuses_merges_nothing_half(refusing):
    folder, refuse = refusing
    made = History()
    closed: list[Window] = []
    outbox = Outbox(folder / "outbox.db", max_bytes=9_000, merge=rollup.merge, choose=rollup.choose)

    def close_window():
        window = made.window(1, len(closed) + 1)
        outbox.append(window.session, window.seq, history.TOPIC, encode(window))
        closed.append(window)

    for _ in range(30):
        close_window()
    before, gaps, size = outbox.pending(100), outbox.gaps(), outbox.size_bytes
    refused = 0
    with refuse(outbox, folder):
        for _ in range(3):
            try:
                close_window()
            except SkiffError:
                refused += 1
                assert (outbox.pending(100), outbox.gaps(), outbox.size_bytes) == (before, gaps, size)
            before, gaps, size = outbox.pending(100), outbox.gaps(), outbox.size_bytes
    assert refused == 3 or refuse is not no_writing
    for _ in range(10):
        close_window()
    assert total(read_windows(r.payload for r in outbox.pending(100))) == total(closed)
    outbox.close()


def test_marking_and_trimming_on_a_disk_that_refuses_say_so_and_change_nothing(tmp_path):
    outbox = Outbox(tmp_path / "outbox.db")
    outbox.append(ONE, 0, TOPIC, b"x")
    with no_writing(outbox, tmp_path):
        with pytest.raises(SkiffError, match="disk I/O error"):
            outbox.mark_sent([(ONE, 0)])
        with pytest.raises(SkiffError, match="disk I/O error"):
            outbox.trim(ONE, [0])
        assert [record.sent for record in outbox.pending(9)] == [False]
    outbox.mark_sent([(ONE, 0)])
    assert [record.sent for record in outbox.pending(9)] == [True]
    assert outbox.trim(ONE, [0]) == 1
    outbox.close()


# ── no disk at the start ───────────────────────────────────────────────────────────────────────────────


@contextmanager
def a_folder_that_is_a_file(folder):
    folder.write_bytes(b"")
    yield
    folder.unlink()


@contextmanager
def a_file_that_is_a_folder(folder):
    (folder / "outbox.db").mkdir(parents=True)
    yield
    (folder / "outbox.db").rmdir()


@contextmanager
def a_read_only_folder(folder):
    folder.mkdir()
    with read_only(folder):
        yield


@pytest.mark.parametrize("missing", [a_folder_that_is_a_file, a_file_that_is_a_folder, a_read_only_folder])
def test_without_a_disk_records_are_in_memory_until_there_is_one(tmp_path, missing):
    folder = tmp_path / "state"
    made, closed = History(), []
    with missing(folder):
        outbox = Outbox(folder / "outbox.db", max_bytes=9_000, merge=rollup.merge, choose=rollup.choose)
        assert "cannot be written" in outbox.volatile
        assert "lost with the process" in outbox.volatile
        for seq in range(1, 31):
            closed.append(made.window(1, seq))
            outbox.append(session(1), seq, history.TOPIC, encode(closed[-1]))
        assert outbox.volatile
        outbox.mark_sent([(session(1), outbox.pending(1)[0].seq)])
        before, gaps = outbox.pending(100), outbox.gaps()
        assert before[0].sent
        assert gaps
    closed.append(made.window(1, 31))
    outbox.append(session(1), 31, history.TOPIC, encode(closed[-1]))
    assert outbox.volatile == ""
    assert outbox.pending(1) == before[:1]
    assert outbox.gaps()[0].records == gaps[0].records + 1
    outbox.close()
    again = Outbox(folder / "outbox.db")
    assert again.volatile == again.set_aside == ""
    assert total(read_windows(r.payload for r in again.pending(100))) == total(closed)
    assert [r.sent for r in again.pending(100)] == [True] + [False] * (len(again) - 1)
    again.close()


def test_what_was_on_the_disk_comes_before_what_was_kept_in_memory_meanwhile(tmp_path, monkeypatch):
    path = tmp_path / "outbox.db"
    outbox = Outbox(path)
    outbox.append(ONE, 1, TOPIC, b"on the disk")
    outbox.close()
    connect = sqlite3.connect
    refusing = [True]

    def unable(name, **options):
        if refusing and name != ":memory:":
            raise OSError(5, "Input/output error")
        return connect(name, **options)

    monkeypatch.setattr(sqlite3, "connect", unable)
    outbox = Outbox(path)
    assert "Input/output error" in outbox.volatile
    assert keys(outbox) == []
    outbox.append(session(2), 1, TOPIC, b"in memory", sent=True)
    refusing.clear()
    outbox.append(session(2), 2, TOPIC, b"new")
    assert outbox.volatile == ""
    found = [(r.payload, r.sent) for r in outbox.pending(9)]
    assert found == [(b"on the disk", True), (b"in memory", True), (b"new", False)]
    outbox.close()


def test_memory_is_bounded(tmp_path):
    (tmp_path / "outbox.db").mkdir()
    outbox = Outbox(tmp_path / "outbox.db", max_bytes=64 << 20)
    for seq in range(50):
        outbox.append(ONE, seq, TOPIC, bytes(100_000))
        assert outbox.size_bytes <= VOLATILE_BYTES
    assert outbox.dropped == 50 - len(outbox)
    outbox.close()


# ── damage that cannot be set aside ────────────────────────────────────────────────────────────────────


def test_a_damaged_file_on_a_read_only_disk_is_no_crash_loop(tmp_path):
    path = tmp_path / "state" / "outbox.db"
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 1000)
    with read_only(path.parent):
        for _ in range(3):
            outbox = Outbox(path)
            assert "damaged (file is not a database) and cannot be set aside" in outbox.volatile
            assert outbox.set_aside == ""
            outbox.append(ONE, 1, TOPIC, b"x")
            assert keys(outbox) == [1]
            outbox.close()
    assert path.read_bytes().startswith(b"this is no database")
    outbox = Outbox(path)  # the disk is well again
    assert "file is not a database" in outbox.set_aside
    assert outbox.volatile == ""
    outbox.close()


def test_damage_found_in_use_that_cannot_be_set_aside_moves_to_memory(tmp_path, monkeypatch):
    path = tmp_path / "outbox.db"
    outbox = Outbox(path)
    outbox.append_all([Record(session=ONE, seq=n, topic=TOPIC, payload=bytes(600)) for n in range(200)])
    outbox.close()
    outbox = Outbox(path)
    data = bytearray(path.read_bytes())
    for start in range(4096, len(data), 4096):
        data[start : start + 512] = b"\xa5" * 512
    path.write_bytes(data)
    outbox._database.execute("PRAGMA cache_size = 0")
    outbox._database.execute("PRAGMA shrink_memory")
    monkeypatch.setattr(
        Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted"))
    )
    assert outbox.trim(ONE, [1]) == 0
    assert "cannot be set aside" in outbox.volatile
    assert outbox.set_aside == ""
    outbox.append(ONE, 2, TOPIC, b"y")
    assert keys(outbox) == [2]
    outbox.close()


def test_a_file_that_another_process_has_is_refused_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "outbox.db"
    Outbox(path).close()
    connect = sqlite3.connect
    with closing(connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(sqlite3, "connect", lambda name, **_: connect(name, timeout=0.0))
        with pytest.raises(SkiffError, match=r"outbox\.db: database is locked: is another daemon running"):
            Outbox(path)
    assert not Path(f"{path}.damaged").exists()


def test_a_closed_outbox_is_our_mistake_and_no_damage(tmp_path):
    outbox = Outbox(tmp_path / "outbox.db")
    outbox.append(ONE, 1, TOPIC, b"x")
    outbox.close()
    with pytest.raises(SkiffError, match="closed database"):
        outbox.append(ONE, 2, TOPIC, b"y")
    assert outbox.set_aside == ""
    assert not list(tmp_path.glob("*.damaged"))
