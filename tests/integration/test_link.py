"""The link against a real Mosquitto, and against a broker that misbehaves."""

import logging
import socket
import threading
import time
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edge_runtime.contract.errors import BudgetExceeded, LinkError
from edge_runtime.contract.topics import Delivery
from edge_runtime.link import (
    MAX_OUTSTANDING,
    MAX_PACKET_BYTES,
    Broker,
    Connected,
    Delivered,
    Disconnected,
    Link,
    Outgoing,
    Received,
)
from tests.services import Mosquitto, find_mosquitto, free_port
from tests.support.certificates import Authority
from tests.support.fake_broker import CONNACK, REFUSED, FakeBroker, silent

WAIT_SECONDS = 15.0
PLAIN = Delivery(1, False)
RETAINED = Delivery(1, True)
ONCE = Delivery(0, False)


class Links:
    """Links of one test, all stopped at its end."""

    def __init__(self, broker):
        self.broker = broker
        self._open: list[Link] = []

    def make(self, client_id, **options) -> Any:
        broker = options.pop("broker", None) or Broker(host=self.broker.host, port=self.broker.port)
        link = Link(broker, client_id=client_id, delay=options.pop("delay", lambda _: 0.02), **options)
        self._open.append(link)
        return link

    def connect(self, client_id, *topics, settled=True, **options) -> Any:
        """A link that is connected and, unless the first messages matter, whose subscriptions are in force."""
        link = self.make(client_id, **options)
        for topic in topics:
            link.subscribe(topic)
        link.start()
        until(link, Connected)
        if topics and settled:
            settle(link)
        return link

    def close(self):
        for link in self._open:
            link.stop(WAIT_SECONDS)
            assert not link._thread.is_alive()


@pytest.fixture
def links(mosquitto):
    made = Links(mosquitto)
    yield made
    made.close()


def settle(link):
    """Returns when the broker has done what this link asked before: it works through its packets in order."""
    deliver(link, "settled", b"")


def until(link, kind, **fields):
    """The next event of a kind, with these fields; others before it are passed over."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        event = link.poll(left)
        if isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items()):
            return event
    raise AssertionError(f"no {kind.__name__} {fields} within {WAIT_SECONDS} s")


def nothing(link, kind, seconds=0.3):
    """No event of a kind comes for a while."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        assert not isinstance(link.poll(left), kind)


def deliver(link, topic, payload, delivery=PLAIN):
    token = link.publish(Outgoing(topic, payload, delivery))
    until(link, Delivered, token=token)


# ── talking ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_message_goes_from_link_to_link(links):
    one = links.connect("one")
    two = links.connect("two", "a/b")
    for payload, delivery in ((b"plain", PLAIN), (b"", PLAIN), (bytes(200_000), PLAIN), (b"once", ONCE)):
        deliver(one, "a/b", payload, delivery)
        found = until(two, Received)
        assert (found.topic, found.payload, found.retained) == ("a/b", payload, False)
        assert bool(found.token) == bool(delivery.qos)


def test_retained_state_meets_a_new_subscription(links):
    one = links.connect("one")
    deliver(one, "state", b"old", RETAINED)
    deliver(one, "state", b"new", RETAINED)
    two = links.connect("two", "state", settled=False)
    assert until(two, Received).payload == b"new"
    three = links.connect("three")
    three.subscribe("state")  # while connected
    assert until(three, Received).retained
    three.unsubscribe("state")
    three.subscribe("sentinel")
    settle(three)
    deliver(one, "state", b"newer", RETAINED)
    deliver(one, "sentinel", b"")
    assert until(three, Received).topic == "sentinel"


def test_a_token_belongs_to_one_message(links):
    one = links.connect("one")
    tokens = {one.publish(Outgoing("t", b"x", PLAIN)) for _ in range(50)}
    assert len(tokens) == 50
    assert {until(one, Delivered).token for _ in range(50)} == tokens


