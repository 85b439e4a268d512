"""A model on trial is measured beside the one before it: CPU time, and which calls only one of them answers."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, InputError
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.engine import Engine, Rows
from edge_runtime.schema import Schema
from edge_runtime.serving import drained

TURNS: Final = 8

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStats:
    """Totals since the model was put into service; windows do not reset them.

    ``cpu`` has the thread's CPU time per row, one sample per call while `Runtime.measure_cpu` was set;
    ``incumbent_cpu`` that of `Runtime.incumbent`, for every eighth row instead of the candidate's. CPU time,
    because wall time on a busy device condemns good models. ``refused_alone`` counts calls with a row that has no
    answer, refused or NaN, that `Runtime.incumbent` answers and for which it has one: calls, because rows of a batch
    are refused together. ``failed`` leaves out rows of calls in which the incumbent fails, too.
    """

    predictions: int
    failed: int
    refused_alone: int
    cpu: LatencyHistogram
    incumbent_cpu: LatencyHistogram


class Incumbent:
    """The model that a candidate on trial is compared with, in memory for as long as that lasts. Not thread-safe.

    ``timed`` is set while its runs can be timed beside the candidate's.
    """

    __slots__ = ("_schema", "engine", "timed")

    def __init__(self, engine: Engine) -> None:
        self.engine: Final = engine
        self.timed = True
        manifest = engine.info.manifest
        self._schema: Final = Schema(manifest.features, manifest.input_dtype)

    def run(self, row: Rows) -> bool:
        """Runs the candidate's packed ``row`` (F,) and drops the answer; False, and timed no more, without one."""
        with np.errstate(over="ignore"):
            row = row.astype(self.engine.dtype, copy=False)
        try:
            self.engine.run(row)
        except (ArtifactError, BudgetExceeded):
            self.timed = False
        return self.timed

    def answered(self, rows: Any, *, max_batch: int = 0) -> NDArray[np.bool_] | None:
        """Which rows (n,) of a call with ``rows``, as the caller gave them, it has an answer for that is not NaN.

        None when it would have refused the call, or failed.
        """
        try:
            table, _ = self._schema.convert(rows)
            self._schema.check(table)
            _, scores = self.engine.run(table, max_batch=max_batch)
        except (InputError, ArtifactError, BudgetExceeded):
            return None
        found = ~np.asarray(np.isnan(scores).any(axis=1))
        return found if self.engine.info.manifest.undefined or found.all() else None


class Beside:
    """What is measured on trial. Guarded by its runtime's lock.

    Attributes:
        incumbent: see `Runtime.incumbent`.
        cpu_ring: CPU times of the candidate's calls, to be counted.
        excused: rows of failed calls that the incumbent fails, too.
        refused_alone: see `TrialStats`.
    """

    __slots__ = (
        "_clock_ns",
        "_cpu",
        "_incumbent_cpu",
        "_incumbent_ring",
        "_turn",
        "cpu_ring",
        "excused",
        "incumbent",
        "refused_alone",
    )

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        self._clock_ns: Final = clock_ns
        self._turn = 0
        self.incumbent: Incumbent | None = None
        self.begin()

    def begin(self) -> None:
        """Another model is in service: all is counted from 0."""
        self._cpu = LatencyHistogram()
        self._incumbent_cpu = LatencyHistogram()
        self.cpu_ring = array("q")
        self._incumbent_ring = array("q")
        self.excused = 0
        self.refused_alone = 0

    def candidates_turn(self, row: Rows) -> bool:
        """Whether this row's CPU time is the candidate's to spend; every eighth time the incumbent runs the row first.

        Whoever comes first meets caches that others have emptied: so both are timed in the same conditions, and a busy
        device does not condemn a good model.
        """
        self._turn = (self._turn + 1) % TURNS
        incumbent = self.incumbent
        if self._turn or incumbent is None or not incumbent.timed:
            return True
        before_ns = self._clock_ns()
        if not incumbent.run(row):
            return True
        self._incumbent_ring.append(self._clock_ns() - before_ns)
        return False

    def hold_against(self, given: Any, blamed: Mask | None, *, max_batch: int) -> None:
        """Counts a call with ``given`` where the incumbent has an answer for a row that the candidate has none for.

        ``blamed`` (n,) are those rows; where none is named it may be any.
        """
        answered = self._answered(given, max_batch)
        if answered is not None:
            self.refused_alone += bool((answered if blamed is None else answered & blamed).any())

    def excuse(self, given: Any, rows: int, *, max_batch: int) -> None:
        """Counts the ``rows`` of a failed call with ``given`` where the incumbent fails, too."""
        if self.incumbent is not None and self._answered(given, max_batch) is None:
            self.excused += rows

    def count(self) -> tuple[LatencyHistogram, LatencyHistogram]:
        """CPU times so far, the candidate's and the incumbent's."""
        if self.cpu_ring:
            self._cpu = self._cpu.merge(drained(self.cpu_ring))
        if self._incumbent_ring:
            self._incumbent_cpu = self._incumbent_cpu.merge(drained(self._incumbent_ring))
        return self._cpu, self._incumbent_cpu

    def _answered(self, given: Any, max_batch: int) -> Mask | None:
        return None if self.incumbent is None else self.incumbent.answered(given, max_batch=max_batch)
