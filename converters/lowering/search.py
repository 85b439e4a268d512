"""The nearest training rows, found in the order in which scikit-learn's search finds them.

Distances are added up column by column like scikit-learn's, so that what is equal there is equal here: (0.1, 0.2, 0.3)
and (0.3, 0.2, 0.1) may be equally far or not, by the order of the sum. Of more equally far rows than there is room for
the search keeps some by the order in which it meets them: that of the training set, or leaf by leaf of a tree, the
nearer child of every node first (``sklearn/neighbors/_binary_tree.pxi.tp``); `converters.lowering.heap` says which.

Two of scikit-learn's ways cannot be followed. For rows of another type than the training rows (whole numbers) it uses
`numpy.argpartition`, whose order is the processor's. And with more than 256 training rows, several processors and few
queries it splits the training rows among threads, so that its answer depends on how many rows are asked for at once.
"""

# ruff: noqa: SLF001 - what a fitted estimator learned is partly private to it
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics._pairwise_distances_reduction._dispatcher import sqeuclidean_row_norms
from sklearn.neighbors import KNeighborsClassifier

from converters.lowering import heap
from converters.lowering.graph import Lowering, Operand, Value, Wide

_NAMES: Final = {
    "euclidean": 2.0,
    "l2": 2.0,
    "manhattan": 1.0,
    "cityblock": 1.0,
    "l1": 1.0,
    "chebyshev": np.inf,
    "infinity": np.inf,
}
_UNROLLED: Final = 64
"""Columns up to which distances are added up one by one; beyond, in one sum, whose order is ONNX Runtime's."""

_QUERIES: Final = 128
_PRODUCTS: Final = 1_000_000  # queries times training rows
_CHUNK: Final = 256
"""Training rows that scikit-learn's brute force gives to one thread at a time."""

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Leaves:
    """The leaves of a tree, left to right, and how their order follows from the children's distances.

    Attributes:
        starts: (L + 1,) where each leaf begins in the tree's order of the training rows.
        children: (2, I) the left and the right child of every inner node.
        base: (L,) a number that orders the leaves when every left child is the nearer.
        swaps: (I, L) what is added to it where a right child is.
    """

    starts: Index
    children: Index
    base: Wide
    swaps: Wide


@dataclass(frozen=True, slots=True, eq=False)
class _Metric:
    """A Minkowski distance: its power and the columns' weights."""

    p: float
    weights: Wide | None

    def term(self, g: Lowering, apart: Value) -> Value:
        if self.p == 2.0:
            return g.mul(apart, apart)
        size = g.unary("Abs", apart)
        if self.p == 1.0 or np.isinf(self.p):
            return size
        # One exponent per element: ONNX Runtime takes a lone 3 for two products, which round otherwise than pow.
        return g.binary("Pow", size, np.full((*(1,) * (len(size.shape) - 1), size.width), self.p))

    def root(self, g: Lowering, reduced: Value) -> Value:
        """The distance whose power ``reduced`` is."""
        if self.p == 1.0 or np.isinf(self.p):
            return reduced
        return g.unary("Sqrt", reduced) if self.p == 2.0 else g.binary("Pow", reduced, 1.0 / self.p)

    def power(self, g: Lowering, distance: Value) -> Value:
        """What `root` reverses."""
        return distance if self.p == 1.0 or np.isinf(self.p) else self.term(g, distance)

    def sums(self, g: Lowering, terms: list[Value]) -> Value:
        """Terms of all columns in order, added up, or the largest."""
        total = terms[0]
        for term in terms[1:]:
            total = g.node("Max", [total, term], total.shape) if np.isinf(self.p) else g.add(total, term)
        return total

    def between(self, queries: Wide, rows: Wide) -> Wide:
        """(m, N) reduced distances as numbers, not in scikit-learn's order of addition."""
        total = np.zeros((len(queries), len(rows)))
        for j in range(rows.shape[1]):
            size = np.abs(queries[:, [j]] - rows[None, :, j])
            weight = 1.0 if self.weights is None else self.weights[j]
            power = size * size if self.p == 2.0 else size if np.isinf(self.p) else size**self.p
            total = np.maximum(total, power) if np.isinf(self.p) else total + weight * power
        return total


def training_order(g: Lowering, fitted: Any) -> Index:
    """(N,) indices of the training rows in the order in which the graph has them: a tree's own, or the set's."""
    g.note(f"carries {fitted.n_samples_fit_} training rows ({type(fitted).__name__})")
    if fitted._tree is None:
        return np.arange(fitted.n_samples_fit_)
    return np.asarray(fitted._tree.idx_array, np.int64)


