"""Stores of every version are taken forward whole, newer ones refused, and a crash on the way leaves the old one."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect

from aggregator.adapters import documents
from aggregator.adapters.ledger import VERSION as LEDGER_VERSION
from aggregator.adapters.ledger import Ledger, steps
from aggregator.adapters.windows import VERSION as WINDOWS_VERSION
from aggregator.adapters.windows import Windows
from aggregator.records import Selection
from edge_runtime.contract.errors import ConfigError
from tests.golden.make_stores import (
    DEVICE,
    FOLDER,
    LABELS,
    LOOK,
    RELEASE,
    TELLING,
    TRACE,
    UNJUDGED,
    VERDICT,
    WINDOWS,
)
from tests.support.fleet import MODEL, NOW, SECOND, A, B, window
from tests.support.window_kit import counted, merged, once, prune, put

STORES = {"ledger": (Ledger, LEDGER_VERSION), "windows": (Windows, WINDOWS_VERSION)}
KEPT = sorted(FOLDER.glob("*.sqlite"))


def named(path):
    name, _, version = path.stem.partition("-")
    return name, int(version)


@pytest.fixture
def store(tmp_path):
    """A copy of a kept store, that may be changed."""

    def copied(name):
        shutil.copyfile(FOLDER / name, tmp_path / name)
        return tmp_path / name

    return copied


def dump(path):
    with closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA user_version").fetchone()[0], "\n".join(db.iterdump())


def schema(path):
    """Tables, columns and indexes, whatever order the columns were added in."""
    engine = create_engine(f"sqlite:///{path}")
    try:
        found = inspect(engine)
        return {
            table: (
                sorted(
                    (c["name"], str(c["type"]), c["nullable"] and c["name"] != "id", c["default"])
                    for c in found.get_columns(table)
                ),
                found.get_pk_constraint(table)["constrained_columns"],
                sorted(
                    (str(i["name"]), i["column_names"], i["unique"], where_of(i))
                    for i in found.get_indexes(table)
                ),
                [c["column_names"] for c in found.get_unique_constraints(table)],
                {word for word in ("WITHOUT ROWID", "AUTOINCREMENT") if word in sql_of(path, table)},
            )
            for table in found.get_table_names()
        }
    finally:
        engine.dispose()


def where_of(index):
    return str(index.get("dialect_options", {}).get("sqlite_where")).replace(" ", "")


def sql_of(path, table):
    with closing(sqlite3.connect(path)) as db:
        row = db.execute("SELECT sql FROM sqlite_master WHERE type='table' AND name=?", (table,)).fetchone()
    return str(row[0]).upper()


def without_bytes(found):
    """What `counted` and `once` say, but for the size on the wire: older devices wrote otherwise."""
    totals, *rest = found
    return {key: [*numbers[:6], *numbers[7:]] for key, numbers in totals.items()}, *rest


def test_every_version_up_to_this_one_is_kept():
    for name, (_, version) in STORES.items():
        assert [v for n, v in map(named, KEPT) if n == name] == list(range(1, version + 1))


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_what_the_steps_make_is_what_a_new_store_has(kept, store, tmp_path):
    opens, version = STORES[named(kept)[0]]
    path, new = store(kept.name), tmp_path / "new.sqlite"
    opens(path).close()
    opens(new).close()
    assert schema(path) == schema(new)
    assert dump(path)[0] == version
    opens(path, read_only=True).close()


@pytest.mark.parametrize(
    "kept", [p for p in KEPT if named(p)[1] < STORES[named(p)[0]][1]], ids=lambda p: p.stem
)
def test_a_reader_does_not_take_a_store_forward(kept, store):
    name, version = named(kept)
    path = store(kept.name)
    with pytest.raises(
        ConfigError, match=f"version {version} is not {STORES[name][1]}: start this aggregator once"
    ):
        STORES[name][0](path, read_only=True)
    assert dump(path) == dump(kept)


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("read_only", [True, False])
def test_a_newer_store_is_refused_and_left_alone(name, store, read_only):
    opens, version = STORES[name]
    path = store(f"{name}-{version}.sqlite")
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version={version + 1}")
    before = dump(path)
    with pytest.raises(ConfigError, match="written by a newer skiff"):
        opens(path, read_only=read_only)
    assert dump(path) == before


@pytest.mark.parametrize("kept", sorted(FOLDER.glob("ledger-*")), ids=lambda path: path.stem)
def test_a_ledger_of_any_version_says_what_it_was_told(kept, store):
    with closing(Ledger(store(kept.name))) as ledger:
        assert ledger.devices() == (DEVICE,)
        (track,) = ledger.tracks()
        assert track.release == RELEASE
        assert ledger.revisions() == {RELEASE.cohort: 4}
        assert [r.by for r in ledger.pending()] == ["bob"]
        assert ledger.answer(1) == ("refused", "there is none")
        assert [row["who"] for row in ledger.table("audit")] == ["ann"]
        assert ledger.retrains("waiting") == ((1, "{}"),)
        assert ledger.asked(MODEL) == (frozenset({A}), NOW)
        assert ledger.request("halt", {}, by="", why="", now_ns=NOW) == 3
        newest, oldest = ledger.table("incidents")
        assert (oldest["kind"], oldest["closed_ns"]) == ("skew", NOW + 5)
        assert (newest["kind"], newest["opened_ns"]) == ("skew", NOW + 9)
        assert documents.read_alarm(json.dumps(newest["document"])).why == "a moved"
        if named(kept)[1] <= 3:  # the judge changed with version 4: it begins anew
            assert oldest["closed_why"] == "calm"
            assert (newest["closed_ns"], newest["closed_why"]) == (NOW + 9, "judged anew by a newer version")
            assert (ledger.alarming(), ledger.verdicts(), ledger.next_look(A)) == ((), (), 0)
        else:
            assert newest["closed_ns"] is None
            assert (ledger.traces(A), ledger.verdicts(), ledger.next_look(A)) == ((TRACE,), (VERDICT,), 2)
            assert ledger.suspects(A) == LOOK.suspects
            assert [r.device for one in ledger.first_looks(A) for r in one.readings] == ["dev-1"]
        waits = [replace(telling, number=0) for telling in ledger.tellings()]
        assert waits == ([TELLING] if named(kept)[1] >= 5 else [])  # before, events were told or lost
        with ledger.transaction():
            (event,) = ledger.put_traces(B, MODEL, (TRACE,), NOW)
        assert (event.what, event.number) == ("opened", 3)


@pytest.mark.parametrize("kept", sorted(FOLDER.glob("windows-*")), ids=lambda path: path.stem)
def test_a_windows_store_of_any_version_counts_what_it_counted(kept, store):
    path = store(kept.name)
    with closing(Windows(path)) as windows:
        assert without_bytes(counted(windows)) == without_bytes(once([*WINDOWS, UNJUDGED]))
        assert windows.figures().windows == len(WINDOWS) + 1
        assert windows.figures().unjudged == 1
        assert windows.figures().events == len(windows.events()) == 1
        assert windows.periods(LABELS[0].source) == ((10 * SECOND,) if named(kept)[1] >= 4 else ())
        assert [letter["reason"] for letter in windows.dead_letters()] == ["why"]
        assert put(windows, *WINDOWS, UNJUDGED).duplicates == len(WINDOWS) + 1
        newest = max(n for _, _, n in windows.streams())
        late = len(LABELS) if named(kept)[1] >= 4 else 0
        assert prune(windows, NOW + 9 * SECOND) == len(WINDOWS) + 2 + late
        assert without_bytes(counted(windows)) == without_bytes(once([*WINDOWS, UNJUDGED]))
        assert put(windows, *WINDOWS, UNJUDGED).duplicates == len(WINDOWS) + 1
        put(windows, window("dev-4"))
        assert max(n for _, _, n in windows.streams()) == newest + 1
        assert merged(windows, last=1) == window("dev-4").profile


def test_numbers_go_on_in_a_store_that_was_emptied_before_it_was_taken_forward(store):
    path = store("windows-2.sqlite")
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM payloads")
        db.execute("DELETE FROM windows")
    with closing(Windows(path)) as windows:
        newest = max(n for _, _, n in windows.streams())
        put(windows, window("dev-4"))
        assert max(n for _, _, n in windows.streams()) == newest + 1
    assert list(windows_selected(path)) == [window("dev-4")]


def windows_selected(path):
    with closing(Windows(path, read_only=True)) as windows:
        return tuple(windows.windows(Selection()))


KILLED = """
import os, sqlite3, sys
from pathlib import Path
from aggregator.adapters.windows import schema
from aggregator.adapters.windows import Windows
plain = schema.STEPS[2]
def dies(db):
    plain(db)
    os._exit(9)
