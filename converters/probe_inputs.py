"""Rows that try to tell an artifact from its pipeline.

Ordinary rows agree even when a graph is wrong at its edges; these rows sit on the edges. For the splits of trees
there are rows on the threshold and one and two floating-point values to each side of it, built on a training row
that bears witness to the split (`converters.witness`); for bins, categories and clips rows around each of their
edges. Where the graph's own structure says nothing, the pipeline does: between two training rows with different
answers lies an edge, and it is found by bisection over the values of one column.

Where ranges are declared, no row leaves them: devices refuse it, so there is nothing to prove. Their ends are tried,
one by one and together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from converters import boundaries, equidistant, probe_splits, probe_values, witness
from converters.boundaries import Ask
from converters.lowering.graph import Lowering
from converters.probe_values import LARGEST, OFFSETS
from converters.reference import CHUNK, Acceptance
from converters.table import Rows, spread
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.profile import CellSpec

TRAINING: Final = "training"
RANDOM: Final = "random"
THRESHOLD: Final = "threshold"
EDGE: Final = "edge"
BOUNDARY: Final = "boundary"
EXTREME: Final = "extreme"
HUGE: Final = "huge"
INTEGER: Final = "integer"
MISSING: Final = "missing"
INFINITE: Final = "infinite"
CATEGORY: Final = "category"
BATCH: Final = "batch"
EQUIDISTANT: Final = "equidistant"
FAR: Final = "far"
LIMIT: Final = "limit"
KINDS: Final = (
    TRAINING,
    RANDOM,
    THRESHOLD,
    EXTREME,
    HUGE,
    INTEGER,
    MISSING,
    BATCH,
    EDGE,
    BOUNDARY,
    INFINITE,
    CATEGORY,
    EQUIDISTANT,
    FAR,
    LIMIT,
)
SYNTHETIC: Final = frozenset({RANDOM})
"""Kinds drawn from the cells alone: only such rows may travel in an artifact."""

MIN_PROBES: Final = 100
_HUGE_ROWS: Final = 16
LEAST_EQUIDISTANT: Final = 512
"""However few probes are wanted: a tie that falls otherwise is easily missed by fewer."""
_BATCH_ROWS: Final = 256
_LEAST_CORNERS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Which splits of trees the threshold rows try.

    Where ranges are declared, splits and values outside of them are not there for any row, and are not counted.

    Attributes:
        splits: how many splits the trees have.
        distinct: how many different (column, threshold) pairs they are.
        reached: splits that some training row reaches, so that their threshold rows do too.
        decisive: splits whose threshold rows change the tree's answer from one side to the other, so that a threshold
            that is off by a single value cannot hide.
        by_offset: rows per distance from the threshold in floating-point values; every distinct pair has rows at 0, +1
            and -1.
    """

    splits: int
    distinct: int
    reached: int
    decisive: int
    by_offset: tuple[tuple[int, int], ...]


