"""Gradient boosting: one tree ensemble for all stages, then the link of the loss.

`GradientBoosting*` compares float32 as single trees do; `HistGradientBoosting*` compares float64, and its splits over
categories become columns of 0 and 1 that say who goes right.
"""

# ruff: noqa: SLF001 - the fitted trees, losses and encoders are kept in private attributes
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn._loss.loss import ExponentialLoss
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)

from converters.lowering import folding
from converters.lowering.graph import Ensemble, Lowering, Value, Wide
from converters.lowering.rules import rule
from converters.lowering.trees import grown, place, sums
from converters.signature import by_position

_CLASSIFIERS: Final = (GradientBoostingClassifier, HistGradientBoostingClassifier)
_BITS: Final = 32  # of each word of a set of categories


# --- what the stages add up to ----------------------------------------------------------------------------------


@rule("decision_function", GradientBoostingClassifier)
def _decision(g: Lowering, fitted: Any, x: Value) -> Value:
    return _staged(g, fitted, x)


@rule("predict", GradientBoostingRegressor)
def _regression(g: Lowering, fitted: Any, x: Value) -> Value:
    return _staged(g, fitted, x)


def _staged(g: Lowering, fitted: Any, x: Value) -> Value:
    outputs = fitted.estimators_.shape[1]
    members = [tree.tree_ for tree in fitted.estimators_.reshape(-1)]
    values = []
    for i, tree in enumerate(members):
        value = np.zeros((tree.node_count, outputs))
        value[:, i % outputs] = fitted.learning_rate * tree.value[:, 0, 0]
        values.append(value)
    placed = place(g, fitted, x, grown(members, values), narrow=True)
    first = fitted.init_
    if isinstance(first, str) or _is_constant(first):
        with by_position():
            base = fitted._raw_predict_init(np.zeros((1, x.width), np.float32))
        return sums(g, placed, base[0])
    return g.add(_first(g, fitted, x, outputs), sums(g, placed))


def _is_constant(first: Any) -> bool:
    if type(first) is DummyRegressor:
        return True
    return type(first) is DummyClassifier and first.strategy not in ("stratified", "uniform")


def _first(g: Lowering, fitted: Any, x: Value, outputs: int) -> Value:
    """Where an estimator starts the stages: on float32 rows, through the link of the loss."""
    narrowed = g.columnwise(
        x,
        replace(g.cast(g.cast(x, "float32"), "float64"), fold=None),
        lambda rows: rows.astype(np.float32).astype(np.float64),
    )
    if not hasattr(fitted, "classes_"):
        return g.call(fitted.init_, "predict", narrowed, "init")
    chance = g.call(fitted.init_, "predict_proba", narrowed, "init")
    if outputs == 1:
        chance = g.select(chance, [1])
    tiny = float(np.finfo(np.float64).eps)
    chance = g.where(g.binary("Less", chance, tiny), tiny, chance)
    chance = g.where(g.binary("Greater", chance, 1.0 - tiny), 1.0 - tiny, chance)
    if outputs == 1:
        logit = g.unary("Log", g.div(chance, g.sub(1.0, chance)))
        return g.mul(logit, 0.5) if isinstance(fitted._loss, ExponentialLoss) else logit
    middle = g.unary("Exp", g.reduce("Mean", g.unary("Log", chance)))
    return g.unary("Log", g.div(chance, middle))


# --- classes ----------------------------------------------------------------------------------------------------


@rule("predict", *_CLASSIFIERS)
def _label(g: Lowering, fitted: Any, x: Value) -> Value:
    raw = g.call(fitted, "decision_function", x)
    if raw.width > 1:
        return g.argmax(raw)
    kind = "GreaterOrEqual" if isinstance(fitted, GradientBoostingClassifier) else "Greater"
    return g.cast(g.vector(g.binary(kind, raw, 0.0)), "int64")


@rule("predict_proba", *_CLASSIFIERS)
def _probabilities(g: Lowering, fitted: Any, x: Value) -> Value:
    raw = g.call(fitted, "decision_function", x)
    if raw.width > 1:
        return g.softmax(raw)
    second = g.unary("Sigmoid", g.mul(raw, 2.0) if isinstance(fitted._loss, ExponentialLoss) else raw)
    return g.concat([g.sub(1.0, second), second])


# --- histogram-based --------------------------------------------------------------------------------------------


@rule("decision_function", HistGradientBoostingClassifier)
def _histogram_decision(g: Lowering, fitted: Any, x: Value) -> Value:
    return _histogram(g, fitted, x)


@rule("predict", HistGradientBoostingRegressor)
def _histogram_regression(g: Lowering, fitted: Any, x: Value) -> Value:
    raw = _histogram(g, fitted, x)
    return g.unary("Exp", raw) if fitted.loss in ("poisson", "gamma") else raw


