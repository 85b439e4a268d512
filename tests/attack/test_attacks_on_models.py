"""The way of a model to a device: other bytes, too few, too many, and bytes that somebody left behind."""

import pytest

from edge_runtime.contract.topics import MIN_CHUNK_BYTES
from tests.publisher import artifact, release
from tests.support.attacked import TOPICS


def chunks(device, digest):
    """The topics of a model's chunks, in order."""
    return sorted(
        (topic for topic in device.broker.retained if f"/blob/{digest}/" in topic),
        key=lambda topic: int(topic.rpartition("/")[2]),
    )


@pytest.mark.attack("A01")
def test_an_arbitrary_file_in_the_place_of_a_model(device):
    digest = device.publish(seed=1)
    length = sum(len(device.broker.retained[topic]) for topic in chunks(device, digest))
    other = (artifact(seed=2) * 2)[:length]
    for index, topic in enumerate(chunks(device, digest)):
        start = index * MIN_CHUNK_BYTES
        device.broker.retained[topic] = other[start : start + MIN_CHUNK_BYTES]
    device.refuses(release(digest, revision=2), "verify", "SHA-256")
    assert not device.slots.staging(digest).exists()
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A02")
def test_a_tampered_byte(device):
    digest = device.publish(seed=1)
    for topic in (chunks(device, digest)[0], chunks(device, digest)[-1]):
        good = device.broker.retained[topic]
        device.broker.retained[topic] = good[:-1] + bytes([good[-1] ^ 1])
        result = device.refuses(release(digest, revision=2), "verify", "SHA-256")
        assert (result["retry"], result["digest"]) == (True, ""), "the model is not to blame"
        device.broker.retained[topic] = good
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A03")
def test_a_chunk_of_another_length(device):
    digest = device.publish(seed=1)
    first, *_, last = chunks(device, digest)
    for topic, change in ((first, b"x"), (last, b"x"), (first, None), (last, None)):
        good = device.broker.retained[topic]
        device.broker.retained[topic] = good + change if change else good[:-1]
        device.refuses(
            release(digest, revision=2), "fetch", f"holds {len(device.broker.retained[topic])} bytes"
        )
        device.slots.staging(digest).unlink()
        device.broker.retained[topic] = good
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A04")
def test_a_download_that_somebody_spoiled_before_is_not_built_upon(device):
    """The first half is the attacker's, then the honest broker is back: the device must not go on with that half."""
    digest = device.publish(seed=1)
    good = {topic: device.broker.retained[topic] for topic in chunks(device, digest)}
    half = len(good) // 2
    for index, topic in enumerate(good):
        if index < half:
            device.broker.retained[topic] = bytes(reversed(good[topic]))
        else:
            del device.broker.retained[topic]
    device.refuses(release(digest, revision=2), "fetch", "did not arrive")
    assert device.slots.staging(digest).stat().st_size == half * MIN_CHUNK_BYTES
    device.broker.retained.update(good)
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A05")
def test_chunks_that_never_come(device):
    digest = device.publish(seed=1)
    for topic in chunks(device, digest):
        del device.broker.retained[topic]
    result = device.refuses(release(digest, revision=2), "fetch", "did not arrive in 3 tries")
    assert result["retry"]
    assert [t for t in device.broker.asked if "/blob/" in t].count(TOPICS.chunk(digest, 0)) == 3
    device.follows(seed=1, revision=2)
