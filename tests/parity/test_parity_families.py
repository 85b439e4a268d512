"""Every family of pipelines, on rows that sit on its edges, through the engine that serves."""

import numpy as np
import pytest
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from converters import check_parity, convert
from converters import table as tables
from converters.reference import answers
from converters.signature import read
from edge_runtime.engine import Engine
from tests.parity.cases import CLASSIFIERS, REGRESSORS, SCALERS, classes_of, pipeline_of, scaled_integers

pytestmark = pytest.mark.sampled(2)

PROBES = 4000
LINEAR = ("logistic", "least-squares", "ridge")
CASES = [
    (scaler, name)
    for scaler in SCALERS
    for name in (*CLASSIFIERS, *(f"{name}-regressor" for name in REGRESSORS))
]
# One scaler per family and one family per scaler run every time, the rest with `slow`.
FAST = {("standard", name) for _, name in CASES} | {(scaler, "forest") for scaler in SCALERS}
FAST |= {("clip", "logistic"), ("clip", "ridge-regressor")}


def proven(pipeline, X, y, tmp_path, **options):
    artifact = convert(pipeline.fit(X, y), X, tmp_path / "m.onnx", y=y, probes=PROBES, **options)
    assert artifact.report.passed
    assert artifact.report.rows >= PROBES * 0.9
    return artifact


@pytest.mark.parametrize(
    ("scaler", "name"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_family_is_proven_on_scaled_integers(scaler, name, tmp_path):
    X = scaled_integers()
    if name.endswith("-regressor"):
        estimator = REGRESSORS[name.removesuffix("-regressor")]()
        y = X @ np.arange(1.0, 6.0) / np.abs(X).max(axis=0).sum()
    else:
        estimator, y = CLASSIFIERS[name](), classes_of(X, 4)
    report = proven(pipeline_of(scaler, estimator), X, y, tmp_path).report
    assert report.max_rel_error < 1e-6
    if name.removesuffix("-regressor") in LINEAR:
        assert report.coverage is None
        return
    assert report.coverage is not None
    assert report.coverage.reached == report.coverage.splits, "every split lies on a training row's path"
    covered = dict(report.coverage.by_offset)
    assert min(covered[0], covered[1], covered[-1]) >= report.coverage.distinct


@pytest.mark.covering
@pytest.mark.parametrize(
    "names",
    [
        pytest.param([False, True], id="bool"),
        pytest.param(["walk", "run"], id="text"),
        pytest.param(["é", "", "z z"], id="unicode text"),
        pytest.param([-7, 3, 900], id="negative"),
        pytest.param([-1.0, 1.0, 2.0], id="float"),
        pytest.param(np.array(["a", "b", "c"], dtype=object), id="object"),
    ],
)
@pytest.mark.parametrize("family", ["logistic", "forest"])
def test_labels_of_any_type_come_back_as_they_were(names, family, tmp_path):
    X = scaled_integers()
    values = np.asarray(names)
    y = values[classes_of(X, len(names))]
    pipeline = pipeline_of("standard", CLASSIFIERS[family]())
    artifact = proven(pipeline, X, y, tmp_path)
    labels = Engine(artifact.path).info.manifest.labels
    assert labels == tuple(sorted(values.tolist()))
    assert [type(label) for label in labels] == [type(values.tolist()[0])] * len(labels)
    indices, _ = Engine(artifact.path).run(X.astype(np.float32))
    assert indices is not None
    found = [labels[i] for i in indices]
    signature = read(pipeline)
    sure = ~answers(signature, tables.read(signature, X), X.astype(np.float32)).ties[:, 0]
    assert np.mean(sure) > 0.9
    assert [a for a, s in zip(found, sure, strict=True) if s] == pipeline.predict(X)[sure].tolist()


@pytest.mark.parametrize("classes", [2, 3])
def test_missing_values_take_the_way_they_took_in_training(classes, tmp_path):
    X = scaled_integers(600)
    y = classes_of(X, classes)
    X[np.random.default_rng(0).random(X.shape) < 0.15] = np.nan
    X[:, 4] = np.nan_to_num(X[:, 4])
    pipeline = pipeline_of("standard", RandomForestClassifier(8, random_state=0))
    artifact = proven(pipeline, X, y, tmp_path)
    assert all(feature.missing for feature in artifact.manifest.features), "as scikit-learn takes them"
    assert artifact.report.by_probe_kind["missing"].rows == PROBES // 20
    golden = Engine(artifact.path).info.golden
    assert np.isnan(golden.rows).any(axis=0).all()


def test_missing_values_that_the_pipeline_refuses_are_declared_and_not_compared(tmp_path):
    X = scaled_integers()
    artifact = proven(make_pipeline(StandardScaler(), LogisticRegression()), X, classes_of(X, 2), tmp_path)
    assert not any(feature.missing for feature in artifact.manifest.features)
    assert "missing" not in artifact.report.by_probe_kind
    assert not np.isnan(Engine(artifact.path).info.golden.rows).any()


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(LogisticRegression(), id="imputed logistic"),
        pytest.param(RandomForestClassifier(5, random_state=0), id="imputed forest"),
    ],
)
def test_an_imputer_takes_missing_values_for_what_follows(estimator, tmp_path):
    X = scaled_integers(600)
    y = classes_of(X, 3)
    X[np.random.default_rng(0).random(X.shape) < 0.15] = np.nan
    artifact = proven(make_pipeline(SimpleImputer(), StandardScaler(), estimator), X, y, tmp_path)
    assert all(feature.missing for feature in artifact.manifest.features)
    assert artifact.report.by_probe_kind["missing"].rows == PROBES // 20


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(GradientBoostingClassifier(n_estimators=6, random_state=0), id="gradient"),
        pytest.param(HistGradientBoostingClassifier(max_iter=6, random_state=0), id="histogram"),
    ],
)
def test_boosting_is_proven_at_every_split(estimator, tmp_path):
    X = scaled_integers()
    report = proven(make_pipeline(StandardScaler(), estimator), X, classes_of(X, 3), tmp_path).report
    assert report.max_rel_error < 1e-6
    assert report.coverage is not None
    covered = dict(report.coverage.by_offset)
    assert min(covered[0], covered[1], covered[-1]) >= report.coverage.distinct > 0


