"""A candidate that answers live rows unheard before its trial, one event at a time."""

import random
from dataclasses import replace
from typing import Any

import pytest

from edge_runtime.contract import codec, messages
from edge_runtime.contract.release import ShadowGate, from_payload, to_payload
from edge_runtime.contract.topics import Topics
from edge_runtime.core.agent import Agent
from edge_runtime.core.budget import Budget
from edge_runtime.core.events import (
    Append,
    Collect,
    Connected,
    MessageArrived,
    Publish,
    Save,
    Saved,
    Serve,
    Served,
    ServeFailed,
    Shadow,
    Shadowed,
    Started,
    StartUpdate,
    Ticked,
    Unsaved,
    UpdateEnded,
)
from edge_runtime.core.lifecycle import SlotState, begin_shadow
from edge_runtime.core.probation import PROGRESS_SECONDS, SAVE_SECONDS
from tests.support.device import (
    COHORT,
    FLEET,
    GATE,
    MODEL,
    A,
    B,
    C,
    P,
    closed,
    cpu,
    identity,
    release,
    signed,
)

RELEASES = Topics(FLEET).release(COHORT, MODEL)
SETTLED = SlotState(model=MODEL, committed=A, previous=P)
HALF = ShadowGate(rows=100, max_disagreement=0.2)
WANTED = release(B, A, shadow=HALF)


def decode(payload: bytes) -> Any:
    """The message, of whatever kind the test expects."""
    return codec.decode(payload)


class Bench:
    """An agent whose candidate B has been installed; ``disk`` is what was saved."""

    def __init__(self, slots=SETTLED, *, shadows=True):
        self.agent = Agent(identity(), slots, Budget(), random.Random(1), shadows=shadows)
        self.now = 0.0
        self.refusing = False
        self.disk = slots
        self.actions: list[Any] = []
        self.do(Started())
        self.do(Connected())

    def do(self, event, *, after=0.0):
        self.now += after
        queue, self.actions = [event], []
        while queue:
            for action in self.agent.handle(queue.pop(0), self.now, 1):
                if isinstance(action, Save):
                    if self.refusing and action.needed:
                        queue.append(Unsaved("the disk is full"))
                        break
                    self.disk = self.disk if self.refusing else action.slots
                    queue += [Saved()] if action.needed else []
                self.actions.append(action)

    def install(self, document=WANTED, model=B):
        self.do(MessageArrived(RELEASES, signed(document)))
        self.do(UpdateEnded(ok=True, release=document, installed=True, digest=model))
        return self

    def compare(self, rows=50, disagreed=0, failed="", model=B, after=1.0):
        self.do(Shadowed(digest=model, rows=rows, disagreed=disagreed, failed=failed), after=after)

    def get(self, kind):
        return [action for action in self.actions if isinstance(action, kind)]

    @property
    def slots(self):
        return self.agent.slots

    @property
    def notes(self):
        found = [decode(append.payload) for append in self.get(Append)]
        return {event.name: dict(event.detail) for event in found if isinstance(event, messages.Event)}


def test_an_installed_candidate_goes_into_the_shadow_durably_and_the_incumbent_is_not_touched():
    bench = Bench().install()
    assert bench.get(Shadow) == [Shadow(B)]
    assert bench.get(Serve) == []
    saved = next(i for i, a in enumerate(bench.actions) if isinstance(a, Save) and a.needed)
    assert saved < bench.actions.index(Shadow(B))
    assert (bench.slots.serving, bench.slots.shadowing) == (A, B)
    assert set(bench.slots.known) == {A, P, B}
    [report] = [decode(p.payload).models[0] for p in bench.get(Publish)]
    assert (report.state, report.serving, report.candidate) == ("shadow", A, B)


def test_enough_rows_that_agree_lead_to_the_trial():
    bench = Bench().install()
    bench.compare(rows=60, disagreed=3)
    assert bench.get(Serve) == []
    bench.compare(rows=60, disagreed=2)
    assert bench.get(Serve) == [Serve(B)]
    assert bench.get(Shadow) == [Shadow(None)]
    assert bench.notes["trial"]["rows"] == "120"
    assert bench.notes["trial"]["disagreed"] == "5"
    trial = bench.slots.trial
    assert trial is not None
    assert trial.starts_left == GATE.starts - 1
    assert (bench.slots.shadow_rows, bench.slots.shadow_disagreed) == (120, 5)
    bench.do(Served(digest=B, predictions=300, failed=0, seconds=60.0, cpu=cpu(300), rss_bytes=0), after=60.0)
    assert bench.slots.committed == B
    assert bench.slots.previous == A
    assert (bench.slots.shadow_rows, bench.slots.shadow_disagreed) == (120, 5)


def test_exactly_as_many_rows_as_were_asked_for_are_enough():
    bench = Bench().install()
    bench.compare(rows=HALF.rows - 1)
    assert bench.get(Serve) == []
    bench.compare(rows=1)
    assert bench.get(Serve) == [Serve(B)]


