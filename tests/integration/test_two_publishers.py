"""Publishers before a real Mosquitto: whoever overtakes whom, the newest metadata stays; chunks that were too large."""

import threading
import time

import pytest

from cli import publishing
from cli.publishing import publish
from edge_runtime.carriers.mqtt import MqttCarrier
from edge_runtime.contract.errors import LinkError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.topics import MAX_CHUNK_BYTES, Topics
from edge_runtime.link import Link
from edge_runtime.mqtt.broker import Broker
from edge_runtime.truststore import TrustStore
from tests.publisher import DEVICE, FLEET, MODEL, artifact, put
from tests.services import Mosquitto, find_mosquitto, missing_service
from trainer.publish import Repository

REVOKED = Digest("a" * 64)


@pytest.fixture
def repository(tmp_path):
    return Repository.create(tmp_path / "repository")


def of(mosquitto):
    return Broker(host=mosquitto.host, port=mosquitto.port)


def carrier(broker):
    return MqttCarrier(broker, fleet=FLEET, device=DEVICE, max_chunk_bytes=MAX_CHUNK_BYTES)


def test_the_newest_metadata_stays_though_an_older_publisher_is_overtaken(
    mosquitto, repository, tmp_path, monkeypatch
):
    broker, here, go = of(mosquitto), threading.Event(), threading.Event()

    class Slow(Link):
        def publish(self, message):
            if message.topic == Topics(FLEET).packed_trust(1) and not here.is_set():
                here.set()
                assert go.wait(20)
            return super().publish(message)

    monkeypatch.setattr(publishing, "Link", Slow)
    slow = threading.Thread(target=publish, args=(repository, []), kwargs={"fleet": FLEET, "broker": broker})
    slow.start()
    assert here.wait(20)
    other = Repository(tmp_path / "repository")
    other.revoke(REVOKED)
    quick = threading.Thread(target=publish, args=(other, []), kwargs={"fleet": FLEET, "broker": broker})
    quick.start()
    quick.join(1.5)  # longer than it needs where nothing holds it off
    go.set()
    for thread in (slow, quick):
        thread.join(20)
        assert not thread.is_alive()
    with (
        carrier(broker) as source,
        TrustStore(tmp_path / "device", repository.pinned_root.read_bytes()) as store,
    ):
        store.refresh_from(source.metadata(1, time.monotonic() + 20))
        assert store.is_revoked(REVOKED)


@pytest.mark.slow
def test_a_model_in_chunks_too_large_for_the_broker_is_published_in_smaller_ones(repository, tmp_path):
    binary = find_mosquitto()
    if binary is None:
        missing_service("mosquitto is not installed (Debian: apt-get install mosquitto)")
    (tmp_path / "small").mkdir()
    small = Mosquitto(binary, tmp_path / "small", extra_config="message_size_limit 20000")
    small.start()
    try:
        broker, path = of(small), put(tmp_path, artifact(trees=60))
        model = repository.add(path, role="targets")
        with pytest.raises(LinkError, match=r"in smaller chunks: --chunk-kib"):
            publish(repository, [model.digest], fleet=FLEET, broker=broker, patience_seconds=3.0)
        model = repository.add(path, role="targets", chunk_bytes=8 << 10)
        publish(repository, [model.digest], fleet=FLEET, broker=broker)
        until = time.monotonic() + 20
        with (
            carrier(broker) as source,
            TrustStore(tmp_path / "device", repository.pinned_root.read_bytes()) as store,
        ):
            store.refresh_from(source.metadata(1, until))
            target = store.find(MODEL, model.digest)
            assert target is not None
            source.blob(target, tmp_path / "model", until)
        assert digest_of((tmp_path / "model").read_bytes()) == model.digest
    finally:
        small.close()
