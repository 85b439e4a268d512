"""KNNImputer: the same donors give the same values; among equally far ones the proof has to tell."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.impute import KNNImputer

from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

CANCER = load_breast_cancer().data[:150, :6]


def punched(rows, share, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(rows.shape) < share, np.nan, rows)


ROWS = punched(CANCER, 0.15)


@pytest.mark.parametrize(
    "options", [{}, {"n_neighbors": 1}, {"n_neighbors": 149}, {"add_indicator": True}], ids=str
)
@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize("training", [CANCER, ROWS], ids=["whole", "holes"])
def test_values(options, weights, training):
    model = KNNImputer(weights=weights, **options).fit(training)
    odd = [np.full(6, np.nan), np.where(np.arange(6) == 2, np.nan, 0.0), np.where(np.arange(6), np.nan, 1e4)]
    rows = np.vstack([punched(CANCER, 0.3, seed=1), ROWS, odd])
    np.testing.assert_allclose(lowered.transform(model, rows, "float64"), model.transform(rows), rtol=1e-9)


@pytest.mark.parametrize("keep", [True, False])
def test_columns_without_values(keep):
    training = ROWS.copy()
    training[:, 3] = np.nan
    model = KNNImputer(keep_empty_features=keep, add_indicator=True).fit(training)
    rows = punched(CANCER, 0.3, seed=1)
    found, wanted = lowered.transform(model, rows, "float64"), model.transform(rows)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_another_mark_for_what_is_missing():
    training = np.nan_to_num(ROWS, nan=-1.0)
    model = KNNImputer(missing_values=-1.0).fit(training)
    rows = np.nan_to_num(punched(CANCER, 0.3, seed=1), nan=-1.0)
    np.testing.assert_allclose(lowered.transform(model, rows, "float64"), model.transform(rows), rtol=1e-9)


def test_rows_without_a_common_column_get_the_mean():
    training = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, 5.0], [np.nan, 8.0]])
    model = KNNImputer(n_neighbors=1).fit(training)
    rows = np.array([[1.0, np.nan], [np.nan, 5.0], [np.nan, np.nan]])
    np.testing.assert_allclose(lowered.transform(model, rows, "float64"), model.transform(rows))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (KNNImputer(weights=lambda d: 1 / (1 + d)), "function as its weights"),
        (KNNImputer(metric=lambda a, b, missing_values: abs(np.nansum(a - b))), "the metric"),
    ],
    ids=lowered.named,
)
def test_refusals(model, reason):
    with pytest.raises(UnsupportedPipeline, match=reason):
        lowered.transform(model.fit(ROWS), ROWS)
