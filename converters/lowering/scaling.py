"""Steps that rescale: columnwise and never decreasing most of them, many of them affine."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats
from sklearn.preprocessing import (
    Binarizer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)

from converters.lowering import folding
from converters.lowering.functions import (
    clipped,
    count_at_most,
    expm1,
    inverse_normal,
    log1p,
    numbers_only,
    per_column,
)
from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.rules import rule

BOUND = 1e-7
"""scikit-learn's BOUNDS_THRESHOLD: how near to 0 and 1 a normal quantile may come."""


@rule("transform", StandardScaler)
def _standard(g: Lowering, fitted: StandardScaler, x: Value) -> Value:
    return _shifted(
        g,
        fitted,
        x,
        centre=fitted.mean_ if fitted.with_mean else None,
        scale=fitted.scale_ if fitted.with_std else None,
    )


@rule("transform", RobustScaler)
def _robust(g: Lowering, fitted: RobustScaler, x: Value) -> Value:
    return _shifted(
        g,
        fitted,
        x,
        centre=fitted.center_ if fitted.with_centering else None,
        scale=fitted.scale_ if fitted.with_scaling else None,
    )


@rule("transform", MaxAbsScaler)
def _max_abs(g: Lowering, fitted: MaxAbsScaler, x: Value) -> Value:
    made = _shifted(g, fitted, x, centre=None, scale=fitted.scale_)
    if not getattr(fitted, "clip", False):
        return made
    return g.columnwise(x, clipped(g, made, -1.0, 1.0), fitted.transform)


@rule("transform", MinMaxScaler)
def _min_max(g: Lowering, fitted: MinMaxScaler, x: Value) -> Value:
    numbers_only(g, fitted, x)
    made = g.add(g.mul(x, fitted.scale_), fitted.min_)
    if fitted.clip:
        return g.columnwise(x, clipped(g, made, *fitted.feature_range), fitted.transform)
    return g.columnwise(x, made, fitted.transform, slope=fitted.scale_, offset=fitted.min_)


@rule("transform", Normalizer)
def _normalizer(g: Lowering, fitted: Normalizer, x: Value) -> Value:
    numbers_only(g, fitted, x)
    if fitted.norm == "l2":
        norms = g.unary("Sqrt", g.reduce("SumSquare", x))
    else:
        norms = g.reduce("Sum" if fitted.norm == "l1" else "Max", g.unary("Abs", x))
    none = g.binary("Less", norms, 10 * np.finfo(np.float64).eps)  # as sklearn's _handle_zeros_in_scale
    return g.div(x, g.where(none, 1.0, norms))


@rule("transform", Binarizer)
def _binarizer(g: Lowering, fitted: Binarizer, x: Value) -> Value:
    numbers_only(g, fitted, x)
    for column in range(x.width):
        folding.note_edges(g, x, column, np.array([fitted.threshold], np.float64))
    made = g.cast(g.binary("Greater", x, fitted.threshold), "float64")
    return g.columnwise(x, made, fitted.transform)


@rule("transform", PowerTransformer)
def _power(g: Lowering, fitted: PowerTransformer, x: Value) -> Value:
    numbers_only(g, fitted, x)
    lambdas = np.asarray(fitted.lambdas_, np.float64)
    if not np.isfinite(lambdas).all():
        raise g.refuse(
            fitted, "has a lambda that is not finite", "drop columns without values before this step"
        )
    made = _box_cox(g, x, lambdas) if fitted.method == "box-cox" else _yeo_johnson(g, x, lambdas)
    if fitted.standardize:
        scaler = fitted._scaler  # noqa: SLF001 - the only place where the means and scales are
        made = _shifted(g, scaler, made, centre=scaler.mean_, scale=scaler.scale_)
    if fitted.method == "yeo-johnson":
        return g.columnwise(x, made, fitted.transform)

    def apply(rows: Wide) -> Wide:
        """Rows that scikit-learn refuses come before all others."""
        refused = rows <= 0
        return np.where(refused, -np.inf, fitted.transform(np.where(refused, 1.0, rows)))

    return g.columnwise(x, made, apply)


