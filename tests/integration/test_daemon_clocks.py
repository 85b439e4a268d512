"""A real daemon whose clocks misbehave: windows claim sane spans, and every row is in one of them."""

import calendar
from itertools import pairwise

import pytest

from edge_runtime.contract.messages import Window
from tests.services import free_port
from tests.support.chaos import Centre, provision
from tests.support.played import Played

S = 10**9
PERIOD_SECONDS = 300.0
PERIOD_NS = round(PERIOD_SECONDS) * S
TURN_NS = 20 * S
BOOT_NS = 37 * S
"""A board without a battery: 37 seconds after the beginning of 1970."""


def utc(year, month, day, hour=0, minute=0, second=0):
    return calendar.timegm((year, month, day, hour, minute, second)) * S


@pytest.fixture
def device(tmp_path, monkeypatch):
    """Makes a daemon without a broker, on a clock that shows ``wall_ns``."""

    def make(wall_ns, clock="true"):
        home = provision(
            tmp_path / "d",
            "127.0.0.1",
            free_port(),
            source="none",
            window_seconds=PERIOD_SECONDS,
            clock=clock,
        )
        return home, Played(home, monkeypatch, wall_ns=wall_ns)

    return make


def kept(home, played):
    """The windows on disk, in order. Together they hold every row, each has a sane span, trusted ones end in step."""
    found = sorted(home.outbox().items(), key=lambda item: item[0][2])
    windows = [message for _, message in found if isinstance(message, Window)]
    assert sum(w.profile.rows for w in windows) == played.rows > 0
    for window in windows:
        assert 0 <= window.start_ns < window.end_ns
        assert window.end_ns - window.start_ns <= PERIOD_NS + 2 * TURN_NS
    for window in windows[:-1]:
        assert not window.synced or window.end_ns % PERIOD_NS <= TURN_NS, "trusted, and not aligned to UTC"
    return windows


def test_booted_in_1970_windows_are_untrusted_until_the_clock_is_set_to_2026(device):
    home, played = device(BOOT_NS, clock='"auto"')
    set_to_ns = utc(2026, 3, 1, 12, 2)
    played.clocks.synced = False
    before = 0

    def script():
        nonlocal before
        yield from played.pass_time(1000.0)
        played.clocks.wall_ns, played.clocks.synced = set_to_ns, True
        before = played.rows
        yield from played.pass_time(1800.0)

    played.play(script())
    windows = kept(home, played)
    early = [w for w in windows if w.end_ns < utc(1971, 1, 1)]
    late = windows[len(early) :]
    assert all(w.start_ns > utc(2026, 3, 1, 11) for w in late), "no window spans from 1970 to 2026"
    assert not any(w.synced for w in early)
    assert sum(w.profile.rows for w in early) == before + 1, "the jump ends the window at once"
    trusted = [w for w in late if w.synced]
    assert len(trusted) >= 4
    assert late[-len(trusted) :] == trusted
    assert trusted[0].start_ns >= set_to_ns
    assert 1 <= len(late) - len(trusted) <= 2, "until somebody has looked whether the clock is right"


@pytest.mark.parametrize("by_seconds", [-365 * 86_400, -3600, 3600, 86_400])
def test_a_trusted_clock_that_jumps_ends_the_window_and_taints_only_that_one(device, by_seconds):
    home, played = device(utc(2026, 3, 1, 12))
    jumped_ns = 0

    def script():
        nonlocal jumped_ns
        yield from played.pass_time(1000.0)
        played.clocks.wall_ns += by_seconds * S
        jumped_ns = played.clocks.wall_ns
        yield from played.pass_time(1000.0)

    played.play(script())
    windows = kept(home, played)
    (tainted,) = [w for w in windows if not w.synced]
    i = windows.index(tainted)
    assert i == 3
    assert jumped_ns <= tainted.end_ns <= jumped_ns + 2 * TURN_NS
    assert tainted.end_ns - tainted.start_ns <= 120 * S, "as long as it really was"
    assert all(w.end_ns <= utc(2026, 3, 1, 12, 15) for w in windows[:i])
    assert all(w.start_ns >= jumped_ns for w in windows[i + 1 :])
    assert len(windows) >= 7


def test_2038_is_a_second_like_any_other(device):
    end_ns = 2**31 * S
    home, played = device(end_ns - 947 * S)

    def script():
        yield from played.pass_time(2000.0)

    played.play(script())
    windows = kept(home, played)
    assert all(w.synced for w in windows)
    assert all(one.end_ns == two.start_ns for one, two in pairwise(windows))
    assert windows[0].start_ns < end_ns < windows[-1].start_ns
    (across,) = [w for w in windows if w.start_ns <= end_ns < w.end_ns]
    assert across.end_ns - across.start_ns <= PERIOD_NS + 2 * TURN_NS


@pytest.mark.parametrize("unknown", [False, None])
def test_the_clock_is_trusted_as_long_as_the_kernel_says_so(mosquitto, tmp_path, monkeypatch, unknown):
    """Where the kernel does not say (None), nobody trusts it."""
    home = provision(
        tmp_path / "d",
        mosquitto.host,
        mosquitto.port,
        source="none",
        window_seconds=PERIOD_SECONDS,
        clock='"auto"',
    )
    start_ns = utc(2026, 3, 1, 12)
    played = Played(home, monkeypatch, wall_ns=start_ns)
    centre = Centre(mosquitto.host, mosquitto.port)

    def told(clock):
        return [s for s in centre.statuses if s.clock == clock]

    def script():
        while not told("synced"):
            yield True
        yield from played.pass_time(900.0)
        played.clocks.synced = unknown
        yield from played.pass_time(900.0)
        while not told("unsynced"):
            yield True
        played.clocks.synced = True
        yield from played.pass_time(900.0)
        while len([s for s in centre.statuses if s.clock == "synced"]) < 2:
            yield True
        while played.daemon._keeper.report.records:
            yield True

    try:
        played.play(script())
    finally:
        centre.close()
    found = {**home.outbox(), **centre.windows}
    windows = [m for _, m in sorted(found.items(), key=lambda item: item[0][2]) if isinstance(m, Window)]
    assert sum(w.profile.rows for w in windows) == played.rows
    trust = "".join("s" if w.synced else "u" for w in windows)
    assert trust.strip("s").strip("u") == "", trust
    assert trust.startswith("ss")
    assert 3 <= trust.count("u") <= 5, trust
    assert trust.endswith("ss")
    assert [s.clock for s in centre.statuses if s.online] == ["synced", "unsynced", "synced"]
    assert all(one.end_ns <= two.start_ns + PERIOD_NS for one, two in pairwise(windows))


def test_a_machine_that_sleeps_for_a_night_has_no_jump(device):
    """`CLOCK_BOOTTIME` goes on meanwhile: the window lasted all night, and says so."""
    home, played = device(utc(2026, 3, 1, 22))

    def script():
        yield from played.pass_time(400.0)
        played.clocks.go_on(8 * 3600.0)
        yield False
        yield from played.pass_time(400.0)

    played.play(script())
    found = sorted(home.outbox().items(), key=lambda item: item[0][2])
    windows = [message for _, message in found if isinstance(message, Window)]
    assert sum(w.profile.rows for w in windows) == played.rows
    assert all(w.synced for w in windows)
    assert all(one.end_ns == two.start_ns for one, two in pairwise(windows))
    assert max(w.end_ns - w.start_ns for w in windows) > 8 * 3600 * S
