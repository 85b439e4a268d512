"""What a device says: its status, its events and its windows, in one sequence of numbers."""

from dataclasses import dataclass
from typing import Final

from edge_runtime.contract import topics
from edge_runtime.contract.codec import encode
from edge_runtime.contract.ids import CohortId, DeviceId, FleetId, ModelName, SessionId
from edge_runtime.contract.messages import Event, ModelReport, Status, Window
from edge_runtime.core import lifecycle
from edge_runtime.core.events import Append, Publish, WindowClosed

LAST_SEQ: Final = 2**62
"""The number of the last will, above those of all births of its session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who the device is, and how it came to be started: ``last_exit`` tells what the process before ended of."""

    fleet: FleetId
    device: DeviceId
    cohort: CohortId
    session: SessionId
    model: ModelName
    attributes: tuple[tuple[str, str], ...] = ()
    last_exit: str = ""
    restarts: int = 0


class Voice:
    """Makes the messages of one session. Not thread-safe."""

    def __init__(self, identity: Identity) -> None:
        self._me = identity
        self._topics = topics.Topics(identity.fleet)
        self._seq = 0

    def death(self) -> Publish:
        """The last will of this session."""
        me = self._me
        status = Status(device=me.device, session=me.session, seq=LAST_SEQ, online=False)
        return Publish(self._topics.status(me.device), encode(status), topics.STATUS)

    def birth(self, models: tuple[ModelReport, ...], clock: str) -> Publish:
        """The device is here, and this is what it runs."""
        me = self._me
        status = Status(
            device=me.device,
            session=me.session,
            seq=self._next_seq(),
            online=True,
            attributes=tuple(sorted({**dict(me.attributes), "cohort": me.cohort}.items())),
            models=models,
            last_exit=me.last_exit,
            restarts=me.restarts,
            clock=clock,
        )
        return Publish(self._topics.status(me.device), encode(status), topics.STATUS)

    def note(self, name: str, wall_ns: int, **detail: str) -> Append:
        """An event."""
        event = Event(
            device=self._me.device,
            session=self._me.session,
            seq=self._next_seq(),
            wall_ns=wall_ns,
            name=name,
            detail=tuple(sorted((k, lifecycle.brief(v)) for k, v in detail.items())),
        )
        return Append(event.session, event.seq, self._topics.event(event.device), encode(event))

    def window(self, seen: WindowClosed) -> Append:
        """A closed window; raises `ContractError` when it cannot be said in one message."""
        seq = self._next_seq()
        window = Window(
            device=self._me.device,
            session=self._me.session,
            seq=seq,
            seq_lo=seq,
            model=self._me.model,
            digest=seen.digest,
            start_ns=seen.start_ns,
            end_ns=seen.end_ns,
            synced=seen.synced,
            profile=seen.profile,
            latency=seen.latency,
            queueing=seen.queueing,
            health=seen.health,
            refused=seen.refused,
            failed=seen.failed,
            labelled=seen.labelled,
            correct=seen.correct,
        )
        return Append(window.session, seq, self._topics.window(window.device, window.model), encode(window))

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq
