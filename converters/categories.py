"""The categories that a pipeline's encoders know, traced back to the input columns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import FeatureUnion, Pipeline

from edge_runtime.contract.manifest import Label


def known_values(pipeline: Any, width: int) -> list[set[Label]]:
    """For each of the ``width`` input columns, the values that encoders and imputers behind it name.

    Training rows need not hold all of them: categories can be given by hand.
    """
    found: list[set[Label]] = [set() for _ in range(width)]
    _walk(pipeline, [{j} for j in range(width)], found)
    return found


def _walk(fitted: Any, sources: list[set[int]], found: list[set[Label]]) -> list[set[int]] | None:
    """Adds what ``fitted`` knows; returns the sources of its output columns, None where they are not one to one."""
    if isinstance(fitted, Pipeline):
        current: list[set[int]] | None = sources
        for _, step in fitted.steps:
            if current is None:
                break
            if step is not None and not isinstance(step, str):
                current = _walk(step, current, found)
        return current
    if isinstance(fitted, ColumnTransformer):
        for name, step, _ in fitted.transformers_:
            if not isinstance(step, str):
                at = fitted._transformer_to_input_indices[name]  # noqa: SLF001 - columns as numbers, however they were named
                _walk(step, [sources[j] for j in at], found)
        return None
    if isinstance(fitted, FeatureUnion):
        for _, step in fitted.transformer_list:
            if not isinstance(step, str):
                _walk(step, sources, found)
        return None
    if hasattr(fitted, "best_estimator_"):
        return _walk(fitted.best_estimator_, sources, found)
    _add(fitted, sources, found)
    same = (
        getattr(fitted, "n_features_in_", None) == len(sources) and type(fitted).__name__ == "SimpleImputer"
    )
    return sources if same else None


def _add(fitted: Any, sources: list[set[int]], found: list[set[Label]]) -> None:
    categories = getattr(fitted, "categories_", None)
    if isinstance(categories, list) and len(categories) == len(sources):
        for values, columns in zip(categories, sources, strict=True):
            plain = {v.item() if isinstance(v, np.generic) else v for v in values}
            for j in columns:
                found[j] |= {
                    v
                    for v in plain
                    if isinstance(v, str | int) or (isinstance(v, float) and not math.isnan(v))
                }
