"""The outbox: what it accepted survives, in order, until it is trimmed."""

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.adapters import outbox_room
from edge_runtime.adapters.outbox import Outbox, Record
from edge_runtime.adapters.outbox_room import EVENTS_SHARE, RECORD_BYTES
from edge_runtime.contract import ids
from edge_runtime.contract.codec import decode, encode
from edge_runtime.contract.errors import BudgetExceeded, SkiffError
from edge_runtime.core import rollup
from tests.support import history
from tests.support.history import History, event, read_windows, session, total

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
    for of, seq in ((TWO, 9), (ONE, 1), (TWO, 3)):
        outbox.append(of, seq, TOPIC, bytes([seq]) * 5)
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
    for start in range(0, 1000, 10):
        batch = [Record(session=ONE, seq=start + n, topic=TOPIC, payload=bytes(1000)) for n in range(10)]
        outbox.append_all(batch)
        assert sum(file.stat().st_size for file in path.parent.iterdir()) < 700_000  # the log beside it
    outbox.close()
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 1.5 * 200_000


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


@pytest.mark.parametrize("name", [b"tablerecordsrecords", b"tablegapsgaps", b"indexsqlite_autoindex_records"])
def test_a_database_whose_names_are_no_text_is_set_aside_when_opened(path, name):
    """SQLite's error quotes the name, which Python's module cannot decode."""
    filled(path)
    data = path.read_bytes()
    assert name in data
    path.write_bytes(data.replace(name, name[:-4] + b"\x80" + name[-3:]))
    outbox = Outbox(path)
    assert "damaged" in outbox.set_aside
    outbox.append(ONE, 1, TOPIC, b"x")
    assert keys(outbox) == [(ONE, 1)]
    outbox.close()


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


def test_several_records_are_kept_in_one_commit_or_none_is(outbox, monkeypatch):
    outbox.append(ONE, 2, TOPIC, b"there")
    batch = [Record(session=ONE, seq=n, topic=TOPIC, payload=b"x") for n in range(3)]
    with pytest.raises(SkiffError, match="already there with other content"):
        outbox.append_all(batch)
    assert (keys(outbox), len(outbox)) == ([(ONE, 2)], 1)
    assert outbox.size_bytes == len(TOPIC) + 5 + RECORD_BYTES
    statements: list[str] = []
    outbox._database.set_trace_callback(statements.append)
    outbox.append_all(batch[:2])
    assert statements.count("COMMIT") == 1
    assert keys(outbox) == [(ONE, 2), (ONE, 0), (ONE, 1)]


# ── what was sent ──────────────────────────────────────────────────────────────────────────────────────


def sent(outbox):
    return [record.seq for record in outbox.pending(1000) if record.sent]


def test_all_up_to_the_last_one_sent_count_as_sent_and_a_restart_knows(outbox, path):
    for seq in range(5):
        outbox.append(ONE, seq, TOPIC, b"x")
    assert sent(outbox) == []
    outbox.mark_sent([(ONE, 2), (ONE, 0), (TWO, 4)])
    assert sent(outbox) == [0, 1, 2]
    again = Outbox(path)
    assert sent(again) == [0, 1, 2]
    again.close()


def test_marking_what_is_marked_costs_no_commit(outbox):
    outbox.append(ONE, 0, TOPIC, b"x", sent=True)
    statements: list[str] = []
    outbox._database.set_trace_callback(statements.append)
    outbox.mark_sent([(ONE, 0)])
    assert not [s for s in statements if not s.startswith("SELECT")]


def test_given_as_sent_it_is_sent_unless_others_wait_before_it(outbox):
    outbox.append(ONE, 0, TOPIC, b"x", sent=True)
    assert sent(outbox) == [0]
    outbox.append(ONE, 1, TOPIC, b"x")
    outbox.append(ONE, 2, TOPIC, b"x", sent=True)
    assert sent(outbox) == [0]


def test_places_are_not_used_twice_so_that_nothing_new_counts_as_sent(outbox, path):
    outbox.append(ONE, 0, TOPIC, b"x", sent=True)
    outbox.trim(ONE, [0])
    outbox.close()
    again = Outbox(path)
    again.append(ONE, 1, TOPIC, b"x")
    assert sent(again) == []
    again.close()


# ── a full outbox ──────────────────────────────────────────────────────────────────────────────────────


