"""Layouts, cells and counting: the rules that a device and the centre must share bit for bit."""

import numpy as np
import pytest

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import LayoutId
from edge_runtime.contract.profile import (
    FIXED_POINT,
    MAX_ROWS,
    Binner,
    CellSpec,
    FeatureCells,
    Profile,
    cells_from_training,
    class_counts,
    column_counts,
    empty_profile,
)

SPEC = CellSpec((FeatureCells("a", (0.0, 1.0)), FeatureCells("b", (5.0,))), FeatureCells("score", (0.5,)), 2)


def observed(rows, labels, scores, spec=SPEC, **options):
    binner = Binner(spec, probabilities=options.get("probabilities", True))
    binner.observe(np.asarray(rows, np.float32), np.asarray(labels), np.asarray(scores, np.float32))
    return binner.take()


@pytest.mark.parametrize(
    ("edges", "problem"),
    [
        ((), "0 edges"),
        (tuple(range(257)), "257 edges"),
        ((1.0, 1.0), "strictly increasing"),
        ((1.0, float("inf")), "finite"),
        ((0.1,), "float32 values"),
    ],
)
def test_bad_edges_are_refused(edges, problem):
    with pytest.raises(ContractError, match=problem):
        FeatureCells("a", edges)


def test_a_layout_has_at_least_one_feature():
    with pytest.raises(ContractError, match="0 features"):
        CellSpec((), FeatureCells("score", (0.5,)), 2)
    with pytest.raises(ContractError, match="-1 classes"):
        CellSpec(SPEC.features, SPEC.score, -1)


@pytest.mark.parametrize(
    "other",
    [
        CellSpec(SPEC.features, SPEC.score, 3),
        CellSpec(SPEC.features[::-1], SPEC.score, 2),
        CellSpec(SPEC.features, FeatureCells("score", (0.25,)), 2),
        CellSpec((FeatureCells("a", (0.0, 1.0)), FeatureCells("c", (5.0,))), SPEC.score, 2),
        # A name must not run into the next field's bytes.
        CellSpec((FeatureCells("ab", (0.0, 1.0)), FeatureCells("", (5.0,))), SPEC.score, 2),
    ],
)
def test_every_part_of_a_layout_is_in_its_id(other):
    assert other.layout != SPEC.layout
    assert SPEC.layout == CellSpec(SPEC.features, SPEC.score, 2).layout


def test_counters_stand_where_the_layout_says():
    assert SPEC.offsets.tolist() == [0, 6, 11, 16]
    assert SPEC.size == 18
    profile = observed(
        [[0.0, 5.0], [0.5, 6.0], [np.nan, 6.0], [-np.inf, 6.0]],
        [0, 1, 1, 0],
        [[0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [1.0, 0.0]],
    )
    assert profile.rows == 4
    assert profile.counts[:6].tolist() == [1, 1, 0, 1, 1, 0]  # cells, missing, non-finite, repeat
    assert profile.counts[6:11].tolist() == [1, 3, 0, 0, 2]
    assert column_counts(SPEC, profile, 1).tolist() == [1, 3]
    assert column_counts(SPEC, profile, 2).tolist() == [1, 3]
    assert class_counts(SPEC, profile).tolist() == [2, 2]
    assert (profile.sums / FIXED_POINT).tolist() == [3.0, 2.5, 1.5]
    assert profile.check(SPEC) is profile


def test_a_repeat_is_seen_across_windows_but_not_across_streams():
    binner = Binner(SPEC, probabilities=True)
    row = (np.array([[1.0, 2.0]], np.float32), np.array([0]), np.array([[0.5, 0.5]], np.float32))
    binner.observe(*row)
    assert binner.take().counts[[5, 10]].tolist() == [0, 0]
    binner.observe(*row)
    assert binner.rows == 1
    assert binner.take().counts[[5, 10]].tolist() == [1, 1]
    assert observed(*row).counts[[5, 10]].tolist() == [0, 0]


def test_missing_values_are_no_repeats():
    profile = observed([[np.nan, 1.0]] * 3, [0] * 3, [[1.0, 0.0]] * 3)
    assert profile.counts[3:6].tolist() == [3, 0, 0]


@pytest.mark.parametrize("scores", [[np.nan, np.nan], [np.inf, -np.inf], [-0.5, 2.0], [1e30, -1e30]])
def test_nonsense_of_a_model_cannot_break_the_sums(scores):
    profile = observed([[0.0, 0.0]], [0], [scores])
    assert profile.sums.max() <= FIXED_POINT
    assert profile.check(SPEC).rows == 1


def test_a_regressor_has_score_cells_and_no_classes():
    spec = CellSpec((FeatureCells("x", (0.0,)),), FeatureCells("score", (1.0,)), 0)
    profile = observed([[1.0], [2.0]], [0, 0], [[0.5], [2.0]], spec, probabilities=False)
    assert column_counts(spec, profile, 1).tolist() == [1, 1]
    assert class_counts(spec, profile).size == 0
    assert profile.sums.size == 0


def test_counts_cannot_be_changed_from_outside():
    mine = np.zeros(SPEC.size, np.int64)
    profile = Profile(layout=SPEC.layout, rows=0, counts=mine, sums=np.zeros(3, np.int64))
    mine[0] = 7
    assert profile.counts[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        profile.counts[0] = 1


def test_negative_counts_are_refused():
    with pytest.raises(ContractError, match=r"profile\.counts"):
        Profile(layout=SPEC.layout, rows=0, counts=np.array([-1]), sums=np.zeros(0, np.int64))


def lying(**changes):
    base = {"layout": SPEC.layout, "rows": 1, "counts": None, "sums": np.zeros(3, np.int64)}
    honest = observed([[0.0, 0.0]], [0], [[1.0, 0.0]])
    return Profile(**{**base, "counts": honest.counts, **changes})


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        (lying(layout="0" * 16), "read under layout"),
        (lying(counts=np.zeros(3, np.int64)), "3 counters"),
        (lying(sums=np.zeros(2, np.int64)), "2 sums"),
        (lying(rows=2), "counts 1 values in 2 rows"),
        (lying(rows=MAX_ROWS, counts=np.full(SPEC.size, 1 << 61)), "counts"),
        (lying(sums=np.full(3, FIXED_POINT + 1)), "sums probabilities to more than 1"),
    ],
)
def test_a_profile_is_checked_against_its_layout(profile, problem):
    with pytest.raises(ContractError, match=problem):
        profile.check(SPEC)


