"""Linear projections: one matrix product in the order of scikit-learn's own formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import linalg
from sklearn.cluster import FeatureAgglomeration
from sklearn.decomposition import (
    PCA,
    FactorAnalysis,
    FastICA,
    IncrementalPCA,
    MiniBatchSparsePCA,
    SparsePCA,
    TruncatedSVD,
)
from sklearn.linear_model import ridge_regression
from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection

from converters.lowering.functions import numbers_only
from converters.lowering.graph import Lowering, Value
from converters.lowering.rules import rule


@rule("transform", PCA, IncrementalPCA)
def _pca(g: Lowering, fitted: Any, x: Value) -> Value:
    made = _product(g, fitted, x, fitted.components_.T)
    made = g.sub(made, fitted.mean_.reshape(1, -1) @ fitted.components_.T)
    if not fitted.whiten:
        return made
    scale = np.sqrt(fitted.explained_variance_)
    return g.div(made, np.maximum(scale, np.finfo(scale.dtype).eps))


@rule("transform", TruncatedSVD, GaussianRandomProjection, SparseRandomProjection)
def _plain(g: Lowering, fitted: Any, x: Value) -> Value:
    components = fitted.components_
    dense = components if isinstance(components, np.ndarray) else components.toarray()
    return _product(g, fitted, x, dense.T)


@rule("transform", FastICA)
def _ica(g: Lowering, fitted: FastICA, x: Value) -> Value:
    return _product(g, fitted, g.sub(x, fitted.mean_) if fitted.whiten else x, fitted.components_.T)


@rule("transform", FactorAnalysis)
def _factors(g: Lowering, fitted: FactorAnalysis, x: Value) -> Value:
    weighted = fitted.components_ / fitted.noise_variance_
    covariance = linalg.inv(np.eye(len(weighted)) + np.dot(weighted, fitted.components_.T))
    return g.matmul(_product(g, fitted, g.sub(x, fitted.mean_), weighted.T), covariance)


@rule("transform", SparsePCA, MiniBatchSparsePCA)
def _sparse(g: Lowering, fitted: Any, x: Value) -> Value:
    """A ridge regression on the components is linear in its target, so the unit rows say it all."""
    unit = np.eye(fitted.components_.shape[1])
    codes = ridge_regression(fitted.components_.T, unit, fitted.ridge_alpha, solver="cholesky")
    return _product(g, fitted, g.sub(x, fitted.mean_), codes)


@rule("transform", FeatureAgglomeration)
def _pooled(g: Lowering, fitted: FeatureAgglomeration, x: Value) -> Value:
    groups = np.unique(fitted.labels_)
    if fitted.pooling_func is np.mean:
        membership = (fitted.labels_[:, None] == groups).astype(np.float64)
        return g.div(_product(g, fitted, x, membership), membership.sum(axis=0))
    numbers_only(g, fitted, x)
    for function, kind in ((np.max, "Max"), (np.min, "Min"), (np.sum, "Sum")):
        if fitted.pooling_func is function:
            members = [np.flatnonzero(fitted.labels_ == group) for group in groups]
            return g.concat([g.reduce(kind, g.select(x, columns)) for columns in members])
    raise g.refuse(
        fitted,
        "pools with a function that cannot be converted",
        "use numpy.mean, sum, min or max as pooling_func",
    )


def _product(g: Lowering, fitted: Any, x: Value, weights: Any) -> Value:
    numbers_only(g, fitted, x)
    if not np.isfinite(weights).all():
        raise g.refuse(fitted, "has components that are not finite", "drop constant columns and fit again")
    return g.matmul(x, weights)
