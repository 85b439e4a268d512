"""Turning what a caller has into packed rows, and saying what is wrong with them."""

import math
import operator
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import InputError
from edge_runtime.contract.fields import nearest
from edge_runtime.contract.manifest import Feature, Label
from edge_runtime.contract.ranges import Limits

Rows = NDArray[Any]

_NUMBERS: Final = (int, float, np.integer, np.floating, np.bool_)
_NUMERIC_KINDS: Final = "fiub"
_PLAIN: Final = frozenset(
    {bool, int, float, np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64, np.bool_}
)


def count_rows(rows: Any) -> int:
    """How many rows a refused call held; at least 1."""
    if isinstance(rows, np.ndarray):
        return max(1, len(rows)) if rows.ndim > 1 else 1
    return max(1, len(rows)) if _is_frame(rows) or _is_list_of_rows(rows) else 1


def _is_list_of_rows(rows: Any) -> bool:
    return (
        isinstance(rows, list | tuple)
        and bool(rows)
        and isinstance(rows[0], Mapping | list | tuple | np.ndarray)
    )


def _is_frame(rows: Any) -> bool:
    """Whether ``rows`` is a pandas or polars data frame, or looks like one."""
    return not isinstance(rows, Mapping | np.ndarray) and all(
        hasattr(rows, name) for name in ("columns", "__getitem__", "__len__")
    )


def _is_na(value: object) -> bool:
    """Whether ``value`` is pandas' own missing value, which data frames hold beside None and NaN."""
    return type(value).__name__ == "NAType"


