"""The way to a broker, step by step, so that the first thing that is wrong gets a name."""

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from edge_runtime.adapters.status_socket import read_status
from edge_runtime.check import certificate
from edge_runtime.check.finding import Finding, Level, error, ok, warning
from edge_runtime.config import DaemonConfig
from edge_runtime.contract.errors import ContractError, LinkError
from edge_runtime.contract.topics import Topics
from edge_runtime.link import Connected, Disconnected, Link, Received
from edge_runtime.mqtt.broker import Broker

CONNECT_SECONDS: Final = 8.0
READ_SECONDS: Final = CONNECT_SECONDS + 3.0
"""For another connection, and a retained message, which a broker sends at once."""
RENEWAL_SECONDS: Final = 30 * 86400.0

Connect = Callable[[Broker, str, float], str]
"""(broker, client id, seconds): why it cannot be used; "" when it can."""
Read = Callable[[Broker, str, Sequence[str], float], bool]
"""(broker, client id, topics, seconds): whether anything that is retained there is shown to us."""


def check_certificate(config: DaemonConfig, now_seconds: float) -> Iterator[Finding]:
    """The device's own certificate, without asking anybody."""
    broker, where = config.broker, "broker.tls.certificate"
    if broker.port == 8883 and not broker.ca:
        yield error(
            "broker.tls.ca", "port 8883 speaks TLS and no authority is given", "give the broker's ca file"
        )
    missing = _unreadable(broker)
    yield from missing
    if not broker.certificate or missing:
        return
    seen = certificate.look_at(broker.certificate, broker.key, broker.ca)
    if seen.problem:
        yield error(
            where,
            f"{broker.certificate}: {seen.problem}",
            "enrol the device again, or set its clock if that is what is wrong",
        )
        return
    until = f"{datetime.fromtimestamp(seen.expires_seconds, UTC):%Y-%m-%d}"
    if seen.common_name != config.device:
        yield error(
            where,
            f"it is made out to {seen.common_name!r}, and this device is {config.device!r}: the broker would apply "
            "another one's access rules",
            "use this device's certificate, or correct device.id",
        )
    elif seen.expires_seconds - now_seconds < RENEWAL_SECONDS:
        yield warning(where, f"it expires on {until}", "renew it")
    else:
        yield ok(where, f"made out to {seen.common_name}, valid until {until}, and the key is its own")


def _unreadable(broker: Broker) -> list[Finding]:
    found = []
    for name in ("ca", "certificate", "key"):
        path = getattr(broker, name)
        try:
            if path:
                Path(path).read_bytes()
        except OSError as e:
            advice = "check the path; the unit reads keys by its group skiff-keys"
            found.append(error(f"broker.tls.{name}", f"{path} cannot be read ({e.strerror})", advice))
    return found


def daemon_runs(config: DaemonConfig) -> bool:
    """Whether a daemon with this configuration answers on its status socket."""
    try:
        read_status(config.status_socket)
    except LinkError:
        return False
    except ContractError:  # it answers, if with something that cannot be read
        return True
    return True


def check_fleet_broker(
    config: DaemonConfig, connect: Connect | None = None, read: Read | None = None
) -> Iterator[Finding]:
    """The fleet's broker, under the device's own name unless a running daemon uses that.

    A broker takes a device that its access rules deny everything, and with MQTT 3.1.1 says nothing at all of it. So
    the fleet's metadata is asked for, which every device may read; nothing is published.
    """
    if daemon_runs(config):
        yield ok("broker", "not tried, for skiffd runs and uses the connection; ask it with skiffd --status")
        return
    for found in _check("broker", config.broker, config.device, connect or try_to_connect):
        if found.level is Level.OK:
            names = Topics(config.fleet)
            topics = (names.packed_trust(1), names.trust(1))
            if not (read or try_to_read)(config.broker, config.device, topics, READ_SECONDS):
                yield warning(
                    "broker",
                    f"{found.what}, and shows it no metadata of fleet {config.fleet}: none is published there (skiff "
                    f"publish), or its access rules deny {config.device} everything",
                    "a device that was revoked and is enrolled again needs skiff broker-config and a reload there",
                )
                continue
        yield found


