"""``python -m edge_runtime.probe``: tries a verified model in a process of its own, under hard limits.

One JSON document on stdin, one JSON object on stdout. Whatever the file does to ONNX Runtime, it does it here: the
address space, the CPU time and the output of this process are limited, and only figures leave it. It outlives whoever
started it by its CPU limit at most.

The model is loaded first and alone, so that the peak of resident memory is its own; then the one that serves beside it,
and both answer rows in turns: what else the device does, and how fast it is today, weighs on both alike.
"""

import errno
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime import golden
from edge_runtime.adapters import sandbox
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
    """What to try: ``runs`` single rows are timed after the golden rows were answered.

    ``address_space_bytes`` and ``cpu_seconds`` are for each of the two models. ``incumbent`` is None where there is
    nothing to compare with.
    """

    model: Path
    digest: ids.Digest
    incumbent: Path | None
    incumbent_digest: ids.Digest | None
    address_space_bytes: int
    cpu_seconds: int
    runs: int

    @classmethod
    def read(cls, document: object) -> "ProbeJob":
        """Reads the job; raises `ContractError`."""
        f = Fields(document, "probe")
        incumbent, incumbent_digest = f.text("incumbent", "", max_length=4096), f.text("incumbent_digest", "")
        return cls(
            model=Path(f.text("model", max_length=4096)),
            digest=ids.digest(f.text("digest")),
            incumbent=Path(incumbent) if incumbent else None,
            incumbent_digest=ids.digest(incumbent_digest) if incumbent else None,
            address_space_bytes=f.integer("address_space_bytes", low=1),
            cpu_seconds=f.integer("cpu_seconds", low=1),
            runs=f.integer("runs", low=1, high=1_000_000),
        )

    @property
    def models(self) -> int:
        """How many there are to load."""
        return 1 if self.incumbent is None else 2


def limit(job: ProbeJob) -> None:
    """Binds this process for good. Passing the CPU limit kills it with SIGXCPU, passing the others makes calls fail.

    The address space is that of one model until `make_room`.
    """
    more = (job.models - 1) * job.address_space_bytes
    sandbox.limit(resource.RLIMIT_AS, job.address_space_bytes, beyond=more)
    # At the hard limit the kernel would say SIGKILL.
    sandbox.limit(resource.RLIMIT_CPU, job.models * job.cpu_seconds, beyond=1)
    sandbox.limit(resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES)
    sandbox.limit(resource.RLIMIT_CORE, 0)


def make_room() -> None:
    """Allows as much address space as was laid down for all models."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


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


class _Timing:
    """Single golden rows of one model, timed part by part; see `time_rows`."""

    def __init__(self, engine: Engine, runs: int) -> None:
        self._engine = engine
        self._runs = runs
        self._spent: list[int] = []
        self._quiet: list[int] = []
        _warm_up(engine, WARM_UP_RUNS)

    @property
    def tried(self) -> int:
        return len(self._spent)

    @property
    def done(self) -> bool:
        return len(self._quiet) >= self._runs or len(self._spent) >= 4 * self._runs

    def part(self) -> None:
        """Times the next `PART_ROWS` rows, or fewer if they are the last."""
        rows = self._engine.info.golden.rows
        disturbed, switches = self.tried == 0, _preemptions()
        while not self.done:
            row = rows[self.tried % len(rows)]
            before = time.thread_time_ns()
            self._engine.run(row)
            self._spent.append(time.thread_time_ns() - before)
            now = _preemptions()
            if now == switches and not disturbed:
                self._quiet.append(self._spent[-1])
            disturbed, switches = now != switches, now
            if self.tried % PART_ROWS == 0:
                return

    def wake(self) -> None:
        """Fills the caches again after others had them."""
        _warm_up(self._engine, WARM_UP_AGAIN)

    def times(self) -> NDArray[np.int64]:
        return np.array(self._quiet if len(self._quiet) >= self._runs else self._spent, np.int64)


def time_rows(
    engines: Sequence[Engine], runs: int, *, pause: Callable[[], None] = lambda: time.sleep(PAUSE_SECONDS)
) -> list[NDArray[np.int64]]:
    """Nanoseconds of this thread's CPU time for single golden rows of each engine, at least ``runs`` of them.

    The engines take turns of `PART_ROWS` rows. CPU time, because wall time on a busy device condemns good models. Even
    so a row costs more when the scheduler takes the CPU away, and so does the next one, on cold caches: with 20
    processes on 2 cores that is 6 % of the rows, and it makes the p99 three times as large. Such rows tell of the
    device's load and are left out, until four times ``runs`` were tried; where fewer than ``runs`` are left then, all
    count. ``pause`` is called between turns of all, `MAX_PAUSES` times at most.
    """
    timings = [_Timing(engine, runs) for engine in engines]
    turns = 0
    while running := [timing for timing in timings if not timing.done]:
        if 0 < turns <= MAX_PAUSES:
            pause()
        turns += 1
        for timing in running:
            timing.wake()
            timing.part()
    return [timing.times() for timing in timings]


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
    _warm_up(engine, WARM_UP_RUNS)
    alone = Probes()
    rss_bytes, peak_bytes = alone.rss_bytes(), alone.peak_rss_bytes()
    incumbent, why_not = load_incumbent(job)
    spent, *others = time_rows([engine, *([incumbent] if incumbent is not None else [])], job.runs)
    budgets = engine.info.manifest.budgets
    return {
        "ok": True,
        "model": engine.info.manifest.name,
        "rss_bytes": rss_bytes,
        "peak_rss_bytes": peak_bytes,
        "predict_p50_ns": quietest_ns(spent, 0.5),
        "predict_p99_ns": quietest_ns(spent, 0.99),
        "runs": len(spent),
        "golden_rows": golden_rows,
        "incumbent_p99_ns": quietest_ns(others[0], 0.99) if others else 0,
        "incumbent": why_not,
        "budgets": {"predict_p99_ns": budgets.predict_p99_ns, "rss_bytes": budgets.rss_bytes},
    }


def load_incumbent(job: ProbeJob) -> tuple[Engine | None, str]:
    """The model that serves, or None and why it is left out: what is wrong with it says nothing of the other."""
    if job.incumbent is None or job.incumbent_digest is None:
        return None, "none serves"
    make_room()
    try:
        return Engine(job.incumbent, expect=job.incumbent_digest), ""
    except SkiffError as e:
        return None, f"left out: {str(e)[:1000]}"
    except MemoryError:
        return None, "left out: it does not fit into the address space"


def _is_unreadable(problem: SkiffError) -> bool:
    """Whether the disk, not the model, is bad."""
    return isinstance(problem.__cause__, OSError) and problem.__cause__.errno == errno.EIO


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
        answer = {"ok": False, "reason": str(e)[:2000], "unread": _is_unreadable(e)}
    except MemoryError:
        answer = {
            "ok": False,
            "reason": f"the model does not fit into {job.address_space_bytes / 1e6:.0f} MB of address space",
        }
    sys.stdout.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
