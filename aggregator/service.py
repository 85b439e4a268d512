"""The aggregator's composition root: one loop that joins MQTT identities, two stores and the pure cores.

One process does everything, over one persistent session. Processes that share a subscription (`IngestConfig.share`)
each take in windows and events; the one that holds the lease leads as well. docs/adr/0015 tells why that is safe.
"""

import gc
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, TypeVar

from aggregator.adapters.exposition import Exposition
from aggregator.adapters.ledger import Ledger
from aggregator.adapters.registry import Registry
from aggregator.adapters.signer import Director
from aggregator.adapters.sinks import sinks
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig, BrokerConfig, IdentityConfig
from aggregator.core.election import RENEWALS, Election
from aggregator.core.spell import Spell
from aggregator.intake import RECEIVE_MAXIMUM, Intake, Senders
from aggregator.leader import Leader
from aggregator.outlook import outlook
from aggregator.records import Batch, Lease, LeaseLost, SinkState
from aggregator.stores import StoreError
from aggregator.teller import Teller
from edge_runtime import __version__
from edge_runtime.contract import topics
from edge_runtime.contract.messages import Status
from edge_runtime.contract.topics import Topics
from edge_runtime.core.backoff import Every, next_delay_seconds
from edge_runtime.link import Link, Outgoing
from edge_runtime.mqtt.broker import Broker

STOP_SECONDS: Final = 2.0
YOUNG_OBJECTS: Final = 50_000
"""So many more before a search for cycles: what batches are made of has none, and goes without one."""
REST_SECONDS: Final = 0.05
"""How long the loop rests when nothing can be taken in."""
CALM_SECONDS: Final = 30.0
"""The leader does not write all the time: its trouble with a store is over when nothing failed for so long."""
MOST_ALARM_DELAY_SECONDS: Final = 30.0
LOOKS_PER_RENEWAL: Final = 5

log = logging.getLogger(__name__)

T = TypeVar("T")


