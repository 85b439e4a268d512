"""Small artifacts built by hand: a linear model as a real ``.onnx`` file with everything skiff writes into one.

They need onnx but neither scikit-learn nor the converters, load in milliseconds, and come with their own answer in
float64 numpy, so that a test can say what the engine must return.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.contract import ids
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.manifest import (
    Budgets,
    Feature,
    Golden,
    Label,
    Manifest,
    Reference,
    to_metadata,
)
from edge_runtime.contract.profile import Binner, CellSpec, Profile, cells_from_training

OPSET = 17
IR_VERSION = 8
TRAINING_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A linear model: softmax over ``rows @ weights.T + bias`` for a classifier, the sum itself for a regressor.

    One column of weights with two labels decides by its sign. With ``multilabels`` the columns are the blocks of the
    outputs, side by side. Columns of categories are computed with as codes. ``refuses`` says that a row whose score is
    NaN is one that the pipeline refuses.
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    labels: tuple[Label, ...]
    features: tuple[Feature, ...]
    name: str = "tiny"
    version: str = "1.0.0"
    seed: int = 0
    score: str = "predict_proba"
    golden_rows: int = 4
    budgets: Budgets = field(default_factory=Budgets)
    task: str = ""
    input_dtype: str = "float32"
    multilabels: tuple[tuple[Label, ...], ...] = ()
    refuses: bool = False

    @cached_property
    def training(self) -> NDArray[np.floating]:
        """(500, F) standard normal rows of the input's dtype; codes in columns of categories."""
        rng = np.random.default_rng(self.seed + 1)
        rows = rng.normal(size=(TRAINING_ROWS, len(self.features)))
        for j, feature in enumerate(self.features):
            if feature.kind == "category":
                rows[:, j] = rng.integers(len(feature.vocabulary), size=TRAINING_ROWS)
        return rows.astype(self.input_dtype)

    @property
    def signed(self) -> bool:
        """Whether one column decides between two labels."""
        return len(self.weights) == 1 and len(self.labels) == 2

    def answer(self, rows: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Class indices (n,) (zeros for a regressor), (n, K) for K outputs, and scores (n, C), in float64."""
        z = rows.astype(np.float64) @ self.weights.astype(np.float64).T + self.bias
        if not self.labels and not self.multilabels:
            return np.zeros(len(rows), np.int64), z
        if self.signed:
            return (z[:, 0] > 0).astype(np.int64), z
        blocks = np.split(z, np.cumsum([len(found) for found in self.multilabels])[:-1], axis=1)
        blocks = [_softmax(block) for block in blocks] if self.score == "predict_proba" else blocks
        found = np.stack([block.argmax(axis=1).astype(np.int64) for block in blocks], axis=1)
        return (found if self.multilabels else found[:, 0]), np.hstack(blocks)

    @cached_property
    def reference(self) -> Reference:
        """The profile of the training rows, in two groups."""
        labels, scores = self.answer(self.training)
        columns = [
            cells_from_training(feature.name, self.training[:, j]) for j, feature in enumerate(self.features)
        ]
        top = scores.max(axis=1)
        spec = CellSpec(tuple(columns), cells_from_training("score", top), len(self.labels))
        probabilities = bool(self.labels) and self.score == "predict_proba"

        def profile(part: slice) -> Profile:
            binner = Binner(spec, probabilities=probabilities)
            binner.observe(self.training[part], labels[part], scores[part].astype(np.float32))
            return binner.take()

        groups = (("a", profile(slice(0, 200))), ("b", profile(slice(200, None))))
        return Reference(spec=spec, total=profile(slice(None)), groups=groups)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest that goes with the graph."""
        return Manifest(
            name=ids.model_name(self.name),
            version=self.version,
            task=self.task or ("classifier" if self.labels or self.multilabels else "regressor"),
            score=self.score if self.labels or self.multilabels else "predict",
            features=self.features,
            labels=self.labels,
            input_name="rows",
            label_output="label" if self.labels or self.multilabels else "",
            score_output="scores",
            opset=OPSET,
            ir_version=IR_VERSION,
            layout=self.reference.spec.layout,
            training_digest=ids.digest_of(self.training.tobytes()),
            libraries=(("numpy", np.__version__),),
            budgets=self.budgets,
            input_dtype=self.input_dtype,
            multilabels=self.multilabels,
            undefined=not self.refuses and any(f.missing or f.infinite for f in self.features),
        )

    @cached_property
    def golden(self) -> Golden:
        """The first training rows with the model's own answers."""
        rows = self.training[: self.golden_rows]
        labels, scores = self.answer(rows)
        return Golden(rows=rows, labels=labels, scores=scores)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The ``skiff.*`` keys."""
        return to_metadata(self.manifest, self.reference, self.golden, {"passed": True})

    def graph(self) -> onnx.ModelProto:
        """The graph without metadata."""
        wide = self.input_dtype == "float64"
        kind = TensorProto.DOUBLE if wide else TensorProto.FLOAT
        tensors = [
            numpy_helper.from_array(self.weights.astype(self.input_dtype), "W"),
            numpy_helper.from_array(self.bias.astype(self.input_dtype), "b"),
        ]
        more = self.multilabels or (self.labels and self.score == "predict_proba")
        made = "z" if more else "scores"
        nodes = [helper.make_node("Gemm", ["rows", "W", "b"], ["wide" if wide else made], transB=1)]
        if wide:
            nodes.append(helper.make_node("Cast", ["wide"], [made], to=TensorProto.FLOAT))
        outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", len(self.weights)])]
        shape: list[str | int] = ["n"]
        if self.multilabels:
            shape.append(len(self.multilabels))
            nodes += self._several(tensors)
        elif self.signed:
            zero = np.zeros(1, np.float32)
            tensors += [numpy_helper.from_array(zero, "zero"), numpy_helper.from_array(np.array([1]), "one")]
            nodes += [
                helper.make_node("Greater", ["scores", "zero"], ["positive"]),
                helper.make_node("Cast", ["positive"], ["column"], to=TensorProto.INT64),
                helper.make_node("Squeeze", ["column", "one"], ["label"]),
            ]
        elif self.labels:
            if self.score == "predict_proba":
                nodes.append(helper.make_node("Softmax", ["z"], ["scores"], axis=1))
            nodes.append(helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0))
        if self.labels or self.multilabels:
            outputs.insert(0, helper.make_tensor_value_info("label", TensorProto.INT64, shape))
        rows = helper.make_tensor_value_info("rows", kind, ["n", len(self.features)])
        graph = helper.make_graph(nodes, "tiny", [rows], outputs, tensors)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name=""
        )

    def _several(self, tensors: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
        """Blocks of ``z`` as ``scores``, and the place of each block's best as ``label``."""
        sizes = [len(found) for found in self.multilabels]
        tensors.append(numpy_helper.from_array(np.array(sizes), "sizes"))
        blocks, answers, places = ([f"{name}{k}" for k in range(len(sizes))] for name in "zpi")
        nodes = [helper.make_node("Split", ["z", "sizes"], blocks, axis=1)]
        for block, answer, place in zip(blocks, answers, places, strict=True):
            if self.score == "predict_proba":
                nodes.append(helper.make_node("Softmax", [block], [answer], axis=1))
            else:
                nodes.append(helper.make_node("Identity", [block], [answer]))
            nodes.append(helper.make_node("ArgMax", [answer], [place], axis=1, keepdims=1))
        nodes.append(helper.make_node("Concat", answers, ["scores"], axis=1))
        nodes.append(helper.make_node("Concat", places, ["label"], axis=1))
        return nodes

    @cached_property
    def artifact(self) -> bytes:
        """The whole file."""
        return sealed(self.graph(), self.metadata)

    @property
    def digest(self) -> Digest:
        """SHA-256 of the file."""
        return ids.digest_of(self.artifact)

    def save(self, folder: Path) -> Path:
        """Writes the artifact to ``folder`` and returns its path."""
        path = folder / f"{self.name}-{self.digest[:8]}.onnx"
        path.write_bytes(self.artifact)
        return path


class Laborious(Tiny):
    """The same answers, for some hundred times the time."""

    WIDTH: ClassVar = 1000
    TIMES: ClassVar = 3

    def graph(self) -> onnx.ModelProto:
        """The graph without metadata."""
        made = super().graph()
        nodes = list(made.graph.node)
        (gemm,) = (node for node in nodes if node.op_type == "Gemm")
        result, gemm.output[0] = gemm.output[0], "light"
        zeros = {
            "into": np.zeros((len(self.features), self.WIDTH), np.float32),
            "around": np.zeros((self.WIDTH, self.WIDTH), np.float32),
            "out": np.zeros((self.WIDTH, len(self.weights)), np.float32),
        }
        made.graph.initializer.extend(numpy_helper.from_array(table, name) for name, table in zeros.items())
        labour = ["rows", "into", *["around"] * self.TIMES, "out"]
        steps = [
            helper.make_node("MatMul", [labour[0] if k == 1 else f"labour{k - 1}", labour[k]], [f"labour{k}"])
            for k in range(1, len(labour))
        ]
        total = helper.make_node("Add", ["light", f"labour{len(steps)}"], [result])
        del made.graph.node[:]
        made.graph.node.extend([gemm, *steps, total, *(node for node in nodes if node is not gemm)])
        return made


def laborious(tiny: Tiny) -> Laborious:
    """``tiny``, taking its time."""
    return Laborious(**{each.name: getattr(tiny, each.name) for each in fields(tiny)})


def _softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    found: NDArray[np.float64] = e / e.sum(axis=1, keepdims=True)
    return found


def sealed(graph: onnx.ModelProto, metadata: Mapping[str, str]) -> bytes:
    """The bytes of ``graph`` with ``metadata``, in a stable order."""
    helper.set_model_props(graph, dict(sorted(metadata.items())))
    return bytes(graph.SerializeToString(deterministic=True))


def features_of(names: Sequence[str], missing: Sequence[str] = ()) -> tuple[Feature, ...]:
    """Features by name; those in ``missing`` accept NaN."""
    return tuple(Feature(name=name, missing=name in missing) for name in names)


def classifier(
    names: Sequence[str] = ("a", "b", "c"),
    labels: tuple[Label, ...] = ("low", "mid", "high"),
    *,
    missing: Sequence[str] = (),
    seed: int = 0,
    name: str = "tiny",
    score: str = "predict_proba",
) -> Tiny:
    """A classifier with random weights; different seeds give different digests."""
    rng = np.random.default_rng(seed)
    return Tiny(
        weights=rng.normal(size=(len(labels), len(names))).astype(np.float32),
        bias=rng.normal(size=len(labels)).astype(np.float32),
        labels=labels,
        features=features_of(names, missing),
        seed=seed,
        name=name,
        score=score,
    )


def regressor(names: Sequence[str] = ("a", "b"), *, targets: int = 1, seed: int = 0) -> Tiny:
    """A linear regression with random weights."""
    rng = np.random.default_rng(seed)
    return Tiny(
        weights=rng.normal(size=(targets, len(names))).astype(np.float32),
        bias=rng.normal(size=targets).astype(np.float32),
        labels=(),
        features=features_of(names),
        seed=seed,
    )


def several(
    multilabels: tuple[tuple[Label, ...], ...] = (("red", "blue"), ("s", "m", "l")),
    *,
    score: str = "predict_proba",
    seed: int = 0,
) -> Tiny:
    """A classifier with a label output for each entry of ``multilabels``, and the features a, b and c."""
    rng = np.random.default_rng(seed)
    width = sum(len(labels) for labels in multilabels)
    return Tiny(
        weights=rng.normal(size=(width, 3)).astype(np.float32),
        bias=rng.normal(size=width).astype(np.float32),
        labels=(),
        multilabels=multilabels,
        features=features_of("abc"),
        score=score,
        seed=seed,
    )


def categorical(*features: Feature, seed: int = 0, **changes: Any) -> Tiny:
    """A classifier of three classes over ``features`` as they are."""
    tiny = classifier([feature.name for feature in features], seed=seed)
    return replace(tiny, features=features, **changes)
