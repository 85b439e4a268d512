"""Interleaved timing: the arms take turns, so that a machine that changes speed changes it for all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One arm: the median over rounds of each round's median and 99th percentile, in microseconds; and the spread."""

    p50_us: float
    p99_us: float
    p50_low_us: float
    p50_high_us: float


def interleave(
    arms: Mapping[str, Callable[[int], object]], *, rounds: int = 15, calls: int = 400
) -> dict[str, Timing]:
    """Times every arm ``calls`` times in each of ``rounds`` rounds, in turn; the first round warms up."""
    p50: dict[str, list[float]] = {name: [] for name in arms}
    p99: dict[str, list[float]] = {name: [] for name in arms}
    clock = time.perf_counter_ns
    gc.disable()
    try:
        for turn in range(rounds + 1):
            for name, call in arms.items():
                found = np.empty(calls, np.int64)
                for i in range(calls):
                    start = clock()
                    call(i)
                    found[i] = clock() - start
                if turn:
                    p50[name].append(float(np.median(found)) / 1e3)
                    p99[name].append(float(np.quantile(found, 0.99)) / 1e3)
    finally:
        gc.enable()
    return {
        name: Timing(
            p50_us=statistics.median(p50[name]),
            p99_us=statistics.median(p99[name]),
            p50_low_us=min(p50[name]),
            p50_high_us=max(p50[name]),
        )
        for name in arms
    }
