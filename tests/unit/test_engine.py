"""The engine: what it answers, and what it refuses to load."""

import gc
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_native

from edge_runtime import engine as engine_module
from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, InputError
from edge_runtime.contract.manifest import agrees
from edge_runtime.engine import Block, Engine
from tests.support.tiny_models import classifier, regressor, sealed

TINY = classifier()


def built(model=TINY.artifact, **options) -> Any:
    return Engine(model, **options)


def rows_of(tiny, n, seed=7):
    return np.random.default_rng(seed).normal(size=(n, len(tiny.features))).astype(np.float32)


@pytest.mark.parametrize(
    "tiny", [TINY, regressor(), classifier(score="decision_function")], ids=["c", "r", "d"]
)
@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_it_answers_what_the_model_says(tiny, n):
    engine = built(tiny.artifact, max_batch=4)
    rows = rows_of(tiny, n)
    labels, scores = engine.run(rows)
    wanted_labels, wanted_scores = tiny.answer(rows)
    assert scores.shape == (n, engine.width)
    assert scores.dtype == np.float32
    assert agrees(scores, wanted_scores).all()
    if tiny.labels:
        assert labels.dtype == np.int64
        assert labels.tolist() == wanted_labels.tolist()
    else:
        assert labels is None


def test_single_rows_batches_and_slices_agree_bit_for_bit():
    engine = built()
    rows = rows_of(TINY, 50)
    labels, scores = engine.run(rows)
    for i, row in enumerate(rows):
        for one in (row, rows[i : i + 1], np.asfortranarray(rows)[i]):
            found_labels, found_scores = engine.run(one)
            assert found_scores.tobytes() == scores[i].tobytes()
            assert found_labels.tolist() == [labels[i]]
    assert engine.run(rows[::-1])[1].tobytes() == scores[::-1].tobytes()


def test_the_caller_owns_the_answer():
    engine = built()
    first, second = rows_of(TINY, 2)
    labels, scores = engine.run(first)
    kept = labels.copy(), scores.copy()
    engine.run(second)
    assert np.array_equal(labels, kept[0])
    assert np.array_equal(scores, kept[1])
    assert labels.flags.owndata
    assert scores.flags.owndata
    scores[:] = 0
    assert np.array_equal(engine.run(first)[1], kept[1])


def test_nan_and_infinity_go_through_the_graph():
    _, scores = built(regressor().artifact).run(np.array([np.nan, 1.0], np.float32))
    assert np.isnan(scores).all()


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (np.zeros(3), "type"),
        (np.zeros((2, 3)), "type"),
        (np.zeros(4, np.float32), "width"),
        (np.zeros((1, 2), np.float32), "width"),
        (np.zeros((2, 4), np.float32), "width"),
        (np.zeros((1, 1, 3), np.float32), "width"),
        (np.float32(1).reshape(()), "width"),
        (np.zeros(3, ">f4"), "type"),
    ],
)
def test_rows_of_another_kind_are_refused(rows, reason):
    with pytest.raises(InputError) as refused:
        built().run(rows)
    assert refused.value.reason == reason


def test_a_path_and_bytes_are_the_same(tmp_path):
    path = TINY.save(tmp_path)
    for model in (path, str(path), TINY.artifact):
        engine = built(model, expect=TINY.digest)
        assert engine.digest == TINY.digest
        assert engine.info.manifest == TINY.manifest
        assert engine.features == 3


def test_the_digest_is_checked_before_anything_is_parsed(monkeypatch):
    def fail(*_):
        raise AssertionError("parsed")

    monkeypatch.setattr(engine_module, "read_info", fail)
    with pytest.raises(ArtifactError, match="fetch the model again"):
        Engine(TINY.artifact + b"\0", expect=TINY.digest)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"gone\.onnx: cannot be read \(No such file"):
        Engine(tmp_path / "gone.onnx")


