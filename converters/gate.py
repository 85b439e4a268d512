"""The static gate: what a model file may contain, checked without running it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs in the lock
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, checker, shape_inference

from converters.optimize import ML_DOMAIN, attributes
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.manifest import ArtifactInfo, read_info

MAX_ARTIFACT_BYTES: Final = 64 * 1024 * 1024
"""A forest takes about ten times its file in memory while it loads; beyond this it is no edge model."""

# What the converters emit, and nothing else: no control flow, no functions, no custom domain.
OPERATORS: Final = {
    "": frozenset(
        {
            *(
                "Abs",
                "Add",
                "And",
                "ArgMax",
                "ArgMin",
                "Cast",
                "Ceil",
                "Clip",
                "Concat",
                "Cos",
                "CumSum",
                "Div",
            ),
            *("Einsum", "Equal", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND"),
            *(
                "Gemm",
                "Greater",
                "GreaterOrEqual",
                "Identity",
                "IsInf",
                "IsNaN",
                "Less",
                "LessOrEqual",
                "Log",
            ),
            *(
                "LogSoftmax",
                "MatMul",
                "Max",
                "Min",
                "Mod",
                "Mul",
                "Neg",
                "Not",
                "Or",
                "Pad",
                "Pow",
                "Reciprocal",
            ),
            *(
                "ReduceL1",
                "ReduceL2",
                "ReduceLogSumExp",
                "ReduceMax",
                "ReduceMean",
                "ReduceMin",
                "ReduceProd",
            ),
            *(
                "ReduceSum",
                "ReduceSumSquare",
                "Relu",
                "Reshape",
                "Round",
                "ScatterElements",
                "Shape",
                "Sigmoid",
            ),
            *(
                "Sign",
                "Sin",
                "Slice",
                "Softmax",
                "Split",
                "Sqrt",
                "Squeeze",
                "Sub",
                "Sum",
                "Tanh",
                "Tile",
                "TopK",
            ),
            *("Transpose", "Unsqueeze", "Where", "Xor"),
        }
    ),
    ML_DOMAIN: frozenset({"TreeEnsembleClassifier", "TreeEnsembleRegressor"}),
}
_GRAPHS: Final = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def check_static(path: str | Path) -> ArtifactInfo:
    """Checks the artifact at ``path`` and returns what it says about itself.

    Refuses, with `ArtifactError`: files that are too large, damaged, or no artifact; external data; operators other
    than `OPERATORS`; nested graphs, functions and training graphs; trees whose nodes could form a loop.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_ARTIFACT_BYTES + 1)
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({e.strerror})") from e
    return check_bytes(data, str(path))


def check_bytes(data: bytes, where: str) -> ArtifactInfo:
    """`check_static` for the bytes of a file; ``where`` names it in errors."""
    if len(data) > MAX_ARTIFACT_BYTES:
        raise ArtifactError(
            f"{where}: is larger than the {MAX_ARTIFACT_BYTES} bytes allowed; use fewer or shallower trees"
        )
    try:
        info = read_info(data)
        model = ModelProto.FromString(data)
    except ArtifactError as e:
        raise ArtifactError(f"{where}: {e}") from e
    except DecodeError as e:
        raise ArtifactError(f"{where}: not an ONNX file, or cut short ({e})") from e
    for problem in _problems(model):
        raise ArtifactError(f"{where}: {problem}")
    try:
        checker.check_model(data, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError, RuntimeError) as e:
        raise ArtifactError(f"{where}: not a valid ONNX model ({e})") from e
    return info


def _problems(model: ModelProto) -> Iterator[str]:
    if model.functions or model.training_info:
        yield "holds functions or a training graph; only plain graphs are served"
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx", ML_DOMAIN):
            yield f"imports the operator domain {entry.domain!r}; only ONNX's own are served"
    graph = model.graph
    if graph.sparse_initializer:
        yield "holds sparse constants, which no converter emits"
    for tensor in _tensors(graph):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            yield f"constant {tensor.name!r} lies in another file; an artifact is one file"
    for node in graph.node:
        if any(attribute.type in _GRAPHS for attribute in node.attribute):
            yield f"node {node.name!r} holds a graph of its own; control flow is not served"
        if node.op_type not in OPERATORS.get(node.domain, frozenset()):
            kind = f"{node.domain or 'ai.onnx'}.{node.op_type}"
            yield f"node {node.name!r} is {kind}, which is not on the list of operators"
        elif node.op_type.startswith("TreeEnsemble") and (problem := _tree_problem(node)):
            yield f"node {node.name!r}: {problem}"


def _tensors(graph: GraphProto) -> list[TensorProto]:
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute.t] if attribute.type == AttributeProto.TENSOR else attribute.tensors
    return found


def _tree_problem(node: NodeProto) -> str:
    """Children must stand after their parent in its own tree, so that every walk ends."""
    values = attributes(node)
    names = ("treeids", "nodeids", "featureids", "modes", "truenodeids", "falsenodeids")
    if any(f"nodes_{name}" not in values for name in names):
        return "the trees lack some of their attributes"
    columns = [values[f"nodes_{name}"] for name in names]
    if len({len(column) for column in columns}) != 1:
        return "the tree attributes differ in length"
    tree, own, _, modes, true, false = columns
    inner = np.array([mode != b"LEAF" for mode in modes], np.bool_)
    if not set(modes) <= {b"LEAF", b"BRANCH_LEQ", b"BRANCH_EQ"}:
        return "a tree node compares otherwise than by <= or =="
    size = {int(t): int(n) for t, n in zip(*np.unique(tree, return_counts=True), strict=True)}
    limit = np.array([size[int(t)] for t in tree], np.int64)
    parent, left, right = (np.asarray(column, np.int64)[inner] for column in (own, true, false))
    if (np.minimum(left, right) <= parent).any() or (np.maximum(left, right) >= limit[inner]).any():
        return "a tree node's child does not stand after it in the same tree, so a walk might not end"
    return ""
