"""Durable windows a second: the real service against a subscriber that only counts, over one Mosquitto.

Both get the same messages of QoS 1 from the same sender, as fast as the broker takes them: windows of 30 features from
2,000 devices. The service decodes, checks against the artifact, commits to its store and acknowledges every window; its
time ends when the last acknowledgement has arrived. It is measured as one process, and as two that share the
subscription and the store. The subscriber is paho alone and counts; its time ends with the last message. They take
turns on one machine, and those whose turn it is not have nothing to do; a broker may have as many messages on the way
to each.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import rig
from benchmarks.counting import READY
from edge_runtime.contract import ids
from edge_runtime.contract.codec import encode
from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.ids import DeviceId, FleetId
from edge_runtime.contract.latency import observe_ns
from edge_runtime.contract.messages import Health, Status, Window
from edge_runtime.contract.profile import Binner
from edge_runtime.contract.topics import Topics
from edge_runtime.engine import Engine
from tests.services import Mosquitto, find_mosquitto
from tests.support.flood import Acks, flood

DEVICES: Final = 2_000
WINDOWS_EACH: Final = 5
REPETITIONS: Final = 5
ROWS: Final = 1_000
KINDS: Final = 50
"""Different windows, dealt out to the devices."""
TARGET: Final = 0.5
FIRST_SEQ: Final = 10_000
SESSION: Final = ids.session_id("0123456789abcdef")
SERVED: Final = {1: FleetId("alone"), 2: FleetId("share")}
"""The fleet that so many processes serve."""
COUNTED: Final = FleetId("count")
NAME: Final = "gateway-{:05}"

CONFIG: Final = """\
fleet = "{fleet}"
registry = "registry"
[broker]
host = "127.0.0.1"
port = {port}
[ingest]
share = "{share}"
[drift]
check_seconds = 600
"""


def _windows(model: Path) -> list[Window]:
    """Windows of real rows with the model's own answers; ``seq`` and ``device`` are to be replaced."""
    engine = Engine(model)
    info = engine.info
    features = rig.watch_rows()[0]
    found = []
    for kind in range(KINDS):
        rng = np.random.default_rng(kind)
        rows = features[rng.integers(len(features), size=ROWS)]
        labels, scores = engine.run(rows)
        assert labels is not None
        binner = Binner(info.reference.spec, probabilities=info.manifest.probabilities)
        binner.observe(rows, labels, scores)
        durations = (20_000 * np.exp(0.3 * rng.normal(size=ROWS))).astype(np.int64)
        found.append(
            Window(
                device=DeviceId(NAME.format(0)),
                session=SESSION,
                seq=FIRST_SEQ,
                seq_lo=FIRST_SEQ,
                model=rig.MODEL,
                digest=ids.digest_of(model.read_bytes()),
                start_ns=1_790_000_000_000_000_000,
                end_ns=1_790_000_300_000_000_000,
                synced=True,
                profile=binner.take(),
                latency=observe_ns(durations),
                queueing=observe_ns(3 * durations),
                health=Health(
                    rss_bytes=71_303_168,
                    peak_rss_bytes=74_448_896,
                    cpu_ns=3_600_123_456_789,
                    uptime_ns=10**15,
                ),
            )
        )
    engine.close()
    return found


class Traffic:
    """Messages as bytes, made before anything is timed: templates with a device's name and a number replaced."""

    def __init__(self, windows: Sequence[Window], devices: int) -> None:
        self._devices = devices
        self._model = windows[0].model
        self._templates = [encode(window) for window in windows]
        self.bytes_each = sum(map(len, self._templates)) / len(windows)

    def windows(self, fleet: FleetId, first: int, count: int) -> list[tuple[str, bytes]]:
        """``count`` windows of every device, numbered from ``first``, in turns."""
        topics = Topics(fleet)
        before = NAME.format(0).encode(), b"\xcd" + FIRST_SEQ.to_bytes(2, "big")
        made = []
        for seq in range(first, first + count):
            number = b"\xcd" + (FIRST_SEQ + seq).to_bytes(2, "big")
            for i in range(self._devices):
                name = NAME.format(i)
                data = self._templates[(i + seq) % len(self._templates)].replace(before[0], name.encode(), 1)
                made.append((topics.window(DeviceId(name), self._model), data.replace(before[1], number, 1)))
        return made

    def births(self, fleet: FleetId) -> list[tuple[str, bytes]]:
        """Every device says that it is there."""
        topics = Topics(fleet)
        names = [DeviceId(NAME.format(i)) for i in range(self._devices)]
        return [
            (topics.status(name), encode(Status(device=name, session=SESSION, seq=1, online=True)))
            for name in names
        ]


