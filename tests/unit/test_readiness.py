"""When a look is taken."""

from aggregator.config import DriftConfig
from aggregator.core.readiness import Coverage, covers, readiness
from edge_runtime.contract.ids import DeviceId

CONFIG = DriftConfig(horizon_rows=100, quorum=0.8, patience_seconds=60)


def cover(*rows, seconds=100.0):
    return [Coverage(device=DeviceId(f"d{i}"), rows=n, seconds=seconds) for i, n in enumerate(rows)]


def test_a_look_waits_for_a_quorum_of_the_active_devices():
    ready = readiness(cover(*[100] * 8, 99, 99), 0, CONFIG)
    assert ready.ready
    assert ready.covered == tuple(DeviceId(f"d{i}") for i in range(8))
    assert ready.reason == "8 of 10 active devices cover the horizon"
    short = readiness(cover(*[100] * 7, 99, 50, 1), 0, CONFIG)
    assert not short.ready
    assert dict(short.left_out)[DeviceId("d8")] == "50 of 100 rows, 100 of 0 s"


def test_patience_ends_but_somebody_must_have_sent_enough():
    some = cover(*[100] * 2, 99, 50, 1)
    assert not readiness(some, 59.9, CONFIG).ready
    assert readiness(some, 60, CONFIG).ready
    assert not readiness(cover(99, 99), 1e9, CONFIG).ready
    assert not readiness([], 1e9, CONFIG).ready


def test_the_horizon_is_rows_and_seconds():
    config = DriftConfig(horizon_rows=100, horizon_seconds=200)
    (one,) = cover(100)
    assert not covers(one, config)
    assert not readiness([one], 0, config).ready
    assert readiness(cover(100, 100, seconds=200.0), 0, config).ready
