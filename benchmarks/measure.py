"""Interleaved timing: the arms take turns, so that a machine that changes speed changes it for all of them."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_FEWEST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One arm: the median over rounds of each round's median and 99th percentile, in microseconds; and the spread."""

    p50_us: float
    p99_us: float
    p50_low_us: float
    p50_high_us: float
    mean_us: float
    """The mean of all calls of a round, the slowest hundredth left out; the median over rounds."""
    rounds_us: tuple[float, ...]
    """Each round's median. Rounds with the same number of different arms ran one after the other."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times slower one arm is than another: the median over rounds, and the middle half of them."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        """The middle, and the range in brackets."""
        return f"{_short(self.middle)} ({_short(self.low)}-{_short(self.high)})"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def ratio(arm: Timing, peer: Timing) -> Ratio:
    """``arm`` over ``peer``, round by round: what slows a whole round down cancels."""
    return median_of_rounds(arm.rounds_us, peer.rounds_us)


def median_of_rounds(arm: Sequence[float], peer: Sequence[float]) -> Ratio:
    """One figure per round of each arm, the rounds in the same order."""
    each = np.asarray(arm) / np.asarray(peer)
    low, middle, high = np.quantile(each, [0.25, 0.5, 0.75])
    return Ratio(float(middle), float(low), float(high))


def interleave(
    arms: Mapping[str, Callable[[int], object]],
    *,
    rounds: int = 15,
    calls: int = 400,
    round_seconds: float = math.inf,
) -> dict[str, Timing]:
    """Times every arm ``calls`` times in each of ``rounds`` rounds, in turn; the first round warms up.

    An arm that takes longer than ``round_seconds`` makes do with the calls it has had by then, five at least.
    """
    p50: dict[str, list[float]] = {name: [] for name in arms}
    p99: dict[str, list[float]] = {name: [] for name in arms}
    mean: dict[str, list[float]] = {name: [] for name in arms}
    clock = time.perf_counter_ns
    gc.disable()
    try:
        for turn in range(rounds + 1):
            for name, call in arms.items():
                found = np.empty(calls, np.int64)
                last = clock() + min(round_seconds, 1e6) * 1e9
                done = 0
                for i in range(calls):
                    start = clock()
                    call(i)
                    end = clock()
                    found[i] = end - start
                    done = i + 1
                    if end > last and done >= _FEWEST:
                        break
                if turn:
                    p50[name].append(float(np.median(found[:done])) / 1e3)
                    p99[name].append(float(np.quantile(found[:done], 0.99)) / 1e3)
                    quick = np.sort(found[:done])[: max(1, done - done // 100)]
                    mean[name].append(float(quick.mean()) / 1e3)
    finally:
        gc.enable()
    return {
        name: Timing(
            p50_us=statistics.median(p50[name]),
            p99_us=statistics.median(p99[name]),
            p50_low_us=min(p50[name]),
            p50_high_us=max(p50[name]),
            mean_us=statistics.median(mean[name]),
            rounds_us=tuple(p50[name]),
        )
        for name in arms
    }
