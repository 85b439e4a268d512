"""The model itself: one ONNX Runtime session on the CPU. The only onnxruntime import.

The session serves what was proven: the graph was optimised when it was converted, so the runtime's own optimiser
stays off (a hostile file cannot exploit constant folding either). One thread, because a device shares its cores and
ONNX Runtime promises no determinism across thread counts; no spinning, because a spin-wait burns the core; no arena
unless asked for and no memory pattern, because both only ever grow.

From 1.29 on, ONNX Runtime's official builds for Linux report each session to their maker, over HTTPS, from threads of
their own. A device sends nothing that it was not told to: importing this module turns that off for the process, unless
the environment has ``ORT_DISABLE_TELEMETRY`` already. It is read when ONNX Runtime is imported; a program that does
that itself before has decided for itself. https://github.com/microsoft/onnxruntime/blob/main/docs/Privacy.md
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime import golden
from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, InputError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.manifest import ArtifactInfo, Manifest, read_info
from edge_runtime.runlimit import Run, RunLimit, Watched

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_native

Rows = NDArray[Any]
"""Float32, or float64 where the manifest's ``input_dtype`` says so."""
Labels = NDArray[np.int64]
Scores = NDArray[np.float32]

_FLOAT_TENSOR: Final = "tensor(float)"
_INPUT_TENSORS: Final = {"float32": _FLOAT_TENSOR, "float64": "tensor(double)"}
_INTEGER_TENSOR: Final = "tensor(int64)"

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


class Works:
    """Whether any thread is at some work: a context that several may be in at once.

    Who enters waits until ``other`` is not being worked at, 10 ms at most: by then, none begins that heeds this.
    """

    __slots__ = ("_lock", "_other", "_threads")

    def __init__(self, other: "Works | None" = None) -> None:
        self._lock: Final = threading.Lock()
        self._other: Final = other
        self._threads = 0

    def __enter__(self) -> None:
        with self._lock:
            self._threads += 1
        for _ in range(_WAITS):
            if not self._other:
                break
            time.sleep(_WAIT_SECONDS)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads -= 1

    def __bool__(self) -> bool:
        return self._threads > 0


_WAITS: Final = 10
_WAIT_SECONDS: Final = 0.001

counting: Final = Works()
"""Rows are counted by the thread that predicts: numpy gives up the interpreter at each step, and to get it back from
one that loads a model takes a switch interval each time."""

building: Final = Works(counting)
"""An engine is built, or put into service."""


