"""The telemetry store: each window counted once, and questions answered exactly."""

import sqlite3
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.adapters.windows import MAX_LETTER_BYTES, Windows
from aggregator.records import Arrival, DeadLetter, Selection
from edge_runtime.contract.codec import encode
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.profile import empty_profile, merge_all
from tests.support.fleet import (
    DAY,
    NOW,
    OTHER_SESSION,
    SECOND,
    SPEC,
    A,
    B,
    C,
    event,
    make_spec,
    window,
)


@pytest.fixture
def store(tmp_path):
    windows = Windows(tmp_path / "windows.sqlite", dead_letters=5)
    yield windows
    windows.close()


def arrival(w, *, judged=True):
    return Arrival(window=w, payload=encode(w), judged=judged)


def put(store, *windows, judged=True, at=NOW):
    return store.append([arrival(w, judged=judged) for w in windows], [], [], at)


def merged(store, **conditions):
    found = store.profiles(Selection(**conditions))
    assert len(found) <= 1
    return found[0] if found else empty_profile(SPEC, probabilities=True)


def test_a_duplicate_is_counted_as_one_and_changes_nothing(store):
    w = window()
    assert put(store, w).stored == 1
    again = put(store, w, w)
    assert (again.stored, again.duplicates) == (0, 2)
    assert merged(store) == w.profile
    assert store.figures().duplicates_rejected == 2
    assert store.figures().windows == 1


def test_sessions_and_devices_count_apart(store):
    put(store, window("dev-1", 1), window("dev-2", 1), window("dev-1", 1, session=OTHER_SESSION))
    assert merged(store).rows == 60


@pytest.mark.parametrize(("lo", "hi"), [(2, 4), (1, 9), (4, 9), (4, 4), (5, 5)])
def test_a_merged_record_that_overlaps_a_stored_one_is_not_counted_twice(store, lo, hi):
    put(store, window(seq=5, seq_lo=3))
    found = put(store, window(seq=hi, seq_lo=lo))
    assert (found.stored, found.duplicates, found.overlapping) == (0, 0, 1)
    assert merged(store).rows == 20
    assert "overlap the stored 3 to 5" in store.dead_letters()[0]["reason"]


@pytest.mark.parametrize(("lo", "hi"), [(1, 2), (6, 9), (6, 6)])
def test_records_that_touch_but_do_not_overlap_are_both_counted(store, lo, hi):
    put(store, window(seq=5, seq_lo=3))
    assert put(store, window(seq=hi, seq_lo=lo)).stored == 1


def test_a_merged_record_counts_as_the_windows_it_holds(store):
    put(store, window(seq=5, seq_lo=3, windows=3), window(seq=6))
    assert store.figures().windows == 4
    (totals,) = store.totals(Selection())
    assert (totals.windows, totals.rows) == (4, 40)
    assert store.block(A, DeviceId("dev-1"), 0, rows=40, seconds=20).windows == 4
    put(store, window(seq=5, seq_lo=3, windows=3))
    assert store.figures().windows == 4


def test_a_store_of_the_version_before_is_taken_forward(tmp_path):
    path = tmp_path / "windows.sqlite"
    store = Windows(path)
    put(store, window(seq=1), window(seq=2))
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE windows DROP COLUMN windows")
        db.execute("PRAGMA user_version=1")
    db.close()
    with pytest.raises(ConfigError, match="if it is older, start this aggregator once"):
        Windows(path, read_only=True)
    store = Windows(path)
    put(store, window(seq=9, seq_lo=3, windows=5))
    assert store.totals(Selection())[0].windows == 7
    store.close()
    Windows(path, read_only=True).close()


@settings(max_examples=40)
@given(st.data())
def test_any_order_and_repetition_gives_the_profile_of_each_once(tmp_path_factory, data):
    """The dedupe law."""
    windows = [window(f"dev-{d}", seq) for d in range(3) for seq in range(4)]
    extra = data.draw(st.lists(st.sampled_from(windows), max_size=12))
    sent = data.draw(st.permutations(windows + extra))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=4)))
    store = Windows(tmp_path_factory.mktemp("law") / "windows.sqlite")
    try:
        for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
            put(store, *sent[start:end])
        assert merged(store) == merge_all(SPEC, [w.profile for w in windows], probabilities=True)
        assert store.figures().windows == len(windows)
        assert store.figures().duplicates_rejected == len(extra)
    finally:
        store.close()


