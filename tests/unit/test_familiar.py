"""The familiar figures against numpy and scipy on the same binned data."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import chisquare, wasserstein_distance

from aggregator.core.familiar import Reader
from edge_runtime.contract.profile import CellSpec, FeatureCells, Profile

PLACES = {"x": np.array([0.0, 0.5, 2.0, 3.0]), "y": np.array([1.0, 1.0])}
SPEC = CellSpec(
    (FeatureCells("x", (0.0, 1.0, 3.0)), FeatureCells("y", (1.0,))), FeatureCells("score", (0.5,)), 2
)
READER = Reader(SPEC)


def cells(*counts, missing=0, infinite=0, repeated=0):
    """A profile with these counts in the cells of x; y is constant."""
    rows = sum(counts) + missing + infinite
    return Profile(
        layout=SPEC.layout,
        rows=rows,
        counts=np.array([*counts, missing, infinite, repeated, rows, 0, 0, 0, 0, rows, 0, 0, 0, 0, rows, 0]),
        sums=np.zeros(0, np.int64),
    ).check(SPEC)


def read(reference, fleet):
    return READER.read(READER.shares(reference), READER.shares(fleet))


def shares(*counts):
    return np.array(counts) / sum(counts)


@pytest.mark.parametrize("seed", range(5))
def test_every_figure_equals_its_definition(seed):
    rng = np.random.default_rng(seed)
    before, now = rng.integers(5, 100, 4), rng.integers(5, 100, 4)
    found = read([cells(*before)], [cells(*now)])[0]
    p, q, places = shares(*before), shares(*now), PLACES["x"]
    deviation = math.sqrt(p @ (places - p @ places) ** 2)
    assert found.psi == pytest.approx(((q - p) * np.log(q / p)).sum())
    assert found.ks == pytest.approx(np.abs(np.cumsum(p) - np.cumsum(q))[:-1].max())
    assert found.chi2 == pytest.approx(chisquare(now, p * now.sum()).statistic)
    assert found.js == pytest.approx(jensenshannon(p, q, base=2))
    assert found.wasserstein_sd == pytest.approx(wasserstein_distance(places, places, p, q) / deviation)
    assert found.mean_shift_sd == pytest.approx((q @ places - p @ places) / deviation)
    assert found.sd_ratio == pytest.approx(math.sqrt(q @ (places - q @ places) ** 2) / deviation)
    at = int(np.abs(np.cumsum(p) - np.cumsum(q))[:-1].argmax())
    assert found.cut == SPEC.columns[0].edges[at]
    assert found.below == pytest.approx((np.cumsum(p)[at], np.cumsum(q)[at]))


def test_units_weigh_the_same_however_many_rows_they_have():
    reference = [cells(10, 20, 30, 40)]
    chatty = read(reference, [cells(40, 30, 20, 10), cells(10_000, 20_000, 30_000, 40_000)])[0]
    quiet = read(reference, [cells(40, 30, 20, 10), cells(10, 20, 30, 40)])[0]
    assert (chatty.psi, chatty.ks, chatty.js) == (quiet.psi, quiet.ks, quiet.js)
    p, now = shares(10, 20, 30, 40), np.array([10_040, 20_030, 30_020, 40_010])
    assert chatty.chi2 == pytest.approx(chisquare(now, p * now.sum()).statistic)  # of rows, as everybody's is


def test_nothing_moved_is_zero_everywhere():
    for found in read([cells(10, 20, 30, 40)], [cells(1, 2, 3, 4)]):
        figures = (found.psi, found.chi2, found.ks, found.js, found.wasserstein_sd, found.mean_shift_sd)
        np.testing.assert_allclose(figures, 0.0, atol=1e-12)
        assert found.sd_ratio == pytest.approx(1.0)


def test_an_empty_cell_leaves_psi_finite():
    found = read([cells(0, 0, 0, 100)], [cells(100, 0, 0, 0)])[0]
    assert found.psi == pytest.approx(2 * (1 - 1e-4) * math.log(1e4))
    assert (found.ks, found.js) == pytest.approx((1.0, 1.0))


def test_a_column_that_never_varied_has_no_deviations_to_count_in():
    found = read([cells(10, 20, 30, 40)], [cells(40, 30, 20, 10)])[1]
    assert (found.mean_shift_sd, found.wasserstein_sd, found.sd_ratio) == (0.0, 0.0, 1.0)


def test_faults_are_shares_of_all_rows_of_reference_and_fleet():
    found = read([cells(10, 20, 30, 40)], [cells(10, 20, 30, 20, missing=15, infinite=5, repeated=9)])[0]
    assert (found.missing, found.non_finite, found.repeated) == ((0, 0.15), (0, 0.05), (0, 0.09))


def test_a_unit_without_a_finite_value_is_left_out_of_the_cells():
    one = read([cells(10, 20, 30, 40)], [cells(40, 30, 20, 10)])[0]
    two = read([cells(10, 20, 30, 40)], [cells(40, 30, 20, 10), cells(0, 0, 0, 0, missing=10)])[0]
    assert (one.psi, one.ks, one.js) == (two.psi, two.ks, two.js)
    assert two.missing == (0.0, 0.5)


def test_figures_of_one_column_do_not_leak_into_the_next():
    calm = read([cells(10, 20, 30, 40)], [cells(10, 20, 30, 40)])
    moved = read([cells(10, 20, 30, 40)], [cells(40, 30, 20, 10)])
    assert moved[1:] == calm[1:]
    assert len(moved) == 3


@pytest.mark.parametrize("times", [1, 10_000])
def test_chi_square_of_the_same_shares_is_nothing_however_many_rows_there_are(times):
    found = read([cells(0, 20, 0, 40)], [cells(0, 20 * times, 0, 40 * times)])
    assert [one.chi2 for one in found] == pytest.approx([0.0] * 3, abs=1e-9)


def test_rows_in_a_cell_that_was_empty_count_against_the_floor():
    found = read([cells(0, 0, 0, 100)], [cells(10, 0, 0, 90)])[0]
    assert found.chi2 == pytest.approx((10 - 0.01) ** 2 / 0.01 + 1.0)


NOTHING = cells(0, 0, 0, 0, missing=10)


@pytest.mark.parametrize(
    "sides", [([cells(10, 20, 30, 40)], [NOTHING]), ([NOTHING], [cells(40, 30, 20, 10)])]
)
def test_figures_of_a_column_without_a_value_are_none_and_no_other_columns_are(sides):
    found, *others = read(*sides)
    figures = (found.psi, found.ks, found.chi2, found.js, found.wasserstein_sd, found.mean_shift_sd)
    assert np.isnan([*figures, found.sd_ratio, found.cut, *found.below]).all()
    assert sorted(found.missing) == [0.0, 1.0]
    calm = read([cells(10, 20, 30, 40)], [cells(10, 20, 30, 40)])[1:]
    assert [(o.psi, o.ks, o.cut, o.below) for o in others] == [(o.psi, o.ks, o.cut, o.below) for o in calm]


def test_a_share_is_never_less_than_nothing():
    rng = np.random.default_rng(0)
    for _ in range(200):
        before = rng.integers(1, 1000, 4)
        found = read([cells(*before)], [cells(0, 0, *rng.integers(1, 1000, 2))])[0]
        assert 0.0 <= found.below[1] <= 1.0
        assert math.copysign(1.0, found.below[1]) == 1.0
