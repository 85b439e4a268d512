"""The link against a real Mosquitto, and against a broker that misbehaves."""

import logging
import select
import shutil
import socket
import threading
import time

import pytest

from edge_runtime.contract.errors import BudgetExceeded, LinkError
from edge_runtime.contract.topics import Delivery
from edge_runtime.link import Connected, Delivered, Disconnected, Link, Outgoing, Received
from edge_runtime.mqtt.broker import Broker
from edge_runtime.mqtt.client import MAX_ANSWERS, MAX_IN_FLIGHT, MAX_OUTSTANDING, SESSION_SECONDS
from edge_runtime.mqtt.packets import MAX_PACKET_BYTES
from tests.services import Mosquitto, find_mosquitto, free_port
from tests.support.certificates import Authority
from tests.support.fake_broker import BAD_VERSION, MQTT5, NOT_AUTHORISED, FakeBroker, message, silent
from tests.support.links import ONCE, PLAIN, RETAINED, WAIT_SECONDS, Links, deliver, nothing, settle, until

pytestmark = pytest.mark.sampled(2)


@pytest.fixture(params=["3.1.1", "5"])
def protocol(request):
    return request.param


@pytest.fixture
def links(mosquitto, protocol):
    made = Links(mosquitto, protocol)
    yield made
    made.close()


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


def test_nothing_unacknowledged_is_sent_again_by_itself(protocol):
    seen: list[bytes] = []

    def serve(connection):
        seen.append(connection.recv(65536))

    with FakeBroker(serve) as broker:
        links = Links(broker, protocol)
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

    with FakeBroker(lambda _: None) as broker:
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


def test_what_the_broker_does_not_acknowledge_is_bounded(protocol):
    with FakeBroker(silent) as broker:
        links = Links(broker, protocol)
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


