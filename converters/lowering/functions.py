"""Elementwise functions that ONNX Runtime lacks in float64, and `FunctionTransformer` of a numpy ufunc.

Every function here is within a few units in the last place of numpy's, and takes NaN to NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from scipy import special
from sklearn.preprocessing import FunctionTransformer

from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.rules import rule

Elementwise = Callable[[Lowering, Value], Value]

_FEW = 32
"""Tables up to this long are compared with whole; longer ones are searched by halving."""

# Cephes Mathematical Library (S. Moshier), ndtri.c: the middle, and the tails down to exp(-32).
_MIDDLE: Final = (
    (-59.9633501014107895267, 98.0010754185999661536, -56.6762857469070293439, 13.9312609387279679503,
     -1.23916583867381258016),
    (1.0, 1.95448858338141759834, 4.67627912898881538453, 86.3602421390890590575, -225.462687854119370527,
     200.260212380060660359, -82.0372256168333339912, 15.9056225126211695515, -1.18331621121330003142),
)  # fmt: skip
_TAIL: Final = (
    (4.05544892305962419923, 31.5251094599893866154, 57.1628192246421288162, 44.0805073893200834700,
     14.6849561928858024014, 2.18663306850790267539, -0.140256079171354495875, -0.0350424626827848203418,
     -8.57456785154685413611e-4),
    (1.0, 15.7799883256466749731, 45.3907635128879210584, 41.3172038254672030440, 15.0425385692907503408,
     2.50464946208309415979, -0.142182922854787788574, -0.0380806407691578277194, -9.33259480895457427372e-4),
)  # fmt: skip
# Cephes atan.c.
_ATAN: Final = (
    (-0.8750608600031904122785, -16.15753718733365076637, -75.00855792314704667340, -122.8866684490136173410,
     -64.85021904942025371773),
    (1.0, 24.85846490142306297962, 165.0270098316988542046, 432.8810604912902668951, 485.3903996359136964868,
     194.5506571482613964425),
)  # fmt: skip
# Cephes ndtr.c: erf up to 1, erfc from 1 to 8.
_ERF: Final = (
    (9.60497373987051638749, 90.0260197203842689217, 2232.00534594684319226, 7003.32514112805075473,
     55592.3013010394962768),
    (1.0, 33.5617141647503099647, 521.357949780152679795, 4594.32382970980127987, 22629.0000613890934246,
     49267.3942608635921086),
)  # fmt: skip
_ERFC: Final = (
    (2.46196981473530512524e-10, 0.564189564831068821977, 7.46321056442269912687, 48.6371970985681366614,
     196.520832956077098242, 526.445194995477358631, 934.528527171957607540, 1027.55188689515710272,
     557.535335369399327526),
    (1.0, 13.2281951154744992508, 86.7072140885989742329, 354.937778887819891062, 975.708501743205489753,
     1823.90916687909736289, 2246.33760818710981792, 1656.66309194161350182, 557.535340817727675546),
)  # fmt: skip


def numbers_only(g: Lowering, fitted: Any, x: Value) -> None:
    """Raises `UnsupportedPipeline` where ``x`` has columns of codes: arithmetic on codes means nothing."""
    if x.coded:
        raise g.refuse(fitted, "takes columns of text or categories", "encode them before this step")


def count_at_most(g: Lowering, x: Value, tables: Sequence[Wide]) -> Value:
    """(n, W) int64: how many values of the sorted ``tables[j]`` are <= column j, as `numpy.searchsorted` on the right.

    0 for NaN.
    """
    longest = max(len(table) for table in tables)
    if longest <= _FEW:
        size = max(longest, 1)
        padded = _padded(tables, size)
        inside = g.binary("LessOrEqual", padded, g.reshape(x, (-1, x.width, 1)))
        return g.reduce("Sum", g.cast(inside, "int64"), 2, keepdims=False)
    size = 1 << longest.bit_length()
    flat = _padded(tables, size).reshape(-1)
    before = np.arange(x.width) * size - 1
    count = g.cast(g.binary("Less", x, -np.inf), "int64")  # zeros
    step = size // 2
    while step:
        further = g.add(count, step)
        inside = g.binary("LessOrEqual", g.take(flat, g.add(further, before)), x)
        count = g.where(inside, further, count)
        step //= 2
    return count


def per_column(g: Lowering, tables: Wide, index: Value) -> Value:
    """(n, W): ``tables[j, index[:, j]]`` of a constant (W, size)."""
    width, size = tables.shape
    return g.take(np.ascontiguousarray(tables).reshape(-1), g.add(index, np.arange(width) * size))


def log1p(g: Lowering, x: Value) -> Value:
    """log(1 + x) without cancellation (W. Kahan; Goldberg 1991, theorem 4)."""
    u = g.add(x, 1.0)
    log = g.unary("Log", u)
    corrected = g.mul(log, g.div(x, g.sub(u, 1.0)))
    kept = g.where(g.unary("IsInf", u), log, corrected)
    return g.where(g.binary("Equal", u, 1.0), x, kept)


def expm1(g: Lowering, x: Value) -> Value:
    """exp(x) - 1 without cancellation (W. Kahan; Higham 2002, section 1.14.1)."""
    u = g.unary("Exp", x)
    less = g.sub(u, 1.0)
    corrected = g.mul(less, g.div(x, g.unary("Log", u)))
    kept = g.where(g.binary("Equal", less, -1.0), -1.0, g.where(g.unary("IsInf", u), u, corrected))
    return g.where(g.binary("Equal", u, 1.0), x, kept)


def inverse_normal(g: Lowering, p: Value) -> Value:
    """The standard normal quantile of ``p`` in [1e-13, 1 - 1e-13], as `scipy.special.ndtri` (Cephes)."""
    upper = g.binary("Greater", p, 1.0 - np.exp(-2.0))
    tail_p = g.where(upper, g.sub(1.0, p), p)
    centred = g.sub(tail_p, 0.5)
    square = g.mul(centred, centred)
    rational = g.mul(square, _rational(g, square, _MIDDLE))
    middle = g.mul(g.add(centred, g.mul(centred, rational)), float(np.sqrt(2 * np.pi)))
    root = g.unary("Sqrt", g.mul(g.unary("Log", tail_p), -2.0))
    inverse = g.div(1.0, root)
    first = g.sub(root, g.div(g.unary("Log", root), root))
    tail = g.sub(first, g.mul(inverse, _rational(g, inverse, _TAIL)))
    is_middle = g.binary("Greater", tail_p, float(np.exp(-2.0)))
    return g.where(is_middle, middle, g.where(upper, tail, g.unary("Neg", tail)))


def erf(g: Lowering, x: Value) -> Value:
    """The error function, as `scipy.special.erf` (Cephes); it is 1 beyond 6."""
    x = clipped(g, x, -6.0, 6.0)
    size, square = g.unary("Abs", x), g.mul(x, x)
    near = g.mul(x, _rational(g, square, _ERF))
    rest = g.mul(g.unary("Exp", g.unary("Neg", square)), _rational(g, size, _ERFC))
    return g.where(g.binary("Less", size, 1.0), near, _signed(g, x, g.sub(1.0, rest)))


def _padded(tables: Sequence[Wide], size: int) -> Wide:
    padded = np.full((len(tables), size), np.nan)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


def _rational(g: Lowering, x: Value, fraction: tuple[tuple[float, ...], tuple[float, ...]]) -> Value:
    over, under = (_polynomial(g, x, coefficients) for coefficients in fraction)
    return g.div(over, under)


def _polynomial(g: Lowering, x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's scheme, the highest power first."""
    first, second, *rest = coefficients
    made = g.add(x if first == 1.0 else g.mul(x, first), second)
    for coefficient in rest:
        made = g.add(g.mul(made, x), coefficient)
    return made


