"""One SQLite file, opened the way both stores need it.

Write-ahead log, ``synchronous=FULL``: a committed transaction survives a power cut. One connection per store
and process; another process may read at any time (``read_only``), and write short transactions of its own.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from aggregator.stores import StoreError, Unstorable
from edge_runtime.contract.errors import ConfigError

BUSY_TIMEOUT_SECONDS: Final = 10.0
UNFINISHED: Final = "restore-unfinished"
"""While a file of this name stands beside a store, a restore has begun and not ended."""

Step = Callable[[sqlite3.Connection], None]
Values = Sequence[Any] | Mapping[str, Any]


class File:
    """A SQLite file with a schema of a version.

    A new file gets ``schema``; a writer takes an older one forward with ``steps``, one transaction each: a crash leaves
    the version before, whole. ``steps`` hold, by version, what makes it the next one.

    Raises:
        ConfigError: the file is missing (read-only), is no database, or is of another version.
    """

    def __init__(
        self, path: Path, schema: str, version: int, *, read_only: bool, steps: Mapping[int, Step]
    ) -> None:
        check_there(path, read_only=read_only)
        self._path = path
        connection = None
        try:
            connection = connect(path, read_only=read_only)
            self._db = connection
            found = self._version()
            if not read_only:
                found = self._upgraded(schema, version, steps)
        except sqlite3.DatabaseError as e:
            if connection is not None:
                connection.close()
            raise ConfigError(
                f"{path}: cannot be opened as a store ({e}); move it away or restore a backup"
            ) from e
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        if found != version:
            connection.close()
            raise ConfigError(wrong_version(str(path), found, version))

    def close(self) -> None:
        """Closes the file; a writer folds the log back into it."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is committed together, or, when it raises, not at all; raises `StoreError`."""
        with self.translated(), transaction(self._db):
            yield

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Lets SQLite's errors out as `StoreError`, and those that trying again cannot mend as `Unstorable`."""
        try:
            yield
        except (OverflowError, sqlite3.DataError, sqlite3.IntegrityError) as e:
            raise Unstorable(f"{self._path}: {e}") from e
        except sqlite3.Error as e:
            raise StoreError(f"{self._path}: {e}") from e

    def execute(self, statement: str, values: Values = ()) -> sqlite3.Cursor:
        """Performs one statement."""
        with self.translated():
            return self._db.execute(statement, values)

    def many(self, statement: str, values: Sequence[Values]) -> None:
        """Performs one statement with each of the values."""
        with self.translated():
            self._db.executemany(statement, values)

    def one(self, question: str, values: Values = ()) -> Any:
        """The first row of the answer as a tuple, None when there is none."""
        with self.translated():
            return self._db.execute(question, values).fetchone()

    def rows(self, question: str, values: Values = ()) -> list[Any]:
        """All rows of the answer as tuples."""
        with self.translated():
            return self._db.execute(question, values).fetchall()

    def each(self, question: str, values: Values = ()) -> Iterator[Any]:
        """The rows of the answer one by one; they need not fit memory together."""
        with self.translated():
            yield from self._db.execute(question, values)

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _upgraded(self, schema: str, version: int, steps: Mapping[int, Step]) -> int:
        while (found := self._version()) < version and (found == 0 or found in steps):
            with transaction(self._db):
                if self._version() != found:  # another process was quicker
                    continue
                if found == 0:
                    run_script(self._db, schema)
                else:
                    steps[found](self._db)
                self._db.execute(f"PRAGMA user_version={found + 1 if found else version}")
        return found


def check_there(path: Path, *, read_only: bool) -> None:
    """Raises `ConfigError` when a store may not be opened: nothing to read, or a restore that did not end."""
    if (path.parent / UNFINISHED).exists():
        raise ConfigError(f"{path.parent}: a restore was interrupted here; run `skiff restore` again")
    if read_only and not path.exists():
        raise ConfigError(missing(str(path)))


def missing(name: str) -> str:
    """What is said where there is no store."""
    return f"{name}: no such store yet; start the aggregator first (skiff serve)"


def wrong_version(name: str, found: int, version: int) -> str:
    """What is said of a store of another version."""
    advice = (
        "start this aggregator once, it takes the store forward"
        if found < version
        else "it was written by a newer skiff, use that one"
    )
    return f"{name}: schema version {found} is not {version}: {advice}"


def connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """A connection that commits each statement by itself outside a `transaction`; raises `sqlite3.Error`."""
    if not read_only:
        path.parent.mkdir(parents=True, exist_ok=True)
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = sqlite3.connect(
        uri, uri=True, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
    )
    if not read_only:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        except BaseException:
            connection.close()
            raise
    return connection


def run_script(connection: sqlite3.Connection, script: str) -> None:
    """Performs statements that semicolons separate, in the transaction that is open."""
    statement = ""
    for part in script.split(";"):
        statement += f"{part};"
        if sqlite3.complete_statement(statement):  # a trigger has semicolons of its own
            connection.execute(statement)
            statement = ""


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Everything inside is committed together, or, when it raises, not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # a full disk has rolled back already
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def copy(source: Path, target: Path) -> None:
    """Copies a SQLite file as it is at one moment, durable on return, while another process may write to it.

    Raises:
        StoreError: reading or writing failed; ``target`` is worth nothing then.
    """
    try:
        with closing(connect(source, read_only=True)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new)  # in one step: in several, each commit meanwhile would make it begin again
            new.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        sync(target)
    except (sqlite3.Error, OSError) as e:
        raise StoreError(f"{source}: cannot be copied to {target} ({e})") from e


def sync(path: Path) -> None:
    """Returns when the file, or the folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def stand_still(path: Path) -> None:
    """Makes sure that no process has the store open, and folds its log into it.

    Raises:
        StoreError: another process has it open.
    """
    try:
        with closing(sqlite3.connect(path, timeout=0.0, isolation_level=None)) as db:
            mode = db.execute("PRAGMA journal_mode=DELETE").fetchone()[0]
    except sqlite3.OperationalError as e:
        if "locked" not in str(e):
            return
        mode = "wal"
    except sqlite3.DatabaseError:
        return  # damaged, which is what backups are for
    if mode != "delete":
        raise StoreError(f"{path}: is in use; stop the aggregator first")
