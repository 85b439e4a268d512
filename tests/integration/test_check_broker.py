"""`skiffd --check` and a real broker: what is asked, in what version, and what a refusal is called."""

from dataclasses import replace

import pytest

from edge_runtime.check import broker as broker_check
from edge_runtime.check.finding import Level
from edge_runtime.config import load
from tests.services import HOST, Mosquitto, find_mosquitto
from tests.support.certificates import Authority


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "skiffd.toml"
    path.write_text(
        '[device]\nid = "dev-1"\nfleet = "fleet"\nstate_dir = "state"\n[broker]\n'
        '[model]\nname = "tiny"\ntrust_root = "root.json"\n'
    )
    return load(path)


def asked(config, broker, **changes):
    there = replace(config.broker, host=HOST, port=broker.port, **changes)
    [found] = broker_check.check_fleet_broker(replace(config, broker=there))
    return found


def test_the_version_that_was_agreed_on_is_told(config, mosquitto):
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
