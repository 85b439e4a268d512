"""How the process and its machine feel. The only psutil import."""

import time
from pathlib import Path
from typing import Final

import psutil

from edge_runtime.contract.messages import Health

_CGROUP_V2_LIMIT: Final = "memory.max"
_CGROUP_V1_LIMIT: Final = "memory.limit_in_bytes"
_NO_LIMIT: Final = 1 << 60
"""Version 1 writes about 2^63 where there is no limit."""


class Probes:
    """Readings of this process, cheap enough for every window."""

    def __init__(self) -> None:
        self._process: Final = psutil.Process()
        # Both stand on the same boot time, which moves when the clock is set: their difference does not.
        self._started_ns: Final = int((self._process.create_time() - psutil.boot_time()) * 1e9)

    def rss_bytes(self) -> int:
        """Resident memory now."""
        return int(self._process.memory_info().rss)

    def peak_rss_bytes(self) -> int:
        """The largest resident memory since this program started, as the kernel recorded it."""
        # Not getrusage: its maximum is inherited over fork and exec, so a child would report its parent's.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return self.rss_bytes()

    def cpu_ns(self) -> int:
        """CPU time of all threads since the start."""
        return time.process_time_ns()

    def uptime_ns(self) -> int:
        """Time since the process started, sleep of the machine included."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - self._started_ns

    def health(self) -> Health:
        """All readings at once."""
        rss_bytes = self.rss_bytes()
        return Health(
            rss_bytes=rss_bytes,
            # The kernel sums per-thread counters lazily: the peak it shows may lag behind.
            peak_rss_bytes=max(rss_bytes, self.peak_rss_bytes()),
            cpu_ns=self.cpu_ns(),
            uptime_ns=self.uptime_ns(),
        )


def memory_limit_bytes(
    membership: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The tightest memory limit of this process's control group and those above it; None when there is none.

    ``membership`` and ``mounts`` are where the kernel shows them. Reads version 2 (``memory.max``) and version 1
    (``memory.limit_in_bytes``): https://docs.kernel.org/admin-guide/cgroup-v2.html
    """
    limits = []
    for root, name, inside in _groups(membership, mounts):
        folder = root / inside.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            limit = _read_limit(group / name)
            if limit is not None:
                limits.append(limit)
    return min(limits, default=None)


def _groups(membership: Path, mounts: Path) -> list[tuple[Path, str, str]]:
    """(mount, name of the limit file, path of the group in it) of every hierarchy that limits memory."""
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:  # hierarchy:controllers:path
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if not controllers:
            found.append((mounts, _CGROUP_V2_LIMIT, inside))
        elif "memory" in controllers.split(","):
            found.append((mounts / "memory", _CGROUP_V1_LIMIT, inside))
    return found


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:  # a container may see its own group as the root, or may not look above it
        return None
    return int(text) if text.isdecimal() and int(text) < _NO_LIMIT else None
