"""Raw rows of many devices from a Parquet or CSV file, read by column and packed as the devices' model reads them.

Only the columns that are needed are read. Row numbers in messages count the file's rows from 1, a CSV file's header not
among them.
"""

import csv
import math
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cli.backtest.arrow import numbers
from cli.backtest.times import times_ns
from cli.texts import MISSING, listed
from edge_runtime.contract.errors import ConfigError, InputError
from edge_runtime.contract.fields import nearest
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import Manifest
from edge_runtime.schema import Schema

SUFFIXES: Final = (".parquet", ".csv")
UNLABELLED: Final = -1
OTHER_LABEL: Final = -2

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a file say what; ``labels`` is empty where the truth is not known."""

    device: str
    time: str
    labels: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Rows of many devices.

    Attributes:
        devices: their names, sorted.
        device: (n,) each row's place in ``devices``.
        times_ns: (n,) since 1970.
        values: (F, n) the features as the model reads them, of its dtype.
        refused: rows that cannot be packed, by reason, a mask (n,) each; a row is in one of them at most.
        truth: (n,) index of the label that was right, `UNLABELLED`, or `OTHER_LABEL` for one that the model does not
            know; None where nothing is known of any row.
        notes: what the reader of the results should know.
    """

    devices: tuple[DeviceId, ...]
    device: NDArray[Any]
    times_ns: NDArray[np.int64]
    values: NDArray[np.floating]
    refused: dict[str, Mask]
    truth: NDArray[np.int64] | None
    notes: tuple[str, ...]


def read_table(path: Path, manifest: Manifest, columns: Columns) -> Table:
    """The rows of ``path``.

    Raises:
        ConfigError: a named column is not there, the file is of another kind, or pyarrow is not installed.
        InputError: the file cannot be read, is empty, lacks a feature, or has a value that no row may have.
    """
    reader = _reader(path, manifest, columns)
    names = reader.names
    _check_names(path, names, manifest, columns)
    schema = Schema(manifest.features, manifest.input_dtype)
    used = {columns.device, columns.time, columns.labels, *schema.names}
    extra = [name for name in names if name not in used]
    notes = [f"{path}: ignored {listed(extra)}, which the model does not read"] if extra else []
    moments = reader.read(columns.time)
    if not len(moments):
        raise InputError("type", f"{path}: has no rows")
    times, how = times_ns(moments, f"{path}: column {columns.time!r}")
    notes += [how] if how else []
    devices, device = _devices(reader.read(columns.device), f"{path}: column {columns.device!r}")
    values = np.empty((len(schema.names), len(times)), schema.dtype)
    refused: dict[str, Mask] = {}

    def pack(j: int) -> dict[str, Mask]:
        feature, found = manifest.features[j], reader.read(schema.names[j])
        with np.errstate(over="ignore"):  # what the model's dtype cannot hold is infinite, as on a device
            if feature.kind == "category":
                values[j], bad = _codes(found, schema, j, reader.missing - _words(feature.vocabulary))
                return bad
            values[j] = _numbers(found, f"{path}: column {feature.name!r}", reader.missing)
        return {}

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Arrow lets go of the interpreter while it decodes
        for bad in pool.map(pack, range(len(schema.names))):
            _add_refused(refused, bad)
    truth = None
    if columns.labels:
        truth, note = _truth(
            reader.read(columns.labels), manifest, f"{path}: column {columns.labels!r}", reader.missing
        )
        notes += [note] if note else []
    return Table(
        devices=devices,
        device=device,
        times_ns=times,
        values=values,
        refused=refused,
        truth=truth,
        notes=tuple(notes),
    )


# ── files ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Reader:
    """A file: its columns' names, one column as an Arrow array, and what text means that nothing is there."""

    names: Sequence[str]
    read: Callable[[str], Any]
    missing: frozenset[str] = frozenset()


