"""The familiar figures, against their definitions."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from aggregator.core import figures
from edge_runtime.contract.profile import CellSpec, FeatureCells, Profile
from tests.support.fleet import CLASSES, NAMES, SPEC, count

FOUR = CellSpec((FeatureCells("x", (0.0, 1.0, 3.0)),), FeatureCells("score", (0.5,)), 2)


def cells(*counts, missing=0, infinite=0, classes=(0, 0)):
    """A profile of ``FOUR`` with these counts in the cells of x."""
    rows = sum(counts) + missing + infinite
    classes = classes if any(classes) else (rows, 0)
    return Profile(
        layout=FOUR.layout,
        rows=rows,
        counts=np.array([*counts, missing, infinite, 0, rows, 0, 0, 0, 0, *classes]),
        sums=np.zeros(0, np.int64),
    ).check(FOUR)


P, Q = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])
REFERENCE, FLEET = [cells(10, 20, 30, 40)], [cells(40, 30, 20, 10)]


def test_every_figure_equals_its_definition():
    found = figures.column_figures(FOUR, 0, REFERENCE, FLEET)
    places = np.array([0.0, 0.5, 2.0, 3.0])
    deviation = math.sqrt(P @ (places - P @ places) ** 2)
    assert found.psi == pytest.approx(((Q - P) * np.log(Q / P)).sum())
    assert found.ks == pytest.approx(0.4)
    assert found.cut == 1.0
    assert found.below == pytest.approx((0.3, 0.7))
    assert found.js_bits == pytest.approx(jensenshannon(P, Q, base=2) ** 2)
    assert found.wasserstein_sd == pytest.approx(wasserstein_distance(places, places, P, Q) / deviation)
    assert found.mean_shift_sd == pytest.approx((Q @ places - P @ places) / deviation)
    assert found.missing == (0.0, 0.0)
    assert found.broad == 1.0


def test_units_weigh_the_same_however_many_rows_they_have():
    chatty = [cells(40, 30, 20, 10), cells(10_000, 20_000, 30_000, 40_000)]
    quiet = [cells(40, 30, 20, 10), cells(10, 20, 30, 40)]
    assert figures.column_figures(FOUR, 0, REFERENCE, chatty) == figures.column_figures(
        FOUR, 0, REFERENCE, quiet
    )


def test_nothing_moved_is_zero_everywhere():
    found = figures.column_figures(FOUR, 0, REFERENCE, REFERENCE)
    assert (found.psi, found.ks, found.js_bits, found.wasserstein_sd, found.mean_shift_sd) == (0, 0, 0, 0, 0)


def test_an_empty_cell_leaves_psi_finite():
    found = figures.column_figures(FOUR, 0, [cells(0, 0, 0, 100)], [cells(100, 0, 0, 0)])
    assert found.psi == pytest.approx(2 * (1 - 1e-4) * math.log(1e4))
    assert found.mean_shift_sd == 0.0  # the reference does not vary: there is no unit to measure in


def test_broad_counts_the_units_on_the_fleets_side():
    fleet = [cells(90, 5, 5, 0), cells(10, 20, 30, 40), cells(0, 0, 50, 50)]
    assert figures.column_figures(FOUR, 0, REFERENCE, fleet).broad == pytest.approx(1 / 3)


def test_missing_and_infinite_values_have_shares_of_their_own():
    found = figures.input_columns(FOUR, [cells(10, 20, 30, 40), cells(1, 1, 1, 1, missing=4, infinite=2)])
    np.testing.assert_allclose(found.values, [[0.1, 0.3, 0.6, 0, 0], [0.25, 0.5, 0.75, 0.4, 0.2]])
    assert figures.column_figures(FOUR, 0, REFERENCE, [cells(1, 0, 0, 0, missing=1)]).missing == (0.0, 0.5)


def test_a_unit_without_finite_values_speaks_for_neither_side():
    found = figures.input_columns(
        FOUR, [cells(10, 20, 30, 40), cells(30, 40, 10, 20), cells(0, 0, 0, 0, missing=5)]
    )
    np.testing.assert_allclose(found.values[2], [0.2, 0.5, 0.7, 1.0, 0.0])
    nobody = figures.input_columns(FOUR, [cells(0, 0, 0, 0, missing=5)])
    np.testing.assert_allclose(nobody.values[0, :3], 0.5)
    empty = figures.column_figures(FOUR, 0, [cells(0, 0, 0, 0, missing=5)], [cells(0, 0, 0, 0, missing=5)])
    assert empty.psi == 0.0


def test_inputs_are_named_and_owned_in_order():
    rows = np.random.default_rng(0).normal(size=(50, len(NAMES)))
    found = figures.input_columns(SPEC, [count(SPEC, rows)])
    assert found.names == NAMES
    assert found.owners.tolist() == sorted(found.owners.tolist())
    assert np.bincount(found.owners).tolist() == [len(c.edges) + 2 for c in SPEC.features]
    first = [(rows[:, 0].astype(np.float32) <= np.float32(e)).mean() for e in SPEC.features[0].edges]
    np.testing.assert_allclose(found.values[0, : len(first)], first)


def test_outputs_are_the_score_and_every_class():
    scores = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.9, 0.05, 0.05]])
    found = figures.output_columns(SPEC, [count(SPEC, np.zeros((4, 3)), scores)], ("low", "mid", "high"))
    assert found.names == ("score", "class low", "class mid", "class high")
    np.testing.assert_allclose(found.values[0, -CLASSES:], [0.75, 0.25, 0.0])
    assert found.owners[-CLASSES:].tolist() == [1, 2, 3]


def test_a_regressor_has_only_its_value():
    spec = CellSpec((FeatureCells("x", (0.0,)),), FeatureCells("score", (0.0, 1.0)), 0)
    profile = Profile(
        layout=spec.layout,
        rows=4,
        counts=np.array([4, 0, 0, 0, 0, 1, 2, 1, 0, 0, 0]),
        sums=np.zeros(0, np.int64),
    )
    found = figures.output_columns(spec, [profile.check(spec)], ())
    assert found.names == ("score",)
    np.testing.assert_allclose(found.values, [[0.25, 0.75]])


def test_share_figures():
    found = figures.share_figures(np.array([0.8, 0.8]), np.array([0.6, 0.6, 0.9]))
    assert found.below == pytest.approx((0.8, 0.7))
    assert found.ks == pytest.approx(0.1)
    assert found.psi == pytest.approx(0.1 * math.log(0.8 / 0.7) + 0.1 * math.log(0.3 / 0.2))
    assert found.broad == pytest.approx(2 / 3)