class Engine:
    """A verified artifact, ready to predict.

    ``model`` is the path of an artifact or its bytes. The digest is checked against ``expect`` before anything is
    parsed, the manifest is read before the graph is loaded, and a graph that is not what its manifest says is
    refused. What was hashed is what is loaded: nothing is read after that.

    `run` may be called from several threads. Blocks made by `bind` are each their caller's to guard.

    Args:
        model: a path, or the bytes.
        threads: how many threads ONNX Runtime computes with.
        max_batch: more rows than these are run in parts.
        expect: the digest that the file must have.
        arena: whether ONNX Runtime keeps what it allocated for the next run. It makes runs of large batches steadier
            and never gives memory back.
        run_limit_seconds: a run of one part that takes longer is ended, at the next node of its graph, and raises
            `BudgetExceeded`; 0 for no limit, which costs nothing.
        run_clock_ns: what that time is taken from.

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
        arena: bool = False,
        run_limit_seconds: float = 0.0,
        run_clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if threads < 1 or max_batch < 1:
            raise ValueError(f"threads {threads} and max_batch {max_batch} must be at least 1")
        if run_limit_seconds < 0:
            raise ValueError(f"run_limit_seconds {run_limit_seconds} must be at least 0")
        with building:
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
            self._session: ort.InferenceSession | None = _session(data, threads, where, arena=arena)
            del data
            self._limit: Final = RunLimit(run_limit_seconds, run_clock_ns) if run_limit_seconds else None
            self._check_signature(self._session)
            self.width: Final = self._probe_width(self._session)
            self._single_shapes: Final = ((self.features,), (1, self.features))
            self._lock: Final = threading.Lock()
            self._single: Block | None = self.bind()
            trim_memory()

    def run(self, rows: Rows, *, max_batch: int = 0) -> tuple[Labels | None, Scores]:
        """Predicts ``rows``, (n, F) or one row (F,), of `dtype`; n may be 0.

        More rows than ``max_batch`` are run in parts, where that is not 0 and below the engine's own.

        Columns of categories hold codes (see `Feature`). Returns class indices (n,) int64, (n, K) for K label outputs,
        None for a regressor, and scores (n, C) float32; the caller owns both. Values are not checked: NaN and
        infinities go through the graph as they are.

        Raises:
            InputError: ``rows`` has another width or dtype.
            ArtifactError: the graph failed, or answered with something its manifest does not allow.
            BudgetExceeded: the rows do not fit into memory, or take longer than the engine's limit.
        """
        if rows.dtype is not self.dtype and rows.dtype != self.dtype:  # `is` is quick, `!=` is right
            raise InputError("type", f"rows are {rows.dtype}; {self.dtype} is needed")
        if rows.shape in self._single_shapes:
            return self._run_single(rows)
        if rows.ndim != 2 or rows.shape[1] != self.features:
            raise InputError("width", f"rows have shape {rows.shape}; (n, {self.features}) is needed")
        session = self._open()
        most = min(self._max_batch, max_batch or self._max_batch)
        if 0 < len(rows) <= most:
            labels, scores = self._run_part(session, rows)
        else:
            labels = np.empty((len(rows), *self._label_shape), np.int64) if self._sizes.size else None
            scores = np.empty((len(rows), self.width), np.float32)
            for start in range(0, len(rows), most):
                part = slice(start, start + most)
                found, scores[part] = self._run_part(session, rows[part])
                if labels is not None and found is not None:
                    labels[part] = found
        return (None if labels is None else self._checked(labels)), scores

    def _run_part(self, session: ort.InferenceSession, rows: Rows) -> tuple[Labels | None, Scores]:
        n = len(rows)
        *found, scores = self._run_session(session, np.ascontiguousarray(rows))
        if scores.shape != (n, self.width) or any(x.shape != (n, *self._label_shape) for x in found):
            raise ArtifactError(f"{self._where}: {n} rows gave scores of shape {scores.shape}")
        return (found[0] if found else None), scores

    def bind(self) -> "Block":
        """Memory bound to the session, for a caller that guards it with a lock of its own."""
        return Block(self._open(), self.info, self.width, self._limit)

    def golden_problem(self) -> str:
        """What is wrong when one golden row is asked again; empty when it still gives the pipeline's answer."""
        try:
            labels, scores = self.run(self.info.golden.rows[0])
        except (ArtifactError, BudgetExceeded) as e:
            return str(e)
        return golden.problem(self.info, labels, scores, slice(0, 1))

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
            block.row[...] = row
            try:
                block.run()
            except Block.failures as e:
                raise ArtifactError(f"{self._where}: the graph failed on one row: {e}") from e
            scores = block.scores[None].copy()
            labels = None if block.labels is None else block.labels.reshape(1, *self._label_shape).copy()
        # With several outputs there are 0 classes here, and all of them are looked at.
        if labels is not None and not 0 <= labels.item(0) < self._classes:
            self._checked(labels)
        return labels, scores

    def _run_session(self, session: ort.InferenceSession, rows: Rows) -> list[NDArray[Any]]:
        options, watched = _run_options(self._limit)
        run = partial(session.run, self._outputs, {self.info.manifest.input_name: rows}, options)
        try:
            found: list[NDArray[Any]] = run() if watched is None else watched(run)  # type: ignore[assignment]
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
    """Memory for one row and its answer that the session reads and writes in place; not thread-safe.

    Write ``row``, call ``run()``, read ``scores`` and ``labels``: no allocation, no copy and no lookup of names. The
    call raises `failures`, and `BudgetExceeded` beyond the engine's limit; whether a label lies in range is for the
    caller to check. ``memory.tobytes()`` is a record of all three, as ``layout`` says. The block owns the memory: hold
    it as long as anything made from it.

    Attributes:
        layout: of the record: ``labels``, ``row``, and behind it without a gap ``scores``.
        memory: (layout.itemsize,) uint8.
        row: (F,) of the manifest's ``input_dtype``.
        labels: (1,) int64, (K,) for K label outputs, None for a regressor.
        scores: (C,) float32.
        run: one prediction.
    """

    __slots__ = ("labels", "layout", "memory", "row", "run", "scores")

    failures: Final[tuple[type[Exception], ...]] = (MemoryError, *_ORT_ERRORS)

    def __init__(
        self, session: ort.InferenceSession, info: ArtifactInfo, width: int, limit: RunLimit | None = None
    ) -> None:
        manifest = info.manifest
        self.layout: Final = _layout(manifest, width)
        self.memory: Final = np.zeros(self.layout.itemsize, np.uint8)
        found = self.memory.view(self.layout)
        self.row: Final[Rows] = found["row"][0]
        self.scores: Final[Scores] = found["scores"][0]
        binding = session.io_binding()
        binding.bind_ortvalue_input(manifest.input_name, _shared(found["row"]))
        binding.bind_ortvalue_output(manifest.score_output, _shared(found["scores"]))
        self.labels: Final[Labels | None] = found["labels"].reshape(-1) if manifest.label_output else None
        if manifest.label_output:
            binding.bind_ortvalue_output(manifest.label_output, _shared(found["labels"]))
        options, watched = _run_options(limit)
        run = _bound_run(session, binding, options)
        self.run: Final[Run] = run if watched is None else partial(watched, run)