def reduced_distances(g: Lowering, fitted: Any, x: Value) -> tuple[Value, float]:
    """(n, N) distances to the power p, in `training_order`, and p; the distances themselves, and 1, for p = inf."""
    metric = _metric(g, fitted)
    rows = _rows(g, fitted)
    if _multiplied(fitted):
        return _products(g, x, rows), 2.0
    return _sums(g, x, rows, metric), (1.0 if np.isinf(metric.p) else metric.p)


def root(g: Lowering, reduced: Value, p: float) -> Value:
    """The distances whose powers are ``reduced``."""
    return _Metric(p, None).root(g, reduced)


def nearest(g: Lowering, fitted: Any, x: Value, count: int) -> tuple[Value, Value]:
    """(n, k) distances and int64 places in `training_order` of the k nearest rows, in no order."""
    made: tuple[Value, Value] = g.memo(
        (id(fitted), "nearest", x.name, count), lambda: _nearest(g, fitted, x, count), fitted
    )
    return made


def _nearest(g: Lowering, fitted: Any, x: Value, count: int) -> tuple[Value, Value]:
    reduced, p = reduced_distances(g, fitted, x)
    g.searches = True
    _warn(g, fitted)
    leaves = _leaves(fitted)
    arrived = reduced
    place_of: Callable[[Value], Value] = _same
    if leaves is not None:
        arrived, place_of = _in_order(g, fitted, x, reduced, leaves)
    sieve = None
    if 2 < count < fitted.n_samples_fit_:  # with room for two, or for all, those that come first stay
        sieve = heap.plan(_arrivals(g, fitted, leaves), count)
        if sieve is None:
            text = (
                f"keeps the first of equally far rows here; scikit-learn's search of {count} may keep others"
            )
            g.doubt(fitted, text, "use fewer neighbors, or algorithm='kd_tree'")
    found, places = (
        heap.smallest(g, arrived, count) if sieve is None else heap.survivors(g, arrived, count, sieve)
    )
    # A distance beyond all numbers leaves the heap as it was: full of the first training row.
    start = int(np.flatnonzero(training_order(g, fitted) == 0)[0])
    places = g.where(g.unary("IsInf", found), np.full((1, 1), start), place_of(places))
    return root(g, found, p), places


def _same(places: Value) -> Value:
    return places


def _warn(g: Lowering, fitted: Any) -> None:
    """Says where the search's own answer hangs on more than its distances and their order."""
    if fitted._fit_method == "ball_tree":
        text = "leaves out parts of its tree by bounds that round, so that of equally far rows it may miss the first"
    elif fitted._fit_method != "brute":
        return
    elif fitted._fit_X.dtype != np.float64:
        kind = fitted._fit_X.dtype
        text = f"was fitted on {kind} rows, for which the order among equally far ones is the processor's"
    elif fitted.n_samples_fit_ > _CHUNK and not _by_votes(fitted):
        text = "chooses among equally far rows by how many it is asked for at once, and by the processor's rounding"
    elif _multiplied(fitted):
        text = "multiplies matrices, whose rounding is the processor's and decides between almost equally far rows"
    else:
        return
    g.doubt(fitted, text, "use algorithm='kd_tree'")


# --- distances ----------------------------------------------------------------------------------------------------


def _rows(g: Lowering, fitted: Any) -> Wide:
    if not isinstance(fitted._fit_X, np.ndarray) and not hasattr(fitted._fit_X, "__array__"):
        raise g.refuse(fitted, "was fitted on a sparse matrix", "fit on a dense array")
    return np.asarray(fitted._fit_X, np.float64)[training_order(g, fitted)]


def _metric(g: Lowering, fitted: Any) -> _Metric:
    metric, options = fitted.effective_metric_, dict(fitted.effective_metric_params_)
    if not isinstance(metric, str) or metric not in (*_NAMES, "minkowski"):
        remedy = "use metric='minkowski', 'euclidean', 'manhattan' or 'chebyshev'"
        raise g.refuse(fitted, f"has the metric {metric!r}", remedy)
    p = float(options.pop("p", 2.0)) if metric == "minkowski" else _NAMES[metric]
    weights = options.pop("w", None)
    if options or (weights is not None and metric != "minkowski") or (np.isinf(p) and weights is not None):
        raise g.refuse(
            fitted, f"has the metric_params {fitted.metric_params!r}", "use metric_params={'w': …} or none"
        )
    return _Metric(p, None if weights is None else np.asarray(weights, np.float64))


