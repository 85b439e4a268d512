"""A broker that is killed again and again, with a sender that keeps each message until the receiver has answered.

A broker's acknowledgement is no promise: Mosquitto forgets on SIGKILL what it acknowledged since it last saved. So
nothing is claimed of `Delivered`. What holds is from end to end: every message arrives at least once, because its
sender offers it again until the receiver's own answer comes.
"""

import resource
import threading
import time
from pathlib import Path

import pytest

from edge_runtime.contract.errors import LinkError
from edge_runtime.contract.topics import Delivery
from edge_runtime.link import Connected, Delivered, Disconnected, Outgoing, Received
from edge_runtime.mqtt.client import MAX_IN_FLIGHT
from tests.support.links import ONCE, PLAIN, WAIT_SECONDS, Links

RESEND_SECONDS = 0.5


class Sender:
    """Numbers, kept until they are answered; at most `MAX_IN_FLIGHT` on their way."""

    def __init__(self, link):
        self.link = link
        self.waiting: dict[int, None] = {}
        self._flying: dict[int, float] = {}
        self.connections = 0
        link.subscribe("answer", 0)

    def step(self, wait_seconds=0.0):
        while (event := self.link.poll(wait_seconds)) is not None:
            wait_seconds = 0.0
            match event:
                case Connected():
                    self.connections += 1
                case Disconnected():
                    self._flying.clear()
                case Received(payload=payload):
                    self.waiting.pop(int(payload), None)
                    self._flying.pop(int(payload), None)
                case Delivered():
                    pass  # the broker has it, and may forget it
        now = time.monotonic()
        self._flying = {i: since for i, since in self._flying.items() if now - since < RESEND_SECONDS}
        for i in self.waiting:
            if len(self._flying) >= MAX_IN_FLIGHT or not self.link.connected:
                break
            if i not in self._flying:
                self._flying[i] = now
                say(self.link, "number", i, PLAIN)


class Receiver:
    """Answers each number, and only then lets the broker forget it."""

    def __init__(self, link):
        self.link = link
        self.seen: set[int] = set()
        self.connections = 0
        link.subscribe("number")

    def step(self, wait_seconds=0.0):
        while (event := self.link.poll(wait_seconds)) is not None:
            wait_seconds = 0.0
            match event:
                case Connected():
                    self.connections += 1
                case Received(payload=payload):
                    self.seen.add(int(payload))
                    say(self.link, "answer", int(payload), ONCE)
                    self.link.acknowledge(event)
                case Disconnected() | Delivered():
                    pass


def say(link, topic: str, number: int, delivery: Delivery):
    """Publishes while there is a connection; it may have gone since one looked."""
    try:
        link.publish(Outgoing(topic, str(number).encode().ljust(200), delivery))
    except LinkError:
        assert not link.connected


def figures():
    """Threads, open files and peak memory of this process."""
    files = len(list(Path("/proc/self/fd").iterdir()))
    return threading.active_count(), files, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def kill_often(mosquitto, protocol, kills):
    links = Links(mosquitto, protocol)
    sender = Sender(links.make("sender"))
    receiver = Receiver(links.make("receiver", clean_session=False, manual_ack=True))

    def run_until(condition):
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, (
                len(sender.waiting),
                sender.link.connected,
                receiver.link.connected,
            )
            receiver.step(0.001)
            sender.step(0.001)

    sender.link.start()
    receiver.link.start()
    before = figures()
    for kill in range(kills):
        numbers = range(100 * kill, 100 * kill + 100)
        sender.waiting.update(dict.fromkeys(numbers))
        half = numbers[kill % 97]  # killed at another point of the batch each time
        run_until(lambda half=half: half not in sender.waiting)
        if kill == 4:
            before = figures()
        mosquitto.kill()
        mosquitto.start()
    run_until(lambda: not sender.waiting)
    assert receiver.seen == set(range(100 * kills))
    assert sender.connections > kills
    assert receiver.connections > kills
    after = figures()
    links.close()
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + (8 << 20)


@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
def test_broker_killed_five_times(mosquitto, protocol):
    kill_often(mosquitto, protocol, 5)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["3.1.1", "5", "auto"])
def test_broker_killed_a_hundred_times(mosquitto, protocol):
    kill_often(mosquitto, protocol, 100)
