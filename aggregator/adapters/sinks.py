"""Who is told of alarms: a webhook and a command, each in a thread of its own, and the fleet's broker."""

import http.client
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from aggregator.adapters.hooks import Hook
from aggregator.config import AlarmsConfig
from aggregator.records import Telling, Told

POLL_SECONDS: Final = 0.05
REFUSED: Final = frozenset({400, 413, 415, 422})
"""Answers about the very text (RFC 9110). All others may be another next time: an address or a token is put right."""
TOKEN: Final = "SKIFF_ALARM_TOKEN"  # noqa: S105 (the variable's name)
OUTPUT_TAIL: Final = 500

Deliver = Callable[[Telling, threading.Event], None]
Answer = Callable[[str], object]

log = logging.getLogger(__name__)


class Failed(Exception):
    """A delivery failed; ``final`` when another attempt would fail likewise."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class Worker:
    """A sink with a thread that makes the attempts. ``deliver`` is given an event that is set when it must give up.

    It raises `Failed`.
    """

    def __init__(self, name: str, deliver: Deliver) -> None:
        self._name = name
        self._deliver = deliver
        self._asked: queue.SimpleQueue[Telling | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, telling: Telling) -> None:
        """Begins an attempt; never waits."""
        self._asked.put(telling)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"alarms-{self._name}", daemon=True)
            self._thread.start()

    def poll(self) -> Told | None:
        """How the attempt ended, as soon as it did."""
        with suppress(queue.Empty):
            return self._answers.get_nowait()
        return None

    def close(self, timeout: float) -> None:
        """Ends the thread; an attempt that takes longer than ``timeout`` seconds is left to itself."""
        self._stop.set()
        self._asked.put(None)
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while (telling := self._asked.get()) is not None:
            try:
                self._deliver(telling, self._stop)
            except Failed as e:
                told = Told(telling.number, str(e) or "failed", e.final)
            except Exception as e:  # an attempt that never ends would hold up the sink for ever
                log.exception("alarm_attempt_broken sink=%s", self._name)
                told = Told(telling.number, f"{type(e).__name__}: {e}")
            else:
                told = Told(telling.number)
            self._answers.put(told)


class _NoRedirect(HTTPRedirectHandler):
    """A redirected POST would become a GET: the configured address has to be the right one."""

    def redirect_request(self, *_: object, **__: object) -> None:
        """Follows nothing."""


class Webhook:
    """POSTs an event as JSON. A status of `REFUSED` is an answer to this very event; no other, nor none, is."""

    def __init__(self, url: str, *, timeout_seconds: float, token: str = "") -> None:
        self._url = url
        self._timeout = timeout_seconds
        self._headers = {"Content-Type": "application/json", "User-Agent": "skiff"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = build_opener(_NoRedirect())

    def __call__(self, telling: Telling, stop: threading.Event) -> None:
        """Delivers; raises `Failed`."""
        del stop
        key = {"Idempotency-Key": str(json.loads(telling.text)["id"])}
        request = Request(self._url, telling.text.encode(), self._headers | key, method="POST")  # noqa: S310 (http, https)
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                answer.read(1)
        except HTTPError as e:
            with e:
                raise Failed(f"status {e.code}", final=e.code in REFUSED) from e
        except (URLError, OSError, http.client.HTTPException) as e:
            raise Failed(str(getattr(e, "reason", e)) or type(e).__name__) from e


class Command:
    """Runs a command, with the path of the event's JSON file in place of ``{alarm}``."""

    def __init__(self, command: tuple[str, ...], folder: Path, *, timeout_seconds: float) -> None:
        self._hook = Hook(command, folder, timeout_seconds=timeout_seconds, what="alarm")

    def __call__(self, telling: Telling, stop: threading.Event) -> None:
        """Delivers; raises `Failed`."""
        try:
            result = self._hook.start(telling.incident, telling.text)
        except OSError as e:
            raise Failed(f"{e.filename}: {e.strerror}") from e
        if result is None:
            while (result := self._hook.poll()) is None and not stop.wait(POLL_SECONDS):
                pass
            result = result or self._hook.stop()
        if result is not None and result.exit_code:
            raise Failed(f"exit code {result.exit_code}: {result.output[-OUTPUT_TAIL:].strip()}")


class Announcement:
    """The fleet's alarm topic: ``announce`` publishes as soon as it can and calls what it is given with the end of it.

    ``withdraw`` takes back what was not answered in ``timeout_seconds``.
    """

    def __init__(
        self,
        announce: Callable[[bytes, Answer], object],
        withdraw: Callable[[], object],
        *,
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._announce = announce
        self._withdraw = withdraw
        self._timeout = timeout_seconds
        self._clock = clock
        self._number = 0
        self._deadline = 0.0
        self._told: Told | None = None

    def begin(self, telling: Telling) -> None:
        """Begins an attempt."""
        self._number, self._told = telling.number, None
        self._deadline = self._clock() + self._timeout
        self._announce(telling.text.encode(), self._answered)

    def poll(self) -> Told | None:
        """How the attempt ended, as soon as it did or its time is over."""
        if self._number and self._told is None and self._clock() >= self._deadline:
            self._withdraw()
            self._answered(f"no answer from the broker in {self._timeout:g} s")
        told, self._told = self._told, None
        return told

    def close(self, timeout: float) -> None:
        """Takes back what is under way."""
        del timeout
        self._withdraw()
        self._number = 0

    def _answered(self, reason: str) -> None:
        self._told, self._number = Told(self._number, reason), 0


def sinks(
    config: AlarmsConfig,
    folder: Path,
    announce: Callable[[bytes, Answer], object],
    withdraw: Callable[[], object],
) -> dict[str, Worker | Announcement]:
    """Those that ``config`` names; a command's files go to ``folder``."""
    made: dict[str, Worker | Announcement] = {}
    if config.mqtt:
        made["mqtt"] = Announcement(announce, withdraw, timeout_seconds=config.timeout_seconds)
    if config.webhook:
        token = os.environ.get(TOKEN, "")
        webhook = Webhook(config.webhook, timeout_seconds=config.timeout_seconds, token=token)
        made["webhook"] = Worker("webhook", webhook)
    if config.command:
        command = Command(config.command, folder, timeout_seconds=config.timeout_seconds)
        made["command"] = Worker("command", command)
    return made
