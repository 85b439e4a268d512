"""Probe rows: what they cover, that memory stays bounded, and that they come out the same each time."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from converters import witness
from converters.probe_inputs import KINDS, Probes, rows_in_cells
from converters.reference import CHUNK
from converters.rewrite import LARGEST_KEY, float_of, fold, key_of
from converters.signature import read
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.profile import CellSpec, FeatureCells, cells_from_training
from tests.parity.cases import classes_of, scaled_integers


def spec_of(rows):
    cells = tuple(cells_from_training(f"x{j}", rows[:, j]) for j in range(rows.shape[1]))
    return CellSpec(features=cells, score=FeatureCells("score", (0.5,)), classes=2)


def forest_of(X, classes=3, trees=6):
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(trees, random_state=0))
    return fold(read(pipeline.fit(X, classes_of(X, classes))))


def probes_of(X, folded, probes, seed=0):
    rows = X.astype(np.float32)
    return Probes(rows, np.isnan(rows).any(axis=0), spec_of(rows), folded, probes=probes, seed=seed)


@pytest.fixture(scope="module")
def X():
    X = scaled_integers(300)
    X[np.random.default_rng(0).random(len(X)) < 0.2, 1] = np.nan
    return X


@pytest.fixture(scope="module")
def folded(X):
    return forest_of(X)


def by_kind(probes):
    found: dict[str, list[np.ndarray]] = {}
    for kind, rows in probes:
        assert 0 < len(rows) <= CHUNK
        assert rows.dtype == np.float32
        found.setdefault(kind, []).append(rows)
    return {kind: np.concatenate(chunks) for kind, chunks in found.items()}


def test_every_kind_is_there_in_the_size_announced(X, folded):
    probes = probes_of(X, folded, 20_000)
    found = by_kind(probes)
    assert tuple(found) == KINDS
    assert {kind: len(rows) for kind, rows in found.items()} == probes.sizes
    assert sum(probes.sizes.values()) >= 20_000


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(X, folded):
    first, again, other = (by_kind(probes_of(X, folded, 3000, seed)) for seed in (1, 1, 2))
    probes = probes_of(X, folded, 3000, 1)
    by_kind(probes)
    for kind, rows in by_kind(probes).items():
        np.testing.assert_array_equal(rows, first[kind])
        np.testing.assert_array_equal(again[kind], first[kind])
    assert not np.array_equal(first["random"], other["random"])


def test_training_rows_are_never_written_to(X, folded):
    rows = X.astype(np.float32)
    before = rows.copy()
    by_kind(Probes(rows, np.isnan(rows).any(axis=0), spec_of(rows), folded, probes=3000, seed=0))
    np.testing.assert_array_equal(rows, before)


def test_a_first_look_has_a_little_of_everything(X, folded):
    probes = probes_of(X, folded, 20_000)
    sizes = {kind: len(rows) for kind, rows in by_kind(probes.limited(50)).items()}
    assert sizes == {kind: min(50, size) for kind, size in probes.sizes.items()}


def test_with_room_every_split_is_tried_at_every_distance(X, folded):
    splits = folded.splits
    coverage = probes_of(X, folded, 20_000).coverage
    assert coverage is not None
    assert coverage.splits == len(splits.node) == coverage.reached
    assert dict(coverage.by_offset) == dict.fromkeys((0, 1, -1, 2, -2), coverage.splits)
    rows = by_kind(probes_of(X, folded, 20_000))["threshold"]
    assert len(rows) == 5 * coverage.splits
    tried = {(j, k) for j in range(5) for k in key_of(np.nan_to_num(rows[:, j])).tolist()}
    finite = np.abs(key_of(splits.threshold)) < LARGEST_KEY
    for offset in (-2, -1, 0, 1, 2):
        wanted = set(
            zip(
                splits.feature[finite].tolist(),
                (key_of(splits.threshold[finite]) + offset).tolist(),
                strict=True,
            )
        )
        assert wanted <= tried


def test_without_room_every_distinct_threshold_is_still_tried_at_0_and_1_to_each_side(X, folded):
    probes = probes_of(X, folded, 100)
    coverage = probes.coverage
    assert coverage is not None
    assert dict(coverage.by_offset) == {
        0: coverage.distinct,
        1: coverage.distinct,
        -1: coverage.distinct,
        2: 0,
        -2: 0,
    }
    splits = folded.splits
    rows = by_kind(probes)["threshold"]
    tried = {(j, k) for j in range(5) for k in key_of(np.nan_to_num(rows[:, j])).tolist()}
    finite = np.abs(key_of(splits.threshold)) < LARGEST_KEY
    for offset in (-1, 0, 1):
        assert (
            set(
                zip(
                    splits.feature[finite].tolist(),
                    (key_of(splits.threshold[finite]) + offset).tolist(),
                    strict=True,
                )
            )
            <= tried
        )


def test_a_witness_reaches_its_split_and_changes_the_answer_there(X, folded):
    splits = folded.splits
    rows = X.astype(np.float32)
    missing = np.isnan(rows).any(axis=0)
    found, decisive = witness.find(folded, splits, rows, missing)
    assert (found >= 0).all()
    assert decisive.mean() > 0.98
    key = key_of(splits.threshold)
    for i in range(0, len(found), 7):
        tree = folded.estimator.estimators_[splits.tree[i]].tree_
        row = np.repeat(rows[found[i] : found[i] + 1], 2, axis=0)
        for side, offset in enumerate((0, 1)):
            row[side, splits.feature[i]] = witness.beside(
                key[i : i + 1], offset, missing[splits.feature[i : i + 1]]
            )[0]
        assert tree.decision_path(row).toarray()[:, splits.node[i]].all()
        low, high = tree.predict(row)
        assert decisive[i] == (not np.array_equal(low, high))


def test_a_split_that_no_row_reaches_is_counted(X, folded):
    coverage = probes_of(X[:20], folded, 3000).coverage
    assert coverage is not None
    assert 0 < coverage.reached < coverage.splits
    assert coverage.decisive <= coverage.reached


def test_beside_a_threshold():
    key = np.array([100, -100, LARGEST_KEY, -LARGEST_KEY - 1, LARGEST_KEY])
    missing = np.array([True, False, True, True, False])
    at, above = witness.beside(key, 0, missing), witness.beside(key, 1, missing)
    np.testing.assert_array_equal(at[:2], float_of(key[:2]))
    np.testing.assert_array_equal(above[:2], float_of(key[:2] + 1))
    np.testing.assert_array_equal(at[2:], np.array([0, np.nan, 0], np.float32))
    np.testing.assert_array_equal(above[2:], np.array([np.nan, 0, 0], np.float32))


def test_missing_values_stand_only_where_they_may(X, folded):
    found = by_kind(probes_of(X, folded, 5000))
    assert np.isnan(found["missing"][:, 1]).mean() > 0.2
    assert np.isnan(found["missing"][0, 1])
    for rows in found.values():
        assert not np.isnan(rows[:, [0, 2, 3, 4]]).any()
    full = np.nan_to_num(X)
    assert "missing" not in by_kind(probes_of(full, forest_of(full), 5000))


def test_integers_extremes_and_huge_values(X, folded):
    found = by_kind(probes_of(X, folded, 20_000))
    assert not found["integer"][0].any()
    column = X[:, 0].astype(np.float32)
    extremes = found["extreme"][:, 0]
    low, high = np.float32(column.min()), np.float32(column.max())
    for value in (low, high, np.nextafter(low, np.float32(-np.inf)), np.nextafter(high, np.float32(np.inf))):
        assert value in extremes
    assert extremes.max() > 50 * np.abs(column).max()
    assert np.nanmax(np.abs(found["huge"])) > 3e38
    for rows in found.values():
        assert not np.isinf(rows).any()


def test_a_linear_model_has_no_thresholds(X):
    full = np.nan_to_num(X)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(full, classes_of(full, 2))
    probes = probes_of(full, fold(read(pipeline)), 1000)
    assert probes.coverage is None
    assert "threshold" not in probes.sizes
    assert sum(probes.sizes.values()) == 1000


def test_too_few_probes_are_refused(X, folded):
    with pytest.raises(ConfigError, match="probes is 99; at least 100"):
        probes_of(X, folded, 99)


def test_synthetic_rows_visit_every_cell_and_stay_near():
    rows = np.random.default_rng(0).normal(3, 2, size=(500, 2)).astype(np.float32)
    rows[:, 1] = 7.0
    spec = spec_of(rows)
    drawn = rows_in_cells(spec, np.random.default_rng(1), 4000)
    edges = np.asarray(spec.features[0].edges, np.float32)
    counts = np.bincount(np.searchsorted(edges, drawn[:, 0]), minlength=len(edges) + 1)
    assert counts.min() > 0.3 * counts.mean()
    reach = edges[-1] - edges[0]
    assert (
        edges[0] - reach <= drawn[:, 0].min() < edges[0] < edges[-1] < drawn[:, 0].max() <= edges[-1] + reach
    )
    assert (drawn[:, 1] == 7.0).any()
