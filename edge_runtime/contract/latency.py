"""Latency as a base-2 exponential histogram, in the layout of OpenTelemetry's exponential histogram.

At scale ``s`` the base is ``2 ** (2 ** -s)`` and bucket ``i`` holds ``(base**i, base**(i+1)]``. Counts are
integers, so merging is exact; a quantile read from the middle of its bucket is off by at most
`relative_error` of the value. https://opentelemetry.io/docs/specs/otel/metrics/data-model/#exponentialhistogram
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ContractError

SCALE = 3
MAX_BUCKETS = 64 << SCALE


def relative_error(scale: int = SCALE) -> float:
    """The largest relative error of a quantile at ``scale`` (0.0433 at scale 3)."""
    base = math.exp2(2.0**-scale)
    return (base - 1.0) / (base + 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyHistogram:
    """Counts of durations in nanoseconds; ``counts[k]`` belongs to bucket ``offset + k``.

    ``counts`` is trimmed (no zero at either end), so that equal histograms compare equal.
    ``zero`` counts durations of 0 ns; ``sum_ns`` and ``max_ns`` are exact.
    """

    offset: int = 0
    counts: tuple[int, ...] = ()
    zero: int = 0
    sum_ns: int = 0
    max_ns: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.offset <= MAX_BUCKETS - len(self.counts):
            raise ContractError(f"latency: buckets {self.offset}+{len(self.counts)} lie beyond {MAX_BUCKETS}")
        if self.counts and (not self.counts[0] or not self.counts[-1]):
            raise ContractError("latency: counts must not begin or end with a zero")
        if not self.counts and self.offset:
            raise ContractError("latency: an empty histogram has offset 0")

    @property
    def count(self) -> int:
        """How many durations were recorded."""
        return sum(self.counts) + self.zero

    def merge(self, other: "LatencyHistogram") -> "LatencyHistogram":
        """The histogram of both sets of durations; associative, commutative and exact."""
        parts = [h for h in (self, other) if h.counts]
        low = min((h.offset for h in parts), default=0)
        high = max((h.offset + len(h.counts) for h in parts), default=0)
        total = [0] * (high - low)
        for part in parts:
            for k, n in enumerate(part.counts, part.offset - low):
                total[k] += n
        return LatencyHistogram(
            offset=low,
            counts=tuple(total),
            zero=self.zero + other.zero,
            sum_ns=self.sum_ns + other.sum_ns,
            max_ns=max(self.max_ns, other.max_ns),
        )

    def quantile_ns(self, q: float) -> float:
        """The ``q``-quantile (0 to 1) in nanoseconds within `relative_error`; NaN when nothing was recorded.

        The value returned is the one whose relative distance to both ends of the bucket is equal, and
        never more than ``max_ns``.
        """
        n = self.count
        if not n:
            return float("nan")
        rank = min(n - 1, int(q * n))
        if rank < self.zero:
            return 0.0
        seen = self.zero
        base = math.exp2(2.0**-SCALE)
        for k, c in enumerate(self.counts):
            seen += c
            if rank < seen:
                low = math.exp2((self.offset + k) / (1 << SCALE))
                return min(low * 2.0 * base / (1.0 + base), float(self.max_ns))
        raise AssertionError("unreachable: the ranks cover every count")


NONE: Final = LatencyHistogram()
"""No duration recorded; merging with it changes nothing."""


def observe_ns(durations_ns: NDArray[np.int64]) -> LatencyHistogram:
    """The histogram of an ``(n,)`` array of durations in nanoseconds; negative ones count as zero."""
    positive = durations_ns[durations_ns > 0]
    zero = int(durations_ns.size - positive.size)
    if not positive.size:
        return LatencyHistogram(zero=zero)
    index = np.ceil(np.log2(positive.astype(np.float64)) * (1 << SCALE)).astype(np.int64) - 1
    np.maximum(index, 0, out=index)
    offset = int(index.min())
    counts = np.bincount(index - offset)
    return LatencyHistogram(
        offset=offset,
        counts=tuple(counts.tolist()),
        zero=zero,
        sum_ns=int(positive.sum()),
        max_ns=int(positive.max()),
    )
