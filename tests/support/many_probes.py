"""Proves a forest of a hundred deep trees in a process of its own, and prints what that took as JSON.

Usage: python -m tests.support.many_probes PROBES
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from converters import convert


def peak_bytes():
    """The largest resident size of this process so far; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(probes):
    X, y = make_classification(
        5000, 20, n_informative=12, n_redundant=0, n_classes=4, flip_y=0.1, random_state=0
    )
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(100, random_state=0)).fit(X, y)
    calls = []
    before, start = peak_bytes(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        artifact = convert(
            pipeline,
            X,
            Path(folder) / "m.onnx",
            probes=probes,
            progress=lambda stage, done, total: calls.append((stage, done, total, peak_bytes())),
        )
    report = artifact.report
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time(),
        "depth": max(tree.get_depth() for tree in pipeline[-1].estimators_),
        "splits": 0 if report.coverage is None else report.coverage.splits,
        "rows": report.rows,
        "wrong": report.label_mismatches + report.score_mismatches,
        "before_bytes": before,
        "peak_bytes": peak_bytes(),
        "calls": calls,
    }


if __name__ == "__main__":
    json.dump(main(int(sys.argv[1])), sys.stdout)
