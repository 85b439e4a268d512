"""Gaussian processes (Rasmussen and Williams, Gaussian Processes for Machine Learning, MIT Press 2006)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from scipy.linalg import solve_triangular
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process._gpc import COEFS, LAMBDAS, _BinaryGaussianProcessClassifierLaplace
from sklearn.gaussian_process.kernels import (
    RBF,
    ConstantKernel,
    DotProduct,
    Exponentiation,
    ExpSineSquared,
    Matern,
    Product,
    RationalQuadratic,
    Sum,
    WhiteKernel,
)

from converters.lowering.functions import erf
from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.kernels import carries, squared_distances
from converters.lowering.rules import rule

_REMEDY: Final = "use sums and products of RBF, Matern, RationalQuadratic, DotProduct and ConstantKernel"


def covariance(g: Lowering, fitted: Any, kernel: Any, x: Value, rows: Wide) -> Value:
    """(n, S): ``kernel(x, rows)`` for rows (S, F).

    Raises `UnsupportedPipeline` for a kernel that has no formula in ONNX's operators.
    """
    made = _between(g, fitted, kernel, x, rows)
    if isinstance(made, Value):
        return made
    return g.add(g.mul(g.select(x, [0]), 0.0), np.full((1, len(rows)), made))


def _between(g: Lowering, fitted: Any, kernel: Any, x: Value, rows: Wide) -> Value | float:
    kind = type(kernel)
    if kind in (Sum, Product):
        parts = [_between(g, fitted, each, x, rows) for each in (kernel.k1, kernel.k2)]
        return _combined(g, kind, *parts)
    if kind is Exponentiation:
        base = _between(g, fitted, kernel.kernel, x, rows)
        power = float(kernel.exponent)
        return g.binary("Pow", base, power) if isinstance(base, Value) else float(base**power)
    if kind is ConstantKernel:
        return float(kernel.constant_value)
    if kind is WhiteKernel:
        return 0.0
    if kind is DotProduct:
        return g.add(g.matmul(x, rows.T), float(kernel.sigma_0) ** 2)
    return _stationary(g, fitted, kernel, x, rows)


def _combined(g: Lowering, kind: type, a: Value | float, b: Value | float) -> Value | float:
    if isinstance(a, Value) or isinstance(b, Value):
        if kind is Product:
            return g.mul(a, b)
        return b if a == 0.0 else a if b == 0.0 else g.add(a, b)
    return a + b if kind is Sum else a * b


def _stationary(g: Lowering, fitted: Any, kernel: Any, x: Value, rows: Wide) -> Value:
    kind = type(kernel)
    if kind in (RBF, Matern):
        length = np.asarray(kernel.length_scale, np.float64)
        squares = squared_distances(g, g.div(x, length), rows / length)
        if kind is RBF:
            return g.unary("Exp", g.mul(squares, -0.5))
        return _matern(g, fitted, kernel, squares)
    if kind is RationalQuadratic:
        squares = squared_distances(g, x, rows)
        base = g.add(g.div(squares, 2.0 * kernel.alpha * kernel.length_scale**2), 1.0)
        return g.binary("Pow", base, -float(kernel.alpha))
    if kind is ExpSineSquared:
        if x.width > 1:
            # The sine of a large distance depends on its last bit, and so on the order of the sum.
            raise g.refuse(
                fitted, "has ExpSineSquared over several columns", "give it one column, or " + _REMEDY
            )
        apart = g.unary("Sqrt", squared_distances(g, x, rows))
        angle = g.div(g.mul(apart, math.pi), float(kernel.periodicity))
        ratio = g.div(g.unary("Sin", angle), float(kernel.length_scale))
        return g.unary("Exp", g.mul(g.mul(ratio, ratio), -2.0))
    raise g.refuse(fitted, f"has the kernel {kind.__name__}", _REMEDY)


def _matern(g: Lowering, fitted: Any, kernel: Matern, squares: Value) -> Value:
    if kernel.nu == math.inf:
        return g.unary("Exp", g.mul(squares, -0.5))
    apart = g.unary("Sqrt", squares)
    if kernel.nu == 0.5:
        return g.unary("Exp", g.unary("Neg", apart))
    if kernel.nu not in (1.5, 2.5):
        raise g.refuse(fitted, f"has Matern with nu={kernel.nu}", "use nu=0.5, 1.5, 2.5 or inf")
    scaled = g.mul(apart, math.sqrt(2.0 * kernel.nu))
    factor = g.add(scaled, 1.0)
    if kernel.nu == 2.5:
        factor = g.add(factor, g.div(g.mul(scaled, scaled), 3.0))
    return g.mul(factor, g.unary("Exp", g.unary("Neg", scaled)))


def _own(g: Lowering, fitted: Any, kernel: Any, x: Value) -> Value | float:
    """The variance of the prior at each row, (n, 1) or the same for all: the diagonal of ``kernel(x)``."""
    kind = type(kernel)
    if kind in (Sum, Product):
        return _combined(g, kind, *(_own(g, fitted, each, x) for each in (kernel.k1, kernel.k2)))
    if kind is Exponentiation:
        base, power = _own(g, fitted, kernel.kernel, x), float(kernel.exponent)
        return g.binary("Pow", base, power) if isinstance(base, Value) else float(base**power)
    if kind is ConstantKernel:
        return float(kernel.constant_value)
    if kind is WhiteKernel:
        return float(kernel.noise_level)
    if kind is DotProduct:
        return g.add(g.reduce("SumSquare", x), float(kernel.sigma_0) ** 2)
    return 1.0


# --- estimators ------------------------------------------------------------------------------------------------


@rule("predict", GaussianProcessRegressor)
def _regression(g: Lowering, fitted: GaussianProcessRegressor, x: Value) -> Value:
    rows = np.asarray(fitted.X_train_, np.float64)
    carries(g, fitted, rows)
    weights = np.asarray(fitted.alpha_).reshape(len(rows), -1)
    spread, centre = (
        np.broadcast_to(np.asarray(part, np.float64).reshape(-1), weights.shape[1:])
        for part in (fitted._y_train_std, fitted._y_train_mean)  # noqa: SLF001 (no public names)
    )
    return g.matmul(covariance(g, fitted, fitted.kernel_, x, rows), weights * spread, centre)


def _latent(g: Lowering, fitted: _BinaryGaussianProcessClassifierLaplace, x: Value) -> tuple[Value, Value]:
    """The kernel (n, S) and the latent mean (n, 1): algorithm 3.2, line 4."""
    rows = np.asarray(fitted.X_train_, np.float64)
    carries(g, fitted, rows)

    def made() -> tuple[Value, Value]:
        values = covariance(g, fitted, fitted.kernel_, x, rows)
        return values, g.matmul(values, (fitted.y_train_ - fitted.pi_)[:, None])

    both: tuple[Value, Value] = g.memo((id(fitted), "latent", x.name), made, fitted)
    return both


@rule("predict", _BinaryGaussianProcessClassifierLaplace)
def _binary_label(g: Lowering, fitted: _BinaryGaussianProcessClassifierLaplace, x: Value) -> Value:
    return g.cast(g.vector(g.binary("Greater", _latent(g, fitted, x)[1], 0.0)), "int64")


@rule("predict_proba", _BinaryGaussianProcessClassifierLaplace)
def _binary_probabilities(g: Lowering, fitted: _BinaryGaussianProcessClassifierLaplace, x: Value) -> Value:
    """The logistic function averaged over the latent normal, by five error functions, as scikit-learn does."""
    values, mean = _latent(g, fitted, x)
    halves = solve_triangular(fitted.L_, np.diag(fitted.W_sr_), lower=True)
    explained = g.reduce("SumSquare", g.matmul(values, halves.T))
    variance = g.sub(_own(g, fitted, fitted.kernel_, x), explained)
    lambdas, shares = LAMBDAS.reshape(-1), COEFS.reshape(-1)
    alpha = g.div(1.0, g.mul(variance, 2.0))
    angle = g.mul(g.mul(mean, lambdas), g.unary("Sqrt", g.div(alpha, g.add(alpha, lambdas**2))))
    width = g.unary("Sqrt", g.div(math.pi, alpha))
    norm = g.mul(g.unary("Sqrt", g.mul(g.mul(variance, 2.0), math.pi)), 2.0)
    integrals = g.div(g.mul(width, erf(g, angle)), norm)
    positive = g.matmul(integrals, shares[:, None], np.array([0.5 * shares.sum()]))
    return g.concat([g.sub(1.0, positive), positive])


def _delegated(method: str) -> Callable[[Lowering, Any, Value], Value]:
    @rule(method, GaussianProcessClassifier)
    def _inner(g: Lowering, fitted: GaussianProcessClassifier, x: Value) -> Value:
        if fitted.n_classes_ > 2 and fitted.multi_class == "one_vs_one":
            raise g.refuse(
                fitted, "has one model per pair and no probabilities", "use multi_class='one_vs_rest'"
            )
        return g.call(fitted.base_estimator_, method, x, "base_estimator_")

    return _inner


for _method in ("predict", "predict_proba"):
    _delegated(_method)
