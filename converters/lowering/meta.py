"""Ensembles of any estimators: voting, stacking, bagging, AdaBoost, calibration.

What their members answer is put together in scikit-learn's order, one addition after the other, so that ties fall the
same way. A member's classes may be some of the ensemble's, and stand there under other indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import is_classifier
from sklearn.calibration import CalibratedClassifierCV, _SigmoidCalibration
from sklearn.ensemble import (
    AdaBoostClassifier,
    AdaBoostRegressor,
    BaggingClassifier,
    BaggingRegressor,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.isotonic import IsotonicRegression

from converters.lowering.composition import constant_rows
from converters.lowering.functions import count_at_most
from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.multiple import predicted_numbers
from converters.lowering.rules import rule


def total(g: Lowering, parts: Sequence[Value]) -> Value:
    """The sum, from the first to the last."""
    return reduce(g.add, parts)


def spread(g: Lowering, member: Any, probabilities: Value, count: int) -> Value:
    """Columns of a member whose ``classes_`` are indices into ``count`` classes, at their places; 0 elsewhere."""
    places = np.asarray(member.classes_, np.int64)
    if len(places) == count:
        return probabilities
    absent = g.sub(g.select(probabilities, [0]), g.select(probabilities, [0]))
    whole = g.concat([probabilities, absent])
    source = np.full(count, len(places))
    source[places] = np.arange(len(places))
    return g.select(whole, source)


def votes(g: Lowering, member: Any, x: Value, count: int, step: str) -> Value:
    """1 in the column of the class that a member predicts; its ``classes_`` are indices into ``count`` classes."""
    return g.take(np.eye(count)[np.asarray(member.classes_, np.int64)], g.call(member, "predict", x, step))


def _members(fitted: Any) -> list[tuple[str, Any]]:
    """Names and fitted members, without those dropped."""
    names = [name for name, member in fitted.estimators if not (isinstance(member, str) and member == "drop")]
    return list(zip(names, fitted.estimators_, strict=True))


# --- voting --------------------------------------------------------------------------------------------------------


def _average(g: Lowering, fitted: Any, parts: Sequence[Value]) -> Value:
    weights = fitted._weights_not_none  # noqa: SLF001 - the weights of the members that are left
    if weights is None:
        return g.div(total(g, parts), float(len(parts)))
    scaled = [g.mul(part, float(weight)) for part, weight in zip(parts, weights, strict=True)]
    return g.div(total(g, scaled), float(np.sum(np.asarray(weights, np.float64))))


@rule("predict", VotingRegressor)
def _voting_regression(g: Lowering, fitted: VotingRegressor, x: Value) -> Value:
    return _average(g, fitted, [g.call(member, "predict", x, name) for name, member in _members(fitted)])


@rule("predict_proba", VotingClassifier)
def _voting_probabilities(g: Lowering, fitted: VotingClassifier, x: Value) -> Value:
    return _average(
        g, fitted, [g.call(member, "predict_proba", x, name) for name, member in _members(fitted)]
    )


@rule("predict", VotingClassifier)
def _voting(g: Lowering, fitted: VotingClassifier, x: Value) -> Value:
    if fitted.voting == "soft":
        return g.argmax(g.call(fitted, "predict_proba", x))
    weights = fitted._weights_not_none  # noqa: SLF001 - the weights of the members that are left
    if weights is None:
        weights = [1.0] * len(fitted.estimators_)
    if min(weights) < 0:
        raise g.refuse(fitted, "votes with a negative weight", "use weights from 0 up")
    parts = [
        g.mul(votes(g, member, x, len(fitted.classes_), name), float(weight))
        for (name, member), weight in zip(_members(fitted), weights, strict=True)
    ]
    return g.argmax(total(g, parts))


@rule("transform", VotingClassifier, VotingRegressor)
def _voting_transform(g: Lowering, fitted: Any, x: Value) -> Value:
    if getattr(fitted, "voting", "hard") == "hard":
        return g.concat([predicted_numbers(g, fitted, member, x, name) for name, member in _members(fitted)])
    if not fitted.flatten_transform:
        raise g.refuse(fitted, "gives a block of three axes", "set flatten_transform=True")
    return g.concat([g.call(member, "predict_proba", x, name) for name, member in _members(fitted)])


# --- stacking ------------------------------------------------------------------------------------------------------


@rule("transform", StackingClassifier, StackingRegressor)
def _stacked(g: Lowering, fitted: Any, x: Value) -> Value:
    binary = is_classifier(fitted) and len(fitted.classes_) == 2
    if is_classifier(fitted) and isinstance(fitted.classes_, list):
        raise g.refuse(fitted, "has several targets", "fit one for each target")
    parts = []
    for (name, member), method in zip(_members(fitted), fitted.stack_method_, strict=True):
        if method == "predict":
            parts.append(predicted_numbers(g, fitted, member, x, name))
            continue
        found = g.call(member, method, x, name)
        if method == "predict_proba" and binary:
            found = g.select(found, np.arange(1, found.width))
        parts.append(found)
    if fitted.passthrough:
        parts.append(x)
    return g.concat(parts)


@rule("predict", StackingRegressor)
def _stacking_regression(g: Lowering, fitted: StackingRegressor, x: Value) -> Value:
    return g.call(fitted.final_estimator_, "predict", g.call(fitted, "transform", x), "final_estimator_")


@rule("predict", StackingClassifier)
def _stacking(g: Lowering, fitted: StackingClassifier, x: Value) -> Value:
    final = fitted.final_estimator_
    index = g.call(final, "predict", g.call(fitted, "transform", x), "final_estimator_")
    return g.take(np.asarray(final.classes_, np.int64), index)


def _stacking_scores(method: str) -> None:
    @rule(method, StackingClassifier)
    def _score(g: Lowering, fitted: StackingClassifier, x: Value) -> Value:
        return g.call(fitted.final_estimator_, method, g.call(fitted, "transform", x), "final_estimator_")


_stacking_scores("predict_proba")
_stacking_scores("decision_function")

# --- bagging -------------------------------------------------------------------------------------------------------


def _bag(g: Lowering, fitted: Any, x: Value) -> list[tuple[str, Any, Value]]:
    return [
        (f"estimators_[{i}]", member, g.select(x, columns))
        for i, (member, columns) in enumerate(
            zip(fitted.estimators_, fitted.estimators_features_, strict=True)
        )
    ]


@rule("predict", BaggingRegressor)
def _bagging_regression(g: Lowering, fitted: BaggingRegressor, x: Value) -> Value:
    found = [g.call(member, "predict", taken, step) for step, member, taken in _bag(g, fitted, x)]
    return g.div(total(g, found), float(fitted.n_estimators))


@rule("predict_proba", BaggingClassifier)
def _bagging_probabilities(g: Lowering, fitted: BaggingClassifier, x: Value) -> Value:
    count = int(fitted.n_classes_)
    parts = []
    for step, member, taken in _bag(g, fitted, x):
        if hasattr(member, "predict_proba"):
            parts.append(spread(g, member, g.call(member, "predict_proba", taken, step), count))
        else:
            parts.append(votes(g, member, taken, count, step))
    return g.div(total(g, parts), float(fitted.n_estimators))


@rule("predict", BaggingClassifier)
def _bagging(g: Lowering, fitted: BaggingClassifier, x: Value) -> Value:
    return g.argmax(g.call(fitted, "predict_proba", x))


@rule("decision_function", BaggingClassifier)
def _bagging_decision(g: Lowering, fitted: BaggingClassifier, x: Value) -> Value:
    found = [g.call(member, "decision_function", taken, step) for step, member, taken in _bag(g, fitted, x)]
    if len({part.width for part in found}) > 1:
        raise g.refuse(fitted, "has members that saw different classes", "ask it for predict_proba")
    return g.div(total(g, found), float(fitted.n_estimators))


# --- AdaBoost ------------------------------------------------------------------------------------------------------


def _boosted(g: Lowering, fitted: AdaBoostClassifier, x: Value) -> Value:
    """SAMME: for each class the weights of the members that say it, less a share of the others', (n, C)."""
    classes = np.asarray(fitted.classes_)
    parts = []
    for i, (member, weight) in enumerate(zip(fitted.estimators_, fitted.estimator_weights_, strict=False)):
        same = np.asarray(member.classes_)[:, None] == classes[None, :]
        table: Wide = np.where(same, weight, -1 / (len(classes) - 1) * weight)
        parts.append(g.take(table, g.call(member, "predict", x, f"estimators_[{i}]")))
    return g.div(total(g, parts), float(fitted.estimator_weights_.sum()))


