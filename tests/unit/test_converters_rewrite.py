"""Folding: the folded estimator answers exactly as the pipeline does, for every float32 row."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import ExtraTreesRegressor, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from converters import convert
from converters.rewrite import LARGEST_KEY, float_of, fold, key_of, largest_left
from converters.signature import Step, read, trees
from converters.witness import beside
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.parity.cases import SCALERS, classes_of, pipeline_of, scaled_integers

MAX = float(np.finfo(np.float32).max)
finite = st.floats(-MAX, MAX, width=32)


@given(st.lists(finite, min_size=2, max_size=20))
def test_keys_keep_the_order_of_floats_and_come_back(values):
    array = np.array(values, np.float32)
    keys = key_of(array)
    np.testing.assert_array_equal(float_of(keys), array)
    assert (np.sign(keys[1:] - keys[:-1]) == np.sign(array[1:].astype(np.float64) - array[:-1])).all()


def test_neighbouring_keys_are_neighbouring_floats():
    keys = np.array([-LARGEST_KEY, -8388608, -1, 0, 1, 8388607, 1065353216, LARGEST_KEY - 1])
    np.testing.assert_array_equal(
        float_of(keys + 1), np.nextafter(float_of(keys), np.float32(np.inf), dtype=np.float32)
    )
    assert float_of(np.array([LARGEST_KEY + 1, -LARGEST_KEY - 1])).tolist() == [math.inf, -math.inf]
    assert key_of(np.array([-0.0], np.float32))[0] == 0


@given(st.floats(-1e38, 1e38))
def test_without_a_scaler_it_is_the_largest_float32_not_above(threshold):
    [found] = largest_left([], np.array([0]), np.array([threshold]), 1)
    assert float(found) <= threshold
    assert float(np.nextafter(found, np.float32(np.inf))) > threshold


@settings(max_examples=40)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=20, unique=True),
    st.sampled_from(["standard", "minmax", "clip", "maxabs", "robust", "chain"]),
    st.floats(-3, 3),
)
def test_the_raw_threshold_is_where_scikit_learns_verdict_changes(values, scaler, threshold):
    maker = SCALERS[scaler]
    assert maker is not None
    fitted = maker().fit(np.array(values).reshape(-1, 1))

    def left(x):
        with np.errstate(over="ignore"):
            return fitted.transform(np.array([[float(x)]])).astype(np.float32)[0, 0] <= np.float64(threshold)

    [found] = largest_left([Step("s", fitted)], np.array([0]), np.array([threshold]), 1)
    if np.isfinite(found):
        assert left(found)
    if found < MAX:
        assert not left(np.nextafter(found, np.float32(np.inf), dtype=np.float32))


def test_splits_that_send_everything_one_way():
    clip = Step("s", MinMaxScaler(clip=True).fit([[0.0], [10.0]]))
    found = largest_left([clip], np.zeros(4, np.int64), np.array([-0.5, 1.0, 0.5, np.inf]), 1)
    assert found.tolist() == [-math.inf, MAX, pytest.approx(5.0), MAX]


def test_equal_splits_are_looked_up_once_and_put_back_in_order():
    rng = np.random.default_rng(0)
    feature = rng.integers(3, size=50)
    threshold = rng.choice([0.25, -1.0, 0.7], size=50)
    scaler = Step("s", StandardScaler().fit(rng.normal(5, 3, size=(40, 3))))
    together = largest_left([scaler], feature, threshold, 3)
    for i in range(50):
        assert largest_left([scaler], feature[i : i + 1], threshold[i : i + 1], 3)[0] == together[i]


@pytest.mark.parametrize("scaler", list(SCALERS))
@pytest.mark.parametrize("holes", [False, True])
def test_a_folded_forest_answers_bit_for_bit(scaler, holes):
    X = scaled_integers()
    if holes:
        X[np.random.default_rng(0).random(X.shape) < 0.1] = np.nan
    pipeline = pipeline_of(scaler, RandomForestClassifier(5, random_state=0)).fit(X, classes_of(X, 3))
    folded = fold(read(pipeline))
    assert folded.splits is not None
    key = key_of(folded.splits.threshold)
    missing = np.asarray(np.isnan(X).any(axis=0))[folded.splits.feature]
    rng = np.random.default_rng(1)
    for offset in (-2, -1, 0, 1, 2):
        rows = X[rng.integers(len(X), size=len(key))].astype(np.float32)
        rows[np.arange(len(key)), folded.splits.feature] = beside(key, offset, missing)
        np.testing.assert_array_equal(
            folded.estimator.predict_proba(rows), pipeline.predict_proba(rows.astype(np.float64))
        )


def test_scikit_learn_itself_answers_otherwise_for_float32_rows():
    """Why the reference widens rows first: the same rows in float32 take other ways through a scaled forest."""
    X = scaled_integers()
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(20, random_state=0)).fit(
        X, classes_of(X, 3)
    )
    rows = X.astype(np.float32)
    assert (pipeline.predict_proba(rows) != pipeline.predict_proba(rows.astype(np.float64))).any()


def test_the_pipeline_is_left_alone():
    X = scaled_integers()
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=0)).fit(
        X, classes_of(X, 3) - 5
    )
    before = [tree.threshold.copy() for tree in trees(pipeline[-1])]
    answers = pipeline.predict_proba(X)
    folded = fold(read(pipeline))
    assert folded.estimator.classes_.tolist() == [0, 1, 2]
    assert pipeline.classes_.tolist() == [-5, -4, -3]
    for was, tree in zip(before, trees(pipeline[-1]), strict=True):
        np.testing.assert_array_equal(was, tree.threshold)
    np.testing.assert_array_equal(answers, pipeline.predict_proba(X))


def test_splits_list_every_inner_node_in_tree_order():
    X = scaled_integers()
    pipeline = make_pipeline(MaxAbsScaler(), ExtraTreesRegressor(4, random_state=0)).fit(X, X[:, 0])
    splits = fold(read(pipeline)).splits
    assert splits is not None
    assert len(splits.node) == sum(int((tree.children_left >= 0).sum()) for tree in trees(pipeline[-1]))
    assert all(a <= b for a, b in pairwise(splits.tree.tolist()))
    assert splits.threshold.dtype == np.float32


@pytest.mark.parametrize(
    "scalers",
    [
        [StandardScaler()],
        [StandardScaler(with_mean=False)],
        [StandardScaler(with_std=False)],
        [MinMaxScaler((-2, 5))],
        [MaxAbsScaler()],
        [RobustScaler()],
        [RobustScaler(with_centering=False)],
        [RobustScaler(with_scaling=False)],
        [RobustScaler(), MinMaxScaler(), StandardScaler()],
    ],
    ids=lambda scalers: "-".join(str(scaler) for scaler in scalers),
)
def test_a_folded_linear_model_answers_to_the_last_digits(scalers):
    X = scaled_integers()
    pipeline = make_pipeline(*scalers, LogisticRegression(max_iter=2000)).fit(X, classes_of(X, 3))
    folded = fold(read(pipeline)).estimator
    np.testing.assert_allclose(
        folded.decision_function(X), pipeline.decision_function(X), rtol=1e-9, atol=1e-10
    )
    regression = make_pipeline(*scalers, LinearRegression(fit_intercept=False)).fit(X, X[:, 0])
    np.testing.assert_allclose(
        fold(read(regression)).estimator.predict(X)[:, 0], regression.predict(X), atol=1e-10
    )


def test_a_clipping_scaler_before_a_linear_model_is_refused(tmp_path):
    X = scaled_integers()
    pipeline = make_pipeline(MinMaxScaler(clip=True), LogisticRegression()).fit(X, classes_of(X, 2))
    with pytest.raises(UnsupportedPipeline, match=r"'minmaxscaler' .* clips, .* fit with clip=False"):
        convert(pipeline, X, tmp_path / "m.onnx")


def test_a_tree_alone_is_folded_too():
    X = scaled_integers()
    pipeline = make_pipeline(RobustScaler(), DecisionTreeClassifier(random_state=0)).fit(X, classes_of(X, 4))
    folded = fold(read(pipeline))
    rows = X.astype(np.float32)
    np.testing.assert_array_equal(folded.estimator.predict_proba(rows), pipeline.predict_proba(X))
