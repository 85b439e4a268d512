"""The model itself: one ONNX Runtime session on the CPU. The only onnxruntime import.

The session serves what was proven: the graph was optimised when it was converted, so the runtime's own optimiser
stays off (a hostile file cannot exploit constant folding either). One thread, because a device shares its cores and
ONNX Runtime promises no determinism across thread counts; no spinning, because a spin-wait burns the core; no arena
and no memory pattern, because both only ever grow.
"""

import ctypes
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_native

from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, InputError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.manifest import ArtifactInfo, read_info

Rows = NDArray[Any]
"""Float32, or float64 where the manifest's ``input_dtype`` says so."""
Labels = NDArray[np.int64]
Scores = NDArray[np.float32]

_FLOAT_TENSOR: Final = "tensor(float)"
_INPUT_TENSORS: Final = {"float32": _FLOAT_TENSOR, "float64": "tensor(double)"}
_INTEGER_TENSOR: Final = "tensor(int64)"

_Run = Callable[[], object]
# Every exception type that the extension defines, and what pybind11 makes of C++'s own.
_ORT_ERRORS: Final[tuple[type[Exception], ...]] = (
    *(
        kind
        for kind in vars(ort_native).values()
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception
    ),
    RuntimeError,
    ValueError,
    TypeError,
)


