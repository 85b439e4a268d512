"""Builds the ONNX graph of a pipeline, step by step, in float64.

Every rule of a step (`converters.lowering.rules`) takes and gives a `Value`: a tensor of the graph with what is known
of it. Values hold float64 unless they say otherwise, and rules mirror scikit-learn's own formula in its own order, so
that what is left of the difference is the last bit of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from converters.optimize import INPUT, ML_DOMAIN
from edge_runtime.contract.errors import SkiffError, UnsupportedPipeline
from edge_runtime.contract.manifest import Label

Dtype = Literal["float64", "float32", "int64", "bool"]
Arithmetic = Literal["float32", "float64"]
Wide = NDArray[np.float64]
Shape = tuple[int | None, ...]

ONNX_TYPES: Final[dict[str, int]] = {
    "float64": TensorProto.DOUBLE,
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
_COMPARISONS: Final = frozenset(
    {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Xor"}
)


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """How columns of a value come from raw input columns, each from one, never decreasing in it.

    Attributes:
        sources: (W,) int64, the raw column behind each column; -1 where a column depends on several, or not in order.
        apply: raw rows (m, F) float64 to (m, W) float64 by the fitted steps themselves; bit for bit what the pipeline
            computes. Columns with source -1 hold anything.
        slope: (W,) with ``offset``: each column is slope·raw + offset; None when some step is not affine.
        offset: (W,).
    """

    sources: NDArray[np.int64]
    apply: Callable[[Wide], Wide]
    slope: Wide | None = None
    offset: Wide | None = None

    @property
    def complete(self) -> bool:
        """Whether every column has a source."""
        return bool((self.sources >= 0).all())


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor of the graph.

    Attributes:
        name: in the graph.
        shape: None stands for the number of rows: ``(None, W)`` for a matrix, ``(None,)`` for a vector.
        dtype: the type of its elements.
        vocabularies: per column the values that its codes 0, 1, … stand for, None for a column of numbers; empty when
            all are numbers. In a coded column -1 is any other value and NaN is a missing one.
        fold: where its columns come from, where that is known.
    """

    name: str
    shape: Shape
    dtype: Dtype = "float64"
    vocabularies: tuple[tuple[Label, ...] | None, ...] = ()
    fold: Fold | None = None

    @property
    def width(self) -> int:
        """The size of the last axis."""
        last = self.shape[-1]
        assert last is not None, f"{self.name} has no width"
        return last

    @property
    def coded(self) -> bool:
        """Whether some column holds codes instead of numbers."""
        return any(vocabulary is not None for vocabulary in self.vocabularies)


Operand = Value | NDArray[Any] | float | int


@dataclass(frozen=True, slots=True, eq=False)
class Ensemble:
    """Trees over raw input columns, for the rows that try their splits. Flat arrays over all N nodes of all trees.

    Attributes:
        tree: (N,) index of the tree.
        feature: (N,) raw column; 0 at a leaf.
        threshold: (N,) in the input's dtype, the largest raw value that goes left.
        left: (N,) index of the node where ``x <= threshold`` leads; -1 at a leaf.
        right: (N,) the other one.
        missing_left: (N,) bool, whether NaN goes left.
        value: (N, C) what a leaf adds to the scores.
    """

    tree: NDArray[np.int64]
    feature: NDArray[np.int64]
    threshold: NDArray[np.floating]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    missing_left: NDArray[np.bool_]
    value: Wide


Rule = Callable[["Lowering", Any, Value], Value]