def test_many_threads_may_publish(links):
    one = links.connect("one")
    two = links.connect("two", "t")

    def work(k):
        for i in range(40):
            one.publish(Outgoing("t", f"{k}:{i}:".encode() + bytes(3000), PLAIN))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(5)]
    for thread in threads:
        thread.start()
    found = [until(two, Received).payload.split(b":", 2)[:2] for _ in range(200)]
    for thread in threads:
        thread.join()
    for k in range(5):
        mine = [int(i) for who, i in found if int(who) == k]
        assert mine == list(range(40))


def test_publishing_without_a_connection_is_refused(links):
    link = links.make("one")
    assert not link.connected
    with pytest.raises(LinkError, match="not connected to 127"):
        link.publish(Outgoing("t", b"x", PLAIN))


def test_a_message_too_large_for_a_packet_is_refused(links):
    one = links.connect("one")
    with pytest.raises(BudgetExceeded, match="does not fit into a packet"):
        one.publish(Outgoing("t", bytes(MAX_PACKET_BYTES), PLAIN))
    deliver(one, "t", b"still connected")


def test_wake_ends_a_poll(links):
    link = links.connect("one")
    woken = threading.Timer(0.05, link.wake)
    woken.start()
    started = time.monotonic()
    assert link.poll(WAIT_SECONDS) is None
    assert time.monotonic() - started < WAIT_SECONDS / 2
    link.wake()  # beforehand: the next poll that would wait
    assert link.poll(WAIT_SECONDS) is None
    assert time.monotonic() - started < WAIT_SECONDS / 2
    assert link.poll(0.0) is None


# ── losing the broker ──────────────────────────────────────────────────────────────────────────────────


def test_it_comes_back_and_subscribes_again(links, mosquitto):
    one = links.connect("one", "a", "b")
    one.unsubscribe("b")
    mosquitto.kill()
    assert until(one, Disconnected).reason
    assert not one.connected
    with pytest.raises(LinkError, match="not connected"):
        one.publish(Outgoing("a", b"x", PLAIN))
    one.subscribe("c")  # while away
    mosquitto.start()
    until(one, Connected)
    assert one.connected
    settle(one)
    two = links.connect("two")
    for topic in ("b", "a", "c"):
        deliver(two, topic, topic.encode())
    assert [until(one, Received).payload for _ in range(2)] == [b"a", b"c"]


def test_nothing_unacknowledged_is_sent_again_by_itself():
    seen: list[bytes] = []

    def serve(connection):
        connection.sendall(CONNACK)
        seen.append(connection.recv(65536))

    with FakeBroker(serve) as broker:
        links = Links(broker)
        link = links.connect("one")
        first = link.publish(Outgoing("t", b"first", PLAIN))
        until(link, Disconnected)
        until(link, Connected)
        second = link.publish(Outgoing("t", b"second", PLAIN))
        until(link, Disconnected)
        links.close()
    assert first != second
    assert b"first" in seen[0]
    assert b"first" not in seen[1]
    assert b"second" in seen[1]


def test_attempts_are_spaced_by_the_callers_delay():
    attempts = []

    def delay(attempt):
        attempts.append(attempt)
        return 0.0

    links = Links(Broker(host="127.0.0.1", port=free_port()))
    link = links.make("one", delay=delay)
    link.start()
    reasons = [until(link, Disconnected).reason for _ in range(4)]
    links.close()
    assert attempts[:3] == [1, 2, 3]
    assert all("cannot connect to 127.0.0.1" in reason for reason in reasons)


def test_a_connection_that_ends_at_once_is_a_failed_attempt():
    attempts = []

    def delay(attempt):
        attempts.append(attempt)
        return 0.0

    with FakeBroker(lambda connection: connection.sendall(CONNACK)) as broker:
        links = Links(broker)
        link = links.make("one", delay=delay)
        link.start()
        for _ in range(3):
            until(link, Connected)
        links.close()
    assert attempts[:2] == [1, 2]


