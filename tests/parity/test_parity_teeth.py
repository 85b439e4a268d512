"""The probes bite: graphs that are wrong in one place are caught, and so is the ordinary conversion."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from converters import artifact as artifacts
from converters import check_parity, convert
from converters import signature as signatures
from converters import table as tables
from converters.lowering import lower
from converters.optimize import LABEL, SCORE, attributes, optimise, to_bytes, with_attributes
from converters.parity import ParityFailure, compare, probes_for
from converters.reference import Acceptance
from edge_runtime.contract.errors import ArtifactError, ParityError
from edge_runtime.engine import Engine
from tests.parity.cases import classes_of, scaled_integers

pytestmark = pytest.mark.sampled(2)

Values = dict[str, Any]
PROBES = 8000  # enough for every split of the forests here at every distance


def probes_of(signature, table, engine, probes):
    """The rows that an artifact was proven with."""
    manifest = engine.info.manifest
    return probes_for(
        signature,
        table,
        lower(signature, dtype=manifest.input_dtype),
        engine.info.reference.spec,
        takes=Acceptance(
            missing=np.array([feature.missing for feature in manifest.features]),
            infinite=np.array([feature.infinite for feature in manifest.features]),
            unseen=np.array([feature.unseen for feature in manifest.features]),
        ),
        probes=probes,
        seed=0,
    )


class Case:
    """A proven forest, its file as a graph to tamper with, and the probes it was proven with."""

    def __init__(self, X, classes, folder, *, trees=8):
        self.X = X
        self.pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(trees, random_state=0))
        self.pipeline.fit(X, classes_of(X, classes))
        self.artifact = convert(self.pipeline, X, folder / f"forest-{classes}.onnx", probes=PROBES)
        self.model = ModelProto.FromString(self.artifact.path.read_bytes())
        self.signature = signatures.read(self.pipeline)
        self.table = tables.read(self.signature, X)
        self.probes = probes_of(self.signature, self.table, Engine(self.artifact.path), PROBES)

    def tampered(self, change: Callable[[Values], None]) -> Engine:
        model = ModelProto()
        model.CopyFrom(self.model)
        [node] = model.graph.node
        values = attributes(node)
        change(values)
        node.CopyFrom(with_attributes(node, values))
        return Engine(to_bytes(model, {p.key: p.value for p in self.model.metadata_props}))

    def check(self, engine, probes=None):
        return compare(engine, self.signature, self.table, self.probes if probes is None else probes)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(scaled_integers(), 4, tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def holes(tmp_path_factory):
    X = scaled_integers()
    X[np.random.default_rng(0).random(X.shape) < 0.15] = np.nan
    return Case(X, 3, tmp_path_factory.mktemp("holes"))


def inner(values: Values) -> list[int]:
    return [i for i, mode in enumerate(values["nodes_modes"]) if mode == b"BRANCH_LEQ"]


def test_the_untampered_graph_passes(case):
    report = case.check(case.tampered(lambda values: None))
    assert report.passed
    assert report.rows == case.artifact.report.rows - len(Engine(case.artifact.path).info.golden.rows)


@pytest.mark.parametrize("direction", [-1, 1])
def test_any_threshold_moved_by_one_float32_value_is_caught(case, direction):
    """Each graph has one threshold wrong by one unit in the last place; the threshold rows find every one of them."""
    rows = [(kind, chunk) for kind, chunk in case.probes if kind == "threshold"]
    positions = inner(attributes(case.model.graph.node[0]))
    assert len(positions) == case.artifact.report.coverage.splits
    for position in np.random.default_rng(direction + 1).choice(positions, size=25, replace=False):

        def move(values, position=int(position)):
            value = np.float32(values["nodes_values"][position])
            values["nodes_values"][position] = float(np.nextafter(value, np.float32(direction * np.inf)))

        report = case.check(case.tampered(move), rows)
        assert not report.passed, f"node {position}"
        assert report.worst_rows[0].kind == "threshold"


def test_ordinary_rows_do_not_notice_such_a_threshold(case):
    def move(values):
        value = np.float32(values["nodes_values"][inner(values)[-1]])
        values["nodes_values"][inner(values)[-1]] = float(np.nextafter(value, np.float32(np.inf)))

    ordinary = [("ordinary", np.random.default_rng(0).normal(size=(4000, 5)).astype(np.float32))]
    assert case.check(case.tampered(move), ordinary).passed


def swap_children(values):
    i = inner(values)[3]
    true, false = values["nodes_truenodeids"], values["nodes_falsenodeids"]
    true[i], false[i] = false[i], true[i]


def other_column(values):
    i = inner(values)[5]
    values["nodes_featureids"][i] = (values["nodes_featureids"][i] + 1) % 5


def strict_comparison(values):
    values["nodes_modes"][inner(values)[0]] = b"BRANCH_LT"


def heavier_leaf(values):
    values["class_weights"][7] += 2e-5


def other_class(values):
    values["class_ids"][9] = (values["class_ids"][9] + 1) % 4


def other_order_of_labels(values):
    values["classlabels_int64s"] = [1, 0, 2, 3]


@pytest.mark.parametrize(
    "change",
    [swap_children, other_column, strict_comparison, heavier_leaf, other_class, other_order_of_labels],
)
def test_other_single_faults_are_caught(case, change):
    report = case.check(case.tampered(change))
    assert not report.passed
    assert report.label_mismatches or report.score_mismatches


def test_a_missing_value_sent_the_wrong_way_is_caught(holes):
    def flip(values):
        tracks = values["nodes_missing_value_tracks_true"]
        i = inner(values)[0]
        tracks[i] = 1 - tracks[i]

    assert holes.check(holes.tampered(lambda values: None)).passed
    report = holes.check(holes.tampered(flip))
    assert not report.passed
    assert report.by_probe_kind["missing"].score_mismatches


def test_missing_values_dropped_as_skl2onnx_drops_them_are_caught(holes):
    report = holes.check(holes.tampered(lambda values: values.pop("nodes_missing_value_tracks_true")))
    assert report.score_mismatches > 100


def default_conversion(pipeline, metadata, width):
    """What skl2onnx makes of the pipeline by itself, dressed as an artifact."""
    model = convert_sklearn(
        pipeline,
        initial_types=[("input", FloatTensorType([None, width]))],
        options={"zipmap": False},
        target_opset={"": 17, "ai.onnx.ml": 1},
    )
    model.ir_version = 8
    names = {model.graph.output[0].name: LABEL, model.graph.output[1].name: SCORE}
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
    classes = len(pipeline.classes_)
    del model.graph.output[:]
    model.graph.output.extend(
        [
            helper.make_tensor_value_info(LABEL, TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info(SCORE, TensorProto.FLOAT, ["n", classes]),
        ]
    )
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)])
    return Engine(to_bytes(model, metadata))


def test_the_ordinary_conversion_of_a_scaled_forest_fails_the_same_probes(case):
    metadata = {p.key: p.value for p in case.model.metadata_props}
    report = case.check(default_conversion(case.pipeline, metadata, 5))
    assert not report.passed
    threshold = report.by_probe_kind["threshold"]
    assert threshold.score_mismatches > 0.01 * threshold.rows
    assert report.by_probe_kind["training"].score_mismatches, "training rows themselves lie on splits"
    assert case.check(Engine(case.artifact.path)).passed


def test_the_ordinary_conversion_of_a_logistic_regression_fails_too(tmp_path):
    """Far from the origin float32 sums cancel, and at the end of float32 probabilities become NaN."""
    rng = np.random.default_rng(0)
    X = (1e4 + rng.normal(size=(400, 4))).astype(np.float32).astype(np.float64)
    y = np.searchsorted([1e4 - 0.5, 1e4 + 0.5], X[:, 0])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=100)).fit(X, y)
    artifact = convert(pipeline, X, tmp_path / "m.onnx", probes=2000)
    metadata = {p.key: p.value for p in ModelProto.FromString(artifact.path.read_bytes()).metadata_props}
    signature = signatures.read(pipeline)
    table = tables.read(signature, X)
    probes = probes_of(signature, table, Engine(artifact.path), 2000)
    report = compare(default_conversion(pipeline, metadata, 4), signature, table, probes)
    assert not report.passed
    assert report.by_probe_kind["huge"].score_mismatches
    assert compare(Engine(artifact.path), signature, table, probes).passed


def test_a_linear_model_with_one_wrong_weight_is_caught(tmp_path):
    X = scaled_integers()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, classes_of(X, 3))
    artifact = convert(pipeline, X, tmp_path / "m.onnx", probes=2000)
    model = ModelProto.FromString(artifact.path.read_bytes())
    [weights] = [t for t in model.graph.initializer if tuple(t.dims) == (5, 3)]
    array = numpy_helper.to_array(weights).copy()
    array[1, 1] *= 1 + 1e-3
    weights.CopyFrom(numpy_helper.from_array(array, weights.name))
    (tmp_path / "broken.onnx").write_bytes(model.SerializeToString())
    assert not check_parity(pipeline, tmp_path / "broken.onnx", X, probes=2000).passed


@pytest.mark.parametrize("direction", [-1, 1])
def test_a_float64_threshold_moved_by_one_float64_value_is_caught(direction, tmp_path):
    rng = np.random.default_rng(0)
    X = np.stack([1.7e9 + rng.random(400) * 43_200, rng.normal(size=400)], axis=1)
    pipeline = RandomForestClassifier(4, random_state=0).fit(X * [1e-9, 1], np.sin(X[:, 0] / 500) > 0)
    artifact = convert(pipeline, X * [1e-9, 1], tmp_path / "m.onnx", probes=4000, input_dtype="float64")
    signature = signatures.read(pipeline)
    table = tables.read(signature, X * [1e-9, 1])
    probes = probes_of(signature, table, Engine(artifact.path), 4000)
    original = ModelProto.FromString(artifact.path.read_bytes())
    [at] = [i for i, n in enumerate(original.graph.node) if n.op_type == "TreeEnsembleClassifier"]
    positions = inner(attributes(original.graph.node[at]))
    for position in rng.choice(positions, size=8, replace=False):
        model = ModelProto()
        model.CopyFrom(original)
        values = attributes(model.graph.node[at])
        limits = numpy_helper.to_array(values["nodes_values_as_tensor"]).copy()
        assert limits.dtype == np.float64
        limits[position] = np.nextafter(limits[position], direction * np.inf)
        values["nodes_values_as_tensor"] = numpy_helper.from_array(limits, "nodes_values_as_tensor")
        model.graph.node[at].CopyFrom(with_attributes(model.graph.node[at], values))
        engine = Engine(to_bytes(model, {p.key: p.value for p in original.metadata_props}))
        threshold = [(kind, rows) for kind, rows in probes if kind == "threshold"]
        assert not compare(engine, signature, table, threshold).passed, f"node {position}"
    assert compare(Engine(artifact.path), signature, table, probes).passed


def test_a_clip_with_a_wrong_bound_is_caught(tmp_path):
    X = scaled_integers()
    pipeline = make_pipeline(MinMaxScaler(clip=True), LogisticRegression()).fit(X, classes_of(X, 3))
    artifact = convert(pipeline, X, tmp_path / "m.onnx", probes=2000)
    model = ModelProto.FromString(artifact.path.read_bytes())
    bounds = [t for t in model.graph.initializer if np.all(numpy_helper.to_array(t) == 1.0)]
    assert bounds
    for bound in bounds:
        bound.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bound) * (1 + 1e-3), bound.name))
    (tmp_path / "broken.onnx").write_bytes(model.SerializeToString())
    assert check_parity(pipeline, artifact.path, X, probes=2000).passed
    assert not check_parity(pipeline, tmp_path / "broken.onnx", X, probes=2000).passed


def test_convert_raises_with_the_worst_row_and_writes_nothing(monkeypatch, tmp_path):
    X = scaled_integers()
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(5, random_state=0)).fit(
        X, classes_of(X, 3)
    )

    def broken(graph, **options):
        model = optimise(graph, **options)
        [node] = [n for n in model.graph.node if n.op_type == "TreeEnsembleClassifier"]
        values = attributes(node)
        values["classlabels_int64s"] = [0, 2, 1]
        node.CopyFrom(with_attributes(node, values))
        return model

    monkeypatch.setattr(artifacts, "optimise", broken)
    with pytest.raises(ParityError, match=r"worst row \(\w+\): label [012] for [012], scores \[") as caught:
        convert(pipeline, X, tmp_path / "m.onnx", probes=1000)
    assert isinstance(caught.value, ParityFailure)
    assert caught.value.report.label_mismatches
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_of_another_pipeline_is_not_compared(case, tmp_path):
    X = case.X
    other = make_pipeline(StandardScaler(), RandomForestClassifier(3)).fit(X, classes_of(X, 4) + 1)
    with pytest.raises(ArtifactError, match="labels"):
        check_parity(other, case.artifact.path, X)
    narrow = RandomForestClassifier(3).fit(X[:, :3], classes_of(X, 4))
    with pytest.raises(ArtifactError, match="number of columns is 5, not 3"):
        check_parity(narrow, case.artifact.path, X[:, :3])
