"""`skiff backtest` on recorded rows of which it is known what changed: real models, real Parquet, the whole command."""

import importlib.util
import re
import zipfile
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from benchmarks.real_data import report, tables
from benchmarks.real_data.cases import CASES, Workshop

pytestmark = pytest.mark.sampled(3)

BY_NAME = {case.name: case for case in CASES}
LONG = {
    "watch-moved-both",
    "watch-joined",
    "weather-weeks",
    "shuttle",
    "digits",
    "watch-moved-unlabelled",
    "watch-joined-both",
    "flights-no-history",
    "flights-days",
    "weather-seasons-no-history",
}


class Told:
    """What was said of each case; each is replayed once."""

    def __init__(self, folder):
        self._shop, self._found = Workshop(folder), {}

    def __getitem__(self, name):
        if name not in self._found:
            self._found[name] = self._shop.run(BY_NAME[name])
        return self._found[name]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return Told(tmp_path_factory.mktemp("real-data"))


def _marked(name):
    return pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])


def changed_at(name):
    changed = BY_NAME[name].changed
    assert changed is not None
    return changed


def accuracies(found, changed):
    row = [(window["accuracy"], window["rows"]) for window in found["windows"]]
    return tuple(
        sum(value * n for value, n in part) / sum(n for _, n in part)
        for part in (row[:changed], row[changed:])
    )


@pytest.mark.parametrize("name", [_marked(case.name) for case in CASES])
def test_harm_asks_for_another_model_and_what_is_harmless_does_not(told, name):
    found = told[name]
    assert report.right(BY_NAME[name], found), (found["alarms"], found["retrain_requests"])


@pytest.mark.slow
def test_the_same_rows_harm_one_model_and_not_another(told):
    one, both = told["watch-moved"], told["watch-moved-both"]
    changed = changed_at("watch-moved")
    before, after = accuracies(one, changed)
    assert before - after > 0.2
    before, after = accuracies(both, changed)
    assert before - after < 0.05
    for found in (one, both):
        drifted = [alarm for alarm in found["alarms"] if alarm["kind"] == "drift"]
        assert min(alarm["opened_window"] for alarm in drifted) == changed
        assert {alarm["feature"] for alarm in drifted} >= {"accel_x_min"}
    assert one["retrain_requests"][0]["window"] <= changed + 2
    assert {alarm["severity"] for alarm in both["alarms"]} == {"ticket"}


def test_a_change_that_a_model_does_not_see_is_drift_and_no_more(told):
    dimmed, moved, same = told["digits-dimmed"], told["digits-moved"], told["digits"]
    changed = changed_at("digits-moved")
    assert [w["accuracy"] for w in dimmed["windows"]] == [w["accuracy"] for w in same["windows"]]
    assert {alarm["kind"] for alarm in dimmed["alarms"]} == {"drift"}
    before, after = accuracies(moved, changed)
    assert before - after > 0.5
    assert {"performance", "prediction"} <= {alarm["kind"] for alarm in moved["alarms"]}
    assert moved["retrain_requests"][0]["window"] == changed + 1


def test_three_stations_are_judged_one_by_one_and_that_is_said(told):
    found = told["weather-seasons"]
    assert any(note.startswith("3 devices with a past: a fleet verdict needs 10") for note in found["notes"])
    drifted = [alarm for alarm in found["alarms"] if alarm["kind"] == "drift"]
    assert {alarm["feature"] for alarm in drifted} == {"temp", "dewp"}
    assert all(set(alarm["devices"]) <= {"EWR", "JFK", "LGA"} for alarm in drifted)


def test_a_shifted_level_is_found_in_the_window_of_its_label(told):
    found, changed = told["pv-shift"], changed_at("pv-shift")
    [at] = [k for k, label in enumerate(BY_NAME["pv-shift"].rows()["label"]) if label]
    assert at // 10 == changed
    first = min(found["alarms"], key=lambda alarm: alarm["opened_window"])
    assert changed <= first["opened_window"] <= changed + 1
    assert "value" in {alarm["feature"] for alarm in found["alarms"]}


def test_values_that_stand_still_are_found_where_they_are_marked_and_nowhere_else(told):
    marked = BY_NAME["pv-stale"].rows()["stale_data_mask"].to_numpy()
    windows = marked[: len(marked) // 20 * 20].reshape(-1, 20)
    whole = windows.all(axis=1)
    starts = [k for k in range(len(whole)) if whole[k] and not whole[k - 1]]
    assert len(starts) == 3
    quality = [alarm for alarm in told["pv-stale"]["alarms"] if alarm["kind"] == "quality"]
    assert [alarm["feature"] for alarm in quality] == ["value_normalized"] * 3
    assert all("repeated values" in alarm["why"] for alarm in quality)
    for start, alarm in zip(starts, quality, strict=True):
        assert start <= alarm["opened_window"] <= start + 1
        assert windows[alarm["opened_window"]].any()


def test_outliers_beyond_the_declared_range_are_refused_in_their_windows(told):
    rows = BY_NAME["pv-outliers"].rows()
    beyond = rows["outlier"].to_numpy() & ~rows["value_normalized"].between(-0.05, 1.05).to_numpy()
    assert (int(rows["outlier"].sum()), int(beyond.sum())) == (6, 5)
    expected = [int(part.sum()) for part in beyond[:500].reshape(-1, 20)]
    found = told["pv-outliers"]
    assert [window["refused"].get("range", 0) for window in found["windows"]] == expected
    assert found["alarms"] == []


def test_anomalies_of_one_unit_are_that_units_alone(told):
    found = told["shuttle-one-unit"]
    assert {alarm["kind"] for alarm in found["alarms"]} == {"sensor"}
    assert {device for alarm in found["alarms"] for device in alarm["devices"]} == {"unit-03"}
    assert min(alarm["opened_window"] for alarm in found["alarms"]) == changed_at("shuttle-one-unit")


# ── the files, and the page ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_files", tables.DATA / "make_files.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_is_there_and_described(maker):
    text = (tables.DATA / "README.md").read_text(encoding="utf-8")
    described = dict(re.findall(r"^\| `(\w+\.parquet)` \| ([\d,]+) \|", text, re.MULTILINE))
    rows = {made.name: pq.read_metadata(tables.DATA / made.name).num_rows for made in maker.FILES}
    assert {name: int(n.replace(",", "")) for name, n in described.items()} == rows
    assert {path.name for path in tables.DATA.glob("*.parquet")} == set(rows)


def test_other_bytes_than_the_published_ones_are_refused(maker, tmp_path, capsys):
    wheel = tmp_path / "river-0.26.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("river/datasets/shuttle.csv.gz", b"other")
    assert maker.main([str(wheel), "--out", str(tmp_path)]) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert list(tmp_path.glob("*.parquet")) == []


def test_the_page_tells_of_every_case(repository):
    text = (repository / "docs/explanation/real-data.md").read_text(encoding="utf-8")
    table = text.partition(report.BEGIN)[2].partition(report.END)[0]
    cells = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    assert {row[0].strip("`"): row[-1] for row in cells} == {case.name: "yes" for case in CASES}
