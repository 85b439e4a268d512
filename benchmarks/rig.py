"""What device benchmarks stand on: a model on the device's disk, a real broker, processes and their memory."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.measure import Ratio
from converters import convert
from edge_runtime.adapters.slots import Slots
from edge_runtime.contract import ids
from edge_runtime.contract.errors import SkiffError
from edge_runtime.core import lifecycle
from edge_runtime.engine import Engine
from tests.services import Mosquitto, find_mosquitto
from tests.support.certificates import Authority
from trainer.datasets import load_watch

MODEL: Final = ids.model_name("watch")
FLEET: Final = ids.fleet_id("bench")
DEVICE: Final = ids.device_id("bench-1")
WAIT_SECONDS: Final = 60.0
QUIET_SECONDS: Final = 0.5
_POLL_SECONDS: Final = 0.02

ESTIMATORS: Final[Mapping[str, Callable[[], Any]]] = {
    "logistic": lambda: LogisticRegression(max_iter=300),
    "forest of 100": lambda: RandomForestClassifier(100, max_depth=8, min_samples_leaf=40, random_state=0),
}

CONFIG: Final = """\
[device]
id = "{device}"
fleet = "{fleet}"
state_dir = "state"

[broker]
host = "{host}"
port = {port}
{tls}
[model]
name = "{model}"
trust_root = "root.json"

[window]
seconds = {window_seconds}
min_rows = 1
jitter_seconds = 0.0

[source]
kind = "{source}"
"""


class NoBroker(SkiffError):
    """These benchmarks need a real Mosquitto."""


@dataclass(frozen=True, slots=True)
class Address:
    """A broker that listens: its port on loopback, and the PEM files of a client if it speaks TLS."""

    host: str
    port: int
    tls: tuple[str, ...] = ()
    """Of the authority, the client's certificate and its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of one process, in MB of 10^6 bytes: resident, its share of what it shares, and the resident peak so far."""

    rss_mb: float
    pss_mb: float
    peak_mb: float


def watch_rows() -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any]]:
    """Rows (7015, 30), their labels, and the person each is of: six people's right wrists."""
    data = load_watch().select(people=(1, 2, 3, 4, 5, 6), wrists=(0,))
    return data.features, np.asarray(data.label_names)[data.labels], data.groups


def artifact(folder: Path, estimator: str, *, version: str = "1", like: Path | None = None) -> Path:
    """Fits and converts one of `ESTIMATORS`; with the cells of ``like``, as a second version has them."""
    x, y, groups = watch_rows()
    pipeline = make_pipeline(StandardScaler(), ESTIMATORS[estimator]()).fit(x, y)
    out = folder / f"{estimator.replace(' ', '-')}-{version}.onnx"
    layout = Engine(like).info.reference.spec if like else None
    made = convert(pipeline, x, out, name=MODEL, version=version, groups=groups, probes=500, layout=layout)
    return made.path


def provision(folder: Path, model: Path, at: Address, *, source: str, window_seconds: float) -> Path:
    """A device that has committed ``model``, as an update would have left it; returns its configuration."""
    data = model.read_bytes()
    digest = ids.digest_of(data)
    slots = Slots(folder / "state")
    slots.staging(digest).write_bytes(data)
    slots.install(digest)
    slots.write_record(lifecycle.to_document(lifecycle.SlotState(model=MODEL, committed=digest)))
    names = zip(("ca", "certificate", "key"), at.tls, strict=False)
    tls = "".join(f'{name} = "{path}"\n' for name, path in names)
    config = folder / "skiffd.toml"
    config.write_text(
        CONFIG.format(
            device=DEVICE,
            fleet=FLEET,
            host=at.host,
            port=at.port,
            tls=f"[broker.tls]\n{tls}" if tls else "",
            model=MODEL,
            window_seconds=window_seconds,
            source=source,
        ),
        encoding="utf-8",
    )
    return config


