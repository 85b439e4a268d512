"""How long to wait before trying again, and whether it is time."""

import math
import random


def next_delay_seconds(
    attempt: int, rng: random.Random, *, base: float = 0.5, cap: float = 60.0, least: float = 0.0
) -> float:
    """Full jitter: uniform in ``[0, min(cap, base * 2**attempt)]`` seconds, for attempts 0, 1, 2 and so on.

    With ``least``, at least that share of the longest: for what must not be tried at once again by any chance.

    A fleet that lost its broker at one instant does not come back at one instant. Source: M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    longest = min(cap, base * 2.0 ** min(attempt, 32))
    return rng.uniform(least * longest, longest)


class Every:
    """Says when a period has passed; the first time at once."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = -math.inf

    def due(self, now_seconds: float) -> bool:
        """Whether it is time again; ``now_seconds`` is monotonic."""
        if now_seconds < self._next:
            return False
        self._next = now_seconds + self._seconds
        return True