def _histogram(g: Lowering, fitted: Any, x: Value) -> Value:
    members = [predictor for stage in fitted._predictors for predictor in stage]
    outputs = fitted.n_trees_per_iteration_
    base = np.broadcast_to(np.asarray(fitted._baseline_prediction, np.float64).reshape(-1), (outputs,))
    trees = _grown_histogram(members, outputs)
    if fitted._preprocessor is not None:
        trees, x = _with_categories(g, fitted, x, members, trees)
    return sums(g, place(g, fitted, x, trees, narrow=False), base)


def _grown_histogram(members: list[Any], outputs: int) -> Ensemble:
    sizes = [len(member.nodes) for member in members]
    nodes = np.concatenate([member.nodes for member in members])
    owner = np.repeat(np.arange(len(members)), sizes)
    start = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    inner = ~nodes["is_leaf"].astype(np.bool_)
    value = np.zeros((len(nodes), outputs))
    value[np.arange(len(nodes)), owner % outputs] = np.where(inner, 0.0, nodes["value"])
    return Ensemble(
        tree=owner,
        feature=np.where(inner, nodes["feature_idx"], 0).astype(np.int64),
        threshold=np.where(inner, nodes["num_threshold"], 0.0),
        left=np.where(inner, nodes["left"] + start, -1).astype(np.int64),
        right=np.where(inner, nodes["right"] + start, -1).astype(np.int64),
        missing_left=nodes["missing_go_to_left"].astype(np.bool_) & inner,
        value=value,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Sets:
    """Splits over one column of K categories.

    ``right`` (K, S) says which categories go right, ``missing_right`` (S,) where anything else goes.
    """

    right: NDArray[np.bool_]
    missing_right: NDArray[np.bool_]


def _with_categories(
    g: Lowering, fitted: Any, x: Value, members: list[Any], trees: Ensemble
) -> tuple[Ensemble, Value]:
    """The trees over ``x`` and, after its columns, one column of 0 and 1 per split over categories."""
    encoder = fitted._preprocessor.named_transformers_.get("encoder")
    is_category = np.asarray(fitted.is_categorical_, np.bool_)
    order = np.concatenate([np.flatnonzero(is_category), np.flatnonzero(~is_category)])
    categorical = np.concatenate([m.nodes["is_categorical"] for m in members]).astype(np.bool_) & (
        trees.left >= 0
    )
    feature = np.where(trees.left >= 0, order[trees.feature], 0)
    threshold = np.where(categorical, 0.5, trees.threshold)
    missing = trees.missing_left & ~categorical
    parts, width = [x], x.width
    for place_, column in enumerate(np.flatnonzero(is_category)):
        nodes = np.flatnonzero(categorical & (trees.feature == place_))
        if not nodes.size:
            continue
        sets = _sets(members, trees, nodes, len(encoder.categories_[place_]))
        codes = _codes(g, fitted, x, int(column), encoder.categories_[place_])
        parts.append(_goes_right(g, x, int(column), codes, sets))
        feature[nodes] = width + np.arange(len(nodes))
        width += len(nodes)
    return replace(trees, feature=feature, threshold=threshold, missing_left=missing), g.concat(parts)


def _sets(members: list[Any], trees: Ensemble, nodes: NDArray[np.int64], count: int) -> _Sets:
    """The encoder gives the tree no category that the tree does not know, so what is not left is right."""
    which = np.concatenate([member.nodes["bitset_idx"] for member in members])
    bits = [members[trees.tree[node]].raw_left_cat_bitsets[which[node]] for node in nodes]
    return _Sets(
        right=np.stack([~_unpacked(words, count) for words in bits], axis=1),
        missing_right=~trees.missing_left[nodes],
    )


def _unpacked(words: NDArray[np.uint32], count: int) -> NDArray[np.bool_]:
    at = np.arange(count)
    return ((np.asarray(words)[at // _BITS] >> (at % _BITS).astype(np.uint32)) & 1).astype(np.bool_)


def _goes_right(g: Lowering, x: Value, column: int, codes: Wide, sets: _Sets) -> Value:
    """(n, S) 1 where a row goes right; sums of whole numbers, so exact."""
    if not x.vocabularies or x.vocabularies[column] is None:
        folding.note_edges(g, x, column, codes)
    hits = g.cast(g.binary("Equal", g.select(x, [column]), codes.reshape(1, -1)), "float64")
    other = sets.missing_right.astype(np.float64)
    return g.matmul(hits, sets.right.astype(np.float64) - other, other)


def _codes(g: Lowering, fitted: Any, x: Value, column: int, categories: NDArray[Any]) -> Wide:
    """(K,) what the column holds for each category; NaN, which equals nothing, where it never holds it."""
    vocabulary = x.vocabularies[column] if x.vocabularies else None
    if vocabulary is not None:
        place_of = {word: code for code, word in enumerate(vocabulary)}
        return np.array([place_of.get(_plain(word), np.nan) for word in categories], np.float64)
    plain = [np.nan if word is None else _plain(word) for word in categories]
    if any(isinstance(word, str) for word in plain):
        raise g.refuse(
            fitted,
            f"takes text in column {column}, which holds numbers here",
            "convert with the training data frame",
        )
    return np.array(plain, np.float64)


def _plain(word: Any) -> Any:
    return word.item() if isinstance(word, np.generic) else word
