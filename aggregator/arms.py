"""What the gates of rollouts want to know of the telemetry store."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Final

from aggregator.core.coordinator import Ask
from aggregator.core.gates import Evidence
from aggregator.records import Selection
from aggregator.stores import WindowStore
from edge_runtime.contract.ids import RolloutId

LATENCY_WINDOWS: Final = 500
"""Latencies of an arm are read from so many of its newest windows: each is a histogram of its own."""
REST: Final = 9.0
"""After the gates' questions the store rests for so many times as long as they took: they get a tenth of the time."""


class Arms:
    """The windows of each rollout's arms.

    That takes the longer the more devices there are and the longer a stage lasts. So what was found stands for a
    while, unless another stage begins: in a small fleet for less than a tick, in one where it takes a second for nine.
    """

    def __init__(self, windows: WindowStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._windows = windows
        self._clock = clock
        self._found: dict[Ask, tuple[Evidence, float]] = {}

    def evidence(self, asks: Iterable[Ask]) -> dict[RolloutId, Evidence]:
        """What is known for each of ``asks``."""
        found = {}
        for ask in asks:
            stage = replace(ask, devices=())  # a device that joins does not make it another question
            kept = self._found.get(stage)
            if kept is None or self._clock() >= kept[1]:
                began = self._clock()
                evidence = self._ask(ask)
                ended = self._clock()
                kept = evidence, ended + REST * (ended - began)
            found[stage] = kept
        self._found = found
        return {stage.rollout: evidence for stage, (evidence, _) in found.items()}

    def _ask(self, ask: Ask) -> Evidence:
        # A stage that lasts longer than retention is judged by what is left of it.
        arm = partial(Selection, devices=ask.devices, leave_out_cut_days=True)
        arms = [arm(digest=ask.candidate, since_ns=ask.candidate_since_ns)]
        if ask.incumbent is not None:
            arms.append(arm(digest=ask.incumbent, since_ns=ask.incumbent_since_ns))
        totals = [self._windows.totals(arm) for arm in arms]
        latency = [self._windows.latency(replace(arm, last=LATENCY_WINDOWS)) for arm in arms]
        if ask.incumbent is None:
            return Evidence(candidate=totals[0], candidate_latency=latency[0])
        return Evidence(
            candidate=totals[0],
            control=totals[1],
            candidate_latency=latency[0],
            control_latency=latency[1],
        )
