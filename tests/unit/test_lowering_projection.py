"""Projections, pooling and feature selection."""

import numpy as np
import pytest
from sklearn.cluster import FeatureAgglomeration
from sklearn.datasets import load_wine
from sklearn.decomposition import (
    NMF,
    PCA,
    FactorAnalysis,
    FastICA,
    IncrementalPCA,
    MiniBatchSparsePCA,
    SparsePCA,
    TruncatedSVD,
)
from sklearn.feature_selection import (
    RFE,
    RFECV,
    GenericUnivariateSelect,
    SelectFdr,
    SelectFpr,
    SelectFromModel,
    SelectFwe,
    SelectKBest,
    SelectPercentile,
    SequentialFeatureSelector,
    VarianceThreshold,
)
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection

from converters.lowering.graph import Lowering
from converters.lowering.rules import RULES
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered, transformed

X, Y = load_wine(return_X_y=True)
X = StandardScaler().fit_transform(X)
ROWS = transformed.hostile(X)


@pytest.mark.parametrize(
    "projection",
    [
        PCA(3),
        PCA(0.9),
        PCA(whiten=True),
        IncrementalPCA(3, whiten=True),
        TruncatedSVD(3),
        FastICA(3, random_state=0),
        FastICA(whiten=False, max_iter=2000, random_state=0),
        FactorAnalysis(3),
        SparsePCA(3, max_iter=20, random_state=0),
        MiniBatchSparsePCA(3, alpha=5, max_iter=20, ridge_alpha=0.0, random_state=0),
        GaussianRandomProjection(4, random_state=0),
        SparseRandomProjection(4, random_state=0),
        SparseRandomProjection(4, dense_output=True, density=1.0, random_state=0),
        FeatureAgglomeration(3),
        FeatureAgglomeration(3, pooling_func=np.max),
        FeatureAgglomeration(3, pooling_func=np.min),
    ],
    ids=lowered.named,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning", "ignore:Ill-conditioned")
def test_projections(projection):
    scale = np.abs(ROWS).max(axis=1, keepdims=True)
    projection.fit(X)
    expected = transformed.wanted(projection, ROWS)
    found = lowered.transform(projection, ROWS)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= 1e-12 * (1 + scale)).all()


def test_components_fitted_in_float32():
    fitted = PCA(5, whiten=True).fit(X.astype(np.float32))
    assert fitted.components_.dtype == np.float32
    transformed.assert_same(fitted, X, rtol=1e-9, atol=1e-12)


def test_a_component_without_variance_is_whitened_as_scikit_learn_clips_it():
    flat = np.column_stack([X[:, 0], X[:, 0], X[:, 0]])
    fitted = PCA(whiten=True, svd_solver="covariance_eigh").fit(flat)
    fitted.explained_variance_[-1] = 0.0
    assert np.isfinite(lowered.transform(fitted, flat)).all()
    np.testing.assert_allclose(lowered.transform(fitted, flat)[:, 0], transformed.wanted(fitted, flat)[:, 0])


def test_pooling_with_any_other_function_is_refused():
    fitted = FeatureAgglomeration(3, pooling_func=np.median).fit(X)
    with pytest.raises(UnsupportedPipeline, match="pooling_func"):
        lowered.transform(fitted, X)


def test_an_iterative_decomposition_has_no_rule():
    assert (NMF, "transform") not in RULES


SELECTORS = [
    VarianceThreshold(0.5),
    SelectKBest(k=4),
    SelectPercentile(percentile=30),
    SelectFpr(alpha=1e-20),
    SelectFdr(alpha=1e-20),
    SelectFwe(alpha=1e-20),
    GenericUnivariateSelect(mode="k_best", param=3),
    RFE(LogisticRegression(), n_features_to_select=3),
    RFECV(LogisticRegression(), step=4, cv=2),
    SelectFromModel(LogisticRegression()),
    SequentialFeatureSelector(LinearRegression(), n_features_to_select=2, cv=2),
]


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: type(s).__name__)
def test_selection_keeps_columns_and_their_fold(selector):
    data = X * np.linspace(0.5, 2, 13)
    selector.fit(data, Y)
    kept = np.flatnonzero(selector.get_support())
    assert 0 < len(kept) < 13
    transformed.assert_same(selector, transformed.hostile(data))
    g = Lowering(width=13, dtype="float32", rules=RULES)
    fold = g.call(selector, "transform", g.start()).fold
    assert fold is not None
    assert fold.sources.tolist() == kept.tolist()


def test_selection_lets_nan_pass():
    transformed.assert_same(VarianceThreshold().fit(transformed.holes(X)), transformed.holes(X))


@pytest.mark.filterwarnings("ignore:No features were selected")
def test_nothing_selected_is_refused():
    selector = SelectFromModel(LogisticRegression(), threshold=1e9).fit(X, Y)
    with pytest.raises(UnsupportedPipeline, match="keeps no column"):
        lowered.transform(selector, X)


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (RFE(LogisticRegression(), n_features_to_select=4), np.array(["a", "b", "c"])[Y]),
        (RFE(LogisticRegression(), n_features_to_select=2), Y == 1),
        (RFECV(LinearRegression(), step=4, cv=2), X[:, 0] + X[:, 1]),
    ],
    ids=["classes", "two classes", "regression"],
)
def test_elimination_as_the_predictor(model, target):
    lowered.assert_equal(make_pipeline(StandardScaler(), model).fit(X, target), X)
