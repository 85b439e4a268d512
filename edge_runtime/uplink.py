"""The daemon's way to its broker: what happens there as the agent's events, and how it stands for ``--status``.

The daemon loads this module once its model serves: paho and TLS take a fifth of the time that the rest of it takes to
be loaded, and no answer needs them.
"""

import logging
import time
from collections.abc import Callable, Sequence

from edge_runtime.adapters.status_report import LinkReport
from edge_runtime.contract.errors import LinkError
from edge_runtime.contract.topics import Delivery
from edge_runtime.core import events as core
from edge_runtime.link import Connected, Disconnected, Link, Outgoing, Received
from edge_runtime.mqtt.broker import Broker

log = logging.getLogger("skiffd")


class Uplink:
    """A link that carries the agent's messages. The methods are for the daemon's loop, but `wake` for any thread.

    A broker that is away, or TLS files that cannot be used, are reasons why it is not connected and tries again: a
    device serves without it.

    Attributes:
        report: how it stands; may be read from any thread.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        client_id: str,
        will: core.Publish,
        topics: Sequence[str],
        delay: Callable[[int], float],
    ) -> None:
        self._place = f"{broker.host}:{broker.port}"
        self._link = Link(
            broker,
            client_id=client_id,
            will=Outgoing(will.topic, will.payload, will.delivery),
            delay=delay,
            needs_tls_files=False,
        )
        self._state = (time.monotonic(), "not connected yet")
        for topic in topics:
            self._link.subscribe(topic)
        self._link.start()

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and the connection is not known to be lost."""
        return self._link.connected

    @property
    def report(self) -> LinkReport:
        """How it stands, for how long, and why it is down."""
        since, reason = self._state
        return LinkReport(
            broker=self._place,
            connected=self._link.connected,
            since_seconds=time.monotonic() - since,
            reason=reason,
        )

    def poll(self, timeout_seconds: float) -> core.AgentEvent | None:
        """The next thing that happened; None after the timeout, a `wake`, or what does not concern the agent."""
        match self._link.poll(timeout_seconds):
            case Connected():
                self._state = (time.monotonic(), "")
                log.info("connected")
                return core.Connected()
            case Disconnected() as event:
                self._state = (time.monotonic(), event.reason)
                log.info("disconnected reason=%s", event.reason)
                return core.Disconnected()
            case Received() as event:
                return core.MessageArrived(event.topic, event.payload)
            case _:
                return None

    def wake(self) -> None:
        """Ends a `poll` that waits."""
        self._link.wake()

    def hand_over(self, topic: str, payload: bytes, delivery: Delivery) -> None:
        """Gives a message to the connection; raises `LinkError` and `BudgetExceeded` as `Link.publish` does."""
        self._link.publish(Outgoing(topic, payload, delivery))

    def publish(self, action: core.Publish) -> None:
        """Says something that the agent says again where it is lost."""
        try:
            self.hand_over(action.topic, action.payload, action.delivery)
        except LinkError as e:
            log.info("publish_lost topic=%s reason=%s", action.topic, e)

    def close(self, goodbye: core.Publish, timeout_seconds: float) -> None:
        """Says goodbye where there is a connection, waits until everything is acknowledged, and ends it."""
        if self.connected:
            self.publish(goodbye)
        self._link.stop(timeout_seconds)
