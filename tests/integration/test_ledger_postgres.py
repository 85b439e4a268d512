"""The ledger in a real PostgreSQL: the kit, and what a server adds."""

import signal
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Double,
    LargeBinary,
    MetaData,
    String,
    create_engine,
    func,
    insert,
    inspect,
    select,
)
from sqlalchemy.types import TypeEngine
from typer.testing import CliRunner

from aggregator.adapters.ledger import VERSION, Ledger, dump, exists, load
from aggregator.adapters.ledger.tables import metadata
from aggregator.adapters.windows import Windows
from aggregator.config import load as load_config
from aggregator.records import AuditEntry, Track
from aggregator.stores import StoreError
from cli.app import app
from cli.view import FleetView
from edge_runtime.contract.errors import ConfigError
from tests.golden.make_stores import DEVICE, WINDOWS, write_ledger, write_windows
from tests.golden.make_stores import FOLDER as KEPT
from tests.services import missing_service
from tests.services_postgres import Postgres, find_postgres
from tests.support.fleet import NOW, A
from tests.support.ledger_kit import RELEASE, ROLLOUT, VERDICT, LedgerKit, put

ENTRY = AuditEntry(at_ns=NOW, who="ann", what="start", why="because")


@pytest.fixture(scope="module")
def postgres():
    programs = find_postgres()
    if programs is None:
        missing_service("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    # Not below pytest's folder: that is closed to the server's own user, and too long a name for a socket.
    with tempfile.TemporaryDirectory(prefix="skiff-pg-") as folder:
        Path(folder).chmod(0o755)
        server = Postgres(programs, Path(folder) / "cluster")
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def url(postgres):
    return postgres.database()


class TestServer(LedgerKit):
    @pytest.fixture
    def opened(self, url):
        return partial(Ledger, url)


def everything(ledger):
    names = ("audit", "rollouts", "verdicts", "looks", "incidents", "retrains", "requests")
    return (
        {name: ledger.table(name) for name in names},
        ledger.devices(),
        ledger.tracks(),
        ledger.first_looks(A),
        ledger.traces(A),
        ledger.suspects(A),
        ledger.revisions(),
        ledger.cursors(),
    )


def test_there_is_no_reading_what_was_never_written(url):
    assert not exists(url)
    with pytest.raises(ConfigError, match="start the aggregator first"):
        Ledger(url, read_only=True)
    assert not exists(url)
    Ledger(url).close()
    assert exists(url)


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be opened as a store"):
        Ledger(f"postgresql+psycopg://skiff@/none?host={tmp_path}")
    with pytest.raises(ConfigError, match="cannot be opened as a store"):
        exists(f"postgresql+psycopg://skiff@/none?host={tmp_path}")


def test_a_newer_schema_is_refused_and_left_alone(url):
    ledger = Ledger(url)
    with ledger._db.transaction() as c:
        c.exec_driver_sql(f"UPDATE skiff_ledger SET version={VERSION + 1}")
    ledger.close()
    for read_only in (True, False):
        with pytest.raises(ConfigError, match=f"{VERSION + 1} is not {VERSION}: it was written by a newer"):
            Ledger(url, read_only=read_only)


def test_commits_outlive_a_crash_of_the_server_and_the_ledger_connects_again(postgres, url):
    ledger = Ledger(url)
    with ledger.transaction():
        ledger.put_audit(ENTRY)

    def lose_the_server_in_the_middle():
        with ledger.transaction():
            ledger.put_audit(ENTRY)
            postgres.stop(signal.SIGQUIT)
            ledger.put_audit(ENTRY)

    with pytest.raises(StoreError):
        lose_the_server_in_the_middle()
    with pytest.raises(StoreError):
        ledger.devices()
    postgres.start()
    assert len(ledger.table("audit")) == 1
    with ledger.transaction():
        ledger.put_audit(ENTRY)
    assert len(ledger.table("audit")) == 2
    ledger.close()


def test_a_dump_holds_one_moment_and_loads_anywhere(postgres, url, tmp_path):
    write_ledger(url)
    ledger = Ledger(url)
    put(ledger, VERDICT)
    with ledger.transaction():
        ledger.put_track(Track(cohort=RELEASE.cohort, model=RELEASE.model, release=RELEASE, rollout=ROLLOUT))
    expected = everything(ledger)
    with ledger.transaction():
        ledger.put_audit(ENTRY)
        dump(url, tmp_path / "ledger.sqlite")  # what is not committed is not copied, and nobody waits
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.sqlite"]
    copied = Ledger(tmp_path / "ledger.sqlite", read_only=True)
    assert everything(copied) == expected
    copied.close()

    other = postgres.database()
    load(tmp_path / "ledger.sqlite", other, force=False)
    loaded = Ledger(other)
    assert everything(loaded) == expected
    newest = max(row["id"] for row in loaded.table("requests"))
    assert loaded.request("halt", {}, by="", why="", now_ns=NOW) == newest + 1
    with pytest.raises(StoreError, match="in use"):
        load(tmp_path / "ledger.sqlite", other, force=True)
    loaded.close()
    with pytest.raises(ConfigError, match="holds a ledger already"):
        load(tmp_path / "ledger.sqlite", other, force=False)
    load(tmp_path / "ledger.sqlite", other, force=True)
    loaded = Ledger(other, read_only=True)
    assert everything(loaded) == expected
    loaded.close()
    ledger.close()


@pytest.fixture
def place(tmp_path, postgres):
    """Makes an aggregator's configuration with a database of its own."""

    def made(name):
        path = tmp_path / name / "aggregator.toml"
        path.parent.mkdir()
        path.write_text(f'fleet = "fleet"\nledger = "{postgres.database()}"\n', encoding="utf-8")
        return path

    return made


def with_revisions_skipped(found):
    *before, revisions, cursors = found
    return (*before, {cohort: r + 1000 for cohort, r in revisions.items()}, cursors)


def skiff(*arguments, code=0):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, (done.exit_code, done.stdout, done.stderr, done.exception)
    return done.stderr


def test_backup_and_restore_with_the_ledger_on_a_server(place, tmp_path, monkeypatch):
    one, two = place("one"), place("two")
    write_ledger(load_config(one).ledger)
    write_windows(load_config(one).windows_path)
    with closing(Ledger(load_config(one).ledger, read_only=True)) as ledger:
        expected = with_revisions_skipped(everything(ledger))
    skiff("backup", one, "--out", tmp_path / "copied")

    skiff("restore", two, tmp_path / "copied")
    view = FleetView(two)
    assert view.ready()
    assert view.devices() == (DEVICE,)
    assert view.request("halt", {}, by="ann", why="") == 3
    assert "windows.sqlite: is there already" in skiff("restore", two, tmp_path / "copied", code=2)
    view.config.windows_path.unlink()
    before = sorted(p.name for p in view.config.state_dir.iterdir())
    assert "holds a ledger already" in skiff("restore", two, tmp_path / "copied", code=2)
    assert sorted(p.name for p in view.config.state_dir.iterdir()) == before

    # The server has its part, the file has not: nothing opens, and the next restore goes on.
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", fail)
        assert "No space left" in skiff("restore", two, tmp_path / "copied", "--force", code=1)
    with pytest.raises(ConfigError, match="run `skiff restore` again"):
        Windows(view.config.windows_path)
    with closing(Ledger(view.config.ledger)):
        assert "is in use" in skiff("restore", two, tmp_path / "copied", code=1)
    skiff("restore", two, tmp_path / "copied")
    with closing(Ledger(view.config.ledger, read_only=True)) as restored:
        assert everything(restored) == expected
    assert view.figures().windows == len(WINDOWS) + 1


def moved_to_a_server(kept, url):
    """What a kept file's version would have made on a server: its tables, indexes and rows, and its version."""
    source, target, found = create_engine(f"sqlite:///{kept}"), create_engine(url), MetaData()
    kinds: dict[str, TypeEngine[Any]] = {
        "INTEGER": BigInteger(),
        "TEXT": String(collation="C"),
        "REAL": Double(),
        "BLOB": LargeBinary(),
    }
    try:
        with source.connect() as old, target.begin() as new:
            found.reflect(old)
            for table in found.sorted_tables:
                for column in table.columns:
                    column.type = kinds[str(column.type)]
                for index in table.indexes:
                    index.dialect_options["postgresql"]["where"] = index.dialect_options["sqlite"]["where"]
            found.create_all(new)
            for table in found.sorted_tables:
                rows = [dict(row) for row in old.execute(select(table)).mappings()]
                if rows:
                    new.execute(insert(table), rows)
                if "id" in table.columns:
                    new.exec_driver_sql(
                        f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'),"
                        f" (SELECT COALESCE(MAX(id), 0) + 1 FROM {table.name}), false)"
                    )
            version = old.exec_driver_sql("PRAGMA user_version").scalar_one()
            new.exec_driver_sql("CREATE TABLE skiff_ledger (version BIGINT NOT NULL)")
            new.exec_driver_sql(f"INSERT INTO skiff_ledger VALUES ({version})")
    finally:
        source.dispose()
        target.dispose()


def columns(url):
    engine = create_engine(url)
    try:
        found = inspect(engine)
        return {
            table: (
                sorted((c["name"], str(c["type"]), c["nullable"]) for c in found.get_columns(table)),
                sorted((str(i["name"]), i["column_names"], i["unique"]) for i in found.get_indexes(table)),
            )
            for table in found.get_table_names()
        }
    finally:
        engine.dispose()


# The first version that could be on a server is 2.
@pytest.mark.parametrize("kept", sorted(KEPT.glob("ledger-[!1]*")), ids=lambda path: path.stem)
def test_a_server_of_any_version_is_taken_forward(kept, postgres):
    url, new = postgres.database(), postgres.database()
    moved_to_a_server(kept, url)
    with closing(Ledger(url)) as ledger:
        assert ledger.devices() == (DEVICE,)
        assert [r.by for r in ledger.pending()] == ["bob"]
        assert [row["who"] for row in ledger.table("audit")] == ["ann"]
        assert [row["id"] for row in ledger.table("incidents")] == [2, 1]
        ledger.request("halt", {}, by="", why="", now_ns=NOW)
        with ledger._db.transaction() as c:  # every table goes on counting
            for table in metadata.sorted_tables:
                if table.autoincrement_column is None:
                    continue
                sequence = func.pg_get_serial_sequence(table.name, "id")
                newest = c.execute(select(func.coalesce(func.max(table.c.id), 0))).scalar_one()
                assert c.execute(select(func.nextval(sequence))).scalar_one() > newest, table.name
    Ledger(new).close()
    assert columns(url) == columns(new)
