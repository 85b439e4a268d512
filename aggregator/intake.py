"""Telemetry in: from a link into the store, and back to the devices that it is stored.

Sources of labels are told as devices are. PUBACK would not do for them either: it says that the broker has a message,
which a broker that is killed forgets, and nobody would send it again. What contradicts the contract or what was told
before is acknowledged too, for sending it again cannot help; the dead letters keep it.

The order that loses nothing: take what has arrived (bounded, senders in turn), commit it in one transaction per store,
tell the devices what is stored, and only then let the broker forget the messages. Killed at any point, whatever was
acknowledged is on disk, and whatever was not comes again: from the broker's session or from the device's outbox.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from aggregator.adapters.registry import Registry
from aggregator.config import IngestConfig
from aggregator.core import ingest
from aggregator.core.turns import Turns
from aggregator.records import Batch, DeadLetter, Stored
from aggregator.stores import Unstorable, WindowStore
from edge_runtime.contract.codec import encode
from edge_runtime.contract.errors import BudgetExceeded, LinkError
from edge_runtime.contract.ids import DeviceId, Digest, SessionId
from edge_runtime.contract.manifest import ArtifactInfo
from edge_runtime.contract.messages import Ack, Status
from edge_runtime.contract.topics import Topics
from edge_runtime.core.backoff import Every
from edge_runtime.link import Connected, Delivered, Disconnected, Link, Outgoing, Received

POLL_SECONDS: Final = 0.1
STOP_SECONDS: Final = 2.0
RECEIVE_MAXIMUM: Final = 2000
"""Messages that a broker of MQTT 5 sends ahead: what a batch and everybody's turns are chosen from."""
MAX_LOOKED_AT: Final = 4096
"""Messages taken from the link for one batch; what a flood sends beyond waits for the next, others' with it."""
FLOOD_SECONDS: Final = 10.0
"""The least time between two lines about floods."""
NAMED_FLOODS: Final = 5

log = logging.getLogger(__name__)

Senders = frozenset[tuple[DeviceId, SessionId]]


