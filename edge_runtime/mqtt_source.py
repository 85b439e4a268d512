"""Rows in from one topic of a local broker, answers out on another.

A message carries one request line, see `edge_runtime.adapters.sources.ndjson`; its answer carries the same ``id``. A
row that came with QoS 1 is acknowledged once its answer is handed to the connection, and comes again after a lost
connection otherwise: answered at least once.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from edge_runtime.adapters.sources.ndjson import MAX_LINE_BYTES, Answerer, Refusal, encode, respond
from edge_runtime.contract.errors import BudgetExceeded, ConfigError, LinkError
from edge_runtime.contract.topics import Delivery
from edge_runtime.link import Connected, Delivered, Disconnected, Link, LinkEvent, Outgoing, Received
from edge_runtime.mqtt.broker import Broker

INBOX_ROWS: Final = 64
MAX_UNCONFIRMED: Final = 256
"""Answers that the broker has not acknowledged; beyond that rows wait."""
MAX_HELD: Final = 1024
"""Rows that wait meanwhile. More are left to the broker, which sends them again after a reconnect if it has them."""
MAX_TOPIC_BYTES: Final = 65535
TICK_SECONDS: Final = 0.25
STOP_SECONDS: Final = 2.0
ANSWER: Final = Delivery(1, False)

log = logging.getLogger(__name__)


class MqttSource:
    """A connection of its own to ``broker``, with a persistent session under ``client_id``, unique on that broker.

    While rows are answered more slowly than they come, they wait in an inbox of 64, then in the broker.

    Args:
        broker: where; its user must be allowed to read ``topic_in`` and write ``topic_out``.
        client_id: the session's name; the same at every start.
        topic_in: a topic filter to subscribe to with QoS 1.
        topic_out: the topic of the answers, QoS 1, not retained; empty: nobody is told.
        delay: seconds before an attempt to connect, from the number of failed ones before.
        max_line_bytes: the longest request.

    Raises:
        ConfigError: a topic is no topic, or answers would come back as rows.
        LinkError: a certificate cannot be read.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        client_id: str,
        topic_in: str,
        topic_out: str,
        delay: Callable[[int], float],
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        check_topics(topic_in, topic_out)
        self._topic_in = topic_in
        self._topic_out = topic_out
        self._max_line_bytes = max_line_bytes
        self._link = Link(
            broker,
            client_id=client_id,
            delay=delay,
            clean_session=False,
            inbox_size=INBOX_ROWS,
            manual_ack=True,
        )
        self._unconfirmed: set[int] = set()
        self._held: deque[tuple[Received, int]] = deque()

    def serve(self, answer: Answerer, stop: threading.Event) -> None:
        """Answers until ``stop`` is set, through any number of lost connections."""
        self._link.subscribe(self._topic_in)
        self._link.start()
        try:
            while not stop.is_set():
                if self._held and len(self._unconfirmed) < MAX_UNCONFIRMED:
                    self._answer(*self._held.popleft(), answer)
                    self._gather()
                elif (event := self._link.poll(TICK_SECONDS)) is not None:
                    self._take(event)
                    self._gather()
        finally:
            self._link.stop(STOP_SECONDS)

    def _gather(self) -> None:
        """Everything that has come meanwhile, so that its waiting is seen; it stays with the link when that is much."""
        while len(self._held) < INBOX_ROWS and (event := self._link.poll(0.0)) is not None:
            self._take(event)

    def _take(self, event: LinkEvent) -> None:
        match event:
            case Received():
                if len(self._held) < MAX_HELD:
                    self._held.append((event, time.perf_counter_ns()))
                else:
                    log.warning("row_left_with_broker topic=%s", event.topic)
            case Delivered():
                self._unconfirmed.discard(event.token)
                if event.refusal:
                    log.warning("answer_refused topic=%s reason=%s", self._topic_out, event.refusal)
            case Connected():
                log.info("rows_connected topic=%s", self._topic_in)
            case Disconnected():
                # Rows of QoS 1 come again, and answers to them are what is lost.
                log.info("rows_disconnected reason=%s", event.reason)
                self._unconfirmed.clear()
                self._held.clear()

    def _answer(self, received: Received, arrived_ns: int, answer: Answerer) -> None:
        if received.retained:
            refused = Refusal(
                "request", f"a retained message on {received.topic} is no row: it comes at every start"
            )
            reply = encode(None, answer(refused))
        else:
            reply = respond(
                received.payload, answer, arrived_ns=arrived_ns, max_line_bytes=self._max_line_bytes
            )
        try:
            if reply and self._topic_out:
                self._unconfirmed.add(self._hand_over(reply))
        except LinkError as e:
            log.warning("answer_lost topic=%s reason=%s", self._topic_out, e)
            if not self._link.connected:
                return  # the row comes again
        self._link.acknowledge(received)

    def _hand_over(self, reply: bytes) -> int:
        try:
            return self._link.publish(Outgoing(self._topic_out, reply.rstrip(b"\n"), ANSWER))
        except BudgetExceeded as e:
            log.warning("answer_too_long topic=%s reason=%s", self._topic_out, e)
            short = encode(
                json.loads(reply)["id"], Refusal("too_long", f"the answer is too long for a message: {e}")
            )
            return self._link.publish(Outgoing(self._topic_out, short.rstrip(b"\n"), ANSWER))


def check_topics(topic_in: str, topic_out: str) -> None:
    """Raises `ConfigError` when one is no topic, or when what goes out would come back in."""
    for key, topic in (("topic_in", topic_in or "\0"), ("topic_out", topic_out)):
        if "\0" in topic or len(topic.encode(errors="replace")) > MAX_TOPIC_BYTES:
            raise ConfigError(
                f"source.{key}: no MQTT topic; 1 to {MAX_TOPIC_BYTES} bytes without a NUL are, such as sensors/rows"
            )
    if "+" in topic_out or "#" in topic_out:
        raise ConfigError(f"source.topic_out: {topic_out!r} has a wildcard; answers go to one topic")
    levels = topic_in.split("/")
    if any(len(level) > 1 and ("+" in level or "#" in level) for level in levels) or "#" in levels[:-1]:
        raise ConfigError(f"source.topic_in: {topic_in!r}: + stands for one whole level, # for the last ones")
    if topic_out and _matches(levels, topic_out.split("/")):
        raise ConfigError(
            f"source.topic_out: answers on {topic_out!r} would come back as rows on {topic_in!r}"
        )


def _matches(levels: list[str], topic: list[str]) -> bool:
    """Whether a topic falls under a filter (MQTT 3.1.1, section 4.7)."""
    if levels[-1] == "#":
        levels = levels[:-1]
        topic = topic[: len(levels)]
    return len(levels) == len(topic) and all(a in {"+", b} for a, b in zip(levels, topic, strict=True))