class Device:
    """Appends windows and events to a small outbox, and knows what they add up to."""

    def __init__(self, path, max_bytes=12_000):
        self.path, self.max_bytes = path, max_bytes
        self.history = History()
        self.closed = []
        self.seq = {}
        self.open()

    def open(self):
        self.outbox = Outbox(self.path, max_bytes=self.max_bytes, merge=rollup.merge, choose=rollup.choose)

    def next_seq(self, start):
        self.seq[start] = self.seq.get(start, 0) + 1
        return self.seq[start]

    def close_window(self, start=1, topic=history.TOPIC, **options):
        changes = options.pop("changes", {})
        window = self.history.window(start, self.next_seq(start), **changes)
        self.closed.append(window)
        self.outbox.append(window.session, window.seq, topic, encode(window), **options)
        assert self.outbox.size_bytes <= self.max_bytes
        return window

    def note(self, start=1):
        told = event(start, self.next_seq(start))
        self.outbox.append(told.session, told.seq, history.EVENT_TOPIC, encode(told))
        return told

    def waiting(self):
        return self.outbox.pending(10_000)

    def windows(self):
        return read_windows(record.payload for record in self.waiting())


@pytest.fixture
def device(path):
    made = Device(path)
    yield made
    made.outbox.close()


def test_a_full_outbox_merges_old_windows_and_loses_no_count(device):
    for _ in range(120):
        device.close_window()
    windows = device.windows()
    assert total(windows) == total(device.closed)
    assert device.outbox.dropped == 0
    assert windows[-1] == device.closed[-1]  # the newest is as it was closed
    assert windows[0].windows > 5  # the oldest are coarse
    # Every number is covered once, in order.
    covered = [n for w in windows for n in range(w.seq_lo, w.seq + 1)]
    assert covered == list(range(1, 121))
    for record, window in zip(device.waiting(), windows, strict=True):
        assert (record.session, record.seq) == (window.session, window.seq)


def test_the_gap_says_what_resolution_was_lost(device):
    for _ in range(60):
        device.close_window()
    windows = device.windows()
    (gap,) = device.outbox.gaps()
    assert (gap.topic, gap.kind) == (history.TOPIC, "merged")
    assert gap.records == 60 - len(windows)
    coarse = [w for w in windows if w.windows > 1]
    assert gap.windows == sum(w.windows for w in coarse)
    assert gap.start_ns == coarse[0].start_ns
    assert gap.end_ns == coarse[-1].end_ns


def test_a_gap_that_was_told_is_settled_unless_it_grew_meanwhile(device):
    for _ in range(60):
        device.close_window()
    told = device.outbox.gaps()
    for _ in range(3):
        device.close_window()
    device.outbox.settle(told)
    (grown,) = device.outbox.gaps()
    assert (grown.number, grown.records) == (told[0].number, told[0].records + 3)
    device.outbox.settle([grown])
    assert device.outbox.gaps() == ()
    device.close_window()
    (begun,) = device.outbox.gaps()
    assert begun.number > grown.number
    assert begun.records == 1
    device.outbox.close()
    device.open()
    assert device.outbox.gaps() == (begun,)


def test_what_was_sent_is_never_merged(device):
    for _ in range(4):
        device.close_window()
    first = device.waiting()[:2]
    device.outbox.mark_sent((record.session, record.seq) for record in first)
    for _ in range(40):
        device.close_window()
    windows = device.windows()
    assert windows[:2] == device.closed[:2]
    assert windows[2].seq_lo == 3
    assert total(windows) == total(device.closed)


def test_no_record_reaches_over_one_that_was_sent_even_after_that_is_stored_and_forgotten(device):
    device.close_window()
    window = device.close_window()
    device.outbox.mark_sent([(window.session, window.seq)])
    device.outbox.trim(window.session, [window.seq])
    for _ in range(60):
        device.close_window()
    windows = device.windows()
    assert windows[0] == device.closed[0]
    assert all(not w.seq_lo <= 2 <= w.seq for w in windows)


def test_events_stand_between_windows_and_keep_their_keys(device):
    events = []
    for n in range(40):
        device.close_window()
        if n % 10 == 0:
            events.append(device.note())
    waiting = {
        record.seq: record.payload for record in device.waiting() if record.topic == history.EVENT_TOPIC
    }
    assert waiting == {e.seq: encode(e) for e in events}
    assert total(device.windows()) == total(device.closed)


