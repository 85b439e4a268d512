"""Scalers, normalisers, power and quantile transforms, and functions of numpy."""

import numpy as np
import pytest
from scipy import special
from sklearn.datasets import load_diabetes, load_wine
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    Binarizer,
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)

from converters.lowering.functions import _FUNCTIONS, _RISING
from converters.lowering.graph import Lowering
from converters.lowering.rules import RULES
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered, transformed

X = load_wine().data.astype(np.float32).astype(np.float64)
N = transformed.holes(X)


@pytest.mark.parametrize(
    "scaler",
    [
        StandardScaler(),
        StandardScaler(with_mean=False),
        StandardScaler(with_std=False),
        RobustScaler(),
        RobustScaler(with_centering=False, quantile_range=(5, 95)),
        MaxAbsScaler(),
        MinMaxScaler((-2, 3)),
        MinMaxScaler(clip=True),
    ],
    ids=str,
)
def test_scalers_round_as_scikit_learn_does_and_let_nan_pass(scaler):
    transformed.assert_same(scaler.fit(N), transformed.holes(transformed.hostile(X)))


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_rows_of_almost_nothing_are_not_normalised(norm):
    rows = np.vstack([transformed.hostile(X), np.full((1, 13), 1e-17), np.full((1, 13), 1e-10)])
    fitted = Normalizer(norm=norm).fit(X)
    transformed.assert_same(fitted, rows, rtol=1e-15)
    assert lowered.transform(fitted, rows)[-2:, 0] == pytest.approx(transformed.wanted(fitted, rows)[-2:, 0])


def test_the_threshold_itself_counts_as_zero_and_is_an_edge():
    threshold = float(X[0, 0])
    fitted = Binarizer(threshold=threshold).fit(X)
    transformed.assert_same(fitted, transformed.hostile(X))
    g = Lowering(width=13, dtype="float32", rules=RULES)
    g.call(fitted, "transform", g.start())
    assert [(column, values.tolist()) for column, values in g.edges] == [(j, [threshold]) for j in range(13)]


