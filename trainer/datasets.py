"""Rows to train on: the smart-watch data set that ships with skiff, and tables of the user's own."""

import csv
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.errors import SkiffError

WATCH_PATH: Final = Path(__file__).parent / "data" / "watch" / "watch_features.npz"
LEFT: Final = 0
RIGHT: Final = 1
_WRIST_NAMES: Final = ("left", "right")
_WATCH_ARRAYS: Final = ("features", "label", "label_names", "person", "wrist", "recording", "feature_names")


class DatasetError(SkiffError):
    """A data set is missing or malformed; the message names the file, the place in it and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WatchData:
    """Smart-watch windows of seven shoulder exercises by ten people, on the left and the right wrist.

    One row is two seconds of a six-axis inertial sensor; the next row of the same recording starts 0.2 s later, so
    neighbouring rows overlap and are strongly correlated. Rows are in order of recording, then time. Arrays are
    read-only. ``trainer/data/watch/README.md`` describes source, licence and columns.

    Attributes:
        features: ``(n, 30)`` float32; columns named by ``feature_names``.
        labels: ``(n,)`` uint8, an index into ``label_names``.
        label_names: the exercises, seven in the full data set.
        person: ``(n,)`` uint8, 1 to 10.
        wrist: ``(n,)`` uint8, `LEFT` or `RIGHT`.
        recording: ``(n,)`` uint8; one recording is one person, wrist and exercise.
        feature_names: thirty names such as ``accel_x_mean``.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.uint8]
    label_names: tuple[str, ...]
    person: NDArray[np.uint8]
    wrist: NDArray[np.uint8]
    recording: NDArray[np.uint8]
    feature_names: tuple[str, ...]

    def __post_init__(self) -> None:
        rows = len(self.features)
        if self.features.ndim != 2 or self.features.shape[1] != len(self.feature_names):
            raise DatasetError(
                f"watch data: features has shape {self.features.shape}, but there are {len(self.feature_names)} names"
            )
        for name in ("labels", "person", "wrist", "recording"):
            column: NDArray[np.uint8] = getattr(self, name)
            if column.shape != (rows,):
                raise DatasetError(f"watch data: {name} has shape {column.shape}, but there are {rows} rows")
        if rows and int(self.labels.max()) >= len(self.label_names):
            raise DatasetError(f"watch data: label {self.labels.max()} has no name")
        for name in ("features", "labels", "person", "wrist", "recording"):
            getattr(self, name).setflags(write=False)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def devices(self) -> tuple[tuple[int, int], ...]:
        """The ``(person, wrist)`` pairs with rows, sorted: each stands for one device."""
        pairs = np.unique(np.stack([self.person, self.wrist], axis=1), axis=0)
        return tuple((int(person), int(wrist)) for person, wrist in pairs)

    @property
    def groups(self) -> NDArray[np.str_]:
        """``(n,)`` name of each row's device, such as ``person-03-left``: the groups of a reference profile."""
        names = np.array(
            [[f"person-{person:02d}-{wrist}" for wrist in _WRIST_NAMES] for person in range(256)]
        )
        return names[self.person, self.wrist]

    def take(self, rows: NDArray[Any]) -> Self:
        """Return the rows picked by a boolean mask or by indices, in that order."""
        return type(self)(
            features=self.features[rows],
            labels=self.labels[rows],
            label_names=self.label_names,
            person=self.person[rows],
            wrist=self.wrist[rows],
            recording=self.recording[rows],
            feature_names=self.feature_names,
        )

    def select(self, *, people: tuple[int, ...] | None = None, wrists: tuple[int, ...] | None = None) -> Self:
        """Return the rows of the given people and wrists; ``None`` means all.

        Raises:
            DatasetError: a person or a wrist asked for has no rows.
        """
        mask = np.ones(len(self), dtype=np.bool_)
        for name, column, wanted in (("person", self.person, people), ("wrist", self.wrist, wrists)):
            if wanted is None:
                continue
            have = sorted(int(value) for value in np.unique(column))
            absent = sorted(set(wanted) - set(have))
            if absent:
                raise DatasetError(f"watch data: {name} {absent[0]} has no rows; there are {have}")
            mask &= np.isin(column, wanted)
        return self.take(mask)

    def device_rows(self, person: int, wrist: int) -> Self:
        """Return one device's rows, in order of recording, then time.

        Raises:
            DatasetError: the device has no rows.
        """
        found = self.take((self.person == person) & (self.wrist == wrist))
        if not len(found):
            raise DatasetError(
                f"watch data: person {person}, wrist {wrist} has no rows; devices are {self.devices}"
            )
        return found

    def recordings(self) -> tuple[Self, ...]:
        """Return the rows split by recording, each in order of time: what a device replays."""
        return tuple(self.take(self.recording == number) for number in np.unique(self.recording))


