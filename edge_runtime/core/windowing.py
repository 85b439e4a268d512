"""When a window opens and closes.

A window closes at a multiple of its period in UTC where the clock is trusted, else when its period has
elapsed. The deadline is kept in monotonic time, so a clock that jumps misaligns one window and loses none.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPolicy:
    """``min_rows``: a window with fewer rows stays open, because a histogram of one row is that row."""

    period_ns: int
    min_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWindow:
    """A window in progress: when it began by the wall clock, and when it is due by the monotonic one."""

    start_wall_ns: int
    due_mono_ns: int


def open_window(policy: WindowPolicy, *, wall_ns: int, mono_ns: int, synced: bool) -> OpenWindow:
    """A window that starts now and is due at the next multiple of the period."""
    left = policy.period_ns - wall_ns % policy.period_ns if synced else policy.period_ns
    return OpenWindow(start_wall_ns=wall_ns, due_mono_ns=mono_ns + left)


def is_due(policy: WindowPolicy, window: OpenWindow, *, rows: int, mono_ns: int) -> bool:
    """Whether the window may be closed and leave the device."""
    return mono_ns >= window.due_mono_ns and rows >= policy.min_rows