def test_a_batch_is_stored_whole_or_not_at_all(store, monkeypatch):
    def fail(*_):
        raise sqlite3.OperationalError("disk full")

    monkeypatch.setattr(store, "_trim_letters", fail)
    with pytest.raises(sqlite3.OperationalError, match="disk full"):
        put(store, window())
    monkeypatch.undo()
    assert store.figures().windows == 0
    assert put(store, window()).stored == 1


def test_what_was_committed_is_there_after_the_process_died(tmp_path):
    path = tmp_path / "windows.sqlite"
    store = Windows(path)
    put(store, window(seq=1))
    reader = Windows(path, read_only=True)  # a second look at the files as they are, without a clean close
    assert reader.figures().windows == 1
    reader.close()
    again = Windows(path)
    assert put(again, window(seq=1)).duplicates == 1
    again.close()
    store.close()


def test_totals_by_device_and_filter(store):
    put(store, window("dev-1", 1, labelled=10, correct=7, refused=(("width", 2),), failed=1))
    put(store, window("dev-1", 2, labelled=5, correct=5), at=NOW + SECOND)
    put(store, window("dev-2", 1, model=B), at=NOW + 2 * SECOND)
    first, second = store.totals(Selection())
    assert (first.device, first.windows, first.rows, first.labelled, first.correct) == (
        "dev-1",
        2,
        40,
        15,
        12,
    )
    assert (first.refused, first.failed, first.rss_bytes, first.peak_rss_bytes) == (2, 1, 1002, 2002)
    assert (first.first_ns, first.last_ns) == (NOW, NOW + SECOND)
    assert (second.device, second.digest) == ("dev-2", B)
    assert [t.device for t in store.totals(Selection(digest=A))] == ["dev-1"]
    assert [t.windows for t in store.totals(Selection(since_ns=NOW + SECOND))] == [1, 1]
    assert [t.windows for t in store.totals(Selection(until_ns=NOW + SECOND))] == [1]
    assert [t.device for t in store.totals(Selection(devices=(DeviceId("dev-2"),)))] == ["dev-2"]
    assert store.totals(Selection(devices=())) == ()
    assert [t.device for t in store.totals(Selection(last=1))] == ["dev-2"]


def test_profiles_latency_and_sizes_by_filter(store):
    windows = [window(seq=seq, latency_ns=1000 * seq) for seq in range(1, 6)]
    put(store, *windows)
    assert merged(store, last=2) == windows[3].profile.merge(windows[4].profile)
    latency = LatencyHistogram()
    for w in windows:
        latency = latency.merge(w.latency)
    assert store.latency(Selection()) == latency
    sizes = sorted(len(encode(w)) for w in windows)
    assert store.wire_bytes(Selection()) == sizes[2]
    assert store.wire_bytes(Selection(), 0.0) == sizes[0]
    assert store.wire_bytes(Selection(), 1.0) == sizes[-1]
    assert store.wire_bytes(Selection(digest=C)) == 0
    assert list(store.windows(Selection())) == windows


def test_profiles_of_different_layouts_are_not_merged(store):
    other = make_spec(seed=7)
    odd = replace(window(seq=2).profile, layout=other.layout)
    put(store, window(seq=1), window(seq=2, profile=odd))
    assert {p.layout for p in store.profiles(Selection())} == {SPEC.layout, other.layout}


def test_a_block_takes_the_newest_windows_until_it_covers_the_horizon(store):
    windows = [window(seq=seq, labelled=seq, correct=1) for seq in range(1, 6)]
    put(store, *windows, window("dev-2", 1))
    block = store.block(A, DeviceId("dev-1"), 0, rows=45, seconds=0)
    assert (block.windows, block.rows, block.labelled, block.correct) == (3, 60, 12, 3)
    assert (block.first, block.last, block.seconds) == (3, 5, 30.0)
    assert block.profile == windows[2].profile.merge(windows[3].profile).merge(windows[4].profile)
    assert store.block(A, DeviceId("dev-1"), 0, rows=1, seconds=45.0).windows == 5
    assert store.block(A, DeviceId("dev-1"), 4, rows=20, seconds=0).windows == 1
    assert store.block(A, DeviceId("dev-1"), 4, rows=21, seconds=0) is None
    assert store.pending(A, DeviceId("dev-1"), 3) == (40, 20.0, NOW)
    assert store.pending(A, DeviceId("dev-1"), 5) == (0, 0.0, 0)


