"""Raw rows of many devices from a Parquet or CSV file, read by column and packed as the devices' model reads them.

Only the columns that are needed are read. Row numbers in messages count the file's rows from 1, a CSV file's header not
among them.
"""

import math
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cli.backtest.arrow import encoded, numbers
from cli.backtest.files import check_once, check_options, open_rows
from cli.backtest.times import times_ns
from cli.texts import listed
from edge_runtime.contract.errors import InputError
from edge_runtime.contract.fields import nearest
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import Manifest
from edge_runtime.schema import Schema

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


def read_table(path: Path, manifest: Manifest, columns: Columns, *, truth_needed: bool = True) -> Table:
    """The rows of ``path``; without the column of labels only where the truth is not ``truth_needed``.

    Raises:
        ConfigError: a named column is not there, the file is of another kind, or pyarrow is not installed.
        InputError: the file cannot be read, is empty, lacks a feature, or has a value that no row may have.
    """
    texts = {columns.device, *(f.name for f in manifest.features if _words(f.vocabulary))}
    if any(isinstance(label, str) for label in manifest.labels):
        texts.add(columns.labels)
    wanted = {columns.device, columns.time, columns.labels, *(f.name for f in manifest.features)}
    reader = open_rows(path, wanted, texts)
    names = reader.names
    notes = []
    if columns.labels not in names and columns.labels and not truth_needed:
        notes.append(
            f"{path}: has no column {columns.labels!r}, so how often the model was right there is not known"
        )
        columns = replace(columns, labels="")
    _check_names(path, names, manifest, columns)
    schema = Schema(manifest.features, manifest.input_dtype)
    used = {columns.device, columns.time, columns.labels, *schema.names}
    extra = [name for name in names if name not in used]
    notes += [f"{path}: ignored {listed(extra)}, which the model does not read"] if extra else []

    def named() -> tuple[tuple[DeviceId, ...], NDArray[Any]]:
        return _devices(reader.read(columns.device), f"{path}: column {columns.device!r}")

    def labelled() -> tuple[NDArray[np.int64] | None, str]:
        where = f"{path}: column {columns.labels!r}"
        return _truth(reader.read(columns.labels), manifest, where, reader.missing)

    def pack(j: int, into: NDArray[np.floating]) -> dict[str, Mask]:
        feature, found = manifest.features[j], reader.read(schema.names[j])
        with np.errstate(over="ignore"):  # what the model's dtype cannot hold is infinite, as on a device
            if feature.kind == "category":
                where = f"{path}: column {feature.name!r}"
                into[:], bad = _codes(found, schema, j, reader.missing - _words(feature.vocabulary), where)
                return bad
            into[:] = _numbers(found, f"{path}: column {feature.name!r}", reader.missing)
        return {}

    refused: dict[str, Mask] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Arrow lets go of the interpreter while it decodes
        names_read = pool.submit(named)
        labels_read = pool.submit(labelled) if columns.labels else None
        moments = reader.read(columns.time)
        if not len(moments):
            raise InputError("type", f"{path}: has no rows")
        times, how = times_ns(moments, f"{path}: column {columns.time!r}")
        notes += [how] if how else []
        devices, device = names_read.result()
        values = np.empty((len(schema.names), len(times)), schema.dtype)
        for bad in pool.map(pack, range(len(schema.names)), values):
            _add_refused(refused, bad)
        truth, note = labels_read.result() if labels_read else (None, "")
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Told:
    """Rows of many devices whose right answers are known, or not yet.

    Attributes:
        devices: their names, sorted.
        device: (n,) each row's place in ``devices``.
        times_ns: (n,) since 1970.
        known: (n,) rows of which is known whether they were predicted right.
        right: (n,) those of them that were.
        notes: what the reader of the results should know.
    """

    devices: tuple[DeviceId, ...]
    device: NDArray[Any]
    times_ns: NDArray[np.int64]
    known: Mask
    right: Mask
    notes: tuple[str, ...]


