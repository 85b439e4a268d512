"""Metadata and models as the publisher retains them on the fleet's broker."""

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from edge_runtime.adapters import disk
from edge_runtime.contract import bundle, codec, topics
from edge_runtime.contract.errors import LinkError
from edge_runtime.contract.ids import DeviceId, Digest, FleetId
from edge_runtime.contract.messages import TrustBundle
from edge_runtime.contract.trust import Target
from edge_runtime.core.backoff import next_delay_seconds
from edge_runtime.core.transfer import Action, Append, Ask, Done, Failed, Leave, Transfer
from edge_runtime.link import Connected, Disconnected, Link, Received
from edge_runtime.mqtt.broker import Broker

CONNECT_SECONDS: Final = 30.0
BUNDLE_SECONDS: Final = 15.0
PACKED_SECONDS: Final = 3.0
"""After these the plain form is asked for, too: MQTT answers for what is not there with silence."""
CHUNK_SECONDS: Final = 5.0
STOP_SECONDS: Final = 2.0


class MqttCarrier:
    """A connection of its own to ``broker``, made when it is needed first. A context manager that ends it.

    Chunks of more than ``max_chunk_bytes`` are not asked for.
    """

    name = "MQTT"

    def __init__(self, broker: Broker, *, fleet: FleetId, device: DeviceId, max_chunk_bytes: int) -> None:
        self._broker = broker
        self._topics = topics.Topics(fleet)
        self._device = device
        self._max_chunk_bytes = max_chunk_bytes
        self._open = ExitStack()
        self._link: Link | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._link = None

    def metadata(self, root_version: int, until: float) -> Callable[[str], bytes | None]:
        """All of it in one message; raises `LinkError` when none is retained, `ContractError` when it is no bundle."""
        link = self._connected(until)
        packed, plain = self._topics.packed_trust(root_version), self._topics.trust(root_version)
        asked = [packed]
        link.subscribe(packed)
        due = min(until, time.monotonic() + PACKED_SECONDS)
        while True:
            event = link.poll(_wait(due))
            if isinstance(event, Received) and event.topic in asked and event.payload:
                for topic in asked:
                    link.unsubscribe(topic)
                return dict(_bundle(event, packed=event.topic == packed).files).get
            if time.monotonic() < due:
                continue
            if plain in asked:
                raise LinkError(f"nothing is retained on {plain}: publish the repository to this broker")
            asked.append(plain)  # of a publisher from before there was a packed form
            link.subscribe(plain)
            due = min(until, time.monotonic() + BUNDLE_SECONDS)

    def problem(self, target: Target) -> str:
        """Whether the model or its chunks are too large."""
        if not 1 <= target.length <= topics.MAX_BLOB_BYTES:
            return (
                f"a blob of {target.length} bytes cannot be fetched over MQTT; 1 to {topics.MAX_BLOB_BYTES} are "
                "allowed: name the repository's https address under [update] url"
            )
        if target.chunk_bytes > self._max_chunk_bytes:
            return (
                f"its chunks of {target.chunk_bytes} bytes are larger than the {self._max_chunk_bytes} of [update] "
                "max_chunk_kib: publish it in smaller ones, raise the limit, or name the repository's https address "
                "under [update] url"
            )
        return ""

    def blob(self, target: Target, into: Path, until: float) -> None:
        """Chunk by chunk; raises `LinkError` when some stay away, have another length, or the time is over."""
        link = self._connected(until)
        transfer = Transfer(
            length=target.length,
            have=_whole_chunks(into, target),
            chunk_bytes=target.chunk_bytes,
            deadline_seconds=until,
            patience_seconds=CHUNK_SECONDS,
        )
        by_topic = {self._topics.chunk(target.digest, i): i for i in range(target.chunks)}
        with disk.append_to(into) as staging:
            actions = transfer.start(time.monotonic())
            while not transfer.over:
                self._perform(link, target.digest, actions, staging)
                event = link.poll(_wait(transfer.due_seconds()))
                now = time.monotonic()
                actions = transfer.tick(now)
                if isinstance(event, Received) and event.topic in by_topic and not transfer.over:
                    actions += transfer.chunk(by_topic[event.topic], event.payload, now)
            self._perform(link, target.digest, actions, staging)

    def _perform(self, link: Link, digest: Digest, actions: list[Action], staging: disk.Appending) -> None:
        for action in actions:
            match action:
                case Ask(index, again):
                    topic = self._topics.chunk(digest, index)
                    if again:  # only a new subscription makes the broker send what it retains once more
                        link.unsubscribe(topic)
                    link.subscribe(topic)
                case Leave(index):
                    link.unsubscribe(self._topics.chunk(digest, index))
                case Append(data):
                    staging.write(data)
                case Failed(reason):
                    raise LinkError(reason)
                case Done():
                    pass

    def _connected(self, until: float) -> Link:
        if self._link is not None:
            return self._link
        rng = random.Random()  # noqa: S311 (jitter, no secret)
        link = Link(
            self._broker,
            client_id=f"{self._device}-update",
            delay=lambda attempt: next_delay_seconds(attempt, rng),
        )
        link.start()
        self._open.callback(link.stop, timeout=STOP_SECONDS)
        until = min(until, time.monotonic() + CONNECT_SECONDS)
        reason = "no answer"
        while not isinstance(event := link.poll(_wait(until)), Connected):
            if isinstance(event, Disconnected):
                reason = event.reason
            if time.monotonic() >= until:
                self._open.close()
                raise LinkError(
                    f"broker {self._broker.host}:{self._broker.port} cannot be reached ({reason})"
                )
        self._link = link
        return link


def _whole_chunks(path: Path, target: Target) -> int:
    """How many leading chunks the staging file at ``path`` holds; what cannot be used is cut off."""
    size = path.stat().st_size if path.exists() else 0
    if size == target.length:
        return target.chunks
    have = size // target.chunk_bytes if size < target.length else 0
    if size:
        disk.cut(path, have * target.chunk_bytes)
    return have


def _bundle(event: Received, *, packed: bool) -> TrustBundle:
    return bundle.unpack(event.payload) if packed else bundle.expect(codec.decode(event.payload), event.topic)


def _wait(until: float) -> float:
    return max(0.0, until - time.monotonic())
