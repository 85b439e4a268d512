"""``python -m benchmarks.swapping``: what `benchmarks.swaps` runs, in a process that imports what a device does.

One JSON object on stdin: ``models``, paths of two artifacts; ``rows``, of an ``.npy`` file; ``swaps``, ``predictions``
and ``switch_seconds``. One on stdout.

A gap is the time between two answers. For each swap there are three figures: the longest gap that overlaps the loading
of the model, the one that overlaps the call of `Runtime.swap`, and, as a control, the one that overlaps as long a time
just before in which nothing is loaded.
"""

import gc
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.adapters.probes import Probes
from edge_runtime.contract.errors import SkiffError
from edge_runtime.engine import Engine, trim_memory
from edge_runtime.runtime import Runtime

import onnxruntime as ort  # isort: skip  (after the engine, which turns its telemetry off)

WARM_UP: Final = 2_000
"""Memory is compared after so many swaps, and after a fifth where there are fewer: CPython 3.11 keeps up to 2,000
dropped tuples of each length up to 20, and a model that is read adds one or several of some lengths. Growth from the
start is reported beside it."""

_SHORT_NS: Final = 50_000
"""Shorter gaps count as none."""
_PAUSE_SECONDS: Final = 0.002


@dataclass(slots=True)
class _Reader:
    """What the thread that predicts has seen; ``gaps`` has the beginnings and ends of gaps, in ns."""

    runtime: Runtime
    rows: list[NDArray[np.float32]]
    stop: threading.Event = field(default_factory=threading.Event)
    answers: int = 0
    failures: int = 0
    last_ns: int = 0
    gaps: list[tuple[int, int]] = field(default_factory=list)

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
            if now - last > _SHORT_NS:
                self.gaps.append((last, now))
            self.last_ns = last = now

    def longest_ms(self, start_ns: int, end_ns: int) -> float:
        """The longest gap that overlaps this time; waits until that is known."""
        while self.last_ns <= end_ns:
            time.sleep(_PAUSE_SECONDS / 2)
        return max((e - s for s, e in self.gaps if s < end_ns and e > start_ns), default=0) / 1e6


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Figures of the job."""
    models = [Path(path).read_bytes() for path in job["models"]]
    rows = [np.ascontiguousarray(row) for row in np.load(job["rows"])]
    reader = _Reader(Runtime(models[0]), rows)
    sys.setswitchinterval(job["switch_seconds"])
    gc.freeze()  # as `skiffd` does
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
        "a bare session leaves bytes": _bare(models, max(10, job["swaps"] // 5)),
    }


def _swap(reader: _Reader, models: list[bytes], swaps: int, predictions: int) -> dict[str, Any]:
    clock = time.perf_counter_ns
    loading, swapping, neither = (np.zeros(swaps) for _ in range(3))
    counted = took_ns = first = warm = 0
    for i in range(swaps):
        if i == min(10, swaps - 1):
            first = _rss_bytes()
        if i == min(WARM_UP, swaps // 5):
            warm = _rss_bytes()
        time.sleep(_PAUSE_SECONDS)
        reader.gaps = []
        start = clock()
        time.sleep(took_ns / 1e9)
        end = clock()
        neither[i] = reader.longest_ms(start, end)
        start = clock()
        engine = Engine(models[(i + 1) % 2])
        loaded = clock()
        counted += reader.runtime.swap(engine).rows
        end = clock()
        took_ns = end - start
        del engine
        loading[i], swapping[i] = reader.longest_ms(start, loaded), reader.longest_ms(loaded, end)
        while reader.answers < predictions * (i + 1) // swaps:
            time.sleep(_PAUSE_SECONDS)
        counted += reader.runtime.take_window().rows
    rss = _rss_bytes()
    named = {"swapping": swapping, "loading": loading, "neither": neither[1:]}
    return {
        "swaps": swaps,
        "counted": counted,
        "rss MB": round(rss / 1e6, 1),
        "rss growth kB": (rss - warm) // 1000,
        "rss growth kB, from the start": (rss - first) // 1000,
        **{
            f"gap ms, {when}: p50, p99, max": [
                round(float(np.quantile(gaps, q)), 2) for q in (0.5, 0.99, 1.0)
            ]
            for when, gaps in named.items()
        },
    }


def _bare(models: list[bytes], sessions: int) -> int:
    """What memory ONNX Runtime itself keeps of each session made and dropped, in bytes."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_cpu_mem_arena = 1, False
    before = 0
    for i in range(2 * sessions):  # the first half warms up
        if i == sessions:
            before = _rss_bytes()
        ort.InferenceSession(models[i % 2], options, providers=["CPUExecutionProvider"])
    return (_rss_bytes() - before) // sessions


def _rss_bytes() -> int:
    trim_memory()
    return Probes().rss_bytes()


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
