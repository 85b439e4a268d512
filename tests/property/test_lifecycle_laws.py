"""Laws of a device's models under any sequence of releases, trials, failures, full disks and power cuts.

The machine drives the real `Agent`. Its disk is what the last `Save` wrote, as JSON text, and the blobs; it may refuse
for a while. A power cut may strike before any action of any event; the device then boots from the disk.
"""

import json
import random
from collections import deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_runtime.contract.release import ShadowGate, TrialGate
from edge_runtime.contract.topics import Topics
from edge_runtime.core.agent import Agent
from edge_runtime.core.budget import Budget
from edge_runtime.core.events import (
    Collect,
    Connected,
    Disconnected,
    MessageArrived,
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
from edge_runtime.core.lifecycle import SlotState, from_document, needs, to_document
from tests.support.device import COHORT, DEVICE, FLEET, MODEL, A, B, C, cpu, identity, release, signed

RELEASES = Topics(FLEET).release(COHORT, MODEL)

MODELS = st.sampled_from([A, B, C])
MAYBE = st.one_of(st.none(), MODELS)


class Device(RuleBasedStateMachine):
    """One device, its disk and its update child."""

    def __init__(self):
        super().__init__()
        self.disk = json.dumps(to_document(SlotState(model=MODEL)))
        self.blobs = set()
        self.damaged = set()
        self.held = {}
        self.committed_once = False
        self.releases = {}
        self.retained = b""
        self.revision = 0
        self.now = 0.0
        self.boots = 0
        self.cut = None
        self.refusing = False
        self.behind = False
        self.alone = False
        self.boot()

    # ── the world around the agent ─────────────────────────────────────────────────────────────────────

    @property
    def state(self):
        return from_document(json.loads(self.disk), MODEL)

    @property
    def in_service(self):
        return self.agent.tried or self.agent.slots.committed

    def boot(self):
        self.boots += 1
        self.child = None
        self.loaded = None
        self.failing = None
        self.shadowing: Any = None
        self.agent = Agent(
            identity(session=f"{self.boots:016x}"),
            self.state,
            Budget(predict_p99_ns=1_000_000),
            random.Random(self.boots),
        )
        self.do(Started())
        self.connect()

    def connect(self):
        self.do(Connected())
        if self.retained:
            self.do(MessageArrived(RELEASES, self.retained))

    def do(self, event):
        self.now += 0.25
        queue = deque([event])
        while queue:
            for action in self.agent.handle(queue.popleft(), self.now, 1):
                if self.cut == 0:
                    self.cut = None
                    self.boot()
                    return
                if self.cut is not None:
                    self.cut -= 1
                if isinstance(action, Save):
                    self.behind = self.refusing and action.slots != self.state
                    if action.needed:
                        queue.appendleft(Unsaved("full") if self.behind else Saved())
                    if self.behind and action.needed:
                        break
                queue += self.perform(action)

    def perform(self, action):
        match action:
            case Save(slots):
                if not self.behind:
                    self.saved(slots)
            case Serve(model):
                if model is not None and model not in self.blobs:
                    assert model in self.damaged, (
                        "a model was to be served whose blob was never there or collected"
                    )
                    self.loaded, self.failing = None, model
                    return [ServeFailed(model, "damaged")]
                known = (self.state.committed, self.state.previous) if self.behind else ()
                assert model in (self.state.serving, *known), "a model was loaded before the disk said so"
                self.loaded, self.failing = model, None
            case Shadow(model):
                assert model in (None, self.state.shadowing), "a shadow began before the disk said so"
                assert model is None or model in self.blobs | self.damaged
                self.shadowing = model
            case Collect(keep):
                needed = set(self.state.known)
                assert self.behind or needed <= set(keep), "a blob the disk still needs was collected"
                self.blobs &= set(keep) | needed
            case StartUpdate():
                assert self.child is None
                self.child = (action, self.releases[action.release])
        return []

    def saved(self, slots):
        before, self.disk = self.state, json.dumps(to_document(slots))
        after = self.state
        assert after == slots
        for cohort, floor in before.floors:
            assert after.floor(cohort) >= floor
        trial = after.trial and (after.trial.digest, after.trial.attempt)
        if trial and trial != (before.trial and (before.trial.digest, before.trial.attempt)):
            assert trial[1] > self.held.get(trial[0], 0), (
                "a quarantined model was tried without a higher attempt"
            )
        left = before.shadowing is not None and after.on_trial and after.trial.digest == before.shadowing
        if (
            left and before.committed != self.failing and not self.alone
        ):  # else there was nobody to be compared with
            gate = before.trial.shadow
            assert after.shadow_rows >= gate.rows
            assert after.shadow_disagreed <= gate.max_disagreement * after.shadow_rows
        if after.committed != before.committed and after.committed is not None:
            self.committed_once = True
            self.held.pop(after.committed, None)
        if before.trial and not after.trial and after.outcome == "rolled_back":
            self.hold(before.trial.digest, before.trial.attempt)
        for model, attempt in after.quarantine:
            self.hold(model, attempt)

    def hold(self, model, attempt):
        self.held[model] = max(attempt, self.held.get(model, 0))

    # ── rules ──────────────────────────────────────────────────────────────────────────────────────────

    @initialize(model=MODELS)
    def first_model(self, model):
        self.publish(model, None, 1, "r0", 1)
        self.child_answers("good")
        self.serves("good", 300)

    @rule(actions=st.integers(0, 6))
    def power_will_be_cut(self, actions):
        self.cut = actions

    @rule(refuses=st.booleans())
    def power_cut(self, refuses):
        """The disk may be found to refuse at the start."""
        self.refusing = refuses
        self.boot()

    @rule(
        candidate=MAYBE,
        incumbent=MAYBE,
        attempt=st.integers(1, 3),
        rollout=st.sampled_from(["r0", "r1", "r2"]),
        step=st.sampled_from([1, 1, 1, 2, 0, -1]),
        shadow=st.sampled_from([0, 50]),
    )
    def publish(self, candidate, incumbent, attempt, rollout, step, shadow=0):
        revision = max(1, self.revision + step)
        self.revision = max(self.revision, revision)
        document = release(
            candidate,
            incumbent,
            revision=revision,
            attempt=attempt,
            rollout=rollout,
            trial=TrialGate(predictions=200, seconds=1.0, starts=2),
            shadow=ShadowGate(rows=shadow, max_disagreement=0.5),
        )
        self.releases[signed(document)] = document
        self.retained = signed(document)
        self.do(MessageArrived(RELEASES, self.retained))

    @rule(
        candidate=MODELS,
        attempt=st.integers(1, 3),
        rollout=st.sampled_from(["r1", "r2"]),
        shadow=st.sampled_from([0, 50]),
    )
    def a_trial_begins(self, candidate, attempt, rollout, shadow):
        """A shortcut to where most of the laws are at stake."""
        self.time_passes(100.0)
        for _ in range(3):
            self.child_answers("good")
        self.publish(candidate, None, attempt, rollout, 1, shadow)
        self.child_answers("good")
        self.time_passes(0.25)

    @precondition(lambda self: self.shadowing is not None)
    @rule(
        rows=st.integers(0, 60),
        share=st.sampled_from([0.0, 0.4, 0.9]),
        why=st.sampled_from(
            [{}, {}, {"failed": "the graph failed"}, {"alone": "the incumbent's file is damaged"}]
        ),
    )
    def the_shadow_speaks(self, rows, share, why):
        self.alone = "alone" in why
        self.do(Shadowed(digest=self.shadowing, rows=rows, disagreed=int(share * rows), **why))
        self.alone = False

    @rule(candidate=MODELS, attempt=st.integers(1, 3))
    def the_next_model_is_installed_meanwhile(self, candidate, attempt):
        """The child is done but has not said so: what the device does now, it does on old knowledge of its blobs."""
        self.publish(candidate, None, attempt, "r3", 1)
        self.child_works()

    @rule()
    def child_works(self):
        if self.child is not None:
            start, document = self.child
            action, wanted = self.needed(start, document)
            if action == "install" and document.revision >= start.floor:
                self.blobs.add(wanted)
                self.damaged.discard(wanted)

    @staticmethod
    def needed(start, document):
        held = dict(start.quarantine)
        return needs(document, DEVICE, serving=start.serving, have=start.have, quarantine=held)

    @precondition(lambda self: self.child is not None)
    @rule(
        how=st.sampled_from(
            ["good", "good", "slow in the probe", "no network", "untrusted", "nothing to blame"]
        )
    )
    def child_answers(self, how):
        if self.child is None:
            return
        if how == "good":
            self.child_works()
        (start, document), self.child = self.child, None
        if how == "no network":
            self.do(UpdateEnded(ok=False, stage="fetch", reason="timeout", retry=True))
            return
        if how == "untrusted" or document.revision < start.floor:
            self.do(UpdateEnded(ok=False, stage="release", reason="below the floor"))
            return
        if how == "nothing to blame":
            self.do(UpdateEnded(ok=False, release=document, stage="verify", reason="no target"))
            return
        action, wanted = self.needed(start, document)
        if action == "install" and how != "good":
            self.do(UpdateEnded(ok=False, release=document, stage="probe", reason=how, digest=wanted))
            return
        self.do(UpdateEnded(ok=True, release=document, installed=action == "install", digest=wanted))

    @rule(how=st.sampled_from(["good", "slow", "failed", "refuses"]), predictions=st.integers(0, 300))
    def serves(self, how, predictions):
        if self.loaded is None:
            return
        boots = self.boots
        self.do(
            Served(
                digest=self.loaded,
                predictions=predictions,
                failed=int(how == "failed"),
                seconds=1.0,
                cpu=cpu(predictions, 9_000_000 if how == "slow" else 9_000),
                rss_bytes=0,
                refused=100_000 if how == "refuses" else 0,
            )
        )
        if how == "refuses" and boots == self.boots:
            assert self.agent.tried is None, (
                "a candidate that refuses what the model before it answers goes on"
            )

    @rule(worn=st.booleans())
    def model_fails_to_load(self, worn):
        serving = self.in_service
        if serving is None:
            return
        if worn:
            self.blobs.discard(serving)
            self.damaged.add(serving)
        self.loaded, self.failing = None, serving
        self.do(ServeFailed(serving, "cannot be read"))

    @precondition(lambda self: self.shadowing is not None)
    @rule()
    def shadow_dies(self):
        self.do(ServeFailed(self.shadowing, "ended 3 times"))

    @rule(seconds=st.sampled_from([0.25, 5.0, 100.0]))
    def time_passes(self, seconds):
        self.now += seconds
        if self.behind and not self.refusing:
            self.behind = False
            self.saved(self.agent.slots)
        self.do(Ticked())

    @rule(refuses=st.booleans())
    def the_disk(self, refuses):
        self.refusing = refuses

    @rule()
    def a_start_that_is_not_counted_and_then_all_is_well(self):
        """Another shortcut."""
        self.power_cut(refuses=True)
        self.serves("good", 10)
        self.all_is_well_for_a_while()

    @rule()
    def all_is_well_for_a_while(self):
        """Whatever was, a trial serves, a shadow is cast, and everything is on the disk."""
        self.refusing, self.cut = False, None
        for _ in range(5):
            self.time_passes(100.0)
        slots = self.agent.slots
        assert not self.behind
        assert self.agent.tried == (slots.serving if slots.on_trial else None)
        assert self.shadowing == slots.shadowing
        assert self.loaded == slots.serving or self.failing in self.damaged

    @rule()
    def link_breaks(self):
        self.do(Disconnected())
        self.connect()

    # ── laws ───────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def a_committed_device_always_has_a_runnable_model(self):
        for state in (self.state, self.agent.slots):
            if self.committed_once:
                assert state.committed is not None
                assert state.serving is not None
            for model in state.known:
                assert model in self.blobs or model in self.damaged
            assert state.serving is None or state.serving in state.known

    @invariant()
    def the_disk_holds_all_but_a_trials_latest_progress(self):
        if self.behind:
            return
        disk, memory = to_document(self.state), to_document(self.agent.slots)
        for document in (disk, memory):
            if document["trial"]:
                for name in ("predictions", "seconds", "cpu", "compared", "disagreed"):
                    del document["trial"][name]
        assert disk == memory

    @invariant()
    def what_is_loaded_is_what_the_slots_say(self):
        assert self.in_service in (self.loaded, self.failing)

    @invariant()
    def a_candidate_in_the_shadow_does_not_serve(self):
        assert self.state.shadowing is None or self.loaded != self.state.shadowing

    @invariant()
    def the_floor_is_the_highest_revision_accepted(self):
        assert self.state.floor(COHORT) <= self.revision


TestDevice = Device.TestCase
TestDevice.settings = settings(stateful_step_count=40)
