"""Trees of every family, behind scalers, with missing values and categories, for the million rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
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
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.tree import (
    DecisionTreeClassifier,
    DecisionTreeRegressor,
    ExtraTreeClassifier,
    ExtraTreeRegressor,
)

N = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One fitted pipeline.

    ``target`` is a number of classes or a name in `target_of`; ``categories`` is "codes" or "frame". Where gaps
    ``tell``, the target depends on what is missing: trees learn splits between all numbers and NaN.
    """

    model: Any
    target: Any = "y"
    scalers: tuple[Callable[[], Any], ...] = ()
    holes: bool = False
    tell: bool = False
    dtype: str = "float32"
    categories: str = ""


TREES = [
    Case(model=DecisionTreeClassifier(random_state=0), target=3),
    Case(model=DecisionTreeClassifier(random_state=0), target=2, scalers=(StandardScaler,)),
    Case(model=DecisionTreeRegressor(random_state=0), scalers=(StandardScaler,)),
    Case(model=DecisionTreeClassifier(random_state=0), target=4, holes=True),
    Case(model=DecisionTreeClassifier(random_state=0), target=4, scalers=(RobustScaler,), holes=True),
    Case(model=DecisionTreeClassifier(max_depth=5), target=3, scalers=(MinMaxScaler,), dtype="float64"),
    Case(model=ExtraTreeClassifier(random_state=0), target=3, scalers=(PowerTransformer,)),
    Case(model=DecisionTreeRegressor(random_state=0), target="two", scalers=(QuantileTransformer,)),
    Case(model=DecisionTreeRegressor(random_state=0), holes=True, scalers=(MinMaxScaler,)),
    Case(model=ExtraTreeRegressor(random_state=0), scalers=(RobustScaler, MinMaxScaler, StandardScaler)),
]


def forests(classifier, regressor):
    return [
        Case(model=classifier(12, random_state=0), target=3),
        Case(model=classifier(12, random_state=0), target=2, scalers=(StandardScaler,), holes=True),
        Case(model=regressor(12, random_state=0), scalers=(MinMaxScaler,)),
        Case(model=classifier(13, random_state=0), target=4, scalers=(RobustScaler,)),
        Case(model=classifier(9, random_state=0), target=2, scalers=(PowerTransformer,)),
        Case(model=regressor(12, random_state=0), holes=True, tell=True),
        Case(model=regressor(8, random_state=0), target="two", scalers=(MaxAbsScaler,)),
        Case(model=classifier(9, random_state=0), target=3, scalers=(StandardScaler,), dtype="float64"),
    ]


