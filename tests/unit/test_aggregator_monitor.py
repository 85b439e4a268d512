"""From stored windows to verdicts, incidents and a request for a better model, over real stores and a real artifact."""

import gc
import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.registry import Registry
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig, AlarmsConfig, DriftConfig, RetrainConfig
from aggregator.core.ingest import check_profile
from aggregator.monitor import Monitor
from aggregator.records import Arrival, DeviceRecord, RetrainRequest
from edge_runtime.contract.codec import encode
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import empty_profile
from tests.support.fleet import (
    FLEET,
    MODEL,
    NAMES,
    NOW,
    SECOND,
    SESSION,
    B,
    labels,
    publish_artifact,
    report,
    tiny_count,
    window,
)

pytestmark = pytest.mark.sampled(2)

DRIFT = DriftConfig(attributes=("wrist",), horizon_rows=400, baseline_looks=3, budget_looks=100)
ROWS = 200


ARRIVALS: dict[tuple[object, ...], Arrival] = {}
"""What fleets have sent, for the next fleet that sends the same."""


def arrival(tiny, digest, name, seq, shift, right, judged):
    """A window of `ROWS` rows that the model ``tiny`` has answered."""
    rng = np.random.default_rng([seq, *name.encode()])
    rows = rng.normal(size=(ROWS, len(NAMES))).astype(np.float32)
    rows[:, 0] += np.float32(shift)
    w = window(
        name,
        seq,
        model=digest,
        profile=tiny_count(tiny, rows),
        labelled=100,
        correct=int(100 * right) + int(rng.integers(-3, 4)),
    )
    return Arrival(window=w, payload=encode(w), judged=judged)


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
            alarms=AlarmsConfig(mqtt=True),
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

    def again(self):
        """Another process goes on."""
        self.close()
        self.open()

    def arrival(self, *what):
        """The same for all fleets: they count rows for the same artifact."""
        if (self.digest, *what) not in ARRIVALS:
            ARRIVALS[self.digest, *what] = arrival(self.tiny, self.digest, *what)
        return ARRIVALS[self.digest, *what]

    def send(self, *names, shift=0.0, windows=2, right=0.8, judged=True):
        """Each device sends ``windows`` windows of `ROWS` rows."""
        for _ in range(windows):
            self.seq += 1
            sent = [self.arrival(name, self.seq, shift, right, judged) for name in names]
            assert self.windows.append(sent, [], [], self.now).stored == len(names)

    def check(self):
        self.now += 10 * SECOND
        return {(v.cohort, v.kind): v for v in self.monitor.check(self.devices, self.now)}

    def look(self, *names, **options):
        self.send(*names, **options)
        return self.check()

    def settle(self, *names):
        """Looks that are the devices' past."""
        for _ in range(self.config.drift.baseline_looks):
            self.look(*names)

    def told(self):
        """What waits to be told, as it will be."""
        return [json.loads(telling.text) for telling in self.ledger.tellings()]

    def forget_told(self):
        with self.ledger.transaction():
            self.ledger.put_told([telling.number for telling in self.ledger.tellings()])

    def incidents(self, *, closed=False):
        """(cohort, column, kind) of the incidents that are open, or that were closed."""
        return {
            (row["cohort"], row["column_key"], row["kind"])
            for row in self.ledger.table("incidents")
            if (row["closed_ns"] is not None) == closed
        }

    def remembered(self):
        """Everything that a judge goes on from, and what people are shown."""
        it, digest = self.ledger, self.digest
        tables = [it.table(name, 10_000) for name in ("looks", "incidents", "verdicts", "audit", "retrains")]
        return it.traces(digest), it.first_looks(digest), it.suspects(digest), it.cursors(), tables


LEFT = tuple(f"left-{i}" for i in range(10))
RIGHT = tuple(f"right-{i}" for i in range(10))


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path)
    yield made
    made.close()


def outcomes(found):
    return {key: v.outcome for key, v in found.items()}


# ── when a look is taken ───────────────────────────────────────────────────────────────────────────────


def test_before_the_first_look_the_verdict_says_what_is_lacking(fleet):
    fleet.join(*LEFT)
    fleet.send(*LEFT[:3])
    fleet.send(*LEFT[3:6], windows=1)
    assert fleet.check() == {}
    (standing,) = fleet.ledger.verdicts()
    assert standing.outcome == "insufficient"
    assert standing.reason == "3 of 6 active devices cover the horizon"
    assert standing.left_out[0] == ("left-3", "200 of 400 rows, 10 of 0 s")
    assert fleet.check() == {}
    assert fleet.ledger.verdicts() == (standing,)  # nothing new to say
    assert fleet.ledger.table("looks") == ()
    fleet.look(*LEFT)
    assert fleet.ledger.verdicts()[0].outcome == "stable"


