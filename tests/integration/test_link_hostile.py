"""The link against a broker that lies, stalls and floods: it comes back, and memory is bounded."""

import contextlib
import logging
import queue
import resource
import socket
import threading
import tracemalloc
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_runtime.contract.errors import LinkError
from edge_runtime.link import Connected, Disconnected, Outgoing, Received
from edge_runtime.mqtt import client as mqtt_client
from edge_runtime.mqtt.broker import Broker
from edge_runtime.mqtt.packets import MAX_PACKET_BYTES
from tests.support.certificates import Authority
from tests.support.fake_broker import MQTT5, FakeBroker, length, message, packet, silent
from tests.support.links import ONCE, WAIT_SECONDS, Links, settle, until

pytestmark = pytest.mark.sampled(2)

MEGABYTE = 1 << 20


@pytest.fixture(params=["3.1.1", "5"])
def protocol(request):
    return request.param


class Moody(FakeBroker):
    """Treats the first connection as a test wants, and all later ones well: they get one message."""

    def __init__(self, serve, *, welcome=True):
        super().__init__(self._choose, welcome=False)
        self._first, self._polite = serve, welcome

    def _choose(self, connection):
        if self.connections == 1:
            if self._polite:
                self.answer(connection)
            self._first(connection)
        else:
            self.answer(connection)
            connection.sendall(message(self.level, b"t", b"fine"))
            silent(connection)


@contextlib.contextmanager
def linked(serving, protocol, **options):
    """A link that is connecting."""
    with serving:
        links = Links(serving, protocol)
        link = links.make("one", **options)
        link.start()
        try:
            yield link
        finally:
            links.close()


def recovers(link):
    """Why the first connection ended; the second one works."""
    reason = until(link, Disconnected).reason
    assert until(link, Received).payload == b"fine"
    return reason


# ── packets that no broker sends ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x30\xff\xff\xff\xff\xff", "protocol error"),  # a length of five bytes
        (b"\x30\xff\xff\xff\x7f", ""),  # the beginning of a message of 256 MB
        (b"\x30\x02\xff\xff", "ends within its topic"),
        (b"\x30\x00", "ends within its topic"),
        (b"\x30\x01\x00", "ends within its topic"),
        (b"\x32\x06\x00\x01t\x00\x00\x00", "message with id 0"),
        (b"\x34\x06\x00\x01t\x00\x07\x00", "message of QoS 2"),
        (b"\x36\x06\x00\x01t\x00\x07\x00", "message of QoS 3"),
        (b"\x40\x00", "protocol error"),
        (b"\x41\x02\x00\x01", "PUBACK with reserved bits"),
        (b"\x90\x01\x00", "protocol error"),
        (b"\x20\x02\x00\x00", "answered CONNECT twice"),
        (b"\x10\x00", "none a broker sends"),
        (b"\x50\x02\x00\x01", "none a broker sends"),  # PUBREC
        (b"\x62\x02\x00\x01", "none a broker sends"),  # PUBREL
        (b"\x70\x02\x00\x01", "none a broker sends"),  # PUBCOMP
        (b"\x82\x00", "none a broker sends"),
        (b"\xc0\x00", "none a broker sends"),  # PINGREQ
        (b"\xf0\x00", "none a broker sends"),
        (b"\x00" * 64, "none a broker sends"),
        (b"\xd0\x01\x00", "protocol error"),
        (b"\x90\x80\x80\x20", "packet 0x90 of 524288 bytes, more than the"),
        (b"\xe0\xff\xff\xff\x7f", "packet 0xe0 of 268435455 bytes, more than the"),
        (bytes(range(256)), ""),
    ],
)
def test_what_no_broker_sends_ends_the_connection_and_not_the_link(data, problem, protocol):
    with linked(Moody(lambda connection: connection.sendall(data)), protocol) as link:
        assert problem in recovers(link)


@pytest.mark.parametrize(
    "data",
    [
        b"\xe0\x00",
        b"\xe0\x01\xff",  # no such reason
        b"\xe0\x03\x00\x01\x63",  # no such property
        b"\xe0\x06\x89\x04\x1f\x00\x01\xff",  # a reason that is not text
        b"\x40\x04\x00\x01\xff\x00",
        b"\x90\x05\x00\x01\x01\x1f\x00",
    ],
)
def test_what_only_mqtt_5_can_get_wrong(data):
    with linked(Moody(lambda connection: connection.sendall(data)), "5") as link:
        recovers(link)


