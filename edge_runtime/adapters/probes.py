"""How the process and its machine feel, read from ``/proc`` and ``/sys``."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from edge_runtime.adapters import kernel
from edge_runtime.adapters.kernel import integer, read_text, value_of
from edge_runtime.contract.messages import Health

THROTTLED_NOW: Final = 1
THROTTLED_SINCE_BOOT: Final = 2

TEMPERATURE_SECONDS: Final = 5.0
"""A sensor may sit behind a slow bus, so `Probes.glance` reads it this often at most."""

PSS_SECONDS: Final = 30.0

_FIRMWARE: Final = (
    "devices/platform/soc/soc:firmware/get_throttled",
    "devices/platform/soc@*/soc@*:firmware/get_throttled",  # Raspberry Pi 5
)
_FIRMWARE_NOW: Final = 0xF
"""Under-voltage, frequency capped, throttled, soft temperature limit; shifted by 16: has occurred since boot."""
_SLOWING: Final = (
    "cpufreq",
    "thermal-cpufreq",
    "thermal-idle",
    "idle",
    "devfreq",
    "thermal-devfreq",
    "processor",
)
"""Cooling devices that take speed away. Others have a state above 0 in peace: a fan, a display, Intel's TCC offset."""
_HOTTEST_MC: Final = 1_000_000