def test_a_look_is_taken_when_enough_devices_cover_the_horizon(tmp_path):
    fleet = Fleet(tmp_path, drift=replace(DRIFT, min_devices=8))
    fleet.join(*LEFT)
    fleet.send(*LEFT[:7])
    fleet.send(*LEFT[7:], windows=1)
    assert fleet.check() == {}
    fleet.send("left-7", windows=1)
    found = fleet.check()["fleet", "skew"]
    assert found.judged == 8
    assert [name for name, _ in found.left_out] == ["left-8", "left-9"]
    assert fleet.check() == {}
    fleet.close()


def test_looks_do_not_overlap(fleet):
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    used = fleet.ledger.cursors()
    assert fleet.check() == {}
    fleet.send(*LEFT, windows=1)
    assert fleet.check() == {}
    assert fleet.ledger.cursors() == used
    fleet.look(*LEFT, windows=1)
    assert {row["row_count"] for row in fleet.ledger.table("looks")} == {10 * 400}
    newest = {(digest, device): n for digest, device, n in fleet.windows.streams()}
    assert fleet.ledger.cursors() == newest
    assert all(newest[key] > n for key, n in used.items())


def test_a_silent_or_departed_device_does_not_hold_a_look_up(fleet):
    fleet.join(*LEFT)
    fleet.join("asleep", online=False)
    fleet.join("moved-on", serving=B)
    fleet.send("asleep", "moved-on", windows=1)
    found = fleet.look(*LEFT)["fleet", "skew"]
    assert (found.judged, found.left_out) == (10, ())


def test_an_active_majority_is_waited_for_but_not_for_ever(tmp_path):
    fleet = Fleet(tmp_path, drift=replace(DRIFT, patience_seconds=60.0))
    slow = [f"slow-{i}" for i in range(6)]
    fleet.join(*LEFT, *slow)
    fleet.send(*slow, windows=1)
    assert fleet.look(*LEFT) == {}
    fleet.now += 60 * SECOND
    found = fleet.check()["fleet", "skew"]
    assert found.judged == 10
    assert {name for name, _ in found.left_out} == set(slow)
    fleet.close()


def test_windows_from_before_the_artifact_was_published_are_judged_later(fleet):
    fleet.join(*LEFT)
    path = next(fleet.config.registry.rglob("*.onnx"))
    hidden = path.rename(fleet.folder / "hidden")
    fleet.send(*LEFT, judged=False)
    assert fleet.check() == {}
    assert fleet.windows.figures().unjudged == 20
    hidden.rename(path)
    fleet.again()
    assert fleet.check()["fleet", "skew"].outcome == "stable"
    assert fleet.windows.figures().unjudged == 0


# ── what a look comes to ───────────────────────────────────────────────────────────────────────────────


def test_a_fleet_like_the_training_is_stable_and_its_first_looks_are_its_past(fleet):
    fleet.join(*LEFT)
    first = outcomes(fleet.look(*LEFT))
    assert first == {("fleet", "skew"): "stable"}
    for _ in range(2):
        fleet.look(*LEFT)
    kept = fleet.ledger.first_looks(fleet.digest)
    assert [one.index for one in kept] == [0, 1, 2]
    assert {r.device for one in kept for r in one.readings} == set(LEFT)
    later = outcomes(fleet.look(*LEFT))
    assert set(later.values()) == {"stable"}
    assert {kind for _, kind in later} >= {"skew", "drift", "sensor", "prediction", "performance"}
    assert fleet.ledger.first_looks(fleet.digest) == kept
    assert fleet.incidents() == fleet.incidents(closed=True) == set()
    assert fleet.told() == []