@pytest.mark.parametrize(
    "data", [b"\x30\x04\x00\x01tX", b"\x20\x00", b"\x20\x02\x00\xff", b"\x20\x01\x00", b"\xd0\x00"]
)
def test_what_is_no_answer_to_connect(data, protocol):
    with linked(Moody(lambda connection: connection.sendall(data), welcome=False), protocol) as link:
        recovers(link)


def test_answers_to_nothing_are_passed_over(protocol):
    def serve(connection):
        end = b"\x00" if broker.level == MQTT5 else b""
        connection.sendall(b"\x40\x02\x12\x34" * 20_000)
        connection.sendall(packet(0x90, b"\x12\x34" + end + b"\x80") * 100)
        connection.sendall(packet(0xB0, b"\x12\x34" + end + (b"\x00" if end else b"")) * 100)
        connection.sendall(b"\xd0\x00" * 100)
        connection.sendall(message(broker.level, b"t", b"still here"))
        silent(connection)

    broker = FakeBroker(serve)
    with linked(broker, protocol) as link:
        assert until(link, Received).payload == b"still here"
        assert broker.connections == 1


# ── poisoned messages ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("manual_ack", [True, False])
@pytest.mark.parametrize("topic", [b"\xff\xfe", b""])
def test_a_topic_that_is_no_text_is_dropped_and_acknowledged(topic, manual_ack, protocol, caplog):
    """Unacknowledged it would come again with every connection, and take one of the few places in flight."""
    acknowledged: list[bytes] = []

    def serve(connection):
        connection.sendall(message(broker.level, topic, b"X", mid=7))
        acknowledged.append(connection.recv(4))
        connection.sendall(message(broker.level, topic, b"X") + message(broker.level, b"hi", b"Y"))
        silent(connection)

    broker = FakeBroker(serve)
    with caplog.at_level(logging.WARNING), linked(broker, protocol, manual_ack=manual_ack) as link:
        assert until(link, Received).payload == b"Y"
    assert acknowledged == [b"\x40\x02\x00\x07"]
    assert caplog.text.count("topic_not_text") == 2


def test_a_message_too_large_is_dropped_unread_and_acknowledged(protocol, caplog):
    acknowledged: list[bytes] = []
    size = 64 * MEGABYTE

    def serve(connection):
        head = b"\x00\x01t\x00\x07"
        connection.sendall(b"\x32" + length(size) + head)
        for _ in range(64):
            connection.sendall(bytes(MEGABYTE))
        acknowledged.append(connection.recv(4))
        connection.sendall(message(broker.level, b"t", b"fine"))
        silent(connection)

    size += 5
    broker = FakeBroker(serve)
    with caplog.at_level(logging.WARNING), linked(broker, protocol, manual_ack=True) as link:
        until(link, Connected)
        tracemalloc.start()
        try:
            assert until(link, Received).payload == b"fine"
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert acknowledged == [b"\x40\x02\x00\x07"]
    assert f"message_too_large topic='t' bytes={size}" in caplog.text
    assert peak_bytes < 4 * MEGABYTE  # the broker's own megabyte is among them


def test_a_message_too_large_does_not_come_for_ever(mosquitto, protocol):
    links = Links(mosquitto, protocol)
    keep = {"clean_session": False, "manual_ack": True}
    links.connect("two", "t", **keep).stop(WAIT_SECONDS)
    raw = mqtt.Client(CallbackAPIVersion.VERSION2)
    raw.connect(mosquitto.host, mosquitto.port)
    raw.loop_start()
    try:
        for payload in (bytes(MAX_PACKET_BYTES + 1), b"fine"):
            raw.publish("t", payload, qos=1).wait_for_publish(WAIT_SECONDS)
    finally:
        raw.disconnect()
        raw.loop_stop()
    for _ in range(2):
        two = links.connect("two", settled=False, **keep)
        received = until(two, Received)
        assert received.payload == b"fine"
        two.stop(WAIT_SECONDS)
    links.close()


def test_a_property_that_a_parser_dislikes_reaches_nobody(mosquitto):
    """U+FEFF is legal (MQTT 5, section 1.5.4) and Mosquitto passes it on; paho takes it for a broken packet."""
    links = Links(mosquitto, "5")
    two = links.connect("two", "t", clean_session=False, manual_ack=True)
    raw = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    raw.connect(mosquitto.host, mosquitto.port)
    raw.loop_start()
    try:
        properties = Properties(PacketTypes.PUBLISH)
        properties.UserProperty = ("mark", "\ufeff")
        raw.publish("t", b"poison", qos=1, properties=properties).wait_for_publish(WAIT_SECONDS)
    finally:
        raw.disconnect()
        raw.loop_stop()
    assert until(two, Received).payload == b"poison"
    settle(two)  # the connection is still the first
    links.close()


