"""One row through `Runtime.predict` against its peers on the same trained pipeline.

``bare``: ``session.run(None, {…})`` on the plain skl2onnx graph (ZipMap off), same thread settings, nothing watched.
``script``: what one would write by hand around it: check the row, time it, keep a histogram per feature.
``runtime``: skiff's data plane on skiff's artifact: checked, timed, counted, outputs owned by the caller.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.measure import interleave
from benchmarks.peers import plain
from converters import convert
from converters import signature as signatures
from edge_runtime.runtime import Runtime
from trainer.datasets import load_watch


class _Script:
    """A careful engineer's afternoon: everything the runtime does, row by row."""

    def __init__(self, session: ort.InferenceSession, edges: list[NDArray[np.float32]]) -> None:
        self._session = session
        self._name = session.get_inputs()[0].name
        self._edges = edges
        self._counts = [np.zeros(e.size + 1, np.int64) for e in edges]
        self._latencies: list[int] = []

    def predict(self, row: NDArray[np.float32]) -> list[Any]:
        start = time.perf_counter_ns()
        if not np.isfinite(row).all():
            raise ValueError("row is not finite")
        found: list[Any] = self._session.run(None, {self._name: row[None]})
        for j, edges in enumerate(self._edges):
            self._counts[j][np.searchsorted(edges, row[j])] += 1
        self._latencies.append(time.perf_counter_ns() - start)
        return found


def _arms(
    runtime: Runtime, session: ort.InferenceSession, script: _Script, rows: list[NDArray[np.float32]]
) -> dict[str, Callable[[int], object]]:
    key = session.get_inputs()[0].name

    def ours(i: int) -> object:
        return runtime.predict(rows[i])

    def bare(i: int) -> object:
        return session.run(None, {key: rows[i][None]})

    def by_hand(i: int) -> object:
        return script.predict(rows[i])

    return {"runtime": ours, "bare": bare, "script": by_hand}


def run() -> list[dict[str, Any]]:
    """One row of figures per model."""
    data = load_watch().select(people=(1, 2, 3, 4, 5, 6), wrists=(0,))
    x, y = data.features, np.asarray(data.label_names)[data.labels]
    models = {
        "logistic": LogisticRegression(max_iter=300),
        "forest of 100": RandomForestClassifier(100, max_depth=8, min_samples_leaf=40, random_state=0),
    }
    rows = [np.ascontiguousarray(row) for row in x[:: max(1, len(x) // 400)][:400]]
    found = []
    for name, model in models.items():
        pipeline = make_pipeline(StandardScaler(), model).fit(x, y)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            artifact = convert(pipeline, x, out=path, name="bench", version="1", probes=5_000)
            runtime = Runtime(artifact.path)
            edges = [np.asarray(c.edges, np.float32) for c in runtime.engine.info.reference.spec.features]
        session = plain(pipeline, x, signatures.read(pipeline)).session
        assert session is not None, "skl2onnx converts scalers, linear models and forests"
        timings = interleave(_arms(runtime, session, _Script(session, edges), rows))
        bare, script_time, ours = timings["bare"], timings["script"], timings["runtime"]
        found.append(
            {
                "model": name,
                "runtime p50 us": round(ours.p50_us, 2),
                "bare p50 us": round(bare.p50_us, 2),
                "script p50 us": round(script_time.p50_us, 2),
                "runtime / bare": round(ours.p50_us / bare.p50_us, 3),
                "runtime / script": round(ours.p50_us / script_time.p50_us, 3),
                "runtime p99 / p50": round(ours.p99_us / ours.p50_us, 2),
                "runtime p50 spread us": [round(ours.p50_low_us, 2), round(ours.p50_high_us, 2)],
            }
        )
    return found
