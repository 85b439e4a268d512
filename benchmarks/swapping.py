"""``python -m benchmarks.swapping``: what `benchmarks.swaps` runs, in a process that imports what a device does.

One JSON object on stdin: ``models``, paths of two artifacts; ``rows``, of an ``.npy`` file; ``swaps``, ``predictions``
and ``switch_seconds``. One on stdout.
"""

import json
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.adapters.probes import Probes
from edge_runtime.contract.errors import SkiffError
from edge_runtime.engine import Engine, trim_memory
from edge_runtime.runtime import Runtime

WARM_UP = 10
"""Memory is compared after a tenth of the swaps: before, numpy, ONNX Runtime and the C library fill their caches."""


@dataclass(slots=True)
class _Reader:
    """What the thread that predicts has seen."""

    runtime: Runtime
    rows: list[NDArray[np.float32]]
    stop: threading.Event = field(default_factory=threading.Event)
    answers: int = 0
    failures: int = 0
    gap_ns: int = 0
    """The longest time without an answer since it was last set to 0."""

    def work(self) -> None:
        clock, rows, n = time.perf_counter_ns, self.rows, len(self.rows)
        last = clock()
        while not self.stop.is_set():
            try:
                self.runtime.predict(rows[self.answers % n])
            except SkiffError:
                self.failures += 1
            self.answers += 1
            now = clock()
            self.gap_ns = max(self.gap_ns, now - last)
            last = now


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Figures of the job."""
    models = [Path(path).read_bytes() for path in job["models"]]
    rows = [np.ascontiguousarray(row) for row in np.load(job["rows"])]
    reader = _Reader(Runtime(models[0]), rows)
    sys.setswitchinterval(job["switch_seconds"])
    thread = threading.Thread(target=reader.work)
    thread.start()
    try:
        figures = _swap(reader, models, job["swaps"], job["predictions"])
    finally:
        reader.stop.set()
        thread.join()
    counted = figures.pop("counted") + reader.runtime.take_window().rows
    return {
        **figures,
        "predictions": reader.answers,
        "failed": reader.failures,
        "not counted": reader.answers - reader.failures - counted,
    }


def _swap(reader: _Reader, models: list[bytes], swaps: int, predictions: int) -> dict[str, Any]:
    loading, swapping, neither = (np.zeros(swaps) for _ in range(3))
    counted = warm = 0
    for i in range(swaps):
        if i == swaps // WARM_UP:
            warm = _rss_bytes()
        reader.gap_ns = 0
        engine = Engine(models[(i + 1) % 2])
        loading[i], reader.gap_ns = reader.gap_ns, 0
        counted += reader.runtime.swap(engine).rows
        swapping[i], reader.gap_ns = reader.gap_ns, 0
        del engine
        time.sleep(0.001)
        neither[i] = reader.gap_ns
        while reader.answers < predictions * (i + 1) // swaps:
            time.sleep(0.001)
        counted += reader.runtime.take_window().rows
    rss = _rss_bytes()
    named = {"swapping": swapping, "loading": loading, "neither": neither}
    return {
        "swaps": swaps,
        "counted": counted,
        "rss MB": round(rss / 1e6, 1),
        "rss growth kB": (rss - warm) // 1000,
        **{
            f"gap ms, {when}: p50, p99, max": [
                round(float(np.quantile(gaps, q)) / 1e6, 2) for q in (0.5, 0.99, 1.0)
            ]
            for when, gaps in named.items()
        },
    }


def _rss_bytes() -> int:
    trim_memory()
    return Probes().rss_bytes()


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