def test_a_missing_value_in_a_column_that_never_missed_still_goes_scikit_learns_way(tmp_path):
    X = scaled_integers()
    pipeline = RandomForestClassifier(8, random_state=0).fit(X, classes_of(X, 3))
    artifact = convert(pipeline, X, tmp_path / "m.onnx", probes=PROBES)
    rows = X.astype(np.float32)
    rows[np.random.default_rng(0).random(rows.shape) < 0.3] = np.nan
    _, scores = Engine(artifact.path).run(rows)
    assert np.abs(scores - pipeline.predict_proba(rows)).max() < 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e6, 1e30])
def test_columns_of_any_size(scale, tmp_path):
    X = scaled_integers() * scale
    for estimator in (RandomForestClassifier(5, random_state=0), LogisticRegression(max_iter=2000)):
        proven(pipeline_of("standard", estimator), X, classes_of(X, 3), tmp_path)


def test_a_constant_column_and_a_single_column(tmp_path):
    X = scaled_integers()
    X[:, 2] = 5.0
    proven(pipeline_of("standard", RandomForestClassifier(5, random_state=0)), X, classes_of(X, 2), tmp_path)
    one = X[:, :1]
    proven(pipeline_of("minmax", LogisticRegression()), one, classes_of(one, 2), tmp_path)
    proven(
        pipeline_of("minmax", RandomForestClassifier(5, random_state=0)), one, classes_of(one, 2), tmp_path
    )