def _reader(path: Path, manifest: Manifest, columns: Columns) -> _Reader:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: is of no known kind; rows are read from {' and '.join(SUFFIXES)}")
    try:
        import pyarrow as pa
    except ImportError as e:
        raise ConfigError(f"{path}: reading rows needs pyarrow: pip install pyarrow") from e
    try:
        return _parquet(path) if path.suffix == ".parquet" else _csv(path, manifest, columns)
    except OSError as e:
        raise InputError("type", f"{path}: cannot be read ({e.strerror or e})") from e
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as e:
        kind = "Parquet" if path.suffix == ".parquet" else "UTF-8 CSV"
        raise InputError("type", f"{path}: is not a {kind} file ({' '.join(str(e).split())})") from e


def _parquet(path: Path) -> _Reader:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)

    def read(name: str) -> Any:
        try:  # by a reader of its own: several threads read
            own = pq.ParquetFile(path, metadata=file.metadata)
            return _plain(own.read(columns=[name], use_threads=False).column(name))
        except (OSError, pa.ArrowException) as e:
            raise InputError(
                "type", f"{path}: column {name!r} cannot be read ({' '.join(str(e).split())})"
            ) from e

    return _Reader(tuple(file.schema_arrow.names), read)


def _csv(path: Path, manifest: Manifest, columns: Columns) -> _Reader:
    import pyarrow as pa
    import pyarrow.csv as arrow_csv

    with path.open(encoding="utf-8-sig", newline="") as lines:
        names = tuple(next(csv.reader(lines), ()))
    if not names:
        raise InputError("type", f"{path}: is empty")
    texts = [columns.device, *(f.name for f in manifest.features if _words(f.vocabulary))]
    if any(isinstance(label, str) for label in manifest.labels):
        texts.append(columns.labels)
    wanted = {columns.device, columns.time, columns.labels, *(f.name for f in manifest.features)}
    if len(set(names)) != len(names) or not wanted & set(names):
        return _Reader(names, lambda name: name)  # the check of names says what is wrong
    table = arrow_csv.read_csv(
        path,
        convert_options=arrow_csv.ConvertOptions(
            include_columns=[name for name in names if name in wanted],
            column_types={name: pa.string() for name in texts if name in names},
            null_values=sorted(MISSING),
            strings_can_be_null=False,
        ),
    )
    return _Reader(names, lambda name: _plain(table.column(name)), MISSING)


def _plain(chunked: Any) -> Any:
    """One array of values, not of references to them."""
    import pyarrow as pa

    kind = chunked.type
    array = chunked.combine_chunks() if chunked.num_chunks != 1 else chunked.chunk(0)
    return array.cast(kind.value_type) if pa.types.is_dictionary(kind) else array


def _check_names(path: Path, names: Sequence[str], manifest: Manifest, columns: Columns) -> None:
    options = (
        ("--device-column", columns.device),
        ("--time-column", columns.time),
        ("--labels", columns.labels),
    )
    for option, name in options:
        if name and name not in names:
            raise ConfigError(
                f"{path}: has no column {name!r} for {option}{nearest(name, names)}; it has {listed(names)}"
            )
    features = [feature.name for feature in manifest.features]
    lacking = [name for name in features if name not in names]
    if lacking:
        free = [name for name in names if name not in features]
        hint = nearest(lacking[0], free)
        raise InputError(
            "missing",
            f"{path}: lacks {listed(lacking)}, which the model reads{hint}; besides what it reads there is "
            f"{listed(free) or 'nothing'}",
        )
    twice = [name for name in (*features, *(name for _, name in options)) if names.count(name) > 1]
    if twice:
        raise InputError("type", f"{path}: has two columns {twice[0]!r}")


# ── columns ────────────────────────────────────────────────────────────────────────────────────────────


def _devices(array: Any, where: str) -> tuple[tuple[DeviceId, ...], NDArray[Any]]:
    import pyarrow as pa

    uniques, places = _encoded(array)
    names: list[str] = []
    for place, value in enumerate(uniques):
        if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
            row = int((places == place).argmax()) + 1
            raise InputError("type", f"{where}, row {row}: no device's name; every row must say whose it is")
        whole = isinstance(value, float) and value.is_integer()
        names.append(str(int(value)) if whole else str(value))
    if not (
        pa.types.is_string(array.type)
        or pa.types.is_large_string(array.type)
        or pa.types.is_integer(array.type)
    ) and len(set(names)) != len(names):
        raise InputError(
            "type", f"{where}: two of its values are written the same; give devices' names as text"
        )
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    narrow = rank.astype(np.uint16) if len(names) < 1 << 16 else rank  # numpy sorts short integers by radix
    return tuple(DeviceId(names[place]) for place in order), narrow[places]