def check_source_broker(config: DaemonConfig, connect: Connect | None = None) -> Iterator[Finding]:
    """The local broker that rows come from, if they come from one. Under another name than the daemon uses."""
    if config.source.kind == "mqtt":
        name = f"{config.device}-check"
        yield from _check("source.broker", config.source.broker, name, connect or try_to_connect)


def _check(where: str, broker: Broker, client_id: str, connect: Connect) -> Iterator[Finding]:
    place = f"{broker.host}:{broker.port}"
    try:
        socket.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
    except OSError as e:
        yield error(
            f"{where}.host", f"{broker.host!r} has no address ({e})", "check the name and the resolver"
        )
        return
    try:
        socket.create_connection((broker.host, broker.port), timeout=CONNECT_SECONDS).close()
    except OSError as e:
        yield error(where, f"nothing answers at {place} ({e})", "check the port, the firewall and the broker")
        return
    versions = ("5", "3.1.1") if broker.protocol == "auto" else (broker.protocol,)
    reasons = []
    for version in versions:
        reason = connect(replace(broker, protocol=version), client_id, CONNECT_SECONDS)
        if not reason:
            secured = "with TLS" if broker.ca else "without TLS"
            yield ok(where, f"{place} takes {client_id} with MQTT {version}, {secured}")
            return
        reasons.append(f"MQTT {version}: {reason}")
    yield error(where, f"{place}: {'; '.join(reasons)}", _advice(" ".join(reasons), secured=bool(broker.ca)))


def _advice(reason: str, *, secured: bool) -> str:
    """What usually helps, by the words of OpenSSL and of the broker."""
    known = {
        "CERTIFICATE_REVOKED": "the broker knows our certificate as revoked: enrol the device again, with a new key",
        "CERTIFICATE_VERIFY_FAILED": "give the authority that signed the broker's certificate, and the host it names",
        "WRONG_VERSION_NUMBER": "the broker does not speak TLS on this port: use its TLS port, usually 8883",
        "alert": "the broker refuses our certificate: it has to be signed by the authority that the broker trusts",
        "uthor": "the broker does not let this user in: see its access rules, and SKIFF_BROKER_PASSWORD",
        "assword": "the broker does not know this username and password: see SKIFF_BROKER_PASSWORD",
    }
    silent = "read the broker's log" + (
        ": it may not trust the authority of our certificate"
        if secured
        else "; if it speaks TLS on this port, give broker.tls.ca"
    )
    return next((advice for word, advice in known.items() if word in reason), silent)


def try_to_connect(broker: Broker, client_id: str, seconds: float) -> str:
    """One attempt, as the daemon would make it, with a clean session and without a last will."""
    try:
        with _told() as told:
            for event in _events(broker, client_id, (), seconds):
                match event:
                    case Connected():
                        return ""
                    case Disconnected(reason):
                        return f"{reason} ({told[-1]})" if told else reason
    except LinkError as e:
        return str(e)
    return f"no answer within {seconds:g} s"


def try_to_read(broker: Broker, client_id: str, topics: Sequence[str], seconds: float) -> bool:
    """Whether a message comes on one of ``topics``."""
    return any(isinstance(event, Received) for event in _events(broker, client_id, topics, seconds))


def _events(broker: Broker, client_id: str, topics: Sequence[str], seconds: float) -> Iterator[object]:
    """What happens on a connection of its own while it is looked at, ``seconds`` at most; raises `LinkError`."""
    link = Link(broker, client_id=client_id, delay=lambda _: seconds)
    for topic in topics:
        link.subscribe(topic)
    deadline = time.monotonic() + seconds
    link.start()
    try:
        while (left := deadline - time.monotonic()) > 0:
            yield link.poll(left)
    finally:
        link.stop(timeout=1.0)


class _Words(logging.Handler):
    """Keeps the messages of errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


@contextmanager
def _told() -> Iterator[list[str]]:
    """What the MQTT client says of errors meanwhile: a TLS alert ends a connection, and is named nowhere else."""
    log, words = logging.getLogger("edge_runtime.link.paho"), _Words()
    log.addHandler(words)
    try:
        yield words.kept
    finally:
        log.removeHandler(words)
