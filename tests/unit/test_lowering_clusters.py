"""Clusterers, centroids and ellipsoids: the nearest centre is scikit-learn's, also far from zero."""

import numpy as np
import pytest
from sklearn.cluster import AffinityPropagation, Birch, BisectingKMeans, KMeans, MeanShift, MiniBatchKMeans
from sklearn.covariance import EllipticEnvelope
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from converters.lowering.graph import Lowering
from converters.lowering.rules import RULES
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

IRIS, KIND = load_iris(return_X_y=True)
WINE, VINTAGE = load_wine(return_X_y=True)
CANCER, BENIGN = (part[:200] for part in load_breast_cancer(return_X_y=True))

CLUSTERERS = [
    KMeans(3, n_init=1, random_state=0),
    MiniBatchKMeans(4, n_init=1, random_state=0),
    BisectingKMeans(5, random_state=0),
    BisectingKMeans(1, random_state=0),
    MeanShift(bandwidth=1.5),
    AffinityPropagation(random_state=0),
    Birch(n_clusters=3, threshold=0.6),
    Birch(n_clusters=None, threshold=0.8),
]


def hostile(rows):
    odd = [np.zeros(rows.shape[1]), *np.round(rows[:3]), np.full(rows.shape[1], 1e-42), rows[0] * 1e4]
    far = [np.full(rows.shape[1], 1e30), np.where(np.arange(rows.shape[1]) % 2, -1e30, 1e30)]
    return np.vstack([rows[::3], odd, far]).astype(np.float32).astype(float)


def centres_of(model):
    return model.subcluster_centers_ if isinstance(model, Birch) else model.cluster_centers_


@pytest.mark.parametrize("estimator", CLUSTERERS, ids=repr)
def test_clusters(estimator):
    model = estimator.fit(IRIS)
    rows = hostile(IRIS)
    found = lowered.assert_equal(model, rows)
    assert found.labels.tolist() == model.predict(rows).tolist()
    apart = np.sqrt(((rows[:, None] - centres_of(model)) ** 2).sum(axis=2))
    np.testing.assert_allclose(found.scores, -apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", CLUSTERERS, ids=repr)
def test_between_two_centres(estimator):
    """Midpoints of centres are as near a tie as float64 comes."""
    model = estimator.fit(IRIS)
    centres = centres_of(model)
    rows = ((centres[:, None] + centres[None]) / 2).reshape(-1, 4)[:400]
    found = lowered.run(model, rows, dtype="float64")
    measured = np.sort(((rows[:, None] - centres) ** 2).sum(axis=2), axis=1)
    exact = np.isin(found.labels, model.labels_)
    assert exact.all()
    clear = np.ones(len(rows), bool) if len(centres) < 2 else measured[:, 1] - measured[:, 0] > 1e-12
    assert (found.labels == model.predict(rows))[clear].all()


@pytest.mark.parametrize("estimator", CLUSTERERS[:4], ids=repr)
def test_far_from_zero(estimator):
    rows = (IRIS + 1e4).astype(np.float32).astype(float)
    model = estimator.fit(rows)
    found = lowered.run(model, rows)
    assert found.labels.tolist() == model.predict(rows).tolist()
    np.testing.assert_allclose(found.scores, -model.transform(rows), atol=1e-3)


def test_behind_a_scaler():
    model = make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(WINE)
    lowered.assert_equal(model, hostile(WINE)[:-2])


@pytest.mark.parametrize("estimator", [CLUSTERERS[0], CLUSTERERS[2], CLUSTERERS[6]], ids=repr)
def test_distances_as_features(estimator):
    model = make_pipeline(estimator, LogisticRegression(max_iter=1000)).fit(IRIS, KIND)
    lowered.assert_equal(model, IRIS)


@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
@pytest.mark.parametrize("priors", ["uniform", "empirical", [0.2, 0.3, 0.5]], ids=str)
@pytest.mark.parametrize("shrink", [None, 0.4])
def test_nearest_centroid(metric, priors, shrink):
    model = NearestCentroid(metric=metric, priors=priors, shrink_threshold=shrink).fit(WINE, VINTAGE)
    rows = hostile(WINE)[:-2]
    found = lowered.assert_equal(model, rows)
    assert found.labels.tolist() == model.predict(rows).tolist()


def test_nearest_centroid_of_two_gives_one_score():
    model = NearestCentroid().fit(CANCER, BENIGN)
    g = Lowering(width=CANCER.shape[1], dtype="float32", rules=RULES)
    assert g.call(model, "decision_function", g.start()).shape == (None, 1)
    lowered.assert_equal(model, CANCER)


@pytest.mark.parametrize("options", [{}, {"contamination": 0.3}, {"assume_centered": True}], ids=str)
def test_ellipse(options):
    model = EllipticEnvelope(random_state=0, **options).fit(IRIS[:50])
    found = lowered.assert_equal(model, hostile(IRIS)[:-2])  # squares of the last two leave float32
    assert set(found.labels.tolist()) == {0, 1}


def test_without_centres_it_is_refused():
    points = np.array([0.0, 1.0, 9.0])
    model = AffinityPropagation(affinity="precomputed", random_state=0).fit(-np.abs(points[:, None] - points))
    with pytest.raises(UnsupportedPipeline, match="AffinityPropagation"):
        lowered.run(model, np.ones((1, 3)))


@pytest.mark.parametrize("estimator", CLUSTERERS[:3], ids=repr)
def test_fitted_on_float32(estimator):
    model = estimator.fit(IRIS.astype(np.float32))
    with pytest.raises(ValueError, match="dtype"):
        model.predict(IRIS)
    with pytest.raises(UnsupportedPipeline, match="fit it on float64 rows"):
        lowered.run(model, IRIS)
