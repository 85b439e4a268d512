"""Whether what a model costs lies within what was declared."""

import math
from dataclasses import dataclass, replace
from typing import Final

from edge_runtime.contract.latency import LatencyHistogram

MIN_COMPARED: Final = 50
COMPARED_FACTOR: Final = 2.0
COLD_FACTOR: Final = 8
CHANCE: Final = 1e-6
"""How likely rows of a model inside its limit may look too slow; small, for a trial is judged again with every row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits for one model on one device; 0 means no limit."""

    predict_p99_ns: int = 0
    rss_bytes: int = 0

    def tightest(self, other: "Budget") -> "Budget":
        """The stricter limit of each kind."""
        return Budget(
            predict_p99_ns=_stricter(self.predict_p99_ns, other.predict_p99_ns),
            rss_bytes=_stricter(self.rss_bytes, other.rss_bytes),
        )


def _stricter(a: int, b: int) -> int:
    return min(a, b) if a and b else a or b


def on_trial(budget: Budget, incumbent: LatencyHistogram) -> Budget:
    """What a model may spend among everything else that the device does, given what the incumbent spends there.

    The probe holds a model to the budget itself, in a quiet loop. Serving, the same model spends several times as much:
    others empty the caches between two rows (on 2 cores with 20 processes a forest's p99 went from 15 to 115 us of CPU
    time). So a trial is held to twice what the incumbent needs for rows in between, or the budget where that is more;
    to `COLD_FACTOR` times the budget, if that is more, while there are few such rows or none.
    """
    limit = budget.predict_p99_ns
    if limit and incumbent.count < MIN_COMPARED:
        limit *= COLD_FACTOR
    if limit and incumbent.count:
        limit = max(limit, int(COMPARED_FACTOR * incumbent.quantile_ns(0.99)))
    return replace(budget, predict_p99_ns=limit)


def surest_p99_ns(times: LatencyHistogram) -> float:
    """What the p99 behind ``times`` lies above, wrong with a chance of at most `CHANCE`; NaN below 3 rows.

    The p99 of a few rows is their slowest one, which says more about what else the device did than about the model.
    The k-th slowest of n bounds the p99 from below where k rows in the slowest hundredth would be that unlikely, by
    Hoeffding's bound on a binomial tail (Probability inequalities for sums of bounded random variables, 1963,
    theorem 1).
    """
    n = times.count
    for k in range(n // 100 + 1, n + 1):
        if n * _divergence(k / n, 0.01) >= -math.log(CHANCE):
            return times.quantile_ns((n - k + 0.5) / n)
    return float("nan")


def _divergence(a: float, b: float) -> float:
    """Kullback and Leibler's, of a coin of chance ``a`` from one of chance ``b``, in nats."""
    return sum(x * math.log(x / y) for x, y in ((a, b), (1.0 - a, 1.0 - b)) if x)


def breaches(budget: Budget, *, predict_p99_ns: float, rss_bytes: int) -> list[str]:
    """Every limit that is passed, as a sentence with both figures; empty when all is well."""
    found = []
    if budget.predict_p99_ns and predict_p99_ns > budget.predict_p99_ns:
        found.append(
            f"predict p99 of {predict_p99_ns / 1e3:.1f} us CPU is above "
            f"the budget of {budget.predict_p99_ns / 1e3:.1f} us"
        )
    if budget.rss_bytes and rss_bytes > budget.rss_bytes:
        found.append(
            f"RSS of {rss_bytes / 1e6:.1f} MB is above the budget of {budget.rss_bytes / 1e6:.1f} MB"
        )
    return found
