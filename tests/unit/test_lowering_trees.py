"""Trees, forests and boosting: the graph answers as scikit-learn on rows at and beside every threshold."""

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from sklearn.datasets import make_regression
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler
from sklearn.tree import (
    DecisionTreeClassifier,
    DecisionTreeRegressor,
    ExtraTreeClassifier,
    ExtraTreeRegressor,
)

from converters.lowering.folding import LARGEST_KEYS, float_of, key_of
from converters.lowering.graph import Lowering
from converters.lowering.rules import RULES
from converters.optimize import ML_DOMAIN
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

pytestmark = pytest.mark.sampled(2)

RNG = np.random.default_rng(0)
N = 160
# Integers over a power of two lie on the thresholds that a scaler rounds.
X = (RNG.integers(-40, 40, size=(N, 4)) / 8.0) * np.array([1.0, 3.0, 0.1, 1000.0])
CLASSES = {
    2: (X[:, 0] + X[:, 1] > 0.3).astype(int),
    3: np.digitize(X[:, 0] + X[:, 1] / 3, [-2.0, 2.0]),
}
TARGET = X[:, 0] ** 2 + 10 * np.sin(X[:, 1]) + X[:, 2]
SCALERS = {
    "none": list,
    "standard": lambda: [StandardScaler()],
    "clip": lambda: [MinMaxScaler((-1, 2), clip=True)],
    "chain": lambda: [RobustScaler(), MinMaxScaler(), StandardScaler()],
    "pca": lambda: [PCA(3)],
}


def hostile(found, missing=False, limit=3000):
    """Rows of ``X`` with a column set to each raw threshold and edge and the two values on either side of it."""
    g = found.lowering
    edges = list(g.edges)
    for ensemble in g.ensembles:
        inner = ensemble.left >= 0
        for j in np.unique(ensemble.feature[inner]):
            edges.append((j, np.unique(ensemble.threshold[inner & (ensemble.feature == j)])))
    parts = [X.astype(g.dtype)]
    rng = np.random.default_rng(1)
    for column, values in edges:
        finite = values[np.isfinite(values)]
        largest = LARGEST_KEYS[g.dtype]
        for offset in (-2, -1, 0, 1, 2):
            keys = np.clip(key_of(finite) + offset, -largest, largest)
            made = X[rng.integers(N, size=len(keys))].astype(g.dtype)
            made[:, column] = float_of(keys, g.dtype)
            parts.append(made[np.abs(made).max(axis=1) < 1e30])
    rows = np.concatenate(parts)
    rows = rows[rng.permutation(len(rows))[:limit]]
    if missing:
        holes = rows[:400].copy()
        holes[rng.random(holes.shape) < 0.4] = np.nan
        rows = np.concatenate([rows, holes])
    return np.concatenate([rows, -rows[:50], np.zeros((1, rows.shape[1]), rows.dtype)])


def check(pipeline, *, missing=False, **options):
    found = lowered.run(pipeline, X, **options)
    return lowered.assert_equal(pipeline, hostile(found, missing), **options)


def with_holes(rate=0.15):
    holes = X.copy()
    holes[np.random.default_rng(5).random(X.shape) < rate] = np.nan
    return holes


@pytest.mark.covering
@pytest.mark.parametrize("scaler", list(SCALERS))
@pytest.mark.parametrize(
    ("dtype", "arithmetic"), [("float32", "float64"), ("float32", "float32"), ("float64", "float64")]
)
@pytest.mark.parametrize("count", [2, 3])
def test_forest_classifiers_with_every_scaler(scaler, dtype, arithmetic, count):
    for kind in (RandomForestClassifier, ExtraTreesClassifier):
        pipeline = make_pipeline(*SCALERS[scaler](), kind(6, random_state=0)).fit(X, CLASSES[count])
        check(pipeline, dtype=dtype, arithmetic=arithmetic)


