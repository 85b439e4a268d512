"""When windows open and close, and what they claim, whatever the clocks do."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.core.windowing import (
    JUMP_NS,
    OpenWindow,
    WindowPolicy,
    close_window,
    is_due,
    open_window,
    publish_delay_ns,
)

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
YEAR = 365 * 24 * HOUR
PERIOD = 300 * SECOND
POLICY = WindowPolicy(period_ns=PERIOD, min_rows=30)
NOON = 1_700_000_100 * SECOND  # a multiple of 300 s
assert NOON % PERIOD == 0
IN_2038 = 2**31 * SECOND  # 2038-01-19 03:14:08 UTC, one second beyond a signed 32-bit time_t


class Clocks:
    """A device's two clocks and its opinion of the wall clock."""

    def __init__(self, wall_ns, *, synced=True, mono_ns=77):
        self.wall_ns, self.mono_ns, self.synced = wall_ns, mono_ns, synced

    def run(self, seconds):
        self.wall_ns += round(seconds * SECOND)
        self.mono_ns += round(seconds * SECOND)

    def open(self, policy=POLICY):
        return open_window(policy, wall_ns=self.wall_ns, mono_ns=self.mono_ns, synced=self.synced)

    def due(self, window, rows=30, policy=POLICY):
        return is_due(policy, window, rows=rows, wall_ns=self.wall_ns, mono_ns=self.mono_ns)

    def close(self, window):
        return close_window(window, wall_ns=self.wall_ns, mono_ns=self.mono_ns, synced=self.synced)


@pytest.mark.parametrize(
    ("into_the_period_s", "synced", "due_in_s"),
    [(0, True, 300), (1, True, 299), (290, True, 10), (0, False, 300), (1, False, 300), (299, False, 300)],
)
def test_a_window_is_due_at_a_multiple_of_its_period_where_the_clock_is_trusted(
    into_the_period_s, synced, due_in_s
):
    clocks = Clocks(NOON + into_the_period_s * SECOND, synced=synced)
    window = clocks.open()
    assert window.start_wall_ns == clocks.wall_ns
    assert window.due_mono_ns == 77 + due_in_s * SECOND


def test_a_window_closes_when_it_is_due_and_has_rows_enough():
    clocks = Clocks(NOON)
    window = clocks.open()
    clocks.run(299.999)
    assert not clocks.due(window, rows=1000)
    clocks.run(0.001)
    assert clocks.due(window, rows=30)
    assert not clocks.due(window, rows=29)
    clocks.run(1200)
    assert clocks.due(window, rows=30)
    span = clocks.close(window)
    assert (span.start_ns, span.end_ns, span.synced) == (NOON, NOON + 1500 * SECOND, True)


def test_a_day_of_windows_tiles_the_day_with_aligned_edges():
    clocks = Clocks(NOON + 17 * SECOND)
    window, spans = clocks.open(), []
    for _ in range(24 * 3600 * 4):
        clocks.run(0.25)  # the daemon's tick
        if clocks.due(window):
            spans.append(clocks.close(window))
            window = clocks.open()
    assert len(spans) == 288
    assert all(before.end_ns == after.start_ns for before, after in pairwise(spans))
    assert all(span.synced and span.end_ns % PERIOD == 0 for span in spans)


def test_a_slewed_clock_that_reaches_the_boundary_late_leaves_no_sliver():
    clocks = Clocks(NOON)
    window = clocks.open()
    clocks.run(300)
    clocks.wall_ns -= 3_000_000  # slewed: 3 ms before the boundary when the monotonic deadline comes
    assert clocks.due(window)
    assert clocks.close(window).synced
    following = clocks.open()
    assert (following.due_mono_ns - clocks.mono_ns) == PERIOD + 3_000_000


