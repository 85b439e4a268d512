"""Encoders of categories: one table per column, whose rows are what the fitted encoder itself says of each category.

A coded column has its categories numbered already; in a column of numbers a category is found by equality. Rows of a
table: a value never seen, the categories in order, and for coded columns a missing value last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, TargetEncoder
from sklearn.utils._missing import is_scalar_nan

from converters.lowering import folding
from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.rules import rule
from converters.signature import by_position
from edge_runtime.contract.manifest import Label


class _Unseen:
    """A value that equals no category."""


@rule("transform", OneHotEncoder, OrdinalEncoder, TargetEncoder)
def _encode(g: Lowering, fitted: Any, x: Value) -> Value:
    blocks = _blocks(fitted)
    parts = []
    for j, block in enumerate(blocks):
        if not len(block):
            continue
        vocabulary = x.vocabularies[j] if x.vocabularies else None
        if vocabulary is None:
            values, index = _numbers(g, fitted, x, j)
            if getattr(fitted, "handle_unknown", "ignore") == "error":
                g.bar(g.binary("Equal", index, 0))
        else:
            values, index = [*vocabulary, _missing(g, fitted, j)], _codes(g, x, j, len(vocabulary))
        parts.append(g.take(_table(fitted, j, values)[:, block], index))
    if not parts:
        raise g.refuse(fitted, "keeps no column", "use drop=None")
    return g.concat(parts)


def _blocks(fitted: Any) -> list[NDArray[np.int64]]:
    """For each input column, the columns of the output that it makes."""
    if isinstance(fitted, OneHotEncoder):
        sizes = list(fitted._n_features_outs)  # noqa: SLF001 - no public name
    elif isinstance(fitted, TargetEncoder) and fitted.target_type_ == "multiclass":
        sizes = [len(fitted.classes_)] * len(fitted.categories_)
    else:
        sizes = [1] * len(fitted.categories_)
    ends = np.cumsum([0, *sizes])
    return [np.arange(start, end) for start, end in pairwise(ends)]


def _codes(g: Lowering, x: Value, j: int, count: int) -> Value:
    """Rows of the table (n,) for a coded column: codes from -1 on, then NaN."""
    codes = g.vector(g.select(x, [j]))
    return g.cast(g.add(g.where(g.unary("IsNaN", codes), float(count), codes), 1.0), "int64")


def _numbers(g: Lowering, fitted: Any, x: Value, j: int) -> tuple[list[Any], Value]:
    """The categories of a column of numbers, and rows of the table (n,): 0 where no category is met."""
    categories = list(fitted.categories_[j])
    try:
        known = np.array(categories).astype(np.float64)
    except (TypeError, ValueError) as e:
        raise g.refuse(
            fitted, f"has categories in column {j} that are not numbers", "give the column as text"
        ) from e
    if any(isinstance(each, str) for each in categories):
        raise g.refuse(
            fitted, f"has text as categories in column {j}, which holds numbers", "give it as text"
        )
    folding.note_edges(g, x, j, known)
    column = g.select(x, [j])
    same = g.binary("Equal", column, known.reshape(1, -1))
    if np.isnan(known).any():
        same = g.binary("Or", same, g.binary("And", g.unary("IsNaN", column), np.isnan(known).reshape(1, -1)))
    places = g.matmul(g.cast(same, "float64"), np.arange(1.0, len(known) + 1).reshape(-1, 1))
    return categories, g.cast(g.vector(places), "int64")


def _missing(g: Lowering, fitted: Any, j: int) -> Any:
    """What a missing value is to the encoder: the category None or NaN, whichever it has."""
    kinds = [each for each in fitted.categories_[j] if each is None or is_scalar_nan(each)]
    if len(kinds) > 1:
        raise g.refuse(fitted, f"tells None from NaN in column {j}", "use one of them for what is missing")
    return kinds[0] if kinds else np.nan


def _table(fitted: Any, j: int, values: Sequence[Label | Any]) -> Wide:
    """(1 + V, W): the encoder's answers to a value never seen and to ``values`` in column ``j``.

    0 for values that the encoder refuses: such rows get no answer at all (`Lowering.bar`; codes are not even packed).
    """
    known = [_is_known(fitted.categories_[j], value) for value in values]
    asked = [value for value, seen in zip(values, known, strict=True) if seen]
    strict = getattr(fitted, "handle_unknown", "ignore") == "error"
    unseen = [] if strict else [_Unseen()]
    rows = np.empty((len(asked) + len(unseen), len(fitted.categories_)), object)
    for k, categories in enumerate(fitted.categories_):
        rows[:, k] = categories[0]
    for i, value in enumerate([*unseen, *asked]):
        rows[i, j] = value
    with by_position():
        answer = fitted.transform(rows)
    answers = np.asarray(answer.toarray() if hasattr(answer, "toarray") else answer, np.float64)
    other = np.zeros((1, answers.shape[1])) if strict else answers[:1]
    found = iter(answers[len(unseen) :])
    return np.vstack([other, *(next(found)[None] if seen else other for seen in known)])


def _is_known(categories: NDArray[Any], value: Any) -> bool:
    if value is None:
        return any(each is None for each in categories)
    if is_scalar_nan(value):
        return any(is_scalar_nan(each) for each in categories)
    return value in set(categories.tolist())
