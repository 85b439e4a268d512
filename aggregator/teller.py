"""Tells others what became of incidents: joins the ledger's outbox, the rules of telling and the sinks."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from aggregator.core import telling as core
from aggregator.records import SinkState, Telling, Told
from aggregator.stores import TellingLedger

ASK_SECONDS: Final = 0.5
"""How often the ledger is asked for what came in."""

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Whoever is told; neither method waits."""

    def begin(self, telling: Telling) -> None:
        """Begins an attempt; there is none under way."""

    def poll(self) -> Told | None:
        """How the attempt ended, once, as soon as it did."""

    def close(self, timeout: float) -> None:
        """Gives up what is under way, within ``timeout`` seconds."""


class Teller:
    """Delivers what the ledger's outbox holds to ``sinks``, one attempt at a time and sink. The leader's loop owns it.

    ``delay`` says how many seconds to rest after a failure, counted from 0. ``note`` is given the sink and ``told``,
    ``failed`` or ``given_up`` as it happens. What was told is forgotten in a transaction of its own: a process that
    dies in between has it told again, with the same ``id``.
    """

    def __init__(
        self,
        ledger: TellingLedger,
        sinks: Mapping[str, Sink],
        *,
        keep_seconds: float,
        delay: Callable[[int], float],
        note: Callable[[str, str], object] = lambda _sink, _what: None,
    ) -> None:
        self._ledger = ledger
        self._sinks = sinks
        self._note = note
        self._outbox = core.Outbox(sinks, keep_seconds=keep_seconds, delay=delay)
        self._last = 0
        self._ask_at = 0.0
        self._over: list[int] = []

    @property
    def states(self) -> tuple[SinkState, ...]:
        """How it stands with each sink."""
        return self._outbox.states

    def step(self, now_seconds: float, now_ns: int) -> None:
        """Does whatever is due; raises `StoreError`, and goes on from there the next time."""
        if now_seconds >= self._ask_at:
            found = self._ledger.tellings(self._last)
            self._ask_at = now_seconds + ASK_SECONDS
            self._last = max((telling.number for telling in found), default=self._last)
            self._perform(self._outbox.found(found))
        self._hear(now_seconds, now_ns)
        for action in self._outbox.due(now_seconds):
            self._sinks[action.telling.sink].begin(action.telling)

    def close(self, timeout: float, now_seconds: float, now_ns: int) -> None:
        """Ends the sinks; what none of them has taken stays in the ledger."""
        for sink in self._sinks.values():
            sink.close(timeout)
        self._hear(now_seconds, now_ns, closing=True)

    def _hear(self, now_seconds: float, now_ns: int, *, closing: bool = False) -> None:
        for name, sink in self._sinks.items():
            told = sink.poll()
            if told is not None and not (closing and told.reason):  # what was cut short has not failed
                self._note(name, "failed" if told.reason else "told")
                self._perform(self._outbox.ended(name, told, now_seconds=now_seconds, now_ns=now_ns))
        if self._over:
            with self._ledger.transaction():
                self._ledger.put_told(self._over)
            self._over.clear()

    def _perform(self, actions: Iterable[core.Action]) -> None:
        for action in actions:
            match action:
                case core.Done(telling):
                    self._over.append(telling.number)
                    log.info("alarm_told sink=%s incident=%d", telling.sink, telling.incident)
                case core.GivenUp(telling, reason):
                    self._over.append(telling.number)
                    self._note(telling.sink, "given_up")
                    log.error(
                        "alarm_undelivered sink=%s incident=%d reason=%r",
                        telling.sink,
                        telling.incident,
                        reason,
                    )
                case core.Failing(sink, reason):
                    log.warning("alarm_sink_failing sink=%s reason=%r: it is tried again", sink, reason)
                case core.Works(sink):
                    log.info("alarm_sink_works sink=%s", sink)
                case core.Deliver():
                    raise AssertionError("attempts are begun where they are due")
