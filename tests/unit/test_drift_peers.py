"""The drift peers: what they are given, how they are counted, and what is said where they cannot run."""

import json
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import drift_peer_child, drift_peers, environments, label_free, run_cache
from benchmarks.drift_peers import START, WINDOWS, Case
from benchmarks.run_cache import Cache


def test_fifteen_drift_free_fleets_and_eighteen_shifts():
    todo = drift_peers.cases()
    assert sum(not case.shift for case in todo) == 15
    assert sum(bool(case.shift) for case in todo) == 18
    assert len({case.name for case in todo}) == 33


def test_the_files_hold_all_rows_window_after_window(tmp_path):
    case = Case("heterogeneous", "mean", 1)
    drift_peers.write(case, tmp_path / "fleet")
    reference, data = (
        pq.read_table(tmp_path / "fleet" / f"{name}.parquet") for name in ("reference", "data")
    )
    per_window = 40 * drift_peers.ROWS
    for table, windows in ((reference, range(-WINDOWS, 0)), (data, range(WINDOWS))):
        np.testing.assert_array_equal(table["window"], np.repeat(windows, per_window))
        assert table.column_names == ["window", *case.fleet.names]
    means = np.asarray(data["f7"]).reshape(WINDOWS, -1).mean(axis=1)
    assert means[START:].mean() - means[:START].mean() == pytest.approx(1.0, abs=0.05)


def test_the_pooled_test_finds_a_shift_and_answers_as_the_peers_do(tmp_path, monkeypatch, capsys):
    drift_peers.write(Case("iid", "mean", 1), tmp_path / "fleet")
    monkeypatch.setattr(sys, "argv", ["child", "scipy", str(tmp_path)])
    assert drift_peer_child.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fleet"] == "fleet"
    assert all("f7" in named for named in found["windows"][START:])
    assert not any("f7" in named for named in found["windows"][:START])


LABEL_FREE = {
    "change": "nothing",
    "fleets": 2,
    "before": 0.8,
    "after": 0.75,
    "apart": 2e-8,
    "skiff": {"before": 0.004, "after": 0.0051, "bias": 0.0, "alerted": 1},
    "nannyml": {"reason": "not installed: no network"},
}


def named(*windows):
    found: list[set[str]] = [set() for _ in range(WINDOWS)]
    for window, column in windows:
        found[window].add(column)
    return found


@pytest.mark.parametrize(
    ("windows", "found"),
    [
        (named(), False),
        (named((START, "f7")), True),
        (named((START, "f8")), False),
        (named((0, "f7"), (START, "f7")), False),
        (named((0, "f8"), (WINDOWS - 1, "f7")), True),
    ],
)
def test_found_is_newly_named(windows, found):
    assert drift_peers.found_newly(windows, "f7") == found


def test_any_column_in_any_window_of_a_drift_free_fleet_is_an_alarm():
    todo = (Case("iid", "", 1), Case("iid", "", 2), Case("iid", "mean", 3))
    answers = {todo[0].name: named((3, "f1")), todo[1].name: named(), todo[2].name: named((START, "f7"))}
    scored = drift_peers.score(todo, answers)
    assert (scored["alarmed"]["count"], scored["alarmed"]["runs"]) == (1, 2)
    assert (scored["found"]["count"], scored["found"]["runs"]) == (1, 1)
    rows = [{"peer": "skiff", **scored}, {"peer": "other", "reason": "not installed: no network"}]
    text = drift_peers.markdown({"drift": rows, "label_free": [LABEL_FREE]})
    assert "\n| skiff | 1 of 2 (1% to 99%) | 1 of 1" in text
    assert "\n| other | not installed: no network | - |\n" in text


@pytest.mark.slow  # makes a virtual environment
def test_without_the_packages_it_says_why_and_tries_again_next_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    found = environments.environment("whylogs", tmp_path)
    assert isinstance(found, str)
    assert found.startswith("not installed: ERROR: ")
    assert not (tmp_path / "whylogs" / "pins.sha256").exists()


def test_an_environment_is_kept_while_its_pins_stay(tmp_path, monkeypatch):
    made = []

    def create(folder, **_):
        folder.mkdir(parents=True)
        made.append(folder)

    monkeypatch.setattr("venv.create", create)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
    first = environments.environment("whylogs", tmp_path)
    assert first == environments.environment("whylogs", tmp_path) == tmp_path / "whylogs" / "bin" / "python"
    assert len(made) == 1


def test_a_peer_that_breaks_is_reported_with_its_last_words(tmp_path):
    (tmp_path / "fleet").mkdir()
    with pytest.raises(RuntimeError, match=r"scipy failed: FileNotFoundError: .*reference\.parquet"):
        list(environments.ask(sys.executable, "scipy", tmp_path))


def test_pins_name_each_peer():
    for peer in drift_peers.PEERS:
        pins = (environments.HERE / "peer_environments" / f"{peer}.txt").read_text()
        assert f"\n{peer}==" in pins
        assert "@" not in pins


