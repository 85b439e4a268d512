"""Disks that refuse, models that do not load, releases nobody can believe: what serves, and that it goes on."""

import random
from collections import deque
from dataclasses import replace
from typing import Any

import pytest

from edge_runtime.contract.ids import Digest
from edge_runtime.contract.release import ShadowGate
from edge_runtime.contract.topics import Topics
from edge_runtime.core.agent import SUSPICIONS, Agent
from edge_runtime.core.budget import Budget
from edge_runtime.core.events import (
    AgentEvent,
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
    Started,
    StartUpdate,
    Ticked,
    Unsaved,
    UpdateEnded,
)
from edge_runtime.core.lifecycle import SlotState, begin_shadow, begin_trial, needs
from edge_runtime.core.probation import SAVE_SECONDS
from tests.support.device import (
    COHORT,
    DEVICE,
    FLEET,
    GATE,
    MODEL,
    A,
    B,
    C,
    P,
    cpu,
    identity,
    release,
    signed,
)

RELEASES = Topics(FLEET).release(COHORT, MODEL)
SETTLED = SlotState(model=MODEL, committed=A, previous=P)
ALONE = SlotState(model=MODEL, committed=A)
HALF = ShadowGate(rows=100, max_disagreement=0.2)


class Device:
    """An agent with a disk that may refuse and files of models that may not load; performs what it asks for."""

    def __init__(
        self, slots: SlotState, *, refusing: bool = False, bad: tuple[Digest, ...] = (), shadows: bool = True
    ) -> None:
        self.disk, self.refusing, self.bad = slots, refusing, set(bad)
        self.now = 0.0
        self.behind = False
        self.loads: list[Digest | None] = []
        self.shadow: Digest | None = None
        self.asked: list[StartUpdate] = []
        self.kept: list[tuple[Digest, ...]] = []
        self.agent = Agent(identity(), slots, Budget(), random.Random(1), shadows=shadows)
        self.do(Started())
        self.do(Connected())

    @property
    def serving(self) -> Digest | None:
        """What answers rows."""
        return self.loads[-1] if self.loads else None

    def newest_kept(self) -> tuple[Digest, ...]:
        """What the last collection left."""
        return self.kept[-1]

    def do(self, event: AgentEvent, *, after: float = 0.0) -> None:
        self.now += after
        queue: deque[AgentEvent] = deque([event])
        while queue:
            for action in self.agent.handle(queue.popleft(), self.now, 1):
                if isinstance(action, Save):
                    self.behind = self.refusing and action.slots != self.disk
                    if action.needed:
                        queue.appendleft(Unsaved("full") if self.behind else Saved())
                    if self.behind and action.needed:
                        break
                    self.disk = self.disk if self.behind else action.slots
                elif isinstance(action, Serve) and action.digest in self.bad:
                    assert action.digest is not None
                    queue.append(ServeFailed(action.digest, "a bad file"))
                elif isinstance(action, Serve):
                    self.loads.append(action.digest)
                elif isinstance(action, Shadow):
                    self.shadow = action.digest
                elif isinstance(action, Collect):
                    self.kept.append(action.keep)
                elif isinstance(action, StartUpdate):
                    self.asked.append(action)

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            if self.behind and not self.refusing:
                self.disk, self.behind = self.agent.slots, False
            self.do(Ticked(), after=1.0)

    def offer(self, document: Any) -> None:
        self.do(MessageArrived(RELEASES, signed(document)), after=60.0)

    def end(self, document: Any, **result: Any) -> None:
        """The child's answer."""
        self.do(UpdateEnded(release=document, **{"ok": True, **result}), after=1.0)

    def serve(self, *, rows: int = 300, failed: int = 0) -> None:
        assert self.serving is not None
        self.do(
            Served(
                digest=self.serving, predictions=rows, failed=failed, seconds=60.0, cpu=cpu(rows), rss_bytes=0
            ),
            after=60.0,
        )


# ── the only model does not load ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("restarts", [0, 2])
def test_a_candidate_in_the_shadow_of_a_model_that_does_not_load_serves(restarts):
    device = Device(begin_shadow(ALONE, B, attempt=1, gate=GATE, shadow=HALF), bad=(A,))
    for _ in range(restarts):
        device = Device(device.disk, bad=(A,))
    assert device.serving == B
    assert device.shadow is None
    device.serve()
    assert (device.agent.slots.committed, device.agent.slots.quarantine) == (B, ())


def test_it_serves_once_the_disk_takes_its_start():
    device = Device(begin_shadow(ALONE, B, attempt=1, gate=GATE, shadow=HALF), bad=(A,), refusing=True)
    assert device.serving is None
    device.refusing = False
    device.wait(60)
    assert device.serving == B


