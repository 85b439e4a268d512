"""What one process of a fleet does: who is there, who runs what, what moved, and whether to retrain.

Everything here is written by the leader alone; `aggregator.service` says who that is.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from aggregator.adapters.hooks import Hook, HookResult
from aggregator.adapters.published import is_published
from aggregator.adapters.registry import Registry
from aggregator.adapters.signer import Director
from aggregator.arms import Arms
from aggregator.config import AggregatorConfig
from aggregator.core import coordinator as core
from aggregator.core import presence, requests
from aggregator.monitor import Monitor
from aggregator.records import DeviceRecord, SinkState
from aggregator.stores import LedgerStore, StoreError, WindowStore
from aggregator.teller import Teller
from edge_runtime.contract import topics
from edge_runtime.contract.codec import encode
from edge_runtime.contract.errors import LinkError
from edge_runtime.contract.ids import DeviceId, SessionId
from edge_runtime.contract.messages import Command, Status
from edge_runtime.contract.topics import Topics
from edge_runtime.core.backoff import Every
from edge_runtime.link import Connected, Disconnected, Link, Outgoing

PRUNE_SECONDS: Final = 3600.0
STORED_SECONDS: Final = 1.0
DOUBTED_ASKS: Final = 3
"""How often a device whose presence is in doubt is asked before its silence counts."""
QUIET_NS: Final = 600 * 1_000_000_000
"""Who is online and was not heard for so long is asked: twice what a window lasts by default."""
MOST_DOUBTED: Final = 50
"""So many more are asked in one turn, so that a fleet without rows is asked over minutes."""
TWINS_SECONDS: Final = 600.0

log = logging.getLogger(__name__)


class Leader:
    """Presence, rollouts, drift and retraining over one link. Owned by the service's loop.

    Methods raise `StoreError` when a store fails. What was decided then and not kept is forgotten: the next call begins
    with what the ledger says.
    """

    def __init__(
        self,
        config: AggregatorConfig,
        link: Link,
        *,
        director: Director,
        ledger: LedgerStore,
        windows: WindowStore,
        registry: Registry,
        teller: Teller,
        wall_ns: Callable[[], int],
    ) -> None:
        self._config = config
        self._link = link
        self._director = director
        self._ledger = ledger
        self._windows = windows
        self._arms = Arms(windows)
        self._registry = registry
        self._wall_ns = wall_ns
        self._topics = Topics(config.fleet)
        self._rng = random.Random()  # noqa: S311 (no secret)
        self._teller = teller
        self._hook = Hook(
            config.retrain.command,
            config.state_dir / "retrain",
            timeout_seconds=config.retrain.timeout_seconds,
        )
        self._hook_over: tuple[HookResult, str] | None = None
        self._asked: dict[DeviceId, float] = {}
        self._sent_ns: dict[DeviceId, int] = {}
        self._began_ns = wall_ns()
        self._twins: dict[DeviceId, float] = {}
        self._hears_since_ns = wall_ns()
        self._rollouts = Every(config.rollout.tick_seconds)
        self._drift = Every(config.drift.check_seconds)
        self._prune = Every(PRUNE_SECONDS)
        self._pruning = False
        self._ask_stored = Every(STORED_SECONDS)
        self._questioned = max((number for _, _, number in windows.streams()), default=0)
        self._stale = False
        self._load()
        log.info("leads fleet=%s devices=%d", config.fleet, len(self._devices))

    def _load(self) -> None:
        """Takes over what the ledger says."""
        config, ledger = self._config, self._ledger
        self._monitor = Monitor(config, self._windows, ledger, self._registry)
        self._devices = {record.device: record for record in ledger.devices()}
        self._coordinator = core.Coordinator(
            config.fleet,
            config.rollout,
            tracks=ledger.tracks(),
            revisions=ledger.revisions(),
            cohorts=ledger.cohorts(),
            devices=self._devices.values(),
        )
        if not self._hook.busy and self._hook_over is None:
            self._resume_hooks()

    @contextmanager
    def _as_kept(self) -> Iterator[None]:
        """What a store refused is not remembered either: it is read again what was kept."""
        if self._stale:
            self._load()
            self._stale = False
            if self._link.connected:
                self._decide(core.Connected(), self._wall_ns())
        try:
            yield
        except StoreError:
            self._stale = True
            raise

    @property
    def devices(self) -> tuple[DeviceRecord, ...]:
        """What is known of every device."""
        return tuple(self._devices.values())

    def sent_ns(self, device: DeviceId) -> int:
        """When the device's newest window or event came, or this leader began, whichever is later, as wall time."""
        return self._sent_ns.get(device, self._began_ns)

    @property
    def sinks(self) -> tuple[SinkState, ...]:
        """How it stands with whoever is told of alarms."""
        return self._teller.states

    def step(self) -> None:
        """Does whatever is due."""
        with self._as_kept():
            self._step()

    def _step(self) -> None:
        self._listen()
        now = time.monotonic()
        self._teller.step(now, self._wall_ns())
        if self._rollouts.due(now):
            self._tick()
        if self._drift.due(now):
            self._monitor.check(self._devices, self._wall_ns())
        if self._config.ingest.retention_days:
            self._make_room(now)

    def _make_room(self, now: float) -> None:
        """Rolls up what is older than the retention, some of it in each step."""
        is_due = self._prune.due(now)
        if not (is_due or self._pruning):
            return
        before_ns = self._wall_ns() - int(self._config.ingest.retention_days * 86400e9)
        if is_due:
            self._ledger.prune_looks(before_ns)
        gone = self._windows.prune(before_ns)
        self._pruning = gone > 0
        if gone:
            log.info("pruned records=%d", gone)

    def close(self, timeout: float) -> None:
        """Ends a hook that runs, and says so in the ledger; what was told by now is forgotten there."""
        ended = self._hook.stop()
        try:
            self._teller.close(timeout, time.monotonic(), self._wall_ns())
        finally:
            if ended is not None:
                self._record(ended, "interrupted")

    # ── who is there ───────────────────────────────────────────────────────────────────────────────────

    def hear(self, statuses: Iterable[Status], now_ns: int) -> None:
        """Takes statuses over, durable on return, and decides what follows from them."""
        with self._as_kept():
            for record in self._apply(statuses, now_ns):
                self._decide(core.StatusSeen(record), now_ns)

    def _apply(self, statuses: Iterable[Status], now_ns: int) -> list[DeviceRecord]:
        """The records that ``statuses`` changed, in force and durable."""
        changed: dict[DeviceId, DeviceRecord] = {}
        for status in statuses:
            before = self._devices.get(status.device)
            record = presence.apply(before, status, now_ns)
            if presence.is_shared(before, record):
                self._warn_of_twins(status.device)
            if record is not before:
                self._devices[status.device] = changed[status.device] = record
        self._put(changed.values())
        return list(changed.values())

    def _warn_of_twins(self, device: DeviceId) -> None:
        """Two that take turns would fill the log."""
        now = time.monotonic()
        if now >= self._twins.get(device, -math.inf) + TWINS_SECONDS:
            self._twins[device] = now
            log.warning(
                "two machines use this id device=%s: a session that another had replaced speaks again; stop one of "
                "them, or enrol it under a name of its own",
                device,
            )

    def deaf(self, now_ns: int) -> None:
        """Nothing can be heard now, so nobody is silent."""
        self._hears_since_ns = now_ns

    def _put(self, records: Iterable[DeviceRecord]) -> None:
        records = list(records)
        if records:
            with self._ledger.transaction():
                for record in records:
                    self._ledger.put_device(record)

    def question(self, senders: Iterable[tuple[DeviceId, SessionId]], now_ns: int) -> None:
        """Asks devices to say who they are when what they send does not fit what is known of them."""
        for device, session in senders:
            self._sent_ns[device] = now_ns
            record = self._devices.get(device)
            if record is None or not record.online:
                self._rebirth(device)
            elif record.session == session:
                self._devices[device] = presence.heard(record, now_ns)

    def question_stored(self, now_ns: int) -> None:
        """`question` about whatever any process has stored since the last time."""
        if not self._ask_stored.due(time.monotonic()):
            return
        streams = self._windows.streams()
        for _, device, number in streams:
            record = self._devices.get(device)
            if number <= self._questioned:
                continue
            self._sent_ns[device] = now_ns
            if record is None or not record.online:
                self._rebirth(device)
            else:
                self._devices[device] = replace(record, last_seen_ns=now_ns)
        self._questioned = max((number for _, _, number in streams), default=0)

    def _rebirth(self, device: DeviceId, *, level: int = logging.INFO) -> None:
        now = time.monotonic()
        if now < self._asked.get(device, -1e9) + self._config.ingest.rebirth_seconds:
            return
        self._asked[device] = now
        command = Command(device=device, name="rebirth", correlation=f"{self._rng.getrandbits(64):016x}")
        log.log(level, "rebirth_asked device=%s", device)
        self._say(Outgoing(self._topics.command(device), encode(command), topics.COMMAND))

    # ── rollouts ───────────────────────────────────────────────────────────────────────────────────────

    def _listen(self) -> None:
        while (event := self._link.poll(0.0)) is not None:
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
        if self._director.look():
            self._decide(core.Connected(), now_ns)
        self._settle_presence(now_ns)
        for request in self._ledger.pending():
            candidate = requests.candidate_of(request)
            info = self._registry.info(candidate, now=True) if candidate is not None else None
            artifact = info.manifest.name if info is not None else None
            published = is_published(self._config.metadata, candidate) if candidate is not None else None
            namesake = self._ledger.rollout(requests.name_of(request))
            self._decide(
                core.RequestSeen(request, artifact, published, namesake, self._director.trouble), now_ns
            )
        self._decide(core.Tick(self._arms.evidence(self._coordinator.asks)), now_ns)
        self._run_hooks()

    def _settle_presence(self, now_ns: int) -> None:
        patience_ns = int(DOUBTED_ASKS * self._config.ingest.rebirth_seconds * 1e9)
        if not self._link.connected:
            self.deaf(now_ns)  # nobody can be asked
        silent, room = [], MOST_DOUBTED
        for device, record in tuple(self._devices.items()):
            if room:
                known = record
                record = presence.doubt_silent(known, now_ns, self._hears_since_ns, QUIET_NS)  # noqa: PLW2901
                self._devices[device] = record
                room -= record is not known
            if record.doubted_ns:
                self._rebirth(record.device, level=logging.DEBUG)  # who has no rows is asked for ever
                settled = presence.settle(record, now_ns, patience_ns)
                if settled is not record and now_ns - self._hears_since_ns >= patience_ns:
                    silent.append(settled)
        self._devices.update((record.device, record) for record in silent)
        self._put(silent)
        for record in silent:
            self._decide(core.StatusSeen(record), now_ns)

    def _decide(self, event: core.Event, now_ns: int) -> None:
        """Hands the event to the coordinator and performs its actions: save in one transaction, then publish."""
        actions = self._coordinator.handle(event, now_ns)
        kept = [action for action in actions if not isinstance(action, core.Publish | core.Warn)]
        if kept:
            with self._ledger.transaction():
                for change in kept:
                    self._keep(change)
        for action in actions:
            match action:
                case core.Audit(e):
                    log.info("audit what=%r who=%r rollout=%s why=%r", e.what, e.who, e.rollout, e.why)
                case core.Warn(text):
                    log.warning("releases %s", text)
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
        signed = self._director.sign(release)
        if signed is None:
            log.error(
                "release_unsigned model=%s revision=%d: set director_key", release.model, release.revision
            )
            return
        payload = encode(signed)
        topic = self._topics.release(release.cohort, release.model)
        log.info(
            "release cohort=%s model=%s rollout=%s revision=%d threshold=%d",
            *(release.cohort, release.model, release.rollout, release.revision, release.threshold),
        )
        self._say(Outgoing(topic, payload, topics.RELEASE))

    def _say(self, message: Outgoing) -> None:
        """Publishes, or leaves it: commands are given again, releases with the connection."""
        try:
            self._link.publish(message)
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
            self._hook_over = result, "failed" if result.exit_code else "done"
        if self._hook_over is not None:
            self._record(*self._hook_over)
            self._hook_over = None
        if self._hook.busy or not self._config.retrain.command:
            return
        for number, document in self._ledger.retrains("waiting")[:1]:
            self._ledger.move_retrain(number, "running")
            log.info("hook_started request=%d", number)
            try:
                result = self._hook.start(number, document)
            except OSError as e:
                self._ledger.move_retrain(number, "waiting")
                raise StoreError(f"{e.filename}: {e.strerror}; retrain request {number} waits") from e
            if result is not None:
                self._hook_over = result, "failed"

    def _record(self, result: HookResult, state: str) -> None:
        self._ledger.move_retrain(
            result.number,
            state,
            exit_code=result.exit_code,
            output=result.output,
            ended_ns=self._wall_ns(),
        )
        log.info("hook_ended request=%d state=%s exit_code=%d", result.number, state, result.exit_code)
