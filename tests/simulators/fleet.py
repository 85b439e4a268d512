"""A fleet in one process: real agents and the real coordinator on a virtual clock, over a network that misbehaves.

Real are `Agent`, `lifecycle`, the codec, `ingest`, `presence` and `Coordinator`. Modelled are:

- *Time*: a heap of calls. Nothing waits, and one seeded `random.Random` makes every choice, so a seed is a run.
- *Links*: a client's messages reach the broker in the order they were sent, as TCP and MQTT have it. From there on
  they are delayed at random and so reordered (a device's statuses keep their order: MQTT has it for one topic, and
  `presence` needs it); those of QoS 1 may come again late, those of QoS 0 may be lost. When a connection breaks,
  everything on its way to or from that device is lost, the broker notices late (when the device comes back at the
  latest, unless `Faults.late_wills`), and the next connection brings the retained messages.
- *Devices*: the disk holds what the last `Save` wrote (as JSON text), the outbox and the blobs. The power may fail
  before any action the agent asks for; all else is forgotten then, and the device boots after a while.
- *The update child*: a call that takes time and may fail for the network's sake. It believes the signature ``good``,
  holds releases against the floor, and judges a model by its `Kind`.
- *The centre*: stores windows and events under their key, acknowledges what it stored, and runs the coordinator, whose
  ledger is what its last `Save` wrote. It may die before and after every transaction.

Laws are asserted as things happen (`Fleet.law`), and at the end, when the world has been calm for long enough
(`Fleet.finish`).
"""

import heapq
import json
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from aggregator.config import RolloutConfig
from aggregator.core import coordinator as core
from aggregator.core import ingest, presence
from aggregator.core.coordinator import Coordinator
from aggregator.core.gates import Evidence
from aggregator.records import DeviceRecord, DeviceTotals, Gates, Request, Rollout, Track
from edge_runtime.contract import messages, topics
from edge_runtime.contract.codec import decode, encode
from edge_runtime.contract.ids import DeviceId, Digest, SessionId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.release import EVERYONE, Release, TrialGate, desired, from_payload, stage_hash
from edge_runtime.contract.topics import Delivery
from edge_runtime.core import events as ev
from edge_runtime.core.agent import MAX_IN_FLIGHT, Agent
from edge_runtime.core.budget import Budget
from edge_runtime.core.lifecycle import SlotState, from_document, needs, to_document
from tests.support.device import COHORT, FLEET, MODEL, closed, cpu, identity, release, signed

TOPICS = topics.Topics(FLEET)
WALL_NS = 1_700_000_000_000_000_000
BUDGET = Budget(predict_p99_ns=1_000_000)
BEAT_SECONDS = 1.0
ROWS_PER_BEAT = 60
ROWS_PER_WINDOW = 20
REBIRTH_SECONDS = 10.0
DOUBT_NS = 30_000_000_000
ROLLOUTS = RolloutConfig(
    stages=(3, 0.25, 1.0),
    gates=Gates(bake_seconds=3.0),
    trial=TrialGate(predictions=200, seconds=4.0, starts=3),
)

