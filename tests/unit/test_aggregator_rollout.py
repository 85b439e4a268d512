"""The rollout's table, its thresholds, and its gates."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregator.core import gates, rollout
from aggregator.core.gates import Evidence
from aggregator.records import DeviceTotals, Gates, Rollout
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import CohortId, DeviceId, RolloutId
from edge_runtime.contract.latency import observe_ns
from edge_runtime.contract.release import EVERYONE, TrialGate, desired, stage_hash
from tests.support.fleet import FLEET, MODEL, NOW, SECOND, A, B, device

GATES = Gates(bake_seconds=10.0, min_labelled=100)


def draft(**changes: object) -> Rollout:
    made = Rollout(
        rollout=RolloutId("r1"),
        cohort=CohortId("main"),
        model=MODEL,
        candidate=B,
        incumbent=A,
        stages=(2, 0.5, 1.0),
        gates=GATES,
        trial=TrialGate(),
        attempt=1,
        by="me",
        why="because",
        created_ns=NOW,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def fleet(n, **options):
    return [device(f"dev-{i}", **options) for i in range(n)]


def told(r, devices):
    """The devices that the release tells to run the candidate."""
    release = rollout.release_of(r, FLEET, 1)
    return {d.device for d in devices if desired(release, d.device) == B}


# ── the table ──────────────────────────────────────────────────────────────────────────────────────────


def test_final_states_have_no_way_out_but_one():
    ways = {(s, v) for s, v in rollout.TRANSITIONS if s not in rollout.ACTIVE}
    assert ways == {("completed", "roll_back")}


def test_every_active_state_can_be_halted_and_rolled_back():
    for state in rollout.ACTIVE:
        assert rollout.TRANSITIONS[state, "halt"] == "halted"
        assert rollout.TRANSITIONS[state, "roll_back"] == "rolled_back"


def test_only_running_completes():
    assert [s for (s, v), after in rollout.TRANSITIONS.items() if after == "completed"] == ["running"]


def test_a_forbidden_step_says_what_is_allowed():
    with pytest.raises(
        ContractError, match="is halted, so it cannot resume: devices were told already to run what"
    ):
        rollout.resume(draft(state="halted"), "", NOW)
    with pytest.raises(
        ContractError, match="is completed, so it cannot halt: what is left to do is roll back"
    ):
        rollout.end(draft(state="completed"), "halt", "")


# ── stages ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stage_of_k_tells_exactly_k_online_devices():
    devices = fleet(10)
    r = rollout.begin(draft(), devices, NOW)
    assert (r.state, r.stage, r.cap) == ("running", 1, 2)
    chosen = told(r, devices)
    assert len(chosen) == 2
    r = rollout.advance(r, devices, NOW)
    assert len(told(r, devices)) == 5
    assert chosen < told(r, devices)
    r = rollout.advance(r, devices, NOW)
    assert (r.threshold, told(r, devices)) == (EVERYONE, {d.device for d in devices})


def test_offline_devices_and_other_cohorts_and_models_are_no_canaries():
    others = [device("off", online=False), device("else", cohort="beta"), replace(device("bare"), models=())]
    assert rollout.begin(draft(), others, NOW) == draft()
    r = rollout.begin(draft(stages=(5, 1.0)), [*others, device("dev-1")], NOW)
    assert r.threshold == stage_hash(DeviceId("dev-1"), r.rollout) + 1


def test_a_rollout_to_everyone_waits_for_nobody():
    r = rollout.begin(draft(stages=(1.0,)), [], NOW)
    assert (r.state, r.threshold, r.cap) == ("running", EVERYONE, rollout.NO_CAP)


def test_a_share_rounds_up_to_at_least_one():
    assert rollout.begin(draft(stages=(0.01, 1.0)), fleet(10), NOW).cap == 1
    assert rollout.begin(draft(stages=(0.25, 1.0)), fleet(10), NOW).cap == 3


def test_a_device_that_comes_back_below_the_threshold_pushes_another_out():
    devices = fleet(10)
    ranked = sorted(devices, key=lambda d: stage_hash(d.device, RolloutId("r1")))
    away = replace(ranked[0], online=False)
    r = rollout.begin(draft(), [away, *ranked[1:]], NOW)
    assert told(r, ranked[1:]) == {ranked[1].device, ranked[2].device}
    tight = rollout.tighten(r, ranked)
    assert told(tight, ranked) == {ranked[0].device, ranked[1].device}
    assert tight.threshold < r.threshold
    assert rollout.tighten(tight, [away, *ranked[1:]]) == tight  # leaving again raises nothing


def test_a_stage_that_begins_with_most_devices_away_keeps_the_room_of_the_one_before():
    devices = fleet(8)
    first = rollout.begin(draft(stages=(3, 0.25, 1.0)), devices, NOW)
    chosen = told(first, devices)
    away = [replace(d, online=d.device == min(chosen)) for d in devices]
    second = rollout.advance(first, away, NOW)
    assert second.cap == 3
    assert told(rollout.tighten(second, devices), devices) == chosen


def test_a_later_stage_never_falls_behind_an_earlier_one():
    devices = fleet(10)
    r = rollout.begin(draft(stages=(8, 0.5, 1.0)), devices, NOW)
    shrunk = [replace(d, online=i < 8) for i, d in enumerate(devices)]
    later = rollout.advance(r, shrunk, NOW)
    assert later.threshold >= r.threshold
    assert len([d for d in shrunk if d.online and d.device in told(later, shrunk)]) <= later.cap


def test_an_end_exposes_nobody_and_only_completion_promotes():
    devices = fleet(4)
    running = rollout.begin(draft(stages=(1.0,)), devices, NOW)
    for verb, incumbent in (("halt", A), ("roll_back", A), ("finish", B)):
        release = rollout.release_of(rollout.end(running, verb, "x"), FLEET, 2)
        assert (release.candidate, release.incumbent, release.threshold) == (None, incumbent, 0)
    back = rollout.release_of(rollout.end(rollout.end(running, "finish", ""), "roll_back", ""), FLEET, 3)
    assert (back.candidate, back.incumbent) == (None, A)


def test_the_last_stage_can_only_be_finished():
    with pytest.raises(ContractError, match="finish it"):
        rollout.advance(rollout.begin(draft(stages=(1.0,)), fleet(1), NOW), fleet(1), NOW)


# ── gates ──────────────────────────────────────────────────────────────────────────────────────────────

RUNNING = draft(state="running", stage=1, cap=2, threshold=EVERYONE, revision=3, stage_since_ns=NOW)
GOOD: dict[str, Any] = {"state": "committed", "serving": B, "rollout": "r1", "revision": 3}


def judge(members, evidence=Evidence(), *, r=RUNNING, ready_for=None, now=NOW):  # noqa: B008
    if ready_for is not None:
        r = replace(r, ready_since_ns=now - int(ready_for * SECOND))
    return gates.judge(r, gates.standing(r, members), evidence, now)


def totals(name="dev-0", rows=1000, *, digest=B, failed=0, refused=0, labelled=0, correct=0):
    return DeviceTotals(
        device=DeviceId(name),
        digest=digest,
        windows=1,
        rows=rows,
        failed=failed,
        refused=refused,
        labelled=labelled,
        correct=correct,
        wire_bytes=1,
        rss_bytes=1,
        peak_rss_bytes=1,
        first_ns=NOW,
        last_ns=NOW,
    )


def test_a_stage_waits_for_commits_then_bakes_then_goes():
    waiting = fleet(2, state="trial", serving=B)
    assert "0 of 2 devices committed" in judge(waiting).why
    done = fleet(2, **GOOD)
    assert judge(done) == gates.Outcome(action="wait", why="baking: 0 of 10 s", ready=True)
    assert judge(done, ready_for=9.9).action == "wait"
    assert judge(done, ready_for=10).action == "go"


def test_a_trial_is_no_commit_and_the_incumbent_is_none_either():
    assert not gates.committed(device("d", **{**GOOD, "state": "trial"}), RUNNING)
    assert not gates.committed(device("d", **{**GOOD, "serving": A}), RUNNING)
    assert gates.committed(device("d", **GOOD), RUNNING)


def test_who_runs_the_candidate_for_another_reason_has_not_committed():
    """A device that refuses this rollout's releases, because they are older than what it follows, runs it as well."""
    assert not gates.committed(device("d", **{**GOOD, "rollout": "r0", "revision": 1011}), RUNNING)
    assert not gates.committed(device("d", **{**GOOD, "revision": RUNNING.revision - 1}), RUNNING)
    assert gates.committed(device("d", **{**GOOD, "revision": RUNNING.revision + 5}), RUNNING)


