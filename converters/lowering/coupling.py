"""libsvm's probabilities: a sigmoid for each pair of classes, and the one vector that fits them all best.

The vector is found by an iteration (``multiclass_probability`` in libsvm's ``svm.cpp``; Wu, Lin and Weng, 2004), even
for two classes. It stops at a tolerance, so its answer hangs on when it stops: the rounds are unrolled, and a row that
has reached the tolerance keeps what it has. libsvm goes on for up to a hundred rounds. Of 1.3 million rows of pairs of
all sorts, certain ones, contradictory ones and cycles, for 2 to 20 classes, none took more than four.
"""

# ruff: noqa: SLF001 - the sigmoids are public, but deprecated with what fits them
from __future__ import annotations

from typing import Any, Final

import numpy as np
from sklearn.svm import SVC, NuSVC

from converters.lowering.graph import Lowering, Value, Wide
from converters.lowering.kernels import decisions
from converters.lowering.rules import rule

_ROUNDS: Final = 6
_LEAST: Final = 1e-7
_STOP: Final = 0.005
"""What is left over where the iteration stops, divided by the number of classes."""

MAX_CLASSES: Final = 32

_REMEDY: Final = "fit it with probability=False and wrap it in CalibratedClassifierCV(ensemble=False)"


@rule("predict_proba", SVC, NuSVC)
def _probabilities(g: Lowering, fitted: Any, x: Value) -> Value:
    classes = len(fitted.classes_)
    if classes > MAX_CLASSES:
        reason = f"couples the probabilities of {classes} classes, more than {MAX_CLASSES}"
        raise g.refuse(fitted, reason, _REMEDY)
    g.doubt(fitted, "stops at a tolerance, and chooses its label apart, where the last bit can tell", _REMEDY)
    pairs = _sigmoid(g, decisions(g, fitted, x), fitted._probA, fitted._probB)
    quadratic, diagonal = _quadratic(g, pairs, classes)
    rows = [g.node("Gather", [quadratic, np.array(t)], (None, classes), axis=1) for t in range(classes)]
    found: Value | Wide = np.full((1, classes), 1.0 / classes)
    for _ in range(_ROUNDS):
        found = _round(g, found, quadratic, rows, diagonal)
    assert isinstance(found, Value), "there is at least one round"
    return found


def _sigmoid(g: Lowering, values: Value, slope: Wide, offset: Wide) -> Value:
    """(n, P) the probability of the first class of each pair, never certain."""
    exponent = g.add(g.mul(values, np.asarray(slope, np.float64)[None]), np.asarray(offset, np.float64)[None])
    small = g.unary("Exp", g.unary("Neg", g.unary("Abs", exponent)))
    above = g.where(g.binary("Less", exponent, 0.0), np.ones((1, 1)), small)
    made = g.div(above, g.add(small, 1.0))
    made = g.where(g.binary("Less", made, _LEAST), _LEAST, made)
    return g.where(g.binary("Greater", made, 1.0 - _LEAST), 1.0 - _LEAST, made)


def _quadratic(g: Lowering, pairs: Value, classes: int) -> tuple[Value, Value]:
    """(n, C, C) the form to be minimised, and (n, C) its diagonal."""
    # The input's first column is there for the number of rows, which some kernels lose; see `heap`.
    anchor = g.select(g.cast(g.input, "float64"), [0])
    known = g.concat([anchor, pairs, g.sub(1.0, pairs)])
    at = np.ones((classes, classes), np.int64)
    first, second = np.triu_indices(classes, 1)
    at[first, second] = 1 + np.arange(len(first))
    at[second, first] = 1 + len(first) + np.arange(len(first))
    ahead = g.node("Gather", [known, at], (None, classes, classes), axis=1)
    behind = g.node("Gather", [known, at.T], (None, classes, classes), axis=1)
    eye = np.eye(classes)
    squares = g.mul(g.mul(behind, behind), 1.0 - eye[None])
    diagonal = g.reduce("Sum", squares, axis=2)
    crossed = g.unary("Neg", g.mul(ahead, behind))
    whole = g.where(Value(g.constant(eye[None] > 0), (1, classes, classes), "bool"), diagonal, crossed)
    return whole, g.node("Squeeze", [diagonal, np.array([2])], (None, classes))


def _round(g: Lowering, found: Value | Wide, quadratic: Value, rows: list[Value], diagonal: Value) -> Value:
    """One round over all classes; rows that are near enough keep what they have."""
    classes = len(rows)
    upright = g.node("Unsqueeze", [found, np.array([2])], (None, classes, 1))
    product = g.node("MatMul", [quadratic, upright], (None, classes, 1))
    gradient = g.node("Squeeze", [product, np.array([2])], (None, classes))
    value = g.reduce("Sum", g.mul(gradient, found))
    left = g.reduce("Max", g.unary("Abs", g.sub(gradient, value)))
    done = g.binary("Less", left, _STOP / classes)
    moved: Value | Wide = found
    for t, row in enumerate(rows):
        own, scale = g.select(gradient, [t]), g.select(diagonal, [t])
        step = g.div(g.sub(value, own), scale)
        whole = g.add(step, 1.0)
        rise = g.mul(step, g.add(g.mul(step, scale), g.mul(own, 2.0)))
        value = g.div(g.div(g.add(value, rise), whole), whole)
        gradient = g.div(g.add(gradient, g.mul(step, row)), whole)
        moved = g.div(g.add(g.mul(step, np.eye(classes)[[t]]), moved), whole)
    return g.where(done, found, moved)