def test_counters_cannot_wrap_around_to_the_right_sum():
    # 2^63 - 1 + 2^63 - 1 + 3 is 1 in 64 bits.
    counts = observed([[0.0, 0.0]], [0], [[1.0, 0.0]]).counts.copy()
    counts[:3] = 2**63 - 1, 2**63 - 1, 3
    with np.errstate(over="ignore"):
        assert counts[:3].sum() == 1
    with pytest.raises(ContractError, match="of something in 1 rows"):
        lying(counts=counts).check(SPEC)


def test_class_counts_must_add_up_too():
    counts = observed([[0.0, 0.0]], [0], [[1.0, 0.0]]).counts.copy()
    counts[-2:] = 1, 1
    with pytest.raises(ContractError, match="counts 2 classes in 1 rows"):
        lying(counts=counts).check(SPEC)


def test_probability_sums_and_none_do_not_merge():
    with pytest.raises(ContractError, match="probability sums"):
        empty_profile(SPEC, probabilities=True).merge(empty_profile(SPEC, probabilities=False))


def test_cells_of_training_data():
    values = np.random.default_rng(0).normal(size=20_000)
    cells = cells_from_training("x", values)
    counts = np.bincount(
        np.searchsorted(np.asarray(cells.edges), values.astype(np.float32)), minlength=cells.cells
    )
    assert cells.cells == 16 + 2 * 3
    assert counts[[0, -1]].tolist() == [0, 0]  # nothing of the training lies beyond its minimum and maximum
    assert counts[3:-3] == pytest.approx(np.full(16, 20_000 * 0.98 / 16), rel=0.02)


@pytest.mark.parametrize(
    ("values", "edges"),
    [
        ([], (0.0,)),
        ([np.nan, np.inf], (0.0,)),
        ([3.0] * 10, (float(np.nextafter(np.float32(3), np.float32(0))), 3.0)),
        ([1e300, 3.0, -1e300], (float(np.nextafter(np.float32(3), np.float32(0))), 3.0)),
    ],
)
def test_cells_of_odd_columns(values, edges):
    assert cells_from_training("x", np.array(values, np.float64)).edges == edges


def test_cells_at_the_end_of_float32():
    top = float(np.finfo(np.float32).max)
    assert cells_from_training("x", np.array([-top, top])).edges == (-top, top)


def one_by_one(spec, rows, top, before=None):
    """The counters of the columns, value by value."""
    counts = np.zeros(spec.size, np.int64)
    for j, column in enumerate(spec.columns):
        start, last = int(spec.offsets[j]), before
        for i in range(len(rows)):
            value = top[i] if j == len(spec.features) else rows[i, j]
            if np.isnan(value) or np.isinf(value):
                counts[start + column.cells + int(np.isinf(value))] += 1
            else:
                counts[start + sum(bool(value > np.float32(edge)) for edge in column.edges)] += 1
            counts[start + column.cells + 2] += bool(last == value)
            last = value
    return counts


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 256, 600])
@pytest.mark.parametrize("sizes", [(1, 20, 32), (33, 3, 256, 1), (2,) * 40])
def test_columns_of_few_and_of_many_edges_are_counted_alike(sizes, n, odd):
    rng = np.random.default_rng(len(sizes) * n)
    edges = [tuple(float(e) for e in np.unique(rng.normal(size=size).astype(np.float32))) for size in sizes]
    cells = tuple(FeatureCells(f"f{j}", found) for j, found in enumerate(edges))
    spec = CellSpec(cells, FeatureCells("score", (0.25, 0.5)), 0)
    rows = rng.normal(size=(n, len(sizes))).astype(np.float32)
    rows[:, 0] = rng.choice(edges[0], n)  # on an edge a value belongs to the cell below it
    rows[n // 2 :] = rows[: n - n // 2]
    if odd:
        rows[rng.random(rows.shape) < 0.2] = np.nan
        rows[rng.random(rows.shape) < 0.1] = np.inf
        rows[rng.random(rows.shape) < 0.1] = -np.inf
    top = rng.random(n).astype(np.float32)
    binner = Binner(spec, probabilities=False)
    binner.observe(rows[: n // 3], np.zeros(n // 3, np.int64), top[: n // 3])
    binner.observe(rows[n // 3 :], np.zeros(n - n // 3, np.int64), top[n // 3 :])
    assert binner.take().counts.tolist() == one_by_one(spec, rows, top).tolist()


def test_counts_known_to_be_good_are_taken_over_and_closed():
    counts, sums = np.array([1, 2], np.int64), np.array([3], np.int64)
    found = Profile.counted(LayoutId("a" * 16), 3, counts, sums)
    assert found == Profile(layout=LayoutId("a" * 16), rows=3, counts=counts, sums=sums)
    assert found.counts is counts
    for array in (counts, sums):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 9
