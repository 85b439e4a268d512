"""Writing that survives losing power: flush the data, rename, flush the folder, in that order.

A rename that reached the disk before its data would leave an empty file under a good name (Pillai et al., "All File
Systems Are Not Created Equal", OSDI 2014).
"""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Has the kernel write a file's content, or a folder's names, to the disk before returning."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, data: bytes) -> None:
    """Replaces a file durably; after a crash at any instant it holds the old bytes or the new ones.

    Raises `OSError` when the disk refuses. The temporary file ``{path}.new`` may stay behind; the next call reuses it.
    """
    temporary = path.with_name(f"{path.name}.new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    temporary.replace(path)
    flush(path.parent)
