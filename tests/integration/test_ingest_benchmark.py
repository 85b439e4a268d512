"""The ingest benchmark runs, and measures what it says."""

import pytest

from benchmarks import ingest


@pytest.mark.slow
@pytest.mark.usefixtures("mosquitto")
def test_a_small_fleet_is_measured():
    rows = ingest.run(devices=60, windows_each=2, repetitions=2)
    assert [row["processes"] for row in rows] == [1, 2]
    for row in rows:
        assert (row["devices"], row["windows a turn"]) == (60, 120)
        assert 500 < row["bytes each"] < 1000
        for rate in ("durable and acknowledged a second", "counted a second"):
            assert float(row[rate].split()[0]) > 10
