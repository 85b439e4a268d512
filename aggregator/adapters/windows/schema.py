"""The telemetry store's tables, and how older versions become this one."""

import sqlite3
from collections.abc import Mapping
from typing import Final

from aggregator.adapters.database import Step, run_script
from edge_runtime.contract.profile import FIXED_POINT

VERSION: Final = 5

UNJUDGED, JUDGED, REJECTED = 0, 1, 2
"""``state``: kept before its artifact is known, checked against it, found to contradict it."""

# AUTOINCREMENT: a number must not come again when the newest windows were rolled up, for looks remember numbers.
WINDOWS: Final = """
CREATE TABLE windows (
  id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, session TEXT NOT NULL, seq INTEGER NOT NULL,
  seq_lo INTEGER NOT NULL, model TEXT NOT NULL, digest TEXT NOT NULL, layout TEXT NOT NULL, state INTEGER NOT NULL,
  start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL, synced INTEGER NOT NULL, received_ns INTEGER NOT NULL,
  rows INTEGER NOT NULL, failed INTEGER NOT NULL, refused INTEGER NOT NULL, labelled INTEGER NOT NULL,
  correct INTEGER NOT NULL, rss_bytes INTEGER NOT NULL, peak_rss_bytes INTEGER NOT NULL, wire_bytes INTEGER NOT NULL,
  latency TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
  windows INTEGER NOT NULL DEFAULT 1, UNIQUE (device, session, seq))"""

WINDOW_INDEXES: Final = """
CREATE INDEX windows_by_stream ON windows (digest, device, id);
CREATE INDEX windows_unjudged ON windows (digest) WHERE state=0;
CREATE INDEX windows_rejected ON windows (digest) WHERE state=2;
CREATE INDEX windows_by_receipt ON windows (received_ns)"""

# `day` is a day of receipt since 1970. Two rows may share all of it when they cannot be merged.
RETENTION: Final = """
CREATE TABLE rollups (
  id INTEGER PRIMARY KEY, device TEXT NOT NULL, digest TEXT NOT NULL, model TEXT NOT NULL, layout TEXT NOT NULL,
  day INTEGER NOT NULL, state INTEGER NOT NULL, records INTEGER NOT NULL, windows INTEGER NOT NULL,
  rows INTEGER NOT NULL, failed INTEGER NOT NULL, refused INTEGER NOT NULL, labelled INTEGER NOT NULL,
  correct INTEGER NOT NULL, labelled_squares REAL NOT NULL, products REAL NOT NULL, correct_squares REAL NOT NULL,
  wire_bytes INTEGER NOT NULL, rss_bytes INTEGER NOT NULL, peak_rss_bytes INTEGER NOT NULL,
  first_ns INTEGER NOT NULL, last_ns INTEGER NOT NULL, newest INTEGER NOT NULL,
  profile TEXT NOT NULL, latency TEXT NOT NULL);
CREATE INDEX rollups_by_stream ON rollups (digest, device, day);
CREATE INDEX rollups_unjudged ON rollups (digest) WHERE state=0;
CREATE INDEX rollups_rejected ON rollups (digest) WHERE state=2;
CREATE UNIQUE INDEX rollups_newest ON rollups (newest);
CREATE TABLE intervals (
  device TEXT NOT NULL, session TEXT NOT NULL, model TEXT NOT NULL, lo INTEGER NOT NULL, hi INTEGER NOT NULL,
  whole INTEGER NOT NULL, PRIMARY KEY (device, session, model, hi)) WITHOUT ROWID"""