class Schema:
    """The features of a model, in order, and what each accepts.

    ``dtype`` is the graph's, float32 or float64.
    """

    __slots__ = (
        "_accepts_infinite",
        "_accepts_missing",
        "_codes",
        "_columns",
        "_features",
        "_limits",
        "_pick",
        "_typecode",
        "dtype",
        "names",
    )

    def __init__(self, features: Sequence[Feature], dtype: str = "float32") -> None:
        self.names: Final = tuple(feature.name for feature in features)
        self.dtype: Final[np.dtype[Any]] = np.dtype(dtype)
        self._features: Final = tuple(features)
        self._columns: Final = {name: j for j, name in enumerate(self.names)}
        self._accepts_missing: Final = np.array([feature.missing for feature in features])
        self._accepts_infinite: Final = np.array([feature.infinite for feature in features])
        self._limits: Final = Limits.of(features, dtype)
        self._codes: Final[dict[int, dict[Label, int]]] = {
            j: {value: code for code, value in enumerate(feature.vocabulary)}
            for j, feature in enumerate(features)
            if feature.kind == "category"
        }

        self._typecode: Final[Literal["f", "d"]] = "f" if dtype == "float32" else "d"
        # Of one name it would give the value itself instead of a tuple of one.
        self._pick: Final = operator.itemgetter(*self.names) if len(self.names) > 1 else None

    @property
    def coded(self) -> bool:
        """Whether any column is one of categories, so that rows as users have them differ from packed ones."""
        return bool(self._codes)

    def pack(self, rows: Any) -> Rows | None:
        """One row as `convert` packs it, (F,), where that is quick: a dict, list or tuple of all features' numbers.

        None for everything else, wrong rows included: `convert` knows what to do with it, or what to say.
        """
        kind = rows.__class__
        if kind is dict:
            if self._pick is None or len(rows) != len(self.names):
                return None
            try:
                rows = self._pick(rows)
            except KeyError:
                return None
        elif (kind is not list and kind is not tuple) or len(rows) != len(self.names):
            return None
        if self._codes or not _PLAIN.issuperset(map(type, rows)):
            return None
        try:
            return np.frombuffer(array(self._typecode, rows), self.dtype)
        except OverflowError:  # an integer beyond any float
            return None

    def convert(self, rows: Any) -> tuple[Rows, bool]:
        """``rows`` as a packed (n, F) array of `dtype`, and whether they were one bare row; raises `InputError`.

        ``rows`` is an array, a sequence or a mapping of names, a list of these, or a data frame. Values of categories
        become codes, the numbers of a numeric array too. The answer shares no memory with ``rows``.
        """
        packed = rows.__class__ is np.ndarray and rows.dtype is self.dtype and not self._codes
        if packed and rows.ndim == 2 and rows.shape[1] == len(self.names):
            return np.array(rows), False
        if isinstance(rows, np.ndarray):
            texts = rows.dtype.kind == "U" and self.coded
            if rows.dtype != object and not texts:
                return self._from_array(rows)
            rows = rows.tolist()
        elif _is_frame(rows):
            return self._from_frame(rows), False
        if _is_list_of_rows(rows) or (isinstance(rows, list | tuple) and not rows):
            table = np.empty((len(rows), len(self.names)), self.dtype)
            for i, row in enumerate(rows):
                table[i] = self._from_row(row, f"row {i}: ")
            return table, False
        return self._from_row(rows, "")[None], True

    def check(self, table: Rows) -> None:
        """Raises `InputError` on the first value of packed rows that its feature does not accept.

        NaN and infinities come first, then what lies outside a range. An infinity that the feature accepts lies outside
        of a range that ends on its side; a missing value does not.
        """
        finite = np.isfinite(table)
        if not finite.all():
            self._check_finite(table, finite)
        if self._limits is not None:
            self._check_ranges(table, self._limits)

    def refused(self, table: Rows) -> dict[str, NDArray[np.bool_]]:
        """Which of the packed rows (n, F) `check` refuses on their own, and why: a mask (n,) for each reason there is.

        No row is in two masks: it is refused for what `check` finds first.
        """
        found: dict[str, NDArray[np.bool_]] = {}
        finite = np.isfinite(table)
        odd = np.zeros(len(table), np.bool_)
        if not finite.all():
            bad, missing = self._unaccepted(table, finite)
            odd |= bad.any(axis=1)
            first = missing[np.arange(len(table)), bad.argmax(axis=1)]
            found = {"missing": odd & first, "non_finite": odd & ~first}
        if self._limits is not None:
            found["range"] = ~odd & self._limits.outside(table).any(axis=1)
        return {reason: mask for reason, mask in found.items() if mask.any()}

    def _unaccepted(
        self, table: Rows, finite: NDArray[np.bool_]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which values (n, F) are missing or infinite and not accepted as such; and which are missing."""
        missing = np.isnan(table)
        return ~finite & ~np.where(missing, self._accepts_missing, self._accepts_infinite), missing

    def _check_finite(self, table: Rows, finite: NDArray[np.bool_]) -> None:
        bad, missing = self._unaccepted(table, finite)
        if not bad.any():
            return
        i, j, where = self._first(bad)
        if missing[i, j]:
            raise InputError("missing", f"{where} is missing and the model does not accept that")
        raise InputError("non_finite", f"{where} is {table[i, j]}; a finite {self.dtype} number is needed")

    def _check_ranges(self, table: Rows, limits: Limits) -> None:
        outside = limits.outside(table)
        if not outside.any():
            return
        i, j, where = self._first(outside)
        raise InputError(
            "range",
            f"{where} is {table[i, j]!s}, outside {limits.text(j)}, the range the model is proven for",
        )

    def _first(self, bad: NDArray[np.bool_]) -> tuple[int, int, str]:
        """Row and column of the first ``bad`` value (n, F), and how a message names them."""
        i, j = (int(k[0]) for k in np.nonzero(bad))
        where = f"row {i}: " if len(bad) > 1 else ""
        return i, j, f"{where}feature {self.names[j]!r}"

    def no_answer(self, row: Rows, columns: Sequence[int]) -> str:
        """Why a packed ``row`` (F,) that accepts every check has no answer, where one of ``columns`` is to blame."""
        if not columns:
            return "the model has no answer for this combination of values, which its pipeline refuses"
        named = " and ".join(f"feature {self.names[j]!r} is {self._shown(row[j], j)}" for j in columns[:3])
        return f"{named}, for which the model has no answer: its pipeline refuses such rows"

    def _shown(self, value: Any, j: int) -> str:
        vocabulary = self._features[j].vocabulary
        if not vocabulary or np.isnan(value):
            return "missing" if np.isnan(value) else f"{value:g}"
        return repr(vocabulary[int(value)]) if value >= 0 else "unknown"

    def _from_array(self, rows: NDArray[Any]) -> tuple[Rows, bool]:
        if hasattr(rows, "mask"):
            raise InputError(
                "type", "a masked array says not what to use in its gaps; pass rows.filled(np.nan)"
            )
        if rows.dtype.kind not in _NUMERIC_KINDS:
            raise InputError("type", f"an array of {rows.dtype} is not an array of numbers")
        if rows.ndim not in (1, 2) or rows.shape[-1] != len(self.names):
            raise InputError("width", f"an array of shape {rows.shape}; (n, {len(self.names)}) is needed")
        with np.errstate(over="ignore"):  # what overflows float32 is infinite from here on
            table = np.atleast_2d(rows.astype(self.dtype, subok=False))
        given = np.atleast_2d(rows)
        for j in self._codes:
            table[:, j] = self._cells(given[:, j].tolist(), j)
        return table, rows.ndim == 1

    def _from_frame(self, frame: Any) -> Rows:
        given = list(frame.columns)
        columns = [str(name) for name in given]  # as the converter names columns: frames may number theirs
        for name, text in zip(given, columns, strict=True):
            if text not in self._columns:
                raise InputError(
                    "unknown_feature", f"the model has no feature {name!r}{nearest(text, self.names)}"
                )
        if len(columns) != len(set(columns)):
            twice = next(name for name in columns if columns.count(name) > 1)
            raise InputError("unknown_feature", f"the data frame has two columns {twice!r}")
        absent = [name for name in self.names if name not in columns]
        if absent:
            raise InputError("missing", f"the data frame has no column {absent[0]!r}")
        table = np.empty((len(frame), len(self.names)), self.dtype)
        for j, name in enumerate(self.names):
            column = np.asarray(frame[given[columns.index(name)]])
            if column.dtype.kind in _NUMERIC_KINDS and j not in self._codes:
                with np.errstate(over="ignore"):
                    table[:, j] = column
            elif column.dtype.kind in _NUMERIC_KINDS + "OU":
                table[:, j] = self._cells(column.tolist(), j)
            else:
                raise InputError("type", f"column {name!r} holds {column.dtype}, not numbers or categories")
        return table

    def _cells(self, values: list[Any], j: int) -> Rows:
        """One column's values, packed."""
        found = np.empty(len(values))
        for i, value in enumerate(values):
            found[i] = self.cell(value, j, f"row {i}: " if len(values) > 1 else "")
        with np.errstate(over="ignore"):
            return found.astype(self.dtype)

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
                f"{where}{type(row).__name__} is not a row; pass an array, a list of values or a mapping of names",
            )
        if len(values) != len(self.names):
            raise InputError(
                "width", f"{where}{len(values)} values; the model has {len(self.names)} features"
            )
        with np.errstate(over="ignore"):
            return np.array([self.cell(value, j, where) for j, value in enumerate(values)]).astype(self.dtype)

    def cell(self, value: Any, j: int, where: str = "") -> float:
        """One value of feature ``j``, packed: a number as it is, a category as its code; raises `InputError`."""
        if value is None:
            return float("nan")
        if j in self._codes:
            return self._code(value, j, where)
        if not isinstance(value, _NUMBERS):
            if _is_na(value):
                return float("nan")
            raise InputError(
                "type",
                f"{where}feature {self.names[j]!r} is {type(value).__name__} {value!r:.40}, not a number",
            )
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")

    def _code(self, value: Any, j: int, where: str) -> float:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and math.isnan(value):
            return float("nan")
        try:
            code = self._codes[j].get(value)
        except TypeError as e:
            raise InputError(
                "type",
                f"{where}feature {self.names[j]!r} is {type(value).__name__} {value!r:.40}, not a category",
            ) from e
        if code is not None:
            return float(code)
        if _is_na(value):
            return float("nan")
        feature = self._features[j]
        if not feature.unseen:
            hint = nearest(str(value), [str(known) for known in feature.vocabulary])
            raise InputError(
                "unseen",
                f"{where}feature {feature.name!r} is {value!r:.80}, which the training data did not have{hint}",
            )
        return -1.0
