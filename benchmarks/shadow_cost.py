"""``python -m benchmarks.shadow_cost``: what a candidate in the shadow costs the rows of the model in service.

Two arms, in turn: `Runtime.predict` alone, and with a shadow that compares all the time (rows are offered faster than
it may read them). Once on all processors, once with everything on one, as on the smallest boards. The share is of the
CPU that the shadow's process really used, from ``/proc``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.measure import median_of_rounds
from edge_runtime.adapters.slots import Slots
from edge_runtime.config import load
from edge_runtime.contract.ids import digest_of
from edge_runtime.core.events import Shadowed
from edge_runtime.runtime import Runtime
from edge_runtime.shadowing import Shadowing

ROUNDS: Final = 20
ROWS: Final = 40_000
HEARD_ROWS: Final = 2_000
START_SECONDS: Final = 60.0
"""The shadow's process imports ONNX Runtime and loads two models first."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")

_CONFIG = """
[device]
id = "bench"
fleet = "bench"
state_dir = "state"
[broker]
port = 1
[model]
name = "bench"
trust_root = "root.json"
[update]
shadow_cpu_share = {share}
"""


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Figures of one pair of models; on one processor when the job says so."""
    if job["one"]:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    rows = [np.ascontiguousarray(row) for row in np.load(job["rows"])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "skiffd.toml"
        path.write_text(_CONFIG.format(share=job["share"]), encoding="utf-8")
        config = load(path)
        slots = Slots(config.state_dir)
        digests = []
        for model in job["models"]:
            data = Path(model).read_bytes()
            digests.append(digest_of(data))
            slots.blob(digests[-1]).write_bytes(data)
        woken = threading.Event()
        shadowing = Shadowing(config, slots, wake=woken.set)
        runtime = Runtime(slots.blob(digests[0]))
        shadowing.follow(digests[1], digests[0])
        try:
            return _turns(runtime, shadowing, rows)
        finally:
            shadowing.stop()


def _turns(runtime: Runtime, shadowing: Shadowing, rows: list[Any]) -> dict[str, Any]:
    deadline = time.monotonic() + START_SECONDS
    sample = np.stack(rows[:64])
    while not any(isinstance(said, Shadowed) for said in shadowing.listen()):
        shadowing.offer(sample)
        time.sleep(0.05)
        if time.monotonic() > deadline:
            raise TimeoutError("the shadow did not answer a row")
    pid = shadowing.pid
    p50: dict[str, list[float]] = {"alone": [], "with": []}
    p99: dict[str, list[float]] = {"alone": [], "with": []}
    compared, used, lasted = 0, 0.0, 0.0
    for turn in range(ROUNDS + 1):
        for arm in ("alone", "with") if turn % 2 else ("with", "alone"):
            _pause(pid, stop=arm == "alone")
            runtime.tap = shadowing.offer if arm == "with" else None
            before, start = _cpu_seconds(pid), time.perf_counter()
            found, rows_compared = _answer(runtime, rows, shadowing)
            compared += rows_compared
            if arm == "with":
                used += _cpu_seconds(pid) - before
                lasted += time.perf_counter() - start
            if turn:
                p50[arm].append(float(np.median(found)) / 1e3)
                p99[arm].append(float(np.quantile(found, 0.99)) / 1e3)
    return {
        "alone p50 us": round(float(np.median(p50["alone"])), 2),
        "alone p99 us": round(float(np.median(p99["alone"])), 2),
        "p50 with / alone": str(median_of_rounds(p50["with"], p50["alone"])),
        "p99 with / alone": str(median_of_rounds(p99["with"], p99["alone"])),
        "share of a CPU": round(used / lasted, 3),
        "rows compared": compared,
    }


def _answer(runtime: Runtime, rows: list[Any], shadowing: Shadowing) -> tuple[Any, int]:
    """How long each row took, in ns; what the shadow says is heard in between, as the daemon's other thread would."""
    clock, n = time.perf_counter_ns, len(rows)
    found, compared = np.empty(ROWS, np.int64), 0
    for i in range(ROWS):
        start = clock()
        runtime.predict(rows[i % n])
        found[i] = clock() - start
        if not i % HEARD_ROWS:
            compared += sum(said.rows for said in shadowing.listen() if isinstance(said, Shadowed))
    return found, compared


def _pause(pid: int, *, stop: bool) -> None:
    os.kill(pid, 19 if stop else 18)  # SIGSTOP, SIGCONT


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def run(*, share: float = 0.1) -> list[dict[str, Any]]:
    """A row of figures for each model and number of processors."""
    from sklearn.ensemble import RandomForestClassifier  # noqa: PLC0415 (the measuring process does without)
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    from converters import convert  # noqa: PLC0415
    from trainer.datasets import load_watch  # noqa: PLC0415

    data = load_watch().select(people=(1, 2, 3, 4, 5, 6), wrists=(0,))
    x, y = data.features, np.asarray(data.label_names)[data.labels]
    families = {
        "logistic regression": [
            make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300)) for c in (1.0, 0.1)
        ],
        "forest of 100": [RandomForestClassifier(100, random_state=seed) for seed in (0, 1)],
    }
    found = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npy"
        np.save(rows, x[:400])
        for name, pipelines in families.items():
            paths = [str(Path(folder) / f"{name[:3]}{i}.onnx") for i in range(2)]
            for path, pipeline in zip(paths, pipelines, strict=True):
                convert(pipeline.fit(x, y), x, out=path, name="bench", probes=2_000)
            for one in (False, True):
                job = {"models": paths, "rows": str(rows), "share": share, "one": one}
                child = [sys.executable, "-m", "benchmarks.shadow_cost", "--job"]
                done = subprocess.run(
                    child, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True
                )
                on = "one" if one else str(os.cpu_count())
                found.append({"model": name, "processors": on, **json.loads(done.stdout)})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.shadow_cost``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shadow_cost", description=__doc__)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument(
        "--job", action="store_true", help="measure the job on stdin, as this program asks itself"
    )
    given = parser.parse_args(arguments)
    if given.job:
        json.dump(measure(json.load(sys.stdin)), sys.stdout)
        return 0
    from benchmarks.__main__ import table  # noqa: PLC0415 (a device does without the other benchmarks)

    found = run(share=given.share)
    print("\n".join(table(found, tuple(found[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
