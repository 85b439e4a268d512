"""Unix sockets that listen: a file with permissions, replaced when it is stale and removed at the end, or a bare name.

A bare name is one of Linux's abstract namespace (unix(7)): it needs no folder, and it is gone with its process. It has
no permissions, so whoever uses it asks for the other side's user (`peer_uid`).
"""

import errno
import logging
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Final

from edge_runtime.contract.errors import ConfigError

MAX_PATH_BYTES: Final = 107
"""``sun_path`` has 108 bytes, one of them for the NUL (unix(7))."""
_PEER: Final = struct.Struct("iII")
"""``struct ucred`` of SO_PEERCRED (unix(7)): process, user, group."""

log = logging.getLogger(__name__)


class NoPlaceError(ConfigError):
    """No socket can be made at the path: too long, no folder, not writable, or another user's socket is in the way."""


class UnixListener:
    """A listening stream socket at ``path`` with the permissions ``mode``.

    What a dead process left at ``path`` is replaced. Nobody can connect before the permissions are set: a socket
    that does not listen yet refuses.

    Raises:
        NoPlaceError: the path is too long, its folder is missing or not writable, or another user's socket is there.
        ConfigError: something else stands there, or another process listens there.
    """

    def __init__(self, path: Path, *, mode: int = 0o600, backlog: int = 16) -> None:
        check_path(path)
        self.path: Final = path
        self.socket: Final = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _clear(path)
            self.socket.bind(os.fspath(path))
            path.chmod(mode)
            self.socket.listen(backlog)
            self._file = _identity(path)
        except OSError as e:
            self.socket.close()
            raise NoPlaceError(
                f"{path}: cannot listen there ({e.strerror}); its folder must exist and be writable"
            ) from e
        except ConfigError:
            self.socket.close()
            raise

    def close(self) -> None:
        """Stops listening and removes the file, unless somebody else's stands there now."""
        self.socket.close()
        try:
            if _identity(self.path) == self._file:
                self.path.unlink()
        except FileNotFoundError:
            return
        except OSError as e:  # the disk became read-only; the next one to listen there replaces what is left
            log.warning("socket_left path=%s reason=%s", self.path, e.strerror)


class AbstractListener:
    """A listening stream socket under ``name`` in the abstract namespace, which every local user may connect to.

    Raises `ConfigError` when another process listens there.
    """

    def __init__(self, name: str, *, backlog: int = 16) -> None:
        self.socket: Final = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.bind(abstract(name))
            self.socket.listen(backlog)
        except OSError as e:
            self.socket.close()
            what = "another process listens there" if e.errno == errno.EADDRINUSE else e.strerror
            raise ConfigError(f"@{name}: cannot listen there ({what})") from e

    def close(self) -> None:
        """Stops listening, which frees the name."""
        self.socket.close()


def abstract(name: str) -> str:
    """The address of ``name`` in the abstract namespace; `ss` and `/proc/net/unix` show it as ``@name``."""
    return f"\0{name}"


def peer_uid(connection: socket.socket) -> int:
    """Whose process is at the other end: for a server since it listens, for a client since it connected (unix(7))."""
    _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(uid)


def check_path(path: Path) -> None:
    """Raises `NoPlaceError` when ``path`` is too long for a Unix socket, or no path at all."""
    if "\0" in os.fspath(path):
        raise NoPlaceError(f"{os.fspath(path)!r}: no path of a file, there is a NUL in it")
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        raise NoPlaceError(
            f"{path}: {size} bytes; the path of a Unix socket has at most {MAX_PATH_BYTES}: choose a shorter one, "
            "for example below /run"
        )


def _clear(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ConfigError(f"{path}: there is something that is no socket; choose another path or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        found = probe.connect_ex(os.fspath(path))
    if found == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif found in (0, errno.EAGAIN):  # EAGAIN: it listens, and its queue is full
        raise ConfigError(f"{path}: another process listens there; stop it or choose another path")
    elif found != errno.ENOENT:
        raise NoPlaceError(f"{path}: what is there cannot be replaced ({os.strerror(found)})")


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