@rule("decision_function", AdaBoostClassifier)
def _boosted_decision(g: Lowering, fitted: AdaBoostClassifier, x: Value) -> Value:
    if fitted.n_classes_ == 1:
        return constant_rows(g, x, [0.0])
    found = _boosted(g, fitted, x)
    if fitted.n_classes_ > 2:
        return found
    return g.add(g.unary("Neg", g.select(found, [0])), g.select(found, [1]))


@rule("predict", AdaBoostClassifier)
def _boosted_label(g: Lowering, fitted: AdaBoostClassifier, x: Value) -> Value:
    decision = g.call(fitted, "decision_function", x)
    if fitted.n_classes_ == 2:
        return g.cast(g.vector(g.binary("Greater", decision, 0.0)), "int64")
    return g.argmax(decision)


@rule("predict_proba", AdaBoostClassifier)
def _boosted_probabilities(g: Lowering, fitted: AdaBoostClassifier, x: Value) -> Value:
    if fitted.n_classes_ == 1:
        return constant_rows(g, x, [1.0])
    decision = g.call(fitted, "decision_function", x)
    if fitted.n_classes_ == 2:
        return g.softmax(g.div(g.concat([g.unary("Neg", decision), decision]), 2.0))
    return g.softmax(g.div(decision, float(fitted.n_classes_ - 1)))


