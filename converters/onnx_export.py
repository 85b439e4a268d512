"""A folded estimator as an ONNX graph. The only skl2onnx import.

A forest is one operator. In float32 its thresholds are exact, and only the sum of the leaves rounds; where that would
leave the tolerance (a thousand trees, regression targets of mixed sign) the sum is taken in float64 instead.

A linear model is always computed in float64 and rounded once. A float32 sum of products has no bound that holds for
every row: terms that cancel magnify its error, and values near the end of float32 turn probabilities into NaN. skl2onnx
has no float64 linear operator, and its float64 graph takes up to eleven nodes for what five do here.
"""

from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType

from converters.optimize import (
    INPUT,
    LABEL,
    ML_DOMAIN,
    ML_OPSET,
    OPSET,
    SCORE,
    attributes,
    optimise,
    with_attributes,
)
from converters.rewrite import Folded
from converters.signature import Signature, trees

_WIDE_INPUT: Final = "wide_input"


Arithmetic = Literal["float32", "float64"]


def choices(signature: Signature) -> tuple[Arithmetic, ...]:
    """The arithmetics there are for a pipeline, the cheapest first; the last one is the most exact."""
    return ("float64",) if signature.family == "linear" else ("float32", "float64")


def export(signature: Signature, folded: Folded, arithmetic: Arithmetic) -> ModelProto:
    """The optimised graph of ``folded``, without metadata: one input ``input``, outputs ``label`` and ``score``.

    Raises `UnsupportedPipeline` when skl2onnx refuses the estimator.
    """
    if signature.family == "linear":
        graph = _linear(signature, folded.estimator)
    else:
        graph = _forest(signature, folded.estimator, wide=arithmetic == "float64")
    return optimise(
        graph,
        width=signature.width,
        scores=max(1, len(signature.labels)),
        classifier=signature.task == "classifier",
    )


def _forest(signature: Signature, estimator: Any, *, wide: bool) -> GraphProto:
    graph = _converted(signature, estimator)
    nodes = [_tree_node(node, signature, estimator, wide=wide) for node in graph.node]
    if wide:
        nodes.insert(0, helper.make_node("Cast", [INPUT], [_WIDE_INPUT], to=TensorProto.DOUBLE))
    del graph.node[:]
    graph.node.extend(nodes)
    return graph


def _converted(signature: Signature, estimator: Any) -> GraphProto:
    classifier = signature.task == "classifier"
    try:
        model: ModelProto = convert_sklearn(
            estimator,
            initial_types=[(INPUT, FloatTensorType([None, signature.width]))],
            options={id(estimator): {"zipmap": False}} if classifier else None,
            target_opset={"": OPSET, ML_DOMAIN: ML_OPSET},
        )
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as e:
        raise signature.estimator.refuse(f"is not converted by skl2onnx ({e})") from e
    graph = model.graph
    wanted = [LABEL, SCORE] if classifier else [SCORE]
    found = [str(output.name) for output in graph.output]
    if len(found) != len(wanted):
        raise signature.estimator.refuse(f"gives the outputs {found} in skl2onnx, not {wanted}")
    for node in graph.node:
        for old, new in zip(found, wanted, strict=True):
            node.output[:] = [new if name == old else name for name in node.output]
            node.input[:] = [new if name == old else name for name in node.input]
    return graph


def _tree_node(node: NodeProto, signature: Signature, estimator: Any, *, wide: bool) -> NodeProto:
    """Carries what skl2onnx leaves out: the way of missing values, and weights in float64."""
    if not node.op_type.startswith("TreeEnsemble"):
        raise signature.estimator.refuse(f"gives an unexpected {node.op_type} node in skl2onnx")
    values = attributes(node)
    members = trees(estimator)
    owner = np.asarray(values["nodes_treeids"])
    place = np.asarray(values["nodes_nodeids"])
    offset = np.cumsum([0, *(tree.node_count for tree in members)])
    at = offset[owner] + place
    inner = np.concatenate([tree.children_left for tree in members]) >= 0
    missing = np.concatenate([tree.missing_go_to_left for tree in members]).astype(bool) & inner
    values["nodes_missing_value_tracks_true"] = missing[at].astype(np.int64).tolist()
    if wide:
        threshold = np.where(inner, np.concatenate([tree.threshold for tree in members]), 0.0)
        _set_doubles(values, "nodes_values", threshold[at])
        kind = "class" if signature.task == "classifier" else "target"
        value = np.concatenate([tree.value[:, 0, :] for tree in members]) / len(members)
        leaf = offset[np.asarray(values[f"{kind}_treeids"])] + np.asarray(values[f"{kind}_nodeids"])
        column = np.asarray(values[f"{kind}_ids"])
        if len(signature.labels) == 2:
            column = column + 1  # one weight per leaf: that of the second class
        _set_doubles(values, f"{kind}_weights", value[leaf, column])
    made = with_attributes(node, values)
    if wide:
        made.input[:] = [_WIDE_INPUT]
    return made


def _set_doubles(values: dict[str, Any], name: str, array: NDArray[np.float64]) -> None:
    del values[name]
    values[f"{name}_as_tensor"] = numpy_helper.from_array(np.ascontiguousarray(array, np.float64), name)


def _linear(signature: Signature, estimator: Any) -> GraphProto:
    coef, intercept = np.asarray(estimator.coef_), np.asarray(estimator.intercept_)
    if len(signature.labels) == 2:
        # The logistic function of z is the second entry of softmax(-z/2, z/2); halving is exact.
        coef, intercept = np.vstack([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    nodes = [
        helper.make_node("Cast", [INPUT], [_WIDE_INPUT], to=TensorProto.DOUBLE),
        helper.make_node("Gemm", [_WIDE_INPUT, "weights", "bias"], ["logits"]),
    ]
    result = "logits"
    if signature.labels:
        result = "probabilities"
        nodes += [
            helper.make_node("ArgMax", ["logits"], [LABEL], axis=1, keepdims=0),
            helper.make_node("Softmax", ["logits"], [result], axis=1),
        ]
    nodes.append(helper.make_node("Cast", [result], [SCORE], to=TensorProto.FLOAT))
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(coef.T), "weights"),
        numpy_helper.from_array(np.ascontiguousarray(intercept), "bias"),
    ]
    return helper.make_graph(nodes, "linear", [], [], constants)
