"""Linear models: the scalers before them are folded into the weights in float64.

A float32 sum of products has no bound that holds for every row: terms that cancel magnify its error, and values near
the end of float32 turn probabilities into NaN.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from scipy.sparse import issparse
from sklearn._loss.link import IdentityLink, LogLink
from sklearn.cross_decomposition import CCA, PLSSVD, PLSCanonical, PLSRegression
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import (
    ARDRegression,
    BayesianRidge,
    ElasticNet,
    ElasticNetCV,
    GammaRegressor,
    HuberRegressor,
    Lars,
    LarsCV,
    Lasso,
    LassoCV,
    LassoLars,
    LassoLarsCV,
    LassoLarsIC,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    MultiTaskElasticNet,
    MultiTaskElasticNetCV,
    MultiTaskLasso,
    MultiTaskLassoCV,
    OrthogonalMatchingPursuit,
    OrthogonalMatchingPursuitCV,
    PassiveAggressiveClassifier,
    PassiveAggressiveRegressor,
    Perceptron,
    PoissonRegressor,
    QuantileRegressor,
    RANSACRegressor,
    Ridge,
    RidgeClassifier,
    RidgeClassifierCV,
    RidgeCV,
    SGDClassifier,
    SGDOneClassSVM,
    SGDRegressor,
    TheilSenRegressor,
    TweedieRegressor,
)
from sklearn.svm import LinearSVC, LinearSVR

from converters.lowering.functions import clipped, expit
from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.rules import rule

_REGRESSORS: Final = (
    ARDRegression,
    BayesianRidge,
    ElasticNet,
    ElasticNetCV,
    HuberRegressor,
    Lars,
    LarsCV,
    Lasso,
    LassoCV,
    LassoLars,
    LassoLarsCV,
    LassoLarsIC,
    LinearRegression,
    LinearSVR,
    MultiTaskElasticNet,
    MultiTaskElasticNetCV,
    MultiTaskLasso,
    MultiTaskLassoCV,
    OrthogonalMatchingPursuit,
    OrthogonalMatchingPursuitCV,
    PassiveAggressiveRegressor,
    QuantileRegressor,
    Ridge,
    RidgeCV,
    SGDRegressor,
    TheilSenRegressor,
)
_GENERALISED: Final = (GammaRegressor, PoissonRegressor, TweedieRegressor)
_LOGISTIC: Final = (LogisticRegression, LogisticRegressionCV)
_RIDGE: Final = (RidgeClassifier, RidgeClassifierCV)
_CLASSIFIERS: Final = (LinearSVC, PassiveAggressiveClassifier, Perceptron, SGDClassifier)
_LATENT: Final = (CCA, PLSCanonical, PLSRegression)


def dense(g: Lowering, fitted: Any, coef: Any) -> Wide:
    """``coef`` as float64; raises `UnsupportedPipeline` for a sparse matrix."""
    if issparse(coef):
        raise g.refuse(fitted, "has sparse coefficients", "call densify() on it")
    return np.asarray(coef, np.float64)


def affine(g: Lowering, fitted: Any, x: Value, coef: Any, intercept: Any) -> Value:
    """``x @ coef.T + intercept``, (n, K): on the raw input where the steps before are affine.

    Of the raw columns only those that ``x`` is made of: 0 times the NaN of another would be NaN.
    """
    coef = dense(g, fitted, coef)
    if not np.isfinite(coef).all() or not np.isfinite(intercept).all():
        raise g.refuse(fitted, "has coefficients that are not finite", "scale the columns and fit again")
    weights = coef.reshape(-1, x.width)
    bias = np.broadcast_to(np.asarray(intercept, np.float64).reshape(-1), (len(weights),))
    fold = x.fold
    if fold is None or not fold.complete or fold.slope is None or fold.offset is None:
        return g.matmul(x, weights.T, bias)
    used, place = np.unique(fold.sources, return_inverse=True)
    raw = np.zeros((len(used), len(weights)))
    np.add.at(raw, place, (weights * fold.slope).T)
    moved = [math.fsum([b, *(w * fold.offset).tolist()]) for w, b in zip(weights, bias, strict=True)]
    return g.matmul(g.select(g.cast(g.input, "float64"), used), raw, np.array(moved))


def sign_index(g: Lowering, decision: Value) -> Value:
    """Class indices (n,) from decision values: above 0 for two classes, else the first largest."""
    if decision.width > 1:
        return g.argmax(decision)
    return g.cast(g.vector(g.binary("Greater", decision, 0.0)), "int64")


def shares(g: Lowering, weights: Value) -> Value:
    """Rows (n, C) divided by their sums; rows of zeros become uniform, as in scikit-learn's one-vs-rest."""
    total = g.reduce("Sum", weights)
    empty = g.binary("Equal", total, 0.0)
    return g.where(empty, 1.0 / weights.width, g.div(weights, g.where(empty, 1.0, total)))


