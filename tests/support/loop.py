"""The whole loop for tests: a repository, an aggregator process and ``skiffd`` processes that can be killed.

Every process carries a mark in its environment, which its children inherit, so that nothing is left behind.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.adapters.windows import Windows
from aggregator.records import DeviceRecord, Selection
from cli.orders import order
from cli.publishing import publish
from cli.view import FleetView
from edge_runtime.contract import ids
from edge_runtime.contract.ids import Digest
from edge_runtime.core import lifecycle
from edge_runtime.mqtt.broker import Broker
from tests.services import Mosquitto
from tests.support.device import whole_state
from trainer.datasets import load_watch
from trainer.publish import Repository

FLEET = ids.fleet_id("loop")
MODEL = ids.model_name("watch")
WAIT_SECONDS = 60.0
MARK = "SKIFF_TEST_LOOP"

Key = tuple[str, str, int]
"""Device, session and number: what a record is counted once by."""

AGGREGATOR = """
fleet = "{fleet}"
state_dir = "aggregator"
registry = "repository/targets"
director_key = "repository/keys/director.json"

[broker]
host = "{host}"
port = {port}
keepalive_seconds = 5

[ingest]
rebirth_seconds = 0.5

[rollout]
stages = [1.0]
tick_seconds = 0.1
gates = {{ committed_share = 1.0, bake_seconds = 0.2, timeout_seconds = 120.0, max_latency_ratio = 0.0 }}
"""

SKIFFD = """
[device]
id = "{device}"
fleet = "{fleet}"
state_dir = "state"

[broker]
host = "{host}"
port = {port}
keepalive_seconds = 5

[model]
name = "{model}"
trust_root = "{root}"

[window]
seconds = 0.5
min_rows = 30

[source]
kind = "replay"
path = "recordings.npz"
rows_per_second = 200.0

[update]
deadline_seconds = 60.0
"""


def wait_for(condition: Callable[[], object], what: Callable[[], str] | str) -> None:
    """Returns when ``condition`` holds; fails saying ``what`` when it has not for `WAIT_SECONDS`."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited too long for {what if isinstance(what, str) else what()}")
        time.sleep(0.05)


class Program:
    """A program that is killed and started again; each start writes a log of its own."""

    def __init__(self, name: str, command: tuple[str, ...], folder: Path, mark: str) -> None:
        self.name = name
        self._command = command
        self._folder = folder
        self._mark = mark
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self) -> None:
        assert self._process is None
        self.starts += 1
        with self.log(self.starts).open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, MARK: self._mark},
            )

    def end(self, how: signal.Signals) -> int:
        """Ends it and returns its exit code; fails when it has ended on its own before."""
        process, self._process = self._process, None
        assert process is not None
        ended = process.poll()
        assert ended is None, f"{self.name} ended with {ended}:\n{self.text}"
        process.send_signal(how)
        return process.wait(WAIT_SECONDS)

    def kill(self) -> None:
        """Ends it as the kernel does when memory runs out: it does not get to say or write anything."""
        assert self.end(signal.SIGKILL) == -signal.SIGKILL

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def log(self, start: int) -> Path:
        return self._folder / f"{self.name}.{start}.log"

    @property
    def text(self) -> str:
        """What the current start has logged."""
        return self.log(self.starts).read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a daemon's log: what happened, and its figures."""

    event: str
    values: Mapping[str, str]


class Device(Program):
    """One ``skiffd`` and its state on disk."""

    def __init__(self, name: str, folder: Path, mark: str) -> None:
        super().__init__(name, ("edge_runtime.skiffd", str(folder / "skiffd.toml")), folder, mark)
        self.state = folder / "state"

    def lines(self, start: int | None = None) -> list[Line]:
        """What one start has logged, by default the current one; a line cut off by the end is left out."""
        path = self.log(start or self.starts)
        whole = path.read_text(encoding="utf-8").split("\n")[:-1]
        found = [json.loads(line) for line in whole if line.startswith("{")]
        return [Line(d["event"], _values(d.get("detail", ""))) for d in found]

    def seen(self, event: str, **values: str) -> Line | None:
        """The first such line of the current start."""
        return next(
            (x for x in self.lines() if x.event == event and values.items() <= x.values.items()), None
        )

    @property
    def session(self) -> str:
        """The session of the current start, empty before the device has kept anything."""
        line = self.seen("record_kept")
        return line.values["session"] if line else ""

    def kept(self) -> dict[Key, int | None]:
        """Everything the daemon said it keeps until it is stored: the rows of windows, None for events."""
        found: dict[Key, int | None] = {}
        for start in range(1, self.starts + 1):
            rows: int | None = None
            for line in self.lines(start):
                if line.event == "window_closed":
                    rows = int(line.values["rows"])
                elif line.event == "record_kept":
                    is_window = line.values["topic"].endswith("/window")
                    assert not is_window or rows is not None
                    key = (self.name, line.values["session"], int(line.values["seq"]))
                    assert key not in found
                    found[key] = rows if is_window else None
                    rows = None if is_window else rows
        return found

    def waiting(self) -> tuple[set[Key], int]:
        """What its outbox holds, and how many records it ever dropped; read beside the daemon."""
        with closing(sqlite3.connect(f"file:{self.state / 'outbox.db'}?mode=ro", uri=True)) as db:
            keys = {(self.name, s, n) for s, n in db.execute("SELECT session, seq FROM records")}
            (dropped,) = db.execute("SELECT value FROM totals WHERE name='dropped'").fetchone()
        return keys, dropped

    def check_state(self) -> lifecycle.SlotState:
        """The state a killed daemon leaves: the record whole, and every model it names installed and whole."""
        return whole_state(self.state, MODEL)


