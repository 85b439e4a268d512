"""Compositions: columns apart, side by side, one estimator behind another, and targets transformed."""

import numpy as np
import pytest
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    HalvingGridSearchCV,
    HalvingRandomSearchCV,
    RandomizedSearchCV,
    TunedThresholdClassifierCV,
)
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.semi_supervised import SelfTrainingClassifier

from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

pytestmark = pytest.mark.sampled(2)

IRIS, KIND = load_iris(return_X_y=True)
CANCER, BENIGN = (part[:200] for part in load_breast_cancer(return_X_y=True))
SUGAR, COURSE = (part[:150] for part in load_diabetes(return_X_y=True))
NARROW = CANCER[:, :5]
LABELS = [(0, 1), (-3, 4), (False, True), ("bad", "good")]


def hostile(rows):
    """Rows of the set, then zeros, whole numbers, denormals and far away ones."""
    odd = [np.zeros(rows.shape[1]), *np.round(rows[:3]), np.full(rows.shape[1], 1e-42), rows[0] * 1e4]
    return np.vstack([rows[::2], odd, np.full(rows.shape[1], -1e30)])


def logistic():
    return make_pipeline(StandardScaler(), LogisticRegression())


@pytest.mark.parametrize(
    "columns",
    [
        ColumnTransformer([("b", MinMaxScaler(), [3, 1]), ("a", StandardScaler(), [0])], remainder="drop"),
        ColumnTransformer([("b", MinMaxScaler(), [3, 1])], remainder="passthrough"),
        ColumnTransformer([("b", "passthrough", [2]), ("a", "drop", [0])], remainder=RobustScaler()),
        ColumnTransformer(
            [("twice", StandardScaler(), [2, 2]), ("none", MinMaxScaler(), [])], remainder="drop"
        ),
        ColumnTransformer(
            [("a", StandardScaler(), slice(1, 3)), ("b", MaxAbsScaler(), [True, False, False, True])]
        ),
        ColumnTransformer(
            [("a", StandardScaler(), [-1]), ("b", MaxAbsScaler(), [0])],
            remainder="passthrough",
            transformer_weights={"a": -2.5, "b": 0.3, "remainder": 7.0},
        ),
        FeatureUnion([("a", MinMaxScaler()), ("b", "passthrough"), ("c", "drop"), ("d", RobustScaler())]),
        FeatureUnion([("a", MinMaxScaler()), ("b", "passthrough")], transformer_weights={"a": 0.1, "b": -3}),
        make_pipeline(FeatureUnion([("a", MinMaxScaler()), ("b", RobustScaler())]), StandardScaler()),
    ],
)
def test_columns_are_those_that_scikit_learn_makes(columns):
    columns.fit(IRIS)
    rows = hostile(IRIS).astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(lowered.transform(columns, rows), columns.transform(rows))
    lowered.assert_equal(
        make_pipeline(columns, LogisticRegression(max_iter=500)).fit(IRIS, KIND), hostile(IRIS)
    )


def test_a_transformer_that_keeps_no_column_is_refused():
    nothing = ColumnTransformer([("a", "drop", [0, 1, 2, 3])]).fit(IRIS)
    with pytest.raises(UnsupportedPipeline, match="keeps no column"):
        lowered.transform(nothing, IRIS)


@pytest.mark.parametrize(
    "search",
    [
        GridSearchCV(logistic(), {"logisticregression__C": [0.1, 10]}, cv=3),
        RandomizedSearchCV(logistic(), {"logisticregression__C": [0.1, 10]}, n_iter=2, cv=3),
        HalvingGridSearchCV(logistic(), {"logisticregression__C": [0.1, 10]}, cv=3),
        HalvingRandomSearchCV(
            logistic(), {"logisticregression__C": [0.1, 10]}, n_candidates=2, cv=3, random_state=0
        ),
        SelfTrainingClassifier(LogisticRegression(max_iter=500)),
    ],
)
def test_a_search_answers_as_its_best(search):
    kind = KIND.copy()
    if isinstance(search, SelfTrainingClassifier):
        kind[::3] = -1
    lowered.assert_equal(make_pipeline(MinMaxScaler(), search).fit(IRIS, kind), hostile(IRIS))


