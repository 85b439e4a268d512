"""Trust metadata over MQTT in its two forms: packed, and plain for older devices and from older publishers."""

import itertools
import time
import tracemalloc
import zlib

import pytest

from edge_runtime.carriers.mqtt import MqttCarrier
from edge_runtime.contract import bundle, codec
from edge_runtime.contract.codec import MAX_MESSAGE_BYTES
from edge_runtime.contract.errors import ContractError, LinkError
from edge_runtime.contract.messages import Command, TrustBundle
from edge_runtime.contract.topics import Topics
from edge_runtime.mqtt.broker import Broker
from tests.publisher import DEVICE, FLEET
from tests.support.memory_broker import MemoryBroker
from trainer.publish import Repository

TOPICS = Topics(FLEET)
PACKED, PLAIN = TOPICS.packed_trust(1), TOPICS.trust(1)
BUNDLE = TrustBundle(root_version=1, files=(("2.root.json", b"{}" * 1000), ("timestamp.json", b"{}")))


@pytest.fixture
def broker(monkeypatch):
    broker = MemoryBroker(packed=True)
    broker.stand_before(monkeypatch)
    return broker


@pytest.fixture
def asking(broker):
    where = Broker(host="localhost")
    with MqttCarrier(where, fleet=FLEET, device=DEVICE, max_chunk_bytes=1024) as way:
        yield lambda seconds=10.0: way.metadata(1, time.monotonic() + seconds)


def test_the_packed_form_is_enough(broker, asking):
    broker.retained = {PACKED: bundle.pack(BUNDLE), PLAIN: b"never asked for"}
    file = asking()
    assert (file("2.root.json"), file("3.root.json")) == (b"{}" * 1000, None)
    assert broker.asked == [PACKED]


def test_an_older_publishers_form_is_asked_for_next(broker, asking):
    broker.retained = {PLAIN: codec.encode(BUNDLE)}
    assert asking()("timestamp.json") == b"{}"
    assert broker.asked == [PACKED, PLAIN]


def test_nothing_retained_is_a_reason(broker, asking):
    with pytest.raises(LinkError, match=rf"nothing is retained on {PLAIN}"):
        asking()
    with pytest.raises(LinkError, match="nothing is retained"):
        asking(0.0)


BOMB = zlib.compress(bytes(MAX_MESSAGE_BYTES * 200), 9)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"garbage", "incorrect header"),
        (codec.encode(BUNDLE), "packed trust metadata"),
        (bundle.pack(BUNDLE)[:-1], "cut short"),
        (bundle.pack(BUNDLE) + b"x", "followed by something"),
        (BOMB, f"above {MAX_MESSAGE_BYTES} bytes"),
        (zlib.compress(b"garbage"), "not valid msgpack"),
        (
            zlib.compress(codec.encode(Command(device=DEVICE, name="rebirth", correlation=""))),
            "a Command instead",
        ),
    ],
    ids=["noise", "plain", "cut", "longer", "bomb", "packed noise", "another message"],
)
def test_what_is_no_bundle_is_refused_in_little_memory(broker, asking, payload, reason):
    broker.retained = {PACKED: payload}
    tracemalloc.start()
    with pytest.raises(ContractError, match=reason):
        asking()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8_000_000  # the bomb holds 52


def test_a_root_more_costs_less_than_a_kilobyte(tmp_path):
    repository = Repository.create(tmp_path / "repository")
    sizes = []
    for _ in range(4):
        sizes.append(len(bundle.pack(repository.bundle(1))))
        assert bundle.unpack(bundle.pack(repository.bundle(1))) == repository.bundle(1)
        repository.rotate("root")
    print(f"packed bytes of metadata after 0, 1, 2, 3 new roots: {sizes}")
    assert sizes[0] < 1500
    # The first brings new names and forms along.
    assert all(later - before < 1000 for before, later in itertools.pairwise(sizes[1:]))
