"""Naive Bayes, discriminants, mixtures and dummies: the graph answers what scikit-learn answers, or refuses."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.naive_bayes import BernoulliNB, CategoricalNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

IRIS, KIND = load_iris(return_X_y=True)
WINE, VINTAGE = load_wine(return_X_y=True)
CANCER, BENIGN = (part[:200] for part in load_breast_cancer(return_X_y=True))
NAMES = np.array(["setosa", "versicolor", "virginica"])[KIND]


def hostile(rows):
    """Rows of the set, then zeros, whole numbers, denormals, far away ones and one of each sign."""
    odd = [np.zeros(rows.shape[1]), *np.round(rows[:3]), np.full(rows.shape[1], 1e-42), rows[0] * 1e4]
    far = [np.full(rows.shape[1], 1e30), np.where(np.arange(rows.shape[1]) % 2, -1e30, 1e30)]
    return np.vstack([rows[::3], odd, far])


@pytest.mark.parametrize(
    ("estimator", "rows", "labels"),
    [
        (GaussianNB(), IRIS, NAMES),
        (GaussianNB(priors=[0.2, 0.3, 0.5], var_smoothing=1e-3), WINE, VINTAGE),
        (GaussianNB(), CANCER, BENIGN),
        (MultinomialNB(), WINE, VINTAGE),
        (MultinomialNB(alpha=0.1, fit_prior=False), IRIS, NAMES),
        (ComplementNB(), WINE, VINTAGE),
        (ComplementNB(norm=True), IRIS, KIND == 1),
        (BernoulliNB(binarize=3.0), IRIS, NAMES),
        (BernoulliNB(binarize=None), (IRIS > 2).astype(float), KIND),
        (LinearDiscriminantAnalysis(), IRIS, NAMES),
        (LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"), WINE, VINTAGE),
        (LinearDiscriminantAnalysis(solver="eigen"), CANCER[:, :6], BENIGN.astype(float)),
        (QuadraticDiscriminantAnalysis(), IRIS, NAMES),
        (QuadraticDiscriminantAnalysis(reg_param=0.1, priors=[0.3, 0.7]), CANCER[:, :6], BENIGN),
        (DummyClassifier(), IRIS, KIND == 0),
        (DummyClassifier(strategy="most_frequent"), IRIS, NAMES),
        (DummyClassifier(strategy="constant", constant="virginica"), IRIS, NAMES),
        (DummyClassifier(), IRIS, np.column_stack([KIND, NAMES == "setosa"]).astype(int)),
    ],
    ids=repr,
)
def test_classifier(estimator, rows, labels):
    lowered.assert_equal(estimator.fit(rows, labels), hostile(rows))


@pytest.mark.parametrize(
    "estimator", [GaussianNB(), LinearDiscriminantAnalysis(), QuadraticDiscriminantAnalysis()]
)
def test_behind_a_scaler(estimator):
    lowered.assert_equal(make_pipeline(StandardScaler(), estimator).fit(IRIS, NAMES), hostile(IRIS))


def test_one_class_only():
    rows = np.abs(IRIS)
    for estimator in (GaussianNB(), MultinomialNB(), ComplementNB(), BernoulliNB()):
        lowered.assert_equal(estimator.fit(rows, np.zeros(len(rows), int)), rows[:20])


def test_bernoulli_at_its_edge():
    model = make_pipeline(MinMaxScaler(), BernoulliNB(binarize=0.5)).fit(IRIS, KIND)
    found = lowered.run(model, IRIS)
    assert {column for column, _ in found.lowering.edges} == {0, 1, 2, 3}
    for column, values in found.lowering.edges:
        rows = np.repeat(IRIS[:1], 3, axis=0).astype(np.float32)
        rows[:, column] = [values[0], np.nextafter(values[0], -np.inf), np.nextafter(values[0], np.inf)]
        lowered.assert_equal(model, rows)
        assert len(np.unique(model.predict_proba(rows.astype(float)), axis=0)) == 2


def test_categories():
    codes = np.floor(IRIS)
    model = CategoricalNB().fit(codes, NAMES)
    lowered.assert_equal(model, codes)
    lowered.assert_equal(model, codes + 0.9)  # cut to whole numbers
    lowered.assert_equal(model, np.full((1, 4), -0.5))  # which makes this 0


def test_unknown_category_scores_nan():
    codes = np.floor(IRIS)
    model = CategoricalNB().fit(codes, NAMES)
    beyond = codes[:3].copy()
    beyond[1, 0] = 99
    with pytest.raises(IndexError):
        model.predict(beyond)
    found = lowered.run(model, beyond)
    assert np.isnan(found.scores).all(axis=1).tolist() == [False, True, False]
    assert any("category" in note for note in found.lowering.notes)


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("mixture", [GaussianMixture, BayesianGaussianMixture])
def test_mixture(mixture, kind):
    model = mixture(n_components=3, covariance_type=kind, random_state=0, max_iter=300, tol=1e-2).fit(IRIS)
    found = lowered.assert_equal(model, hostile(IRIS)[:-2])
    assert (
        found.labels.tolist() == model.predict(hostile(IRIS)[:-2].astype(np.float32).astype(float)).tolist()
    )


def test_mixture_with_dirichlet_weights_far_from_zero():
    rows = IRIS + 1e4
    model = BayesianGaussianMixture(
        n_components=2,
        weight_concentration_prior_type="dirichlet_distribution",
        random_state=0,
        max_iter=300,
        tol=1e-2,
    ).fit(rows)
    lowered.assert_equal(make_pipeline(StandardScaler(with_std=False), model).fit(rows), rows[::5])


def test_discriminants_transform():
    for model in (LinearDiscriminantAnalysis(n_components=1), LinearDiscriminantAnalysis(solver="eigen")):
        np.testing.assert_allclose(
            lowered.transform(model.fit(WINE, VINTAGE), WINE, "float64"),
            model.transform(WINE),
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize(
    "dummy",
    [DummyRegressor(), DummyRegressor(strategy="median"), DummyRegressor(strategy="quantile", quantile=0.3)],
    ids=repr,
)
@pytest.mark.parametrize("targets", [IRIS[:, 0], IRIS[:, :2]], ids=["one", "two"])
def test_dummy_regressor(dummy, targets):
    lowered.assert_equal(dummy.fit(IRIS, targets), IRIS[:5])


@pytest.mark.parametrize("strategy", ["stratified", "uniform"])
def test_chance_is_refused(strategy):
    with pytest.raises(UnsupportedPipeline, match="at random"):
        lowered.run(DummyClassifier(strategy=strategy).fit(IRIS, KIND), IRIS)


def test_impossible_words_are_refused():
    with np.errstate(divide="ignore"):
        model = MultinomialNB(alpha=0.0).fit(np.eye(3), [0, 1, 2])
    with pytest.raises(UnsupportedPipeline, match="probabilities of zero; fit with alpha > 0"):
        lowered.run(model, np.eye(3))
