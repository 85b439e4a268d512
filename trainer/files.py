"""Files of the repository: folders made as needed, one writer at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters import files


def write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replaces ``path`` whole or not at all, see `converters.files.write`; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, data, mode=mode)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file ``path``; waits for whoever holds it."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