def test_a_killed_comparison_asks_only_for_what_is_missing(tmp_path, monkeypatch):
    todo = (Case("iid", "", 1), Case("iid", "mean", 2))
    asked = []

    def ask(_python, peer, _folder, names):
        asked.append((peer, list(names)))
        yield {"fleet": names[0], "windows": [["f7"]], "seconds": 1.0}
        if len(asked) == 1:
            raise RuntimeError(f"{peer} failed: killed")

    monkeypatch.setattr(drift_peers, "ask", ask)
    monkeypatch.setattr(drift_peers, "write", lambda _case, folder: folder.mkdir())
    first = drift_peers.answers("scipy", todo, tmp_path, tmp_path, Cache(tmp_path / "runs", "a"))
    assert first == "scipy failed: killed"
    again = drift_peers.answers("scipy", todo, tmp_path, tmp_path, Cache(tmp_path / "runs", "a"))
    assert again == {case.name: [{"f7"}] for case in todo}
    assert asked == [("scipy", [case.name for case in todo]), ("scipy", [todo[1].name])]


def test_answers_of_peers_outlive_a_change_of_the_engine_and_skiffs_own_do_not(tmp_path, monkeypatch):
    before = drift_peers.others(), drift_peers.engine()
    tree = tmp_path / "tree"
    for package in ("aggregator", "edge_runtime", "benchmarks", "tests/simulators"):
        shutil.copytree(run_cache.TREE / package, tree / package)
    monkeypatch.setattr(run_cache, "TREE", tree)
    assert (drift_peers.others(), drift_peers.engine()) == before
    with (tree / "aggregator" / "core" / "evidence.py").open("a") as file:
        file.write("\nCHANGED = 1\n")
    assert drift_peers.others() == before[0]
    assert drift_peers.engine() != before[1]


def test_the_estimate_from_sums_is_the_one_from_raw_scores_and_right_while_scores_are():
    honest = label_free.skiff(label_free.Case("the world: inputs closer together", 1))
    sure = label_free.skiff(label_free.Case("scores too sure, nothing", 1))
    assert honest["apart"] < 1e-6
    assert sure["apart"] < 1e-6
    errors = np.abs(np.subtract(honest["estimates"], honest["truth"]))
    assert errors.max() < 0.04  # of 2,000 rows
    assert np.mean(honest["truth"][:START]) - np.mean(honest["truth"][START:]) > 0.05
    assert np.subtract(sure["estimates"], sure["truth"]).mean() > 0.05
    assert any(honest["alerts"][START:])
    assert not any(sure["alerts"])


def test_estimates_are_held_against_the_truth_and_nannyml_where_it_can_run(tmp_path, monkeypatch):
    monkeypatch.setattr(label_free, "CHANGES", {"nothing": (None, 1.0)})
    monkeypatch.setattr(label_free, "environment", lambda *_: "not installed: no network")
    truth = [0.8] * 5 + [0.7] * 5
    mine = {"truth": truth, "estimates": [0.81] * 10, "apart": 1e-9, "alerts": [False] * 9 + [True]}
    monkeypatch.setattr(label_free, "skiff", lambda *_: mine)
    (row,) = label_free.run(cache=tmp_path, runs=tmp_path / "runs", seeds=2)
    assert row["skiff"] == {"before": 0.01, "after": 0.11, "bias": 0.11, "alerted": 2}
    assert row["nannyml"] == {"reason": "not installed: no network"}
    asked = []

    def ask(_python, peer, _folder, names):
        asked.append((peer, len(names)))
        for name in names:
            yield {"fleet": name, "windows": [[0.8, True]] * 10}

    monkeypatch.setattr(label_free, "environment", lambda *_: tmp_path)
    monkeypatch.setattr(label_free, "ask", ask)
    for _ in range(2):
        (row,) = label_free.run(cache=tmp_path, runs=tmp_path / "runs", seeds=2)
    assert asked == [("cbpe", 2)]
    assert row["nannyml"] == {"before": 0.0, "after": 0.1, "bias": 0.1, "alerted": 0}
    text = label_free.table([row])
    assert text[2] == "| nothing | 0.800 to 0.700 | 0.1100 | 0.1000 | 2 of 2 | 0 of 2 |"


def test_the_rows_of_an_estimate_are_written_as_a_peer_reads_them(tmp_path):
    case = label_free.Case("the answer changes", 1)
    found = label_free.skiff(case, tmp_path / "000")
    reference, data = (pq.read_table(tmp_path / "000" / f"{name}.parquet") for name in ("reference", "data"))
    assert reference.column_names == data.column_names == ["window", "score", "prediction", "label"]
    right = (np.asarray(data["prediction"]) == np.asarray(data["label"])).reshape(WINDOWS, -1).mean(axis=1)
    np.testing.assert_allclose(right, found["truth"])
    assert ((np.asarray(data["score"]) > 0.5) == np.asarray(data["prediction"])).all()
    assert right[:START].mean() - right[START:].mean() > 0.05
