"""Whether the wall clock is kept right by somebody.

Source: adjtimex(2). An NTP client (timesyncd, chrony, ntpd) clears ``STA_UNSYNC`` when it has set the clock and the
kernel sets it again when nobody is heard of for too long. Reading needs no privilege; a few container managers
(systemd-nspawn) forbid the call all the same.
"""

import ctypes
from pathlib import Path
from typing import Final

_STA_UNSYNC: Final = 0x0040
_TIMEX_BYTES: Final = 512
"""More than ``struct timex`` has anywhere (208 on 64-bit Linux)."""
_STATUS_OFFSET: Final = 40
"""Of ``int status`` on 64-bit Linux: ``unsigned modes``, padding, then four ``long``."""
_TIMESYNCD: Final = Path("/run/systemd/timesync/synchronized")
"""Touched by systemd-timesyncd at each synchronisation since the boot."""


def is_synced(timesyncd: Path = _TIMESYNCD) -> bool | None:
    """Whether the kernel says that the clock is synchronised; None where it does not say.

    Where the call is forbidden (a seccomp filter), the mark that systemd-timesyncd leaves has to do.
    """
    status = _kernel_status()
    if status is not None:
        return not status & _STA_UNSYNC
    return True if timesyncd.exists() else None


def _kernel_status() -> int | None:
    """``timex.status``; None where the C library or the kernel refuses."""
    if ctypes.sizeof(ctypes.c_long) != 8:
        return None
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes = 0: nothing is set
    try:
        result = ctypes.CDLL(None).adjtimex(timex)
    except (OSError, AttributeError):
        return None
    return None if result < 0 else ctypes.c_int.from_buffer(timex, _STATUS_OFFSET).value
