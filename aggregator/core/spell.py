"""A part that fails for a while: begun again later each time, its trouble told once and its end once."""

from collections.abc import Callable


class Spell:
    """``delay`` says how many seconds to rest, from the number of failures before in this spell.

    A spell is over when nothing failed for ``calm_seconds``: with 0 at the first success. Times are monotonic seconds.
    """

    def __init__(self, delay: Callable[[int], float], *, calm_seconds: float = 0.0) -> None:
        self._delay = delay
        self._calm_seconds = calm_seconds
        self._failures = 0
        self._since = self._last = self._not_before = 0.0

    @property
    def lasts(self) -> bool:
        """Whether there is trouble."""
        return self._failures > 0

    def may(self, now_seconds: float) -> bool:
        """Whether to try."""
        return not self._failures or now_seconds >= self._not_before

    def failed(self, now_seconds: float) -> bool:
        """Counts a failure; True when it is the first of a spell."""
        if not self._failures:
            self._since = now_seconds
        self._last = now_seconds
        self._not_before = now_seconds + self._delay(self._failures)
        self._failures += 1
        return self._failures == 1

    def worked(self, now_seconds: float) -> float | None:
        """Counts a success; how many seconds the spell lasted when it is over now."""
        if not self._failures or now_seconds < self._last + self._calm_seconds:
            return None
        self._failures = 0
        return now_seconds - self._since
