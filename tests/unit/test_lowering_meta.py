"""Ensembles of any estimators: ties, weights, members that saw only some of the classes, labels of every type."""

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.ensemble import (
    AdaBoostClassifier,
    AdaBoostRegressor,
    BaggingClassifier,
    BaggingRegressor,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier, OutputCodeClassifier
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier, MultiOutputRegressor, RegressorChain
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

pytestmark = pytest.mark.sampled(2)

IRIS, KIND = load_iris(return_X_y=True)
CANCER, BENIGN = (part[:200] for part in load_breast_cancer(return_X_y=True))
CANCER = CANCER[:, :6]
SUGAR, COURSE = (part[:150] for part in load_diabetes(return_X_y=True))
BOTH = np.column_stack([COURSE, 300 - COURSE[::-1]])
LABELS = [(0, 1, 2), (-7, 3, 20), ("a", "bb", "c")]
PAIRS = [(0, 1), (-1, 1), (False, True), ("bad", "good")]


def hostile(rows):
    """Rows of the set, then zeros, whole numbers, denormals and far away ones."""
    odd = [np.zeros(rows.shape[1]), *np.round(rows[:3]), np.full(rows.shape[1], 1e-42), rows[0] * 1e4]
    return np.vstack([rows[::4], odd, np.full(rows.shape[1], -1e30)])


def several(targets):
    """Rows with ``targets`` labels of two classes, none of them easy."""
    rows = IRIS[::2]
    noisy = rows + np.random.default_rng(0).normal(0, 0.6, rows.shape)
    return rows, (noisy > np.median(rows, axis=0))[:, :targets].astype(int)


def logistic(c=1.0):
    return make_pipeline(StandardScaler(), LogisticRegression(C=c))


def hard(c):
    """A classifier with decision_function and predict, but without predict_proba."""
    return OneVsRestClassifier(Ridge(alpha=c))


def check(model, classes, rows=IRIS, kind=KIND):
    labels = np.array(classes)[kind]
    return lowered.assert_equal(model.fit(rows, labels), hostile(rows))


MEMBERS = [
    ("a", logistic(0.01)),
    ("gone", logistic()),
    ("b", logistic(100)),
    ("c", LogisticRegression(C=1e-3)),
]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("weights", [None, [1, 5, 2.5, 0.5], [0, 1, 1, 1]])
@pytest.mark.parametrize("voting", ["soft", "hard"])
def test_voting(labels, weights, voting):
    model = VotingClassifier(MEMBERS, voting=voting, weights=weights).set_params(gone="drop")
    check(model, labels)


def test_tied_votes_go_to_the_first_class():
    model = VotingClassifier([("a", logistic(1e-4)), ("b", logistic(100))]).fit(IRIS, KIND)
    rows = IRIS.astype(np.float32).astype(np.float64)
    tied = model.estimators_[0].predict(rows) != model.estimators_[1].predict(rows)
    assert tied.sum() > 5
    assert (lowered.run(model, IRIS).labels == model.predict(rows)).all()


def test_negative_votes_are_refused():
    model = VotingClassifier(MEMBERS[:2], weights=[-1, 2]).fit(IRIS, KIND)
    with pytest.raises(UnsupportedPipeline, match="negative weight"):
        lowered.run(model, IRIS)


@pytest.mark.parametrize("weights", [None, [1, 3, 0.3]])
def test_voting_regressor(weights):
    members = [("a", Ridge(10)), ("b", LinearRegression()), ("c", Ridge(0.1))]
    lowered.assert_equal(VotingRegressor(members, weights=weights).fit(SUGAR, COURSE), hostile(SUGAR))


@pytest.mark.parametrize("voting", [{"voting": "hard"}, {"voting": "soft"}])
def test_voting_as_a_step(voting):
    lowered.assert_equal(
        make_pipeline(VotingClassifier(MEMBERS, **voting), LogisticRegression()).fit(IRIS, KIND),
        hostile(IRIS),
    )


@pytest.mark.covering
@pytest.mark.parametrize("passthrough", [False, True])
@pytest.mark.parametrize("method", ["auto", "predict", "decision_function"])
@pytest.mark.parametrize("labels", [LABELS[1], LABELS[2]])
def test_stacking(labels, method, passthrough):
    model = StackingClassifier(
        MEMBERS, LogisticRegression(max_iter=500), cv=3, stack_method=method, passthrough=passthrough
    ).set_params(gone="drop")
    check(model, labels)


@pytest.mark.parametrize("labels", PAIRS)
def test_stacking_of_two_classes_leaves_the_first_column_out(labels):
    found = check(StackingClassifier(MEMBERS, logistic(), cv=3), labels, CANCER, BENIGN)
    assert found.lowering.call(found.signature.pipeline, "transform", found.lowering.start()).width == len(
        MEMBERS
    )


def test_stacking_of_fitted_members_takes_their_own_labels():
    kind = np.array([10, 30, 70])[KIND]
    members = [("a", logistic().fit(IRIS, kind)), ("b", LogisticRegression(C=0.01).fit(IRIS, kind))]
    model = StackingClassifier(
        members, LogisticRegression(max_iter=2000), cv="prefit", stack_method="predict"
    )
    check(model, (10, 30, 70))


@pytest.mark.parametrize("passthrough", [False, True])
def test_stacking_regressor(passthrough):
    members = [("a", Ridge(10)), ("b", LinearRegression())]
    model = StackingRegressor(members, Ridge(), cv=3, passthrough=passthrough).fit(SUGAR, COURSE)
    lowered.assert_equal(model, hostile(SUGAR))


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (logistic(), {"max_features": 0.5}),
        (logistic(), {"max_features": 3, "bootstrap_features": True}),
        (hard(1.0), {"max_features": 0.75}),
    ],
)
def test_bagging(labels, base, options):
    check(BaggingClassifier(base, 5, random_state=0, **options), labels)


