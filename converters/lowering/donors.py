"""Missing values filled in from the nearest rows that have one.

Distances leave out what is missing on either side and are scaled up for it, in the order of
`sklearn.metrics.pairwise.nan_euclidean_distances`. Among equally far rows scikit-learn takes those that
`numpy.argpartition` leaves in front, in an order of the processor's; the graph takes the first.
"""

# ruff: noqa: SLF001 - what a fitted estimator learned is partly private to it
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.impute import KNNImputer
from sklearn.utils.extmath import row_norms

from converters.lowering.graph import Lowering, Value
from converters.lowering.heap import smallest
from converters.lowering.imputing import missing_mask, picked_columns
from converters.lowering.rules import rule

Index = NDArray[np.int64]


@rule("transform", KNNImputer)
def _impute(g: Lowering, fitted: KNNImputer, x: Value) -> Value:
    if x.coded:
        raise g.refuse(fitted, "gets a column of categories", "encode it before this step")
    if fitted.metric != "nan_euclidean":
        raise g.refuse(fitted, f"has the metric {fitted.metric!r}", "use metric='nan_euclidean'")
    if callable(fitted.weights):
        raise g.refuse(fitted, "has a function as its weights", "use weights='uniform' or 'distance'")
    valid = np.flatnonzero(fitted._valid_mask)
    kept = np.arange(x.width) if fitted.keep_empty_features else valid
    if not len(kept):
        raise g.refuse(fitted, "keeps no column", "drop columns without values before this step")
    g.note(f"carries {len(fitted._fit_X)} training rows (KNNImputer)")
    text = "chooses among equally far rows in an order that is the processor's"
    g.doubt(fitted, text, "use SimpleImputer, or leave out of the training data what repeats itself")
    g.searches = True
    mask = missing_mask(g, fitted, x)
    made = _filled(g, fitted, x, mask, kept)
    if not fitted.add_indicator or not len(fitted.indicator_.features_):
        return made
    marked = np.asarray(fitted.indicator_.features_, np.int64)
    return g.concat([made, g.cast(picked_columns(g, mask, marked), "float64")])


def _filled(g: Lowering, fitted: KNNImputer, x: Value, mask: Value, kept: Index) -> Value:
    distances = _distances(g, fitted, x, mask)
    columns = []
    for j in kept.tolist():
        column = g.select(x, [j])
        if fitted._valid_mask[j]:
            value = _value(g, fitted, distances, j)
            columns.append(g.where(picked_columns(g, mask, np.array([j])), value, column))
        else:  # kept, and filled with zeros whatever it holds
            columns.append(g.where(g.unary("IsNaN", column), 0.0, np.zeros((1, 1))))
    return g.concat(columns)


def _distances(g: Lowering, fitted: KNNImputer, x: Value, mask: Value) -> Value:
    """(n, N) distances to the training rows; infinite where the two have no column in common."""
    away = np.asarray(fitted._mask_fit_X, np.float64)
    rows = np.where(fitted._mask_fit_X, 0.0, np.asarray(fitted._fit_X, np.float64))
    holes = g.cast(mask, "float64")
    present = g.where(mask, 0.0, x)
    squares = g.mul(present, present)
    made = g.add(g.matmul(present, -2.0 * rows.T), g.reduce("Sum", squares))
    made = _positive(g, g.add(made, row_norms(rows, squared=True)[None]))
    if away.any():
        made = g.sub(made, g.matmul(squares, away.T))
    made = _positive(g, g.sub(made, g.matmul(holes, (rows * rows).T)))
    common = g.matmul(g.sub(1.0, holes), 1.0 - away.T)
    alone = g.binary("Equal", common, 0.0)
    made = g.mul(g.div(made, g.where(alone, 1.0, common)), float(x.width))
    return g.where(alone, np.full((1, 1), np.inf), g.unary("Sqrt", made))


def _positive(g: Lowering, x: Value) -> Value:
    return g.where(g.binary("Less", x, 0.0), 0.0, x)


def _value(g: Lowering, fitted: KNNImputer, distances: Value, column: int) -> Value:
    """(n, 1) the mean of the nearest rows that have a value; that of all of them where none has a distance."""
    donors = np.flatnonzero(~fitted._mask_fit_X[:, column])
    values = np.asarray(fitted._fit_X, np.float64)[donors, column]
    count = min(fitted.n_neighbors, len(donors))
    weights, places = g.memo(
        (id(fitted), distances.name, donors.tobytes()),
        lambda: _weighted(g, fitted, distances, donors, count),
        fitted,
    )
    found = g.take(values, places)
    total = g.reduce("Sum", weights)
    none = g.binary("Equal", total, 0.0)
    mean = g.div(g.reduce("Sum", g.mul(found, weights)), g.where(none, 1.0, total))
    return g.where(none, float(values.mean()), mean)


def _weighted(
    g: Lowering, fitted: KNNImputer, distances: Value, donors: Index, count: int
) -> tuple[Value, Value]:
    """(n, k) weights and places among the donors of the nearest ones."""
    if len(donors) < distances.width:
        distances = g.node("Gather", [distances, donors], (None, len(donors)), axis=1)
    nearest, places = smallest(g, distances, count)
    apart = g.unary("IsInf", nearest)
    if fitted.weights != "distance":
        return g.where(apart, np.zeros((1, 1)), np.ones((1, 1))), places
    inverse = g.div(1.0, nearest)
    same = g.cast(g.unary("IsInf", inverse), "float64")
    return g.where(g.binary("Greater", g.reduce("Max", same), 0.0), same, inverse), places