def test_a_device_that_has_not_heard_of_the_next_stage_has_still_committed():
    later = replace(RUNNING, stage=2, cap=rollout.NO_CAP)
    assert rollout.release_of(later, FLEET, RUNNING.revision + 1).revision > later.revision
    assert gates.committed(device("d", **GOOD), later)


def test_a_stage_says_whom_it_waits_for():
    late = [device(f"late-{i}", state="fetching") for i in range(5)]
    away = device("away", online=False)
    found = judge([*fleet(2, **GOOD), *late, away]).why
    assert found == (
        "2 of 7 devices committed; 7 are needed, so it waits for late-0, late-1, late-2 and 2 more"
    )


def test_devices_that_went_offline_do_not_hold_a_stage_up_for_ever():
    here, away = fleet(3, **GOOD), [device(f"off-{i}", online=False) for i in range(3)]
    assert judge([*here, *away], ready_for=10).action == "go"
    assert "can be heard" in judge([*here[:2], *away], ready_for=10).why
    assert judge([*here, *[device("slow", state="fetching")]], ready_for=10).action == "wait"
    assert judge([]).action == "wait"


def test_a_device_that_committed_and_went_offline_counts():
    assert judge(fleet(2, online=False, **GOOD), ready_for=10).action == "go"


@pytest.mark.parametrize(
    "report",
    [
        {"outcome": "refused", "outcome_digest": B, "reason": "too slow"},
        {"outcome": "rolled_back", "outcome_digest": B, "reason": "too slow"},
    ],
)
def test_a_refusal_halts(report):
    failed = device("dev-9", rollout="r1", revision=3, **report)
    found = judge([*fleet(1, **GOOD), failed], ready_for=10)
    assert found.action == "halt"
    assert "dev-9" in found.why
    tolerant = replace(RUNNING, gates=replace(GATES, max_failures=1))
    assert judge([*fleet(1, **GOOD), failed], r=tolerant, ready_for=10).action == "go"


