"""Runs the graph of a fitted estimator and sets it against the estimator's own answers, without the proof around it."""

import re
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
from onnx import helper

from converters import signature as signatures
from converters.lowering import lower
from converters.lowering.graph import Lowering
from converters.lowering.rules import RULES
from converters.optimize import IR_VERSION, LABEL, ML_DOMAIN, ML_OPSET, OPSET, SCORE, optimise
from converters.signature import by_position
from edge_runtime.contract.manifest import agrees, ties


def named(value):
    """The name of a test's parameter: addresses would differ from one process to the next."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def session_of(model):
    """A session as the device's engine has it: nothing is optimised on the way."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(pipeline, rows, **options):
    """(label indices or None, scores) of the optimised graph for float rows (n, F)."""
    signature = signatures.read(pipeline)
    g = lower(signature, **options)
    model = optimise(g.graph(), dtype=g.dtype, width=signature.width, outputs=len(signature.labels))
    session = session_of(model)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"input": rows.astype(g.dtype)}), strict=True))
    return SimpleNamespace(
        labels=found.get(LABEL),
        scores=found[SCORE],
        model=model,
        session=session,
        lowering=g,
        signature=signature,
    )


def transform(fitted, rows, dtype="float32", vocabularies=()):
    """What the graph makes of ``fitted.transform`` for (n, F) rows, as float64."""
    g = Lowering(width=rows.shape[1], dtype=dtype, rules=RULES, vocabularies=vocabularies)
    made = g.call(fitted, "transform", g.start())
    graph = g.graph()
    graph.input.append(
        helper.make_tensor_value_info("input", 1 if dtype == "float32" else 11, ["n", rows.shape[1]])
    )
    graph.output.append(helper.make_tensor_value_info(made.name, 11, ["n", made.width]))
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(ML_DOMAIN, ML_OPSET)]
    session = session_of(helper.make_model(graph, ir_version=IR_VERSION, opset_imports=imports))
    return session.run(None, {"input": rows.astype(dtype)})[0]


def assert_equal(pipeline, rows, **options):
    """The graph agrees with the pipeline on rows as float32, all at once, one by one, and on no row at all."""
    found = run(pipeline, rows, **options)
    signature = found.signature
    wide = rows.astype(found.lowering.dtype).astype(np.float64)
    with by_position():
        predicted = np.asarray(pipeline.predict(wide))
        if signature.task == "regressor":
            wanted = predicted.astype(np.float64).reshape(len(rows), -1)
        elif signature.score in ("predict_proba", "decision_function"):
            scores = getattr(pipeline, signature.score)(wide)
            wanted = (
                np.hstack(scores) if isinstance(scores, list) else np.asarray(scores).reshape(len(rows), -1)
            )
        else:
            wanted = None
    assert found.scores.dtype == np.float32
    if wanted is not None:
        assert found.scores.shape == wanted.shape
        close = agrees(found.scores, wanted)
        assert close.all(), f"scores: {found.scores[~close][:5]} for {wanted[~close][:5]}"
    if len(signature.labels) == 1:
        classes = np.array(signature.single, dtype=object)
        same = classes[found.labels] == predicted.astype(object)
        unsure = np.zeros(len(rows), bool) if wanted is None else ties(wanted)
        if wanted is not None and wanted.shape[1] == 1:
            unsure = np.abs(wanted[:, 0]) <= 1e-5
        assert (same | unsure).all(), f"labels differ in rows {np.flatnonzero(~(same | unsure))[:5]}"
    single = np.concatenate([run_more(found, rows[i : i + 1])[1] for i in range(min(8, len(rows)))])
    assert agrees(single, found.scores[: len(single)]).all()
    assert run_more(found, rows[:0])[1].shape == (0, found.scores.shape[1])
    return found


def run_more(found, rows):
    """More rows through the graph of `run`."""
    out = found.session.run(None, {"input": rows.astype(found.lowering.dtype)})
    return (out[0] if len(out) > 1 else None), out[-1]
