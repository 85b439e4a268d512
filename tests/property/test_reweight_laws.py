"""What holds for every weighting."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.profile import CellSpec, FeatureCells, Profile
from tests.support.counted import counted
from trainer.reweight import Limits, cells_of, reweight

EDGES = tuple(float(edge) for edge in range(5))
SPEC = CellSpec(tuple(FeatureCells(name, EDGES) for name in "abc"), FeatureCells("score", (0.0,)), 0)
EVERY_ROW = Limits(moved=0.0, few_rows=1)
seeds = st.integers(0, 2**32 - 1)


def rows_of(seed, n=400):
    """Whole numbers and halves, some missing, in columns that go together a little."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, 2, size=(n, 1))
    X = rng.integers(-1, 6, size=(n, 3)) * 0.75 + common
    X[rng.random(size=X.shape) < 0.05] = np.nan
    return X.astype(np.float32)


def profile_of(shares):
    """A device whose histogram has these shares, to a millionth."""
    counts = np.zeros(SPEC.size, np.int64)
    for start, share in zip(SPEC.offsets, shares, strict=False):
        up_to = np.rint(np.cumsum(share) * 1_000_000).astype(np.int64)
        counts[start : start + len(share)] = np.diff(up_to, prepend=0)
    counts[SPEC.offsets[-2]] = 1_000_000
    return Profile(layout=SPEC.layout, rows=1_000_000, counts=counts, sums=np.zeros(0, np.int64)).check(SPEC)


def histograms(X, weights):
    return [np.bincount(found, weights, minlength=8) / weights.sum() for found in cells_of(SPEC, X)]


@given(rows=seeds, true=seeds)
def test_marginals_that_some_weights_reach_are_reached(rows, true):
    X = rows_of(rows)
    tilt = np.random.default_rng(true).uniform(0.4, 2.0, size=400) * np.where(
        np.nan_to_num(X[:, 0]) > 2, 2.0, 0.7
    )
    target = histograms(X, tilt)
    found = reweight(SPEC, X, [profile_of(target)], every=True, limits=EVERY_ROW)
    assert found.problems == ()
    for wanted, reached in zip(target, histograms(X, found.weights), strict=True):
        assert np.abs(wanted - reached).max() < 2e-3
    assert max(feature.after for feature in found.features) < 5e-3


@given(rows=seeds, fleet=seeds, shift=st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 40.0]), every=st.booleans())
def test_weights_are_bounded_positive_and_of_mean_one(rows, fleet, shift, every):
    X = rows_of(rows)
    devices = [counted(SPEC, rows_of(fleet + at, 50) + np.float32(shift)) for at in range(6)]
    found = reweight(SPEC, X, devices, every=every)
    limits = Limits()
    assert found.weights.min() >= limits.smallest
    assert found.weights.max() <= limits.largest
    assert abs(found.weights.mean() - 1.0) < 1e-9
    assert 1.0 <= found.effective <= len(X) * (1 + 1e-9)
    assert all(0.0 <= feature.uncovered <= 1.0 for feature in found.features)


@given(rows=seeds, every=st.booleans())
def test_rows_that_match_already_keep_weight_one(rows, every):
    X = rows_of(rows)
    found = reweight(SPEC, X, [counted(SPEC, X)], every=every)
    assert np.abs(found.weights - 1.0).max() < 1e-9
    assert found.problems == ()


@given(rows=seeds, fleet=seeds, order=st.randoms(use_true_random=False))
def test_neither_the_order_of_rows_nor_that_of_devices_matters(rows, fleet, order):
    X = rows_of(rows)
    devices = [counted(SPEC, rows_of(fleet + at, 80) + np.float32(0.5)) for at in range(6)]
    permuted = np.array(order.sample(range(len(X)), len(X)))
    shuffled = order.sample(devices, len(devices))
    found, again = reweight(SPEC, X, devices), reweight(SPEC, X[permuted], shuffled)
    assert np.allclose(found.weights[permuted], again.weights, rtol=1e-9)
    assert found.problems == again.problems


@given(fleet=seeds, at=st.integers(0, 9), lie=seeds)
def test_one_device_moves_the_target_by_little_more_than_its_vote(fleet, at, lie):
    rng = np.random.default_rng(fleet)
    devices = [counted(SPEC, rows_of(int(seed), 60)) for seed in rng.integers(0, 2**31, size=10)]
    liar = counted(SPEC, np.full((60, 3), np.random.default_rng(lie).choice([-9, 2, 9, np.nan, np.inf])))
    X = rows_of(0)
    before = [f.before for f in reweight(SPEC, X, devices).features]
    after = [f.before for f in reweight(SPEC, X, [*devices[:at], liar, *devices[at + 1 :]]).features]
    assert max(abs(b - a) for b, a in zip(before, after, strict=True)) <= 1 / 8
