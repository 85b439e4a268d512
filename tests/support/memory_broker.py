"""A broker in memory: what it retains, and links through which the update child reads that. No network, no wait."""

from collections.abc import Callable, Iterable

import pytest

from edge_runtime.carriers import mqtt as carrier
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.topics import Topics
from edge_runtime.link import Connected, Disconnected, Received
from edge_runtime.mqtt.broker import Broker
from tests.publisher import DEVICE, FLEET
from trainer.publish import Repository


class MemoryBroker:
    """Retained messages, and links that read them; ``asked`` has the topics that were subscribed to.

    Unless told that trust metadata is ``packed``, it gets that in the plain form only, as from an older publisher.
    """

    def __init__(self, *, packed: bool = False) -> None:
        self.retained: dict[str, bytes] = {}
        self.reachable = True
        self.asked: list[str] = []
        self.packed = packed

    def publish(self, repository: Repository, digests: Iterable[Digest] = ()) -> None:
        for topic, payload, _ in repository.outgoing(Topics(FLEET), digests):
            if self.packed or not topic.endswith("z"):
                self.retained[topic] = payload

    def link(self, broker: Broker, *, client_id: str, delay: Callable[[int], float]) -> "MemoryLink":
        assert client_id == f"{DEVICE}-update"
        return MemoryLink(self)

    def stand_before(self, monkeypatch: pytest.MonkeyPatch, *, patience_seconds: float = 0.02) -> None:
        """Takes the place of the update child's link until ``monkeypatch`` is undone; no wait is long."""
        monkeypatch.setattr(carrier, "Link", self.link)
        for name in ("CONNECT_SECONDS", "BUNDLE_SECONDS", "PACKED_SECONDS", "CHUNK_SECONDS"):
            monkeypatch.setattr(carrier, name, patience_seconds)


class MemoryLink:
    """What the child uses of `edge_runtime.link.Link`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.events: list[Connected | Disconnected | Received] = []
        self.open = False

    def start(self) -> None:
        self.open = True
        self.events.append(Connected(False) if self.broker.reachable else Disconnected("refused: test"))

    def stop(self, timeout: float) -> None:
        self.open = False

    def subscribe(self, topic: str, qos: int = 1) -> None:
        assert self.open
        self.broker.asked.append(topic)
        if topic in self.broker.retained:
            self.events.append(Received(topic, self.broker.retained[topic], True, 0))

    def unsubscribe(self, topic: str) -> None:
        assert self.open

    def poll(self, timeout_seconds: float) -> Connected | Disconnected | Received | None:
        assert self.open
        return self.events.pop(0) if self.events else None
