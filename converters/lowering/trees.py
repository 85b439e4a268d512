"""Trees and forests: one tree ensemble operator on raw columns, or on the steps' result where it does not fold.

`sklearn.tree` casts its input to float32 and compares with a float64 threshold. Where each split depends on one
raw column in order, the steps before are folded into the threshold (`converters.lowering.folding`); elsewhere the
graph casts to float32 too, and the threshold is the largest float32 value not above scikit-learn's.
"""

# ruff: noqa: SLF001 - what an isolation forest adds up is kept in private attributes
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.ensemble._iforest import _average_path_length
from sklearn.tree import (
    DecisionTreeClassifier,
    DecisionTreeRegressor,
    ExtraTreeClassifier,
    ExtraTreeRegressor,
)

from converters.lowering import folding
from converters.lowering.graph import Ensemble, Lowering, Value, Wide
from converters.lowering.rules import rule

_CLASSIFIERS: Final = (
    DecisionTreeClassifier,
    ExtraTreeClassifier,
    RandomForestClassifier,
    ExtraTreesClassifier,
)
_REGRESSORS: Final = (DecisionTreeRegressor, ExtraTreeRegressor, RandomForestRegressor, ExtraTreesRegressor)


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Trees with the tensor that they compare: float64 where ``wide``, else float32, and thresholds of that type."""

    trees: Ensemble
    source: Value
    wide: bool


def grown(members: Sequence[Any], values: Sequence[Wide], columns: Sequence[Any] | None = None) -> Ensemble:
    """Fitted `sklearn.tree._tree.Tree` objects as one ensemble over the columns they were fitted on, in float64.

    ``values`` are (nodes, C) per tree; ``columns`` say per tree which column each of its features is.
    """
    start = np.cumsum([0, *(tree.node_count for tree in members)])
    left = np.concatenate([np.asarray(tree.children_left, np.int64) for tree in members])
    right = np.concatenate([np.asarray(tree.children_right, np.int64) for tree in members])
    owner = np.repeat(np.arange(len(members)), np.diff(start))
    inner = left >= 0
    features = [np.maximum(np.asarray(tree.feature, np.int64), 0) for tree in members]
    if columns is not None:
        features = [np.asarray(at, np.int64)[feature] for at, feature in zip(columns, features, strict=True)]
    missing = np.concatenate([np.asarray(tree.missing_go_to_left, np.bool_) for tree in members])
    return Ensemble(
        tree=owner,
        feature=np.where(inner, np.concatenate(features), 0),
        threshold=np.where(inner, np.concatenate([tree.threshold for tree in members]), 0.0),
        left=np.where(inner, left + start[owner], -1),
        right=np.where(inner, right + start[owner], -1),
        missing_left=missing & inner,
        value=np.concatenate([np.asarray(value, np.float64) for value in values]),
    )


def place(g: Lowering, fitted: Any, x: Value, trees: Ensemble, *, narrow: bool) -> Placed:
    """``trees`` over columns of ``x`` made ready for the graph; ``narrow`` casts to float32 before it compares."""
    inner = np.flatnonzero(trees.left >= 0)
    used = np.unique(trees.feature[inner])
    if x.vocabularies and any(x.vocabularies[j] is not None for j in used):
        raise g.refuse(
            fitted, "splits a column of categories as if it held numbers", "encode the column first"
        )
    if not used.size or (x.fold is not None and bool((x.fold.sources[used] >= 0).all())):
        return _folded(g, x, trees, inner, narrow=narrow)
    for j in used:
        folding.note_edges(g, x, int(j), trees.threshold[inner[trees.feature[inner] == j]], narrow=narrow)
    if not narrow:
        return Placed(trees, x, wide=True)
    threshold = trees.threshold.astype(np.float32)
    above = threshold.astype(np.float64) > trees.threshold
    threshold[above] = np.nextafter(threshold[above], np.float32(-np.inf))
    source = g.cast(x, "float32")
    if g.arithmetic == "float64":
        return Placed(
            replace(trees, threshold=threshold.astype(np.float64)), g.cast(source, "float64"), wide=True
        )
    return Placed(replace(trees, threshold=threshold), source, wide=False)


def _folded(g: Lowering, x: Value, trees: Ensemble, inner: NDArray[np.int64], *, narrow: bool) -> Placed:
    raw = replace(trees, threshold=np.zeros(len(trees.threshold), g.dtype))
    if inner.size:
        assert x.fold is not None
        column, limit = trees.feature[inner], np.asarray(trees.threshold[inner], np.float64)
        raw.feature[inner] = x.fold.sources[column]
        raw.threshold[inner] = folding.largest_left(
            x.fold, column, limit, g.dtype, narrow=narrow, width=g.width
        )
        raw.missing_left[inner] = folding.missing_left(
            x.fold, column, limit, trees.missing_left[inner], narrow=narrow, width=g.width
        )
        g.ensembles.append(raw)
    wide = g.arithmetic == "float64" or g.dtype == "float64"
    return Placed(raw, g.cast(g.input, "float64") if wide else g.input, wide)


def sums(g: Lowering, placed: Placed, base: Wide | None = None, *, precise: bool = False) -> Value:
    """(n, C) the sum over all trees of their leaves' values, plus ``base`` (C,).

    The operator gives float32 whatever it takes. ``precise`` splits each value into a coarse part, whose sum is exact
    in float32, and a rest, so that the sum is good to about 2⁻⁴⁰ of the largest one there could be.
    """
    if not precise:
        return g.cast(_regressor(g, placed, placed.trees.value, base), "float64")
    value = placed.trees.value
    highest = np.zeros(int(placed.trees.tree[-1]) + 1)
    np.maximum.at(highest, placed.trees.tree, np.abs(value).max(axis=1))
    step = 2.0 ** (np.ceil(np.log2(max(float(highest.sum()), np.finfo(np.float64).tiny))) - 23)
    coarse = np.round(value / step) * step
    both = g.cast(_regressor(g, placed, np.concatenate([coarse, value - coarse], axis=1), None), "float64")
    width = value.shape[1]
    if width == 1:
        made = g.reduce("Sum", both)
    else:
        made = g.add(g.select(both, np.arange(width)), g.select(both, np.arange(width, 2 * width)))
    return made if base is None else g.add(made, base)


def _regressor(g: Lowering, placed: Placed, value: Wide, base: Wide | None) -> Value:
    attributes = _nodes(placed)
    leaf, column = _weighted(placed.trees, value)
    attributes |= _leaves(placed, "target", leaf, column, value[leaf, column])
    if base is not None:
        _floats(attributes, "base_values", np.asarray(base, np.float64).reshape(-1), wide=placed.wide)
    return g.node(
        "TreeEnsembleRegressor",
        [placed.source],
        (None, value.shape[1]),
        "float32",
        ml=True,
        n_targets=value.shape[1],
        **attributes,
    )


def votes(g: Lowering, placed: Placed) -> tuple[Value, Value]:
    """Index of the class with the largest sum (n,) and the sums (n, C) as float64, from one operator.

    The values of a leaf must be fractions. For two classes the operator sums those of the second alone and compares
    with a half.
    """
    value = placed.trees.value
    if value.shape[1] == 1:  # the operator takes one class for two
        total = sums(g, placed)
        return g.argmax(total), total
    attributes = _nodes(placed)
    if value.shape[1] == 2:
        leaf = np.flatnonzero(placed.trees.left < 0)
        attributes |= _leaves(placed, "class", leaf, np.zeros(len(leaf), np.int64), value[leaf, 1])
    else:
        leaf, column = _weighted(placed.trees, value)
        attributes |= _leaves(placed, "class", leaf, column, value[leaf, column])
    label, score = g.node_many(
        "TreeEnsembleClassifier",
        [placed.source],
        [((None,), "int64"), ((None, value.shape[1]), "float32")],
        ml=True,
        classlabels_int64s=list(range(value.shape[1])),
        **attributes,
    )
    return label, g.cast(score, "float64")


def _nodes(placed: Placed) -> dict[str, Any]:
    trees = placed.trees
    inner = trees.left >= 0
    first = np.searchsorted(trees.tree, trees.tree)
    made: dict[str, Any] = {
        "nodes_treeids": trees.tree.tolist(),
        "nodes_nodeids": (np.arange(len(first)) - first).tolist(),
        "nodes_featureids": trees.feature.tolist(),
        "nodes_modes": np.where(inner, "BRANCH_LEQ", "LEAF").tolist(),
        "nodes_truenodeids": np.where(inner, trees.left - first, 0).tolist(),
        "nodes_falsenodeids": np.where(inner, trees.right - first, 0).tolist(),
        "nodes_missing_value_tracks_true": trees.missing_left.astype(np.int64).tolist(),
    }
    _floats(made, "nodes_values", trees.threshold, wide=placed.wide)
    return made


def _weighted(trees: Ensemble, value: Wide) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(leaf, column) of the values to name: those that are not 0, and one of a leaf that has no other."""
    leaves = np.flatnonzero(trees.left < 0)
    named = value[leaves] != 0
    named[~named.any(axis=1), 0] = True
    row, column = np.nonzero(named)
    return leaves[row], column


