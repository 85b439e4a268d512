"""Folding thresholds into raw columns, exactly, and the rows that bear witness to a split."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import ExtraTreesRegressor, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler

from converters import signature, witness
from converters.lowering import lower
from converters.lowering.folding import LARGEST_KEYS, float_of, key_of, largest_left, missing_left, note_edges
from converters.lowering.graph import Fold, Value

pytestmark = pytest.mark.sampled(2)

MAX = {name: float(np.finfo(name).max) for name in LARGEST_KEYS}
DTYPES = list(LARGEST_KEYS)
SCALERS = {
    "standard": StandardScaler,
    "minmax": MinMaxScaler,
    "clip": lambda: MinMaxScaler(clip=True),
    "maxabs": MaxAbsScaler,
    "robust": RobustScaler,
    "chain": lambda: make_pipeline(RobustScaler(), MinMaxScaler(), StandardScaler()),
}


def fold_of(apply, *sources):
    return Fold(sources=np.array(sources, np.int64), apply=apply)


def thresholds(fold, column, limits, dtype="float32", narrow=True, width=1):
    return largest_left(
        fold, np.asarray(column), np.asarray(limits, np.float64), dtype, narrow=narrow, width=width
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_keep_the_order_of_floats_and_come_back(dtype):
    @given(st.lists(st.floats(-MAX[dtype], MAX[dtype], width=32 if dtype == "float32" else 64), min_size=2))
    def law(values):
        array = np.array(values, dtype)
        keys = key_of(array)
        np.testing.assert_array_equal(float_of(keys, dtype), array)
        np.testing.assert_array_equal(keys[1:] > keys[:-1], array[1:] > array[:-1])
        np.testing.assert_array_equal(keys[1:] == keys[:-1], array[1:] == array[:-1])

    law()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_keys_are_neighbouring_floats(dtype):
    largest = LARGEST_KEYS[dtype]
    keys = np.array([-largest, -8388608, -1, 0, 1, 8388607, 1065353216, largest - 1])
    up = np.nextafter(float_of(keys, dtype), np.array(np.inf, dtype))
    np.testing.assert_array_equal(float_of(keys + 1, dtype), up)
    assert float_of(np.array([largest + 1, -largest - 1]), dtype).tolist() == [math.inf, -math.inf]
    assert key_of(np.array([-0.0, 0.0], dtype)).tolist() == [0, 0]


@given(st.floats(-1e38, 1e38))
def test_without_a_step_it_is_the_largest_float32_not_above(threshold):
    [found] = thresholds(fold_of(np.array, 0), [0], [threshold])
    assert float(found) <= threshold
    assert float(np.nextafter(found, np.float32(np.inf))) > threshold


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=20, unique=True),
    scaler=st.sampled_from(sorted(SCALERS)),
    threshold=st.floats(-3, 3),
)
def test_the_raw_threshold_is_where_the_verdict_changes(dtype, narrow, values, scaler, threshold):
    fitted = SCALERS[scaler]().fit(np.array(values).reshape(-1, 1))

    def left(x):
        scaled = fitted.transform(np.array([[float(x)]]))[0, 0]
        with np.errstate(over="ignore"):
            return np.float64(np.float32(scaled) if narrow else scaled) <= threshold

    [found] = thresholds(fold_of(fitted.transform, 0), [0], [threshold], dtype, narrow)
    assert found.dtype == dtype
    # Next to the end of float64 a scaler overflows to an infinity, which it refuses to pass on.
    if abs(found) < MAX[dtype] / 1e30:
        assert left(found)
        assert not left(np.nextafter(found, np.array(np.inf, dtype)))


def test_splits_that_send_everything_one_way():
    clip = MinMaxScaler(clip=True).fit([[0.0], [10.0]])
    found = thresholds(fold_of(clip.transform, 0), [0] * 4, [-0.5, 1.0, 0.5, np.inf])
    assert found.tolist() == [-math.inf, math.inf, pytest.approx(5.0), math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_infinities_go_the_way_that_they_are_sent(dtype):
    limits = [np.inf, 1e300, MAX[dtype], -MAX[dtype], -np.inf]
    for narrow in (False, True):
        found = thresholds(fold_of(np.array, 0), [0] * 5, limits, dtype, narrow)
        for x in np.array([np.inf, MAX[dtype], -MAX[dtype], -np.inf], dtype):
            with np.errstate(over="ignore"):
                wanted = np.float64(np.float32(x) if narrow else x) <= limits
            assert (x <= found).tolist() == wanted.tolist()
    [bounded, beyond] = thresholds(
        fold_of(np.tanh, 0), [0, 0], [1.0, np.nextafter(1.0, 0)], dtype, narrow=False
    )
    assert bounded == np.inf
    assert beyond < 20


def test_columns_may_share_a_raw_column_and_stand_in_any_order():
    fold = fold_of(lambda raw: np.stack([raw[:, 2] * 2, raw[:, 0] + 1, raw[:, 2] - 3], axis=1), 2, 0, 2)
    found = thresholds(fold, [2, 0, 1, 0, 2, 2], [1.0, 1.0, 1.0, 8.0, 1.0, 0.0], width=3)
    # A float32 does not see what is added to 1, or to 8, below half of its last bit: these go left too.
    half = 2.0**-24
    assert found[2] == half
    np.testing.assert_allclose(found[[0, 1, 3, 4, 5]], [4.0, 0.5, 4.0, 4.0, 3.0], rtol=2e-7)
    for at, (column, limit) in enumerate([(2, 1.0), (0, 1.0), (1, 1.0), (0, 8.0), (2, 1.0), (2, 0.0)]):
        for value, left in ((found[at], True), (np.nextafter(found[at], np.float32(np.inf)), False)):
            assert (
                np.float32(fold.apply(np.full((1, 3), np.float64(value)))[0, column]) <= limit
            ) is np.bool_(left)


def test_a_nan_goes_where_the_steps_send_it():
    rows = np.array([[1.0], [np.nan], [4.0], [4.0]])
    imputed = fold_of(SimpleImputer().fit(rows).transform, 0)  # 3
    column, limits, own = np.zeros(2, np.int64), np.array([2.0, 5.0]), np.array([True, False])
    assert missing_left(imputed, column, limits, own, narrow=True, width=1).tolist() == [False, True]
    scaled = fold_of(StandardScaler().fit(rows).transform, 0)
    assert missing_left(scaled, column, limits, own, narrow=True, width=1).tolist() == [True, False]


def test_edges_are_noted_in_raw_columns_and_only_where_there_is_one():
    g: Any = SimpleNamespace(dtype="float32", width=3, edges=[])
    fold = fold_of(lambda raw: np.stack([raw[:, 2] * 2, raw[:, 0]], axis=1), 2, -1)
    x = Value("x", (None, 2), fold=fold)
    note_edges(g, x, 0, np.array([4.0, -6.0, np.nan, np.inf, 4.0]))
    note_edges(g, x, 1, np.array([4.0]))
    note_edges(g, Value("y", (None, 2)), 0, np.array([4.0]))
    [(column, values)] = g.edges
    assert (column, values.tolist(), values.dtype) == (2, [-3.0, 2.0], np.float32)


# --- witnesses --------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X = RNG.integers(-50, 50, size=(300, 4)) / 8.0
HOLES = np.where(RNG.random(X.shape) < 0.1, np.nan, X)


@pytest.mark.parametrize("rows", [X, HOLES], ids=["whole", "holes"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forest", [RandomForestClassifier, ExtraTreesRegressor])
def test_a_witness_reaches_its_split_and_changes_the_tree_there(rows, dtype, forest):
    pipeline = make_pipeline(StandardScaler(), forest(6, random_state=0)).fit(
        rows, (X[:, 0] + X[:, 1] > 0) * 1
    )
    [trees] = lower(signature.read(pipeline), dtype=dtype).ensembles
    inner = np.flatnonzero(trees.left >= 0)
    missing = np.isnan(rows).any(axis=0)
    raw = rows.astype(dtype)
    found, decisive = witness.find(trees, raw, missing)
    assert found.shape == decisive.shape == inner.shape
    assert decisive.mean() > 0.7
    for s, node in enumerate(inner):
        member = pipeline[-1].estimators_[trees.tree[node]]
        place = node - np.searchsorted(trees.tree, trees.tree[node])
        path = member.decision_path(pipeline[0].transform(raw.astype(np.float64)).astype(np.float32))
        reached = path[:, place].toarray()[:, 0].astype(bool)
        assert (found[s] >= 0) == reached.any()
        if found[s] >= 0:
            assert reached[found[s]]
        if decisive[s]:
            pair = raw[[found[s], found[s]]]
            key = key_of(trees.threshold[node : node + 1])
            column = trees.feature[node]
            for side in (0, 1):
                [pair[side, column]] = witness.beside(key, side, missing[[column]], dtype)
            value = member.tree_.predict(pipeline[0].transform(pair.astype(np.float64)).astype(np.float32))
            assert np.abs(value[0] - value[1]).max() > 0


def test_beside_a_threshold():
    largest = LARGEST_KEYS["float32"]
    key = np.array([0, largest, -largest - 1, largest, 5])
    missing = np.array([True, True, True, False, False])
    at, above = (witness.beside(key, offset, missing) for offset in (0, 1))
    assert at[:2].tolist() == [0.0, 0.0]
    assert np.isnan(at[2])
    assert at[3] == 0.0
    assert above[0] == np.nextafter(np.float32(0), np.float32(1))
    assert np.isnan(above[1])
    assert above[2:4].tolist() == [0.0, 0.0]
    assert key_of(above)[4] == 6
    assert at.dtype == np.float32
    assert witness.beside(key[:1], 1, missing[:1], "float64")[0] == 5e-324
