"""When windows open and close."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.windowing import WindowPolicy, is_due, open_window

SECOND = 1_000_000_000
POLICY = WindowPolicy(period_ns=300 * SECOND, min_rows=30)
NOON = 1_700_000_100 * SECOND  # a multiple of 300 s
assert NOON % POLICY.period_ns == 0


@pytest.mark.parametrize(
    ("into_the_period_s", "synced", "due_in_s"),
    [(0, True, 300), (1, True, 299), (299, True, 1), (0, False, 300), (1, False, 300), (299, False, 300)],
)
def test_a_window_is_due_at_a_multiple_of_its_period_where_the_clock_is_trusted(
    into_the_period_s, synced, due_in_s
):
    wall_ns = NOON + into_the_period_s * SECOND
    window = open_window(POLICY, wall_ns=wall_ns, mono_ns=77, synced=synced)
    assert (window.start_wall_ns, window.due_mono_ns) == (wall_ns, 77 + due_in_s * SECOND)


def test_a_window_closes_when_it_is_due_and_has_rows_enough():
    window = open_window(POLICY, wall_ns=NOON, mono_ns=0, synced=True)
    due = 300 * SECOND
    assert not is_due(POLICY, window, rows=1000, mono_ns=due - 1)
    assert is_due(POLICY, window, rows=30, mono_ns=due)
    assert not is_due(POLICY, window, rows=29, mono_ns=due)
    assert is_due(POLICY, window, rows=30, mono_ns=5 * due)


@given(
    period_s=st.integers(1, 86_400),
    wall_ns=st.integers(0, 2**62),
    mono_ns=st.integers(0, 2**62),
    synced=st.booleans(),
)
def test_a_window_lasts_at_most_its_period_and_ends_aligned(period_s, wall_ns, mono_ns, synced):
    policy = WindowPolicy(period_ns=period_s * SECOND, min_rows=1)
    window = open_window(policy, wall_ns=wall_ns, mono_ns=mono_ns, synced=synced)
    left = window.due_mono_ns - mono_ns
    assert 0 < left <= policy.period_ns
    assert not synced or (wall_ns + left) % policy.period_ns == 0


def test_a_clock_that_jumps_does_not_move_an_open_window():
    window = open_window(POLICY, wall_ns=NOON, mono_ns=0, synced=True)
    assert is_due(POLICY, window, rows=30, mono_ns=300 * SECOND)  # whatever the wall clock says by then