def _signed(g: Lowering, x: Value, size: Value) -> Value:
    return g.where(g.binary("Less", x, 0.0), g.unary("Neg", size), size)


def _arctan(g: Lowering, x: Value) -> Value:
    size = g.unary("Abs", x)
    steep = g.binary("Greater", size, float(np.tan(3 * np.pi / 8)))
    slanted = g.binary("Greater", size, 0.66)
    reduced = g.where(
        steep,
        g.unary("Neg", g.unary("Reciprocal", size)),
        g.where(slanted, g.div(g.sub(size, 1.0), g.add(size, 1.0)), size),
    )
    start = g.where(steep, np.pi / 2, g.where(slanted, np.pi / 4, 0.0))
    lost = 6.123233995736765886130e-17  # what float64 leaves of pi / 2
    low = g.where(steep, lost, g.where(slanted, lost / 2, 0.0))
    z = g.mul(reduced, reduced)
    bent = g.mul(g.mul(z, _rational(g, z, _ATAN)), reduced)
    return _signed(g, x, g.add(start, g.add(g.add(bent, reduced), low)))


def _arcsin(g: Lowering, x: Value) -> Value:
    return _arctan(g, g.div(x, g.unary("Sqrt", g.mul(g.sub(1.0, x), g.add(x, 1.0)))))


