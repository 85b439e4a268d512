"""The telemetry store in a SQLite file: the kit, and what only a file can do."""

import itertools
import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.adapters.windows import MAX_LETTER_BYTES, VERSION, Windows, retention
from aggregator.adapters.windows.append import latency_text
from aggregator.adapters.windows.intervals import EVENTS, Interval, compact
from aggregator.adapters.windows.labels import MOST_PERIODS, REACHED
from aggregator.records import Selection
from aggregator.stores import Unstorable, WindowStore
from edge_runtime.contract.codec import latency_body
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.latency import LatencyHistogram
from tests.support import strategies as our
from tests.support.fleet import NOW, OTHER_SESSION, SECOND, A, B, event, labels, window
from tests.support.window_kit import LETTER_BYTES, LETTERS, WindowKit, counted, of_other, once, prune, put

pytestmark = pytest.mark.sampled(2)

HOUR = 3600 * SECOND


class TestFile(WindowKit):
    @pytest.fixture
    def places(self, tmp_path_factory):
        def place():
            return partial(Windows, tmp_path_factory.mktemp("place") / "windows.sqlite", dead_letters=LETTERS)

        return place


def as_protocol(windows: Windows) -> WindowStore:
    return windows  # mypy compares them


def test_the_kits_constants():
    assert MAX_LETTER_BYTES == LETTER_BYTES


def test_a_foreign_or_newer_file_is_refused(tmp_path):
    path = tmp_path / "windows.sqlite"
    path.write_bytes(b"not a database at all, but long enough to look at" * 20)
    with pytest.raises(ConfigError, match="cannot be opened as a store"):
        Windows(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=9")
    db.close()
    with pytest.raises(
        ConfigError, match=f"schema version 9 is not {VERSION}: it was written by a newer skiff"
    ):
        Windows(path)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["dev-1", "dev-2"]),
            st.integers(0, 12),
            st.integers(0, 3),
            st.booleans(),
            st.booleans(),
        ),
        max_size=14,
    ),
    st.integers(0, 14),
)
def test_a_batch_counts_as_its_windows_one_by_one_do(tmp_path_factory, sent, pruned):
    windows = []
    for device, seq, back, is_other, is_first in sent:
        w = replace(window(device, seq), seq_lo=max(0, seq - back))
        w = of_other(w) if is_other else w
        windows.append(w if is_first else replace(w, session=OTHER_SESSION))
    found = []
    for size in (1, len(windows) or 1):
        path = tmp_path_factory.mktemp("store") / "windows.sqlite"
        with closing(Windows(path)) as store:
            put(store, *windows[:pruned])
            prune(store, NOW + SECOND)
            rest = windows[pruned:]
            for start in range(0, len(rest), size):
                put(store, *rest[start : start + size], at=NOW + SECOND)
            figures = replace(store.figures(), dead_letters=0)
            found.append(
                (figures, list(store.windows(Selection())), store.streams(), store.totals(Selection()))
            )
    assert found[0] == found[1]


@given(our.latencies)
def test_a_stored_histogram_is_the_codecs_as_json(h):
    assert latency_text(h) == json.dumps(latency_body(h), separators=(",", ":"))


def intervals(path):
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT model, lo, hi FROM intervals ORDER BY model, lo").fetchall()


def test_a_session_that_lost_nothing_is_one_interval_for_each_model(tmp_path):
    path = tmp_path / "windows.sqlite"
    with closing(Windows(path)) as store:
        for seq in range(1, 31):
            if seq % 10 == 0:
                store.append([], [event(seq=seq)], [], NOW + seq * SECOND)
            else:
                put(store, of_other(window(seq=seq)) if seq % 2 else window(seq=seq), at=NOW + seq * SECOND)
        for seq in (3, 17, 25, 31):
            prune(store, NOW + seq * SECOND)
    assert intervals(path) == [("", 10, 30), ("other", 1, 29), ("tiny", 2, 28)]


def test_a_lost_number_stays_a_gap_until_it_comes(tmp_path):
    path = tmp_path / "windows.sqlite"
    with closing(Windows(path)) as store:
        put(store, *(window(seq=seq) for seq in (1, 2, 4, 5)))
        prune(store, NOW + 1)
        assert intervals(path) == [("tiny", 1, 2), ("tiny", 4, 5)]
        assert put(store, window(seq=3)).stored == 1
        prune(store, NOW + 1)
    assert intervals(path) == [("tiny", 1, 5)]


# ── what labels cost ───────────────────────────────────────────────────────────────────────────────────