class Intake:
    """One subscription's way into the store.

    ``tell`` is given the batch's statuses before the broker forgets them, and makes them durable. ``note`` is given
    what each batch came to.
    """

    def __init__(
        self,
        config: IngestConfig,
        fleet: Topics,
        link: Link,
        *,
        windows: WindowStore,
        registry: Registry,
        tell: Callable[[Iterable[Status], int], object],
        note: Callable[[Batch], object],
        wall_ns: Callable[[], int],
    ) -> None:
        self._config = config
        self._topics = fleet
        self._link = link
        self._windows = windows
        self._registry = registry
        self._tell = tell
        self._note = note
        self._wall_ns = wall_ns
        self._turns: Turns[Received] = Turns(config.device_messages)
        self._shed: Counter[str] = Counter()
        self._floods: Counter[str] = Counter()
        self._flood_line = Every(FLOOD_SECONDS)
        self._stored = 0
        self._held: tuple[list[Received], Counter[str]] | None = None
        self._announcement: tuple[Outgoing, Callable[[str], object]] | None = None
        self._announced: int | None = None

    def start(self) -> None:
        """Begins to connect."""
        self._link.start()

    def close(self) -> None:
        """Ends the connection once what was published is written; what still waits for its turn comes again."""
        self._link.stop(STOP_SECONDS)
        log.info("ingested windows=%d", self._stored)

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us."""
        return self._link.connected

    def announce(self, message: Outgoing, answer: Callable[[str], object]) -> None:
        """Publishes as soon as there is a connection, and again until the broker has it, one message at a time.

        ``answer`` is called then: with nothing, or with why the broker will not have it.
        """
        self._announcement, self._announced = (message, answer), None

    def withdraw(self) -> None:
        """Forgets what is not answered yet; it may have been published."""
        self._announcement = self._announced = None

    def _announce(self) -> None:
        if self._announcement is None or self._announced is not None:
            return
        try:
            self._announced = self._link.publish(self._announcement[0])
        except LinkError:
            return  # there is no connection; a later step tries again
        except BudgetExceeded as e:
            self._answer(str(e))

    def _answer(self, refusal: str) -> None:
        if self._announcement is not None:
            _, answer = self._announcement
            self.withdraw()
            answer(refusal)

    def step(self, wait_seconds: float = POLL_SECONDS) -> Senders:
        """Takes in one batch, waiting a moment for the first message; returns whose windows and events were in it.

        Raises:
            StoreError: it could not be stored. Nothing of it was acknowledged; the next call begins with it again.
        """
        self._announce()
        if self._held is None:
            batch = self._take(wait_seconds)
            shed, self._shed = self._shed, Counter()
            if not batch and not shed:
                return frozenset()
            self._held = batch, shed
        senders = self._ingest(*self._held)
        self._held = None
        return senders

    def _take(self, wait_seconds: float) -> list[Received]:
        """What has arrived, at most a batch; waits a moment for the first message and not at all for more."""
        looked_at = 0
        if self._turns:
            wait_seconds = 0.0
        while (room := self._config.batch_messages - len(self._turns)) > 0 and looked_at < MAX_LOOKED_AT:
            events = self._link.poll_many(min(room, MAX_LOOKED_AT - looked_at), wait_seconds)
            if not events:
                break
            wait_seconds = 0.0
            for event in events:
                match event:
                    case Received():
                        self._queue(event)
                        looked_at += 1
                    case Connected():
                        log.info("connected identity=aggregator session_present=%s", event.session_present)
                    case Disconnected():
                        log.info("disconnected identity=aggregator reason=%r", event.reason)
                        self._announced = None
                    case Delivered() if event.token == self._announced:
                        self._answer(event.refusal)
                    case _:
                        pass
        return self._turns.take(self._config.batch_messages)

    def _queue(self, message: Received) -> None:
        """Lets a message wait for its turn, or has the broker forget it: who sent it was not told that it is stored.

        Left to the broker it would stay on the way to us, and once a flood is all that is on the way nobody else comes.
        """
        sender = ingest.sender(self._topics, message.topic)
        if not self._turns.put(sender, message):
            self._link.acknowledge(message)
            self._shed[sender] += 1

    def _ingest(self, batch: list[Received], shed: Counter[str]) -> Senders:
        began = time.monotonic()
        decoded = ingest.read_all(self._topics, [(message.topic, message.payload) for message in batch])
        found = {digest: self._registry.info(digest) for digest in ingest.digests(decoded)}
        infos = {digest: info for digest, info in found.items() if info is not None}
        plan = ingest.plan(decoded, infos)
        now_ns = self._wall_ns()
        stored = None
        commit_began = time.monotonic()
        if plan.windows or plan.events or plan.labels or plan.dead:
            plan, stored = self._store(decoded, infos, plan, now_ns)
            self._stored += stored.stored
        commit_seconds = time.monotonic() - commit_began
        self._tell(plan.statuses, now_ns)
        acks = [(self._topics.ack(ack.device), ack) for ack in plan.acks]
        acks += [(self._topics.labels_ack(source), ack) for source, ack in plan.labels_acks]
        unsaid = self._say(acks) if acks else 0
        self._link.acknowledge_all(batch)
        for letter in plan.dead:
            log.warning(
                "dead_letter cause=%s topic=%r reason=%r",
                *(letter.cause, letter.topic[:200], letter.reason[:200]),
            )
        self._report_floods(shed)
        causes = Counter(letter.cause for letter in plan.dead)
        if stored is not None and stored.overlapping:
            causes["overlap"] += stored.overlapping
        for why in stored.contradictions if stored is not None else ():
            causes["labels"] += 1
            log.warning("dead_letter cause=labels reason=%r", why[:400])
        self._note(
            Batch(
                messages=len(batch),
                windows=stored.stored if stored else 0,
                duplicates=stored.duplicates if stored else 0,
                overlaps=stored.overlapping if stored else 0,
                events=len(plan.events),
                statuses=len(plan.statuses),
                dead=tuple(sorted(causes.items())),
                acks=len(acks) - unsaid,
                labels=stored.labels if stored else 0,
                unsaid=unsaid,
                shed=sum(shed.values()),
                seconds=time.monotonic() - began,
                commit_seconds=None if stored is None else commit_seconds,
            )
        )
        senders = {(w.window.device, w.window.session) for w in plan.windows}
        return frozenset(senders | {(e.device, e.session) for e in plan.events})

    def _append(self, plan: ingest.Plan, now_ns: int) -> Stored:
        return self._windows.append(plan.windows, plan.events, plan.dead, now_ns, labels=plan.labels)

    def _store(
        self,
        decoded: Sequence[ingest.Decoded],
        infos: Mapping[Digest, ArtifactInfo],
        plan: ingest.Plan,
        now_ns: int,
    ) -> tuple[ingest.Plan, Stored]:
        """Commits the plan; where no store can hold some message, message by message, and that one is a dead letter.

        Tried again as one batch it would keep everything else from being stored, for ever. It is acknowledged.
        """
        try:
            return plan, self._append(plan, now_ns)
        except Unstorable as e:
            log.warning("sifted messages=%d reason=%r", len(decoded), str(e))
        dead, done = list(plan.dead), list[Stored]()
        for one in decoded:
            try:
                done.append(self._append(ingest.plan([one], infos), now_ns))
            except Unstorable as e:
                dead.append(DeadLetter(one.topic, one.payload, str(e), "counts"))
                done.append(self._append(ingest.Plan(dead=(dead[-1],)), now_ns))
        return replace(plan, dead=tuple(dead)), Stored(
            stored=sum(part.stored for part in done),
            duplicates=sum(part.duplicates for part in done),
            overlapping=sum(part.overlapping for part in done),
            labels=sum(part.labels for part in done),
            contradictions=tuple(why for part in done for why in part.contradictions),
        )

    def _say(self, acks: Sequence[tuple[str, Ack]]) -> int:
        """Publishes acknowledgements on topics; returns how many had to be left: each comes again with its message."""
        said = self._link.publish_all([(topic, encode(ack)) for topic, ack in acks])
        if said < len(acks):
            log.info("not_published acks=%d of=%d", len(acks) - said, len(acks))
        return len(acks) - said

    def _report_floods(self, shed: Counter[str]) -> None:
        self._floods += shed
        if self._floods and self._flood_line.due(time.monotonic()):
            worst = " ".join(f"{name or '?'}={n}" for name, n in self._floods.most_common(NAMED_FLOODS))
            log.warning("flood shed=%d devices=%d worst=%r", self._floods.total(), len(self._floods), worst)
            self._floods.clear()