def test_the_only_model_that_works_stays_on_trial_when_its_successor_is_refused():
    device = Device(ALONE, bad=(A,))
    first, other = release(B, None), release(C, None, revision=2, rollout="r2")
    device.offer(first)
    device.end(first, installed=True, digest=B)
    device.offer(other)
    device.end(other, ok=False, stage="probe", reason="slow", digest=C)
    assert device.serving == B
    device.offer(replace(other, candidate=None, revision=3))
    device.end(replace(other, candidate=None, revision=3))
    assert device.serving == B
    assert dict(device.agent.slots.quarantine) == {C: 1}


# ── a disk that refuses ────────────────────────────────────────────────────────────────────────────────


def test_what_is_committed_serves_although_the_disk_refuses_the_start():
    device = Device(ALONE, refusing=True)
    assert device.serving == A


def test_a_start_without_shadows_on_a_refusing_disk_serves_what_is_committed_and_then_the_trial():
    device = Device(begin_shadow(SETTLED, B, attempt=1, gate=GATE, shadow=HALF), refusing=True, shadows=False)
    assert (device.serving, device.shadow) == (A, None)
    device.wait(600)
    assert device.loads == [A]
    device.refusing = False
    device.wait(60)
    assert device.serving == B
    assert device.disk.on_trial


def test_a_rollback_that_was_not_saved_is_not_undone_by_the_next_state_that_is_not():
    device = Device(SETTLED)
    first, other = release(B, A), release(C, A, revision=2, rollout="r2")
    device.offer(first)
    device.end(first, installed=True, digest=B)
    device.serve(rows=50)
    device.offer(other)
    device.refusing = True
    device.serve(rows=1, failed=9)
    assert device.serving == A
    device.end(other, installed=True, digest=C)
    assert (device.serving, device.agent.report.serving) == (A, A)
    assert dict(device.agent.slots.quarantine) == {B: 1}
    device.refusing = False
    device.do(Disconnected())
    device.wait(60)
    assert dict(device.disk.quarantine) == {B: 1}
    assert Device(device.disk).serving == A


def test_a_start_that_was_not_counted_still_waits_when_another_state_is_refused():
    device = Device(begin_trial(SETTLED, B, attempt=1, gate=GATE), refusing=True)
    assert (device.serving, device.agent.report.serving, device.agent.tried) == (A, A, None)
    back = release(None, P, revision=2)
    device.offer(back)
    device.end(back, digest=P)
    device.wait(int(3 * SAVE_SECONDS))
    assert device.loads == [A]
    assert device.disk.trial is not None
    assert device.disk.trial.starts_left == GATE.starts
    device.refusing = False
    device.wait(int(2 * SAVE_SECONDS))
    assert device.serving == B
    assert device.disk.trial.starts_left == GATE.starts - 1


def test_cpu_times_of_a_trial_are_kept_when_its_successor_cannot_be_begun():
    device = Device(SETTLED)
    first, other = release(B, A), release(C, A, revision=2, rollout="r2")
    device.offer(first)
    device.end(first, installed=True, digest=B)
    device.do(Served(digest=B, predictions=20, failed=0, seconds=1.0, cpu=cpu(20), rss_bytes=0), after=1.0)
    device = Device(device.disk)  # 20 calls are known from before
    device.offer(other)
    device.refusing = True
    device.end(other, installed=True, digest=C)
    device.refusing = False
    device.do(Served(digest=B, predictions=10, failed=0, seconds=1.0, cpu=cpu(10), rss_bytes=0), after=1.0)
    assert device.agent.slots.trial is not None
    assert device.agent.slots.trial.cpu.count == 30


# ── a release that no key has signed ───────────────────────────────────────────────────────────────────


def test_a_release_that_nobody_can_believe_does_not_keep_a_genuine_one_waiting():
    device = Device(SETTLED)
    device.offer(release(C, A, revision=999))
    for _ in range(3):
        device.end(None, ok=False, stage="release", reason="not signed by the director", retry=True)
        device.wait(600)
    assert len(device.asked) > 1, "its key may be trusted later"
    genuine = release(B, A, revision=5)
    device.end(None, ok=False, stage="release", reason="not signed by the director", retry=True)
    device.offer(genuine)
    device.wait(600)
    assert device.asked[-1].release == signed(genuine)
    action, wanted = needs(genuine, DEVICE, serving=A, have=(A, P), quarantine={})
    device.end(genuine, installed=action == "install", digest=wanted)
    assert device.serving == B


def test_what_could_not_be_fetched_keeps_its_place():
    device = Device(SETTLED)
    newest, older = release(B, A, revision=9), release(C, A, revision=5)
    device.offer(newest)
    device.end(None, ok=False, stage="fetch", reason="no network", retry=True)
    device.offer(older)
    device.wait(600)
    assert device.asked[-1].release == signed(newest)


# ── what is tried again costs less every time ──────────────────────────────────────────────────────────


def waits(device: Device, times: int, **result: Any) -> list[float]:
    """How long the release at work waits after each of so many ends."""
    found = []
    for _ in range(times):
        before, asked = device.now, len(device.asked)
        device.do(UpdateEnded(ok=False, retry=True, **result))
        while len(device.asked) == asked:
            device.do(Ticked(), after=max(1.0, (device.now - before) / 100))
            assert device.now < before + 86_400.0, "it is not tried again"
        found.append(device.now - before)
    return found


