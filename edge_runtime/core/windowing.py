"""When a window opens, when it closes, which span it may claim, and when it leaves the device.

A window closes at a multiple of its period in UTC where the clock is trusted, else when its period has elapsed. The
deadline is kept in monotonic time, so that no clock that is set can stretch a window or lose one. How far the wall
clock was set meanwhile shows when both clocks are compared: a window in which it jumped ends at once and does not
claim to be synced.

All times are integer nanoseconds, wall time since 1970, so 2038 is a second like any other. Monotonic time should go
on while the device sleeps (``CLOCK_BOOTTIME``); where it stops, a sleep looks like a jump and is handled as one.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

JUMP_NS: Final = 2_000_000_000
"""The wall clock jumped when it went this much more or less than the monotonic one since the window was opened.

A leap second is 1 s, smeared or not, and servers that slew stay far below; a clock that is stepped by less misplaces an
edge by less.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPolicy:
    """``min_rows``: a window with fewer rows stays open, because a histogram of one row is that row.

    ``jitter_ns``: devices send a window at their own instants within this long after it closed.
    """

    period_ns: int
    min_rows: int
    jitter_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWindow:
    """A window in progress: when it began by both clocks, whether the wall clock was trusted, and when it is due."""

    start_wall_ns: int
    start_mono_ns: int
    due_mono_ns: int
    synced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What a closed window may claim: ``0 <= start_ns <= end_ns``, to be trusted only when ``synced``."""

    start_ns: int
    end_ns: int
    synced: bool


def open_window(policy: WindowPolicy, *, wall_ns: int, mono_ns: int, synced: bool) -> OpenWindow:
    """A window that starts now and is due at the next multiple of the period.

    Where that is nearer than a tenth of the period (`JUMP_NS` at most) the one after it is meant: a wall clock that is
    slewed reaches the boundary a little before or after the monotonic deadline, and must not leave slivers behind.
    """
    left = policy.period_ns
    if synced:
        left -= wall_ns % policy.period_ns
        if left < min(policy.period_ns // 10, JUMP_NS):
            left += policy.period_ns
    return OpenWindow(start_wall_ns=wall_ns, start_mono_ns=mono_ns, due_mono_ns=mono_ns + left, synced=synced)


def jump_ns(window: OpenWindow, *, wall_ns: int, mono_ns: int) -> int:
    """How far the wall clock was set since the window was opened; negative when backwards."""
    return (wall_ns - window.start_wall_ns) - (mono_ns - window.start_mono_ns)


def is_due(policy: WindowPolicy, window: OpenWindow, *, rows: int, wall_ns: int, mono_ns: int) -> bool:
    """Whether the window may be closed and leave the device: it has rows enough, and its time is over.

    That is at its deadline, or at once when the wall clock jumped. A period that was made shorter since the window was
    opened holds for it too.
    """
    if rows < policy.min_rows:
        return False
    shortened = window.start_mono_ns + policy.period_ns + min(policy.period_ns // 10, JUMP_NS)
    if mono_ns >= min(window.due_mono_ns, shortened):
        return True
    return abs(jump_ns(window, wall_ns=wall_ns, mono_ns=mono_ns)) > JUMP_NS


def close_window(window: OpenWindow, *, wall_ns: int, mono_ns: int, synced: bool) -> Span:
    """The span of a window that ends now.

    It is the wall clock's when that was trusted at both ends and did not jump in between. Else the window lasted as
    long as the monotonic clock says, up to now where the wall clock is trusted by now, and it is not synced.
    """
    start_ns = window.start_wall_ns
    jumped = abs(jump_ns(window, wall_ns=wall_ns, mono_ns=mono_ns)) > JUMP_NS
    if window.synced and synced and not jumped and start_ns >= 0:
        return Span(start_ns=start_ns, end_ns=max(start_ns, wall_ns), synced=True)
    lasted_ns = max(0, mono_ns - window.start_mono_ns)
    end_ns = max(0, wall_ns if synced else start_ns + lasted_ns)
    return Span(start_ns=max(0, end_ns - lasted_ns), end_ns=end_ns, synced=False)


def publish_delay_ns(policy: WindowPolicy, device: str) -> int:
    """How long after a window closed this device begins to send it: always the same, spread evenly over a fleet.

    In ``[0, jitter_ns)``, and below the period, so that a window has left before the next one closes.
    """
    drawn = int.from_bytes(hashlib.sha256(f"skiff-publish-delay {device}".encode()).digest()[:8])
    return drawn * min(policy.jitter_ns, policy.period_ns) >> 64