class Engine:
    """A verified artifact, ready to predict.

    ``model`` is the path of an artifact or its bytes. The digest is checked against ``expect`` before anything is
    parsed, the manifest is read before the graph is loaded, and a graph that is not what its manifest says is
    refused. What was hashed is what is loaded: a path is read once.

    `run` may be called from several threads. Blocks made by `bind` are each their caller's to guard.

    Attributes:
        info: what the artifact says about itself.
        digest: SHA-256 of the file.
        features: F, the width of a row.
        dtype: of the rows, float32 or float64.
        width: C, the width of a score.

    Raises:
        ArtifactError: the file is missing, cut short, foreign, not ``expect``, or not what its manifest says.
        BudgetExceeded: the session does not fit into the memory this process may have.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        threads: int = 1,
        max_batch: int = 4096,
        expect: Digest | None = None,
    ) -> None:
        if threads < 1 or max_batch < 1:
            raise ValueError(f"threads {threads} and max_batch {max_batch} must be at least 1")
        where, data = _read(model)
        self.digest: Final = digest_of(data)
        if expect is not None and self.digest != expect:
            raise ArtifactError(
                f"{where}: SHA-256 is {self.digest}, expected {expect}: fetch the model again"
            )
        try:
            self.info: Final[ArtifactInfo] = read_info(data)
        except ArtifactError as e:
            raise ArtifactError(f"{where}: {e}") from e
        manifest = self.info.manifest
        self.features: Final = len(manifest.features)
        self.dtype: Final[np.dtype[Any]] = np.dtype(manifest.input_dtype)
        sizes = [len(labels) for labels in manifest.outputs]
        self._classes: Final = sizes[0] if len(sizes) == 1 and not manifest.multilabels else 0
        self._sizes: Final = np.array(sizes, np.uint64)
        self._label_shape: Final = (len(sizes),) if manifest.multilabels else ()
        self._where: Final = where
        self._max_batch: Final = max_batch
        self._outputs: Final = [name for name in (manifest.label_output, manifest.score_output) if name]
        self._session: ort.InferenceSession | None = _session(data, threads, where)
        del data
        self._check_signature(self._session)
        self.width: Final = self._probe_width(self._session)
        self._single_shapes: Final = ((self.features,), (1, self.features))
        self._lock: Final = threading.Lock()
        self._single: Block | None = Block(self._session, self.info, self.width, slots=1)
        trim_memory()

    def run(self, rows: Rows) -> tuple[Labels | None, Scores]:
        """Predicts ``rows``, (n, F) or one row (F,), of `dtype`; n may be 0.

        Columns of categories hold codes (see `Feature`). Returns class indices (n,) int64, (n, K) for K label outputs,
        None for a regressor, and scores (n, C) float32; the caller owns both. Values are not checked: NaN and
        infinities go through the graph as they are.

        Raises:
            InputError: ``rows`` has another width or dtype.
            ArtifactError: the graph failed, or answered with something its manifest does not allow.
        """
        if rows.dtype is not self.dtype and rows.dtype != self.dtype:  # `is` is quick, `!=` is right
            raise InputError("type", f"rows are {rows.dtype}; {self.dtype} is needed")
        if rows.shape in self._single_shapes:
            return self._run_single(rows)
        if rows.ndim != 2 or rows.shape[1] != self.features:
            raise InputError("width", f"rows have shape {rows.shape}; (n, {self.features}) is needed")
        session = self._open()
        classifier = bool(self.info.manifest.label_output)
        labels = np.empty((len(rows), *self._label_shape), np.int64)
        scores = np.empty((len(rows), self.width), np.float32)
        for start in range(0, len(rows), self._max_batch):
            part = np.ascontiguousarray(rows[start : start + self._max_batch])
            *found, scored = self._run_session(session, part)
            shape = (len(part), *self._label_shape)
            if scored.shape != (len(part), self.width) or any(x.shape != shape for x in found):
                raise ArtifactError(f"{self._where}: {len(part)} rows gave scores of shape {scored.shape}")
            scores[start : start + len(part)] = scored
            if classifier:
                labels[start : start + len(part)] = found[0]
        return (self._checked(labels) if classifier else None), scores

    def bind(self, slots: int) -> "Block":
        """A block of ``slots`` rows bound to the session, for a caller that guards it with a lock of its own."""
        return Block(self._open(), self.info, self.width, slots=slots)

    def close(self) -> None:
        """Drops the session and its memory; further calls raise `ArtifactError`. Blocks keep theirs until dropped."""
        with self._lock:
            self._session = None
            self._single = None
        trim_memory()

    def _open(self) -> ort.InferenceSession:
        session = self._session
        if session is None:
            raise self._closed()
        return session

    def _closed(self) -> ArtifactError:
        return ArtifactError(f"{self._where}: the engine is closed; build a new one")

    def _run_single(self, row: Rows) -> tuple[Labels | None, Scores]:
        with self._lock:
            block = self._single
            if block is None:
                raise self._closed()
            block.rows[...] = row
            try:
                block.runs[0]()
            except Block.failures as e:
                raise ArtifactError(f"{self._where}: the graph failed on one row: {e}") from e
            scores = block.scores.copy()
            labels = None if block.labels is None else block.labels.copy()
        # With several outputs there are 0 classes here, and all of them are looked at.
        if labels is not None and not 0 <= labels.item(0) < self._classes:
            self._checked(labels)
        return labels, scores

    def _run_session(self, session: ort.InferenceSession, rows: Rows) -> list[NDArray[Any]]:
        try:
            found: list[NDArray[Any]] = session.run(self._outputs, {self.info.manifest.input_name: rows})
        except MemoryError as e:
            raise BudgetExceeded(
                f"{self._where}: {len(rows)} rows do not fit into memory; lower max_batch"
            ) from e
        except _ORT_ERRORS as e:
            raise ArtifactError(f"{self._where}: the graph failed on {len(rows)} rows: {e}") from e
        return found

    def _checked(self, labels: Labels) -> Labels:
        # As unsigned numbers the negative ones are the largest: one comparison finds both.
        beyond = labels.view(np.uint64) >= self._sizes
        if beyond.any():
            at = tuple(int(k[0]) for k in np.nonzero(beyond))
            where = f" for output {at[1]}" if self._label_shape else ""
            classes = self._sizes[at[1] if self._label_shape else 0]
            raise ArtifactError(
                f"{self._where}: the graph answered class {labels[at]}{where}; the manifest has {classes}"
            )
        return labels

    def _check_signature(self, session: ort.InferenceSession) -> None:
        manifest = self.info.manifest
        inputs = [(node.name, node.type, list(node.shape)) for node in session.get_inputs()]
        name, kind, shape = inputs[0] if len(inputs) == 1 else ("", "", [])
        free = len(shape) == 2 and not isinstance(shape[0], int) and shape[1] == self.features
        needed = _INPUT_TENSORS[manifest.input_dtype]
        if name != manifest.input_name or kind != needed or not free:
            raise ArtifactError(
                f"{self._where}: graph inputs are {inputs}; the manifest needs one, "
                f"{manifest.input_name!r} {needed} [n, {self.features}]"
            )
        outputs = {node.name: node.type for node in session.get_outputs()}
        wanted = {manifest.score_output: _FLOAT_TENSOR}
        if manifest.label_output:
            wanted[manifest.label_output] = _INTEGER_TENSOR
        if outputs != wanted:
            raise ArtifactError(f"{self._where}: graph outputs are {outputs}; the manifest needs {wanted}")

    def _probe_width(self, session: ort.InferenceSession) -> int:
        # Declared output shapes may be symbolic: a golden row tells.
        *found, scores = self._run_session(session, self.info.golden.rows[:1])
        manifest = self.info.manifest
        width = int(scores.shape[1]) if scores.ndim == 2 and len(scores) == 1 else 0
        allowed: tuple[int, ...] = ()
        if manifest.multilabels:
            allowed = (int(self._sizes.sum()), len(self._sizes))
        elif manifest.labels and manifest.score in ("predict_proba", "predict"):
            allowed = (len(manifest.labels),)
        shape = (1, *self._label_shape)
        if width < 1 or (allowed and width not in allowed) or any(x.shape != shape for x in found):
            needed = " or ".join(str(c) for c in allowed) or "1 or more"
            raise ArtifactError(
                f"{self._where}: one row gave scores of shape {scores.shape} and labels of shape "
                f"{[x.shape for x in found]}; a {manifest.task} with {[len(x) for x in manifest.outputs]} labels and "
                f"score {manifest.score!r} needs (1, {needed}) and {shape if manifest.outputs else 'none'}"
            )
        return width


class Block:
    """``slots`` rows of memory that the session reads and writes in place; not thread-safe.

    Write a row into ``rows[i]``, call ``runs[i]()``, read ``scores[i]`` and ``labels[i]``: no allocation, no copy and
    no lookup of names. The calls raise `failures`; whether a label lies in range is the caller's to check. The block
    owns the memory: hold it as long as anything made from it.

    Attributes:
        rows: (slots, F) of the manifest's ``input_dtype``.
        labels: (slots,) int64, (slots, K) for K label outputs, None for a regressor.
        scores: (slots, C) float32.
        runs: one callable per slot.
    """

    __slots__ = ("labels", "rows", "runs", "scores")

    failures: Final[tuple[type[Exception], ...]] = (MemoryError, *_ORT_ERRORS)

    def __init__(self, session: ort.InferenceSession, info: ArtifactInfo, width: int, *, slots: int) -> None:
        manifest = info.manifest
        self.rows: Final[Rows] = np.zeros((slots, len(manifest.features)), manifest.input_dtype)
        self.scores: Final[Scores] = np.zeros((slots, width), np.float32)
        shape = (slots, len(manifest.multilabels)) if manifest.multilabels else (slots,)
        self.labels: Final[Labels | None] = np.zeros(shape, np.int64) if manifest.label_output else None
        runs = []
        for i in range(slots):
            binding = session.io_binding()
            binding.bind_ortvalue_input(manifest.input_name, _shared(self.rows[i : i + 1]))
            binding.bind_ortvalue_output(manifest.score_output, _shared(self.scores[i : i + 1]))
            if self.labels is not None:
                binding.bind_ortvalue_output(manifest.label_output, _shared(self.labels[i : i + 1]))
            runs.append(_bound_run(session, binding))
        self.runs: Final[tuple[_Run, ...]] = tuple(runs)


def trim_memory() -> None:
    """Returns freed heap pages to the system where the C library can (glibc); elsewhere does nothing.

    Building a session leaves some 10 MB of freed pages behind.
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


