"""Training rows as the user has them, as a device sends them, and back.

A device sends one packed row of numbers. A column of numbers travels as it is; a column of categories (text, truth
values in an object column, a pandas categorical) as a code: its place in the column's vocabulary, -1 for any other
value, NaN for a missing one.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from converters.categories import known_values
from converters.signature import Signature, by_position
from edge_runtime.contract import ids
from edge_runtime.contract.errors import InputError, UnsupportedPipeline
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.manifest import Label

Rows = NDArray[np.floating]
InputDtype = Literal["float32", "float64"]

STRANGERS: Final = ("", " ", "nan", "None", "\N{SNOWMAN}", "0", "no such category", "x" * 200, "\u0130\u0307")
"""Values that no vocabulary should know; those that one does know are left out."""

_TRIED: Final = 64


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One input column.

    Attributes:
        name: as in the data frame.
        vocabulary: what its codes stand for, the most frequent first; None for a column of numbers.
        missing: what the training rows hold where a value is missing: None or NaN.
        rebuild: a list of Python values back to a column of the kind the user passed.
    """

    name: str
    vocabulary: tuple[Label, ...] | None
    missing: object
    rebuild: Callable[[list[Any]], Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Rows that fit a pipeline.

    Attributes:
        columns: (F,) the input columns.
        given: the rows as the user passed them.
        wide: (n, F) float64, codes in columns of categories.
        assemble: F columns to what the pipeline takes; None where it takes the float64 rows as they are.
    """

    columns: tuple[Column, ...]
    given: Any
    wide: NDArray[np.float64]
    assemble: Callable[[list[Any]], Any] | None

    @property
    def names(self) -> tuple[str, ...]:
        """(F,) column names."""
        return tuple(column.name for column in self.columns)

    @property
    def vocabularies(self) -> tuple[tuple[Label, ...] | None, ...]:
        """(F,) vocabularies; empty when every column is one of numbers."""
        found = tuple(column.vocabulary for column in self.columns)
        return found if any(vocabulary is not None for vocabulary in found) else ()

    @property
    def coded(self) -> NDArray[np.bool_]:
        """(F,) bool, which columns hold codes."""
        return np.array([column.vocabulary is not None for column in self.columns])

    def rows(self, dtype: InputDtype) -> Rows:
        """(n, F) what a device would send."""
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(self.wide.astype(dtype))

    def restore(self, rows: Rows, *, seed: int = 0) -> Any:
        """Coded rows (m, F) as the pipeline takes them: numbers widened, codes as values, -1 as some stranger."""
        wide = rows.astype(np.float64)
        if self.assemble is None:
            return wide
        rng = np.random.default_rng(seed)
        columns = []
        for j, column in enumerate(self.columns):
            if column.vocabulary is None:
                columns.append(wide[:, j])
                continue
            columns.append(column.rebuild(_decoded(column, wide[:, j], rng)))
        return self.assemble(columns)


def read(signature: Signature, X: Any, *, vocabularies: tuple[tuple[Label, ...] | None, ...] = ()) -> Table:
    """Reads ``X``, an (n, F) array of numbers or objects, or a pandas or polars data frame.

    ``vocabularies`` (F,) are those of an artifact that exists already; without them the rows and the pipeline's own
    encoders say what the categories are.

    Columns get the frame's names, else those the pipeline was fitted with, else ``x0``, ``x1``, …

    Raises:
        UnsupportedPipeline: a column can be neither read as numbers nor as categories, or the names are not the
            pipeline's.
        InputError: the shape is wrong, or a value is infinite or too large for float64.
    """
    if hasattr(X, "toarray"):
        raise UnsupportedPipeline("X is a sparse matrix, and devices send dense rows; pass X.toarray()")
    if np.ma.isMaskedArray(X):
        raise InputError("type", "X is a masked array; pass X.filled(numpy.nan), or fill its gaps otherwise")
    if hasattr(X, "collect"):
        raise InputError("type", "X is a lazy frame, which holds no rows yet; pass X.collect()")
    if not hasattr(X, "columns"):
        X = _array(X)
    names = _names(signature, X)
    shape = tuple(X.shape)
    if len(shape) != 2 or shape[1] != signature.width or not shape[0]:
        raise InputError(
            "width", f"X has shape {shape}; the pipeline takes (n, {signature.width}) with n > 0"
        )
    if isinstance(X, np.ndarray) and X.dtype.kind in "biuf":
        wide = X.astype(np.float64)
        columns = tuple(Column(name, None, math.nan, list) for name in names)
        frame = _assembler(signature, wide, _framed(names))
        given = X if frame is None else frame(list(wide.T))
        return _checked(Table(columns=columns, given=given, wide=wide, assemble=frame))
    known = known_values(signature.pipeline, signature.width)
    fixed = vocabularies or (None,) * len(names)
    series = [X[:, j] for j in range(len(names))] if isinstance(X, np.ndarray) else [X[c] for c in X.columns]
    parts = [
        _read_column(name, one, values, vocabulary)
        for name, one, values, vocabulary in zip(names, series, known, fixed, strict=True)
    ]
    if not vocabularies:
        at = [j for j, (column, _) in enumerate(parts) if column.vocabulary is None and _in_doubt(series[j])]
        numbers = {j: parts[j][1] for j in at}
        if not _alike(signature, X, numbers):
            for j in at:
                if not _alike(signature, X, {j: numbers[j]}):
                    parts[j] = _read_column(names[j], series[j], known[j], None, categorical=True)
    wide = np.stack([codes for _, codes in parts], axis=1)
    columns = tuple(column for column, _ in parts)
    assemble: Callable[[list[Any]], Any] | None = _objects if isinstance(X, np.ndarray) else _like(X)
    if assemble is not None and all(column.vocabulary is None for column in columns):
        assemble = _assembler(signature, wide, assemble)
    return _checked(Table(columns=columns, given=X, wide=wide, assemble=assemble))


def _array(X: Any) -> NDArray[Any]:
    try:
        found = np.asarray(X)
    except ValueError as e:
        raise InputError("width", f"X is no table ({e}); give every row the same number of values") from e
    return found.astype(object) if found.dtype.kind in "US" else found


def training_digest(table: Table, y: Any) -> Digest:
    """SHA-256 over the shape and the float32 bytes of the rows, then over ``y`` where given.

    Numbers in ``y`` are hashed as float64, anything else as text, so that the dtype of a column does not matter.
    Vocabularies are hashed too, where there are any.
    """
    h = hashlib.sha256(f"skiff-training-1 {table.wide.shape}".encode())
    h.update(table.rows("float32").astype("<f4").tobytes())
    if table.vocabularies:
        h.update(repr(table.vocabularies).encode())
    if y is not None:
        column = np.asarray(y)
        if len(column) != len(table.wide):
            raise InputError("width", f"y has {len(column)} values for {len(table.wide)} rows")
        if column.dtype.kind in "biuf":
            h.update(b"numbers" + column.astype("<f8").tobytes())
        else:
            h.update(b"text" + "\0".join(str(value) for value in column.ravel()).encode())
    return ids.digest(h.hexdigest())


def spread(rows: Rows) -> NDArray[np.float64]:
    """(F,) standard deviation of each column's finite values; 0 where there are none."""
    columns = (column[np.isfinite(column)].astype(np.float64) for column in rows.T)
    return np.array([column.std() if column.size else 0.0 for column in columns])


def _names(signature: Signature, X: Any) -> tuple[str, ...]:
    columns = tuple(str(name) for name in getattr(X, "columns", ()))
    if columns and signature.names and columns != signature.names:
        odd = next((pair for pair in zip(columns, signature.names, strict=False) if pair[0] != pair[1]), None)
        found = (
            f"{len(columns)} columns, not {len(signature.names)}"
            if odd is None
            else f"{odd[0]!r} for {odd[1]!r}"
        )
        raise UnsupportedPipeline(
            f"X has other columns than the pipeline was fitted with ({found}); "
            "pass the same columns in the same order"
        )
    names = columns or signature.names or tuple(f"x{j}" for j in range(signature.width))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UnsupportedPipeline(f"column name {twice[0]!r} appears more than once; rename the columns")
    return names


def _checked(table: Table) -> Table:
    bad = np.isinf(table.wide)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise InputError(
            "non_finite", f"X: column {table.names[column]!r}, row {row} is infinite; drop or replace it"
        )
    return table


def _read_column(
    name: str,
    series: Any,
    known: Iterable[Label],
    fixed: tuple[Label, ...] | None,
    *,
    categorical: bool = False,
) -> tuple[Column, NDArray[np.float64]]:
    """A column and its numbers or codes (n,)."""
    values = series.tolist() if hasattr(series, "tolist") else series.to_list()
    absent = [_is_missing(value) for value in values]
    present = [value for value, gone in zip(values, absent, strict=True) if not gone]
    categorical = categorical or _kind(series) in ("CategoricalDtype", "Categorical", "Enum")
    if (
        fixed is None
        and not categorical
        and all(isinstance(v, int | float | np.number | np.bool_) for v in present)
    ):
        numbers = np.array([math.nan if gone else float(v) for v, gone in zip(values, absent, strict=True)])
        return Column(name, None, math.nan, _rebuilder(series)), numbers
    if not all(isinstance(v, str | int | float | bool | np.generic) for v in present):
        odd = next(v for v in present if not isinstance(v, str | int | float | bool | np.generic))
        raise UnsupportedPipeline(
            f"column {name!r} holds a {type(odd).__name__}; turn it into numbers or text before the pipeline"
        )
    kinds = {type(value) for value, gone in zip(values, absent, strict=True) if gone}
    if len(kinds) > 1:
        raise UnsupportedPipeline(
            f"column {name!r} holds several kinds of missing values ({', '.join(sorted(k.__name__ for k in kinds))}); "
            "use one of them"
        )
    plain = [v.item() if isinstance(v, np.generic) else v for v in present]
    counted = Counter(plain)
    listed = sorted(counted, key=lambda v: (-counted[v], str(v)))
    vocabulary = fixed or (*listed, *sorted({v for v in known if v not in counted}, key=str))
    place = {value: float(code) for code, value in enumerate(vocabulary)}
    codes = np.full(len(values), math.nan)
    codes[~np.array(absent, bool)] = [place.get(v, -1.0) for v in plain]
    missing = next((value for value, gone in zip(values, absent, strict=True) if gone), math.nan)
    # polars knows no missing value but null: a NaN in a column of text would become a text.
    return Column(name, vocabulary, None if _is_polars(series) else missing, _rebuilder(series)), codes


def _kind(series: Any) -> str:
    return type(getattr(series, "dtype", None)).__name__


def _is_polars(series: Any) -> bool:
    return hasattr(series, "to_list") and not hasattr(series, "iloc")


def _in_doubt(series: Any) -> bool:
    """Whether a column of numbers may be more: it holds Python objects, or truth values or None in no numeric dtype."""
    kind = getattr(getattr(series, "dtype", None), "kind", "")  # polars has none
    if kind == "O":
        return True
    if _kind(series).startswith("Float") or (kind and kind in "biuf"):
        return False
    values = series.tolist() if hasattr(series, "tolist") else series.to_list()
    return bool({type(value).__name__ for value in values} & {"bool", "NoneType", "NAType"})


def _alike(signature: Signature, X: Any, numbers: Mapping[int, NDArray[np.float64]]) -> bool:
    """Whether the pipeline answers the same when columns come as float64 ``numbers`` (n,), NaN for missing.

    An encoder that was fitted on None beside True and False knows no NaN.
    """
    if not numbers:
        return True
    gone = np.isnan(np.stack(list(numbers.values()))).any(axis=0)
    at = np.sort(np.concatenate([np.flatnonzero(gone)[:_TRIED], np.flatnonzero(~gone)[:_TRIED]]))
    some = X.iloc[at] if hasattr(X, "iloc") else X[at]
    if isinstance(some, np.ndarray):
        changed = some.copy()
        for j, values in numbers.items():
            changed[:, j] = values[at]
    else:
        columns = {name: some[name] for name in some.columns}
        columns |= {some.columns[j]: values[at] for j, values in numbers.items()}
        changed = type(X)(columns)
    ask = getattr(signature.pipeline, signature.score, signature.pipeline.predict)
    with by_position():
        try:
            given = ask(some)
        except (ValueError, TypeError, KeyError):
            return True  # what is wrong with these rows is found and named later
        try:
            found = ask(changed)
        except (ValueError, TypeError, KeyError):
            return False
    exact = np.asarray(given).dtype.kind == "f"
    return np.array_equal(np.asarray(given), np.asarray(found), equal_nan=exact)


def _is_missing(value: Any) -> bool:
    return (
        value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and math.isnan(value))
    )


