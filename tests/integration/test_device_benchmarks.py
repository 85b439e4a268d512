"""The device's benchmarks run, small, with real processes and a real broker; what they measure is plausible."""

from itertools import pairwise

import pytest

from benchmarks import budgets, closing, device, rig, update, window
from edge_runtime.contract.errors import SkiffError


@pytest.fixture
def broker_installed(mosquitto):
    mosquitto.stop()  # the benchmarks start their own


def figure(row, name):
    """The middle of a spread."""
    found = budgets.worst([row], name)
    assert found is not None
    return found


def test_a_window_is_weighed_for_each_number_of_classes():
    rows = window.run(classes=(2, 7, 50), rows=300, rounds=2)
    assert [(row["classes"], row["shifted"]) for row in rows] == [
        (2, "no"),
        (7, "no"),
        (50, "no"),
        (2, "yes"),
    ]
    for fewer, more in pairwise(rows[:3]):
        assert more["counters"] - fewer["counters"] == more["classes"] - fewer["classes"]
        assert 100 < fewer["bytes"] < more["bytes"] < 5_000
    for row in rows:
        assert min(row["bin us/row"], row["encode us"], row["decode us"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True])
def test_skiffd_and_the_script_are_measured_side_by_side(broker_installed, tls):
    (row,) = device.run(estimators=("logistic",), tls=(tls,), starts=1)
    assert (row["model"], row["tls"], row["starts"]) == ("logistic", "on" if tls else "off", 1)
    for arm in ("skiffd", "script"):
        rss, pss, peak = (figure(row, f"{arm} {what} MB") for what in ("rss", "pss", "peak"))
        assert 20 < pss <= rss <= peak < 1_000
        assert 0 < figure(row, f"{arm} start s") < rig.WAIT_SECONDS
        assert figure(row, f"{arm} start cpu s") > 0
    assert 0.2 < row["rss ratio"].middle < 5
    assert row["start ratio"].middle > 0


@pytest.mark.slow
def test_calls_are_timed_while_windows_are_closed_and_acknowledged(broker_installed):
    rows = closing.run(estimator="logistic", rounds=1, seconds=1.5, window_seconds=0.3)
    assert [row["rows"] for row in rows] == list(closing.PACE_SECONDS)
    for row in rows:
        assert row["windows acknowledged"] >= 1
        assert row["none acknowledged"] == 0
        for arm in ("windows", "none"):
            assert row[f"{arm} calls"] > 50
            p50, p99, worst = (figure(row, f"{arm} {q} us") for q in ("p50", "p99", "worst"))
            assert 0 < p50 <= p99 <= worst
        assert row["p99 ratio"].middle > 0
    assert rows[0]["windows calls"] > rows[1]["windows calls"]


@pytest.mark.slow
def test_the_peaks_of_an_update_and_of_its_children_are_seen(broker_installed):
    first, swap = update.run(estimator="logistic")
    for row in (first, swap):
        assert row["daemon before MB"] < row["daemon peak MB"]
        assert row["update child peak MB"] > 20
        assert row["probe peak MB"] > 20
        assert row["children left"] == 0
    assert first["daemon peak MB"] <= swap["daemon peak MB"]


def test_a_process_that_ends_is_told_with_what_it_said(tmp_path):
    arguments = ("benchmarks.minimal_device", str(tmp_path / "gone.onnx"), "127.0.0.1", "1")
    with pytest.raises(SkiffError, match=r"(?s)ended or waited too long for .*gone\.onnx"):
        rig.Running(*arguments, row=[0.0], events=())


def test_ratios_are_taken_start_by_start():
    assert rig.over([2.0, 40.0, 6.0], [1.0, 10.0, 3.0]).middle == 2.0
    assert rig.spread([3.0, 1.0, 2.04]) == "2.0 (1.0-3.0)"


def test_figures_are_held_against_the_budgets_of_a_class():
    found = budgets.run(
        [{"skiffd rss MB": "90.0 (80.0-95.0)"}, {"skiffd rss MB": "250.5 (80.0-300.0)"}],
        [{"daemon peak MB": 100.0, "update child peak MB": 50.0}],
        [{"classes": 2, "bytes": 650}, {"classes": 50, "bytes": 10**6}],
        classes=("simulator.toml",),
    )
    verdicts = {row["figure"]: (row["measured"], row["verdict"]) for row in found}
    assert verdicts["rss_mb"] == (250.5, "OVER")
    assert verdicts.get("window_bytes", (650, "within")) == (650, "within")
    assert "start_seconds" not in verdicts
