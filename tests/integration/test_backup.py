"""Backups of stores in use are whole, and restoring one is all or nothing."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aggregator.adapters import backups
from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.records import Selection
from cli.app import app
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import DeviceId
from tests.golden.make_stores import DEVICE, RELEASE, UNJUDGED, WINDOWS, write_ledger, write_windows
from tests.golden.make_stores import FOLDER as KEPT
from tests.integration.test_aggregator_service import Site
from tests.support.fleet import NOW, A, window
from tests.support.window_kit import counted, once, put

RUN = CliRunner()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "aggregator.toml"
    path.write_text('fleet = "fleet"\nstate_dir = "state"\n', encoding="utf-8")
    return path


@pytest.fixture
def state(config):
    folder = config.parent / "state"
    write_ledger(folder / "ledger.sqlite")
    write_windows(folder / "windows.sqlite")
    return folder


def skiff(*arguments, code=0):
    done = RUN.invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, (done.exit_code, done.stdout, done.stderr, done.exception)
    return done


def check_contents(state):
    with (
        closing(Ledger(state / "ledger.sqlite")) as ledger,
        closing(Windows(state / "windows.sqlite")) as store,
    ):
        assert ledger.devices() == (DEVICE,)
        assert ledger.tracks()[0].release == RELEASE
        assert ledger.revisions() == {
            RELEASE.cohort: 1004
        }  # above what devices may have seen since the backup
        assert counted(store) == once([*WINDOWS, UNJUDGED])


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_backup_comes_back_as_it_was(config, state, tmp_path):
    copied = tmp_path / "copied"
    skiff("backup", config, "--out", copied)
    assert sorted(p.name for p in copied.iterdir()) == ["ledger.sqlite", "manifest.json", "windows.sqlite"]
    assert copied.stat().st_mode & 0o077 == 0
    shutil.rmtree(state)
    skiff("restore", config, copied)
    assert sorted(p.name for p in state.iterdir()) == ["ledger.sqlite", "windows.sqlite"]
    check_contents(state)


@contextmanager
def writing(folder):
    """A process that keeps writing to both stores in ``folder``."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.support.store_writer", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    with child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()


def test_a_backup_under_writes_is_of_one_moment_each(config, tmp_path):
    state, copied, back = tmp_path / "state", tmp_path / "copied", tmp_path / "back"
    with writing(state) as child:
        while int(child.stdout.readline()) < 60:
            pass
        skiff("backup", config, "--out", copied)
        before, after = 60, int(child.stdout.readline())
        while after < 120:  # it went on
            after = int(child.stdout.readline())
        child.communicate()
        assert child.returncode == 0
    for name in ("ledger", "windows"):
        with closing(sqlite3.connect(copied / f"{name}.sqlite")) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    config.write_text(f'fleet = "fleet"\nstate_dir = "{back}"\n', encoding="utf-8")
    skiff("restore", config, copied)
    with (
        closing(Ledger(back / "ledger.sqlite")) as ledger,
        closing(Windows(back / "windows.sqlite")) as store,
    ):
        entries = [int(row["what"]) for row in ledger.table("audit", 10_000)]
        assert entries == list(range(len(entries), 0, -1))
        assert before <= len(entries) <= after
        totals = {t.device: t for t in store.totals(Selection())}
        stored = totals[DeviceId("dev-1")].windows
        assert stored == totals[DeviceId("dev-2")].windows
        assert store.figures().windows == 2 * stored
        assert totals[DeviceId("dev-1")].correct_squares == 4 * stored
        # The ledger is the older one: what its cursor has seen is there.
        assert ledger.cursors()[A, DeviceId("dev-1")] == 2 * len(entries) <= 2 * stored
        again = put(store, *(window(seq=seq, labelled=3, correct=2) for seq in range(1, stored + 1)))
        assert (again.stored, again.duplicates) == (0, stored)


def test_a_running_service_is_backed_up_and_cannot_be_overwritten(mosquitto, tmp_path):
    site = Site(tmp_path, mosquitto)
    with closing(site.device("dev-1")) as device, site.running():
        device.put(window(seq=seq) for seq in range(1, 6))
        site.wait(lambda: site.windows(lambda s: s.figures().windows) == 5, "the windows")
        skiff("backup", site.path, "--out", tmp_path / "copied")
        before = site.windows(lambda s: (s.figures().windows, s.totals(Selection())))
        done = skiff("restore", site.path, tmp_path / "copied", "--force", code=1)
        assert "is in use; stop the aggregator first" in done.stderr
        device.put([window(seq=6)])
        site.wait(lambda: site.windows(lambda s: s.figures().windows) == 6, "the window after that")
    skiff("restore", site.path, tmp_path / "copied", "--force")
    assert site.windows(lambda s: (s.figures().windows, s.totals(Selection()))) == before


def test_what_is_there_is_not_overwritten_without_force(config, state, tmp_path):
    skiff("backup", config, "--out", tmp_path / "copied")
    with closing(Windows(state / "windows.sqlite")) as store:
        put(store, window("dev-9"))
    before = files(state)
    done = skiff("restore", config, tmp_path / "copied", code=2)
    assert "--force replaces it" in done.stderr
    assert files(state) == before
    skiff("restore", config, tmp_path / "copied", "--force")
    check_contents(state)