@pytest.mark.parametrize("base", [logistic(), hard(1.0)])
def test_members_of_a_bag_that_never_saw_a_class(base):
    few = np.concatenate([np.arange(3), np.arange(50, 70), np.arange(100, 120)])
    labels = np.array(["k", "a", "x"])[KIND[few]]  # the one in the middle is rare
    model = BaggingClassifier(base, 12, max_samples=9, random_state=3).fit(IRIS[few], labels)
    sizes = {tuple(member.classes_) for member in model.estimators_}
    assert len({len(each) for each in sizes}) > 1
    lowered.assert_equal(model, hostile(IRIS))


@pytest.mark.parametrize("wanted", [COURSE, BOTH])
def test_bagging_regressor(wanted):
    model = BaggingRegressor(Ridge(), 6, max_features=0.5, random_state=0).fit(SUGAR, wanted)
    lowered.assert_equal(model, hostile(SUGAR))


@pytest.mark.parametrize("labels", LABELS)
def test_adaboost(labels):
    check(AdaBoostClassifier(LogisticRegression(C=0.05), n_estimators=7, random_state=0), labels)


@pytest.mark.parametrize("labels", PAIRS)
def test_adaboost_of_two_classes(labels):
    check(
        AdaBoostClassifier(LogisticRegression(C=0.05, max_iter=2000), n_estimators=5), labels, CANCER, BENIGN
    )


def test_adaboost_regressor_is_a_weighted_median():
    model = AdaBoostRegressor(Ridge(0.01), n_estimators=9, random_state=0).fit(SUGAR, COURSE)
    assert len(model.estimators_) > 3
    lowered.assert_equal(model, hostile(SUGAR))
    model.estimator_weights_[:] = 1.0  # exactly half of the weight at one member
    lowered.assert_equal(model, hostile(SUGAR))
    model.estimators_[1:3] = [model.estimators_[0]] * 2  # equal predictions
    lowered.assert_equal(model, hostile(SUGAR))


@pytest.mark.covering
@pytest.mark.parametrize("method", ["sigmoid", "isotonic", "temperature"])
@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("base", [logistic(), GaussianNB()])
def test_calibration(method, ensemble, base):
    check(CalibratedClassifierCV(base, method=method, ensemble=ensemble, cv=3), LABELS[2])
    check(CalibratedClassifierCV(base, method=method, ensemble=ensemble, cv=3), PAIRS[1], CANCER, BENIGN)


