"""Weights for training rows under which they look like the fleet, from the fleet's histograms alone: raking.

Raking, or iterative proportional fitting (W. E. Deming, F. F. Stephan, *On a least squares adjustment of a sampled
frequency table when the expected marginal totals are known*, Ann. Math. Statist. 11, 1940), multiplies the weights of
each cell's rows by what the cell lacks, one feature after another, until every feature's weighted histogram is the
target's. Where no bound binds that is the calibration with the exponential distance (J.-C. Deville, C.-E. Särndal,
*Calibration estimators in survey sampling*, JASA 87, 1992): of all weights with these marginals, those nearest to
equal ones. Here they are bounded, as in their truncated methods.

It helps when inputs have moved and labels given inputs have not. Marginals say nothing of how features go together, and
no weight makes up for rows that are not there: `Reweighting.problems` says where the overlap is too poor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.profile import CellSpec, FeatureCells, Profile

Weights = NDArray[np.float64]
Cells = NDArray[np.int16]
ODD: Final = 2
"""Cells behind those of the numbers: missing (NaN), and not finite."""
TRIMMED: Final = 0.1
"""The share of devices left out at each end, where there are at least five."""
_SWEEPS: Final = 500
_TOLERANCE: Final = 1e-4
_PATIENCE: Final = 5
_PROGRESS: Final = 0.95
_CHANCE: Final = 1.358
"""Kolmogorov's 5 % point: n rows drawn from the target are no farther from it than this over √n, 19 times in 20."""
_HALVINGS: Final = 60
_NAMED: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is asked of weights.

    Attributes:
        moved: features whose KS distance to the target is at least this, and more than chance, are fitted.
        smallest: of a weight; no row is dropped.
        largest: of a weight; a cell can stand for no more than so many times its share.
        few_rows: a cell of fewer rows than this is not given more than its share.
        uncovered: more of the fleet than this in cells that rows cannot stand for is too much.
        effective: fewer effective rows than this share of all is too few.
        unfitted: more than this share of a distance left over means that rows do not combine the values wanted.
    """

    moved: float = 0.05
    smallest: float = 0.01
    largest: float = 10.0
    few_rows: int = 5
    uncovered: float = 0.05
    effective: float = 0.15
    unfitted: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFit:
    """One feature: KS distance to the target before and after, whether it was fitted, and what rows cannot stand for.

    ``uncovered`` is a share of the fleet, ``where`` the values most of it has.
    """

    name: str
    before: float
    after: float
    fitted: bool
    uncovered: float
    where: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reweighting:
    """Weights (n,) of mean 1, and what they do.

    ``effective`` is how many rows of equal weight say as much, (Σw)² / Σw² (L. Kish, *Survey sampling*, 1965).
    ``problems`` says in words why the overlap is too poor to use the weights; empty when it is not.
    """

    weights: Weights
    devices: int
    effective: float
    features: tuple[FeatureFit, ...]
    sweeps: int
    problems: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest weight."""
        return float(self.weights.max())

    @property
    def fitted(self) -> tuple[FeatureFit, ...]:
        """The features that were fitted, the one that had moved most first."""
        return tuple(sorted((f for f in self.features if f.fitted), key=lambda f: (-f.before, f.name)))


def cells_of(spec: CellSpec, X: NDArray[np.floating]) -> Cells:
    """``(F, n)`` the cell of every value of ``X`` (n, F), as a device bins it: missing and non-finite come last."""
    found = np.empty((len(spec.features), len(X)), np.int16)
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite to the device
        columns = X.astype(np.float32).T
    for column, values, cells in zip(spec.features, columns, found, strict=True):
        cells[:] = np.asarray(column.edges, np.float32).searchsorted(values)
        cells[np.isnan(values)] = column.cells
        cells[np.isinf(values)] = column.cells + 1
    return found