@contextmanager
def served(folder: Path, model: Path, port: int, fleet: FleetId, processes: int) -> Iterator[None]:
    """`skiff serve` in processes of its own, with a store on this disk."""
    registry = folder / "registry"
    registry.mkdir(parents=True)
    data = model.read_bytes()
    (registry / f"{ids.digest_of(data)}.onnx").write_bytes(data)
    config = folder / "aggregator.toml"
    share = "ingest" if processes > 1 else ""
    config.write_text(CONFIG.format(fleet=fleet, port=port, share=share), encoding="utf-8")
    command = [sys.executable, "-m", "cli.main", "serve", str(config), "--log-level", "warning"]
    with (folder / "log").open("wb") as log, ExitStack() as stack:
        started = []
        for _ in range(processes):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
            stack.callback(process.wait, rig.WAIT_SECONDS)
            stack.callback(process.terminate)
            started.append(process)
        yield
        if any(process.poll() is not None for process in started):
            raise SkiffError(f"an aggregator ended: {(folder / 'log').read_text(encoding='utf-8')[-2000:]}")


def _count(port: int, messages: Sequence[tuple[str, bytes]]) -> float:
    """Seconds from the first message sent to the last one counted."""
    topic = Topics(COUNTED).every("window")
    command = [sys.executable, "-m", "benchmarks.counting", str(port), topic, str(len(messages))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != READY:
                raise SkiffError("the counting subscriber did not start")
            began = time.monotonic()
            flood(port, messages)
            process.stdout.readline()
            return time.monotonic() - began
        finally:
            process.kill()


def _serve(port: int, messages: Sequence[tuple[str, bytes]], acks: Acks) -> float:
    """Seconds from the first message sent to the last one acknowledged to its device."""
    began = time.monotonic()
    flood(port, messages)
    acks.wait(len(messages), rig.WAIT_SECONDS)
    return time.monotonic() - began


def run(
    *, devices: int = DEVICES, windows_each: int = WINDOWS_EACH, repetitions: int = REPETITIONS
) -> list[dict[str, Any]]:
    """One row of figures for each number of processes; raises `NoBroker` without Mosquitto."""
    binary = find_mosquitto()
    if binary is None:
        raise rig.NoBroker("mosquitto is not installed (Debian: apt-get install mosquitto)")
    counted: list[float] = []
    stored: dict[int, list[float]] = {processes: [] for processes in SERVED}
    with rig.workplace() as folder:
        model = rig.artifact(folder, "logistic")
        traffic = Traffic(_windows(model), devices)
        home = folder / "broker"
        home.mkdir()
        broker = Mosquitto(binary, home, extra_config="max_queued_messages 0\nlog_type error")
        broker.start()
        try:
            with ExitStack() as stack:
                heard = {}
                for processes, fleet in SERVED.items():
                    stack.enter_context(served(folder / fleet, model, broker.port, fleet, processes))
                    heard[processes] = stack.enter_context(Acks(broker.port, Topics(fleet)))
                    _settle(broker.port, fleet, traffic, heard[processes])
                for turn in range(1, repetitions + 1):
                    first = 1 + turn * windows_each
                    messages = traffic.windows(COUNTED, first, windows_each)
                    counted.append(len(messages) / _count(broker.port, messages))
                    for processes, fleet in SERVED.items():
                        messages = traffic.windows(fleet, first, windows_each)
                        seconds = _serve(broker.port, messages, heard[processes])
                        stored[processes].append(len(messages) / seconds)
        finally:
            broker.close()
    return [
        {
            "processes": processes,
            "devices": devices,
            "windows a turn": devices * windows_each,
            "bytes each": round(traffic.bytes_each),
            "durable and acknowledged a second": rig.spread(rates, 0),
            "counted a second": rig.spread(counted, 0),
            "durable / counted": str(rig.over(rates, counted)),
            "at least": TARGET,
        }
        for processes, rates in stored.items()
    ]


def _settle(port: int, fleet: FleetId, traffic: Traffic, acks: Acks) -> None:
    """Every device is known and has sent its first window; sent until it is acknowledged, as devices do."""
    first = traffic.windows(fleet, 0, 1)
    deadline = time.monotonic() + rig.WAIT_SECONDS
    while acks.count < len(first):
        if time.monotonic() > deadline:
            raise SkiffError(f"the service acknowledged {acks.count} of {len(first)} first windows")
        flood(port, [*traffic.births(fleet), *first])
        time.sleep(2.0)
    time.sleep(2.0)
    acks.forget()


def main() -> int:
    """Entry point of ``python -m benchmarks.ingest``."""
    for row in run():
        for name, figure in row.items():
            print(f"{name}: {figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
