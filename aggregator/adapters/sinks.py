"""Tells others what became of incidents: a webhook and a command, each in a thread of its own.

What could not be told is in the log and, like everything, in the ledger; a delivery may come twice, never out of order.
"""

import http.client
import json
import logging
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from aggregator.adapters.hooks import Hook
from aggregator.config import AlarmsConfig
from aggregator.looks import AlarmEvent
from edge_runtime.contract.ids import FleetId

SCHEMA: Final = 1
MAX_WAITING: Final = 1000
"""Events that wait for one sink; what comes beyond is not told."""
POLL_SECONDS: Final = 0.05
AGAIN: Final = frozenset({408, 425, 429})
"""Answers of a client's fault that may be another next time (RFC 9110, RFC 6585, RFC 8470)."""
TOKEN: Final = "SKIFF_ALARM_TOKEN"  # noqa: S105 (the variable's name)
OUTPUT_TAIL: Final = 500

log = logging.getLogger(__name__)


class Failed(Exception):
    """A delivery failed; ``final`` when another attempt would fail likewise."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


def document(fleet: FleetId, e: AlarmEvent) -> str:
    """The event as JSON text, the same for every sink. ``id`` is the same when it is told again."""
    alarm = {k: v for k, v in asdict(e.alarm).items() if k not in ("why", "evidence", "closed_window")}
    return json.dumps(
        {
            "schema": SCHEMA,
            "id": f"{fleet}-{e.number}-{e.what}",
            "fleet": fleet,
            "event": e.what,
            "incident": e.number,
            "model": e.model,
            "digest": e.digest,
            "at_ns": e.at_ns,
            "why": e.why,
            **alarm,
            "evidence": dict(e.alarm.evidence),
        },
        sort_keys=True,
    )


class Worker:
    """One sink: a bounded queue and a thread that delivers from it, in order, again and again where it fails.

    ``deliver`` is given the incident's number, the text and an event that is set when it must give up. It raises
    `Failed`.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[int, str, threading.Event], None],
        *,
        attempts: int,
        delay: Callable[[int], float],
    ) -> None:
        self._name = name
        self._deliver = deliver
        self._attempts = attempts
        self._delay = delay
        self._waiting: queue.Queue[tuple[int, str]] = queue.Queue(MAX_WAITING)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def put(self, number: int, text: str) -> None:
        """Takes an event over; never waits."""
        if self._waiting.full():
            self._lost(number, f"{MAX_WAITING} wait before it")
            return
        self._waiting.put_nowait((number, text))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"alarms-{self._name}", daemon=True)
            self._thread.start()

    def close(self, timeout: float) -> None:
        """Gives up after at most ``timeout`` seconds what is not delivered."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout)
        while not self._waiting.empty():
            number, _ = self._waiting.get_nowait()
            self._lost(number, "the aggregator ended")

    def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(queue.Empty):
                self._tell(*self._waiting.get(timeout=POLL_SECONDS))

    def _tell(self, number: int, text: str) -> None:
        for attempt in range(self._attempts):
            try:
                self._deliver(number, text, self._stop)
            except Failed as e:
                if e.final or attempt + 1 == self._attempts or self._stop.wait(self._delay(attempt)):
                    self._lost(number, str(e))
                    return
                log.warning("alarm_retried sink=%s incident=%d reason=%r", self._name, number, str(e))
            else:
                log.info("alarm_told sink=%s incident=%d", self._name, number)
                return

    def _lost(self, number: int, reason: str) -> None:
        log.error("alarm_undelivered sink=%s incident=%d reason=%r", self._name, number, reason)


class _NoRedirect(HTTPRedirectHandler):
    """A redirected POST would become a GET: the configured address has to be the right one."""

    def redirect_request(self, *_: object, **__: object) -> None:
        """Follows nothing."""


class Webhook:
    """POSTs an event as JSON. A status of 5xx, or none at all, is tried again; of 3xx and 4xx few are."""

    def __init__(self, url: str, *, timeout_seconds: float, token: str = "") -> None:
        self._url = url
        self._timeout = timeout_seconds
        self._headers = {"Content-Type": "application/json", "User-Agent": "skiff"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = build_opener(_NoRedirect())

    def __call__(self, number: int, text: str, stop: threading.Event) -> None:
        """Delivers; raises `Failed`."""
        del number, stop
        key = {"Idempotency-Key": str(json.loads(text)["id"])}
        request = Request(self._url, text.encode(), self._headers | key, method="POST")  # noqa: S310 (http, https)
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                answer.read(1)
        except HTTPError as e:
            with e:
                raise Failed(f"status {e.code}", final=e.code < 500 and e.code not in AGAIN) from e
        except (URLError, OSError, http.client.HTTPException) as e:
            raise Failed(str(getattr(e, "reason", e)) or type(e).__name__) from e


class Command:
    """Runs a command, with the path of the event's JSON file in place of ``{alarm}``."""

    def __init__(self, command: tuple[str, ...], folder: Path, *, timeout_seconds: float) -> None:
        self._hook = Hook(command, folder, timeout_seconds=timeout_seconds, what="alarm")

    def __call__(self, number: int, text: str, stop: threading.Event) -> None:
        """Delivers; raises `Failed`."""
        try:
            result = self._hook.start(number, text)
        except OSError as e:
            raise Failed(f"{e.filename}: {e.strerror}") from e
        if result is None:
            while (result := self._hook.poll()) is None and not stop.wait(POLL_SECONDS):
                pass
            result = result or self._hook.stop()
        if result is not None and result.exit_code:
            raise Failed(f"exit code {result.exit_code}: {result.output[-OUTPUT_TAIL:].strip()}")


class Sinks:
    """All sinks but the log.

    ``announce`` is given each event's text when it goes over MQTT too; ``delay`` says how many seconds to wait after a
    failed attempt, counted from 0.
    """

    def __init__(
        self,
        config: AlarmsConfig,
        fleet: FleetId,
        folder: Path,
        announce: Callable[[bytes], None],
        *,
        delay: Callable[[int], float],
    ) -> None:
        self._fleet = fleet
        self._announce = announce if config.mqtt else None
        made: dict[str, Callable[[int, str, threading.Event], None]] = {}
        if config.webhook:
            made["webhook"] = Webhook(
                config.webhook, timeout_seconds=config.timeout_seconds, token=os.environ.get(TOKEN, "")
            )
        if config.command:
            made["command"] = Command(config.command, folder, timeout_seconds=config.timeout_seconds)
        self._workers = [
            Worker(name, deliver, attempts=config.attempts, delay=delay) for name, deliver in made.items()
        ]

    def tell(self, e: AlarmEvent) -> None:
        """Takes an event over; never waits and never fails."""
        text = document(self._fleet, e)
        if self._announce is not None:
            self._announce(text.encode())
        for worker in self._workers:
            worker.put(e.number, text)

    def close(self, timeout: float) -> None:
        """Ends the threads."""
        for worker in self._workers:
            worker.close(timeout)
