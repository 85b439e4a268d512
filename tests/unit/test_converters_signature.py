"""What a fitted pipeline takes and gives, and how one that says too little is refused."""

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import DBSCAN, AffinityPropagation, Birch, BisectingKMeans, KMeans, MeanShift
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import IsolationForest, RandomForestClassifier, RandomForestRegressor, VotingClassifier
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import (
    ElasticNet,
    LinearRegression,
    LogisticRegression,
    Perceptron,
    RidgeClassifier,
    SGDOneClassSVM,
)
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import OneClassSVM
from sklearn.tree import DecisionTreeClassifier

from converters import convert
from converters.signature import final, read
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.parity.cases import classes_of, scaled_integers

X = scaled_integers(80)
y = classes_of(X, 2)
TWO = np.stack([y, classes_of(X, 3, seed=2)], axis=1)
FLAGS = np.stack([y, 1 - y, classes_of(X, 2, seed=3)], axis=1)
SCALED = StandardScaler().fit_transform(X)


class MyScaler(StandardScaler):  # type: ignore[misc]
    def transform(self, X, copy=None):
        return np.sqrt(np.abs(super().transform(X, copy)))


class MyForest(RandomForestClassifier):  # type: ignore[misc]
    def predict(self, X):
        return 1 - super().predict(X)


def test_a_pipeline_is_read_from_its_last_step():
    forest = RandomForestClassifier(3, random_state=0)
    pipeline = Pipeline(
        [
            ("nothing", None),
            ("inner", Pipeline([("scale", StandardScaler()), ("squeeze", MinMaxScaler())])),
            ("pass", "passthrough"),
            ("last", Pipeline([("forest", forest)])),
        ]
    ).fit(X, y)
    signature = read(pipeline)
    assert signature.pipeline is pipeline
    assert final(pipeline) is forest
    assert (signature.task, signature.score, signature.labels) == ("classifier", "predict_proba", ((0, 1),))
    assert (signature.width, signature.names) == (5, ())


def test_a_frame_gives_the_column_names():
    frame = pd.DataFrame(X, columns=["temp", "rpm", "volt", "x y", "ß"])
    assert read(LogisticRegression().fit(frame, y)).names == ("temp", "rpm", "volt", "x y", "ß")


def test_a_pipeline_that_begins_with_nothing_is_read_from_its_first_step():
    frame = pd.DataFrame(X, columns=["temp", "rpm", "volt", "x y", "ß"])
    inner = Pipeline([("pass", "passthrough"), ("scale", StandardScaler())])
    signature = read(
        Pipeline([("none", None), ("inner", inner), ("fit", LogisticRegression())]).fit(frame, y)
    )
    assert (signature.width, signature.names) == (5, tuple(frame.columns))


def test_a_search_is_read_from_the_best_estimator():
    search = GridSearchCV(DecisionTreeClassifier(random_state=0), {"max_depth": [2, 3]}, cv=2)
    pipeline = make_pipeline(StandardScaler(), search).fit(X, y)
    assert final(pipeline) is search.best_estimator_
    signature = read(pipeline)
    assert (signature.task, signature.score, signature.single) == ("classifier", "predict_proba", (0, 1))


@pytest.mark.parametrize(
    ("estimator", "score"),
    [
        (GaussianNB(), "predict_proba"),
        (RidgeClassifier(), "decision_function"),
        (Perceptron(), "decision_function"),
        (VotingClassifier([("a", GaussianNB()), ("b", DecisionTreeClassifier())]), "predict"),
        (VotingClassifier([("a", GaussianNB())], voting="soft"), "predict_proba"),
    ],
)
def test_a_classifier_is_scored_by_the_best_method_it_has(estimator, score):
    signature = read(make_pipeline(StandardScaler(), estimator).fit(X, y))
    assert (signature.task, signature.score, signature.labels) == ("classifier", score, ((0, 1),))


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (np.array([0, 1]), int),
        (np.array([-3, 7], np.int8), int),
        (np.array([False, True]), bool),
        (np.array(["idle", "läuft"]), str),
        (np.array(["idle", "läuft"], object), str),
        (np.array([0.0, 2.0]), float),
    ],
)
def test_labels_are_python_values(labels, kind):
    signature = read(DecisionTreeClassifier().fit(X, labels[y]))
    assert signature.single == tuple(labels.tolist())
    assert [type(label) for label in signature.single] == [kind, kind]