def test_a_tree_without_a_split(tmp_path):
    X = scaled_integers()
    forest = RandomForestRegressor(3, max_depth=1, min_samples_leaf=300)
    artifact = proven(forest, X, X[:, 0], tmp_path)
    assert artifact.report.coverage is None
    assert "threshold" not in artifact.report.by_probe_kind
    _, scores = Engine(artifact.path).run(X.astype(np.float32))
    assert scores[:, 0] == pytest.approx(forest.predict(X), rel=1e-6)


def test_a_large_offset_costs_a_linear_model_nothing(tmp_path):
    rng = np.random.default_rng(0)
    X = (1e5 + rng.normal(size=(500, 3))).astype(np.float32).astype(np.float64)
    y = (X[:, 0] > 1e5).astype(int)
    report = proven(make_pipeline(StandardScaler(), LogisticRegression(C=100)), X, y, tmp_path).report
    assert report.max_abs_error < 1e-7


def test_coefficients_that_cancel(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(500, 2)) * 1e4
    X[:, 1] = X[:, 0] + rng.normal(size=500) * 1e-2
    X = X.astype(np.float32).astype(np.float64)
    report = proven(LinearRegression(), X, X[:, 0] * 1e4 - X[:, 1] * 1e4, tmp_path).report
    assert report.arithmetic == "float64"


def test_leaves_that_cancel_are_summed_in_float64(tmp_path):
    X = scaled_integers()
    y = np.random.default_rng(0).normal(size=len(X))
    calm = proven(RandomForestRegressor(20, random_state=0), X, y, tmp_path).report
    wild = proven(RandomForestRegressor(20, random_state=0), X, y * 1e7, tmp_path).report
    assert (calm.arithmetic, wild.arithmetic) == ("float32", "float64")
    assert wild.max_rel_error < 1e-7


@pytest.mark.slow
def test_many_equal_votes_are_summed_in_float64(tmp_path):
    X = scaled_integers()
    forest = RandomForestClassifier(1000, max_features=None, random_state=0)
    report = proven(forest, X, X[:, 0] > 0, tmp_path).report
    assert report.arithmetic == "float64"
    assert report.max_abs_error < 1e-7


def test_values_the_pipeline_refuses_are_counted_apart(tmp_path):
    X = scaled_integers() * 1e-12
    report = proven(
        make_pipeline(StandardScaler(), RandomForestClassifier(5, random_state=0)),
        X,
        classes_of(X, 2),
        tmp_path,
    ).report
    assert report.refused > 0
    assert report.by_probe_kind["huge"].refused == report.refused


def test_batches_and_single_rows_are_all_compared(tmp_path):
    X = scaled_integers()
    report = proven(make_pipeline(MinMaxScaler(), LogisticRegression()), X, classes_of(X, 3), tmp_path).report
    assert report.by_probe_kind["batch"].rows == 3 * PROBES // 20


def test_check_parity_agrees_with_other_rows(tmp_path):
    X = scaled_integers()
    pipeline = pipeline_of("standard", RandomForestClassifier(8, random_state=0))
    artifact = proven(pipeline, X, classes_of(X, 4), tmp_path)
    report = check_parity(pipeline, artifact.path, X[::2], probes=2000, seed=5)
    assert report.passed
    assert (report.seed, report.digest, report.arithmetic) == (5, artifact.digest, "float32")


@pytest.mark.slow
def test_a_forest_of_a_hundred_trees_with_every_split_at_every_distance(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(7000, 30)).astype(np.float32)
    y = classes_of(X.astype(np.float64), 7)
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(60, min_samples_leaf=4, random_state=0))
    artifact = convert(pipeline.fit(X, y), X, tmp_path / "m.onnx")
    coverage = artifact.report.coverage
    assert coverage is not None
    assert min(count for offset, count in coverage.by_offset if abs(offset) < 2) >= coverage.distinct
    assert artifact.report.passed