def test_a_moved_cohort_warns_then_opens_incidents_and_asks_once_for_a_better_model(fleet):
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    fleet.join(*RIGHT, wrist="right")

    def both():
        fleet.send(*RIGHT, shift=2.0, right=0.4)
        return fleet.look(*LEFT)

    first = outcomes(both())
    assert first["wrist=right", "skew"] == "warning"
    assert first["wrist=left", "skew"] == "stable"
    assert fleet.incidents() == set()
    second = both()
    assert second["wrist=right", "skew"].outcome == "drifted"
    assert second["wrist=right", "skew"].moved == ("a",)
    assert second["wrist=right", "performance"].outcome == "drifted"
    assert second["wrist=left", "performance"].outcome == "stable"
    assert {("wrist=right", "a", "skew"), ("wrist=right", "the accuracy", "performance")} <= fleet.incidents()
    ((_, document),) = fleet.ledger.retrains("waiting")
    both()
    assert len(fleet.ledger.table("retrains")) == 1
    asked = json.loads(document)
    assert (asked["schema"], asked["cohort"], asked["digest"]) == (2, "wrist=right", fleet.digest)
    assert {d["device"] for d in asked["devices"]} == set(RIGHT)
    assert {alarm["kind"] for alarm in asked["alarms"]} >= {"skew", "performance"}
    assert "retrain request" in {row["what"] for row in fleet.ledger.table("audit")}


def test_newcomers_that_are_worse_do_not_get_used_to_it(fleet):
    """Their own past begins with what opened the incident: it must not close it."""
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    fleet.join(*RIGHT, wrist="right")
    for _ in range(DRIFT.baseline_looks + DRIFT.clear_confirmations + 2):
        fleet.send(*RIGHT, shift=2.0, right=0.4)
        fleet.look(*LEFT)
    assert {("wrist=right", "a", "skew"), ("wrist=right", "the accuracy", "performance")} <= fleet.incidents()
    assert fleet.incidents(closed=True) == set()


def test_a_device_all_of_whose_rows_are_refused_is_judged(fleet):
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    for _ in range(3):
        dead = replace(
            fleet.arrival(LEFT[0], fleet.seq, 0.0, 0.8, True).window,
            seq=fleet.seq + 1000,
            seq_lo=fleet.seq + 1000,
            profile=empty_profile(fleet.tiny.reference.spec, probabilities=True),
            refused=(("missing", 2 * ROWS),),
            labelled=0,
            correct=0,
        )
        fleet.windows.append([Arrival(window=dead, payload=encode(dead), judged=True)], [], [], fleet.now)
        fleet.look(*LEFT[1:])
    assert ("fleet", "refused rows", "sensor") in fleet.incidents()


def test_what_becomes_of_incidents_is_told_with_their_numbers(fleet):
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    for _ in range(2):
        fleet.look(*LEFT, shift=2.0, right=0.4)
    opened = [e for e in fleet.told() if e["event"] == "opened"]
    assert {(e["cohort"], e["feature"] or e["kind"]) for e in opened} >= {
        ("fleet", "a"),
        ("fleet", "performance"),
    }
    rows = {row["id"]: row for row in fleet.ledger.table("incidents")}
    assert all(rows[e["incident"]]["kind"] == e["kind"] for e in opened)
    for _ in range(4):
        fleet.look(*LEFT)
    closed = [e for e in fleet.told() if e["event"] == "closed"]
    assert {e["incident"] for e in closed} == {e["incident"] for e in opened} == set(rows)
    assert fleet.incidents() == set()
    audited = [row["what"] for row in fleet.ledger.table("audit") if "incident" in row["what"]]
    assert audited[::-1] == [
        f"{e['event']} incident {e['incident']}: {e['kind']} of {e['cohort']}" for e in fleet.told()
    ]


def test_an_incident_closes_when_the_world_comes_back(fleet):
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    while not fleet.incidents():
        fleet.look(*LEFT, shift=2.0)
    assert ("fleet", "a", "drift") in fleet.incidents()
    found = [outcomes(fleet.look(*LEFT))["fleet", "drift"] for _ in range(2)]
    assert found == ["drifted", "stable"]
    assert ("fleet", "a", "drift") in fleet.incidents(closed=True)


def test_what_stands_is_of_the_last_look_alone(fleet):
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    fleet.look(*LEFT)
    assert ("sensor") in {v.kind for v in fleet.ledger.verdicts()}
    few = LEFT[:4]
    for name in LEFT[4:]:
        fleet.join(name, online=False)
    fleet.look(*few)
    assert {v.look for v in fleet.ledger.verdicts()} == {4}


# ── a better model ─────────────────────────────────────────────────────────────────────────────────────


def worsen(fleet):
    for _ in range(3):
        fleet.look(*LEFT, shift=2.0, right=0.4)


def test_without_a_command_the_request_is_only_recorded(tmp_path):
    fleet = Fleet(tmp_path, command=())
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    worsen(fleet)
    assert [row["state"] for row in fleet.ledger.table("retrains")] == ["recorded"]
    fleet.close()


