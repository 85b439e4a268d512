"""The pipelines that `benchmarks.conversion` converts, on data sets that come with scikit-learn and with skiff."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from trainer.datasets import load_watch

Fitted = tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A named pipeline: ``make`` fits it and gives it with its training rows, float32 or a data frame."""

    name: str
    data: str
    make: Callable[[], Fitted]


def _on(load: Callable[..., Any], *steps: Any) -> Callable[[], Fitted]:
    def make() -> Fitted:
        X, y = load(return_X_y=True)
        rows = np.asarray(X, np.float32)
        return make_pipeline(*steps).fit(rows, y), rows

    return make


def _with_holes() -> Fitted:
    X, y = load_breast_cancer(return_X_y=True)
    rows = np.asarray(X, np.float32)
    rows[np.random.default_rng(0).random(rows.shape) < 0.1] = np.nan
    return HistGradientBoostingClassifier(random_state=0).fit(rows, y), rows


def _frame() -> Fitted:
    """Nine sensor figures, a tenth of them lost, and two columns of text: the wrist and the wearer's group."""
    data = load_watch().select(people=(1, 2, 3, 4, 5, 6))
    rows = data.features[:, :9].copy()
    rows[np.random.default_rng(0).random(rows.shape) < 0.1] = np.nan
    frame = pd.DataFrame(rows, columns=data.feature_names[:9])
    frame["wrist"] = np.where(data.wrist == 0, "left", "right")
    frame["group"] = np.array(["a", "b", "c"])[data.person % 3]
    frame = frame.iloc[::5].reset_index(drop=True)
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    columns = make_column_transformer(
        (numbers, list(frame.columns[:9])),
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), ["wrist", "group"]),
    )
    pipeline = make_pipeline(columns, LogisticRegression(max_iter=2000))
    return pipeline.fit(frame, np.asarray(data.label_names)[data.labels[::5]]), frame


CASES = (
    Case("scaler, logistic regression", "iris", _on(load_iris, StandardScaler(), LogisticRegression())),
    Case("scaler, SVC (rbf)", "wine", _on(load_wine, StandardScaler(), SVC())),
    Case("random forest of 100", "digits", _on(load_digits, RandomForestClassifier(random_state=0))),
    Case(
        "scaler, random forest of 100",
        "breast cancer",
        _on(load_breast_cancer, StandardScaler(), RandomForestClassifier(random_state=0)),
    ),
    Case("extra trees of 100", "diabetes", _on(load_diabetes, ExtraTreesRegressor(random_state=0))),
    Case(
        "gradient boosting",
        "breast cancer",
        _on(load_breast_cancer, GradientBoostingClassifier(random_state=0)),
    ),
    Case("hist gradient boosting, NaN", "breast cancer", _with_holes),
    Case("isolation forest", "breast cancer", _on(load_breast_cancer, IsolationForest(random_state=0))),
    Case(
        "scaler, MLP of 100",
        "digits",
        _on(load_digits, StandardScaler(), MLPClassifier(random_state=0, max_iter=400)),
    ),
    Case("impute, scale, one-hot, logistic", "watch", _frame),
    Case(
        "scaler, PCA of 5, 5 neighbours",
        "wine",
        _on(load_wine, StandardScaler(), PCA(5, random_state=0), KNeighborsClassifier()),
    ),
)