def two_sided(g: Lowering, decision: Value) -> Value:
    """Logits (n, 2) whose softmax is the logistic function of ``decision`` (n, 1): -z/2 and z/2; halving is exact."""
    return g.matmul(decision, np.array([[-0.5, 0.5]]))


@rule("predict", *_REGRESSORS)
def _regression(g: Lowering, fitted: Any, x: Value) -> Value:
    return affine(g, fitted, x, fitted.coef_, fitted.intercept_)


@rule("predict", RANSACRegressor)
def _consensus(g: Lowering, fitted: RANSACRegressor, x: Value) -> Value:
    return g.call(fitted.estimator_, "predict", x, "estimator_")


@rule("predict", *_GENERALISED)
def _generalised(g: Lowering, fitted: Any, x: Value) -> Value:
    linear = affine(g, fitted, x, fitted.coef_, fitted.intercept_)
    link = type(fitted._base_loss.link)  # noqa: SLF001 (what predict itself reads; the public ``link`` may be "auto")
    if link is IdentityLink:
        return linear
    if link is LogLink:
        return g.unary("Exp", linear)
    raise g.refuse(fitted, f"has the link {link.__name__}", "use the log or identity link")


@rule("decision_function", *_LOGISTIC, *_RIDGE, *_CLASSIFIERS)
def _linear_decision(g: Lowering, fitted: Any, x: Value) -> Value:
    return affine(g, fitted, x, fitted.coef_, fitted.intercept_)


@rule("predict", *_LOGISTIC)
def _logistic_label(g: Lowering, fitted: Any, x: Value) -> Value:
    return g.argmax(_logits(g, fitted, x))


@rule("predict_proba", *_LOGISTIC)
def _logistic_probabilities(g: Lowering, fitted: Any, x: Value) -> Value:
    return g.softmax(_logits(g, fitted, x))


def _logits(g: Lowering, fitted: Any, x: Value) -> Value:
    """Two columns for two classes, so that label and probabilities share them."""
    coef, intercept = dense(g, fitted, fitted.coef_), np.asarray(fitted.intercept_)
    if len(coef) > 1:
        return g.call(fitted, "decision_function", x)
    halves: Wide = np.vstack([-coef, coef]) / 2
    made: Value = g.memo(
        (id(fitted), "logits", x.name),
        lambda: affine(g, fitted, x, halves, np.concatenate([-intercept, intercept]) / 2),
        fitted,
    )
    return made


@rule("predict", *_CLASSIFIERS)
def _linear_label(g: Lowering, fitted: Any, x: Value) -> Value:
    return sign_index(g, g.call(fitted, "decision_function", x))


@rule("predict", *_RIDGE)
def _ridge_label(g: Lowering, fitted: Any, x: Value) -> Value:
    decision = g.call(fitted, "decision_function", x)
    if fitted._label_binarizer.y_type_.startswith("multilabel"):  # noqa: SLF001 (what predict itself reads)
        return g.cast(g.binary("Greater", decision, 0.0), "int64")
    return sign_index(g, decision)