@pytest.mark.covering
@pytest.mark.parametrize("scaler", ["none", "standard", "pca"])
@pytest.mark.parametrize("targets", [1, 2])
def test_regressors(scaler, targets):
    y = TARGET if targets == 1 else np.stack([TARGET, -TARGET * 3], axis=1)
    for model in (
        DecisionTreeRegressor(random_state=0),
        ExtraTreeRegressor(random_state=0),
        RandomForestRegressor(5, random_state=0),
        ExtraTreesRegressor(5, random_state=0),
        DecisionTreeRegressor(criterion="absolute_error", max_depth=3),
    ):
        check(make_pipeline(*SCALERS[scaler](), model).fit(X, y))


@pytest.mark.parametrize("labels", [["b", "a", "c"], [-5, 7, 2], [True, False, True]])
def test_single_classifiers(labels):
    y = np.array(labels)[CLASSES[3]]
    for model in (
        DecisionTreeClassifier(random_state=0),
        DecisionTreeClassifier(max_depth=1),
        ExtraTreeClassifier(max_depth=3, random_state=0, class_weight="balanced"),
        DecisionTreeClassifier(min_samples_leaf=X.shape[0]),
    ):
        check(make_pipeline(StandardScaler(), model).fit(X, y))
    check(DecisionTreeClassifier(monotonic_cst=[1, -1, 0, 0]).fit(X, CLASSES[2]))