def test_many_are_taken_answered_and_acknowledged_at_once(links):
    keep = {"clean_session": False, "manual_ack": True}
    two = links.connect("two", "t", **keep)
    one = links.connect("one", "u")
    for i in range(5):
        deliver(one, "t", str(i).encode())
    got: list[Received] = []
    while len(got) < 5:
        got += [event for event in two.poll_many(5, WAIT_SECONDS) if isinstance(event, Received)]
    assert two.publish_all([("u", event.payload) for event in got]) == 5
    two.acknowledge_all(
        [*got[:3], Received("t", b"", False, 0), Received("t", b"", False, got[3].token + (1 << 16))]
    )
    assert [until(one, Received).payload for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
    two.stop(WAIT_SECONDS)
    again = links.connect("two", "t", settled=False, **keep)
    assert sorted(until(again, Received).payload for _ in range(2)) == [b"3", b"4"]


def test_without_a_connection_nothing_is_published_or_acknowledged(links):
    link = links.make("one")
    assert link.publish_all([("t", b"x")]) == 0
    link.acknowledge_all([Received("t", b"x", False, 5)])


def test_answers_and_acknowledgements_leave_in_order_and_no_more_than_may_wait(protocol):
    read: list[bytes] = []

    def serve(connection):
        connection.sendall(
            message(broker.level, b"t", b"x", mid=7) + message(broker.level, b"t", b"y", mid=8)
        )
        while data := connection.recv(65536):
            read.append(data)

    with FakeBroker(serve) as broker:
        links = Links(broker, protocol)
        link = links.connect("one", manual_ack=True)
        got = [until(link, Received) for _ in range(2)]
        assert link.publish_all([("u", bytes(400_000))]) == 0
        assert link.publish_all([("u", b"%d" % i) for i in range(2 * MAX_ANSWERS)]) <= MAX_ANSWERS
        link.acknowledge_all(got)
        link.stop(WAIT_SECONDS)
        links.close()
    sent = b"".join(read)
    properties = b"\0" if broker.level == 5 else b""
    assert sent.index(b"\0\x01u" + properties + b"0") < sent.index(b"\0\x01u" + properties + b"1")
    last = b"%d" % (MAX_ANSWERS - 1)
    assert sent.endswith(b"\0\x01u" + properties + last + b"\x40\x02\0\x07" + b"\x40\x02\0\x08" + b"\xe0\0")


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


def test_what_was_acknowledged_is_known_although_more_is_on_its_way(links):
    """A socket closed with anything unread is reset, and the broker forgets what it was about to read."""
    keep = {"clean_session": False, "manual_ack": True}
    two = links.connect("two", "t", inbox_size=10, **keep)
    one = links.connect("one")
    for i in range(60):
        deliver(one, "t", str(i).encode().ljust(20_000))
    for received in [until(two, Received) for _ in range(10)]:
        two.acknowledge(received)
    two.stop(WAIT_SECONDS)
    again = links.connect("two", "t", settled=False, **keep)
    found = [until(again, Received) for _ in range(15)]
    assert min(int(event.payload) for event in found) == 10


def test_what_was_acknowledged_reaches_a_broker_that_reads_late(protocol):
    read: list[bytes] = []

    def serve(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        for i in range(1, 100):
            connection.sendall(message(broker.level, b"t", bytes(2000), mid=i))
        reset = select.poll()
        reset.register(connection, select.POLLRDHUP)
        reset.poll(300)
        while data := connection.recv(65536):
            read.append(data)

    with FakeBroker(serve) as broker:
        links = Links(broker, protocol)
        link = links.connect("one", manual_ack=True, inbox_size=2)
        messages = [until(link, Received) for _ in range(2)]
        link.publish(Outgoing("u", bytes(20_000), ONCE))  # more than the other side's window holds
        for received in messages:
            link.acknowledge(received)
        link.stop(WAIT_SECONDS)
        links.close()
    assert b"".join(read).endswith(b"\x40\x02\0\x01" + b"\x40\x02\0\x02" + b"\xe0\0")


def test_what_a_closing_link_did_not_take_comes_again(links):
    keep = {"clean_session": False, "inbox_size": 1}  # acknowledged by entering the inbox
    two = links.connect("two", "t", **keep)
    one = links.connect("one")
    for i in range(10):
        deliver(one, "t", str(i).encode())
    found = [int(until(two, Received).payload)]
    two.publish(Outgoing("elsewhere", b"x", PLAIN))  # waited for, while more messages come
    two.stop(WAIT_SECONDS)
    while (event := two.poll(0.0)) is not None:
        if isinstance(event, Received):
            found.append(int(event.payload))
    again = links.connect("two", "t", settled=False, **keep)
    while len(found) < 10:
        found.append(int(until(again, Received).payload))
    assert found == list(range(10))


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


# ── versions of the protocol ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("asked", "spoken"), [("auto", "p5"), ("5", "p5"), ("3.1.1", "p2")])
def test_the_version_asked_for_is_spoken(mosquitto, asked, spoken):
    links = Links(mosquitto, asked)
    links.connect("one")
    links.close()
    assert f"as one ({spoken}," in mosquitto.log


def test_auto_falls_back_at_once_when_the_broker_refuses_the_version_and_remembers():
    levels = []

    def serve(connection):
        levels.append(broker.level)
        if broker.level == MQTT5:
            connection.sendall(b"\x20\x02\x00\x01")  # as a broker of 3.1.1 says it
        else:
            broker.answer(connection)
            if len(levels) > 2:
                silent(connection)

    with FakeBroker(serve, welcome=False) as broker:
        links = Links(broker)
        link = links.make("one")
        link.start()
        assert isinstance(link.poll(WAIT_SECONDS), Connected)  # no Disconnected before it
        until(link, Disconnected)
        until(link, Connected)
        links.close()
    assert levels[:3] == [5, 4, 4]


@pytest.mark.parametrize(
    "answer", [b"", b"\x20\x02\x00\x00"]
)  # silence, or an acceptance in the other version
def test_auto_tries_the_other_version_after_an_answer_it_cannot_read(answer):
    levels = []

    def serve(connection):
        levels.append(broker.level)
        if broker.level == MQTT5:
            connection.sendall(answer)
        else:
            broker.answer(connection)

    with FakeBroker(serve, welcome=False) as broker:
        links = Links(broker)
        link = links.make("one")
        link.start()
        for _ in range(2):
            until(link, Connected)
        links.close()
    assert levels[:3] == [5, 4, 4]


def test_auto_stays_with_a_version_that_worked():
    levels = []

    def serve(connection):
        levels.append(broker.level)
        if len(levels) not in (2, 3):  # a broker that is killed between accept and CONNACK
            broker.answer(connection)

    with FakeBroker(serve, welcome=False) as broker:
        links = Links(broker)
        link = links.make("one")
        link.start()
        for _ in range(2):
            until(link, Connected)
        links.close()
    assert set(levels) == {MQTT5}


@pytest.mark.parametrize("asked", ["5", "3.1.1"])
def test_a_version_that_was_asked_for_is_never_left(asked):
    levels = []

    def serve(connection):
        levels.append(broker.level)
        broker.answer(connection, BAD_VERSION)

    with FakeBroker(serve, welcome=False) as broker:
        links = Links(broker, asked)
        link = links.make("one")
        link.start()
        for _ in range(3):
            until(link, Disconnected)
        links.close()
    assert set(levels) == {5 if asked == "5" else 4}


@pytest.mark.parametrize("clean", [True, False])
def test_what_is_announced_under_mqtt_5(clean):
    with FakeBroker(silent) as broker:
        links = Links(broker, "5")
        links.connect("one", clean_session=clean)
        links.close()
    connect = broker.connects[0]
    assert connect[9] & 2 == 2 * clean  # clean start
    properties = connect[13 : 13 + connect[12]]
    announced = b"\x21" + MAX_IN_FLIGHT.to_bytes(2) + b"\x27" + MAX_PACKET_BYTES.to_bytes(4)
    assert properties == announced if clean else b"\x11" + SESSION_SECONDS.to_bytes(4) + announced


def test_limits_of_the_broker_are_obeyed():
    got: list[bytes] = []
    three = threading.Event()

    def serve(connection):
        # receive maximum 2, maximum packet size 100, server keepalive 1
        broker.answer(connection, properties=b"\x21\0\x02" + b"\x27\0\0\0\x64" + b"\x13\0\x01")
        while data := connection.recv(65536):
            got.append(data)
            if b"\xc0\0" in data:  # a ping, although our own keepalive is 30 s
                three.set()

    with FakeBroker(serve, welcome=False) as broker:
        links = Links(broker, "5")
        link = links.connect("one")
        with pytest.raises(BudgetExceeded, match="at most 100 bytes"):
            link.publish(Outgoing("t", bytes(100), PLAIN))
        for i in range(3):
            link.publish(Outgoing("t", b"number-%d" % i, PLAIN))
        assert three.wait(WAIT_SECONDS)
        link.stop(0.0)
        links.close()
    sent = b"".join(got)
    assert b"number-0" in sent
    assert b"number-1" in sent
    assert b"number-2" not in sent


@pytest.mark.parametrize("seconds", [0, 65535])
def test_a_broker_cannot_turn_the_keepalive_off(seconds):
    def serve(connection):
        broker.answer(connection, properties=b"\x13" + seconds.to_bytes(2))
        silent(connection)

    with FakeBroker(serve, welcome=False) as broker:
        links = Links(broker)
        link = links.make(
            "one", broker=Broker(host=broker.host, port=broker.port, protocol="5", keepalive_seconds=1)
        )
        link.start()
        until(link, Connected)
        assert until(link, Disconnected).reason
        links.close()


def test_a_goodbye_of_the_broker_has_its_reason():
    words = b"too busy"
    goodbye = b"\x89" + bytes([3 + len(words), 0x1F, 0, len(words)]) + words

    def serve(connection):
        connection.sendall(b"\xe0" + bytes([len(goodbye)]) + goodbye)

    with FakeBroker(serve) as broker:
        links = Links(broker, "5")
        link = links.connect("one")
        assert until(link, Disconnected).reason == "the broker ended the connection: Server busy (too busy)"
        links.close()


def test_a_publish_that_the_broker_refuses_says_so(mosquitto, tmp_path):
    acl = tmp_path / "acl"
    acl.write_text("topic write allowed\n")
    acl.chmod(0o600)
    broker = broker_with(tmp_path, f"acl_file {acl}")
    broker.start()
    links = Links(broker, "5")
    try:
        link = links.connect("one")
        link.publish(Outgoing("allowed", b"x", PLAIN))
        assert until(link, Delivered).refusal == ""
        link.publish(Outgoing("forbidden", b"x", PLAIN))
        assert until(link, Delivered).refusal == "Not authorized"
    finally:
        links.close()
        broker.close()


def test_a_session_outlives_a_change_of_version(mosquitto):
    links = Links(mosquitto)
    keep = {"clean_session": False, "manual_ack": True}
    links.connect("two", "t", protocol="3.1.1", **keep).stop(WAIT_SECONDS)
    deliver(links.connect("one"), "t", b"x")
    again = links.make("two", protocol="5", **keep)
    again.start()
    assert until(again, Connected).session_present
    assert until(again, Received).payload == b"x"
    links.close()


@pytest.mark.parametrize("qos", [-1, 2, 3])
def test_other_qualities_of_service_are_refused(qos):
    link = Link(Broker(host="127.0.0.1"), client_id="x", delay=lambda _: 0.0)
    with pytest.raises(ValueError, match=f"quality of service {qos}"):
        link.subscribe("t", qos)
    with pytest.raises(ValueError, match=f"quality of service {qos}"):
        link.publish(Outgoing("t", b"", Delivery(qos, False)))


# ── poisoned (more of it in test_link_hostile.py) ──────────────────────────────────────────────────────


def test_a_refusal_by_the_broker_is_the_reason(protocol):
    with FakeBroker(lambda wire: broker.answer(wire, NOT_AUTHORISED), welcome=False) as broker:
        links = Links(broker, protocol)
        link = links.make("one")
        link.start()
        assert "the broker refused the connection: Not authorized" in until(link, Disconnected).reason
        assert not link.connected
        links.close()


def test_a_poisoned_callback_does_not_end_the_thread(links, monkeypatch):
    two = links.make("two")
    honest = two._on_message

    def poisoned(client, epoch, message):
        if message.payload == b"poison":
            raise RuntimeError("poison")
        honest(client, epoch, message)

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


def test_a_refused_subscription_is_logged(caplog, protocol):
    logged = threading.Event()

    def serve(connection):
        asked = connection.recv(4096)  # 0x82, length, message id, topic …
        mid = asked[2:4]
        connection.sendall(
            b"\x90\x04" + mid + b"\0\x80" if broker.level == MQTT5 else b"\x90\x03" + mid + b"\x80"
        )
        logged.wait(WAIT_SECONDS)

    with FakeBroker(serve) as broker, caplog.at_level(logging.ERROR, "edge_runtime.link"):
        links = Links(broker, protocol)
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
def test_mutual_tls(needs_mosquitto, tmp_path, protocol):
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
            protocol=protocol,
        )

    try:
        link = links.connect("device", "t", broker=to(ours.path, device))
        link.publish(Outgoing("t", bytes(100_000), PLAIN))
        assert len(until(link, Received).payload) == 100_000
        link.stop(WAIT_SECONDS)  # says goodbye through TLS, too
        assert "Client device disconnected." in broker.log
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
        ({"protocol": "3.1"}, r"no protocol '3\.1': use one of auto, 5, 3\.1\.1"),
    ],
)
def test_what_cannot_be_used_is_found_when_the_link_is_made(fields, problem):
    with pytest.raises(LinkError, match=problem):
        Link(Broker(host="127.0.0.1", **fields), client_id="x", delay=lambda _: 0.0)


