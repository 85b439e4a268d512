"""Missing values filled in or marked, in columns of numbers and of text."""

import numpy as np
import pytest
from onnx import helper
from onnxruntime import InferenceSession
from sklearn.datasets import load_wine
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler

from converters.lowering.graph import Lowering
from converters.lowering.rules import RULES
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered, transformed

X, Y = load_wine(return_X_y=True)
X = X.astype(np.float32).astype(np.float64)
N = transformed.holes(X)
ROWS = transformed.holes(transformed.hostile(X))


@pytest.mark.parametrize("strategy", ["mean", "median", "most_frequent", "constant"])
@pytest.mark.parametrize("add_indicator", [False, True])
@pytest.mark.parametrize("keep_empty_features", [False, True])
def test_columns_without_values_are_dropped_or_kept(strategy, add_indicator, keep_empty_features):
    data = N.copy()
    data[:, 2] = np.nan
    data[:, 4] = X[:, 4]  # never missing in training: no indicator
    fitted = SimpleImputer(
        strategy=strategy, add_indicator=add_indicator, keep_empty_features=keep_empty_features
    ).fit(data)
    transformed.assert_same(fitted, ROWS)


@pytest.mark.parametrize("placeholder", [-1, 0.0, float(X[0, 0])])
def test_a_number_stands_for_missing(placeholder):
    data = X.copy()
    data[::7, 3] = placeholder
    fitted = SimpleImputer(missing_values=placeholder, add_indicator=True).fit(data)
    rows = np.vstack([transformed.hostile(X), np.full((1, 13), placeholder)])
    transformed.assert_same(fitted, rows)
    g = Lowering(width=13, dtype="float32", rules=RULES)
    assert g.call(fitted, "transform", g.start()).fold is None  # a filled placeholder is out of order
    assert (3, [placeholder]) in [(column, values.tolist()) for column, values in g.edges]


def test_statistics_take_the_type_of_the_training_data():
    fitted = SimpleImputer().fit(N.astype(np.float32))
    transformed.assert_same(fitted, ROWS)
    whole = SimpleImputer(missing_values=7, strategy="most_frequent").fit(np.arange(12).reshape(4, 3))
    transformed.assert_same(whole, np.arange(24.0).reshape(8, 3))


@pytest.mark.parametrize(
    "options", [{}, {"features": "all"}, {"missing_values": 0.0, "sparse": True}], ids=str
)
def test_indicators(options):
    missing = options.get("missing_values", np.nan)
    data, rows = (np.where(np.isnan(a), missing, a) for a in (N, ROWS))
    transformed.assert_same(MissingIndicator(error_on_new=False, **options).fit(data), rows)


def test_nothing_to_mark_is_refused():
    with pytest.raises(UnsupportedPipeline, match="marks no column"):
        lowered.transform(MissingIndicator(error_on_new=False).fit(X), X)


def test_a_column_of_nan_alone_is_refused():
    fitted = SimpleImputer().fit(np.full((3, 1), np.nan))
    with pytest.raises(UnsupportedPipeline, match="keeps no column"):
        lowered.transform(fitted, np.full((3, 1), np.nan))


@pytest.mark.parametrize("add_indicator", [False, True])
def test_in_front_of_models(add_indicator):
    imputer = SimpleImputer(add_indicator=add_indicator)
    linear = make_pipeline(imputer, StandardScaler(), LogisticRegression()).fit(N, Y)
    lowered.assert_equal(linear, ROWS[:400])


def test_in_front_of_a_forest():
    both = make_union(SimpleImputer(), MissingIndicator(error_on_new=False))
    for step in (SimpleImputer(strategy="median"), SimpleImputer(missing_values=0.0), both):
        data = np.where(np.isnan(N), 0.0, N) if getattr(step, "missing_values", None) == 0.0 else N
        rows = np.where(np.isnan(ROWS), 0.0, ROWS) if data is not N else ROWS
        forest = RandomForestClassifier(10, random_state=0)
        lowered.assert_equal(make_pipeline(step, forest).fit(data, Y), rows)


def coded(fitted, codes, vocabularies):
    """(rows, vocabularies) that the graph of ``fitted`` makes of codes (n, F)."""
    g = Lowering(width=len(vocabularies), dtype="float32", rules=RULES, vocabularies=vocabularies)
    made = g.call(fitted, "transform", g.start())
    graph = g.graph()
    graph.input.append(helper.make_tensor_value_info("input", 1, ["n", len(vocabularies)]))
    graph.output.append(helper.make_tensor_value_info(made.name, 11, ["n", made.width]))
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": np.asarray(codes, np.float32)})[0], made.vocabularies


WORDS = np.array([["red", 1.5], ["blue", 2.5], [np.nan, np.nan], ["red", 2.5]], dtype=object)
COLOURS = ("blue", "red")


def test_text_takes_the_code_of_the_most_frequent_value():
    fitted = SimpleImputer(strategy="most_frequent", add_indicator=True).fit(WORDS)
    made, vocabularies = coded(fitted, [[np.nan, np.nan], [0, 7], [-1, 1]], (COLOURS, None))
    assert made.tolist() == [[1.0, 2.5, 1.0, 1.0], [0.0, 7.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]]
    assert vocabularies == (COLOURS, None, None, None)


def test_a_new_word_joins_the_vocabulary():
    fitted = SimpleImputer(strategy="constant", fill_value="none").fit(WORDS[:, :1])
    made, vocabularies = coded(fitted, [[np.nan], [0], [-1]], (COLOURS,))
    assert made.tolist() == [[2.0], [0.0], [-1.0]]
    assert vocabularies == ((*COLOURS, "none"),)


def test_a_word_for_missing_must_be_a_known_one():
    words = np.array([["red"], ["?"], ["red"]], dtype=object)
    fitted = SimpleImputer(strategy="most_frequent", missing_values="?").fit(words)
    made, _ = coded(fitted, [[0], [1], [-1]], (("?", "red"),))
    assert made.tolist() == [[1.0], [1.0], [-1.0]]
    with pytest.raises(UnsupportedPipeline, match="no known category"):
        coded(fitted, [[0]], (("red",),))


def test_a_word_cannot_fill_a_column_of_numbers():
    fitted = SimpleImputer(strategy="constant", fill_value="none").fit(WORDS)
    with pytest.raises(UnsupportedPipeline, match="a column of numbers"):
        coded(fitted, [[0, np.nan]], (COLOURS, None))
