"""Graphs in fewer nodes give the same answers, to the bit where nothing else is said."""

import numpy as np
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from converters import convert
from converters import signature as signatures
from converters import table as tables
from converters.fusing import fused
from converters.lowering import lower
from converters.optimize import attributes, optimise
from edge_runtime.contract.manifest import agrees
from tests.parity.cases import classes_of, scaled_integers
from tests.support import lowered


@pytest.fixture(scope="module")
def X():
    return scaled_integers(200)


def operators(found):
    return [node.op_type for node in found.model.graph.node]


BOOSTED = [
    pytest.param(GradientBoostingClassifier(n_estimators=12, random_state=0), 2, id="gradient"),
    pytest.param(GradientBoostingClassifier(n_estimators=12, random_state=0), 3, id="gradient, three"),
    pytest.param(
        GradientBoostingClassifier(loss="exponential", n_estimators=12, random_state=0), 2, id="exponential"
    ),
    pytest.param(HistGradientBoostingClassifier(max_iter=12, random_state=0), 2, id="histogram"),
    pytest.param(HistGradientBoostingClassifier(max_iter=12, random_state=0), 3, id="histogram, three"),
]


@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
@pytest.mark.parametrize(("model", "classes"), BOOSTED)
def test_boosted_classifiers_are_one_ensemble(model, classes, arithmetic, X):
    model = clone(model).fit(X, classes_of(X, classes))
    found = lowered.assert_equal(model, X, arithmetic=arithmetic)
    wide = ["Cast"] if arithmetic == "float64" else []
    assert operators(found) == [*wide, "TreeEnsembleClassifier"]
    sure = np.abs(np.sort(found.scores, axis=1)[:, -1] - np.sort(found.scores, axis=1)[:, -2]) > 1e-5
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(found.labels[sure], found.scores[sure].argmax(axis=1))


def test_a_sum_of_exactly_nothing_is_the_second_class_where_scikit_learn_says_so(X):
    """Two classes at even odds: of a row that every tree leaves at 0 the decision is 0, and that counts as positive."""
    y = np.arange(len(X)) % 2
    model = GradientBoostingClassifier(n_estimators=2, max_depth=1, random_state=0).fit(X, y)
    assert model.init_.class_prior_.tolist() == [0.5, 0.5]
    for tree in model.estimators_[:, 0]:
        tree.tree_.value[tree.tree_.children_left < 0] = np.array([[[-1.0]], [[0.0]]])
    found = lowered.run(model, X, arithmetic="float32")
    none = model.decision_function(X.astype(np.float32)) == 0
    assert none.any()
    assert not none.all()
    assert operators(found) == ["TreeEnsembleClassifier"]
    np.testing.assert_array_equal(found.labels, model.predict(X.astype(np.float32)))


def test_leaves_without_a_sign_keep_the_long_way(X):
    """The classifier operator takes sums of leaves that are all positive for probabilities."""
    model = GradientBoostingClassifier(n_estimators=3, random_state=0).fit(X, classes_of(X, 2))
    for tree in model.estimators_[:, 0]:
        tree.tree_.value[:] = np.abs(tree.tree_.value)
    found = lowered.assert_equal(model, X, arithmetic="float32")
    assert operators(found)[0] == "TreeEnsembleRegressor"
    assert "Sigmoid" in operators(found)


def test_boosting_that_starts_from_an_estimator_keeps_the_long_way(X):
    model = GradientBoostingClassifier(n_estimators=3, init=LogisticRegression(max_iter=5000), random_state=0)
    found = lowered.assert_equal(model.fit(X, classes_of(X, 2)), X, arithmetic="float32")
    assert "TreeEnsembleClassifier" not in operators(found)


def test_a_boosted_classifier_is_proven(X, tmp_path):
    rows = X.copy()
    rows[::7, 1] = np.nan
    model = HistGradientBoostingClassifier(max_iter=10, random_state=0).fit(rows, classes_of(X, 2))
    artifact = convert(model, rows, tmp_path / "m.onnx", probes=1000)
    assert artifact.report.passed
    assert artifact.report.arithmetic == "float32"


def test_columns_of_columns_are_taken_once(X):
    frame = pd.DataFrame(X, columns=list("abcde"))
    frame["place"] = np.array(["in", "out", "off"])[np.arange(len(X)) % 3]
    frame["side"] = np.array(["left", "right"])[np.arange(len(X)) % 2]
    columns = make_column_transformer(
        (StandardScaler(), ["b", "d"]),
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), ["side", "place"]),
    )
    pipeline = make_pipeline(columns, LogisticRegression(max_iter=5000)).fit(frame, classes_of(X, 3))
    signature = signatures.read(pipeline)
    table = tables.read(signature, frame)
    g = lower(signature, vocabularies=table.vocabularies)
    model = optimise(g.graph(), dtype="float32", width=7, outputs=1)
    kinds = [node.op_type for node in model.graph.node]
    before = [node.op_type for node in g.graph().node]
    assert (before.count("Concat"), kinds.count("Concat")) == (2, 1)
    assert (before.count("Reshape"), kinds.count("Reshape")) == (2, 0)
    by_axis = [attributes(node)["axis"] for node in model.graph.node if node.op_type == "Gather"]
    assert by_axis.count(1) == 3  # the two numbers, and each category
    rows = table.rows("float32")
    rows[:3, 5:] = [[-1.0, 0.0], [0.0, -1.0], [-1.0, -1.0]]
    labels, scores = lowered.session_of(model).run(None, {"input": rows})
    wanted = pipeline.predict_proba(table.restore(rows))
    assert agrees(scores, wanted).all()
    np.testing.assert_array_equal(labels, wanted.argmax(axis=1))


def graph_of(nodes, **constants):
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return fused(nodes, tensors, source="input", label="label", score="score")


def test_a_concat_that_others_read_stays():
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["ab"], axis=1),
        helper.make_node("Concat", ["ab", "c"], ["abc"], axis=1),
        helper.make_node("Neg", ["ab"], ["label"]),
        helper.make_node("Cast", ["abc"], ["score"], to=TensorProto.FLOAT),
    ]
    found, _ = graph_of(nodes)
    assert list(found[1].input) == ["ab", "c"]


def test_a_column_of_something_else_than_the_input_keeps_its_reshape():
    """Whether that is a matrix is not known here: a third axis would go into the reshape."""
    nodes = [
        helper.make_node("Exp", ["input"], ["x"]),
        helper.make_node("Gather", ["x", "one"], ["column"], axis=1),
        helper.make_node("Reshape", ["column", "all"], ["score"]),
    ]
    found, _ = graph_of(nodes, one=np.array([1]), all=np.array([-1]))
    assert [node.op_type for node in found] == ["Exp", "Gather", "Reshape"]
