"""Rows that try to tell an artifact from its pipeline.

Ordinary rows agree even when a graph is wrong at its edges; these rows sit on the edges. For the splits of a forest
there are rows on the threshold and one and two float32 values to each side of it, built on a training row that
bears witness to the split (`converters.witness`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from converters import witness
from converters.reference import CHUNK
from converters.rewrite import Folded, Splits, key_of
from converters.table import Rows, spread
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.profile import CellSpec

TRAINING: Final = "training"
RANDOM: Final = "random"
THRESHOLD: Final = "threshold"
EXTREME: Final = "extreme"
HUGE: Final = "huge"
INTEGER: Final = "integer"
MISSING: Final = "missing"
BATCH: Final = "batch"
KINDS: Final = (TRAINING, RANDOM, THRESHOLD, EXTREME, HUGE, INTEGER, MISSING, BATCH)
SYNTHETIC: Final = frozenset({RANDOM})
"""Kinds drawn from the cells alone: only such rows may travel in an artifact."""

MIN_PROBES: Final = 100
_OFFSETS: Final = (0, 1, -1, 2, -2)
_HUGE_ROWS: Final = 16
_BATCH_ROWS: Final = 256
_LARGEST: Final = np.finfo(np.float32).max


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Which splits of a forest the threshold rows try.

    Attributes:
        splits: how many splits the forest has.
        distinct: how many different (column, threshold) pairs they are.
        reached: splits that some training row reaches, so that their threshold rows do too.
        decisive: splits whose threshold rows change the tree's answer from one side to the other, so that a threshold
            that is off by a single float32 value cannot hide.
        by_offset: rows per distance from the threshold in float32 values; every distinct pair has rows at 0, +1 and -1.
    """

    splits: int
    distinct: int
    reached: int
    decisive: int
    by_offset: tuple[tuple[int, int], ...]