def _arccos(g: Lowering, x: Value) -> Value:
    half = _arctan(g, g.unary("Sqrt", g.div(g.sub(1.0, x), g.add(x, 1.0))))
    return g.mul(half, 2.0)


def _arcsinh(g: Lowering, x: Value) -> Value:
    size = g.unary("Abs", x)
    square = g.mul(size, size)
    near = log1p(g, g.add(size, g.div(square, g.add(g.unary("Sqrt", g.add(square, 1.0)), 1.0))))
    far = g.add(g.unary("Log", size), float(np.log(2.0)))
    return _signed(g, x, g.where(g.binary("Greater", size, 1e8), far, near))


def _arccosh(g: Lowering, x: Value) -> Value:
    t = g.sub(x, 1.0)
    near = log1p(g, g.add(t, g.unary("Sqrt", g.mul(t, g.add(t, 2.0)))))
    far = g.add(g.unary("Log", x), float(np.log(2.0)))
    return g.where(g.binary("Less", x, 1.0), np.nan, g.where(g.binary("Greater", x, 1e8), far, near))


def _arctanh(g: Lowering, x: Value) -> Value:
    size = g.unary("Abs", x)
    return _signed(g, x, g.mul(log1p(g, g.div(g.mul(size, 2.0), g.sub(1.0, size))), 0.5))


def _sinh(g: Lowering, x: Value) -> Value:
    size = g.unary("Abs", x)
    grown = expm1(g, size)
    near = g.mul(g.add(grown, g.div(grown, g.add(grown, 1.0))), 0.5)
    return _signed(g, x, g.where(g.binary("Greater", size, 22.0), _half_exp(g, size), near))


def _cosh(g: Lowering, x: Value) -> Value:
    size = g.unary("Abs", x)
    grown = g.unary("Exp", size)
    near = g.mul(g.add(grown, g.unary("Reciprocal", grown)), 0.5)
    return g.where(g.binary("Greater", size, 22.0), _half_exp(g, size), near)


def _half_exp(g: Lowering, x: Value) -> Value:
    """exp(x) / 2, also where exp(x) alone overflows."""
    root = g.unary("Exp", g.mul(x, 0.5))
    return g.mul(g.mul(root, 0.5), root)


def _cbrt(g: Lowering, x: Value) -> Value:
    """A power refined by a Newton step; itself for zero, infinity and NaN."""
    size = g.unary("Abs", x)
    y = g.binary("Pow", size, 1.0 / 3.0)
    y = g.sub(y, g.div(g.sub(y, g.div(size, g.mul(y, y))), 3.0))
    itself = g.binary("Or", g.binary("Equal", x, 0.0), g.unary("IsInf", x))
    return g.where(itself, x, _signed(g, x, y))


def _trunc(g: Lowering, x: Value) -> Value:
    return g.where(g.binary("Less", x, 0.0), g.unary("Ceil", x), g.unary("Floor", x))


def _flag(g: Lowering, condition: Value) -> Value:
    return g.cast(condition, "float64")


