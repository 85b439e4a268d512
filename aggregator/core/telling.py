"""Who is told of an alarm event, when, and when again: the outbox of the alarms without its ledger and its sinks.

Every event is written for every sink in the transaction of its incident, and leaves the ledger when that sink has it:
told at least once, and twice when the process died in between. Laws:

- Events of one incident reach a sink in their order; an event that fails holds up no other incident.
- One attempt at a time and sink; sinks know nothing of each other.
- After a failure the sink rests, and so does the event, each longer the more failed in a row (the caller's delay). Of
  what may be tried the least tried comes first, so that one event that always fails does not stand before the others.
- Of more than `MAX_WAITING` for one sink the oldest are given up, and so is what failed once it is too old, or refused
  for what it says.
- Trouble is told once, and its end once: when everything that failed is told or given up.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from aggregator.looks import AlarmEvent
from aggregator.records import SinkState, Telling, Told
from edge_runtime.contract.ids import FleetId

SCHEMA: Final = 1
MAX_WAITING: Final = 1000


def tellings(fleet: FleetId, events: Iterable[AlarmEvent], sinks: Sequence[str]) -> tuple[Telling, ...]:
    """Each of ``events`` for each of ``sinks``, events in their order."""
    return tuple(
        Telling(sink=sink, incident=e.number, at_ns=e.at_ns, text=text)
        for e in events
        for text in [document(fleet, e)]
        for sink in sinks
    )


def document(fleet: FleetId, e: AlarmEvent) -> str:
    """The event as JSON text, the same for every sink. ``id`` is the same when it is told again, and no other's."""
    alarm = {k: v for k, v in asdict(e.alarm).items() if k not in ("why", "evidence", "closed_window")}
    return json.dumps(
        {
            "schema": SCHEMA,
            "id": f"{fleet}-{e.number}-{e.what}-{e.at_ns}",
            "fleet": fleet,
            "event": e.what,
            "incident": e.number,
            "model": e.model,
            "digest": e.digest,
            "at_ns": e.at_ns,
            "why": e.why,
            **alarm,
            "evidence": dict(e.alarm.evidence),
        },
        sort_keys=True,
    )


# ── actions ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Deliver:
    """Begin an attempt; its end is to be given to `Outbox.ended`."""

    telling: Telling


@dataclass(frozen=True, slots=True)
class Done:
    """The sink has it: forget it."""

    telling: Telling


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Nobody will be told: forget it, and say so."""

    telling: Telling
    reason: str


@dataclass(frozen=True, slots=True)
class Failing:
    """A sink has begun to fail."""

    sink: str
    reason: str


@dataclass(frozen=True, slots=True)
class Works:
    """A sink that failed has everything that it had refused, or that was given up."""

    sink: str


Action = Deliver | Done | GivenUp | Failing | Works


# ── the outbox ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Waiting:
    telling: Telling
    attempts: int = 0
    not_before: float = 0.0


@dataclass(slots=True)
class _Sink:
    queue: dict[int, _Waiting] = field(default_factory=dict)
    under_way: int = 0
    failures: int = 0
    not_before: float = 0.0
    failing: bool = False

    def next(self, now_seconds: float) -> _Waiting | None:
        """What to try now: the oldest event of each incident may be, the least tried of them is."""
        heads: dict[int, _Waiting] = {}
        for waiting in self.queue.values():
            heads.setdefault(waiting.telling.incident, waiting)
        due = [waiting for waiting in heads.values() if waiting.not_before <= now_seconds]
        return min(due, key=lambda waiting: (waiting.attempts, waiting.telling.number), default=None)

    def settled(self) -> bool:
        """Whether nothing that failed is left."""
        return not any(waiting.attempts for waiting in self.queue.values())


class Outbox:
    """What waits for each of ``sinks``. ``delay`` says how many seconds to rest, from the number of failures before.

    ``keep_seconds`` is the age at which an event that fails is given up. Times are the caller's: ``now_seconds``
    monotonic from 0 on, ``now_ns`` by the clock on the wall.
    """

    def __init__(self, sinks: Iterable[str], *, keep_seconds: float, delay: Callable[[int], float]) -> None:
        self._sinks = {name: _Sink() for name in sinks}
        self._keep_seconds = keep_seconds
        self._delay = delay

    @property
    def states(self) -> tuple[SinkState, ...]:
        """How it stands with each sink."""
        return tuple(SinkState(name, len(s.queue), s.failing) for name, s in self._sinks.items())

    def found(self, tellings: Iterable[Telling]) -> tuple[Action, ...]:
        """Takes over what the ledger holds, in its order, each once."""
        actions: list[Action] = []
        for telling in tellings:
            sink = self._sinks.get(telling.sink)
            if sink is None:
                actions.append(GivenUp(telling, f"[alarms] names no {telling.sink} any more"))
                continue
            sink.queue[telling.number] = _Waiting(telling)
            if len(sink.queue) > MAX_WAITING:
                oldest = next(number for number in sink.queue if number != sink.under_way)
                actions.append(
                    GivenUp(sink.queue.pop(oldest).telling, f"{MAX_WAITING} newer ones wait for the sink")
                )
                actions += self._settled(telling.sink, sink)
        return tuple(actions)

    def due(self, now_seconds: float) -> tuple[Deliver, ...]:
        """What is to be tried now: at most one for each sink."""
        actions = []
        for sink in self._sinks.values():
            if sink.under_way or sink.not_before > now_seconds:
                continue
            waiting = sink.next(now_seconds)
            if waiting is not None:
                sink.under_way = waiting.telling.number
                actions.append(Deliver(waiting.telling))
        return tuple(actions)

    def ended(self, name: str, told: Told, *, now_seconds: float, now_ns: int) -> tuple[Action, ...]:
        """How the attempt that was under way at the sink ended."""
        sink = self._sinks[name]
        if told.number != sink.under_way:
            raise ValueError(f"{name}: attempt {told.number} ended, {sink.under_way} was under way")
        sink.under_way = 0
        waiting = sink.queue[told.number]
        telling = waiting.telling
        if not told.reason:
            sink.failures = 0
            del sink.queue[told.number]
            return (Done(telling), *self._settled(name, sink))
        if told.final:
            del sink.queue[told.number]
            return (GivenUp(telling, told.reason), *self._settled(name, sink))
        sink.not_before = now_seconds + self._delay(sink.failures)
        waiting.not_before = now_seconds + self._delay(waiting.attempts)
        sink.failures += 1
        waiting.attempts += 1
        actions: list[Action] = []
        if not sink.failing:
            sink.failing = True
            actions.append(Failing(name, told.reason))
        if now_ns - telling.at_ns > self._keep_seconds * 1e9:
            del sink.queue[told.number]
            actions += (GivenUp(telling, told.reason), *self._settled(name, sink))
        return tuple(actions)

    @staticmethod
    def _settled(name: str, sink: _Sink) -> tuple[Works, ...]:
        if not sink.failing or not sink.settled():
            return ()
        sink.failing = False
        return (Works(name),)
