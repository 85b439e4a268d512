"""The unrolled heap keeps what scikit-learn's own heap keeps, whatever is handed to it and in whatever order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from sklearn.neighbors._kd_tree import NeighborsHeap64

from converters.lowering import heap
from converters.lowering.graph import Lowering
from converters.lowering.heap import Plan
from converters.lowering.rules import RULES
from converters.optimize import IR_VERSION, OPSET
from tests.support import lowered


def kept(arrivals, count, sieve):
    """(n, k) distances and places in order of the places."""
    g = Lowering(width=arrivals.shape[1], dtype="float64", rules=RULES)
    found = heap.survivors(g, g.start(), count, sieve)
    graph = g.graph()
    graph.input.append(helper.make_tensor_value_info("input", 11, ["n", arrivals.shape[1]]))
    for value, kind in zip(found, (11, 7), strict=True):
        graph.output.append(helper.make_tensor_value_info(value.name, kind, None))
    model = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)])
    distances, places = lowered.session_of(model).run(None, {"input": arrivals})
    order = np.argsort(places, axis=1)
    return np.take_along_axis(distances, order, 1), np.take_along_axis(places, order, 1)


def searched(arrivals, count):
    """The same by scikit-learn."""
    found = NeighborsHeap64(len(arrivals), count)
    for row, distances in enumerate(arrivals):
        for place, distance in enumerate(distances):
            found.push(row, distance, place)
    return np.sort(found.get_arrays()[1], axis=1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 12])
def test_all_rows_handed_on(count):
    arrivals = np.random.default_rng(count).integers(0, 6, (300, 20)).astype(float)
    distances, places = kept(arrivals, count, Plan((20,), 0))
    np.testing.assert_array_equal(places, searched(arrivals, count))
    np.testing.assert_array_equal(distances, np.take_along_axis(arrivals, places, 1))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_arrivals(data):
    """With room for all of them, the sieve never changes what is kept."""
    count = data.draw(st.integers(1, 6))
    total = data.draw(st.integers(count + 1, 40))
    values = st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 3.0, 5e-324, 1e300, np.inf])
    row = st.lists(values, min_size=total, max_size=total)
    arrivals = np.array(data.draw(st.lists(row, min_size=1, max_size=8)))
    ends = sorted(data.draw(st.sets(st.integers(count, total - 1), min_size=1, max_size=4)))
    sieve = Plan((*ends, total), total - ends[0])
    enough = np.isfinite(arrivals).sum(axis=1) >= count
    distances, places = kept(arrivals, count, sieve)
    np.testing.assert_array_equal(places[enough], searched(arrivals, count)[enough])
    assert np.isinf(distances).any(axis=1).tolist() == (~enough).tolist()


@pytest.mark.parametrize("order", ["random", "falling", "rising"])
def test_a_plan_hands_on_few(order):
    rng = np.random.default_rng(0)
    arrivals = rng.integers(0, 400, (200, 600)).astype(float)
    if order != "random":
        arrivals = np.sort(arrivals, axis=1)[:, :: -1 if order == "falling" else 1]
    sieve = heap.plan(arrivals, 5)
    if order == "falling":  # every row is nearer than all before it
        assert sieve is None
        return
    assert sieve is not None
    assert sieve.pushes < 120
    np.testing.assert_array_equal(kept(arrivals, 5, sieve)[1], searched(arrivals, 5))


def test_without_room_the_nearest_are_kept_all_the_same():
    rng = np.random.default_rng(0)
    arrivals = -np.sort(-rng.integers(0, 400, (200, 100)).astype(float), axis=1)
    distances, _ = kept(arrivals, 5, Plan((10, 100), 12))
    np.testing.assert_array_equal(np.sort(distances, axis=1), np.sort(arrivals, axis=1)[:, :5])


def test_the_number_of_rows_is_known_all_the_way():
    """Otherwise ONNX Runtime compares all buffers with one another, and takes seconds to open the file."""
    import onnx  # noqa: PLC0415 - for this test alone

    g = Lowering(width=40, dtype="float32", rules=RULES)
    lost = g.reshape(g.reshape(g.start(), (-1, 1, 40)), (-1, 40))
    heap.survivors(g, lost, 5, Plan((8, 40), 20))
    graph = g.graph()
    graph.input.append(helper.make_tensor_value_info("input", 1, ["n", 40]))
    model = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)])
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {each.name: each.type.tensor_type.shape.dim for each in inferred.value_info}
    heaps = [node.output[0] for node in graph.node if node.op_type == "Max"]
    assert len(heaps) == 28
    assert {shapes[name][0].dim_param for name in heaps} == {"n"}