def test_stopping_does_not_wait_for_the_next_attempt():
    links = Links(Broker(host="127.0.0.1", port=free_port()))
    link = links.make("one", delay=lambda _: 3600.0)
    link.start()
    until(link, Disconnected)
    started = time.monotonic()
    links.close()
    assert time.monotonic() - started < WAIT_SECONDS / 2


def test_a_link_that_never_started_stops():
    Links(None).make("one", broker=Broker(host="127.0.0.1")).stop(1.0)


# ── back-pressure ──────────────────────────────────────────────────────────────────────────────────────


def test_a_full_inbox_holds_the_broker_back_and_loses_nothing(links):
    two = links.connect("two", "t", inbox_size=5)
    one = links.connect("one")
    for i in range(300):
        deliver(one, "t", str(i).encode())
    assert two._inbox._messages <= 5
    assert [int(until(two, Received).payload) for _ in range(300)] == list(range(300))


def test_a_full_inbox_does_not_block_publishing(links):
    two = links.connect("two", "t", inbox_size=2)
    one = links.connect("one")
    for i in range(30):
        deliver(one, "t", str(i).encode())
    tokens = [two.publish(Outgoing("elsewhere", b"x", PLAIN)) for _ in range(30)]
    received: list[int] = []
    delivered: list[int] = []
    while len(received) < 30 or len(delivered) < 30:
        match two.poll(WAIT_SECONDS):
            case Received(payload=payload):
                received.append(int(payload))
            case Delivered(token=token):
                delivered.append(token)
            case other:
                raise AssertionError(other)
    assert received == list(range(30))
    assert sorted(delivered) == sorted(tokens)


def test_a_full_inbox_does_not_block_stopping(links):
    two = links.connect("two", "t", inbox_size=1)
    one = links.connect("one")
    for i in range(20):
        deliver(one, "t", str(i).encode())
    started = time.monotonic()
    two.stop(WAIT_SECONDS)
    assert time.monotonic() - started < WAIT_SECONDS / 2
    assert not two._thread.is_alive()


def test_what_the_broker_does_not_acknowledge_is_bounded():
    with FakeBroker(silent) as broker:
        links = Links(broker)
        link = links.connect("one")
        for _ in range(MAX_OUTSTANDING):
            link.publish(Outgoing("t", b"x", PLAIN))
        with pytest.raises(LinkError, match=f"{MAX_OUTSTANDING} messages await"):
            link.publish(Outgoing("t", b"x", PLAIN))
        started = time.monotonic()
        link.stop(0.3)  # waits for acknowledgements that never come
        assert 0.3 <= time.monotonic() - started < WAIT_SECONDS / 2
        links.close()


# ── acknowledging ──────────────────────────────────────────────────────────────────────────────────────


def test_what_was_not_acknowledged_comes_again(links):
    keep = {"clean_session": False, "manual_ack": True}
    two = links.connect("two", "t", **keep)
    one = links.connect("one")
    for i in range(3):
        deliver(one, "t", str(i).encode())
    got = [until(two, Received) for _ in range(3)]
    two.acknowledge(got[1])
    two.stop(WAIT_SECONDS)
    again = links.make("two", **keep)
    again.subscribe("t")
    again.start()
    assert until(again, Connected).session_present
    back = [until(again, Received) for _ in range(2)]
    assert sorted(event.payload for event in back) == [b"0", b"2"]
    for event in back:
        again.acknowledge(event)
    again.stop(WAIT_SECONDS)
    third = links.connect("two", "t", settled=False, **keep)
    nothing(third, Received)


