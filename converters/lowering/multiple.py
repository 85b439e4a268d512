"""Several estimators for several targets, or for the several classes of one target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import is_classifier, is_regressor
from sklearn.multiclass import (
    OneVsOneClassifier,
    OneVsRestClassifier,
    OutputCodeClassifier,
    _ConstantPredictor,
)
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier, MultiOutputRegressor, RegressorChain

from converters.lowering.composition import constant_rows
from converters.lowering.graph import Lowering, Value
from converters.lowering.rules import rule


def predicted_numbers(g: Lowering, fitted: Any, sub: Any, x: Value, step: str = "") -> Value:
    """What ``sub.predict`` gives as numbers, (n, K): a classifier's own labels, which must be numbers here."""
    found = g.call(sub, "predict", x, step)
    if not is_classifier(sub):
        if not is_regressor(sub):
            raise g.refuse(
                fitted, f"contains a {type(sub).__name__}", "use classifiers and regressors inside it"
            )
        return found
    classes = np.asarray(sub.classes_)
    if len(found.shape) != 1 or classes.dtype.kind not in "biuf":
        raise g.refuse(
            fitted, f"takes the labels of a {type(sub).__name__} as numbers", "use numbers as labels"
        )
    return g.column(g.take(classes.astype(np.float64), found))


def binary_score(g: Lowering, sub: Any, x: Value, step: str = "") -> Value:
    """How sure an estimator of two classes is of the second, (n, 1), as scikit-learn's ``_predict_binary``."""
    if is_regressor(sub):
        return g.call(sub, "predict", x, step)
    if hasattr(sub, "decision_function"):
        return g.call(sub, "decision_function", x, step)
    return g.select(g.call(sub, "predict_proba", x, step), [1])


def binary_threshold(sub: Any) -> float:
    """The score above which the second class is predicted."""
    return 0.0 if hasattr(sub, "decision_function") and is_classifier(sub) else 0.5


def _each(g: Lowering, fitted: Any, method: str, x: Value) -> list[Value]:
    return [g.call(sub, method, x, f"estimators_[{i}]") for i, sub in enumerate(fitted.estimators_)]


# --- several targets -----------------------------------------------------------------------------------------------


@rule("predict", MultiOutputRegressor)
def _regressors(g: Lowering, fitted: MultiOutputRegressor, x: Value) -> Value:
    return g.concat(_each(g, fitted, "predict", x))


@rule("predict", MultiOutputClassifier)
def _classifiers(g: Lowering, fitted: MultiOutputClassifier, x: Value) -> Value:
    return g.concat([g.column(label) for label in _each(g, fitted, "predict", x)])


@rule("predict_proba", MultiOutputClassifier)
def _classifiers_probabilities(g: Lowering, fitted: MultiOutputClassifier, x: Value) -> Value:
    return g.concat(_each(g, fitted, "predict_proba", x))


def _chained(g: Lowering, fitted: Any, x: Value) -> list[Value]:
    """What each estimator of a chain takes: the columns, then the answers of those before it."""
    inputs = []
    method = getattr(fitted, "chain_method_", "predict")
    for i in range(len(fitted.estimators_)):
        inputs.append(x)
        if i + 1 < len(fitted.estimators_):
            x = g.concat([x, _response(g, fitted, i, method, x)])
    return inputs


def _response(g: Lowering, fitted: Any, i: int, method: str, x: Value) -> Value:
    """One number a row of a chain's i-th estimator, (n, 1): the label, or the score of the last class."""
    sub, step = fitted.estimators_[i], f"estimators_[{i}]"
    if method == "predict":
        return predicted_numbers(g, fitted, sub, x, step)
    if method not in ("predict_proba", "decision_function") or len(sub.classes_) != 2:
        raise g.refuse(
            fitted, f"passes on {method} of {len(sub.classes_)} classes", "use chain_method='predict'"
        )
    answer = g.call(sub, method, x, step)
    return g.select(answer, [1]) if method == "predict_proba" else answer


def _in_order(g: Lowering, fitted: Any, parts: Sequence[Value]) -> Value:
    """Columns from the order of the chain to the order of the targets."""
    return g.concat([parts[i] for i in np.argsort(np.asarray(fitted.order_))])


@rule("predict", RegressorChain)
def _regressor_chain(g: Lowering, fitted: RegressorChain, x: Value) -> Value:
    inputs = _chained(g, fitted, x)
    found = [
        g.call(sub, "predict", taken, f"estimators_[{i}]")
        for i, (sub, taken) in enumerate(zip(fitted.estimators_, inputs, strict=True))
    ]
    return _in_order(g, fitted, found)


@rule("predict", ClassifierChain)
def _classifier_chain(g: Lowering, fitted: ClassifierChain, x: Value) -> Value:
    place = np.argsort(np.asarray(fitted.order_))
    # classes_ stands in the order of the chain, the answers in the order of the targets
    if any(not np.array_equal(fitted.classes_[k], fitted.classes_[i]) for k, i in enumerate(place)):
        raise g.refuse(fitted, "has targets with different classes out of order", "use order=None")
    found = [
        g.column(g.call(sub, "predict", taken, f"estimators_[{i}]"))
        for i, (sub, taken) in enumerate(zip(fitted.estimators_, _chained(g, fitted, x), strict=True))
    ]
    return _in_order(g, fitted, found)