class Service:
    """One fleet's aggregator and coordinator. `run` owns everything until it is told to stop.

    Raises:
        ConfigError: a store or the director's key cannot be opened.
    """

    def __init__(self, config: AggregatorConfig, *, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self._config = config
        self._wall_ns = wall_ns
        self._topics = Topics(config.fleet)
        self._director = Director(config.director_key, config.metadata)
        self._ledger = Ledger(config.ledger_at)
        self._windows = Windows(config.windows_path, dead_letters=config.ingest.dead_letters)
        self._registry = Registry(config.registry)
        self._rng = random.Random()  # noqa: S311 (jitter, no secret)
        self._name = secrets.token_hex(8)
        self._leader: Leader | None = None
        self._control: Link | None = None
        self._statuses: Intake | None = None
        share = config.ingest.share
        whats = ("event", "labels", "window") if share else ("status", "event", "labels", "window")
        self._intake = self._take_in(whats, share)
        lease_seconds = config.ingest.lease_seconds
        self._election = Election(self._name, lease_seconds) if share else None
        self._campaign = Every(lease_seconds / RENEWALS / LOOKS_PER_RENEWAL)
        self._spells = {
            "intake": Spell(self._delay),
            "leader": Spell(self._delay, calm_seconds=CALM_SECONDS),
            "lease": Spell(self._delay),
        }
        self._page = Exposition(__version__)
        self._refresh = Every(config.metrics.refresh_seconds)

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────

    def run(self, stop: threading.Event) -> None:
        """Serves until ``stop`` is set, then closes links and stores."""
        address = self._config.metrics.address
        if address is not None:
            log.info("metrics address=%s:%d", address[0], self._page.serve(*address))
        if self._election is None:
            while self._attempt("leader", self._lead) is None and not stop.wait(REST_SECONDS):
                pass
        self._intake.start()
        # What stays is not looked through again and again for garbage: a batch makes enough objects to ask for it.
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, 10, 10)
        log.info("started fleet=%s process=%s", self._config.fleet, self._name)
        try:
            while not stop.is_set():
                self._step()
        finally:
            self._close()

    def _step(self) -> None:
        """One turn: take in what came, then lead. A store that fails one of them does not keep it from the other."""
        took = self._attempt("intake", self._intake.step)
        if self._election is not None:
            self._attempt("lease", partial(self._stand, self._election))
        self._attempt("leader", partial(self._lead_on, took))
        if took is None:  # else it waited for messages
            time.sleep(REST_SECONDS)
        if self._config.metrics.listen and self._refresh.due(time.monotonic()):
            self._attempt("leader", self._show)

    def _attempt(self, part: str, perform: Callable[[], T]) -> T | None:
        """What ``perform`` returns; None while the store that it needs fails, which is told once.

        Nothing is acknowledged then that is not stored, and nothing is decided that is not kept.
        """
        spell, now = self._spells[part], time.monotonic()
        if not spell.may(now):
            return None
        try:
            found = perform()
        except StoreError as e:
            self._page.store_error(part)
            if spell.failed(time.monotonic()):
                log.error(  # noqa: TRY400 (its words are in the line)
                    "store_failed part=%s reason=%r: it is tried again until it works", part, str(e)
                )
            return None
        lasted = spell.worked(time.monotonic())
        if lasted is not None:
            self._page.store(part, failing=False)
            log.warning("store_works part=%s seconds=%.1f", part, lasted)
        return found

    def _lead_on(self, senders: Senders | None) -> bool:
        """Whether this process leads; does what a leader has to do. ``senders`` is None when nothing was taken in."""
        try:
            if self._leader is None:
                return False
            if senders is None or not (self._statuses or self._intake).connected:
                self._leader.deaf(self._wall_ns())
            if self._statuses is not None:
                self._statuses.step(0.0)
                self._leader.question_stored(self._wall_ns())
            else:
                self._leader.question(senders or frozenset(), self._wall_ns())
            self._leader.step()
        except LeaseLost as e:
            if self._election is None:
                raise
            self._step_down(self._election, str(e))
        return self._leader is not None

    def _show(self) -> None:
        """Brings the page up to date with what is not counted as it happens."""
        self._page.link("aggregator", connected=self._intake.connected)
        self._page.link("coordinator", connected=self._control is not None and self._control.connected)
        if self._leader is None:
            self._page.fleet(None)
            self._page.sinks(SinkState(name, 0, failing=False) for name in self._config.alarms.sinks)
            return
        self._page.sinks(self._leader.sinks)
        self._page.fleet(
            outlook(
                self._ledger,
                self._windows,
                self._leader.devices,
                sent_ns=self._leader.sent_ns,
                silent_before_ns=self._wall_ns() - int(self._config.metrics.silent_seconds * 1e9),
            )
        )

    def _close(self) -> None:
        try:
            self._lay_down()
        except (LeaseLost, StoreError) as e:
            log.warning("leader_closed_late reason=%s", e)
        self._close_links()
        self._intake.close()
        self._page.close()
        self._windows.close()
        self._ledger.close()
        log.info("stopped")

    def _lay_down(self) -> None:
        """Ends what the leader has running, and lets another lead at once."""
        if self._leader is None:
            return
        self._leader.close(STOP_SECONDS)
        election = self._election
        if election is not None and election.held is not None:
            self._ledger.swap_lease(election.held, Lease("", election.held.term, election.held.beat))

    # ── leading ────────────────────────────────────────────────────────────────────────────────────────

    def _stand(self, election: Election) -> None:
        """Renews the lease or bids for it, and steps down when it is another's or may be."""
        now = time.monotonic()
        if not self._campaign.due(now) and (election.held is None or election.leads(now)):
            return
        found = self._ledger.lease()
        held = election.held
        if held is not None and found != held:
            self._step_down(election, f"{found} stands in the place of {held}")
            return
        asked = time.monotonic()
        bid = election.bid(found, asked)
        if bid is not None and self._ledger.swap_lease(found, bid):
            election.win(bid, asked)
            self._ledger.guard(bid)
            if self._leader is None:
                log.info("elected process=%s term=%d", self._name, bid.term)
                try:
                    self._lead()
                except LeaseLost as e:  # it was not heard of for longer than the lease while it took over
                    self._step_down(election, str(e))

    def _lead(self) -> Leader:
        """Takes over what the ledger says, and the sessions of whoever led before: the broker cuts them off."""
        broker, prefix = self._config.broker, f"skiff-{self._config.fleet}"
        self._control = Link(
            _broker(broker, broker.coordinator), client_id=f"{prefix}-coordinator", delay=self._delay
        )
        leader = self._leader = Leader(
            self._config,
            self._control,
            director=self._director,
            ledger=self._ledger,
            windows=self._windows,
            registry=self._registry,
            teller=self._teller(),
            wall_ns=self._wall_ns,
        )
        if self._config.ingest.share:
            self._statuses = self._take_in(("status",), "")
            self._statuses.start()
        self._control.start()
        return leader

    def _step_down(self, election: Election, why: str) -> None:
        log.warning("deposed process=%s reason=%s", self._name, why)
        election.lose()
        leader, self._leader = self._leader, None
        self._close_links()
        try:
            if leader is not None:
                leader.close(STOP_SECONDS)
        except (LeaseLost, StoreError) as e:
            log.info("left_to_successor process=%s reason=%s", self._name, e)
        self._ledger.guard(None)

    def _close_links(self) -> None:
        statuses, self._statuses = self._statuses, None
        control, self._control = self._control, None
        if statuses is not None:
            statuses.close()
        if control is not None:
            control.stop(STOP_SECONDS)

    # ── joining ────────────────────────────────────────────────────────────────────────────────────────

    def _take_in(self, whats: tuple[str, ...], share: str) -> Intake:
        """An intake of its own session.

        One that shares a subscription leaves nothing with the broker when it goes. The leader's session of statuses is
        not the one that a single process has: the broker remembers other subscriptions with that.
        """
        config = self._config
        role = "aggregator" if "window" in whats else "presence"
        name = f"skiff-{config.fleet}-{role}"
        link = Link(
            _broker(config.broker, config.broker.aggregator),
            client_id=f"{name}-{self._name}" if share else name,
            delay=self._delay,
            clean_session=bool(share),
            manual_ack=True,
            receive_maximum=RECEIVE_MAXIMUM,
            inbox_size=RECEIVE_MAXIMUM,
        )
        for what in whats:
            link.subscribe(self._topics.every(what, share))
        return Intake(
            config.ingest,
            self._topics,
            link,
            windows=self._windows,
            registry=self._registry,
            tell=self._hear,
            note=self._note,
            wall_ns=self._wall_ns,
        )

    def _hear(self, statuses: Iterable[Status], now_ns: int) -> None:
        statuses = tuple(statuses)
        if statuses:
            assert self._leader is not None  # only its links subscribe to statuses
            self._leader.hear(statuses, now_ns)

    def _teller(self) -> Teller:
        config = self._config
        return Teller(
            self._ledger,
            sinks(config.alarms, config.state_dir / "alarms", self._announce, self._intake.withdraw),
            keep_seconds=config.alarms.keep_hours * 3600.0,
            delay=partial(next_delay_seconds, rng=self._rng, cap=MOST_ALARM_DELAY_SECONDS),
            note=self._page.alarm,
        )

    def _announce(self, payload: bytes, answer: Callable[[str], object]) -> None:
        self._intake.announce(Outgoing(self._topics.alarm(), payload, topics.ALARM), answer)

    def _note(self, batch: Batch) -> None:
        self._page.batch(batch, self._wall_ns() / 1e9)

    def _delay(self, attempt: int) -> float:
        return next_delay_seconds(attempt, self._rng, cap=10.0)


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