def _encoded(array: Any) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct values, None among them where one is missing, and each row's place among these."""
    encoded = array.dictionary_encode(null_encoding="encode")
    return encoded.dictionary.to_pylist(), numbers(encoded.indices)


def _numbers(array: Any, where: str, missing: Collection[str]) -> NDArray[np.floating]:
    import pyarrow as pa

    kinds, kind = pa.types, array.type
    if kinds.is_floating(kind):
        return numbers(array)
    if kinds.is_integer(kind) or kinds.is_decimal(kind) or kinds.is_boolean(kind) or kinds.is_null(kind):
        wide = array.cast(pa.uint8()) if kinds.is_boolean(kind) else array
        return numbers(wide.cast(pa.float64(), safe=False))
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        uniques, places = _encoded(array)
        values = np.empty(len(uniques))
        for place, text in enumerate(uniques):
            try:
                values[place] = math.nan if text is None or text in missing else float(text)
            except ValueError as e:
                row = int((places == place).argmax()) + 1
                raise InputError("type", f"{where}, row {row}: {text!r:.40} is not a number") from e
        return np.asarray(values[places])
    raise InputError("type", f"{where}: holds {kind}, and the model reads numbers there")


def _words(values: Collection[object]) -> set[str]:
    return {value for value in values if isinstance(value, str)}


def _codes(
    array: Any, schema: Schema, j: int, missing: Collection[str]
) -> tuple[NDArray[np.float64], dict[str, Mask]]:
    """The codes of a category's values, and the rows that a device refuses for one of them, by reason."""
    uniques, places = _encoded(array)
    codes = np.full(len(uniques), math.nan)
    reasons: dict[str, list[int]] = {}
    for place, value in enumerate(uniques):
        try:
            codes[place] = schema.cell(None if value in missing else value, j)
        except InputError as e:
            reasons.setdefault(e.reason, []).append(place)
    return np.asarray(codes[places]), {why: np.isin(places, bad) for why, bad in reasons.items()}


def _add_refused(refused: dict[str, Mask], found: dict[str, Mask]) -> None:
    """Adds what a further column is refused for, where no column before it was."""
    for why, rows in found.items():
        free = rows.copy()
        for known in refused.values():
            free &= ~known
        refused[why] = refused[why] | free if why in refused else free


def _truth(
    array: Any, manifest: Manifest, where: str, missing: Collection[str]
) -> tuple[NDArray[np.int64] | None, str]:
    """Indices of the labels, and a note on them."""
    if not manifest.labels:
        several = "a model of several labels" if manifest.multilabels else f"a {manifest.task}"
        return None, f"{where}: not used, because {several} has no single right answer to count"
    index = {label: place for place, label in enumerate(manifest.labels)}
    uniques, places = _encoded(array)
    found = np.full(len(uniques), UNLABELLED)
    empty = missing - _words(manifest.labels) if isinstance(missing, frozenset) else missing
    known = [
        not (value is None or value in empty or (isinstance(value, float) and math.isnan(value)))
        for value in uniques
    ]
    for place, value in enumerate(uniques):
        if known[place]:
            found[place] = index.get(value, OTHER_LABEL)
    given = [value for value, labelled in zip(uniques, known, strict=True) if labelled]
    others = [value for place, value in enumerate(uniques) if found[place] == OTHER_LABEL]
    if given and len(others) == len(given):
        raise InputError(
            "type",
            f"{where}: holds {listed(given)}, none of which the model knows; its labels are {listed(manifest.labels)}",
        )
    note = (
        f"{where}: {listed(others)} is never answered by the model; such rows count as wrong"
        if others
        else ""
    )
    return np.asarray(found[places]), note
