"""Metadata and models from a copy of the publisher's repository, as any web server or bucket serves it.

Below the address lie its ``metadata/`` and ``targets/``. A model that was begun is gone on with by a range request
(RFC 9110, section 14); what is content-addressed needs neither ``ETag`` nor ``If-Range``. The server is trusted with
nothing: what it sends is cut off at the signed length, and every wait ends. Redirects are not followed.

Only the update child imports this: `http.client` weighs a megabyte.
"""

import http.client
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

from edge_runtime.adapters import disk
from edge_runtime.carriers import MAX_CARRIED_WORDS
from edge_runtime.contract.codec import MAX_MESSAGE_BYTES
from edge_runtime.contract.errors import LinkError
from edge_runtime.contract.trust import METADATA_FOLDER, TARGETS_FOLDER, Target
from edge_runtime.core.backoff import next_delay_seconds

STALL_SECONDS: Final = 15.0
"""Without a byte; also for the socket, and for the TLS handshake as a whole."""
ATTEMPTS: Final = 5
"""In a row that bring nothing; after that the way counts as closed."""
RETRY_CAP_SECONDS: Final = 15.0
MAX_METADATA_BYTES: Final = MAX_MESSAGE_BYTES
MAX_TIMES_OVER: Final = 4
"""A model's length that is taken in all, where a server starts from the beginning again and again."""
_READ_BYTES: Final = 64 << 10
_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_ABSENT: Final = (403, 404, 410)
"""A bucket whose listing is private says 403 of what is not there, which python-tuf takes for 404 too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Web:
    """Where the repository is, see `contract.trust.repository_url`, and the PEM files to use.

    ``ca`` is the authority that signed the server's certificate, "" for those that the system trusts.
    """

    url: str
    ca: str = ""
    certificate: str = ""
    key: str = ""


class _Interrupted(LinkError):
    """The connection broke, or the server is not well: worth another try."""


class HttpsCarrier:
    """A connection to the server at ``web``, made when it is needed first. A context manager that ends it.

    ``sleep`` waits between two attempts, for so many seconds.
    """

    name = "HTTPS"

    def __init__(self, web: Web, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._web = web
        self._parts = urlsplit(web.url)
        self._base = self._parts.path.rstrip("/")
        self._rng = random.Random()  # noqa: S311 (jitter, no secret)
        self._sleep = sleep
        self._wire: http.client.HTTPConnection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    # ── what a carrier does ────────────────────────────────────────────────────────────────────────────

    def metadata(self, root_version: int, until: float) -> Callable[[str], bytes | None]:  # noqa: ARG002 (names say it)
        """Each file when it is asked for; then `LinkError` is raised when the server does not give it."""
        return lambda name: self._file(f"{METADATA_FOLDER}/{name}", until)

    def problem(self, target: Target) -> str:
        """Whether there is anything to fetch."""
        return "" if target.length > 0 else "it is empty"

    def blob(self, target: Target, into: Path, until: float) -> None:
        """In one stream, or in as many as it takes; raises `LinkError`."""
        path = f"{TARGETS_FOLDER}/{target.path}"
        if _size(into) > target.length:
            disk.cut(into, 0)
        tries = self._tries(path, until)
        while (have := _size(into)) < target.length:
            reason = "nothing came"
            try:
                self._go_on(path, target, into, tries)
            except _Interrupted as e:
                reason = str(e)
            else:
                if _size(into) > have:
                    continue
            now = _size(into)
            tries.failed(f"{reason}; {now} of {target.length} bytes are here", further=now > have)

    # ── requests ───────────────────────────────────────────────────────────────────────────────────────

    def _file(self, path: str, until: float) -> bytes | None:
        tries = self._tries(path, until)
        while True:
            try:
                with self._ask(path, until) as answer:
                    if answer.status in _ABSENT:
                        answer.pass_over()
                        return None
                    answer.check(200)
                    return answer.whole(MAX_METADATA_BYTES)
            except _Interrupted as e:
                tries.failed(str(e), further=False)

    def _go_on(self, path: str, target: Target, into: Path, tries: "_Tries") -> None:
        """One request for what is missing."""
        have = _size(into)
        with self._ask(path, tries.until, start=have) as answer:
            if answer.status == 416:
                raise LinkError(f"{answer.where}: holds fewer than the {target.length} bytes that are signed")
            answer.check(200, 206 if have else 200)
            if answer.status == 200:
                if answer.declared not in (None, target.length):
                    raise LinkError(
                        f"{answer.where}: {answer.declared} bytes instead of the {target.length} that are signed: copy "
                        "the repository's targets/ there again"
                    )
                begin, end = 0, target.length
            else:
                begin, end = answer.range(have, target.length)
            if begin < have:
                disk.cut(into, begin)
            with disk.append_to(into) as staging:
                while begin < end and (data := answer.read(end - begin)):
                    tries.took(len(data), MAX_TIMES_OVER * target.length)
                    staging.write(data)
                    begin += len(data)
            if begin < end:
                raise _Interrupted("the answer ended early")

    def _ask(self, path: str, until: float, *, start: int = 0) -> "_Answer":
        where = self._where(path)
        left = until - time.monotonic()
        if left <= 0:
            raise _Interrupted("no time was left")
        headers = {"User-Agent": "skiff", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        kept = self._wire is not None
        try:
            wire = self._connected(left)
            wire.sock.settimeout(min(STALL_SECONDS, left))
            watchdog = _Watchdog(wire.sock, left)
            try:
                wire.request("GET", f"{self._base}/{path}", headers=headers)
                return _Answer(where, wire.getresponse(), watchdog, self._drop)
            except BaseException:
                watchdog.stop()
                raise
        except ssl.SSLCertVerificationError as e:
            self._drop()
            raise LinkError(f"{where}: its certificate is not trusted ({e.verify_message})") from e
        except (OSError, http.client.HTTPException, ValueError) as e:
            self._drop()
            if kept:  # servers end what was idle for a while, and that is no fault
                return self._ask(path, until, start=start)
            raise _Interrupted(_words(e)) from e

    def _connected(self, left: float) -> http.client.HTTPConnection:
        if self._wire is not None:
            return self._wire
        host, port, timeout = self._parts.hostname or "", self._parts.port, min(STALL_SECONDS, left)
        if self._parts.scheme == "https":
            self._wire = http.client.HTTPSConnection(host, port, timeout=timeout, context=self._context())
        else:
            self._wire = http.client.HTTPConnection(host, port, timeout=timeout)
        self._wire.connect()
        return self._wire

    def _context(self) -> ssl.SSLContext:
        web = self._web
        try:
            context = ssl.create_default_context(cafile=web.ca or None)
            if web.certificate:
                context.load_cert_chain(web.certificate, web.key or None)
        except OSError as e:
            files = ", ".join(path for path in (web.ca, web.certificate, web.key) if path)
            raise LinkError(
                f"cannot use the TLS files {files} ({e}): check [update] ca and [broker] tls"
            ) from e
        return context

    def _drop(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def _where(self, path: str) -> str:
        return f"{self._web.url.rstrip('/')}/{path}"

    def _tries(self, path: str, until: float) -> "_Tries":
        def pause(attempt: int) -> None:
            seconds = next_delay_seconds(attempt, self._rng, cap=RETRY_CAP_SECONDS)
            self._sleep(min(seconds, max(0.0, until - time.monotonic())))

        return _Tries(self._where(path), until, pause)


class _Tries:
    """Counts what came and what went wrong in a row, and gives up."""

    def __init__(self, where: str, until: float, pause: Callable[[int], None]) -> None:
        self.until: Final = until
        self._where = where
        self._pause = pause
        self._failed = 0
        self._taken = 0

    def took(self, size: int, most: int) -> None:
        """So many bytes came; raises `LinkError` when they are more than ``most`` in all."""
        self._taken += size
        if self._taken > most:
            raise LinkError(
                f"{self._where}: more than {most} bytes came and no whole model: have the server answer range requests"
            )

    def failed(self, reason: str, *, further: bool) -> None:
        """Waits for the next try; ``further`` says that this one brought something. Raises `LinkError`."""
        self._failed = 1 if further else self._failed + 1
        if time.monotonic() >= self.until:
            raise LinkError(f"{self._where}: the deadline passed ({reason})")
        if self._failed >= ATTEMPTS:
            raise LinkError(f"{self._where}: {reason}, {ATTEMPTS} times")
        self._pause(self._failed)


class _Watchdog:
    """Ends a connection at a deadline, whatever is being read: a line that comes byte by byte has no end of its own."""

    def __init__(self, wire: socket.socket, seconds: float) -> None:
        self._wire = wire
        self.bit = False
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def _cut(self) -> None:
        self.bit = True
        with suppress(OSError):
            # An SSLSocket's own would first say goodbye, and forget its state under the reader.
            socket.socket.shutdown(self._wire, socket.SHUT_RDWR)

    def stop(self) -> None:
        """There is nothing to end any more."""
        self._timer.cancel()


class _Answer:
    """A response whose headers are here. A context manager; a connection that is not read to its end is dropped."""

    def __init__(
        self, where: str, response: http.client.HTTPResponse, watchdog: _Watchdog, drop: Callable[[], None]
    ) -> None:
        self.where: Final = where
        self.status: Final = response.status
        self._response = response
        self._watchdog = watchdog
        self._drop = drop
        length = response.getheader("Content-Length", "")
        self.declared: Final = int(length) if length.isdecimal() and not response.chunked else None
        self._left = self.declared

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.stop()
        self._response.close()
        if self._left != 0 or self._response.will_close:
            self._drop()

    def check(self, *wanted: int) -> None:
        """Raises `LinkError` unless the status is one of ``wanted`` and the body is the file itself."""
        status, encoding = self.status, self._response.getheader("Content-Encoding", "identity")
        if status >= 500 or status == 429:
            raise _Interrupted(f"the server answered {status}")
        if 300 <= status < 400:
            target = _words(self._response.getheader("Location", ""))
            raise LinkError(
                f"{self.where}: redirects are not followed, and this one leads to {target!r}: name the address where "
                "the repository really is"
            )
        if status in _ABSENT:
            raise LinkError(
                f"{self.where}: is not there ({status}): copy the repository's metadata/ and targets/ there"
            )
        if status not in wanted:
            raise LinkError(f"{self.where}: the server answered {status} {_words(self._response.reason)}")
        if encoding.lower() != "identity":
            raise LinkError(
                f"{self.where}: came as {_words(encoding)!r}: have the server send the file as it is"
            )

    def range(self, start: int, length: int) -> tuple[int, int]:
        """Where the part that comes begins and ends (exclusive); raises `LinkError` when it was not asked for."""
        text = self._response.getheader("Content-Range", "")
        found = _RANGE.fullmatch(text)
        if found is not None:
            first, last, total = found.groups()
            if int(first) == start <= int(last) < length and total in ("*", str(length)):
                return start, int(last) + 1
        raise LinkError(
            f"{self.where}: asked for bytes {start}-{length - 1}/{length}, the server answered with {_words(text)!r}"
        )

    def read(self, most: int) -> bytes:
        """The next bytes, at most ``most`` of them; none at the end. Raises `LinkError`."""
        wanted = min(most, _READ_BYTES, *(() if self._left is None else (self._left,)))
        if not wanted:
            return b""
        try:
            data = self._response.read1(wanted)
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise _Interrupted(_words(e)) from e
        if not data and self._watchdog.bit:  # which looks like the end of a body without a length
            raise _Interrupted("the answer went on for too long")
        if self._left is not None:
            self._left -= len(data)
        return data

    def pass_over(self) -> None:
        """Reads a small body, so that the connection can be used again."""
        while self._left and self._left <= _READ_BYTES and self.read(self._left):
            pass

    def whole(self, most: int) -> bytes:
        """The whole body; raises `LinkError` when it is larger than ``most`` bytes or ends early."""
        found = bytearray()
        if self.declared is None or self.declared <= most:
            while len(found) <= most and (data := self.read(most + 1 - len(found))):
                found += data
            if self._left and len(found) <= most:
                raise _Interrupted("the answer ended early")
            if len(found) <= most:
                return bytes(found)
        raise LinkError(f"{self.where}: is larger than the {most} bytes allowed")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _words(of: object) -> str:
    """What a peer, or the system, says: short, and without what a terminal would obey."""
    text = str(of) or type(of).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:MAX_CARRIED_WORDS]