def test_an_acknowledgement_of_an_earlier_connection_does_nothing(links):
    keep = {"clean_session": False, "manual_ack": True}
    two = links.connect("two", "t", **keep)
    one = links.connect("one")
    deliver(one, "t", b"x")
    old = until(two, Received)
    two._client.socket().shutdown(socket.SHUT_RDWR)
    until(two, Connected)
    new = until(two, Received)
    assert (new.payload, new.token == old.token) == (b"x", False)
    two.acknowledge(old)
    two.stop(WAIT_SECONDS)
    third = links.connect("two", "t", settled=False, **keep)
    assert until(third, Received).payload == b"x"
    third.acknowledge(Received("t", b"x", False, 0))  # quality of service 0 has nothing to acknowledge


# ── last will ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_will_speaks_for_the_dead_and_not_for_the_stopped(links):
    watcher = links.connect("watcher", "will/#")
    clean = links.connect("clean", will=Outgoing("will/clean", b"gone", RETAINED))
    cut = links.connect("cut", will=Outgoing("will/cut", b"gone", RETAINED))
    clean.stop(WAIT_SECONDS)
    cut._stopping.set()  # a process that was killed does not come back
    cut._client.socket().shutdown(socket.SHUT_RDWR)
    assert until(watcher, Received).topic == "will/cut"
    nothing(watcher, Received)


def test_what_was_published_before_a_stop_arrives(links):
    two = links.connect("two", "t")
    one = links.connect("one")
    for i in range(20):
        one.publish(Outgoing("t", str(i).encode() + bytes(10_000), PLAIN))
    one.stop(WAIT_SECONDS)
    assert [int(until(two, Received).payload.rstrip(b"\0")) for _ in range(20)] == list(range(20))


# ── hostile and poisoned ───────────────────────────────────────────────────────────────────────────────


def test_a_packet_beyond_the_limit_is_not_read(links):
    one = links.connect("one", "t", "u")
    raw = mqtt.Client(CallbackAPIVersion.VERSION2)
    raw.connect(links.broker.host, links.broker.port)
    raw.loop_start()
    try:
        raw.publish("t", bytes(MAX_PACKET_BYTES + 1), qos=1).wait_for_publish(WAIT_SECONDS)
        reason = until(one, Disconnected).reason
        assert "is larger than the" in reason
        until(one, Connected)
        settle(one)
        raw.publish("u", b"fine", qos=1).wait_for_publish(WAIT_SECONDS)
    finally:
        raw.disconnect()
        raw.loop_stop()
    assert until(one, Received).payload == b"fine"


@pytest.mark.parametrize(
    "data",
    [
        b"\x30\xff\xff\xff\xff\xff",  # a length of five bytes
        b"\x30\xff\xff\xff\x7f",  # a message of 256 MB
        b"\x30\x02\xff\xff",  # a topic that runs past the end
        b"\x30\x00",  # no topic
        b"\x40\x00",  # an acknowledgement of nothing
        b"\x90\x01\x00",
        b"\x20\x00",
        b"\xf0\x00",
        b"\x00" * 64,
        bytes(range(256)),
    ],
)
def test_bytes_that_are_no_mqtt_end_the_connection_and_not_the_link(data):
    calm = threading.Event()

    def serve(connection):
        connection.sendall(CONNACK)
        if calm.is_set():
            connection.sendall(b"\x30\x05\x00\x02hiX")
            connection.recv(10)
        else:
            connection.sendall(data)

    with FakeBroker(serve) as broker:
        links = Links(broker)
        link = links.make("one")
        link.start()
        until(link, Disconnected)
        calm.set()
        assert until(link, Received).payload == b"X"
        links.close()


def test_a_topic_that_is_not_text_is_dropped_with_a_warning(caplog):
    def serve(connection):
        connection.sendall(CONNACK + b"\x30\x05\x00\x02\xff\xfeX" + b"\x30\x05\x00\x02hiY")
        connection.recv(10)

    with FakeBroker(serve) as broker, caplog.at_level(logging.WARNING):
        links = Links(broker)
        link = links.connect("one")
        assert until(link, Received).payload == b"Y"
        links.close()
    assert "topic_not_utf8" in caplog.text


