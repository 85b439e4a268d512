"""The graph: small, with deterministic bytes, and nothing in it that the gate would refuse."""

import numpy as np
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper
from sklearn.base import is_regressor
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from converters import convert
from converters.artifact import check_static
from converters.gate import MAX_ARTIFACT_BYTES, check_bytes
from converters.lowering import lower
from converters.optimize import INPUT, LABEL, SCORE, attributes, optimise, to_bytes
from converters.signature import read
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.engine import Engine
from tests.parity.cases import classes_of, pipeline_of, scaled_integers


@pytest.fixture(scope="module")
def X():
    return scaled_integers(200)


@pytest.fixture(scope="module")
def file(X, tmp_path_factory):
    pipeline = pipeline_of("standard", RandomForestClassifier(4, random_state=0)).fit(X, classes_of(X, 3))
    return convert(pipeline, X, tmp_path_factory.mktemp("graph") / "m.onnx", probes=500).path


def exported(estimator, X, y, arithmetic="float64", dtype="float32"):
    signature = read(pipeline_of("standard", estimator).fit(X, y))
    g = lower(signature, dtype=dtype, arithmetic=arithmetic)
    return optimise(g.graph(), dtype=g.dtype, width=signature.width, outputs=len(signature.labels))


def scored(graph):
    """A model of ``graph`` with three columns and no label."""
    return optimise(graph, dtype="float32", width=3, outputs=0)


TREE_GRAPHS = [
    (RandomForestClassifier(3, random_state=0), 3, "TreeEnsembleClassifier"),
    (RandomForestClassifier(3, random_state=0), 2, "TreeEnsembleClassifier"),
    (DecisionTreeClassifier(random_state=0), 3, "TreeEnsembleClassifier"),
    (RandomForestRegressor(3, random_state=0), 3, "TreeEnsembleRegressor"),
]


@pytest.mark.parametrize(
    ("estimator", "classes", "dtype", "arithmetic", "operators"),
    [
        *((e, classes, "float32", "float32", [kind]) for e, classes, kind in TREE_GRAPHS),
        *((e, classes, "float32", "float64", ["Cast", kind]) for e, classes, kind in TREE_GRAPHS),
        *((e, classes, "float64", "float64", [kind]) for e, classes, kind in TREE_GRAPHS),
        (
            LogisticRegression(max_iter=1000),
            3,
            "float32",
            "float64",
            ["Cast", "Gemm", "ArgMax", "Softmax", "Cast"],
        ),
        (LogisticRegression(max_iter=1000), 3, "float64", "float64", ["Gemm", "ArgMax", "Softmax", "Cast"]),
        (LinearRegression(), 3, "float32", "float64", ["Cast", "Gemm", "Cast"]),
        (LinearRegression(), 3, "float64", "float64", ["Gemm", "Cast"]),
    ],
)
def test_graphs_are_as_small_as_they_get(X, estimator, classes, dtype, arithmetic, operators):
    model = exported(estimator, X, classes_of(X, classes), arithmetic, dtype)
    assert [node.op_type for node in model.graph.node] == operators
    [given] = model.graph.input
    assert given.name == INPUT
    tensor = given.type.tensor_type
    assert tensor.elem_type == (TensorProto.FLOAT if dtype == "float32" else TensorProto.DOUBLE)
    assert [dim.dim_param or dim.dim_value for dim in tensor.shape.dim] == ["n", X.shape[1]]
    wanted = [SCORE] if is_regressor(estimator) else [LABEL, SCORE]
    assert [value.name for value in model.graph.output] == wanted
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 17), ("ai.onnx.ml", 3)}
    assert (model.ir_version, model.producer_name, model.doc_string) == (8, "skiff", "")


@pytest.mark.parametrize(("outputs", "shape"), [(1, ["n"]), (2, ["n", 2])])
def test_a_label_has_a_column_for_each_output_beyond_one(X, outputs, shape):
    y = np.stack([classes_of(X, 3), classes_of(X, 2, seed=2)], axis=1)[:, :outputs].squeeze()
    model = exported(RandomForestClassifier(3, random_state=0), X, y)
    label = model.graph.output[0]
    assert label.name == LABEL
    assert [dim.dim_param or dim.dim_value for dim in label.type.tensor_type.shape.dim] == shape


