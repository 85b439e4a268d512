"""Neighbours: the same rows are nearest and the same votes follow; where equal distances may differ, it is said."""

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.neighbors import (
    KNeighborsClassifier,
    KNeighborsRegressor,
    LocalOutlierFactor,
    NeighborhoodComponentsAnalysis,
    RadiusNeighborsClassifier,
    RadiusNeighborsRegressor,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelPropagation, LabelSpreading

from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

IRIS, KIND = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[KIND]
SUGAR, PROGRESS = (part[:150] for part in load_diabetes(return_X_y=True))
CANCER, BENIGN = (part[:200] for part in load_breast_cancer(return_X_y=True))
ALGORITHMS = ["brute", "kd_tree", "ball_tree"]
METRICS: list[dict[str, Any]] = [
    {"p": 2},
    {"p": 1},
    {"p": 3},
    {"p": 1.5},
    {"metric": "chebyshev"},
    {"metric": "manhattan"},
    {"metric": "l2"},
]


def hostile(rows):
    odd = [np.zeros(rows.shape[1]), *np.round(rows[:3]), np.full(rows.shape[1], 1e-42), rows[0] * 1e4]
    return np.vstack([rows[::3], odd]).astype(np.float32).astype(float)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_classifier(algorithm, weights, metric):
    rows = IRIS + np.random.default_rng(0).normal(scale=1e-3, size=IRIS.shape)  # no equal distances
    model = KNeighborsClassifier(4, weights=weights, algorithm=algorithm, **metric).fit(rows, NAMES)
    found = lowered.assert_equal(model, hostile(rows))
    assert found.lowering.notes == ["carries 150 training rows (KNeighborsClassifier)"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_rows_themselves(algorithm):
    """At distance zero only the row itself, and its copies, count."""
    model = KNeighborsClassifier(5, weights="distance", algorithm=algorithm).fit(np.round(IRIS, 1), NAMES)
    rows = np.round(IRIS, 1)
    found = lowered.run(model, rows, dtype="float64")
    np.testing.assert_allclose(found.scores, model.predict_proba(rows), atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_far_away_all_rows_tie(algorithm):
    rows = np.array([[1e30] * 4, [-1e30] * 4, [3e29, -1e30, 1e30, 0.0]]).astype(np.float32)
    for k in (1, 3, 7):
        lowered.assert_equal(KNeighborsClassifier(k, algorithm=algorithm).fit(IRIS, NAMES), rows)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize(
    "targets", [PROGRESS, np.column_stack([PROGRESS, -PROGRESS / 7]), PROGRESS.astype(int)]
)
def test_regressor(algorithm, weights, targets):
    model = KNeighborsRegressor(weights=weights, algorithm=algorithm).fit(SUGAR, targets)
    lowered.assert_equal(model, hostile(SUGAR))


def test_many_columns():
    rows = np.random.default_rng(0).normal(size=(60, 80))
    for metric in METRICS:
        model = KNeighborsRegressor(3, algorithm="ball_tree", **metric).fit(rows, rows[:, 0])
        lowered.assert_equal(model, rows[:20] + 0.1)


def test_weighted_columns():
    model = KNeighborsClassifier(metric_params={"w": np.array([1.0, 0.5, 2.0, 0.0])}, p=3, algorithm="brute")
    lowered.assert_equal(model.fit(IRIS + SUGAR[:, :4] * 1e-3, NAMES), hostile(IRIS))


def test_several_outputs():
    labels = np.column_stack([KIND, KIND == 1]).astype(int)
    model = make_pipeline(StandardScaler(), KNeighborsClassifier(3, weights="distance")).fit(IRIS, labels)
    rows = hostile(IRIS)
    found = lowered.assert_equal(model, rows)
    assert found.labels.tolist() == model.predict(rows).tolist()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_radius(algorithm, weights):
    options = {"radius": 1.0, "weights": weights, "algorithm": algorithm}
    rows = np.vstack([hostile(IRIS), [[100.0] * 4]])
    lowered.assert_equal(RadiusNeighborsClassifier(outlier_label="setosa", **options).fit(IRIS, NAMES), rows)
    lowered.assert_equal(
        RadiusNeighborsClassifier(outlier_label="most_frequent", **options).fit(IRIS, KIND), rows
    )
    lowered.assert_equal(RadiusNeighborsRegressor(**options).fit(IRIS, IRIS[:, 0]), rows)
    lowered.assert_equal(RadiusNeighborsRegressor(**options).fit(IRIS, KIND), rows)


def test_row_without_neighbours_scores_nan():
    model = RadiusNeighborsClassifier(radius=1.0).fit(IRIS, NAMES)
    rows = np.vstack([IRIS[:2], [[100.0] * 4]])
    with pytest.raises(ValueError, match="No neighbors"):
        model.predict(rows)
    found = lowered.run(model, rows)
    assert np.isnan(found.scores).all(axis=1).tolist() == [False, False, True]
    assert any("without neighbours" in note for note in found.lowering.notes)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "options", [{"n_neighbors": 20}, {"n_neighbors": 3, "contamination": 0.2, "p": 1}], ids=str
)
def test_local_outliers(algorithm, options):
    rows = CANCER[:, :5]
    model = LocalOutlierFactor(novelty=True, algorithm=algorithm, **options).fit(rows)
    found = lowered.assert_equal(model, hostile(rows))
    assert set(found.labels.tolist()) == {0, 1}


def test_equal_distances_are_announced():
    """The proof must try rows where distances are equal, for there the search may take other rows."""
    grid = np.random.default_rng(0).integers(0, 4, (100, 3)).astype(float)
    found = lowered.run(KNeighborsRegressor(1, algorithm="brute").fit(grid, grid[:, 0]), grid)
    assert [(column, values.tolist()) for column, values in found.lowering.edges] == [
        (j, [0.0, 1.0, 2.0, 3.0]) for j in range(3)
    ]
    assert any("equally far" in note for note in found.lowering.notes)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("step", [1.0, 0.5])
def test_equal_distances_brute(k, step):
    """With room for one or two, the first of equally far rows win, as in scikit-learn."""
    rng = np.random.default_rng(0)
    grid, labels = rng.integers(0, 4, (200, 3)).astype(float), rng.integers(0, 3, 200)
    model = KNeighborsClassifier(k, algorithm="brute").fit(grid, labels)
    lowered.assert_equal(model, rng.integers(0, 8, (200, 3)) * step)


@pytest.mark.parametrize("spread", [LabelPropagation, LabelSpreading])
@pytest.mark.parametrize("options", [{"gamma": 2.0}, {"kernel": "knn", "n_neighbors": 5}], ids=str)
def test_labels_spread(spread, options):
    rows = IRIS + np.random.default_rng(0).normal(scale=1e-3, size=IRIS.shape)
    labels = np.where(np.arange(150) % 3 == 0, KIND, -1)
    lowered.assert_equal(spread(max_iter=5000, **options).fit(rows, labels), hostile(rows))


def test_learned_projection():
    model = NeighborhoodComponentsAnalysis(2, max_iter=5, random_state=0).fit(IRIS, KIND)
    np.testing.assert_allclose(lowered.transform(model, IRIS, "float64"), model.transform(IRIS), rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (KNeighborsClassifier(metric="cosine"), "metric 'cosine'"),
        (KNeighborsClassifier(weights=np.exp), "function as its weights"),
        (KNeighborsRegressor(metric=lambda a, b: abs(a[0] - b[0])), "the metric"),
        (RadiusNeighborsClassifier(outlier_label=7), "none of its classes"),
        (LabelPropagation(kernel=lambda a, b: a @ b.T, max_iter=1), "function as its kernel"),
    ],
    ids=lowered.named,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_refusals(model, reason):
    with pytest.raises(UnsupportedPipeline, match=reason):
        lowered.run(model.fit(IRIS, KIND), IRIS)
