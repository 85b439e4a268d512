"""Kernel machines: the value of a kernel between a row and each stored training row, then a weighted sum.

Distances are sums of squared differences, as libsvm computes them: the expansion |x|² - 2xy + |y|² cancels where
columns carry an offset. A linear kernel needs no training rows; its weights are multiplied out.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from scipy.sparse import issparse
from sklearn.decomposition import KernelPCA
from sklearn.kernel_approximation import (
    AdditiveChi2Sampler,
    Nystroem,
    RBFSampler,
    SkewedChi2Sampler,
)
from sklearn.kernel_ridge import KernelRidge
from sklearn.svm import SVC, SVR, NuSVC, NuSVR, OneClassSVM

from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.linear import affine
from converters.lowering.rules import rule

_MACHINES: Final = (SVC, NuSVC)
_REGRESSORS: Final = (SVR, NuSVR)


def carries(g: Lowering, fitted: Any, rows: Any) -> None:
    """Says that the graph holds training rows."""
    g.note(f"carries {len(rows)} training rows ({type(fitted).__name__})")


def differences(g: Lowering, x: Value, rows: Wide) -> Value:
    """(n, S, F): each row less each of ``rows`` (S, F)."""
    return g.sub(g.reshape(x, (-1, 1, x.width)), rows[None])


def squared_distances(g: Lowering, x: Value, rows: Wide) -> Value:
    """(n, S): the sum of squared differences to each of ``rows`` (S, F)."""
    return g.reduce("SumSquare", differences(g, x, rows), axis=2, keepdims=False)


def kernel(
    g: Lowering,
    fitted: Any,
    x: Value,
    rows: Any,
    *,
    kind: Any,
    gamma: float | None = None,
    coef0: float = 1.0,
    degree: float = 3.0,
) -> Value:
    """(n, S): a kernel of `sklearn.metrics.pairwise` between ``x`` and ``rows`` (S, F); ``gamma`` None is 1/F.

    Raises `UnsupportedPipeline` for precomputed and callable kernels, sparse rows, and kernels for counts only.
    """
    if issparse(rows):
        raise g.refuse(fitted, "was fitted on sparse rows", "fit it on a dense array")
    base = np.asarray(rows, np.float64)
    scale = 1.0 / x.width if gamma is None else float(gamma)
    if kind == "rbf":
        return g.unary("Exp", g.mul(squared_distances(g, x, base), -scale))
    if kind == "laplacian":
        apart = g.reduce("Sum", g.unary("Abs", differences(g, x, base)), axis=2, keepdims=False)
        return g.unary("Exp", g.mul(apart, -scale))
    if kind == "cosine":
        lengths = np.sqrt(np.einsum("ij,ij->i", base, base))[:, None]
        return g.matmul(_unit(g, x), (base / np.where(lengths == 0, 1.0, lengths)).T)
    products = g.matmul(x, base.T)
    if kind == "linear":
        return products
    # One factor per row: a lone one would be fused into the product as a float32 where a runtime optimises.
    shifted = g.add(g.mul(products, np.full(len(base), scale)), float(coef0))
    if kind in ("poly", "polynomial"):
        return g.binary("Pow", shifted, float(degree))
    if kind == "sigmoid":
        return g.unary("Tanh", shifted)
    name = "a function of its own" if callable(kind) else repr(kind)
    raise g.refuse(fitted, f"has {name} as its kernel", "use kernel='rbf', 'poly', 'sigmoid' or 'linear'")


def _unit(g: Lowering, x: Value) -> Value:
    length = g.unary("Sqrt", g.reduce("SumSquare", x))
    return g.div(x, g.where(g.binary("Equal", length, 0.0), 1.0, length))


# --- libsvm ----------------------------------------------------------------------------------------------------


def decisions(g: Lowering, fitted: Any, x: Value) -> Value:
    """(n, P): libsvm's own decision values, one per pair of classes i < j (above 0 means i), or one.

    Private attributes: they are what libsvm is given; the public ones flip their sign for two classes.
    """
    made: Value = g.memo((id(fitted), "libsvm", x.name), lambda: _libsvm(g, fitted, x), fitted)
    return made


def _libsvm(g: Lowering, fitted: Any, x: Value) -> Value:
    if fitted._sparse:  # noqa: SLF001
        raise g.refuse(fitted, "was fitted on sparse rows", "fit it on a dense array")
    weights, bias = _pair_weights(fitted), np.asarray(fitted._intercept_, np.float64)
    vectors = np.asarray(fitted.support_vectors_, np.float64)
    if callable(fitted.kernel) or fitted.kernel == "precomputed":
        raise g.refuse(fitted, "has a kernel that is not built in", "use kernel='rbf', 'poly' or 'linear'")
    if fitted.kernel == "linear" or not len(vectors):
        return affine(g, fitted, x, (vectors.T @ weights).T.reshape(-1, x.width), bias)
    carries(g, fitted, vectors)
    values = kernel(
        g,
        fitted,
        x,
        vectors,
        kind=fitted.kernel,
        gamma=fitted._gamma,  # noqa: SLF001
        coef0=fitted.coef0,
        degree=fitted.degree,
    )
    return g.matmul(values, weights, bias)


def _pair_weights(fitted: Any) -> Wide:
    """(S, P): the weight of each support vector in each decision value; see the layout in libsvm's FAQ."""
    dual = np.asarray(fitted._dual_coef_, np.float64)
    if len(dual) == 1:
        return dual.T
    ends = np.cumsum(fitted._n_support)  # noqa: SLF001
    spans = [slice(end - size, end) for end, size in zip(ends, fitted._n_support, strict=True)]  # noqa: SLF001
    columns = []
    for i, j in _pairs(len(spans)):
        column = np.zeros(dual.shape[1])
        column[spans[i]] = dual[j - 1, spans[i]]
        column[spans[j]] = dual[i, spans[j]]
        columns.append(column)
    return np.stack(columns, axis=1)


