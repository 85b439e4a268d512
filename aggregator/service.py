"""The aggregator's composition root: one loop that joins two MQTT identities, two stores and the pure cores.

The order that loses nothing: take what has arrived (bounded), commit it in one transaction per store, tell
the devices what is stored, and only then let the broker forget the messages. Killed at any point, whatever
was acknowledged is on disk, and whatever was not comes again: from the broker's session or from the device's
outbox.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from aggregator.adapters.hooks import Hook, HookResult
from aggregator.adapters.ledger import Ledger
from aggregator.adapters.registry import Registry
from aggregator.adapters.signer import Signer
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig, BrokerConfig, IdentityConfig
from aggregator.core import coordinator as core
from aggregator.core import ingest, presence
from aggregator.core.gates import Evidence
from aggregator.monitor import Monitor
from aggregator.records import DeviceRecord, Selection
from edge_runtime.contract import topics
from edge_runtime.contract.codec import encode
from edge_runtime.contract.errors import LinkError
from edge_runtime.contract.ids import DeviceId, SessionId
from edge_runtime.contract.messages import Command, Status
from edge_runtime.contract.topics import Topics
from edge_runtime.core.backoff import Every, next_delay_seconds
from edge_runtime.link import Broker, Connected, Disconnected, Link, LinkEvent, Outgoing, Received

POLL_SECONDS: Final = 0.1
STOP_SECONDS: Final = 2.0
PRUNE_SECONDS: Final = 3600.0
DOUBTED_ASKS: Final = 3
"""How often a device whose presence is in doubt is asked before its silence counts."""
LATENCY_WINDOWS: Final = 500
"""Latencies of an arm are read from its newest windows, so that a look at a gate costs the same on any day."""

log = logging.getLogger(__name__)


class Service:
    """One fleet's aggregator and coordinator. `run` owns everything until it is told to stop.

    Raises:
        ConfigError: a store or the director's key cannot be opened.
    """

    def __init__(self, config: AggregatorConfig, *, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self._config = config
        self._wall_ns = wall_ns
        self._topics = Topics(config.fleet)
        self._signer = Signer(config.director_key) if config.director_key is not None else None
        self._ledger = Ledger(config.ledger_path)
        self._windows = Windows(config.windows_path, dead_letters=config.ingest.dead_letters)
        self._registry = Registry(config.registry)
        self._monitor = Monitor(config, self._windows, self._ledger, self._registry)
        self._devices = {record.device: record for record in self._ledger.devices()}
        self._coordinator = core.Coordinator(
            config.fleet,
            config.rollout,
            tracks=self._ledger.tracks(),
            revisions=self._ledger.revisions(),
            devices=self._devices.values(),
            can_sign=self._signer is not None,
        )
        self._hook = Hook(
            config.retrain.command,
            config.state_dir / "retrain",
            timeout_seconds=config.retrain.timeout_seconds,
        )
        rng = random.Random()  # noqa: S311 (jitter, no secret)
        self._rng = rng

        def delay(attempt: int) -> float:
            return next_delay_seconds(attempt, rng, cap=10.0)

        prefix = f"skiff-{config.fleet}"
        self._telemetry = Link(
            _broker(config.broker, config.broker.aggregator),
            client_id=f"{prefix}-aggregator",
            delay=delay,
            clean_session=False,
            manual_ack=True,
        )
        self._control = Link(
            _broker(config.broker, config.broker.coordinator), client_id=f"{prefix}-coordinator", delay=delay
        )
        self._asked: dict[DeviceId, float] = {}

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────

    def run(self, stop: threading.Event) -> None:
        """Serves until ``stop`` is set, then closes links and stores."""
        self._resume_hooks()
        for what in ("status", "event", "window"):
            self._telemetry.subscribe(self._topics.every(what))
        self._telemetry.start()
        self._control.start()
        log.info("started fleet=%s devices=%d", self._config.fleet, len(self._devices))
        rollouts = Every(self._config.rollout.tick_seconds)
        drift, prune = Every(self._config.drift.check_seconds), Every(PRUNE_SECONDS)
        try:
            while not stop.is_set():
                self._ingest(self._take())
                self._listen()
                now = time.monotonic()
                if rollouts.due(now):
                    self._tick()
                if drift.due(now):
                    self._monitor.check(self._devices, self._wall_ns())
                if prune.due(now) and self._config.ingest.retention_days:
                    before_ns = self._wall_ns() - int(self._config.ingest.retention_days * 86400e9)
                    log.info("pruned windows=%d", self._windows.prune(before_ns))
        finally:
            self._close()

    def _close(self) -> None:
        ended = self._hook.stop()
        if ended is not None:
            self._record(ended, state="interrupted")
        self._control.stop(STOP_SECONDS)
        self._telemetry.stop(STOP_SECONDS)
        self._windows.close()
        self._ledger.close()
        log.info("stopped")

    # ── telemetry in ───────────────────────────────────────────────────────────────────────────────────

    def _take(self) -> list[Received]:
        """What has arrived, at most a batch; waits a moment for the first message and not at all for more."""
        batch: list[Received] = []
        event: LinkEvent | None = self._telemetry.poll(POLL_SECONDS)
        while event is not None:
            match event:
                case Received():
                    batch.append(event)
                    if len(batch) >= self._config.ingest.batch_messages:
                        break
                case Connected():
                    log.info("connected identity=aggregator session_present=%s", event.session_present)
                case Disconnected():
                    log.info("disconnected identity=aggregator reason=%r", event.reason)
                case _:
                    pass
            event = self._telemetry.poll(0.0)
        return batch

    def _ingest(self, batch: list[Received]) -> None:
        if not batch:
            return
        decoded = [ingest.read(self._topics, message.topic, message.payload) for message in batch]
        found = {digest: self._registry.info(digest) for digest in ingest.digests(decoded)}
        plan = ingest.plan(decoded, {digest: info for digest, info in found.items() if info is not None})
        now_ns = self._wall_ns()
        if plan.windows or plan.events or plan.dead:
            self._windows.append(plan.windows, plan.events, plan.dead, now_ns)
        changed = self._apply(plan.statuses, now_ns)
        for ack in plan.acks:
            self._say(self._telemetry, Outgoing(self._topics.ack(ack.device), encode(ack), topics.ACK))
        for message in batch:
            self._telemetry.acknowledge(message)
        for letter in plan.dead:
            log.warning("dead_letter topic=%r reason=%r", letter.topic[:200], letter.reason[:200])
        for record in changed:
            self._decide(core.StatusSeen(record), now_ns)
        senders = {(w.window.device, w.window.session) for w in plan.windows}
        self._question(senders | {(e.device, e.session) for e in plan.events}, now_ns)

    def _apply(self, statuses: Iterable[Status], now_ns: int) -> list[DeviceRecord]:
        """The records that ``statuses`` changed, in force and durable."""
        changed: dict[DeviceId, DeviceRecord] = {}
        for status in statuses:
            before = self._devices.get(status.device)
            record = presence.apply(before, status, now_ns)
            if record is not before:
                self._devices[status.device] = changed[status.device] = record
        self._put(changed.values())
        return list(changed.values())

    def _put(self, records: Iterable[DeviceRecord]) -> None:
        records = list(records)
        if records:
            with self._ledger.transaction():
                for record in records:
                    self._ledger.put_device(record)

    def _question(self, senders: Iterable[tuple[DeviceId, SessionId]], now_ns: int) -> None:
        """Asks devices to say who they are when what they send does not fit what is known of them."""
        for device, session in senders:
            record = self._devices.get(device)
            if record is None or not record.online:
                self._rebirth(device)
            elif record.session == session:
                self._devices[device] = presence.heard(record, now_ns)

    def _rebirth(self, device: DeviceId) -> None:
        now = time.monotonic()
        if now < self._asked.get(device, -1e9) + self._config.ingest.rebirth_seconds:
            return
        self._asked[device] = now
        command = Command(device=device, name="rebirth", correlation=f"{self._rng.getrandbits(64):016x}")
        log.info("rebirth_asked device=%s", device)
        self._say(self._control, Outgoing(self._topics.command(device), encode(command), topics.COMMAND))

    # ── control out ────────────────────────────────────────────────────────────────────────────────────

    def _listen(self) -> None:
        while (event := self._control.poll(0.0)) is not None:
            match event:
                case Connected():
                    log.info("connected identity=coordinator")
                    self._decide(core.Connected(), self._wall_ns())
                case Disconnected():
                    log.info("disconnected identity=coordinator reason=%r", event.reason)
                case _:
                    pass

    def _tick(self) -> None:
        now_ns = self._wall_ns()
        self._settle_presence(now_ns)
        for request in self._ledger.pending():
            candidate = core.candidate_of(request)
            info = self._registry.info(candidate, now=True) if candidate is not None else None
            artifact = info.manifest.name if info is not None else None
            self._decide(core.RequestSeen(request, artifact), now_ns)
        evidence = {ask.rollout: self._evidence(ask) for ask in self._coordinator.asks}
        self._decide(core.Tick(evidence), now_ns)
        self._run_hooks()

    def _settle_presence(self, now_ns: int) -> None:
        patience_ns = int(DOUBTED_ASKS * self._config.ingest.rebirth_seconds * 1e9)
        silent = []
        for record in self._devices.values():
            if record.doubted_ns:
                self._rebirth(record.device)
                settled = presence.settle(record, now_ns, patience_ns)
                if settled is not record:
                    silent.append(settled)
        self._devices.update((record.device, record) for record in silent)
        self._put(silent)
        for record in silent:
            self._decide(core.StatusSeen(record), now_ns)

    def _evidence(self, ask: core.Ask) -> Evidence:
        arms = [Selection(digest=ask.candidate, devices=ask.devices, since_ns=ask.candidate_since_ns)]
        if ask.incumbent is not None:
            arms.append(Selection(digest=ask.incumbent, devices=ask.devices, since_ns=ask.incumbent_since_ns))
        totals = [self._windows.totals(arm) for arm in arms]
        latency = [self._windows.latency(replace(arm, last=LATENCY_WINDOWS)) for arm in arms]
        if ask.incumbent is None:
            return Evidence(candidate=totals[0], candidate_latency=latency[0])
        return Evidence(
            candidate=totals[0],
            control=totals[1],
            candidate_latency=latency[0],
            control_latency=latency[1],
        )

    def _decide(self, event: core.Event, now_ns: int) -> None:
        """Hands the event to the coordinator and performs its actions: save in one transaction, then publish."""
        actions = self._coordinator.handle(event, now_ns)
        kept = [action for action in actions if not isinstance(action, core.Publish)]
        if kept:
            with self._ledger.transaction():
                for change in kept:
                    self._keep(change)
        for action in actions:
            match action:
                case core.Audit(e):
                    log.info("audit what=%r who=%r rollout=%s why=%r", e.what, e.who, e.rollout, e.why)
                case core.Publish():
                    self._publish(action)
                case _:
                    pass

    def _keep(self, action: core.Kept) -> None:
        match action:
            case core.Save():
                self._ledger.put_track(action.track)
            case core.Audit():
                self._ledger.put_audit(action.entry)
            case core.Answer():
                self._ledger.put_answer(action.number, accepted=action.accepted, reason=action.reason)

    def _publish(self, action: core.Publish) -> None:
        release = action.release
        if self._signer is None:
            log.error(
                "release_unsigned model=%s revision=%d: set director_key", release.model, release.revision
            )
            return
        payload = encode(self._signer.sign(release))
        topic = self._topics.release(release.cohort, release.model)
        log.info(
            "release cohort=%s model=%s rollout=%s revision=%d threshold=%d",
            *(release.cohort, release.model, release.rollout, release.revision, release.threshold),
        )
        self._say(self._control, Outgoing(topic, payload, topics.RELEASE))

    def _say(self, link: Link, message: Outgoing) -> None:
        """Publishes, or leaves it: acknowledgements come again with the windows, releases with the connection."""
        try:
            link.publish(message)
        except LinkError as e:
            log.info("not_published topic=%s reason=%r", message.topic, str(e))

    # ── retraining ─────────────────────────────────────────────────────────────────────────────────────

    def _resume_hooks(self) -> None:
        """A hook that ran when the service died is not run again: nobody knows how far it came."""
        for number, _ in self._ledger.retrains("running"):
            self._ledger.move_retrain(
                number,
                "interrupted",
                output="the aggregator ended while the hook ran",
                ended_ns=self._wall_ns(),
            )
            log.warning("hook_interrupted request=%d", number)

    def _run_hooks(self) -> None:
        result = self._hook.poll()
        if result is not None:
            self._record(result, state="failed" if result.exit_code else "done")
        if self._hook.busy or not self._config.retrain.command:
            return
        for number, document in self._ledger.retrains("waiting")[:1]:
            self._ledger.move_retrain(number, "running")
            log.info("hook_started request=%d", number)
            result = self._hook.start(number, document)
            if result is not None:
                self._record(result, state="failed")

    def _record(self, result: HookResult, *, state: str) -> None:
        self._ledger.move_retrain(
            result.number,
            state,
            exit_code=result.exit_code,
            output=result.output,
            ended_ns=self._wall_ns(),
        )
        log.info("hook_ended request=%d state=%s exit_code=%d", result.number, state, result.exit_code)


def _broker(config: BrokerConfig, identity: IdentityConfig) -> Broker:
    return Broker(
        host=config.host,
        port=config.port,
        username=identity.username,
        password=identity.password,
        ca=config.ca,
        certificate=identity.certificate,
        key=identity.key,
        keepalive_seconds=config.keepalive_seconds,
        protocol=config.protocol,
    )
