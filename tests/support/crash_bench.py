"""Where a device with updates is tried in this process: a publisher, a broker in memory, clocks, and the device.

The daemon, its agent, its slots, the update child's whole job with TUF, chunks and ranges, and the models are the real
ones. Replaced are the network (`memory_broker`), the clocks (`played`), the shadow's child, and the probe, which never
writes below the state.
"""

import contextlib
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import daemon as daemon_module
from edge_runtime import shadowing, updates
from edge_runtime.adapters import sandbox
from edge_runtime.carriers import https
from edge_runtime.config import DaemonConfig, load
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.release import ShadowGate, TrialGate
from edge_runtime.contract.topics import Topics
from edge_runtime.core import events as core
from edge_runtime.core.lifecycle import SlotState
from edge_runtime.daemon import Daemon
from edge_runtime.update_job import Job
from edge_runtime.updater import Update
from tests.publisher import COHORT, DEVICE, FLEET, MODEL, release, signed
from tests.support.certificates import Authority
from tests.support.memory_broker import MemoryBroker
from tests.support.played import Clocks
from tests.support.tiny_models import classifier, sealed
from tests.support.web import WebServer
from trainer.publish import Repository

GATE = TrialGate(predictions=20, seconds=1.0, starts=2)
SHADOW = ShadowGate(rows=30, max_disagreement=0.2)
CHUNK_BYTES = 4096
TURN_SECONDS = 0.5
TURNS = 400
RELEASES = Topics(FLEET).release(COHORT, MODEL)

CONFIG = """\
[device]
id = "{device}"
fleet = "{fleet}"
state_dir = "state"
clock_synced = true

[broker]
port = 1

[model]
name = "{model}"
trust_root = "root.json"
"""
OVER_HTTPS = """\
[update]
url = "{url}"
ca = "{ca}"
prefer = "https"
"""


@cache
def heavy(seed: int) -> bytes:
    """A small model in a file of three chunks, of which no byte is like the next."""
    tiny = classifier(seed=seed, name=MODEL)
    graph = tiny.graph()
    graph.doc_string = random.Random(seed).randbytes(CHUNK_BYTES).hex()
    return sealed(graph, tiny.metadata)


class Here:
    """Stands for `Updates`: the child's job is done in this process, when the daemon listens."""

    def __init__(self, config: DaemonConfig, *, wake: Callable[[], None], killed: Callable[[], None]) -> None:
        self._config = config
        self._job: dict[str, Any] | None = None
        self.reasons: list[str] = []

    @property
    def running(self) -> bool:
        return self._job is not None

    def start(self, action: core.StartUpdate) -> None:
        self._job = updates._job(self._config, action)

    def kill(self) -> None:
        self._job = None

    def listen(self) -> Iterator[core.AgentEvent]:
        if self._job is None:
            return
        job, self._job = self._job, None
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            result = Update(Job.read(job)).run()
        for line in said.getvalue().splitlines():
            yield core.update_phase(json.loads(line))
        if not result["ok"]:
            self.reasons.append(result["reason"])
        yield core.update_ended(result)


class Beside:
    """Stands for `Shadowing`: whoever is in the shadow has answered some rows when the daemon listens."""

    pid = 0

    def __init__(self, disagreed: Callable[[], int]) -> None:
        self._disagreed = disagreed
        self.candidate: Digest | None = None

    def follow(self, candidate: Digest | None, incumbent: Digest | None) -> None:
        self.candidate = candidate

    def offer(self, *_: object) -> None: ...

    def listen(self) -> Iterator[core.AgentEvent]:
        if self.candidate is not None:
            yield core.Shadowed(
                digest=self.candidate, rows=SHADOW.rows // 3, disagreed=self._disagreed(), failed=""
            )

    def stop(self) -> None:
        self.candidate = None


def no_probe(*_: object, **__: object) -> sandbox.Ended:
    """What the probe says of a model that is all right."""
    answer = {
        "ok": True,
        "model": MODEL,
        "rss_bytes": 60_000_000,
        "peak_rss_bytes": 70_000_000,
        "predict_p50_ns": 8_000,
        "predict_p99_ns": 20_000,
        "runs": 2000,
        "golden_rows": 4,
        "budgets": {"predict_p99_ns": 0, "rss_bytes": 0},
    }
    return sandbox.Ended(0, json.dumps(answer).encode(), "")


