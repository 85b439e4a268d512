"""Rows over a local broker: a real Mosquitto, also one that goes away and comes back."""

import json
import threading
import time

import numpy as np
import pytest

from edge_runtime import mqtt_source
from edge_runtime.adapters.sources.ndjson import Answer, Refusal
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.topics import Delivery
from edge_runtime.link import Connected, Delivered, Link, Outgoing, Received
from edge_runtime.mqtt.broker import Broker
from edge_runtime.mqtt_source import INBOX_ROWS, MqttSource, check_topics

WAIT_SECONDS = 20.0
ROWS, ANSWERS = "press/rows", "press/answers"


class Served:
    """A source in a thread that answers each row with its first value."""

    def __init__(self, broker, **options):
        self.stop = threading.Event()
        self.asked: list[float] = []
        self.refused: list[str] = []
        self.arrivals: list[int] = []
        self.unconfirmed: list[int] = []
        self.hold = threading.Event()
        self.hold.set()
        self.source = MqttSource(
            broker,
            client_id="device-rows",
            topic_in=ROWS,
            topic_out=options.pop("topic_out", ANSWERS),
            delay=lambda _: 0.02,
            **options,
        )
        self.connected = threading.Event()
        take = self.source._take

        def watched(event):
            take(event)
            if isinstance(event, Connected):
                self.connected.set()

        self.source._take = watched  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self.source.serve, args=(self.answer, self.stop))
        self.thread.start()

    def answer(self, asked):
        assert self.hold.wait(WAIT_SECONDS)
        if isinstance(asked, Refusal):
            self.refused.append(asked.reason)
            return asked
        self.asked.append(asked.rows[0])
        self.arrivals.append(asked.arrived_ns)
        self.unconfirmed.append(len(self.source._unconfirmed))
        wide = 60_000 if asked.id == "wide" else 1
        return Answer(None, np.full(wide, asked.rows[0] / 3, np.float32), "m")

    def close(self):
        self.hold.set()
        self.stop.set()
        self.thread.join(WAIT_SECONDS)
        assert not self.thread.is_alive()


class Application:
    """Publishes rows and reads the answers."""

    def __init__(self, broker, client_id="application"):
        self.link = Link(broker, client_id=client_id, delay=lambda _: 0.02, clean_session=False)
        self.link.subscribe(ANSWERS)
        self.answers: list[dict[str, object]] = []
        self.confirmed: set[int] = set()
        self.link.start()
        self.until(lambda event: isinstance(event, Connected))
        self.send(b"", topic="settled")  # the broker has worked through the subscription

    def until(self, wanted):
        deadline = time.monotonic() + WAIT_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            event = self.link.poll(left)
            if isinstance(event, Received):
                self.answers.append(json.loads(event.payload))
            if isinstance(event, Delivered):
                self.confirmed.add(event.token)
            if event is not None and wanted(event):
                return
        raise AssertionError(f"nothing came within {WAIT_SECONDS} s; answers so far: {self.answers[-3:]}")

    def send(self, payload, *, qos=1, retain=False, topic=ROWS):
        token = self.link.publish(Outgoing(topic, payload, Delivery(qos, retain)))
        if token not in self.confirmed:
            self.until(lambda event: event == Delivered(token))

    def read(self, n):
        """The next ``n`` answers."""
        if len(self.answers) < n:
            self.until(lambda _: len(self.answers) >= n)
        found, self.answers = self.answers[:n], self.answers[n:]
        return found


@pytest.fixture
def broker(mosquitto):
    return Broker(host=mosquitto.host, port=mosquitto.port, keepalive_seconds=10)


@pytest.fixture
def serve(broker):
    made = []

    def start(**options):
        served = Served(broker, **options)
        made.append(served)
        assert served.connected.wait(WAIT_SECONDS)
        return served

    yield start
    for served in made:
        served.close()


@pytest.fixture
def application(broker):
    made = Application(broker)
    yield made
    made.link.stop(WAIT_SECONDS)


def settled(application, served):
    """The source's subscription is in force, and no answer is under way."""
    deadline = time.monotonic() + WAIT_SECONDS
    sent = 0
    while not served.asked and time.monotonic() < deadline:
        sent += 1
        application.send(b'{"row": [0], "id": "settle %d"}' % sent)
        threading.Event().wait(0.02)
    read_until(application, f"settle {sent}")
    served.asked.clear()


def read_until(application, id_):
    """The answer with this id; those before it are passed over."""
    while True:
        [found] = application.read(1)
        if found["id"] == id_:
            return found


def test_each_message_is_answered_with_its_id(serve, application):
    served = serve()
    settled(application, served)
    for i in range(30):
        application.send(b'{"row": [%d], "id": %d}' % (3 * i, i), qos=i % 2)
    found = application.read(30)
    assert [answer["id"] for answer in found] == list(range(30))
    assert [answer["score"] for answer in found] == [[float(i)] for i in range(30)]
    assert all(arrived > 0 for arrived in served.arrivals)


