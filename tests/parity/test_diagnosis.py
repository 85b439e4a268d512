"""A failed proof names the step whose graph is wrong, wherever it stands."""

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, StandardScaler

from converters import artifact as artifacts
from converters import convert, gate
from converters.lowering.rules import RULES
from converters.parity import ParityFailure
from edge_runtime.contract.errors import UnsupportedPipeline

IRIS = load_iris()


@pytest.fixture
def wrong(monkeypatch):
    """Makes the rule of one method of one estimator wrong by a little."""

    def spoil(kind, method):
        rule = RULES[kind, method]
        monkeypatch.setitem(
            RULES, (kind, method), lambda g, fitted, x: g.mul(rule(g, fitted, x), np.array(1.01))
        )

    return spoil


def failure(pipeline, X, folder, probes=500):
    with pytest.raises(ParityFailure) as caught:
        convert(pipeline, X, folder / "m.onnx", probes=probes)
    return str(caught.value)


def test_a_step_in_the_middle_is_named_with_a_remedy(wrong, tmp_path):
    pipeline = make_pipeline(MinMaxScaler(), StandardScaler(), LogisticRegression(max_iter=500))
    wrong(StandardScaler, "transform")
    said = failure(pipeline.fit(IRIS.data, IRIS.target), IRIS.data, tmp_path)
    assert said.startswith("step 'standardscaler' (StandardScaler) disagrees with its graph: ")
    assert "worst row" in said
    assert "use another step" in said


def test_the_last_step_is_named_where_all_before_are_right(wrong, tmp_path):
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    wrong(LogisticRegression, "predict_proba")
    said = failure(pipeline.fit(IRIS.data, IRIS.target), IRIS.data, tmp_path)
    assert said.startswith("step 'logisticregression' (LogisticRegression)")


def test_an_estimator_alone_is_named_by_its_type(wrong, tmp_path):
    wrong(LogisticRegression, "predict_proba")
    fitted = LogisticRegression(max_iter=500).fit(IRIS.data, IRIS.target)
    assert failure(fitted, IRIS.data, tmp_path).startswith("LogisticRegression disagrees")


def test_a_step_inside_a_search_inside_a_pipeline_is_named_by_its_path(wrong, tmp_path):
    inner = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    search = GridSearchCV(inner, {"logisticregression__C": [0.1, 1.0]}, cv=2)
    pipeline = make_pipeline(MinMaxScaler(), search).fit(IRIS.data, IRIS.target)
    wrong(StandardScaler, "transform")
    said = failure(pipeline, IRIS.data, tmp_path)
    assert said.startswith("step 'gridsearchcv__standardscaler' (StandardScaler)")


def test_a_step_over_a_frame_with_text_is_named(wrong, tmp_path):
    rng = np.random.default_rng(1)
    X = pd.DataFrame({"size": rng.normal(size=90), "kind": rng.choice(["a", "b", "c"], 90)})
    columns = ColumnTransformer([("number", StandardScaler(), ["size"]), ("text", OneHotEncoder(), ["kind"])])
    pipeline = make_pipeline(columns, LogisticRegression()).fit(X, X["size"] > 0)
    wrong(StandardScaler, "transform")
    assert failure(pipeline, X, tmp_path).startswith("step 'columntransformer' (ColumnTransformer)")


# ── what nobody thought of ends like any other refusal ─────────────────────────────────────────────────


def refusal(pipeline, X, folder):
    with pytest.raises(UnsupportedPipeline) as caught:
        convert(pipeline, X, folder / "m.onnx", probes=500)
    assert list(folder.iterdir()) == []
    return str(caught.value)


def test_a_rule_that_fails_refuses_its_step(monkeypatch, tmp_path):
    def fails(g, fitted, x):
        raise ZeroDivisionError("a state of its own")

    monkeypatch.setitem(RULES, (StandardScaler, "transform"), fails)
    pipeline = make_pipeline(MinMaxScaler(), StandardScaler(), LogisticRegression()).fit(
        IRIS.data, IRIS.target
    )
    said = refusal(pipeline, IRIS.data, tmp_path)
    assert said.startswith("step 'standardscaler' (StandardScaler) is in a state that the rule for transform")
    assert "ZeroDivisionError: a state of its own" in said


def test_a_graph_that_onnx_runtime_does_not_load_is_refused(monkeypatch, tmp_path):
    def odd(g, fitted, x):
        return g.node("MatMul", [x, np.zeros((7, 3))], (None, 3))

    monkeypatch.setitem(RULES, (LogisticRegression, "predict_proba"), odd)
    fitted = LogisticRegression(max_iter=500).fit(IRIS.data, IRIS.target)
    assert "LogisticRegression gives no usable file: " in refusal(fitted, IRIS.data, tmp_path)


def test_a_file_that_is_too_large_is_refused_before_the_proof(monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "MAX_ARTIFACT_BYTES", 1000)
    monkeypatch.setattr(artifacts, "compare", None)
    fitted = LogisticRegression(max_iter=500).fit(IRIS.data, IRIS.target)
    assert "larger than the 1000 bytes allowed" in refusal(fitted, IRIS.data, tmp_path)


def test_where_only_values_far_out_go_wrong_the_remedy_bounds_them_and_helps(tmp_path):
    X, y = load_breast_cancer(return_X_y=True)
    search = [PCA(10), KNeighborsClassifier()]
    said = failure(make_pipeline(StandardScaler(), *search).fit(X, y), X, tmp_path, probes=3000)
    assert "far beyond the training rows" in said
    assert "MinMaxScaler(clip=True)" in said
    bounded = make_pipeline(MinMaxScaler(clip=True), *search).fit(X, y)
    assert convert(bounded, X, tmp_path / "m.onnx", probes=3000).report.passed
