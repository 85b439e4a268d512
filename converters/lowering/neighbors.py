"""Nearest neighbours: the training rows are constants of the graph, and every query measures its distance to all.

Which rows are nearest, where several are equally far, is the matter of `converters.lowering.search`.
"""

# ruff: noqa: SLF001 - what a fitted estimator learned is partly private to it
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import (
    KNeighborsClassifier,
    KNeighborsRegressor,
    LocalOutlierFactor,
    NeighborhoodComponentsAnalysis,
    RadiusNeighborsClassifier,
    RadiusNeighborsRegressor,
)
from sklearn.semi_supervised import LabelPropagation, LabelSpreading

from converters.lowering.clusters import expanded_squares
from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.rules import rule
from converters.lowering.search import nearest, reduced_distances, root, training_order

# --- the k nearest ------------------------------------------------------------------------------------------------


def _inverse(g: Lowering, distances: Value) -> Value:
    """1 / distance; where some of a row are zero, 1 for those and 0 for the others."""
    inverse = g.div(1.0, distances)
    infinite = g.cast(g.unary("IsInf", inverse), "float64")
    return g.where(g.binary("Greater", g.reduce("Max", infinite), 0.0), infinite, inverse)


def _weighting(g: Lowering, fitted: Any) -> bool:
    """Whether neighbours are weighted by distance."""
    if callable(fitted.weights):
        raise g.refuse(fitted, "has a function as its weights", "use weights='uniform' or 'distance'")
    return bool(fitted.weights == "distance")


def _blocks(fitted: Any, order: NDArray[np.int64]) -> list[Wide]:
    """For each output (N, C): 1 in the column of each training row's class."""
    codes = np.asarray(fitted._y).reshape(len(order), -1)[order]
    classes = fitted.classes_ if fitted.outputs_2d_ else [fitted.classes_]
    return [np.eye(len(known))[codes[:, k]] for k, known in enumerate(classes)]


def _targets(fitted: Any, order: NDArray[np.int64]) -> Wide:
    return np.asarray(fitted._y, np.float64).reshape(len(order), -1)[order]


def _winners(g: Lowering, fitted: Any, votes: Sequence[Value]) -> Value:
    labels = [g.argmax(each) for each in votes]
    return g.concat([g.column(label) for label in labels]) if fitted.outputs_2d_ else labels[0]


def _gathered(g: Lowering, fitted: Any, x: Value, table: Wide, *, mean: bool) -> Value:
    """(n, W) sums over the nearest rows of their rows in ``table`` (N, W), weighted; or means."""
    distances, places = nearest(g, fitted, x, fitted.n_neighbors)
    found = g.take(table, places)
    if not _weighting(g, fitted):
        return g.reduce("Mean" if mean else "Sum", found, axis=1, keepdims=False)
    weights = _inverse(g, distances)
    summed = g.reduce(
        "Sum", g.mul(found, g.reshape(weights, (-1, fitted.n_neighbors, 1))), axis=1, keepdims=False
    )
    return g.div(summed, g.reduce("Sum", weights)) if mean else summed


def _votes(g: Lowering, fitted: KNeighborsClassifier, x: Value) -> list[Value]:
    order = training_order(g, fitted)
    make = lambda: [_gathered(g, fitted, x, block, mean=False) for block in _blocks(fitted, order)]  # noqa: E731
    made: list[Value] = g.memo((id(fitted), "votes", x.name), make, fitted)
    return made


@rule("predict", KNeighborsClassifier)
def _label(g: Lowering, fitted: KNeighborsClassifier, x: Value) -> Value:
    return _winners(g, fitted, _votes(g, fitted, x))


@rule("predict_proba", KNeighborsClassifier)
def _probabilities(g: Lowering, fitted: KNeighborsClassifier, x: Value) -> Value:
    return g.concat([g.div(each, g.reduce("Sum", each)) for each in _votes(g, fitted, x)])


@rule("predict", KNeighborsRegressor)
def _mean(g: Lowering, fitted: KNeighborsRegressor, x: Value) -> Value:
    return _gathered(g, fitted, x, _targets(fitted, training_order(g, fitted)), mean=True)


# --- all within a radius ------------------------------------------------------------------------------------------


def _within(g: Lowering, fitted: Any, x: Value) -> tuple[Value, Value]:
    """(n, N) weights, 0 beyond the radius, and (n, 1) bool: whether there is no neighbour."""
    reduced, p = reduced_distances(g, fitted, x)
    near = g.binary("LessOrEqual", reduced, float(fitted.radius) ** p)
    ones = g.cast(near, "float64")
    alone = g.binary("Equal", g.reduce("Max", ones), 0.0)
    if not _weighting(g, fitted):
        return ones, alone
    zero = g.cast(g.binary("Equal", reduced, 0.0), "float64")
    inverse = g.where(near, g.div(1.0, root(g, reduced, p)), 0.0)
    return g.where(g.binary("Greater", g.reduce("Max", zero), 0.0), zero, inverse), alone