def _find_malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


_MALLOC_TRIM: Final = _find_malloc_trim()


def _read(model: str | Path | bytes) -> tuple[str, bytes]:
    if isinstance(model, bytes):
        return "model", model
    try:
        return str(model), Path(model).read_bytes()
    except OSError as e:
        raise ArtifactError(f"{model}: cannot be read ({e.strerror})") from e


def _session(data: bytes, threads: int, where: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # what goes wrong is raised; nothing of a hostile file reaches the log
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except MemoryError as e:
        raise BudgetExceeded(f"{where}: the model does not fit into the memory this process may have") from e
    except _ORT_ERRORS as e:
        raise ArtifactError(f"{where}: ONNX Runtime {ort.__version__} refuses the graph: {e}") from e


def _shared(array: NDArray[Any]) -> ort.OrtValue:
    """An OrtValue on the array's own memory (on the CPU `ortvalue_from_numpy` does not copy)."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def _bound_run(session: ort.InferenceSession, binding: ort.IOBinding) -> _Run:
    """One call that runs the session on its bound buffers.

    The public method checks for GPU graph capture at each call, which costs a third of a small model; the native one
    is not part of ONNX Runtime's interface, so its absence falls back to the public method.
    """
    native = getattr(getattr(session, "_sess", None), "run_with_iobinding", None)
    inner = getattr(binding, "_iobinding", None)
    if native is None or inner is None:
        return partial(session.run_with_iobinding, binding)
    return partial(native, inner, None)
