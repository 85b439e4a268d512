"""Files of rows: Parquet and CSV, read by column as Arrow arrays.

Row numbers in messages count the file's rows from 1, a CSV file's header not among them.
"""

import csv
import gzip
import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from cli.backtest.arrow import plain
from cli.texts import MISSING, listed
from edge_runtime.contract.errors import ConfigError, InputError
from edge_runtime.contract.fields import nearest

SUFFIXES: Final = (".parquet", ".csv", ".csv.gz")


@dataclass(frozen=True, slots=True)
class Reader:
    """A file: its columns' names, one column as an Arrow array, and what text means that nothing is there."""

    names: Sequence[str]
    read: Callable[[str], Any]
    missing: frozenset[str] = frozenset()


def open_rows(path: Path, wanted: Collection[str], texts: Collection[str]) -> Reader:
    """Reads the ``wanted`` columns, a CSV file's ``texts`` as they are written."""
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(f"{path}: is of no known kind; rows are read from {', '.join(SUFFIXES)}")
    try:
        import pyarrow as pa
    except ImportError as e:
        raise ConfigError(f"{path}: reading rows needs pyarrow: pip install pyarrow") from e
    # Arrow's own allocator takes memory in huge pages, and the kernel clears them: half the time of reading a CSV file.
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        return _parquet(path) if path.suffix == ".parquet" else _csv(path, wanted, texts)
    except OSError as e:
        raise InputError("type", f"{path}: cannot be read ({e.strerror or e})") from e
    except (pa.ArrowInvalid, UnicodeDecodeError, EOFError, zlib.error, csv.Error) as e:
        kind = "Parquet" if path.suffix == ".parquet" else "UTF-8 CSV"
        raise InputError("type", f"{path}: is not a {kind} file ({' '.join(str(e).split())})") from e


def _parquet(path: Path) -> Reader:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)

    def read(name: str) -> Any:
        try:  # by a reader of its own: several threads read
            own = pq.ParquetFile(path, metadata=file.metadata)
            found = own.read(columns=[name], use_threads=False).column(name)
        except (OSError, pa.ArrowException) as e:
            raise InputError(
                "type", f"{path}: column {name!r} cannot be read ({' '.join(str(e).split())})"
            ) from e
        return plain(found, f"{path}: column {name!r}")

    return Reader(tuple(file.schema_arrow.names), read)


def _csv(path: Path, wanted: Collection[str], texts: Collection[str]) -> Reader:
    import pyarrow as pa
    import pyarrow.csv as arrow_csv

    with _text(path) as lines:
        names = tuple(next(csv.reader(lines), ()))
    if not names:
        raise InputError("type", f"{path}: is empty")
    for other in (";", "\t"):
        if len(names) == 1 and other in names[0]:
            raise InputError("type", f"{path}: its columns are set apart by {other!r}; save it with commas")
    if len(set(names)) != len(names) or not set(wanted) & set(names):
        return Reader(names, lambda name: name)  # the check of names says what is wrong
    convert = arrow_csv.ConvertOptions(
        include_columns=[name for name in names if name in wanted],
        column_types={name: pa.string() for name in texts if name in names},
        null_values=sorted(MISSING),
        strings_can_be_null=False,
    )
    ragged: list[Any] = []

    def table(*, threads: bool) -> Any:
        def keep(row: Any) -> str:
            ragged.append(row)
            return "error"

        return arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(use_threads=threads),
            parse_options=arrow_csv.ParseOptions(invalid_row_handler=keep),
            convert_options=convert,
        )

    try:
        found = table(threads=True)
    except pa.ArrowInvalid:
        if not ragged:
            raise
        ragged.clear()
        with suppress(pa.ArrowInvalid):  # threads do not know which row they are at
            table(threads=False)
        row = ragged[0]
        raise InputError(
            "type",
            f"{path}, row {row.number - 1}: has {row.actual_columns} values where the header names "
            f"{row.expected_columns} columns ({row.text:.60}); put values with a comma in quotes",
        ) from None
    return Reader(names, lambda name: plain(found.column(name), f"{path}: column {name!r}"), MISSING)


def _text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def check_options(path: Path, names: Sequence[str], options: Sequence[tuple[str, str]]) -> None:
    """Raises where the column that an option names is not there once; ``options`` are pairs of option and column."""
    for option, name in options:
        if name not in names:
            raise ConfigError(
                f"{path}: has no column {name!r} for {option}{nearest(name, names)}; it has {listed(names)}"
            )
    check_once(path, names, [name for _, name in options])


def check_once(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises where a ``wanted`` column is there twice."""
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise InputError("type", f"{path}: has two columns {twice[0]!r}")
