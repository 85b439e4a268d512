"""Every component of a profile against a direct computation from the raw rows."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from aggregator.core.components import (
    ACCURACY,
    CLASS,
    LOCATION,
    MISSING,
    NON_FINITE,
    REPEATED,
    SCALE,
    SHAPE,
    UNSEEN,
    components_of,
)
from edge_runtime.contract.profile import column_counts
from tests.simulators.stream_rows import SHAPES, answer, shaped
from tests.simulators.streams import Fleet, Traits
from tests.support.looks import binned

FLEET = Fleet(features=10, groups=2, group_rows=1500, traits=Traits(shapes=SHAPES))
COMPONENTS = components_of(FLEET.info)
CATEGORY = FLEET.shapes.index("category")
CONSTANT = FLEET.shapes.index("constant")


def raw(seed=0, n=700):
    """Rows of every shape with holes, infinities, repeats and categories that training never saw."""
    rng = np.random.default_rng(seed)
    columns = rng.normal(0.2, 1.3, size=(10, n)).astype(np.float32)
    for j, shape in enumerate(FLEET.shapes):
        if shape != "plain":
            columns[j] = shaped(shape, columns[j])
    columns[CATEGORY, rng.random(n) < 0.1] = -1
    columns[0, rng.random(n) < 0.2] = np.nan
    columns[1, rng.random(n) < 0.1] = np.inf
    columns[1, rng.random(n) < 0.1] = -np.inf
    columns[2, 1::3] = columns[2, 0:-1:3]
    return columns.T.copy()


ROWS = raw()
FOUND = COMPONENTS.sample([binned(FLEET, ROWS)])


def of(owner, nature, cell=None):
    """The values of a column's components."""
    mine = (COMPONENTS.owners == owner) & (COMPONENTS.nature == nature)
    if cell is not None:
        mine &= COMPONENTS.cells == cell
    return FOUND.values[0, mine]


def best(rows):
    _, scores = answer(rows.T)
    return scores.max(axis=1).astype(np.float32)


NUMERIC = [j for j, shape in enumerate(FLEET.shapes) if shape != "category"]


@pytest.mark.parametrize("j", [*NUMERIC, 10])
def test_numbers_give_the_distribution_function_at_every_edge(j):
    values = best(ROWS) if j == 10 else ROWS[:, j]
    finite = values[np.isfinite(values)]
    edges = FLEET.spec.columns[j].edges
    shape = of(j, SHAPE)
    assert len(shape) == len(edges) + 2
    np.testing.assert_allclose(shape[: len(edges)], [(finite <= np.float32(e)).mean() for e in edges])
    assert (FOUND.finite[0, j], FOUND.rows[0, j]) == (len(finite), len(values))


@pytest.mark.parametrize("j", [0, 1, 5])
def test_scores_are_means_of_what_the_cells_score(j):
    """Location and scale from raw values: every value scores by its cell, standardised on the training's rows."""
    edges = np.asarray(FLEET.spec.columns[j].edges, np.float32)
    training = np.concatenate([rows[:, j] for rows, _ in FLEET.training])
    finite = ROWS[np.isfinite(ROWS[:, j]), j]
    at, now = np.searchsorted(edges, training), np.searchsorted(edges, finite)
    shares = np.bincount(at, minlength=len(edges) + 1) / len(training)

    middles = norm.ppf(np.clip(np.cumsum(shares) - shares / 2, 5e-4, 1 - 5e-4))
    location = (middles - middles[at].mean()) / middles[at].std()
    np.testing.assert_allclose(of(j, SHAPE, LOCATION), location[now].mean())
    squared = location**2
    scale = (squared - squared[at].mean()) / squared[at].std()
    np.testing.assert_allclose(of(j, SHAPE, SCALE), scale[now].mean())


def test_training_itself_scores_nothing_and_a_shift_scores_its_size():
    own = COMPONENTS.sample([FLEET.info.reference.total]).values[0]
    scores = np.isin(COMPONENTS.cells, (LOCATION, SCALE))
    np.testing.assert_allclose(own[scores], 0.0, atol=1e-12)
    moved = np.concatenate([rows for rows, _ in FLEET.training])
    moved[:, 3] += 0.5
    values = COMPONENTS.sample([binned(FLEET, moved)]).values[0]
    at = (COMPONENTS.owners == 3) & (COMPONENTS.cells == LOCATION) & (COMPONENTS.nature == SHAPE)
    assert values[at] == pytest.approx(0.5, abs=0.06)


