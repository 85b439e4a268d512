"""Steps that skiff has no rule for, as skl2onnx converts them. The only skl2onnx import.

What skl2onnx makes of a step is judged like everything else: by the rows of the proof.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import DoubleTensorType
from skl2onnx.common.exceptions import MissingConverter, MissingShapeCalculator

from converters.gate import OPERATORS
from converters.lowering.graph import Lowering, Shape, Value
from converters.optimize import ML_DOMAIN, ML_OPSET, OPSET

_OUTPUTS: Final = {"predict": 0, "predict_proba": 1, "decision_function": 1, "transform": 0}
_FAILURES: Final = (
    MissingConverter,
    MissingShapeCalculator,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    NotImplementedError,
    AssertionError,
)


def fallback(g: Lowering, fitted: Any, method: str, x: Value) -> Value:
    """The nodes that skl2onnx gives for ``fitted``, spliced into the graph; float64 in, float64 out.

    Raises `UnsupportedPipeline` where it has none, or gives something else than numbers for ``method``.
    """
    if x.coded:
        raise g.refuse(
            fitted, "cannot be converted for columns of text", "encode categories first, with OneHotEncoder"
        )
    if method not in _OUTPUTS:
        raise g.refuse(fitted, f"has no {method} that can be converted", "see docs/reference/coverage.md")
    classes = method != "transform" and hasattr(fitted, "classes_")
    index = _OUTPUTS[method] if classes else 0
    options: dict[str, Any] = {"zipmap": False} if classes else {}
    if method == "decision_function":
        options["raw_scores"] = True
    try:
        model = to_onnx(
            fitted,
            initial_types=[("X", DoubleTensorType([None, x.width]))],
            options={id(fitted): options} if options else None,
            target_opset={"": OPSET, ML_DOMAIN: ML_OPSET},
        )
    except _FAILURES as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise g.refuse(
            fitted,
            f"has no {method} that can be converted (skl2onnx: {first[:160]})",
            "use a step that docs/reference/coverage.md lists as supported",
        ) from e
    graph = model.graph
    for node in graph.node:
        if node.op_type not in OPERATORS.get(node.domain, frozenset()):
            raise g.refuse(
                fitted,
                f"becomes {node.domain or 'ai.onnx'}.{node.op_type} in skl2onnx, which devices do not run",
                "use a step that docs/reference/coverage.md lists as supported",
            )
    g.note(f"converted by skl2onnx: {type(fitted).__name__}.{method}")
    names = {"X": x.name}
    constants = {str(t.name): g.constant(numpy_helper.to_array(t)) for t in graph.initializer}
    names.update(constants)
    prefix = f"skl{len(g.nodes)}_"
    for node in graph.node:
        made = NodeProto()
        made.CopyFrom(node)
        for name in node.output:
            names.setdefault(str(name), prefix + str(name))
        made.input[:] = [names.get(str(name), str(name)) for name in node.input]
        made.output[:] = [names[str(name)] for name in node.output]
        made.name = ""
        g.nodes.append(made)
    output = graph.output[index]
    kind = output.type.tensor_type.elem_type
    name = names[str(output.name)]
    return _typed(g, fitted, method, name, kind, classes=classes and method == "predict")


def _typed(g: Lowering, fitted: Any, method: str, name: str, kind: int, *, classes: bool) -> Value:
    if classes:
        labels = np.asarray(fitted.classes_)
        if kind != TensorProto.INT64 or labels.dtype.kind not in "iu":
            raise g.refuse(
                fitted, "has labels that skl2onnx does not give as whole numbers", "label classes 0, 1, …"
            )
        found = g.reshape(Value(name, (None,), "int64"), (-1, 1))
        return g.argmax(g.cast(g.binary("Equal", found, labels.astype(np.int64)[None, :]), "float64"))
    shape: Shape = (None, _width(fitted, method))
    if kind == TensorProto.DOUBLE:
        return g.reshape(Value(name, shape), (-1, _width(fitted, method)))
    if kind in (TensorProto.FLOAT, TensorProto.INT64):
        narrow = Value(name, shape, "float32" if kind == TensorProto.FLOAT else "int64")
        return g.reshape(g.cast(narrow, "float64"), (-1, _width(fitted, method)))
    raise g.refuse(fitted, f"gives no numbers in {method}", "use another step")


def _width(fitted: Any, method: str) -> int:
    trial = np.zeros((1, int(fitted.n_features_in_)))
    made = getattr(fitted, method)(trial)
    made = made.toarray() if hasattr(made, "toarray") else np.asarray(made)
    return int(made.reshape(1, -1).shape[1])