@pytest.mark.parametrize("standardize", [True, False])
def test_yeo_johnson(standardize):
    fitted = PowerTransformer(standardize=standardize).fit(N)
    transformed.assert_same(fitted, transformed.holes(transformed.hostile(X)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lambdas", [0.0, 2.0, 1.0, -3.0, 1e-17])
def test_yeo_johnson_at_its_special_exponents(lambdas):
    fitted = PowerTransformer(standardize=False).fit(X)
    fitted.lambdas_ = np.full(13, lambdas)
    transformed.assert_same(fitted, transformed.hostile(X), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("lambdas", [None, 0.0, -1.5])
def test_box_cox(lambdas):
    positive = np.where(N <= 0, 0.5, N)
    fitted = PowerTransformer(method="box-cox").fit(positive)
    if lambdas is not None:
        fitted.lambdas_ = np.full(13, lambdas)
    rows = np.vstack([positive, positive * 100, positive * 1e-6])
    transformed.assert_same(fitted, rows, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("quantiles", [1, 5, 30, 178])
def test_uniform_quantiles_are_those_of_numpy_interp(quantiles):
    fitted = QuantileTransformer(n_quantiles=quantiles).fit(N)
    rows = np.vstack([transformed.holes(transformed.hostile(X)), fitted.quantiles_])
    transformed.assert_same(fitted, rows)


def test_repeated_quantiles_take_the_mean_of_both_directions():
    counts = np.repeat(np.array([[0.0], [1.0], [5.0], [5.5]]), [40, 30, 20, 10], axis=0)
    fitted = QuantileTransformer(n_quantiles=100).fit(counts)
    rows = np.array(
        [[-1.0], [0.0], [0.5], [1.0], [np.nextafter(np.float32(1), 2)], [5.0], [5.2], [5.5], [9.0]]
    )
    transformed.assert_same(fitted, rows)
    assert 0 < lowered.transform(fitted, rows)[3, 0] < 1


@pytest.mark.parametrize("quantiles", [5, 178])
def test_normal_quantiles_are_clipped_where_scikit_learn_clips(quantiles):
    fitted = QuantileTransformer(n_quantiles=quantiles, output_distribution="normal").fit(N)
    rows = np.vstack([transformed.holes(transformed.hostile(X)), fitted.quantiles_])
    transformed.assert_same(fitted, rows, rtol=1e-14, atol=1e-14)
    assert np.nanmax(lowered.transform(fitted, rows)) == pytest.approx(5.199337582605575)


ARGUMENTS = np.concatenate(
    [
        np.random.default_rng(0).normal(size=2000) * 10.0 ** np.random.default_rng(1).integers(-12, 4, 2000),
        np.linspace(-1, 1, 201),
        np.arange(-5, 5, 0.5),
        [np.nan, 0.0, -0.0, 1e30, -1e30, 1e-40, 88.0, -88.0, 700.0, 710.0, -750.0, 1e8, 1e9],
    ]
)[:, None]


@pytest.mark.parametrize("function", _FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_of_numpy(function):
    trigonometric = function in (np.sin, np.cos, np.tan)
    fitted = FunctionTransformer(function).fit(ARGUMENTS)
    transformed.assert_same(fitted, ARGUMENTS, rtol=5e-13 if trigonometric else 2e-15)


@pytest.mark.parametrize("function", _RISING, ids=lambda f: f.__name__)
def test_functions_that_carry_a_fold_never_decrease(function):
    rows = np.sort(ARGUMENTS[~np.isnan(ARGUMENTS)])
    with np.errstate(all="ignore"):
        made = function(rows)
    assert (made[1:] >= made[:-1]).all()
    g = Lowering(width=1, dtype="float32", rules=RULES)
    assert g.call(FunctionTransformer(function).fit(rows[:, None]), "transform", g.start()).fold is not None


@pytest.mark.parametrize("function", sorted(set(_FUNCTIONS) - set(_RISING), key=str), ids=str)
def test_functions_that_fall_or_lack_values_carry_no_fold(function):
    g = Lowering(width=1, dtype="float32", rules=RULES)
    assert g.call(FunctionTransformer(function).fit(X[:, :1]), "transform", g.start()).fold is None


def test_no_function_at_all_passes_the_columns():
    transformed.assert_same(FunctionTransformer().fit(X), transformed.holes(X))


@pytest.mark.parametrize("function", [lambda x: x, np.nan_to_num, np.add, special.erf])
def test_other_functions_are_refused(function):
    with pytest.raises(UnsupportedPipeline, match="use a numpy ufunc"):
        lowered.transform(FunctionTransformer(function), X)


def test_arguments_of_a_function_are_refused():
    with pytest.raises(UnsupportedPipeline, match="kw_args"):
        lowered.transform(FunctionTransformer(np.log, kw_args={"where": True}), X)


def test_text_columns_are_refused():
    g = Lowering(width=1, dtype="float32", rules=RULES, vocabularies=(("a", "b"),))
    for step in (StandardScaler(), Normalizer(), MinMaxScaler(), Binarizer()):
        with pytest.raises(UnsupportedPipeline, match="text or categories"):
            g.call(step.fit(X[:, :1]), "transform", g.start())


@pytest.mark.parametrize(
    "steps",
    [
        (StandardScaler(), FunctionTransformer(np.tanh)),
        (PowerTransformer(), MinMaxScaler()),
        (QuantileTransformer(n_quantiles=50), Normalizer()),
        (MinMaxScaler(), FunctionTransformer(np.log1p), Binarizer(threshold=0.3)),
    ],
)
def test_chains_in_front_of_a_model(steps):
    data = load_diabetes()
    pipeline = make_pipeline(*steps, LinearRegression()).fit(data.data, data.target)
    lowered.assert_equal(pipeline, data.data[:150])