@pytest.mark.parametrize(
    "jump_ns", [2 * SECOND + 1, 60 * SECOND, HOUR, YEAR, 30 * YEAR, -60 * SECOND, -HOUR, -YEAR, -50 * YEAR]
)
@pytest.mark.parametrize("trusted_after", [True, False])
def test_a_clock_that_jumps_ends_the_window_at_once_and_unsynced(jump_ns, trusted_after):
    clocks = Clocks(NOON)
    window = clocks.open()
    clocks.run(100)
    assert not clocks.due(window)
    clocks.wall_ns += jump_ns
    clocks.synced = trusted_after
    assert clocks.due(window)
    assert not clocks.due(window, rows=29)  # a histogram of few rows does not leave for that either
    span = clocks.close(window)
    assert not span.synced
    assert span.end_ns - span.start_ns == 100 * SECOND
    assert span.end_ns == (clocks.wall_ns if trusted_after else NOON + 100 * SECOND)
    following = clocks.open()
    clocks.run(0.25)
    assert not clocks.due(following)  # one jump ends one window
    clocks.run(PERIOD / SECOND)
    assert clocks.due(following)
    assert clocks.close(following).synced is trusted_after


def test_a_jump_that_is_taken_back_has_not_happened():
    clocks = Clocks(NOON)
    window = clocks.open()
    clocks.wall_ns += HOUR
    clocks.run(300)
    clocks.wall_ns -= HOUR
    span = clocks.close(window)
    assert (span.start_ns, span.end_ns, span.synced) == (NOON, NOON + PERIOD, True)


def test_a_device_that_starts_in_1970_and_hears_the_time_in_2026():
    clocks = Clocks(3 * SECOND, synced=False)
    window = clocks.open()
    assert window.due_mono_ns == clocks.mono_ns + PERIOD
    clocks.run(300)
    assert clocks.due(window)
    span = clocks.close(window)
    assert (span.start_ns, span.end_ns, span.synced) == (3 * SECOND, 303 * SECOND, False)
    window = clocks.open()
    clocks.run(40)
    clocks.wall_ns, clocks.synced = 1_780_000_000 * SECOND, True
    assert clocks.due(window)
    span = clocks.close(window)
    assert (span.end_ns - span.start_ns, span.end_ns, span.synced) == (40 * SECOND, clocks.wall_ns, False)
    window = clocks.open()
    clocks.run((window.due_mono_ns - clocks.mono_ns) / SECOND)
    assert clocks.due(window)
    span = clocks.close(window)
    assert span.synced
    assert span.end_ns % PERIOD == 0


def test_trust_gained_or_lost_without_a_jump_makes_no_synced_window():
    for before, after in ((False, True), (True, False), (False, False)):
        clocks = Clocks(NOON, synced=before)
        window = clocks.open()
        clocks.run(300)
        clocks.synced = after
        span = clocks.close(window)
        assert (span.start_ns, span.end_ns, span.synced) == (NOON, NOON + PERIOD, False)


def test_the_second_after_which_32_bits_are_full_is_like_any_other():
    clocks = Clocks(IN_2038 - 10 * SECOND)
    window = clocks.open()
    left = PERIOD - (IN_2038 - 10 * SECOND) % PERIOD
    assert window.due_mono_ns - clocks.mono_ns == left
    clocks.run(left / SECOND)
    assert clocks.due(window)
    span = clocks.close(window)
    assert span.synced
    assert span.start_ns < IN_2038 < span.end_ns
    assert span.end_ns % PERIOD == 0


def test_a_clock_that_wraps_in_2038_is_a_jump_to_1901_that_claims_nothing():
    clocks = Clocks(IN_2038 - SECOND)
    window = clocks.open()
    clocks.run(1)
    clocks.wall_ns -= 2**32 * SECOND
    assert clocks.wall_ns < 0
    assert clocks.due(window)
    span = clocks.close(window)
    assert (span.start_ns, span.end_ns, span.synced) == (0, 0, False)


def test_a_leap_second_smeared_or_not_is_no_jump():
    smeared = Clocks(NOON)
    window = smeared.open()
    for _ in range(300):
        smeared.run(1)
        smeared.wall_ns -= SECOND // 86_400  # 24 h of smear
        assert not smeared.due(window) or smeared.mono_ns == window.due_mono_ns
    assert smeared.close(window).synced
    stepped = Clocks(NOON)
    window = stepped.open()
    stepped.run(150)
    stepped.wall_ns -= SECOND
    assert not stepped.due(window)
    stepped.run(150)
    span = stepped.close(window)
    assert (span.end_ns - span.start_ns, span.synced) == (299 * SECOND, True)


