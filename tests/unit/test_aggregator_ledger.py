"""The control state survives as it was, and says so to other processes."""

import sqlite3
from dataclasses import replace

import pytest

from aggregator.adapters.ledger import Ledger
from aggregator.records import (
    AuditEntry,
    DeviceRecord,
    Figure,
    Gates,
    Judgement,
    RetrainRequest,
    Rollout,
    Track,
    Trail,
    Unit,
    Verdict,
)
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import CohortId, DeviceId, RolloutId
from edge_runtime.contract.release import EVERYONE, Release, TrialGate
from tests.support.fleet import FLEET, MODEL, NOW, OTHER_SESSION, SESSION, A, B, C, report, window

MAIN = CohortId("main")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    made = Ledger(path)
    yield made
    made.close()


def reopened(path, read):
    """What another process reads."""
    other = Ledger(path, read_only=True)
    try:
        return read(other)
    finally:
        other.close()


def test_a_device_is_kept_whole(ledger, path):
    full = DeviceRecord(
        device=DeviceId("dev-1"),
        session=SESSION,
        seq=7,
        online=True,
        attributes=(("cohort", "beta"), ("wrist", "left")),
        models=(
            report(
                state="rolled_back",
                serving=A,
                previous=B,
                candidate=C,
                rollout="r1",
                revision=3,
                outcome="refused",
                outcome_digest=C,
                reason="x" * 2000,
                quarantined=(B, C),
            ),
            report(),
        ),
        last_seen_ns=NOW,
        ended=(OTHER_SESSION,),
        doubted_ns=5,
        last_exit="killed for memory",
        restarts=4,
        clock="unsynced",
    )
    bare = DeviceRecord(device=DeviceId("a"), session=SESSION, seq=-1, online=False)
    with ledger.transaction():
        ledger.put_device(replace(full, seq=1))
        ledger.put_device(full)
        ledger.put_device(bare)
    assert reopened(path, Ledger.devices) == (bare, full)


def test_a_ledger_of_the_version_before_is_taken_forward(tmp_path):
    path = tmp_path / "before.sqlite"
    kept = DeviceRecord(device=DeviceId("a"), session=SESSION, seq=3, online=True)
    ledger = Ledger(path)
    with ledger.transaction():
        ledger.put_device(kept)
    ledger.close()
    with sqlite3.connect(path) as db:
        for column in ("last_exit", "restarts", "clock"):
            db.execute(f"ALTER TABLE devices DROP COLUMN {column}")
        db.execute("PRAGMA user_version=1")
    db.close()
    ledger = Ledger(path)
    assert ledger.devices() == (kept,)
    with ledger.transaction():
        ledger.put_device(replace(kept, last_exit="terminated", restarts=1, clock="synced"))
    ledger.close()
    assert reopened(path, Ledger.devices) == (
        replace(kept, last_exit="terminated", restarts=1, clock="synced"),
    )


ROLLOUT = Rollout(
    rollout=RolloutId("r1"),
    cohort=MAIN,
    model=MODEL,
    candidate=B,
    incumbent=None,
    stages=(1, 0.5, 1.0),
    gates=Gates(bake_seconds=0.5, max_failures=2),
    trial=TrialGate(predictions=9, seconds=1.5, starts=2),
    attempt=2,
    by="ann",
    why="w" * 5000,
    created_ns=NOW,
    state="running",
    stage=3,
    cap=-1,
    threshold=EVERYONE,
    stage_since_ns=NOW + 1,
    ready_since_ns=NOW + 2,
    revision=4,
    note="n",
)
RELEASE = Release(
    fleet=FLEET,
    cohort=MAIN,
    model=MODEL,
    rollout=RolloutId("r1"),
    revision=4,
    threshold=EVERYONE,
    candidate=B,
    incumbent=None,
)


@pytest.mark.parametrize(
    "rollout", [ROLLOUT, replace(ROLLOUT, ready_since_ns=None, incumbent=A, cap=3), None], ids=str
)
@pytest.mark.parametrize("release", [RELEASE, None])
def test_a_track_is_kept_whole(ledger, path, rollout, release):
    track = Track(cohort=MAIN, model=MODEL, release=release, rollout=rollout)
    with ledger.transaction():
        ledger.put_track(track)
    assert reopened(path, Ledger.tracks) == (track,)
    assert reopened(path, lambda it: it.rollout("r1")) == rollout