BOOSTED = [
    Case(model=GradientBoostingClassifier(n_estimators=12, random_state=0), target=3),
    Case(model=GradientBoostingClassifier(n_estimators=30), target=2, scalers=(StandardScaler,)),
    Case(model=GradientBoostingRegressor(n_estimators=30), scalers=(RobustScaler,)),
    Case(model=GradientBoostingClassifier(n_estimators=20, loss="exponential"), target=2),
    Case(model=GradientBoostingRegressor(n_estimators=20, loss="huber"), scalers=(PowerTransformer,)),
    Case(model=GradientBoostingRegressor(n_estimators=20, loss="quantile", max_depth=5)),
    Case(model=GradientBoostingClassifier(n_estimators=10), target=4, scalers=(MinMaxScaler,)),
    Case(
        model=GradientBoostingClassifier(n_estimators=20), target=2, scalers=(MinMaxScaler,), dtype="float64"
    ),
]
_SMALL = {"max_iter": 15, "min_samples_leaf": 5, "random_state": 0}
HISTOGRAM = [
    Case(model=HistGradientBoostingClassifier(**_SMALL), target=3, holes=True, tell=True),
    Case(model=HistGradientBoostingClassifier(**_SMALL), target=3, scalers=(StandardScaler,), holes=True),
    Case(
        model=HistGradientBoostingClassifier(**_SMALL, categorical_features=[1, 3]),
        target=2,
        categories="codes",
        holes=True,
    ),
    Case(model=HistGradientBoostingRegressor(**_SMALL), categories="frame", holes=True),
    Case(model=HistGradientBoostingClassifier(**_SMALL), target=2),
    Case(model=HistGradientBoostingRegressor(**_SMALL), scalers=(RobustScaler,)),
    Case(
        model=HistGradientBoostingRegressor(**_SMALL, loss="gamma"),
        target="positive",
        scalers=(PowerTransformer,),
    ),
    Case(
        model=HistGradientBoostingRegressor(**_SMALL, categorical_features=[1]),
        categories="codes",
        scalers=(MinMaxScaler,),
    ),
    Case(model=HistGradientBoostingClassifier(**_SMALL), target=3, categories="frame"),
    Case(
        model=HistGradientBoostingClassifier(**_SMALL),
        target=2,
        scalers=(MinMaxScaler,),
        dtype="float64",
        holes=True,
    ),
]
ISOLATION = [
    Case(model=IsolationForest(n_estimators=12, random_state=0), target=""),
    Case(
        model=IsolationForest(n_estimators=12, random_state=0, contamination=0.1),
        target="",
        scalers=(StandardScaler,),
        holes=True,
    ),
    Case(
        model=IsolationForest(n_estimators=12, random_state=0, max_features=0.5),
        target="",
        scalers=(PowerTransformer,),
    ),
    Case(
        model=IsolationForest(n_estimators=12, random_state=0, max_samples=64, contamination=0.2),
        target="",
        scalers=(RobustScaler,),
    ),
    Case(
        model=IsolationForest(n_estimators=12, random_state=0),
        target="",
        scalers=(MinMaxScaler,),
        dtype="float64",
    ),
]
FAMILIES = {
    "tree": TREES,
    "random-forest": forests(RandomForestClassifier, RandomForestRegressor),
    "extra-trees": forests(ExtraTreesClassifier, ExtraTreesRegressor),
    "gradient-boosting": BOOSTED,
    "histogram-boosting": HISTOGRAM,
    "isolation-forest": ISOLATION,
}


# --- what is fitted ---------------------------------------------------------------------------------------------


def training_rows(case):
    """(N, 6): whole numbers over powers of two, which lie on thresholds, an offset, a skew, and a tiny scale."""
    rng = np.random.default_rng(0)
    rows = np.stack(
        [
            rng.integers(-40, 40, N) / 8.0,
            rng.integers(0, 12, N) * 1.5,
            1000 + rng.normal(size=N),
            rng.integers(-3, 5, N) * 1.0,
            rng.lognormal(size=N),
            rng.normal(size=N) * 1e-6,
        ],
        axis=1,
    )
    rows = rows.astype(np.float32).astype(np.float64) if case.dtype == "float32" else rows
    y = (
        rows[:, 0] ** 2
        + 3 * np.isin(rows[:, 1], [0.0, 4.5, 9.0])
        + rows[:, 3]
        + np.log(rows[:, 4])
        + 1e6 * rows[:, 5]
    )
    y += rng.normal(size=N)
    if case.holes:
        gaps = rng.random(rows.shape) < 0.12
        rows[gaps] = np.nan
        if case.tell:
            y += np.asarray(gaps, np.float64) @ np.array([9.0, -9.0, 9.0, -9.0, 9.0, 0.0])
    return rows, y


def target_of(case, y):
    if isinstance(case.target, int):
        labels = np.digitize(y, np.quantile(y, np.arange(1, case.target) / case.target))
        return np.array(["idle", "run", "sit", "walk"])[labels] if case.target == 4 else labels - 1
    return {"y": y, "positive": np.exp(y / 10), "two": np.stack([y, -3 * y], axis=1), "": None}[case.target]


WORDS = np.array(["red", "green", "blue", "grey", "", "é", "7", "nan", "None", "x", "y", "z"], dtype=object)


def framed(rows, vocabulary):
    """Rows with codes in column 1 as a frame with a categorical; -1 becomes a word that is not in the vocabulary."""
    frame = pd.DataFrame(rows.astype(np.float64), columns=list("abcdef"))
    missing = np.isnan(rows[:, 1])
    codes = np.where(missing, -1, np.where(rows[:, 1] == -1, len(vocabulary), rows[:, 1])).astype(int)
    frame["b"] = pd.Categorical.from_codes(codes, categories=[*vocabulary, "a stranger"])
    return frame