def _values(detail: str) -> dict[str, str]:
    return dict(pair for word in detail.split() if len(pair := word.split("=", 1)) == 2)


class Loop:
    """One fleet over one broker."""

    def __init__(self, folder: Path, mosquitto: Mosquitto) -> None:
        self.folder = folder
        self.mosquitto = mosquitto
        self.broker = Broker(host=mosquitto.host, port=mosquitto.port)
        self.repository = Repository.create(folder / "repository")
        config = folder / "aggregator.toml"
        config.write_text(
            AGGREGATOR.format(fleet=FLEET, host=mosquitto.host, port=mosquitto.port), encoding="utf-8"
        )
        self.aggregator = Program(
            "aggregator", ("cli.main", "serve", str(config)), folder, str(folder.resolve())
        )
        self.view = FleetView(config)
        self.devices: list[Device] = []

    def start(self, devices: int) -> None:
        """Starts the aggregator and ``devices`` daemons, and returns when they are online."""
        self.aggregator.start()
        wait_for(self.view.ready, "the aggregator's stores")
        data = load_watch()
        for person in range(1, devices + 1):
            home = self.folder / f"watch-{person}"
            home.mkdir()
            rows = data.device_rows(person, 0)
            np.savez(
                home / "recordings.npz",
                features=rows.features,
                labels=np.asarray(rows.label_names)[rows.labels],
                recording=rows.recording,
            )
            (home / "skiffd.toml").write_text(self.configuration(home), encoding="utf-8")
            device = Device(home.name, home, str(self.folder.resolve()))
            device.start()
            self.devices.append(device)
        wait_for(lambda: len(self.view.online()) == devices, f"{devices} devices online")

    def configuration(self, home: Path) -> str:
        """The configuration of the device in ``home``."""
        return SKIFFD.format(
            device=home.name,
            fleet=FLEET,
            host=self.mosquitto.host,
            port=self.mosquitto.port,
            model=MODEL,
            root=self.repository.pinned_root,
        )

    def offer(self, artifact: Path, *, trial_seconds: float = 0.5) -> Digest:
        """Publishes an artifact, signed, and offers it to every device; a trial is never given up for its starts."""
        published = self.repository.add(artifact, role="targets")
        publish(self.repository, [published.digest], fleet=FLEET, broker=self.broker)
        trial = {"predictions": 100, "seconds": trial_seconds, "starts": 100}
        document = {"model": MODEL, "candidate": published.digest, "stages": [1.0], "trial": trial}
        order(self.view, "start_rollout", document, by="test", why="a new version")
        return published.digest

    def wait_serving(self, digest: Digest) -> None:
        """Returns when every device has committed ``digest`` and the rollout is completed."""
        wait_for(
            lambda: self.view.serving(MODEL).get(digest, 0) == len(self.devices),
            lambda: f"{digest} on every device: {self.view.devices()}",
        )
        wait_for(lambda: self._completed(digest), lambda: f"the rollout's end: {self.view.rollout(MODEL)}")

    def _completed(self, digest: Digest) -> bool:
        rollout = self.view.rollout(MODEL)
        return rollout is not None and (rollout.candidate, rollout.state) == (digest, "completed")

    def record(self, device: Device) -> DeviceRecord:
        """What the ledger says of a device."""
        return next(r for r in self.view.devices() if r.device == device.name)

    def stored(self) -> tuple[list[tuple[Key, int]], list[Key]]:
        """The windows in the aggregator's store with their rows, and its events."""
        windows = [((w.device, w.session, w.seq), w.profile.rows) for w in self.view.windows(Selection())]
        with closing(Windows(self.view.config.windows_path, read_only=True)) as store:
            events = [(e["device"], e["session"], e["seq"]) for e in store.events(10**6)]
        return [((str(d), str(s), n), rows) for (d, s, n), rows in windows], events

    def dead_letters(self) -> tuple[dict[str, Any], ...]:
        """The messages that nobody could use."""
        with closing(Windows(self.view.config.windows_path, read_only=True)) as store:
            return store.dead_letters()

    def survivors(self) -> Iterator[int]:
        """The processes that belong to this loop and still run, children of children included."""
        mark = f"{MARK}={self.folder.resolve()}\0".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    found = mark in (entry / "environ").read_bytes()
                except (FileNotFoundError, PermissionError, ProcessLookupError):
                    continue
                if found:
                    yield int(entry.name)

    def close(self) -> None:
        for program in (*self.devices, self.aggregator):
            program.close()
        for process in self.survivors():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
