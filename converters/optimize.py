"""Makes a graph small, and its bytes a function of its contents."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from converters.fusing import fused
from edge_runtime.contract.errors import ArtifactError

ML_DOMAIN: Final = "ai.onnx.ml"
PRODUCER: Final = "skiff"
INPUT: Final = "input"
LABEL: Final = "label"
SCORE: Final = "score"
# Newer ones would shut out older runtimes, and the graphs use nothing that came later.
OPSET: Final = 17
ML_OPSET: Final = 3
IR_VERSION: Final = 8


def optimise(graph: GraphProto, *, dtype: str, width: int, outputs: int) -> ModelProto:
    """A minimal model with one input ``input`` (n, width) and the outputs ``label`` and ``score`` (n, C).

    ``graph`` must already use these names; with ``outputs`` 0 there is no label, with 1 it is (n,), with more
    (n, outputs). Removed: identities, casts to the type a value already has, widening casts that are narrowed again,
    zero class weights beside others, attributes at their defaults, and whatever no output needs; then
    `converters.fusing` says the rest in fewer nodes.
    """
    source = TensorProto.FLOAT if dtype == "float32" else TensorProto.DOUBLE
    names = [LABEL, SCORE] if outputs else [SCORE]
    nodes = _bypass([_copied(node) for node in graph.node], set(names), source)
    nodes, tensors = fused(
        _alive(nodes, set(names)), graph.initializer, source=INPUT, label=LABEL, score=SCORE
    )
    nodes = [_compact(node) for node in _alive(nodes, set(names))]
    used = {name for node in nodes for name in node.input}
    constants = sorted((t for t in tensors if t.name in used), key=lambda t: str(t.name))
    rename = _names(nodes, [str(t.name) for t in constants], {INPUT, *names})
    for i, node in enumerate(nodes):
        node.name = f"n{i}"
        node.doc_string = ""
        node.input[:] = [rename.get(name, name) for name in node.input]
        node.output[:] = [rename.get(name, name) for name in node.output]
    described = [helper.make_tensor_value_info(SCORE, TensorProto.FLOAT, ["n", "scores"])]
    if outputs:
        shape: list[str | int | None] = ["n"] if outputs == 1 else ["n", outputs]
        described.insert(0, helper.make_tensor_value_info(LABEL, TensorProto.INT64, shape))
    return helper.make_model(
        helper.make_graph(
            nodes,
            PRODUCER,
            [helper.make_tensor_value_info(INPUT, source, ["n", width])],
            described,
            [_constant(tensor, rename[str(tensor.name)]) for tensor in constants],
        ),
        producer_name=PRODUCER,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(ML_DOMAIN, ML_OPSET)],
    )


def to_bytes(model: ModelProto, metadata: Mapping[str, str]) -> bytes:
    """The file's bytes with ``metadata`` in order of its keys; the same model gives the same bytes.

    Raises `ArtifactError` when reading the bytes back does not give them again.
    """
    written = ModelProto()
    written.CopyFrom(model)
    del written.metadata_props[:]
    helper.set_model_props(written, {key: metadata[key] for key in sorted(metadata)})
    data: bytes = written.SerializeToString(deterministic=True)
    if ModelProto.FromString(data).SerializeToString(deterministic=True) != data:
        raise ArtifactError(
            "the model's bytes do not survive a round trip through protobuf: report this as a bug"
        )
    return data


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of ``node`` by name, as Python values."""
    return {str(a.name): helper.get_attribute_value(a) for a in node.attribute}


def with_attributes(node: NodeProto, values: Mapping[str, Any]) -> NodeProto:
    """``node`` with other attributes, in order of their names."""
    made = helper.make_node(
        node.op_type, list(node.input), list(node.output), name=node.name, domain=node.domain
    )
    made.attribute.extend(helper.make_attribute(name, values[name]) for name in sorted(values))
    return made


def _copied(node: NodeProto) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    return made


def _constant(tensor: TensorProto, name: str) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor), name)


def _bypass(nodes: Sequence[NodeProto], outputs: set[str], source: int) -> list[NodeProto]:
    """Removes nodes that pass their input on unchanged, renaming what they joined."""
    types = {INPUT: source}
    widened: dict[str, str] = {}  # float64 values that are float32 ones, widened: narrowing gives these again
    kept: list[NodeProto] = []
    for node in nodes:
        target = attributes(node)["to"] if node.op_type == "Cast" else None
        if target == TensorProto.FLOAT and node.input[0] in widened:
            node.input[0] = widened[node.input[0]]
        if node.op_type == "Identity" or (target is not None and types.get(node.input[0]) == target):
            passed, result = node.input[0], node.output[0]
            if result not in outputs:
                _rename_value(nodes, result, passed)
                continue
            if passed not in outputs and passed != INPUT and passed in types:
                _rename_value(nodes, passed, result)
                types[result] = types[passed]
                continue
        if target is not None:
            if target == TensorProto.DOUBLE and types.get(node.input[0]) == TensorProto.FLOAT:
                widened[node.output[0]] = node.input[0]
            types[node.output[0]] = target
        else:
            types.update(dict.fromkeys(node.output, TensorProto.UNDEFINED))
            if node.op_type.startswith("TreeEnsemble"):
                types[node.output[-1]] = TensorProto.FLOAT  # whatever the type of its input
        kept.append(node)
    return kept


def _rename_value(nodes: Sequence[NodeProto], old: str, new: str) -> None:
    for node in nodes:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def _alive(nodes: Sequence[NodeProto], outputs: set[str]) -> list[NodeProto]:
    wanted = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _compact(node: NodeProto) -> NodeProto:
    values = attributes(node)
    if node.op_type.startswith("TreeEnsemble"):
        _drop_zero_weights(values)
        if not any(values.get("nodes_missing_value_tracks_true", ())):
            values.pop("nodes_missing_value_tracks_true", None)
        values.pop("nodes_hitrates", None)  # a hint that runtimes ignore
        if values.get("post_transform") == b"NONE":
            del values["post_transform"]
    return with_attributes(node, values)


def _drop_zero_weights(values: dict[str, Any]) -> None:
    """Drops the zero weights of a classifier's leaf that has others: adding 0 changes no sum."""
    key = "class_weights" if "class_weights" in values else "class_weights_as_tensor"
    if key not in values:
        return
    wide = key.endswith("_as_tensor")
    weights = numpy_helper.to_array(values[key]) if wide else np.asarray(values[key], np.float32)
    leaf = np.stack([values["class_treeids"], values["class_nodeids"]])
    _, where = np.unique(leaf, axis=1, return_inverse=True)
    where = where.reshape(-1)
    votes = np.bincount(where, weights=(weights != 0).astype(np.float64))
    first = np.zeros(len(weights), np.bool_)
    first[np.unique(where, return_index=True)[1]] = True
    kept = (weights != 0) | (first & (votes[where] == 0))
    values[key] = numpy_helper.from_array(weights[kept], key) if wide else weights[kept].tolist()
    for name in ("class_treeids", "class_nodeids", "class_ids"):
        values[name] = np.asarray(values[name])[kept].tolist()


def _names(nodes: Sequence[NodeProto], constants: Sequence[str], fixed: set[str]) -> dict[str, str]:
    """New names for constants (``c0`` …) and inner values (``v0`` …), in order of appearance."""
    rename = {name: f"c{i}" for i, name in enumerate(constants)}
    inner = [name for node in nodes for name in node.output if name and name not in fixed]
    return rename | {name: f"v{i}" for i, name in enumerate(inner)}