def fleet_shares(spec: CellSpec, devices: Sequence[Profile]) -> tuple[Weights, ...]:
    """The target: for every feature the share of each cell, missing and non-finite last, over at least one device.

    Each device has one vote, however many rows it has. What is averaged is the share of rows up to each cell, without
    the tenth of the devices with the smallest and the tenth with the largest (`TRIMMED`): no device can move the target
    far, and a minority that is larger than that keeps its place.
    """
    trim = int(np.ceil(TRIMMED * len(devices))) if len(devices) >= 5 else 0
    counts = np.stack([profile.counts for profile in devices]).astype(np.float64)
    rows = np.array([[profile.rows] for profile in devices], np.float64)
    found = []
    for j, column in enumerate(spec.features):
        start = int(spec.offsets[j])
        up_to = np.sort(np.cumsum(counts[:, start : start + column.cells + ODD], axis=1) / rows, axis=0)
        middle = up_to[trim : len(devices) - trim].mean(axis=0)
        found.append(np.diff(middle, prepend=0.0))
    return tuple(found)


def reweight(
    spec: CellSpec,
    X: NDArray[np.floating],
    devices: Sequence[Profile],
    *,
    every: bool = False,
    limits: Limits = Limits(),
) -> Reweighting:
    """Weights for the rows ``X`` (n, F), n at least 1, under which they look like ``devices``, at least one with rows.

    Fitted are the features that have moved and those that fitting these would move; with ``every`` all of them.
    """
    cells, target = cells_of(spec, X), fleet_shares(spec, devices)
    sides = [_Side(*pair, limits) for pair in zip(cells, target, strict=True)]
    equal = np.ones(len(X))
    before = [side.distance(equal) for side in sides]
    moved = max(limits.moved, _CHANCE / np.sqrt(len(X)))
    chosen = {j for j, distance in enumerate(before) if every or distance >= moved}
    weights, sweeps = equal, 0
    while True:
        weights, more = _rake([sides[j] for j in sorted(chosen)], len(X), limits)
        sweeps += more
        after = [side.distance(weights) for side in sides]
        carried = {j for j, distance in enumerate(after) if distance >= moved} - chosen
        if not carried:
            break
        chosen |= carried
    features = tuple(
        FeatureFit(
            name=column.name,
            before=before[j],
            after=after[j],
            fitted=j in chosen,
            uncovered=float(sides[j].lost.sum()),
            where=_where(column, sides[j].lost),
        )
        for j, column in enumerate(spec.features)
    )
    effective = float(weights.sum() ** 2 / (weights**2).sum())
    return Reweighting(
        weights=weights,
        devices=len(devices),
        effective=effective,
        features=features,
        sweeps=sweeps,
        problems=tuple(_problems(features, effective / len(X), limits)),
    )


class _Side:
    """One feature's rows against its target, which is cut down to what rows can stand for.

    ``lost`` is what was cut off, for each cell.
    """

    __slots__ = ("_cells", "_target", "lost", "reachable")

    def __init__(self, cells: Cells, target: Weights, limits: Limits) -> None:
        self._cells = cells
        self._target = target
        rows = np.bincount(cells, minlength=len(target))
        share = rows / len(cells)
        most = np.where(rows < limits.few_rows, share, limits.largest * share)
        self.lost = np.maximum(target - most, 0.0)
        kept = np.maximum(target - self.lost, limits.smallest * share)
        self.reachable = kept / kept.sum()

    def shares(self, weights: Weights) -> Weights:
        """The weighted histogram."""
        found: Weights = np.bincount(self._cells, weights, minlength=len(self._target)) / len(self._cells)
        return found

    def distance(self, weights: Weights) -> float:
        """KS distance of the weighted rows to the whole target."""
        return float(np.abs(np.cumsum(self.shares(weights) - self._target)).max())

    def off(self, weights: Weights) -> Weights:
        """What the share of each cell is above the target that can be reached."""
        found: Weights = self.shares(weights) - self.reachable
        return found

    def fitted(self, weights: Weights) -> Weights:
        """The weights times what each one's cell lacks."""
        now = self.shares(weights)
        factors: Weights = np.divide(self.reachable, now, out=np.ones_like(now), where=now > 0)
        return weights * factors[self._cells]


