"""Training rows as the user has them (an array or a data frame) and as a device sends them (float32)."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.signature import Signature
from edge_runtime.contract import ids
from edge_runtime.contract.errors import InputError, UnsupportedPipeline
from edge_runtime.contract.ids import Digest

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Rows that fit a pipeline.

    Attributes:
        names: (F,) column names.
        given: the rows as the user passed them.
        wide: (n, F) float64.
        rows: (n, F) float32, what a device would send.
        missing: (F,) bool, which columns hold NaN.
    """

    names: tuple[str, ...]
    given: Any
    wide: NDArray[np.float64]
    rows: Rows
    missing: NDArray[np.bool_]


def read(signature: Signature, X: Any) -> Table:
    """Reads ``X``, an (n, F) array or a data frame with F numeric columns.

    Columns get the frame's names, else those the pipeline was fitted with, else ``x0``, ``x1``, …

    Raises:
        UnsupportedPipeline: a column is not numeric, or the names are not the pipeline's.
        InputError: the shape is wrong, or a value is infinite, too large for float32, or missing where the
            pipeline takes no missing value.
    """
    names = _names(signature, X)
    wide = _numbers(X, names)
    if wide.ndim != 2 or wide.shape[1] != signature.width or not len(wide):
        raise InputError(
            "width", f"X has shape {wide.shape}; the pipeline takes (n, {signature.width}) with n > 0"
        )
    with np.errstate(over="ignore"):
        rows = wide.astype(np.float32)
    absent = np.isnan(rows)
    _refuse_cells(np.isinf(wide), names, "non_finite", "is infinite; drop or replace it")
    _refuse_cells(np.isinf(rows), names, "non_finite", "is too large for float32; scale the column")
    if not signature.missing:
        kind = type(signature.estimator.fitted).__name__
        _refuse_cells(absent, names, "missing", f"is NaN, and {kind} takes no missing values")
    return Table(
        names=names,
        given=X,
        wide=wide,
        rows=np.ascontiguousarray(rows),
        missing=np.asarray(absent.any(axis=0)),
    )


def training_digest(table: Table, y: Any) -> Digest:
    """SHA-256 over the shape and the float32 bytes of the rows, then over ``y`` where given.

    Numbers in ``y`` are hashed as float64, anything else as text, so that the dtype of a column does not matter.
    """
    h = hashlib.sha256(f"skiff-training-1 {table.rows.shape}".encode())
    h.update(table.rows.astype("<f4").tobytes())
    if y is not None:
        column = np.asarray(y)
        if len(column) != len(table.rows):
            raise InputError("width", f"y has {len(column)} values for {len(table.rows)} rows")
        if column.dtype.kind in "biuf":
            h.update(b"numbers" + column.astype("<f8").tobytes())
        else:
            h.update(b"text" + "\0".join(str(value) for value in column.ravel()).encode())
    return ids.digest(h.hexdigest())


def spread(rows: NDArray[np.floating]) -> NDArray[np.float64]:
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


def _numbers(X: Any, names: tuple[str, ...]) -> NDArray[np.float64]:
    if not hasattr(X, "columns"):
        try:
            return np.asarray(X, dtype=np.float64)
        except (TypeError, ValueError) as e:
            raise UnsupportedPipeline(
                f"X is not a table of numbers ({e}); encode text before the pipeline"
            ) from e
    found = []
    for name, column in zip(names, X.columns, strict=True):
        try:
            found.append(np.asarray(X[column], dtype=np.float64))
        except (TypeError, ValueError) as e:
            raise UnsupportedPipeline(
                f"column {name!r} is not numeric ({e}); encode it before the pipeline"
            ) from e
    return np.stack(found, axis=1)


def _refuse_cells(bad: NDArray[np.bool_], names: tuple[str, ...], reason: str, problem: str) -> None:
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise InputError(reason, f"X: column {names[column]!r}, row {row} {problem}")