def test_bad_messages_are_answered_too(serve, application):
    served = serve(max_line_bytes=100)
    settled(application, served)
    application.send(b"\xff\x00")
    application.send(b"")
    application.send(b"[" + b" " * 200 + b"1]")
    application.send(b'{"row": [1], "id": "wide"}')
    application.send(b'{"row": [3], "id": "good"}')
    found = application.read(4)
    assert [answer.get("error", {"reason": ""})["reason"] for answer in found] == [
        "json",
        "too_long",
        "too_long",
        "",
    ]
    assert [answer["id"] for answer in found] == [None, None, "wide", "good"]


def test_a_retained_row_is_refused(serve, application):
    application.send(b"[5]", retain=True)
    served = serve()
    [found] = application.read(1)
    assert found["error"]["reason"] == "request"
    assert "retained" in found["error"]["message"]
    assert served.asked == []


def test_nobody_needs_to_be_told(serve, application):
    served = serve(topic_out="")
    deadline = time.monotonic() + WAIT_SECONDS
    while not served.asked and time.monotonic() < deadline:
        application.send(b"[7]")
        threading.Event().wait(0.01)
    assert set(served.asked) == {7}


def test_rows_wait_in_the_broker_while_the_model_is_slow(serve, application):
    served = serve()
    settled(application, served)
    served.hold.clear()
    for i in range(500):
        application.send(b'{"row": [%d], "id": %d}' % (i, i), qos=1)
    waiting = served.source._link._inbox._messages + len(served.source._held)
    assert waiting <= 2 * INBOX_ROWS
    served.hold.set()
    assert [answer["id"] for answer in application.read(500)] == list(range(500))
    assert served.asked == list(range(500))


def test_few_answers_are_under_way_at_once(monkeypatch, serve, application):
    monkeypatch.setattr(mqtt_source, "MAX_UNCONFIRMED", 3)
    served = serve()
    settled(application, served)
    for i in range(50):
        application.send(b'{"row": [%d], "id": %d}' % (i, i))
    assert [answer["id"] for answer in application.read(50)] == list(range(50))
    assert max(served.unconfirmed) < 3


def test_rows_for_which_there_is_no_room_are_left_to_the_broker(monkeypatch, serve, application, caplog):
    served = serve()
    settled(application, served)
    monkeypatch.setattr(mqtt_source, "MAX_HELD", 5)
    monkeypatch.setattr(mqtt_source, "MAX_UNCONFIRMED", 0)
    for i in range(8):
        application.send(b'{"row": [%d], "id": %d}' % (i, i))
    deadline = time.monotonic() + WAIT_SECONDS
    while caplog.text.count("row_left_with_broker") < 3 and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert len(served.source._held) == 5
    monkeypatch.setattr(mqtt_source, "MAX_UNCONFIRMED", 256)
    assert [answer["id"] for answer in application.read(5)] == list(range(5))


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_broker_that_goes_away_and_comes_back(serve, application, mosquitto, end):
    served = serve()
    settled(application, served)
    for round_ in range(2):
        served.connected.clear()
        mosquitto.save()
        getattr(mosquitto, end)()
        mosquitto.start()
        application.until(lambda event: isinstance(event, Connected))
        assert served.connected.wait(WAIT_SECONDS)
        application.send(b'{"row": [3], "id": "back %d"}' % round_)
        assert read_until(application, f"back {round_}")["score"] == [1.0]


def test_a_row_without_an_answer_comes_again(serve, application, mosquitto):
    """The broker goes while a row is being answered: the answer cannot be handed over, so the row comes again."""
    served = serve()
    settled(application, served)
    served.hold.clear()
    served.connected.clear()
    application.send(b'{"row": [3], "id": "again"}')
    mosquitto.stop()  # it writes the session and what is in flight
    deadline = time.monotonic() + WAIT_SECONDS
    while served.source._link.connected and time.monotonic() < deadline:
        served.connected.wait(0.01)
    served.hold.set()
    mosquitto.start()
    application.until(lambda event: isinstance(event, Connected))
    [found] = application.read(1)
    assert found["id"] == "again"
    assert served.asked == [3, 3]


@pytest.mark.parametrize(
    ("topic_in", "topic_out", "problem"),
    [
        ("", "out", "topic_in: no MQTT topic"),
        ("a\0", "out", "topic_in: no MQTT topic"),
        ("x" * 65536, "out", "topic_in: no MQTT topic"),
        ("rows", "out\0", "topic_out: no MQTT topic"),
        ("rows", "out/+", "topic_out: 'out/\\+' has a wildcard"),
        ("rows", "#", "topic_out: '#' has a wildcard"),
        ("rows/x+", "out", r"\+ stands for one whole level"),
        ("rows/#/x", "out", "# for the last ones"),
        ("rows", "rows", "would come back as rows"),
        ("a/+/c", "a/b/c", "would come back as rows"),
        ("a/#", "a", "would come back as rows"),
        ("#", "out", "would come back as rows"),
    ],
)
def test_topics_that_cannot_work_are_refused(topic_in, topic_out, problem):
    with pytest.raises(ConfigError, match=problem):
        check_topics(topic_in, topic_out)


@pytest.mark.parametrize(
    ("topic_in", "topic_out"),
    [("a/+", "a/b/c"), ("a/+/rows", "a/b/answers"), ("a/#", "b"), ("a/b", "a"), ("a", ""), ("#", "")],
)
def test_topics_that_work_are_taken(topic_in, topic_out):
    check_topics(topic_in, topic_out)
