"""Cells and counts: what a device tells of the rows it saw, and what training data looked like.

A `CellSpec` (the layout) is frozen at training and has its own id. A `Profile` is one histogram per
feature under one layout, plus the histograms of the outputs: exact integers, so that merging is
associative, commutative and loses nothing. Profiles of different layouts cannot be merged.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import LayoutId

Counts = NDArray[np.int64]
Rows = NDArray[np.float32]

GUARD_QUANTILES: Final = (0.001, 0.01)
INNER_CELLS: Final = 16
BESIDE: Final = 3
"""Counters beside the partition, in this order: missing (NaN), non-finite (±inf), repeat (equal to the row before)."""
FIXED_POINT: Final = 1 << 20
"""Probabilities are summed as whole multiples of 2^-20, so that sums merge exactly."""
MAX_FEATURES: Final = 4096
MAX_CLASSES: Final = 4096
MAX_EDGES: Final = 256
MAX_ROWS: Final = 1 << 53
"""Below this the counters of a column cannot overflow when they are summed."""
_SHORT: Final = 32
"""Columns of at most so many edges are binned by comparing with all of them, longer ones by searching."""
_TOGETHER: Final = 32
_CHUNK_ROWS: Final = 256
"""32 columns of 20 edges and 256 rows make 170 kB of comparisons, which stay in a cache of the second level."""

_set: Final = object.__setattr__


@dataclass(frozen=True, slots=True)
class FeatureCells:
    """The cells of one numeric column: ``edges`` are strictly increasing float32 values.

    Cell ``i`` holds ``edges[i-1] < x <= edges[i]``; the first and the last cell are open.
    """

    name: str
    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        found = np.asarray(self.edges, dtype=np.float64)
        if not 1 <= found.size <= MAX_EDGES:
            raise ContractError(f"cells of {self.name!r}: {found.size} edges; 1 to {MAX_EDGES} are allowed")
        if not np.isfinite(found).all() or (np.diff(found) <= 0).any():
            raise ContractError(f"cells of {self.name!r}: edges must be finite and strictly increasing")
        if (found.astype(np.float32).astype(np.float64) != found).any():
            raise ContractError(f"cells of {self.name!r}: edges must be float32 values")

    @property
    def cells(self) -> int:
        """How many cells partition the numbers."""
        return len(self.edges) + 1

    @property
    def size(self) -> int:
        """How many counters the column has, those beside the partition included."""
        return self.cells + BESIDE


def cells_from_training(name: str, values: NDArray[np.floating]) -> FeatureCells:
    """Cells for the ``(n,)`` training values of one column; missing and infinite values are left out.

    16 equiprobable cells between the 1 % and the 99 % quantile, and three guard cells a side: beyond
    those, beyond the 0.1 % and 99.9 % quantiles, and beyond the training minimum and maximum. Edges that
    coincide collapse. A column with no finite value gets one edge, 0.
    """
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite to the device, and left out
        narrow = values.astype(np.float32)
    finite = np.sort(narrow[np.isfinite(narrow)])
    if not finite.size:
        return FeatureCells(name, (0.0,))
    outer = np.asarray(GUARD_QUANTILES)
    inner = np.linspace(outer[-1], 1 - outer[-1], INNER_CELLS + 1)
    quantiles = np.concatenate([outer[:-1], inner, 1 - outer[:-1][::-1]])
    cuts = np.quantile(finite, quantiles, method="lower")
    with np.errstate(over="ignore"):
        below = np.nextafter(finite[0], np.float32(-np.inf), dtype=np.float32)
    edges = np.unique(np.concatenate([[below], cuts, [finite[-1]]]).astype(np.float32))
    return FeatureCells(name, tuple(float(edge) for edge in edges[np.isfinite(edges)]))


def category_cells(name: str, categories: int) -> FeatureCells:
    """Cells for a column of codes 0 … ``categories`` - 1: one for unseen values (-1), then one per category.

    Codes follow the frequency in training, so that beyond `MAX_EDGES` categories the rarest share the last cell.
    """
    return FeatureCells(name, tuple(code - 0.5 for code in range(min(max(1, categories), MAX_EDGES))))


@dataclass(frozen=True)
class CellSpec:
    """The versioned layout: input columns in order, the cells of the score, and the number of classes.

    ``score`` is the largest of a row's scores: the largest class probability of a classifier, the prediction of a
    regressor. ``classes`` counts the labels of a classifier, clusterer or outlier detector; it is 0 for a regressor and
    for a model with several label outputs. A column of categories is binned by its codes.
    """

    features: tuple[FeatureCells, ...]
    score: FeatureCells
    classes: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.features) <= MAX_FEATURES:
            raise ContractError(f"layout: {len(self.features)} features; 1 to {MAX_FEATURES} are allowed")
        if not 0 <= self.classes <= MAX_CLASSES:
            raise ContractError(f"layout: {self.classes} classes; 0 to {MAX_CLASSES} are allowed")

    @cached_property
    def columns(self) -> tuple[FeatureCells, ...]:
        """The binned columns: every feature, then the score."""
        return (*self.features, self.score)

    @cached_property
    def offsets(self) -> Counts:
        """``(F + 2,)`` start of each column's counters; the last entry is where the class counts start."""
        return np.concatenate([[0], np.cumsum([column.size for column in self.columns])]).astype(np.int64)

    @cached_property
    def size(self) -> int:
        """How many counters a profile under this layout has."""
        return int(self.offsets[-1]) + self.classes

    @cached_property
    def layout(self) -> LayoutId:
        """The layout's id: the first 16 hexadecimal digits of a SHA-256 over names, edges and classes."""
        h = hashlib.sha256(f"skiff-layout-1 {self.classes}".encode())
        for column in self.columns:
            name = column.name.encode()
            h.update(len(name).to_bytes(4, "little") + name)
            h.update(len(column.edges).to_bytes(4, "little") + np.asarray(column.edges, "<f4").tobytes())
        return LayoutId(h.hexdigest()[:16])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:  # noqa: PLW1641 (arrays are compared, never hashed)
    """Counts under one layout.

    ``counts`` is ``(spec.size,)`` int64, read-only: per column its cells, then missing, non-finite and
    repeat; after the columns the predicted-class counts. ``sums`` is ``(1 + classes,)`` int64 for a
    classifier with probabilities (Σ max p, then Σ p per class, in units of 2^-20), else empty.
    """

    layout: LayoutId
    rows: int
    counts: Counts
    sums: Counts

    def __post_init__(self) -> None:
        for name in ("counts", "sums"):
            array = np.array(getattr(self, name), dtype=np.int64)
            if array.ndim != 1 or np.minimum.reduce(array, initial=0) < 0:
                raise ContractError(f"profile.{name}: expected a list of counts of at least 0")
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @classmethod
    def counted(cls, layout: LayoutId, rows: int, counts: Counts, sums: Counts) -> "Profile":
        """A profile of what is known to be counts of at least 0, ``(n,)`` int64 each.

        They are taken over, neither looked through nor copied: nobody may write to them from then on.
        """
        profile = object.__new__(cls)
        counts.setflags(write=False)
        sums.setflags(write=False)
        _set(profile, "layout", layout)
        _set(profile, "rows", rows)
        _set(profile, "counts", counts)
        _set(profile, "sums", sums)
        return profile

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        return (
            self.layout == other.layout
            and self.rows == other.rows
            and np.array_equal(self.counts, other.counts)
            and np.array_equal(self.sums, other.sums)
        )

    def merge(self, other: "Profile") -> "Profile":
        """The profile of both sets of rows; raises `ContractError` when the layouts differ."""
        self.check_alike(other)
        return Profile(
            layout=self.layout,
            rows=self.rows + other.rows,
            counts=self.counts + other.counts,
            sums=self.sums + other.sums,
        )

    def check_alike(self, other: "Profile") -> None:
        """Raises `ContractError` when the two cannot be merged."""
        if self.layout != other.layout or self.counts.size != other.counts.size:
            raise ContractError(f"profiles of layouts {self.layout} and {other.layout} cannot be merged")
        if self.sums.size != other.sums.size:
            raise ContractError("a profile with probability sums cannot be merged with one without")

    def check(self, spec: CellSpec) -> "Profile":
        """Returns itself when it fits ``spec``; raises `ContractError` naming what does not."""
        if fit((self,), spec)[0]:
            return self
        raise ContractError(self._misfit(spec))

    def _misfit(self, spec: CellSpec) -> str:
        """What is wrong with a profile that does not `fit`."""
        if self.layout != spec.layout:
            return f"profile of layout {self.layout} read under layout {spec.layout}"
        if self.counts.size != spec.size or self.sums.size not in (0, 1 + spec.classes):
            return (
                f"profile has {self.counts.size} counters and {self.sums.size} sums; layout {spec.layout} has "
                f"{spec.size} and {1 + spec.classes}"
            )
        if not 0 <= self.rows < MAX_ROWS or int(self.counts.max()) > self.rows:
            return f"profile counts {self.counts.max()} of something in {self.rows} rows"
        seen = _seen(self.counts[None], spec)[0]
        wrong = np.flatnonzero(seen != self.rows)
        if wrong.size:
            j = int(wrong[0])
            return f"profile of {spec.columns[j].name!r} counts {seen[j]} values in {self.rows} rows"
        classes = int(class_counts(spec, self).sum())
        if spec.classes and classes != self.rows:
            return f"profile counts {classes} classes in {self.rows} rows"
        return f"profile sums probabilities to more than 1 in each of {self.rows} rows"