def test_wrong_bytes_are_fetched_a_few_times_a_day_at_last():
    device = Device(SETTLED)
    wanted = release(B, A)
    device.offer(wanted)
    found = waits(device, 20, release=wanted, stage="verify", reason="the download has another SHA-256")
    assert 2.0 <= found[0] <= 5.0, "it may have been damaged on its way"
    assert all(before < after for before, after in zip(found[:6], found[2:8], strict=True))
    assert sum(found[:10]) > 1800.0
    assert all(3 * 3600.0 <= seconds <= 6 * 3700.0 for seconds in found[-4:])


def test_a_model_that_is_not_published_is_asked_for_every_quarter_of_an_hour_at_last():
    device = Device(SETTLED)
    wanted = release(B, A)
    device.offer(wanted)
    found = waits(device, 40, release=wanted, stage="release", reason="no target")
    assert sum(found[:3]) < 20.0, "it may be published a moment later"
    assert 300.0 < max(found) <= 910.0
    assert sum(found[20:]) > 20 * 200.0


def test_a_new_release_does_not_wait_for_what_the_one_before_waits_for():
    device = Device(SETTLED)
    damaged, mended = release(B, A), release(C, A, revision=2, rollout="r2")
    device.offer(damaged)
    waits(device, 10, release=damaged, stage="verify", reason="the download has another SHA-256")
    device.end(damaged, ok=False, stage="verify", reason="the same", retry=True)
    assert len(device.asked) == 11
    device.offer(mended)
    assert device.asked[-1].release == signed(mended)
    device.end(mended, installed=True, digest=C)
    assert device.serving == C
    device.do(Ticked(), after=7 * 3600.0)
    assert device.asked[-1].release == signed(mended), "what it replaced is not worked on again"


def test_a_network_that_is_absent_does_not_make_the_wait_longer():
    device = Device(SETTLED)
    wanted = release(B, A)
    device.offer(wanted)
    waits(device, 10, release=wanted, stage="verify", reason="the download has another SHA-256")
    assert max(waits(device, 10, stage="trust", reason="no network")) <= 61.0


def test_a_probe_that_the_device_may_have_ended_condemns_nobody_at_once():
    device = Device(SETTLED)
    wanted = release(B, A, attempt=2)
    device.offer(wanted)
    ended: dict[str, Any] = {"release": wanted, "stage": "probe", "reason": "killed", "digest": B}
    assert min(waits(device, SUSPICIONS - 1, **ended)) >= 30.0
    assert (device.agent.slots.quarantine, device.agent.slots.outcome) == ((), "")
    device.do(UpdateEnded(ok=False, retry=True, **ended))
    assert dict(device.agent.slots.quarantine) == {B: 2}
    assert device.agent.slots.reason == f"killed, {SUSPICIONS} times"


def test_suspicions_are_counted_by_model_and_attempt():
    device = Device(SETTLED)
    for revision, (model, attempt) in enumerate([(B, 1), (B, 2), (C, 2), (B, 2)], start=1):
        wanted = release(model, A, revision=revision, attempt=attempt)
        device.offer(wanted)
        ended: dict[str, Any] = {"release": wanted, "stage": "probe", "reason": "killed", "digest": model}
        waits(device, SUSPICIONS - 2, **ended)
        device.do(UpdateEnded(ok=False, retry=True, **ended))
    assert device.agent.slots.quarantine == ()


# ── what nobody asks for any more ──────────────────────────────────────────────────────────────────────


def test_what_an_earlier_life_left_is_collected_but_what_is_wanted():
    device = Device(SETTLED)
    assert device.kept == []  # nobody knows yet what is wanted
    device.offer(release(B, A))
    assert device.kept == [(A, P, B)]


def test_what_a_release_began_is_collected_once_the_next_replaces_it():
    device = Device(SETTLED)
    first, second = release(B, A), release(C, A, revision=2, rollout="r2")
    device.offer(first)
    device.do(UpdateEnded(ok=False, release=first, stage="fetch", reason="no chunk", retry=True), after=1.0)
    assert device.newest_kept() == (A, P, B), "it goes on with what is here"
    device.wait(60)
    device.do(UpdateEnded(ok=False, release=first, stage="fetch", reason="no chunk", retry=True), after=1.0)
    device.offer(second)
    assert device.asked[-1].release == signed(second)
    assert device.newest_kept() == (A, P, B, C), "the second may have been made up"
    device.do(UpdateEnded(ok=False, release=second, stage="fetch", reason="no chunk", retry=True), after=1.0)
    assert device.newest_kept() == (A, P, C)


def test_a_disk_that_is_full_is_tidied_before_every_try():
    device = Device(SETTLED)
    device.offer(release(B, A))
    for tries in range(2, 6):
        device.end(None, ok=False, stage="trust", reason="No space left on device", retry=True)
        assert device.kept == [(A, P, B)] * tries
        device.wait(60)
        assert len(device.asked) == tries
