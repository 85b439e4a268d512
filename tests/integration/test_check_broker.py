"""`skiffd --check` and a real broker: what is asked, in what version, and what a refusal is called."""

from dataclasses import replace

import pytest

from edge_runtime.check import broker as broker_check
from edge_runtime.check.finding import Level
from edge_runtime.config import load
from edge_runtime.contract.topics import TRUST, Topics
from edge_runtime.link import Connected, Link, Outgoing
from edge_runtime.mqtt.broker import Broker
from tests.services import HOST, Mosquitto, find_mosquitto, missing_service
from tests.support.certificates import Authority
from tests.support.locked import locked_broker


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "skiffd.toml"
    path.write_text(
        '[device]\nid = "dev-1"\nfleet = "fleet"\nstate_dir = "state"\n[broker]\n'
        '[model]\nname = "tiny"\ntrust_root = "root.json"\n'
    )
    return load(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A broker on this machine shows what it has at once."""
    monkeypatch.setattr(broker_check, "READ_SECONDS", 1.5)


def asked(config, broker, **changes):
    there = replace(config.broker, host=HOST, port=broker.port, **changes)
    [found] = broker_check.check_fleet_broker(replace(config, broker=there))
    return found


def publish(topic, payload, **where):
    """Leaves a retained message."""
    link = Link(Broker(host=HOST, **where), client_id="publisher", delay=lambda _: 0.1)
    link.start()
    while not isinstance(link.poll(5.0), Connected):
        pass
    link.publish(Outgoing(topic, payload, TRUST))
    link.stop(timeout=5.0)


def test_a_fleet_that_is_not_there_is_told(config, mosquitto):
    found = asked(config, mosquitto)
    assert (found.level, "none is published there" in found.what) == (Level.WARNING, True)


def test_the_version_that_was_agreed_on_is_told(config, mosquitto):
    publish(Topics(config.fleet).packed_trust(1), b"metadata", port=mosquitto.port)
    assert asked(config, mosquitto).level is Level.OK
    assert "dev-1 with MQTT 5, without TLS" in asked(config, mosquitto).what
    assert "MQTT 3.1.1, without TLS" in asked(config, mosquitto, protocol="3.1.1").what


@pytest.fixture
def secured(mosquitto, tmp_path):
    """A broker with mutual TLS, and the authority of its devices."""
    mosquitto.stop()
    authority = Authority(tmp_path / "ours")
    server = authority.issue("broker")
    folder = tmp_path / "secured"
    folder.mkdir()
    binary = find_mosquitto()
    assert binary is not None
    broker = Mosquitto(
        binary,
        folder,
        extra_config=f"cafile {authority.path}\ncertfile {server.certificate}\nkeyfile {server.key}\n"
        "require_certificate true\nuse_identity_as_username true",
    )
    broker.start()
    try:
        yield broker, authority
    finally:
        broker.close()


# paho leaves a socket whose handshake failed to the garbage collector.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)
def test_mutual_tls_is_spoken_as_the_daemon_would(config, secured, tmp_path):
    broker, ours = secured
    device = ours.issue("dev-1")
    tls = {"ca": ours.path, "certificate": device.certificate, "key": device.key}
    publish(Topics(config.fleet).trust(1), b"metadata", port=broker.port, **tls)
    found = asked(config, broker, **tls)
    assert found.level is Level.OK, found
    assert "with TLS" in found.what

    theirs = Authority(tmp_path / "theirs", "other")
    stranger = theirs.issue("dev-1")
    wrong = asked(config, broker, **{**tls, "ca": theirs.path})
    assert (wrong.level, "VERIFY_FAILED" in wrong.what) == (Level.ERROR, True)
    assert "authority that signed the broker's certificate" in wrong.remedy
    unknown = asked(config, broker, ca=ours.path, certificate=stranger.certificate, key=stranger.key)
    assert unknown.level is Level.ERROR
    assert "trust" in unknown.remedy, unknown
    plain = asked(config, broker)
    assert plain.level is Level.ERROR
    assert "broker.tls.ca" in plain.remedy, plain


@pytest.fixture
def locked(config, tmp_path):
    """A broker with the files of ``skiff broker-config``, which has metadata of the fleet."""
    binary = find_mosquitto()
    if binary is None:
        missing_service("mosquitto is not installed (Debian: apt-get install mosquitto)")
    with locked_broker(binary, tmp_path, config.fleet) as (enrolled, broker):
        publisher = enrolled.service("publisher")
        where = {"ca": publisher.ca, "certificate": publisher.certificate, "key": publisher.key}
        publish(Topics(config.fleet).packed_trust(1), b"metadata", port=broker.port, **where)
        yield enrolled, broker


def told(config, broker, wallet, **more):
    return asked(config, broker, ca=wallet.ca, certificate=wallet.certificate, key=wallet.key, **more)


# paho leaves a socket whose handshake failed to the garbage collector.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)
def test_a_device_that_was_revoked_and_is_enrolled_again_is_told_what_the_broker_lacks(config, locked):
    enrolled, broker = locked
    first = enrolled.device("dev-1")
    assert told(config, broker, first).level is Level.OK
    enrolled.authority.revoke("dev-1")
    broker.configure()
    broker.reload()
    revoked = told(config, broker, first)
    assert (revoked.level, "as revoked" in revoked.remedy) == (Level.ERROR, True), revoked
    again = enrolled.put("dev-1", enrolled.authority.device("dev-1"))
    for protocol in ("5", "3.1.1"):
        shut_out = told(config, broker, again, protocol=protocol)
        assert shut_out.level is Level.WARNING
        assert "access rules deny dev-1 everything" in shut_out.what
    broker.configure()
    broker.reload()
    assert told(config, broker, again).level is Level.OK