@contextmanager
def mosquitto(folder: Path, *, tls: bool) -> Iterator[Address]:
    """A real broker; with ``tls`` it asks for client certificates, as a fleet's does. Raises `NoBroker`."""
    binary = find_mosquitto()
    if binary is None:
        raise NoBroker("mosquitto is not installed (Debian: apt-get install mosquitto)")
    folder.mkdir(parents=True)
    extra, files = "", tuple[str, ...]()
    if tls:
        authority = Authority(folder / "tls")
        server, client = authority.issue("broker"), authority.issue(DEVICE)
        extra = (
            f"cafile {authority.path}\ncertfile {server.certificate}\nkeyfile {server.key}\n"
            "require_certificate true"
        )
        files = (authority.path, client.certificate, client.key)
    broker = Mosquitto(binary, folder, extra_config=extra)
    broker.start()
    try:
        yield Address(broker.host, broker.port, files)
    finally:
        broker.close()


class Running:
    """A process that answers rows: started, asked for one, and waited for until it has said all of ``events``.

    Leaving it as a context manager ends it.

    Attributes:
        pid: of the process.
        answer_seconds: from its start to its first answer.
        answer_cpu_seconds: of all its threads until then; other processes make an answer late, but hardly dearer.
    """

    def __init__(self, module: str, *arguments: str, row: Sequence[float], events: Sequence[str]) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        start = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        self.pid = self._process.pid
        self.answer_seconds = self.answer_cpu_seconds = 0.0
        give_up = threading.Timer(WAIT_SECONDS, self._process.kill)
        give_up.start()
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(list(row)).encode() + b"\n")
            self._process.stdin.flush()
            self._listen(start, set(events))
        except BaseException:
            self.close()
            raise
        finally:
            give_up.cancel()

    def _listen(self, start: float, missing: set[str]) -> None:
        output: IO[bytes] | None = self._process.stdout
        assert output is not None
        heard = []
        for line in output:
            heard.append(line.decode("utf-8", "replace"))
            said = json.loads(line) if line.startswith(b"{") else {}
            if "score" in said and not self.answer_seconds:
                self.answer_seconds = time.monotonic() - start
                self.answer_cpu_seconds = cpu_seconds(self.pid)
            missing.discard(said.get("event", ""))
            if self.answer_seconds and not missing:
                return
        raise SkiffError(
            f"the process ended or waited too long for {missing or 'an answer'}:\n{''.join(heard)}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.communicate()

    def settled(self) -> Memory:
        """Its memory once it stands still, see `settled`."""
        return settled(self.pid)


def settled(pid: int) -> Memory:
    """The memory of a process once its resident size has not changed for `QUIET_SECONDS`."""
    deadline = time.monotonic() + WAIT_SECONDS
    last, since = memory(pid), time.monotonic()
    while (now := time.monotonic()) - since < QUIET_SECONDS:
        if now > deadline:
            raise SkiffError(f"memory of process {pid} still changes after {WAIT_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)
        found = memory(pid)
        if found.rss_mb != last.rss_mb:
            since = time.monotonic()
        last = found
    return last


def memory(pid: int) -> Memory:
    """What the kernel says of a process (proc(5)); raises `OSError` when it is gone."""
    rollup = _kilobytes(f"/proc/{pid}/smaps_rollup")
    return Memory(rss_mb=rollup["Rss"] * 1.024e-3, pss_mb=rollup["Pss"] * 1.024e-3, peak_mb=peak_mb(pid))


def peak_mb(pid: int) -> float:
    """The resident peak of a process so far; raises `OSError` or `KeyError` when it is gone."""
    return _kilobytes(f"/proc/{pid}/status")["VmHWM"] * 1.024e-3


def cpu_seconds(pid: int) -> float:
    """CPU time of a process's living threads, finer than clock ticks (``sched-stats``, Documentation/scheduler)."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((t / "schedstat").read_text(encoding="ascii").split()[0]) for t in threads) / 1e9


def _kilobytes(path: str) -> dict[str, int]:
    found = {}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0])
    return found


def over(arm: Sequence[float], peer: Sequence[float]) -> Ratio:
    """``arm`` over ``peer``, start by start: the median, and the middle half."""
    low, middle, high = np.quantile(np.asarray(arm) / np.asarray(peer), [0.25, 0.5, 0.75])
    return Ratio(float(middle), float(low), float(high))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median, and the lowest and highest in brackets."""
    low, middle, high = np.quantile(values, [0.0, 0.5, 1.0])
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="skiff-bench-") as folder:
        yield Path(folder)
