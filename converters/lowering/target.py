"""`TransformedTargetRegressor`: the inverse of a target's transformation after the regressor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from sklearn.compose import TransformedTargetRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)

from converters.lowering.functions import erf, log1p
from converters.lowering.graph import Lowering, Value
from converters.lowering.meta import interpolated
from converters.lowering.rules import rule
from converters.lowering.scaling import BOUND


@rule("predict", TransformedTargetRegressor)
def _target(g: Lowering, fitted: TransformedTargetRegressor, x: Value) -> Value:
    return _inverse(g, fitted.transformer_, g.call(fitted.regressor_, "predict", x, "regressor_"))


def _inverse(g: Lowering, fitted: Any, y: Value) -> Value:
    """``fitted.inverse_transform(y)``, (n, K)."""
    if type(fitted) is Pipeline:
        for _, step in reversed(fitted.steps):
            y = y if step is None or isinstance(step, str) else _inverse(g, step, y)
        return y
    undo = _INVERSES.get(type(fitted))
    if undo is None:
        raise g.refuse(
            fitted, "has no inverse that can be converted", "transform the target with a scaler or a function"
        )
    return undo(g, fitted, y)


def _function(g: Lowering, fitted: FunctionTransformer, y: Value) -> Value:
    undo = FunctionTransformer(func=fitted.inverse_func, kw_args=fitted.inv_kw_args)
    return g.call(undo, "transform", y, "inverse_func")


def _min_max(g: Lowering, fitted: MinMaxScaler, y: Value) -> Value:
    return g.div(g.sub(y, fitted.min_), fitted.scale_)


def _max_abs(g: Lowering, fitted: MaxAbsScaler, y: Value) -> Value:
    return g.mul(y, fitted.scale_)


def _standard(g: Lowering, fitted: StandardScaler, y: Value) -> Value:
    return _stretched(
        g, y, fitted.scale_ if fitted.with_std else None, fitted.mean_ if fitted.with_mean else None
    )


def _robust(g: Lowering, fitted: RobustScaler, y: Value) -> Value:
    centre = fitted.center_ if fitted.with_centering else None
    return _stretched(g, y, fitted.scale_ if fitted.with_scaling else None, centre)


def _stretched(g: Lowering, y: Value, scale: Any, centre: Any) -> Value:
    y = y if scale is None else g.mul(y, scale)
    return y if centre is None else g.add(y, centre)


def _power(g: Lowering, fitted: PowerTransformer, y: Value) -> Value:
    if not np.isfinite(fitted.lambdas_).all():
        raise g.refuse(fitted, "has a power that is not finite", "fit it on a target that varies")
    if fitted.standardize:
        y = _inverse(g, fitted._scaler, y)  # noqa: SLF001 - no public name
    undo = _yeo_johnson if fitted.method == "yeo-johnson" else _box_cox
    return g.concat([undo(g, g.select(y, [k]), float(power)) for k, power in enumerate(fitted.lambdas_)])


def _yeo_johnson(g: Lowering, y: Value, power: float) -> Value:
    tiny = float(np.spacing(1.0))
    if abs(power) < tiny:
        above = g.sub(g.unary("Exp", y), 1.0)
    else:
        above = g.sub(g.binary("Pow", g.add(g.mul(y, power), 1.0), 1 / power), 1.0)
    if abs(power - 2) > tiny:
        below = g.sub(1.0, g.binary("Pow", g.add(g.mul(y, -(2 - power)), 1.0), 1 / (2 - power)))
    else:
        below = g.sub(1.0, g.unary("Exp", g.unary("Neg", y)))
    return g.where(g.binary("GreaterOrEqual", y, 0.0), above, below)


def _box_cox(g: Lowering, y: Value, power: float) -> Value:
    if power == 0.0:
        return g.unary("Exp", y)
    return g.unary("Exp", g.div(log1p(g, g.mul(y, power)), power))


def _quantiles(g: Lowering, fitted: QuantileTransformer, y: Value) -> Value:
    """Within 1e-7 of 0 and 1, where a normal distribution ends for scikit-learn, the ends of the table."""
    references = np.asarray(fitted.references_, np.float64)
    table = np.asarray(fitted.quantiles_, np.float64)
    if fitted.output_distribution == "normal":
        y = g.mul(g.add(erf(g, g.mul(y, float(np.sqrt(0.5)))), 1.0), 0.5)
        low = g.binary("Less", g.sub(y, BOUND), 0.0)
        high = g.binary("Greater", g.add(y, BOUND), 1.0)
        y = g.where(low, 0.0, g.where(high, 1.0, y))
    return g.concat(
        [interpolated(g, g.select(y, [k]), references, table[:, k]) for k in range(table.shape[1])]
    )


_INVERSES: Final[dict[type, Callable[[Lowering, Any, Value], Value]]] = {
    FunctionTransformer: _function,
    MaxAbsScaler: _max_abs,
    MinMaxScaler: _min_max,
    PowerTransformer: _power,
    QuantileTransformer: _quantiles,
    RobustScaler: _robust,
    StandardScaler: _standard,
}