@rule("transform", QuantileTransformer)
def _quantile(g: Lowering, fitted: QuantileTransformer, x: Value) -> Value:
    numbers_only(g, fitted, x)
    quantiles, references = fitted.quantiles_, fitted.references_
    if not np.isfinite(quantiles).all():
        raise g.refuse(fitted, "has a column without values", "drop the column before this step")
    lowest, highest = quantiles[0], quantiles[-1]
    for column in range(x.width):
        folding.note_edges(g, x, column, np.unique(quantiles[:, column]))
    rising = _interpolated(g, fitted, x, quantiles, references)
    falling = _interpolated(g, fitted, g.unary("Neg", x), -quantiles[::-1], -references[::-1])
    made = g.mul(g.sub(rising, falling), 0.5)
    if fitted.output_distribution == "uniform":
        made = g.where(g.binary("Equal", x, highest), 1.0, made)
        made = g.where(g.binary("Equal", x, lowest), 0.0, made)
        return g.columnwise(x, made, fitted.transform)
    made = g.where(g.binary("Greater", g.add(x, BOUND), highest), 1.0, made)
    made = g.where(g.binary("Less", g.sub(x, BOUND), lowest), 0.0, made)
    near_zero = BOUND - np.spacing(1)
    low, high = stats.norm.ppf(near_zero), stats.norm.ppf(1 - near_zero)
    inner = inverse_normal(g, clipped(g, made, near_zero, 1 - near_zero))
    return g.columnwise(x, clipped(g, inner, float(low), float(high)), fitted.transform)


def _interpolated(g: Lowering, fitted: Any, x: Value, points: Wide, values: Wide) -> Value:
    """`numpy.interp` of each column at ``points`` (Q, W) with ``values`` (Q,); NaN stays NaN."""
    size, width = points.shape
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        slopes = np.diff(values)[:, None] / np.diff(points, axis=0)
    slopes = np.where(np.diff(points, axis=0) > 0, slopes, 0.0)
    if not np.isfinite(slopes).all():
        raise g.refuse(
            fitted, "has quantiles too close to each other", "scale the columns up before this step"
        )
    # Place 0 is below all points, place Q at or above the last one.
    from_point, from_value, slope = (np.zeros((width, size + 1)) for _ in range(3))
    from_point[:, 1:size], slope[:, 1:size] = points[:-1].T, slopes.T
    from_value[:] = np.concatenate([values[:1], values])
    place = count_at_most(g, x, list(points.T))
    run = g.sub(x, per_column(g, from_point, place))
    made = g.add(g.mul(per_column(g, slope, place), run), per_column(g, from_value, place))
    return g.where(g.unary("IsNaN", x), x, made)


def _yeo_johnson(g: Lowering, x: Value, lambdas: Wide) -> Value:
    eps = np.finfo(np.float64).eps
    positive = g.binary("GreaterOrEqual", x, 0.0)
    over = np.where(np.abs(lambdas) < eps, 0.0, lambdas)
    under = np.where(np.abs(lambdas - 2) > eps, 2 - lambdas, 0.0)
    size = log1p(g, g.unary("Abs", x))
    made = g.where(positive, _power_of(g, size, over), _power_of(g, size, under))
    return g.where(positive, made, g.unary("Neg", made))


def _box_cox(g: Lowering, x: Value, lambdas: Wide) -> Value:
    # scikit-learn refuses what is not positive; 0 would come out finite where the exponent is positive.
    positive = g.where(g.binary("Greater", x, 0.0), x, np.nan)
    return _power_of(g, g.unary("Log", positive), np.where(np.abs(lambdas) < 1e-19, 0.0, lambdas))


def _power_of(g: Lowering, log: Value, exponents: Wide) -> Value:
    """``(exp(exponent·log) - 1) / exponent``, and ``log`` itself where the exponent is 0."""
    plain = exponents == 0
    if plain.all():
        return log
    safe = np.where(plain, 1.0, exponents)
    made = g.div(expm1(g, g.mul(log, safe)), safe)
    if not plain.any():
        return made
    return g.node("Where", [plain, log, made], log.shape)


def _shifted(g: Lowering, fitted: Any, x: Value, *, centre: Any, scale: Any) -> Value:
    """``(x - centre) / scale`` as scikit-learn computes it: two roundings."""
    numbers_only(g, fitted, x)
    made = x if centre is None else g.sub(x, centre)
    made = made if scale is None else g.div(made, scale)
    slope = np.ones(x.width) if scale is None else 1.0 / np.asarray(scale, np.float64)
    offset = np.zeros(x.width) if centre is None else -np.asarray(centre, np.float64) * slope
    return g.columnwise(x, made, fitted.transform, slope=slope, offset=offset)