@pytest.mark.parametrize("cut", [0, 10, 500, -1])
def test_a_file_cut_short_is_refused_and_named(tmp_path, cut):
    path = tmp_path / "short.onnx"
    path.write_bytes(TINY.artifact[:cut])
    with pytest.raises(ArtifactError, match=r"short\.onnx"):
        Engine(path)


def test_a_foreign_onnx_file_is_refused():
    with pytest.raises(ArtifactError, match=r"not a skiff artifact.*converters\.convert"):
        Engine(TINY.graph().SerializeToString())


def tampered(change):
    graph = TINY.graph()
    change(graph)
    return sealed(graph, TINY.metadata)


def rename_input(model):
    model.graph.input[0].name = model.graph.node[0].input[0] = "other"


def second_input(model):
    model.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, ["n", 3]))


def double_input(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    model.graph.node.insert(0, helper.make_node("Cast", ["rows"], ["narrow"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "narrow"


def fixed_batch(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def any_width(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "f"


def extra_output(model):
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 3]))


def no_label(model):
    del model.graph.output[0]


def float_label(model):
    model.graph.node[2].output[0] = "index"
    model.graph.node.append(helper.make_node("Cast", ["index"], ["label"], to=TensorProto.FLOAT))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT


def narrow_scores(model):
    starts, ends, axes = (
        onnx.numpy_helper.from_array(np.array([k]), name) for k, name in ((0, "s"), (2, "e"), (1, "x"))
    )
    model.graph.initializer.extend([starts, ends, axes])
    model.graph.node[1].output[0] = "all"
    model.graph.node.insert(2, helper.make_node("Slice", ["all", "s", "e", "x"], ["scores"]))
    model.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 2


def column_labels(model):
    model.graph.node[2].attribute[1].i = 1  # keepdims
    model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (rename_input, "graph inputs are"),
        (second_input, "graph inputs are"),
        (double_input, "graph inputs are"),
        (fixed_batch, "graph inputs are"),
        (any_width, "graph inputs are"),
        (extra_output, "graph outputs are"),
        (no_label, "graph outputs are"),
        (float_label, "graph outputs are"),
        (narrow_scores, r"gave scores of shape \(1, 2\)"),
        (column_labels, r"labels of shape \[\(1, 1\)\]"),
    ],
)
def test_a_graph_that_contradicts_its_manifest_is_refused(change, problem):
    with pytest.raises(ArtifactError, match=problem):
        Engine(tampered(change))


def test_what_onnx_runtime_refuses_is_translated():
    with pytest.raises(ArtifactError, match=r"ONNX Runtime .* refuses the graph") as refused:
        Engine(tampered(lambda model: setattr(model.graph.node[0], "op_type", "NoSuchOperator")))
    assert refused.value.__cause__ is not None


def wrong_label(index):
    """A graph whose label is a constant beyond the manifest's labels."""

    def change(model):
        model.graph.node[2].output[0] = "index"
        shift = onnx.numpy_helper.from_array(np.array([index]), "shift")
        model.graph.initializer.append(shift)
        zero = onnx.numpy_helper.from_array(np.array([0]), "zero")
        model.graph.initializer.append(zero)
        model.graph.node.append(helper.make_node("Mul", ["index", "zero"], ["none"]))
        model.graph.node.append(helper.make_node("Add", ["none", "shift"], ["label"]))

    return tampered(change)


@pytest.mark.parametrize("index", [3, -1, 2**40])
@pytest.mark.parametrize("n", [1, 5])
def test_a_class_the_manifest_does_not_have_is_refused(index, n):
    engine = built(wrong_label(index))
    with pytest.raises(ArtifactError, match=f"answered class {index}; the manifest has 3"):
        engine.run(rows_of(TINY, n))


def test_memory_that_runs_out_is_a_budget(monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    engine = built()
    monkeypatch.setattr(engine._session, "run", fail)
    with pytest.raises(BudgetExceeded, match="lower max_batch"):
        engine.run(rows_of(TINY, 2))
    monkeypatch.setattr(ort, "InferenceSession", fail)
    with pytest.raises(BudgetExceeded, match="does not fit into the memory"):
        built()


def test_a_graph_that_fails_on_rows_is_an_artifact_error(monkeypatch):
    def fail(*_):
        raise ort_native.RuntimeException("boom")

    engine = built()
    monkeypatch.setattr(engine._session, "run", fail)
    block: Any = SimpleNamespace(row=np.zeros(3, np.float32), run=fail)
    engine._single = block
    for n in (1, 2):
        with pytest.raises(ArtifactError, match=r"the graph failed on .* boom"):
            engine.run(rows_of(TINY, n))


def test_closing_drops_the_session():
    engine = built()
    session = weakref.ref(engine._session)
    block = weakref.ref(engine._single.memory)
    engine.close()
    gc.collect()
    assert session() is None
    assert block() is None
    for call in (
        lambda: engine.run(rows_of(TINY, 1)),
        lambda: engine.run(rows_of(TINY, 2)),
        engine.bind,
    ):
        with pytest.raises(ArtifactError, match="the engine is closed; build a new one"):
            call()


@pytest.mark.parametrize("option", [{"threads": 0}, {"max_batch": 0}])
def test_options_are_checked(option):
    with pytest.raises(ValueError, match="at least 1"):
        built(**option)


def test_a_block_reads_and_writes_in_place():
    engine = built()
    block = engine.bind()
    rows = rows_of(TINY, 3)
    records = b""
    for row in rows:
        block.row[:] = row
        block.run()
        records += block.memory.tobytes()
    labels, scores = engine.run(rows)
    assert block.scores.tobytes() == scores[-1].tobytes()
    assert block.labels.tolist() == labels[-1:].tolist()
    found = np.frombuffer(records, block.layout)
    assert found["row"].tobytes() == rows.tobytes()
    assert found["scores"].tobytes() == scores.tobytes()
    assert found["labels"].tolist() == labels.tolist()


def test_the_public_binding_is_the_fallback(monkeypatch):
    class Session:
        """A session of an ONNX Runtime that hides its native one."""

        def __init__(self, session):
            self._inner = session
            self.run_with_iobinding = session.run_with_iobinding
            self.io_binding = session.io_binding

    engine = built()
    session: Any = Session(engine._session)
    block: Any = Block(session, engine.info, engine.width)
    assert block.run.func == engine._session.run_with_iobinding
    row = rows_of(TINY, 1)
    block.row[:] = row
    block.run()
    assert block.scores.tobytes() == engine.run(row)[1].tobytes()
    native: Any = engine.bind()
    assert native.run.func != engine._session.run_with_iobinding, "the native call is no longer found"


def test_threads_get_their_own_answers():
    engine = built()
    rows = rows_of(TINY, 64)
    wanted = engine.run(rows)[1]
    wrong: list[int] = []
    barrier = threading.Barrier(4)

    def work(mine):
        barrier.wait()
        wrong.extend(i for i in mine * 20 if engine.run(rows[i])[1].tobytes() != wanted[i].tobytes())

    threads = [threading.Thread(target=work, args=(list(range(k, 64, 4)),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_session_is_built_for_a_device(monkeypatch):
    seen = []
    build = ort.InferenceSession

    def spy(data, options, **others):
        seen.append((options, others))
        return build(data, options, **others)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    built()
    ((options, others),) = seen
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert others == {"providers": ["CPUExecutionProvider"]}


@pytest.mark.attack("A93")
def test_a_folding_bomb_is_not_folded():
    # The optimiser would compute this constant of 400 MB while loading.
    def change(model):
        size = onnx.numpy_helper.from_array(np.array([100_000_000]), "size")
        model.graph.initializer.append(size)
        model.graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["big"]))
        model.graph.node.append(helper.make_node("ReduceSum", ["big"], ["unused"]))

    def peak_kb():
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak"))

    data = tampered(change)
    before = peak_kb()
    engine_module._session(data, 1, "bomb")
    assert peak_kb() - before < 100_000


def test_the_arena_is_the_callers_choice(monkeypatch):
    seen = []
    build = ort.InferenceSession

    def spy(data, options, **others):
        seen.append(options.enable_cpu_mem_arena)
        return build(data, options, **others)

    monkeypatch.setattr(ort, "InferenceSession", spy)
    rows = rows_of(TINY, 5)
    assert built(arena=True).run(rows)[1].tobytes() == built().run(rows)[1].tobytes()
    assert seen == [True, False]


@pytest.mark.parametrize(("engines", "asked", "parts"), [(4096, 4, 3), (3, 4, 4), (3, 0, 4), (4096, 0, 1)])
def test_a_batch_is_run_in_parts_of_the_smaller_limit(monkeypatch, engines, asked, parts):
    engine = built(max_batch=engines)
    rows = rows_of(TINY, 10)
    wanted = built().run(rows)
    calls = []
    run = engine._session.run

    def counted(*given):
        calls.append(1)
        return run(*given)

    monkeypatch.setattr(engine._session, "run", counted)
    labels, scores = engine.run(rows, max_batch=asked)
    assert len(calls) == parts
    assert scores.tobytes() == wanted[1].tobytes()
    assert labels.tolist() == wanted[0].tolist()


def test_a_golden_row_is_asked_again(monkeypatch):
    engine = built()
    assert engine.golden_problem() == ""
    golden = engine.info.golden
    wanted = engine.run(golden.rows[0])
    monkeypatch.setattr(Engine, "run", lambda *_: (wanted[0], wanted[1] + np.float32(0.01)))
    assert "1 of 1 golden rows are answered differently here" in engine.golden_problem()
    monkeypatch.setattr(Engine, "run", lambda *_: ((wanted[0] + 1) % 3, wanted[1]))
    assert "1 of 1 golden rows are answered differently here" in engine.golden_problem()
    monkeypatch.undo()
    for error, wrong in ((5e-6, False), (2e-5, True)):
        scores = golden.scores[0] + error  # of probabilities, which are below 1
        monkeypatch.setattr(Engine, "run", lambda *_, scores=scores: (wanted[0], scores[None]))
        assert bool(engine.golden_problem()) is wrong, error
    monkeypatch.undo()
    engine.close()
    assert "the engine is closed" in engine.golden_problem()


def test_a_limit_that_is_not_reached_changes_nothing():
    engine = built(run_limit_seconds=3600.0)
    rows = rows_of(TINY, 5)
    assert engine.run(rows)[1].tobytes() == built().run(rows)[1].tobytes()
    for row in rows:
        assert engine.run(row)[1].tobytes() == built().run(row)[1].tobytes()
    with pytest.raises(ValueError, match="run_limit_seconds -1"):
        built(run_limit_seconds=-1)


def endless():
    """A model whose graph counts to 2^40 before it answers."""

    def change(model):
        graph = model.graph
        for name, value in (("rounds", np.int64(2**40)), ("go", np.array(True)), ("start", np.int64(0))):
            graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        scalar = [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("total", TensorProto.INT64, []),
        ]
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["again"], ["still"]),
                helper.make_node("Add", ["total", "i"], ["sum"]),
            ],
            "body",
            scalar,
            [
                helper.make_tensor_value_info("still", TensorProto.BOOL, []),
                helper.make_tensor_value_info("sum", TensorProto.INT64, []),
            ],
        )
        graph.node[-1].output[0], made = "unshifted", graph.node[-1].output[0]
        graph.node.append(helper.make_node("Loop", ["rounds", "go", "start"], ["counted"], body=body))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int64), "none"))
        graph.node.append(helper.make_node("Mul", ["counted", "none"], ["zero"]))
        kind = TensorProto.FLOAT if made == "score" else TensorProto.INT64
        graph.node.append(helper.make_node("Cast", ["zero"], ["shift"], to=kind))
        graph.node.append(helper.make_node("Add", ["unshifted", "shift"], [made]))

    return tampered(change)


def test_a_run_beyond_its_limit_is_ended():
    with pytest.raises(BudgetExceeded, match=r"a run took longer than 0\.05 s and was ended"):
        built(endless(), run_limit_seconds=0.05)
