"""A whole device under a test's hand: a ``skiffd`` process, an application that asks it, and a centre that stores.

Nothing here sleeps to wait for something: whatever happens wakes who waits for it.
"""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.adapters.slots import Slots
from edge_runtime.config import DaemonConfig, load
from edge_runtime.contract import ids
from edge_runtime.contract.codec import decode, encode
from edge_runtime.contract.errors import LinkError
from edge_runtime.contract.ids import DeviceId, Digest
from edge_runtime.contract.messages import Ack, Event, Status, Window
from edge_runtime.contract.topics import ACK, RELEASE, Delivery, Topics
from edge_runtime.core import lifecycle
from edge_runtime.link import Link, Outgoing, Received
from edge_runtime.mqtt.broker import Broker
from tests.support.device import whole_state
from tests.support.loop import Line
from tests.support.tiny_models import Tiny, classifier

FLEET = ids.fleet_id("chaos")
MODEL = ids.model_name("tiny")
COHORT = ids.cohort_id("main")
WAIT_SECONDS = 30.0
PAUSE_SECONDS = 0.003
"""Between two rows: some 300 a second, so that a test leaves the machine to others."""

OLD, NEW = classifier(seed=1), classifier(seed=2)
TOPICS = Topics(FLEET)
Key = tuple[str, str, int]

CONFIG = """\
[device]
id = "{device}"
fleet = "{fleet}"
state_dir = "{state}"
clock_synced = {clock}
{device_more}

[broker]
host = "{host}"
port = {port}
keepalive_seconds = 5

[model]
name = "{model}"
trust_root = "root.json"

[window]
seconds = {window_seconds}
min_rows = {min_rows}
jitter_seconds = 0.0

[source]
kind = "{source}"
socket = "rows.sock"
max_line_kb = 16384

{more}
"""


