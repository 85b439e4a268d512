"""One row, and a batch, through `Runtime.predict` against its peers on the same trained pipeline.

``bare``: ``session.run(None, {…})`` on the plain skl2onnx graph (ZipMap off), same thread settings, nothing watched.
``script``: what one would write by hand around it: check the row, time it, keep a histogram per feature.
``runtime``: skiff's data plane on skiff's artifact: checked, timed, counted, outputs owned by the caller.

``python -m benchmarks.predict`` runs this alone.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.measure import Timing, interleave, ratio
from benchmarks.peers import plain
from converters import convert
from converters import signature as signatures
from edge_runtime.contract.profile import Binner
from edge_runtime.runtime import Runtime
from trainer.datasets import load_watch

BATCH = 256


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
    names = [feature.name for feature in runtime.engine.info.manifest.features]
    lists = [[float(value) for value in row] for row in rows]
    mappings = [dict(zip(names, row, strict=True)) for row in lists]
    return {
        "runtime": lambda i: runtime.predict(rows[i]),
        "bare": lambda i: session.run(None, {key: rows[i][None]}),
        "script": lambda i: script.predict(rows[i]),
        "mapping": lambda i: runtime.predict(mappings[i]),
        "list": lambda i: runtime.predict(lists[i]),
    }


def _batch_arms(
    runtime: Runtime, session: ort.InferenceSession, batch: NDArray[np.float32]
) -> dict[str, Callable[[int], object]]:
    key = session.get_inputs()[0].name
    labels, scores = runtime.engine.run(batch)
    assert labels is not None, "these are classifiers"
    manifest = runtime.engine.info.manifest
    binner = Binner(runtime.engine.info.reference.spec, probabilities=manifest.probabilities)
    return {
        "runtime": lambda _: runtime.predict(batch),
        "bare": lambda _: session.run(None, {key: batch}),
        "binning": lambda _: binner.observe(batch, labels, scores),
    }


def run(told: Callable[[str], object] = str) -> list[dict[str, Any]]:
    """One row of figures per model; ``told`` is called with each model's name before it is trained."""
    data = load_watch().select(people=(1, 2, 3, 4, 5, 6), wrists=(0,))
    x, y = data.features, np.asarray(data.label_names)[data.labels]
    models = {
        "logistic": LogisticRegression(max_iter=300),
        "forest of 100": RandomForestClassifier(100, max_depth=8, min_samples_leaf=40, random_state=0),
        "gradient boosting": GradientBoostingClassifier(random_state=0),
        "hist. gradient boosting": HistGradientBoostingClassifier(random_state=0),
    }
    rows = [np.ascontiguousarray(row) for row in x[:: max(1, len(x) // 400)][:400]]
    found = []
    for name, model in models.items():
        told(name)
        pipeline = make_pipeline(StandardScaler(), model).fit(x, y)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            artifact = convert(pipeline, x, out=path, name="bench", version="1", probes=5_000)
            runtime = Runtime(artifact.path)
        edges = [np.asarray(c.edges, np.float32) for c in runtime.engine.info.reference.spec.features]
        session = plain(pipeline, x, signatures.read(pipeline)).session
        assert session is not None, "skl2onnx converts scalers, linear models and trees"
        single = interleave(_arms(runtime, session, _Script(session, edges), rows), rounds=15, calls=200)
        batch = np.ascontiguousarray(x[:: max(1, len(x) // BATCH)][:BATCH])
        batches = interleave(_batch_arms(runtime, session, batch), rounds=15, calls=20)
        found.append({"model": name, **_figures(single, batches)})
    return found


def _figures(single: dict[str, Timing], batches: dict[str, Timing]) -> dict[str, Any]:
    ours, bare = single["runtime"], single["bare"]
    return {
        "runtime p50 us": round(ours.p50_us, 2),
        "bare p50 us": round(bare.p50_us, 2),
        "script p50 us": round(single["script"].p50_us, 2),
        "runtime / bare": ratio(ours, bare),
        "runtime / script": ratio(ours, single["script"]),
        "runtime p99/p50": round(ours.p99_us / ours.p50_us, 2),
        "bare p99/p50": round(bare.p99_us / bare.p50_us, 2),
        "mapping adds us": round(single["mapping"].p50_us - ours.p50_us, 2),
        "list adds us": round(single["list"].p50_us - ours.p50_us, 2),
        "256 rows / bare": ratio(batches["runtime"], batches["bare"]),
        "binning us/row": round(batches["binning"].p50_us / BATCH, 2),
        "256 rows, binned too / bare": round(batches["runtime"].mean_us / batches["bare"].mean_us, 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.predict``."""
    argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__).parse_args(arguments)
    for figures in run(told=lambda name: print(f"... {name}", file=sys.stderr)):
        print("\n".join(f"{head:28} {value}" for head, value in figures.items()), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
