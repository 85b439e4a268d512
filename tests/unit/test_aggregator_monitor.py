"""From stored windows to verdicts, incidents and a request for a better model, over real stores and a real artifact."""

from dataclasses import replace

import numpy as np
import pytest

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.registry import Registry
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig, DriftConfig, RetrainConfig
from aggregator.core.ingest import check_profile
from aggregator.monitor import Monitor
from aggregator.records import Arrival, DeviceRecord
from edge_runtime.contract.codec import encode
from edge_runtime.contract.ids import DeviceId
from tests.support.fleet import (
    FLEET,
    MODEL,
    NAMES,
    NOW,
    SECOND,
    SESSION,
    B,
    publish_artifact,
    report,
    tiny_count,
    window,
)

DRIFT = DriftConfig(attributes=("wrist",), horizon_rows=400, min_labelled=50, psi_floor=0.2, cdf_floor=0.2)
ROWS = 200


class Fleet:
    """Devices that count rows and a monitor that judges them."""

    def __init__(self, folder, drift=DRIFT, command=("train", "{request}")):
        self.folder = folder
        self.config = AggregatorConfig(
            fleet=FLEET,
            state_dir=folder / "state",
            registry=folder / "registry",
            drift=drift,
            retrain=RetrainConfig(command=command),
        )
        self.tiny, self.digest = publish_artifact(folder / "registry")
        self.devices = {}
        self.now = NOW
        self.seq = 0
        self.open()

    def open(self):
        self.windows = Windows(self.config.windows_path)
        self.ledger = Ledger(self.config.ledger_path)
        self.registry = Registry(self.config.registry)
        self.monitor = Monitor(self.config, self.windows, self.ledger, self.registry)

    def close(self):
        self.windows.close()
        self.ledger.close()

    def join(self, *names, wrist="left", online=True, serving=None):
        for name in names:
            self.devices[DeviceId(name)] = DeviceRecord(
                device=DeviceId(name),
                session=SESSION,
                seq=1,
                online=online,
                attributes=(("wrist", wrist),),
                models=(report(serving=serving or self.digest, state="committed"),),
            )

    def send(self, *names, shift=0.0, windows=2, right=0.8, judged=True):
        """Each device sends ``windows`` windows of `ROWS` rows."""
        for _ in range(windows):
            self.seq += 1
            for name in names:
                rng = np.random.default_rng([self.seq, *name.encode()])
                rows = rng.normal(size=(ROWS, len(NAMES))).astype(np.float32)
                rows[:, 0] += np.float32(shift)
                w = window(
                    name,
                    self.seq,
                    model=self.digest,
                    profile=tiny_count(self.tiny, rows),
                    labelled=100,
                    correct=int(100 * right) + int(rng.integers(-3, 4)),
                )
                arrival = Arrival(window=w, payload=encode(w), judged=judged)
                assert self.windows.append([arrival], [], [], self.now).stored == 1

    def check(self):
        self.now += 10 * SECOND
        return {(v.cohort, v.kind): v for v in self.monitor.check(self.devices, self.now)}

    def look(self, *names, **options):
        self.send(*names, **options)
        return self.check()


LEFT = tuple(f"left-{i}" for i in range(10))
RIGHT = tuple(f"right-{i}" for i in range(10))


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path)
    yield made
    made.close()


def test_before_the_first_look_the_verdict_says_what_is_lacking(fleet):
    fleet.join(*LEFT)
    fleet.send(*LEFT[:3])
    assert fleet.check() == {}
    (standing,) = fleet.ledger.verdicts()
    assert standing.outcome == "insufficient"
    assert standing.reason == "3 of 3 active devices cover the horizon; 5 are needed"
    assert fleet.ledger.table("looks") == ()
    fleet.send(*LEFT[3:6], windows=1)
    fleet.check()
    left_out = fleet.ledger.verdicts()[0].left_out
    assert left_out[0] == ("left-3", "200 of 400 rows, 10 of 0 s")


def test_a_fleet_like_the_training_is_stable_and_becomes_the_baseline(fleet):
    fleet.join(*LEFT)
    found = fleet.look(*LEFT)
    assert {key: v.outcome for key, v in found.items()} == {
        ("fleet", "skew"): "stable",
        ("fleet", "drift"): "insufficient",
        ("fleet", "prediction"): "stable",
        ("fleet", "performance"): "stable",
    }
    assert set(fleet.ledger.origins(fleet.digest)) == set(LEFT)
    assert fleet.look(*LEFT)["fleet", "drift"].outcome == "stable"
    assert {u.device for u in fleet.ledger.baseline(fleet.digest) or ()} == set(LEFT)
    assert found["fleet", "skew"].devices == tuple(sorted(LEFT))


def test_looks_do_not_overlap(fleet):
    fleet.join(*LEFT)
    first = fleet.look(*LEFT)["fleet", "skew"]
    assert fleet.check() == {}
    fleet.send(*LEFT, windows=1)
    assert fleet.check() == {}
    second = fleet.look(*LEFT, windows=1)["fleet", "skew"]
    assert second.first > first.last