def test_after_one_request_a_model_cools_down(fleet):
    wish = RetrainRequest(model=MODEL, digest=B, cohort="fleet", at_ns=fleet.now, why="drift", document="{}")
    with fleet.ledger.transaction():
        fleet.ledger.put_retrain(wish, "done")
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    worsen(fleet)
    assert [row["digest"] for row in fleet.ledger.table("retrains")] == [B]
    fleet.now += int(fleet.config.retrain.cooldown_seconds) * SECOND
    fleet.look(*LEFT, shift=2.0, right=0.4)
    assert [row["digest"] for row in fleet.ledger.table("retrains")] == [fleet.digest, B]


def test_harmless_drift_asks_for_nothing(fleet):
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    for _ in range(4):
        fleet.look(*LEFT, shift=0.3)
    assert ("fleet", "a", "drift") in fleet.incidents()
    assert not {kind for _, _, kind in fleet.incidents()} & {"prediction", "performance"}
    assert fleet.ledger.table("retrains") == ()


# ── deaths and restarts ────────────────────────────────────────────────────────────────────────────────

STORY = (
    *[{}] * 4,
    {"shift": 2.0, "right": 0.4},
    {"shift": 2.0, "right": 0.4},
    {"shift": 2.0, "right": 0.4},
    {},
    {},
    {},
)
"""Looks: the world moves after the fourth, and comes back after the seventh."""


def suspect(fleet, k):
    """One device that is a little odd from the fourth look on: enough to be named when it is so again in the next."""
    return {"shift": 0.75} if k >= 3 else {}


def tell(fleet, after_each):
    fleet.join(*LEFT)
    for k, options in enumerate(STORY):
        fleet.send("left-0", **{**options, **suspect(fleet, k)})
        fleet.look(*LEFT[1:], **options)
        after_each(fleet)
    return fleet.remembered()


def test_a_process_that_ends_after_every_look_leaves_the_same_as_one_that_never_ends(tmp_path):
    once, often = Fleet(tmp_path / "once"), Fleet(tmp_path / "often")
    through = tell(once, lambda it: None)
    restarted = tell(often, Fleet.again)
    assert once.incidents(closed=True)
    assert through == restarted
    once.close()
    often.close()


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("at", ["put_look", "put_traces", "put_tellings", "put_retrain"])
def test_what_fails_between_a_look_and_its_commit_is_judged_again_from_what_the_ledger_holds(
    tmp_path, monkeypatch, at
):
    whole, broken = Fleet(tmp_path / "whole"), Fleet(tmp_path / "broken")
    plain = getattr(broken.ledger, at)
    cuts: list[int] = []

    def fail_every_other_time(*arguments):
        result = plain(*arguments)
        cuts.append(len(cuts) % 2)
        if not cuts[-1]:
            raise PowerCut
        return result

    monkeypatch.setattr(broken.ledger, at, fail_every_other_time)
    check = broken.monitor.check

    def until_it_holds(devices, now_ns):
        before = broken.remembered()
        while True:
            try:
                return check(devices, now_ns)
            except PowerCut:
                assert broken.remembered() == before

    monkeypatch.setattr(broken.monitor, "check", until_it_holds)
    assert tell(broken, lambda it: None) == tell(whole, lambda it: None)
    assert cuts.count(0) == cuts.count(1) > 0
    assert broken.told() == whole.told()
    whole.close()
    broken.close()


def test_a_restart_takes_no_look_twice(fleet):
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    fleet.again()
    assert fleet.check() == {}
    fleet.look(*LEFT)
    assert [row["look"] for row in fleet.ledger.table("looks")] == [1, 0]


# ── the fleet moves on ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("restarted", [False, True])
def test_an_incident_retires_when_the_fleet_serves_another_artifact(fleet, restarted):
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    worsen(fleet)
    open_ones = fleet.incidents()
    assert open_ones
    fleet.forget_told()
    if restarted:
        fleet.again()
    fleet.join(*LEFT[:9], serving=B)
    fleet.check()
    assert fleet.incidents() == open_ones  # one still serves it
    fleet.join(*LEFT, serving=B)
    fleet.check()
    assert fleet.incidents() == set()
    assert fleet.ledger.alarming() == ()
    assert {row["closed_why"] for row in fleet.ledger.table("incidents")} == {
        "no online device of the cohort serves the artifact any more"
    }
    assert [e["event"] for e in fleet.told()] == ["closed"] * len(open_ones)
    assert "drifted" not in {v.outcome for v in fleet.ledger.verdicts()}
    fleet.join(*LEFT)
    fleet.look(*LEFT, shift=2.0, right=0.4)  # and back again: it begins anew
    assert fleet.check() == {}


