"""Steps that make several columns of one, or of products: bins, polynomials, splines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import KBinsDiscretizer, PolynomialFeatures, SplineTransformer

from converters.lowering import folding
from converters.lowering.functions import count_at_most, numbers_only, per_column
from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.rules import rule


@rule("transform", KBinsDiscretizer)
def _bins(g: Lowering, fitted: KBinsDiscretizer, x: Value) -> Value:
    numbers_only(g, fitted, x)
    inner = [np.asarray(edges[1:-1], np.float64) for edges in fitted.bin_edges_]
    for column, edges in enumerate(inner):
        folding.note_edges(g, x, column, edges)
    rounded = x
    if fitted.dtype is not None and np.dtype(fitted.dtype) == np.float32:
        rounded = g.cast(g.cast(x, "float32"), "float64")
    place = count_at_most(g, rounded, inner)
    if fitted.encode == "ordinal":
        return g.columnwise(x, g.cast(place, "float64"), fitted.transform)
    sizes = np.asarray(fitted.n_bins_, np.int64)
    repeated = g.select(place, np.repeat(np.arange(x.width), sizes))
    return g.cast(g.binary("Equal", repeated, np.concatenate([np.arange(size) for size in sizes])), "float64")


@rule("transform", PolynomialFeatures)
def _polynomial(g: Lowering, fitted: PolynomialFeatures, x: Value) -> Value:
    numbers_only(g, fitted, x)
    lowest, highest = fitted._min_degree, fitted._max_degree  # noqa: SLF001 - as read from degree by fit
    width = x.width
    blocks = []
    if fitted.include_bias:
        blocks.append(g.where(g.binary("Less", g.select(x, [0]), 0.0), 1.0, 1.0))
    if lowest <= 1 <= highest:
        blocks.append(x)
    # As scikit-learn: a term of degree d is a term of degree d - 1, from `starts` on, times one feature.
    terms, starts, count = x, list(range(width + 1)), width
    for degree in range(2, highest + 1):
        left: list[int] = []
        right: list[int] = []
        begins = []
        for feature in range(width):
            begins.append(len(left))
            start = starts[feature + 1] if fitted.interaction_only else starts[feature]
            left.extend(range(start, count))
            right.extend([feature] * (count - start))
        if not left:
            break
        terms = g.mul(g.select(terms, left), g.select(x, right))
        starts, count = [*begins, len(left)], len(left)
        if degree >= lowest:
            blocks.append(terms)
    if not blocks:
        raise g.refuse(fitted, "makes no column", "raise its degree or drop the step")
    return g.concat(blocks)


@dataclass(frozen=True, slots=True, eq=False)
class _Outside:
    """What becomes of values beyond the knots; column by column, W columns of S splines each.

    Attributes:
        low: (W,) the smallest value inside.
        high: (W,) the largest.
        below: (W, S) the splines at ``low``, and above ``high`` at ``high``.
        above: (W, S).
        below_slope: (W, S) how they go on from there; None when they stay.
        above_slope: (W, S).
    """

    low: Wide
    high: Wide
    below: Wide
    above: Wide
    below_slope: Wide | None
    above_slope: Wide | None


@rule("transform", SplineTransformer)
def _splines(g: Lowering, fitted: SplineTransformer, x: Value) -> Value:
    numbers_only(g, fitted, x)
    fails = fitted.extrapolation == "constant" or (
        fitted.extrapolation == "periodic" and fitted.sparse_output
    )
    if fitted.degree == 0 and fails:
        raise g.refuse(
            fitted,
            f"with degree=0 and extrapolation={fitted.extrapolation!r} is one that scikit-learn cannot apply",
            "fit with extrapolation='continue' or a higher degree",
        )
    knots = np.array([spline.t for spline in fitted.bsplines_], np.float64)
    if fitted.extrapolation == "error":
        beyond = [
            g.binary("Less", x, knots[:, fitted.degree]),
            g.binary("Greater", x, knots[:, -fitted.degree - 1]),
        ]
        for side in beyond:
            g.bar(g.cast(g.reduce("Max", g.cast(side, "int64"), keepdims=False), "bool"))
    inside = _wrapped(g, fitted, x, knots) if fitted.extrapolation == "periodic" else x
    made = _basis(g, fitted, inside, knots)
    size = made.width
    cube = g.reshape(x, (-1, x.width, 1))
    if fitted.extrapolation in ("constant", "linear"):
        made = _beyond(g, cube, made, _outside(fitted))
    made = g.where(g.unary("IsNaN", cube), 0.0, made)
    flat = g.reshape(made, (-1, x.width * size))
    if fitted.include_bias:
        return flat
    kept = [j for j in range(flat.width) if (j + 1) % size]
    if not kept:
        raise g.refuse(fitted, "makes no column", "fit with include_bias=True")
    return g.select(flat, kept)


def _wrapped(g: Lowering, fitted: Any, x: Value, knots: Wide) -> Value:
    """Into the first period, as ``%`` of numpy does it."""
    degree = fitted.degree
    first, last = knots[:, degree], knots[:, -degree - 1]
    period = last - first
    constant = period <= 0
    safe = np.where(constant, 1.0, period)
    rest = g.node("Mod", [g.sub(x, first), safe], x.shape, fmod=1)
    wrapped = g.add(g.where(g.binary("Less", rest, 0.0), g.add(rest, safe), rest), first)
    return g.node("Where", [constant, np.zeros(1), wrapped], x.shape) if constant.any() else wrapped


def _basis(g: Lowering, fitted: Any, x: Value, knots: Wide) -> Value:
    """(n, W, S): every spline by the recurrence of de Boor, as `scipy.interpolate.BSpline` runs it."""
    degree, width = fitted.degree, x.width
    last = knots.shape[1] - degree - 1
    interval = count_at_most(
        g, x, list(knots[:, degree + 1 : last])
    )  # from the interval that begins at t[degree]
    near = {o: per_column(g, knots, g.add(interval, degree + o)) for o in range(1 - degree, degree + 1)}
    values = [g.where(g.unary("IsNaN", x), x, 1.0)]
    for j in range(1, degree + 1):
        before, values = values, [g.mul(values[0], 0.0)]
        for n in range(1, j + 1):
            right, left = near[n], near[n - j]
            gap = g.sub(right, left)
            w = g.div(before[n - 1], gap)
            if (np.diff(knots, axis=1) == 0).any():
                w = g.where(g.binary("Equal", gap, 0.0), 0.0, w)
            values[n - 1] = g.add(values[n - 1], g.mul(w, g.sub(right, x)))
            values.append(g.mul(w, g.sub(x, left)))
    return _placed(g, fitted, interval, values, width)


def _placed(g: Lowering, fitted: Any, interval: Value, values: list[Value], width: int) -> Value:
    """Spline a of an interval is spline interval + a; periodic ones share the first with the last."""
    size = fitted.bsplines_[0].c.shape[1]
    first = g.reshape(interval, (-1, width, 1))
    made: Value | None = None
    for a, value in enumerate(values):
        index = g.add(first, a)
        if fitted.extrapolation == "periodic":
            index = g.where(g.binary("GreaterOrEqual", index, size), g.sub(index, size), index)
        part = g.where(g.binary("Equal", index, np.arange(size)), g.reshape(value, (-1, width, 1)), 0.0)
        made = part if made is None else g.add(made, part)
    assert made is not None
    return made


def _outside(fitted: Any) -> _Outside:
    """As `SplineTransformer.transform`, down to its ``degree`` that grows from column to column when linear."""
    degree = fitted.degree
    linear = fitted.extrapolation == "linear"
    size = fitted.bsplines_[0].c.shape[1]
    lows, highs = [], []
    tables: NDArray[np.float64] = np.zeros((4, len(fitted.bsplines_), size))
    for column, spline in enumerate(fitted.bsplines_):
        low, high = spline.t[degree], spline.t[-degree - 1]
        lows.append(low)
        highs.append(high)
        if linear and degree <= 1:
            degree += 1
        first, last = slice(0, degree), slice(size - degree, size)
        tables[0, column, first], tables[1, column, last] = spline(low)[first], spline(high)[last]
        if linear:
            tables[2, column, first] = spline(low, nu=1)[first]
            tables[3, column, last] = spline(high, nu=1)[last]
    return _Outside(
        low=np.array(lows),
        high=np.array(highs),
        below=tables[0],
        above=tables[1],
        below_slope=tables[2] if linear else None,
        above_slope=tables[3] if linear else None,
    )


def _beyond(g: Lowering, x: Value, made: Value, outside: _Outside) -> Value:
    low, high = outside.low[:, None], outside.high[:, None]
    sides = (
        ("Less", low, outside.below, outside.below_slope),
        ("Greater", high, outside.above, outside.above_slope),
    )
    for kind, bound, table, slope in sides:
        if slope is None:
            made = g.node("Where", [g.binary(kind, x, bound), table, made], made.shape)
        else:
            made = g.where(g.binary(kind, x, bound), g.add(g.mul(g.sub(x, bound), slope), table), made)
    return made
