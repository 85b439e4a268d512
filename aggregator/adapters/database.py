"""One SQLite file, opened the way both stores need it.

Write-ahead log, ``synchronous=FULL``: a committed transaction survives a power cut. One connection per store
and process; another process may read at any time (``read_only``), and write short transactions of its own.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from edge_runtime.contract.errors import ConfigError

BUSY_TIMEOUT_SECONDS: Final = 10.0


def connect(
    path: Path, schema: str, version: int, *, read_only: bool, steps: Mapping[int, str] | None = None
) -> sqlite3.Connection:
    """Opens ``path``, making it with ``schema`` when it is new; a writer takes an older file forward.

    ``steps`` holds, for each version that can be taken forward, the statements that make it the next one.

    Raises:
        ConfigError: the file is missing (read-only), is no database, or is of another version.
    """
    if read_only and not path.exists():
        raise ConfigError(f"{path}: no such store yet; start the aggregator first (skiff serve)")
    if not read_only:
        path.parent.mkdir(parents=True, exist_ok=True)
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = None
    try:
        connection = sqlite3.connect(
            uri, uri=True, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
        )
        found = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if not read_only:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            if found == 0:
                with transaction(connection):
                    for statement in schema.split(";"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version={version}")
                found = version
            found = _upgrade(connection, found, version, steps or {})
    except sqlite3.DatabaseError as e:
        if connection is not None:
            connection.close()
        raise ConfigError(
            f"{path}: cannot be opened as a store ({e}); move it away or restore a backup"
        ) from e
    if found != version:
        connection.close()
        raise ConfigError(
            f"{path}: schema version {found} is not {version}: use the skiff that wrote it; if it is older, start "
            "this aggregator once"
        )
    return connection


def _upgrade(connection: sqlite3.Connection, found: int, version: int, steps: Mapping[int, str]) -> int:
    while found < version and found in steps:
        with transaction(connection):
            for statement in steps[found].split(";"):
                connection.execute(statement)
            found += 1
            connection.execute(f"PRAGMA user_version={found}")
    return found


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Everything inside is committed together, or, when it raises, not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
