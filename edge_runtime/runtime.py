"""The data plane: validate a row, run the model, count what was seen. What an application calls.

A single row of the model's own dtype takes a short straight line: it is copied into memory that the session reads, and
that the answer is written into; a copy of the whole record then waits in a ring. Rows are counted in bulk when the ring
is full or a window is taken, those of batches when some hundreds of them wait.
"""

import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from edge_runtime.beside import Beside, Incumbent, Mask, TrialStats
from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, InputError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.latency import LatencyHistogram, observe_ns
from edge_runtime.contract.manifest import Label
from edge_runtime.contract.profile import Profile
from edge_runtime.engine import Block, Engine, Rows, Scores, building, counting, trim_memory
from edge_runtime.schema import count_rows
from edge_runtime.serving import RING_ROWS, Serving, check_same_stream, drained

_new_tuple: Final = tuple.__new__


class Prediction(NamedTuple):
    """One answer; a tuple because a frozen dataclass takes twice as long to build.

    Attributes:
        label: in the pipeline's own label type: a scalar for one row, an array (n,) for a batch; None for a regressor;
            for a model with K label outputs (K,) for one row, (n, K) for a batch.
        score: (C,) float32 for one row, (n, C) for a batch: probabilities, decision values or the prediction.
        raw: the label's index in the manifest: an int, or (n,) int64; None for a regressor; (K,) or (n, K) for K label
            outputs.
        model: SHA-256 of the model that answered.
    """

    label: Label | NDArray[Any] | None
    score: Scores
    raw: int | NDArray[np.int64] | None
    model: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one model saw between two calls of `Runtime.take_window`.

    ``latency`` has one duration per answered call of `Runtime.predict`, of whatever number of rows, from when its turn
    came. ``queueing`` has the durations given to `Runtime.record_queueing`, and how long calls of `Runtime.predict`
    waited for their turn; calls that did not wait are not in it. ``refused`` counts rows answered with `InputError`, by
    reason, and under ``shed`` those that came while `Runtime.shedding` was set; ``failed`` counts rows that broke
    inside the engine or took too long.
    """

    digest: Digest
    profile: Profile
    latency: LatencyHistogram
    queueing: LatencyHistogram
    refused: tuple[tuple[str, int], ...]
    failed: int
    labelled: int
    correct: int

    @property
    def rows(self) -> int:
        """Rows predicted."""
        return self.profile.rows


class _Packed(np.ndarray[Any, np.dtype[Any]]):
    """A row that is packed already; what callers pass to a model with columns of categories is not.

    ``given`` is what the caller passed.
    """

    given: Any


class _Nothing(np.ndarray[Any, np.dtype[Any]]):
    """A row that nobody passes: while load is shed, no row goes the short way."""


class Runtime:
    """One stream of rows, answered by one model at a time and counted.

    ``model`` is an `Engine` or what one is built from; the other options are the `Engine`'s.

    What several threads may count on: every method and attribute may be used from any thread at any time. One lock
    guards the model, so that rows are answered one call after another; a prediction is answered whole by one model,
    counted for that model exactly once, and counted before it is returned. `swap` builds what it needs before it takes
    the lock, and counts what the old model saw after it. A call that waited for the lock says so in ``queueing``. The
    arrays of an answer are its caller's alone. A row that another thread changes while `predict` reads it is answered
    as it was copied. What a signal handler or a finaliser calls must not predict: the lock is not reentrant. Building
    an `Engine` in another thread keeps the interpreter for as long as its switch interval allows
    (`sys.setswitchinterval`, 5 ms unless set): a program that may not wait so long sets a shorter one.

    Memory is bounded: a ring of at most 1,024 rows (twice as long while a model is loaded), batches of at most 1,024
    rows that wait to be counted, 1 MB each or one batch, and the counters.

    Attributes:
        measure_cpu: set it to have `predict` record the thread's CPU time for `trial_stats`.
        max_batch: larger batches are run in parts of so many rows, with the same answers; 0 for the engine's own limit.

    Raises:
        ArtifactError: see `Engine`.
        BudgetExceeded: see `Engine`.
    """

    __slots__ = (
        "_beside",
        "_clock_ns",
        "_correct",
        "_cpu_clock_ns",
        "_dtype",
        "_failed",
        "_failed_before",
        "_labelled",
        "_latencies_ns",
        "_latency",
        "_lock",
        "_predictions",
        "_queueing",
        "_refused",
        "_row_type",
        "_schema",
        "_serving",
        "_shape",
        "_shedding",
        "_swapping",
        "_waits_ns",
        "max_batch",
        "measure_cpu",
    )

    def __init__(
        self,
        model: Engine | str | Path | bytes,
        *,
        threads: int = 1,
        max_batch: int = 4096,
        arena: bool = False,
        run_limit_seconds: float = 0.0,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        cpu_clock_ns: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        engine = (
            model
            if isinstance(model, Engine)
            else Engine(
                model, threads=threads, max_batch=max_batch, arena=arena, run_limit_seconds=run_limit_seconds
            )
        )
        self.max_batch = 0
        self.measure_cpu = False
        self._clock_ns = clock_ns
        self._cpu_clock_ns = cpu_clock_ns
        self._beside = Beside(cpu_clock_ns)
        self._lock = threading.Lock()
        # Taken before the other one: rows are converted for the model that answers them.
        self._swapping = threading.Lock()
        self._shape = (engine.features,)
        self._latencies_ns = array("q")
        self._waits_ns = array("q")
        self._shedding = False
        self._clear_window()
        self._begin(Serving(engine))

    def _begin(self, serving: Serving) -> None:
        self._schema = serving.schema
        self._dtype = self._schema.dtype
        self._serving = serving
        self._row_type = self._short_way()
        self._predictions = 0
        self._failed_before = 0
        self._beside.begin()

    def _short_way(self) -> type[NDArray[Any]]:
        """The type of the rows that `predict` answers itself, when their dtype and shape are right, too."""
        if self._shedding:
            return _Nothing
        several = self._serving.offsets.size
        return _Packed if self._schema.coded or several else np.ndarray

    def _clear_window(self) -> None:
        self._latency = LatencyHistogram()
        self._queueing = LatencyHistogram()
        self._refused: dict[str, int] = {}
        self._failed = 0
        self._labelled = 0
        self._correct = 0

    @property
    def digest(self) -> Digest:
        """SHA-256 of the model in service."""
        return self._serving.digest

    @property
    def engine(self) -> Engine:
        """The engine in service."""
        return self._serving.engine

    @property
    def rows(self) -> int:
        """Rows predicted since the last window was taken."""
        with self._lock:
            return self._serving.rows + len(self._serving.ring)

    @property
    def unanswered(self) -> int:
        """Rows refused or failed since the last window was taken."""
        with self._lock:
            return self._failed + sum(self._refused.values())

    @property
    def tap(self) -> Callable[[Rows], None] | None:
        """Is given the packed rows (n, F) of the model in service when they are counted, by whoever counts them.

        It may keep them but not change them, and must not take long: a lock is held. A swap takes it off.
        """
        return self._serving.tap

    @tap.setter
    def tap(self, tap: Callable[[Rows], None] | None) -> None:
        with self._lock:
            self._serving.tap = tap

    @property
    def incumbent(self) -> Incumbent | None:
        """The model to set beside the one in service while ``measure_cpu`` is set; its answers are dropped.

        Its time, and which of the rows that have no answer it would have answered.
        """
        return self._beside.incumbent

    @incumbent.setter
    def incumbent(self, incumbent: Incumbent | None) -> None:
        self._beside.incumbent = incumbent

    @property
    def _compared(self) -> bool:
        return self.measure_cpu and self._beside.incumbent is not None

    def count(self) -> None:
        """Counts the rows that wait for it, which else happens when there are many or a window is taken."""
        with self._lock:
            self._flush()

    @property
    def shedding(self) -> bool:
        """Whether every call of `predict` is refused with `BudgetExceeded`, its rows counted under ``shed``."""
        return self._shedding

    @shedding.setter
    def shedding(self, wanted: bool) -> None:
        with self._swapping, self._lock:
            self._shedding = wanted
            self._row_type = self._short_way()

    def predict(self, rows: NDArray[Any] | Mapping[str, object] | Sequence[object]) -> Prediction:
        """Predicts one row or a batch; quickest for one array of shape (F,) and the model's dtype, float32 for most.

        ``rows`` is an (n, F) array, one row of F values, a mapping of feature name to value, a list of these, or a
        pandas or polars data frame with the features' columns in any order. Numbers are rounded to the model's dtype;
        the values of categories are looked up in their vocabulary, those of a numeric array too. None, NaN and an
        absent name mean missing. The caller owns the arrays of the answer.

        Raises:
            InputError: a row breaks the schema, or is one that the pipeline refuses itself; the message names row and
                feature. Nothing was predicted for any row of the call, and each is counted as refused under the
                error's ``reason``.
            ArtifactError: the graph failed, or answered what its manifest does not allow; counted as failed.
            BudgetExceeded: a batch does not fit into memory, or a run takes longer than the engine's limit; counted as
                failed. Or `shedding` is set; then the rows are counted as refused.
        """
        if rows.__class__ is not self._row_type or rows.dtype is not self._dtype or rows.shape != self._shape:
            return self._predict_other(rows)
        lock = self._lock
        if not lock.acquire(False):  # `with` costs twice as much, a fiftieth of a small model's call
            self._wait()
        try:
            clock_ns = self._clock_ns
            start_ns = clock_ns()
            measure_cpu = self.measure_cpu  # read once: it may be set while this runs
            if measure_cpu:
                measure_cpu = self._beside.candidates_turn(rows)
            cpu_ns = self._cpu_clock_ns() if measure_cpu else 0
            serving = self._serving
            row, run, record_of, copy_score, tops, score_tops = serving.hot
            row[...] = rows
            try:
                run()
            except Block.failures as e:
                self._check(row[None], rows)
                self._fail(f"the graph failed on one row: {e}", rows, e)
            except BudgetExceeded:
                self._count_failed(1, rows)
                raise
            record = record_of()
            found = record[tops] if score_tops is None else record[tops] + record[score_tops]
            score = copy_score()
            if 0x7F in found or 0xFF in found:  # perhaps not finite: see `Serving`
                self._check(row[None], rows)
                self._check_scores(serving, row[None], score[None], rows)
            raw = serving.raw[0]
            if not 0 <= raw < serving.classes:
                self._fail(f"the graph answered class {raw}; the manifest has {serving.classes}", rows)
            if measure_cpu:
                self._beside.cpu_ring.append(self._cpu_clock_ns() - cpu_ns)
            ring = serving.ring
            ring.append(record)
            self._latencies_ns.append(clock_ns() - start_ns)
            if len(ring) >= serving.size:
                self._count_full()
        finally:
            lock.release()
        labels = serving.labels
        if labels is None:
            return _new_tuple(Prediction, (None, score, None, serving.digest))
        return _new_tuple(Prediction, (labels[raw], score, raw, serving.digest))

    def _count_full(self) -> None:
        """Counts a full ring, or a fuller one later while another thread loads a model; see `counting`."""
        if not building or len(self._serving.ring) >= 2 * self._serving.size:
            with counting:
                self._flush()

    def _wait(self) -> None:
        """Takes the lock when it is free, and notes how long that took."""
        before_ns = self._clock_ns()
        self._lock.acquire()
        self._waits_ns.append(self._clock_ns() - before_ns)
        if len(self._waits_ns) >= RING_ROWS:
            self._flush_waits()

    def _predict_other(self, rows: Any) -> Prediction:
        if self._shedding:
            n = count_rows(rows)
            with self._lock:
                self._count_refused("shed", n)
            raise BudgetExceeded(f"load is shed: {n} rows are not predicted; ask again later")
        with self._swapping:
            packed = self._schema.pack(rows)
            if packed is not None and self._row_type is np.ndarray:
                return self.predict(packed)
            try:
                table, single = self._schema.convert(rows)
            except InputError as e:
                with self._lock:
                    self._refuse(e.reason, count_rows(rows), rows)
                raise
            if not single:
                return self._predict_batch(table, rows)
            if not self._serving.offsets.size:
                row = table[0].view(self._row_type)
                if isinstance(row, _Packed):
                    row.given = rows
                return self.predict(row)
            label, score, raw, digest = self._predict_batch(table, rows)
            return Prediction(label[0], score[0], raw[0], digest)  # type: ignore[index]

    def _predict_batch(self, table: Rows, given: Any) -> Prediction:
        """Answers ``table`` (n, F), packed and nobody else's; ``given`` is what the caller passed."""
        if not self._lock.acquire(False):
            self._wait()
        try:
            start_ns = self._clock_ns()
            cpu_ns = self._cpu_clock_ns()
            serving = self._serving
            self._check(table, given)
            try:
                raw, score = serving.engine.run(table, max_batch=self.max_batch)
            except (ArtifactError, BudgetExceeded):
                self._count_failed(len(table), given)
                raise
            self._check_scores(serving, table, score, given)
            if len(table):
                self._flush_ring()  # rows are counted in the order they came
                serving.count_later(table, raw, score)
                self._predictions += len(table)
                if self.measure_cpu:
                    self._beside.cpu_ring.append((self._cpu_clock_ns() - cpu_ns) // len(table))
                self._latencies_ns.append(self._clock_ns() - start_ns)
                if len(self._latencies_ns) >= RING_ROWS:
                    self._flush_clocks()
        finally:
            self._lock.release()
        return Prediction(serving.labels_of(raw), score, raw, serving.digest)

    def record_queueing(self, durations_ns: Sequence[int]) -> None:
        """Adds how long rows waited elsewhere before `predict` was called, in nanoseconds, to the open window."""
        found = observe_ns(np.asarray(durations_ns, np.int64))
        with self._lock:
            self._queueing = self._queueing.merge(found)

    def record_truth(self, labelled: int, correct: int) -> None:
        """Adds ``labelled`` rows whose truth became known, ``correct`` of them predicted right, to the open window."""
        if not 0 <= correct <= labelled:
            raise ValueError(f"{correct} correct of {labelled} labelled rows")
        with self._lock:
            self._labelled += labelled
            self._correct += correct

    def take_window(self) -> Observation:
        """What was seen since the last call, and a fresh start; the row before is remembered for ``repeat``."""
        with self._lock:
            return self._take()

    def timings(self) -> tuple[LatencyHistogram, LatencyHistogram]:
        """Latency and queueing since the last window was taken, as `Observation` has them."""
        with self._lock:
            self._flush()
            return self._latency, self._queueing

    def let_incumbent_go(self) -> None:
        """Gives the incumbent's memory back; the candidate is not compared any more."""
        self.incumbent = None
        trim_memory()

    def trial_stats(self) -> TrialStats:
        """Totals of the model in service since it was put there."""
        with self._lock:
            self._flush()
            cpu, incumbent_cpu = self._beside.count()
            return TrialStats(
                predictions=self._predictions,
                failed=self._failed_before + self._failed - self._beside.excused,
                refused_alone=self._beside.refused_alone,
                cpu=cpu,
                incumbent_cpu=incumbent_cpu,
            )

    def swap(self, engine: Engine) -> Observation:
        """Puts ``engine`` into service between two predictions; none fails and none waits for the model to load.

        Returns what the old model saw since the last window. The old engine is let go, not closed: its memory is freed
        when nobody else holds it.

        Raises:
            ArtifactError: the new model reads other features, or in another order, or as numbers what was a category,
                so that this stream's rows would mean something else to it; or it has another number of label outputs.
                The old one stays.
        """
        with building:
            with self._swapping:
                check_same_stream(self.engine, engine)
                serving = Serving(engine)
                with self._lock:
                    old, durations_ns, self._latencies_ns = self._serving, self._latencies_ns, array("q")
                    waits_ns, self._waits_ns = self._waits_ns, array("q")
                    latency, queueing, rest = self._latency, self._queueing, self._close_window()
                    self._begin(serving)
                # What takes time is done while the new model answers.
                old.count_ring(old.ring)
                old.count()
                seen = rest(
                    profile=old.binner.take(),
                    latency=latency.merge(drained(durations_ns)),
                    queueing=queueing.merge(drained(waits_ns)),
                )
                del old
            trim_memory()
        return seen

    def _take(self) -> Observation:
        self._flush()
        latency, queueing, profile = self._latency, self._queueing, self._serving.binner.take()
        return self._close_window()(profile=profile, latency=latency, queueing=queueing)

    def _close_window(self) -> "partial[Observation]":
        """What was seen but for ``profile``, ``latency`` and ``queueing``, and a fresh start."""
        seen = partial(
            Observation,
            digest=self._serving.digest,
            refused=tuple(sorted(self._refused.items())),
            failed=self._failed,
            labelled=self._labelled,
            correct=self._correct,
        )
        self._failed_before += self._failed
        self._clear_window()
        return seen

    def _flush(self) -> None:
        self._flush_ring()
        self._serving.count()
        self._flush_clocks()

    def _flush_ring(self) -> None:
        serving = self._serving
        ring, serving.ring = serving.ring, []
        self._predictions += len(ring)
        serving.count_ring(ring)

    def _flush_waits(self) -> None:
        self._queueing = self._queueing.merge(drained(self._waits_ns))

    def _flush_clocks(self) -> None:
        if self._waits_ns:
            self._flush_waits()
        if self._latencies_ns:
            self._latency = self._latency.merge(drained(self._latencies_ns))
        self._beside.count()

    def _check(self, table: Rows, given: Any) -> None:
        try:
            self._schema.check(table)
        except InputError as e:
            blamed = np.any(list(self._schema.refused(table).values()), axis=0)
            self._refuse(e.reason, len(table), given, blamed)
            raise

    def _check_scores(self, serving: Serving, table: Rows, scores: Scores, given: Any) -> None:
        """Refuses rows without an answer: a NaN among the scores (n, C) of a model whose pipeline never gives one."""
        if serving.undefined and not self._compared:
            return
        missing = np.asarray(np.isnan(scores).any(axis=1))
        if not missing.any():
            return
        if serving.undefined:
            self._hold_against(given, missing)
            return
        i = int(missing.argmax())
        where = f"row {i}: " if len(table) > 1 else ""
        columns = serving.without_answer(table[i])
        self._refuse("undefined", len(table), given, missing)
        raise InputError("undefined", f"{where}{self._schema.no_answer(table[i], columns)}")

    def _refuse(self, reason: str, rows: int, given: Any, blamed: Mask | None = None) -> None:
        """Counts the ``rows`` rows of a call with ``given``, refused for those that are ``blamed`` (n,), if known."""
        self._count_refused(reason, rows)
        self._hold_against(given, blamed)

    def _count_refused(self, reason: str, rows: int) -> None:
        self._refused[reason] = self._refused.get(reason, 0) + rows

    def _hold_against(self, given: Any, blamed: Mask | None) -> None:
        if self._compared:
            self._beside.hold_against(_as_given(given), blamed, max_batch=self.max_batch)

    def _count_failed(self, rows: int, given: Any) -> None:
        self._failed += rows
        if self._compared:
            self._beside.excuse(_as_given(given), rows, max_batch=self.max_batch)

    def _fail(self, problem: str, given: Any, cause: Exception | None = None) -> NoReturn:
        self._count_failed(1, given)
        raise ArtifactError(f"model {self._serving.digest}: {problem}") from cause


def _as_given(rows: Any) -> Any:
    return rows.given if isinstance(rows, _Packed) else rows