# ── stalling ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("data", [b"", b"\x20\x02"])
def test_a_broker_that_never_answers_connect_is_left(monkeypatch, data, protocol):
    monkeypatch.setattr(mqtt_client, "CONNECT_SECONDS", 0.2)

    def serve(connection):
        connection.sendall(data)
        silent(connection)

    with linked(Moody(serve, welcome=False), protocol) as link:
        assert recovers(link) == "the broker did not answer CONNECT within 0.2 s"


def test_a_broker_that_sends_byte_by_byte_is_left(monkeypatch, protocol):
    monkeypatch.setattr(mqtt_client, "PACKET_SECONDS", 0.3)

    def serve(connection):
        connection.settimeout(0.02)
        for byte in packet(0x30, b"\x00\x01t" + bytes(100_000)):
            connection.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                if not connection.recv(4096):
                    return

    with linked(Moody(serve), protocol) as link:
        assert recovers(link) == "the broker did not end a packet within 0.3 s"


def test_a_connection_that_died_in_silence_is_left(protocol):
    broker = Moody(silent)
    patient = Broker(host=broker.host, port=broker.port, protocol=protocol, keepalive_seconds=1)
    with linked(broker, protocol, broker=patient) as link:
        recovers(link)


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)
def test_a_broker_that_never_shakes_hands_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(mqtt_client, "OPEN_SECONDS", 0.2)
    with FakeBroker(silent, welcome=False) as broker:
        links = Links(broker)
        link = links.make(
            "one", broker=Broker(host=broker.host, port=broker.port, ca=Authority(tmp_path).path)
        )
        link.start()
        for _ in range(2):
            assert "timed out" in until(link, Disconnected).reason
        links.close()


def test_a_broker_that_reads_nothing_and_goes_on_sending_is_left(monkeypatch, protocol):
    monkeypatch.setattr(mqtt_client, "MAX_QUEUED", 300)
    filled = threading.Event()

    def serve(connection):
        filled.wait(WAIT_SECONDS)
        for i in range(1, 60_000):
            connection.sendall(message(broker.level, b"t", b"", mid=i))

    broker = Moody(serve)
    with linked(broker, protocol) as link:
        until(link, Connected)
        for _ in range(60):
            link.publish(Outgoing("t", bytes(250_000), ONCE))
        filled.set()
        assert "of ours unread" in recovers(link)


def test_what_is_not_written_is_bounded(protocol):
    over = threading.Event()
    with linked(FakeBroker(lambda _: over.wait(WAIT_SECONDS)), protocol) as link:
        until(link, Connected)
        for _ in range(60):
            link.publish(Outgoing("t", bytes(250_000), ONCE))
        fill(link, 930)
        with pytest.raises(LinkError, match="1000 packets are not yet written"):
            fill(link, 71)
        link.stop(0.0)
        over.set()


def fill(link, count):
    for _ in range(count):
        link.publish(Outgoing("t", b"x", ONCE))


def test_messages_that_nobody_takes_are_bounded_in_bytes(protocol):
    def serve(connection):
        for _ in range(200):
            connection.sendall(message(broker.level, b"t", bytes(300_000)))
        silent(connection)

    broker = FakeBroker(serve)
    tracemalloc.start()
    try:
        with linked(broker, protocol) as link:
            until(link, Connected)
            while link._inbox._bytes < 3_900_000:  # full: no other message fits
                link._stopping.wait(0.01)
            found = [len(until(link, Received).payload) for _ in range(200)]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [300_000] * 200
    assert peak_bytes < 8 * MEGABYTE


# ── anything at all ────────────────────────────────────────────────────────────────────────────────────


FIRST_BYTES = st.one_of(
    st.sampled_from([0x20, 0x30, 0x31, 0x32, 0x3A, 0x40, 0x90, 0xB0, 0xD0, 0xE0]), st.integers(0, 255)
)
SMALL = st.integers(0, 40)
BODIES = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda mid, properties, rest: mid.to_bytes(2) + length(len(properties)) + properties + rest,
        st.integers(0, 3),
        st.builds(lambda which, value: bytes([which]) + value, SMALL, st.binary(max_size=20)),
        st.binary(max_size=10),
    ),
)
MESSAGES = st.builds(
    lambda level, topic, payload, mid, properties: message(
        level, topic, payload, mid=mid, properties=properties
    ),
    st.sampled_from([4, 5]),
    st.binary(max_size=10),
    st.binary(max_size=200),
    st.integers(0, 65535),
    st.binary(max_size=100),
)
PIECES = st.one_of(MESSAGES, st.builds(packet, FIRST_BYTES, BODIES), st.binary(min_size=1, max_size=64))
JUNK = st.lists(PIECES, min_size=1, max_size=8).map(b"".join)