def test_with_nobody_left_to_be_compared_with_the_trial_begins():
    bench = Bench().install()
    bench.compare(rows=10)
    bench.do(Shadowed(digest=B, rows=0, disagreed=0, alone="the incumbent's file is damaged"), after=1.0)
    assert bench.get(Serve) == [Serve(B)]
    assert bench.notes["trial"]["reason"] == "the incumbent's file is damaged"
    assert (bench.slots.quarantine, bench.slots.shadow_rows) == ((), 10)


def test_too_much_disagreement_refuses_the_candidate_as_soon_as_no_row_could_change_it():
    bench = Bench().install()
    bench.compare(rows=30, disagreed=20)
    assert bench.slots.shadowing == B  # 20 of 100 would be allowed
    bench.compare(rows=10, disagreed=1)
    assert bench.get(Shadow) == [Shadow(None)]
    assert bench.get(Serve) == []
    assert bench.slots.outcome == "refused"
    assert dict(bench.slots.quarantine) == {B: 1}
    assert "21 of 40 live rows" in bench.notes["refused"]["reason"]
    assert bench.get(Collect) == [Collect((A, P))]


def test_a_candidate_that_fails_on_live_rows_is_refused():
    bench = Bench().install()
    bench.compare(rows=10, failed="boom")
    assert bench.slots.outcome == "refused"
    assert "boom" in bench.slots.reason


def test_a_shadow_that_cannot_run_is_refused_without_touching_what_serves():
    bench = Bench().install()
    bench.do(ServeFailed(B, "ended 3 times"))
    assert bench.get(Serve) == []
    assert bench.slots.outcome == "refused"
    assert bench.slots.serving == A


@pytest.mark.parametrize(
    ("document", "slots", "shadows"),
    [
        (release(B, A), SETTLED, True),
        (WANTED, SETTLED, False),
        (WANTED, SlotState(model=MODEL), True),
    ],
    ids=["not asked for", "switched off on the device", "nobody to compare with"],
)
def test_without_a_shadow_the_trial_begins_at_once(document, slots, shadows):
    bench = Bench(slots, shadows=shadows).install(document)
    assert bench.get(Serve) == [Serve(B)]
    assert bench.get(Shadow) == []


def test_the_same_wish_again_leaves_the_shadow_alone():
    bench = Bench().install()
    bench.compare(rows=60)
    later = replace(WANTED, revision=2)
    bench.do(MessageArrived(RELEASES, signed(later)))
    [start] = bench.get(StartUpdate)
    assert B in start.have  # neither fetched nor probed again
    bench.do(UpdateEnded(ok=True, release=later, digest=B))
    assert bench.get(Shadow) == []
    bench.compare(rows=60)
    assert bench.slots.serving == B


@pytest.mark.parametrize("wish", [release(None, A, revision=2), release(None, None, revision=2)])
def test_a_wish_for_something_else_ends_the_shadow_and_nothing_is_held_against_it(wish):
    bench = Bench().install()
    bench.do(MessageArrived(RELEASES, signed(wish)))
    bench.do(UpdateEnded(ok=True, release=wish, digest=wish.incumbent))
    assert bench.get(Shadow) == [Shadow(None)]
    assert bench.get(Serve) == []
    assert bench.slots.trial is None
    assert bench.slots.quarantine == ()


def test_a_candidate_that_is_revoked_while_it_is_in_the_shadow_does_not_leave_it():
    bench = Bench().install()
    again = replace(WANTED, revision=2)
    bench.do(MessageArrived(RELEASES, signed(again)))
    bench.do(UpdateEnded(ok=False, release=again, stage="release", reason="revoked", retry=False, digest=B))
    assert bench.get(Shadow) == [Shadow(None)]
    assert (bench.slots.trial, bench.slots.outcome, bench.slots.reason) == (None, "refused", "revoked")
    bench.compare(rows=120)
    assert bench.slots.serving == A
    assert dict(bench.slots.quarantine) == {B: 1}
    assert bench.disk == bench.slots