# `rows` and `top` are those of the windows that the period reaches, see `labels`.
LABELS: Final = """
CREATE TABLE labels (
  id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, source TEXT NOT NULL, seq INTEGER NOT NULL,
  model TEXT NOT NULL, digest TEXT NOT NULL, start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL,
  labelled INTEGER NOT NULL, correct INTEGER NOT NULL, received_ns INTEGER NOT NULL,
  rows INTEGER NOT NULL, top INTEGER NOT NULL, UNIQUE (device, source, seq));
CREATE INDEX labels_by_stream ON labels (digest, device, id);
CREATE INDEX labels_by_receipt ON labels (received_ns);
CREATE INDEX labels_by_end ON labels (digest, device, end_ns);
CREATE TABLE truth (
  digest TEXT NOT NULL, device TEXT NOT NULL, late INTEGER NOT NULL, model TEXT NOT NULL,
  labelled INTEGER NOT NULL, correct INTEGER NOT NULL, compared INTEGER NOT NULL, compared_correct INTEGER NOT NULL,
  expected REAL NOT NULL, PRIMARY KEY (digest, device, late)) WITHOUT ROWID"""

# What labels come to is added to `truth` by whatever adds a row of them, or to one: else every question adds them up.
_EXPECTED: Final = f"CAST(labelled AS REAL)*top/rows/{FIXED_POINT}"
_ADD_TRUTH: Final = """ON CONFLICT (digest, device, late) DO UPDATE SET
    labelled=labelled+excluded.labelled, correct=correct+excluded.correct, compared=compared+excluded.compared,
    compared_correct=compared_correct+excluded.compared_correct, expected=expected+excluded.expected"""
TRUTH_TRIGGERS: Final = f"""
CREATE TRIGGER labels_told AFTER INSERT ON labels BEGIN
  INSERT INTO truth SELECT digest, device, 1, model, labelled, correct, CASE WHEN rows THEN labelled ELSE 0 END,
    CASE WHEN rows THEN correct ELSE 0 END, CASE WHEN rows THEN {_EXPECTED} ELSE 0.0 END FROM labels WHERE id=NEW.id
  {_ADD_TRUTH};
END;
CREATE TRIGGER labels_reached AFTER UPDATE OF rows, top ON labels WHEN NEW.rows BEGIN
  UPDATE truth SET
    compared=compared+CASE WHEN OLD.rows THEN 0 ELSE NEW.labelled END,
    compared_correct=compared_correct+CASE WHEN OLD.rows THEN 0 ELSE NEW.correct END,
    expected=expected+CAST(NEW.labelled AS REAL)/{FIXED_POINT}
      *(CAST(NEW.top AS REAL)/NEW.rows-CASE WHEN OLD.rows THEN CAST(OLD.top AS REAL)/OLD.rows ELSE 0.0 END)
  WHERE digest=NEW.digest AND device=NEW.device AND late=1;
END"""  # noqa: S608

# Which windows of a stream a period reaches is seen in the index alone: a device has many, and they are wide.
REACHED_INDEX: Final = """
DROP INDEX windows_by_stream;
CREATE INDEX windows_by_stream ON windows (digest, device, id, state, synced, start_ns, end_ns)"""

# Lengths of the periods that a source's labels are of. They stay, as what was counted does: counted by another period
# the same rows would count again.
PERIODS: Final = """
CREATE TABLE periods (
  source TEXT NOT NULL, length_ns INTEGER NOT NULL, PRIMARY KEY (source, length_ns)) WITHOUT ROWID"""

# Without `state` in it a partial index does not cover what is asked, and SQLite goes through the index of all windows.
FEW_INDEXES: Final = """
DROP INDEX windows_unjudged;
CREATE INDEX windows_unjudged ON windows (digest, state) WHERE state=0;
DROP INDEX windows_rejected;
CREATE INDEX windows_rejected ON windows (digest, state) WHERE state=2;
CREATE INDEX events_by_receipt ON events (received_ns)"""

