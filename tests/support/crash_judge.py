"""Starts a device on a state that a crash may have left, and says what it breaks of what was promised.

The laws: a start finds a record that was promised, or the one that was being written; once a model was committed one
that is whole serves; the model before it is there; every model under a good name is whole; what is quarantined is not
tried again; what is trusted never goes back.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import daemon as daemon_module
from edge_runtime import shadowing
from edge_runtime.adapters.slots import Slots
from edge_runtime.config import DaemonConfig
from edge_runtime.contract import ids
from edge_runtime.contract.codec import decode
from edge_runtime.contract.errors import ArtifactError, SkiffError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.messages import SignedRelease
from edge_runtime.contract.release import desired, from_payload
from edge_runtime.core import events as core
from edge_runtime.engine import Engine
from edge_runtime.loading import load_model
from edge_runtime.watch import Watch
from tests.publisher import DEVICE
from tests.support.crash_bench import Bench, Beside, Device
from tests.support.crash_model import State
from tests.support.crash_story import Kept, Life, Promise
from tests.support.recorder import Recorder

LATE = 10**6
"""A revision that no story reaches."""
LINKED_BYTES = 4 << 10
"""Larger files are links into a pool: nothing that is tested writes into a file that has its name already."""


class Broken(Exception):
    """A promise was not kept."""


@dataclass(frozen=True, slots=True)
class OnDisk:
    """What the record names, read without the device's own code; "" for none."""

    record: str = ""
    committed: str = ""
    previous: str = ""
    trial: str = ""


