"""``python -m edge_runtime.probe``: tries a verified model in a process of its own, under hard limits.

One JSON document on stdin, one JSON object on stdout. Whatever the file does to ONNX Runtime, it does it here: the
address space, the CPU time and the output of this process are limited, and only figures leave it. It outlives whoever
started it by its CPU limit at most.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime import golden
from edge_runtime.adapters.probes import Probes
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ArtifactError, ContractError, SkiffError
from edge_runtime.contract.fields import Fields
from edge_runtime.engine import Engine

WARM_UP_RUNS: Final = 200
PART_ROWS: Final = 100
PAUSE_SECONDS: Final = 0.025
"""Between two parts: 2,000 rows of a small model at a stretch are over in 30 ms, and a burst of others is not."""
MAX_PAUSES: Final = 40
WARM_UP_AGAIN: Final = 10
MAX_OUTPUT_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeJob:
    """What to try: ``runs`` single rows are timed after the golden rows were answered."""

    model: Path
    digest: ids.Digest
    address_space_bytes: int
    cpu_seconds: int
    runs: int

    @classmethod
    def read(cls, document: object) -> "ProbeJob":
        """Reads the job; raises `ContractError`."""
        f = Fields(document, "probe")
        return cls(
            model=Path(f.text("model", max_length=4096)),
            digest=ids.digest(f.text("digest")),
            address_space_bytes=f.integer("address_space_bytes", low=1),
            cpu_seconds=f.integer("cpu_seconds", low=1),
            runs=f.integer("runs", low=1, high=1_000_000),
        )


def limit(job: ProbeJob) -> None:
    """Binds this process for good. Passing the CPU limit kills it with SIGXCPU, passing the others makes calls fail."""
    for kind, soft, beyond in (
        (resource.RLIMIT_AS, job.address_space_bytes, 0),
        (resource.RLIMIT_CPU, job.cpu_seconds, 1),  # at the hard limit the kernel would say SIGKILL
        (resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, ceiling = resource.getrlimit(kind)
        hard = soft + beyond if ceiling == resource.RLIM_INFINITY else min(soft + beyond, ceiling)
        resource.setrlimit(kind, (min(soft, hard), hard))


def check_golden(engine: Engine) -> int:
    """Re-runs the golden rows, all at once and one by one; returns how many there are, raises `ArtifactError`."""
    rows = engine.info.golden.rows
    _check(engine, rows, slice(None))
    for i, row in enumerate(rows):
        _check(engine, row, slice(i, i + 1))
    return len(rows)


def _check(engine: Engine, rows: NDArray[Any], part: slice) -> None:
    if found := golden.problem(engine.info, *engine.run(rows), part):
        raise ArtifactError(found)


def time_rows(
    engine: Engine, runs: int, *, pause: Callable[[], None] = lambda: time.sleep(PAUSE_SECONDS)
) -> NDArray[np.int64]:
    """Nanoseconds of this thread's CPU time for single golden rows, at least ``runs`` of them, after a warm-up.

    CPU time, because wall time on a busy device condemns good models. Even so a row costs more when the scheduler takes
    the CPU away, and so does the next one, on cold caches: with 20 processes on 2 cores that is 6 % of the rows, and it
    makes the p99 three times as large. Such rows tell of the device's load and are left out, until four times ``runs``
    were tried; where fewer than ``runs`` are left then, all count. ``pause`` is called after every `PART_ROWS` rows,
    `MAX_PAUSES` times at most.
    """
    rows = engine.info.golden.rows
    _warm_up(engine, WARM_UP_RUNS)
    spent: list[int] = []
    quiet: list[int] = []
    switches = _preemptions()
    disturbed = True
    while len(quiet) < runs and len(spent) < 4 * runs:
        row = rows[len(spent) % len(rows)]
        before = time.thread_time_ns()
        engine.run(row)
        spent.append(time.thread_time_ns() - before)
        now = _preemptions()
        if now == switches and not disturbed:
            quiet.append(spent[-1])
        disturbed, switches = now != switches, now
        if len(spent) % PART_ROWS == 0 and len(spent) <= MAX_PAUSES * PART_ROWS:
            pause()
            _warm_up(engine, WARM_UP_AGAIN)
            switches = _preemptions()
    return np.array(quiet if len(quiet) >= runs else spent, np.int64)


def _warm_up(engine: Engine, runs: int) -> None:
    rows = engine.info.golden.rows
    for i in range(runs):
        engine.run(rows[i % len(rows)])


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def quietest_ns(spent: NDArray[np.int64], q: float) -> int:
    """The smallest ``q``-quantile of consecutive parts of `PART_ROWS` rows of ``spent``, in nanoseconds.

    Other processes take the caches away in bursts, which costs CPU time too. A part of a small model is over within a
    time slice of the scheduler, so that what the model itself needs shows in the part that was disturbed least.
    """
    parts = np.array_split(spent, max(1, spent.size // PART_ROWS))
    return min(int(np.quantile(part, q, method="higher")) for part in parts)


def probe(job: ProbeJob) -> dict[str, Any]:
    """Loads, checks and times the model; raises `ArtifactError` or `BudgetExceeded`."""
    engine = Engine(job.model, expect=job.digest)
    golden_rows = check_golden(engine)
    spent = time_rows(engine, job.runs)
    budgets = engine.info.manifest.budgets
    return {
        "ok": True,
        "model": engine.info.manifest.name,
        "rss_bytes": Probes().rss_bytes(),
        "predict_p50_ns": quietest_ns(spent, 0.5),
        "predict_p99_ns": quietest_ns(spent, 0.99),
        "runs": len(spent),
        "golden_rows": golden_rows,
        "budgets": {"predict_p99_ns": budgets.predict_p99_ns, "rss_bytes": budgets.rss_bytes},
    }


def main() -> int:
    """Entry point; an expected refusal is an answer like any other and exits 0."""
    try:
        job = ProbeJob.read(json.load(sys.stdin))
    except (ValueError, ContractError) as e:
        sys.stderr.write(f"probe: not a job ({e})\n")
        return 2
    limit(job)
    try:
        answer = probe(job)
    except SkiffError as e:
        answer = {"ok": False, "reason": str(e)[:2000]}
    except MemoryError:
        answer = {
            "ok": False,
            "reason": f"the model does not fit into {job.address_space_bytes / 1e6:.0f} MB of address space",
        }
    sys.stdout.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