def test_a_revision_never_falls(ledger, path):
    for revision in (4, 9, 5):
        with ledger.transaction():
            ledger.put_track(Track(cohort=MAIN, model=MODEL, release=replace(RELEASE, revision=revision)))
    assert reopened(path, Ledger.revisions) == {MAIN: 9}


def test_finished_rollouts_stay_to_be_looked_up(ledger):
    with ledger.transaction():
        ledger.put_track(Track(cohort=MAIN, model=MODEL, rollout=ROLLOUT))
        ledger.put_track(Track(cohort=MAIN, model=MODEL, rollout=replace(ROLLOUT, rollout=RolloutId("r2"))))
    assert ledger.rollout("r1") == ROLLOUT
    assert {row["rollout"] for row in ledger.table("rollouts")} == {"r1", "r2"}
    assert ledger.rollout("r3") is None


def test_a_transaction_is_kept_whole_or_not_at_all(ledger):
    entry = AuditEntry(at_ns=NOW, who="ann", what="start", why="because", cohort="main", model=MODEL)

    def fail_in_the_middle():
        with ledger.transaction():
            ledger.put_audit(entry)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle()
    assert ledger.table("audit") == ()
    with ledger.transaction():
        ledger.put_audit(entry)
    (row,) = ledger.table("audit")
    assert (row["who"], row["what"], row["why"], row["rollout"]) == ("ann", "start", "because", "")


def test_orders_come_from_other_processes_and_are_answered(ledger, path):
    other = Ledger(path)
    first = other.request("halt", {"model": MODEL}, by="ann", why="no", now_ns=NOW)
    second = other.request("resume", {"model": MODEL}, by="bob", why="yes", now_ns=NOW)
    assert [(r.number, r.kind, r.by, r.why) for r in ledger.pending()] == [
        (first, "halt", "ann", "no"),
        (second, "resume", "bob", "yes"),
    ]
    with ledger.transaction():
        ledger.put_answer(first, accepted=False, reason="there is none")
    assert [r.number for r in ledger.pending()] == [second]
    assert other.answer(first) == ("refused", "there is none")
    assert other.answer(second) == ("pending", "")
    with pytest.raises(KeyError):
        other.answer(99)
    other.close()


FIGURE = Figure(
    name="a",
    p=0.001,
    statistic=4.5,
    moved=True,
    psi=0.3,
    ks=0.2,
    js_bits=0.1,
    wasserstein_sd=0.4,
    mean_shift_sd=-0.4,
    missing=(0.0, 0.25),
    cut=1.5,
    below=(0.5, 0.3),
    broad=0.9,
)
VERDICT = Verdict(
    kind="skew",
    model=MODEL,
    digest=A,
    cohort="fleet",
    at_ns=NOW,
    outcome="warning",
    reason="a moved",
    judgement=Judgement(
        outcome="moved",
        reason="a moved",
        p=0.001,
        alpha=0.01,
        reference_units=6,
        fleet_units=10,
        permutations=8008,
        exact=True,
        figures=(FIGURE, replace(FIGURE, name="b", moved=False)),
    ),
    devices=(DeviceId("dev-1"), DeviceId("dev-2")),
    left_out=((DeviceId("dev-3"), "3 of 100 rows"),),
    streak=1,
    first=3,
    last=9,
)


def put(ledger, *verdicts):
    with ledger.transaction():
        for verdict in verdicts:
            ledger.put_verdict(verdict, look=True)


def test_a_verdict_is_kept_whole_and_the_newest_stands(ledger, path):
    put(
        ledger,
        replace(VERDICT, outcome="stable"),
        VERDICT,
        replace(VERDICT, cohort="wrist=left", at_ns=NOW + 1),
    )
    newest, fleet = reopened(path, Ledger.verdicts)
    assert newest.cohort == "wrist=left"
    assert fleet == VERDICT
    assert len(ledger.table("looks")) == 3
    assert ledger.table("looks")[0]["moved"] == ["a"]
    assert ledger.trails()[0] == Trail(
        model=MODEL, digest=A, cohort="fleet", kind="skew", streak=1, clear=0, incident=False
    )


