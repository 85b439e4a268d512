"""What float32 does to training rows: tolerated on a knife's edge and reported; where a column needs more, float64."""

import re

import numpy as np
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import FixedThresholdClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from converters import convert
from converters import table as tables
from converters.reference import Answers, accepted_values, answers, ask, changed, rounding_effect, ties_of
from converters.signature import read
from edge_runtime.contract.errors import InputError, UnsupportedPipeline
from edge_runtime.contract.manifest import agrees
from edge_runtime.engine import Engine
from tests.parity.cases import classes_of, scaled_integers


def timestamps(rows=600):
    """Half a day of Unix time beside a harmless column."""
    rng = np.random.default_rng(0)
    return np.stack([1.7e9 + rng.random(rows) * 43_200, rng.normal(size=rows)], axis=1)


def timed_forest(X):
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(10, random_state=0))
    return pipeline.fit(X, np.sin(X[:, 0] / 500) > 0)


def test_a_timestamp_in_a_forest_travels_as_float64(tmp_path):
    X = timestamps()
    pipeline = timed_forest(X)
    artifact = convert(pipeline, X, tmp_path / "m.onnx", probes=3000)
    report = artifact.report
    assert artifact.manifest.input_dtype == "float64"
    assert artifact.path == tmp_path / "m.onnx"
    [remedy] = report.remedies
    assert re.fullmatch(
        r"float64 input, because float32 input changes the pipeline's answer on \d+ of 600 training rows .*"
        r"column 'x0' .* float32 values near 1\.7\d*e\+09 lie 128 apart",
        remedy,
    )
    assert report.float32 is not None
    assert (report.float32.labels_changed, report.float32.scores_changed) == (0, 0)
    assert report.passed
    assert report.coverage is not None
    covered = dict(report.coverage.by_offset)
    assert min(covered[0], covered[1], covered[-1]) >= report.coverage.distinct
    # What the splits tell apart is lost in float32 and kept by the artifact.
    engine = Engine(artifact.path)
    _, scores = engine.run(X)
    wanted = pipeline.predict_proba(X)
    assert agrees(scores, wanted).all()
    assert not agrees(pipeline.predict_proba(X.astype(np.float32).astype(np.float64)), wanted).all()


def test_a_timestamp_in_a_linear_model_travels_as_float64_too(tmp_path):
    X = timestamps()
    pipeline = make_pipeline(StandardScaler(), LinearRegression()).fit(X, X[:, 0] - 1.7e9)
    artifact = convert(pipeline, X, tmp_path / "m.onnx", probes=500)
    assert artifact.manifest.input_dtype == "float64"
    assert artifact.report.passed
    assert re.search(r"changes the pipeline's answer on \d+ of 600 .*'x0'", artifact.report.remedies[0])


def test_float32_input_that_was_asked_for_is_refused_with_a_remedy(tmp_path):
    X = timestamps()
    with pytest.raises(
        UnsupportedPipeline,
        match=r"column 'x0' .* lie 128 apart; pass input_dtype='float64', or subtract an offset from the column",
    ):
        convert(timed_forest(X), X, tmp_path / "m.onnx", input_dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_float64_input_can_be_asked_for(tmp_path):
    X = scaled_integers()
    pipeline = RandomForestClassifier(3, random_state=0).fit(X, classes_of(X, 2))
    narrow = convert(pipeline, X, tmp_path / "narrow.onnx", probes=500)
    wide = convert(pipeline, X, tmp_path / "wide.onnx", probes=500, input_dtype="float64")
    assert (narrow.manifest.input_dtype, wide.manifest.input_dtype) == ("float32", "float64")
    assert narrow.report.remedies == wide.report.remedies == ()


def test_the_remedy_works(tmp_path):
    X = timestamps()
    X[:, 0] -= 1.7e9
    pipeline = make_pipeline(StandardScaler(), LinearRegression()).fit(X, X[:, 0] / 43_200)
    artifact = convert(pipeline, X, tmp_path / "m.onnx", probes=500, input_dtype="float32")
    assert artifact.report.passed
    assert artifact.report.remedies == ()


def test_a_timestamp_that_float32_can_tell_well_enough_is_fine(tmp_path):
    X = timestamps()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=1e-4)).fit(X, X[:, 1] > 0)
    artifact = convert(pipeline, X, tmp_path / "m.onnx", probes=500)
    effect = artifact.report.float32
    assert effect is not None
    assert effect.scores_changed == 0
    assert artifact.manifest.input_dtype == "float32"