def test_rows_without_any_calibrated_probability_are_uniform():
    model = CalibratedClassifierCV(logistic(), method="isotonic", ensemble=False, cv=3).fit(IRIS, KIND)
    for calibrator in model.calibrated_classifiers_[0].calibrators:
        calibrator.f_.y[:] = calibrator.y_thresholds_[:] = np.where(calibrator.y_thresholds_ < 0.9, 0.0, 1.0)
    rows = IRIS.astype(np.float32).astype(np.float64)
    empty = (model.predict_proba(rows) == 1 / 3).all(axis=1)
    assert 0 < empty.sum() < len(rows)
    lowered.assert_equal(model, IRIS)


def test_one_target_after_the_other():
    rows, kinds = several(3)
    words = np.array(["no", "yes"])[kinds]
    words[:20, 1] = "maybe"
    found = lowered.run(MultiOutputClassifier(logistic()).fit(rows, words), rows)
    model, labels = found.signature.pipeline, found.signature.labels
    assert [len(each) for each in labels] == [2, 3, 2]
    said = np.column_stack([np.array(each)[found.labels[:, k]] for k, each in enumerate(labels)])
    assert (said == model.predict(rows)).all()
    np.testing.assert_allclose(found.scores, np.hstack(model.predict_proba(rows)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [None, [2, 0, 1]])
@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
def test_classifiers_in_a_chain(order, method):
    rows, kinds = several(3)
    model = ClassifierChain(LogisticRegression(max_iter=500), order=order, chain_method=method).fit(
        rows, kinds
    )
    found = lowered.run(model, rows)
    assert (found.labels == model.predict(rows)).all()
    np.testing.assert_allclose(found.scores, model.predict_proba(rows), rtol=1e-6, atol=1e-6)


def test_a_chain_passes_on_labels_and_not_their_indices():
    rows, kinds = several(3)
    model = ClassifierChain(LogisticRegression(max_iter=500)).fit(rows, np.array([-4, 9])[kinds])
    found = lowered.run(model, rows)
    assert (np.array([-4, 9])[found.labels] == model.predict(rows)).all()


def test_a_chain_out_of_order_with_different_classes_is_refused():
    rows, kinds = several(2)
    kinds[:, 1] += 5
    model = ClassifierChain(LogisticRegression(max_iter=500), order=[1, 0]).fit(rows, kinds)
    with pytest.raises(UnsupportedPipeline, match="out of order"):
        lowered.run(model, rows)


@pytest.mark.parametrize(
    "model",
    [
        MultiOutputRegressor(Ridge()),
        RegressorChain(Ridge()),
        RegressorChain(Ridge(), order=[1, 0]),
        make_pipeline(MinMaxScaler(), RegressorChain(LinearRegression(), order=[1, 0])),
    ],
)
def test_regressors_of_several_targets(model):
    lowered.assert_equal(model.fit(SUGAR, BOTH), hostile(SUGAR))


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("base", [logistic(), Ridge(), GaussianNB()])
@pytest.mark.parametrize("kind", [OneVsRestClassifier, OneVsOneClassifier])
def test_classes_one_against_the_other(kind, base, labels):
    check(kind(base), labels)


@pytest.mark.parametrize("labels", LABELS[1:])
@pytest.mark.parametrize(("base", "size"), [(logistic(), 3), (logistic(), 1), (GaussianNB(), 3)])
def test_classes_by_the_nearest_code_word(base, size, labels):
    check(OutputCodeClassifier(base, code_size=size, random_state=1), labels)


@pytest.mark.parametrize("labels", PAIRS)
@pytest.mark.parametrize("base", [logistic(), Ridge(), GaussianNB()])
@pytest.mark.parametrize("kind", [OneVsRestClassifier, OneVsOneClassifier])
def test_two_classes_one_against_the_other(kind, base, labels):
    check(kind(base), labels, CANCER, BENIGN)


def test_one_against_the_rest_for_several_labels():
    rows, kinds = several(3)
    kinds[:, 2] = 1  # a constant predictor
    with pytest.warns(UserWarning, match="present in all"):
        model = OneVsRestClassifier(logistic()).fit(rows, kinds)
    found = lowered.run(model, rows)
    assert (found.labels == model.predict(rows)).all()
    np.testing.assert_allclose(found.scores, model.predict_proba(rows), rtol=1e-6, atol=1e-6)