def test_zero_weights_and_defaults_are_dropped(X):
    forest = RandomForestClassifier(5, random_state=0)
    y = classes_of(X, 4)
    [node] = exported(forest, X, y, "float32").graph.node
    values = attributes(node)
    assert not {"nodes_hitrates", "post_transform"} & set(values)
    weights = np.asarray(values["class_weights"])
    assert (weights > 0).all()
    leaves = sum(int((member.tree_.children_left < 0).sum()) for member in forest.estimators_)
    votes = sum(
        int((member.tree_.value[member.tree_.children_left < 0] > 0).sum()) for member in forest.estimators_
    )
    assert len(weights) == votes < 4 * leaves
    assert weights.sum() == pytest.approx(leaves / 5)


def test_a_leaf_of_zeros_keeps_one_weight(X):
    """With two classes a leaf has one weight, that of the second: it stays, also when it is 0."""
    [node] = exported(RandomForestClassifier(3, random_state=0), X, classes_of(X, 2), "float32").graph.node
    values = attributes(node)
    assert len(values["class_weights"]) == sum(mode == b"LEAF" for mode in values["nodes_modes"])
    assert 0.0 in values["class_weights"]


def test_the_wide_graph_carries_float64_leaves(X):
    y = X[:, 0] / 3
    narrow = attributes(exported(RandomForestRegressor(7, random_state=0), X, y, "float32").graph.node[0])
    wide = attributes(exported(RandomForestRegressor(7, random_state=0), X, y, "float64").graph.node[1])
    weights = numpy_helper.to_array(wide["target_weights_as_tensor"])
    thresholds = numpy_helper.to_array(wide["nodes_values_as_tensor"])
    assert weights.dtype == thresholds.dtype == np.float64
    np.testing.assert_array_equal(
        weights.astype(np.float32), np.asarray(narrow["target_weights"], np.float32)
    )
    np.testing.assert_array_equal(thresholds, np.asarray(narrow["nodes_values"], np.float64))
    assert (weights != weights.astype(np.float32)).any()


