"""Copies of both stores in a folder with a manifest, made while the aggregator runs, and put back when it does not.

The ledger is copied first: its cursors then point at windows that the other copy has.
"""

import datetime as dt
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aggregator.adapters import database, ledger, windows
from aggregator.adapters.database import UNFINISHED
from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.records import SKIPPED_REVISIONS
from aggregator.stores import StoreError
from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.contract.fields import Fields

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
LEDGER: Final = "ledger"
WINDOWS: Final = "windows"
VERSIONS: Final = {LEDGER: ledger.VERSION, WINDOWS: windows.VERSION}
STAGING: Final = ".restoring-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a fleet's stores are: the ledger's path or URL, the windows' path."""

    fleet: str
    ledger: Path | str
    windows: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """One store in a backup: its file's name, the version of its schema, its size and its SHA-256."""

    file: str
    version: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """What the manifest of a backup says. ``made`` is UTC in ISO 8601, ``skiff`` the version that made it."""

    fleet: str
    made: str
    skiff: str
    ledger: Copied
    windows: Copied


def back_up(places: Places, folder: Path, *, skiff: str, now: dt.datetime) -> Backup:
    """Copies both stores into ``folder``, which must be new or empty; the manifest, written last, makes it a backup.

    What it has written is gone again when it fails.

    Raises:
        ConfigError: ``folder`` holds something, or a store is missing or of another version.
        StoreError: a store could not be read, or the copy not written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not an empty folder; a backup needs one of its own")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # attributes and audit log are nobody else's business
        return _copy_all(places, folder, skiff, now)
    except BaseException as e:
        _empty(folder, gone=new)
        if isinstance(e, OSError):
            raise StoreError(f"{folder}: the backup cannot be written ({e.strerror})") from e
        raise


def _copy_all(places: Places, folder: Path, skiff: str, now: dt.datetime) -> Backup:
    ledger.dump(places.ledger, folder / f"{LEDGER}.sqlite")
    Windows(places.windows, read_only=True).close()  # there, and of this version
    database.copy(places.windows, folder / f"{WINDOWS}.sqlite")
    made = Backup(
        fleet=places.fleet,
        made=now.astimezone(dt.UTC).isoformat(timespec="seconds"),
        skiff=skiff,
        ledger=_copied(folder, LEDGER),
        windows=_copied(folder, WINDOWS),
    )
    _write(folder / MANIFEST, json.dumps(_document(made), indent=2) + "\n")
    database.sync(folder)
    return made


def _empty(folder: Path, *, gone: bool) -> None:
    """Removes what a backup that failed has written; the error that led here is the one to tell."""
    with suppress(OSError):
        for path in folder.iterdir():
            path.unlink()
        if gone:
            folder.rmdir()


def restore(places: Places, folder: Path, *, force: bool) -> Backup:
    """Puts the stores of a backup in their places; an older version is taken forward on the way.

    The next release is numbered `SKIPPED_REVISIONS` higher than the backup's last.
    Everything is checked and copied beside the places first. From the first change to the last a file named
    `UNFINISHED` stands there, while which no store opens: after a crash, restore again.

    Raises:
        ConfigError: the backup is damaged, incomplete, newer or of another fleet, or, without ``force``, something
            would be overwritten.
        StoreError: a store is in use, or writing failed.
    """
    found = read_manifest(folder)
    if found.fleet != places.fleet:
        raise ConfigError(f"{folder}: is a backup of fleet {found.fleet!r}, not of {places.fleet!r}")
    state = places.windows.parent
    mark = state / UNFINISHED
    try:
        state.mkdir(parents=True, exist_ok=True)
        begun = mark.exists()
        force = force or begun
        _check_free(places, force=force)
        with _staged(folder, found, state) as staged:
            for place in _files(places):
                if place.exists():
                    database.stand_still(place)
            _write(mark, "")
            database.sync(state)
            if isinstance(places.ledger, str):
                try:
                    ledger.load(staged / f"{LEDGER}.sqlite", places.ledger, force=force)
                except (ConfigError, StoreError):
                    if not begun:  # refused, and nothing was changed
                        mark.unlink()
                    raise
            for place in _files(places):
                for log in ("-wal", "-shm"):  # a damaged store's: what it says belongs to another file
                    place.with_name(place.name + log).unlink(missing_ok=True)
                name = WINDOWS if place == places.windows else LEDGER
                (staged / f"{name}.sqlite").replace(place)
            database.sync(state)
            mark.unlink()
            database.sync(state)
    except OSError as e:
        raise StoreError(f"{state}: the stores cannot be restored ({e.strerror}); run it again") from e
    return found


def read_manifest(folder: Path) -> Backup:
    """Reads and checks the manifest; raises `ConfigError` when it is none, or from a newer skiff."""
    path = folder / MANIFEST
    try:
        f = Fields(json.loads(path.read_text(encoding="utf-8")), str(path), ConfigError)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror}); this is no finished backup") from e
    except (ValueError, ContractError) as e:
        raise ConfigError(f"{path}: is damaged ({e})") from e
    if f.integer("format") > FORMAT:
        raise ConfigError(f"{path}: was written by a newer skiff, use that one")
    found = Backup(
        fleet=f.text("fleet"),
        made=f.text("made"),
        skiff=f.text("skiff"),
        ledger=_read_copied(f.section(LEDGER)),
        windows=_read_copied(f.section(WINDOWS)),
    )
    for name, copied in ((LEDGER, found.ledger), (WINDOWS, found.windows)):
        if copied.file != f"{name}.sqlite":
            raise ConfigError(f"{path}: {name}.file is {copied.file!r}, not '{name}.sqlite'")
        if copied.version > VERSIONS[name]:
            raise ConfigError(
                f"{path}: {name} has schema version {copied.version}, from a newer skiff; use that one"
            )
    return found


def _read_copied(f: Fields) -> Copied:
    return Copied(
        file=f.text("file"),
        version=f.integer("version"),
        size_bytes=f.integer("size_bytes"),
        sha256=f.text("sha256"),
    )


def _document(b: Backup) -> dict[str, Any]:
    document: dict[str, Any] = {"format": FORMAT, "fleet": b.fleet, "made": b.made, "skiff": b.skiff}
    for name, copied in ((LEDGER, b.ledger), (WINDOWS, b.windows)):
        document[name] = {
            "file": copied.file,
            "version": copied.version,
            "size_bytes": copied.size_bytes,
            "sha256": copied.sha256,
        }
    return document


def _copied(folder: Path, name: str) -> Copied:
    path = folder / f"{name}.sqlite"
    return Copied(
        file=path.name, version=VERSIONS[name], size_bytes=path.stat().st_size, sha256=_sha256(path)
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    database.sync(path)


def _files(places: Places) -> list[Path]:
    return [place for place in (places.windows, places.ledger) if isinstance(place, Path)]


def _check_free(places: Places, *, force: bool) -> None:
    if force:
        return
    for place in _files(places):
        if place.exists():
            raise ConfigError(f"{place}: is there already; --force replaces it")


@contextmanager
def _staged(folder: Path, found: Backup, state: Path) -> Iterator[Path]:
    """Copies of the backup's files beside their places, checked and taken forward; gone at the end."""
    for left in state.glob(f"{STAGING}*"):  # by a restore that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=state) as name:
        staged = Path(name)
        for copied in (found.ledger, found.windows):
            source, target = folder / copied.file, staged / copied.file
            try:
                shutil.copyfile(source, target)
            except FileNotFoundError as e:
                raise ConfigError(f"{source}: is missing; the backup is incomplete") from e
            if target.stat().st_size != copied.size_bytes or _sha256(target) != copied.sha256:
                raise ConfigError(f"{source}: is not what {MANIFEST} says (SHA-256); the backup is damaged")
        with closing(Ledger(staged / found.ledger.file)) as taken, taken.transaction():
            taken.skip_revisions(SKIPPED_REVISIONS)
        Windows(staged / found.windows.file).close()
        for path in (staged / found.ledger.file, staged / found.windows.file):
            database.stand_still(path)
            database.sync(path)
        yield staged