def load_watch(path: Path = WATCH_PATH) -> WatchData:
    """Load the smart-watch features that ship with skiff: 23,091 rows, 30 columns, 20 devices. No pickle is read.

    Raises:
        DatasetError: the file is missing, is no ``.npz``, or lacks an array.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _WATCH_ARRAYS}
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path}: no such file; make it with trainer/data/watch/make_features.py or reinstall skiff"
        ) from error
    except KeyError as error:
        raise DatasetError(f"{path}: {error.args[0]}; make it again with make_features.py") from error
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(
            f"{path}: not a readable feature file ({error}); make it with make_features.py"
        ) from error
    return WatchData(
        features=np.ascontiguousarray(arrays["features"], dtype=np.float32),
        labels=arrays["label"],
        label_names=tuple(str(name) for name in arrays["label_names"]),
        person=arrays["person"],
        wrist=arrays["wrist"],
        recording=arrays["recording"],
        feature_names=tuple(str(name) for name in arrays["feature_names"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """A numeric table of the user's own.

    Attributes:
        features: ``(n, F)`` float32, NaN for an empty cell.
        feature_names: F names.
        target: ``(n,)`` what to predict: text from a CSV file, any type from an ``.npz`` file.
        group: ``(n,)`` text, the device or person of each row; None when no such column was asked for.
    """

    features: NDArray[np.float32]
    feature_names: tuple[str, ...]
    target: NDArray[Any]
    group: NDArray[np.str_] | None = None


def load_csv(path: Path, *, target: str, group: str = "") -> Table:
    """Load a UTF-8 CSV file with one header line; every column but ``target`` and ``group`` is numeric or empty.

    Raises:
        DatasetError: the file can't be read, has no rows, lacks a column, or a cell is no number; the message
            names line and column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: not a readable CSV file ({error})") from error
    for wanted in filter(None, (target, group)):
        if len(set(header)) != len(header) or wanted not in header:
            raise DatasetError(
                f"{path}: line 1: expected distinct column names with {wanted!r} among them, found {header}"
            )
    if not lines:
        raise DatasetError(f"{path}: a header but no rows")
    numeric = [at for at, name in enumerate(header) if name not in (target, group)]
    features = np.empty((len(lines), len(numeric)), dtype=np.float32)
    for at, (line, row) in enumerate(lines):
        if len(row) != len(header):
            raise DatasetError(f"{path}: line {line}: {len(row)} cells, but the header has {len(header)}")
        for column, source in enumerate(numeric):
            text = row[source]
            try:
                features[at, column] = float(text) if text.strip() else np.nan
            except ValueError as error:
                raise DatasetError(
                    f"{path}: line {line}, column {header[source]!r}: {text!r} is no number"
                ) from error

    def texts(name: str) -> NDArray[np.str_]:
        place = header.index(name)
        return np.array([row[place] for _, row in lines], dtype=np.str_)

    return Table(
        features=features,
        feature_names=tuple(header[at] for at in numeric),
        target=texts(target),
        group=texts(group) if group else None,
    )


def load_npz(path: Path, *, target: str, group: str = "") -> Table:
    """Load an ``.npz`` file with arrays ``features`` (n, F), ``feature_names`` (F,), ``target`` and ``group`` (n,).

    ``target`` and ``group`` are the names of the arrays to use; without ``feature_names`` columns are ``x0``, ``x1``,
    … No pickle is read.

    Raises:
        DatasetError: the file can't be read, lacks an array, or shapes do not fit; the message names the array.
    """
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays.update({name: archive[name] for name in archive.files})
        features = np.asarray(arrays["features"], dtype=np.float32)
        wanted = {name: arrays[name] for name in (target, group) if name}
    except KeyError as error:
        raise DatasetError(f"{path}: holds no array {error.args[0]!r}, only {sorted(arrays)}") from error
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{path}: not a readable .npz file ({error})") from error
    if features.ndim != 2 or not len(features):
        raise DatasetError(f"{path}: features has shape {features.shape}; (n, F) is needed")
    names = arrays.get("feature_names", np.array([f"x{j}" for j in range(features.shape[1])]))
    if names.shape != (features.shape[1],):
        raise DatasetError(f"{path}: feature_names has shape {names.shape} for {features.shape[1]} columns")
    for name, column in wanted.items():
        if column.shape != (len(features),):
            raise DatasetError(f"{path}: {name} has shape {column.shape}, but there are {len(features)} rows")
    return Table(
        features=features,
        feature_names=tuple(str(name) for name in names),
        target=wanted[target],
        group=wanted[group].astype(np.str_) if group else None,
    )