def _leaves(
    placed: Placed, kind: str, leaf: NDArray[np.int64], column: NDArray[np.int64], weight: Wide
) -> dict[str, Any]:
    tree = placed.trees.tree
    made: dict[str, Any] = {
        f"{kind}_treeids": tree[leaf].tolist(),
        f"{kind}_nodeids": (leaf - np.searchsorted(tree, tree[leaf])).tolist(),
        f"{kind}_ids": column.tolist(),
    }
    _floats(made, f"{kind}_weights", weight, wide=placed.wide)
    return made


def _floats(attributes: dict[str, Any], name: str, array: NDArray[np.floating], *, wide: bool) -> None:
    if wide:
        attributes[f"{name}_as_tensor"] = numpy_helper.from_array(
            np.ascontiguousarray(array, np.float64), name
        )
    else:
        attributes[name] = np.asarray(array, np.float32).tolist()


# --- single trees and forests -----------------------------------------------------------------------------------


def _members(fitted: Any) -> list[Any]:
    members = getattr(fitted, "estimators_", None)
    return [fitted.tree_] if members is None else [member.tree_ for member in members]


def _classes(fitted: Any) -> list[int]:
    return [int(size) for size in np.atleast_1d(fitted.n_classes_)]


def _placed(g: Lowering, fitted: Any, x: Value) -> Placed:
    """The trees with what each leaf adds to the mean: targets, or the classes of all outputs side by side."""

    def make() -> Placed:
        members = _members(fitted)
        values = [_leaf_values(fitted, tree) / len(members) for tree in members]
        return place(g, fitted, x, grown(members, values), narrow=True)

    made: Placed = g.memo((id(fitted), "trees", x.name), make, fitted)
    return made


