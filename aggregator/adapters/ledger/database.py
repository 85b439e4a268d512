"""The ledger's database: SQLite in one file, or PostgreSQL at a URL, through SQLAlchemy Core.

SQLite keeps a write-ahead log with ``synchronous=FULL``, PostgreSQL commits with ``synchronous_commit=on``: a committed
transaction survives a power cut. Other processes may read at any time.
"""

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, Table, create_engine, inspect
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import QueuePool
from sqlalchemy.sql import Executable

from aggregator.adapters.database import check_there, connect, missing, wrong_version
from aggregator.adapters.ledger.steps import STEPS, VERSION
from aggregator.adapters.ledger.tables import metadata
from aggregator.stores import StoreError
from edge_runtime.contract.errors import ConfigError

DRIVER: Final = "postgresql+psycopg"
VERSION_TABLE: Final = "skiff_ledger"
UPGRADE_LOCK: Final = 0x736B696666  # "skiff": one process at a time makes or changes the tables

Values = Mapping[str, Any] | Sequence[Mapping[str, Any]]
Upsert = sqlite.Insert | postgresql.Insert


def exists(where: Path | str) -> bool:
    """Whether a ledger is there, of any version; raises `ConfigError` when its server does not answer."""
    if isinstance(where, Path):
        return where.exists()
    engine, name = _engine(where, read_only=True)
    try:
        with engine.connect() as c:
            return inspect(c).has_table(VERSION_TABLE)
    except SQLAlchemyError as e:
        raise ConfigError(f"{name}: {_why(e)}; it cannot be opened as a store") from e
    finally:
        engine.dispose()


