"""Missing values: filled in, or marked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.impute import MissingIndicator, SimpleImputer

from converters.lowering import folding
from converters.lowering.graph import Fold, Lowering, Value, Wide
from converters.lowering.rules import rule
from edge_runtime.contract.manifest import Label

Vocabulary = tuple[Label, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class _Filling:
    """Per kept column: what stands for a missing value, and what the column's codes mean afterwards."""

    values: Wide
    vocabularies: tuple[Vocabulary, ...]


@rule("transform", SimpleImputer)
def _simple(g: Lowering, fitted: SimpleImputer, x: Value) -> Value:
    missing = missing_mask(g, fitted, x)
    kept = np.arange(x.width) if fitted.keep_empty_features else np.flatnonzero(~_absent(fitted.statistics_))
    if not len(kept):
        raise g.refuse(fitted, "keeps no column", "drop columns without values before this step")
    source = g.select(x, kept)
    filling = _filling(g, fitted, source, kept)
    made = g.where(picked_columns(g, missing, kept), filling.values, source)
    made = replace(
        made,
        vocabularies=filling.vocabularies if any(v is not None for v in filling.vocabularies) else (),
        fold=_kept_fold(fitted, source, filling),
    )
    if not fitted.add_indicator:
        return made
    marked = np.asarray(fitted.indicator_.features_, np.int64)
    if not len(marked):
        return made
    return g.concat([made, g.cast(picked_columns(g, missing, marked), "float64")])


@rule("transform", MissingIndicator)
def _indicator(g: Lowering, fitted: MissingIndicator, x: Value) -> Value:
    marked = np.asarray(fitted.features_, np.int64)
    if not len(marked):
        raise g.refuse(fitted, "marks no column", "drop the step, or fit with features='all'")
    return g.cast(picked_columns(g, missing_mask(g, fitted, x), marked), "float64")


def _absent(values: Any) -> NDArray[np.bool_]:
    """Where an array of any kind holds NaN."""
    array = np.asarray(values)
    return np.asarray(array != array, bool)  # noqa: PLR0124 - NaN alone differs from itself, objects included


def _unspecific(missing_values: Any) -> bool:
    """Whether the placeholder is NaN, None or pandas.NA."""
    if missing_values is None or type(missing_values).__name__ == "NAType":
        return True
    return isinstance(missing_values, float | np.floating) and bool(np.isnan(missing_values))


def missing_mask(g: Lowering, fitted: Any, x: Value) -> Value:
    """(n, W) bool: what counts as missing."""
    placeholder = fitted.missing_values
    if _unspecific(placeholder):
        return g.unary("IsNaN", x)
    wanted = np.full(x.width, np.nan)
    for column in range(x.width):
        vocabulary = x.vocabularies[column] if x.coded else None
        if vocabulary is not None:
            if placeholder not in vocabulary:
                raise g.refuse(
                    fitted,
                    f"takes {placeholder!r} for missing in column {column}, where no known category has that value",
                    "replace it by NaN before the pipeline and leave missing_values as it is",
                )
            wanted[column] = vocabulary.index(placeholder)
        elif isinstance(placeholder, str):
            continue  # no number equals a string
        else:
            wanted[column] = placeholder
            folding.note_edges(g, x, column, np.array([placeholder], np.float64))
    return g.binary("Equal", x, wanted)


def picked_columns(g: Lowering, mask: Value, columns: NDArray[np.int64]) -> Value:
    """Columns of a mask, in this order."""
    if np.array_equal(columns, np.arange(mask.width)):
        return mask
    return g.node("Gather", [mask, columns], (None, len(columns)), "bool", axis=1)


def _filling(g: Lowering, fitted: SimpleImputer, x: Value, kept: NDArray[np.int64]) -> _Filling:
    """``x`` holds the kept columns alone."""
    statistics = fitted.statistics_[kept].astype(fitted._fill_dtype)  # noqa: SLF001 - what transform casts them to
    values = np.zeros(x.width)
    vocabularies: list[Vocabulary] = list(x.vocabularies) or [None] * x.width
    for column, statistic in enumerate(statistics):
        fill = statistic.item() if isinstance(statistic, np.generic) else statistic
        vocabulary = vocabularies[column]
        if vocabulary is not None:
            if fill is None or not isinstance(fill, str | int | float | bool):
                raise g.refuse(fitted, f"fills column {kept[column]} with {fill!r}", "fill it with a string")
            if fill not in vocabulary:
                vocabulary = (*vocabulary, fill)
                vocabularies[column] = vocabulary
            values[column] = vocabulary.index(fill)
        elif isinstance(fill, int | float) and not _absent(fill).any():
            values[column] = float(fill)
        else:
            raise g.refuse(
                fitted,
                f"fills column {kept[column]}, a column of numbers, with {fill!r}",
                "fill it with a number",
            )
    return _Filling(values, tuple(vocabularies))


def _kept_fold(fitted: SimpleImputer, x: Value, filling: _Filling) -> Fold | None:
    """Numbers pass as they are and NaN takes its filling; another placeholder breaks the order."""
    fold = x.fold
    if fold is None or not _unspecific(fitted.missing_values):
        return None

    def apply(raw: Wide) -> Wide:
        rows = fold.apply(raw)
        return np.where(np.isnan(rows), filling.values, rows)

    return Fold(sources=fold.sources, apply=apply)
