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

pytestmark = pytest.mark.sampled(2)

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


@pytest.mark.covering
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


@pytest.mark.covering
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


@pytest.mark.covering
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


def between(rows, rng, count):
    """Training rows, points halfway between two of them, and mixtures of two: many are equally far from several."""
    one, other = rng.integers(len(rows), size=(2, count))
    mixed = np.where(rng.random((count, rows.shape[1])) < 0.5, rows[one], rows[other])
    return np.concatenate([rows[one], (rows[one] + rows[other]) / 2, mixed])


def tied(model, rows):
    """How many rows have more equally far training rows than there is room for."""
    far = np.sort(model.kneighbors(rows, model.n_samples_fit_)[0], axis=1)
    return int((far[:, model.n_neighbors - 1] == far[:, model.n_neighbors]).sum())


@pytest.mark.covering
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("options", [{}, {"weights": "distance", "p": 1}, {"p": 3, "leaf_size": 5}], ids=str)
def test_equally_far_rows(algorithm, k, options):
    """Of more equally far rows than there is room for the same ones are taken."""
    rng = np.random.default_rng(k)
    grid = rng.integers(0, 4, (150, 3)).astype(float)
    model = KNeighborsRegressor(k, algorithm=algorithm, **options).fit(grid, rng.normal(size=150))
    rows = between(grid, rng, 100)
    assert tied(model, rows) > 100
    lowered.assert_equal(model, rows)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_first_come_is_not_enough(algorithm):
    """The teeth of the test above: the first of equally far rows are other ones in some cases."""
    rng = np.random.default_rng(5)
    grid = rng.integers(0, 4, (150, 3)).astype(float)
    model = KNeighborsRegressor(5, algorithm=algorithm).fit(grid, rng.normal(size=150))
    order = np.arange(150) if algorithm == "brute" else np.asarray(model._tree.idx_array)
    rows = between(grid, rng, 100)
    far = ((rows[:, None] - grid[order]) ** 2).sum(axis=2)
    first = np.sort(order[np.argsort(far, axis=1, kind="stable")[:, :5]], axis=1)
    found = np.sort(model.kneighbors(rows, return_distance=False), axis=1)
    assert (first != found).any(axis=1).sum() > 10


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equally_far_in_a_pipeline_of_classes(algorithm):
    rng = np.random.default_rng(0)
    grid, kinds = rng.integers(0, 3, (200, 4)).astype(float), rng.integers(0, 3, 200)
    model = make_pipeline(StandardScaler(), KNeighborsClassifier(5, algorithm=algorithm)).fit(grid, kinds)
    for dtype in ("float32", "float64"):
        lowered.assert_equal(model, between(grid, rng, 100), dtype=dtype)


def test_far_enough_that_distances_round_to_few_values():
    rng = np.random.default_rng(0)
    model = KNeighborsClassifier(5, algorithm="kd_tree").fit(IRIS, NAMES)
    rows = IRIS.repeat(4, axis=0)
    rows[np.arange(600), rng.integers(4, size=600)] = np.exp2(rng.uniform(20, 70, size=600))
    assert tied(model, rows.astype(np.float32).astype(float)) > 50
    lowered.assert_equal(model, rows)


def test_distances_beyond_all_numbers():
    """The search finds none, and answers with what its heap was filled with: the first training row."""
    rows = np.array([[1e200, 0.0, 0.0, 0.0], [5.0, 3.0, 2.0, 1.0]])
    for algorithm in ("kd_tree", "ball_tree"):
        model = KNeighborsRegressor(5, algorithm=algorithm).fit(IRIS, IRIS[:, 0])
        with np.errstate(over="ignore"):
            lowered.assert_equal(model, rows, dtype="float64")


def test_too_many_neighbours_for_a_heap():
    """The nearest are found all the same; only ties may fall otherwise, and a failed proof says so."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1200, 2))
    model = KNeighborsRegressor(400).fit(rows, rows[:, 0])
    found = lowered.assert_equal(model, rows[:50] + 0.01)
    assert len(found.model.graph.node) < 200
    assert ["fewer neighbors" in doubt for doubt in found.lowering.doubts] == [True]


@pytest.mark.parametrize(
    ("model", "rows", "reason"),
    [
        (KNeighborsRegressor(algorithm="brute"), SUGAR.astype(int), "fitted on int64 rows"),
        (KNeighborsRegressor(algorithm="brute"), np.tile(SUGAR, (2, 1)), "asked for at once"),
        (KNeighborsRegressor(algorithm="brute"), SUGAR, "multiplies matrices"),
        (KNeighborsRegressor(algorithm="ball_tree"), SUGAR, "bounds that round"),
    ],
    ids=["integers", "threads", "products", "ball"],
)
def test_what_a_search_may_hang_on_is_said(model, rows, reason):
    found = lowered.run(model.fit(rows, rows[:, 0]), rows[:3])
    assert len(found.lowering.doubts) == 1
    assert reason in found.lowering.doubts[0]
    assert "use algorithm='kd_tree'" in found.lowering.doubts[0]
    assert found.lowering.searches


def test_a_tree_of_boxes_is_followed_without_doubt():
    found = lowered.run(KNeighborsRegressor(algorithm="kd_tree").fit(SUGAR, PROGRESS), SUGAR[:3])
    assert not found.lowering.doubts


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