class Database:
    """One connection, made again when it was lost. Reads outside a `transaction` see what is committed by then.

    Raises:
        ConfigError: it cannot be opened, is not there (read-only), or is of another version.
    """

    def __init__(self, where: Path | str, *, read_only: bool = False) -> None:
        if isinstance(where, Path):
            check_there(where, read_only=read_only)
        self._engine, self.name = _engine(where, read_only=read_only)
        self._inside: Connection | None = None
        self.first: Callable[[Connection], None] | None = None
        """What every transaction begins with; what it raises ends the transaction."""
        try:
            found = self._version() if read_only else self._upgraded()
        except StoreError as e:
            self.close()
            raise ConfigError(f"{e}; it cannot be opened as a store: move it away or restore a backup") from e
        if found != VERSION:
            self.close()
            raise ConfigError(wrong_version(self.name, found, VERSION) if found else missing(self.name))

    def close(self) -> None:
        """Closes the connection; SQLite folds its log back into the file."""
        self._engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Everything inside is committed together, or, when it raises, not at all."""
        with self._between("BEGIN IMMEDIATE" if self._sqlite else "BEGIN") as c:
            if self.first is not None:
                self.first(c)
            yield c

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """Everything read inside is as it was at one moment."""
        with self._between("BEGIN" if self._sqlite else "BEGIN ISOLATION LEVEL REPEATABLE READ") as c:
            yield c

    @contextmanager
    def _between(self, begin: str) -> Iterator[Connection]:
        if self._inside is not None:
            raise RuntimeError("transactions do not nest")
        with self._translated(), self._engine.connect() as c:
            c.exec_driver_sql(begin)
            self._inside = c
            try:
                yield c
            except BaseException:
                # A lost connection or a full disk has rolled back already; the error that led here is the one to tell.
                with contextlib.suppress(SQLAlchemyError):
                    c.exec_driver_sql("ROLLBACK")
                raise
            finally:
                self._inside = None
            c.exec_driver_sql("COMMIT")

    def rows(self, statement: Executable, values: Values | None = None) -> Sequence[Row[Any]]:
        """What the statement returns."""
        with self._connected() as c:
            return c.execute(statement, values).all()

    def one(self, statement: Executable, values: Values | None = None) -> Row[Any] | None:
        """The first row that the statement returns."""
        with self._connected() as c:
            return c.execute(statement, values).first()

    def run(self, statement: Executable, values: Values | None = None) -> None:
        """Performs a statement that returns nothing, for each of the values when they are a list."""
        with self._connected() as c:
            c.execute(statement, values)

    def upsert(self, table: Table, values: Values) -> None:
        """Inserts the row, or each of several, or replaces the one with its primary key."""
        statement = self.insert(table)
        rest = {c.name: statement.excluded[c.name] for c in table.columns if not c.primary_key}
        self.run(statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=rest), values)

    def put_once(self, table: Table, values: Mapping[str, Any]) -> None:
        """Inserts the row unless its primary key is taken."""
        statement = self.insert(table)
        self.run(statement.on_conflict_do_nothing(index_elements=list(table.primary_key)), values)

    def insert(self, table: Table) -> Upsert:
        """An insertion that may say what to do on a conflict."""
        return sqlite.insert(table) if self._sqlite else postgresql.insert(table)

    @property
    def _sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as e:
            raise StoreError(f"{self.name}: {_why(e)}") from e

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        with self._translated():
            if self._inside is not None:
                yield self._inside
                return
            with self._engine.connect() as c:
                yield c

    # ── versions ───────────────────────────────────────────────────────────────────────────────────────

    def _version(self) -> int:
        """The schema's version, 0 when there is no schema."""
        with self._connected() as c:
            if self._sqlite:
                return int(c.exec_driver_sql("PRAGMA user_version").scalar_one())
            if not inspect(c).has_table(VERSION_TABLE):
                return 0
            return int(c.exec_driver_sql(f"SELECT version FROM {VERSION_TABLE}").scalar_one())  # noqa: S608

    def _upgraded(self) -> int:
        """Makes the tables, or takes them forward step by step; the version that is there then."""
        while (found := self._version()) < VERSION and (found == 0 or found in STEPS):
            with self.transaction() as c:
                if not self._sqlite:
                    c.exec_driver_sql(f"SELECT pg_advisory_xact_lock({UPGRADE_LOCK})")
                if self._version() != found:  # another process was quicker
                    continue
                if found == 0:
                    metadata.create_all(c, checkfirst=False)
                else:
                    STEPS[found](c)
                self._set_version(c, found + 1 if found else VERSION)
        return found

    def _set_version(self, c: Connection, version: int) -> None:
        if self._sqlite:
            c.exec_driver_sql(f"PRAGMA user_version={version}")
            return
        c.exec_driver_sql(f"CREATE TABLE IF NOT EXISTS {VERSION_TABLE} (version BIGINT NOT NULL)")
        c.exec_driver_sql(f"DELETE FROM {VERSION_TABLE}")  # noqa: S608
        c.exec_driver_sql(f"INSERT INTO {VERSION_TABLE} VALUES ({version})")  # noqa: S608


def _why(e: Exception) -> str:
    """The driver's own words in one line."""
    return " ".join(str(getattr(e, "orig", None) or e).split())


def _engine(where: Path | str, *, read_only: bool) -> tuple[Engine, str]:
    """An engine that commits each statement by itself outside a transaction, and what to call it in messages."""
    if isinstance(where, Path):
        return _file_engine(where, read_only=read_only), str(where)
    try:
        url = make_url(where)
    except SQLAlchemyError as e:
        raise ConfigError(f"ledger: {where!r} is no URL; give '{DRIVER}://user@host/database'") from e
    if url.drivername != DRIVER:
        raise ConfigError(
            f"ledger: {url.drivername!r} is not supported; give '{DRIVER}://user@host/database'"
        )
    return _server_engine(url, read_only=read_only), url.render_as_string(hide_password=True)


def _file_engine(path: Path, *, read_only: bool) -> Engine:
    return create_engine(
        "sqlite+pysqlite://",
        creator=partial(connect, path, read_only=read_only),
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        isolation_level="AUTOCOMMIT",
    )


def _server_engine(url: URL, *, read_only: bool) -> Engine:
    options = [str(url.query.get("options", "")), "-c synchronous_commit=on"]
    if read_only:
        options.append("-c default_transaction_read_only=on")
    return create_engine(
        url,
        connect_args={
            "options": " ".join(options).strip(),
            "connect_timeout": 10,
            "application_name": "skiff",
        },
        pool_size=1,
        max_overflow=0,
        pool_pre_ping=True,
        isolation_level="AUTOCOMMIT",
    )
