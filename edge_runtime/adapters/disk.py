"""Writing that survives losing power; every change of a file that a start depends on goes through here.

Data is flushed before a name is given to it, and the folder that holds the name after: a rename that reached the disk
before its data would leave an empty file under a good name (Pillai et al., "All File Systems Are Not Created Equal",
OSDI 2014). A name is durable only when its folder was flushed, and that folder's own name only when the one above was.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MODE = 0o600


class Appending:
    """A file that grows at its end. Nothing is flushed: what a crash leaves of it is for its reader to check."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def write(self, data: bytes) -> None:
        """Adds all of ``data``; raises `OSError` when the disk refuses, with a part of it written maybe."""
        _write(self._handle, data)


def flush(path: Path) -> None:
    """Has the kernel write a file's content, or a folder's names, to the disk before returning."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it that are missing, durably; raises `OSError`.

    A folder that is there is left alone: the one above it may be closed to this process.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file durably; after a crash at any instant it holds the old bytes or the new ones.

    Raises `OSError` when the disk refuses. The temporary file ``{path}.new`` may stay behind; the next call reuses it.
    """
    temporary = path.with_name(f"{path.name}.new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _MODE)
    try:
        _write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
    temporary.replace(path)
    flush(path.parent)


def move_file(source: Path, target: Path) -> None:
    """Gives a file another name, durably and with its content, in place of whatever has that name; raises `OSError`.

    After a crash at any instant the whole file is found under one of the names, or under both.
    """
    flush(source)
    source.replace(target)
    flush(target.parent)
    if source.parent != target.parent:
        flush(source.parent)


@contextmanager
def append_to(path: Path) -> Iterator[Appending]:
    """Opens a file to add to its end; makes it where there is none. Raises `OSError`."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _MODE)
    try:
        yield Appending(handle)
    finally:
        os.close(handle)


def cut(path: Path, size_bytes: int) -> None:
    """Leaves only the first ``size_bytes`` of a file. Nothing is flushed, see `Appending`. Raises `OSError`."""
    os.truncate(path, size_bytes)


def _write(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]