def test_several_outputs():
    y = np.stack([CLASSES[3], CLASSES[2]], axis=1)
    for model in (DecisionTreeClassifier(max_depth=3), RandomForestClassifier(5, random_state=0)):
        pipeline = make_pipeline(StandardScaler(), model).fit(X, y)
        found = check(pipeline)
        rows = hostile(found)
        labels = lowered.run(pipeline, rows).labels
        np.testing.assert_array_equal(labels, pipeline.predict(rows.astype(np.float64)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_missing_values_go_their_way(dtype):
    holes = with_holes()
    for model, y in (
        (RandomForestClassifier(6, random_state=0), CLASSES[3]),
        (DecisionTreeRegressor(), TARGET),
        (HistGradientBoostingClassifier(max_iter=8, min_samples_leaf=5), CLASSES[2]),
        (HistGradientBoostingRegressor(max_iter=8, min_samples_leaf=5), TARGET),
        (IsolationForest(n_estimators=10, random_state=0), None),
    ):
        for scaler in ("none", "standard"):
            check(make_pipeline(*SCALERS[scaler](), model).fit(holes, y), missing=True, dtype=dtype)


GAP_MODELS = {
    "tree": (DecisionTreeClassifier, DecisionTreeRegressor, {"max_depth": 5}),
    "extra tree": (ExtraTreeClassifier, ExtraTreeRegressor, {"max_depth": 5}),
    "forest": (RandomForestClassifier, RandomForestRegressor, {"n_estimators": 4, "max_depth": 5}),
    "extra trees": (ExtraTreesClassifier, ExtraTreesRegressor, {"n_estimators": 4, "max_depth": 5}),
    "histogram": (
        HistGradientBoostingClassifier,
        HistGradientBoostingRegressor,
        {"max_iter": 5, "min_samples_leaf": 4, "early_stopping": False},
    ),
}


def gaps_that_tell(seed, rates):
    """Rows with gaps, and what depends on them: in columns 0 and 2 they go with high values, in 1 and 3 with low."""
    gaps = np.random.default_rng(seed).random(X.shape) < np.array(rates)
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    return np.where(gaps, np.nan, X), (gaps * signs * 3.0).sum(axis=1) + X[:, 0] / 2 + X[:, 1] / 6


def fitted_to_gaps(kind, target, holes, y, **options):
    """``target`` is a number of classes, or 0 for a regressor."""
    classifier, regressor, fixed = GAP_MODELS[kind]
    made = (classifier if target else regressor)(**fixed, **options, random_state=0)
    return made.fit(holes, np.digitize(y, np.quantile(y, np.arange(1, target) / target)) if target else y)


def splits_of(model):
    """(thresholds, whether NaN goes left) of all splits over numbers."""
    if hasattr(model, "_predictors"):
        nodes = np.concatenate([tree.nodes for stage in model._predictors for tree in stage])
        nodes = nodes[(nodes["is_leaf"] == 0) & (nodes["is_categorical"] == 0)]
        return nodes["num_threshold"], nodes["missing_go_to_left"].astype(bool)
    trees = [member.tree_ for member in getattr(model, "estimators_", [model])]
    inner = [tree.children_left >= 0 for tree in trees]
    return (
        np.concatenate([tree.threshold[at] for tree, at in zip(trees, inner, strict=True)]),
        np.concatenate([tree.missing_go_to_left[at] for tree, at in zip(trees, inner, strict=True)]) > 0,
    )


def to_the_ends(rows, dtype, infinite):
    """Rows with each column at the ends of float32 and missing, ``infinite`` ones (F,) beyond; then with several so."""
    largest = float(np.finfo(np.float32).max)
    far = [np.inf, -np.inf, *([] if dtype == "float32" else [1e300, -1e300, float(np.finfo(dtype).max)])]
    ends = np.array([np.nan, largest, -largest, 1e30, -1e30, 0.0, *far])
    alone = np.repeat(rows, rows.shape[1] * len(ends), axis=0)
    at = np.arange(len(alone))
    alone[at, at // len(ends) % rows.shape[1]] = ends[at % len(ends)]
    rng = np.random.default_rng(2)
    made = np.concatenate(
        [alone, np.where(rng.random(alone.shape) < 0.5, rng.choice(ends, alone.shape), alone)]
    )
    return np.where(infinite, made, np.clip(made, -largest, largest))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("target", [0, 2, 3])
@pytest.mark.parametrize("kind", list(GAP_MODELS))
def test_what_gaps_taught_holds_for_every_value(kind, target, dtype):
    holes, y = gaps_that_tell(0, [0.1, 0.2, 0.3, 0.1])
    model = fitted_to_gaps(kind, target, holes, y)
    threshold, missing_left = splits_of(model)
    assert missing_left.any()
    assert not missing_left.all()
    # A split drawn at random is never between all numbers and what is missing.
    assert np.isposinf(threshold).any() == (not kind.startswith("extra"))
    rows = to_the_ends(holes[:30], dtype, np.full(4, kind == "histogram"))
    lowered.assert_equal(model, rows, dtype=dtype)


@pytest.mark.parametrize("kind", list(GAP_MODELS))
@settings(max_examples=15)
@given(
    target=st.sampled_from([0, 2, 3]),
    seed=st.integers(0, 2**16),
    rates=st.lists(st.sampled_from([0.0, 0.03, 0.15, 0.5, 0.9]), min_size=4, max_size=4),
    bins=st.sampled_from([2, 3, 8, 255]),
    categories=st.sampled_from([[], [1], [0, 3]]),
    dtype=st.sampled_from(["float32", "float64"]),
    arithmetic=st.sampled_from(["float32", "float64"]),
)
def test_random_gaps_teach_nothing_that_is_lost(
    kind, target, seed, rates, bins, categories, dtype, arithmetic
):
    holes, y = gaps_that_tell(seed, rates)
    options, infinite = {}, np.full(4, kind == "histogram")
    if kind == "histogram":
        options = {"max_bins": bins, "categorical_features": categories or None}
        holes[:, categories] = np.floor(holes[:, categories]) % max(1, bins - 1)
        infinite[categories] = False  # the encoder in the model refuses them
    model = fitted_to_gaps(kind, target, holes, y, **options)
    rows = to_the_ends(holes[seed % 100 : seed % 100 + 10], dtype, infinite)
    lowered.assert_equal(model, rows, dtype=dtype, arithmetic=arithmetic)


def test_a_forest_is_one_operator():
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=0)).fit(X, CLASSES[3])
    [node] = lowered.run(pipeline, X, arithmetic="float32").model.graph.node
    assert (node.op_type, node.domain) == ("TreeEnsembleClassifier", ML_DOMAIN)
    kinds = [node.op_type for node in lowered.run(pipeline, X).model.graph.node]
    assert kinds == ["Cast", "TreeEnsembleClassifier"]


@pytest.mark.covering
@pytest.mark.parametrize("scaler", ["none", "chain", "pca"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [2, 3])
def test_boosted_classifiers(scaler, dtype, count):
    models = [
        GradientBoostingClassifier(n_estimators=8, random_state=0),
        GradientBoostingClassifier(n_estimators=5, init="zero"),
        GradientBoostingClassifier(n_estimators=5, init=GaussianNB()),
        GradientBoostingClassifier(n_estimators=5, init=DecisionTreeClassifier(max_depth=2)),
        GradientBoostingClassifier(n_estimators=5, init=DummyClassifier(strategy="most_frequent")),
        HistGradientBoostingClassifier(max_iter=8, min_samples_leaf=5),
    ]
    if count == 2:
        models.append(GradientBoostingClassifier(n_estimators=5, loss="exponential"))
        models.append(GradientBoostingClassifier(n_estimators=5, loss="exponential", init=GaussianNB()))
    for model in models:
        check(make_pipeline(*SCALERS[scaler](), model).fit(X, CLASSES[count]), dtype=dtype)


@pytest.mark.parametrize("scaler", ["none", "standard", "clip"])
def test_boosted_regressors(scaler):
    positive = np.abs(TARGET) + 0.1
    for model in (
        *(
            GradientBoostingRegressor(n_estimators=6, loss=loss)
            for loss in ("squared_error", "absolute_error", "huber", "quantile")
        ),
        GradientBoostingRegressor(n_estimators=6, init="zero", subsample=0.5, random_state=0),
        GradientBoostingRegressor(n_estimators=6, init=LinearRegression()),
        *(
            HistGradientBoostingRegressor(max_iter=6, min_samples_leaf=5, loss=loss)
            for loss in ("squared_error", "absolute_error", "gamma", "poisson")
        ),
        HistGradientBoostingRegressor(max_iter=6, min_samples_leaf=5, loss="quantile", quantile=0.8),
    ):
        check(make_pipeline(*SCALERS[scaler](), model).fit(X, positive))


@pytest.mark.covering
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_splits_over_categories(holes, before):
    rows = X.copy()
    rows[:, 1] = np.random.default_rng(3).integers(0, 40, N) * 1.5
    rows[:, 3] = np.random.default_rng(4).integers(-3, 5, N)
    y = np.isin(rows[:, 1], [0.0, 1.5, 9.0, 30.0, 33.0]) * 3 + (rows[:, 3] % 3) + rows[:, 0] / 10
    if holes:
        rows[np.random.default_rng(5).random(rows.shape) < 0.15] = np.nan
    steps = [MinMaxScaler()] if before else []
    tests = np.concatenate(
        [rows, rows + 1.0, rows + 1e-3, np.full((1, 4), -1.0), np.full((1, 4), np.nan), rows * 0 + 300]
    )
    for model, target in (
        (HistGradientBoostingRegressor(max_iter=8, min_samples_leaf=3, categorical_features=[1, 3]), y),
        (
            HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=3, categorical_features=[3, 1]),
            np.digitize(y, [1, 3]),
        ),
    ):
        pipeline = make_pipeline(*steps, model).fit(rows, target)
        assert any(p.nodes["is_categorical"].any() for stage in pipeline[-1]._predictors for p in stage)
        for dtype in ("float32", "float64"):
            lowered.assert_equal(pipeline, tests, dtype=dtype)
            found = lowered.run(pipeline, rows, dtype=dtype)
            lowered.assert_equal(pipeline, hostile(found, holes), dtype=dtype)


@pytest.mark.parametrize("scaler", ["none", "standard", "pca"])
def test_isolation_forests(scaler):
    for model in (
        IsolationForest(n_estimators=20, random_state=0),
        IsolationForest(n_estimators=20, random_state=0, max_features=0.5, contamination=0.1),
        IsolationForest(n_estimators=10, random_state=0, max_samples=32, bootstrap=True),
        IsolationForest(n_estimators=5, random_state=0, max_samples=1),
    ):
        pipeline = make_pipeline(*SCALERS[scaler](), model).fit(X)
        found = check(pipeline)
        assert sum(node.op_type.startswith("TreeEnsemble") for node in found.model.graph.node) == 1


def test_isolation_scores_are_nearly_float64():
    model = IsolationForest(n_estimators=50, random_state=0, contamination=0.2).fit(X)
    g = Lowering(width=4, dtype="float64", rules=RULES)
    decision = g.call(model, "decision_function", g.start())
    label = g.call(model, "predict", g.start())
    score, index = lowered_values(g, decision, label)
    np.testing.assert_allclose(score[:, 0], model.decision_function(X), rtol=0, atol=1e-12)
    clear = np.abs(model.decision_function(X)) > 1e-12
    np.testing.assert_array_equal((index * 2 - 1)[clear], model.predict(X)[clear])


def lowered_values(g, *values):
    graph = g.graph()
    graph.input.append(helper.make_tensor_value_info("input", 11, ["n", g.width]))
    for value in values:
        graph.output.append(
            helper.make_tensor_value_info(value.name, 7 if value.dtype == "int64" else 11, None)
        )
    model = helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(ML_DOMAIN, 3)]
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": X})


