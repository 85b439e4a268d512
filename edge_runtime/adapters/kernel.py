"""What the kernel shows in small text files: reading them, and the control groups of this process.

Such a file may be absent (another board, another kernel, a container), refuse to be read (a sensor that is off answers
EINVAL or EAGAIN) or hold something unexpected. All three mean that nothing is known: nothing here raises.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 16384
"""The largest file read here, ``/proc/vmstat``, has about 5 kB."""

PROC: Final = Path("/proc")
SYS: Final = Path("/sys")


def read_text(path: str | Path) -> str:
    """The first `MAX_BYTES` of a file, "" when it cannot be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        return os.read(handle, MAX_BYTES).decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(handle)


def integer(text: str, base: int = 10) -> int | None:
    """The number that ``text`` consists of, None when it is something else or does not fit 64 bits."""
    text = text.strip()
    if not text or len(text) > 20 or not text.isascii() or "_" in text:
        return None
    try:
        value = int(text, base)
    except ValueError:
        return None
    return value if -(1 << 63) <= value < 1 << 64 else None


def value_of(text: str, key: str) -> int | None:
    """The number behind ``key`` in lines of ``key number unit``, as of ``memory.events`` or ``/proc/self/status``."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == key:
            return integer(words[1])
    return None


@dataclass(frozen=True, slots=True)
class Group:
    """A control group that accounts this process's memory; ``version`` 1 or 2 of the interface."""

    folder: Path
    version: int


def memory_groups(
    membership: Path = PROC / "self/cgroup", mounts: Path = SYS / "fs/cgroup"
) -> tuple[tuple[Group, ...], ...]:
    """For every hierarchy that accounts memory, this process's group and those above it, innermost first.

    ``membership`` and ``mounts`` are where the kernel shows them. A container may see its own group as the root.
    https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """
    found = []
    for line in read_text(membership).splitlines():  # hierarchy:controllers:path
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if not controllers:
            root, version = mounts, 2
        elif "memory" in controllers.split(","):
            root, version = mounts / "memory", 1
        else:
            continue
        folder = root / inside.lstrip("/")
        above = [g for g in (folder, *folder.parents) if g.is_relative_to(root)]
        found.append(tuple(Group(g, version) for g in above))
    return tuple(found)


_LIMIT: Final = {1: "memory.limit_in_bytes", 2: "memory.max"}
_NO_LIMIT: Final = 1 << 60
"""Version 1 writes about 2^63 where there is no limit."""


def limit_files(hierarchies: tuple[tuple[Group, ...], ...]) -> tuple[str, ...]:
    """Where the memory limits of these groups are shown; not each of the files need be there."""
    return tuple(str(group.folder / _LIMIT[group.version]) for groups in hierarchies for group in groups)


def memory_limit_bytes(files: tuple[str, ...]) -> int | None:
    """The tightest of the memory limits in these files; None when there is none."""
    limits = (integer(read_text(path)) for path in files)
    return min((limit for limit in limits if limit is not None and 0 <= limit < _NO_LIMIT), default=None)
