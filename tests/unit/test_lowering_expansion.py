"""Bins, polynomials and splines."""

import numpy as np
import pytest
from sklearn.datasets import load_wine
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import KBinsDiscretizer, PolynomialFeatures, SplineTransformer, StandardScaler

from converters.lowering.graph import Lowering
from converters.lowering.rules import RULES
from edge_runtime.contract.errors import UnsupportedPipeline
from edge_runtime.contract.manifest import agrees
from tests.support import lowered, transformed

X, Y = load_wine(return_X_y=True)
X = X.astype(np.float32).astype(np.float64)
FEW = X[:, :4]


@pytest.mark.parametrize("encode", ["ordinal", "onehot", "onehot-dense"])
@pytest.mark.parametrize(
    "options",
    [
        {"n_bins": 3, "strategy": "uniform"},
        {"n_bins": 2, "strategy": "kmeans"},
        {"n_bins": 40, "strategy": "uniform"},
        {"n_bins": [2, 3, 34, 35], "strategy": "uniform", "dtype": np.float32},
        {"n_bins": 12, "strategy": "quantile", "quantile_method": "averaged_inverted_cdf"},
    ],
    ids=str,
)
def test_values_on_an_edge_belong_to_the_upper_bin(encode, options):
    fitted = KBinsDiscretizer(encode=encode, **options).fit(FEW)
    longest = max(len(edges) for edges in fitted.bin_edges_)
    on_edges = np.column_stack([np.resize(edges, longest) for edges in fitted.bin_edges_])
    transformed.assert_same(fitted, np.vstack([transformed.hostile(FEW), transformed.hostile(on_edges)]))


def test_bins_of_scaled_columns_note_raw_edges():
    pipeline = make_pipeline(StandardScaler(), KBinsDiscretizer(4, encode="ordinal", strategy="uniform")).fit(
        FEW
    )
    g = Lowering(width=4, dtype="float32", rules=RULES)
    made = g.call(pipeline, "transform", g.start())
    assert [(column, len(values)) for column, values in g.edges] == [(j, 3) for j in range(4)]
    column, values = g.edges[2]
    rows = np.tile(FEW[:1], (2, 1))
    rows[:, column] = values[0], np.nextafter(values[0], np.float32(np.inf))
    assert pipeline.transform(rows)[:, column].tolist() == [0.0, 1.0]
    assert made.fold is not None
    assert made.fold.complete


@pytest.mark.parametrize("degree", [0, 1, 2, 3, (2, 3), (0, 3), (3, 3), 5])
@pytest.mark.parametrize("interaction_only", [False, True])
@pytest.mark.parametrize("include_bias", [False, True])
def test_products_are_multiplied_in_the_same_order(degree, interaction_only, include_bias):
    options = {"interaction_only": interaction_only, "include_bias": include_bias or degree == 0}
    transformed.assert_same(PolynomialFeatures(degree, **options).fit(FEW), transformed.hostile(FEW))


UNIFORM = {"knots": "uniform"}
QUANTILE = {"knots": "quantile", "include_bias": False, "sparse_output": True}


@pytest.mark.covering
@pytest.mark.parametrize("extrapolation", ["constant", "linear", "continue", "periodic"])
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
@pytest.mark.parametrize("options", [UNIFORM, QUANTILE], ids=str)
def test_splines(extrapolation, degree, options):
    fitted = SplineTransformer(6, degree=degree, extrapolation=extrapolation, **options).fit(FEW)
    transformed.assert_same(fitted, transformed.hostile(FEW))


@pytest.mark.parametrize(
    ("extrapolation", "options"),
    [
        ("linear", UNIFORM),
        ("linear", QUANTILE),
        ("continue", UNIFORM),
        ("continue", QUANTILE),
        ("periodic", UNIFORM),
    ],
    ids=str,
)
def test_splines_that_are_steps(extrapolation, options):
    fitted = SplineTransformer(6, degree=0, extrapolation=extrapolation, **options).fit(FEW)
    transformed.assert_same(fitted, transformed.hostile(FEW))


@pytest.mark.parametrize(
    ("extrapolation", "options"),
    [("constant", UNIFORM), ("constant", QUANTILE), ("periodic", QUANTILE)],
    ids=str,
)
def test_steps_that_scikit_learn_cannot_apply_are_refused(extrapolation, options):
    fitted = SplineTransformer(6, degree=0, extrapolation=extrapolation, **options).fit(FEW)
    with pytest.raises(UnsupportedPipeline, match="scikit-learn cannot apply"):
        lowered.transform(fitted, FEW)


@pytest.mark.parametrize("extrapolation", ["constant", "linear", "continue", "periodic"])
def test_a_missing_value_has_no_spline(extrapolation):
    holes = transformed.holes(FEW)
    fitted = SplineTransformer(50, extrapolation=extrapolation, handle_missing="zeros").fit(holes)
    rows = transformed.holes(transformed.hostile(FEW))
    transformed.assert_same(fitted, rows)
    assert not lowered.transform(fitted, np.full((1, 4), np.nan)).any()


def test_knots_that_coincide():
    counts = np.repeat(np.array([[0.0], [1.0], [2.0], [7.0]]), [60, 30, 8, 2], axis=0)
    fitted = SplineTransformer(6, knots="quantile", degree=2).fit(counts)
    assert (np.diff(fitted.bsplines_[0].t) == 0).any()
    transformed.assert_same(fitted, transformed.hostile(np.arange(-1, 8, 0.25)[:, None]))


@pytest.mark.parametrize("options", [{}, {"sparse_output": True}, {"degree": 0}, {"knots": "quantile"}])
def test_rows_beyond_the_knots_that_the_splines_raise_for_have_no_score(options):
    fitted = make_pipeline(SplineTransformer(extrapolation="error", **options), LinearRegression())
    fitted.fit(FEW, X[: len(FEW), 5])
    low, high = FEW.min(axis=0), FEW.max(axis=0)
    edges = np.tile(FEW[:1], (8, 1))
    edges[0, 0], edges[1, 0], edges[2, 0], edges[3, 0] = low[0], high[0], np.nextafter(low[0], -9e9), 1e30
    edges[4, 1], edges[5, 1], edges[6, 1], edges[7, 1] = low[1], high[1], -1e30, np.nextafter(high[1], 9e9)
    found = lowered.run(fitted, edges, dtype="float64").scores[:, 0]
    taken = np.array([True, True, False, False] * 2)
    assert np.array_equal(np.isnan(found), ~taken)
    assert agrees(found[taken], fitted.predict(edges[taken])).all()
    for row in edges[~taken]:
        with pytest.raises(ValueError, match=r"limits of the knots|[Oo]ut of bounds"):
            fitted.predict(row[None])


@pytest.mark.parametrize(
    "step",
    [
        KBinsDiscretizer(5, strategy="uniform"),
        PolynomialFeatures(2),
        SplineTransformer(extrapolation="linear"),
    ],
    ids=str,
)
def test_in_front_of_models(step):
    scaled = make_pipeline(StandardScaler(), step)
    lowered.assert_equal(make_pipeline(scaled, LogisticRegression(max_iter=5000)).fit(FEW, Y), FEW)
    lowered.assert_equal(make_pipeline(scaled, LinearRegression()).fit(FEW, X[:, 5:7]), FEW)