def _pairs(classes: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(classes) for j in range(i + 1, classes)]


def _incidence(classes: int) -> tuple[Wide, Wide]:
    """(P, C) twice: 1 where the pair's first, or second, class is the column's."""
    eye, pairs = np.eye(classes), np.array(_pairs(classes))
    return eye[pairs[:, 0]], eye[pairs[:, 1]]


@rule("predict", *_REGRESSORS)
def _support_regression(g: Lowering, fitted: Any, x: Value) -> Value:
    return decisions(g, fitted, x)


@rule("decision_function", OneClassSVM)
def _one_class_decision(g: Lowering, fitted: OneClassSVM, x: Value) -> Value:
    return decisions(g, fitted, x)


@rule("score_samples", OneClassSVM)
def _one_class_samples(g: Lowering, fitted: OneClassSVM, x: Value) -> Value:
    return g.add(decisions(g, fitted, x), np.asarray(fitted.offset_))


@rule("predict", OneClassSVM)
def _one_class_label(g: Lowering, fitted: OneClassSVM, x: Value) -> Value:
    return g.cast(g.vector(g.binary("Greater", decisions(g, fitted, x), 0.0)), "int64")


@rule("decision_function", *_MACHINES)
def _support_decision(g: Lowering, fitted: Any, x: Value) -> Value:
    values, classes = decisions(g, fitted, x), len(fitted.classes_)
    if classes == 2:
        return g.unary("Neg", values)
    if fitted.decision_function_shape == "ovo":
        return values
    first, second = _incidence(classes)
    behind = g.cast(g.binary("Less", values, 0.0), "float64")
    votes = g.matmul(behind, second - first, first.sum(axis=0))
    confidence = g.matmul(values, first - second)
    bounded = g.div(confidence, g.mul(g.add(g.unary("Abs", confidence), 1.0), 3.0))
    return g.add(votes, bounded)


@rule("predict", *_MACHINES)
def _support_label(g: Lowering, fitted: Any, x: Value) -> Value:
    classes = len(fitted.classes_)
    if fitted.break_ties and fitted.decision_function_shape == "ovo":
        raise g.refuse(fitted, "cannot break ties between pairs", "set decision_function_shape='ovr'")
    if fitted.break_ties and classes > 2:
        return g.argmax(g.call(fitted, "decision_function", x))
    ahead = g.binary("Greater", decisions(g, fitted, x), 0.0)
    if classes == 2:
        return g.cast(g.vector(g.unary("Not", ahead)), "int64")
    first, second = _incidence(classes)
    return g.argmax(g.matmul(g.cast(ahead, "float64"), first - second, second.sum(axis=0)))


# --- the others ------------------------------------------------------------------------------------------------


