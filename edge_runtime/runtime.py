"""The data plane: validate a row, run the model, count what was seen. What an application calls.

A single row of the model's own dtype takes a short straight line: it is copied once, into the next slot of a ring that
the session reads and writes in place, so the ring afterwards holds what must be counted. Rows are binned in bulk when
the ring is full or a window is taken.
"""

import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, InputError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.latency import LatencyHistogram, observe_ns
from edge_runtime.contract.manifest import Label
from edge_runtime.contract.profile import Binner, Profile
from edge_runtime.engine import Block, Engine, Rows, Scores, trim_memory
from edge_runtime.schema import Schema, count_rows

RING_ROWS: Final = 256
RING_BYTES: Final = 1 << 20
"""Wide rows get a shorter ring: its rows and scores together stay below this."""

MOST_BLAMED: Final = 1024
"""Wider rows are refused without naming the feature to blame: finding it takes a prediction per feature."""

TURNS: Final = 8

_vdot: Final = np.vdot
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

    ``latency`` has one duration per answered call of `Runtime.predict`, of whatever number of rows. ``refused`` counts
    rows answered with `InputError`, by reason; ``failed`` counts rows that broke inside the engine.
    """

    digest: Digest
    profile: Profile
    latency: LatencyHistogram
    refused: tuple[tuple[str, int], ...]
    failed: int
    labelled: int
    correct: int

    @property
    def rows(self) -> int:
        """Rows predicted."""
        return self.profile.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStats:
    """Totals since the model was put into service; windows do not reset them.

    ``cpu`` has the thread's CPU time per row, one sample per call while `Runtime.measure_cpu` was set;
    ``incumbent_cpu`` that of `Runtime.incumbent`, for every eighth row instead of the candidate's. CPU time,
    because wall time on a busy device condemns good models.
    """

    predictions: int
    failed: int
    cpu: LatencyHistogram
    incumbent_cpu: LatencyHistogram


class _Packed(np.ndarray[Any, np.dtype[Any]]):
    """A row that is packed already; what callers pass to a model with columns of categories is not."""


class Runtime:
    """One stream of rows, answered by one model at a time and counted.

    ``model`` is an `Engine` or what one is built from. `predict` may be called from any number of threads, also while
    `swap`, `take_window` or `record_truth` run in another: one lock guards all of them, and every prediction is
    answered whole by one model and counted for that model. Memory is bounded: a ring of at most 256 rows and 1 MB, and
    the counters.

    Attributes:
        measure_cpu: set it to have `predict` record the thread's CPU time for `trial_stats`.
        incumbent: the engine to time beside the one in service while ``measure_cpu`` is set; its answers are dropped.

    Raises:
        ArtifactError: see `Engine`.
        BudgetExceeded: see `Engine`.
    """

    __slots__ = (
        "_clock_ns",
        "_correct",
        "_cpu",
        "_cpu_clock_ns",
        "_cpu_ring",
        "_dtype",
        "_failed",
        "_failed_before",
        "_filled",
        "_incumbent_cpu",
        "_incumbent_ring",
        "_labelled",
        "_latency",
        "_latency_ring",
        "_lock",
        "_predictions",
        "_refused",
        "_row_type",
        "_schema",
        "_serving",
        "_shape",
        "_swapping",
        "_turn",
        "_zeros",
        "incumbent",
        "measure_cpu",
    )

    def __init__(
        self,
        model: Engine | str | Path | bytes,
        *,
        threads: int = 1,
        max_batch: int = 4096,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        cpu_clock_ns: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        engine = model if isinstance(model, Engine) else Engine(model, threads=threads, max_batch=max_batch)
        self.measure_cpu = False
        self.incumbent: Engine | None = None
        self._turn = 0
        self._clock_ns = clock_ns
        self._cpu_clock_ns = cpu_clock_ns
        self._lock = threading.Lock()
        # Taken before the other one: rows are converted for the model that answers them.
        self._swapping = threading.Lock()
        self._shape = (engine.features,)
        self._latency_ring = array("q", bytes(8 * RING_ROWS))
        self._filled = 0
        self._clear_window()
        self._begin(_Serving(engine))

    def _begin(self, serving: "_Serving") -> None:
        manifest = serving.engine.info.manifest
        self._schema = Schema(manifest.features, manifest.input_dtype)
        # Only rows of this type, dtype and shape go the short way.
        self._row_type: type[NDArray[Any]] = (
            _Packed if self._schema.coded or manifest.multilabels else np.ndarray
        )
        self._dtype = self._schema.dtype
        self._zeros = np.zeros(serving.engine.features, self._dtype)
        self._serving = serving
        self._predictions = 0
        self._failed_before = 0
        self._cpu = LatencyHistogram()
        self._cpu_ring = array("q")
        self._incumbent_cpu = LatencyHistogram()
        self._incumbent_ring = array("q")

    def _clear_window(self) -> None:
        self._latency = LatencyHistogram()
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
            return self._serving.binner.rows + self._filled

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
            BudgetExceeded: a batch does not fit into memory; counted as failed.
        """
        if rows.__class__ is not self._row_type or rows.dtype is not self._dtype or rows.shape != self._shape:
            return self._predict_other(rows)
        clock_ns = self._clock_ns
        start_ns = clock_ns()
        lock = self._lock
        lock.acquire()  # `with` costs twice as much, a fiftieth of a small model's call
        try:
            measure_cpu = self.measure_cpu  # read once: it may be set while this runs
            if measure_cpu and self.incumbent is not None:
                measure_cpu = self._candidates_turn(rows)
            cpu_ns = self._cpu_clock_ns() if measure_cpu else 0
            serving = self._serving
            slot = self._filled
            row, run, copy_score = serving.slots[slot]
            row[...] = rows
            if _vdot(row, self._zeros) != 0.0:  # 0 * NaN and 0 * inf are NaN: one pass finds both
                self._check(row[None])
            try:
                run()
            except Block.failures as e:
                self._fail(1, f"the graph failed on one row: {e}", e)
            score = copy_score()
            if _vdot(score, serving.no_score) != 0.0:
                self._check_scores(serving, row[None], score[None])
            raw = serving.raw[slot]
            if not 0 <= raw < serving.classes:
                self._fail(1, f"the graph answered class {raw}; the manifest has {serving.classes}")
            if measure_cpu:
                self._cpu_ring.append(self._cpu_clock_ns() - cpu_ns)
            self._latency_ring[slot] = clock_ns() - start_ns
            self._filled = slot + 1
            if slot == serving.last:
                self._flush()
        finally:
            lock.release()
        labels = serving.labels
        if labels is None:
            return Prediction(None, score, None, serving.digest)
        return _new_tuple(Prediction, (labels[raw], score, raw, serving.digest))

    def _candidates_turn(self, row: Rows) -> bool:
        """Whether this row's CPU time is the candidate's to spend; every eighth time the incumbent runs the row first.

        Whoever comes first meets caches that others have emptied: so both are timed in the same conditions, and a busy
        device does not condemn a good model.
        """
        self._turn = (self._turn + 1) % TURNS
        incumbent = self.incumbent
        if self._turn or incumbent is None:
            return True
        with np.errstate(over="ignore"):
            row = row.astype(incumbent.dtype, copy=False)
        before_ns = self._cpu_clock_ns()
        try:
            incumbent.run(row)
        except ArtifactError:
            self.incumbent = (
                None  # it has nothing to compare with any more; the candidate is judged without it
            )
            return True
        self._incumbent_ring.append(self._cpu_clock_ns() - before_ns)
        return False

    def _predict_other(self, rows: Any) -> Prediction:
        with self._swapping:
            try:
                table, single = self._schema.convert(rows)
            except InputError as e:
                with self._lock:
                    self._refuse(e.reason, count_rows(rows))
                raise
            if not single:
                return self._predict_batch(table)
            if not self._serving.offsets.size:
                return self.predict(table[0].view(self._row_type))
            label, score, raw, digest = self._predict_batch(table)
            return Prediction(label[0], score[0], raw[0], digest)  # type: ignore[index]

    def _predict_batch(self, table: Rows) -> Prediction:
        start_ns = self._clock_ns()
        with self._lock:
            cpu_ns = self._cpu_clock_ns()
            serving = self._serving
            self._check(table)
            try:
                raw, score = serving.engine.run(table)
            except (ArtifactError, BudgetExceeded):
                self._failed += len(table)
                raise
            self._check_scores(serving, table, score)
            if len(table):
                self._flush()  # rows are counted in the order they came
                serving.binner.observe(table, np.zeros(len(table), np.int64) if raw is None else raw, score)
                if self.measure_cpu:
                    self._cpu_ring.append((self._cpu_clock_ns() - cpu_ns) // len(table))
                self._latency = self._latency.merge(observe_ns(np.asarray([self._clock_ns() - start_ns])))
                self._predictions += len(table)
        return Prediction(serving.labels_of(raw), score, raw, serving.digest)

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

    def trial_stats(self) -> TrialStats:
        """Totals of the model in service since it was put there."""
        with self._lock:
            self._flush()
            return TrialStats(
                predictions=self._predictions,
                failed=self._failed_before + self._failed,
                cpu=self._cpu,
                incumbent_cpu=self._incumbent_cpu,
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
        with self._swapping:
            self._check_same_stream(engine)
            serving = _Serving(engine)
            with self._lock:
                seen = self._take()
                self._begin(serving)
        trim_memory()
        return seen

    def _check_same_stream(self, engine: Engine) -> None:
        old, new = self.engine.info.manifest, engine.info.manifest
        names, wanted = self._schema.names, tuple(feature.name for feature in new.features)
        if wanted != names:
            raise ArtifactError(
                f"model {engine.digest} reads features {list(wanted)}; this stream carries {list(names)}: "
                "build a new Runtime for it"
            )
        for before, after in zip(old.features, new.features, strict=True):
            if before.kind != after.kind:
                raise ArtifactError(
                    f"model {engine.digest} reads feature {after.name!r} as a {after.kind}; this stream carries a "
                    f"{before.kind}: build a new Runtime for it"
                )
        if len(old.multilabels) != len(new.multilabels):
            raise ArtifactError(
                f"model {engine.digest} has {len(new.outputs)} label outputs instead of {len(old.outputs)}: "
                "build a new Runtime for it"
            )

    def _take(self) -> Observation:
        self._flush()
        seen = Observation(
            digest=self._serving.digest,
            profile=self._serving.binner.take(),
            latency=self._latency,
            refused=tuple(sorted(self._refused.items())),
            failed=self._failed,
            labelled=self._labelled,
            correct=self._correct,
        )
        self._failed_before += self._failed
        self._clear_window()
        return seen

    def _flush(self) -> None:
        n, serving = self._filled, self._serving
        if n:
            self._filled = 0
            self._predictions += n
            block = serving.block
            labels = serving.no_labels[:n] if block.labels is None else block.labels[:n]
            serving.binner.observe(block.rows[:n], labels, block.scores[:n])
            self._latency = self._latency.merge(observe_ns(np.frombuffer(self._latency_ring, np.int64, n)))
        if self._cpu_ring:
            self._cpu = self._cpu.merge(observe_ns(np.array(self._cpu_ring, np.int64)))
            self._cpu_ring = array("q")
        if self._incumbent_ring:
            self._incumbent_cpu = self._incumbent_cpu.merge(
                observe_ns(np.array(self._incumbent_ring, np.int64))
            )
            self._incumbent_ring = array("q")

    def _check(self, table: Rows) -> None:
        try:
            self._schema.check(table)
        except InputError as e:
            self._refuse(e.reason, len(table))
            raise

    def _check_scores(self, serving: "_Serving", table: Rows, scores: Scores) -> None:
        """Refuses rows without an answer: a NaN among the scores (n, C) of a model whose pipeline never gives one."""
        if serving.undefined:
            return
        missing = np.isnan(scores).any(axis=1)
        if not missing.any():
            return
        i = int(missing.argmax())
        where = f"row {i}: " if len(table) > 1 else ""
        try:
            columns = serving.without_answer(table[i])
        except (ArtifactError, BudgetExceeded):
            columns = []  # then no feature is named
        self._refuse("undefined", len(table))
        raise InputError("undefined", f"{where}{self._schema.no_answer(table[i], columns)}")

    def _refuse(self, reason: str, rows: int) -> None:
        self._refused[reason] = self._refused.get(reason, 0) + rows

    def _fail(self, rows: int, problem: str, cause: Exception | None = None) -> NoReturn:
        self._failed += rows
        raise ArtifactError(f"model {self._serving.digest}: {problem}") from cause


class _Serving:
    """A model in service with its ring, unpacked so that the hot path looks nothing up twice."""

    __slots__ = (
        "binner",
        "block",
        "classes",
        "digest",
        "engine",
        "label_array",
        "labels",
        "last",
        "no_labels",
        "no_score",
        "offsets",
        "raw",
        "slots",
        "undefined",
    )

    def __init__(self, engine: Engine) -> None:
        manifest = engine.info.manifest
        row_bytes = engine.dtype.itemsize * engine.features + 4 * engine.width
        size = max(1, min(RING_ROWS, RING_BYTES // row_bytes))
        self.last: Final = size - 1
        self.engine: Final = engine
        self.digest: Final = engine.digest
        block = engine.bind(size)
        self.block: Final = block  # owns the memory that the slots point into
        self.slots: Final = tuple(
            zip(block.rows, block.runs, [score.copy for score in block.scores], strict=True)
        )
        self.no_labels: Final = np.zeros(size, np.int64)
        self.no_score: Final = np.zeros(engine.width, np.float32)
        self.undefined: Final = manifest.undefined
        single = block.labels is not None and block.labels.ndim == 1
        self.raw: Final = (block.labels if single else self.no_labels).data  # type: ignore[union-attr]
        self.labels: Final[tuple[Label, ...] | None] = manifest.labels or None
        self.classes: Final = len(manifest.labels) or 1
        together = tuple(label for output in manifest.outputs for label in output)
        self.label_array: Final = _label_array(together) if together else None
        sizes = [len(output) for output in manifest.multilabels]
        self.offsets: Final = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
        self.binner: Final = Binner(engine.info.reference.spec, probabilities=manifest.probabilities)

    def without_answer(self, row: Rows) -> list[int]:
        """The columns of ``row`` (F,) that are to blame for a NaN score: with a golden row's value it has none."""
        known = self.engine.info.golden.rows
        if self.engine.features > MOST_BLAMED or not len(known):
            return []
        trial = np.repeat(row[None], self.engine.features, axis=0)
        np.fill_diagonal(trial, known[0])
        _, scores = self.engine.run(trial)
        return [int(j) for j in np.flatnonzero(~np.isnan(scores).any(axis=1))]

    def labels_of(self, raw: NDArray[np.int64] | None) -> NDArray[Any] | None:
        """The labels of indices (n,) or (n, K); ``offsets`` (K,) says where each output's labels start."""
        if raw is None or self.label_array is None:
            return None
        found: NDArray[Any] = self.label_array[raw + self.offsets if self.offsets.size else raw]
        return found


def _label_array(labels: tuple[Label, ...]) -> NDArray[Any]:
    """Labels as an array that keeps type and value: where numpy's own types do not, labels stay Python objects."""
    if len({type(label) for label in labels}) == 1:
        made = np.array(labels)
        # Large integers become floats beside small ones, and text loses a NUL at its end.
        if [(type(value), value) for value in made.tolist()] == [(type(label), label) for label in labels]:
            return made
    found = np.empty(len(labels), object)
    found[:] = labels
    return found