def fit(profiles: Sequence[Profile], spec: CellSpec) -> list[bool]:
    """Which profiles could have been counted under ``spec``; many cost little more than one each."""
    found = [
        p.layout == spec.layout
        and p.counts.size == spec.size
        and p.sums.size in (0, 1 + spec.classes)
        and 0 <= p.rows < MAX_ROWS
        and max(p.sums.tolist(), default=0) <= p.rows * FIXED_POINT
        for p in profiles
    ]
    likely = [i for i, so_far in enumerate(found) if so_far]
    for start in range(0, len(likely), _TOGETHER):
        part = likely[start : start + _TOGETHER]
        counts = np.stack([profiles[i].counts for i in part])
        rows = np.array([profiles[i].rows for i in part])
        good = (counts.max(axis=1) <= rows) & (_seen(counts, spec) == rows[:, None]).all(axis=1)
        if spec.classes:
            good &= counts[:, int(spec.offsets[-1]) :].sum(axis=1) == rows
        for i, is_good in zip(part, good.tolist(), strict=True):
            found[i] = is_good
    return found


def _seen(counts: Counts, spec: CellSpec) -> Counts:
    """``(n, columns)`` rows that each column's counters add up to: all but its last, `repeat`, ``counts`` (n, size)."""
    ends = spec.offsets[1:]
    sums: Counts = np.add.reduceat(counts[:, : ends[-1]], spec.offsets[:-1], axis=1)
    return sums - counts[:, ends - 1]