def _layout(manifest: Manifest, width: int) -> np.dtype[Any]:
    """Labels lead, because eight bytes must be aligned; the record's size is a multiple of eight for the next one."""
    shape = (len(manifest.multilabels),) if manifest.multilabels else ()
    parts: dict[str, tuple[Any, int]] = {}
    size = 0
    if manifest.label_output:
        parts["labels"] = ((np.int64, shape), size)
        size += 8 * max(1, len(manifest.multilabels))
    parts["row"] = ((manifest.input_dtype, (len(manifest.features),)), size)
    size += np.dtype(manifest.input_dtype).itemsize * len(manifest.features)
    parts["scores"] = ((np.float32, (width,)), size)
    size += 4 * width
    return np.dtype(
        {
            "names": list(parts),
            "formats": [kind for kind, _ in parts.values()],
            "offsets": [offset for _, offset in parts.values()],
            "itemsize": -(-size // 8) * 8,
        }
    )


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
        return str(model), _read_file(Path(model))
    except OSError as e:
        raise ArtifactError(f"{model}: cannot be read ({e.strerror})") from e


def _read_file(path: Path) -> bytes:
    """A worn sector may read well the second time, and what is judged by it would be held against the model."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError:
        return path.read_bytes()


def _session(data: bytes, threads: int, where: str, *, arena: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = arena
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


def _run_options(limit: RunLimit | None) -> tuple[ort.RunOptions, Watched | None]:
    """Options of one run after another, and what watches these where there is a limit.

    They are made once because ONNX Runtime makes its own for every run that comes without: a fifth of a small model.
    """
    options = ort.RunOptions()
    options.log_severity_level = 4

    def terminate(wanted: bool) -> None:  # noqa: FBT001 - what it is called for
        options.terminate = wanted

    return options, None if limit is None else limit.watch(terminate)


def _bound_run(session: ort.InferenceSession, binding: ort.IOBinding, options: ort.RunOptions) -> Run:
    """One call that runs the session on its bound buffers.

    The public method checks for GPU graph capture at each call, which costs a third of a small model; the native one
    is not part of ONNX Runtime's interface, so its absence falls back to the public method.
    """
    native = getattr(getattr(session, "_sess", None), "run_with_iobinding", None)
    inner = getattr(binding, "_iobinding", None)
    if native is None or inner is None:
        return partial(session.run_with_iobinding, binding, options)
    return partial(native, inner, options)