@pytest.mark.parametrize(
    "regressor",
    [
        ElasticNet(),
        RandomForestRegressor(2),
        make_pipeline(StandardScaler(), LinearRegression()),
        TransformedTargetRegressor(LinearRegression(), transformer=StandardScaler()),
    ],
)
def test_regressors_have_no_labels(regressor):
    signature = read(regressor.fit(X, X[:, 0]))
    assert (signature.task, signature.score, signature.labels) == ("regressor", "predict", ())
    assert (signature.single, signature.width) == ((), 5)


def test_a_regressor_with_several_targets_is_one_score_table():
    signature = read(LinearRegression().fit(X, TWO))
    assert (signature.task, signature.score, signature.labels) == ("regressor", "predict", ())


def test_an_isotonic_regression_takes_one_column():
    assert read(IsotonicRegression().fit(X[:, 0], X[:, 1])).width == 1


@pytest.mark.parametrize(
    ("clusterer", "score", "clusters"),
    [
        (KMeans(3, n_init=1, random_state=0), "negative_distance", 3),
        (BisectingKMeans(4, random_state=0), "negative_distance", 4),
        (MeanShift(bandwidth=1.5), "negative_distance", None),
        (AffinityPropagation(random_state=0), "negative_distance", None),
        (Birch(n_clusters=2, threshold=0.1), "negative_distance", 2),
        (GaussianMixture(3, random_state=0), "predict_proba", 3),
    ],
)
def test_clusterers_number_their_clusters(clusterer, score, clusters):
    signature = read(make_pipeline(StandardScaler(), clusterer).fit(X))
    found = clusters or len(clusterer.cluster_centers_)
    assert (signature.task, signature.score) == ("clusterer", score)
    assert signature.labels == (tuple(range(found)),)
    assert set(clusterer.predict(SCALED).tolist()) <= set(signature.single)


@pytest.mark.parametrize(
    "detector",
    [
        IsolationForest(n_estimators=3, random_state=0),
        OneClassSVM(),
        SGDOneClassSVM(),
        LocalOutlierFactor(novelty=True),
    ],
)
def test_outlier_detectors_say_minus_one_or_one(detector):
    signature = read(make_pipeline(StandardScaler(), detector).fit(X))
    assert (signature.task, signature.score) == ("outlier_detector", "decision_function")
    assert signature.single == (-1, 1)


@pytest.mark.parametrize(
    ("estimator", "score"),
    [
        (RandomForestClassifier(2), "predict_proba"),
        (KNeighborsClassifier(), "predict_proba"),
        (MultiOutputClassifier(LogisticRegression(max_iter=1000)), "predict_proba"),
        (MultiOutputClassifier(RidgeClassifier()), "predict"),
    ],
)
def test_several_outputs_have_their_own_labels(estimator, score):
    signature = read(estimator.fit(SCALED, TWO))
    assert (signature.task, signature.score) == ("classifier", score)
    assert signature.labels == ((0, 1), (0, 1, 2))
    assert signature.single == ()


@pytest.mark.parametrize(
    ("estimator", "score"),
    [
        (RandomForestClassifier(2), "predict_proba"),
        (MLPClassifier((2,), max_iter=5000, tol=0.1), "predict_proba"),
        (RidgeClassifier(), "decision_function"),
        (ClassifierChain(GaussianNB()), "predict_proba"),
    ],
)
def test_many_labels_at_once_are_outputs_of_zero_and_one(estimator, score):
    signature = read(estimator.fit(SCALED, FLAGS))
    assert (signature.score, signature.labels) == (score, ((0, 1),) * 3)


def refused(pipeline, message):
    with pytest.raises(UnsupportedPipeline, match=message):
        read(pipeline)


def test_what_is_not_fitted_is_refused():
    refused(
        make_pipeline(StandardScaler(), LogisticRegression()),
        r"'standardscaler' .* is not fitted; call pipeline\.fit",
    )
    refused(
        make_pipeline(StandardScaler().fit(X), LogisticRegression()), "'logisticregression' .* is not fitted"
    )
    inner = make_pipeline(MinMaxScaler(), LogisticRegression())
    refused(make_pipeline(StandardScaler().fit(X), inner), "'minmaxscaler' .* is not fitted")
    refused(DecisionTreeClassifier(), "^DecisionTreeClassifier is not fitted")


