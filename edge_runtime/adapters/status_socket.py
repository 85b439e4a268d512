"""``skiffd --status``: a Unix socket on which the running daemon says how it is, to whoever may read its state.

Whoever connects is sent one JSON document, and the connection is closed; nothing is read from it. The socket has mode
0600, so it answers the daemon's own user and root.

Where no file can be made (a state folder that is read-only, full, or too deep), the daemon takes a name of Linux's
abstract namespace that follows from the path, so that both sides find it in the same configuration. Such a name has no
permissions: the daemon looks who asks, and whoever asks looks who answers.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from edge_runtime.adapters.unix_socket import (
    AbstractListener,
    NoPlaceError,
    UnixListener,
    abstract,
    check_path,
    peer_uid,
)
from edge_runtime.contract.errors import ConfigError, ContractError, LinkError

NAME: Final = "status.sock"
MODE: Final = 0o600
WAITING: Final = 4
CLIENT_SECONDS: Final = 1.0
"""How long one client may take to read; the others wait in line meanwhile, the daemon does not."""
RETRY_SECONDS: Final = 0.02
MAX_DOCUMENT_BYTES: Final = 1 << 20
ROOT: Final = 0

log = logging.getLogger(__name__)


def fallback_name(path: Path) -> str:
    """The abstract name that stands in for ``path``."""
    return f"skiffd-status-{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}"


class StatusSocket:
    """Serves ``document()`` under ``path`` on a thread of its own, one client at a time.

    ``document`` is called on that thread and returns what JSON can hold. When it raises, the client is told so.
    """

    def __init__(self, path: Path, document: Callable[[], Mapping[str, Any]]) -> None:
        self._path: Final = path
        self._document: Final = document
        self._listener: UnixListener | AbstractListener | None = None
        self._stopping: Final = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listens from now on, under ``path`` or, where that cannot be made, under `fallback_name`, which the log says.

        A socket that a killed daemon left behind is replaced. Raises `LinkError` when another process listens there
        already, or when something else than a socket is in the way.
        """
        try:
            self._listener = self._listen()
        except ConfigError as e:
            raise LinkError(str(e)) from e
        self._stopping.clear()
        self._thread = threading.Thread(
            target=self._serve, args=(self._listener,), name="status", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stops listening and removes the socket; may be called again, and without a start."""
        listener, thread = self._listener, self._thread
        self._listener = self._thread = None
        if listener is None or thread is None:
            return
        self._stopping.set()
        listener.socket.shutdown(socket.SHUT_RDWR)  # ends accept()
        thread.join(timeout=2 * CLIENT_SECONDS)
        listener.close()

    def _listen(self) -> UnixListener | AbstractListener:
        try:
            return UnixListener(self._path, mode=MODE, backlog=WAITING)
        except NoPlaceError as e:
            name = fallback_name(self._path)
            listener = AbstractListener(name, backlog=WAITING)
            log.warning("status_elsewhere socket=@%s reason=%s", name, e)
            return listener

    def _serve(self, listener: UnixListener | AbstractListener) -> None:
        while not self._stopping.is_set():
            try:
                client, _ = listener.socket.accept()
            except OSError as e:
                if not self._stopping.wait(CLIENT_SECONDS):  # out of files, for one: some may be free then
                    log.warning("status_unanswered reason=%s", e.strerror or e)
                continue
            try:
                uid = peer_uid(client)
                if uid not in (ROOT, os.geteuid()):  # a file's permissions say the same
                    log.info("status_refused uid=%d", uid)
                    continue
                client.settimeout(CLIENT_SECONDS)
                client.sendall(self._answer())
            except OSError as e:
                log.info("status_lost reason=%s", e.strerror or e)
            finally:
                client.close()

    def _answer(self) -> bytes:
        try:
            return json.dumps(self._document(), allow_nan=False).encode() + b"\n"
        except Exception as e:  # whatever is wrong with the report must not end the thread that reports it
            log.exception("status_broken")
            return json.dumps({"error": f"{type(e).__name__}: {e}"}).encode() + b"\n"


def read_status(path: Path, timeout: float = 2.0) -> dict[str, Any]:
    """What the daemon whose socket is at ``path`` says now; ``timeout`` in seconds.

    Raises:
        LinkError: nobody answers there, or not in time; says what to do.
        ContractError: what came back is not a status document.
    """
    try:
        data = _receive(path, timeout)
    except (FileNotFoundError, ConnectionRefusedError, NoPlaceError) as e:
        raise LinkError(
            f"{path}: nobody answers; is skiffd running with this configuration? (systemctl status skiffd)"
        ) from e
    except PermissionError as e:
        raise LinkError(f"{path}: not yours to read; ask as root or as the user that skiffd runs as") from e
    except TimeoutError as e:
        raise LinkError(f"{path}: skiffd did not answer within {timeout:g} s") from e
    except OSError as e:
        raise LinkError(f"{path}: {e.strerror or e}") from e
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ContractError(f"{path}: not a status document ({len(data)} bytes)") from e
    if not isinstance(document, dict):
        raise ContractError(f"{path}: not a status document but a {type(document).__name__}")
    if "error" in document:
        raise ContractError(f"{path}: skiffd runs, but cannot report: {document['error']}")
    return document


def _receive(path: Path, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    data = b""
    with _reach(path, deadline) as client:
        while len(data) <= MAX_DOCUMENT_BYTES:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            client.settimeout(left)
            part = client.recv(1 << 16)
            if not part:
                return data
            data += part
    raise ContractError(f"{path}: sends more than {MAX_DOCUMENT_BYTES} bytes, so it is not skiffd")


def _reach(path: Path, deadline: float) -> socket.socket:
    """A connection to the daemon of ``path``, wherever it listens; where nobody does, raises what ``path`` raised."""
    try:
        check_path(path)
        return _connect(os.fspath(path), deadline)
    except TimeoutError:  # somebody is there
        raise
    except (OSError, NoPlaceError) as e:
        missing = e
    try:
        client = _connect(abstract(fallback_name(path)), deadline)
    except ConnectionRefusedError:  # nobody has the name
        raise missing from None
    try:
        _look_who_answers(peer_uid(client), path)
    except BaseException:
        client.close()
        raise
    return client


def _connect(address: str, deadline: float) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        while not _connects(client, address, deadline):
            time.sleep(RETRY_SECONDS)
    except BaseException:
        client.close()
        raise
    return client


def _connects(client: socket.socket, address: str, deadline: float) -> bool:
    """False when others wait already: a Unix socket has no line beyond that."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    client.settimeout(left)
    try:
        client.connect(address)
    except BlockingIOError:
        return False
    return True


def _look_who_answers(uid: int, path: Path) -> None:
    """What a file's permissions would settle. Raises PermissionError, and `LinkError` for a stranger's answer."""
    me = os.geteuid()
    owners = {ROOT, me}
    with contextlib.suppress(OSError):  # the folder may be what is missing
        owners.add(path.parent.stat().st_uid)
    if uid not in owners:  # anyone may take an abstract name
        raise LinkError(
            f"{path}: the user with the number {uid} answers for it, who is neither root, you nor the owner of the "
            "folder; if skiffd runs as that user, ask as that user"
        )
    if me not in (ROOT, uid):
        raise PermissionError