def passing_graph():
    """An identity, a cast that changes nothing, a cast chain and a dead branch around one Softmax."""
    nodes = [
        helper.make_node("Identity", [INPUT], ["a"], name="user/name", doc_string="where it came from"),
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["b"], ["c"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["c"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Softmax", ["d"], ["e"], axis=1),
        helper.make_node("ArgMax", ["unused"], ["dead"], axis=1),
        helper.make_node("Cast", ["e"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Identity", ["f"], [SCORE]),
    ]
    return helper.make_graph(
        nodes, "any", [], [], [numpy_helper.from_array(np.zeros((2, 2), np.float32), "unused")]
    )


def test_what_changes_nothing_is_removed():
    graph = passing_graph()
    before = graph.SerializeToString()
    model = scored(graph)
    assert [(n.op_type, list(n.input), list(n.output)) for n in model.graph.node] == [
        ("Cast", [INPUT], ["v0"]),
        ("Softmax", ["v0"], ["v1"]),
        ("Cast", ["v1"], [SCORE]),
    ]
    assert [(n.name, n.doc_string) for n in model.graph.node] == [("n0", ""), ("n1", ""), ("n2", "")]
    assert not model.graph.initializer
    assert graph.SerializeToString() == before
    assert to_bytes(scored(model.graph), {}) == to_bytes(model, {})


def test_a_widening_that_is_narrowed_again_is_removed():
    nodes = [
        helper.make_node("Cast", [INPUT], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["wide"], ["narrow"], to=TensorProto.FLOAT),
        helper.make_node("Abs", ["narrow"], [SCORE]),
    ]
    graph = helper.make_graph(nodes, "any", [], [])
    [node] = scored(graph).graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Abs", [INPUT], [SCORE])
    kept = optimise(graph, dtype="float64", width=3, outputs=0).graph.node
    assert [n.op_type for n in kept] == ["Cast", "Abs"]  # float64 input: narrowing rounds


def test_an_identity_from_input_to_output_has_to_stay():
    graph = helper.make_graph([helper.make_node("Identity", [INPUT], [SCORE])], "any", [], [])
    assert [n.op_type for n in scored(graph).graph.node] == ["Identity"]


def test_metadata_is_written_in_order_of_its_keys():
    model = scored(passing_graph())
    data = to_bytes(model, {"b": "2", "a": "1"})
    assert data == to_bytes(model, {"a": "1", "b": "2"})
    assert [p.key for p in ModelProto.FromString(data).metadata_props] == ["a", "b"]
    assert not model.metadata_props


def edited(file, change):
    model = ModelProto.FromString(file.read_bytes())
    change(model)
    return model.SerializeToString()


def test_what_the_converter_writes_passes_the_gate(file):
    info = check_static(file)
    assert info.manifest.name == "model"
    assert info.opset == 17


def set_attribute(model, name, index, value):
    [attribute] = [a for a in model.graph.node[0].attribute if a.name == name]
    (attribute.strings or attribute.ints)[index] = value


def external_data(model):
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "far")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.initializer.append(tensor)


def external_attribute(model):
    attribute = model.graph.node[0].attribute.add(name="class_weights_as_tensor", type=AttributeProto.TENSOR)
    attribute.t.CopyFrom(numpy_helper.from_array(np.zeros(3), "w"))
    attribute.t.external_data.add(key="location", value="w.bin")


def control_flow(model):
    branch = helper.make_graph([], "b", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))


def foreign_domain(model):
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def foreign_operator(model):
    model.graph.node.append(helper.make_node("Gelu", ["input"], ["y"], domain="com.microsoft"))


def unlisted_operator(model):
    model.graph.node.append(helper.make_node("NonZero", ["input"], ["y"]))


def function(model):
    model.functions.add(name="f", domain="mine")


def training(model):
    model.training_info.add()


def sparse(model):
    model.graph.sparse_initializer.add()


def child_before_parent(model):
    set_attribute(model, "nodes_truenodeids", 0, 0)


def child_of_another_tree(model):
    set_attribute(model, "nodes_falsenodeids", 0, 1_000_000)


def other_mode(model):
    set_attribute(model, "nodes_modes", 0, b"BRANCH_LT")


def lengths_differ(model):
    [attribute] = [a for a in model.graph.node[0].attribute if a.name == "nodes_featureids"]
    attribute.ints.pop()


def no_modes(model):
    [i] = [i for i, a in enumerate(model.graph.node[0].attribute) if a.name == "nodes_modes"]
    del model.graph.node[0].attribute[i]


def invalid(model):
    model.graph.node[0].input[0] = "nowhere"


def shapes_that_do_not_fit(model):
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((2, 3), np.float32), "left"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((7, 3), np.float32), "right"))
    model.graph.node.append(helper.make_node("MatMul", ["left", "right"], ["y"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external_data, "'far' lies in another file"),
        (external_attribute, "'w' lies in another file"),
        (control_flow, "a graph of its own; control flow is not served"),
        (foreign_domain, "operator domain 'com.microsoft'"),
        (foreign_operator, r"com\.microsoft\.Gelu, which is not on the list"),
        (unlisted_operator, r"ai\.onnx\.NonZero, which is not on the list"),
        (function, "functions or a training graph"),
        (training, "functions or a training graph"),
        (sparse, "sparse constants"),
        (child_before_parent, "a walk might not end"),
        (child_of_another_tree, "a walk might not end"),
        (other_mode, "compares otherwise than by <= or =="),
        (lengths_differ, "differ in length"),
        (no_modes, "lack some of their attributes"),
        (invalid, "not a valid ONNX model"),
        (shapes_that_do_not_fit, "not a valid ONNX model"),
    ],
)
def test_the_gate_refuses(file, tmp_path, change, message):
    path = tmp_path / "bad.onnx"
    path.write_bytes(edited(file, change))
    with pytest.raises(ArtifactError, match=message) as caught:
        check_static(path)
    assert str(path) in str(caught.value)


def test_the_gate_refuses_files_that_are_no_artifacts(file, tmp_path):
    with pytest.raises(ArtifactError, match=r"absent\.onnx: cannot be read"):
        check_static(tmp_path / "absent.onnx")
    with pytest.raises(ArtifactError, match="not a skiff artifact"):
        check_bytes(to_bytes(ModelProto.FromString(file.read_bytes()), {}), "plain")
    with pytest.raises(ArtifactError, match="is larger than"):
        check_bytes(bytes(MAX_ARTIFACT_BYTES + 1), "large")


def test_a_file_cut_short_anywhere_is_refused(file):
    data = file.read_bytes()
    for cut in [0, 1, 7, *np.linspace(20, len(data) - 1, 40).astype(int)]:
        with pytest.raises(ArtifactError):
            check_bytes(data[:cut], "cut")
        with pytest.raises(ArtifactError):
            Engine(data[:cut])


def test_nested_graphs_are_found_in_any_attribute(file):
    def hide(model):
        attribute = model.graph.node[0].attribute.add(name="extra", type=AttributeProto.GRAPHS)
        attribute.graphs.append(GraphProto())

    with pytest.raises(ArtifactError, match="a graph of its own"):
        check_bytes(edited(file, hide), "hidden")