def test_a_refusal_by_the_broker_is_the_reason():
    with FakeBroker(lambda connection: connection.sendall(REFUSED)) as broker:
        links = Links(broker)
        link = links.make("one")
        link.start()
        assert "the broker refused the connection: Not authorized" in until(link, Disconnected).reason
        assert not link.connected
        links.close()


def test_a_poisoned_callback_does_not_end_the_thread(links, monkeypatch):
    two = links.make("two")
    honest = two._on_message

    def poisoned(epoch, message):
        if message.payload == b"poison":
            raise RuntimeError("poison")
        honest(epoch, message)

    monkeypatch.setattr(two, "_on_message", poisoned)
    two.subscribe("t")
    two.start()
    until(two, Connected)
    settle(two)
    one = links.connect("one")
    deliver(one, "t", b"poison")
    deliver(one, "t", b"fine")
    assert until(two, Received).payload == b"fine"


# ── who may ────────────────────────────────────────────────────────────────────────────────────────────


def broker_with(tmp_path, extra):
    binary = find_mosquitto()
    folder = tmp_path / "broker"
    folder.mkdir()
    assert binary is not None
    return Mosquitto(binary, folder, extra_config=extra)


@pytest.fixture
def needs_mosquitto(mosquitto):
    mosquitto.stop()


def test_a_refused_subscription_is_logged(caplog):
    logged = threading.Event()

    def serve(connection):
        connection.sendall(CONNACK)
        asked = connection.recv(4096)  # 0x82, length, message id, topic …
        connection.sendall(b"\x90\x03" + asked[2:4] + b"\x80")
        logged.wait(WAIT_SECONDS)

    with FakeBroker(serve) as broker, caplog.at_level(logging.ERROR, "edge_runtime.link"):
        links = Links(broker)
        link = links.make("one")
        link.subscribe("forbidden")
        link.start()
        deadline = time.monotonic() + WAIT_SECONDS
        while not caplog.text and time.monotonic() < deadline:
            link.poll(0.02)
        logged.set()
        links.close()
    assert "subscription_refused client=one topic=forbidden" in caplog.text


# paho leaves a socket whose handshake failed to the garbage collector.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)
def test_mutual_tls(needs_mosquitto, tmp_path):
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    server, device, stranger = ours.issue("broker"), ours.issue("device"), theirs.issue("stranger")
    broker = broker_with(
        tmp_path,
        f"cafile {ours.path}\ncertfile {server.certificate}\nkeyfile {server.key}\n"
        "require_certificate true\nuse_identity_as_username true",
    )
    broker.start()
    links = Links(broker)

    def to(ca, pair=None):
        return Broker(
            host=broker.host,
            port=broker.port,
            ca=ca,
            certificate=pair.certificate if pair else "",
            key=pair.key if pair else "",
        )

    try:
        link = links.connect("device", "t", broker=to(ours.path, device))
        link.publish(Outgoing("t", bytes(100_000), PLAIN))
        assert len(until(link, Received).payload) == 100_000
        assert "u'device'" in broker.log
        for client_id, other in (
            ("no-certificate", to(ours.path)),
            ("foreign-certificate", to(ours.path, stranger)),
            ("foreign-broker", to(theirs.path, device)),
            ("plain", Broker(host=broker.host, port=broker.port)),
        ):
            refused = links.make(client_id, broker=other)
            refused.start()
            until(refused, Disconnected)
            assert not refused.connected
    finally:
        links.close()
        broker.close()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"ca": "gone.pem"}, r"cannot use the TLS files gone\.pem"),
        ({"certificate": "c.pem"}, "a client certificate without a ca"),
    ],
)
def test_tls_files_are_read_when_the_link_is_made(fields, problem):
    with pytest.raises(LinkError, match=problem):
        Link(Broker(host="127.0.0.1", **fields), client_id="x", delay=lambda _: 0.0)


def test_a_password_is_not_shown():
    assert "geheim" not in repr(Broker(host="h", username="u", password="geheim"))
