"""The benchmarks run, on one tiny pipeline, and tell an agreeing peer from a wrong one."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from benchmarks import __main__ as command
from benchmarks import conversion, judging, peers, swaps
from benchmarks.cases import CASES, Case
from benchmarks.measure import Ratio, Timing, interleave, ratio
from converters import signature as signatures
from converters import table as tables


def iris(*steps, C=1.0):
    X, y = load_iris(return_X_y=True)
    rows = np.asarray(X, np.float32)
    return make_pipeline(*steps, StandardScaler(), LogisticRegression(C=C)).fit(rows, y), rows


@pytest.fixture(scope="module")
def figures():
    return conversion.measure(Case("logistic", "iris", iris), probes=300, rounds=2, calls=6)


def test_a_pipeline_is_measured_from_conversion_to_latency(figures):
    assert figures["pipeline"] == "logistic (iris)"
    assert figures["skiff's answers"].startswith("agree")
    assert figures["probes"] >= 300
    assert min(figures[f"{stage} s"] for stage in ("convert", "prove", "skl2onnx")) >= 0
    assert figures["convert s"] + figures["prove s"] > 0
    assert figures["file kB"] > figures["graph kB"] > 0.1
    assert min(figures[f"{arm} us"] for arm in ("engine", "graph", "plain", "sklearn")) > 0
    for a, b in conversion.RATIOS:
        assert 0 < figures[f"{a}/{b}"].low <= figures[f"{a}/{b}"].middle <= figures[f"{a}/{b}"].high


def test_a_peer_is_judged_by_the_pipelines_answers():
    pipeline, X = iris()
    signature = signatures.read(pipeline)
    table = tables.read(signature, X)
    rows = [("training", table.rows("float32"))]
    peer = peers.plain(pipeline, X, signature)
    assert peers.verdict(peer, signature, table, rows) == "agrees"
    other, _ = iris(C=1e-3)
    found = peers.verdict(peer, signatures.read(other), table, rows)
    assert found.startswith("WRONG on 150 of 150 probes (labels: ")
    assert found.endswith("): training 150")


def test_a_peer_that_cannot_be_made_says_why():
    pipeline, X = iris(FunctionTransformer(np.cbrt))
    signature = signatures.read(pipeline)
    peer = peers.plain(pipeline, X, signature)
    assert (peer.session, peer.size) == (None, 0)
    assert peers.verdict(peer, signature, tables.read(signature, X), []).startswith("not converted: ")


def test_stages_are_added_up():
    stages = conversion.Stages(iter([0.0, 1.0, 3.0, 3.5, 7.5, 7.5, 9.5]).__next__)
    for event in ("lower", "probe", "export", "prove", "prove", "write"):
        stages(event, 0, 1)
    assert stages.proof() == 0.5 + 2.0
    assert stages.conversion() == 1.0 + 2.0 + 4.0


def test_slow_arms_make_fewer_calls():
    calls = {"slow": 0, "quick": 0}

    def arm(name):
        def call(i):
            calls[name] += 1

        return call

    found = interleave({"slow": arm("slow"), "quick": arm("quick")}, rounds=3, calls=9, round_seconds=0.0)
    assert calls == {"slow": 20, "quick": 20}  # five of nine, in three rounds and one to warm up
    assert len(found["slow"].rounds_us) == 3


def test_a_ratio_is_taken_round_by_round():
    def timing(*rounds):
        return Timing(p50_us=0.0, p99_us=0.0, p50_low_us=0.0, p50_high_us=0.0, mean_us=0.0, rounds_us=rounds)

    assert ratio(timing(2.0, 20.0, 200.0), timing(1.0, 10.0, 100.0)) == Ratio(2.0, 2.0, 2.0)
    assert str(Ratio(1.0, 0.5, 1234.5)) == "1.00 (0.50-1,234)"


def test_the_command_prints_tables_and_writes_the_figures(figures, monkeypatch, capsys, tmp_path):
    refused = {"pipeline": "other", "skiff's answers": "refused: because"}
    monkeypatch.setattr(conversion, "run", lambda told: [figures, refused])
    monkeypatch.setattr("benchmarks.predict.run", lambda: [{"model": "logistic", "runtime p50 us": 8.5}])
    monkeypatch.setattr(swaps, "run", lambda **_: {"failed": 0})
    for name in ("window", "device", "closing", "update", "update_agent", "shadow_cost", "ingest", "judging"):
        monkeypatch.setattr(f"benchmarks.{name}.run", lambda name=name: [{"what": name, "bytes": 7}])
    held = [{"budget": "window_bytes", "verdict": "within"}]
    monkeypatch.setattr("benchmarks.budgets.run", lambda *_: held)
    monkeypatch.setattr("benchmarks.calibration.run", lambda: {"runs": 0})
    monkeypatch.setattr(
        "benchmarks.calibration_text.markdown", lambda found: f"calibrated in {found['runs']}"
    )
    assert command.main(["--json", str(tmp_path / "f.json")]) == 0
    printed = capsys.readouterr().out
    assert "refused: because" in printed
    assert str(figures["graph/plain"]) in printed
    assert "window_bytes  within" in printed
    assert "calibrated in 0" in printed
    written = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert written["conversion"][0]["graph/plain"]["middle"] == figures["graph/plain"].middle
    assert written["budgets"] == held
    assert written["predict"] == [{"model": "logistic", "runtime p50 us": 8.5}]


def test_a_look_at_many_devices_that_did_not_move_is_timed_and_silent():
    found = judging.run(devices=60)[0]
    assert found["devices"] == 60
    assert found["alarms"] == 0
    assert isinstance(found["look s"], float)


def test_every_case_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES) >= 10


def test_swaps_under_load_lose_no_row():
    found = swaps.run(swaps=12, predictions=600)
    assert found["swaps"] == 12
    assert found["predictions"] >= 600
    assert found["failed"] == found["not counted"] == 0
    for when in ("swapping", "loading", "neither"):
        p50, p99, longest = found[f"gap ms, {when}: p50, p99, max"]
        assert 0 <= p50 <= p99 <= longest