def _by_votes(fitted: Any) -> bool:
    """Whether brute force counts the votes on its way, one query at a time."""
    return (
        isinstance(fitted, KNeighborsClassifier)
        and fitted.weights == "uniform"
        and not fitted.outputs_2d_
        and fitted.metric != "euclidean"
        and not (fitted.metric == "minkowski" and fitted.p == 2)
    )


def _multiplied(fitted: Any) -> bool:
    """Whether squares are expanded, ||x||² - 2 x·y + ||y||²."""
    return fitted._fit_method == "brute" and bool(fitted.effective_metric_ == "euclidean")


def _products(g: Lowering, x: Value, rows: Wide) -> Value:
    """(n, N) squares as brute force has them, (||x||² - 2 x·y) + ||y||² or 0, to the last bit for up to 15 columns.

    There the norms are sums of fused products, column by column, as `Einsum` has them, and the product is one by
    blocks that OpenBLAS and ONNX Runtime add up alike.
    """
    norms = g.memo(
        (x.name, "norms"),
        lambda: g.column(g.node("Einsum", [x, x], (None,), equation="ij,ij->i")),
    )
    constant = sqeuclidean_row_norms(np.ascontiguousarray(rows), 1)
    made = g.add(g.add(norms, g.matmul(x, -2.0 * rows.T)), np.asarray(constant, np.float64)[None])
    return g.where(g.binary("Less", made, 0.0), 0.0, made)


def _sums(g: Lowering, x: Value, rows: Wide, metric: _Metric) -> Value:
    if x.width > _UNROLLED:
        terms = metric.term(g, g.sub(g.reshape(x, (-1, 1, x.width)), rows[None]))
        if metric.weights is not None:
            terms = g.mul(terms, metric.weights)
        return g.reduce("Max" if np.isinf(metric.p) else "Sum", terms, axis=2, keepdims=False)
    terms_ = []
    for j in range(x.width):
        term = metric.term(g, g.sub(g.select(x, [j]), rows[None, :, j]))
        terms_.append(term if metric.weights is None else g.mul(term, float(metric.weights[j])))
    return metric.sums(g, terms_)


# --- the order of a tree's leaves ---------------------------------------------------------------------------------


def _leaves(fitted: Any) -> _Leaves | None:
    """None where there is no tree, or a tree of one leaf."""
    if fitted._tree is None:
        return None
    _, _, nodes, _ = fitted._tree.get_arrays()
    if nodes["is_leaf"][0]:
        return None
    paths: list[tuple[int, list[tuple[int, bool]]]] = []
    pending: list[tuple[int, list[tuple[int, bool]]]] = [(0, [])]
    while pending:
        node, path = pending.pop()
        if nodes["is_leaf"][node]:
            paths.append((node, path))
        else:  # the left child is taken up first
            pending += [(2 * node + 2 - side, [*path, (node, not side)]) for side in (0, 1)]
    inner = sorted({node for _, path in paths for node, _ in path})
    where, depth = {node: i for i, node in enumerate(inner)}, max(len(path) for _, path in paths)
    base, swaps = np.zeros(len(paths)), np.zeros((len(inner), len(paths)))
    for leaf, (_, path) in enumerate(paths):
        for level, (node, right) in enumerate(path):
            weight = 2.0 ** (depth - 1 - level)
            base[leaf] += weight * right
            swaps[where[node], leaf] = -weight if right else weight
    starts = [int(nodes["idx_start"][node]) for node, _ in paths]
    children = np.array([[2 * node + 1 for node in inner], [2 * node + 2 for node in inner]])
    return _Leaves(np.array([*starts, int(nodes["idx_end"][paths[-1][0]])]), children, base, swaps)


def _in_order(
    g: Lowering, fitted: Any, x: Value, reduced: Value, leaves: _Leaves
) -> tuple[Value, Callable[[Value], Value]]:
    """(n, P) distances in the order in which the search meets the rows, and what gives a place's training row.

    Leaves that are shorter than the longest are filled up with infinite distances.
    """
    count, size, index = len(leaves.base), int(np.diff(leaves.starts).max()), _padded(leaves)
    filled = g.node("Gather", [reduced, np.maximum(index, 0)], (None, len(index)), axis=1)
    if (index < 0).any():
        filled = g.where(g.cast(_row(g, index < 0), "bool"), np.full((1, 1), np.inf), filled)
    swapped = g.cast(_nearer_right(g, fitted, x, leaves), "float64")
    ranks = g.matmul(swapped, leaves.swaps, leaves.base)
    order = heap.smallest(g, ranks, count)[1]
    blocks = g.reshape(filled, (-1, count, size))
    at = g.reshape(order, (-1, count, 1))
    met = g.node("GatherND", [blocks, at], (None, count, size), batch_dims=1)

    def place_of(places: Value) -> Value:
        leaf = g.node("GatherElements", [order, g.div(places, np.array(size))], places.shape, "int64", axis=1)
        inside = g.node("Mod", [places, np.array(size)], places.shape, "int64")
        return g.take(np.maximum(index, 0), g.add(g.mul(leaf, np.array(size)), inside))

    return g.reshape(met, (-1, count * size)), place_of


