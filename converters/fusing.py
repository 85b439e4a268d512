"""Fewer nodes for the same answers: what the rules of single steps leave between them, put together.

A small node costs what ONNX Runtime needs to call it, about 0.4 µs of the 6 to 10 of a small model, so a graph of many
loses against a plain one of few (docs/explanation/speed.md). Every rewrite here keeps each value to the bit but for
`_end_in_trees`, which takes the last link of boosted trees in float32, where the output is float32 anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]

_ABOVE_ZERO: Final = 1e-30
"""Added to a sum of leaves of exactly 0, so that an operator that asks for more than 0 says yes; lost in any other."""


@dataclass(slots=True, eq=False)
class _Graph:
    """Nodes in order, and constants by name; ``input`` is the graph's own."""

    nodes: list[NodeProto]
    tensors: dict[str, TensorProto]
    outputs: tuple[str, ...]
    input: str
    made: dict[str, NodeProto] = field(init=False)

    def __post_init__(self) -> None:
        self.index()

    def index(self) -> None:
        self.made = {name: node for node in self.nodes for name in node.output}

    def source(self, name: str, *kinds: str, **attributes: int) -> NodeProto | None:
        """The node that makes ``name``, where it is one of these operators with these attributes."""
        node = self.made.get(name)
        if node is None or node.op_type not in kinds:
            return None
        same = all(_attribute(node, key) == value for key, value in attributes.items())
        return node if same else None

    def constant(self, name: str) -> Array | None:
        tensor = self.tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def add(self, array: Array) -> str:
        name = f"fused{len(self.tensors)}"
        self.tensors[name] = numpy_helper.from_array(array, name)
        return name

    def users(self, name: str) -> int:
        return sum(list(node.input).count(name) for node in self.nodes) + (name in self.outputs)


def fused(
    nodes: Sequence[NodeProto], tensors: Sequence[TensorProto], *, source: str, label: str, score: str
) -> tuple[list[NodeProto], list[TensorProto]]:
    """``nodes`` with fewer of them, and the constants that they need; some may be left over.

    ``source`` is the graph's input, ``label`` and ``score`` its outputs. The nodes given may be changed.
    """
    g = _Graph(list(nodes), {str(t.name): t for t in tensors}, (label, score), source)
    _join_selections(g)
    _take_columns(g)
    _flatten_concats(g)
    _end_in_trees(g, label, score)
    return g.nodes, list(g.tensors.values())


def _attribute(node: NodeProto, name: str) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return None


# --- columns ----------------------------------------------------------------------------------------------------


def _join_selections(g: _Graph) -> None:
    """Columns of columns are columns."""
    for node in g.nodes:
        outer = _columns(g, node)
        inner_node = g.source(node.input[0], "Gather", axis=1) if outer is not None else None
        inner = None if inner_node is None else _columns(g, inner_node)
        if outer is None or inner_node is None or inner is None or inner.ndim != 1:
            continue
        node.input[0], node.input[1] = inner_node.input[0], g.add(inner[outer])


def _take_columns(g: _Graph) -> None:
    """One column of the input as a vector: a scalar index drops the axis that a reshape would."""
    for node in g.nodes:
        if node.op_type != "Reshape" or not _is(g, node.input[1], [-1]):
            continue
        taken = g.source(node.input[0], "Gather", axis=1)
        at = None if taken is None else _columns(g, taken)
        if taken is None or at is None or at.shape != (1,) or not _is_matrix(g, str(taken.input[0])):
            continue
        made = helper.make_node("Gather", [taken.input[0], g.add(at.reshape(()))], list(node.output), axis=1)
        node.CopyFrom(made)
    g.index()


def _columns(g: _Graph, node: NodeProto) -> Array | None:
    """The constant columns that a Gather takes."""
    if node.op_type != "Gather" or _attribute(node, "axis") != 1:
        return None
    return g.constant(node.input[1])


def _is_matrix(g: _Graph, name: str) -> bool:
    cast = g.source(name, "Cast")
    return name == g.input or (cast is not None and cast.input[0] == g.input)


def _flatten_concats(g: _Graph) -> None:
    """Columns beside columns beside columns: one Concat."""
    for node in g.nodes:
        if node.op_type != "Concat" or _attribute(node, "axis") != 1:
            continue
        flat: list[str] = []
        for name in node.input:
            inner = g.source(name, "Concat", axis=1)
            flat += list(inner.input) if inner is not None and g.users(name) == 1 else [name]
        node.input[:] = flat


# --- boosted trees ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Link:
    """How a graph ends: what the label and the score are made of, by the operator's name for it."""

    trees: NodeProto
    post_transform: str
    factor: float = 1.0
    zero_is_positive: bool = False


