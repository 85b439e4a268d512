"""The broker is gone for days: a real daemon on a clock that runs fast keeps every count, within its room."""

import sqlite3
from contextlib import closing
from itertools import pairwise

import pytest

from edge_runtime.contract.messages import Window
from tests.support.chaos import Centre, provision
from tests.support.played import Played

PERIOD_SECONDS = 300.0
MONDAY_NS = 1_780_272_000 * 10**9  # a multiple of a day
OUTBOX_KB = 16


@pytest.fixture
def centre(mosquitto):
    """Knows the way to the broker, which is down."""
    mosquitto.stop()
    found = Centre(mosquitto.host, mosquitto.port)
    yield found
    found.close()


def added_up(windows):
    """One profile of all."""
    first, *rest = windows
    profile = first.profile
    for window in rest:
        profile = profile.merge(window.profile)
    return profile


@pytest.mark.slow
@pytest.mark.parametrize("days", [1, 14])
def test_after_days_without_a_broker_every_total_arrives_once_and_the_gaps_are_told(
    tmp_path, mosquitto, monkeypatch, centre, days
):
    home = provision(
        tmp_path / "d", mosquitto.host, mosquitto.port, source="none", window_seconds=PERIOD_SECONDS,
        more=f"[outbox]\nmax_kb = {OUTBOX_KB}\n",
    )  # fmt: skip
    played = Played(home, monkeypatch, wall_ns=MONDAY_NS)
    keeper = played.daemon._keeper
    periods = days * 24 * 12
    fullest = 0

    def script():
        nonlocal fullest
        for n in range(periods):
            played.ask(1 + n % 5)
            played.clocks.go_on(PERIOD_SECONDS)
            yield False
            assert keeper.report.size_bytes <= OUTBOX_KB * 1024
            fullest = max(fullest, keeper.report.size_bytes)
        assert not centre.windows
        played.clocks.go_on(1.0)
        mosquitto.start()
        while keeper.report.records or not centre.said("records_merged"):
            yield True

    played.play(script())
    assert fullest > 0.9 * OUTBOX_KB * 1024
    assert centre.conflicts == []
    assert home.outbox() == {}
    windows = list(centre.windows.values())
    assert {w.session for w in windows} == {played.daemon._identity.session}
    assert sum(w.windows for w in windows) == periods
    assert added_up(windows) == played.profile()
    assert len(windows) < periods / 2, "records hold several windows"
    for window in windows:
        held_ns = window.windows * PERIOD_SECONDS * 1e9
        assert window.synced
        assert window.end_ns - window.start_ns == held_ns, "a merged window says how long it was"
    spans = sorted((w.start_ns, w.end_ns) for w in windows)
    assert all(one[1] == two[0] for one, two in pairwise(spans)), "no hole, no overlap"
    assert (spans[0][0], spans[-1][1]) == (MONDAY_NS, MONDAY_NS + days * 86_400 * 10**9)

    gaps = [dict(event.detail) for event in centre.said("records_merged")]
    assert sum(int(gap["records"]) for gap in gaps) == periods - len(windows), "each merger is told once"
    assert all(gap["topic"].endswith("/window") for gap in gaps)
    assert centre.said("records_dropped") == []
    with closing(sqlite3.connect(home.state / "outbox.db")) as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
    assert pages * 4096 < 8 * OUTBOX_KB * 1024
    print(f"{periods} windows came in {len(windows)} records; the file has {pages * 4} KiB")


@pytest.mark.slow
def test_a_broker_that_comes_and_goes_meanwhile_gets_every_total_once(
    tmp_path, mosquitto, monkeypatch, centre
):
    """It is there for a moment every day, and does not always acknowledge what it is sent."""
    home = provision(
        tmp_path / "d", mosquitto.host, mosquitto.port, source="none", window_seconds=PERIOD_SECONDS,
        more=f"[outbox]\nmax_kb = {OUTBOX_KB}\n",
    )  # fmt: skip
    played = Played(home, monkeypatch, wall_ns=MONDAY_NS)
    daemon, keeper = played.daemon, played.daemon._keeper
    periods = 3 * 60

    def script():
        for visit in range(3):
            for _ in range(60):
                played.ask(2)
                played.clocks.go_on(PERIOD_SECONDS)
                yield False
            centre.acking = visit % 2 == 0
            before = centre.arrived
            mosquitto.start()
            while centre.arrived < before + 10:
                yield True
            mosquitto.kill()
            while daemon._link is not None and daemon._link.connected:
                yield True
        centre.acking = True
        mosquitto.start()
        while keeper.report.records or daemon._agent._in_flight:
            yield True

    played.play(script())
    assert centre.conflicts == []
    windows = [w for w in centre.windows.values() if isinstance(w, Window)]
    assert sum(w.windows for w in windows) == periods
    assert added_up(windows) == played.profile()
    covered = sorted((w.seq_lo, w.seq) for w in windows)
    assert all(one[1] < two[0] for one, two in pairwise(covered))