def _chain_scores(method: str) -> None:
    @rule(method, ClassifierChain)
    def _scores(g: Lowering, fitted: ClassifierChain, x: Value) -> Value:
        found = [_response(g, fitted, i, method, taken) for i, taken in enumerate(_chained(g, fitted, x))]
        return _in_order(g, fitted, found)


_chain_scores("predict_proba")
_chain_scores("decision_function")

# --- several classes -----------------------------------------------------------------------------------------------


@rule("decision_function", _ConstantPredictor)
def _constant_decision(g: Lowering, fitted: _ConstantPredictor, x: Value) -> Value:
    return constant_rows(g, x, fitted.y_)


@rule("predict_proba", _ConstantPredictor)
def _constant_probabilities(g: Lowering, fitted: _ConstantPredictor, x: Value) -> Value:
    positive = float(np.ravel(fitted.y_)[0])
    return constant_rows(g, x, [1 - positive, positive])


def _binary_scores(g: Lowering, fitted: Any, x: Value) -> Value:
    return g.concat(
        [binary_score(g, sub, x, f"estimators_[{i}]") for i, sub in enumerate(fitted.estimators_)]
    )


@rule("predict", OneVsRestClassifier)
def _rest(g: Lowering, fitted: OneVsRestClassifier, x: Value) -> Value:
    scores = _binary_scores(g, fitted, x)
    if fitted.label_binarizer_.y_type_ == "multiclass":
        return g.argmax(scores)
    above = g.cast(g.binary("Greater", scores, binary_threshold(fitted.estimators_[0])), "int64")
    if fitted.multilabel_:
        return above
    if len(fitted.classes_) == 1:
        return g.cast(g.vector(constant_rows(g, x, [0.0])), "int64")
    return g.vector(above)


@rule("decision_function", OneVsRestClassifier)
def _rest_decision(g: Lowering, fitted: OneVsRestClassifier, x: Value) -> Value:
    return g.concat(_each(g, fitted, "decision_function", x))


@rule("predict_proba", OneVsRestClassifier)
def _rest_probabilities(g: Lowering, fitted: OneVsRestClassifier, x: Value) -> Value:
    found = g.concat([g.select(each, [1]) for each in _each(g, fitted, "predict_proba", x)])
    if len(fitted.estimators_) == 1:
        found = g.concat([g.sub(1.0, found), found])
    if fitted.multilabel_:
        return found
    total = g.reduce("Sum", found)
    return g.div(found, g.where(g.binary("Equal", total, 0.0), 1.0, total))


@rule("decision_function", OneVsOneClassifier)
def _one_decision(g: Lowering, fitted: OneVsOneClassifier, x: Value) -> Value:
    """Votes plus the sum of confidences squeezed into (-1/3, 1/3), as scikit-learn's ``_ovr_decision_function``."""
    if fitted.pairwise_indices_ is not None:
        raise g.refuse(fitted, "takes a matrix of kernels", "use an estimator that takes columns")
    count = len(fitted.classes_)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    lost, won = np.zeros((2, len(pairs), count))
    for k, (i, j) in enumerate(pairs):
        lost[k, i] = won[k, j] = 1.0
    predicted = g.concat(
        [
            predicted_numbers(g, fitted, sub, x, f"estimators_[{k}]")
            for k, sub in enumerate(fitted.estimators_)
        ]
    )
    zero, one = (g.cast(g.binary("Equal", predicted, float(side)), "float64") for side in (0, 1))
    votes = g.add(g.matmul(zero, lost), g.matmul(one, won))
    total = g.matmul(_binary_scores(g, fitted, x), won - lost)
    squeezed = g.div(total, g.mul(g.add(g.unary("Abs", total), 1.0), 3.0))
    decision = g.add(votes, squeezed)
    return g.select(decision, [1]) if count == 2 else decision


@rule("predict", OneVsOneClassifier)
def _one(g: Lowering, fitted: OneVsOneClassifier, x: Value) -> Value:
    decision = g.call(fitted, "decision_function", x)
    if decision.width > 1:
        return g.argmax(decision)
    return g.cast(g.vector(g.binary("Greater", decision, binary_threshold(fitted.estimators_[0]))), "int64")


@rule("predict", OutputCodeClassifier)
def _codes(g: Lowering, fitted: OutputCodeClassifier, x: Value) -> Value:
    """The nearest code word by |y|² - 2yc + |c|², the first of those as near.

    The scores' own square is the same for all words, but far away its rounding makes them equally near.
    """
    book = np.asarray(fitted.code_book_, np.float64)
    scores = _binary_scores(g, fitted, x)
    squares = g.add(g.reduce("SumSquare", scores), g.matmul(scores, -2.0 * book.T))
    distances = g.add(squares, np.sum(book * book, axis=1).reshape(1, -1))
    return g.argmin(g.where(g.binary("Greater", distances, 0.0), distances, 0.0))