class Probes:
    """All probe rows for one model; iterating again gives the same rows. At most `CHUNK` rows are held at once.

    Args:
        rows: (n, F) float32 training rows.
        missing: (F,) bool, the columns that may hold NaN.
        spec: the cells to draw random rows from.
        folded: the folded estimator, for the thresholds and for who reaches them.
        probes: how many rows are wanted. Each distinct threshold is covered at 0 and ±1 even if that takes more.
        seed: fixes every draw.

    Raises:
        ConfigError: ``probes`` is below `MIN_PROBES`.
    """

    def __init__(
        self,
        rows: Rows,
        missing: NDArray[np.bool_],
        spec: CellSpec,
        folded: Folded,
        *,
        probes: int,
        seed: int,
    ) -> None:
        if probes < MIN_PROBES:
            raise ConfigError(f"probes is {probes}; at least {MIN_PROBES} rows prove anything")
        self._rows = rows
        self._may_miss = missing
        self._missing = np.flatnonzero(missing)
        self._spec = spec
        self._seed = seed
        self._splits = folded.splits
        self._segments: list[tuple[int, NDArray[np.int64]]] = []
        self._base = np.zeros(0, np.int64)
        self.coverage: Coverage | None = None
        if folded.splits is not None:
            self._plan_thresholds(folded, folded.splits, probes)
        self._sizes = self._plan(probes)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows per kind."""
        return {kind: size for kind, size in self._sizes.items() if size}

    def __iter__(self) -> Iterator[tuple[str, Rows]]:
        return self.limited(None)

    def limited(self, per_kind: int | None) -> Iterator[tuple[str, Rows]]:
        """Yields (kind, rows), at most ``per_kind`` rows of each kind, in chunks of at most `CHUNK` rows."""
        for number, kind in enumerate(KINDS):
            left = self._sizes[kind] if per_kind is None else min(per_kind, self._sizes[kind])
            source = self._sources()[kind](np.random.default_rng([self._seed, number]), left)
            for chunk in source:
                yield kind, chunk

    def _plan(self, probes: int) -> dict[str, int]:
        width = self._rows.shape[1]
        sizes = {
            TRAINING: min(len(self._rows), probes // 8),
            THRESHOLD: sum(len(at) for _, at in self._segments),
            EXTREME: min(len(_extremes(self._rows[:, 0])) * width, probes // 10),
            HUGE: min(_HUGE_ROWS, probes // 20),
            INTEGER: probes // 20,
            MISSING: probes // 20 if self._missing.size else 0,
            BATCH: min(_BATCH_ROWS, probes // 20),
        }
        sizes[RANDOM] = max(probes - sum(sizes.values()), probes // 10)
        return sizes

    def _sources(self) -> dict[str, Callable[[np.random.Generator, int], Iterator[Rows]]]:
        return {
            TRAINING: self._training,
            RANDOM: self._random,
            THRESHOLD: self._threshold,
            EXTREME: self._extreme,
            HUGE: self._huge,
            INTEGER: self._integer,
            MISSING: self._with_missing,
            BATCH: self._batch,
        }

    def _training(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        picked = np.sort(rng.permutation(len(self._rows))[:count])
        for part in _parts(count):
            yield self._rows[picked[part]]

    def _drawn(self, rng: np.random.Generator, count: int) -> Rows:
        """``count`` training rows, with repetition; the caller may write to them."""
        return self._rows[rng.integers(len(self._rows), size=count)]

    def _random(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        for part in _parts(count):
            yield rows_in_cells(self._spec, rng, part.stop - part.start)

    def _integer(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Whole multiples of a power of two near each column's spread; the first row is all zeros."""
        with np.errstate(divide="ignore", invalid="ignore"):
            exponent = np.floor(np.log2(spread(self._rows)))
        unit = np.exp2(np.where(np.isfinite(exponent), exponent, 0.0))
        for part in _parts(count):
            rows = self._drawn(rng, part.stop - part.start).astype(np.float64)
            step = unit * np.exp2(rng.integers(-6, 4, size=(len(rows), 1)))
            found = np.clip(np.rint(rows / step) * step, -_LARGEST, _LARGEST).astype(np.float32)
            if part.start == 0:
                found[:1] = 0.0
            yield found

    def _extreme(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Training rows with one value at, beyond or far beyond the column's range, or next to zero."""
        width = self._rows.shape[1]
        values = np.stack([_extremes(self._rows[:, j]) for j in range(width)])
        order = rng.permutation(values.size)[:count]
        for part in _parts(count):
            rows = self._drawn(rng, part.stop - part.start)
            column, which = np.divmod(order[part], values.shape[1])
            rows[np.arange(len(rows)), column] = values[column, which]
            yield rows

    def _huge(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Values near the end of float32, which many pipelines refuse themselves."""
        values = np.array([1e18, -1e18, 1e30, -1e30, _LARGEST, -_LARGEST], np.float32)
        rows = self._drawn(rng, count)
        rows[np.arange(count), rng.integers(rows.shape[1], size=count)] = values[
            np.arange(count) % len(values)
        ]
        yield rows

    def _with_missing(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Training rows with NaN scattered over the columns that may hold it; the first row has all of them."""
        for part in _parts(count):
            rows = self._drawn(rng, part.stop - part.start)
            holes = rng.random((len(rows), self._missing.size)) < rng.random((len(rows), 1))
            if part.start == 0:
                holes[:1] = True
            rows[:, self._missing] = np.where(holes, np.float32(np.nan), rows[:, self._missing])
            yield rows

    def _batch(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        half = count // 2
        yield np.concatenate([self._drawn(rng, half), rows_in_cells(self._spec, rng, count - half)])

    def _plan_thresholds(self, folded: Folded, splits: Splits, allowed: int) -> None:
        pairs = np.stack([splits.feature, key_of(splits.threshold)], axis=1)
        first = np.sort(np.unique(pairs, axis=0, return_index=True)[1])
        rest = np.setdiff1d(np.arange(len(pairs)), first)
        every = np.concatenate([first, rest])
        for offset, at in (
            *((offset, first) for offset in _OFFSETS[:3]),
            *((offset, rest) for offset in _OFFSETS[:3]),
            *((offset, every) for offset in _OFFSETS[3:]),
        ):
            room = len(at) if at is first else max(0, min(len(at), allowed))
            allowed -= room
            self._segments.append((offset, at[:room]))
        self._base, decisive = witness.find(folded, splits, self._rows, self._may_miss)
        self.coverage = Coverage(
            splits=len(pairs),
            distinct=len(first),
            reached=int((self._base >= 0).sum()),
            decisive=int(decisive.sum()),
            by_offset=tuple(
                (offset, sum(len(at) for o, at in self._segments if o == offset)) for offset in _OFFSETS
            ),
        )

    def _threshold(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        splits = self._splits
        if splits is None:
            return
        key = key_of(splits.threshold)
        for offset, at in self._segments:
            taken = at[: max(0, count)]
            count -= len(taken)
            for part in _parts(len(taken)):
                split = taken[part]
                base = self._base[split]
                stray = rng.integers(len(self._rows), size=len(split))
                rows = self._rows[np.where(base >= 0, base, stray)]
                column = splits.feature[split]
                rows[np.arange(len(rows)), column] = witness.beside(
                    key[split], offset, self._may_miss[column]
                )
                yield rows


def rows_in_cells(spec: CellSpec, rng: np.random.Generator, count: int) -> Rows:
    """``count`` synthetic rows (count, F) float32: per value a cell at random, then a value in it at random.

    The open first and last cells reach as far out as the inner cells do together.
    """
    rows = np.empty((count, len(spec.features)), np.float32)
    for j, cells in enumerate(spec.features):
        edges = np.asarray(cells.edges, np.float64)
        reach = edges[-1] - edges[0] or max(1.0, abs(edges[0]))
        bounds = np.concatenate([[edges[0] - reach], edges, [edges[-1] + reach]])
        cell = rng.integers(cells.cells, size=count)
        drawn = bounds[cell] + rng.random(count) * (bounds[cell + 1] - bounds[cell])
        rows[:, j] = np.clip(drawn, -_LARGEST, _LARGEST)
    return rows


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


def _extremes(column: Rows) -> Rows:
    """(12,) values at the ends of a column's range, beyond them, and around zero."""
    finite = column[np.isfinite(column)].astype(np.float64)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    span = high - low or max(1.0, abs(low))
    ends = np.clip(
        [low, high, low - span, high + span, low - 100 * span, high + 100 * span], -_LARGEST, _LARGEST
    )
    near = ends.astype(np.float32)
    steps = np.nextafter(near[:2], np.array([-np.inf, np.inf], np.float32))
    tiny = np.finfo(np.float32).smallest_subnormal
    return np.concatenate([near, steps, np.array([0.0, -0.0, tiny, -tiny], np.float32)])
