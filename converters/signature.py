"""What a fitted pipeline takes and gives: its steps, columns, classes, task and score."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import (
    ARDRegression,
    BayesianRidge,
    ElasticNet,
    ElasticNetCV,
    HuberRegressor,
    Lars,
    LarsCV,
    Lasso,
    LassoCV,
    LassoLars,
    LassoLarsCV,
    LassoLarsIC,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    OrthogonalMatchingPursuit,
    QuantileRegressor,
    Ridge,
    RidgeCV,
    SGDRegressor,
    TheilSenRegressor,
)
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.svm import LinearSVR
from sklearn.tree import (
    DecisionTreeClassifier,
    DecisionTreeRegressor,
    ExtraTreeClassifier,
    ExtraTreeRegressor,
)
from sklearn.utils.validation import check_is_fitted

from edge_runtime.contract.errors import UnsupportedPipeline
from edge_runtime.contract.manifest import Label

Family = Literal["linear", "forest"]
Task = Literal["classifier", "regressor"]

SCALERS: Final[frozenset[type]] = frozenset({StandardScaler, MinMaxScaler, MaxAbsScaler, RobustScaler})
_FORESTS: Final[frozenset[type]] = frozenset(
    {
        RandomForestClassifier,
        RandomForestRegressor,
        ExtraTreesClassifier,
        ExtraTreesRegressor,
        DecisionTreeClassifier,
        DecisionTreeRegressor,
        ExtraTreeClassifier,
        ExtraTreeRegressor,
    }
)
# Every one predicts X @ coef_ + intercept_, and nothing else.
_LINEAR: Final[frozenset[type]] = frozenset(
    {
        LogisticRegression,
        LogisticRegressionCV,
        LinearRegression,
        Ridge,
        RidgeCV,
        Lasso,
        LassoCV,
        ElasticNet,
        ElasticNetCV,
        Lars,
        LarsCV,
        LassoLars,
        LassoLarsCV,
        LassoLarsIC,
        OrthogonalMatchingPursuit,
        BayesianRidge,
        ARDRegression,
        HuberRegressor,
        TheilSenRegressor,
        QuantileRegressor,
        SGDRegressor,
        LinearSVR,
    }
)
_SCALER_NAMES: Final = ", ".join(sorted(kind.__name__ for kind in SCALERS))
_ESTIMATOR_NAMES: Final = (
    "LogisticRegression, LinearRegression and its relatives (Ridge, Lasso, …), "
    "DecisionTree, ExtraTree, RandomForest and ExtraTrees (classifier or regressor)"
)
# What to do about the steps people most often bring; the rest get the list of what is supported.
_REMEDIES: Final = {
    "SimpleImputer": "forests take NaN themselves: drop this step and fit on NaN",
    "KNNImputer": "forests take NaN themselves: drop this step and fit on NaN",
    "ColumnTransformer": "select and encode columns before the pipeline, so that it starts at numbers",
    "OneHotEncoder": "encode before the pipeline, so that it starts at numbers",
    "OrdinalEncoder": "encode before the pipeline, so that it starts at numbers",
    "PolynomialFeatures": "compute these columns before the pipeline, or use a forest",
    "FunctionTransformer": "apply the function before the pipeline",
    "SelectKBest": "drop the unselected columns and fit again without this step",
    "HistGradientBoostingClassifier": "use RandomForestClassifier or ExtraTreesClassifier",
    "HistGradientBoostingRegressor": "use RandomForestRegressor or ExtraTreesRegressor",
    "GradientBoostingClassifier": "use RandomForestClassifier or ExtraTreesClassifier",
    "GradientBoostingRegressor": "use RandomForestRegressor or ExtraTreesRegressor",
    "RidgeClassifier": "use LogisticRegression, which has probabilities",
    "LinearSVC": "use LogisticRegression, which has probabilities",
    "SGDClassifier": "use LogisticRegression, which has probabilities",
    "TransformedTargetRegressor": "fit on the transformed target and undo the transformation after predict",
    "GridSearchCV": "convert its best_estimator_",
    "RandomizedSearchCV": "convert its best_estimator_",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a pipeline: its name as the user wrote it, and the fitted object."""

    name: str
    fitted: Any

    def refuse(self, reason: str, remedy: str = "") -> UnsupportedPipeline:
        """An error that names this step, the reason and a remedy."""
        kind = type(self.fitted).__name__
        advice = remedy or _REMEDIES.get(kind) or f"supported: {_SCALER_NAMES}; then {_ESTIMATOR_NAMES}"
        return UnsupportedPipeline(f"step {self.name!r} ({kind}) {reason}; {advice}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Signature:
    """A pipeline that the converters understand.

    Attributes:
        pipeline: the fitted object itself, whose answers are the reference.
        scalers: the steps before the estimator, each one of `SCALERS`.
        estimator: the last step.
        family: ``linear`` or ``forest`` (single trees too).
        task: ``classifier`` or ``regressor``.
        score: the method that the score stands for: ``predict_proba`` or ``predict``.
        width: F, how many columns the pipeline takes.
        names: the column names the pipeline was fitted with; empty when it was fitted without.
        labels: class labels in the order of the scores, as Python values; empty for a regressor.
        missing: whether the estimator takes NaN at all.
    """

    pipeline: Any
    scalers: tuple[Step, ...]
    estimator: Step
    family: Family
    task: Task
    score: Literal["predict_proba", "predict"]
    width: int
    names: tuple[str, ...]
    labels: tuple[Label, ...]
    missing: bool


def read(pipeline: Any) -> Signature:
    """Reads a fitted pipeline or bare estimator; raises `UnsupportedPipeline` on anything not understood."""
    steps = _flatten("", pipeline)
    if not steps:
        raise UnsupportedPipeline(f"the pipeline has no estimator; it must end in one of {_ESTIMATOR_NAMES}")
    *scalers, last = steps
    for step in scalers:
        if type(step.fitted) not in SCALERS:
            raise step.refuse("cannot be converted")
    kind = type(last.fitted)
    if kind not in _FORESTS and kind not in _LINEAR:
        raise last.refuse("cannot be converted")
    for step in steps:
        try:
            check_is_fitted(step.fitted)
        except NotFittedError as e:
            raise step.refuse("is not fitted", "call pipeline.fit(X, y) first") from e
    family: Family = "forest" if kind in _FORESTS else "linear"
    classifier = hasattr(last.fitted, "classes_")
    _check_outputs(last, family)
    return Signature(
        pipeline=pipeline,
        scalers=tuple(scalers),
        estimator=last,
        family=family,
        task="classifier" if classifier else "regressor",
        score="predict_proba" if classifier else "predict",
        width=int(steps[0].fitted.n_features_in_),
        names=tuple(str(name) for name in getattr(steps[0].fitted, "feature_names_in_", ())),
        labels=_labels(last) if classifier else (),
        missing=family == "forest" and bool(last.fitted.__sklearn_tags__().input_tags.allow_nan),
    )


def trees(estimator: Any) -> list[Any]:
    """The fitted ``sklearn.tree._tree.Tree`` objects of a forest or of a single tree."""
    members = getattr(estimator, "estimators_", None)
    return [estimator.tree_] if members is None else [member.tree_ for member in members]


@contextmanager
def by_position() -> Iterator[None]:
    """Lets arrays be passed to objects fitted on a data frame, and lets values overflow on their way to float32."""
    with warnings.catch_warnings(), np.errstate(over="ignore", under="ignore", invalid="ignore"):
        warnings.filterwarnings("ignore", "X does not have valid feature names")
        warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
        yield


def _flatten(prefix: str, fitted: Any) -> list[Step]:
    if not isinstance(fitted, Pipeline):
        return [Step(prefix or "estimator", fitted)]
    found: list[Step] = []
    for name, step in fitted.steps:
        if step is None or (isinstance(step, str) and step == "passthrough"):
            continue
        found += _flatten(f"{prefix}__{name}" if prefix else name, step)
    return found


def _check_outputs(last: Step, family: Family) -> None:
    if family == "forest":
        outputs = int(last.fitted.n_outputs_)
    else:
        coef = last.fitted.coef_
        if not isinstance(coef, np.ndarray):
            raise last.refuse("has sparse coefficients", "call densify() on it")
        if not np.isfinite(coef).all() or not np.isfinite(last.fitted.intercept_).all():
            raise last.refuse("has coefficients that are not finite", "scale the columns and fit again")
        outputs = 1 if hasattr(last.fitted, "classes_") or coef.ndim == 1 else len(coef)
    if outputs != 1:
        raise last.refuse(f"predicts {outputs} targets at once", "fit and convert one model per target")


def _labels(last: Step) -> tuple[Label, ...]:
    classes: NDArray[Any] = np.asarray(last.fitted.classes_)
    if classes.size < 2:
        raise last.refuse("was fitted on one class only", "fit on rows of at least two classes")
    found: list[Label] = []
    for value in classes:
        plain = value.item() if isinstance(value, np.generic) else value
        if not isinstance(plain, bool | int | float | str):
            raise last.refuse(
                f"has the class label {plain!r} of type {type(plain).__name__}",
                "use text, whole numbers or truth values as labels",
            )
        found.append(plain)
    return tuple(found)