def test_big_targets_lose_nothing_that_float32_can_hold():
    rows, y = make_regression(150, 4, random_state=0)
    pipeline = RandomForestRegressor(30, random_state=0).fit(rows, y * 1e6)
    lowered.assert_equal(pipeline, rows)


def test_splits_over_text_read_the_codes_of_the_packed_input():
    rng = np.random.default_rng(8)
    words = np.array(["red", "green", "blue", "grey"], dtype=object)
    rows = np.empty((N, 2), dtype=object)
    rows[:, 0], rows[:, 1] = X[:, 0], words[rng.integers(4, size=N)]
    y = (rows[:, 1] == "blue") * 5.0 + (rows[:, 1] == "red") * 2.0 + X[:, 0]
    rows[:5, 1] = np.nan
    model = HistGradientBoostingRegressor(max_iter=6, min_samples_leaf=3, categorical_features=[1]).fit(
        rows, y
    )
    vocabulary = ("blue", "cyan", "red", "green")  # one word the model never saw; "grey" is not among them
    codes = {word: float(code) for code, word in enumerate(vocabulary)}
    packed = np.array([[a, np.nan if isinstance(b, float) else codes.get(b, -1.0)] for a, b in rows])
    packed = np.concatenate([packed, [[0.5, 1.0]]]).astype(np.float64)
    tried = np.concatenate([rows, np.array([[0.5, "cyan"]], dtype=object)])
    known = np.array([b != "grey" for b in tried[:, 1]])
    found = lowered.run(model, packed, dtype="float64", vocabularies=(None, vocabulary))
    np.testing.assert_allclose(found.scores[known, 0], model.predict(tried)[known], rtol=1e-6)
    unseen = tried[~known].copy()
    unseen[:, 1] = "violet"  # what has no code is a word the model never saw
    np.testing.assert_allclose(found.scores[~known, 0], model.predict(unseen), rtol=1e-6)


def test_numbers_are_not_split_out_of_codes():
    model = DecisionTreeRegressor().fit(X, TARGET)
    with pytest.raises(UnsupportedPipeline, match=r"categories as if it held numbers; encode"):
        lowered.run(model, X, vocabularies=(("a", "b"), None, None, None))
