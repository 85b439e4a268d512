"""Merging neighbours: totals are exact in any order, and nothing is merged that one record cannot stand for."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.core.ingest import MAX_WINDOW_COUNT
from edge_runtime.contract import ids
from edge_runtime.contract.codec import decode, encode
from edge_runtime.core.rollup import MAX_COUNT, choose, merge
from tests.support.history import PERIOD_NS, History, session, total

HISTORY = History()
SECOND = 10**9


def merged(older, newer):
    found = merge(older, newer)
    assert found is not None
    return found


def a_week(starts=3, each=6):
    """Windows of several sessions, with numbers between them that belong to events."""
    history = History()
    return [history.window(s, 1 + 3 * n) for s in range(1, starts + 1) for n in range(each)]


def folded(windows, order):
    """All merged to one record, the pair of neighbours to merge next chosen by ``order``."""
    left = list(windows)
    for pick in order:
        if len(left) > 1:
            i = pick % (len(left) - 1)
            left[i : i + 2] = [merged(left[i], left[i + 1])]
    while len(left) > 1:
        left[:2] = [merged(*left[:2])]
    return left[0]


@given(order=st.lists(st.integers(0, 100), max_size=20))
@settings(max_examples=25)
def test_any_order_of_merging_gives_one_record_with_the_sum_of_all(order):
    windows = a_week()
    record = folded(windows, order)
    assert record == folded(windows, [])
    assert total([record]) == total(windows)
    assert (record.start_ns, record.end_ns, record.synced) == (windows[0].start_ns, windows[-1].end_ns, True)
    assert (record.session, record.seq, record.seq_lo) == (session(3), 16, 1)
    assert decode(encode(record)) == record


@given(order=st.lists(st.integers(0, 100), max_size=20), unsynced=st.sets(st.integers(0, 17), min_size=1))
def test_windows_without_a_clock_keep_their_totals_and_never_end_before_they_start(order, unsynced):
    windows = [
        replace(w, synced=False, start_ns=0, end_ns=PERIOD_NS) if i in unsynced else w
        for i, w in enumerate(a_week())
    ]
    record = folded(windows, order)
    assert total([record]) == total(windows)
    assert not record.synced
    assert 0 <= record.start_ns <= record.end_ns == windows[-1].end_ns


def test_a_record_that_crosses_a_jump_of_the_clock_claims_no_more_than_both_windows_lasted():
    in_1970 = HISTORY.window(1, 1, synced=False, start_ns=5 * SECOND, end_ns=305 * SECOND)
    in_2026 = HISTORY.window(1, 2)
    record = merged(in_1970, in_2026)
    assert record.end_ns == in_2026.end_ns
    assert record.end_ns - record.start_ns == 600 * SECOND
    assert not record.synced


def test_within_a_session_the_record_covers_the_numbers_of_both_and_those_of_events_between():
    record = merged(HISTORY.window(1, 7, seq_lo=5), HISTORY.window(1, 12, seq_lo=10))
    assert (record.session, record.seq_lo, record.seq, record.windows) == (session(1), 5, 12, 2)


def test_across_sessions_the_record_bears_the_newer_ones_numbers_only():
    record = merged(HISTORY.window(1, 70, seq_lo=5, windows=9), HISTORY.window(2, 12, seq_lo=10, windows=3))
    assert (record.session, record.seq_lo, record.seq, record.windows) == (session(2), 10, 12, 12)


def test_the_health_is_the_newer_ones_and_the_peak_the_larger():
    older, newer = HISTORY.window(1, 1), HISTORY.window(1, 2)
    older = replace(older, health=replace(older.health, peak_rss_bytes=900, rss_bytes=5))
    newer = replace(newer, health=replace(newer.health, peak_rss_bytes=800, rss_bytes=6, major_faults=3))
    assert merged(older, newer).health == replace(newer.health, peak_rss_bytes=900)
    newer = replace(newer, health=replace(newer.health, peak_rss_bytes=1000))
    assert merged(older, newer).health == newer.health


OTHER = History(features=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": ids.device_id("other")},
        {"model": ids.model_name("other")},
        {"digest": ids.digest("cd" * 32)},
        {"seq": 1, "seq_lo": 1},
        {"seq": 9, "seq_lo": 1},
        {"profile": OTHER.window(1, 1).profile},
        {"profile": replace(HISTORY.window(1, 1).profile, sums=np.zeros(0, np.int64))},
    ],
    ids=["device", "model", "digest", "itself", "overlapping", "layout", "probabilities"],
)
def test_what_one_record_cannot_stand_for_is_not_merged(changes):
    older = HISTORY.window(1, 1)
    assert merge(older, HISTORY.window(1, 2)) is not None
    assert merge(older, replace(HISTORY.window(1, 2), **changes)) is None


def test_what_came_later_is_not_merged_into_what_came_before():
    older, newer = HISTORY.window(1, 1), HISTORY.window(1, 2)
    assert merge(newer, older) is None


@pytest.mark.parametrize("name", ["failed", "labelled", "rows", "refused"])
def test_a_record_never_counts_more_than_an_aggregator_believes(name):
    assert MAX_COUNT == MAX_WINDOW_COUNT

    def counting(seq, n):
        window = HISTORY.window(1, seq)
        if name == "rows":
            return replace(window, profile=replace(window.profile, rows=n))
        changes: dict[str, Any] = {name: (("width", n),) if name == "refused" else n}
        return replace(window, **changes)

    half = MAX_COUNT // 2
    assert merge(counting(1, half), counting(2, half)) is not None
    assert merge(counting(1, half), counting(2, half + 1)) is None


# ── which pair ─────────────────────────────────────────────────────────────────────────────────────────


def thinned(count, room):
    """The widths of at most ``room`` records after ``count`` windows came one by one."""
    spans = []
    for _ in range(count):
        spans.append(1)
        while len(spans) > room:
            i = choose(spans)
            assert i is not None
            spans[i : i + 2] = [spans[i] + spans[i + 1]]
    return spans


@pytest.mark.parametrize(("count", "room"), [(8640, 54), (8640, 12), (1000, 3), (100, 1), (30_000, 40)])
def test_resolution_thins_with_age(count, room):
    spans = thinned(count, room)
    assert sum(spans) == count
    assert len(spans) == room
    age = np.cumsum(spans[::-1])[::-1]
    assert all(older >= newer / 2 for older, newer in pairwise(spans)), (
        spans
    )  # coarser with age, up to rounding
    if room > 10:
        assert max(np.asarray(spans) / age) < 8 * np.log(count) / room  # a record is narrow for its age
        assert spans[-1] == 1  # the newest stay fine


def test_the_pair_that_is_narrowest_for_its_age_is_next_and_of_equals_the_older():
    assert choose([1, 1, 1, 1, 1]) == 0
    assert choose([4, 1, 1, 1, 1]) == 1
    assert choose([2, 2]) == 0
    assert choose([1, 1, 1], apart=[0]) == 1
    assert choose([1, 1, 1], apart=[0, 1]) is None
    assert choose([1, 1, 1], apart=[7, -1]) == 0
    assert choose([5]) is None
    assert choose([]) is None


@given(spans=st.lists(st.integers(1, 10**6), max_size=60), apart=st.sets(st.integers(0, 70)))
def test_there_is_a_pair_as_long_as_two_neighbours_may_be_merged(spans, apart):
    found = choose(spans, apart)
    allowed = [i for i in range(len(spans) - 1) if i not in apart]
    assert (found in allowed) if allowed else (found is None)
