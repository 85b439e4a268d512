"""One thread predicts, another loads and swaps models: memory, failed predictions, and time without an answer.

``python -m benchmarks.swaps`` takes some minutes; ``--swaps 200 --predictions 100000`` some seconds. The work itself is
done by `benchmarks.swapping` in a process of its own, so that the memory is a device's and not scikit-learn's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from converters import convert
from edge_runtime.skiffd import SWITCH_SECONDS
from trainer.datasets import load_watch


def run(
    *, swaps: int = 10_000, predictions: int = 10_000_000, switch_seconds: float = SWITCH_SECONDS
) -> dict[str, Any]:
    """Figures of ``swaps`` swaps, a new engine each time, while at least ``predictions`` rows are predicted.

    ``switch_seconds`` is the interpreter's switch interval: so long a thread that computes in Python may keep the
    others waiting.
    """
    data = load_watch().select(people=(1, 2, 3, 4, 5, 6), wrists=(0,))
    x, y = data.features, np.asarray(data.label_names)[data.labels]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"model{i}.onnx" for i in range(2)]
        for path, penalty in zip(paths, (1.0, 0.1), strict=True):
            pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=300))
            convert(pipeline.fit(x, y), x, out=path, name="bench", probes=2_000)
        rows = Path(folder) / "rows.npy"
        np.save(rows, x[:400])
        job = {
            "models": [str(path) for path in paths],
            "rows": str(rows),
            "swaps": swaps,
            "predictions": predictions,
            "switch_seconds": switch_seconds,
        }
        child = [sys.executable, "-m", "benchmarks.swapping"]
        done = subprocess.run(child, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.swaps``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swaps", description=__doc__)
    parser.add_argument("--swaps", type=int, default=10_000)
    parser.add_argument("--predictions", type=int, default=10_000_000)
    parser.add_argument("--switch-seconds", type=float, default=SWITCH_SECONDS)
    given = parser.parse_args(arguments)
    figures = run(swaps=given.swaps, predictions=given.predictions, switch_seconds=given.switch_seconds)
    print("\n".join(f"{head:36} {value}" for head, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
