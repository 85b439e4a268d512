"""The calibration report: the raw tests are the textbook's, and the tables say what the runs showed."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks import calibration, calibration_runs, calibration_text, raw_tests, run_cache
from benchmarks.calibration_runs import Task
from tests.simulators.streams import Fleet

START = 10


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(1)
    reference = np.sort(rng.normal(size=4000)).astype(np.float32)
    return reference, [np.sort(rng.normal(0.1 * k, 1 + 0.1 * k, 300)).astype(np.float32) for k in range(4)]


def compared(reference, window):
    return dict(zip(raw_tests.TESTS, raw_tests.Before(reference).compare(window), strict=True))


def test_kolmogorov_smirnov_is_scipys_with_ties_too(samples):
    reference, windows = samples
    rounded = np.round(reference)
    for window in windows:
        exact = stats.ks_2samp(reference, window).statistic
        assert compared(reference, window)["KS"] == pytest.approx(exact, abs=1e-6)
        tied = np.round(window)
        exact = stats.ks_2samp(rounded, tied).statistic
        assert compared(rounded, tied)["KS"] == pytest.approx(exact, abs=1e-6)
    assert compared(reference, reference + 100)["KS"] == 1


def test_wasserstein_is_scipys_in_standard_deviations(samples):
    reference, windows = samples
    for window in windows:
        exact = stats.wasserstein_distance(reference, window) / reference.std()
        assert compared(reference, window)["Wasserstein"] == pytest.approx(exact, abs=0.01)
    assert compared(np.ones(5, np.float32), np.zeros(3, np.float32))["Wasserstein"] == 0


def test_anderson_darling_is_the_textbooks_where_the_reference_is_known(samples):
    _, windows = samples
    known = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000).astype(np.float32)
    for window in windows:
        n, u = len(window), stats.norm.cdf(window.astype(float))
        i = np.arange(1, n + 1)
        exact = -n - ((2 * i - 1) * (np.log(u) + np.log1p(-u[::-1]))).sum() / n
        assert n * compared(known, window)["Anderson-Darling"] == pytest.approx(exact, rel=0.02, abs=0.05)


def test_anderson_darling_takes_ties_half_below(samples):
    reference, windows = samples
    rounded, tied = np.round(reference, 1), np.round(windows[1], 1)
    n, m = len(tied), len(rounded)
    below = (rounded[:, None] < tied).sum(axis=0) + (rounded[:, None] == tied).sum(axis=0) / 2
    u = (below + 0.5) / (m + 1)
    exact = -1 - ((2 * np.arange(1, n + 1) - 1) * (np.log(u) + np.log1p(-u[::-1]))).sum() / n**2
    assert compared(rounded, tied)["Anderson-Darling"] == pytest.approx(exact, rel=1e-9)


def test_a_threshold_is_passed_in_the_nominal_share_of_new_runs():
    rng = np.random.default_rng(2)
    passed = [rng.random() > raw_tests.threshold(rng.random(99).tolist(), 0.05) for _ in range(4000)]
    assert np.mean(passed) == pytest.approx(0.05, abs=0.012)
    assert raw_tests.threshold([1.0, 3.0, 2.0], 0.05) == 3.0


def pooled(fleet, columns, start=0):
    pool = raw_tests.Pool(fleet, columns, start=start)
    fleet.count(pool.take)
    return pool.pooled


def test_pooled_rows_are_all_rows_and_the_history_is_thinned(monkeypatch):
    monkeypatch.setattr(raw_tests, "REFERENCE_ROWS", 200)
    fleet = Fleet(devices=3, features=6, rows=40, windows=3, reference_windows=4, group_rows=50)
    found = pooled(fleet, [0, 5])
    assert [window.shape for window in found.windows] == [(3, 120)] * 3
    assert (found.training.shape, found.history.shape) == ((3, 300), (3, 240))
    assert (found.history[2] >= 0.5).all()  # the score
    np.testing.assert_array_equal(found.windows[1][0, 40:80], next(fleet.stream(1)).values[0, 5])
    (later,) = pooled(fleet, [0, 5], start=2).windows
    np.testing.assert_array_equal(later, found.windows[2])
    series = raw_tests.statistics(found.history, found.windows)
    assert series["KS"].shape == (3, 3)
    assert 0 < series["KS"].max() < 0.3


def alarm(kind="drift", feature="f7", opened=12, closed=None, devices=()):
    return {
        "kind": kind,
        "feature": feature,
        "opened": opened,
        "closed": closed,
        "devices": devices,
        "why": "so",
    }


def run(kind="clean", fault="", alarms=(), seed=0, hit=(), raw=None):
    return {
        "kind": kind,
        "scenario": "iid",
        "seed": seed,
        "fault": fault,
        "arms": ("training",),
        "windows": 40,
        "columns": ["f7"] if fault else [],
        "hit": list(hit),
        "alarms": {"training": list(alarms)},
        "raw": {} if raw is None else {"training": dict.fromkeys(raw_tests.TESTS, raw)},
        "seconds": {"judge": 0.4},
    }


def report(runs):
    return calibration_text.report(runs, level=0.05, start=START)


def test_a_run_with_any_alarm_is_a_false_alarm_and_its_seed_is_kept():
    (row,) = report([run(seed=s, alarms=[alarm()] * (2 if s == 3 else 0)) for s in range(20)])["false_alarms"]
    assert (row["count"], row["runs"], row["seeds"], row["kinds"]) == (1, 20, [3], {"drift": 1})
    exact = stats.beta.ppf([0.025, 0.975], [1, 2], [20, 19])
    np.testing.assert_allclose([row["low"], row["high"]], exact, atol=1e-4)


def faulty(alarms, series, fault="mean +0.5"):
    clean = [run(raw=[0.1 + 0.001 * s]) for s in range(20)]
    found = report([*clean, *(run("faulty", fault, a, raw=r) for a, r in zip(alarms, series, strict=True))])
    return found["power"][0], calibration_text.markdown(found)


def test_power_is_the_share_of_runs_that_name_the_right_column_and_the_delay_is_in_windows():
    row, text = faulty(
        [[alarm(opened=12)], [alarm(feature="f3", opened=11)]],
        [[0.05, 0.05, 0.05, 0.2], [0.0, 0.0, 0.1, 0.1]],
    )
    assert (row["skiff"]["share"], row["skiff"]["delay"]) == (0.5, 2)
    assert (row["KS"]["share"], row["KS"]["delay"]) == (0.5, 3)
    assert row["others named"] == 1
    assert row["lost to"] == []
    assert "**50%" not in text


def test_what_is_lost_is_shown_as_lost():
    row, text = faulty([[alarm(opened=12)], []], [[0.3, 0.3], [0.3, 0.3]])
    assert row["lost to"] == list(raw_tests.TESTS)
    assert "**50% [1-99], 2 (lost)**" in text
    later, _ = faulty([[alarm(opened=13)], [alarm(opened=13)]], [[0.0, 0.3], [0.0, 0.3]])
    assert later["skiff"]["share"] == later["KS"]["share"] == 1
    assert later["lost to"] == list(raw_tests.TESTS)


def test_an_alarm_that_stood_before_the_fault_is_no_detection():
    stood, _ = faulty([[alarm(opened=4), alarm(opened=12)], []], [[0.0], [0.0]])
    assert stood["skiff"]["share"] == 0
    closed, _ = faulty([[alarm(opened=4, closed=7), alarm(opened=12)], []], [[0.0], [0.0]])
    assert closed["skiff"]["share"] == 0.5


def test_a_fault_of_correlation_shows_in_the_outputs_only():
    row, _ = faulty([[alarm("prediction", None)], [alarm()]], [[0.0], [0.0]], fault="correlation 0.8 only")
    assert row["skiff"]["share"] == 0.5


@pytest.mark.parametrize(
    ("hit", "alarms", "named", "right"),
    [
        (["a"], [alarm("sensor", devices=["a"])], 1, 1),
        (["a"], [alarm("quality", devices=["a"])], 1, 1),
        (["a"], [alarm("sensor", devices=["a", "b"])], 1, 0),
        (["a"], [alarm("sensor", devices=["a"]), alarm("drift", devices=["a"])], 1, 0),
        (["a"], [alarm("sensor", "f3", devices=["a"])], 0, 0),
        (list("abcdef"), [alarm("drift", devices=list("abcdef"))], 1, 1),
        (list("abcdef"), [alarm("drift"), alarm("sensor", devices=["a"])], 1, 0),
        (list("abcdef"), [alarm("sensor", devices=["a"])], 1, 0),
        (list("abcdef"), [], 0, 0),
    ],
)
def test_attribution(hit, alarms, named, right):
    found = report([run("attributed", "stuck", alarms, hit=hit)])
    row = found["attribution"][0]
    assert (row["named"], row["right"]) == (named, right)
    assert row["broken"] == (len(hit) <= 3)
    assert f"| {named} of 1 | {right} of {named}" in calibration_text.markdown(found)


def test_the_page_keeps_its_text_around_the_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{calibration_text.BEGIN}\nstale\n{calibration_text.END}\nafter\n")
    found = report([run()])
    calibration_text.write(found, page)
    calibration_text.write(found, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    assert text.count("| iid | 40 | **0 of 1") == 1
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no block"):
        calibration_text.write(found, page)


def test_a_report_has_a_run_for_every_cell():
    todo = calibration.tasks(calibration.QUICK)
    assert len(set(todo)) == len(todo)
    assert {task.scenario for task in todo if task.kind == "clean"} == set(calibration_runs.CLEAN)
    assert {task.fault for task in todo if task.kind == "faulty"} == set(calibration_runs.FAULTS)
    assert {task.fault for task in todo if task.kind == "attributed"} == {
        *calibration_runs.BROKEN,
        *calibration_runs.SHIFTS,
    }
    long = [task for task in todo if task.windows == calibration.QUICK.long_windows]
    assert len(long) == calibration.QUICK.long


def test_runs_are_taken_in_turns():
    todo = calibration.tasks(calibration.FULL)
    groups = Counter((task.kind, task.scenario, task.fault, task.windows) for task in todo)
    part = Counter((task.kind, task.scenario, task.fault, task.windows) for task in todo[: len(todo) // 4])
    assert part.keys() == groups.keys()
    assert all(abs(part[group] - groups[group] / 4) <= 1 for group in groups)


def test_the_sizes_are_enough_for_the_bounds():
    size = calibration.FULL
    assert calibration_text.interval(0, size.long)[1] <= calibration_text.NOMINAL_BOUND
    assert calibration_text.interval(5, size.clean)[1] <= calibration_text.NOMINAL_BOUND
    attributed = size.attributed * len(calibration_runs.HARD)
    attributed *= len(calibration_runs.BROKEN) + len(calibration_runs.SHIFTS)
    assert calibration_text.interval(attributed, attributed)[0] >= 0.99
    assert size.matched <= size.clean


def test_a_report_goes_on_where_it_was_interrupted(tmp_path):
    size = replace(calibration.QUICK, clean=2, other=0, matched=0, long=0)
    cache = tmp_path / "runs.jsonl"
    assert calibration.run(size, parts=("clean",), cache=cache, seconds=0)["false_alarms"] == []
    kept = run_cache.Cache(cache, calibration_runs.sources())
    for task in calibration.tasks(size, ("clean",))[:5]:
        one = run(seed=task.seed)
        kept.add(calibration_runs.key_of(task), {**one, "scenario": task.scenario})
    found = calibration.run(size, parts=("clean",), cache=cache, seconds=0)
    assert sum(row["runs"] for row in found["false_alarms"]) == 5
    assert "0 of 5" in calibration_text.markdown(found)


def test_the_same_rows_whoever_looks_at_them_as_they_pass():
    fleet = Fleet(seed=4, devices=2, features=4, rows=20, windows=3, group_rows=50)
    seen = []
    fleet.count(lambda stretch: seen.append(stretch.first))
    assert seen == [0, 0]
    assert fleet.slices == replace(fleet).slices


def test_faults_begin_where_they_should_and_broken_sensors_are_one_to_three():
    for task in calibration.tasks(calibration.QUICK):
        fleet = calibration_runs.fleet_of(task)
        assert [fault.start for fault in fleet.faults] == [calibration_runs.START] * bool(task.fault)
        if task.fault in calibration_runs.BROKEN:
            assert len(set(fleet.faults[0].hit(40))) == 1 + task.seed % 3
        if task.fault.startswith("unseen"):
            assert fleet.shapes[fleet.faults[0].columns[0]] == "category"


def test_one_run_names_what_was_moved():
    task = Task(
        kind="faulty",
        scenario="iid",
        seed=1,
        fault="mean +1",
        arms=("training",),
        raw=True,
        windows=12,
        rows=60,
    )
    found = calibration_runs.work(task)
    assert found["columns"] == ["f7"]
    assert len(found["hit"]) == 40
    assert "f7" in {alarm["feature"] for alarm in found["alarms"]["training"]}
    assert all(min(series) > 0.2 for series in found["raw"]["training"].values())
    (row,) = report([found, *(run(raw=[0.1]) for _ in range(20))])["power"]
    assert row["skiff"]["share"] == row["KS"]["share"] == 1


def test_correlation_is_looked_for_in_the_score():
    task = Task(
        kind="faulty", scenario="iid", seed=1, fault="correlation 0.8 only", arms=(), windows=12, rows=60
    )
    fleet = calibration_runs.fleet_of(task)
    assert calibration_runs.raw_columns(fleet) == []
    rows, before = pooled(fleet, [], start=10), pooled(fleet, [])
    moved = raw_tests.statistics(rows.training, rows.windows)["KS"]
    assert moved.shape == (2, 1)
    assert moved.min() > 1.5 * raw_tests.statistics(before.training, before.windows[:10])["KS"].max()


def test_an_artifact_without_groups_keeps_its_total():
    fleet = Fleet(devices=1, features=4, windows=1, group_rows=100)
    bare = calibration_runs.ungrouped(fleet.info)
    assert bare.reference.groups == ()
    assert bare.reference.total == fleet.info.reference.total