@pytest.mark.parametrize("on_trial", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_candidate_that_another_was_to_replace_ends_although_that_one_is_refused(on_trial, held):
    bench = Bench(replace(SETTLED, quarantine=((C, 1),)) if held else SETTLED)
    bench.install(release(B, A) if on_trial else WANTED)
    assert bench.slots.serving == (B if on_trial else A)
    other = release(C, A, revision=2, rollout="r2")
    bench.do(MessageArrived(RELEASES, signed(other)))
    if held:
        bench.do(UpdateEnded(ok=True, release=other))
    else:
        bench.do(UpdateEnded(ok=False, release=other, stage="probe", reason="slow", retry=False, digest=C))
    assert (bench.slots.trial, bench.slots.serving) == (None, A)
    assert bench.get(Serve) == ([Serve(A)] if on_trial else [])
    assert dict(bench.slots.quarantine) == {C: 1}
    assert (bench.slots.outcome, bench.slots.outcome_digest) == ("refused", C)
    assert bench.disk == bench.slots


def test_the_first_model_stays_on_trial_when_what_was_to_replace_it_is_refused():
    bench = Bench(SlotState(model=MODEL)).install(release(B, None))
    other = release(C, None, revision=2, rollout="r2")
    bench.do(MessageArrived(RELEASES, signed(other)))
    bench.do(UpdateEnded(ok=False, release=other, stage="probe", reason="slow", retry=False, digest=C))
    assert bench.slots.serving == B


def test_another_candidate_takes_the_place():
    bench = Bench().install()
    bench.install(release(C, A, revision=2, rollout="r2", shadow=HALF), C)
    assert bench.get(Shadow) == [Shadow(C)]
    assert bench.get(Collect) == [Collect((A, P, C))]
    bench.compare(rows=500, model=B)  # what the one before had still to say
    assert bench.slots.shadowing == C


def test_going_back_to_the_previous_model_ends_the_shadow():
    bench = Bench().install()
    wish = release(None, P, revision=2)
    bench.do(MessageArrived(RELEASES, signed(wish)))
    bench.do(UpdateEnded(ok=True, release=wish, digest=P))
    assert bench.get(Serve) == [Serve(P)]
    assert bench.get(Shadow) == [Shadow(None)]


def test_a_restart_goes_on_where_the_disk_knows_and_uses_up_a_start_without_progress():
    begun = begin_shadow(SETTLED, B, attempt=1, gate=GATE, shadow=HALF)
    for starts_left in (2, 1, 0):
        bench = Bench(begun)
        assert bench.get(Serve) == []  # the last event was the connection
        assert bench.slots.shadowing == B
        begun = bench.disk
        assert begun.trial is not None
        assert begun.trial.starts_left == starts_left
    bench = Bench(begun)
    assert bench.slots.trial is None
    assert bench.slots.outcome == "refused"
    assert bench.slots.serving == A


def test_a_device_that_was_told_to_do_without_shadows_meanwhile_begins_the_trial():
    begun = begin_shadow(SETTLED, B, attempt=1, gate=GATE, shadow=HALF)
    bench = Bench(begun, shadows=False)
    assert bench.slots.shadowing is None
    assert bench.slots.serving == B
    assert bench.disk.on_trial


def test_progress_is_saved_at_once_and_then_now_and_again():
    bench = Bench().install()
    for rows, after, saved in ((10, 1.0, 1), (10, 1.0, 0), (10, PROGRESS_SECONDS, 1)):
        bench.compare(rows=rows, after=after)
        assert len(bench.get(Save)) == saved
    assert bench.disk.trial is not None
    assert (bench.disk.trial.compared, bench.disk.trial.progressed) == (30, True)


def test_a_disk_that_refuses_keeps_a_candidate_out_of_the_shadow():
    bench = Bench()
    bench.refusing = True
    bench.install()
    assert bench.get(Shadow) == []
    assert bench.slots.trial is None


def test_a_start_that_the_disk_does_not_count_serves_without_the_shadow():
    bench = Bench(begin_shadow(SETTLED, B, attempt=1, gate=GATE, shadow=HALF))
    again = Bench.__new__(Bench)
    again.agent = Agent(identity(), bench.disk, Budget(), random.Random(1))
    again.now, again.refusing, again.disk = 0.0, True, bench.disk
    again.do(Started())
    assert again.get(Serve) == [Serve(A)]
    assert again.get(Shadow) == []
    again.refusing = False
    again.do(closed(A))  # what answers is not what waits for the disk
    again.do(Ticked(), after=SAVE_SECONDS)
    assert again.get(Shadow) == [Shadow(B)]
    assert again.get(Serve) == []
    again.compare(rows=120)
    assert again.slots.serving == B


def test_a_disk_that_refuses_the_trial_leaves_the_candidate_in_the_shadow_for_a_while():
    bench = Bench().install()
    bench.compare(rows=60, after=PROGRESS_SECONDS)
    bench.refusing = True
    bench.compare(rows=60)
    assert bench.get(Serve) == []
    assert bench.slots.shadowing == B
    bench.refusing = False
    bench.compare(rows=60)
    assert bench.get(Serve) == []
    bench.compare(rows=60, after=SAVE_SECONDS)
    assert bench.get(Serve) == [Serve(B)]


def test_a_release_carries_its_shadow_and_older_ones_have_none():
    assert from_payload(to_payload(WANTED)) == WANTED
    plain = to_payload(WANTED).replace(b'"shadow":{"max_disagreement":0.2,"rows":100},', b"")
    assert plain != to_payload(WANTED)
    assert from_payload(plain).shadow == ShadowGate()
