"""A locked-down fleet for tests: its certificate authority, a real Mosquitto with exactly the files that
`skiff broker-config` writes, and MQTT clients that say what the broker let them do.
"""

import contextlib
import getpass
import queue
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from cli import broker_config
from cli.broker_config import Site
from edge_runtime.contract.ids import FleetId
from tests.services import HOST, Mosquitto
from trainer import certificates
from trainer.authority import SERVICES, Authority, Issued
from trainer.certificates import Wanted

FLEET = FleetId("fleet-1")
WAIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Wallet:
    """Paths of a certificate and its key, and of the authority its holder trusts; None: shows no certificate."""

    ca: str
    certificate: str | None = None
    key: str | None = None


class Enrolled:
    """An authority in ``folder``/authority, and wallets that it, or somebody who has its key, filled."""

    def __init__(
        self, folder: Path, fleet: FleetId = FLEET, *, clock: Callable[[], datetime] | None = None
    ) -> None:
        self.folder = folder
        self.fleet = fleet
        clock = clock or certificates.utc_now
        self.authority = Authority.create(folder / "authority", fleet, clock=clock)
        self.clock = clock
        self._wallets: dict[str, Wallet] = {}

    def device(self, name: str) -> Wallet:
        """The wallet of device ``name``; enrolled when asked for first."""
        if name not in self._wallets:
            self._wallets[name] = self.put(name, self.authority.device(name))
        return self._wallets[name]

    def service(self, which: str) -> Wallet:
        """The wallet of a service: aggregator, coordinator …"""
        if which not in self._wallets:
            self._wallets[which] = self.put(SERVICES[which], self.authority.service(which))
        return self._wallets[which]

    def nobody(self) -> Wallet:
        """Trusts the fleet's authority and has no certificate."""
        return Wallet(str(self.authority.certificate))

    def put(self, label: str, issued: Issued) -> Wallet:
        """``issued`` as files."""
        assert issued.key is not None
        return self.files(f"{label}-{issued.entry.serial[:8]}", issued.certificate, issued.key)

    def files(self, label: str, certificate: bytes, key: bytes) -> Wallet:
        """Any certificate and key as files."""
        folder = self.folder / "wallets" / label.encode().hex()
        folder.mkdir(parents=True)
        (folder / "crt").write_bytes(certificate)
        (folder / "key").write_bytes(key)
        return Wallet(str(self.authority.certificate), str(folder / "crt"), str(folder / "key"))

    def forged(
        self,
        common_name: str,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        use: certificates.Use = "client",
        hosts: tuple[str, ...] = (),
    ) -> Wallet:
        """What somebody with the authority's key could make: none of the checks of `trainer.authority`."""
        folder = self.folder / "authority"
        signer = certificates.Authority.load(
            (folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes(), str(folder)
        )
        key = certificates.new_key()
        wanted = Wanted(
            name=common_name,
            use=use,
            serial=certificates.new_serial(),
            start=start or datetime(2020, 1, 1, tzinfo=UTC),
            end=end or datetime(2034, 1, 1, tzinfo=UTC),
            hosts=hosts,
        )
        label = f"forged-{common_name}-{wanted.serial:x}"
        return self.files(label, signer.issue(wanted, key.public_key()), certificates.private_bytes(key))


class LockedMosquitto(Mosquitto):
    """Mosquitto with the files of `skiff broker-config`, in one folder. Port, address, paths and user are options."""

    def __init__(self, binary: str, enrolled: Enrolled) -> None:
        self.etc = enrolled.folder / "etc"
        self._enrolled = enrolled
        super().__init__(binary, enrolled.folder)
        (enrolled.folder / "data").mkdir()
        issued = enrolled.authority.broker([HOST])
        assert issued.key is not None
        (self.etc / "certs").mkdir(parents=True)
        (self.etc / "certs" / "server.crt").write_bytes(issued.certificate)
        (self.etc / "certs" / "server.key").write_bytes(issued.key)

    def configure(self) -> None:
        """Writes the files as they have to be now; a running broker takes note at `reload`."""
        site = Site(
            folder=str(self.etc),
            data=str(self._enrolled.folder / "data"),
            port=self.port,
            address=HOST,
            user=getpass.getuser(),
        )
        broker_config.write(self.etc, self._enrolled.fleet, site, self._enrolled.authority)

    def reload(self) -> None:
        """Has the running broker read its files again, as ``systemctl reload mosquitto`` does."""
        before = self.log.count("Reloading config.")
        self._running().send_signal(signal.SIGHUP)
        self._wait(lambda: self.log.count("Reloading config.") > before, "reload", WAIT_SECONDS)

    def command(self) -> list[str]:
        self.configure()
        return [self._binary, "-v", "-c", str(self.etc / "mosquitto.conf")]  # its log names what it denies


class Peer:
    """One MQTT connection that shows ``wallet``; a context manager that connects. Events arrive in `messages`."""

    def __init__(
        self,
        broker: Mosquitto,
        wallet: Wallet,
        *,
        client_id: str,
        username: str = "",
        version: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv311,
        clean: bool = True,
        will: tuple[str, bytes] | None = None,
    ) -> None:
        self.client_id = client_id
        self.messages: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._broker = broker
        self._events: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
        self.closed: queue.SimpleQueue[str] = queue.SimpleQueue()
        five = version == MQTTProtocolVersion.MQTTv5
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=version,
            clean_session=None if five else clean,
            reconnect_on_failure=False,
        )
        self._client.tls_set(wallet.ca, wallet.certificate, wallet.key, tls_version=ssl.PROTOCOL_TLS_CLIENT)
        if username:
            self._client.username_pw_set(username, "password")
        if will is not None:
            self._client.will_set(*will, qos=1)
        self._client.on_connect = lambda _, __, ___, reason, ____: self._events.put(("connect", 0, reason))
        self._client.on_disconnect = lambda _, __, ___, reason, ____: self._lost(str(reason))
        self._client.on_subscribe = lambda _, __, mid, reasons, ___: self._events.put(
            ("subscribe", mid, reasons)
        )
        self._client.on_unsubscribe = lambda _, __, mid, ___, ____: self._events.put(
            ("unsubscribe", mid, None)
        )
        self._client.on_publish = lambda _, __, mid, reason, ___: self._events.put(("publish", mid, reason))
        self._client.on_message = lambda _, __, message: self.messages.put(
            (message.topic, bytes(message.payload))
        )

    def _lost(self, reason: str) -> None:
        self._events.put(("closed", 0, reason))
        self.closed.put(reason)

    def __enter__(self) -> Self:
        """Raises `OSError` (`ssl.SSLError` too) or `PermissionError` when the broker does not take us."""
        self._client.connect(self._broker.host, self._broker.port, keepalive=60)
        self._client.loop_start()
        try:
            self._check(self._answer("connect", 0))
        except BaseException:
            self._client.loop_stop()
            raise
        return self

    @staticmethod
    def _check(reason: Any) -> None:
        if reason.is_failure:
            raise PermissionError(str(reason))

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def cut(self) -> None:
        """Ends the connection without a word, so that the broker publishes the last will."""
        found = self._client.socket()
        assert isinstance(found, socket.socket)
        found.shutdown(socket.SHUT_RDWR)

    def subscribe(self, *topics: str) -> list[Any]:
        """Subscribes with QoS 1; returns what the broker said to each. Mosquitto grants what it will not deliver."""
        _, mid = self._client.subscribe([(topic, 1) for topic in topics])
        assert mid is not None
        return list(self._answer("subscribe", mid))

    def unsubscribe(self, *topics: str) -> None:
        """Takes `subscribe` back."""
        _, mid = self._client.unsubscribe(list(topics))
        assert mid is not None
        self._answer("unsubscribe", mid)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> Any:
        """Publishes with QoS 1, waits for the broker and returns its reason: with MQTT 5 it says that it refused."""
        return self._answer("publish", self._client.publish(topic, payload, qos=1, retain=retain).mid)

    def until(self, payload: bytes) -> list[tuple[str, bytes]]:
        """What arrived before ``payload``, which is a fence: all that was sent before it has been dealt with."""
        found = []
        while (message := self.messages.get(timeout=WAIT_SECONDS))[1] != payload:
            found.append(message)
        return found

    def _answer(self, kind: str, mid: int) -> Any:
        while True:
            event = self._events.get(timeout=WAIT_SECONDS)
            if event[0] == "closed":
                raise ConnectionResetError(
                    f"the broker closed the connection of {self.client_id}: {event[2]}"
                )
            if event[:2] == (kind, mid):
                return event[2]


@contextlib.contextmanager
def locked_broker(
    binary: str, folder: Path, fleet: FleetId = FLEET
) -> Iterator[tuple[Enrolled, LockedMosquitto]]:
    """A running locked-down Mosquitto and the authority that it trusts, in ``folder``."""
    enrolled = Enrolled(folder, fleet)
    broker = LockedMosquitto(binary, enrolled)
    broker.start()
    try:
        yield enrolled, broker
    finally:
        broker.close()