SCHEMA: Final = f"""{WINDOWS};
CREATE TABLE payloads (id INTEGER PRIMARY KEY, payload BLOB NOT NULL);{WINDOW_INDEXES};{REACHED_INDEX};
CREATE TABLE streams (
  digest TEXT NOT NULL, device TEXT NOT NULL, newest INTEGER NOT NULL, PRIMARY KEY (digest, device)) WITHOUT ROWID;
CREATE TABLE events (
  id INTEGER PRIMARY KEY, device TEXT NOT NULL, session TEXT NOT NULL, seq INTEGER NOT NULL, wall_ns INTEGER NOT NULL,
  received_ns INTEGER NOT NULL, name TEXT NOT NULL, detail TEXT NOT NULL, UNIQUE (device, session, seq));
CREATE TABLE dead_letters (
  id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, topic TEXT NOT NULL, reason TEXT NOT NULL,
  payload BLOB NOT NULL, length INTEGER NOT NULL, times INTEGER NOT NULL, first_ns INTEGER NOT NULL,
  last_ns INTEGER NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;{RETENTION};{LABELS};
{TRUTH_TRIGGERS};{PERIODS};{FEW_INDEXES}"""

COLUMNS: Final = (
    "id, device, session, seq, seq_lo, model, digest, layout, state, start_ns, end_ns, synced, received_ns, rows,"
    " failed, refused, labelled, correct, rss_bytes, peak_rss_bytes, wire_bytes, latency, reason, windows"
)


def _records_of_several(db: sqlite3.Connection) -> None:
    """1 to 2: a record may hold several windows."""
    db.execute("ALTER TABLE windows ADD COLUMN windows INTEGER NOT NULL DEFAULT 1")


def _retention(db: sqlite3.Connection) -> None:
    """2 to 3: roll-ups and intervals; numbers of windows never come again."""
    db.execute("ALTER TABLE windows RENAME TO old_windows")
    run_script(db, WINDOWS)
    db.execute(f"INSERT INTO windows ({COLUMNS}) SELECT {COLUMNS} FROM old_windows")  # noqa: S608
    db.execute("DROP TABLE old_windows")
    newest = db.execute("SELECT COALESCE(MAX(newest), 0) FROM streams").fetchone()[0]
    if not db.execute("UPDATE sqlite_sequence SET seq=MAX(seq, ?) WHERE name='windows'", (newest,)).rowcount:
        db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('windows', ?)", (newest,))
    run_script(db, WINDOW_INDEXES)
    run_script(db, RETENTION)


def _labels(db: sqlite3.Connection) -> None:
    """3 to 4: labels that come late. What devices told before counts as known, with no estimate beside it."""
    run_script(db, LABELS)
    run_script(db, REACHED_INDEX)
    db.execute(
        "INSERT INTO truth SELECT digest, device, 0, model, SUM(labelled), SUM(correct), 0, 0, 0.0 FROM"
        " (SELECT digest, device, model, labelled, correct FROM windows WHERE state=1 AND labelled>0 UNION ALL"
        " SELECT digest, device, model, labelled, correct FROM rollups WHERE state=1 AND labelled>0)"
        " GROUP BY digest, device"
    )


def _truth(db: sqlite3.Connection) -> None:
    """4 to 5: what labels come to is known as they come, and so are their periods and how many events are kept."""
    db.execute(
        "INSERT INTO truth SELECT digest, device, 1, model, SUM(labelled), SUM(correct),"  # noqa: S608
        " SUM(CASE WHEN rows THEN labelled ELSE 0 END), SUM(CASE WHEN rows THEN correct ELSE 0 END),"
        f" SUM(CASE WHEN rows THEN {_EXPECTED} ELSE 0.0 END) FROM labels WHERE 1 GROUP BY digest, device {_ADD_TRUTH}"
    )
    run_script(db, TRUTH_TRIGGERS)
    run_script(db, PERIODS)
    db.execute("INSERT INTO periods SELECT DISTINCT source, end_ns-start_ns FROM labels")
    db.execute("INSERT INTO counters SELECT 'events', COUNT(*) FROM events")
    run_script(db, FEW_INDEXES)


STEPS: Final[Mapping[int, Step]] = {1: _records_of_several, 2: _retention, 3: _labels, 4: _truth}