@rule("predict", AdaBoostRegressor)
def _boosted_regression(g: Lowering, fitted: AdaBoostRegressor, x: Value) -> Value:
    """The weighted median: the first prediction, from the smallest, that has half of the weight up to it."""
    found = g.concat(
        [g.call(member, "predict", x, f"estimators_[{i}]") for i, member in enumerate(fitted.estimators_)]
    )
    count = found.width
    weights = np.asarray(fitted.estimator_weights_[:count], np.float64)
    ordered, order = g.node_many(
        "TopK",
        [found, np.array([count])],
        [(found.shape, "float64"), (found.shape, "int64")],
        axis=1,
        largest=0,
        sorted=1,
    )
    share = g.node("CumSum", [g.take(weights, order), np.array(1)], found.shape)
    enough = g.binary("GreaterOrEqual", share, g.mul(g.select(share, [count - 1]), 0.5))
    at = g.column(g.argmax(g.cast(enough, "float64")))
    return g.node("GatherElements", [ordered, at], (None, 1), axis=1)


# --- calibration ---------------------------------------------------------------------------------------------------


def interpolated(g: Lowering, x: Value, knots: Wide, values: Wide) -> Value:
    """`numpy.interp` of a column (n, 1) without NaN between rising ``knots`` (m,) with ``values`` (m,)."""
    if len(knots) == 1:
        return constant_rows(g, x, values)
    slopes = np.append(np.diff(values) / np.diff(knots), 0.0)
    low, high = float(knots[0]), float(knots[-1])
    x = g.where(g.binary("Less", x, low), low, g.where(g.binary("Greater", x, high), high, x))
    index = g.vector(count_at_most(g, x, [knots[1:]]))
    start, slope, value = (g.column(g.take(table, index)) for table in (knots, slopes, values))
    return g.add(g.mul(slope, g.sub(x, start)), value)


