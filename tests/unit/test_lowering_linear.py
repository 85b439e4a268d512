"""Linear models as graphs: every class of them, with its options, on ordinary and on hostile rows."""

import warnings

import numpy as np
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.cross_decomposition import CCA, PLSSVD, PLSCanonical, PLSRegression
from sklearn.datasets import load_diabetes, load_iris
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import (
    GammaRegressor,
    LassoLars,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    MultiTaskElasticNetCV,
    MultiTaskLasso,
    OrthogonalMatchingPursuitCV,
    PassiveAggressiveClassifier,
    PassiveAggressiveRegressor,
    Perceptron,
    PoissonRegressor,
    RANSACRegressor,
    Ridge,
    RidgeClassifier,
    RidgeClassifierCV,
    SGDClassifier,
    SGDOneClassSVM,
    SGDRegressor,
    TweedieRegressor,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import LinearSVC

from converters.lowering.graph import Lowering
from converters.lowering.rules import RULES
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

pytestmark = pytest.mark.sampled(2)

IRIS, SPECIES = load_iris(return_X_y=True)
DIABETES, PROGRESS = (part[:120] for part in load_diabetes(return_X_y=True))
TARGETS = np.stack([PROGRESS, np.sqrt(PROGRESS[::-1])], axis=1)
LABELS = {
    "text": (IRIS[50:], np.array(["a", "b"])[SPECIES[50:] - 1]),
    "numbers": (IRIS, np.array([-3, 0, 7])[SPECIES]),
    "truth": (IRIS, SPECIES == 1),
}


def hostile(rows, largest=1e12):
    """The rows, multiples of them, zeros, and single columns at the ends of what is asked, all float32 values."""
    rng = np.random.default_rng(0)
    picked = rows[rng.integers(len(rows), size=30)] * rng.normal(0, 100, (30, 1))
    width = rows.shape[1]
    ends = [
        np.zeros((1, width)),
        np.full((1, width), 1e-40),
        np.eye(width) * largest,
        np.eye(width) * -largest,
    ]
    return np.concatenate([rows, picked, *ends]).astype(np.float32).astype(np.float64)


def fitted(estimator, X, y):
    with warnings.catch_warnings():  # few iterations are enough here, and some classes are deprecated
        warnings.simplefilter("ignore")
        return estimator.fit(X, y)


@pytest.mark.filterwarnings("ignore:Class PassiveAggressive:FutureWarning")
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LinearSVC, {}),
        (LinearSVC, {"multi_class": "crammer_singer"}),
        (LogisticRegression, {}),
        (LogisticRegression, {"C": 1e6, "fit_intercept": False}),
        (LogisticRegressionCV, {"cv": 2, "Cs": 2}),
        (PassiveAggressiveClassifier, {}),
        (Perceptron, {}),
        (RidgeClassifier, {}),
        (RidgeClassifierCV, {}),
        *[(SGDClassifier, {"loss": loss}) for loss in ("hinge", "log_loss", "modified_huber", "huber")],
    ],
)
def test_classifiers(kind, options, labels):
    X, y = LABELS[labels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator = kind(**options)
        lowered.assert_equal(fitted(make_pipeline(StandardScaler(), estimator), X, y), hostile(X))


def test_ridge_of_several_labels():
    several = np.stack([SPECIES == 0, SPECIES > 0, IRIS[:, 0] > 5.5], axis=1).astype(int)
    model = fitted(make_pipeline(StandardScaler(), RidgeClassifier()), IRIS, several)
    found = lowered.assert_equal(model, hostile(IRIS))
    assert np.array_equal(found.labels, model.predict(hostile(IRIS)))


def test_one_column():
    model = fitted(LogisticRegression(), IRIS[50:, 2:3], SPECIES[50:])
    lowered.assert_equal(model, hostile(IRIS[:, 2:3]))


def test_one_against_the_rest_where_all_underflow():
    """The logistic function of -500 is a very small number, of -800 it is 0: those share, these are uniform."""
    model = SGDClassifier(loss="log_loss").fit(IRIS, SPECIES)
    model.coef_, model.intercept_ = -np.eye(3, 4), np.zeros(3)
    rows = np.array([[500.0, 501, 502, 0], [800, 801, 802, 0], [600, 800, 800, 0], [40, 41, 45, 0]])
    found = lowered.assert_equal(model, rows)
    assert found.scores[0, 0] == pytest.approx(1 / (1 + np.exp(-1) + np.exp(-2)), rel=1e-6)
    assert np.array_equal(found.scores[1], np.full(3, 1 / 3, np.float32))


def test_no_probabilities_without_such_a_loss():
    g = Lowering(width=4, dtype="float32", rules=RULES)
    with pytest.raises(UnsupportedPipeline, match="loss 'hinge'"):
        g.call(SGDClassifier().fit(IRIS, SPECIES), "predict_proba", g.start())


@pytest.mark.parametrize("kind", [LogisticRegression, SGDClassifier, SGDRegressor])
def test_sparse_coefficients_are_refused_with_the_remedy(kind):
    model = fitted(kind(), IRIS, SPECIES > 0).sparsify()
    with pytest.raises(UnsupportedPipeline, match="densify"):
        lowered.run(model, IRIS)
    lowered.assert_equal(model.densify(), hostile(IRIS))


@pytest.mark.parametrize(
    "estimator",
    [
        LassoLars(alpha=0.1),
        OrthogonalMatchingPursuitCV(cv=2),
        PLSRegression(n_components=3),
        PLSRegression(n_components=2, scale=False),
        RANSACRegressor(random_state=0),
        TweedieRegressor(power=0),
        TweedieRegressor(power=1.5, link="identity"),
    ],
)
@pytest.mark.parametrize("scaler", [StandardScaler, MinMaxScaler])
def test_regressors_of_one_target(estimator, scaler):
    model = fitted(make_pipeline(scaler(), estimator), DIABETES, PROGRESS)
    lowered.assert_equal(model, hostile(DIABETES))


@pytest.mark.parametrize(
    "estimator",
    [GammaRegressor(), PoissonRegressor(), TweedieRegressor(power=1.5), TweedieRegressor(power=2)],
)
def test_generalised_linear_models(estimator):
    model = fitted(make_pipeline(StandardScaler(), estimator), DIABETES, PROGRESS)
    assert float(model.predict(DIABETES).min()) > 0
    lowered.assert_equal(model, hostile(DIABETES, largest=1.0))


@pytest.mark.filterwarnings("ignore:Class PassiveAggressive:FutureWarning")
def test_passive_aggressive_regressor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_pipeline(StandardScaler(), PassiveAggressiveRegressor()).fit(DIABETES, PROGRESS)
        lowered.assert_equal(model, hostile(DIABETES))


@pytest.mark.parametrize(
    "estimator",
    [
        CCA(n_components=2),
        MultiTaskElasticNetCV(cv=2, alphas=3),
        MultiTaskLasso(),
        PLSCanonical(n_components=2),
        PLSRegression(n_components=2),
        RANSACRegressor(LinearRegression(), random_state=0),
        RANSACRegressor(Ridge(), min_samples=30, random_state=0),
    ],
)
def test_regressors_of_two_targets(estimator):
    model = fitted(make_pipeline(StandardScaler(), estimator), DIABETES, TARGETS)
    found = lowered.assert_equal(model, hostile(DIABETES))
    assert found.scores.shape[1] == 2


@pytest.mark.parametrize("kind", [CCA, PLSCanonical, PLSRegression, PLSSVD])
def test_latent_scores(kind):
    model = kind(n_components=2).fit(DIABETES, TARGETS)
    rows = hostile(DIABETES, largest=1e3)
    np.testing.assert_allclose(lowered.transform(model, rows), model.transform(rows), rtol=1e-9, atol=1e-9)


def test_outliers_by_descent():
    lowered.assert_equal(fitted(make_pipeline(StandardScaler(), SGDOneClassSVM()), IRIS, None), hostile(IRIS))


class _Column:
    """Stands for a transformer, so that its harness runs a regressor of one column."""


def isotonic(monkeypatch, model, values):
    monkeypatch.setitem(RULES, (_Column, "transform"), lambda g, _, x: g.call(model, "predict", x))
    return lowered.transform(_Column(), values, dtype="float64")[:, 0]


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("bounds", ["clip", "nan"])
def test_isotonic_is_exact_at_and_beside_every_threshold(monkeypatch, bounds, increasing):
    rng = np.random.default_rng(2)
    x = np.round(rng.normal(size=80), 2)
    y = (x if increasing else -x) + rng.normal(0, 0.4, 80)
    model = IsotonicRegression(out_of_bounds=bounds, increasing=increasing).fit(x, y)
    at = model.X_thresholds_
    rows = np.concatenate(
        [at, np.nextafter(at, np.inf), np.nextafter(at, -np.inf), [-1e300, 1e300, 0.0], rng.normal(size=99)]
    )
    assert np.array_equal(isotonic(monkeypatch, model, rows[:, None]), model.predict(rows), equal_nan=True)


def test_isotonic_of_one_value_and_one_that_raises(monkeypatch):
    constant = IsotonicRegression(out_of_bounds="clip").fit([1.0, 1.0], [3.0, 4.0])
    assert isotonic(monkeypatch, constant, np.array([[0.0], [9.0]])).tolist() == [3.5, 3.5]
    strict = IsotonicRegression(out_of_bounds="raise").fit([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(UnsupportedPipeline, match="out_of_bounds='clip'"):
        isotonic(monkeypatch, strict, np.zeros((1, 1)))


def test_a_column_that_no_weight_uses_may_hold_anything():
    chosen = ColumnTransformer([("some", StandardScaler(), [0, 2])]).fit(IRIS)
    model = make_pipeline(chosen, LogisticRegression()).fit(IRIS, SPECIES)
    for value in (np.nan, np.inf):
        rows = IRIS.copy()
        rows[::2, 1], rows[::3, 3] = value, -value
        assert np.isfinite(lowered.run(model, rows).scores).all()
        assert (lowered.run(model, rows).scores == lowered.run(model, IRIS).scores).all()