def _end_in_trees(g: _Graph, label: str, score: str) -> None:
    """Sums of leaves, their link and their label from one operator, as a classifier of boosted trees ends."""
    link = _logistic(g, label, score) or _softmax(g, label, score)
    if link is None or (made := _classifier(link, label, score)) is None:
        return
    kept = [node for node in g.nodes if not {label, score} & set(node.output)]
    at = next(i for i, node in enumerate(kept) if node is link.trees)
    kept.insert(at + 1, made)
    g.nodes = kept
    g.index()


def _logistic(g: _Graph, label: str, score: str) -> _Link | None:
    """``label = raw > 0`` and ``score = (1 - sigmoid(raw), sigmoid(raw))``."""
    as_label = g.source(label, "Cast", to=TensorProto.INT64)
    vector = as_label and g.source(as_label.input[0], "Reshape")
    above = vector and g.source(vector.input[0], "Greater", "GreaterOrEqual")
    as_score = g.source(score, "Cast", to=TensorProto.FLOAT)
    both = as_score and g.source(as_score.input[0], "Concat", axis=1)
    if not (above and both) or len(both.input) != 2 or not _is(g, above.input[1], 0.0):
        return None
    rest, second = g.source(both.input[0], "Sub"), g.source(both.input[1], "Sigmoid")
    if not (rest and second) or not _is(g, rest.input[0], 1.0) or rest.input[1] != both.input[1]:
        return None
    raw, factor = str(second.input[0]), 1.0
    if raw != above.input[0]:
        scaled = g.source(raw, "Mul")
        by = scaled and g.constant(scaled.input[1])
        if not scaled or by is None or by.size != 1 or scaled.input[0] != above.input[0]:
            return None
        raw, factor = str(scaled.input[0]), float(by.item())
    trees = _sums(g, raw)
    if trees is None or _attribute(trees, "n_targets") != 1 or factor <= 0:
        return None
    return _Link(trees, "LOGISTIC", factor, above.op_type == "GreaterOrEqual")


def _softmax(g: _Graph, label: str, score: str) -> _Link | None:
    """``label = argmax(raw)`` and ``score = softmax(raw)`` of three classes or more."""
    as_label = g.source(label, "ArgMax", axis=1)
    as_score = g.source(score, "Cast", to=TensorProto.FLOAT)
    shares = as_score and g.source(as_score.input[0], "Softmax")
    if not (as_label and shares) or as_label.input[0] != shares.input[0]:
        return None
    trees = _sums(g, str(shares.input[0]))
    return None if trees is None or _attribute(trees, "n_targets") < 3 else _Link(trees, "SOFTMAX")


def _sums(g: _Graph, name: str) -> NodeProto | None:
    """The trees whose sums ``name`` holds as float64."""
    wide = g.source(name, "Cast", to=TensorProto.DOUBLE)
    return None if wide is None else g.source(wide.input[0], "TreeEnsembleRegressor")


def _classifier(link: _Link, label: str, score: str) -> NodeProto | None:
    """The classifier operator for the trees of ``link``; None where it would read them otherwise.

    ONNX Runtime takes the sums of two classes for probabilities where no leaf is below 0.
    """
    classes = 2 if link.post_transform == "LOGISTIC" else int(_attribute(link.trees, "n_targets"))
    values = {a.name: helper.get_attribute_value(a) for a in link.trees.attribute}
    del values["n_targets"]
    for name in ("target_treeids", "target_nodeids", "target_ids"):
        values[name.replace("target", "class")] = values.pop(name)
    weights, wide = _floats(values, "target_weights")
    base, _ = _floats(values, "base_values")
    if classes == 2:
        if not (weights < 0).any():
            return None
        weights = weights * link.factor
        base = base * link.factor if base.size else np.zeros(1)
        if link.zero_is_positive and not base.any():
            base = np.full(1, _ABOVE_ZERO)
    for name, array in (("class_weights", weights), ("base_values", base)):
        if wide and array.size:
            values[f"{name}_as_tensor"] = numpy_helper.from_array(np.asarray(array, np.float64), name)
        elif array.size:
            values[name] = np.asarray(array, np.float32).tolist()
    made = helper.make_node(
        "TreeEnsembleClassifier", list(link.trees.input), [label, score], domain=link.trees.domain
    )
    values |= {"classlabels_int64s": list(range(classes)), "post_transform": link.post_transform}
    made.attribute.extend(helper.make_attribute(name, values[name]) for name in sorted(values))
    return made


def _floats(values: dict[str, Any], name: str) -> tuple[NDArray[np.float64], bool]:
    """Takes a float attribute out of ``values``: its numbers, and whether it was a float64 tensor."""
    if (tensor := values.pop(f"{name}_as_tensor", None)) is not None:
        return np.asarray(numpy_helper.to_array(tensor), np.float64), True
    return np.asarray(values.pop(name, ()), np.float64), False


def _is(g: _Graph, name: str, value: Any) -> bool:
    found = g.constant(name)
    return found is not None and np.array_equal(found.reshape(-1), np.ravel(value))