@pytest.mark.parametrize("load", [load_iris, load_wine, load_breast_cancer])
def test_classic_data_in_float64_is_converted_and_its_knife_edges_reported(load, tmp_path):
    X, y = load(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(30, random_state=0)).fit(X, y)
    report = convert(pipeline, X, tmp_path / "m.onnx", probes=2000).report
    wanted = pipeline.predict_proba(X.astype(np.float32).astype(np.float64))
    found = np.abs(pipeline.predict_proba(X) - wanted)
    assert report.float32 is not None
    assert report.float32.scores_changed == int((found > 1e-5).any(axis=1).sum())
    assert report.float32.max_change == found.max()
    assert report.float32.rows == len(X)


def test_too_many_knife_edges_are_noticed_with_a_remedy_that_works(tmp_path):
    """Columns in steps of 0.1, where float64 puts every split exactly on a value, and a target that shows it."""
    rng = np.random.default_rng(3)
    X = rng.integers(0, 60, size=(400, 3)) / 10 + 0.1
    y = classes_of(X, 3)
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=0)).fit(X[::2], y[::2])
    edge = X.copy()
    edge[::2, 0] = _on_a_split(pipeline, X)
    with pytest.raises(UnsupportedPipeline, match=r"values lie exactly on splits; fit on X\.astype"):
        convert(pipeline, edge, tmp_path / "m.onnx", probes=500, input_dtype="float32")
    artifact = convert(pipeline, edge, tmp_path / "m.onnx", probes=500)
    assert artifact.manifest.input_dtype == "float64"
    assert "values lie exactly on splits" in artifact.report.remedies[0]
    rounded = edge.astype(np.float32).astype(np.float64)
    again = make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=0)).fit(rounded, y)
    artifact = convert(again, rounded, tmp_path / "m.onnx", probes=500)
    effect = artifact.report.float32
    assert artifact.manifest.input_dtype == "float32"
    assert effect is not None
    assert (effect.labels_changed, effect.scores_changed) == (0, 0)


def _on_a_split(pipeline, X):
    """A value of the first column beside a split that float32 rounds to the other side."""
    tree = next(m.tree_ for m in pipeline[-1].estimators_ if (m.tree_.feature == 0).any())
    threshold = tree.threshold[tree.feature == 0][0]
    low, high = X[:, 0].min(), X[:, 0].max()

    def left(x):
        return np.float32((x - pipeline[0].mean_[0]) / pipeline[0].scale_[0]) <= threshold

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) else (low, middle)
    return high if left(float(np.float32(high))) else low


def test_float32_training_rows_are_compared_in_float32_as_passed():
    """scikit-learn scales float32 rows in float32: the effect of that is counted, not hidden."""
    X = scaled_integers()
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(20, random_state=0)).fit(
        X, classes_of(X, 2)
    )
    rows = X.astype(np.float32)
    expected = int(
        (np.abs(pipeline.predict_proba(rows) - pipeline.predict_proba(X)) > 1e-5).any(axis=1).sum()
    )
    assert expected > 0
    signature = read(pipeline)
    table = tables.read(signature, rows)
    effect, problem = rounding_effect(
        signature, table, answers(signature, table, table.rows("float32")), "float32"
    )
    assert problem == ""
    assert effect.scores_changed == expected
    assert effect.max_change > 0


def test_rows_the_pipeline_refuses_are_found_one_by_one():
    X = scaled_integers()
    signature = read(
        make_pipeline(StandardScaler(), RandomForestClassifier(3)).fit(X * 1e-9, classes_of(X, 2))
    )
    rows = np.repeat((X * 1e-9).astype(np.float32), 2, axis=0)
    rows[[3, 200, 201, 799], 0] = 3e38
    found = answers(signature, tables.read(signature, X * 1e-9), rows)
    assert np.flatnonzero(~found.accepted).tolist() == [3, 200, 201, 799]
    assert found.reason.startswith("ValueError: ")
    assert "too large for dtype('float32')" in found.reason
    assert (found.labels[~found.accepted] == -1).all()
    labels, scores = ask(signature, rows[found.accepted].astype(np.float64))
    np.testing.assert_array_equal(found.labels[found.accepted], labels)
    np.testing.assert_array_equal(found.scores[found.accepted], scores)


