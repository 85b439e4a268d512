"""Turning what a caller has into float32 rows, and saying what is wrong with them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import InputError
from edge_runtime.contract.fields import nearest
from edge_runtime.contract.manifest import Feature

Rows = NDArray[np.float32]

_NUMBERS: Final = (int, float, np.integer, np.floating, np.bool_)


def count_rows(rows: Any) -> int:
    """How many rows a refused call held; at least 1."""
    if isinstance(rows, np.ndarray):
        return max(1, len(rows)) if rows.ndim > 1 else 1
    return len(rows) if _is_list_of_rows(rows) else 1


def _is_list_of_rows(rows: Any) -> bool:
    return (
        isinstance(rows, list | tuple)
        and bool(rows)
        and isinstance(rows[0], Mapping | list | tuple | np.ndarray)
    )


class Schema:
    """The features of a model, in order, and which of them may be missing."""

    __slots__ = ("_accepts_missing", "_columns", "names")

    def __init__(self, features: Sequence[Feature]) -> None:
        self.names: Final = tuple(feature.name for feature in features)
        self._columns: Final = {name: j for j, name in enumerate(self.names)}
        self._accepts_missing: Final = np.array([feature.missing for feature in features])

    def convert(self, rows: Any) -> tuple[Rows, bool]:
        """``rows`` as an (n, F) float32 array, and whether they were one bare row; raises `InputError`."""
        if isinstance(rows, np.ndarray) and rows.dtype != object:
            return self._from_array(rows)
        if isinstance(rows, np.ndarray):
            rows = rows.tolist()
        if _is_list_of_rows(rows) or (isinstance(rows, list | tuple) and not rows):
            table = np.empty((len(rows), len(self.names)), np.float32)
            for i, row in enumerate(rows):
                table[i] = self._from_row(row, f"row {i}: ")
            return table, False
        return self._from_row(rows, "")[None], True

    def check(self, table: Rows) -> None:
        """Raises `InputError` on the first NaN in a feature that may not be missing, or infinity."""
        bad = ~np.isfinite(table)
        bad &= ~(np.isnan(table) & self._accepts_missing)
        if not bad.any():
            return
        i, j = (int(k[0]) for k in np.nonzero(bad))
        where = f"row {i}: feature {self.names[j]!r}" if len(table) > 1 else f"feature {self.names[j]!r}"
        if np.isnan(table[i, j]):
            raise InputError("missing", f"{where} is missing and the model does not accept that")
        raise InputError("non_finite", f"{where} is {table[i, j]}; a finite float32 number is needed")

    def _from_array(self, rows: NDArray[Any]) -> tuple[Rows, bool]:
        if hasattr(rows, "mask"):
            raise InputError(
                "type", "a masked array says not what to use in its gaps; pass rows.filled(np.nan)"
            )
        if rows.dtype.kind not in "fiub":
            raise InputError("type", f"an array of {rows.dtype} is not an array of numbers")
        if rows.ndim not in (1, 2) or rows.shape[-1] != len(self.names):
            raise InputError("width", f"an array of shape {rows.shape}; (n, {len(self.names)}) is needed")
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is refused as such
            table = rows.astype(np.float32)
        return (table[None], True) if rows.ndim == 1 else (table, False)

    def _from_row(self, row: Any, where: str) -> Rows:
        if isinstance(row, Mapping):
            for name in row:
                if name not in self._columns:
                    hint = nearest(str(name), self.names)
                    raise InputError("unknown_feature", f"{where}the model has no feature {name!r}{hint}")
            values = [row.get(name) for name in self.names]
        elif isinstance(row, list | tuple):
            values = list(row)
        elif isinstance(row, np.ndarray) and row.ndim == 1:
            values = row.tolist()
        else:
            raise InputError(
                "type",
                f"{where}{type(row).__name__} is not a row; pass an array, a list of numbers or a mapping of names",
            )
        if len(values) != len(self.names):
            raise InputError(
                "width", f"{where}{len(values)} values; the model has {len(self.names)} features"
            )
        with np.errstate(over="ignore"):
            return np.array(
                [self._number(v, name, where) for v, name in zip(values, self.names, strict=True)]
            ).astype(np.float32)

    def _number(self, value: object, name: str, where: str) -> float:
        if value is None:
            return float("nan")
        if not isinstance(value, _NUMBERS):
            raise InputError(
                "type", f"{where}feature {name!r} is {type(value).__name__} {value!r:.40}, not a number"
            )
        try:
            return float(value)
        except OverflowError:
            return float("inf")