def _row(g: Lowering, flags: NDArray[np.bool_]) -> Value:
    """A constant row."""
    return Value(g.constant(flags[None]), (1, len(flags)), "bool")


def _padded(leaves: _Leaves) -> Index:
    """(P,) the row of the tree's order at each place, leaf by leaf; -1 where a leaf has no more."""
    sizes = np.diff(leaves.starts)
    place = np.arange(sizes.max())
    return np.where(place < sizes[:, None], leaves.starts[:-1, None] + place, -1).reshape(-1)


def _nearer_right(g: Lowering, fitted: Any, x: Value, leaves: _Leaves) -> Value:
    """(n, I) bool: whether the search goes to the right child of a node first."""
    metric, nodes = _metric(g, fitted), leaves.children.reshape(-1)
    _, _, data, bounds = fitted._tree.get_arrays()
    if len(bounds) == 2:  # a box
        low, high = bounds[0][nodes], bounds[1][nodes]
        terms = []
        for j in range(x.width):
            column = g.select(x, [j])
            outside: list[Operand] = [
                g.sub(low[None, :, j], column),
                g.sub(column, high[None, :, j]),
                np.zeros((1, 1)),
            ]
            terms.append(metric.power(g, g.node("Max", outside, (None, len(nodes)))))
        distances = metric.sums(g, terms)
    else:  # a ball
        centres = metric.root(g, _sums(g, x, bounds[0][nodes], metric))
        beyond = g.sub(centres, data["radius"][nodes][None])
        distances = metric.power(g, g.node("Max", [beyond, np.zeros((1, 1))], (None, len(nodes))))
    inner = leaves.children.shape[1]
    left, right = (g.select(distances, np.arange(inner) + side * inner) for side in (0, 1))
    return g.binary("Greater", left, right)


# --- what the searches meet ---------------------------------------------------------------------------------------


def _arrivals(g: Lowering, fitted: Any, leaves: _Leaves | None) -> Wide:
    """(m, P) distances in order of arrival for some queries: training rows, points between them and far away."""
    metric, rows = _metric(g, fitted), _rows(g, fitted)
    seen = min(len(rows), max(16, min(_QUERIES, _PRODUCTS // len(rows))))
    picked = rows[np.linspace(0, len(rows) - 1, seen).astype(np.int64)]
    far = np.repeat(picked[:1], 2 * rows.shape[1], axis=0)
    column = np.arange(len(far)) // 2
    far[np.arange(len(far)), column] += (
        np.where(np.arange(len(far)) % 2, 1e3, -1e3) * np.ptp(rows, axis=0)[column]
    )
    queries = np.concatenate([picked, (picked + picked[::-1]) / 2, (picked[1:] + picked[:-1]) / 2, far])
    distances = metric.between(queries, rows)
    if leaves is None:
        return distances
    _, _, data, bounds = fitted._tree.get_arrays()
    nodes = leaves.children.reshape(-1)
    if len(bounds) == 2:
        inside = np.clip(queries[:, None], bounds[0][nodes], bounds[1][nodes])
        each = np.stack([metric.between(q[None], at)[0] for q, at in zip(queries, inside, strict=True)])
    else:
        reduced = metric.between(queries, bounds[0][nodes])
        each = (reduced if np.isinf(metric.p) else reduced ** (1 / metric.p)) - data["radius"][nodes]
        each = np.maximum(each, 0.0)
    left, right = np.split(each, 2, axis=1)
    order = np.argsort((left > right) @ leaves.swaps + leaves.base, axis=1)
    index = _padded(leaves)
    filled = np.where(index < 0, np.inf, distances[:, np.maximum(index, 0)])
    blocks = filled.reshape(len(queries), len(leaves.base), -1)
    return np.take_along_axis(blocks, order[:, :, None], axis=1).reshape(len(queries), -1)
