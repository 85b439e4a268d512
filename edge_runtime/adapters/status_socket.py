"""``skiffd --status``: a Unix socket on which the running daemon says how it is, to whoever may read its state.

Whoever connects is sent one JSON document, and the connection is closed; nothing is read from it. The socket has mode
0600, so it answers the daemon's own user and root.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from edge_runtime.contract.errors import ContractError, LinkError

NAME: Final = "status.sock"
MODE: Final = 0o600
WAITING: Final = 4
CLIENT_SECONDS: Final = 1.0
"""How long one client may take to read; the others wait in line meanwhile, the daemon does not."""
RETRY_SECONDS: Final = 0.02
MAX_DOCUMENT_BYTES: Final = 1 << 20
_MAX_ADDRESS_BYTES: Final = 107

log = logging.getLogger(__name__)


class StatusSocket:
    """Serves ``document()`` under ``path`` on a thread of its own, one client at a time.

    ``document`` is called on that thread and returns what JSON can hold. When it raises, the client is told so.
    """

    def __init__(self, path: Path, document: Callable[[], Mapping[str, Any]]) -> None:
        self._path: Final = path
        self._document: Final = document
        self._listener: socket.socket | None = None
        self._inode = 0
        self._stopping: Final = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listens from now on. A socket that a killed daemon left behind is replaced.

        Raises `LinkError` when the path cannot be bound, or when another daemon answers there.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _address(self._path) as address:
                _make_room(self._path, address)
                listener.bind(address)
                # Nobody can connect before listen(), so the mode is in force from the first client on.
                self._path.chmod(MODE)
                listener.listen(WAITING)
                self._inode = self._path.stat().st_ino
        except OSError as e:
            listener.close()
            raise LinkError(f"{self._path}: cannot listen there ({e.strerror or e})") from e
        except LinkError:
            listener.close()
            raise
        self._listener = listener
        self._stopping.clear()
        self._thread = threading.Thread(target=self._serve, args=(listener,), name="status", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops listening and removes the socket; may be called again, and without a start."""
        listener, thread = self._listener, self._thread
        self._listener = self._thread = None
        if listener is None or thread is None:
            return
        self._stopping.set()
        listener.shutdown(socket.SHUT_RDWR)  # ends accept()
        thread.join(timeout=2 * CLIENT_SECONDS)
        listener.close()
        with contextlib.suppress(OSError):  # another daemon may have taken the place
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _serve(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                client, _ = listener.accept()
            except OSError as e:
                if not self._stopping.wait(CLIENT_SECONDS):  # out of files, for one: some may be free then
                    log.warning("status_unanswered reason=%s", e.strerror or e)
                continue
            try:
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
    except (FileNotFoundError, ConnectionRefusedError) as e:
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
    with _address(path) as address, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout)
        while True:
            try:
                client.connect(address)
                break
            except BlockingIOError:  # others wait already, and a Unix socket has no line beyond that
                if time.monotonic() >= deadline:
                    raise TimeoutError from None
                time.sleep(RETRY_SECONDS)
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


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """An address for ``path``: by way of its open folder where it is longer than a Unix address may be (unix(7))."""
    if len(os.fsencode(path)) <= _MAX_ADDRESS_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _make_room(path: Path, address: str) -> None:
    """Removes the socket of a daemon that is gone; raises `LinkError` when one answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(CLIENT_SECONDS)
        try:
            client.connect(address)
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # it is so busy answering that nobody else can even wait
        except ConnectionRefusedError:
            if not path.is_socket():
                raise LinkError(f"{path}: something else than a socket is in the way; remove it") from None
            path.unlink()
            return
    raise LinkError(f"{path}: another skiffd answers there; two must not share one state_dir")
