"""What becomes of incidents, told to a real HTTP server, a real command, and whoever listens at a real broker."""

import json
import logging
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.sinks import MAX_WAITING, Sinks, Worker, document
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig, AlarmsConfig, BrokerConfig, DriftConfig
from aggregator.looks import Alarm, AlarmEvent
from aggregator.records import Arrival
from aggregator.service import Service
from edge_runtime.contract.codec import encode
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.topics import ALARM as ALARM_DELIVERY
from edge_runtime.link import Connected, Disconnected, Link, Outgoing, Received
from edge_runtime.mqtt.broker import Broker
from tests.golden import asyncapi
from tests.support.fleet import FLEET, MODEL, NAMES, NOW, TOPICS, A, publish_artifact, tiny_count, window

WAIT_SECONDS = 30.0
ALARM = Alarm(
    kind="skew",
    feature="a",
    cohort="wrist=right",
    opened_window=3,
    closed_window=None,
    devices=(DeviceId("dev-1"), DeviceId("dev-2")),
    severity="page",
    why="a moved",
    evidence=(("p", 0.001), ("cell", "low")),
)
OPENED = AlarmEvent(what="opened", number=7, model=MODEL, digest=A, at_ns=NOW, alarm=ALARM, why="a moved")
CLOSED = replace(OPENED, what="closed", why="it is calm")


def until(condition, what):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        threading.Event().wait(0.005)