def test_windows_of_sessions_that_nobody_has_seen_become_one_record_of_the_newest(device):
    for start in range(1, 61):
        device.close_window(start)
        device.close_window(start)
    windows = device.windows()
    assert len(windows) < 30
    assert total(windows) == total(device.closed)
    assert windows[-1] == device.closed[-1]
    (gap,) = device.outbox.gaps()
    assert gap.records == 120 - len(windows)


def test_windows_of_different_models_are_merged_apart(device):
    digests = [ids.digest(c * 64) for c in "abc"]
    for n in range(90):
        device.close_window(changes={"digest": digests[n // 30]})
    windows = device.windows()
    for digest in digests:
        wanted = [w for w in device.closed if w.digest == digest]
        assert total(w for w in windows if w.digest == digest) == total(wanted)


def test_topics_do_not_mix(device):
    other = history.TOPIC.replace("/pump/", "/fan/")
    model = ids.model_name("fan")
    for _ in range(40):
        device.close_window()
        device.close_window(topic=other, changes={"model": model})
    for topic, name in ((history.TOPIC, history.MODEL), (other, model)):
        found = read_windows(record.payload for record in device.waiting() if record.topic == topic)
        assert {w.model for w in found} == {name}
        assert total(found) == total(w for w in device.closed if w.model == name)


def test_chatter_does_not_thin_out_the_windows(device):
    for _ in range(5):
        device.close_window()
    for _ in range(200):
        device.note()
    assert device.windows() == device.closed
    events = [r for r in device.waiting() if r.topic == history.EVENT_TOPIC]
    assert [r.seq for r in events][-1] == 205
    assert sum(len(r.payload) + len(r.topic) + RECORD_BYTES for r in events) <= device.max_bytes
    for _ in range(30):
        device.close_window()
    events = [r for r in device.waiting() if r.topic == history.EVENT_TOPIC]
    assert events
    charged = sum(len(r.payload) + len(r.topic) + RECORD_BYTES for r in events)
    assert charged <= device.max_bytes // EVENTS_SHARE
    (dropped,) = [gap for gap in device.outbox.gaps() if gap.kind == "dropped"]
    assert (dropped.topic, dropped.windows) == (history.EVENT_TOPIC, 0)
    assert dropped.records == device.outbox.dropped == 200 - len(events)
    first, last = event(1, 6).wall_ns, event(1, events[0].seq - 1).wall_ns
    assert (dropped.start_ns, dropped.end_ns) == (first, last)


def test_when_nothing_can_be_merged_the_oldest_go_and_are_counted(device):
    a, b = (ids.digest(c * 64) for c in "ab")
    device.note()
    for n in range(60):
        device.close_window(changes={"digest": (a, b)[n % 2]})
    windows = device.windows()
    assert len(windows) < 30
    assert windows == device.closed[-len(windows) :]
    assert all(record.topic != history.EVENT_TOPIC for record in device.waiting())  # events went first
    of_windows, of_events = sorted(device.outbox.gaps(), key=lambda gap: gap.windows, reverse=True)
    gone = 60 - len(windows)
    assert (of_windows.kind, of_windows.windows, of_windows.records) == ("dropped", gone, gone)
    assert (of_windows.start_ns, of_windows.end_ns) == (
        device.closed[0].start_ns,
        device.closed[gone - 1].end_ns,
    )
    assert (of_events.kind, of_events.windows, of_events.records) == ("dropped", 0, 1)
    assert device.outbox.dropped == gone + 1


def test_a_full_outbox_reads_a_few_windows_for_each_that_comes(device, monkeypatch):
    decoded = []

    def counted(data):
        decoded.append(1)
        return decode(data)

    monkeypatch.setattr(outbox_room, "decode", counted)
    for _ in range(80):
        device.close_window()
    merged = sum(gap.records for gap in device.outbox.gaps())
    assert merged > 50
    assert len(decoded) == 2 * merged
    decoded.clear()
    for n in range(40):  # pairs that cannot be merged are tried once
        device.close_window(changes={"digest": ids.digest("cd"[n % 2] * 64)})
    assert len(decoded) < 40 * 6


def test_what_cannot_be_read_is_dropped_but_never_merged(device):
    for seq in range(100):
        device.outbox.append(TWO, seq, history.TOPIC, b"no window" * 50)
    window = device.close_window()
    assert device.waiting()[-1].payload == encode(window)
    (gap,) = device.outbox.gaps()
    assert (gap.kind, gap.start_ns, gap.end_ns) == ("dropped", 0, 0)
    assert gap.records == device.outbox.dropped > 0


@given(
    steps=st.lists(
        st.one_of(
            st.sampled_from(["window", "event", "restart", "power"]),
            st.tuples(st.just("send"), st.integers(1, 5)),
            st.tuples(st.just("trim"), st.integers(0, 5)),
        ),
        max_size=60,
    ),
    capacity=st.integers(5_000, 12_000),
)
@settings(max_examples=40)
def test_no_order_of_events_counts_a_window_twice_or_loses_one_unsaid(tmp_path_factory, steps, capacity):
    """What an aggregator stored and what still waits are together every window closed, once; less what gaps admit."""
    device = Device(tmp_path_factory.mktemp("outbox") / "outbox.db", capacity)
    start, stored = 1, []
    intervals: list[tuple[ids.SessionId, int, int]] = []
    for step in steps:
        match step:
            case "window":
                device.close_window(start)
            case "event":
                device.note(start)
            case "restart":
                start += 1
                device.outbox.close()
                device.open()
            case "power":
                device.outbox.close()
                device.open()
            case "send", count:
                records = device.outbox.pending(count)
                device.outbox.mark_sent((r.session, r.seq) for r in records)
                for window in read_windows(r.payload for r in records):
                    key = (window.session, window.seq_lo, window.seq)
                    if key not in intervals:  # as the aggregator does
                        assert not any(
                            s == window.session and lo <= window.seq and window.seq_lo <= hi
                            for s, lo, hi in intervals
                        )
                        intervals.append(key)
                        stored.append(window)
            case "trim", count:
                for record in device.outbox.pending(count):
                    if record.sent:
                        device.outbox.trim(record.session, [record.seq])
    known = {(w.session, w.seq_lo, w.seq) for w in stored}
    waiting = [w for w in device.windows() if (w.session, w.seq_lo, w.seq) not in known]
    dropped = sum(gap.windows for gap in device.outbox.gaps() if gap.kind == "dropped")
    counted = sum(w.windows for w in (*stored, *waiting))
    assert len(device.closed) - dropped <= counted <= len(device.closed)
    if not dropped:
        assert total([*stored, *waiting]) == total(device.closed)
    device.outbox.close()


# ── files of an older layout ───────────────────────────────────────────────────────────────────────────

LAYOUT_0 = """
CREATE TABLE records (
  place INTEGER PRIMARY KEY, session TEXT NOT NULL, seq INTEGER NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL,
  UNIQUE (session, seq)
);
CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT OR IGNORE INTO totals VALUES ('dropped', 7);
"""


def test_a_file_of_the_first_layout_is_migrated_in_place(path):
    made = History()
    windows = [made.window(1, seq) for seq in (1, 2, 4)]
    path.parent.mkdir()
    with sqlite3.connect(path) as old:
        old.executescript(f"PRAGMA journal_mode = WAL; {LAYOUT_0}")
        insert = "INSERT INTO records (session, seq, topic, payload) VALUES (?, ?, ?, ?)"
        old.executemany(insert, [(w.session, w.seq, history.TOPIC, encode(w)) for w in windows])
        old.execute(insert, (session(1), 3, history.EVENT_TOPIC, encode(event(1, 3))))
    old.close()
    device = Device(path)
    assert device.outbox.set_aside == device.outbox.volatile == ""
    assert device.outbox.dropped == 7
    assert [r.seq for r in device.waiting()] == [1, 2, 4, 3]
    assert all(record.sent for record in device.waiting())  # nobody wrote down what was
    device.seq[1] = 4
    for _ in range(40):
        device.close_window()
    assert device.windows()[:3] == windows
    assert total(device.windows()[3:]) == total(device.closed)
    device.outbox.close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)


@pytest.mark.parametrize("script", ["PRAGMA user_version = 2", "CREATE TABLE records (place INTEGER)"])
def test_a_file_of_a_later_or_foreign_layout_is_set_aside(path, script):
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)
    outbox = Outbox(path)
    assert "damaged" in outbox.set_aside
    assert outbox.volatile == ""
    outbox.append(ONE, 1, TOPIC, b"x")
    assert path.with_name("outbox.db.damaged").exists()
    outbox.close()
