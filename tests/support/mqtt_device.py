"""A device for tests of the aggregator: a real link, and an outbox that forgets only what was acknowledged."""

import random
import socket
import time
from collections.abc import Iterable

from edge_runtime.contract.codec import decode, encode
from edge_runtime.contract.ids import CohortId, DeviceId, SessionId
from edge_runtime.contract.messages import Ack, Command, Event, ModelReport, SignedRelease, Status, Window
from edge_runtime.contract.release import Release, desired, from_payload
from edge_runtime.contract.topics import STATUS, WINDOW
from edge_runtime.link import Connected, Disconnected, Link, Outgoing, Received
from edge_runtime.mqtt.broker import Broker
from tests.support.fleet import MODEL, SESSION, TOPICS, death, wire

IN_FLIGHT = 20
RESEND_SECONDS = 1.0


class MqttDevice:
    """Sends what is put into its outbox until it is acknowledged, and obeys releases when it ``obeys``.

    `step` does whatever is due; nothing happens between calls but the link's own reconnecting.
    """

    def __init__(
        self,
        name: str,
        port: int,
        *,
        session: SessionId = SESSION,
        attributes: tuple[tuple[str, str], ...] = (),
        obeys: bool = True,
        births: bool = True,
    ) -> None:
        self.name = DeviceId(name)
        self.session = session
        self.attributes = attributes
        self.obeys = obeys
        self.births = births
        self.report = ModelReport(model=MODEL)
        self.waiting: dict[int, tuple[str, bytes]] = {}
        self.acked: set[int] = set()
        self.commands: list[Command] = []
        self.releases: list[tuple[Release, SignedRelease]] = []
        self._flying: dict[int, float] = {}
        self._status_seq = 0
        will = death(name, session=session)
        rng = random.Random(name)
        self.link = Link(
            Broker(host="127.0.0.1", port=port),
            client_id=name,
            will=Outgoing(TOPICS.status(self.name), encode(will), STATUS),
            delay=lambda attempt: rng.uniform(0.0, 0.2),
        )
        self.link.subscribe(TOPICS.ack(self.name))
        self.link.subscribe(TOPICS.command(self.name))
        self.link.subscribe(TOPICS.release(CohortId("main"), MODEL))
        self.link.start()

    def put(self, messages: Iterable[Window | Event]) -> None:
        for message in messages:
            self.waiting[message.seq] = wire(message)

    def say(self, topic: str, payload: bytes) -> None:
        if self.link.connected:
            self.link.publish(Outgoing(topic, payload, WINDOW))

    def birth(self) -> None:
        if not self.link.connected:
            return
        self._status_seq += 1
        status = Status(
            device=self.name,
            session=self.session,
            seq=self._status_seq,
            online=True,
            attributes=self.attributes,
            models=(self.report,),
        )
        self.link.publish(Outgoing(TOPICS.status(self.name), encode(status), STATUS))

    def step(self) -> None:
        while (event := self.link.poll(0.0)) is not None:
            match event:
                case Connected():
                    if self.births:
                        self.birth()
                case Disconnected():
                    self._flying.clear()
                case Received():
                    self._hear(event)
                case _:
                    pass
        now = time.monotonic()
        for seq in [s for s, at in self._flying.items() if now >= at + RESEND_SECONDS]:
            del self._flying[seq]
        for seq, (topic, payload) in self.waiting.items():
            if not self.link.connected or len(self._flying) >= IN_FLIGHT:
                break
            if seq not in self._flying:
                self._flying[seq] = now
                self.say(topic, payload)

    def _hear(self, event: Received) -> None:
        message = decode(event.payload)
        match message:
            case Ack():
                if message.session == self.session:
                    for seq in message.seqs:
                        self.waiting.pop(seq, None)
                        self._flying.pop(seq, None)
                        self.acked.add(seq)
            case Command():
                self.commands.append(message)
                self.births = True
                self.birth()
            case SignedRelease():
                release = from_payload(message.payload)
                self.releases.append((release, message))
                if self.obeys:
                    self.follow(release)
            case _:
                raise AssertionError(message)

    def follow(self, release: Release) -> None:
        """Runs what the release says and reports it."""
        self.report = ModelReport(
            model=MODEL,
            state="committed",
            serving=desired(release, self.name) or self.report.serving,
            rollout=release.rollout,
            revision=release.revision,
        )
        self.birth()

    def cut(self) -> None:
        """The connection breaks without a goodbye, so the broker publishes the last will; the link then comes back."""
        client = self.link._client
        wire = client.socket() if client is not None else None
        assert isinstance(wire, socket.socket)
        wire.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.link.stop(2.0)