class Changing:
    """What one thread changes and another waits for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()

    def wait(self, condition: Callable[[], object], what: str | Callable[[], str]) -> None:
        """Returns when ``condition`` holds; fails saying ``what`` when it has not for `WAIT_SECONDS`."""
        with self.changed:
            if not self.changed.wait_for(condition, WAIT_SECONDS):
                raise AssertionError(f"waited too long for {what if isinstance(what, str) else what()}")


class Centre(Changing):
    """Stands in for the aggregator: stores each record once, and acknowledges it unless told not to."""

    def __init__(self, host: str, port: int, *, acking: bool = True) -> None:
        super().__init__()
        self.acking = acking
        self.windows: dict[Key, Window] = {}
        self.events: dict[Key, Event] = {}
        self.statuses: list[Status] = []
        self.conflicts: list[str] = []
        self.arrived = 0
        self._stop = threading.Event()
        self._link = Link(Broker(host=host, port=port), client_id="centre", delay=lambda _: 0.05)
        for family in ("status", "window", "event"):
            self._link.subscribe(TOPICS.every(family))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._link.start()
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            event = self._link.poll(0.5)
            if isinstance(event, Received):
                self._take(decode(event.payload))

    def _take(self, message: object) -> None:
        with self.changed:
            match message:
                case Status():
                    self.statuses.append(message)
                case Window():
                    self._store(self.windows, message)
                case Event():
                    self._store(self.events, message)
            self.changed.notify_all()

    def _store(self, store: dict[Key, Window] | dict[Key, Event], message: Window | Event) -> None:
        self.arrived += 1
        key = (str(message.device), str(message.session), message.seq)
        if store.setdefault(key, message) != message:  # type: ignore[arg-type] # each store has its kind
            self.conflicts.append(f"{key} came twice with different content")
        if self.acking:
            self.acknowledge([key])

    def acknowledge(self, keys: Iterable[Key]) -> None:
        """Says that these are stored. Where that is lost the device sends them again."""
        for device, session, seq in keys:
            ack = Ack(device=ids.device_id(device), session=ids.session_id(session), seqs=(seq,))
            with suppress(LinkError):
                self._link.publish(Outgoing(TOPICS.ack(ack.device), encode(ack), ACK))

    def publish(self, topic: str, payload: bytes, delivery: Delivery = RELEASE) -> None:
        self.wait(lambda: self._link.connected, "the centre's link")
        self._link.publish(Outgoing(topic, payload, delivery))

    def of(self, device: str, session: str = "") -> list[Window]:
        """The windows of a device, in the order they came."""
        return [w for k, w in self.windows.items() if k[0] == device and session in ("", k[1])]

    def said(self, name: str) -> list[Event]:
        return [event for event in self.events.values() if event.name == name]

    def births(self, session: str) -> list[Status]:
        return [s for s in self.statuses if s.session == session and s.online]

    def wait_birth(self, session: str) -> Status:
        self.wait(lambda: self.births(session), f"the birth of session {session}")
        return self.births(session)[0]

    def wait_windows(self, device: str, session: str, count: int = 1) -> None:
        self.wait(
            lambda: len(self.of(device, session)) >= count, f"{count} windows of {device}, session {session}"
        )

    def wait_event(self, name: str) -> Event:
        self.wait(
            lambda: self.said(name), lambda: f"{name}; there were {sorted(self.events.values(), key=str)}"
        )
        return self.said(name)[0]

    def close(self) -> None:
        self._stop.set()
        self._link.wake()
        self._thread.join(WAIT_SECONDS)
        self._link.stop(2.0)


class Process(Changing):
    """One start of a program that logs JSON lines on stderr."""

    def __init__(self, *command: str, environment: dict[str, str] | None = None) -> None:
        super().__init__()
        self.text: list[str] = []
        self.lines: list[Line] = []
        self.ended = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for raw in self._process.stderr:
            text = raw.decode("utf-8", "replace")
            found = json.loads(text) if text.startswith("{") and text.endswith("}\n") else None
            with self.changed:
                self.text.append(text)
                if found is not None:
                    words = (word.split("=", 1) for word in found.get("detail", "").split())
                    self.lines.append(Line(found["event"], {w[0]: w[1] for w in words if len(w) == 2}))
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def said(self, event: str, **values: str) -> list[Line]:
        return [x for x in self.lines if x.event == event and values.items() <= x.values.items()]

    def wait_line(self, event: str, **values: str) -> Line:
        self.wait(
            lambda: self.said(event, **values) or self.ended,
            lambda: f"{event} {values}:\n{''.join(self.text)}",
        )
        found = self.said(event, **values)
        assert found, f"the process ended without {event} {values}:\n{''.join(self.text)}"
        return found[0]

    @property
    def session(self) -> str:
        """The session of this start, once it has kept a record."""
        return self.wait_line("record_kept").values["session"]

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait_end(self, timeout: float = WAIT_SECONDS) -> int:
        """Its exit code, when it has ended and everything it said is read."""
        code = self._process.wait(timeout)
        self._reader.join(WAIT_SECONDS)
        assert self._process.stderr is not None
        self._process.stderr.close()
        return code

    def stop(self) -> int:
        self.send(signal.SIGTERM)
        return self.wait_end()

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self.wait_end() == -signal.SIGKILL, "".join(self.text)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.wait_end()


@dataclass
class Connection:
    """What was asked over one connection: when each answer came, what refused the others, and which models answered."""

    phase: int
    answers: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)


class Application(Changing):
    """Asks a device one row after another over its socket, and comes back when the device does."""

    def __init__(self, path: Path, row: Sequence[float] = (0.1, -0.2, 0.3)) -> None:
        super().__init__()
        self.phase = 0
        self.connections: list[Connection] = []
        self.connected = False
        self._path = path
        self._line = json.dumps(list(row)).encode() + b"\n"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wire:
                try:
                    wire.connect(str(self._path))
                except OSError:
                    self._stop.wait(0.01)
                    continue
                self._note(connected=True)
                self.connections.append(Connection(self.phase))
                with suppress(OSError), wire.makefile("rb") as answers:
                    self._ask(wire, answers, self.connections[-1])
                self._note(connected=False)

    def _note(self, *, connected: bool) -> None:
        with self.changed:
            self.connected = connected
            self.changed.notify_all()

    def _ask(self, wire: socket.socket, answers: Iterable[bytes], connection: Connection) -> None:
        lines = iter(answers)
        while not self._stop.wait(PAUSE_SECONDS):
            wire.sendall(self._line)
            answer = next(lines, b"")
            if not answer.endswith(b"\n"):
                return
            said = json.loads(answer)
            with self.changed:
                if "error" in said:
                    connection.refused.append(said["error"]["reason"])
                else:
                    connection.answers.append(time.monotonic())
                    connection.models.append(said["model"])
                self.changed.notify_all()

    def answered(self, phase: int) -> int:
        """Rows that were answered in a phase."""
        return sum(len(c.answers) for c in self.connections if c.phase == phase)

    def models(self, phase: int) -> set[str]:
        return {model for c in self.connections if c.phase == phase for model in c.models}

    def refused(self, phase: int) -> list[str]:
        return [reason for c in self.connections if c.phase == phase for reason in c.refused]

    def wait_answers(self, count: int) -> None:
        """Waits until so many more rows were answered."""
        before = sum(len(c.answers) for c in self.connections)
        self.wait(
            lambda: sum(len(c.answers) for c in self.connections) >= before + count, f"{count} more answers"
        )

    def wait_gone(self) -> None:
        self.wait(lambda: not self.connected, "the connection's end")

    def close(self) -> None:
        self._stop.set()
        self._thread.join(WAIT_SECONDS)


@dataclass(frozen=True)
class Home:
    """A device's folder: its configuration and its state."""

    folder: Path
    device: DeviceId
    config: Path
    state: Path

    @property
    def socket(self) -> Path:
        return self.folder / "rows.sock"

    def start(self, *, environment: dict[str, str] | None = None) -> Process:
        return Process("edge_runtime.skiffd", str(self.config), environment=environment)

    def start_doomed(self, target: str, when: str, nth: int) -> Process:
        return Process("tests.support.doomed", str(self.config), target, when, str(nth))

    def check_state(self) -> lifecycle.SlotState:
        """The state on disk, whole, and every model it names whole."""
        return whole_state(self.state, MODEL)

    def outbox(self) -> dict[Key, Window | Event]:
        """What the outbox of a daemon that has ended holds; read from a copy, for opening it changes the file."""
        path = self.state / "outbox.db"
        if not path.exists():
            return {}
        with tempfile.TemporaryDirectory() as name:
            for part in self.state.glob("outbox.db*"):
                shutil.copy(part, name)
            with closing(sqlite3.connect(Path(name) / "outbox.db")) as db:
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                made = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchone()
                rows = db.execute("SELECT session, seq, payload FROM records").fetchall() if made else []
        found = {(str(self.device), s, n): decode(payload) for s, n, payload in rows}
        assert all(isinstance(message, Window | Event) for message in found.values())
        return found  # type: ignore[return-value] # as just checked


