"""The states a model passes through on a device, one transition at a time."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.release import ShadowGate, TrialGate, stage_hash
from edge_runtime.core.lifecycle import (
    MAX_QUARANTINE,
    MAX_REASON,
    TRANSITIONS,
    Phase,
    SlotState,
    accept,
    activate,
    begin_shadow,
    begin_trial,
    broken,
    commit,
    compare,
    fail,
    from_document,
    leave_shadow,
    needs,
    progress,
    refuse,
    switch,
    to_document,
    withdraw,
)
from tests.support.device import DEVICE, GATE, MODEL, A, B, C, P, cpu, digest, release

EMPTY = SlotState(model=MODEL)
SETTLED = SlotState(model=MODEL, committed=A, previous=P)


def trying(slots=SETTLED, model=B, attempt=1, gate=GATE) -> Any:
    return begin_trial(slots, model, attempt=attempt, gate=gate)


def served(slots, predictions=1, seconds=1.0) -> Any:
    return progress(slots, predictions=predictions, seconds=seconds, cpu=cpu(predictions))


# ── what a release asks for ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wanted", "serving", "have", "quarantine", "answer"),
    [
        (B, A, (A, P), {}, ("install", B)),
        (A, A, (A, P), {}, ("keep", A)),
        (P, A, (A, P), {}, ("switch", P)),
        (None, A, (A, P), {}, ("keep", None)),
        (B, A, (A, P), {B: 1}, ("skip_quarantined", B)),
        (B, A, (A, P), {B: 0}, ("install", B)),
        (B, None, (), {}, ("install", B)),
        (B, B, (A, P), {B: 9}, ("keep", B)),
        (A, B, (A, P), {}, ("switch", A)),
    ],
)
def test_needs(wanted, serving, have, quarantine, answer):
    document = release(wanted, attempt=1)
    assert needs(document, DEVICE, serving=serving, have=have, quarantine=quarantine) == answer


def test_a_higher_attempt_lifts_a_quarantine():
    document = release(B, attempt=3)
    assert needs(document, DEVICE, serving=A, have=(), quarantine={B: 3})[0] == "skip_quarantined"
    assert needs(document, DEVICE, serving=A, have=(), quarantine={B: 2})[0] == "install"


def test_the_threshold_decides_between_candidate_and_incumbent():
    place = stage_hash(DEVICE, release(B).rollout)
    outside = release(B, A, threshold=place)
    inside = release(B, A, threshold=place + 1)
    assert needs(outside, DEVICE, serving=None, have=(), quarantine={}) == ("install", A)
    assert needs(inside, DEVICE, serving=None, have=(), quarantine={}) == ("install", B)


# ── a trial ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_trial_serves_and_keeps_the_committed_model_beside_it():
    slots = trying()
    assert slots.serving == B
    assert slots.known == (A, P, B)
    assert slots.outcome == ""


def test_every_start_without_progress_costs_one_and_the_last_one_ends_the_trial():
    slots = trying(gate=TrialGate(starts=2))
    slots = activate(activate(slots))
    assert slots.trial is not None
    slots = activate(slots)
    assert slots.trial is None
    assert slots.serving == A
    assert dict(slots.quarantine) == {B: 1}
    assert slots.reason == "made no progress in 2 starts"


def test_a_device_switched_off_every_night_does_not_condemn_a_good_model():
    slots = trying(gate=TrialGate(predictions=10_000, starts=1))
    for _ in range(50):
        slots = served(activate(slots))
    assert slots.trial is not None
    assert slots.trial.predictions == 50


def test_progress_of_an_earlier_start_does_not_pay_for_two():
    slots = served(activate(trying(gate=TrialGate(starts=1))))
    slots = activate(slots)  # paid for by the progress
    assert slots.trial is not None
    assert activate(slots).trial is None


def test_no_predictions_are_no_progress():
    slots = activate(trying())
    assert served(slots, predictions=0) == slots


def test_a_trial_passes_with_both_predictions_and_seconds():
    slots = trying(gate=TrialGate(predictions=10, seconds=5.0))
    assert not served(slots, 10, 4.0).trial.passed
    assert not served(slots, 9, 6.0).trial.passed
    assert served(slots, 10, 5.0).trial.passed


def test_commit_keeps_the_model_to_go_back_to_and_drops_the_one_before():
    slots = commit(trying())
    assert (slots.committed, slots.previous, slots.trial) == (B, A, None)
    assert slots.known == (B, A)
    assert (slots.outcome, slots.outcome_digest) == ("committed", B)


def test_fail_goes_back_and_quarantines():
    slots = fail(trying(attempt=4), "too slow")
    assert (slots.serving, slots.outcome, slots.outcome_digest, slots.reason) == (
        A,
        "rolled_back",
        B,
        "too slow",
    )
    assert dict(slots.quarantine) == {B: 4}


def test_without_a_trial_there_is_nothing_to_commit_fail_or_withdraw():
    assert commit(SETTLED) == fail(SETTLED, "x") == withdraw(SETTLED) == activate(SETTLED) == SETTLED


def test_a_withdrawn_trial_is_not_held_against_the_model():
    slots = withdraw(trying())
    assert slots.serving == A
    assert slots.quarantine == ()


# ── quarantine ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_trial_that_is_withdrawn_leaves_an_older_quarantine_in_place():
    held = refuse(SETTLED, B, attempt=2, reason="golden rows")
    assert dict(withdraw(trying(held, attempt=3)).quarantine) == {B: 2}


def test_a_commit_clears_the_quarantine():
    held = refuse(SETTLED, B, attempt=2, reason="golden rows")
    assert commit(trying(held, attempt=3)).quarantine == ()


def test_a_quarantine_never_falls_to_a_lower_attempt():
    held = refuse(refuse(SETTLED, B, attempt=3, reason="x"), B, attempt=1, reason="revoked")
    assert dict(held.quarantine) == {B: 3}


def test_the_quarantine_is_bounded_and_forgets_the_oldest():
    slots = SETTLED
    for k in range(MAX_QUARANTINE + 5):
        slots = refuse(slots, digest(f"m{k}"), attempt=1, reason="x")
    assert len(slots.quarantine) == MAX_QUARANTINE
    assert slots.quarantine[0][0] == digest("m5")


# ── releases ───────────────────────────────────────────────────────────────────────────────────────────


def test_floors_are_kept_by_cohort_and_are_those_of_the_last_release_that_was_verified():
    slots = accept(EMPTY, release(B, revision=7))
    slots = accept(slots, release(B, revision=3, cohort="other"))
    assert slots.floor("main") == 7
    assert accept(slots, release(B, revision=1)).floor("main") == 1  # of a new director key
    assert slots.floor("other") == 3
    assert slots.floor("never-heard-of") == 0


def test_a_new_rollout_starts_with_a_clean_slate():
    slots = fail(trying(accept(SETTLED, release(B, rollout="r1"))), "too slow")
    assert accept(slots, release(C, rollout="r1", revision=2)).outcome == "rolled_back"
    fresh = accept(slots, release(B, rollout="r2", revision=3, attempt=2))
    assert (fresh.outcome, fresh.outcome_digest, fresh.reason) == ("", None, "")
    assert dict(fresh.quarantine) == {B: 1}


# ── going back ─────────────────────────────────────────────────────────────────────────────────────────


def test_switch_to_the_model_before():
    slots = switch(SETTLED, P)
    assert (slots.committed, slots.previous) == (P, A)


def test_switch_to_the_committed_model_ends_a_trial():
    assert switch(trying(), A).trial is None


def test_switch_to_a_stranger_is_refused():
    with pytest.raises(ContractError, match="neither the committed model nor the one before"):
        switch(SETTLED, C)


def test_a_broken_trial_fails():
    slots = broken(trying(), B, "truncated")
    assert slots.serving == A
    assert dict(slots.quarantine) == {B: 1}


def test_a_broken_committed_model_falls_back_and_says_so():
    slots = broken(SETTLED, A, "disk")
    assert (slots.committed, slots.previous) == (P, None)
    assert (slots.outcome, slots.outcome_digest, slots.reason) == ("rolled_back", A, "disk")
    assert slots.quarantine == ()


def test_the_only_model_is_never_forgotten():
    only = SlotState(model=MODEL, committed=A)
    assert broken(only, A, "no memory").serving == A


def test_a_broken_previous_model_is_dropped_and_a_stranger_changes_nothing():
    assert broken(SETTLED, P, "disk").previous is None
    assert broken(SETTLED, C, "disk") == SETTLED


# ── the document ───────────────────────────────────────────────────────────────────────────────────────


def full() -> Any:
    slots = served(trying(accept(refuse(SETTLED, C, attempt=2, reason="no"), release(B, revision=9))), 7, 2.5)
    return replace(slots, reason="é", outcome="refused")


@pytest.mark.parametrize("slots", [EMPTY, SETTLED, full()], ids=["empty", "settled", "trial"])
def test_the_document_survives_json(slots):
    assert from_document(json.loads(json.dumps(to_document(slots))), MODEL) == slots


def test_a_long_reason_is_kept_short_enough_to_be_read_again():
    slots = refuse(SETTLED, B, attempt=1, reason="x" * 100_000)
    assert len(slots.reason) == MAX_REASON
    assert from_document(json.loads(json.dumps(to_document(slots))), MODEL) == slots


def test_a_reason_with_lone_surrogates_is_made_fit_for_the_wire():
    assert fail(trying(), "\ud800 bad path").reason == "? bad path"


def test_a_document_without_cpu_times_is_read():
    document = to_document(full())
    del document["trial"]["cpu"]
    trial = from_document(document, MODEL).trial
    assert trial is not None
    assert trial.cpu.count == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "slots.schema"),
        ({"model": "other"}, "the configuration says 'watch': use another state_dir"),
        ({"committed": "../../etc"}, "SHA-256 digest"),
        ({"floors": {"main": -1}}, "slots.floors.main"),
        ({"outcome": "promoted"}, "slots.outcome"),
        ({"quarantine": [{"digest": A}]}, r"quarantine\[0\].attempt"),
        ({"trial": {"digest": A}}, "slots.trial.gate"),
    ],
)
def test_a_damaged_document_is_refused_by_the_field(change, message):
    with pytest.raises(ContractError, match=message):
        from_document({**to_document(full()), **change}, MODEL)


# ── all of it ──────────────────────────────────────────────────────────────────────────────────────────

ONCE = TrialGate(predictions=1, seconds=0.0, starts=1)


def steps(slots: SlotState) -> Iterator[tuple[str, SlotState]]:
    """Whatever may happen to a device of three models, by the name of the function that says so."""
    for model in (A, B, C):
        if model != slots.committed and (slots.trial is None or slots.trial.digest != model):
            yield "begin_trial", begin_trial(slots, model, attempt=2, gate=ONCE)
            if slots.committed is not None:
                shadow = ShadowGate(rows=1)
                yield (
                    "begin_shadow",
                    begin_shadow(slots, model, attempt=2, gate=ONCE, shadow=shadow),
                )
        yield "refuse", refuse(slots, model, attempt=1, reason="slow")
        if model in (slots.committed, slots.previous):
            yield "switch", switch(slots, model)
        if model in slots.known:
            yield "broken", broken(slots, model, "worn")
    if slots.shadowing is not None:
        yield "compare", compare(slots, rows=1, disagreed=0)
        yield "leave_shadow", leave_shadow(slots)
    if slots.on_trial:
        yield "progress", progress(slots, predictions=1, seconds=1.0, cpu=cpu(1))
        yield "commit", commit(slots)
    if slots.trial is not None:
        yield "fail", fail(slots, "bad")
        yield "withdraw", withdraw(slots)
        yield "activate", activate(slots)


def plain(slots: SlotState) -> SlotState:
    """The state without what only counts: so that there are few of them."""
    trial = slots.trial
    if trial is not None:
        trial = replace(trial, predictions=0, seconds=0.0, compared=0, disagreed=0, cpu=cpu(0), attempt=1)
    quarantine = tuple(sorted((model, 1) for model, _ in slots.quarantine))
    bare = SlotState(model=MODEL, committed=slots.committed, previous=slots.previous)
    return replace(bare, trial=trial, quarantine=quarantine)


def test_the_table_has_every_step_that_can_be_taken_and_no_other():
    start = SlotState(model=MODEL)
    seen, todo = {start}, [start]
    taken: dict[str, dict[Phase, set[Phase]]] = {}
    while todo:
        before = todo.pop()
        for verb, after in steps(before):
            for model in (A, B, C):
                was, now = before.phase(model), after.phase(model)
                if was != now:
                    taken.setdefault(verb, {}).setdefault(was, set()).add(now)
            assert before.committed is None or after.committed is not None, verb
            assert (after.serving is None) == (after.known == ()), verb
            if verb not in ("broken", "commit", "switch"):
                assert (after.committed, after.previous) == (before.committed, before.previous), verb
            assert from_document(json.loads(json.dumps(to_document(after))), MODEL) == after
            if (kept := plain(after)) not in seen:
                seen.add(kept)
                todo.append(kept)
    assert len(seen) > 1000
    assert taken == {
        verb: {was: set(found) for was, found in rows.items()} for verb, rows in TRANSITIONS.items()
    }
