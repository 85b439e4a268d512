"""A Unix socket that listens: a file with permissions, replaced when it is stale, removed at the end."""

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from edge_runtime.contract.errors import ConfigError

MAX_PATH_BYTES: Final = 107
"""``sun_path`` has 108 bytes, one of them for the NUL (unix(7))."""


class UnixListener:
    """A listening stream socket at ``path`` with the permissions ``mode``.

    What a dead process left at ``path`` is replaced. Nobody can connect before the permissions are set: a socket
    that does not listen yet refuses.

    Raises:
        ConfigError: the path is too long, its folder is missing or not writable, something else stands there, or
            another process listens there.
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
            self.socket.setblocking(False)
            self._file = _identity(path)
        except OSError as e:
            self.socket.close()
            raise ConfigError(
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


def check_path(path: Path) -> None:
    """Raises `ConfigError` when ``path`` is too long for a Unix socket, or no path at all."""
    if "\0" in os.fspath(path):
        raise ConfigError(f"{os.fspath(path)!r}: no path of a file, there is a NUL in it")
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        raise ConfigError(
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
        raise ConfigError(f"{path}: cannot be replaced ({os.strerror(found)})")


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
