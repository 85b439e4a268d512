"""A model in service: its ring of rows, what it was asked, and what is counted of it."""

from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ArtifactError, BudgetExceeded
from edge_runtime.contract.latency import LatencyHistogram, observe_ns
from edge_runtime.contract.manifest import Label
from edge_runtime.contract.profile import Binner
from edge_runtime.contract.ranges import Limits
from edge_runtime.engine import Block, Engine, Rows, Scores
from edge_runtime.runlimit import Run
from edge_runtime.schema import Schema

RING_ROWS: Final = 1024
"""Counting a ring takes some 0.4 ms and leaves the caches cold for a few rows. With rings of 256 rows that was one row
in a hundred, and the 99th percentile of the time a row takes."""

RING_BYTES: Final = 1 << 20
"""Wide rows get a shorter ring: its rows and scores together stay below this. So do batches that wait to be counted."""

WAITING_ROWS: Final = 1024
"""Rows of batches that wait to be counted: at once they cost less, and most batches are answered without waiting."""

MOST_BLAMED: Final = 1024
"""Wider rows are refused without naming the feature to blame: finding it takes a prediction per feature."""


class Serving:
    """A model in service with its ring, unpacked so that the hot path looks nothing up twice.

    Not thread-safe. ``ring`` holds the records of answered rows, see `Block`, until they are counted, ``size`` of them
    at once. ``hot`` is what answering a row needs: where to write it, the run (for a model with ranges it begins with a
    look at these), the record, a copy of the scores, and which bytes of the record tell that something in it may not be
    finite (of the row's and the scores' numbers together, or of the row's and then of the scores'). ``tap`` is given
    rows that were counted, see `Runtime.tap`.
    """

    __slots__ = (
        "_block",
        "_counts_labels",
        "_most_waiting",
        "_waiting",
        "_waiting_rows",
        "binner",
        "classes",
        "digest",
        "engine",
        "hot",
        "label_array",
        "labels",
        "offsets",
        "raw",
        "ring",
        "schema",
        "size",
        "tap",
        "undefined",
    )

    def __init__(self, engine: Engine) -> None:
        manifest = engine.info.manifest
        block = engine.bind()
        size = max(1, min(RING_ROWS, RING_BYTES // block.layout.itemsize))
        self.size: Final = size
        self.engine: Final = engine
        self.digest: Final = engine.digest
        self.schema: Final = Schema(manifest.features, manifest.input_dtype)
        self._block: Final = block  # owns the memory that the rest points into
        self.ring: list[bytes] = []
        limits = Limits.of(manifest.features, manifest.input_dtype)
        run = block.run if limits is None else _run_inside(limits, block)
        self.hot: Final = (block.row, run, block.memory.tobytes, block.scores.copy, *_tops(block))
        self.undefined: Final = manifest.undefined
        single = block.labels is not None and not manifest.multilabels
        self._counts_labels: Final = single
        self.raw: Final = (block.labels if single else np.zeros(1, np.int64)).data  # type: ignore[union-attr]
        self.labels: Final[tuple[Label, ...] | None] = manifest.labels or None
        self.classes: Final = len(manifest.labels) or 1
        together = tuple(label for output in manifest.outputs for label in output)
        self.label_array: Final = _label_array(together) if together else None
        sizes = [len(output) for output in manifest.multilabels]
        self.offsets: Final = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
        self.binner: Final = Binner(engine.info.reference.spec, probabilities=manifest.probabilities)
        self._most_waiting: Final = max(1, min(WAITING_ROWS, RING_BYTES // block.layout.itemsize))
        self._waiting: tuple[NDArray[Any], ...] | None = None  # rows, labels, scores
        self._waiting_rows = 0
        self.tap: Callable[[Rows], None] | None = None

    @property
    def rows(self) -> int:
        """Rows counted or waiting for it, without those in the ring."""
        return self.binner.rows + self._waiting_rows

    def count_later(self, rows: Rows, labels: NDArray[np.int64] | None, scores: Scores) -> None:
        """Counts the rows (n, F) of a batch, or keeps them to be counted together with the next ones."""
        n = len(rows)
        found = np.zeros(n, np.int64) if labels is None or labels.ndim > 1 else labels
        if self._waiting_rows + n > self._most_waiting:
            self.count()
        if n > self._most_waiting:
            self._observe(rows, found, scores)
            return
        if self._waiting is None:
            self._waiting = tuple(
                np.empty((self._most_waiting, *values.shape[1:]), values.dtype)
                for values in (rows, found, scores)
            )
        at = slice(self._waiting_rows, self._waiting_rows + n)
        for kept, values in zip(self._waiting, (rows, found, scores), strict=True):
            kept[at] = values
        self._waiting_rows += n

    def count_ring(self, ring: list[bytes]) -> None:
        """Counts the records of ``ring``, behind the batches that came before them."""
        if not ring:
            return
        self.count()
        found = np.frombuffer(b"".join(ring), self._block.layout)
        labels = found["labels"] if self._counts_labels else np.zeros(len(ring), np.int64)
        self._observe(found["row"], labels, found["scores"])

    def count(self) -> None:
        """Counts the batches that wait, in the order they came."""
        if self._waiting is not None and self._waiting_rows:
            n, self._waiting_rows = self._waiting_rows, 0
            rows, labels, scores = (values[:n] for values in self._waiting)
            self._observe(rows, labels, scores)

    def _observe(self, rows: Rows, labels: NDArray[np.int64], scores: Scores) -> None:
        self.binner.observe(rows, labels, scores)
        if self.tap is not None:
            self.tap(rows)

    def without_answer(self, row: Rows) -> list[int]:
        """The columns of ``row`` (F,) that are to blame for a NaN score: with a golden row's value it has none."""
        known = self.engine.info.golden.rows
        if self.engine.features > MOST_BLAMED or not len(known):
            return []
        trial = np.repeat(row[None], self.engine.features, axis=0)
        np.fill_diagonal(trial, known[0])
        try:
            _, scores = self.engine.run(trial)
        except (ArtifactError, BudgetExceeded):
            return []  # then no feature is named
        return [int(j) for j in np.flatnonzero(~np.isnan(scores).any(axis=1))]

    def labels_of(self, raw: NDArray[np.int64] | None) -> NDArray[Any] | None:
        """The labels of indices (n,) or (n, K); ``offsets`` (K,) says where each output's labels start."""
        if raw is None or self.label_array is None:
            return None
        found: NDArray[Any] = self.label_array[raw + self.offsets if self.offsets.size else raw]
        return found


def check_same_stream(before: Engine, after: Engine) -> None:
    """Raises `ArtifactError` where rows for one model mean something else to the other, or have other labels."""
    old, new = before.info.manifest, after.info.manifest
    names, wanted = [feature.name for feature in old.features], [feature.name for feature in new.features]
    remedy = "build a new Runtime for it"
    if wanted != names:
        raise ArtifactError(
            f"model {after.digest} reads features {wanted}; this stream carries {names}: {remedy}"
        )
    for was, now in zip(old.features, new.features, strict=True):
        if was.kind != now.kind:
            raise ArtifactError(
                f"model {after.digest} reads feature {now.name!r} as a {now.kind}; this stream carries a "
                f"{was.kind}: {remedy}"
            )
    if len(old.multilabels) != len(new.multilabels):
        raise ArtifactError(
            f"model {after.digest} has {len(new.outputs)} label outputs instead of {len(old.outputs)}: {remedy}"
        )


def drained(durations_ns: "array[int]") -> LatencyHistogram:
    """The histogram of the durations, which are forgotten."""
    found = observe_ns(np.array(durations_ns, np.int64))
    del durations_ns[:]
    return found


class Outside(ValueError):
    """A value of the bound row lies outside its range: one of `Block.failures`, after which the row is checked."""


def _run_inside(limits: Limits, block: Block) -> Run:
    """``block.run``, which raises `Outside` instead where the bound row has a value outside its range.

    With the row between the limits in one piece of memory, a single comparison of two stretches of it asks both
    questions: [row, high] < [low, row]. It takes two thirds of the time of two comparisons, and models without ranges
    have none of it.
    """
    width = len(block.row)
    between = np.concatenate([limits.low, block.row, limits.high])
    copy = between[width : 2 * width]
    found = np.empty(2 * width, np.bool_)
    compare = partial(np.less, between[width:], between[: 2 * width], found)
    row, answers, run = block.row, found.tobytes, block.run

    def run_inside() -> None:
        copy[...] = row
        compare()
        if 1 in answers():
            raise Outside
        run()

    return run_inside


def _tops(block: Block) -> tuple[slice, slice | None]:
    """Which bytes of a record have the sign and the seven upper bits of the exponent of its numbers.

    NaN and infinities have 0x7F or 0xFF there, and so have finite numbers from 2^127 in float32 and from 2^1009 in
    float64. To search some bytes for these two costs half of any question about numbers that numpy answers.
    """
    fields = block.layout.fields
    assert fields is not None, "a record has fields"
    start, middle = int(fields["row"][1]), int(fields["scores"][1])
    end = middle + 4 * len(block.scores)
    size = block.row.itemsize
    top = size - 1 if np.little_endian else 0
    if size == block.scores.itemsize:
        return slice(start + top, end, size), None
    score_top = block.scores.itemsize - 1 if np.little_endian else 0
    return slice(start + top, middle, size), slice(middle + score_top, end, block.scores.itemsize)


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
