"""Clock, memory and processor against what the configuration counts on. The only psutil import.

The daemon reads ``/proc`` itself: psutil would cost it 0.9 MB of resident memory and 9 ms for a few lines of text.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import psutil

from edge_runtime.adapters import clock
from edge_runtime.adapters.probes import Probes
from edge_runtime.check.finding import Finding, error, ok, warning
from edge_runtime.config import DaemonConfig

RELEASED: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""No device runs this code before."""
LAST_YEAR: Final = 2100
MIN_GLIBC: Final = (2, 28)
"""onnxruntime 1.31 has wheels for manylinux_2_28 (https://peps.python.org/pep-0600/)."""
MACHINES: Final = ("x86_64", "aarch64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """How the machine is asked; a test asks another one."""

    now_seconds: Callable[[], float] = time.time
    clock_synced: Callable[[], bool | None] = clock.is_synced
    available_bytes: Callable[[], int]
    limit_bytes: Callable[[], int] = lambda: Probes().memory_limit_bytes()
    architecture: Callable[[], str] = platform.machine
    pointer_bits: Callable[[], int] = lambda: sys.maxsize.bit_length() + 1
    libc: Callable[[], tuple[str, str]] = platform.libc_ver
    cores: Callable[[], int] = lambda: len(os.sched_getaffinity(0))


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(available_bytes=available_bytes)


def check_machine(config: DaemonConfig, machine: Machine) -> Iterator[Finding]:
    """Everything about the machine itself."""
    yield from _check_processor(config, machine)
    yield from _check_clock(config, machine)
    yield from _check_memory(config, machine)


def _check_processor(config: DaemonConfig, machine: Machine) -> Iterator[Finding]:
    kind, bits = machine.architecture(), machine.pointer_bits()
    library, version = machine.libc()
    if kind not in MACHINES or bits != 64:
        yield error(
            "machine",
            f"{kind} with a {bits}-bit Python: ONNX Runtime has no wheels for it",
            "install the 64-bit system (aarch64 or x86_64)",
        )
    elif library != "glibc" or _numbers(version) < MIN_GLIBC:
        yield error(
            "machine",
            f"C library {library or 'other than glibc'} {version}: ONNX Runtime needs glibc 2.28 or newer",
            "use Debian 12, Ubuntu 22.04 or newer; Alpine has musl",
        )
    else:
        yield ok("machine", f"{kind}, glibc {version}")
    if config.threads > machine.cores():
        yield warning(
            "model.threads",
            f"{config.threads} threads for {machine.cores()} cores wait for each other",
            "lower it; 1 is best for single rows",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _check_clock(config: DaemonConfig, machine: Machine) -> Iterator[Finding]:
    now = datetime.fromtimestamp(machine.now_seconds(), UTC)
    shown = f"{now:%Y-%m-%d %H:%M} UTC"
    if now < RELEASED or now.year >= LAST_YEAR:
        yield error(
            "clock",
            f"it says {shown}: certificates and trust metadata will look wrong",
            "set it (timedatectl set-time), enable an NTP client, or fit a battery-backed clock",
        )
        return
    synced = machine.clock_synced()
    if synced is None and config.clock == "auto":
        yield warning(
            "device.clock_synced",
            f"it says {shown}; the kernel does not tell whether anybody keeps it right",
            "set clock_synced to true or false",
        )
    elif synced is False and config.clock != "unsynced":
        yield warning(
            "clock",
            f"it says {shown}, but no NTP client keeps it right",
            "enable one (systemctl enable --now systemd-timesyncd), or set device.clock_synced = false",
        )
    else:
        yield ok("clock", f"it says {shown}, {'synchronised' if synced else 'on its own, as configured'}")


def _check_memory(config: DaemonConfig, machine: Machine) -> Iterator[Finding]:
    limits, costs = config.limits, config.costs
    # An update runs beside the daemon; a swap holds two models.
    needed = max(
        (limits.rss_soft_bytes or limits.rss_bytes) + costs.update_peak_bytes,
        costs.load_peak_bytes,
        limits.rss_bytes,
    )
    available, limit = machine.available_bytes(), machine.limit_bytes()
    if limit and needed > limit:
        yield error(
            "budgets",
            f"daemon and update child may take {_mb(needed)}, and this control group is killed at {_mb(limit)}",
            "raise the limit (MemoryMax=, docker run --memory) or lower rss_mb, load_peak_mb or update_mb",
        )
    elif available and needed > available:
        yield warning(
            "budgets",
            f"daemon and update child may take {_mb(needed)}, and {_mb(available)} are available now",
            "end what else runs, or lower rss_mb, load_peak_mb or update_mb",
        )
    else:
        bound = f", limit {_mb(limit)}" if limit else ""
        yield ok("memory", f"{_mb(available)} available{bound}; {_mb(needed)} budgeted")


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"