def test_categories_give_the_share_of_every_cell_and_of_the_unseen():
    codes = ROWS[:, CATEGORY]
    np.testing.assert_allclose(of(CATEGORY, UNSEEN), [(codes < 0).mean()])
    np.testing.assert_allclose(of(CATEGORY, SHAPE), [(codes == k).mean() for k in range(5)])
    assert not np.isin(COMPONENTS.cells[COMPONENTS.owners == CATEGORY], (LOCATION, SCALE)).any()


@pytest.mark.parametrize("j", range(10))
def test_faults_are_shares_of_all_rows(j):
    column = ROWS[:, j]
    assert of(j, MISSING) == pytest.approx(np.isnan(column).mean())
    assert of(j, NON_FINITE) == pytest.approx(np.isinf(column).mean())
    assert of(j, REPEATED) == pytest.approx((column[1:] == column[:-1]).sum() / len(column))


def test_outputs_are_classes_and_the_mean_of_the_largest_probability():
    labels, scores = answer(ROWS.T)
    np.testing.assert_allclose(of(11, CLASS), [(labels == 0).mean(), (labels == 1).mean()])
    assert COMPONENTS.estimates
    assert of(12, ACCURACY) == pytest.approx(scores.max(axis=1).astype(float).mean(), abs=1e-6)


def test_a_constant_column_has_no_spread_but_every_component():
    assert (of(CONSTANT, SHAPE, LOCATION), of(CONSTANT, SHAPE, SCALE)) == (0.0, 0.0)
    assert not np.isnan(FOUND.values).any()


def test_a_column_without_a_finite_value_says_nothing_but_that():
    rows = ROWS.copy()
    rows[:, 0] = np.nan
    values = COMPONENTS.sample([binned(FLEET, rows)]).values[0]
    mine = COMPONENTS.owners == 0
    assert np.isnan(values[mine & (COMPONENTS.nature == SHAPE)]).all()
    assert values[mine & (COMPONENTS.nature == MISSING)] == 1.0
    assert not np.isnan(values[~mine]).any()


def test_values_are_linear_in_counts():
    first, second = binned(FLEET, ROWS[:300]), binned(FLEET, ROWS[300:])
    parts = COMPONENTS.sample([first, second])
    both = COMPONENTS.sample([first.merge(second)])
    of_columns = COMPONENTS.owners < 11
    owners, natures = COMPONENTS.owners[of_columns], COMPONENTS.nature[of_columns]
    weights = np.where(np.isin(natures, (SHAPE, UNSEEN)), parts.finite[:, owners], parts.rows[:, owners])
    mean = (parts.values[:, of_columns] * weights).sum(axis=0) / weights.sum(axis=0)
    np.testing.assert_allclose(both.values[0, of_columns], mean, atol=1e-12)
    np.testing.assert_array_equal(both.rows[0], parts.rows.sum(axis=0))


def test_the_variance_of_a_row_is_that_of_a_share_and_one_for_a_score():
    found = COMPONENTS.variance_of_a_row(np.full(COMPONENTS.size, 0.3))
    scores = np.isin(COMPONENTS.cells, (LOCATION, SCALE))
    np.testing.assert_allclose(found[~scores], 0.21)
    np.testing.assert_allclose(found[scores], 1.0)


def test_without_probabilities_there_is_no_estimate():
    info = replace(FLEET.info, manifest=replace(FLEET.info.manifest, score="predict"))
    assert not info.manifest.probabilities
    found = components_of(info)
    assert not found.estimates
    assert found.size == COMPONENTS.size - 1
    bare = replace(binned(FLEET, ROWS), sums=np.zeros(0, np.int64))
    np.testing.assert_array_equal(found.sample([bare]).values, FOUND.values[:, :-1])


def test_cells_add_up_to_the_edges():
    """The distribution function of the last edge lacks the last cell only."""
    counts = column_counts(FLEET.spec, binned(FLEET, ROWS), 4)
    cells = FLEET.spec.columns[4].cells
    assert of(4, SHAPE, cells - 2) == pytest.approx(1 - counts[cells - 1] / counts[:cells].sum())
