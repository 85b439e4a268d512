"""Stored windows judged again under other settings."""

from dataclasses import replace

import pytest

from aggregator.backtest import backtest
from aggregator.records import Selection
from tests.support.fleet import SECOND
from tests.unit.test_aggregator_monitor import LEFT, RIGHT, Fleet

LOOK_SECONDS = 60


@pytest.fixture
def history(tmp_path):
    """A fleet whose right wrists moved, and its windows as they were stored, a minute from look to look."""
    fleet = Fleet(tmp_path)
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    fleet.join(*RIGHT, wrist="right")
    for _ in range(3):
        fleet.send(*LEFT)
        fleet.look(*RIGHT, shift=2.0)
    windows = [replace(w, end_ns=w.seq * LOOK_SECONDS * SECOND) for w in fleet.windows.windows(Selection())]
    yield fleet, windows
    fleet.close()


def opened(verdicts):
    return [(v.cohort, v.kind) for v in verdicts if v.changed == "opened"]


def test_the_same_settings_give_the_same_incidents(history, tmp_path):
    fleet, windows = history
    folder = tmp_path / "again"
    folder.mkdir()
    found = backtest(fleet.config, windows, fleet.devices, folder)
    kept = {(row["cohort"], row["kind"]) for row in fleet.ledger.table("incidents")}
    assert ("wrist=right", "skew") in kept
    assert set(opened(found)) == kept


def test_other_settings_give_other_incidents_and_touch_nothing(history, tmp_path):
    fleet, windows = history
    before = fleet.windows.figures(), fleet.ledger.table("verdicts"), fleet.ledger.table("audit")
    patient = replace(fleet.config, drift=replace(fleet.config.drift, confirmations=50))
    folder = tmp_path / "again"
    folder.mkdir()
    found = backtest(patient, windows, fleet.devices, folder)
    assert "warning" in {v.outcome for v in found if v.cohort == "wrist=right"}
    assert opened(found) == []
    assert (fleet.windows.figures(), fleet.ledger.table("verdicts"), fleet.ledger.table("audit")) == before