@pytest.mark.parametrize("monotonic_stops", [True, False])
def test_a_night_of_sleep_ends_the_window_when_the_device_wakes(monotonic_stops):
    clocks = Clocks(NOON)
    window = clocks.open()
    clocks.run(100)
    clocks.wall_ns += 8 * HOUR
    if not monotonic_stops:
        clocks.mono_ns += 8 * HOUR
    assert clocks.due(window)
    span = clocks.close(window)
    # CLOCK_BOOTTIME knows how long it was; CLOCK_MONOTONIC cannot tell the sleep from a jump, and claims less.
    assert span.synced is not monotonic_stops
    assert span.end_ns - span.start_ns == 100 * SECOND + (0 if monotonic_stops else 8 * HOUR)
    assert span.end_ns == clocks.wall_ns


def test_a_shorter_period_holds_for_the_open_window_and_a_longer_one_for_the_next():
    clocks = Clocks(NOON)
    window = clocks.open(WindowPolicy(period_ns=24 * HOUR, min_rows=30))
    clocks.run(303)
    assert clocks.due(window, policy=POLICY)
    window = clocks.open(POLICY)
    clocks.run(300)
    longer = WindowPolicy(period_ns=24 * HOUR, min_rows=30)
    assert clocks.due(window, policy=longer)
    assert clocks.open(longer).due_mono_ns > clocks.mono_ns + PERIOD


@given(
    period_s=st.integers(1, 86_400),
    wall_ns=st.integers(0, 2**62),
    mono_ns=st.integers(0, 2**62),
    synced=st.booleans(),
)
def test_a_window_lasts_about_its_period_and_ends_aligned(period_s, wall_ns, mono_ns, synced):
    policy = WindowPolicy(period_ns=period_s * SECOND, min_rows=1)
    window = open_window(policy, wall_ns=wall_ns, mono_ns=mono_ns, synced=synced)
    left = window.due_mono_ns - mono_ns
    sliver = min(policy.period_ns // 10, JUMP_NS)
    assert sliver <= left < policy.period_ns + sliver
    assert not synced or (wall_ns + left) % policy.period_ns == 0


anytime = st.integers(-(2**63), 2**63 - 1)


@given(
    start=anytime,
    end=anytime,
    before=st.integers(0, 2**62),
    after=st.integers(0, 2**62),
    trust=st.tuples(st.booleans(), st.booleans()),
)
def test_no_two_clocks_make_a_window_that_ends_before_it_starts(start, end, before, after, trust):
    window = OpenWindow(
        start_wall_ns=start, start_mono_ns=before, due_mono_ns=before + PERIOD, synced=trust[0]
    )
    span = close_window(window, wall_ns=end, mono_ns=after, synced=trust[1])
    assert 0 <= span.start_ns <= span.end_ns
    lasted = max(0, after - before)
    if span.synced:
        assert trust == (True, True)
        assert abs((span.end_ns - span.start_ns) - lasted) <= JUMP_NS
    else:
        assert span.end_ns - span.start_ns <= lasted


def test_a_fleet_does_not_publish_at_once():
    policy = WindowPolicy(period_ns=PERIOD, min_rows=30, jitter_ns=60 * SECOND)
    delays = [publish_delay_ns(policy, f"device-{n}") for n in range(6000)]
    assert min(delays) >= 0
    assert max(delays) < 60 * SECOND
    per_second = [sum(d // SECOND == s for d in delays) for s in range(60)]
    assert sum(per_second) == 6000
    assert max(per_second) < 150  # 100 on average; all 6,000 at once without jitter
    assert min(per_second) > 60


def test_a_device_always_has_the_same_delay_and_none_without_jitter():
    policy = WindowPolicy(period_ns=PERIOD, min_rows=30, jitter_ns=60 * SECOND)
    assert publish_delay_ns(policy, "dev-1") == publish_delay_ns(policy, "dev-1") == 36_839_462_461
    assert publish_delay_ns(POLICY, "dev-1") == 0
    shorter = WindowPolicy(period_ns=SECOND, min_rows=30, jitter_ns=60 * SECOND)
    assert all(publish_delay_ns(shorter, f"dev-{n}") < SECOND for n in range(100))
