"""What skiff is set against: the graph that skl2onnx makes of the same pipeline, in a session with the same threads."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from skl2onnx import to_onnx

from converters.optimize import ML_DOMAIN, ML_OPSET, OPSET
from converters.reference import Answers, answers, changed
from converters.signature import Signature
from converters.table import Rows, Table

Feed = Mapping[str, NDArray[Any]]


def session_of(data: bytes) -> ort.InferenceSession:
    """A session as a script has it, with the optimiser's defaults; one thread that does not spin, as skiff's engine."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plain:
    """The graph of skl2onnx, as far as it got.

    Attributes:
        seconds: what the conversion took.
        size: bytes of the file; 0 where there is none.
        session: None where the graph cannot be made or loaded.
        problem: why not; empty otherwise.
    """

    seconds: float
    size: int = 0
    session: ort.InferenceSession | None = None
    problem: str = ""

    def feed(self, X: Any) -> Feed:
        """Rows (an array or a data frame) as this graph's inputs, numbers in the types it asks for."""
        assert self.session is not None
        inputs = self.session.get_inputs()
        if not hasattr(X, "columns"):
            return {inputs[0].name: np.asarray(X, _dtype(inputs[0].type))}
        columns = zip(inputs, X.columns, strict=True)
        return {node.name: X[name].to_numpy(_dtype(node.type)).reshape(-1, 1) for node, name in columns}


def _dtype(kind: str) -> type:
    return {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(string)": object}[kind]


def plain(pipeline: Any, X: Any, signature: Signature) -> Plain:
    """skl2onnx's graph for rows like ``X``, without ZipMap and with raw scores where these are the pipeline's."""
    options: dict[str, Any] = {"zipmap": False} if signature.task == "classifier" else {}
    if signature.task == "classifier" and signature.score == "decision_function":
        options["raw_scores"] = True
    model, problem, start = None, "", time.perf_counter()
    for targets in (None, {"": OPSET, ML_DOMAIN: ML_OPSET}):  # some converters refuse skl2onnx's own default
        start = time.perf_counter()
        try:
            model = to_onnx(pipeline, X[:1], options=options or None, target_opset=targets)
            break
        except Exception as e:  # noqa: BLE001 - whatever it raises is the finding
            problem = problem or f"not converted: {_short(e)}"
    seconds = time.perf_counter() - start
    if model is None:
        return Plain(seconds=seconds, problem=problem)
    data = model.SerializeToString()
    try:
        return Plain(seconds=seconds, size=len(data), session=session_of(data))
    except Exception as e:  # noqa: BLE001 - the same
        return Plain(seconds=seconds, size=len(data), problem=f"not loaded: {_short(e)}")


def verdict(peer: Plain, signature: Signature, table: Table, probes: Iterable[tuple[str, Rows]]) -> str:
    """``agrees``, or what is wrong on ``probes``, (kind, rows), by the tolerance that skiff itself is held to."""
    if peer.session is None:
        return peer.problem
    total = labels = 0
    wrong: Counter[str] = Counter()
    for kind, rows in probes:
        wanted = answers(signature, table, rows)
        kept = np.flatnonzero(wanted.accepted)
        if not kept.size:
            continue
        try:
            given = peer.session.run(None, peer.feed(table.restore(rows)))
        except Exception as e:  # noqa: BLE001 - the same
            return f"fails to run: {_short(e)}"
        found = _read(signature, given, len(rows))
        if found.scores.shape != wanted.scores.shape:
            return f"scores are {found.scores.shape[1]} wide, not {wanted.scores.shape[1]}"
        label, score = changed(found.at(kept), _in_float32(wanted).at(kept))
        total, labels = total + len(kept), labels + int(label.sum())
        wrong[kind] += int((label | score).sum())
    if not wrong.total():
        return "agrees"
    most = ", ".join(f"{kind} {count}" for kind, count in wrong.most_common(3) if count)
    return f"WRONG on {wrong.total():,} of {total:,} probes (labels: {labels:,}): {most}"


def _in_float32(wanted: Answers) -> Answers:
    """Scores beyond float32 as the infinities that a float32 output can only answer with."""
    with np.errstate(over="ignore"):
        narrow = wanted.scores.astype(np.float32)
    return replace(wanted, scores=np.where(np.isinf(narrow), narrow, wanted.scores))


def _read(signature: Signature, given: list[Any], rows: int) -> Answers:
    scores = np.asarray(given[-1], np.float64).reshape(rows, -1)
    labels = np.zeros((rows, 1), np.int64)
    if signature.labels:
        place = {label: index for index, label in enumerate(signature.single)}
        labels[:, 0] = [place.get(label, -1) for label in np.asarray(given[0]).reshape(-1).tolist()]
    return Answers(
        labels=labels, scores=scores, accepted=np.ones(rows, np.bool_), ties=np.zeros((rows, 1), np.bool_)
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 90 else text[:87] + "..."