def test_tls_files_are_read_for_every_connection(needs_mosquitto, tmp_path, protocol):
    """A link that may wait for them, whose key comes late and whose certificate is renewed later."""
    authority = Authority(tmp_path / "authority")
    server, first, second = (authority.issue(name) for name in ("broker", "first", "second"))
    broker = broker_with(
        tmp_path,
        f"cafile {authority.path}\ncertfile {server.certificate}\nkeyfile {server.key}\n"
        "require_certificate true\nuse_identity_as_username true",
    )
    broker.start()
    links = Links(broker)
    certificate, key = tmp_path / "link.crt", tmp_path / "link.key"

    def enrol(pair):
        shutil.copy(pair.certificate, certificate)
        shutil.copy(pair.key, key)

    secured = Broker(
        host=broker.host,
        port=broker.port,
        protocol=protocol,
        ca=authority.path,
        certificate=str(certificate),
        key=str(key),
    )
    try:
        link = links.make("x", broker=secured, needs_tls_files=False)
        link.start()
        assert "cannot use the TLS files" in until(link, Disconnected).reason
        with pytest.raises(LinkError, match="not connected"):
            link.publish(Outgoing("t", b"x", PLAIN))
        enrol(first)
        until(link, Connected)
        assert "u'first'" in broker.log
        enrol(second)
        broker.kill()
        broker.start()
        until(link, Connected)
        assert "u'second'" in broker.log
    finally:
        links.close()
        broker.close()


def test_a_password_is_not_shown():
    assert "geheim" not in repr(Broker(host="h", username="u", password="geheim"))
