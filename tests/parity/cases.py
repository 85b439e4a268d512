"""Pipelines and rows for the parity tests, small enough to fit in milliseconds."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.tree import (
    DecisionTreeClassifier,
    DecisionTreeRegressor,
    ExtraTreeClassifier,
    ExtraTreeRegressor,
)

Maker = Callable[[], Any]

SCALERS: dict[str, Maker | None] = {
    "none": None,
    "standard": StandardScaler,
    "minmax": MinMaxScaler,
    "clip": lambda: MinMaxScaler(clip=True),
    "maxabs": MaxAbsScaler,
    "robust": RobustScaler,
    "chain": lambda: make_pipeline(RobustScaler(), StandardScaler(), MinMaxScaler((-3, 7))),
}
CLASSIFIERS: dict[str, Maker] = {
    "logistic": lambda: LogisticRegression(max_iter=20_000),
    "forest": lambda: RandomForestClassifier(8, random_state=0),
    "extra-trees": lambda: ExtraTreesClassifier(8, random_state=0),
    "tree": lambda: DecisionTreeClassifier(random_state=0),
    "extra-tree": lambda: ExtraTreeClassifier(random_state=0),
}
REGRESSORS: dict[str, Maker] = {
    "least-squares": LinearRegression,
    "ridge": Ridge,
    "forest": lambda: RandomForestRegressor(8, random_state=0),
    "extra-trees": lambda: ExtraTreesRegressor(8, random_state=0),
    "tree": lambda: DecisionTreeRegressor(random_state=0),
    "extra-tree": lambda: ExtraTreeRegressor(random_state=0),
}


def scaled_integers(rows: int = 400, width: int = 5, seed: int = 0) -> NDArray[np.float64]:
    """Whole numbers times a power of two per column: many values lie exactly on splits, in float32 too."""
    rng = np.random.default_rng(seed)
    return rng.integers(-60, 60, size=(rows, width)) * 2.0 ** rng.integers(-7, 7, size=width)


def classes_of(X: NDArray[np.float64], classes: int, seed: int = 1) -> NDArray[np.int64]:
    """(n,) noisy classes of roughly equal size, so that trees grow deep."""
    rng = np.random.default_rng(seed)
    z = (np.nan_to_num(X) / (np.nanstd(X, axis=0) + 1e-9)) @ rng.normal(size=X.shape[1])
    z += rng.normal(scale=0.5, size=len(X))
    return np.asarray(np.searchsorted(np.quantile(z, np.arange(1, classes) / classes), z), np.int64)


def pipeline_of(scaler: str, estimator: Any) -> Any:
    """``estimator`` behind the named scaler, or alone."""
    maker = SCALERS[scaler]
    return estimator if maker is None else make_pipeline(maker(), estimator)