class Probes:
    """All probe rows for one model; iterating again gives the same rows. At most `CHUNK` rows are held at once.

    Args:
        rows: (n, F) training rows in the artifact's input dtype, codes in columns of categories; none lies outside a
            declared range.
        takes: what the pipeline accepts in each column; one that takes only what it held in training keeps its values.
        spec: the cells to draw random rows from.
        lowered: the lowered pipeline, for its edges and trees.
        vocabulary: (F,) how many categories each column has; 0 for a column of numbers.
        ask: the pipeline's answers, to look for boundaries; None looks for none.
        probes: how many rows are wanted. Each distinct threshold is covered at 0 and ±1 even if that takes more.
        seed: fixes every draw.

    Raises:
        ConfigError: ``probes`` is below `MIN_PROBES`.
    """

    def __init__(
        self,
        rows: Rows,
        takes: Acceptance,
        spec: CellSpec,
        lowered: Lowering,
        *,
        vocabulary: NDArray[np.int64],
        ask: Ask | None,
        probes: int,
        seed: int,
    ) -> None:
        if probes < MIN_PROBES:
            raise ConfigError(f"probes is {probes}; at least {MIN_PROBES} rows prove anything")
        self._rows = rows
        self._takes = takes
        self._missing = np.flatnonzero(takes.missing)
        self._vocabulary = vocabulary
        free = vocabulary == 0
        free[list(takes.only)] = False
        self._numbers = np.flatnonzero(free)
        self._infinite = probe_values.infinities(takes)
        self._ends = probe_values.ends(takes.limits, self._numbers, rows.dtype)
        self._endless = probe_values.endless(takes.limits, self._numbers)
        self._spec = spec
        self._seed = seed
        self._segments: list[tuple[int, NDArray[np.int64]]] = []
        self._splits = probe_splits.read(lowered.ensembles, rows, takes)
        self._one_way = self._splits.open_to_infinity(takes)
        self.coverage: Coverage | None = None
        if len(self._splits.column):
            self._plan_thresholds(probes)
        edges = [(column, values) for column, values in lowered.edges if column not in takes.only]
        beside = probe_values.around(edges, rows.dtype)
        self._edges = beside[probe_values.allowed(takes.limits, beside)][: max(probes, MIN_PROBES)]
        self._boundary = rows[:0] if ask is None else boundaries.find(rows, self._numbers, ask, seed)
        self._categories = probe_values.categories(vocabulary, takes.unseen)
        self._searches = lowered.searches
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
                yield kind, self._inside(chunk)

    def _inside(self, rows: Rows) -> Rows:
        """The rows with what lies outside its range at the nearer end of that."""
        limits = self._takes.limits
        return rows if limits is None else np.clip(rows, limits.low, limits.high)

    def _plan(self, probes: int) -> dict[str, int]:
        sizes = {
            TRAINING: min(len(self._rows), probes // 8),
            THRESHOLD: sum(len(at) for _, at in self._segments),
            EXTREME: min(probe_values.EXTREMES * len(self._numbers), probes // 10),
            HUGE: min(_HUGE_ROWS, probes // 20) if self._endless.size else 0,
            INTEGER: probes // 20 if self._numbers.size else 0,
            MISSING: probes // 20 if self._missing.size else 0,
            BATCH: min(_BATCH_ROWS, probes // 20),
            EDGE: len(self._edges),
            BOUNDARY: len(self._boundary),
            INFINITE: min(len(self._infinite) + len(self._one_way.column), probes // 20),
            CATEGORY: max(len(self._categories), probes // 20) if len(self._categories) else 0,
            EQUIDISTANT: max(probes // 10, LEAST_EQUIDISTANT) if self._searches else 0,
            FAR: probes // 40 if self._searches and self._numbers.size else 0,
            LIMIT: len(self._ends) + max(probes // 20, _LEAST_CORNERS) if len(self._ends) else 0,
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
            EDGE: self._at_edges,
            BOUNDARY: self._at_boundaries,
            INFINITE: self._with_infinities,
            CATEGORY: self._with_categories,
            EQUIDISTANT: self._equidistant,
            FAR: self._far,
            LIMIT: self._at_limits,
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
            yield self._in_cells(rng, part.stop - part.start)

    def _in_cells(self, rng: np.random.Generator, count: int) -> Rows:
        return rows_in_cells(self._spec, rng, count, self._vocabulary, self._takes, self._rows.dtype)

    def _integer(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Whole multiples of a power of two near each column's spread; the first row is all zeros."""
        with np.errstate(divide="ignore", invalid="ignore"):
            exponent = np.floor(np.log2(spread(self._rows)))
        unit = np.exp2(np.where(np.isfinite(exponent), exponent, 0.0))[self._numbers]
        for part in _parts(count):
            rows = self._drawn(rng, part.stop - part.start)
            step = unit * np.exp2(rng.integers(-6, 4, size=(len(rows), 1)))
            found = np.clip(np.rint(rows[:, self._numbers] / step) * step, -LARGEST, LARGEST)
            if part.start == 0:
                found[:1] = 0.0
            rows[:, self._numbers] = found
            yield rows

    def _extreme(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Training rows with one value at, beyond or far beyond the column's range, or next to zero."""
        values = (
            np.stack([probe_values.extremes(self._rows[:, j]) for j in self._numbers])
            if count
            else np.zeros((0, 1))
        )
        order = rng.permutation(values.size)[:count]
        for part in _parts(count):
            rows = self._drawn(rng, part.stop - part.start)
            column, which = np.divmod(order[part], values.shape[1])
            rows[np.arange(len(rows)), self._numbers[column]] = values[column, which]
            yield rows

    def _huge(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Values near the end of float32, which many pipelines refuse themselves."""
        values = np.array([1e18, -1e18, 1e30, -1e30, LARGEST, -LARGEST], self._rows.dtype)
        rows = self._drawn(rng, count)
        if count:
            at = self._endless[rng.integers(len(self._endless), size=count)]
            rows[np.arange(count), at] = values[np.arange(count) % len(values)]
            if (limits := self._takes.limits) is not None:  # the other side has no end
                rows = np.where(limits.outside(rows), -rows, rows)
            yield rows

    def _with_missing(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Training rows with NaN scattered over the columns that may hold it; the first row has all of them."""
        for part in _parts(count):
            rows = self._drawn(rng, part.stop - part.start)
            holes = rng.random((len(rows), self._missing.size)) < rng.random((len(rows), 1))
            if part.start == 0:
                holes[:1] = True
            rows[:, self._missing] = np.where(holes, np.nan, rows[:, self._missing])
            yield rows

    def _with_infinities(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Training rows with one infinity, then those that reach a split between all numbers and NaN, with ``inf``."""
        alone = min(count, len(self._infinite))
        if alone:
            rows = self._drawn(rng, alone)
            rows[np.arange(alone), self._infinite["column"][:alone]] = self._infinite["value"][:alone]
            yield rows
        for part in _parts(count - alone):
            splits = self._one_way
            rows = self._rows[splits.base[part]]
            rows[np.arange(len(rows)), splits.column[part]] = np.inf
            yield rows

    def _at_limits(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Training rows with one value at the end of its range or beside it, then with several at ends, or all."""
        limits = self._takes.limits
        alone = min(count, len(self._ends))
        for part in _parts(alone):
            rows = self._drawn(rng, part.stop - part.start)
            rows[np.arange(len(rows)), self._ends["column"][part]] = self._ends["value"][part]
            yield rows
        for part in _parts(count - alone):
            assert limits is not None, "without ranges there are no such rows"
            rows = self._drawn(rng, part.stop - part.start)
            ends = np.where(rng.random(rows.shape) < 0.5, limits.low, limits.high)
            share = np.where(np.arange(len(rows)) % 2, 1.0, rng.random(len(rows)))[:, None]
            moved = np.isfinite(ends) & (rng.random(rows.shape) < share)
            moved &= np.isin(np.arange(rows.shape[1]), self._numbers)
            yield np.where(moved, ends, rows)

    def _with_categories(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        """Training rows with each value of each vocabulary, strangers included, then mixtures of them."""
        for part in _parts(count):
            rows = self._drawn(rng, part.stop - part.start)
            column, code = self._categories[np.arange(part.start, part.stop) % len(self._categories)].T
            rows[np.arange(len(rows)), column] = code
            yield rows

    def _batch(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        half = count // 2
        yield np.concatenate([self._drawn(rng, half), self._in_cells(rng, count - half)])

    def _at_edges(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        for part in _parts(count):
            rows = self._drawn(rng, part.stop - part.start)
            column = self._edges["column"][part]
            rows[np.arange(len(rows)), column] = self._edges["value"][part]
            yield rows

    def _at_boundaries(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        del rng
        if count:
            yield self._boundary[:count]

    def _equidistant(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        for part in _parts(count):
            rows = equidistant.find(self._rows, self._numbers, rng, part.stop - part.start)
            if self._missing.size:
                # Every other row gets a hole or two, which a step fills from its neighbours.
                holes = rng.random((len(rows), self._missing.size)) < 1.5 / self._missing.size
                holes[::2] = False
                rows[:, self._missing] = np.where(holes, np.nan, rows[:, self._missing])
            yield rows

    def _far(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        for part in _parts(count):
            yield equidistant.far(self._rows, self._numbers, rng, part.stop - part.start)

    def _plan_thresholds(self, allowed: int) -> None:
        splits = self._splits
        pairs = np.stack([splits.column, splits.key], axis=1)
        first = np.sort(np.unique(pairs, axis=0, return_index=True)[1])
        rest = np.setdiff1d(np.arange(len(pairs)), first)
        every = np.concatenate([first, rest])
        for offset, at in (
            *((offset, first) for offset in OFFSETS[:3]),
            *((offset, rest) for offset in OFFSETS[:3]),
            *((offset, every) for offset in OFFSETS[3:]),
        ):
            held = at[splits.held(offset)[at]]
            room = len(held) if at is first else max(0, min(len(held), allowed))
            allowed -= room
            self._segments.append((offset, held[:room]))
        self.coverage = Coverage(
            splits=len(pairs),
            distinct=len(first),
            reached=int((splits.base >= 0).sum()),
            decisive=int(splits.decisive.sum()),
            by_offset=tuple(
                (offset, sum(len(at) for o, at in self._segments if o == offset)) for offset in OFFSETS
            ),
        )

    def _threshold(self, rng: np.random.Generator, count: int) -> Iterator[Rows]:
        splits = self._splits
        for offset, at in self._segments:
            taken = at[: max(0, count)]
            count -= len(taken)
            for part in _parts(len(taken)):
                split = taken[part]
                base = splits.base[split]
                stray = rng.integers(len(self._rows), size=len(split))
                rows = self._rows[np.where(base >= 0, base, stray)]
                column = splits.column[split]
                rows[np.arange(len(rows)), column] = witness.beside(
                    splits.key[split], offset, self._takes.missing[column], rows.dtype
                )
                yield rows


def rows_in_cells(  # noqa: PLR0917 - what the rows are drawn from
    spec: CellSpec,
    rng: np.random.Generator,
    count: int,
    vocabulary: NDArray[np.int64],
    takes: Acceptance,
    dtype: np.dtype[np.floating],
) -> Rows:
    """``count`` synthetic rows (count, F): per value a cell at random, then a value in it at random; or any category.

    The open first and last cells reach as far out as the inner cells do together. A column that takes only what it
    held in training gets just that. No row leaves a declared range.
    """
    rows = np.empty((count, len(spec.features)), dtype)
    for j, cells in enumerate(spec.features):
        if vocabulary[j]:
            rows[:, j] = rng.integers(-int(takes.unseen[j]), vocabulary[j], size=count)
            continue
        if j in takes.only:
            rows[:, j] = rng.choice(takes.only[j], size=count)
            continue
        edges = np.asarray(cells.edges, np.float64)
        reach = edges[-1] - edges[0] or max(1.0, abs(edges[0]))
        bounds = np.concatenate([[edges[0] - reach], edges, [edges[-1] + reach]])
        if takes.limits is not None:
            bounds = np.clip(bounds, float(takes.limits.low[j]), float(takes.limits.high[j]))
        cell = rng.integers(cells.cells, size=count)
        drawn = bounds[cell] + rng.random(count) * (bounds[cell + 1] - bounds[cell])
        rows[:, j] = np.clip(drawn, -LARGEST, LARGEST)
    return rows if takes.limits is None else np.clip(rows, takes.limits.low, takes.limits.high)


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))