@pytest.mark.parametrize("last", [[], LEFT[:1]])
def test_a_judge_is_let_go_of_when_the_fleet_serves_another_artifact(fleet, last):
    """It is large. While one device serves its artifact, or all are away for an hour, it is needed again."""
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    judge = weakref.ref(fleet.monitor._judges[fleet.digest])
    for name in LEFT:
        fleet.join(name, online=False)
    fleet.check()
    assert judge() is not None
    fleet.join(*LEFT, serving=B)
    fleet.join(*last)
    fleet.check()
    gc.collect()
    assert (judge() is not None) == bool(last)


def test_a_judge_that_was_let_go_of_goes_on_as_one_that_was_kept(tmp_path):
    gone, kept = Fleet(tmp_path / "gone"), Fleet(tmp_path / "kept")
    for fleet in (gone, kept):
        fleet.join(*LEFT)
        fleet.settle(*LEFT)
        fleet.join(*LEFT, serving=B if fleet is gone else None)
        fleet.check()
        assert bool(fleet.monitor._judges) == (fleet is kept)
        fleet.join(*LEFT)
        for _ in range(2):
            fleet.look(*LEFT, shift=2.0)
    assert gone.incidents()
    assert gone.remembered() == kept.remembered()
    gone.close()
    kept.close()


# ── the telemetry store is another one ─────────────────────────────────────────────────────────────────


def replace_windows(fleet, copied=None):
    """The telemetry store is moved away, and ``copied`` put in its place, if any."""
    fleet.close()
    path = fleet.config.windows_path
    path.unlink()
    if copied is not None:
        shutil.copy(copied, path)
    fleet.open()


def test_a_store_that_was_moved_away_does_not_silence_drift(fleet, caplog):
    fleet.join(*LEFT)
    fleet.settle(*LEFT)
    with fleet.ledger.transaction():
        fleet.ledger.put_label_cursor(fleet.digest, DeviceId("left-0"), 7)
    replace_windows(fleet)
    (told,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert told.startswith("telemetry_went_back windows=0 labels=0 cursors=10 label_cursors=1: ")
    assert set(fleet.ledger.cursors().values()) == set(fleet.ledger.label_cursors().values()) == {0}
    for _ in range(2):
        assert fleet.look(*LEFT, shift=2.0)
    assert ("fleet", "a", "drift") in fleet.incidents()
    looks = fleet.ledger.table("looks")
    fleet.again()
    assert (fleet.check(), fleet.ledger.table("looks")) == ({}, looks)
    assert len([r for r in caplog.records if r.levelname == "WARNING" and "went_back" in r.getMessage()]) == 1


def test_a_store_that_was_restored_goes_on_from_what_it_holds(fleet, caplog):
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    fleet.send(*LEFT)
    fleet.windows.append([], [], [], NOW, labels=[labels(seq=seq) for seq in (1, 2)])
    fleet.close()
    backup = shutil.copy(fleet.config.windows_path, fleet.folder / "backup.sqlite")
    fleet.open()
    fleet.check()
    with fleet.ledger.transaction():
        fleet.ledger.put_label_cursor(fleet.digest, DeviceId("left-0"), 2)
    few = LEFT[:5]
    for name in LEFT[5:]:
        fleet.join(name, serving=B)
    fleet.look(*few)
    before = fleet.ledger.cursors()
    replace_windows(fleet, backup)
    highest, _ = fleet.windows.numbered()
    assert fleet.ledger.cursors() == {key: min(last, highest) for key, last in before.items()} != before
    assert set(fleet.ledger.label_cursors().values()) == {2}
    assert f"windows={highest} labels=2 cursors=5 label_cursors=0" in caplog.text
    assert fleet.check() == {}  # all that it holds was looked at
    assert fleet.look(*few)


def test_a_store_that_is_the_ledgers_own_is_not_spoken_of(fleet, caplog):
    fleet.join(*LEFT)
    fleet.look(*LEFT)
    cursors = fleet.ledger.cursors()
    fleet.again()
    assert fleet.ledger.cursors() == cursors
    assert "went_back" not in caplog.text


def test_the_artifact_under_test_is_sound(fleet):
    info = fleet.registry.info(fleet.digest)
    assert info.manifest.name == MODEL
    for _, profile in info.reference.groups:
        check_profile(profile, info)
