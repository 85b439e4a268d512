"""The centre of the fleet simulator: the store and the real coordinator with its ledger, as the service joins them."""

import json
from collections.abc import Iterable
from typing import Any

from aggregator.config import RolloutConfig
from aggregator.core import coordinator as core
from aggregator.core import ingest, presence
from aggregator.core.coordinator import Coordinator
from aggregator.core.gates import Evidence
from aggregator.records import DeviceRecord, DeviceTotals, Request, Rollout, Track
from edge_runtime.contract import messages, topics
from edge_runtime.contract.codec import encode
from edge_runtime.contract.ids import DeviceId, Digest, SessionId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.release import EVERYONE, Release, stage_hash
from edge_runtime.contract.topics import Delivery
from tests.simulators.world import BEAT_SECONDS, TOPICS, Broker, Key, World
from tests.support.device import COHORT, FLEET, MODEL, release, signed

REBIRTH_SECONDS = 10.0
DOUBT_NS = 30_000_000_000
QUIET_NS = 60_000_000_000


class Centre:
    """Aggregator and coordinator. ``latecomers`` could not be reached when a stage that they fall in was cut."""

    def __init__(
        self,
        world: World,
        broker: Broker,
        names: Iterable[DeviceId],
        rollouts: RolloutConfig,
        first: Digest | None,
    ) -> None:
        self._world = world
        self._broker = broker
        self._names = tuple(names)
        self._rollouts = rollouts
        self.windows: dict[Key, bytes] = {}
        self.events: set[Key] = set()
        self.records: dict[DeviceId, DeviceRecord] = {}
        self._arms: dict[Digest, list[tuple[int, DeviceId, int]]] = {digest: [] for digest in world.kinds}
        initial = release(None, first, revision=1, threshold=0, rollout="first") if first else None
        self.track = Track(cohort=COHORT, model=MODEL, release=initial)
        self.latecomers: set[DeviceId] = set()
        self.audit: list[str] = []
        self.refused: list[str] = []
        self._requests: dict[int, Request] = {}
        self._orders = 0
        self._lives = 0
        self._pipe = 0.0
        self._waiting: list[tuple[str, bytes]] = []
        broker.centre = self.receive
        self._rise()
        world.after(BEAT_SECONDS, self._tick)

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
        text, now_ns = json.dumps({"model": MODEL, **document}), self._world.wall_ns
        self._requests[self._orders] = Request(
            number=self._orders, kind=kind, document=text, by="test", why="test", created_ns=now_ns
        )

    # ── life and death ─────────────────────────────────────────────────────────────────────────────────

    def _rise(self) -> None:
        revision = self.track.release.revision if self.track.release else 0
        tracks = [self.track] if self.track.release or self.track.rollout else []
        self._coordinator: Coordinator | None = Coordinator(
            FLEET, self._rollouts, tracks=tracks, revisions={COHORT: revision}, devices=self.records.values()
        )
        self._asked: dict[DeviceId, float] = {}
        self._hears_since_ns = self._world.wall_ns
        self.reconnect()
        waiting, self._waiting = self._waiting, []
        for topic, payload in waiting:
            self.receive(topic, payload)

    def lose_ledger(self) -> None:
        """What it knew of devices, releases and revisions is gone; it goes on with an empty ledger."""
        self.track = Track(cohort=COHORT, model=MODEL)
        self.records.clear()
        self._rise()

    def reconnect(self) -> None:
        self._decide(core.Connected())

    def die(self) -> None:
        if self._coordinator is not None:
            self._coordinator = None
            self._lives += 1
            self._world.after(self._world.rng.uniform(1.0, 6.0), self._rise)

    def _send(self, topic: str, payload: bytes, delivery: Delivery) -> None:
        life, world = self._lives, self._world
        self._pipe = max(self._pipe, world.now + world.delay())

        def arrive() -> None:
            if life == self._lives:
                self._broker.publish(topic, payload, delivery)

        world.after(self._pipe - world.now, arrive)

    # ── telemetry in ───────────────────────────────────────────────────────────────────────────────────

    def receive(self, topic: str, payload: bytes) -> None:
        if self._coordinator is None:
            self._waiting.append((topic, payload))  # its session at the broker is persistent
            return
        plan = ingest.plan([ingest.read(TOPICS, topic, payload)], {})
        self._world.law(not plan.dead, f"a device sent what is no message: {plan.dead}")
        for arrival in plan.windows:
            self._store(arrival.window, payload)
        self.events.update((event.device, event.session, event.seq) for event in plan.events)
        for ack in plan.acks:
            self._send(TOPICS.ack(ack.device), encode(ack), topics.ACK)
            self._question(ack.device, ack.session)
        for status in plan.statuses:
            before = self.records.get(status.device)
            after = presence.apply(before, status, self._world.wall_ns)
            if after is not before:
                self.records[status.device] = after
                self._decide(core.StatusSeen(after))

    def _store(self, window: messages.Window, payload: bytes) -> None:
        key = (window.device, window.session, window.seq)
        if key in self.windows:
            self._world.law(self.windows[key] == payload, "one key names two windows")
        else:
            self.windows[key] = payload
            self._arms[window.digest].append((self._world.wall_ns, window.device, window.profile.rows))

    def stored(self, key: Key) -> bool:
        return key in self.windows or key in self.events

    def _question(self, device: DeviceId, session: SessionId) -> None:
        record = self.records.get(device)
        if record is None or not record.online:
            self._ask_for_rebirth(device)
        elif record.session == session:
            self.records[device] = presence.heard(record, self._world.wall_ns)

    def _ask_for_rebirth(self, device: DeviceId) -> None:
        if self._world.now >= self._asked.get(device, -1e9) + REBIRTH_SECONDS:
            self._asked[device] = self._world.now
            command = messages.Command(device=device, name="rebirth", correlation="")
            self._send(TOPICS.command(device), encode(command), topics.COMMAND)

    # ── control out ────────────────────────────────────────────────────────────────────────────────────

    def _tick(self) -> None:
        self._world.after(BEAT_SECONDS, self._tick)
        if self._coordinator is None:
            return
        now_ns = self._world.wall_ns
        for name, record in self.records.items():
            self.records[name] = presence.doubt_silent(record, now_ns, self._hears_since_ns, QUIET_NS)
        for record in [r for r in self.records.values() if r.doubted_ns]:
            self._ask_for_rebirth(record.device)
            settled = presence.settle(record, self._world.wall_ns, DOUBT_NS)
            if settled is not record:
                self.records[record.device] = settled
                self._decide(core.StatusSeen(settled))
        for request in tuple(self._requests.values()):
            self._decide(core.RequestSeen(request, MODEL))
        self._decide(core.Tick({ask.rollout: self._evidence(ask) for ask in self._asks()}))

    def _asks(self) -> tuple[core.Ask, ...]:
        return self._coordinator.asks if self._coordinator is not None else ()

    def totals(self, digest: Digest, since_ns: int = 0) -> tuple[DeviceTotals, ...]:
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
        now, latency = self._arm(ask.candidate, ask.candidate_since_ns)
        before, control = self._arm(ask.incumbent, ask.incumbent_since_ns)
        return Evidence(candidate=now, control=before, candidate_latency=latency, control_latency=control)

    def _arm(self, digest: Digest | None, since_ns: int) -> tuple[tuple[DeviceTotals, ...], LatencyHistogram]:
        if digest is None:
            return (), LatencyHistogram()
        totals = self.totals(digest, since_ns)
        return totals, self._world.kinds[digest].cpu_times(sum(t.rows for t in totals))

    def _decide(self, event: core.Event) -> None:
        """Saves in one transaction, then publishes; death may come before either."""
        if self._coordinator is None:
            return
        actions = self._coordinator.handle(event, self._world.wall_ns)
        if actions and self._world.chance(self._world.faults.centre):
            self.die()
            return
        for action in actions:
            match action:
                case core.Save(track):
                    self.track = track
                case core.Answer(number, accepted, reason):
                    del self._requests[number]
                    self.refused += [] if accepted else [reason]
                case core.Audit(entry):
                    self.audit.append(entry.what)
        for action in actions:
            if isinstance(action, core.Publish):
                if self._world.chance(self._world.faults.centre):
                    self.die()
                    return
                self._publish(action.release)

    def _publish(self, document: Release) -> None:
        if 0 < document.threshold < EVERYONE:
            for name in self._names:
                record = self.records.get(name)
                below = stage_hash(name, document.rollout) < document.threshold
                if below and (record is None or not record.online):
                    self.latecomers.add(name)
        self._send(TOPICS.release(COHORT, MODEL), signed(document), topics.RELEASE)
