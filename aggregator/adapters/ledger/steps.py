"""How a ledger of an older version becomes one of this version, one step at a time.

A step is one transaction: a crash in it leaves the version before, whole. It must go on doing what it did when it was
written: tables that later steps change are spelled out in it. `test_store_versions.py` compares what the steps make of
every kept file with what `tables` makes new.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, MetaData, Table, insert

from aggregator.adapters.ledger.tables import (
    first_looks,
    incidents,
    label_cursors,
    lease,
    number,
    tellings,
    traces,
    verdicts,
    words,
)

VERSION: Final = 5


def _ends_and_clocks(c: Connection) -> None:
    """1 to 2: devices tell how they ended, how often they started, and about their clock."""
    for column in ("last_exit TEXT", "restarts INTEGER", "clock TEXT"):
        default = "0" if column.endswith("INTEGER") else "''"
        c.exec_driver_sql(f"ALTER TABLE devices ADD COLUMN {column} NOT NULL DEFAULT {default}")


def _lease(c: Connection) -> None:
    """2 to 3: several processes may share a ledger, and one of them leads."""
    lease.create(c)


def _columns(c: Connection) -> None:
    """3 to 4: incidents are of a column, not of a kind; what was learned of devices is learned anew."""
    c.exec_driver_sql("DROP INDEX incidents_open")
    c.exec_driver_sql("ALTER TABLE incidents RENAME TO incidents_of_kinds")
    for table in ("verdicts", "looks", "origins", "baselines"):
        c.exec_driver_sql(f"DROP TABLE {table}")
    looks = Table(
        "looks",
        MetaData(),
        words("digest", key=True),
        number("look", key=True),
        words("model"),
        number("at_ns"),
        number("devices"),
        number("row_count"),
        words("document"),
        sqlite_with_rowid=False,
    )
    for made in (verdicts, looks, first_looks, traces, incidents):
        made.create(c)
    for row in c.exec_driver_sql("SELECT * FROM incidents_of_kinds").mappings().all():
        still_open = row["closed_ns"] is None
        moved_on = {
            "column_key": row["kind"],
            "severity": "ticket",
            "closed_ns": row["updated_ns"] if still_open else row["closed_ns"],
            "closed_why": "judged anew by a newer version" if still_open else row["closed_why"],
            "document": _alarm_of_a_verdict(json.loads(row["document"]), json.loads(row["columns"])),
        }
        kept = ("id", "model", "digest", "cohort", "kind", "opened_ns", "updated_ns")
        c.execute(insert(incidents), {name: row[name] for name in kept} | moved_on)
    c.exec_driver_sql("DROP TABLE incidents_of_kinds")
    if c.dialect.name == "postgresql":  # its counter has not seen the numbers that were given
        c.exec_driver_sql(
            "SELECT setval(pg_get_serial_sequence('incidents', 'id'),"
            " (SELECT COALESCE(MAX(id), 0) + 1 FROM incidents), false)"
        )


def _alarm_of_a_verdict(verdict: Mapping[str, Any], columns: Sequence[str]) -> str:
    alarm = {
        "kind": verdict["kind"],
        "cohort": verdict["cohort"],
        "opened_window": 0,
        "devices": verdict["devices"],
        "severity": "ticket",
        "why": verdict["reason"],
        "evidence": [["columns", ", ".join(columns)]],
    }
    return json.dumps(alarm, sort_keys=True, separators=(",", ":"))


def _five(c: Connection) -> None:
    """4 to 5: alarm events wait until they are told, looks take in late labels and can be replayed."""
    kind = "BIGINT" if c.dialect.name == "postgresql" else "INTEGER"
    c.exec_driver_sql(f"ALTER TABLE looks ADD COLUMN newest {kind} NOT NULL DEFAULT 0")
    tellings.create(c)
    label_cursors.create(c)


STEPS: Final[Mapping[int, Callable[[Connection], None]]] = {
    1: _ends_and_clocks,
    2: _lease,
    3: _columns,
    4: _five,
}
"""By the version that the step takes forward."""
