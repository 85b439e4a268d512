"""The outbox: what it accepted survives, in order, until it is trimmed."""

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.adapters.outbox import RECORD_BYTES, Outbox
from edge_runtime.contract import ids
from edge_runtime.contract.errors import BudgetExceeded, SkiffError

ONE, TWO = (ids.session_id(f"{n:016x}") for n in (1, 2))
TOPIC = "skiff/1/f/d/dev/m/window"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "outbox.db"


@pytest.fixture
def outbox(path):
    opened = Outbox(path)
    yield opened
    opened.close()


def keys(outbox, limit=1000, skip=frozenset()):
    return [(record.session, record.seq) for record in outbox.pending(limit, skip)]


def test_records_come_oldest_first_and_whole(outbox):
    for session, seq in ((TWO, 9), (ONE, 1), (TWO, 3)):
        outbox.append(session, seq, TOPIC, bytes([seq]) * 5)
    assert keys(outbox) == [(TWO, 9), (ONE, 1), (TWO, 3)]
    first = outbox.pending(1)[0]
    assert (first.topic, first.payload) == (TOPIC, b"\x09" * 5)
    assert len(outbox) == 3
    assert outbox.size_bytes == 3 * (len(TOPIC) + 5 + RECORD_BYTES)


def test_what_is_in_flight_is_left_out(outbox):
    for seq in range(10):
        outbox.append(ONE, seq, TOPIC, b"x")
    assert keys(outbox, 3) == [(ONE, 0), (ONE, 1), (ONE, 2)]
    assert keys(outbox, 3, {(ONE, 0), (ONE, 2), (TWO, 1)}) == [(ONE, 1), (ONE, 3), (ONE, 4)]
    assert keys(outbox, 0) == []


def test_trimming_forgets_what_is_stored_elsewhere(outbox):
    for seq in range(5):
        outbox.append(ONE, seq, TOPIC, b"x")
        outbox.append(TWO, seq, TOPIC, b"x")
    assert outbox.trim(ONE, [0, 1, 4, 77]) == 3
    assert outbox.trim(ONE, [0, 1, 4]) == 0
    assert keys(outbox) == [(TWO, 0), (TWO, 1), (ONE, 2), (TWO, 2), (ONE, 3), (TWO, 3), (TWO, 4)]
    assert len(outbox) == 7
    assert outbox.size_bytes == 7 * (len(TOPIC) + 1 + RECORD_BYTES)


def test_order_and_totals_survive_a_restart(outbox, path):
    for seq in range(4):
        outbox.append(ONE, seq, TOPIC, b"x" * seq)
    outbox.trim(ONE, [0])
    size = outbox.size_bytes
    outbox.close()
    again = Outbox(path)
    again.append(TWO, 0, TOPIC, b"")
    assert keys(again) == [(ONE, 1), (ONE, 2), (ONE, 3), (TWO, 0)]
    assert again.size_bytes == size + len(TOPIC) + RECORD_BYTES
    assert len(again) == 4
    assert again.set_aside == ""
    again.close()


def test_order_survives_emptying(outbox):
    outbox.append(ONE, 7, TOPIC, b"x")
    outbox.trim(ONE, [7])
    outbox.append(ONE, 5, TOPIC, b"x")
    outbox.append(ONE, 4, TOPIC, b"x")
    assert keys(outbox) == [(ONE, 5), (ONE, 4)]


def test_the_same_record_twice_is_one_record(outbox):
    outbox.append(ONE, 1, TOPIC, b"x")
    outbox.append(ONE, 1, TOPIC, b"x")
    assert len(outbox) == 1
    with pytest.raises(SkiffError, match=r"seq 1\) is already there with other content"):
        outbox.append(ONE, 1, TOPIC, b"y")
    assert outbox.pending(1)[0].payload == b"x"
    outbox.append(ONE, 2, TOPIC, b"y")  # the refusal left no open transaction behind
    assert len(outbox) == 2


def test_a_full_outbox_drops_the_oldest_and_counts_them(path):
    charge = RECORD_BYTES + len(TOPIC) + 100
    outbox = Outbox(path, max_bytes=5 * charge)
    for seq in range(8):
        outbox.append(ONE, seq, TOPIC, bytes(100))
        assert outbox.size_bytes <= 5 * charge
    assert keys(outbox) == [(ONE, seq) for seq in (3, 4, 5, 6, 7)]
    assert outbox.dropped == 3
    outbox.append(ONE, 8, TOPIC, bytes(100 + charge))  # needs the room of two
    assert keys(outbox) == [(ONE, seq) for seq in (5, 6, 7, 8)]
    assert len(outbox) == 4
    outbox.close()
    again = Outbox(path, max_bytes=5 * charge)
    assert again.dropped == 5
    again.close()


def test_a_message_larger_than_the_outbox_is_refused(path):
    outbox = Outbox(path, max_bytes=1000)
    outbox.append(ONE, 0, TOPIC, b"x")
    with pytest.raises(BudgetExceeded, match=r"2000 bytes is larger than the outbox \(1000 bytes\)"):
        outbox.append(ONE, 1, TOPIC, bytes(2000))
    assert keys(outbox) == [(ONE, 0)]
    assert outbox.dropped == 0
    outbox.close()