def told(store, count, *, first=0, end_ns=NOW):
    """Puts an hour's labels of ``dev-1`` each, the last of which ends at ``end_ns``; numbered by their first second."""
    hours = [end_ns - k * HOUR for k in range(first + count, first, -1)]
    given = [labels(seq=start // SECOND, start_ns=start, seconds=3600) for start in hours]
    return store.append([], [], [], NOW, labels=given)


def work(store, perform):
    """How many thousands of SQLite's own steps ``perform`` takes."""
    steps: list[None] = []
    store._db._db.set_progress_handler(lambda: steps.append(None), 1000)
    perform()
    store._db._db.set_progress_handler(None, 0)
    return len(steps)


def test_a_window_does_not_look_through_all_labels_of_its_device(tmp_path):
    found = []
    for many in (100, 3000):
        with closing(Windows(tmp_path / f"{many}.sqlite")) as store:
            told(store, many)
            store.append([], [], [], NOW, labels=[labels("dev-2", start_ns=NOW, seconds=86_400)])
            found.append(work(store, lambda: put(store, *(window(seq=seq) for seq in range(1, 101)))))
    assert found[1] <= found[0] + 5  # 3000 labels times 100 windows took 5000 more


def test_rolling_up_labels_does_not_write_all_numbers_of_their_source_again(tmp_path):
    with closing(Windows(tmp_path / "windows.sqlite")) as store:
        told(store, 250)
        took = [work(store, lambda: prune(store, NOW + 1))]
        for k in range(1, 12):
            told(store, 250, first=250 * k)
            took.append(work(store, lambda: prune(store, NOW + 1)))
        assert took[-1] <= 1.5 * took[0] + 5
        assert told(store, 3000).labels == 0  # each of them is known still
    assert len(intervals(tmp_path / "windows.sqlite")) == 3000


def test_labels_find_their_windows_without_reading_those_of_other_times(tmp_path):
    with closing(Windows(tmp_path / "windows.sqlite")) as store:
        plan = store._db.rows(f"EXPLAIN QUERY PLAN {REACHED}", ("d" * 64, "dev-1", 1, 2, 1))
    assert any("COVERING INDEX windows_by_stream" in row[3] for row in plan)


def test_a_source_of_many_labels_asks_for_its_twins_and_periods_without_reading_them_all(tmp_path):
    found = []
    for many in (100, 3000):
        with closing(Windows(tmp_path / f"{many}.sqlite")) as store:
            told(store, many)
            again = [labels(seq=k, source="copy", start_ns=NOW + k * SECOND) for k in range(100)]
            store.append([], [], [], NOW, labels=again)
            found.append(
                (
                    work(store, partial(store.twins, again)),
                    work(store, partial(store.periods, again[0].source)),
                    work(store, partial(store.late, A, {again[0].device: 1 << 40})),
                )
            )
    assert all(b <= a + 2 for a, b in zip(*found, strict=True)), found


def test_the_lengths_of_periods_that_are_kept_of_a_source_are_bounded(tmp_path):
    with closing(Windows(tmp_path / "windows.sqlite")) as store:
        for k in range(1, 3 * MOST_PERIODS):
            store.append([], [], [], NOW, labels=[labels(seq=k, seconds=k), labels("dev-2", k, seconds=k)])
        assert store.periods(labels().source) == tuple(k * SECOND for k in range(1, MOST_PERIODS + 1))
        store.append([], [], [], NOW, labels=[labels(source="shop", seconds=77)])
        assert store.periods(labels(source="shop").source) == (77 * SECOND,)


# ── what waits and what goes ───────────────────────────────────────────────────────────────────────────


def many_judged(store, count):
    """Judged windows of ``A`` as the index has them; nobody reads what they hold."""
    db = store._db
    put(store, window("first"))
    names = (
        "session, seq_lo, model, digest, layout, state, start_ns, end_ns, synced, received_ns, rows, failed,"
        " refused, labelled, correct, rss_bytes, peak_rss_bytes, wire_bytes, latency"
    )
    db.execute(
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<?)"
        f" INSERT INTO windows (device, seq, {names}) SELECT 'many', 9+i, {names} FROM n, windows WHERE device='first'",
        (count,),
    )


def test_judging_late_does_not_go_through_the_windows_that_are_judged(tmp_path):
    found = []
    for many in (10, 5000):
        with closing(Windows(tmp_path / f"{many}.sqlite")) as store:
            many_judged(store, many)
            put(store, *(window(seq=seq) for seq in range(20)), judged=False)
            found.append(
                (
                    work(store, store.unjudged),
                    work(store, lambda: store.settle(B, lambda profile: None)),
                    work(store, store.figures),
                    work(store, lambda: store.settle(A, lambda profile: None)),
                )
            )
            assert store.settle(A, lambda profile: None) == (0, 0)
    assert all(b <= a + 2 for a, b in zip(*found, strict=True)), found


def test_pruning_and_figures_do_not_go_through_the_events_that_stay(tmp_path):
    found = []
    for many in (10, 5000):
        with closing(Windows(tmp_path / f"{many}.sqlite")) as store:
            later = [event("dev-2", seq) for seq in range(many)]
            store.append([], later, [], NOW + SECOND)
            store.append([], [event(seq=seq) for seq in range(5)], [], NOW)
            assert store.figures().events == many + 5
            found.append((work(store, lambda: store.prune(NOW + 1)), work(store, store.figures)))
            assert store.figures().events == many
    assert all(b <= a + 2 for a, b in zip(*found, strict=True)), found


def test_roll_ups_that_nothing_merges_with_are_not_all_read_for_each_window(tmp_path, monkeypatch):
    counting = Mock(side_effect=retention.read_latencies)
    monkeypatch.setattr(retention, "read_latencies", counting)
    profile = window().profile
    shapes = [replace(profile, counts=np.ones(k, np.int64)) for k in range(1, 61)]
    windows = [window(seq=seq, profile=shape) for seq, shape in enumerate(shapes)]
    with closing(Windows(tmp_path / "windows.sqlite")) as store:
        for at, w in enumerate(windows, NOW):
            put(store, w, at=at)
            prune(store, at + 1)
        assert counting.call_count <= retention.TRIED_ROLLUPS * len(windows)
        assert sum(t.rows for t in store.totals(Selection())) == 60 * 20
        assert len(store.profiles(Selection())) == 60


# ── numbers at the end of 63 bits ──────────────────────────────────────────────────────────────────────

TOP = 2**63 - 1


def test_what_sqlite_cannot_hold_is_said_to_be_unstorable_and_leaves_nothing(tmp_path):
    with closing(Windows(tmp_path / "windows.sqlite")) as store:
        with pytest.raises(Unstorable, match="too large"):
            store.append([], [event(seq=1), event(seq=TOP + 1)], [], NOW)
        assert store.figures().events == 0
        assert store.append([], [event(seq=1)], [], NOW).duplicates == 0


def test_labels_and_windows_at_the_end_of_time_are_kept_and_rolled_up(tmp_path):
    last = replace(labels(seq=TOP), start_ns=TOP, end_ns=TOP)
    late = replace(window(), start_ns=TOP, end_ns=TOP)
    with closing(Windows(tmp_path / "windows.sqlite")) as store:
        store.append([], [], [], NOW, labels=[labels(), replace(last, seq=TOP - 1)])
        put(store, late)
        store.append([], [], [], NOW, labels=[last])
        assert prune(store, NOW + 1) == 4
        assert store.append([], [], [], NOW, labels=[last]).duplicates == 1
        assert store.truths()[0].labelled == 30


def test_an_estimate_beyond_63_bits_is_counted_as_their_end(tmp_path):
    plain = window().profile
    vast = replace(plain, rows=1 << 32, sums=np.full(4, 1 << 62))
    with closing(Windows(tmp_path / "windows.sqlite")) as store:
        put(store, *(window(seq=seq, profile=vast) for seq in range(4)))
        store.append([], [], [], NOW, labels=[labels()])
        assert store._db.rows("SELECT rows, top FROM labels") == [(4 << 32, TOP)]
        put(store, window(seq=9, profile=vast))
        assert prune(store, NOW + 1)


def slow(seq, sum_ns):
    return replace(window(seq=seq), latency=LatencyHistogram(zero=1, sum_ns=sum_ns, max_ns=sum_ns))


def test_latencies_that_do_not_fit_one_roll_up_make_another(tmp_path):
    path = tmp_path / "windows.sqlite"
    windows = [slow(seq, TOP // 2) for seq in range(6)]
    with closing(Windows(path)) as store:
        for at, some in enumerate((windows[:1], windows[1:3], windows[3:]), NOW):
            put(store, *some, at=at)
            prune(store, at + 1)
        assert counted(store) == once(windows)
        assert len(store._db.rows("SELECT 1 FROM rollups")) == 3


def test_a_store_with_a_roll_up_beyond_63_bits_goes_on(tmp_path):
    windows = [window(seq=seq) for seq in range(3)]
    huge = LatencyHistogram(zero=1, sum_ns=2 * TOP, max_ns=TOP)
    with closing(Windows(tmp_path / "windows.sqlite")) as store:
        put(store, *windows[:2])
        prune(store, NOW + 1)
        store._db.execute("UPDATE rollups SET latency=?", (latency_text(huge),))
        put(store, windows[2])
        assert prune(store, NOW + 1) == 1
        assert store.latency(Selection()) == huge.merge(windows[2].latency)
        assert counted(store)[:2] == once(windows)[:2]


MODELS = ("a", "b", EVENTS)
RUNS = st.lists(st.tuples(st.sampled_from(MODELS), st.integers(1, 3), st.booleans()), max_size=14)


@given(RUNS, st.data())
def test_compacting_forgets_no_number_and_claims_none_that_may_come(runs, data):
    """Of messages numbered in a row, some gone: each gone one is covered, no other one is, in any order of pruning."""
    messages, number = [], 0
    for model, length, lost in runs:
        span = length if model != EVENTS else 1
        messages.append((Interval(model, number, number + span - 1, whole=span == 1), lost))
        number += span
    gone = data.draw(st.permutations([m for m, lost in messages if not lost]))
    cut = data.draw(st.integers(0, len(gone)))
    kept = compact([*compact(gone[:cut]), *gone[cut:]])

    def covered(m):
        return any(i.model == m.model and i.lo <= m.lo and m.hi <= i.hi for i in kept)

    assert all(covered(m) == (not lost) for m, lost in messages)
    assert kept == compact(kept) == compact(gone)
    for model, group in itertools.groupby(kept, key=lambda i: i.model):
        spans = [(i.lo, i.hi) for i in group]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(spans)), (model, spans)