class Credulous:
    """Stands for `Updates`, with a child that says of every release that its model is installed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.asked: list[core.StartUpdate] = []
        self._waiting: list[core.StartUpdate] = []

    @property
    def running(self) -> bool:
        return bool(self._waiting)

    def start(self, action: core.StartUpdate) -> None:
        self.asked.append(action)
        self._waiting.append(action)

    def kill(self) -> None:
        self._waiting.clear()

    def listen(self) -> Iterator[core.AgentEvent]:
        while self._waiting:
            message = decode(self._waiting.pop().release)
            assert isinstance(message, SignedRelease)
            release = from_payload(message.payload)
            wanted = desired(release, DEVICE)
            yield core.UpdateEnded(ok=True, release=release, installed=True, digest=wanted)


class Aside:
    """Stands for `Keeper`: what would leave the device is of no concern here."""

    def __init__(self, *_: Any) -> None: ...
    def append(self, action: core.Append) -> None: ...
    def trim(self, action: core.Trim) -> None: ...
    def about_to_leave(self, action: core.Send) -> list[Any]:
        return []

    def tick(self, now_seconds: float) -> tuple[()]:
        return ()

    def close(self) -> None: ...


class Judge:
    """Judges states below ``folder``, which should be in memory. ``config`` is the story's device."""

    def __init__(self, bench: Bench, config: DaemonConfig, folder: Path) -> None:
        self._bench = bench
        self._config = config
        self._folder = folder
        self._pool: dict[bytes, Path] = {}
        self._engines: dict[Digest, Engine] = {}
        self._tried: set[tuple[object, ...]] = set()
        self._offers: dict[tuple[str, int], bytes] = {}
        self._watch: Watch | None = None
        self._judged = 0
        self.loaded = 0

    # ── the quick way: the daemon's own decisions and files ────────────────────────────────────────────

    @contextmanager
    def standing(self) -> Iterator[None]:
        """What costs time and keeps nothing that is judged is replaced until this is left."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(daemon_module, "time", self._bench.clocks)
            patch.setattr(daemon_module, "Updates", Credulous)
            patch.setattr(daemon_module, "Keeper", Aside)
            patch.setattr(shadowing, "Shadowing", lambda *_, **__: Beside(lambda: 0))
            patch.setattr(daemon_module, "Watch", self._watching)
            patch.setattr(daemon_module, "load_model", self._load)
            yield

    def problem(self, state: State, promise: Promise, rng: random.Random) -> str:
        """What a device that starts on ``state`` breaks of ``promise``; "" when nothing. While `standing`."""
        config = self._materialise(state)
        try:
            self._check(state, config, promise, rng)
        except Broken as e:
            return str(e)
        except (SkiffError, OSError) as e:
            return f"it does not start: {type(e).__name__}: {e}"
        finally:
            shutil.rmtree(config.state_dir.parent)
        return ""

    def _check(self, state: State, config: DaemonConfig, promise: Promise, rng: random.Random) -> None:
        believed = tuple((n, d) for n, d in sorted(state.files.items()) if n.startswith("state/trust/"))
        if (believed, promise) not in self._tried:  # nothing else says what is trusted
            check_trust(config, promise)
            self._tried.add((believed, promise))
        before = check_records(config, promise)
        device = Device(config, self._bench.clocks)
        device.start()
        self._check_serving(device, before)
        if promise.quarantine:
            held = rng.choice(sorted(promise.quarantine.items()))
            tried = (before, held, tuple(sorted(p.name for p in (config.state_dir / "blobs").iterdir())))
            if tried not in self._tried:  # all that the answer can depend on
                self._tried.add(tried)
                self._offer_again(device, held)
                self._check_serving(device, before)

    def _check_serving(self, device: Device, before: OnDisk) -> None:
        if not before.committed:
            return
        serving, now = device.serving, device.slots
        if serving is None:
            raise Broken("nothing serves")
        if serving not in (before.committed, before.trial):
            raise Broken(f"{serving} serves, which is neither committed nor on trial")
        if now.committed != before.committed:
            raise Broken(f"{now.committed} is committed instead of {before.committed}")
        if before.previous and not device.daemon._slots.has(ids.digest(before.previous)):
            raise Broken(f"the model before, {before.previous}, is lost")

    def _offer_again(self, device: Device, held: tuple[str, int]) -> None:
        digest, attempt = ids.digest(held[0]), held[1]
        if held not in self._offers:
            self._offers[held] = self._bench.offer(digest, attempt=attempt, revision=LATE)
        device.hear(self._offers[held])
        updates = device.daemon._updates
        assert isinstance(updates, Credulous)
        device.turn()
        if not updates.asked:
            raise Broken("it does not follow releases any more")
        if dict(updates.asked[-1].quarantine).get(digest, 0) < attempt:
            raise Broken(f"the child is not told that {digest} is quarantined")
        trial = device.slots.trial
        if device.serving == digest or (trial is not None and trial.digest == digest):
            raise Broken(f"{digest} is tried again, attempt {attempt}")

    # ── the long way: everything real, to the end ──────────────────────────────────────────────────────

    def finish(
        self, state: State, promise: Promise, rng: random.Random, release: tuple[bytes, Digest]
    ) -> Life:
        """Has a device on ``state`` follow a release, everything real, until its model is committed.

        Whatever no start may depend on is thrown in: remains of TUF's work, of the lock, of the outbox. Returns the
        record of it; raises `Broken` when it does not come to that end.
        """
        message, wanted = release
        config = self._materialise(state, copy=True)
        home = config.state_dir.parent
        rubbish(config.state_dir, rng)
        try:
            check_trust(config, promise)
            check_records(config, promise)
            life = Life(Recorder(home), first_records(config))
            device = Device(config, self._bench.clocks)
            with self._bench.standing(), life.recorded():
                device.boot()
                device.hear(message)
                device.turn_until(lambda s: s.committed == wanted and s.trial is None, rows=8)
                device.power_off()
            if not Slots(config.state_dir).has(wanted, verify=True):
                raise Broken(f"{wanted} is committed and not whole")
        except (SkiffError, OSError, AssertionError) as e:
            raise Broken(f"it does not finish: {type(e).__name__}: {e}") from e
        finally:
            shutil.rmtree(home)
        return life

    # ── what is replaced ───────────────────────────────────────────────────────────────────────────────

    def _watching(self, config: DaemonConfig) -> Watch:
        if self._watch is None:
            self._watch = Watch(config)
        return self._watch

    def _load(self, path: Path, digest: Digest, config: DaemonConfig, *, on_trial: bool = False) -> Engine:
        """Hashes every file, has ONNX Runtime load each content once and answer its golden rows."""
        try:
            found = digest_of(path.read_bytes())
        except OSError as e:
            raise ArtifactError(f"{path}: {e}") from e
        if found != digest:
            raise ArtifactError(f"{path}: has SHA-256 {found}")
        if digest not in self._engines:
            self._engines[digest] = load_model(path, digest, config, on_trial=on_trial)
            self.loaded += 1
        return self._engines[digest]

    # ── disks ──────────────────────────────────────────────────────────────────────────────────────────

    def _materialise(self, state: State, *, copy: bool = False) -> DaemonConfig:
        self._judged += 1
        home = self._folder / str(self._judged)
        home.mkdir(parents=True)
        for folder in sorted(state.folders):
            (home / folder).mkdir()
        for name, data in state.files.items():
            path = home / name
            if len(data) < LINKED_BYTES or not name.endswith(".onnx") or copy:
                path.write_bytes(data)
            else:
                os.link(self._pooled(data), path)
        return replace(
            self._config,
            state_dir=home / "state",
            status_socket=home / "state/status.sock",
            trust_root=home / "root.json",
        )

    def _pooled(self, data: bytes) -> Path:
        path = self._pool.get(data)
        if path is None:
            path = self._pool[data] = self._folder / f"pool-{len(self._pool)}"
            path.write_bytes(data)
        return path

    def check_pool(self) -> None:
        """What was linked into states is what it was: no device has written into a model's file."""
        for data, path in self._pool.items():
            assert path.read_bytes() == data, "a model's file was written to"


