"""How long to wait before trying again."""

import random


def next_delay_seconds(attempt: int, rng: random.Random, *, base: float = 0.5, cap: float = 60.0) -> float:
    """Full jitter: uniform in ``[0, min(cap, base * 2**attempt)]`` seconds, for attempts 0, 1, 2 and so on.

    A fleet that lost its broker at one instant does not come back at one instant. Source: M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return rng.uniform(0.0, min(cap, base * 2.0 ** min(attempt, 32)))
