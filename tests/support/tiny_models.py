"""Small artifacts built by hand: a linear model as a real ``.onnx`` file with everything skiff writes into one.

They need onnx but neither scikit-learn nor the converters, load in milliseconds, and come with their own answer in
float64 numpy, so that a test can say what the engine must return.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

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
    """A linear model: softmax over ``rows @ weights.T + bias`` for a classifier, the sum itself for a regressor."""

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

    @cached_property
    def training(self) -> NDArray[np.float32]:
        """(500, F) standard normal rows."""
        rng = np.random.default_rng(self.seed + 1)
        return rng.normal(size=(TRAINING_ROWS, len(self.features))).astype(np.float32)

    def answer(self, rows: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Class indices (n,) (zeros for a regressor) and scores (n, C) in float64."""
        z = rows.astype(np.float64) @ self.weights.astype(np.float64).T + self.bias
        if not self.labels:
            return np.zeros(len(rows), np.int64), z
        if self.score == "predict_proba":
            e = np.exp(z - z.max(axis=1, keepdims=True))
            z = e / e.sum(axis=1, keepdims=True)
        return z.argmax(axis=1).astype(np.int64), z

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
            task="classifier" if self.labels else "regressor",
            score=self.score if self.labels else "predict",
            features=self.features,
            labels=self.labels,
            input_name="rows",
            label_output="label" if self.labels else "",
            score_output="scores",
            opset=OPSET,
            ir_version=IR_VERSION,
            layout=self.reference.spec.layout,
            training_digest=ids.digest_of(self.training.tobytes()),
            libraries=(("numpy", np.__version__),),
            budgets=self.budgets,
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
        tensors = [numpy_helper.from_array(self.weights, "W"), numpy_helper.from_array(self.bias, "b")]
        scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", len(self.weights)])
        outputs = [scores]
        if not self.labels:
            nodes = [helper.make_node("Gemm", ["rows", "W", "b"], ["scores"], transB=1)]
        elif self.score == "predict_proba":
            nodes = [
                helper.make_node("Gemm", ["rows", "W", "b"], ["z"], transB=1),
                helper.make_node("Softmax", ["z"], ["scores"], axis=1),
            ]
        else:
            nodes = [helper.make_node("Gemm", ["rows", "W", "b"], ["scores"], transB=1)]
        if self.labels:
            nodes.append(helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0))
            outputs.insert(0, helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]))
        rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", len(self.features)])
        graph = helper.make_graph(nodes, "tiny", [rows], outputs, tensors)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name=""
        )

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


def regressor(names: Sequence[str] = ("a", "b"), *, seed: int = 0) -> Tiny:
    """A linear regression with random weights."""
    rng = np.random.default_rng(seed)
    return Tiny(
        weights=rng.normal(size=(1, len(names))).astype(np.float32),
        bias=rng.normal(size=1).astype(np.float32),
        labels=(),
        features=features_of(names),
        seed=seed,
    )
