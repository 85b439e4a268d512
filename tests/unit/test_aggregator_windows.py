"""The telemetry store in a SQLite file: the kit, and what only a file can do."""

import itertools
import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.adapters.windows import MAX_LETTER_BYTES, VERSION, Windows
from aggregator.adapters.windows.append import latency_text
from aggregator.adapters.windows.intervals import EVENTS, Interval, compact
from aggregator.adapters.windows.labels import REACHED
from aggregator.records import Selection
from aggregator.stores import WindowStore
from edge_runtime.contract.codec import latency_body
from edge_runtime.contract.errors import ConfigError
from tests.support import strategies as our
from tests.support.fleet import NOW, OTHER_SESSION, SECOND, event, labels, window
from tests.support.window_kit import LETTER_BYTES, LETTERS, WindowKit, of_other, prune, put

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