def _calibrator(g: Lowering, fitted: Any, calibrator: Any, scores: Value) -> Value:
    """A calibrator's answer (n, 1) to scores (n, 1)."""
    if type(calibrator) is _SigmoidCalibration:
        exponent = g.add(g.mul(scores, float(calibrator.a_)), float(calibrator.b_))
        return g.unary("Sigmoid", g.unary("Neg", exponent))
    if type(calibrator) is IsotonicRegression and calibrator.out_of_bounds == "clip":
        knots, values = np.asarray(calibrator.X_thresholds_), np.asarray(calibrator.y_thresholds_)
        if knots.dtype == np.float64 and values.dtype == np.float64:
            return interpolated(g, scores, knots, values)
    raise g.refuse(
        fitted, f"calibrates with a {type(calibrator).__name__} of its own", "use method='sigmoid'"
    )


def _one_vs_rest(g: Lowering, fitted: Any, calibrated: Any, scores: Value) -> Value:
    count = len(calibrated.classes)
    places: NDArray[np.int64] = np.searchsorted(calibrated.classes, calibrated.estimator.classes_).astype(
        np.int64
    )
    found: dict[int, Value] = {}
    for place, k, calibrator in zip(places, range(scores.width), calibrated.calibrators, strict=False):
        at = int(place) + 1 if count == 2 else int(place)
        found[at] = _calibrator(g, fitted, calibrator, g.select(scores, [k]))
    if count == 2:
        return g.concat([g.sub(1.0, found[1]), found[1]])
    absent = constant_rows(g, scores, [0.0])
    whole = g.concat([found.get(k, absent) for k in range(count)])
    sums = g.reduce("Sum", whole)
    empty = g.binary("Equal", sums, 0.0)
    return g.where(empty, 1 / count, g.div(whole, g.where(empty, 1.0, sums)))


def _temperature(g: Lowering, calibrated: Any, scores: Value, *, probabilities: bool) -> Value:
    """Softmax of scaled logits; rows that look like probabilities are taken for such, as scikit-learn does."""
    alone = scores.width == 1
    if alone:
        first = g.sub(1.0, scores) if probabilities else g.unary("Neg", scores)
        scores = g.concat([first, scores])
    logits = scores
    if probabilities or not alone:
        outside = g.binary("Or", g.binary("Less", scores, 0.0), g.binary("Greater", scores, 1.0))
        apart = g.unary("Abs", g.sub(g.reduce("Sum", scores), 1.0))
        inside = g.binary("Equal", g.reduce("Max", g.cast(outside, "float64")), 0.0)
        alike = g.binary("And", inside, g.binary("LessOrEqual", apart, 1e-8 + 1e-5))  # numpy.isclose
        logits = g.where(alike, g.unary("Log", g.add(scores, 1e-12)), scores)
    return g.softmax(g.mul(logits, float(calibrated.calibrators[0].beta_)))


def _calibrated(g: Lowering, fitted: Any, calibrated: Any, x: Value, step: str) -> Value:
    member = calibrated.estimator
    decides = hasattr(member, "decision_function")
    scores = g.call(member, "decision_function" if decides else "predict_proba", x, step)
    if not decides and scores.width == 2:
        scores = g.select(scores, [1])
    if calibrated.method == "temperature":
        found = _temperature(g, calibrated, scores, probabilities=not decides)
    else:
        found = _one_vs_rest(g, fitted, calibrated, scores)
    above = g.binary("And", g.binary("Greater", found, 1.0), g.binary("LessOrEqual", found, 1.0 + 1e-5))
    return g.where(above, 1.0, found)


@rule("predict_proba", CalibratedClassifierCV)
def _calibrated_probabilities(g: Lowering, fitted: CalibratedClassifierCV, x: Value) -> Value:
    members = fitted.calibrated_classifiers_
    parts = [
        _calibrated(g, fitted, each, x, f"calibrated_classifiers_[{i}]") for i, each in enumerate(members)
    ]
    return g.div(total(g, parts), float(len(members)))


@rule("predict", CalibratedClassifierCV)
def _calibrated_label(g: Lowering, fitted: CalibratedClassifierCV, x: Value) -> Value:
    return g.argmax(g.call(fitted, "predict_proba", x))