def test_a_frozen_step_is_the_step():
    scaler = FrozenEstimator(StandardScaler().fit(IRIS))
    model = FrozenEstimator(LogisticRegression().fit(scaler.transform(IRIS), KIND))
    lowered.assert_equal(make_pipeline(scaler, model).fit(IRIS, KIND), hostile(IRIS))


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("positive", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.8},
        {"threshold": "auto"},
        {"threshold": -0.7, "response_method": "decision_function"},
        {"threshold": "auto", "response_method": "decision_function"},
    ],
)
def test_a_threshold_decides(labels, positive, options):
    kind = np.array(labels)[BENIGN]
    model = FixedThresholdClassifier(logistic(), pos_label=labels[positive], **options).fit(NARROW, kind)
    found = lowered.run(model, NARROW)
    wide = NARROW.astype(np.float32).astype(np.float64)
    assert (np.array(labels)[found.labels] == model.predict(wide)).all()
    assert len(set(found.labels)) == 2
    plain = logistic().fit(NARROW, kind).predict(wide)
    if options["threshold"] != "auto":
        assert (plain != model.predict(wide)).any()


@pytest.mark.parametrize("method", ["auto", "decision_function"])
def test_a_tuned_threshold_decides(method):
    model = TunedThresholdClassifierCV(logistic(), scoring="f1", response_method=method, cv=3).fit(
        NARROW, BENIGN
    )
    found = lowered.run(model, NARROW)
    assert (found.labels == model.predict(NARROW.astype(np.float32).astype(np.float64))).all()


@pytest.mark.parametrize(
    "options",
    [
        {"func": np.log1p, "inverse_func": np.expm1},
        {"func": np.log, "inverse_func": np.exp},
        {"func": np.sqrt, "inverse_func": np.square},
        {"func": np.log2, "inverse_func": np.exp2},
        {},
        {"transformer": StandardScaler()},
        {"transformer": StandardScaler(with_mean=False)},
        {"transformer": RobustScaler(with_scaling=False)},
        {"transformer": MinMaxScaler((-1, 3))},
        {"transformer": MaxAbsScaler()},
        {"transformer": PowerTransformer()},
        {"transformer": PowerTransformer("box-cox", standardize=False)},
        {"transformer": QuantileTransformer(n_quantiles=40)},
        {"transformer": QuantileTransformer(n_quantiles=40, output_distribution="normal")},
        {"transformer": make_pipeline(FunctionTransformer(np.log, np.exp), StandardScaler())},
    ],
)
@pytest.mark.parametrize("targets", [1, 2])
def test_a_target_is_transformed_back(options, targets):
    wanted = COURSE if targets == 1 else np.column_stack([COURSE, COURSE[::-1] * 3 + 1])
    model = TransformedTargetRegressor(Ridge(), check_inverse=False, **options).fit(SUGAR, wanted)
    rows = np.vstack([SUGAR, SUGAR[:20] * 8])  # beyond the ends of the quantiles, and below zero
    lowered.assert_equal(make_pipeline(MinMaxScaler(), model).fit(SUGAR, wanted), rows)


@pytest.mark.parametrize("power", [0.0, 2.0, 2.5, -1.0])
def test_powers_are_undone_on_both_sides_of_zero(power):
    model = TransformedTargetRegressor(LinearRegression(), transformer=PowerTransformer(standardize=False))
    rows = np.linspace(-3, 3, 61)[:, None]
    model.fit(rows, rows[:, 0])
    model.transformer_.lambdas_ = np.array([power])
    model.regressor_.coef_, model.regressor_.intercept_ = np.array([[0.3]]), np.array([0.0])
    lowered.assert_equal(model, rows)


@pytest.mark.parametrize(
    "options",
    [
        {"func": np.log, "inverse_func": lambda y: y + 1},
        {
            "transformer": make_pipeline(
                FunctionTransformer(np.log), PolynomialFeatures(1, include_bias=False)
            )
        },
    ],
)
def test_an_inverse_without_a_rule_is_refused(options):
    model = TransformedTargetRegressor(Ridge(), check_inverse=False, **options).fit(SUGAR, COURSE)
    with pytest.raises(UnsupportedPipeline):
        lowered.run(model, SUGAR)