def _finite(g: Lowering, x: Value) -> Value:
    return g.unary("Not", g.binary("Or", g.unary("IsNaN", x), g.unary("IsInf", x)))


def expit(g: Lowering, x: Value) -> Value:
    """The logistic function as `scipy.special.expit` computes it; ONNX Runtime's Sigmoid is 0 below about -37."""
    return g.unary("Reciprocal", g.add(g.unary("Exp", g.unary("Neg", x)), 1.0))


def clipped(g: Lowering, x: Value, low: float, high: float) -> Value:
    """As `numpy.clip`: NaN stays NaN."""
    return g.where(g.binary("Less", x, low), low, g.where(g.binary("Greater", x, high), high, x))


def _unary(kind: str) -> Elementwise:
    return lambda g, x: g.unary(kind, x)


def _times(factor: float) -> Elementwise:
    return lambda g, x: g.mul(x, factor)


_RISING: Final[dict[np.ufunc, Elementwise]] = {
    np.arcsinh: _arcsinh,
    np.arctan: _arctan,
    np.cbrt: _cbrt,
    np.ceil: _unary("Ceil"),
    np.deg2rad: _times(np.pi / 180.0),
    np.exp: _unary("Exp"),
    np.exp2: lambda g, x: g.node("Pow", [2.0, x], x.shape),
    np.expm1: expm1,
    np.floor: _unary("Floor"),
    np.positive: lambda _, x: x,
    np.rad2deg: _times(180.0 / np.pi),
    np.degrees: _times(180.0 / np.pi),
    np.radians: _times(np.pi / 180.0),
    np.rint: _unary("Round"),
    np.sign: _unary("Sign"),
    np.sinh: _sinh,
    np.tanh: _unary("Tanh"),
    np.trunc: _trunc,
    special.expit: expit,
}
"""Never decreasing, and defined for every number."""
_FUNCTIONS: Final[dict[np.ufunc, Elementwise]] = {
    **_RISING,
    np.absolute: _unary("Abs"),
    np.arccos: _arccos,
    np.arccosh: _arccosh,
    np.arcsin: _arcsin,
    np.arctanh: _arctanh,
    np.cos: _unary("Cos"),
    np.cosh: _cosh,
    np.fabs: _unary("Abs"),
    np.isfinite: lambda g, x: _flag(g, _finite(g, x)),
    np.isinf: lambda g, x: _flag(g, g.unary("IsInf", x)),
    np.isnan: lambda g, x: _flag(g, g.unary("IsNaN", x)),
    np.log: _unary("Log"),
    np.log10: lambda g, x: g.div(g.unary("Log", x), float(np.log(10.0))),
    np.log1p: log1p,
    np.log2: lambda g, x: g.div(g.unary("Log", x), float(np.log(2.0))),
    np.negative: _unary("Neg"),
    np.reciprocal: _unary("Reciprocal"),
    np.sin: _unary("Sin"),
    np.sqrt: _unary("Sqrt"),
    np.square: lambda g, x: g.mul(x, x),
    np.tan: lambda g, x: g.div(g.unary("Sin", x), g.unary("Cos", x)),
}


@rule("transform", FunctionTransformer)
def _function(g: Lowering, fitted: FunctionTransformer, x: Value) -> Value:
    if fitted.func is None:
        return x
    name = getattr(fitted.func, "__name__", repr(fitted.func))
    make = _FUNCTIONS.get(fitted.func) if isinstance(fitted.func, np.ufunc) else None
    if make is None:
        known = ", ".join(sorted(function.__name__ for function in _FUNCTIONS))
        raise g.refuse(
            fitted,
            f"calls {name}, which cannot be converted",
            f"use a numpy ufunc (one of {known}), or compute the columns before the pipeline",
        )
    if fitted.kw_args:
        raise g.refuse(fitted, f"calls {name} with kw_args", "leave kw_args empty")
    numbers_only(g, fitted, x)
    made = make(g, x)
    return g.columnwise(x, made, fitted.func) if fitted.func in _RISING else made