Key = tuple[DeviceId, SessionId, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How bad the world is: chances from 0 to 1, ``breaks`` per device and second, ``power`` per action."""

    late: float = 0.0
    repeat: float = 0.0
    lose: float = 0.0
    breaks: float = 0.0
    power: float = 0.0
    child: float = 0.0
    centre: float = 0.0
    late_wills: bool = False


CALM = Faults()
ROUGH = Faults(late=0.1, repeat=0.2, lose=0.2, breaks=0.01, power=0.001, child=0.3, centre=0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a model is like on the devices."""

    probe_ok: bool = True
    cpu_ns: int = 50_000
    crashes: bool = False


GOOD = Kind()
SLOW_IN_PROBE = Kind(probe_ok=False)
SLOW_ON_TRIAL = Kind(cpu_ns=10_000_000)
CRASHES = Kind(crashes=True)


def cpu_times(kind: Kind, calls: int) -> LatencyHistogram:
    """The histogram of ``calls`` equal calls."""
    if not calls:
        return LatencyHistogram()
    return replace(cpu(1, kind.cpu_ns), counts=(calls,), sum_ns=calls * kind.cpu_ns)


class Fleet:
    """The world. Everybody in it asks it for the time, for chance, and for something to happen later."""

    def __init__(
        self,
        seed: int,
        size: int,
        kinds: dict[Digest, Kind],
        *,
        incumbent: Digest | None = None,
        faults: Faults = CALM,
        rollouts: RolloutConfig = ROLLOUTS,
        refusals: bool = False,
    ) -> None:
        self.refusals = refusals
        self.rng = random.Random(seed)
        self.now = 0.0
        self.faults = faults
        self.kinds = kinds
        self.windows = {
            digest: closed(digest, ROWS_PER_WINDOW, kind.cpu_ns) for digest, kind in kinds.items()
        }
        self.window_seconds = 20.0
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = 0
        self.serving: dict[Digest, set[DeviceId]] = {digest: set() for digest in kinds}
        self.ever: dict[Digest, set[DeviceId]] = {digest: set() for digest in kinds}
        self.measured: set[Key] = set()
        self.fetched = 0
        names = [DeviceId(f"dev-{k:04d}") for k in range(size)]
        self.devices = {name: Device(self, name, incumbent) for name in names}
        self.broker = Broker(self)
        self.centre = Centre(self, rollouts, incumbent)

    @property
    def wall_ns(self) -> int:
        return WALL_NS + int(self.now * 1e9)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self._numbers += 1
        heapq.heappush(self._calls, (self.now + seconds, self._numbers, call))

    def chance(self, share: float) -> bool:
        return share > 0.0 and self.rng.random() < share

    def delay(self) -> float:
        return self.rng.expovariate(20.0) + (
            self.rng.uniform(1.0, 5.0) if self.chance(self.faults.late) else 0.0
        )

    def law(self, holds: bool, name: str) -> None:
        assert holds, f"{name} (at {self.now:.2f} s)"

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Lets time pass; returns True as soon as ``until`` holds at the end of a beat."""
        end = self.now + seconds
        while self.now < end:
            beat = self.now + BEAT_SECONDS
            while self._calls and self._calls[0][0] <= beat:
                self.now, _, call = heapq.heappop(self._calls)
                call()
            self.now = beat
            if until():
                return True
        return False

    def serves(self, device: "Device", digest: Digest | None) -> None:
        """Notes what answers predictions on a device, and holds it against the stage's cap."""
        if device.loaded is not None:
            self.serving[device.loaded].discard(device.name)
        device.loaded = digest
        if digest is None:
            return
        self.serving[digest].add(device.name)
        self.ever[digest].add(device.name)
        r = self.centre.track.rollout
        if r is not None and r.candidate == digest and r.cap >= 0 and r.state != "completed":
            exposed = self.serving[digest] - self.centre.latecomers
            self.law(len(exposed) <= r.cap, f"{len(exposed)} devices run a candidate in a stage of {r.cap}")

    def finish(self, seconds: float = 600.0) -> None:
        """Calms the world and asserts that every device with power comes to what the release in force asks of it."""
        self.faults = CALM
        here = [device for device in self.devices.values() if not device.off]
        done = self.run(seconds, lambda: not self.centre.busy and all(device.settled() for device in here))
        odd = [f"{d.name}: {d.saved}" for d in here if not d.settled()][:2]
        self.law(done, f"devices did not converge to {self.centre.track.release}: {odd}")
        self.window_seconds = float("inf")
        self.law(self.run(60.0, lambda: not any(d.outbox for d in here)), "outboxes did not drain")
        kept = {key for device in self.devices.values() for key in device.outbox}
        self.law(self.measured <= self.centre.windows.keys() | kept, "a window was lost")
        rows = sum(row.rows for digest in self.kinds for row in self.centre.totals(digest, 0))
        self.law(rows == ROWS_PER_WINDOW * len(self.centre.windows), "rows were counted twice")


class Broker:
    """Keeps retained messages and passes on the rest."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.retained: dict[str, bytes] = {}
        self._status_at: dict[str, float] = {}
        self._readers: dict[str, list[Device]] = {TOPICS.release(COHORT, MODEL): list(fleet.devices.values())}
        for name, device in fleet.devices.items():
            self._readers[TOPICS.ack(name)] = self._readers[TOPICS.command(name)] = [device]

    def publish(self, topic: str, payload: bytes, delivery: Delivery) -> None:
        if delivery.retain:
            self.retained[topic] = payload
        for device in self._readers.get(topic, ()):
            self._pass_on(partial(device.receive, device.link, topic, payload), delivery)
        if topic not in self._readers:
            fleet = self._fleet
            delay = fleet.delay()
            if delivery == topics.STATUS:
                delay = max(delay, self._status_at.get(topic, 0.0) - fleet.now)
                self._status_at[topic] = fleet.now + delay
            self._pass_on(partial(fleet.centre.receive, topic, payload), delivery, delay)

    def attach(self, device: "Device", wanted: Iterable[str]) -> None:
        for topic in wanted:
            if topic in self.retained:
                self._pass_on(
                    partial(device.receive, device.link, topic, self.retained[topic]), topics.RELEASE
                )

    def _pass_on(self, deliver: Callable[[], None], delivery: Delivery, delay: float | None = None) -> None:
        fleet = self._fleet
        if delivery.qos == 0 and fleet.chance(fleet.faults.lose):
            return
        delay = fleet.delay() if delay is None else delay
        fleet.after(delay, deliver)
        if delivery.qos and fleet.chance(fleet.faults.repeat):
            fleet.after(delay + fleet.delay(), deliver)

    def restart_without_memory(self) -> None:
        """Every connection breaks and nothing is retained any more."""
        self.retained.clear()
        for device in self._fleet.devices.values():
            device.lose_link()
        self._fleet.after(1.0, self._fleet.centre.reconnect)


class Device:
    """A device: what survives a power cut, what does not, and the daemon's loop around the agent."""

    def __init__(self, fleet: Fleet, name: DeviceId, incumbent: Digest | None) -> None:
        self._fleet = fleet
        self.name = name
        self.saved = SlotState(model=MODEL, committed=incumbent)
        self._blobs = {incumbent} if incumbent else set()
        self.outbox: dict[Key, tuple[str, bytes]] = {}
        self.off = False
        self.agent: Agent | None = None
        self.loaded: Digest | None = None
        self.link = 0
        self._links = 0
        self._lives = 0
        self._will: Callable[[], None] | None = None
        fleet.after(fleet.rng.uniform(0.0, 2.0), self._boot)

    def settled(self) -> bool:
        """Whether the device runs what the release in force asks for, or has quarantined it, and the centre knows."""
        document, record = self._fleet.centre.track.release, self._fleet.centre.records.get(self.name)
        if self.agent is None or record is None or not record.online:
            return False
        slots, report = self.agent.slots, record.report(MODEL)
        revision, reached = 0, True
        if document is not None:
            revision, wanted = document.revision, desired(document, self.name)
            held = wanted is not None and dict(slots.quarantine).get(wanted, 0) >= document.attempt
            reached = wanted is None or slots.committed == wanted or held
        told = report is not None and (report.serving, report.revision) == (self.loaded, revision)
        return slots.trial is None and reached and self.loaded == slots.serving and told

    # ── power and link ─────────────────────────────────────────────────────────────────────────────────

    def _boot(self) -> None:
        if self.off or self.agent is not None:
            return
        rng = self._fleet.rng
        session = f"{rng.getrandbits(64):016x}"
        self.agent = Agent(
            identity(self.name, session), self.saved, BUDGET, random.Random(rng.getrandbits(32))
        )
        self._served = 0
        self._window_at = self._fleet.now + rng.uniform(0.0, self._fleet.window_seconds)
        self._later(BEAT_SECONDS, self._beat)
        self._later(rng.uniform(0.1, 2.0), self._connect)
        self._feed(ev.Started())

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        """As `Fleet.after`, unless the power fails before."""
        life = self._lives
        self._fleet.after(seconds, lambda: call() if life == self._lives else None)

    def cut_power(self) -> None:
        if self.agent is not None:
            self._part()
            self._fleet.serves(self, None)
            self.agent = None
            self._lives += 1
            self._fleet.after(self._fleet.rng.uniform(1.0, 8.0), self._boot)

    def switch(self, *, on: bool) -> None:
        self.off = not on
        self._boot() if on else self.cut_power()

    def _connect(self) -> None:
        assert self.agent is not None
        if self._will is not None and not self._fleet.faults.late_wills:
            self._be_missed(self._will)
        self._links += 1
        self.link, self._pipe = self._links, 0.0
        self._fleet.broker.attach(self, self.agent.subscriptions)
        self._feed(ev.Connected())

    def lose_link(self) -> None:
        if self.link:
            self._part()
            self._later(self._fleet.rng.uniform(0.5, 5.0), self._connect)
            self._feed(ev.Disconnected())

    def _part(self) -> None:
        if self.link and self.agent is not None:
            will = self.agent.death()
            self._will = partial(self._fleet.broker.publish, will.topic, will.payload, will.delivery)
            self._fleet.after(self._fleet.rng.uniform(0.0, 3.0), partial(self._be_missed, self._will))
        self.link = 0

    def _be_missed(self, will: Callable[[], None]) -> None:
        if will is self._will or self._fleet.faults.late_wills:
            self._will = None
            will()

    def _send(self, topic: str, payload: bytes, delivery: Delivery) -> None:
        if self.link:
            self._pipe = max(self._pipe, self._fleet.now + self._fleet.delay())
            arrive = partial(self._arrive, self.link, topic, payload, delivery)
            self._fleet.after(self._pipe - self._fleet.now, arrive)

    def _arrive(self, link: int, topic: str, payload: bytes, delivery: Delivery) -> None:
        if link == self.link:
            self._fleet.broker.publish(topic, payload, delivery)

    def receive(self, link: int, topic: str, payload: bytes) -> None:
        if link and link == self.link:
            self._feed(ev.MessageArrived(topic, payload))

    # ── the daemon's loop ──────────────────────────────────────────────────────────────────────────────

    def _beat(self) -> None:
        fleet, agent = self._fleet, self.agent
        assert agent is not None
        self._later(BEAT_SECONDS, self._beat)
        if self.loaded is not None and agent.slots.trial is not None:
            self._served += ROWS_PER_BEAT
            times = cpu_times(fleet.kinds[self.loaded], self._served)
            self._feed(
                ev.Served(
                    digest=self.loaded,
                    predictions=ROWS_PER_BEAT,
                    failed=0,
                    seconds=BEAT_SECONDS,
                    cpu=times,
                    rss_bytes=0,
                )
            )
        if self.loaded is not None and fleet.now >= self._window_at:
            self._window_at = fleet.now + fleet.window_seconds
            self._feed(fleet.windows[self.loaded])
        self._feed(ev.Ticked())
        if fleet.chance(fleet.faults.breaks):
            self.lose_link()

    def _feed(self, event: ev.AgentEvent) -> None:
        queue, life = deque([event]), self._lives
        while queue and self.agent is not None and life == self._lives:
            for action in self.agent.handle(queue.popleft(), self._fleet.now, self._fleet.wall_ns):
                if self._fleet.chance(self._fleet.faults.power):
                    self.cut_power()
                    return
                followed_by = self._perform(action)
                if life != self._lives:
                    return  # it crashed
                if followed_by is not None:
                    queue.append(followed_by)

    def _perform(self, action: ev.Action) -> ev.AgentEvent | None:
        fleet = self._fleet
        match action:
            case ev.Save(slots):
                was_committed = self.saved.committed is not None
                self.saved = from_document(json.loads(json.dumps(to_document(slots))), MODEL)
                fleet.law(self.saved == slots, "the state did not survive its own document")
                fleet.law(slots.committed is not None or not was_committed, "a committed model was forgotten")
                fleet.law(self._blobs >= set(slots.known), "a model the state names has no blob")
            case ev.Serve(digest):
                fleet.law(self.saved.serving == digest, "a model was loaded before the state was durable")
                if digest is not None and fleet.kinds[digest].crashes:
                    self.cut_power()
                    return None
                self._served = 0
                fleet.serves(self, digest)
            case ev.Collect(keep):
                fleet.law(set(keep) >= set(self.saved.known), "a blob the state needs was collected")
                self._blobs &= set(keep)
            case ev.Publish(topic, payload, delivery):
                self._send(topic, payload, delivery)
            case ev.Append(session, seq, topic, payload):
                key = (self.name, session, seq)
                fleet.law(key not in self.outbox, "a key was used twice")
                self.outbox[key] = (topic, payload)
                if topic == TOPICS.window(self.name, MODEL):
                    fleet.measured.add(key)
            case ev.Send(room, skip):
                return self._send_records(room, skip)
            case ev.Trim(session, seqs):
                for key in ((self.name, session, seq) for seq in seqs):
                    if self.outbox.pop(key, None):
                        fleet.law(
                            key in fleet.centre.windows or key in fleet.centre.events, "unstored, yet trimmed"
                        )
            case ev.StartUpdate():
                self._later(fleet.rng.uniform(0.2, 2.0), partial(self._child_works, action))
        return None

    def _send_records(self, room: int, skip: frozenset[tuple[SessionId, int]]) -> ev.AgentEvent | None:
        self._fleet.law(room + len(skip) <= MAX_IN_FLIGHT, "too many records in flight")
        waiting = [(key, record) for key, record in self.outbox.items() if key[1:] not in skip][:room]
        if not self.link or not waiting:
            return None
        for _, (topic, payload) in waiting:
            self._send(topic, payload, topics.WINDOW)
        return ev.Sent(tuple(key[1:] for key, _ in waiting))

    # ── the update child ───────────────────────────────────────────────────────────────────────────────

    def _child_works(self, job: ev.StartUpdate) -> None:
        fleet, message = self._fleet, decode(job.release)
        assert isinstance(message, messages.SignedRelease)
        document, answer = from_payload(message.payload), {"release": message.payload.hex()}
        end: dict[str, object]
        if not self.link or fleet.chance(fleet.faults.child):
            end = {"ok": False, "stage": "fetch", "reason": "no network", "retry": True}
        elif message.signatures[0][1] != b"good":
            end = {"ok": False, "stage": "release", "reason": "signed by nobody we trust", "retry": False}
        elif document.revision < job.floor:
            end = {"ok": False, "stage": "release", "reason": "below the floor", "retry": False}
        else:
            held = dict(job.quarantine)
            action, wanted = needs(document, self.name, serving=job.serving, have=job.have, quarantine=held)
            end = {"ok": True, "desired": wanted or "", "action": action, **answer}
            if action == "install" and wanted is not None:
                if fleet.kinds[wanted].probe_ok:
                    self._blobs.add(wanted)
                    fleet.fetched += 1
                else:
                    end = {"ok": False, "stage": "probe", "reason": "slow", "digest": wanted, **answer}
                self._feed(ev.UpdatePhase("fetching", wanted))
        self._later(fleet.rng.uniform(0.0, 2.0), lambda: self._feed(ev.update_ended(end)))


class Centre:
    """The aggregator's store and the coordinator with its ledger, as the service joins them."""

    def __init__(self, fleet: Fleet, rollouts: RolloutConfig, incumbent: Digest | None) -> None:
        self._fleet = fleet
        self._rollouts = rollouts
        self.windows: dict[Key, bytes] = {}
        self.events: set[Key] = set()
        self.records: dict[DeviceId, DeviceRecord] = {}
        self._arms: dict[Digest, list[tuple[int, DeviceId, int]]] = {digest: [] for digest in fleet.kinds}
        first = release(None, incumbent, revision=1, threshold=0, rollout="first") if incumbent else None
        self.track = Track(cohort=COHORT, model=MODEL, release=first)
        self.latecomers: set[DeviceId] = set()
        self.audit: list[str] = []
        self._requests: dict[int, Request] = {}
        self._orders = 0
        self._lives = 0
        self._pipe = 0.0
        self._waiting: list[tuple[str, bytes]] = []
        self._rise()
        fleet.after(BEAT_SECONDS, self._tick)

    @property
    def rollout(self) -> Rollout:
        assert self.track.rollout is not None, "no rollout was accepted yet"
        return self.track.rollout

    @property
    def busy(self) -> bool:
        """Whether an order waits or a rollout is under way."""
        r = self.track.rollout
        return bool(self._requests) or (r is not None and r.state in ("draft", "running"))

    def order(self, kind: str, **document: Any) -> None:
        """What the command line writes into the ledger; taken up at the next tick."""
        self._orders += 1
        text = json.dumps({"model": MODEL, **document})
        self._requests[self._orders] = Request(
            number=self._orders,
            kind=kind,
            document=text,
            by="test",
            why="test",
            created_ns=self._fleet.wall_ns,
        )

    def _rise(self) -> None:
        revision = self.track.release.revision if self.track.release else 0
        tracks = [self.track] if self.track.release or self.track.rollout else []
        self._coordinator: Coordinator | None = Coordinator(
            FLEET, self._rollouts, tracks=tracks, revisions={COHORT: revision}, devices=self.records.values()
        )
        self._asked: dict[DeviceId, float] = {}
        self.reconnect()
        waiting, self._waiting = self._waiting, []
        for topic, payload in waiting:
            self.receive(topic, payload)

    def reconnect(self) -> None:
        self._decide(core.Connected())

    def die(self) -> None:
        if self._coordinator is None:
            return
        self._coordinator = None
        self._lives += 1
        self._fleet.after(self._fleet.rng.uniform(1.0, 6.0), self._rise)

    def _send(self, topic: str, message: messages.Message | bytes, delivery: Delivery) -> None:
        payload = message if isinstance(message, bytes) else encode(message)
        life, fleet = self._lives, self._fleet
        self._pipe = max(self._pipe, fleet.now + fleet.delay())
        arrive = partial(fleet.broker.publish, topic, payload, delivery)
        fleet.after(self._pipe - fleet.now, lambda: arrive() if life == self._lives else None)

    # ── telemetry in ───────────────────────────────────────────────────────────────────────────────────

    def receive(self, topic: str, payload: bytes) -> None:
        if self._coordinator is None:
            self._waiting.append((topic, payload))  # its session at the broker is persistent
            return
        plan = ingest.plan([ingest.read(TOPICS, topic, payload)], {})
        self._fleet.law(not plan.dead, f"a device sent what is no message: {plan.dead}")
        for arrival in plan.windows:
            self._store(arrival.window, payload)
        for event in plan.events:
            self.events.add((event.device, event.session, event.seq))
        for ack in plan.acks:
            self._send(TOPICS.ack(ack.device), ack, topics.ACK)
            self._question(ack.device, ack.session)
        for status in plan.statuses:
            before = self.records.get(status.device)
            after = presence.apply(before, status, self._fleet.wall_ns)
            if after is not before:
                self.records[status.device] = after
                self._decide(core.StatusSeen(after))

    def _store(self, window: messages.Window, payload: bytes) -> None:
        key = (window.device, window.session, window.seq)
        if key in self.windows:
            self._fleet.law(self.windows[key] == payload, "one key names two windows")
        else:
            self.windows[key] = payload
            self._arms[window.digest].append((self._fleet.wall_ns, window.device, window.profile.rows))

    def _question(self, device: DeviceId, session: SessionId) -> None:
        record = self.records.get(device)
        if record is None or not record.online:
            self._ask_for_rebirth(device)
        elif record.session == session:
            self.records[device] = presence.heard(record, self._fleet.wall_ns)

    def _ask_for_rebirth(self, device: DeviceId) -> None:
        if self._fleet.now >= self._asked.get(device, -1e9) + REBIRTH_SECONDS:
            self._asked[device] = self._fleet.now
            command = messages.Command(device=device, name="rebirth", correlation="")
            self._send(TOPICS.command(device), command, topics.COMMAND)

    # ── control out ────────────────────────────────────────────────────────────────────────────────────

    def _tick(self) -> None:
        self._fleet.after(BEAT_SECONDS, self._tick)
        for record in [r for r in self.records.values() if r.doubted_ns]:
            self._ask_for_rebirth(record.device)
            settled = presence.settle(record, self._fleet.wall_ns, DOUBT_NS)
            if settled is not record:
                self.records[record.device] = settled
                self._decide(core.StatusSeen(settled))
        for request in tuple(self._requests.values()):
            self._decide(core.RequestSeen(request, MODEL))
        if self._coordinator is not None:
            self._decide(core.Tick({ask.rollout: self._evidence(ask) for ask in self._coordinator.asks}))

    def totals(self, digest: Digest, since_ns: int) -> tuple[DeviceTotals, ...]:
        found: dict[DeviceId, tuple[int, int]] = {}
        for at_ns, device, rows in self._arms[digest]:
            if at_ns >= since_ns:
                windows, before = found.get(device, (0, 0))
                found[device] = (windows + 1, before + rows)
        zero = dict.fromkeys(("failed", "refused", "labelled", "correct", "wire_bytes", "rss_bytes"), 0)
        times = dict.fromkeys(("peak_rss_bytes", "first_ns", "last_ns"), 0)
        return tuple(
            DeviceTotals(device=device, digest=digest, windows=windows, rows=rows, **zero, **times)
            for device, (windows, rows) in found.items()
        )

    def _evidence(self, ask: core.Ask) -> Evidence:
        now = self.totals(ask.candidate, ask.candidate_since_ns)
        before = self.totals(ask.incumbent, ask.incumbent_since_ns) if ask.incumbent else ()
        kinds = self._fleet.kinds
        return Evidence(
            candidate=now,
            control=before,
            candidate_latency=cpu_times(kinds[ask.candidate], sum(t.rows for t in now)),
            control_latency=cpu_times(kinds[ask.incumbent], sum(t.rows for t in before))
            if ask.incumbent
            else LatencyHistogram(),
        )

    def _decide(self, event: core.Event) -> None:
        """Saves in one transaction, then publishes; death may come before either."""
        if self._coordinator is None:
            return
        actions = self._coordinator.handle(event, self._fleet.wall_ns)
        if actions and self._fleet.chance(self._fleet.faults.centre):
            self.die()
            return
        for action in actions:
            match action:
                case core.Save(track):
                    self.track = track
                case core.Answer(number, accepted, reason):
                    del self._requests[number]
                    self._fleet.law(accepted or self._fleet.refusals, f"an order was refused: {reason}")
                case core.Audit(entry):
                    self.audit.append(entry.what)
        for action in actions:
            if isinstance(action, core.Publish):
                if self._fleet.chance(self._fleet.faults.centre):
                    self.die()
                    return
                self._publish(action.release)

    def _publish(self, document: Release) -> None:
        if 0 < document.threshold < EVERYONE:
            for name in self._fleet.devices:
                record = self.records.get(name)
                below = stage_hash(name, document.rollout) < document.threshold
                if below and (record is None or not record.online):
                    self.latecomers.add(name)
        self._send(TOPICS.release(COHORT, MODEL), signed(document), topics.RELEASE)
