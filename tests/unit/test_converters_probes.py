"""Probe rows: what they cover, that memory stays bounded, and that they come out the same each time."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Binarizer, StandardScaler

from converters import witness
from converters.lowering import lower
from converters.lowering.folding import LARGEST_KEYS, float_of, key_of
from converters.probe_inputs import KINDS, Probes, rows_in_cells
from converters.reference import CHUNK, Acceptance, Answers
from converters.signature import read
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.manifest import TOLERANCE
from edge_runtime.contract.profile import CellSpec, FeatureCells, category_cells, cells_from_training
from edge_runtime.contract.ranges import Limits
from tests.parity.cases import classes_of, scaled_integers


def spec_of(rows):
    cells = tuple(cells_from_training(f"x{j}", rows[:, j]) for j in range(rows.shape[1]))
    return CellSpec(features=cells, score=FeatureCells("score", (0.5,)), classes=2)


LARGEST_KEY = LARGEST_KEYS["float32"]


def forest_of(X, classes=3, trees=6, dtype="float32"):
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(trees, random_state=0))
    return lower(read(pipeline.fit(X, classes_of(X, classes))), dtype=dtype)


def takes_of(width, missing=(), infinite=(), unseen=()):
    return Acceptance(
        missing=np.isin(np.arange(width), missing),
        infinite=np.isin(np.arange(width), infinite),
        unseen=np.isin(np.arange(width), unseen),
    )


def probes_of(X, lowered, probes, seed=0, *, takes=None, vocabulary=None, spec=None, ask=None):
    rows = X.astype(lowered.dtype)
    width = rows.shape[1]
    return Probes(
        rows,
        takes_of(width, np.flatnonzero(np.isnan(rows).any(axis=0))) if takes is None else takes,
        spec_of(rows) if spec is None else spec,
        lowered,
        vocabulary=np.zeros(width, np.int64) if vocabulary is None else np.array(vocabulary),
        ask=ask,
        probes=probes,
        seed=seed,
    )


def splits_of(lowered):
    """Column, threshold and node of every split of the only ensemble."""
    [ensemble] = lowered.ensembles
    node = np.flatnonzero(ensemble.left >= 0)
    return SimpleNamespace(feature=ensemble.feature[node], threshold=ensemble.threshold[node], node=node)


@pytest.fixture(scope="module")
def X():
    X = scaled_integers(300)
    X[np.random.default_rng(0).random(len(X)) < 0.2, 1] = np.nan
    return X


@pytest.fixture(scope="module")
def lowered(X):
    return forest_of(X)


def by_kind(probes, dtype=np.float32):
    found: dict[str, list[np.ndarray]] = {}
    for kind, rows in probes:
        assert 0 < len(rows) <= CHUNK
        assert rows.dtype == dtype
        found.setdefault(kind, []).append(rows)
    return {kind: np.concatenate(chunks) for kind, chunks in found.items()}


def test_every_kind_is_there_in_the_size_announced(X, lowered):
    probes = probes_of(X, lowered, 20_000)
    found = by_kind(probes)
    assert set(KINDS) - set(found) == {
        "edge",
        "boundary",
        "equidistant",
        "far",
        "infinite",
        "category",
        "limit",
    }
    assert {kind: len(rows) for kind, rows in found.items()} == probes.sizes
    assert sum(probes.sizes.values()) >= 20_000


def test_every_end_of_every_range_is_tried_however_few_probes_are_wanted():
    rows = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    limits = Limits(np.full(40, -7, np.float32), np.full(40, 9, np.float32))
    limits.high[3] = limits.low[3] = rows[:, 3] = -7  # one value is a range, too
    fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, rows[:, 0] > 0)
    takes = replace(takes_of(40), limits=limits)
    probes = probes_of(rows, lower(read(fitted), dtype="float32"), 100, takes=takes)
    found = by_kind(probes)["limit"]
    assert len(found) == probes.sizes["limit"] == 39 * 6 + 1 + 64
    alone, together = found[:-64], found[-64:]
    for j in set(range(40)) - {3}:
        at = key_of(limits.low[j : j + 1])[0], key_of(limits.high[j : j + 1])[0]
        wanted = {at[0], at[0] + 1, at[0] + 2, at[1], at[1] - 1, at[1] - 2}
        assert wanted <= set(key_of(alone[:, j]).tolist())
        assert {-7.0, 9.0} <= set(together[:, j].tolist())
    assert np.isin(together[1::2], [-7, 9]).all(), "every other row has nothing but ends"


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(X, lowered):
    first, again, other = (by_kind(probes_of(X, lowered, 3000, seed)) for seed in (1, 1, 2))
    probes = probes_of(X, lowered, 3000, 1)
    by_kind(probes)
    for kind, rows in by_kind(probes).items():
        np.testing.assert_array_equal(rows, first[kind])
        np.testing.assert_array_equal(again[kind], first[kind])
    assert not np.array_equal(first["random"], other["random"])


def test_training_rows_are_never_written_to(X, lowered):
    rows = X.astype(np.float32)
    before = rows.copy()
    everything = takes_of(5, range(5), range(5), range(5))
    by_kind(
        Probes(
            rows,
            everything,
            spec_of(rows),
            lowered,
            vocabulary=np.array([0, 0, 0, 0, 3]),
            ask=sign_of(0, 0.5),
            probes=3000,
            seed=0,
        )
    )
    np.testing.assert_array_equal(rows, before)


def test_a_first_look_has_a_little_of_everything(X, lowered):
    probes = probes_of(X, lowered, 20_000)
    sizes = {kind: len(rows) for kind, rows in by_kind(probes.limited(50)).items()}
    assert sizes == {kind: min(50, size) for kind, size in probes.sizes.items()}


def test_with_room_every_split_is_tried_at_every_distance(X, lowered):
    splits = splits_of(lowered)
    coverage = probes_of(X, lowered, 20_000).coverage
    assert coverage is not None
    assert coverage.splits == len(splits.node) == coverage.reached
    assert dict(coverage.by_offset) == dict.fromkeys((0, 1, -1, 2, -2), coverage.splits)
    rows = by_kind(probes_of(X, lowered, 20_000))["threshold"]
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


def test_without_room_every_distinct_threshold_is_still_tried_at_0_and_1_to_each_side(X, lowered):
    probes = probes_of(X, lowered, 100)
    coverage = probes.coverage
    assert coverage is not None
    assert dict(coverage.by_offset) == {
        0: coverage.distinct,
        1: coverage.distinct,
        -1: coverage.distinct,
        2: 0,
        -2: 0,
    }
    splits = splits_of(lowered)
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


def test_a_witness_reaches_its_split_and_changes_the_answer_there(X):
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(6, random_state=0))
    lowered = lower(read(pipeline.fit(X, classes_of(X, 3))))
    splits, [ensemble] = splits_of(lowered), lowered.ensembles
    start = np.searchsorted(ensemble.tree, np.arange(6))
    rows = X.astype(np.float32)
    missing = np.isnan(rows).any(axis=0)
    found, decisive = witness.find(ensemble, rows, missing)
    assert (found >= 0).all()
    assert decisive.mean() > 0.98
    key = key_of(splits.threshold)
    for i in range(0, len(found), 7):
        owner = ensemble.tree[splits.node[i]]
        tree = pipeline[-1].estimators_[owner].tree_
        row = np.repeat(rows[found[i] : found[i] + 1], 2, axis=0)
        for side, offset in enumerate((0, 1)):
            row[side, splits.feature[i]] = witness.beside(
                key[i : i + 1], offset, missing[splits.feature[i : i + 1]]
            )[0]
        scaled = pipeline[0].transform(row.astype(np.float64)).astype(np.float32)
        assert tree.decision_path(scaled).toarray()[:, splits.node[i] - start[owner]].all()
        low, high = tree.predict(scaled)
        assert decisive[i] == (np.abs(low - high).max() > TOLERANCE)


def test_a_split_that_no_row_reaches_is_counted(X, lowered):
    coverage = probes_of(X[:20], lowered, 3000).coverage
    assert coverage is not None
    assert 0 < coverage.reached < coverage.splits
    assert coverage.decisive <= coverage.reached


def test_beside_a_threshold():
    key = np.array([100, -100, LARGEST_KEY, -LARGEST_KEY - 1, LARGEST_KEY])
    missing = np.array([True, False, True, True, False])
    at, above = witness.beside(key, 0, missing), witness.beside(key, 1, missing)
    np.testing.assert_array_equal(at[:2], float_of(key[:2], "float32"))
    np.testing.assert_array_equal(above[:2], float_of(key[:2] + 1, "float32"))
    np.testing.assert_array_equal(at[2:], np.array([0, np.nan, 0], np.float32))
    np.testing.assert_array_equal(above[2:], np.array([np.nan, 0, 0], np.float32))


def test_missing_values_stand_only_where_they_may(X, lowered):
    found = by_kind(probes_of(X, lowered, 5000))
    assert np.isnan(found["missing"][:, 1]).mean() > 0.2
    assert np.isnan(found["missing"][0, 1])
    for rows in found.values():
        assert not np.isnan(rows[:, [0, 2, 3, 4]]).any()
    full = np.nan_to_num(X)
    assert "missing" not in by_kind(probes_of(full, forest_of(full), 5000))


def test_integers_extremes_and_huge_values(X, lowered):
    found = by_kind(probes_of(X, lowered, 20_000))
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
    probes = probes_of(full, lower(read(pipeline)), 1000)
    assert probes.coverage is None
    assert "threshold" not in probes.sizes
    assert sum(probes.sizes.values()) == 1000


def test_too_few_probes_are_refused(X, lowered):
    with pytest.raises(ConfigError, match="probes is 99; at least 100"):
        probes_of(X, lowered, 99)


def test_a_column_that_takes_no_new_value_is_drawn_from_what_it_held():
    rows = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    rows[:, 1] = np.arange(50) % 3
    takes = replace(takes_of(2), only={1: np.array([0, 1, 2], np.float32)})
    drawn = rows_in_cells(
        spec_of(rows), np.random.default_rng(1), 300, np.zeros(2, np.int64), takes, np.dtype(np.float32)
    )
    assert set(drawn[:, 1].tolist()) == {0.0, 1.0, 2.0}
    assert len(set(drawn[:, 0].tolist())) > 200


def test_synthetic_rows_visit_every_cell_and_stay_near():
    rows = np.random.default_rng(0).normal(3, 2, size=(500, 2)).astype(np.float32)
    rows[:, 1] = 7.0
    spec = spec_of(rows)
    drawn = rows_in_cells(
        spec, np.random.default_rng(1), 4000, np.zeros(2, np.int64), takes_of(2), np.dtype(np.float32)
    )
    edges = np.asarray(spec.features[0].edges, np.float32)
    counts = np.bincount(np.searchsorted(edges, drawn[:, 0]), minlength=len(edges) + 1)
    assert counts.min() > 0.3 * counts.mean()
    reach = edges[-1] - edges[0]
    assert (
        edges[0] - reach <= drawn[:, 0].min() < edges[0] < edges[-1] < drawn[:, 0].max() <= edges[-1] + reach
    )
    assert (drawn[:, 1] == 7.0).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_edges_of_steps_are_tried_at_every_distance(X, dtype):
    full = np.nan_to_num(X)
    pipeline = make_pipeline(Binarizer(threshold=0.3), LogisticRegression()).fit(full, classes_of(full, 2))
    lowered = lower(read(pipeline), dtype=dtype)
    assert {column for column, _ in lowered.edges} == set(range(5))
    probes = probes_of(full, lowered, 1000)
    rows = by_kind(probes, dtype)["edge"]
    limit = np.array([0.3], dtype)
    at = key_of(limit)[0] - (float(limit[0]) > 0.3)
    for j in range(5):
        assert set(range(at - 2, at + 3)) <= set(key_of(rows[:, j]).tolist())
    assert len(rows) == 5 * 5


def sign_of(column, edge):
    """A pipeline whose answer jumps where ``column`` exceeds ``edge``, and changes nowhere else."""

    def ask(rows):
        above = (rows[:, column] > edge).astype(np.int64)[:, None]
        sure = np.ones(len(rows), bool)
        return Answers(labels=above, scores=above.astype(float), accepted=sure, ties=~sure[:, None])

    return ask


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_boundaries_are_found_by_asking_the_pipeline(X, dtype):
    full = np.nan_to_num(X)
    pipeline = LogisticRegression().fit(full, classes_of(full, 2))
    edge = float(np.median(full[:, 2])) + 0.1
    found = by_kind(probes_of(full, lower(read(pipeline), dtype=dtype), 1000, ask=sign_of(2, edge)), dtype)[
        "boundary"
    ]
    last = key_of(np.array([edge], dtype))[0]  # numpy compares in the type of the rows
    keys = key_of(found[:, 2])
    for offset in (-2, -1, 0, 1, 2, 3):  # the last value below, the first one above, and two beyond each
        assert (keys == last + offset).sum() >= 10


def test_infinities_stand_only_where_they_may(X, lowered):
    found = by_kind(probes_of(X, lowered, 5000, takes=takes_of(5, [1], [0, 3])))
    rows = found.pop("infinite")
    assert len(rows) == 4
    assert [(np.isneginf(rows[:, j]).sum(), np.isposinf(rows[:, j]).sum()) for j in (0, 3)] == [(1, 1)] * 2
    assert (np.isinf(rows).sum(axis=1) == 1).all()
    assert not any(np.isinf(rest).any() for rest in found.values())


@pytest.mark.parametrize(
    "limits", [None, Limits(np.full(2, -np.inf, np.float32), np.array([np.inf, 9.0], np.float32))]
)
def test_every_split_between_all_numbers_and_nan_meets_an_infinity_on_a_row_that_reaches_it(limits):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(900, 2)).astype(np.float32)
    gaps = rng.random(rows.shape) < 0.1
    rare = (rows > 1.2).any(axis=1, keepdims=True) & gaps
    y = rows.sum(axis=1) + 5 * rare.sum(axis=1)
    rows[gaps] = np.nan
    model = HistGradientBoostingRegressor(max_iter=40, max_leaf_nodes=None, min_samples_leaf=5)
    model.fit(rows.astype(np.float64), y)
    lowered = lower(read(model), dtype="float32")
    probes = probes_of(rows, lowered, 4000, takes=replace(takes_of(2, [0, 1], [0, 1]), limits=limits))
    found = by_kind(probes)["infinite"]
    [trees] = lowered.ensembles
    endless = [0, 1] if limits is None else [0]
    wanted = np.isposinf(trees.threshold) & (trees.left >= 0) & np.isin(trees.feature, endless)
    reached = np.zeros(len(wanted), bool)
    for row in found:
        node = np.flatnonzero(np.r_[True, np.diff(trees.tree) != 0])
        while (node := node[trees.left[node] >= 0]).size:
            value = row[trees.feature[node]]
            reached[node] |= np.isposinf(value)
            left = np.where(np.isnan(value), trees.missing_left[node], value <= trees.threshold[node])
            node = np.where(left, trees.left[node], trees.right[node])
    assert wanted.sum() > 5
    assert set(trees.feature[wanted].tolist()) == set(endless)
    assert reached[wanted].all()


def test_every_category_is_tried_and_strangers_where_they_may_be(X):
    full = np.nan_to_num(X)
    full[:, 3], full[:, 4] = np.arange(300) % 2, np.arange(300) % 3
    lowered = lower(read(LogisticRegression(max_iter=5000).fit(full, classes_of(full, 2))))
    cells = spec_of(full).features
    spec = CellSpec(
        features=(*cells[:3], category_cells("x3", 4), category_cells("x4", 70)),
        score=FeatureCells("score", (0.5,)),
        classes=2,
    )
    takes = takes_of(5, unseen=[4])
    found = by_kind(probes_of(full, lowered, 1000, takes=takes, vocabulary=[0, 0, 0, 4, 70], spec=spec))
    codes = {3: set(range(4)), 4: set(range(-1, 70))}
    assert len(found["category"]) == 4 + 71
    assert set(found["category"][:, 3].tolist()) == codes[3]
    assert set(found["category"][:, 4].tolist()) == codes[4]
    assert set(found["random"][:, 3].tolist()) == codes[3]
    assert -1 in found["random"][:, 4]
    for rows in found.values():
        for j in (3, 4):
            assert set(rows[:, j].tolist()) <= codes[j]


def test_thresholds_of_float64_input_are_tried_to_the_last_bit(X):
    lowered = forest_of(X, dtype="float64")
    splits = splits_of(lowered)
    rows = by_kind(probes_of(X, lowered, 20_000), np.float64)["threshold"]
    tried = {(j, k) for j in range(5) for k in key_of(np.nan_to_num(rows[:, j])).tolist()}
    finite = np.abs(key_of(splits.threshold)) < LARGEST_KEYS["float64"]
    for offset in (-2, -1, 0, 1, 2):
        keys = (key_of(splits.threshold[finite]) + offset).tolist()
        assert set(zip(splits.feature[finite].tolist(), keys, strict=True)) <= tried
