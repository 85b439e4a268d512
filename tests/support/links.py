"""Links for tests, and what is done with them again and again."""

import time
from typing import Any

from edge_runtime.contract.topics import Delivery
from edge_runtime.link import Connected, Delivered, Link, Outgoing
from edge_runtime.mqtt.broker import Broker

WAIT_SECONDS = 15.0
PLAIN = Delivery(1, False)
RETAINED = Delivery(1, True)
ONCE = Delivery(0, False)


class Links:
    """Links of one test, all stopped at its end."""

    def __init__(self, broker, protocol="auto"):
        self.broker = broker
        self.protocol = protocol
        self._open: list[Link] = []

    def make(self, client_id, **options) -> Any:
        broker = options.pop("broker", None) or Broker(
            host=self.broker.host, port=self.broker.port, protocol=options.pop("protocol", self.protocol)
        )
        link = Link(broker, client_id=client_id, delay=options.pop("delay", lambda _: 0.02), **options)
        self._open.append(link)
        return link

    def connect(self, client_id, *topics, settled=True, **options) -> Any:
        """A link that is connected and, unless the first messages matter, whose subscriptions are in force."""
        link = self.make(client_id, **options)
        for topic in topics:
            link.subscribe(topic)
        link.start()
        until(link, Connected)
        if topics and settled:
            settle(link)
        return link

    def close(self):
        for link in self._open:
            link.stop(WAIT_SECONDS)
            assert not link._thread.is_alive()


def settle(link):
    """Returns when the broker has done what this link asked before: it works through its packets in order."""
    deliver(link, "settled", b"")


def until(link, kind, **fields):
    """The next event of a kind, with these fields; others before it are passed over."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        event = link.poll(left)
        if isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items()):
            return event
    raise AssertionError(f"no {kind.__name__} {fields} within {WAIT_SECONDS} s")


def nothing(link, kind, seconds=0.3):
    """No event of a kind comes for a while."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        assert not isinstance(link.poll(left), kind)


def deliver(link, topic, payload, delivery=PLAIN):
    token = link.publish(Outgoing(topic, payload, delivery))
    until(link, Delivered, token=token)