class Fuzzer:
    """One link that meets junk again and again, and a good broker after each."""

    def __init__(self, protocol):
        self._junk: queue.SimpleQueue[tuple[bytes, bool] | None] = queue.SimpleQueue()
        self.broker = FakeBroker(self._serve, welcome=False)
        self._protocol = protocol
        self._count = 0

    def _serve(self, connection):
        junk = self._junk.get()
        if junk is None:
            return
        data, welcome = junk
        if welcome:
            self.broker.answer(connection)
        if data is not None:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        silent(connection)

    def __enter__(self):
        self.broker.__enter__()
        self._links = Links(self.broker, self._protocol)
        self.link = self._links.make("fuzzed", delay=lambda _: 0.0, manual_ack=True)
        self.link.start()
        return self

    def __exit__(self, *_):
        self._junk.put(None)
        self.link._stopping.set()
        self._links.close()
        self.broker.__exit__()

    def meet(self, data, *, welcome):
        """Junk on one connection, and a message on the next."""
        self._count += 1
        name = b"good/%d" % self._count
        level = 5 if self._protocol == "5" else 4
        self._junk.put((data, welcome))
        self._junk.put((message(level, name, b"fine"), True))
        assert until(self.link, Received, topic=name.decode()).payload == b"fine"
        assert self.link._thread.is_alive()


def fuzz(meet, examples):
    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(data=JUNK, welcome=st.sampled_from([True, True, True, False]))
    def law(data, welcome):
        meet(data, welcome=welcome)

    law()


def test_whatever_the_broker_sends_the_link_comes_back(protocol, caplog):
    with Fuzzer(protocol) as fuzzer:
        fuzz(fuzzer.meet, 100)
    for sign in ("link_broken", "message_poisoned", "Caught exception"):
        assert sign not in caplog.text


@pytest.mark.slow
def test_whatever_the_broker_sends_for_long_memory_is_bounded(protocol, monkeypatch):
    # What hypothesis and the captured log keep would be counted as the link's.
    junk: list[tuple[bytes, bool]] = []
    fuzz(lambda data, welcome: junk.append((data, welcome)), 3_000)
    problems: list[logging.LogRecord] = []

    class Traces(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info:
                problems.append(record)

    handler = Traces()
    logger = logging.getLogger("edge_runtime")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [handler])
    with Fuzzer(protocol) as fuzzer:
        for data, welcome in junk[:100]:
            fuzzer.meet(data, welcome=welcome)
        before = threading.active_count(), _open_files(), _peak_bytes()
        for data, welcome in junk:
            fuzzer.meet(data, welcome=welcome)
        after = threading.active_count(), _open_files(), _peak_bytes()
    assert not problems
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 10
    assert after[2] <= before[2] + 4 * MEGABYTE


def _open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def _peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_good_broker_after_a_hundred_bad_ones(protocol):
    with Fuzzer(protocol) as fuzzer:
        fuzzer.meet(b"\x20\x02\x00\x05", welcome=False)
        fds = _open_files()
        for _ in range(100):
            fuzzer.meet(b"\xf0\x00", welcome=True)
        assert _open_files() <= fds + 10  # the next connection may be under way; a leak is a hundred


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 1)), max_size=12),
    st.lists(st.integers(1, 400), min_size=1, max_size=8),
)
def test_messages_are_the_same_however_they_were_cut_on_the_way(sent, cuts):
    """Read ahead whole, or piece by piece by paho, with answers to pings between them."""
    data = b"".join(
        message(MQTT5, b"t/%d" % i, payload, mid=i + 1 if qos else 0) + b"\xd0\0"
        for i, (payload, qos) in enumerate(sent)
    )
    wanted = [(f"t/{i}", payload, i + 1 if qos else 0) for i, (payload, qos) in enumerate(sent)]
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(data[at : at + size])
        at += size
    assert read_in_pieces([data]) == read_in_pieces(pieces) == wanted


def read_in_pieces(pieces):
    found = []
    client = mqtt_client.Client(
        "one",
        mqtt5=True,
        clean_session=True,
        receive_maximum=20,
        take=lambda _, m: found.append((m.topic, m.payload, m.mid)),
    )
    client.is_answered = True
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        client._sock = ours
        for piece in filter(None, pieces):
            theirs.sendall(piece)
            assert client.loop_read() == 0
            while client._ahead:
                if not client._take_ahead():
                    assert client.loop_read() == 0
        client._sock = None
    client.close()
    return found