def test_one_incident_grows_and_closes(ledger):
    opened = replace(VERDICT, incident=True, changed="opened", streak=2)
    b_moved = replace(VERDICT.judgement, figures=(replace(FIGURE, name="b"),))
    put(ledger, VERDICT, opened, replace(VERDICT, incident=True, at_ns=NOW + 5, judgement=b_moved))
    (row,) = ledger.table("incidents")
    assert (row["columns"], row["opened_ns"], row["updated_ns"], row["closed_ns"]) == (
        ["a", "b"],
        NOW,
        NOW + 5,
        None,
    )
    put(ledger, replace(VERDICT, changed="closed", at_ns=NOW + 9, reason="calm"))
    (row,) = ledger.table("incidents")
    assert (row["closed_ns"], row["closed_why"]) == (NOW + 9, "calm")
    put(ledger, replace(opened, at_ns=NOW + 10))
    assert len(ledger.table("incidents")) == 2


def test_two_incidents_of_one_kind_cannot_be_open(ledger):
    opened = replace(VERDICT, incident=True, changed="opened")
    put(ledger, opened)
    with pytest.raises(sqlite3.IntegrityError):
        put(ledger, opened)
    assert len(ledger.table("looks")) == 1


def test_a_retired_incident_closes_and_its_verdict_goes(ledger):
    put(ledger, replace(VERDICT, incident=True, changed="opened"))
    (trail,) = ledger.trails()
    with ledger.transaction():
        ledger.retire(trail, NOW + 7, "moved on")
    assert ledger.trails() == ()
    assert ledger.table("incidents")[0]["closed_why"] == "moved on"


def test_a_baseline_is_kept_once(ledger, path):
    units = tuple(
        Unit(device=DeviceId(f"dev-{i}"), profile=window(f"dev-{i}").profile, labelled=9, correct=i)
        for i in range(3)
    )
    with ledger.transaction():
        ledger.put_baseline(A, units, NOW)
        ledger.put_baseline(A, units[:1], NOW)
    assert reopened(path, lambda it: it.baseline(A)) == units
    assert ledger.baseline(B) is None


def test_a_devices_origin_is_kept_once(ledger, path):
    first, second = window(seq=1).profile, window(seq=2).profile
    with ledger.transaction():
        ledger.put_origin(A, DeviceId("dev-1"), first)
        ledger.put_origin(A, DeviceId("dev-1"), second)
        ledger.put_origin(B, DeviceId("dev-1"), second)
    assert reopened(path, lambda it: it.origins(A)) == {"dev-1": first}


def test_cursors(ledger, path):
    with ledger.transaction():
        ledger.put_cursor(A, DeviceId("dev-1"), 4)
        ledger.put_cursor(A, DeviceId("dev-1"), 9)
        ledger.put_cursor(B, DeviceId("dev-1"), 2)
    assert reopened(path, Ledger.cursors) == {(A, "dev-1"): 9, (B, "dev-1"): 2}


def test_retrain_requests_move_from_state_to_state(ledger):
    wish = RetrainRequest(model=MODEL, digest=A, cohort="fleet", at_ns=NOW, why="drift", document='{"x": 1}')
    assert ledger.asked(MODEL) == (frozenset(), None)
    with ledger.transaction():
        number = ledger.put_retrain(wish, "waiting")
    assert ledger.retrains("waiting") == ((number, '{"x": 1}'),)
    assert ledger.asked(MODEL) == ({A}, NOW)
    ledger.move_retrain(number, "running")
    ledger.move_retrain(number, "failed", exit_code=3, output="boom", ended_ns=NOW + 1)
    assert ledger.retrains("waiting") == ()
    (row,) = ledger.table("retrains")
    assert (row["state"], row["exit_code"], row["output"], row["document"]) == ("failed", 3, "boom", {"x": 1})


def test_a_reader_cannot_write(ledger, path):
    reader = Ledger(path, read_only=True)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.request("halt", {}, by="", why="", now_ns=0)
    reader.close()


def test_there_is_no_reading_what_was_never_written(tmp_path):
    with pytest.raises(ConfigError, match="start the aggregator first"):
        Ledger(tmp_path / "none.sqlite", read_only=True)
