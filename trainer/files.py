"""Files of the repository: folders made as needed, one writer at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters import files


def write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replaces ``path`` whole or not at all, see `converters.files.write`; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, data, mode=mode)


def sync(folder: Path) -> None:
    """Has the names in ``folder`` survive a power cut."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file ``path``; waits for whoever holds it."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def watched(path: Path) -> Iterator[None]:
    """Waits for whoever holds the lock file ``path``, and holds off the next. Writes nothing: it may be absent."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        yield
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield
