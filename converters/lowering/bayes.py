"""Densities and constants: each class or component has a log density, and the largest one wins.

scikit-learn subtracts the logarithm of the sum from each log density and takes the exponential. A softmax would not do:
where log densities are near 1e17, as for rows far away, that logarithm is lost in the sum and the answers differ.
"""

# ruff: noqa: SLF001 - what a fitted estimator learned is partly private to it
from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import digamma
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.naive_bayes import BernoulliNB, CategoricalNB, ComplementNB, GaussianNB, MultinomialNB

from converters.lowering.folding import note_edges
from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.linear import affine, sign_index, two_sided
from converters.lowering.rules import rule

_BAYES = (GaussianNB, MultinomialNB, ComplementNB, BernoulliNB, CategoricalNB)
_MIXTURES = (GaussianMixture, BayesianGaussianMixture)
_DENSITIES = (*_BAYES, *_MIXTURES)


def normalised(g: Lowering, log_density: Value) -> Value:
    """exp(l - logsumexp(l)) along the rows of (n, C), in the order of naive Bayes and mixtures."""
    largest = g.reduce("Max", log_density)
    total = g.reduce("Sum", g.unary("Exp", g.sub(log_density, largest)))
    return g.unary("Exp", g.sub(log_density, g.add(g.unary("Log", total), largest)))


def discriminant_probabilities(g: Lowering, scores: Value) -> Value:
    """The same quotient in the order of `DiscriminantAnalysisPredictionMixin`: the largest is subtracted first."""
    shifted = g.sub(scores, g.reduce("Max", scores))
    total = g.reduce("Sum", g.unary("Exp", shifted))
    return g.unary("Exp", g.sub(shifted, g.unary("Log", total)))


def one_sided(g: Lowering, scores: Value) -> Value:
    """(n, C) scores as ``decision_function`` gives them: the difference (n, 1) where there are two."""
    if scores.width != 2:
        return scores
    return g.sub(g.select(scores, [1]), g.select(scores, [0]))


def constant_rows(g: Lowering, x: Value, table: Any) -> Value:
    """The one row of ``table`` (1, W), or its one element (1,), for each row of ``x``."""
    size = g.node("Gather", [g.node("Shape", [x], (2,), "int64"), np.array([0])], (1,), "int64")
    return g.take(table, g.node("Expand", [np.array([0]), size], (None,), "int64"))


def _finite(g: Lowering, fitted: Any, *parameters: Any) -> None:
    if not all(np.isfinite(each).all() for each in parameters):
        raise g.refuse(fitted, "has probabilities of zero", "fit with alpha > 0 and with priors above zero")


# --- naive Bayes and mixtures -------------------------------------------------------------------------------------


@rule("predict", *_DENSITIES)
def _label(g: Lowering, fitted: Any, x: Value) -> Value:
    return g.argmax(g.call(fitted, "log_density", x))


@rule("predict_proba", *_DENSITIES)
def _probabilities(g: Lowering, fitted: Any, x: Value) -> Value:
    return normalised(g, g.call(fitted, "log_density", x))


@rule("log_density", GaussianNB)
def _gaussian(g: Lowering, fitted: GaussianNB, x: Value) -> Value:
    with np.errstate(divide="ignore"):
        prior = np.log(fitted.class_prior_)
    if not (fitted.var_ > 0).all():
        raise g.refuse(fitted, "has a variance of zero", "fit with var_smoothing > 0")
    _finite(g, fitted, prior)
    constant = -0.5 * np.sum(np.log(2.0 * np.pi * fitted.var_), axis=1)
    apart = g.sub(g.reshape(x, (-1, 1, x.width)), fitted.theta_[None])
    total = g.reduce("Sum", g.div(g.mul(apart, apart), fitted.var_[None]), axis=2, keepdims=False)
    return g.add(g.sub(constant[None], g.mul(total, 0.5)), prior)


@rule("log_density", MultinomialNB)
def _multinomial(g: Lowering, fitted: MultinomialNB, x: Value) -> Value:
    _finite(g, fitted, fitted.feature_log_prob_, fitted.class_log_prior_)
    return g.add(g.matmul(x, fitted.feature_log_prob_.T), fitted.class_log_prior_)


@rule("log_density", ComplementNB)
def _complement(g: Lowering, fitted: ComplementNB, x: Value) -> Value:
    _finite(g, fitted, fitted.feature_log_prob_)
    made = g.matmul(x, fitted.feature_log_prob_.T)
    return g.add(made, fitted.class_log_prior_) if len(fitted.classes_) == 1 else made


