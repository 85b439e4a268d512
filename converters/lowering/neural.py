"""Neural networks: affine layers with elementwise functions between them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from sklearn.neural_network import BernoulliRBM, MLPClassifier, MLPRegressor

from converters.lowering.functions import expit
from converters.lowering.graph import Lowering, Value
from converters.lowering.linear import affine
from converters.lowering.rules import rule

_OPERATORS: Final = {"exp": "Exp", "tanh": "Tanh", "relu": "Relu"}


def _activated(g: Lowering, fitted: Any, kind: str, z: Value) -> Value:
    if kind == "identity":
        return z
    if kind == "logistic":
        return expit(g, z)
    if kind == "softmax":
        return g.softmax(z)
    if kind in _OPERATORS:
        return g.unary(_OPERATORS[kind], z)
    raise g.refuse(fitted, f"has the activation {kind!r}", "use relu, tanh, logistic or identity")


def _forward(g: Lowering, fitted: Any, x: Value) -> Value:
    """(n, outputs): the last layer after its own function; the scalers before the first are folded into it."""

    def layers() -> Value:
        last = len(fitted.coefs_) - 1
        made = x
        for i, (weights, bias) in enumerate(zip(fitted.coefs_, fitted.intercepts_, strict=True)):
            kind = fitted.out_activation_ if i == last else fitted.activation
            made = _activated(g, fitted, kind, affine(g, fitted, made, weights.T, bias))
        return made

    made: Value = g.memo((id(fitted), "forward", x.name), layers, fitted)
    return made


@rule("predict", MLPRegressor)
def _regression(g: Lowering, fitted: MLPRegressor, x: Value) -> Value:
    return _forward(g, fitted, x)


@rule("predict_proba", MLPClassifier)
def _probabilities(g: Lowering, fitted: MLPClassifier, x: Value) -> Value:
    made = _forward(g, fitted, x)
    return g.concat([g.sub(1.0, made), made]) if made.width == 1 else made


@rule("predict", MLPClassifier)
def _label(g: Lowering, fitted: MLPClassifier, x: Value) -> Value:
    made = _forward(g, fitted, x)
    if fitted.out_activation_ == "softmax":
        return g.argmax(made)
    above = g.cast(g.binary("Greater", made, 0.5), "int64")
    return g.vector(above) if made.width == 1 else above


@rule("transform", BernoulliRBM)
def _hidden(g: Lowering, fitted: BernoulliRBM, x: Value) -> Value:
    return expit(g, affine(g, fitted, x, np.asarray(fitted.components_), fitted.intercept_hidden_))