schema.STEPS[2] = dies
Windows(Path(sys.argv[1]))
"""


def test_a_process_that_dies_in_a_step_leaves_the_version_before(store, repository: Path):
    path = store("windows-2.sqlite")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], cwd=repository, env={**os.environ}, check=False, timeout=60
    )
    assert done.returncode == 9
    assert dump(path) == dump(FOLDER / "windows-2.sqlite")
    with closing(Windows(path)) as windows:
        assert without_bytes(counted(windows)) == without_bytes(once([*WINDOWS, UNJUDGED]))


def test_a_step_that_fails_leaves_the_version_before(store, monkeypatch):
    path = store("ledger-1.sqlite")
    plain = steps.STEPS[1]

    def fails(c):
        plain(c)
        c.exec_driver_sql("INSERT INTO nowhere VALUES (1)")

    monkeypatch.setitem(steps.STEPS, 1, fails)
    with pytest.raises(ConfigError, match="no such table: nowhere"):
        Ledger(path)
    assert dump(path) == dump(FOLDER / "ledger-1.sqlite")
    monkeypatch.undo()
    with closing(Ledger(path)) as ledger:
        assert ledger.devices() == (DEVICE,)


@pytest.mark.parametrize("kept", sorted(FOLDER.glob("windows-*")), ids=lambda path: path.stem)
def test_a_telemetry_store_of_any_version_knows_what_devices_told_and_labels_since_4(kept, store):
    with closing(Windows(store(kept.name))) as windows:
        first, *others = windows.truths()
    assert (first.device, first.digest) == ("dev-1", A)
    if named(kept)[1] < 4:
        assert (first.labelled, first.correct, first.compared, others) == (30, 7, 0, [])
    else:
        assert (first.labelled, first.correct, first.compared) == (50, 18, 50)
        assert [(t.device, t.labelled, t.correct) for t in others] == [("dev-2", 10, 8)]
