"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replaces ``path``: temp, fsync, rename, fsync of the folder; ``mode`` holds from the first byte on.

    Raises `OSError`; the file is then as it was before.
    """
    work = path.with_name(f".{path.name}.new")
    work.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        work.replace(path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