def _radius_blocks(g: Lowering, fitted: RadiusNeighborsClassifier, x: Value) -> list[Value]:
    order = training_order(g, fitted)
    weights, alone = _within(g, fitted, x)
    classes = fitted.classes_ if fitted.outputs_2d_ else [fitted.classes_]
    outliers = fitted.outlier_label_
    if outliers is None:
        g.note("a row without neighbours in the radius raises in scikit-learn; devices refuse it")
    made = []
    for k, block in enumerate(_blocks(fitted, order)):
        instead = np.full(len(classes[k]), np.nan)
        if outliers is not None:
            instead = np.asarray(classes[k] == outliers[k], np.float64)
            if not instead.any():
                reason = f"answers outliers with {outliers[k]!r}, which is none of its classes"
                raise g.refuse(fitted, reason, "give a label of the training set as outlier_label")
        votes = g.node("MatMul", [weights, block], (None, block.shape[1]))
        made.append(g.where(alone, instead, g.div(votes, g.reduce("Sum", votes))))
    return made


@rule("predict", RadiusNeighborsClassifier)
def _radius_label(g: Lowering, fitted: RadiusNeighborsClassifier, x: Value) -> Value:
    return _winners(g, fitted, _radius_probabilities_of(g, fitted, x))


@rule("predict_proba", RadiusNeighborsClassifier)
def _radius_probabilities(g: Lowering, fitted: RadiusNeighborsClassifier, x: Value) -> Value:
    return g.concat(_radius_probabilities_of(g, fitted, x))


def _radius_probabilities_of(g: Lowering, fitted: RadiusNeighborsClassifier, x: Value) -> list[Value]:
    made: list[Value] = g.memo((id(fitted), "radius", x.name), lambda: _radius_blocks(g, fitted, x), fitted)
    return made


@rule("predict", RadiusNeighborsRegressor)
def _radius_mean(g: Lowering, fitted: RadiusNeighborsRegressor, x: Value) -> Value:
    table = _targets(fitted, training_order(g, fitted))
    weights, alone = _within(g, fitted, x)
    summed = g.node("MatMul", [weights, table], (None, table.shape[1]))
    with np.errstate(
        invalid="ignore"
    ):  # whole numbers have no NaN: scikit-learn answers what the cast makes of it
        empty = np.full_like(np.asarray(fitted._y).reshape(len(table), -1)[0], np.nan).astype(np.float64)
    return g.where(alone, empty, g.div(summed, g.reduce("Sum", weights)))


# --- local outliers -----------------------------------------------------------------------------------------------


@rule("score_samples", LocalOutlierFactor)
def _outlier_score(g: Lowering, fitted: LocalOutlierFactor, x: Value) -> Value:
    if not fitted.novelty:
        raise g.refuse(fitted, "judges its training rows only", "fit with novelty=True")
    count = int(fitted.n_neighbors_)
    order = training_order(g, fitted)
    distances, places = nearest(g, fitted, x, count)
    reach = g.take(np.asarray(fitted._distances_fit_X_[order, count - 1], np.float64), places)
    reached = g.where(g.binary("Less", distances, reach), reach, distances)
    density = g.div(1.0, g.add(g.reduce("Mean", reached), 1e-10))
    ratios = g.div(g.take(np.asarray(fitted._lrd[order], np.float64), places), density)
    return g.unary("Neg", g.reduce("Mean", ratios))


@rule("decision_function", LocalOutlierFactor)
def _outlier_decision(g: Lowering, fitted: LocalOutlierFactor, x: Value) -> Value:
    return g.sub(g.call(fitted, "score_samples", x), float(fitted.offset_))


@rule("predict", LocalOutlierFactor)
def _outlier_label(g: Lowering, fitted: LocalOutlierFactor, x: Value) -> Value:
    outlying = g.binary("Less", g.call(fitted, "decision_function", x), 0.0)
    return g.cast(g.vector(g.unary("Not", outlying)), "int64")


# --- labels that spread -------------------------------------------------------------------------------------------


@rule("predict_proba", LabelPropagation, LabelSpreading)
def _spread_probabilities(g: Lowering, fitted: Any, x: Value) -> Value:
    table = np.asarray(fitted.label_distributions_, np.float64)
    if fitted.kernel == "knn":
        _, places = nearest(g, fitted.nn_fit, x, fitted.n_neighbors)
        found = g.take(table[training_order(g, fitted.nn_fit)], places)
        weights = g.reduce("Sum", found, axis=1, keepdims=False)
    elif fitted.kernel == "rbf":
        g.note(f"carries {len(table)} training rows ({type(fitted).__name__})")
        squares = expanded_squares(g, x, np.ascontiguousarray(fitted.X_, np.float64))
        weights = g.matmul(g.unary("Exp", g.mul(squares, -float(fitted.gamma))), table)
    else:
        raise g.refuse(fitted, "has a function as its kernel", "use kernel='rbf' or 'knn'")
    return g.div(weights, g.reduce("Sum", weights))


@rule("predict", LabelPropagation, LabelSpreading)
def _spread_label(g: Lowering, fitted: Any, x: Value) -> Value:
    return g.argmax(g.call(fitted, "predict_proba", x))


# --- a learned projection -----------------------------------------------------------------------------------------


@rule("transform", NeighborhoodComponentsAnalysis)
def _components(g: Lowering, fitted: NeighborhoodComponentsAnalysis, x: Value) -> Value:
    return g.matmul(x, np.asarray(fitted.components_).T)