def test_streams_names_the_newest_window_of_each_device(store):
    put(store, window("dev-1", 1), window("dev-2", 1), window("dev-1", 2))
    assert store.streams() == ((A, DeviceId("dev-1"), 3), (A, DeviceId("dev-2"), 2))


def test_an_unjudged_window_is_judged_when_its_artifact_is_known(store):
    honest, odd = window(seq=1), window(seq=2, profile=replace(window(seq=2).profile, rows=21))
    put(store, honest, odd, judged=False)
    assert store.unjudged() == (A,)
    assert store.block(A, DeviceId("dev-1"), 0, rows=1, seconds=0) is None
    assert merged(store, last=2).rows == 41  # telemetry is data, also before it is judged

    assert store.settle(A, lambda profile: profile.check(SPEC)) == (1, 1)
    assert store.settle(A, lambda profile: profile.check(SPEC)) == (0, 0)
    assert store.unjudged() == ()
    assert merged(store) == honest.profile
    assert store.figures().rejected == 1
    assert store.block(A, DeviceId("dev-1"), 0, rows=1, seconds=0).rows == 20
    assert put(store, odd).duplicates == 1  # a rejected window stays known


def test_events_are_kept_once(store):
    store.append([], [event(seq=1), event(seq=1), event(seq=2, name="trial")], [], NOW)
    assert [e["name"] for e in store.events()] == ["trial", "started"]
    assert store.figures().duplicates_rejected == 1


def test_dead_letters_are_bounded_and_repeats_are_counted(store):
    letters = [DeadLetter(f"topic-{i}", b"x" * (MAX_LETTER_BYTES + 1), "why") for i in range(8)]
    store.append([], [], [*letters, letters[-1], letters[-1]], NOW)
    kept = store.dead_letters()
    assert [k["topic"] for k in kept] == ["topic-7", "topic-6", "topic-5", "topic-4", "topic-3"]
    assert kept[0]["times"] == 3
    assert len(kept[0]["payload"]) == MAX_LETTER_BYTES
    assert kept[0]["length"] == MAX_LETTER_BYTES + 1
    assert store.figures().dead_letters == 5
    assert store.figures().dead_letters_ever == 10


def test_pruning_drops_old_windows_and_keeps_the_counters(store):
    put(store, window(seq=1), at=NOW - 2 * DAY)
    put(store, window(seq=2), at=NOW)
    store.append([], [event(seq=3)], [], NOW - 2 * DAY)
    assert store.prune(NOW - DAY) == 1
    assert [w.seq for w in store.windows(Selection())] == [2]
    assert store.figures().windows == 2
    assert store.events() == ()


def test_a_reader_cannot_write_and_needs_a_store(tmp_path):
    path = tmp_path / "windows.sqlite"
    with pytest.raises(ConfigError, match="no such store yet"):
        Windows(path, read_only=True)
    Windows(path).close()
    reader = Windows(path, read_only=True)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        put(reader, window())
    reader.close()


def test_a_foreign_or_newer_file_is_refused(tmp_path):
    path = tmp_path / "windows.sqlite"
    path.write_bytes(b"not a database at all, but long enough to look at" * 20)
    with pytest.raises(ConfigError, match="cannot be opened as a store"):
        Windows(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=9")
    db.close()
    with pytest.raises(ConfigError, match="schema version 9 is not 2"):
        Windows(path)


def test_the_largest_honest_counts_add_up(store):
    huge = 1 << 32
    for seq in range(4):
        put(store, window(seq=seq, labelled=huge, correct=huge))
    assert store.totals(Selection())[0].labelled == 4 * huge
    assert np.iinfo(np.int64).max > 4 * huge
