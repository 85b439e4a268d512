"""Feature selection: the columns of `get_support`, and the predictors that carry their own selection."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.feature_selection import (
    RFE,
    RFECV,
    GenericUnivariateSelect,
    SelectFdr,
    SelectFpr,
    SelectFromModel,
    SelectFwe,
    SelectKBest,
    SelectPercentile,
    SequentialFeatureSelector,
    VarianceThreshold,
)

from converters.lowering.graph import Lowering, Value
from converters.lowering.rules import rule

_ELIMINATIONS = (RFE, RFECV)


@rule(
    "transform",
    *_ELIMINATIONS,
    GenericUnivariateSelect,
    SelectFdr,
    SelectFpr,
    SelectFromModel,
    SelectFwe,
    SelectKBest,
    SelectPercentile,
    SequentialFeatureSelector,
    VarianceThreshold,
)
def _select(g: Lowering, fitted: Any, x: Value) -> Value:
    kept = np.flatnonzero(fitted.get_support())
    if not len(kept):
        raise g.refuse(fitted, "keeps no column", "loosen its test, or drop the step")
    return g.select(x, kept)


def _answers(method: str) -> None:
    @rule(method, *_ELIMINATIONS)
    def _estimator(g: Lowering, fitted: Any, x: Value) -> Value:
        return g.call(fitted.estimator_, method, g.call(fitted, "transform", x), "estimator")


for _method in ("predict", "predict_proba", "decision_function"):
    _answers(_method)
