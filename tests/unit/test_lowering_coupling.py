"""Probabilities of libsvm, whose iteration is unrolled."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_iris
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, NuSVC

from converters.lowering import coupling
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

IRIS, KIND = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[KIND]
DIGITS, DIGIT = (part[:300] for part in load_digits(return_X_y=True))


def fitted(model, rows, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return model.fit(rows, labels)


def hostile(rows):
    rng = np.random.default_rng(0)
    wide = rows[rng.integers(len(rows), size=200)] + rng.normal(size=(200, rows.shape[1])) * 3
    odd = [np.zeros(rows.shape[1]), np.full(rows.shape[1], 1e-42), rows[0] * 1e4, -rows[0] * 1e6]
    return np.vstack([rows[::3], wide, odd])


@pytest.mark.parametrize("kernel", ["linear", "rbf", "poly", "sigmoid"])
@pytest.mark.parametrize("kind", [SVC, NuSVC])
@pytest.mark.parametrize(
    "labels", [NAMES, KIND == 1, np.where(KIND == 0, -1, 7)], ids=["three", "bool", "two"]
)
def test_probabilities(kind, kernel, labels):
    options = {"nu": 0.1} if kind is NuSVC else {}
    model = fitted(kind(kernel=kernel, probability=True, random_state=0, **options), IRIS, labels)
    found = lowered.assert_equal(model, hostile(IRIS))
    assert found.signature.score == "predict_proba"


def test_ten_classes():
    model = fitted(make_pipeline(StandardScaler(), SVC(probability=True, random_state=0)), DIGITS, DIGIT)
    lowered.assert_equal(model, hostile(DIGITS))


@pytest.mark.covering
@pytest.mark.parametrize("classes", [2, 3, 4, 6])
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 1e4])
def test_pairs_that_agree_on_nothing(classes, scale):
    """Sigmoids of any slope: pairs that are certain, that contradict each other, that know nothing."""
    rng = np.random.default_rng(classes)
    rows = rng.normal(size=(40 * classes, 3))
    model = fitted(SVC(probability=True, random_state=0), rows, np.arange(40 * classes) % classes)
    pairs = len(model._probA)
    for _ in range(4):
        model._probA = rng.normal(scale=scale, size=pairs)
        model._probB = rng.normal(scale=scale, size=pairs)
        lowered.assert_equal(model, hostile(rows))


def test_rounds_matter(monkeypatch):
    """The teeth: with fewer rounds than libsvm takes, the probabilities differ."""
    model = fitted(SVC(probability=True, random_state=0), DIGITS, DIGIT)
    monkeypatch.setattr(coupling, "_ROUNDS", 2)
    with pytest.raises(AssertionError, match="scores"):
        lowered.assert_equal(model, DIGITS[:50])


def test_many_classes_are_refused():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(330, 2))
    model = fitted(SVC(probability=True, random_state=0), rows, np.arange(330) % 33)
    with pytest.raises(UnsupportedPipeline, match=r"33 classes.*CalibratedClassifierCV"):
        lowered.run(model, rows)


def test_what_the_last_bit_may_tip_is_said():
    model = fitted(SVC(probability=True, random_state=0), IRIS, NAMES)
    (doubt,) = lowered.run(model, IRIS).lowering.doubts
    assert "CalibratedClassifierCV" in doubt