def _rake(sides: Sequence[_Side], rows: int, limits: Limits) -> tuple[Weights, int]:
    """The weights, and after how many sweeps: when every cell is met, or when five sweeps gain less than a twentieth.

    The gain is in the root of the sum of squared KS distances. Where the targets cannot all be met, more sweeps would
    pay with effective rows for next to nothing.
    """
    weights = np.ones(rows)
    left: list[float] = []
    for sweep in range(_SWEEPS):
        off = [side.off(weights) for side in sides]
        left.append(float(np.sqrt(sum(np.abs(np.cumsum(found)).max() ** 2 for found in off))))
        stalled = sweep >= _PATIENCE and left[-1] > _PROGRESS * left[-1 - _PATIENCE]
        if max((float(np.abs(found).max()) for found in off), default=0.0) <= _TOLERANCE or stalled:
            return weights, sweep
        for side in sides:
            weights = side.fitted(weights)
        weights = _bounded(weights, limits)
    return weights, _SWEEPS


def _bounded(weights: Weights, limits: Limits) -> Weights:
    """Weights of mean 1 within the limits, in proportion to those given where no bound binds."""
    found: Weights = weights / weights.mean()
    if found.min() >= limits.smallest and found.max() <= limits.largest:
        return found
    low, high = limits.smallest / found.max(), limits.largest / found.min()
    for _ in range(_HALVINGS):
        middle = np.sqrt(low * high)
        if np.clip(middle * found, limits.smallest, limits.largest).mean() < 1.0:
            low = middle
        else:
            high = middle
    bounded: Weights = np.clip(high * found, limits.smallest, limits.largest)
    return bounded


def _where(column: FeatureCells, lost: Weights) -> str:
    """The values of the stretch of cells that most of ``lost`` lies in; empty when nothing is."""
    if not lost.any():
        return ""
    names = ["missing (NaN)", "infinite"]
    best, place = 0.0, ""
    for j, name in enumerate(names):
        if lost[column.cells + j] > best:
            best, place = float(lost[column.cells + j]), name
    numbers = lost[: column.cells]
    ends = np.flatnonzero(np.diff(np.concatenate([[False], numbers > 0, [False]]).astype(np.int8)))
    for first, end in zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True):
        if (total := float(numbers[first:end].sum())) > best:
            best, place = total, _stretch(column, first, end)
    return place


def _stretch(column: FeatureCells, first: int, end: int) -> str:
    """Cells ``first`` to ``end``, the last not included, in words."""
    if end == column.cells:
        return f"above {column.edges[first - 1]:.6g}" if first else "any number"
    if not first:
        return f"at or below {column.edges[end - 1]:.6g}"
    return f"above {column.edges[first - 1]:.6g} up to {column.edges[end - 1]:.6g}"


def _problems(features: Sequence[FeatureFit], effective: float, limits: Limits) -> Iterator[str]:
    """Why the overlap is too poor, the worst feature first."""
    bare = sorted((f for f in features if f.uncovered > limits.uncovered), key=lambda f: -f.uncovered)
    if bare:
        named = "; ".join(f"{f.name}: {f.uncovered:.0%}, mostly {f.where}" for f in bare[:_NAMED])
        others = f"; and {len(bare) - _NAMED} more features" if len(bare) > _NAMED else ""
        yield (
            f"part of the fleet lies where there are no or too few training rows ({named}{others}); collect labelled "
            "rows there and add them to the data"
        )
        return
    torn = [
        f
        for f in sorted(features, key=lambda f: -f.after)
        if f.fitted and f.after > max(limits.moved, limits.unfitted * f.before)
    ]
    if torn:
        named = ", ".join(f"{f.name} (KS {f.before:.2f} before, {f.after:.2f} after)" for f in torn[:_NAMED])
        yield (
            f"the rows have the fleet's values one feature at a time, but not together: {named}; collect labelled rows "
            "from devices that moved"
        )
    if effective < limits.effective:
        yield (
            f"all would rest on {effective:.1%} of the rows ({limits.effective:.0%} is asked for); collect more "
            "labelled rows from devices that moved"
        )