def test_a_moved_cohort_warns_then_opens_incidents_and_asks_once_for_a_better_model(fleet):
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    fleet.join(*RIGHT, wrist="right")

    def both():
        fleet.send(*RIGHT, shift=2.0, right=0.4)
        return fleet.look(*LEFT)

    first = both()
    assert first["wrist=right", "skew"].outcome == "warning"
    assert first["wrist=left", "skew"].outcome == "stable"
    assert not fleet.ledger.retrains("waiting")
    second = both()
    assert second["wrist=right", "drift"].outcome == "stable"  # it never was otherwise
    assert second["wrist=right", "skew"].outcome == "drifted"
    assert second["wrist=right", "skew"].changed == "opened"
    assert second["wrist=right", "skew"].judgement.moved == ("a",)
    assert second["wrist=right", "performance"].outcome == "drifted"
    assert second["wrist=left", "performance"].outcome == "stable"
    both()
    ((_, document),) = fleet.ledger.retrains("waiting")
    assert '"cohort": "wrist=right"' in document
    (row,) = fleet.ledger.table("retrains")
    assert {d["device"] for d in row["document"]["devices"]} == set(RIGHT)
    kinds = {row["kind"] for row in fleet.ledger.table("incidents") if row["cohort"] == "wrist=right"}
    assert {"skew", "performance"} <= kinds
    assert "retrain request" in {row["what"] for row in fleet.ledger.table("audit")}


def test_without_a_command_the_request_is_only_recorded(tmp_path):
    fleet = Fleet(tmp_path, command=())
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    for _ in range(2):
        fleet.look(*LEFT, shift=2.0, right=0.4)
    assert [row["state"] for row in fleet.ledger.table("retrains")] == ["recorded"]
    fleet.close()


def test_a_restart_in_between_changes_nothing(fleet):
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    assert fleet.look(*LEFT, shift=2.0)["fleet", "skew"].outcome == "warning"
    fleet.close()
    fleet.open()
    assert fleet.check() == {}
    assert fleet.look(*LEFT, shift=2.0)["fleet", "skew"].outcome == "drifted"


def test_an_incident_closes_when_the_world_comes_back(fleet):
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    for _ in range(2):
        fleet.look(*LEFT, shift=2.0)
    outcomes = [fleet.look(*LEFT)["fleet", "skew"].outcome for _ in range(2)]
    assert outcomes == ["drifted", "stable"]
    assert [
        row["closed_ns"] is not None for row in fleet.ledger.table("incidents") if row["kind"] == "skew"
    ] == [True]


def test_an_incident_retires_when_the_fleet_serves_another_artifact(fleet):
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    for _ in range(2):
        fleet.look(*LEFT, shift=2.0)
    fleet.join(*LEFT, serving=B)
    fleet.check()
    assert all(row["closed_why"].startswith("no online device") for row in fleet.ledger.table("incidents"))
    assert not any(trail.incident for trail in fleet.ledger.trails())


def test_a_silent_or_departed_device_does_not_hold_a_look_up(fleet):
    fleet.join(*LEFT)
    fleet.join("asleep", online=False)
    fleet.join("moved-on", serving=B)
    fleet.send("asleep", "moved-on", windows=1)
    assert set(fleet.look(*LEFT)["fleet", "skew"].devices) == set(LEFT)


def test_an_active_majority_is_waited_for_but_not_for_ever(tmp_path):
    fleet = Fleet(tmp_path, drift=replace(DRIFT, patience_seconds=60.0))
    slow = [f"slow-{i}" for i in range(6)]
    fleet.join(*LEFT[:5])
    fleet.join(*LEFT[5:], *slow, wrist="right")
    fleet.send(*slow, windows=1)
    assert fleet.look(*LEFT) == {}
    fleet.now += 60 * SECOND
    verdicts = fleet.check()
    found = verdicts["fleet", "skew"]
    assert set(found.devices) == set(LEFT)
    assert {name for name, _ in found.left_out} == set(slow)
    assert {name for name, _ in verdicts["wrist=right", "skew"].left_out} == set(slow)
    assert verdicts["wrist=left", "skew"].left_out == ()
    fleet.close()


def test_windows_from_before_the_artifact_was_published_are_judged_later(fleet):
    fleet.join(*LEFT)
    path = next(fleet.config.registry.rglob("*.onnx"))
    hidden = path.rename(fleet.folder / "hidden")
    fleet.send(*LEFT, judged=False)
    assert fleet.check() == {}
    assert fleet.windows.figures().unjudged == 20
    hidden.rename(path)
    fleet.close()
    fleet.open()
    assert fleet.check()["fleet", "skew"].outcome == "stable"
    assert fleet.windows.figures().unjudged == 0


def test_the_artifact_under_test_is_sound(fleet):
    info = fleet.registry.info(fleet.digest)
    assert info.manifest.name == MODEL
    for _, profile in info.reference.groups:
        check_profile(profile, info)