def test_a_training_row_that_overflows_in_float32_is_pointed_at(tmp_path):
    X = scaled_integers()
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(3)).fit(X * 1e-9, classes_of(X, 2))
    rows = X * 1e-9
    rows[17, 2] = 3e38
    with pytest.raises(InputError, match="refuses row 17 as float64: ValueError: Input X contains infinity"):
        convert(pipeline, rows, tmp_path / "m.onnx")


def test_changed_answers_leave_ties_to_either_label():
    X = scaled_integers()
    signature = read(RandomForestClassifier(3).fit(X, classes_of(X, 2)))

    def made(labels, scores):
        array = np.asarray(scores, np.float64)
        return Answers(
            labels=np.asarray(labels).reshape(-1, 1),
            scores=array,
            accepted=np.ones(len(array), np.bool_),
            ties=ties_of(signature, array),
        )

    labels, scores = changed(
        made([0, 1, 1, 0], [[0.5, 0.5], [0.4, 0.6], [0.4, 0.6], [0.9, 0.1]]),
        made([1, 1, 0, 0], [[0.5, 0.5], [0.4, 0.6], [0.6, 0.4], [0.9 + 9e-6, 0.1]]),
    )
    assert labels.tolist() == [False, False, True, False]
    assert scores.tolist() == [False, False, True, False]


def test_an_all_missing_column_is_no_obstacle(tmp_path):
    X = scaled_integers()
    y = classes_of(X, 2)
    X[:, 1] = np.nan
    pipeline = RandomForestClassifier(3, random_state=0).fit(X, y)
    artifact = convert(pipeline, X, tmp_path / "m.onnx", probes=500)
    assert artifact.manifest.features[1].missing
    assert not tables.spread(X)[1]


def binary(response="predict_proba", threshold=0.5, pos_label=None):
    rng = np.random.default_rng(3)
    X = rng.normal(size=(80, 2))
    inner = LogisticRegression()
    fitted = FixedThresholdClassifier(
        inner, response_method=response, threshold=threshold, pos_label=pos_label
    )
    return read(fitted.fit(X, np.where(X[:, 0] > 0, "yes", "no")))


@pytest.mark.parametrize(("pos_label", "column"), [("no", 0), ("yes", 1)])
def test_the_tie_of_a_threshold_lies_at_the_threshold_and_not_at_its_complement(pos_label, column):
    found = binary(threshold=0.3, pos_label=pos_label)
    at = np.array([[0.7, 0.3], [0.3, 0.7], [0.5, 0.5], [np.nan, np.nan]])
    assert ties_of(found, at)[:, 0].tolist() == [column == 1, column == 0, False, True]


def test_no_probability_is_a_tie_where_the_label_goes_by_the_decision():
    found = binary(response="decision_function", threshold=0.0, pos_label="yes")
    assert found.score == "predict_proba"
    assert not ties_of(found, np.array([[0.5, 0.5], [0.7, 0.3]])).any()


def test_several_outputs_tie_one_by_one():
    rng = np.random.default_rng(3)
    X = rng.normal(size=(80, 2))
    fitted = KNeighborsClassifier(2).fit(X, np.stack([X[:, 0] > 0, X[:, 1] > 0], axis=1).astype(int))
    found = read(fitted)
    scores = np.array([[0.5, 0.5, 0.9, 0.1], [0.9, 0.1, 0.5, 0.5], [1.0, 0.0, 0.0, 1.0]])
    assert ties_of(found, scores).tolist() == [[True, False], [False, True], [False, False]]


def test_columns_of_number_codes_that_take_no_new_value_are_proven_on_random_rows(tmp_path):
    rng = np.random.default_rng(0)
    X = np.stack([rng.integers(0, 4, 200), rng.integers(10, 30, 200), rng.normal(size=200)], axis=1)
    columns = ColumnTransformer([("codes", OneHotEncoder(), [0, 1])], remainder="passthrough")
    pipeline = make_pipeline(columns, LogisticRegression()).fit(X, X[:, 0] > 1)
    report = convert(pipeline, X, tmp_path / "m.onnx", probes=1000).report
    assert report.by_probe_kind["random"].refused == 0
    only = accepted_values(read(pipeline), tables.read(read(pipeline), X), X.astype(np.float32)).only
    assert set(only) == {0, 1}
    assert only[0].tolist() == [0, 1, 2, 3]
