"""Training rows weighted to the fleet's histograms: what is reached, what is refused, and in which words."""

import re

import numpy as np
import pytest

from edge_runtime.contract.profile import FeatureCells, column_counts
from tests.support.counted import cells, counted
from trainer.reweight import TRIMMED, Limits, cells_of, fleet_shares, reweight

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def X():
    """Three independent standard normal columns."""
    return np.random.default_rng(0).normal(size=(4000, 3))


def fleet(spec, *, devices=20, rows=500, mean=(0.0, 0.0, 0.0), scale=1.0, seed=1):
    rng = np.random.default_rng(seed)
    return [counted(spec, rng.normal(mean, scale, size=(rows, 3))) for _ in range(devices)]


def test_cells_are_those_of_a_device_for_every_kind_of_number(X):
    rows = X[:300].copy()
    rows[::7, 0] = np.nan
    rows[1::7, 1] = np.inf
    rows[2::7, 1] = -np.inf
    rows[3::7, 2] = 1e300  # infinite once it is a float32
    spec = cells(X, NAMES)
    rows[:23, 2] = [*spec.features[2].edges[:20], 0.0, -0.0, 1e-45]
    profile = counted(spec, rows)
    for j, found in enumerate(cells_of(spec, rows)):
        start, column = int(spec.offsets[j]), spec.features[j]
        assert np.array_equal(
            np.bincount(found, minlength=column.cells + 2), profile.counts[start:][: column.cells + 2]
        )
        assert np.array_equal(
            np.bincount(found, minlength=column.cells)[: column.cells], column_counts(spec, profile, j)
        )


def test_a_column_of_many_edges_is_binned_like_on_a_device():
    values = np.random.default_rng(0).normal(size=(500, 1))
    values[:5] = np.nan
    edges = tuple(float(edge) for edge in np.linspace(-2, 2, 200, dtype=np.float32))
    spec = cells(values, ("a",))
    spec = type(spec)((FeatureCells("a", edges),), spec.score, 0)
    profile = counted(spec, values)
    assert np.array_equal(np.bincount(cells_of(spec, values)[0], minlength=203), profile.counts[:203])


def test_every_device_has_one_vote(X):
    spec = cells(X, NAMES)
    rng = np.random.default_rng(3)
    quiet = [counted(spec, rng.normal(0.0, 1.0, size=(200, 3))) for _ in range(3)]
    chatty = counted(spec, rng.normal(2.0, 1.0, size=(20_000, 3)))
    found = fleet_shares(spec, [*quiet, chatty])
    shares = [column_counts(spec, p, 0) / p.rows for p in (*quiet, chatty)]
    assert np.allclose(found[0][:-2], np.mean(shares, axis=0))


@pytest.mark.parametrize("lie", [6.0, -6.0, np.nan])
def test_a_tenth_of_the_devices_lying_the_same_way_hardly_moves_the_target(X, lie):
    spec = cells(X, NAMES)
    honest = fleet(spec, devices=36)
    liars = [counted(spec, np.full((500, 3), lie)) for _ in range(4)]
    assert len(liars) == TRIMMED * 40
    plain, lied = fleet_shares(spec, honest), fleet_shares(spec, [*honest, *liars])
    for before, after in zip(plain, lied, strict=True):
        assert np.abs(np.cumsum(after - before)).max() < 0.02, "the mean of all devices moves by 0.1"
        assert after.sum() == pytest.approx(1.0)
        assert after.min() >= 0.0


def test_a_minority_of_another_kind_keeps_its_place(X):
    spec = cells(X, NAMES)
    devices = [*fleet(spec, devices=14), *fleet(spec, devices=6, mean=(1.5, 0, 0), seed=2)]
    above = int(np.searchsorted(spec.features[0].edges, 1.5))
    whole = np.mean([column_counts(spec, p, 0)[above:].sum() / p.rows for p in devices])
    assert 0.7 * whole < fleet_shares(spec, devices)[0][above:].sum() < whole


def test_rows_are_weighted_to_a_shifted_fleet_in_the_features_that_moved(X):
    spec = cells(X, NAMES)
    found = reweight(spec, X, fleet(spec, mean=(0.6, 0.0, 0.0)))
    assert found.problems == ()
    assert [feature.name for feature in found.fitted] == ["a"]
    moved, *still = found.features
    assert moved.before > 0.2
    assert moved.after < 0.01
    assert all(feature.after < 0.05 for feature in still)
    assert np.average(X[:, 0], weights=found.weights) == pytest.approx(0.6, abs=0.05)
    assert found.effective == pytest.approx(1 / np.mean(found.weights**2) * len(X))
    assert len(X) * np.exp(-(0.6**2)) == pytest.approx(found.effective, rel=0.1), (
        "what the likelihood ratio has"
    )


def test_a_feature_that_the_others_would_carry_along_is_held_in_place():
    rng = np.random.default_rng(5)
    a = rng.normal(size=4000)
    X = np.stack([a, a + 0.3 * rng.normal(size=4000), rng.normal(size=4000)], axis=1)
    spec = cells(X, NAMES)
    near = rng.normal(size=(20, 500))
    rows = np.stack([near + 0.3, near * 1.05, rng.normal(size=near.shape)], axis=2)
    found = reweight(spec, X, [counted(spec, device) for device in rows])
    assert {feature.name for feature in found.fitted} == {"a", "b"}
    assert max(feature.after for feature in found.features) < 0.05