@rule("log_density", BernoulliNB)
def _bernoulli(g: Lowering, fitted: BernoulliNB, x: Value) -> Value:
    with np.errstate(divide="ignore"):
        absent = np.log(1 - np.exp(fitted.feature_log_prob_))
    _finite(g, fitted, fitted.feature_log_prob_, absent, fitted.class_log_prior_)
    if fitted.binarize is not None:
        for column in range(x.width):
            note_edges(g, x, column, np.array([float(fitted.binarize)]))
        x = g.cast(g.binary("Greater", x, float(fitted.binarize)), "float64")
    made = g.matmul(x, (fitted.feature_log_prob_ - absent).T)
    return g.add(made, fitted.class_log_prior_ + absent.sum(axis=1))


@rule("log_density", CategoricalNB)
def _categorical(g: Lowering, fitted: CategoricalNB, x: Value) -> Value:
    _finite(g, fitted, *fitted.feature_log_prob_, fitted.class_log_prior_)
    g.note("a category that CategoricalNB does not know raises in scikit-learn; devices refuse the row")
    counts = np.array([table.shape[1] for table in fitted.feature_log_prob_], np.float64)
    inside = g.binary("And", g.binary("Greater", x, -1.0), g.binary("Less", x, counts))
    codes = g.cast(g.where(inside, x, 0.0), "int64")
    total: Value | None = None
    for j, table in enumerate(fitted.feature_log_prob_):
        note_edges(g, x, j, np.arange(table.shape[1], dtype=np.float64))
        code = g.vector(g.select(codes, [j]))
        part = g.where(g.select(inside, [j]), g.take(np.ascontiguousarray(table.T), code), np.nan)
        total = part if total is None else g.add(total, part)
    assert total is not None, "scikit-learn fits on at least one column"
    return g.add(total, fitted.class_log_prior_)


@rule("log_density", *_MIXTURES)
def _mixture(g: Lowering, fitted: Any, x: Value) -> Value:
    width, roots = x.width, np.asarray(fitted.precisions_cholesky_, np.float64)
    log_det = _log_det(roots, fitted.covariance_type, width)
    squares = g.add(_mahalanobis(g, x, fitted, roots), width * math.log(2 * math.pi))
    made = g.add(g.mul(squares, -0.5), log_det)
    if isinstance(fitted, BayesianGaussianMixture):
        freedom = fitted.degrees_of_freedom_
        halves = digamma(0.5 * (freedom - np.arange(0, width)[:, np.newaxis]))
        log_lambda = width * np.log(2.0) + np.sum(halves, 0)
        made = g.sub(made, 0.5 * width * np.log(freedom))
        made = g.add(made, 0.5 * (log_lambda - width / fitted.mean_precision_))
    with np.errstate(divide="ignore"):
        weights = np.asarray(fitted._estimate_log_weights(), np.float64)
    return g.add(made, weights)


def _log_det(roots: Wide, kind: str, width: int) -> Wide:
    """(K,), or (1,) for one shared matrix: the logarithm of the determinant of each Cholesky factor."""
    if kind == "full":
        return np.asarray(np.sum(np.log(np.diagonal(roots, axis1=1, axis2=2)), axis=1))
    if kind == "tied":
        return np.asarray([np.sum(np.log(np.diag(roots)))])
    return np.asarray(np.sum(np.log(roots), axis=1) if kind == "diag" else width * np.log(roots))


def _mahalanobis(g: Lowering, x: Value, fitted: Any, roots: Wide) -> Value:
    """(n, K) squared distances to each component, `sklearn.mixture._gaussian_mixture._estimate_log_gaussian_prob`."""
    means = np.asarray(fitted.means_, np.float64)
    if fitted.covariance_type in ("full", "tied"):
        each = roots if fitted.covariance_type == "full" else [roots] * len(means)
        centres = np.stack([mean @ root for mean, root in zip(means, each, strict=True)])
        moved = g.matmul(x, np.hstack(list(roots)) if fitted.covariance_type == "full" else roots)
        shape = (-1, len(means) if fitted.covariance_type == "full" else 1, x.width)
        apart = g.sub(g.reshape(moved, shape), centres[None])
        return g.reduce("Sum", g.mul(apart, apart), axis=2, keepdims=False)
    precisions = roots**2
    squares = g.mul(x, x)
    if fitted.covariance_type == "diag":
        constant = np.sum(means**2 * precisions, axis=1)
        product = g.matmul(x, (means * precisions).T)
        return g.add(g.sub(constant[None], g.mul(product, 2.0)), g.matmul(squares, precisions.T))
    constant = np.sum(means**2, axis=1) * precisions
    product = g.mul(g.matmul(x, means.T), precisions)
    return g.add(g.sub(constant[None], g.mul(product, 2.0)), g.mul(g.reduce("Sum", squares), precisions))


# --- discriminant analysis ----------------------------------------------------------------------------------------