@rule("predict", KernelRidge)
def _kernel_ridge(g: Lowering, fitted: KernelRidge, x: Value) -> Value:
    dual = np.asarray(fitted.dual_coef_).reshape(len(fitted.dual_coef_), -1)
    if fitted.kernel == "linear" and not issparse(fitted.X_fit_):
        return affine(g, fitted, x, dual.T @ fitted.X_fit_, np.zeros(dual.shape[1]))
    carries(g, fitted, dual)
    values = kernel(
        g,
        fitted,
        x,
        fitted.X_fit_,
        kind=fitted.kernel,
        gamma=fitted.gamma,
        coef0=fitted.coef0,
        degree=fitted.degree,
    )
    return g.matmul(values, dual)


@rule("transform", KernelPCA)
def _kernel_components(g: Lowering, fitted: KernelPCA, x: Value) -> Value:
    carries(g, fitted, fitted.eigenvectors_)
    values = kernel(
        g,
        fitted,
        x,
        fitted.X_fit_,
        kind=fitted.kernel,
        gamma=fitted.gamma_,
        coef0=fitted.coef0,
        degree=fitted.degree,
    )
    centre = fitted._centerer  # noqa: SLF001 (transform's own)
    means = g.div(g.reduce("Sum", values), float(len(centre.K_fit_rows_)))
    centred = g.add(g.sub(g.sub(values, centre.K_fit_rows_), means), float(centre.K_fit_all_))
    used = np.flatnonzero(fitted.eigenvalues_)
    scaled = np.zeros_like(fitted.eigenvectors_)
    scaled[:, used] = fitted.eigenvectors_[:, used] / np.sqrt(fitted.eigenvalues_[used])
    return g.matmul(centred, scaled)


@rule("transform", Nystroem)
def _nystroem(g: Lowering, fitted: Nystroem, x: Value) -> Value:
    carries(g, fitted, fitted.normalization_)
    if callable(fitted.kernel) or fitted.kernel == "precomputed":
        raise g.refuse(fitted, "has a kernel that is not built in", "use kernel='rbf', 'poly' or 'cosine'")
    options = fitted._get_kernel_params()  # noqa: SLF001 (transform's own)
    return g.matmul(
        kernel(g, fitted, x, fitted.components_, kind=fitted.kernel, **options), fitted.normalization_.T
    )


@rule("transform", RBFSampler)
def _random_features(g: Lowering, fitted: RBFSampler, x: Value) -> Value:
    angles = g.add(g.matmul(x, fitted.random_weights_), fitted.random_offset_)
    return g.mul(g.unary("Cos", angles), (2.0 / fitted.n_components) ** 0.5)


@rule("transform", SkewedChi2Sampler)
def _skewed_features(g: Lowering, fitted: SkewedChi2Sampler, x: Value) -> Value:
    """Rows that scikit-learn refuses, with a value at or below -skewedness, give NaN."""
    taken = g.binary("Greater", x, -float(fitted.skewedness))
    logs = g.unary("Log", g.where(taken, g.add(x, float(fitted.skewedness)), np.nan))
    angles = g.add(g.matmul(logs, fitted.random_weights_), fitted.random_offset_)
    return g.mul(g.unary("Cos", angles), float(np.sqrt(2.0) / np.sqrt(fitted.n_components)))


@rule("transform", AdditiveChi2Sampler)
def _additive_features(g: Lowering, fitted: AdditiveChi2Sampler, x: Value) -> Value:
    """Rows that scikit-learn refuses, with a value below 0, give NaN."""
    steps, interval = fitted.sample_steps, fitted.sample_interval
    if interval is None:
        known = {1: 0.8, 2: 0.5, 3: 0.4}
        if steps not in known:
            raise g.refuse(fitted, f"has sample_steps={steps} without an interval", "set sample_interval")
        interval = known[steps]
    zero = g.binary("Equal", x, 0.0)
    safe = g.where(zero, 1.0, x)
    blocks = [g.unary("Sqrt", g.mul(safe, interval))]
    logs, doubled = g.mul(g.unary("Log", safe), interval), g.mul(g.mul(safe, 2.0), interval)
    for j in range(1, steps):
        factor = g.unary("Sqrt", g.div(doubled, float(np.cosh(np.pi * j * interval))))
        angles = g.mul(logs, float(j))
        blocks += [g.mul(factor, g.unary("Cos", angles)), g.mul(factor, g.unary("Sin", angles))]
    return g.concat([g.where(zero, 0.0, block) for block in blocks])
