"""Pipelines and what else only arranges other steps: columns apart, side by side, or one estimator behind another.

A search, a frozen, a self-trained or a thresholded estimator answers as the estimator inside it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.experimental import enable_halving_search_cv  # noqa: F401 - makes the two Halving searches importable
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    HalvingGridSearchCV,
    HalvingRandomSearchCV,
    RandomizedSearchCV,
    TunedThresholdClassifierCV,
)
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.semi_supervised import SelfTrainingClassifier

from converters.lowering.graph import Lowering, Value
from converters.lowering.rules import rule

_METHODS: Final = ("predict", "predict_proba", "decision_function", "score_samples", "negative_distance")
_SEARCHES: Final = (GridSearchCV, RandomizedSearchCV, HalvingGridSearchCV, HalvingRandomSearchCV)


def chain(g: Lowering, steps: Sequence[tuple[str, Any]], x: Value) -> Value:
    """``x`` through the ``transform`` of each step."""
    for name, step in steps:
        if not _is_identity(step):
            x = g.call(step, "transform", x, name)
    return x


def constant_rows(g: Lowering, x: Value, values: Any) -> Value:
    """The same ``values`` (W,) for every row of ``x``, (n, W)."""
    row = np.asarray(values, np.float64).reshape(1, -1)
    first = g.select(x, [0])
    return g.where(g.binary("Equal", first, first), row, row)


def _is_identity(step: Any) -> bool:
    if step is None or isinstance(step, str):
        return step != "drop"
    return type(step) is FunctionTransformer and step.func is None


def _weighted(g: Lowering, fitted: Any, x: Value, weight: float | None) -> Value:
    """``weight * x``; keeps the fold where the order stays."""
    if weight is None:
        return x
    if x.coded:
        raise g.refuse(fitted, "weights a column of text or categories", "encode it before")
    factor = float(weight)
    made = g.mul(x, factor)
    if factor <= 0:
        return made
    return g.columnwise(
        x, made, lambda rows: rows * factor, slope=np.full(x.width, factor), offset=np.zeros(x.width)
    )


def _side_by_side(g: Lowering, fitted: Any, parts: Sequence[Value]) -> Value:
    if not any(part.width for part in parts):
        raise g.refuse(fitted, "keeps no column", "give it a transformer that does")
    return g.concat(parts)


# --- pipelines, columns, unions ------------------------------------------------------------------------------------


@rule("transform", Pipeline)
def _transform(g: Lowering, fitted: Pipeline, x: Value) -> Value:
    return chain(g, fitted.steps, x)


def _answers(method: str) -> None:
    @rule(method, Pipeline)
    def _last(g: Lowering, fitted: Pipeline, x: Value) -> Value:
        *before, (name, last) = fitted.steps
        return g.call(last, method, chain(g, before, x), name)


@rule("transform", ColumnTransformer)
def _columns(g: Lowering, fitted: ColumnTransformer, x: Value) -> Value:
    weights = fitted.transformer_weights or {}
    parts = []
    for name, step, _ in fitted.transformers_:
        columns = np.asarray(fitted._transformer_to_input_indices[name], np.int64)  # noqa: SLF001 - the fitted columns
        if (isinstance(step, str) and step == "drop") or not columns.size:
            continue
        part = chain(g, [(name, step)], g.select(x, columns))
        parts.append(_weighted(g, fitted, part, weights.get(name)))
    return _side_by_side(g, fitted, parts)


@rule("transform", FeatureUnion)
def _union(g: Lowering, fitted: FeatureUnion, x: Value) -> Value:
    weights = fitted.transformer_weights or {}
    return _side_by_side(
        g,
        fitted,
        [
            _weighted(g, fitted, chain(g, [(name, step)], x), weights.get(name))
            for name, step in fitted.transformer_list
            if not (isinstance(step, str) and step == "drop")
        ],
    )


# --- one estimator behind another ----------------------------------------------------------------------------------


def _delegates(method: str) -> None:
    @rule(method, *_SEARCHES)
    def _best(g: Lowering, fitted: Any, x: Value) -> Value:
        if not hasattr(fitted, "best_estimator_"):
            raise g.refuse(fitted, "has no best_estimator_", "search with refit=True")
        return g.call(fitted.best_estimator_, method, x, "best_estimator_")

    @rule(method, FrozenEstimator)
    def _frozen(g: Lowering, fitted: Any, x: Value) -> Value:
        return g.call(fitted.estimator, method, x, "estimator")


def _classifies(method: str) -> None:
    @rule(method, SelfTrainingClassifier)
    def _trained(g: Lowering, fitted: Any, x: Value) -> Value:
        return g.call(fitted.estimator_, method, x, "estimator_")


def _scores(method: str) -> None:
    @rule(method, FixedThresholdClassifier, TunedThresholdClassifierCV)
    def _threshold_free(g: Lowering, fitted: Any, x: Value) -> Value:
        return g.call(_inner(fitted), method, x, "estimator_")


for _method in _METHODS:
    _answers(_method)
for _method in (*_METHODS, "transform"):
    _delegates(_method)
for _method in ("predict", "predict_proba", "decision_function"):
    _classifies(_method)
for _method in ("predict_proba", "decision_function"):
    _scores(_method)


def _inner(fitted: Any) -> Any:
    return getattr(fitted, "estimator_", fitted.estimator)


@rule("predict", FixedThresholdClassifier)
def _fixed(g: Lowering, fitted: FixedThresholdClassifier, x: Value) -> Value:
    threshold = fitted.threshold
    if isinstance(threshold, str):
        threshold = 0.5 if _response(fitted) == "predict_proba" else 0.0
    return _thresholded(g, fitted, x, float(threshold), fitted.pos_label)


@rule("predict", TunedThresholdClassifierCV)
def _tuned(g: Lowering, fitted: TunedThresholdClassifierCV, x: Value) -> Value:
    positive = fitted._curve_scorer._get_pos_label()  # noqa: SLF001 - as its own predict asks
    return _thresholded(g, fitted, x, float(fitted.best_threshold_), positive)


def _response(fitted: Any) -> str:
    method = str(fitted.response_method)
    if method != "auto":
        return method
    return "predict_proba" if hasattr(_inner(fitted), "predict_proba") else "decision_function"


def _thresholded(g: Lowering, fitted: Any, x: Value, threshold: float, positive: Any) -> Value:
    """Class indices by ``score >= threshold``, the score being the positive class's."""
    classes = np.asarray(fitted.classes_)
    if len(classes) != 2:
        raise g.refuse(fitted, f"has {len(classes)} classes", "fit it on two")
    index = 1 if positive is None else int(np.flatnonzero(classes == positive)[0])
    method = _response(fitted)
    score = g.call(_inner(fitted), method, x, "estimator_")
    if method == "predict_proba":
        score = g.select(score, [index])
    elif index == 0:
        score = g.unary("Neg", score)
    above = g.cast(g.vector(g.binary("GreaterOrEqual", score, threshold)), "int64")
    return g.take(np.array([1 - index, index]), above)