@rule("decision_function", LinearDiscriminantAnalysis)
def _linear_decision(g: Lowering, fitted: LinearDiscriminantAnalysis, x: Value) -> Value:
    return affine(g, fitted, x, fitted.coef_, fitted.intercept_)


@rule("predict", LinearDiscriminantAnalysis)
def _linear_label(g: Lowering, fitted: LinearDiscriminantAnalysis, x: Value) -> Value:
    return sign_index(g, g.call(fitted, "decision_function", x))


@rule("predict_proba", LinearDiscriminantAnalysis)
def _linear_probabilities(g: Lowering, fitted: LinearDiscriminantAnalysis, x: Value) -> Value:
    decision = g.call(fitted, "decision_function", x)
    return g.softmax(two_sided(g, decision) if len(fitted.classes_) == 2 else decision)


@rule("transform", LinearDiscriminantAnalysis)
def _linear_transform(g: Lowering, fitted: LinearDiscriminantAnalysis, x: Value) -> Value:
    if fitted.solver == "lsqr":
        raise g.refuse(fitted, "has no transform with solver='lsqr'", "fit with solver='svd' or 'eigen'")
    centred = g.sub(x, fitted.xbar_) if fitted.solver == "svd" else x
    return g.matmul(centred, fitted.scalings_[:, : fitted._max_components])


@rule("log_density", QuadraticDiscriminantAnalysis)
def _quadratic(g: Lowering, fitted: QuadraticDiscriminantAnalysis, x: Value) -> Value:
    with np.errstate(divide="ignore"):
        prior = np.log(fitted.priors_)
    norms = []
    for mean, rotation, scaling in zip(fitted.means_, fitted.rotations_, fitted.scalings_, strict=True):
        if not (np.asarray(scaling) > 0).all():
            raise g.refuse(fitted, "has a class without spread in some direction", "fit with reg_param > 0")
        moved = g.matmul(g.sub(x, mean), rotation * scaling ** (-0.5))
        norms.append(g.reduce("Sum", g.mul(moved, moved)))
    logs = np.asarray([np.sum(np.log(each)) for each in fitted.scalings_])
    return g.add(g.mul(g.add(g.concat(norms), logs), -0.5), prior)


@rule("decision_function", QuadraticDiscriminantAnalysis)
def _quadratic_decision(g: Lowering, fitted: QuadraticDiscriminantAnalysis, x: Value) -> Value:
    return one_sided(g, g.call(fitted, "log_density", x))


@rule("predict", QuadraticDiscriminantAnalysis)
def _quadratic_label(g: Lowering, fitted: QuadraticDiscriminantAnalysis, x: Value) -> Value:
    return g.argmax(g.call(fitted, "log_density", x))


@rule("predict_proba", QuadraticDiscriminantAnalysis)
def _quadratic_probabilities(g: Lowering, fitted: QuadraticDiscriminantAnalysis, x: Value) -> Value:
    return discriminant_probabilities(g, g.call(fitted, "log_density", x))


# --- dummies ------------------------------------------------------------------------------------------------------


@rule("predict", DummyRegressor)
def _dummy_regressor(g: Lowering, fitted: DummyRegressor, x: Value) -> Value:
    return constant_rows(g, x, np.asarray(fitted.constant_, np.float64).reshape(1, -1))


@rule("predict", DummyClassifier)
def _dummy_label(g: Lowering, fitted: DummyClassifier, x: Value) -> Value:
    winners = [int(block.argmax()) for block in _dummy_blocks(g, fitted)]
    return constant_rows(g, x, np.array(winners if len(winners) == 1 else [winners], np.int64))


@rule("predict_proba", DummyClassifier)
def _dummy_probabilities(g: Lowering, fitted: DummyClassifier, x: Value) -> Value:
    return constant_rows(g, x, np.concatenate(_dummy_blocks(g, fitted))[None])


def _dummy_blocks(g: Lowering, fitted: DummyClassifier) -> list[Wide]:
    """The probabilities of each output; their first largest is what it predicts."""
    strategy = fitted._strategy
    if strategy not in ("prior", "most_frequent", "constant"):
        remedy = "use strategy='prior', 'most_frequent' or 'constant'"
        raise g.refuse(fitted, f"draws its answers at random (strategy={strategy!r})", remedy)
    single = fitted.n_outputs_ == 1
    priors = [fitted.class_prior_] if single else fitted.class_prior_
    if strategy == "prior":
        return [np.asarray(prior, np.float64) for prior in priors]
    if strategy == "most_frequent":
        return [np.eye(len(prior))[int(np.argmax(prior))] for prior in priors]
    classes = [fitted.classes_] if single else fitted.classes_
    wanted = np.asarray(fitted.constant).reshape(-1)
    return [np.asarray(known == value, np.float64) for known, value in zip(classes, wanted, strict=True)]