def test_the_file_stays_near_its_bound(path):
    outbox = Outbox(path, max_bytes=200_000)
    for seq in range(2000):
        outbox.append(ONE, seq, TOPIC, bytes(1000))
    outbox.close()
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 2 * 200_000


CHILD = """
import sys
from pathlib import Path
from edge_runtime.adapters.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]))
for seq in range(100_000):
    outbox.append("0000000000000001", seq, "topic", bytes(600))
    print(seq, flush=True)
"""


def test_what_append_returned_from_survives_a_kill(path, repository):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True, cwd=repository
    )
    assert child.stdout is not None
    with child.stdout as lines:
        acknowledged = [int(lines.readline()) for _ in range(40)]
        child.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in lines]
    assert child.wait() == -signal.SIGKILL
    outbox = Outbox(path)
    found = [seq for _, seq in keys(outbox, 200_000)]
    assert found[: len(acknowledged)] == acknowledged == list(range(len(acknowledged)))
    assert len(found) <= len(acknowledged) + 1  # at most the one whose append had not returned
    assert outbox.set_aside == ""
    outbox.close()


def test_every_commit_is_flushed(outbox):
    assert outbox._database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert outbox._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_file_that_is_no_database_is_set_aside(path):
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 100)
    outbox = Outbox(path)
    assert "not a database" in outbox.set_aside
    assert path.with_name("outbox.db.damaged").read_bytes().startswith(b"this is no database")
    outbox.append(ONE, 1, TOPIC, b"x")
    assert keys(outbox) == [(ONE, 1)]
    outbox.close()


def filled(path):
    outbox = Outbox(path)
    for seq in range(200):
        outbox.append(ONE, seq, TOPIC, bytes(600))
    outbox.close()


def smash(path):
    """Damages every page but the first, so that the file still opens."""
    data = bytearray(path.read_bytes())
    for start in range(4096, len(data), 4096):
        data[start : start + 512] = b"\xa5" * 512
    path.write_bytes(data)


def test_a_damaged_database_is_set_aside_when_opened(path):
    filled(path)
    smash(path)
    outbox = Outbox(path)
    assert "damaged" in outbox.set_aside
    assert len(outbox) == outbox.size_bytes == outbox.dropped == 0
    outbox.append(ONE, 1, TOPIC, b"x")
    assert keys(outbox) == [(ONE, 1)]
    outbox.close()


@pytest.mark.parametrize(
    ("use", "answer"),
    [
        (lambda o: o.append(TWO, 1, TOPIC, b"new"), None),
        (keys, []),
        (lambda o: o.trim(ONE, [1]), 0),
        (lambda o: o.dropped, 0),
    ],
)
def test_damage_found_in_use_sets_the_file_aside_and_goes_on(path, use, answer):
    filled(path)
    outbox = Outbox(path)
    smash(path)
    outbox._database.execute("PRAGMA cache_size = 0")
    outbox._database.execute("PRAGMA shrink_memory")
    assert use(outbox) == answer
    assert "damaged" in outbox.set_aside
    assert path.with_name("outbox.db.damaged").exists()
    outbox.append(TWO, 2, TOPIC, b"x")
    assert keys(outbox)[-1] == (TWO, 2)
    assert outbox.size_bytes == len(outbox) * (RECORD_BYTES + len(TOPIC)) + sum(
        len(record.payload) for record in outbox.pending(10)
    )
    outbox.close()


def test_a_disk_that_refuses_loses_nothing_accepted(outbox, path):
    outbox.append(ONE, 0, TOPIC, b"x")
    pages = outbox._database.execute("PRAGMA page_count").fetchone()[0]
    outbox._database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(SkiffError, match=r"outbox\.db: database or disk is full"):
        outbox.append(ONE, 1, TOPIC, bytes(100_000))
    assert keys(outbox) == [(ONE, 0)]
    assert len(outbox) == 1
    assert outbox.set_aside == ""
    outbox._database.execute("PRAGMA max_page_count = 1000000")
    outbox.append(ONE, 1, TOPIC, bytes(100_000))
    assert keys(outbox) == [(ONE, 0), (ONE, 1)]


def test_a_file_that_cannot_be_opened_is_named(path):
    path.mkdir(parents=True)
    with pytest.raises(SkiffError, match=r"outbox\.db: cannot be opened"):
        Outbox(path)


def test_a_file_locked_by_another_is_no_damage(path, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **_: connect(name, timeout=0.0))
    outbox = Outbox(path)
    other = connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(SkiffError, match="database is locked"):
        outbox.append(ONE, 1, TOPIC, b"x")
    other.execute("ROLLBACK")
    other.close()
    outbox.append(ONE, 1, TOPIC, b"x")
    assert outbox.set_aside == ""
    outbox.close()
    assert not Path(f"{path}.damaged").exists()
