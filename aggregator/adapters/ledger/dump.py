"""A ledger as one portable file, whichever database keeps it: SQLite's own format, of the same schema version."""

from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Table, func, insert, select, text

from aggregator.adapters import database
from aggregator.adapters.ledger.database import Database
from aggregator.adapters.ledger.tables import metadata
from aggregator.stores import StoreError
from edge_runtime.contract.errors import ConfigError

CHUNK_ROWS: Final = 1000


def dump(where: Path | str, target: Path) -> None:
    """Copies the ledger, as it is at one moment, into a new SQLite file, while its service goes on.

    Raises:
        ConfigError: there is no ledger of this version.
        StoreError: reading or writing failed; ``target`` is worth nothing then.
    """
    source = Database(where, read_only=True)
    try:
        if isinstance(where, Path):
            database.copy(where, target)
            return
        copied = Database(target)
        try:
            with source.snapshot() as old, copied.transaction():
                for table in metadata.sorted_tables:
                    for rows in _chunks(old, table):
                        copied.run(insert(table), rows)
        finally:
            copied.close()
        database.stand_still(target)
        database.sync(target)
    finally:
        source.close()


def load(file: Path, url: str, *, force: bool) -> None:
    """Fills the ledger at ``url`` from a file that `dump` wrote, in one transaction.

    Raises:
        ConfigError: the file is of another version, or, without ``force``, the ledger has rows already.
        StoreError: the ledger is in use, or writing failed; it is as it was.
    """
    source = Database(file, read_only=True)
    try:
        target = Database(url)
        try:
            with source.snapshot() as old, target.transaction() as new:
                _check_alone(target, new)
                for table in reversed(metadata.sorted_tables):
                    if not force and new.execute(select(table).limit(1)).first() is not None:
                        raise ConfigError(f"{target.name}: holds a ledger already; --force replaces it")
                    new.execute(table.delete())
                for table in metadata.sorted_tables:
                    for rows in _chunks(old, table):
                        new.execute(insert(table), rows)
                    _go_on_counting(new, table)
        finally:
            target.close()
    finally:
        source.close()


def _chunks(c: Connection, table: Table) -> Any:
    query = select(table).order_by(*table.primary_key).execution_options(yield_per=CHUNK_ROWS)
    for rows in c.execute(query).mappings().partitions():
        yield [dict(row) for row in rows]


def _check_alone(target: Database, c: Connection) -> None:
    others = c.scalar(
        text(
            "SELECT COUNT(*) FROM pg_stat_activity WHERE datname=current_database()"
            " AND application_name='skiff' AND pid<>pg_backend_pid()"
        )
    )
    if others:
        raise StoreError(f"{target.name}: is in use; stop the aggregator first")


def _go_on_counting(c: Connection, table: Table) -> None:
    """Lets the database number new rows after those that were loaded."""
    column = table.autoincrement_column
    if column is not None:
        sequence = func.pg_get_serial_sequence(table.name, column.name)
        newest = select(func.coalesce(func.max(column), 0) + 1).scalar_subquery()
        c.execute(select(func.setval(sequence, newest, False)))
