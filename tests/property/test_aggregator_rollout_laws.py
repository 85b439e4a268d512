"""Laws of a rollout, whatever devices do, in whatever order, and however often the coordinator is restarted.

The devices here obey whatever release they have last seen; a coordinator that dies loses everything it did not save.
"""

import json
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aggregator.config import RolloutConfig
from aggregator.core import coordinator as core
from aggregator.core import requests, rollout
from aggregator.core.coordinator import Coordinator
from aggregator.records import DeviceRecord, Gates, Request, Track
from edge_runtime.contract.ids import CohortId, DeviceId, Digest
from edge_runtime.contract.messages import ModelReport
from edge_runtime.contract.release import EVERYONE, Release, desired
from tests.support.fleet import FLEET, MODEL, NOW, SECOND, SESSION, digest

NAMES = [f"dev-{i}" for i in range(8)]
CONFIG = RolloutConfig(stages=(1, 0.5, 1.0), gates=Gates(bake_seconds=3.0, timeout_seconds=40.0))
MAIN = CohortId("main")


class Rollouts(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now = NOW
        self.devices: dict[str, DeviceRecord] = {}
        self.saved: dict[tuple[CohortId, str], Track] = {}
        self.revisions: dict[CohortId, int] = {}
        self.broker: Release | None = None
        self.requests = 0
        self.promoted: Digest | None = None

    @initialize()
    def start(self):
        self.coordinator = Coordinator(FLEET, CONFIG)

    # ── the world ──────────────────────────────────────────────────────────────────────────────────────

    def perform(self, actions):
        """Saves first, publishes last, and checks every law a release can break on its way out."""
        published = [a.release for a in actions if isinstance(a, core.Publish)]
        for action in actions:
            if isinstance(action, core.Save):
                track = action.track
                self.saved[track.cohort, track.model] = track
                if track.release is not None:
                    self.revisions[track.cohort] = max(
                        self.revisions.get(track.cohort, 0), track.release.revision
                    )
        for release in published:
            assert any(release == track.release for track in self.saved.values()), (
                "published before it was saved"
            )
            if self.broker is not None and release != self.broker:
                assert release.revision > self.broker.revision
            self.check_promotion(release)
            self.broker = release

    def check_promotion(self, release):
        if self.broker is None or release.incumbent == self.broker.incumbent:
            return
        track = self.saved[MAIN, MODEL]
        assert track.rollout is not None
        if track.rollout.state == "completed":
            assert release.incumbent == track.rollout.candidate
            assert self.broker.threshold == EVERYONE
        else:
            assert track.rollout.state == "rolled_back"
            assert release.incumbent == track.rollout.incumbent

    def seen(self, record):
        self.devices[record.device] = record
        self.perform(self.coordinator.handle(core.StatusSeen(record), self.now))

    def follow(self, record, state="committed", **changes):
        """The device does what the release on the broker says."""
        assert self.broker is not None
        wanted = desired(self.broker, record.device)
        report = record.models[0]
        changes = {"serving": wanted or report.serving, "state": state, **changes}
        return replace(
            record,
            models=(replace(report, rollout=self.broker.rollout, revision=self.broker.revision, **changes),),
        )

    # ── what can happen ────────────────────────────────────────────────────────────────────────────────

    @rule(name=st.sampled_from(NAMES))
    def appear(self, name):
        before = self.devices.get(name)
        fresh = DeviceRecord(
            device=DeviceId(name), session=SESSION, seq=1, online=True, models=(ModelReport(model=MODEL),)
        )
        self.seen(replace(before, online=True) if before else fresh)

    @precondition(lambda self: self.devices)
    @rule(data=st.data())
    def vanish(self, data):
        name = data.draw(st.sampled_from(sorted(self.devices)))
        self.seen(replace(self.devices[name], online=False))

    @precondition(lambda self: self.devices and self.broker)
    @rule(data=st.data(), state=st.sampled_from(["committed", "trial"]))
    def obey(self, data, state):
        name = data.draw(st.sampled_from(sorted(self.devices)))
        if self.devices[name].online:
            self.seen(self.follow(self.devices[name], state))

    @precondition(lambda self: self.devices and self.broker)
    @rule()
    def everybody_obeys(self):
        for record in list(self.devices.values()):
            if record.online:
                self.seen(self.follow(record))

    @precondition(lambda self: self.devices and self.broker and self.broker.candidate)
    @rule(data=st.data())
    def refuse(self, data):
        record = self.devices[data.draw(st.sampled_from(sorted(self.devices)))]
        assert self.broker is not None
        if record.online and desired(self.broker, record.device) == self.broker.candidate:
            self.seen(
                self.follow(
                    record,
                    "idle",
                    serving=record.models[0].serving,
                    outcome="refused",
                    outcome_digest=self.broker.candidate,
                )
            )
            ended = self.saved[MAIN, MODEL].rollout
            assert ended is not None
            assert ended.state != "running"

    @rule(seconds=st.sampled_from([1, 5, 60]))
    def time_passes(self, seconds):
        self.now += seconds * SECOND
        self.perform(self.coordinator.handle(core.Tick({}), self.now))

    @rule(kind=st.sampled_from(["halt", "rollback", "pause", "resume"]))
    def order(self, kind):
        self.ask(kind, {"model": MODEL})

    @rule(
        candidate=st.sampled_from("PQR"),
        stages=st.sampled_from([[1.0], [1, 1.0], [2, 0.5, 1.0], [3, 6, 1.0], [0.3, 0.6, 1.0]]),
    )
    def wish(self, candidate, stages):
        self.now += SECOND
        self.ask(requests.START, {"model": MODEL, "candidate": digest(candidate), "stages": stages})

    def ask(self, kind, document):
        self.requests += 1
        request = Request(
            number=self.requests,
            kind=kind,
            document=json.dumps(document),
            by="x",
            why="y",
            created_ns=self.now,
        )
        actions = self.coordinator.handle(core.RequestSeen(request, MODEL), self.now)
        assert sum(isinstance(a, core.Answer) for a in actions) == 1
        self.perform(actions)

    @rule()
    def restart(self):
        self.coordinator = Coordinator(
            FLEET, CONFIG, tracks=self.saved.values(), revisions=self.revisions, devices=self.devices.values()
        )
        before = self.broker
        self.perform(self.coordinator.handle(core.Connected(), self.now))
        assert self.broker == before

    # ── laws ───────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def exposure_stays_below_the_cap(self):
        for track in self.saved.values():
            r = track.rollout
            if r is None or self.broker is None or r.state not in ("running", "paused"):
                continue
            exposed = [
                d for d in self.devices.values() if d.online and desired(self.broker, d.device) == r.candidate
            ]
            assert r.cap == rollout.NO_CAP or len(exposed) <= r.cap, (len(exposed), r)

    @invariant()
    def an_ended_rollout_exposes_nobody(self):
        for track in self.saved.values():
            if track.rollout is not None and track.rollout.state in ("halted", "rolled_back", "completed"):
                assert track.rollout.threshold == 0
                if track.release is not None:
                    assert track.release.threshold == 0
                    assert track.release.candidate is None

    @invariant()
    def the_broker_has_what_was_saved(self):
        for track in self.saved.values():
            assert track.release == self.broker


Rollouts.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestRollouts = Rollouts.TestCase
