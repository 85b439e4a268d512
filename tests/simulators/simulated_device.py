"""A device of the fleet simulator: what survives a power cut, what does not, and the daemon's loop around the agent."""

import json
import random
from collections import deque
from collections.abc import Callable
from functools import partial

from edge_runtime.contract import messages, topics
from edge_runtime.contract.codec import decode
from edge_runtime.contract.ids import DeviceId, Digest, SessionId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.release import from_payload
from edge_runtime.contract.topics import Delivery
from edge_runtime.core import events as ev
from edge_runtime.core.agent import MAX_IN_FLIGHT, Agent
from edge_runtime.core.budget import MIN_COMPARED, Budget
from edge_runtime.core.lifecycle import SlotState, from_document, needs, to_document
from tests.simulators.world import BEAT_SECONDS, ROWS_PER_WINDOW, TOPICS, Broker, Call, Key, World
from tests.support.device import COHORT, MODEL, closed, identity

BUDGET = Budget(predict_p99_ns=1_000_000)
ROWS_PER_BEAT = 60


class Device:
    """One device. ``serves`` is told what answers predictions, ``stored`` whether the centre has a record."""

    def __init__(
        self,
        world: World,
        broker: Broker,
        name: DeviceId,
        incumbent: Digest | None,
        *,
        serves: Callable[["Device", Digest | None], None],
        stored: Callable[[Key], bool],
    ) -> None:
        self._world = world
        self._broker = broker
        self.name = name
        self._serves = serves
        self._stored = stored
        self.saved = SlotState(model=MODEL, committed=incumbent)
        self._behind = False  # what was decided is not on disk, because it refused
        self.outbox: dict[Key, tuple[str, bytes]] = {}
        self._blobs = {incumbent} if incumbent else set()
        self.measured: set[Key] = set()
        self.fetched = 0
        self.off = False
        self.agent: Agent | None = None
        self.loaded: Digest | None = None
        self.link = 0
        self._links = 0
        self._lives = 0
        self._will: Call | None = None
        broker.register(self, (TOPICS.ack(name), TOPICS.command(name), TOPICS.release(COHORT, MODEL)))
        world.after(world.rng.uniform(0.0, 2.0), self._boot)

    # ── power and link ─────────────────────────────────────────────────────────────────────────────────

    def _boot(self) -> None:
        if self.off or self.agent is not None:
            return
        rng = self._world.rng
        session = f"{rng.getrandbits(64):016x}"
        seeded = random.Random(rng.getrandbits(32))
        self.agent = Agent(identity(self.name, session), self.saved, BUDGET, seeded)
        self._window_at = self._world.now + rng.uniform(0.0, self._world.window_seconds)
        self._later(BEAT_SECONDS, self._beat)
        self._later(rng.uniform(0.1, 2.0), self._connect)
        self._shadowing: Digest | None = None
        self._feed(ev.Started())

    def _later(self, seconds: float, call: Call) -> None:
        """As `World.after`, unless the power fails before."""
        life = self._lives
        self._world.after(seconds, lambda: call() if life == self._lives else None)

    def cut_power(self) -> None:
        if self.agent is not None:
            self._part()
            self._serves(self, None)
            self.agent = None
            self._lives += 1
            self._world.after(self._world.rng.uniform(1.0, 8.0), self._boot)

    def switch(self, *, on: bool) -> None:
        self.off = not on
        self._boot() if on else self.cut_power()

    def _connect(self) -> None:
        assert self.agent is not None
        if self._will is not None and not self._world.faults.late_wills:
            self._be_missed(self._will)
        self._links += 1
        self.link, self._pipe = self._links, 0.0
        self._broker.attach(self, self.agent.subscriptions)
        self._feed(ev.Connected())

    def lose_link(self) -> None:
        if self.link:
            self._part()
            self._later(self._world.rng.uniform(0.5, 5.0), self._connect)
            self._feed(ev.Disconnected())

    def _part(self) -> None:
        if self.link and self.agent is not None:
            will = self.agent.death()
            self._will = partial(self._broker.publish, will.topic, will.payload, will.delivery)
            self._world.after(self._world.rng.uniform(0.0, 3.0), partial(self._be_missed, self._will))
        self.link = 0

    def _be_missed(self, will: Call) -> None:
        if will is self._will or self._world.faults.late_wills:
            self._will = None
            will()

    def forget_will(self) -> None:
        """Nobody says that the device is gone."""
        self._will = None

    def _send(self, topic: str, payload: bytes, delivery: Delivery) -> None:
        if self.link:
            self._pipe = max(self._pipe, self._world.now + self._world.delay())
            arrive = partial(self._arrive, self.link, topic, payload, delivery)
            self._world.after(self._pipe - self._world.now, arrive)

    def _arrive(self, link: int, topic: str, payload: bytes, delivery: Delivery) -> None:
        if link == self.link:
            self._broker.publish(topic, payload, delivery)

    def receive(self, link: int, topic: str, payload: bytes) -> None:
        if link and link == self.link:
            self._feed(ev.MessageArrived(topic, payload))

    # ── the daemon's loop ──────────────────────────────────────────────────────────────────────────────

    def _beat(self) -> None:
        world, agent = self._world, self.agent
        assert agent is not None
        self._later(BEAT_SECONDS, self._beat)
        if self.loaded is not None and self._shadowing is not None:
            kind = world.kinds[self._shadowing]
            self._feed(
                ev.Shadowed(
                    digest=self._shadowing,
                    rows=ROWS_PER_BEAT,
                    disagreed=self._share(kind.disagrees + kind.refuses),
                )
            )
        if self.agent is agent and self.loaded is not None and agent.slots.on_trial:
            beside = agent.slots.committed
            refused = self._share(world.kinds[self.loaded].refuses) if beside else 0
            self._served += ROWS_PER_BEAT - refused
            self._feed(
                ev.Served(
                    digest=self.loaded,
                    predictions=ROWS_PER_BEAT - refused,
                    failed=0,
                    refused=refused,
                    seconds=BEAT_SECONDS,
                    cpu=world.kinds[self.loaded].cpu_times(self._served),
                    incumbent_cpu=world.kinds[beside].cpu_times(MIN_COMPARED)
                    if beside
                    else LatencyHistogram(),
                    rss_bytes=0,
                )
            )
        if self.agent is not agent:
            return  # the power failed
        if self.loaded is not None and world.now >= self._window_at:
            self._window_at = world.now + world.window_seconds
            self._feed(closed(self.loaded, ROWS_PER_WINDOW, world.kinds[self.loaded].cpu_ns))
        if self._behind:
            self._perform(ev.Save(agent.slots, needed=False))
        self._feed(ev.Ticked())
        if world.chance(world.faults.breaks):
            self.lose_link()

    @staticmethod
    def _share(share: float) -> int:
        return int(share * ROWS_PER_BEAT)

    def _feed(self, event: ev.AgentEvent) -> None:
        queue, life, world = deque([event]), self._lives, self._world
        while queue and self.agent is not None and life == self._lives:
            for action in self.agent.handle(queue.popleft(), world.now, world.wall_ns):
                if world.chance(world.faults.power):
                    self.cut_power()
                    return
                followed_by = self._perform(action)
                if life != self._lives:
                    return  # it crashed
                if followed_by is not None:
                    queue.appendleft(followed_by)
                if isinstance(followed_by, ev.Unsaved):
                    break  # what comes after must not happen

    def _perform(self, action: ev.Action) -> ev.AgentEvent | None:
        world = self._world
        match action:
            case ev.Save(slots, needed) if slots != self.saved and world.chance(world.faults.disk):
                self._behind = True
                return ev.Unsaved("the disk is full") if needed else None
            case ev.Save(slots, needed):
                self._behind = False
                was_committed = self.saved.committed is not None
                self.saved = from_document(json.loads(json.dumps(to_document(slots))), MODEL)
                world.law(self.saved == slots, "the state did not survive its own document")
                world.law(slots.committed is not None or not was_committed, "a committed model was forgotten")
                world.law(self._blobs >= set(slots.known), "a model the state names has no blob")
                return ev.Saved() if needed else None
            case ev.Serve(digest):
                known = self.saved.serving == digest or digest in (self.saved.committed, self.saved.previous)
                world.law(known, "a model was loaded before the state was durable")
                if digest is not None and world.kinds[digest].crashes:
                    self.cut_power()
                    return None
                self._served = 0
                self._serves(self, digest)
            case ev.Shadow(digest):
                world.law(digest in (None, self.saved.shadowing), "a shadow began before it was durable")
                world.law(digest is None or digest in self._blobs, "what is not here is in the shadow")
                if digest is not None and world.kinds[digest].dies_in_shadow:
                    return ev.ServeFailed(digest, "ended 3 times in the shadow")
                self._shadowing = digest
            case ev.Collect(keep):
                held = set(self.saved.known)
                world.law(self._behind or set(keep) >= held, "a blob the state needs was collected")
                self._blobs &= set(keep) | held
            case ev.Publish(topic, payload, delivery):
                self._send(topic, payload, delivery)
            case ev.Append(session, seq, topic, payload):
                key = (self.name, session, seq)
                self.outbox[key] = (topic, payload)
                if topic == TOPICS.window(self.name, MODEL):
                    self.measured.add(key)
            case ev.Send(room, skip):
                return self._send_records(room, skip)
            case ev.Trim(session, seqs):
                for key in ((self.name, session, seq) for seq in seqs):
                    if self.outbox.pop(key, None):
                        world.law(self._stored(key), "what is not stored was trimmed")
            case ev.StartUpdate():
                self._later(world.rng.uniform(0.2, 2.0), partial(self._child_works, action))
        return None

    def _send_records(self, room: int, skip: frozenset[tuple[SessionId, int]]) -> ev.AgentEvent | None:
        self._world.law(room + len(skip) <= MAX_IN_FLIGHT, "too many records in flight")
        waiting = [(key, record) for key, record in self.outbox.items() if key[1:] not in skip][:room]
        if not self.link or not waiting:
            return None
        for _, (topic, payload) in waiting:
            self._send(topic, payload, topics.WINDOW)
        return ev.Sent(tuple(key[1:] for key, _ in waiting))

    # ── the update child ───────────────────────────────────────────────────────────────────────────────

    def _child_works(self, job: ev.StartUpdate) -> None:
        end = self._child_result(job)
        self._later(self._world.rng.uniform(0.0, 2.0), lambda: self._feed(ev.update_ended(end)))

    def _child_result(self, job: ev.StartUpdate) -> dict[str, object]:
        world, message = self._world, decode(job.release)
        assert isinstance(message, messages.SignedRelease)
        document = from_payload(message.payload)
        if not self.link or world.chance(world.faults.child):
            return {"ok": False, "stage": "fetch", "reason": "no network", "retry": True}
        if message.signatures[0][1] != b"good" or document.revision < job.floor:
            return {
                "ok": False,
                "stage": "release",
                "reason": "not signed, or below the floor",
                "retry": False,
            }
        held = dict(job.quarantine)
        action, wanted = needs(document, self.name, serving=job.serving, have=job.have, quarantine=held)
        if action == "install" and wanted is not None:
            self._feed(ev.UpdatePhase("fetching", wanted))
            self.fetched += 1
            if not world.kinds[wanted].probe_ok:
                failed = {"ok": False, "stage": "probe", "reason": "slow", "retry": False, "digest": wanted}
                return {**failed, "release": message.payload.hex()}
            self._blobs.add(wanted)
        return {"ok": True, "desired": wanted or "", "action": action, "release": message.payload.hex()}