def _leaf_values(fitted: Any, tree: Any) -> Wide:
    value = np.asarray(tree.value, np.float64)
    if not hasattr(fitted, "classes_"):
        return value[:, :, 0]
    return np.concatenate([value[:, k, :size] for k, size in enumerate(_classes(fitted))], axis=1)


def _voted(g: Lowering, fitted: Any, x: Value) -> tuple[Value, Value]:
    made: tuple[Value, Value] = g.memo(
        (id(fitted), "votes", x.name), lambda: votes(g, _placed(g, fitted, x)), fitted
    )
    return made


@rule("predict", *_REGRESSORS)
def _mean(g: Lowering, fitted: Any, x: Value) -> Value:
    return sums(g, _placed(g, fitted, x))


@rule("predict_proba", *_CLASSIFIERS)
def _probabilities(g: Lowering, fitted: Any, x: Value) -> Value:
    if fitted.n_outputs_ == 1:
        return _voted(g, fitted, x)[1]
    return sums(g, _placed(g, fitted, x))


@rule("predict", *_CLASSIFIERS)
def _label(g: Lowering, fitted: Any, x: Value) -> Value:
    placed = _placed(g, fitted, x)
    single = not hasattr(fitted, "estimators_")
    if fitted.n_outputs_ == 1 and (not single or _labels_itself(placed)):
        return _voted(g, fitted, x)[0]
    bounds = np.cumsum([0, *_classes(fitted)])
    blocks = [np.arange(start, stop) for start, stop in pairwise(bounds)]
    if single:  # one leaf decides: it says the index itself
        index = np.stack([placed.trees.value[:, at].argmax(axis=1) for at in blocks], axis=1)
        label = g.cast(_regressor(g, placed, index.astype(np.float64), None), "int64")
        return label if len(blocks) > 1 else g.vector(label)
    means = g.call(fitted, "predict_proba", x)
    return g.concat([g.column(g.argmax(g.select(means, at))) for at in blocks])


def _labels_itself(placed: Placed) -> bool:
    """Whether the classifier operator finds the first largest class of every leaf, as `numpy.argmax` does."""
    value = placed.trees.value[placed.trees.left < 0]
    seen = value if placed.wide else value.astype(np.float32)
    found = seen.argmax(axis=1) if value.shape[1] != 2 else (seen[:, 1] > 0.5).astype(np.int64)
    return bool((found == value.argmax(axis=1)).all())


# --- isolation forests ------------------------------------------------------------------------------------------


@rule("score_samples", IsolationForest)
def _isolation_scores(g: Lowering, fitted: IsolationForest, x: Value) -> Value:
    return g.unary("Neg", _isolation(g, fitted, x))


@rule("decision_function", IsolationForest)
def _isolation_decision(g: Lowering, fitted: IsolationForest, x: Value) -> Value:
    return g.sub(-float(fitted.offset_), _isolation(g, fitted, x))


def _isolation(g: Lowering, fitted: IsolationForest, x: Value) -> Value:
    """``2 ** (-depth / (trees * expected depth))``; each leaf holds its depth and what a tree below would add."""
    made: Value = g.memo((id(fitted), "isolation", x.name), lambda: _isolation_power(g, fitted, x), fitted)
    return made


def _isolation_power(g: Lowering, fitted: IsolationForest, x: Value) -> Value:
    members = [member.tree_ for member in fitted.estimators_]
    lengths = zip(fitted._decision_path_lengths, fitted._average_path_length_per_tree, strict=True)
    values = [(np.asarray(depth) + path - 1.0).reshape(-1, 1) for depth, path in lengths]
    trees = grown(members, values, fitted.estimators_features_)
    expected = len(members) * float(_average_path_length([fitted._max_samples])[0])
    depths = sums(g, place(g, fitted, x, trees, narrow=True), precise=True)
    # Where the trees had one training row all depths are 0, and the score is 2 ** -1 by definition.
    power = g.div(depths, -expected) if expected else g.sub(depths, 1.0)
    return g.binary("Pow", np.full((1, 1), 2.0), power)


@rule("predict", IsolationForest)
def _isolation_label(g: Lowering, fitted: IsolationForest, x: Value) -> Value:
    decision = g.call(fitted, "decision_function", x)
    return g.cast(g.vector(g.binary("GreaterOrEqual", decision, 0.0)), "int64")
