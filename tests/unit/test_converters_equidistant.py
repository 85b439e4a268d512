"""Rows between training rows: what a search among these is tried with."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsRegressor

from converters import equidistant

GRID = np.random.default_rng(0).integers(0, 4, (120, 5)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_as_many_rows_as_wanted(count, dtype):
    for sort in (equidistant.find, equidistant.far):
        rows = sort(GRID.astype(dtype), np.arange(5), np.random.default_rng(0), count)
        assert rows.shape == (count, 5)
        assert rows.dtype == dtype


def test_many_are_equally_far_from_several_training_rows():
    rows = equidistant.find(GRID, np.arange(5), np.random.default_rng(0), 300)
    far = KNeighborsRegressor(120).fit(GRID, GRID[:, 0]).kneighbors(rows.astype(float))[0]
    assert (far[:, 4] == far[:, 5]).sum() > 100


def test_of_continuous_columns_too():
    training = np.random.default_rng(0).normal(size=(60, 3))
    rows = equidistant.find(training, np.arange(3), np.random.default_rng(0), 300)
    far = np.sort(np.linalg.norm(rows[:, None] - training, axis=2), axis=1)
    assert (np.diff(far, axis=1) < 1e-12).any(axis=1).sum() > 30


def test_codes_stay_codes():
    training = GRID.copy()
    training[:, 0] = np.arange(120) % 7
    training[:, 1] += 0.25
    rows = equidistant.find(training, np.arange(1, 5), np.random.default_rng(0), 300)
    assert set(np.unique(rows[:, 0])) <= set(range(7))
    assert len(np.unique(rows[:, 1])) > 4
    only = equidistant.find(training[:, :1], np.zeros(0, np.int64), np.random.default_rng(0), 300)
    assert only.shape == (300, 1)


def test_far_rows_have_one_value_far_out():
    rows = equidistant.far(GRID, np.arange(5), np.random.default_rng(0), 300)
    assert ((np.abs(rows) > 3).sum(axis=1) == 1).all()
    sizes = np.abs(rows).max(axis=1)
    assert sizes.min() < 1e3
    assert sizes.max() > 1e18
    assert np.isfinite(rows).all()


def test_missing_values_do_no_harm():
    training = np.where(np.random.default_rng(1).random(GRID.shape) < 0.2, np.nan, GRID)
    training[:, 3] = np.nan
    rows = equidistant.find(training, np.arange(5), np.random.default_rng(0), 100)
    assert np.isnan(rows).any()
    assert np.isfinite(rows[:, :3]).any(axis=1).all()


def test_a_column_that_never_changes_does_no_harm():
    training = GRID.copy()
    training[:, 2] = 7.0
    rows = equidistant.find(training, np.arange(5), np.random.default_rng(0), 300)
    assert set(rows[:, 2].tolist()) == {7.0}
    far = KNeighborsRegressor(120).fit(training, training[:, 0]).kneighbors(rows.astype(float))[0]
    assert (far[:, 4] == far[:, 5]).sum() > 100
