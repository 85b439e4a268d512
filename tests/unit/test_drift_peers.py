"""The drift peers: what they are given, how they are counted, and what is said where they cannot run."""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import drift_peer_child, drift_peers
from benchmarks.drift_peers import START, WINDOWS, Case


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
    text = drift_peers.table(
        [{"peer": "skiff", **scored}, {"peer": "other", "reason": "not installed: no network"}]
    )
    assert text[2].startswith("| skiff | 1 of 2 (1% to 99%) | 1 of 1")
    assert text[3] == "| other | not installed: no network | - |"


@pytest.mark.slow  # makes a virtual environment
def test_without_the_packages_it_says_why_and_tries_again_next_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    found = drift_peers.environment("whylogs", tmp_path)
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
    first = drift_peers.environment("whylogs", tmp_path)
    assert first == drift_peers.environment("whylogs", tmp_path) == tmp_path / "whylogs" / "bin" / "python"
    assert len(made) == 1


def test_a_peer_that_breaks_is_reported_with_its_last_words(tmp_path):
    (tmp_path / "fleet").mkdir()
    with pytest.raises(RuntimeError, match=r"scipy failed: FileNotFoundError: .*reference\.parquet"):
        dict(drift_peers.ask(sys.executable, "scipy", tmp_path))


def test_pins_name_each_peer():
    for peer in drift_peers.PEERS:
        pins = (drift_peers.HERE / "peer_environments" / f"{peer}.txt").read_text()
        assert f"\n{peer}==" in pins
        assert "@" not in pins
