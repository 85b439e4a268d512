"""Searches among training rows: proven where they can be followed, refused with a remedy where they cannot."""

import numpy as np
import pytest
from sklearn.impute import KNNImputer
from sklearn.linear_model import Ridge
from sklearn.neighbors import (
    KNeighborsClassifier,
    KNeighborsRegressor,
    LocalOutlierFactor,
    RadiusNeighborsClassifier,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from converters import reference
from converters.artifact import convert
from converters.parity import ParityFailure
from converters.probe_inputs import LEAST_EQUIDISTANT

pytestmark = pytest.mark.sampled(2)

RNG = np.random.default_rng(0)
GRID = RNG.integers(0, 5, (300, 4)).astype(float)
KIND = RNG.integers(0, 3, 300)
PROBES = 1200


@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "model",
    [
        KNeighborsClassifier(),
        KNeighborsClassifier(7, weights="distance", p=1),
        make_pipeline(StandardScaler(), KNeighborsClassifier(3, algorithm="kd_tree")),
        KNeighborsRegressor(9),
    ],
    ids=["classes", "weights", "scaled", "numbers"],
)
def test_grids_are_proven(model, dtype, tmp_path):
    made = convert(model.fit(GRID, KIND), GRID, tmp_path / "m.onnx", probes=PROBES, input_dtype=dtype)
    tried = made.report.by_probe_kind
    assert tried["equidistant"].rows == 2 * max(PROBES // 10, LEAST_EQUIDISTANT), (
        "asked for at once, and few at a time"
    )
    assert tried["far"].rows == PROBES // 40


def test_outliers_are_proven(tmp_path):
    model = LocalOutlierFactor(novelty=True).fit(GRID)
    assert convert(model, GRID, tmp_path / "m.onnx", probes=PROBES).report.passed


def test_an_order_of_the_processor_is_refused(tmp_path):
    """Fitted on whole numbers, brute force takes numpy's argpartition; a tree does not."""
    whole = GRID.astype(int)
    with pytest.raises(ParityFailure, match=r"int64 rows.*use algorithm='kd_tree'"):
        convert(
            KNeighborsRegressor(algorithm="brute").fit(whole, KIND), whole, tmp_path / "m.onnx", probes=PROBES
        )
    model = KNeighborsRegressor(algorithm="kd_tree").fit(whole, KIND)
    assert convert(model, whole, tmp_path / "m.onnx", probes=PROBES).report.passed


def test_an_answer_that_hangs_on_the_question_is_refused(tmp_path, monkeypatch):
    """The pipeline is asked for few rows at a time as well; here that gives another answer, on any machine."""

    def ask(signature, X, *, threads=False):
        labels, scores = original(signature, X)
        return labels, scores + threads

    original = reference.ask
    monkeypatch.setattr(reference, "ask", ask)
    model = KNeighborsRegressor(algorithm="brute").fit(GRID, KIND)
    with pytest.raises(ParityFailure, match=r"asked for at once.*use algorithm='kd_tree'"):
        convert(model, GRID, tmp_path / "m.onnx", probes=PROBES)


def test_imputed_from_neighbours(tmp_path):
    rows = np.random.default_rng(0).normal(size=(200, 4)).cumsum(axis=1)
    rows[np.random.default_rng(1).random(rows.shape) < 0.1] = np.nan
    model = make_pipeline(KNNImputer(weights="distance"), StandardScaler(), Ridge())
    made = convert(model.fit(rows, np.arange(200.0)), rows, tmp_path / "m.onnx", probes=PROBES)
    assert made.report.by_probe_kind["missing"].rows > 0


def test_imputed_from_equally_far_neighbours_is_refused(tmp_path):
    rows = np.where(np.random.default_rng(1).random(GRID.shape) < 0.1, np.nan, GRID)
    model = make_pipeline(KNNImputer(), Ridge()).fit(rows, KIND)
    with pytest.raises(ParityFailure, match=r"'knnimputer'.*the processor's; use SimpleImputer"):
        convert(model, rows, tmp_path / "m.onnx", probes=PROBES)


def test_rows_without_neighbours_cost_one_call(tmp_path, monkeypatch):
    """scikit-learn's error lists them all, so that they need not be found by halves."""
    calls = []

    def ask(signature, X, **options):
        calls.append(len(X))
        return original(signature, X, **options)

    original = reference.ask
    monkeypatch.setattr(reference, "ask", ask)
    model = RadiusNeighborsClassifier(radius=1.0).fit(GRID, KIND)
    made = convert(model, GRID, tmp_path / "m.onnx", probes=PROBES)
    assert made.report.refused > 300
    assert len(calls) < 400