@dataclass(slots=True, kw_only=True, eq=False)
class Lowering:
    """A graph in the making.

    Attributes:
        width: F, columns of the input.
        dtype: the input's type, ``float32`` or ``float64``.
        arithmetic: how the leaves of tree ensembles are summed.
        vocabularies: of the input's coded columns; see `Value`.
        rules: what lowers each (type, method).
        fallback: called for what has no rule; None refuses.
        notes: what a reader of the certificate should know, such as training rows inside the graph.
        edges: (raw column, values in the input's dtype) at which some step changes its answer.
        doubts: what may be behind a proof that fails, with a remedy, for steps that search among training rows.
        searches: whether some step answers by the nearest of its training rows, so that rows between them are tried.
        ensembles: tree ensembles whose splits are all over raw columns.
        barred: vectors (n,) bool of rows that some step refuses; see `bar`.
    """

    width: int
    dtype: Literal["float32", "float64"]
    rules: dict[tuple[type, str], Rule]
    arithmetic: Arithmetic = "float64"
    vocabularies: tuple[tuple[Label, ...] | None, ...] = ()
    fallback: Callable[[Lowering, Any, str, Value], Value] | None = None
    nodes: list[NodeProto] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    edges: list[tuple[int, NDArray[np.floating]]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    searches: bool = False
    ensembles: list[Ensemble] = field(default_factory=list)
    barred: list[Value] = field(default_factory=list)
    _constants: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    _tensors: list[TensorProto] = field(default_factory=list)
    _results: dict[Any, Any] = field(default_factory=dict)
    _keep: list[Any] = field(default_factory=list)
    _path: list[str] = field(default_factory=list)

    # --- the input ---------------------------------------------------------------------------------------------

    @property
    def input(self) -> Value:
        """The packed input in its own dtype, (n, F); codes in the coded columns."""
        return Value(INPUT, (None, self.width), self.dtype, self.vocabularies)

    def start(self) -> Value:
        """The input widened to float64: what the pipeline's first step takes."""
        numbers = np.array([not self._is_coded(j) for j in range(self.width)])
        fold = Fold(
            sources=np.where(numbers, np.arange(self.width), -1).astype(np.int64),
            apply=np.array,
            slope=np.ones(self.width),
            offset=np.zeros(self.width),
        )
        return replace(self.cast(self.input, "float64"), vocabularies=self.vocabularies, fold=fold)

    def _is_coded(self, column: int) -> bool:
        return bool(self.vocabularies) and self.vocabularies[column] is not None

    # --- steps -------------------------------------------------------------------------------------------------

    def call(self, fitted: Any, method: str, x: Value, step: str = "") -> Value:
        """What ``fitted.method`` makes of ``x``.

        ``predict`` gives a vector of class indices (into ``classes_``, or into (-1, 1) for an outlier detector, or the
        cluster's number) for whatever has classes, and float64 (n, targets) for a regressor; ``decision_function``
        (n, 1) for two classes. The same question asked twice is answered by the same nodes. ``step`` is the name that
        errors should show.

        Raises `UnsupportedPipeline` when there is no rule.
        """
        made: Value = self.memo(
            (id(fitted), method, x.name), lambda: self._call(fitted, method, x, step), fitted
        )
        return made

    def _call(self, fitted: Any, method: str, x: Value, step: str) -> Value:
        rule = self.rules.get((type(fitted), method))
        with self.inside(step):
            if rule is not None:
                return self._apply(rule, fitted, method, x)
            if self.fallback is not None:
                return self.fallback(self, fitted, method, x)
            raise self.refuse(
                fitted,
                f"has no {method} that can be converted",
                "use a step with a rule in converters/lowering",
            )

    def _apply(self, rule: Rule, fitted: Any, method: str, x: Value) -> Value:
        """What the rule makes; a state of ``fitted`` that nobody thought of is refused like any other."""
        try:
            return rule(self, fitted, x)
        except SkiffError:
            raise
        except Exception as e:
            raise self.refuse(
                fitted,
                f"is in a state that the rule for {method} does not know ({type(e).__name__}: {e})",
                "report this as a bug, and use another step, or other options, in its place",
            ) from e

    @contextmanager
    def inside(self, step: str) -> Iterator[None]:
        """Adds ``step`` to the path that errors show."""
        if step:
            self._path.append(step)
        try:
            yield
        finally:
            if step:
                self._path.pop()

    def memo(self, key: Any, make: Callable[[], Any], *keep: Any) -> Any:
        """``make()``, once per ``key``; ``keep`` are objects whose ids are in the key."""
        if key not in self._results:
            self._results[key] = make()
            self._keep.extend(keep)
        return self._results[key]

    def refuse(self, fitted: Any, reason: str, remedy: str) -> UnsupportedPipeline:
        """An error that names the step, the reason and a remedy; raise it."""
        kind = type(fitted).__name__
        where = f"step {'__'.join(self._path)!r} ({kind})" if self._path else kind
        return UnsupportedPipeline(f"{where} {reason}; {remedy}")

    def bar(self, rows: Value) -> None:
        """The step raises for rows where ``rows`` (n,) bool holds: their scores become NaN, and runtimes refuse them.

        For steps whose answer would not become NaN by itself, whatever comes behind them.
        """
        self.barred.append(rows)

    def note(self, text: str) -> None:
        """Something a reader of the certificate should know; said once."""
        if text not in self.notes:
            self.notes.append(text)

    def doubt(self, fitted: Any, reason: str, remedy: str) -> None:
        """What to say, and to do, where the proof finds this step wrong; no refusal, for it may never matter."""
        text = str(self.refuse(fitted, reason, remedy))
        if text not in self.doubts:
            self.doubts.append(text)

    # --- nodes -------------------------------------------------------------------------------------------------

    def constant(self, array: Any) -> str:
        """The name of a constant: float64 for floats, int64 for integers, bool; equal ones share a name."""
        data = np.asarray(array)
        if data.dtype.kind in "iu":
            data = data.astype(np.int64)
        elif data.dtype.kind == "f" and data.dtype != np.float32:
            data = data.astype(np.float64)
        data = np.ascontiguousarray(data).reshape(data.shape)  # ascontiguousarray makes 0-d arrays 1-d
        key = (data.dtype.str, data.shape, data.tobytes())
        if key not in self._constants:
            name = f"constant{len(self._constants)}"
            self._constants[key] = name
            self._tensors.append(numpy_helper.from_array(data, name))
        return self._constants[key]

    def node(
        self,
        kind: str,
        inputs: Sequence[Operand | str],
        shape: Shape,
        dtype: Dtype = "float64",
        *,
        ml: bool = False,
        **attributes: Any,
    ) -> Value:
        """One operator with one output of the given shape and dtype; arrays and numbers become constants."""
        (value,) = self.node_many(kind, inputs, [(shape, dtype)], ml=ml, **attributes)
        return value

    def node_many(
        self,
        kind: str,
        inputs: Sequence[Operand | str],
        outputs: Sequence[tuple[Shape, Dtype]],
        *,
        ml: bool = False,
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """One operator with several outputs."""
        names = [
            x.name if isinstance(x, Value) else x if isinstance(x, str) else self.constant(x) for x in inputs
        ]
        made = [f"value{len(self.nodes)}_{i}" for i in range(len(outputs))]
        self.nodes.append(helper.make_node(kind, names, made, domain=ML_DOMAIN if ml else "", **attributes))
        return tuple(Value(name, shape, dtype) for name, (shape, dtype) in zip(made, outputs, strict=True))

    @property
    def ensemble_nodes(self) -> int:
        """How many nodes sum the leaves of trees: what ``arithmetic`` matters to."""
        return sum(node.op_type.startswith("TreeEnsemble") for node in self.nodes)

    def graph(self) -> GraphProto:
        """The nodes and constants so far; `converters.optimize.optimise` makes a model of them."""
        return helper.make_graph(self.nodes, "skiff", [], [], self._tensors)

    # --- arithmetic --------------------------------------------------------------------------------------------

    def unary(self, kind: str, x: Value) -> Value:
        """An elementwise operator of one input, such as Exp, Sqrt, Abs, Neg, Floor, Round, IsNaN, Not."""
        dtype: Dtype = "bool" if kind in ("IsNaN", "IsInf", "Not") else x.dtype
        return self.node(kind, [x], x.shape, dtype)

    def binary(self, kind: str, a: Operand, b: Operand) -> Value:
        """An elementwise operator of two inputs with broadcasting, such as Add, Pow, Less, Equal and And.

        Arrays and numbers take the dtype of the other side.
        """
        dtype = a.dtype if isinstance(a, Value) else b.dtype if isinstance(b, Value) else "float64"
        left, right = (x if isinstance(x, Value) else np.asarray(x, dtype) for x in (a, b))
        result: Dtype = "bool" if kind in _COMPARISONS else dtype
        return self.node(kind, [left, right], _broadcast(left, right), result)

    def add(self, a: Operand, b: Operand) -> Value:
        """A + b."""
        return self.binary("Add", a, b)

    def sub(self, a: Operand, b: Operand) -> Value:
        """A - b."""
        return self.binary("Sub", a, b)

    def mul(self, a: Operand, b: Operand) -> Value:
        """A · b, element by element."""
        return self.binary("Mul", a, b)

    def div(self, a: Operand, b: Operand) -> Value:
        """A / b."""
        return self.binary("Div", a, b)

    def where(self, condition: Value, a: Operand, b: Operand) -> Value:
        """``a`` where ``condition`` holds, else ``b``."""
        dtype = a.dtype if isinstance(a, Value) else b.dtype if isinstance(b, Value) else "float64"
        left, right = (x if isinstance(x, Value) else np.asarray(x, dtype) for x in (a, b))
        shape = _broadcast(condition, _Shaped(_broadcast(left, right)))
        return self.node("Where", [condition, left, right], shape, dtype)

    def matmul(self, x: Value, weights: Wide, bias: Wide | None = None) -> Value:
        """(n, A) times (A, B), plus (B,)."""
        array = np.asarray(weights, np.float64)
        shape = (None, array.shape[1])
        if bias is None:
            return self.node("MatMul", [x, array], shape)
        return self.node("Gemm", [x, array, np.asarray(bias, np.float64)], shape)

    def cast(self, x: Value, dtype: Dtype) -> Value:
        """``x`` as another dtype; itself where it has that one already."""
        if x.dtype == dtype:
            return x
        made: Value = self.memo(
            (x.name, "cast", dtype),
            lambda: replace(self.node("Cast", [x], x.shape, dtype, to=ONNX_TYPES[dtype]), fold=x.fold),
        )
        return made

    def reduce(self, kind: str, x: Value, axis: int = 1, *, keepdims: bool = True) -> Value:
        """Sum, Max, Min, Mean, Prod, L2, SumSquare, LogSumExp over one axis."""
        shape = list(x.shape)
        axis %= len(shape)
        if keepdims:
            shape[axis] = 1
        else:
            del shape[axis]
        if kind == "Sum":
            return self.node(
                "ReduceSum", [x, np.array([axis])], tuple(shape), x.dtype, keepdims=int(keepdims)
            )
        return self.node(f"Reduce{kind}", [x], tuple(shape), x.dtype, axes=[axis], keepdims=int(keepdims))

    def argmax(self, x: Value) -> Value:
        """(n,) int64: the first column with the largest value, as `numpy.argmax`."""
        return self.node("ArgMax", [x], (None,), "int64", axis=1, keepdims=0)

    def argmin(self, x: Value) -> Value:
        """(n,) int64: the first column with the smallest value."""
        return self.node("ArgMin", [x], (None,), "int64", axis=1, keepdims=0)

    def softmax(self, x: Value) -> Value:
        """Softmax over the last axis."""
        return self.node("Softmax", [x], x.shape, axis=-1)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """``x`` with another shape; -1 is the number of rows."""
        known = tuple(None if size == -1 else size for size in shape)
        return self.node("Reshape", [x, np.asarray(shape, np.int64)], known, x.dtype)

    def column(self, x: Value) -> Value:
        """A vector (n,) as a column (n, 1)."""
        return self.reshape(x, (-1, 1))

    def vector(self, x: Value) -> Value:
        """A column (n, 1) as a vector (n,)."""
        return self.reshape(x, (-1,))

    def take(self, table: NDArray[Any], index: Value) -> Value:
        """Rows of a constant ``table`` by an int64 vector: (K, W) gives (n, W), (K,) gives (n,)."""
        dtype: Dtype = (
            "int64" if table.dtype.kind in "iu" else "bool" if table.dtype.kind == "b" else "float64"
        )
        return self.node("Gather", [table, index], (*index.shape, *table.shape[1:]), dtype, axis=0)

    def select(self, x: Value, columns: Sequence[int] | NDArray[np.integer]) -> Value:
        """Columns of a matrix, in this order; keeps their fold and vocabularies."""
        at = np.asarray(columns, np.int64).reshape(-1)
        if np.array_equal(at, np.arange(x.width)):
            return x
        fold = None
        if x.fold is not None:
            whole = x.fold
            fold = Fold(
                sources=whole.sources[at],
                apply=lambda raw: whole.apply(raw)[:, at],
                slope=None if whole.slope is None else whole.slope[at],
                offset=None if whole.offset is None else whole.offset[at],
            )
        made: Value = self.memo(
            (x.name, "select", at.tobytes()),
            lambda: replace(
                self.node("Gather", [x, at], (None, len(at)), x.dtype, axis=1),
                vocabularies=tuple(x.vocabularies[j] for j in at) if x.vocabularies else (),
                fold=fold,
            ),
        )
        return made

    def concat(self, values: Sequence[Value]) -> Value:
        """Matrices of one dtype side by side; keeps folds where all have one, and vocabularies."""
        parts = [value for value in values if value.width]
        if len(parts) == 1:
            return parts[0]
        made = self.node("Concat", parts, (None, sum(v.width for v in parts)), parts[0].dtype, axis=1)
        vocabularies: tuple[tuple[Label, ...] | None, ...] = ()
        if any(v.coded for v in parts):
            vocabularies = tuple(word for v in parts for word in (v.vocabularies or (None,) * v.width))
        return replace(made, vocabularies=vocabularies, fold=_joined(parts))

    def columnwise(
        self, x: Value, made: Value, apply: Callable[[Wide], Wide], *, slope: Any = None, offset: Any = None
    ) -> Value:
        """``made`` with the fold of ``x`` carried through a step that never decreases, column by column.

        ``apply`` is the fitted step on (m, W) float64 rows; ``slope`` and ``offset`` (W,) say that it is affine.
        """
        if x.fold is None:
            return made
        before = x.fold
        affine = slope is not None and before.slope is not None and before.offset is not None
        return replace(
            made,
            fold=Fold(
                sources=before.sources,
                apply=lambda raw: np.asarray(apply(before.apply(raw)), np.float64),
                slope=np.asarray(slope * before.slope) if affine else None,
                offset=np.asarray(slope * before.offset + offset) if affine else None,
            ),
        )


@dataclass(frozen=True, slots=True)
class _Shaped:
    shape: Shape


def _broadcast(a: Any, b: Any) -> Shape:
    one, two = (tuple(x.shape) for x in (a, b))
    size = max(len(one), len(two))
    one, two = ((1,) * (size - len(shape)) + shape for shape in (one, two))
    return tuple(
        p if q == 1 else q if p == 1 else p if q is None else q for p, q in zip(one, two, strict=True)
    )


def _joined(parts: Sequence[Value]) -> Fold | None:
    folds = [value.fold for value in parts]
    if all(fold is None for fold in folds):
        return None
    known = [
        Fold(sources=np.full(value.width, -1, np.int64), apply=_nothing(value.width))
        if fold is None
        else fold
        for value, fold in zip(parts, folds, strict=True)
    ]
    slopes, offsets = [fold.slope for fold in known], [fold.offset for fold in known]
    affine = all(part is not None for part in (*slopes, *offsets))
    return Fold(
        sources=np.concatenate([fold.sources for fold in known]),
        apply=lambda raw: np.concatenate([fold.apply(raw) for fold in known], axis=1),
        slope=np.concatenate([part for part in slopes if part is not None]) if affine else None,
        offset=np.concatenate([part for part in offsets if part is not None]) if affine else None,
    )


def _nothing(width: int) -> Callable[[Wide], Wide]:
    return lambda raw: np.zeros((len(raw), width))