def _rebuilder(series: Any) -> Callable[[list[Any]], Any]:
    if isinstance(series, np.ndarray):
        return list
    if _is_polars(series):
        return lambda values: _polars(series, values)
    if _kind(series) == "CategoricalDtype":
        return lambda values: _categorical(series, values)
    return lambda values: type(series)(values, dtype=series.dtype)


def _polars(series: Any, values: list[Any]) -> Any:
    """``values`` as a polars column of the same dtype; as text where they are strangers to an Enum.

    Raises `TypeError` where the dtype cannot hold them.
    """
    foreign = _kind(series) == "Enum" and not set(values) <= {None, *series.dtype.categories.to_list()}
    return type(series)(values=values, dtype=None if foreign else series.dtype)


def _categorical(series: Any, values: list[Any]) -> Any:
    """``values`` as a pandas categorical of the same order, with strangers after the categories it has."""
    known = series.dtype.categories.tolist()
    new = sorted({v for v in values if not _is_missing(v)} - set(known), key=str)
    return type(series)(values, dtype=type(series.dtype)([*known, *new], ordered=series.dtype.ordered))


def _decoded(column: Column, codes: NDArray[np.float64], rng: np.random.Generator) -> list[Any]:
    assert column.vocabulary is not None
    strangers = [value for value in STRANGERS if value not in column.vocabulary]
    found: list[Any] = []
    for code, which in zip(
        codes.tolist(), rng.integers(len(strangers), size=len(codes)).tolist(), strict=True
    ):
        if math.isnan(code):
            found.append(column.missing)
        else:
            found.append(strangers[which] if code < 0 else column.vocabulary[int(code)])
    return found


def _assembler(
    signature: Signature, wide: NDArray[np.float64], otherwise: Callable[[list[Any]], Any]
) -> Callable[[list[Any]], Any] | None:
    """None where the pipeline takes plain arrays of numbers, by position, even if it was fitted on a frame."""
    try:
        with by_position():
            signature.pipeline.predict(wide[:1])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return otherwise
    return None


def _framed(names: Sequence[str]) -> Callable[[list[Any]], Any]:
    """For a pipeline that selects columns by name and gets an array: a pandas frame."""

    def assemble(columns: list[Any]) -> Any:
        import pandas as pd  # noqa: PLC0415 - half a second that most conversions need not spend

        return pd.DataFrame(dict(zip(names, columns, strict=True)))

    return assemble


def _objects(columns: list[Any]) -> Any:
    table = np.empty((len(columns[0]), len(columns)), object)
    for j, column in enumerate(columns):
        table[:, j] = column
    return table


def _like(X: Any) -> Callable[[list[Any]], Any]:
    names = list(X.columns)

    def assemble(columns: list[Any]) -> Any:
        return type(X)(dict(zip(names, columns, strict=True)))

    return assemble