def empty_profile(spec: CellSpec, *, probabilities: bool) -> Profile:
    """A profile of no rows; merging with it changes nothing."""
    return Profile(
        layout=spec.layout,
        rows=0,
        counts=np.zeros(spec.size, np.int64),
        sums=np.zeros(1 + spec.classes if probabilities else 0, np.int64),
    )


def merged(profiles: Sequence[Profile]) -> Profile:
    """The merged profile of at least one profile; raises `ContractError` when their layouts differ."""
    first = profiles[0]
    for other in profiles:
        first.check_alike(other)
    return Profile(
        layout=first.layout,
        rows=sum(profile.rows for profile in profiles),
        counts=np.sum([profile.counts for profile in profiles], axis=0, dtype=np.int64),
        sums=np.sum([profile.sums for profile in profiles], axis=0, dtype=np.int64),
    )


def merge_all(spec: CellSpec, profiles: Sequence[Profile], *, probabilities: bool) -> Profile:
    """The merged profile of any number of profiles under ``spec``."""
    total = empty_profile(spec, probabilities=probabilities)
    for profile in profiles:
        total = total.merge(profile)
    return total


class Binner:
    """Counts rows of one stream under one layout; the only mutable part of this module.

    Bin in bulk: 256 rows at once cost a tenth of what 256 single rows cost. Not thread-safe.
    """

    __slots__ = (
        "_beside",
        "_counts",
        "_groups",
        "_last",
        "_long",
        "_offsets",
        "_probabilities",
        "_rows",
        "_spec",
        "_sums",
        "_width",
    )

    def __init__(self, spec: CellSpec, *, probabilities: bool) -> None:
        self._spec = spec
        self._width = len(spec.columns)
        self._offsets = spec.offsets[:-1]
        self._beside = spec.offsets[1:] - BESIDE  # where each column's missing, non-finite and repeat stand
        edges = [np.asarray(column.edges, np.float32) for column in spec.columns]
        short = [j for j, found in enumerate(edges) if len(found) <= _SHORT]
        self._groups = tuple(
            _Group(short[at : at + _TOGETHER], edges, spec.offsets) for at in range(0, len(short), _TOGETHER)
        )
        self._long = {j: found for j, found in enumerate(edges) if len(found) > _SHORT}
        self._probabilities = probabilities
        self._last: Rows | None = None
        self._clear()

    def _clear(self) -> None:
        self._counts = np.zeros(self._spec.size, np.int64)
        self._sums = np.zeros(1 + self._spec.classes if self._probabilities else 0, np.int64)
        self._rows = 0
        for group in self._groups:
            group.above[:] = 0

    @property
    def rows(self) -> int:
        """Rows counted since the last `take`."""
        return self._rows

    def observe(self, rows: NDArray[np.floating], labels: NDArray[np.int64], scores: Rows) -> None:
        """Counts ``rows`` (n, F) with their outputs; float64 rows are binned as float32.

        ``labels`` (n,) are class indices, ignored where the layout has no classes; ``scores`` is (n, C), or (n,) for
        one score a row.
        """
        for start in range(0, rows.shape[0], _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            self._observe(rows[part], labels[part], scores[part])

    def _observe(self, rows: NDArray[np.floating], labels: NDArray[np.int64], scores: Rows) -> None:
        n = len(rows)
        flat = np.ascontiguousarray(scores.reshape(n, -1).T)
        # A column of values each, behind the value of the row before: what repeats is equal to its left neighbour.
        values = np.empty((self._width, n + 1), np.float32)
        values[:, 0] = np.nan if self._last is None else self._last
        with np.errstate(over="ignore"):  # what float32 cannot hold is binned as infinite, as in training
            values[:-1, 1:] = rows.T
            values[-1, 1:] = np.maximum.reduce(flat, axis=0)
        self._last = values[:, -1].copy()
        columns = values[:, 1:]
        for group in self._groups:
            group.count(values)
        for j, edges in self._long.items():
            cells = np.bincount(edges.searchsorted(columns[j]), minlength=len(edges) + 1)
            self._counts[self._offsets[j] : self._offsets[j] + len(cells)] += cells
            self._counts[self._beside[j] + 2] += np.count_nonzero(columns[j] == values[j, :-1])
        finite = np.isfinite(columns)
        if not finite.all():
            self._count_odd(columns, finite)
        classes = self._spec.classes
        if classes:
            self._counts[-classes:] += np.bincount(labels, minlength=classes)
        if self._probabilities:
            self._add_probabilities(flat)
        self._rows += n

    def _count_odd(self, columns: Rows, finite: NDArray[np.bool_]) -> None:
        """Moves what is not finite out of the cell where comparisons put it: NaN and -inf first, +inf last."""
        j, i = np.nonzero(~finite)
        odd = columns[j, i]
        last = self._beside[j] - 1
        # A long column's search puts NaN behind everything, the comparisons of a short one before it.
        nan_last = np.isin(j, list(self._long)) & np.isnan(odd)
        np.subtract.at(self._counts, np.where((odd > 0) | nan_last, last, self._offsets[j]), 1)
        np.add.at(self._counts, self._beside[j] + np.isinf(odd), 1)

    def _add_probabilities(self, flat: Rows) -> None:
        # What is not finite is counted in the score's cells, not here.
        sound = np.where(np.isfinite(flat), flat, np.float32(0)).clip(0.0, 1.0)
        fixed = np.rint(
            sound.astype(np.float64) * FIXED_POINT
        )  # whole numbers, and so are their sums below 2^53
        self._sums[0] += int(np.maximum.reduce(fixed, axis=0).sum())
        self._sums[1:] += fixed.sum(axis=1).astype(np.int64)

    def take(self) -> Profile:
        """The profile of the rows since the last `take`; the row before is remembered for ``repeat``."""
        for group in self._groups:
            group.add_to(self._counts, self._rows)
        profile = Profile(layout=self._spec.layout, rows=self._rows, counts=self._counts, sums=self._sums)
        self._clear()
        return profile


class _Group:
    """Columns of few edges, counted by comparing every value with every edge.

    How many values lie above each edge is counted as bits: for some twenty edges a column that takes half the
    time of searching them value by value.
    """

    __slots__ = ("_at", "_columns", "_edges", "_found", "_kept", "_repeats", "above")

    def __init__(self, columns: Sequence[int], edges: Sequence[Rows], offsets: Counts) -> None:
        most = max(len(edges[j]) for j in columns)
        padded = np.full((most, len(columns), 1), np.inf, np.float32)  # nothing lies above infinity
        for k, j in enumerate(columns):
            padded[: len(edges[j]), k, 0] = edges[j]
        self._edges = padded
        self._found: NDArray[np.bool_] | None = None
        together = np.asarray(columns)
        in_order = len(columns) == columns[-1] - columns[0] + 1
        self._columns = slice(columns[0], columns[-1] + 1) if in_order else together
        # Plane 0 counts repeats, plane e + 1 the values above edge e.
        self.above = np.zeros((most + 1, len(columns)), np.int64)
        self._repeats = offsets[together + 1] - 1
        cell, place = np.nonzero(np.arange(most + 1)[:, None] <= [len(edges[j]) for j in columns])
        self._kept = (cell, place)
        self._at = offsets[together[place]] + cell

    def count(self, values: Rows) -> None:
        """Counts ``values`` (columns, 1 + n), the value before in front."""
        mine = values[self._columns]
        n = values.shape[1] - 1
        words = -(-n // 64)
        if n == _CHUNK_ROWS:
            if self._found is None:
                self._found = np.empty((*self.above.shape, n), np.bool_)
            found = self._found  # used again: the kernel would clear new pages each time
        else:
            found = np.zeros((*self.above.shape, words * 64), np.bool_)
        np.equal(mine[:, 1:], mine[:, :-1], out=found[0, :, :n])
        np.greater(mine[:, 1:], self._edges, out=found[1:, :, :n])
        bits = np.packbits(found.reshape(-1)).view(np.uint64).reshape(-1, words)
        self.above += (
            (np.bitwise_count(bits).astype(np.float64) @ np.ones(words))
            .astype(np.int64)
            .reshape(self.above.shape)
        )

    def add_to(self, counts: Counts, rows: int) -> None:
        """Adds what was counted of ``rows`` rows to the counters of the layout."""
        counts[self._repeats] += self.above[0]
        ends = np.vstack(
            [
                np.full((1, self.above.shape[1]), rows),
                self.above[1:],
                np.zeros((1, self.above.shape[1]), np.int64),
            ]
        )
        counts[self._at] += (ends[:-1] - ends[1:])[self._kept]


def column_counts(spec: CellSpec, profile: Profile, j: int) -> Counts:
    """``(cells,)`` counts of column ``j`` (the score is column F), without the counters beside them."""
    start = int(spec.offsets[j])
    return profile.counts[start : start + spec.columns[j].cells]


def class_counts(spec: CellSpec, profile: Profile) -> Counts:
    """``(classes,)`` predicted-class counts."""
    return profile.counts[int(spec.offsets[-1]) :]