@dataclass
class Bench:
    """Where devices are tried: a publisher, a broker, and clocks that the test turns.

    With ``web``, a server of the publisher's folder, whose authority's certificate is at ``ca``, devices turn there
    first.
    """

    folder: Path
    repository: Repository
    broker: MemoryBroker = field(default_factory=lambda: MemoryBroker(packed=True))
    clocks: Clocks = field(default_factory=lambda: Clocks(wall_ns=1_700_000_000 * 10**9))
    revision: int = 0
    disagreed: int = 0
    web: WebServer | None = None
    ca: str = ""

    @classmethod
    def make(cls, folder: Path) -> "Bench":
        repository = Repository.create(folder / "repository")
        repository.enable_auto(MODEL)
        return cls(folder, repository)

    @contextlib.contextmanager
    def on_the_web(self) -> Iterator[None]:
        """Devices that are configured until this is left fetch by HTTPS."""
        authority = Authority(self.folder / "web")
        with WebServer(self.folder / "repository", authority.issue("web")) as self.web:
            self.ca = authority.path
            yield
        self.web = None

    @contextlib.contextmanager
    def standing(self) -> Iterator[pytest.MonkeyPatch]:
        """Everything that is not the device's own is in place until this is left."""
        with pytest.MonkeyPatch.context() as patch:
            self.broker.stand_before(patch, patience_seconds=0.03)
            patch.setattr(sandbox, "run", no_probe)
            patch.setattr(daemon_module, "time", self.clocks)
            patch.setattr(daemon_module, "Updates", Here)
            patch.setattr(https, "next_delay_seconds", lambda *_, **__: 0.0)
            patch.setattr(shadowing, "Shadowing", lambda *_, **__: Beside(lambda: self.disagreed))
            yield patch

    def publish(self, data: bytes) -> Digest:
        """Makes a model known to devices."""
        path = self.folder / f"{digest_of(data)[:8]}.onnx"
        path.write_bytes(data)
        digest = self.repository.add(path, role="auto", chunk_bytes=CHUNK_BYTES).digest
        self.broker.publish(self.repository, [digest])
        return digest

    def revoke(self, digest: Digest) -> None:
        self.repository.revoke(digest)
        self.broker.publish(self.repository)

    def offer(self, candidate: Digest | None, **changes: Any) -> bytes:
        """The next release, as it comes over the wire."""
        self.revision += 1
        made = release(candidate, revision=self.revision, trial=GATE)
        return signed(self.repository, replace(made, **changes))

    def configure(self, home: Path) -> DaemonConfig:
        """A new device's configuration; its state will be in ``home/state``."""
        home.mkdir(parents=True, exist_ok=True)
        path = home / "skiffd.toml"
        text = CONFIG.format(device=DEVICE, fleet=FLEET, model=MODEL)
        if self.web is not None:
            text += OVER_HTTPS.format(url=self.web.url, ca=self.ca)
        path.write_text(text, encoding="utf-8")
        (home / "root.json").write_bytes(self.repository.pinned_root.read_bytes())
        return load(path)


class Device:
    """One start of a daemon after the other on one state, each driven turn by turn as `Daemon.run` would."""

    def __init__(self, config: DaemonConfig, clocks: Clocks) -> None:
        self.config = config
        self._clocks = clocks

    def boot(self) -> None:
        """A start as `Daemon.run` makes it, up to its loop."""
        self.start(noted=True)

    def start(self, *, noted: bool = False) -> None:
        self.daemon = Daemon(self.config)
        if noted:
            self.daemon._watch.begin(self.daemon._identity.session)
        self.daemon._handle(core.Started())

    def power_off(self) -> None:
        """Nothing is said and nothing is saved; only what this process holds open is let go of."""
        self.daemon._keeper.close()

    def reboot(self) -> None:
        self.power_off()
        self.boot()

    def hear(self, message: bytes) -> None:
        """A release comes in, over the link as it is after a start."""
        self.daemon._handle(core.Connected())
        self.daemon._handle(core.MessageArrived(RELEASES, message))

    def turn(self, rows: int = 0) -> None:
        """A turn of the loop: rows are answered, the child is listened to, time passes."""
        runtime = self.daemon._runtime
        for n in range(rows if runtime is not None else 0):
            assert runtime is not None
            runtime.predict(np.array([[0.1, -0.2, n]], np.float32))
        self._clocks.go_on(TURN_SECONDS)
        for told in self.daemon._updates.listen():
            self.daemon._handle(told)
        if self.daemon._shadowing is not None:
            for told in self.daemon._shadowing.listen():
                self.daemon._handle(told)
        self.daemon._tick(self._clocks.monotonic())

    def turn_until(self, condition: Callable[[SlotState], object], rows: int = 0) -> None:
        for _ in range(TURNS):
            if condition(self.slots):
                return
            self.turn(rows)
        raise AssertionError(f"it does not come: {self.slots}; {vars(self.daemon._updates)}")

    @property
    def slots(self) -> SlotState:
        return self.daemon._agent.slots

    @property
    def serving(self) -> Digest | None:
        """What answers rows."""
        runtime = self.daemon._runtime
        return runtime.digest if runtime is not None else None
