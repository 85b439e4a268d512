"""What is understood, and how the rest is refused: which step, why, and what to do instead."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import (
    ElasticNet,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    RidgeClassifier,
)
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, PolynomialFeatures, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from converters import convert
from converters.signature import read, trees
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.parity.cases import classes_of, scaled_integers

X = scaled_integers(80)
y = classes_of(X, 2)


class MyScaler(StandardScaler):  # type: ignore[misc]
    def transform(self, X, copy=None):
        return np.sqrt(np.abs(super().transform(X, copy)))


class MyForest(RandomForestClassifier):  # type: ignore[misc]
    def predict(self, X):
        return 1 - super().predict(X)


def test_a_pipeline_is_taken_apart():
    pipeline = Pipeline(
        [
            ("nothing", None),
            ("inner", Pipeline([("scale", StandardScaler()), ("squeeze", MinMaxScaler())])),
            ("pass", "passthrough"),
            ("forest", RandomForestClassifier(3)),
        ]
    ).fit(X, y)
    signature = read(pipeline)
    assert [step.name for step in signature.scalers] == ["inner__scale", "inner__squeeze"]
    assert signature.estimator.name == "forest"
    assert (signature.family, signature.task, signature.score) == ("forest", "classifier", "predict_proba")
    assert (signature.width, signature.labels, signature.missing) == (5, (0, 1), True)
    assert len(trees(signature.estimator.fitted)) == 3


def test_bare_estimators_and_regressors():
    linear = read(ElasticNet().fit(X, X[:, 0]))
    assert (linear.family, linear.task, linear.score, linear.labels) == ("linear", "regressor", "predict", ())
    assert not linear.missing
    assert linear.estimator.name == "estimator"
    tree = read(DecisionTreeClassifier().fit(X, y == 1))
    assert tree.labels == (False, True)
    assert [type(label) for label in tree.labels] == [bool, bool]


def test_an_estimator_with_its_own_validation_is_a_logistic_regression_too():
    estimator = LogisticRegressionCV(
        Cs=2, cv=2, l1_ratios=(0.0,), use_legacy_attributes=False, scoring="accuracy", max_iter=2000
    )
    assert read(make_pipeline(StandardScaler(), estimator).fit(X, y)).family == "linear"


@pytest.mark.parametrize(
    ("pipeline", "step", "remedy"),
    [
        (
            make_pipeline(SimpleImputer(), RandomForestClassifier(2)),
            "'simpleimputer' (SimpleImputer)",
            "fit on NaN",
        ),
        (make_pipeline(PCA(2), LogisticRegression()), "'pca' (PCA)", "supported: MaxAbsScaler, MinMaxScaler"),
        (
            make_pipeline(PolynomialFeatures(), LinearRegression()),
            "'polynomialfeatures'",
            "before the pipeline",
        ),
        (make_pipeline(MyScaler(), LogisticRegression()), "'myscaler' (MyScaler)", "supported: "),
        (make_pipeline(StandardScaler(), KNeighborsClassifier()), "'kneighborsclassifier'", "RandomForest"),
        (
            HistGradientBoostingClassifier(max_iter=2),
            "'estimator' (HistGradient",
            "use RandomForestClassifier",
        ),
        (
            GradientBoostingClassifier(n_estimators=2),
            "GradientBoostingClassifier",
            "use RandomForestClassifier",
        ),
        (RidgeClassifier(), "RidgeClassifier", "use LogisticRegression"),
        (MyForest(2), "'estimator' (MyForest)", "supported: "),
        (GridSearchCV(DecisionTreeClassifier(), {"max_depth": [2]}, cv=2), "GridSearchCV", "best_estimator_"),
        (make_pipeline(StandardScaler()), "'standardscaler'", "supported: "),
    ],
)
def test_other_steps_are_refused_with_a_remedy(pipeline, step, remedy, tmp_path):
    with pytest.raises(UnsupportedPipeline, match="cannot be converted") as caught:
        convert(pipeline.fit(X, y), X, tmp_path / "m.onnx")
    assert step in str(caught.value)
    assert remedy in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


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


def test_several_targets_are_refused():
    two = np.stack([y, 1 - y], axis=1)
    refused(
        RandomForestClassifier(2).fit(X, two),
        "predicts 2 targets at once; fit and convert one model per target",
    )
    refused(RandomForestRegressor(2).fit(X, two), "predicts 2 targets at once")
    refused(LinearRegression().fit(X, two), "predicts 2 targets at once")


def test_one_target_in_two_dimensions_is_fine(tmp_path):
    artifact = convert(LinearRegression().fit(X, X[:, :1]), X, tmp_path / "m.onnx", probes=500)
    assert artifact.report.passed


def test_odd_coefficients_are_refused():
    refused(LogisticRegression().fit(X, y).sparsify(), r"has sparse coefficients; call densify\(\)")
    broken = LogisticRegression().fit(X, y)
    broken.coef_[0, 0] = np.nan
    refused(broken, "coefficients that are not finite")


def test_odd_labels_are_refused():
    refused(RandomForestClassifier(2).fit(X, np.zeros(len(X))), "one class only")
    refused(RandomForestClassifier(2).fit(X, np.array([b"a", b"b"])[y]), "class label b'a' of type bytes")


def test_a_pipeline_without_a_step_is_refused():
    refused(Pipeline([("a", "passthrough")]), "has no estimator")