def test_a_backup_needs_a_folder_of_its_own_and_stores(config, state, tmp_path):
    done = skiff("backup", config, "--out", state, code=2)
    assert "is not an empty folder" in done.stderr
    (state / "windows.sqlite").unlink()
    done = skiff("backup", config, "--out", tmp_path / "copied", code=2)
    assert "no such store yet" in done.stderr
    assert (
        "this is no finished backup"
        in skiff("restore", config, tmp_path / "copied", "--force", code=2).stderr
    )


def test_a_backup_that_fails_leaves_nothing_behind(config, state, tmp_path):
    (state / "windows.sqlite").rename(tmp_path / "elsewhere")
    new, empty = tmp_path / "new", tmp_path / "empty"
    empty.mkdir()
    for folder in (new, empty):
        assert "no such store yet" in skiff("backup", config, "--out", folder, code=2).stderr
    assert not new.exists()
    assert list(empty.iterdir()) == []
    (tmp_path / "elsewhere").rename(state / "windows.sqlite")
    for folder in (new, empty):
        skiff("backup", config, "--out", folder)


def flipped(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: flipped(f, "windows.sqlite"), "SHA-256"),
        (lambda f: flipped(f, "ledger.sqlite"), "SHA-256"),
        (lambda f: os.truncate(f / "ledger.sqlite", 4096), "SHA-256"),
        (lambda f: (f / "windows.sqlite").unlink(), "is missing"),
        (lambda f: (f / "manifest.json").unlink(), "no finished backup"),
        (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
        (lambda f: edited(f, format=2), "newer skiff"),
        (lambda f: edited(f, fleet="other"), "of fleet 'other', not of 'fleet'"),
        (lambda f: edited(f, ledger={"version": 99}), "schema version 99"),
        (lambda f: edited(f, windows={"file": "../state/ledger.sqlite"}), "windows.file"),
    ],
)
def test_a_damaged_or_foreign_backup_changes_nothing(config, state, tmp_path, damage, words):
    skiff("backup", config, "--out", tmp_path / "copied")
    damage(tmp_path / "copied")
    before = files(state)
    assert words in skiff("restore", config, tmp_path / "copied", "--force", code=2).stderr
    assert files(state) == before


def edited(folder, **changes):
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    for key, value in changes.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(document))


def test_an_older_backup_is_taken_forward(config, tmp_path):
    copied = tmp_path / "copied"
    copied.mkdir()
    document = {"format": 1, "fleet": "fleet", "made": "2026-01-01T00:00:00+00:00", "skiff": "0.1"}
    for name in ("ledger", "windows"):
        target = copied / f"{name}.sqlite"
        shutil.copyfile(KEPT / f"{name}-1.sqlite", target)
        size, digest = target.stat().st_size, backups._sha256(target)
        document[name] = {"file": target.name, "version": 1, "size_bytes": size, "sha256": digest}
    (copied / "manifest.json").write_text(json.dumps(document))
    skiff("restore", config, copied)
    with closing(Ledger(tmp_path / "state" / "ledger.sqlite", read_only=True)) as ledger:
        assert ledger.devices() == (DEVICE,)
    with closing(Windows(tmp_path / "state" / "windows.sqlite", read_only=True)) as store:
        assert store.figures().windows == len(WINDOWS) + 1


def test_a_damaged_store_is_replaced_with_its_log(config, state, tmp_path):
    skiff("backup", config, "--out", tmp_path / "copied")
    for name in ("ledger", "windows"):
        (state / f"{name}.sqlite").write_bytes(b"rubbish" * 1000)
        (state / f"{name}.sqlite-wal").write_bytes(b"more of it" * 1000)
    skiff("restore", config, tmp_path / "copied", "--force")
    check_contents(state)


def test_a_restore_that_was_interrupted_opens_nothing_until_it_is_done(config, state, tmp_path, monkeypatch):
    copied = tmp_path / "copied"
    skiff("backup", config, "--out", copied)
    with closing(Windows(state / "windows.sqlite")) as store:
        put(store, window("dev-9"))
    with closing(Ledger(state / "ledger.sqlite")) as ledger:
        ledger.request("halt", {}, by="", why="", now_ns=NOW)
    plain = Path.replace

    class Killed(BaseException):
        """As a kill is: no handler of errors sees it."""

    def once_only(self, target):
        if target.name == "ledger.sqlite":
            raise Killed
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", once_only)
    places = backups.Places(fleet="fleet", ledger=state / "ledger.sqlite", windows=state / "windows.sqlite")
    with pytest.raises(Killed):
        backups.restore(places, copied, force=True)
    monkeypatch.undo()
    for opens, name in ((Ledger, "ledger"), (Windows, "windows")):
        for read_only in (True, False):
            with pytest.raises(ConfigError, match="run `skiff restore` again"):
                opens(state / f"{name}.sqlite", read_only=read_only)
    (state / ".restoring-left").mkdir()
    skiff("restore", config, copied)  # goes on without --force
    assert sorted(p.name for p in state.iterdir()) == ["ledger.sqlite", "windows.sqlite"]
    check_contents(state)
