"""Brokers that never come to an end, against the real update child."""

import time

import pytest

from tests.publisher import release
from tests.support.attacked import TOPICS
from tests.support.fake_broker import MQTT5, FakeBroker, length, message

DEADLINE_SECONDS = 1.0
OVERTIME_SECONDS = 12.0
"""For the interpreter to start on a busy machine, and for the child to let go of the broker."""
REASONS = (f"nothing is retained on {TOPICS.trust(1)}", f"the deadline of {DEADLINE_SECONDS:g} s passed")


def refused_in_time(device, broker):
    """The child gives up on time, and within the memory that it is given."""
    result = device.refuses(
        release(None, revision=2),
        "trust",
        "",
        child=True,
        broker={"host": broker.host, "port": broker.port},
        deadline_seconds=DEADLINE_SECONDS,
    )
    assert broker.connections >= 1
    # Which of the two depends on how long the broker keeps the child from hanging up.
    assert any(words in result["reason"] for words in REASONS), result
    assert result["retry"]
    assert device.seconds < DEADLINE_SECONDS + OVERTIME_SECONDS
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A06")
def test_data_without_end(device):
    """Messages on topics nobody asked for, as fast as they are taken, and none that was asked for."""

    def flood(connection):
        while True:
            connection.sendall(message(broker.level, b"skiff/1/fleet-1/other", bytes(60_000)))

    with FakeBroker(flood) as broker:
        refused_in_time(device, broker)


@pytest.mark.attack("A07")
def test_data_without_end_that_comes_byte_by_byte(device):
    """The very message that was asked for, whose end never comes."""

    def drip(connection):
        topic = TOPICS.trust(1).encode()
        body = len(topic).to_bytes(2) + topic + (b"\0" if broker.level == MQTT5 else b"")
        connection.sendall(b"\x30" + length(200_000) + body)
        while True:
            connection.sendall(b"x")
            time.sleep(0.01)

    with FakeBroker(drip) as broker:
        refused_in_time(device, broker)
