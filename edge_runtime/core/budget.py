"""Whether what a model costs lies within what was declared."""

from dataclasses import dataclass, replace
from typing import Final

from edge_runtime.contract.latency import LatencyHistogram

MIN_COMPARED: Final = 50
COMPARED_FACTOR: Final = 2.0
COLD_FACTOR: Final = 8


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