def test_features_that_pull_each_other_along_are_met_in_the_end():
    """Fitting the others first drives the one they have in common away: the first sweeps gain little in sum."""
    rng = np.random.default_rng(9)
    X = rng.normal(size=(20_000, 20))
    X[:, 1:] += 0.5 * X[:, :1]
    names = tuple(f"f{j}" for j in range(20))
    spec = cells(X, names)
    found = reweight(spec, X, [counted(spec, rng.normal(0.25, 1.0, size=(500, 20))) for _ in range(100)])
    assert found.problems == ()
    assert len(found.fitted) == 20
    assert max(feature.after for feature in found.features) < 0.01


def test_a_fleet_that_looks_like_training_leaves_rows_alike(X):
    spec = cells(X, NAMES)
    found = reweight(spec, X, fleet(spec))
    assert (found.weights == 1.0).all()
    assert found.fitted == ()
    assert found.problems == ()
    assert found.effective == len(X)


def test_few_rows_are_not_fitted_to_chance():
    """A hundred rows of the very distribution lie 0.1 away from it."""
    rng = np.random.default_rng(8)
    X = rng.normal(size=(100, 3))
    spec = cells(rng.normal(size=(4000, 3)), NAMES)
    found = reweight(spec, X, fleet(spec))
    assert max(feature.before for feature in found.features) > Limits().moved
    assert found.fitted == ()


def test_all_features_are_fitted_when_asked(X):
    spec = cells(X, NAMES)
    found = reweight(spec, X, fleet(spec), every=True)
    assert len(found.fitted) == 3
    assert max(feature.after for feature in found.features) < 0.01
    assert found.effective > 0.9 * len(X)


def test_a_share_of_missing_values_is_fitted_too(X):
    some = X.copy()
    some[::20, 1] = np.nan
    spec = cells(some, NAMES)
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(10, 500, 3))
    rows[:, ::4, 1] = np.nan
    found = reweight(spec, some, [counted(spec, device) for device in rows])
    assert found.problems == ()
    assert found.weights[np.isnan(some[:, 1])].mean() == pytest.approx(5.0, abs=0.1)


@pytest.mark.parametrize(
    ("mean", "where"), [(5.0, r"a: 9\d%, mostly above 3"), (-5.0, r"a: 9\d%, mostly at or below -3")]
)
def test_a_fleet_where_no_row_is_is_refused_with_the_feature_the_share_and_the_place(X, mean, where):
    spec = cells(X, NAMES)
    found = reweight(spec, X, fleet(spec, mean=(mean, 0.0, 0.0)))
    [problem] = found.problems
    assert "no or too few training rows" in problem
    assert "collect labelled rows there" in problem
    assert "b:" not in problem
    assert re.search(where, problem), problem


def test_values_in_a_gap_of_the_training_rows_are_named_by_both_ends():
    rng = np.random.default_rng(6)
    X = rng.normal(size=(2000, 3))
    spec = cells(X, NAMES)
    low, high = spec.features[0].edges[8], spec.features[0].edges[11]
    kept = X[(X[:, 0] <= low) | (X[:, 0] > high)]
    found = reweight(spec, kept, fleet(spec))
    [problem] = found.problems
    assert f"mostly above {low:.6g} up to {high:.6g}" in problem


def test_values_that_are_missing_in_the_fleet_only_are_named(X):
    spec = cells(X, NAMES)
    rows = np.random.default_rng(4).normal(size=(10, 500, 3))
    rows[:, ::4, 1] = np.nan
    found = reweight(spec, X, [counted(spec, device) for device in rows])
    assert "b: 25%, mostly missing (NaN)" in found.problems[0]


def test_values_that_no_row_combines_are_refused():
    """Each feature's values occur in training, but never so together."""
    rng = np.random.default_rng(7)
    a = rng.normal(size=4000)
    X = np.stack([a, a + 0.1 * rng.normal(size=4000), rng.normal(size=4000)], axis=1)
    spec = cells(X, NAMES)
    found = reweight(spec, X, fleet(spec, mean=(1.0, -1.0, 0.0)))
    assert "not together: " in found.problems[0]
    assert "a (KS" in found.problems[0]
    assert max(feature.uncovered for feature in found.features) < Limits().uncovered


def test_a_fleet_that_few_rows_stand_for_is_refused(X):
    spec = cells(X, NAMES)
    found = reweight(spec, X, fleet(spec, mean=(1.1, 1.1, 1.1)), limits=Limits(unfitted=1.0))
    assert found.effective < 0.15 * len(X)
    assert "of the rows (15% is asked for)" in found.problems[-1]


def test_four_rows_do_not_stand_for_a_crowd(X):
    spec = cells(X, NAMES)
    few, seen = X[:200].copy(), X[:500].copy()
    few[:4, 0] = seen[::5, 0] = 9.0  # in a fifth of the fleet's rows, and in four rows of training
    devices = [counted(spec, seen)] * 10
    [problem] = reweight(spec, few, devices).problems
    assert "a: 19%, mostly above 3" in problem
    assert reweight(spec, few, devices, limits=Limits(few_rows=1)).problems == ()
