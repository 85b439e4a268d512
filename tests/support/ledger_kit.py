"""What any ledger must do: the kit that every implementation of `aggregator.stores.LedgerStore` passes.

A test class derives from `LedgerKit` and gives the fixture ``opened``: what opens the same ledger again and again.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from aggregator.adapters import documents
from aggregator.adapters.ledger.control import TAKEN
from aggregator.looks import Alarm, Estimate, Familiar, Look, Reading, Slice, Trace, Verdict
from aggregator.records import (
    AuditEntry,
    DeviceRecord,
    Gates,
    Lease,
    LeaseLost,
    RetrainRequest,
    Rollout,
    Telling,
    Track,
)
from aggregator.stores import LedgerStore, StoreError
from edge_runtime.contract.ids import CohortId, DeviceId, RolloutId
from edge_runtime.contract.release import EVERYONE, Release, TrialGate
from tests.support.fleet import FLEET, MODEL, NOW, OTHER_SESSION, SESSION, A, B, C, report, window

MAIN = CohortId("main")


Opener = Callable[..., LedgerStore]


def reopened(opened, read):
    """What another process reads."""
    other = opened(read_only=True)
    try:
        return read(other)
    finally:
        other.close()


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


VERDICT = Verdict(
    kind="skew",
    model=MODEL,
    digest=A,
    cohort="fleet",
    at_ns=NOW,
    outcome="warning",
    reason="a moved" * 1000,
    p=1.25e-17,
    look=3,
    judged=10,
    moved=("a", "the predictions"),
    devices=(DeviceId("dev-1"), DeviceId("dev-2")),
    left_out=((DeviceId("dev-3"), "3 of 100 rows"),),
)
ALARM = Alarm(
    kind="drift",
    feature="a",
    cohort="fleet",
    opened_window=4,
    closed_window=None,
    devices=(DeviceId("dev-1"), DeviceId("dev-2")),
    severity="ticket",
    why="a moved up by 0.50 standard deviations",
    evidence=(("p", 5e-324), ("psi", 0.1 + 0.2), ("device", "dev-1"), ("cell", 3.0)),
)
OUTPUT = replace(ALARM, kind="performance", feature=None, severity="page", evidence=())
OPEN = Trace(cohort="fleet", key="a", streak=2, alarm=ALARM)
FAMILIAR = Familiar(
    psi=0.3,
    ks=0.2,
    chi2=11.0,
    js=0.1,
    wasserstein_sd=0.4,
    mean_shift_sd=-0.4,
    sd_ratio=1.1,
    cut=1.5,
    below=(0.5, 0.3),
    missing=(0.0, 0.25),
    non_finite=(0.0, 0.0),
    repeated=(0.1, 0.1),
)
LOOK = Look(
    index=0,
    devices=10,
    rows=5000,
    figures={"a": FAMILIAR},
    estimate=Estimate(estimated=0.8, half=0.1, known=0.75, labelled=900),
    suspects={"a": (DeviceId("dev-2"),), "b": (DeviceId("dev-1"), DeviceId("dev-2"))},
)


def put(ledger, *verdicts):
    with ledger.transaction():
        ledger.put_verdicts(A, verdicts)


def remember(ledger, *traces, at=NOW, digest=A):
    """What became of incidents, by what happened and number."""
    with ledger.transaction():
        return [(e.what, e.number) for e in ledger.put_traces(digest, MODEL, traces, at)]


def reading(device="dev-1", seq=1):
    w = window(device, seq)
    return Reading(
        device=w.device,
        profile=w.profile,
        start_ns=w.start_ns,
        end_ns=w.end_ns,
        windows=3,
        labelled=9,
        correct=seq,
        refused=(("layout", 2), ("width", 1)),
    )


def told(sink, incident, *, text="{}"):
    """An event on its way."""
    return Telling(sink=sink, incident=incident, at_ns=NOW, text=text)


class LedgerKit:
    """The tests; derive from it and give ``opened``."""

    @pytest.fixture
    def opened(self) -> Opener:
        """Opens the test's own ledger, new at first, as a writer or ``read_only``."""
        raise NotImplementedError

    @pytest.fixture
    def ledger(self, opened):
        made = opened()
        yield made
        made.close()

    def test_a_device_is_kept_whole(self, ledger, opened):
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
            ended=((OTHER_SESSION, 3),),
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
        assert reopened(opened, lambda it: it.devices()) == (bare, full)

    @pytest.mark.parametrize(
        "rollout", [ROLLOUT, replace(ROLLOUT, ready_since_ns=None, incumbent=A, cap=3), None], ids=str
    )
    @pytest.mark.parametrize("release", [RELEASE, None])
    def test_a_track_is_kept_whole(self, ledger, opened, rollout, release):
        track = Track(cohort=MAIN, model=MODEL, release=release, rollout=rollout)
        with ledger.transaction():
            ledger.put_track(track)
        assert reopened(opened, lambda it: it.tracks()) == (track,)
        assert reopened(opened, lambda it: it.rollout("r1")) == rollout

    def test_a_revision_never_falls(self, ledger, opened):
        for revision in (4, 9, 5):
            with ledger.transaction():
                ledger.put_track(Track(cohort=MAIN, model=MODEL, release=replace(RELEASE, revision=revision)))
        assert reopened(opened, lambda it: it.revisions()) == {MAIN: 9}

    def test_finished_rollouts_stay_to_be_looked_up(self, ledger):
        with ledger.transaction():
            ledger.put_track(Track(cohort=MAIN, model=MODEL, rollout=ROLLOUT))
            ledger.put_track(
                Track(cohort=MAIN, model=MODEL, rollout=replace(ROLLOUT, rollout=RolloutId("r2")))
            )
        assert ledger.rollout("r1") == ROLLOUT
        assert {row["rollout"] for row in ledger.table("rollouts")} == {"r1", "r2"}
        assert ledger.rollout("r3") is None
        assert ledger.cohorts() == {"r1": MAIN, "r2": MAIN}

    def test_a_transaction_is_kept_whole_or_not_at_all(self, ledger):
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

    def test_orders_come_from_other_processes_and_are_answered(self, ledger, opened):
        other = opened()
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
        assert other.answer(second) == ("pending", TAKEN)
        with pytest.raises(KeyError):
            other.answer(99)
        other.close()

    def test_an_order_is_withdrawn_unless_somebody_has_taken_it(self, ledger, opened):
        other = opened()
        first, second = (other.request("halt", {}, by="ann", why="", now_ns=NOW) for _ in range(2))
        assert other.withdraw(first) == ("withdrawn", "")
        assert [r.number for r in ledger.pending()] == [second]
        assert other.withdraw(second) == ("pending", TAKEN)
        assert [r.number for r in ledger.pending()] == [second]  # whoever leads next, takes it too
        with ledger.transaction():
            ledger.put_answer(second, accepted=True, reason="r1")
        assert other.withdraw(second) == ("accepted", "r1")
        assert other.answer(first) == ("withdrawn", "")
        other.close()

    def test_what_stands_for_an_artifact_is_kept_whole_in_the_place_of_what_stood(self, ledger, opened):
        other = replace(VERDICT, digest=B, at_ns=NOW + 1)
        with ledger.transaction():
            ledger.put_verdicts(B, (other,))
        put(ledger, replace(VERDICT, cohort="wrist=left"), replace(VERDICT, kind="quality"))
        later = replace(VERDICT, at_ns=NOW + 2, outcome="stable")
        put(ledger, replace(later, cohort="wrist=left"), later)
        assert reopened(opened, lambda it: it.verdicts()) == (
            later,
            replace(later, cohort="wrist=left"),
            other,
        )

    def test_looks_are_counted_and_shown(self, ledger, opened):
        assert ledger.next_look(A) == 0
        assert ledger.suspects(A) == {}
        with ledger.transaction():
            ledger.put_look(A, MODEL, LOOK, NOW)
            ledger.put_look(A, MODEL, replace(LOOK, index=1, suspects={}), NOW + 1, 7)
            ledger.put_look(B, MODEL, LOOK, NOW)
        assert reopened(opened, lambda it: (it.next_look(A), it.next_look(B), it.next_look(C))) == (2, 1, 0)
        assert reopened(opened, lambda it: (it.suspects(A), it.suspects(B))) == ({}, LOOK.suspects)
        newest = ledger.table("looks")[0]
        assert (newest["look"], newest["devices"], newest["row_count"]) == (1, 10, 5000)
        assert newest["document"]["figures"]["a"]["psi"] == 0.3
        assert newest["document"]["estimate"]["known"] == 0.75
        times = [
            (row["digest"], row["look"], row["at_ns"], row["newest"]) for row in ledger.table("look_times")
        ]
        assert times == [(A, 1, NOW + 1, 7), (A, 0, NOW, 0), (B, 0, NOW, 0)]
        assert "document" not in ledger.table("look_times")[0]

    def test_old_looks_are_forgotten_but_each_artifacts_last(self, ledger):
        with ledger.transaction():
            for index in range(4):
                ledger.put_look(A, MODEL, replace(LOOK, index=index), NOW + index)
            ledger.put_look(B, MODEL, replace(LOOK, index=5), NOW)
        ledger.prune_looks(NOW + 2)
        assert [(row["digest"], row["look"]) for row in ledger.table("look_times")] == [
            (A, 3),
            (A, 2),
            (B, 5),
        ]
        ledger.prune_looks(NOW + 100)
        assert [(row["digest"], row["look"]) for row in ledger.table("look_times")] == [(A, 3), (B, 5)]
        assert (ledger.next_look(A), ledger.next_look(B), ledger.suspects(A)) == (4, 6, LOOK.suspects)

    def test_first_looks_are_kept_whole_and_once(self, ledger, opened):
        looks = tuple(
            Slice(
                index=index,
                start_ns=NOW,
                end_ns=reading().end_ns,
                readings=(reading("dev-1", index + 1), reading("dev-2", index + 1)),
            )
            for index in (0, 2)
        )
        with ledger.transaction():
            for one in looks:
                ledger.put_first_look(A, one)
            ledger.put_first_look(A, replace(looks[0], readings=(reading("dev-1", 9),)))
        assert reopened(opened, lambda it: it.first_looks(A)) == looks
        assert ledger.first_looks(B) == ()

    def test_traces_are_kept_whole(self, ledger, opened):
        traces = (
            OPEN,
            Trace(cohort="fleet", key="b", streak=1),
            Trace(cohort="fleet", key="the accuracy", streak=5, clear=1, alarm=OUTPUT),
            Trace(cohort="wrist=left", key="a", clear=7),
        )
        remember(ledger, *reversed(traces))
        remember(ledger, replace(OPEN, streak=9), digest=B)
        assert reopened(opened, lambda it: it.traces(A)) == traces
        remember(ledger, replace(traces[1], streak=0, clear=1))
        assert ledger.traces(A)[1] == replace(traces[1], streak=0, clear=1)
        assert ledger.traces(A)[0] == OPEN

    @pytest.mark.parametrize(
        "alarm", [ALARM, OUTPUT, replace(ALARM, why="\u2603 " * 9000, feature="f" * 256)], ids=["a", "b", "c"]
    )
    def test_an_alarm_is_kept_exactly(self, ledger, opened, alarm):
        trace = replace(OPEN, alarm=alarm)
        remember(ledger, trace)
        (kept,) = reopened(opened, lambda it: it.traces(A))
        assert kept == trace
        assert [type(value) for _, value in kept.alarm.evidence] == [type(v) for _, v in alarm.evidence]

    def test_an_incident_opens_escalates_and_closes(self, ledger):
        assert remember(ledger, replace(OPEN, alarm=None, streak=1)) == []
        assert ledger.table("incidents") == ()
        assert remember(ledger, OPEN) == [("opened", 1)]
        assert remember(ledger, OPEN, at=NOW + 1) == []
        worse = replace(ALARM, severity="page", kind="quality", devices=(DeviceId("dev-7"),))
        assert remember(ledger, replace(OPEN, streak=3, alarm=worse), at=NOW + 2) == [("escalated", 1)]
        (row,) = ledger.table("incidents")
        assert (row["kind"], row["severity"], row["column_key"]) == ("quality", "page", "a")
        assert (row["opened_ns"], row["updated_ns"], row["closed_ns"]) == (NOW, NOW + 2, None)
        assert documents.read_alarm(json.dumps(row["document"])) == worse
        assert remember(ledger, Trace(cohort="fleet", key="a"), at=NOW + 3) == [("closed", 1)]
        (row,) = ledger.table("incidents")
        assert (row["closed_ns"], row["closed_why"]) == (NOW + 3, "the column looks as it did before")
        assert remember(ledger, OPEN, at=NOW + 4) == [("opened", 2)]
        assert [row["id"] for row in ledger.table("incidents")] == [2, 1]

    def test_the_artifacts_with_open_incidents(self, ledger):
        remember(ledger, OPEN, Trace(cohort="wrist=left", key="a", streak=2, alarm=ALARM))
        remember(ledger, OPEN, digest=B)
        remember(ledger, Trace(cohort="fleet", key="a", streak=1), digest=C)
        assert ledger.alarming() == ((A, MODEL), (B, MODEL))
        remember(ledger, replace(OPEN, alarm=None), digest=B)
        assert ledger.alarming() == ((A, MODEL),)

    def test_a_column_has_one_open_incident(self, ledger, opened):
        remember(ledger, OPEN)
        with pytest.raises(StoreError), ledger.transaction():
            ledger._open(A, MODEL, OPEN, ALARM, NOW)  # the database itself holds to it
        assert len(reopened(opened, lambda it: it.table("incidents"))) == 1

    def test_an_open_incident_is_acknowledged_once_by_anybody(self, ledger, opened):
        remember(ledger, OPEN, Trace(cohort="fleet", key="b", alarm=ALARM))
        remember(ledger, Trace(cohort="fleet", key="b"))
        other = opened()
        assert other.acknowledge(1, by="ann", at_ns=NOW + 5)
        assert not other.acknowledge(1, by="bob", at_ns=NOW + 6)
        assert not other.acknowledge(2, by="bob", at_ns=NOW + 6)
        assert not other.acknowledge(99, by="bob", at_ns=NOW + 6)
        other.close()
        closed, seen = ledger.table("incidents")
        assert (seen["acknowledged_by"], seen["acknowledged_ns"]) == ("ann", NOW + 5)
        assert (closed["acknowledged_by"], closed["acknowledged_ns"]) == ("", None)
        (entry,) = ledger.table("audit")
        assert (entry["who"], entry["what"], entry["model"]) == ("ann", "acknowledged incident 1", MODEL)
        remember(ledger, replace(OPEN, streak=9), at=NOW + 7)
        assert ledger.table("incidents")[1]["acknowledged_by"] == "ann"

    def test_a_retired_incident_closes_and_its_verdict_goes(self, ledger):
        calm = Trace(cohort="fleet", key="b", streak=1)
        remember(ledger, OPEN, calm)
        put(ledger, replace(VERDICT, kind="drift"), VERDICT)
        with ledger.transaction():
            (event,) = ledger.retire(A, MODEL, OPEN, NOW + 7, "moved on")
            assert ledger.retire(A, MODEL, calm, NOW + 7, "moved on") == ()
        assert (event.what, event.number, event.alarm, event.why) == ("closed", 1, ALARM, "moved on")
        assert ledger.traces(A) == ()
        assert ledger.alarming() == ()
        assert ledger.verdicts() == (VERDICT,)
        (row,) = ledger.table("incidents")
        assert (row["closed_ns"], row["closed_why"]) == (NOW + 7, "moved on")

    def test_cursors(self, ledger, opened):
        with ledger.transaction():
            ledger.put_cursor(A, DeviceId("dev-1"), 4)
            ledger.put_cursor(A, DeviceId("dev-1"), 9)
            ledger.put_cursor(B, DeviceId("dev-1"), 2)
        assert reopened(opened, lambda it: it.cursors()) == {(A, "dev-1"): 9, (B, "dev-1"): 2}

    def test_retrain_requests_move_from_state_to_state(self, ledger):
        wish = RetrainRequest(
            model=MODEL, digest=A, cohort="fleet", at_ns=NOW, why="drift", document='{"x": 1}'
        )
        assert ledger.asked(MODEL) == (frozenset(), None)
        with ledger.transaction():
            number = ledger.put_retrain(wish, "waiting")
        assert ledger.retrains("waiting") == ((number, '{"x": 1}'),)
        assert ledger.asked(MODEL) == ({A}, NOW)
        ledger.move_retrain(number, "running")
        ledger.move_retrain(number, "failed", exit_code=3, output="boom", ended_ns=NOW + 1)
        assert ledger.retrains("waiting") == ()
        (row,) = ledger.table("retrains")
        assert (row["state"], row["exit_code"], row["output"], row["document"]) == (
            "failed",
            3,
            "boom",
            {"x": 1},
        )

    def test_a_reader_cannot_write(self, ledger, opened):
        reader = opened(read_only=True)
        with pytest.raises(StoreError, match=r"read-?only"):
            reader.request("halt", {}, by="", why="", now_ns=0)
        reader.close()

    def test_what_is_not_committed_is_nobody_elses(self, ledger, opened):
        entry = AuditEntry(at_ns=NOW, who="ann", what="start", why="because")
        with ledger.transaction():
            ledger.put_audit(entry)
            assert len(ledger.table("audit")) == 1
            assert reopened(opened, lambda it: it.table("audit")) == ()
        assert len(reopened(opened, lambda it: it.table("audit"))) == 1

    def test_transactions_do_not_nest(self, ledger):
        with ledger.transaction():
            ledger.put_audit(AuditEntry(at_ns=NOW, who="ann", what="start", why="because"))
            with pytest.raises(RuntimeError, match="do not nest"):
                ledger.request("halt", {}, by="", why="", now_ns=NOW)
        assert len(ledger.table("audit")) == 1

    def test_a_refused_statement_leaves_the_ledger_usable(self, ledger):
        remember(ledger, OPEN)
        with pytest.raises(StoreError), ledger.transaction():
            ledger._open(A, MODEL, OPEN, ALARM, NOW)
        assert remember(ledger, replace(OPEN, alarm=None)) == [("closed", 1)]

    def test_names_sort_by_their_bytes(self, ledger):
        names = ["a-1", "a0", "a-b", "ab", "b", "b-2"]
        with ledger.transaction():
            for name in reversed(names):
                ledger.put_device(DeviceRecord(device=DeviceId(name), session=SESSION, seq=1, online=True))
        assert [record.device for record in ledger.devices()] == sorted(names)

    def test_the_extremes_of_text_and_numbers(self, ledger, opened):
        odd = DeviceRecord(
            device=DeviceId("dev-1"),
            session=SESSION,
            seq=2**63 - 1,
            online=True,
            attributes=(("a", "nul \0 in JSON"), ("b", "snow \u2603 \U0001f600")),
            last_seen_ns=2**63 - 1,
            last_exit="'quoted' \"twice\" %s :name \\ \u2603",
            restarts=2**53 + 1,
        )
        entry = AuditEntry(at_ns=0, who="ann", what="x", why="nul \0 here")
        with ledger.transaction():
            ledger.put_device(odd)
            ledger.put_audit(entry)
        assert reopened(opened, lambda it: it.devices()) == (odd,)
        assert ledger.table("audit")[0]["why"] == "nul \ufffd here"

    def test_numbers_of_orders_rise_over_restarts(self, ledger, opened):
        first = ledger.request("halt", {}, by="", why="", now_ns=NOW)
        ledger.close()
        again = opened()
        assert again.request("halt", {}, by="", why="", now_ns=NOW) > first
        again.close()

    # ── alarms on their way ────────────────────────────────────────────────────────────────────────────

    def test_what_is_to_be_told_waits_in_its_order_until_it_is_told(self, ledger, opened):
        odd = "\u00e4\n" + "w" * 70_000
        with ledger.transaction():
            ledger.put_tellings([told("mqtt", 1, text=odd), told("webhook", 1)])
            ledger.put_tellings([told("mqtt", 2)])
        first, second, third = reopened(opened, lambda it: it.tellings())
        assert first.number < second.number < third.number
        assert replace(first, number=0) == told("mqtt", 1, text=odd)
        assert (second.sink, third.incident) == ("webhook", 2)
        assert ledger.tellings(first.number) == (second, third)
        with ledger.transaction():
            ledger.put_told([first.number, third.number, third.number + 7])
        assert reopened(opened, lambda it: it.tellings()) == (second,)

    def test_what_is_to_be_told_is_kept_with_its_incident_or_not_at_all(self, ledger):
        def fail():
            with ledger.transaction():
                ledger.put_traces(A, MODEL, (OPEN,), NOW)
                ledger.put_tellings([told("mqtt", 1)])
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert ledger.tellings() == ()
        assert ledger.table("incidents") == ()

    def test_numbers_of_tellings_rise_also_when_all_were_told_and_over_restarts(self, ledger, opened):
        seen = 0
        for _ in range(3):
            other = opened()
            with other.transaction():
                other.put_tellings([told("mqtt", 1)])
            (found,) = other.tellings(seen)
            assert found.number > seen
            seen = found.number
            with other.transaction():
                other.put_told([seen])
            other.close()
        assert ledger.tellings() == ()

    # ── who leads ──────────────────────────────────────────────────────────────────────────────────────

    def test_of_two_who_swap_the_same_lease_one_succeeds(self, ledger, opened):
        other = opened()
        assert ledger.lease() is None
        assert ledger.swap_lease(None, Lease("a", 1))
        assert not other.swap_lease(None, Lease("b", 1))
        assert other.swap_lease(Lease("a", 1), Lease("b", 2))
        assert ledger.lease() == Lease("b", 2)
        other.close()

    def test_a_deposed_leader_writes_nothing_and_others_may(self, ledger, opened):
        entry = AuditEntry(at_ns=NOW, who="ann", what="start", why="because")
        ledger.swap_lease(None, Lease("a", 1))
        ledger.guard(Lease("a", 1))
        with ledger.transaction():
            ledger.put_audit(entry)
        other = opened()
        number = other.request("halt", {}, by="ann", why="because", now_ns=NOW)  # orders need no lease
        other.swap_lease(Lease("a", 1), Lease("b", 2))
        with pytest.raises(LeaseLost), ledger.transaction():
            ledger.put_audit(entry)
        assert len(ledger.table("audit")) == 1
        with pytest.raises(LeaseLost):
            ledger.pending()
        assert [r.number for r in other.pending()] == [number]
        other.close()