class Site:
    """An HTTP server that answers as it is told, and remembers what it was sent."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.hold = threading.Event()
        self.hold.set()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                site.seen.append((self.path, dict(self.headers), json.loads(body)))
                site.hold.wait(WAIT_SECONDS)
                status = site.answers.pop(0) if site.answers else 204
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/alarms?team=a"

    def close(self):
        self.hold.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@contextmanager
def sinks_of(config, folder, announce=lambda _: None):
    made = Sinks(config, FLEET, folder, announce, delay=lambda attempt: 0.001 * attempt)
    try:
        yield made
    finally:
        made.close(WAIT_SECONDS)


def test_the_event_is_as_the_contract_describes_it():
    properties = asyncapi.document()["components"]["schemas"]["Alarm"]["properties"]
    assert set(json.loads(document(FLEET, OPENED))) == set(properties)


def lines(caplog, word):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(word)]


# ── webhook ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_webhook_is_sent_every_event_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIFF_ALARM_TOKEN", "secret")
    with closing(Site()) as site, sinks_of(AlarmsConfig(webhook=site.url), tmp_path) as sinks:
        sinks.tell(OPENED)
        sinks.tell(replace(OPENED, what="escalated"))
        sinks.tell(CLOSED)
        until(lambda: len(site.seen) == 3, "three requests")
    path, headers, body = site.seen[0]
    assert path == "/alarms?team=a"
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Idempotency-Key"] == body["id"] == f"{FLEET}-7-opened"
    assert body == {
        "schema": 1,
        "id": f"{FLEET}-7-opened",
        "fleet": FLEET,
        "event": "opened",
        "incident": 7,
        "model": MODEL,
        "digest": A,
        "at_ns": NOW,
        "kind": "skew",
        "feature": "a",
        "cohort": "wrist=right",
        "opened_window": 3,
        "severity": "page",
        "devices": ["dev-1", "dev-2"],
        "why": "a moved",
        "evidence": {"p": 0.001, "cell": "low"},
    }
    assert [(sent["event"], sent["why"]) for _, _, sent in site.seen[1:]] == [
        ("escalated", "a moved"),
        ("closed", "it is calm"),
    ]


def test_a_webhook_that_fails_is_tried_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with closing(Site(503, 429)) as site, sinks_of(AlarmsConfig(webhook=site.url), tmp_path) as sinks:
        sinks.tell(OPENED)
        sinks.tell(CLOSED)
        until(lambda: len(lines(caplog, "alarm_told")) == 2, "both to be told")
    assert [sent["event"] for _, _, sent in site.seen] == ["opened", "opened", "opened", "closed"]
    assert len(lines(caplog, "alarm_retried")) == 2


@pytest.mark.parametrize(("status", "asked"), [(400, 1), (401, 1), (302, 1), (307, 1), (500, 3)])
def test_a_webhook_that_refuses_is_left_alone_and_one_that_is_ill_is_given_up(
    tmp_path, caplog, status, asked
):
    config = AlarmsConfig(attempts=3)
    with closing(Site(*[status] * asked)) as site:
        with sinks_of(replace(config, webhook=site.url), tmp_path) as sinks:
            sinks.tell(OPENED)
            until(lambda: lines(caplog, "alarm_undelivered"), "it to be given up")
        assert len(site.seen) == asked
    assert f"incident=7 reason='status {status}'" in lines(caplog, "alarm_undelivered")[0]


def test_a_webhook_that_is_not_there_is_named(tmp_path, caplog):
    site = Site()
    site.close()
    with sinks_of(AlarmsConfig(webhook=site.url, attempts=2), tmp_path) as sinks:
        sinks.tell(OPENED)
        until(lambda: lines(caplog, "alarm_undelivered"), "it to be given up")
    assert "refused" in lines(caplog, "alarm_undelivered")[0]


def test_a_webhook_that_hangs_holds_nobody_up(tmp_path, caplog):
    with closing(Site()) as site:
        site.hold.clear()
        with sinks_of(AlarmsConfig(webhook=site.url, timeout_seconds=0.2, attempts=1), tmp_path) as sinks:
            began = time.monotonic()
            for number in range(100):
                sinks.tell(replace(OPENED, number=number))
            assert time.monotonic() - began < 0.2
            until(lambda: lines(caplog, "alarm_undelivered"), "the first to be given up")
            site.hold.set()
            until(lambda: len(site.seen) >= 90, "the others")
    assert "timed out" in lines(caplog, "alarm_undelivered")[0]


def test_a_full_queue_forgets_the_newest_and_says_so(caplog):
    began, release = threading.Event(), threading.Event()

    def deliver(number, text, stop):
        began.set()
        release.wait(WAIT_SECONDS)

    worker = Worker("slow", deliver, attempts=1, delay=float)
    worker.put(0, "{}")
    assert began.wait(WAIT_SECONDS)
    for number in range(1, MAX_WAITING + 3):
        worker.put(number, "{}")
    assert [line.split()[2] for line in lines(caplog, "alarm_undelivered")] == [
        f"incident={MAX_WAITING + 1}",
        f"incident={MAX_WAITING + 2}",
    ]
    worker.close(0.01)
    release.set()
    assert len(lines(caplog, "alarm_undelivered")) == MAX_WAITING + 2  # what waited is named too


# ── command ────────────────────────────────────────────────────────────────────────────────────────────


def command(script):
    return AlarmsConfig(command=(sys.executable, "-c", script, "{alarm}"), timeout_seconds=20.0)


def test_a_command_is_given_the_event_in_a_file(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    copy = f"import sys, shutil; shutil.copy(sys.argv[1], {str(tmp_path / 'copied')!r})"
    with sinks_of(command(copy), tmp_path / "alarms") as sinks:
        sinks.tell(CLOSED)
        until(lambda: lines(caplog, "alarm_told"), "the command's end")
    assert json.loads((tmp_path / "copied").read_text()) == json.loads(document(FLEET, CLOSED))


def test_a_command_that_fails_is_tried_again_and_its_words_are_kept(tmp_path, caplog):
    with sinks_of(replace(command("print('no pager'); raise SystemExit(3)"), attempts=2), tmp_path) as sinks:
        sinks.tell(OPENED)
        until(lambda: lines(caplog, "alarm_undelivered"), "it to be given up")
    assert len(lines(caplog, "alarm_retried")) == 1
    assert "exit code 3: no pager" in lines(caplog, "alarm_undelivered")[0]


def test_the_end_of_the_aggregator_ends_a_command(tmp_path, caplog):
    ready = tmp_path / "ready"
    script = f"import time; open({str(ready)!r}, 'w').close(); time.sleep(600)"
    with sinks_of(command(script), tmp_path) as sinks:
        sinks.tell(OPENED)
        until(ready.exists, "the command's start")
        began = time.monotonic()
    assert time.monotonic() - began < WAIT_SECONDS / 2
    assert "exit code -15" in lines(caplog, "alarm_undelivered")[0]


# ── MQTT ───────────────────────────────────────────────────────────────────────────────────────────────


class Listener:
    """Whoever wants to know, at a broker."""

    def __init__(self, broker):
        self._link = Link(Broker(host=broker.host, port=broker.port), client_id="pager", delay=lambda _: 0.05)
        self._link.subscribe(TOPICS.alarm())
        self._link.start()
        self._connected = False
        self._heard: list[tuple[str, bool, Any]] = []

    def hear(self):
        """Everything so far, but for probes."""
        while (event := self._link.poll(0.0)) is not None:
            match event:
                case Received():
                    self._heard.append((event.topic, event.retained, json.loads(event.payload)))
                    self._link.acknowledge(event)
                case Connected():
                    self._connected = True
                case Disconnected():
                    self._connected = False
        return [heard for heard in self._heard if heard[2] != "probe"]

    def wait_until_it_hears(self):
        """Returns when what is published from now on is heard: what it says itself comes back."""
        before = len(self._heard)
        until(lambda: self.hear() is not None and self._connected, "the listener's connection")
        self._link.publish(Outgoing(TOPICS.alarm(), b'"probe"', ALARM_DELIVERY))
        until(lambda: self.hear() is not None and len(self._heard) > before, "the subscription")

    def wait_until_it_is_cut_off(self):
        until(lambda: self.hear() is not None and not self._connected, "the connection's end")

    def close(self):
        self._link.stop(2.0)


@pytest.fixture
def listener(mosquitto):
    made = Listener(mosquitto)
    made.wait_until_it_hears()
    yield made
    made.close()


@contextmanager
def running(service):
    stop = threading.Event()
    thread = threading.Thread(target=service.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def test_whoever_listens_at_the_broker_hears_it_also_after_the_broker_was_away(
    tmp_path, mosquitto, listener, monkeypatch
):
    config = AggregatorConfig(
        fleet=FLEET,
        state_dir=tmp_path / "state",
        registry=tmp_path / "registry",
        broker=BrokerConfig(host=mosquitto.host, port=mosquitto.port, keepalive_seconds=5),
        alarms=AlarmsConfig(mqtt=True),
    )
    may_connect = threading.Event()
    may_connect.set()

    def delay(self, attempt):
        may_connect.wait(WAIT_SECONDS)
        return 0.01

    monkeypatch.setattr(Service, "_delay", delay)
    service = Service(config)
    with running(service):
        service._sinks.tell(OPENED)
        until(listener.hear, "the first event")
        may_connect.clear()
        mosquitto.kill()
        for number in range(20):
            service._sinks.tell(replace(CLOSED, number=number))
        listener.wait_until_it_is_cut_off()
        mosquitto.start()
        listener.wait_until_it_hears()  # this broker remembers nobody
        may_connect.set()
        until(lambda: len(listener.hear()) >= 21, "the events since")
    first, *rest = listener.hear()
    assert first == (TOPICS.alarm(), False, json.loads(document(FLEET, OPENED)))
    assert list(dict.fromkeys(body["incident"] for _, _, body in rest)) == list(range(20))


# ── all of it ──────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_running_service_finds_is_told(tmp_path, mosquitto, listener):
    tiny, digest = publish_artifact(tmp_path / "registry")
    config = AggregatorConfig(
        fleet=FLEET,
        state_dir=tmp_path / "state",
        registry=tmp_path / "registry",
        broker=BrokerConfig(host=mosquitto.host, port=mosquitto.port, keepalive_seconds=5),
        drift=DriftConfig(horizon_rows=400, check_seconds=0.05),
    )

    def look(store, seq):
        """All devices at once: what is there is enough for a look."""
        arrivals = []
        for k in range(10):
            rows = np.random.default_rng([seq, k]).normal(2.0, 1.0, (400, len(NAMES))).astype(np.float32)
            w = window(f"dev-{k}", seq, model=digest, profile=tiny_count(tiny, rows))
            arrivals.append(Arrival(window=w, payload=encode(w), judged=True))
        store.append(arrivals, [], [], time.time_ns())

    def looks():
        with closing(Ledger(config.ledger_path, read_only=True)) as ledger:
            return len(ledger.table("looks"))

    with closing(Site()) as site:
        told = replace(config, alarms=AlarmsConfig(mqtt=True, webhook=site.url))
        with running(Service(told)), closing(Windows(told.windows_path)) as store:
            look(store, 1)
            until(lambda: looks() == 1, "the first look")
            assert site.seen == []
            look(store, 2)
            until(lambda: len(site.seen) >= len(NAMES), "the webhook")
            until(lambda: len(listener.hear()) >= len(NAMES), "the broker")
    heard = [body for _, _, body in listener.hear()]
    sent = [body for _, _, body in site.seen]
    assert sent == heard
    assert [(e["event"], e["kind"], e["feature"], e["incident"]) for e in sent] == [
        ("opened", "skew", name, number) for number, name in enumerate(NAMES, 1)
    ]
    assert set(sent[0]["devices"]) == {f"dev-{k}" for k in range(10)}
