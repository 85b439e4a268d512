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

from aggregator.adapters import sinks as adapters
from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig, AlarmsConfig, BrokerConfig, DriftConfig
from aggregator.core.telling import document, tellings
from aggregator.looks import Alarm, AlarmEvent
from aggregator.records import Arrival
from aggregator.service import Service
from aggregator.teller import Teller
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


class Told:
    """A ledger's outbox and a teller that a thread of its own drives, as the leader's loop does."""

    def __init__(self, config, folder):
        self.config = config
        self.path = folder / "outbox.sqlite"
        self.ledger = Ledger(self.path)
        made = adapters.sinks(config, folder, lambda *_: None, lambda: None)
        self.noted: list[tuple[str, str]] = []
        self.teller = Teller(
            self.ledger,
            made,
            keep_seconds=config.keep_hours * 3600.0,
            delay=lambda failures: 0.001 * failures,
            note=lambda sink, end: self.noted.append((sink, end)),
        )

    def tell(self, *events):
        with self.ledger.transaction():
            self.ledger.put_tellings(tellings(FLEET, events, self.config.sinks))

    def until(self, condition, what):
        def stepped():
            self.teller.step(time.monotonic(), NOW)
            return condition()

        until(stepped, what)

    def until_it_is_over(self):
        self.until(lambda: not self.ledger.tellings(), "the outbox to be empty")

    def close(self):
        self.teller.close(WAIT_SECONDS, time.monotonic(), NOW)
        self.ledger.close()


@contextmanager
def telling(config, folder):
    made = Told(config, folder)
    try:
        yield made
    finally:
        made.close()


def test_the_event_is_as_the_contract_describes_it():
    properties = asyncapi.document()["components"]["schemas"]["Alarm"]["properties"]
    assert set(json.loads(document(FLEET, OPENED))) == set(properties)


def lines(caplog, word):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(word)]


