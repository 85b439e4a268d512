"""From a pipeline's signature to its graph with the outputs ``label`` and ``score``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from onnx import helper

from converters.lowering.graph import Arithmetic, Lowering, Value
from converters.lowering.rules import RULES
from converters.optimize import LABEL, SCORE
from converters.signature import Signature
from edge_runtime.contract.manifest import Label

Fallback = Callable[[Lowering, Any, str, Value], Value]


def lower(
    signature: Signature,
    *,
    dtype: Literal["float32", "float64"] = "float32",
    arithmetic: Arithmetic = "float64",
    vocabularies: tuple[tuple[Label, ...] | None, ...] = (),
    fallback: Fallback | None = None,
) -> Lowering:
    """The lowered pipeline; its graph gives ``label`` int64 (n,) or (n, K) where there are classes, and ``score``.

    Raises `UnsupportedPipeline` for a step that has no rule and that ``fallback`` refuses.
    """
    g = Lowering(
        width=signature.width,
        dtype=dtype,
        rules=RULES,
        arithmetic=arithmetic,
        vocabularies=vocabularies,
        fallback=fallback,
    )
    x = g.start()
    if signature.labels:
        label = g.call(signature.pipeline, "predict", x)
        _output(g, g.cast(label, "int64"), LABEL)
    if signature.score == "predict" and signature.labels:
        score = _indicator(g, signature)
    else:
        score = g.call(signature.pipeline, signature.score, x)
    for rows in g.barred:
        score = g.where(g.column(rows), np.nan, score)
    _output(g, g.cast(score, "float32"), SCORE)
    return g


def _indicator(g: Lowering, signature: Signature) -> Value:
    """1 in the column of the predicted class: the score of a classifier that has no other."""
    label = g.call(signature.pipeline, "predict", g.start())
    blocks = []
    for k, classes in enumerate(signature.labels):
        column = label if len(label.shape) == 1 else g.vector(g.select(label, [k]))
        blocks.append(g.take(np.eye(len(classes)), column))
    return g.concat(blocks)


def _output(g: Lowering, value: Value, name: str) -> None:
    g.nodes.append(helper.make_node("Identity", [value.name], [name]))