@rule("predict_proba", SGDClassifier)
def _descent_probabilities(g: Lowering, fitted: SGDClassifier, x: Value) -> Value:
    if fitted.loss not in ("log_loss", "modified_huber"):
        raise g.refuse(fitted, f"has no probabilities for the loss {fitted.loss!r}", "use loss='log_loss'")
    scores = g.call(fitted, "decision_function", x)
    logistic = fitted.loss == "log_loss"
    each = expit(g, scores) if logistic else g.div(g.add(clipped(g, scores, -1.0, 1.0), 1.0), 2.0)
    return g.concat([g.sub(1.0, each), each]) if each.width == 1 else shares(g, each)


@rule("decision_function", SGDOneClassSVM)
def _one_class_decision(g: Lowering, fitted: SGDOneClassSVM, x: Value) -> Value:
    return affine(g, fitted, x, fitted.coef_, -fitted.offset_)


@rule("predict", SGDOneClassSVM)
def _one_class_label(g: Lowering, fitted: SGDOneClassSVM, x: Value) -> Value:
    decision = g.call(fitted, "decision_function", x)
    return g.cast(g.vector(g.binary("GreaterOrEqual", decision, 0.0)), "int64")


@rule("predict", *_LATENT)
def _latent_predict(g: Lowering, fitted: Any, x: Value) -> Value:
    mean = fitted._x_mean  # noqa: SLF001 (no public name)
    centred = g.columnwise(x, g.sub(x, mean), lambda rows: rows - mean, slope=np.ones(x.width), offset=-mean)
    return affine(g, fitted, centred, fitted.coef_, fitted.intercept_)


@rule("transform", *_LATENT)
def _latent_scores(g: Lowering, fitted: Any, x: Value) -> Value:
    return _rotated(g, fitted, x, fitted.x_rotations_)


@rule("transform", PLSSVD)
def _singular_scores(g: Lowering, fitted: PLSSVD, x: Value) -> Value:
    return _rotated(g, fitted, x, fitted.x_weights_)


def _rotated(g: Lowering, fitted: Any, x: Value, rotations: Wide) -> Value:
    """``(x - mean) / std @ rotations``."""
    return g.matmul(g.div(g.sub(x, fitted._x_mean), fitted._x_std), rotations)  # noqa: SLF001 (no public names)


@rule("predict", IsotonicRegression)
def _isotonic(g: Lowering, fitted: IsotonicRegression, x: Value) -> Value:
    if fitted.out_of_bounds == "raise":
        raise g.refuse(
            fitted, "raises for values outside of its training range", "set out_of_bounds='clip' or 'nan'"
        )
    at, to = fitted.X_thresholds_, fitted.y_thresholds_
    if at.dtype != np.float64:
        raise g.refuse(fitted, f"was fitted on {at.dtype} values", "fit it on float64 values")
    if x.width != 1:
        raise g.refuse(fitted, f"takes one column, not {x.width}", "select one before it")
    if len(to) == 1:
        return g.add(g.mul(x, 0.0), to)
    if fitted.out_of_bounds == "clip":
        return interpolate(g, clipped(g, x, fitted.X_min_, fitted.X_max_), at, to)
    outside = g.binary("Or", g.binary("Less", x, at[0]), g.binary("Greater", x, at[-1]))
    return g.where(outside, np.nan, interpolate(g, x, at, to))


def interpolate(g: Lowering, x: Value, at: Wide, to: Wide) -> Value:
    """``numpy.interp(x, at, to)`` for a column (n, 1) within ``at`` (S,), S > 1, increasing; in numpy's own order."""
    passed = g.reduce("Sum", g.cast(g.binary("GreaterOrEqual", x, at[None]), "int64"))
    index = g.sub(g.vector(passed), 1)
    slopes = np.append(np.diff(to) / np.diff(at), 0.0)  # 0 at the last point, whose value is taken as it is
    index = g.where(g.binary("Less", index, 0), 0, index)
    slope, start, base = (g.column(g.take(table, index)) for table in (slopes, at, to))
    return g.add(g.mul(slope, g.sub(x, start)), base)