def test_a_quarantine_that_the_attempt_may_lift_does_not_count():
    held = device("dev-9", rollout="r1", revision=3, quarantined=(B,), serving=A)
    assert judge([held]).action == "wait"


@pytest.mark.parametrize("report", [{"rollout": "r0", "revision": 9}, {"rollout": "r1", "revision": 2}])
def test_a_refusal_under_an_earlier_release_does_not_count(report):
    old = device("dev-9", outcome="refused", outcome_digest=B, **report)
    assert judge([old]).action == "wait"


def test_bad_rows_halt_unless_the_incumbent_has_as_many():
    done = fleet(2, **GOOD)
    bad = Evidence(candidate=(totals(rows=950, refused=30, failed=20),))
    assert judge(done, bad).action == "halt"
    both = replace(bad, control=(totals(rows=950, refused=50, digest=A),))
    assert judge(done, both, ready_for=10).action == "go"
    few = Evidence(candidate=(totals(rows=45, refused=5),))
    assert judge(done, few, ready_for=10).action == "wait"


def test_a_stage_waits_for_its_rows():
    r = replace(RUNNING, gates=replace(GATES, min_rows=500))
    assert judge(fleet(1, **GOOD), r=r, ready_for=10).why == "0 of 500 rows were seen by the candidate"
    seen = Evidence(candidate=(totals(rows=500),))
    assert judge(fleet(1, **GOOD), seen, r=r, ready_for=10).action == "go"


def latencies(n, each_ns):
    return observe_ns(np.full(n, each_ns, np.int64))


def test_the_median_latency_is_held_against_the_incumbents():
    done = fleet(2, **GOOD)
    slow = Evidence(candidate_latency=latencies(500, 400_000), control_latency=latencies(500, 100_000))
    assert judge(done, slow).action == "halt"
    assert "4.0 times" in judge(done, slow).why
    few = replace(slow, candidate_latency=latencies(199, 400_000))
    assert judge(done, few, ready_for=10).action == "go"
    fine = replace(slow, candidate_latency=latencies(500, 250_000))
    assert judge(done, fine, ready_for=10).action == "go"


def accuracy(right, labelled=1000, *, own=900, rest=500):
    return Evidence(
        candidate=(totals(labelled=labelled, correct=right),),
        control=(
            totals(labelled=1000, correct=own, digest=A),
            totals("dev-7", labelled=1000, correct=rest, digest=A),
        ),
    )


def test_accuracy_is_held_against_the_same_devices_before():
    done = fleet(2, **GOOD)
    assert judge(done, accuracy(860), ready_for=10).action == "go"
    assert judge(done, accuracy(800), ready_for=10).action == "wait"  # worse, but not beyond doubt
    assert judge(done, accuracy(500), ready_for=10).action == "halt"
    assert "on the same devices" in judge(done, accuracy(500)).why
    assert judge(done, accuracy(50, 99), ready_for=10).action == "go"  # too few answers to say


def test_accuracy_is_held_against_the_rest_where_the_devices_have_no_past():
    done = fleet(2, **GOOD)
    rest = replace(accuracy(300), control=(totals("dev-7", labelled=1000, correct=900, digest=A),))
    assert "elsewhere" in judge(done, rest).why
    first = replace(RUNNING, incumbent=None)
    assert judge(done, rest, r=first, ready_for=10).action == "go"


def test_wilson_bound():
    assert gates.wilson_upper(0, 0, 3) == 1.0
    assert gates.wilson_upper(50, 100, 1.96) == pytest.approx(0.5960, abs=1e-3)
    assert gates.wilson_upper(0, 100, 1.96) == pytest.approx(0.0370, abs=1e-3)