class Probes:
    """Readings of this process and its machine; what cannot be read is 0 and never raises.

    `health` is everything, for the end of a window; `glance` is the cheap part, for every tick. ``proc`` and ``sys``
    are where the kernel shows itself. Not thread-safe: one loop owns it.
    """

    def __init__(
        self,
        *,
        proc: Path = kernel.PROC,
        sys: Path = kernel.SYS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Strings, because joining paths costs more than reading the files.
        self._statm: Final = f"{proc}/self/statm"
        self._stat: Final = f"{proc}/self/stat"
        self._status: Final = f"{proc}/self/status"
        self._smaps: Final = f"{proc}/self/smaps_rollup"
        self._page_bytes: Final = os.sysconf("SC_PAGE_SIZE")
        groups = kernel.memory_groups(proc / "self/cgroup", sys / "fs/cgroup")
        self._limits: Final = kernel.limit_files(groups)
        self._pressures: Final = _pressures(groups, proc)
        self._zones: Final = sorted(map(str, sys.glob("class/thermal/thermal_zone*/temp")))
        self._board: Final = _Board(sys)
        self._temperature: Final = _Seldom(self.temperature_mc, TEMPERATURE_SECONDS, clock)
        self._pss: Final = _Seldom(self.pss_bytes, PSS_SECONDS, clock)
        self._peak_bytes = 0
        (started_ticks,) = self._fields(21)
        self._started_ns: Final = started_ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Resident memory now."""
        words = read_text(self._statm).split()
        pages = integer(words[1]) if len(words) > 1 else None
        return max(0, pages or 0) * self._page_bytes

    def peak_rss_bytes(self) -> int:
        """The largest resident memory since this program started, as the kernel recorded it."""
        # Not getrusage: its maximum is inherited over fork and exec, so a child would report its parent's.
        return max(0, value_of(read_text(self._status), "VmHWM:") or 0) * 1024 or self.rss_bytes()

    def pss_bytes(self) -> int:
        """Resident memory with every shared page divided by the number of processes that share it.

        The kernel walks the page tables for it: 1.3 ms where all else takes 0.2 ms, with ONNX Runtime loaded.
        """
        return max(0, value_of(read_text(self._smaps), "Pss:") or 0) * 1024

    def cpu_ns(self) -> int:
        """CPU time of all threads since the start."""
        return time.process_time_ns()

    def uptime_ns(self) -> int:
        """Time since the process started, sleep of the machine included."""
        return max(0, time.clock_gettime_ns(time.CLOCK_BOOTTIME) - self._started_ns)

    def memory_limit_bytes(self) -> int:
        """The tightest memory limit of this process's control groups, 0 when there is none."""
        return kernel.memory_limit_bytes(self._limits) or 0

    def memory_pressure_ppm(self) -> int:
        """Parts per million of the last minute in which a task waited for memory, in this control group if it tells.

        https://docs.kernel.org/accounting/psi.html
        """
        for path in self._pressures:
            share = _some_avg60(read_text(path))
            if share is not None:
                return share
        return 0

    def temperature_mc(self) -> int:
        """Of the hottest thermal zone, in thousandths of a degree Celsius; 0 also when all are below freezing.

        https://docs.kernel.org/driver-api/thermal/sysfs-api.html
        """
        found = (integer(read_text(path)) for path in self._zones)
        return max((mc for mc in found if mc is not None and 0 < mc <= _HOTTEST_MC), default=0)

    def throttled(self) -> int:
        """Bit 0: heat or supply slow the board down now; bit 1: they did since it was switched on."""
        return self._board.throttled()

    def glance(self) -> Health:
        """What a limit may concern: RSS, CPU time, uptime, and the temperature of the last few seconds.

        The peak is what these readings know of it, so that it is never below an RSS that was told.
        """
        rss_bytes = self.rss_bytes()
        self._peak_bytes = max(self._peak_bytes, rss_bytes)
        return Health(
            rss_bytes=rss_bytes,
            peak_rss_bytes=self._peak_bytes,
            cpu_ns=self.cpu_ns(),
            uptime_ns=self.uptime_ns(),
            temperature_mc=self._temperature.read(),
        )

    def health(self) -> Health:
        """All readings at once; the share of shared memory is up to `PSS_SECONDS` old."""
        rss_bytes = self.rss_bytes()
        # The kernel sums per-thread counters lazily: the peak it shows may lag behind.
        self._peak_bytes = max(self._peak_bytes, rss_bytes, self.peak_rss_bytes())
        minor_faults, major_faults = self._fields(9, 11)
        return Health(
            rss_bytes=rss_bytes,
            peak_rss_bytes=self._peak_bytes,
            cpu_ns=self.cpu_ns(),
            uptime_ns=self.uptime_ns(),
            pss_bytes=self._pss.read(),
            memory_limit_bytes=self.memory_limit_bytes(),
            memory_pressure_ppm=self.memory_pressure_ppm(),
            minor_faults=minor_faults,
            major_faults=major_faults,
            temperature_mc=self.temperature_mc(),
            throttled=self.throttled(),
        )

    def _fields(self, *places: int) -> list[int]:
        """Numbers of ``/proc/self/stat``, whose fields count from 0; number 1 is a name, which may hold anything."""
        words = read_text(self._stat).rpartition(")")[2].split()
        found = (integer(words[place - 2]) if len(words) > place - 2 else None for place in places)
        return [max(0, value or 0) for value in found]


class _Seldom:
    """A reading that costs too much to be taken each time it is asked for."""

    def __init__(self, take: Callable[[], int], seconds: float, clock: Callable[[], float]) -> None:
        self._take: Final = take
        self._seconds: Final = seconds
        self._clock: Final = clock
        self._at = -math.inf
        self._value = 0

    def read(self) -> int:
        now = self._clock()
        if now >= self._at + self._seconds:
            self._at, self._value = now, self._take()
        return self._value


class _Board:
    """Whether the board slows itself down, in each of the ways that boards have to tell it."""

    def __init__(self, sys: Path) -> None:
        self._firmware: Final = [str(p) for pattern in _FIRMWARE for p in sys.glob(pattern)]
        self._voltage: Final = [
            str(p.with_name("in0_lcrit_alarm"))
            for p in sys.glob("class/hwmon/hwmon*/name")
            if read_text(p).strip() == "rpi_volt"
        ]
        self._counters: Final = [
            str(p) for p in sys.glob("devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")
        ]
        self._cooling: Final = [
            str(p.with_name("cur_state"))
            for p in sys.glob("class/thermal/cooling_device*/type")
            if _slows(read_text(p))
        ]
        self._counted = self._count()
        self._ever = self._counted > 0

    def throttled(self) -> int:
        # Raspberry Pi: hexadecimal bits, drivers/firmware/raspberrypi.c. Its hwmon driver clears the bits for what has
        # occurred every 2 s on newer kernels, so what was seen is remembered here.
        bits = 0
        for path in self._firmware:
            bits |= integer(read_text(path), 16) or 0
        counted = self._count()
        now = bool(
            bits & _FIRMWARE_NOW
            or any((integer(read_text(path)) or 0) > 0 for path in (*self._voltage, *self._cooling))
            or counted > self._counted
        )
        self._counted = counted
        self._ever |= now or bool(bits >> 16 & _FIRMWARE_NOW)
        return THROTTLED_NOW * now | THROTTLED_SINCE_BOOT * self._ever

    def _count(self) -> int:
        """x86: how often each core and package was slowed down since boot, arch/x86/kernel/cpu/mce/therm_throt.c."""
        return sum(max(0, integer(read_text(path)) or 0) for path in self._counters)


def _slows(kind: str) -> bool:
    kind = kind.strip().lower()
    return (
        kind.startswith(_SLOWING) or "throttle" in kind
    )  # Jetson: cpu-throttle-alert, soc0-throttle-alert, …


def _pressures(hierarchies: tuple[tuple[kernel.Group, ...], ...], proc: Path) -> tuple[str, ...]:
    own = [str(groups[0].folder / "memory.pressure") for groups in hierarchies if groups[0].version == 2]
    return (*own, f"{proc}/pressure/memory")


def _some_avg60(text: str) -> int | None:
    """From ``some avg10=0.00 avg60=1.25 avg300=0.31 total=12345``, percentages, to parts per million."""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["some"]:
            for word in words[1:]:
                name, _, figure = word.partition("=")
                if name == "avg60":
                    return _ppm(figure)
    return None


def _ppm(percent: str) -> int | None:
    try:
        share = float(percent)
    except ValueError:
        return None
    return round(share * 1e4) if 0.0 <= share <= 100.0 else None