def read_told(path: Path, columns: Columns, *, prediction: str = "", correct: str = "") -> Told:
    """The rows of ``path`` with what was predicted beside ``columns.labels``, or with whether it was ``correct``.

    A prediction is right when it is the label: the same number, or the same text. A row without a label, a prediction
    or a word on its correctness (1, 0, true, false) is not known.

    Raises:
        ConfigError: a named column is not there, the file is of another kind, or pyarrow is not installed.
        InputError: the file cannot be read, is empty, or has a value that no row may have.
    """
    named = {
        "--device-column": columns.device,
        "--time-column": columns.time,
        "--label-column": columns.labels,
        "--prediction-column": prediction,
        "--correct-column": correct,
    }
    wanted = {name for name in named.values() if name}
    reader = open_rows(path, wanted, wanted - {columns.time})
    check_options(path, reader.names, [(option, name) for option, name in named.items() if name])
    moments = reader.read(columns.time)
    if not len(moments):
        raise InputError("type", f"{path}: has no rows")
    times, how = times_ns(moments, f"{path}: column {columns.time!r}")
    devices, device = _devices(reader.read(columns.device), f"{path}: column {columns.device!r}")
    if correct:
        known, right = _said(reader.read(correct), f"{path}: column {correct!r}", reader.missing)
    else:
        wheres = [f"{path}: column {name!r}" for name in (columns.labels, prediction)]
        known, right = _same(reader.read(columns.labels), reader.read(prediction), reader.missing, wheres)
    return Told(
        devices=devices,
        device=device,
        times_ns=times,
        known=known,
        right=right,
        notes=(how,) if how else (),
    )


def _said(array: Any, where: str, missing: Collection[str]) -> tuple[Mask, Mask]:
    """Which rows say whether they were right, and which of them were."""
    uniques, places = encoded(array, where)
    words = {"1": 1, "true": 1, "0": 0, "false": 0}
    says = np.full(len(uniques), -1)
    for place, value in enumerate(uniques):
        if (same := _plain_value(value, missing)) is None:
            continue
        found = words.get(f"{same:.17g}" if isinstance(same, float) else same.lower())
        if found is None:
            row = int((places == place).argmax()) + 1
            raise InputError("type", f"{where}, row {row}: {value!r:.40} is not 1, 0, true or false")
        says[place] = found
    said = says[places]
    return said >= 0, said == 1


def _same(
    labels: Any, predictions: Any, missing: Collection[str], wheres: Sequence[str]
) -> tuple[Mask, Mask]:
    """Which rows have a label and a prediction, and of which these are the same."""
    numbered: dict[float | str, int] = {}
    codes = []
    for array, where in zip((labels, predictions), wheres, strict=True):
        uniques, places = encoded(array, where)
        values = [_plain_value(value, missing) for value in uniques]
        code = [-1 if value is None else numbered.setdefault(value, len(numbered)) for value in values]
        codes.append(np.array(code, np.int64)[places])
    known: Mask = (codes[0] >= 0) & (codes[1] >= 0)
    return known, known & (codes[0] == codes[1])


def _plain_value(value: object, missing: Collection[str]) -> float | str | None:
    """A number, whatever it was written as, or a text; None for what is missing."""
    if value is None or (isinstance(value, str) and (value in missing or not value.strip())):
        return None
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value).strip()
    return None if math.isnan(found) else found


def _check_names(path: Path, names: Sequence[str], manifest: Manifest, columns: Columns) -> None:
    options = (
        ("--device-column", columns.device),
        ("--time-column", columns.time),
        ("--labels", columns.labels),
    )
    check_options(path, names, [(option, name) for option, name in options if name])
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
    check_once(path, names, features)


# ── columns ────────────────────────────────────────────────────────────────────────────────────────────


def _devices(array: Any, where: str) -> tuple[tuple[DeviceId, ...], NDArray[Any]]:
    import pyarrow as pa

    uniques, places = encoded(array, where)
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


def _numbers(array: Any, where: str, missing: Collection[str]) -> NDArray[np.floating]:
    import pyarrow as pa

    kinds, kind = pa.types, array.type
    if kinds.is_floating(kind):
        return numbers(array)
    if kinds.is_integer(kind) or kinds.is_decimal(kind) or kinds.is_boolean(kind) or kinds.is_null(kind):
        wide = array.cast(pa.uint8()) if kinds.is_boolean(kind) else array
        return numbers(wide.cast(pa.float64(), safe=False))
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        uniques, places = encoded(array, where)
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
    array: Any, schema: Schema, j: int, missing: Collection[str], where: str
) -> tuple[NDArray[np.float64], dict[str, Mask]]:
    """The codes of a category's values, and the rows that a device refuses for one of them, by reason."""
    uniques, places = encoded(array, where)
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
    index: dict[object, int] = {str(label): place for place, label in enumerate(manifest.labels)}
    index |= {label: place for place, label in enumerate(manifest.labels)}
    uniques, places = encoded(array, where)
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