def test_what_predicts_nothing_is_refused():
    refused(
        make_pipeline(StandardScaler()).fit(X), "^StandardScaler has no predict; the pipeline must end in"
    )
    refused(DBSCAN().fit(X), "^DBSCAN has no predict")
    refused(LocalOutlierFactor().fit(X), "^LocalOutlierFactor has no predict")
    refused(Pipeline([("a", "passthrough")]).fit(X), "^the last step 'passthrough' has no predict")
    refused(Pipeline([("a", None)]).fit(X), "^the last step None has no predict")


def test_a_pipeline_without_steps_is_refused():
    refused(Pipeline([]), "the pipeline has no steps; it must end in an estimator with predict")


def test_labels_that_cannot_be_written_down_are_refused():
    refused(
        DecisionTreeClassifier().fit(X, np.array([b"a", b"b"])[y]), "class label b'a' of type bytes; use text"
    )
    several = np.stack([np.array([b"a", b"b"])[y]] * 2, axis=1)
    refused(DecisionTreeClassifier().fit(X, several), "class label b'a' of type bytes")


def test_what_does_not_say_its_width_is_refused():
    fitted = LogisticRegression().fit(X, y)
    del fitted.n_features_in_
    refused(fitted, r"does not say how many columns it takes \(n_features_in_\); put a step")


@pytest.mark.parametrize(
    ("pipeline", "step"),
    [
        (make_pipeline(MyScaler(), LogisticRegression()), r"'myscaler' \(MyScaler\)"),
        (MyForest(2), "MyForest"),
    ],
)
def test_a_subclass_is_not_taken_for_its_parent(pipeline, step, tmp_path):
    with pytest.raises(
        UnsupportedPipeline, match=f"{step} has no .* that can be converted .*; use a step that"
    ):
        convert(pipeline.fit(X, y), X, tmp_path / "m.onnx", probes=500)
    assert not (tmp_path / "m.onnx").exists()


def test_one_class_is_one_label():
    assert read(RandomForestClassifier(2).fit(X, np.full(len(X), "on"))).labels == (("on",),)


def test_one_target_in_two_dimensions_is_fine(tmp_path):
    artifact = convert(LinearRegression().fit(X, X[:, :1]), X, tmp_path / "m.onnx", probes=500)
    assert artifact.report.passed


def test_odd_coefficients_are_refused(tmp_path):
    sparse = LogisticRegression().fit(SCALED, y).sparsify()
    with pytest.raises(UnsupportedPipeline, match=r"has sparse coefficients; call densify\(\)"):
        convert(sparse, SCALED, tmp_path / "m.onnx", probes=500)
    broken = LogisticRegression().fit(SCALED, y)
    broken.coef_[0, 0] = np.nan
    with pytest.raises(UnsupportedPipeline, match="coefficients that are not finite"):
        convert(broken, SCALED, tmp_path / "m.onnx", probes=500)
    assert not (tmp_path / "m.onnx").exists()


def test_a_gaussian_process_in_pairs_has_no_probabilities(tmp_path):
    pairs = GaussianProcessClassifier(multi_class="one_vs_one", optimizer=None)
    three = classes_of(X, 3)
    assert read(pairs.fit(SCALED, three)).score == "predict"
    with pytest.raises(UnsupportedPipeline, match="one_vs_rest"):
        convert(pairs, SCALED, tmp_path / "m.onnx", probes=300)
    assert read(pairs.fit(SCALED, y)).score == "predict_proba"


class Doubling:
    """A step of the user's own, which says of itself only what a pipeline needs."""

    def fit(self, X, y=None):
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X):
        return 2 * X


def test_what_is_no_estimator_is_named():
    pipeline = make_pipeline(MinMaxScaler(), Doubling(), LogisticRegression()).fit(X, y)
    with pytest.raises(UnsupportedPipeline, match=r"step 'doubling' \(Doubling\) is not an estimator"):
        read(pipeline)
    with pytest.raises(UnsupportedPipeline, match="the class LogisticRegression is not an estimator"):
        read(LogisticRegression)