def provision(
    folder: Path,
    host: str,
    port: int,
    *,
    device: str = "d",
    committed: Tiny | None = OLD,
    previous: Tiny | None = None,
    slots: lifecycle.SlotState | None = None,
    state_dir: str = "state",
    source: str = "unix",
    window_seconds: float = 0.2,
    min_rows: int = 1,
    clock: str = "true",
    device_more: str = "",
    more: str = "",
) -> Home:
    """A device with models on its disk, as updates would have left it; ``slots`` is its state, if given."""
    folder.mkdir(exist_ok=True)
    home = Home(folder, ids.device_id(device), folder / "skiffd.toml", folder / state_dir)
    home.config.write_text(
        CONFIG.format(
            device=device,
            fleet=FLEET,
            state=state_dir,
            host=host,
            port=port,
            model=MODEL,
            window_seconds=window_seconds,
            min_rows=min_rows,
            source=source,
            clock=clock,
            device_more=device_more,
            more=more,
        ),
        encoding="utf-8",
    )
    kept = Slots(home.state)
    for model in (OLD, NEW):
        install(kept, model)
    state = slots or lifecycle.SlotState(
        model=MODEL,
        committed=committed.digest if committed else None,
        previous=previous.digest if previous else None,
    )
    kept.write_record(lifecycle.to_document(state))
    return home


def configured(folder: Path) -> DaemonConfig:
    """The least configuration there is, of a device that reaches nobody."""
    path = folder / "skiffd.toml"
    path.write_text(
        '[device]\nid = "d1"\nfleet = "f"\nstate_dir = "state"\n[broker]\nport = 1\n'
        '[model]\nname = "m"\ntrust_root = "root.json"\n',
        encoding="utf-8",
    )
    return load(path)


def install(slots: Slots, model: Tiny) -> Digest:
    slots.staging(model.digest).write_bytes(model.artifact)
    slots.install(model.digest)
    return model.digest


def windows_closed(process: Process) -> list[int]:
    """The rows of each window that a process said it closed."""
    return [int(line.values["rows"]) for line in process.said("window_closed")]


def windows_kept(process: Process) -> dict[int, int]:
    """The windows a process said it keeps until they are stored: their rows by number."""
    found: dict[int, int] = {}
    rows = 0
    for line in process.lines:
        if line.event == "window_closed":
            rows = int(line.values["rows"])
        elif line.event == "record_kept" and line.values["topic"].endswith("/window"):
            found[int(line.values["seq"])] = rows
    return found


@contextmanager
def everything(mosquitto: object, home: Home) -> Iterator[tuple[Centre, Application]]:
    """A centre and an application around one device."""
    centre = Centre(mosquitto.host, mosquitto.port)  # type: ignore[attr-defined]
    application = Application(home.socket)
    try:
        yield centre, application
    finally:
        application.close()
        centre.close()