# ── webhook ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_webhook_is_sent_every_event_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIFF_ALARM_TOKEN", "secret")
    with closing(Site()) as site, telling(AlarmsConfig(webhook=site.url), tmp_path) as told:
        told.tell(OPENED, replace(OPENED, what="escalated"))
        told.tell(CLOSED)
        told.until_it_is_over()
    path, headers, body = site.seen[0]
    assert path == "/alarms?team=a"
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Idempotency-Key"] == body["id"] == f"{FLEET}-7-opened-{NOW}"
    assert body == {
        "schema": 1,
        "id": f"{FLEET}-7-opened-{NOW}",
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
    answers = (503, 429, 401, 302, 404)
    with closing(Site(*answers)) as site, telling(AlarmsConfig(webhook=site.url), tmp_path) as told:
        told.tell(OPENED, CLOSED)
        told.until_it_is_over()
    assert [sent["event"] for _, _, sent in site.seen] == ["opened"] * 6 + ["closed"]
    assert lines(caplog, "alarm_sink_failing") == [
        "alarm_sink_failing sink=webhook reason='status 503': it is tried again"
    ]
    assert lines(caplog, "alarm_sink_works") == ["alarm_sink_works sink=webhook"]
    assert told.noted == [("webhook", "failed")] * 5 + [("webhook", "told")] * 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_an_event_that_a_webhook_refuses_for_what_it_says_is_given_up_alone(tmp_path, caplog, status):
    with closing(Site(status)) as site, telling(AlarmsConfig(webhook=site.url), tmp_path) as told:
        told.tell(OPENED, CLOSED)
        told.until_it_is_over()
        assert [sent["event"] for _, _, sent in site.seen] == ["opened", "closed"]
    (line,) = lines(caplog, "alarm_undelivered")
    assert f"sink=webhook incident=7 reason='status {status}'" in line


def test_a_webhook_that_is_not_there_is_named_and_given_up_when_the_event_is_old(tmp_path, caplog):
    site = Site()
    site.close()
    with telling(AlarmsConfig(webhook=site.url, keep_hours=1.0), tmp_path) as told:
        told.tell(replace(OPENED, at_ns=NOW - int(3601e9)))
        told.until_it_is_over()
    assert "refused" in lines(caplog, "alarm_undelivered")[0]


def test_a_webhook_that_hangs_holds_nobody_up(tmp_path, caplog):
    with closing(Site()) as site:
        site.hold.clear()
        with telling(AlarmsConfig(webhook=site.url, timeout_seconds=0.2), tmp_path) as told:
            told.tell(*(replace(OPENED, number=number) for number in range(20)))
            told.until(lambda: site.seen, "the first attempt")
            began = time.monotonic()
            for _ in range(20):
                told.teller.step(time.monotonic(), NOW)
            assert time.monotonic() - began < 0.2
            told.until(lambda: lines(caplog, "alarm_sink_failing"), "its trouble")
            site.hold.set()
            told.until_it_is_over()
    assert "timed out" in lines(caplog, "alarm_sink_failing")[0]


# ── command ────────────────────────────────────────────────────────────────────────────────────────────


def command(script):
    return AlarmsConfig(command=(sys.executable, "-c", script, "{alarm}"), timeout_seconds=20.0)


def test_a_command_is_given_the_event_in_a_file(tmp_path):
    copy = f"import sys, shutil; shutil.copy(sys.argv[1], {str(tmp_path / 'copied')!r})"
    with telling(command(copy), tmp_path / "alarms") as told:
        told.tell(CLOSED)
        told.until_it_is_over()
    assert json.loads((tmp_path / "copied").read_text()) == json.loads(document(FLEET, CLOSED))


def test_a_command_that_fails_is_tried_again_and_its_words_are_kept(tmp_path, caplog):
    once = tmp_path / "once"
    script = (
        f"import pathlib; p = pathlib.Path({str(once)!r})\n"
        "if not p.exists(): p.touch(); print('no pager'); raise SystemExit(3)"
    )
    with telling(command(script), tmp_path) as told:
        told.tell(OPENED)
        told.until_it_is_over()
    assert told.noted == [("command", "failed"), ("command", "told")]
    assert "exit code 3: no pager" in lines(caplog, "alarm_sink_failing")[0]


def test_the_end_of_the_aggregator_ends_a_command_and_the_event_waits(tmp_path):
    ready = tmp_path / "ready"
    script = f"import time; open({str(ready)!r}, 'w').close(); time.sleep(600)"
    with telling(command(script), tmp_path) as told:
        told.tell(OPENED)
        told.until(ready.exists, "the command's start")
        began = time.monotonic()
    assert time.monotonic() - began < WAIT_SECONDS / 2
    with closing(Ledger(told.path, read_only=True)) as ledger:
        assert [t.incident for t in ledger.tellings()] == [7]


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
        alarms=AlarmsConfig(mqtt=True, timeout_seconds=0.5),
    )
    may_connect = threading.Event()
    may_connect.set()

    def delay(self, attempt):
        may_connect.wait(WAIT_SECONDS)
        return 0.01

    monkeypatch.setattr(Service, "_delay", delay)
    service = Service(config)

    def tell(*events):
        with closing(Ledger(config.ledger_path)) as ledger, ledger.transaction():
            ledger.put_tellings(tellings(FLEET, events, ["mqtt"]))

    def waiting():
        with closing(Ledger(config.ledger_path, read_only=True)) as ledger:
            return len(ledger.tellings())

    with running(service):
        tell(OPENED)
        until(listener.hear, "the first event")
        may_connect.clear()
        mosquitto.kill()
        tell(*(replace(CLOSED, number=number) for number in range(20)))
        listener.wait_until_it_is_cut_off()
        mosquitto.start()
        listener.wait_until_it_hears()  # this broker remembers nobody
        may_connect.set()
        until(lambda: len(listener.hear()) >= 21, "the events since")
        until(lambda: not waiting(), "the outbox to be empty")
    first, *rest = listener.hear()
    assert first == (TOPICS.alarm(), False, json.loads(document(FLEET, OPENED)))
    assert {body["incident"] for _, _, body in rest if body["event"] == "closed"} == set(range(20))


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
