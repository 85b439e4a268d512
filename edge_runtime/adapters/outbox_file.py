"""The outbox's SQLite file: opened for writing, brought to the newest layout, or set aside; in memory where all fails.

A device goes on serving without a disk, so none of this may keep a daemon from starting.
"""

import sqlite3
from pathlib import Path
from typing import Final

from edge_runtime.adapters import disk
from edge_runtime.contract.errors import SkiffError

VERSION: Final = 1
LOG_PAGES: Final = (64, 256)
"""How long the log may grow before it is folded back: a part of what the outbox holds, within these bounds."""

_TABLES: Final = """
CREATE TABLE records (
  place INTEGER PRIMARY KEY,
  session TEXT NOT NULL,
  seq INTEGER NOT NULL,
  topic TEXT NOT NULL,
  payload BLOB NOT NULL,
  windows INTEGER NOT NULL DEFAULT 0,
  UNIQUE (session, seq)
);
CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO totals VALUES ('dropped', 0), ('sent_up_to', 0);
"""
_GAPS: Final = """
CREATE TABLE gaps (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  topic TEXT NOT NULL,
  kind TEXT NOT NULL,
  windows INTEGER NOT NULL,
  records INTEGER NOT NULL,
  start_ns INTEGER,
  end_ns INTEGER,
  UNIQUE (topic, kind)
);
"""
# Version 0 did not write down what was sent: any of it may have been.
_FROM_0: Final = """
ALTER TABLE records ADD COLUMN windows INTEGER NOT NULL DEFAULT 0;
UPDATE records SET windows = 1 WHERE topic LIKE '%/window';
INSERT INTO totals SELECT 'sent_up_to', coalesce(max(place), 0) FROM records;
"""


class Damaged(Exception):
    """The file is no outbox, or not one that can be read to its end."""


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the error tells of wrong bytes in the file, not of a disk that refuses."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def open_or_explain(path: Path, *, max_bytes: int, damage: str = "") -> tuple[sqlite3.Connection, str, str]:
    """The outbox at ``path``, why a damaged one was set aside, and why it is in memory only; "" where neither is so.

    ``damage`` says what is already known to be wrong with the file. Raises `SkiffError` when another process has it.
    """
    aside = ""
    try:
        if not damage:
            try:
                return open_file(path, max_bytes=max_bytes), "", ""
            except Damaged as e:
                damage = str(e)
        _set_aside(path)
        aside = f"{path}: damaged ({damage}); kept as {path.name}.damaged"
        return open_file(path, max_bytes=max_bytes), aside, ""
    except (sqlite3.Error, OSError, Damaged) as e:
        found = f"damaged ({damage}) and cannot be set aside" if damage and not aside else "cannot be written"
        return (
            _open_memory(),
            aside,
            f"{path}: {found} ({e}): records are in memory and lost with the process",
        )


def open_file(path: Path, *, max_bytes: int) -> sqlite3.Connection:
    """Opens ``path``, creates or migrates its tables, and sees that it can be written and read to its end.

    Raises:
        Damaged: the file holds something else; `sqlite3.Error` or `OSError`: the disk refuses.
        SkiffError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=5.0)
    try:
        _prepare(database, max_bytes)
    except BaseException as e:
        database.close()
        if isinstance(
            e, UnicodeDecodeError
        ):  # an error that quotes wrong bytes of the file cannot even be told
            raise Damaged(f"names in it are no text: {e}") from e
        if isinstance(e, sqlite3.Error):
            if _code(e) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise SkiffError(f"{path}: {e}: is another daemon running on this folder?") from e
            if is_damage(e) or _code(e) == sqlite3.SQLITE_ERROR:  # the latter: tables of another make
                raise Damaged(str(e)) from e
        raise
    disk.flush(path.parent)
    return database


def _prepare(database: sqlite3.Connection, max_bytes: int) -> None:
    # FULL flushes the log at each commit; NORMAL would lose the last commits with the power.
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    pages = min(max(LOG_PAGES[0], max_bytes // 4096), LOG_PAGES[1])
    database.execute(f"PRAGMA wal_autocheckpoint = {pages}")
    database.execute(f"PRAGMA journal_size_limit = {pages * 4096}")
    database.execute("PRAGMA cache_size = -256")
    problem = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise Damaged(problem)
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise Damaged(f"its layout {version} is of a later skiff than {VERSION}")
    script = ""
    if version < VERSION:
        old = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchone()
        script = (_FROM_0 if old else _TABLES) + _GAPS
    # The last statement also finds out whether the file can be written at all.
    database.executescript(
        f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {VERSION}; COMMIT;"  # noqa: S608
        "UPDATE totals SET value = value WHERE name = 'dropped'"
    )


def _open_memory() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:")
    database.executescript(_TABLES + _GAPS)
    return database


def _set_aside(path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.replace(path.with_name(path.name + ".damaged"))


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