def check_trust(config: DaemonConfig, promise: Promise) -> None:
    """Raises `Broken` when the trust store is not as it was promised."""
    _check_record(config.state_dir / "trust", promise.trust, "what is trusted")


def check_records(config: DaemonConfig, promise: Promise) -> OnDisk:
    """What the disk says; raises `Broken` when that is not what was promised."""
    record = _check_record(config.state_dir, promise.records, "the state")
    whole = set()
    for path in sorted((config.state_dir / "blobs").glob("*.onnx")):
        if digest_of(path.read_bytes()) != path.stem:
            raise Broken(f"a torn model under a good name: {path.name}")
        whole.add(path.stem)
    if record is None:
        return OnDisk()
    trial = (record["trial"] or {}).get("digest", "")
    found = OnDisk(json.dumps(record, sort_keys=True), record["committed"], record["previous"], trial)
    if lost := {found.committed, found.previous, found.trial} - whole - {""}:
        raise Broken(f"the record names models that are lost: {sorted(lost)}")
    return found


def _check_record(
    folder: Path, allowed: tuple[dict[str, Any] | None, ...], what: str
) -> dict[str, Any] | None:
    found = Slots(folder).record() if folder.exists() else None
    if found not in allowed:
        raise Broken(f"{what} is neither the last one that was kept nor the one being written: {found}")
    return found


def first_records(config: DaemonConfig) -> dict[str, Kept]:
    """The records on the disk, as those that were kept before anything else."""
    found = {}
    for store, folder in (("state", config.state_dir), ("state/trust", config.state_dir / "trust")):
        record = Slots(folder).record() if folder.exists() else None
        if record is not None:
            found[store] = Kept(store, 0, 0, record)
    return found


def rubbish(state: Path, rng: random.Random) -> None:
    """What a crash may leave where nothing is flushed and nobody may care."""
    if not state.is_dir():
        return
    for name in ("outbox.db", "outbox.db-wal"):
        if rng.random() < 0.5:
            (state / name).write_bytes(rng.randbytes(rng.choice((0, 100, 5000))))
    trust = state / "trust"
    if not trust.is_dir():
        return
    if rng.random() < 0.5:
        (trust / "lock").touch()
    if rng.random() < 0.7:
        scratch = trust / "scratch"
        (scratch / "root_history").mkdir(parents=True)
        for name in (
            "timestamp.json",
            "snapshot.json",
            "targets.json",
            "root_history/1.root.json",
            "tmpab12cd",
        ):
            if rng.random() < 0.6:
                (scratch / name).write_bytes(rng.randbytes(rng.choice((0, 1, 900))))
        if rng.random() < 0.5:
            (scratch / "root.json").symlink_to("root_history/9.root.json")
