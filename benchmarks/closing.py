"""`Runtime.predict` in a running daemon: while windows close, publish and are acknowledged every second, and without.

The daemon is the real one, in this process, with a real Mosquitto; a process of its own answers every window and
event with an acknowledgement, as the aggregator does. Beside the daemon a thread predicts the same rows in two ways:
one after the other without a pause, and paced, as sensors do. Phases with windows of a second and of a day take
turns. ``p99`` is of all calls of a phase, ``worst`` the slowest one.
"""

import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event as Flag
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import rig
from benchmarks.rig import Address
from edge_runtime.config import load
from edge_runtime.contract.codec import decode, encode
from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.messages import Ack, Event, Window
from edge_runtime.contract.topics import ACK, Topics
from edge_runtime.daemon import Daemon
from edge_runtime.link import Connected, Link, Outgoing, Received
from edge_runtime.mqtt.broker import Broker
from edge_runtime.runtime import Runtime

WINDOW_SECONDS: Final = {"every second": 1.0, "none": 86_400.0}
PACE_SECONDS: Final = {"back to back": 0.0, "1,000 a second": 1e-3}
TARGET: Final = 2.0
"""Most that p99 with windows may be, in terms of p99 without."""
PHASE_SECONDS: Final = 3.0
ROUNDS: Final = 4
WARM_SECONDS: Final = 0.2
_POLL_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Durations of the calls (n,) in ns, and how many windows were acknowledged meanwhile."""

    durations_ns: NDArray[np.int64]
    acknowledged: int

    def quantile_us(self, q: float) -> float:
        """The ``q``-quantile in microseconds."""
        return float(np.quantile(self.durations_ns, q)) / 1e3


def acknowledge(at: Address, stop: Flag, stored: Any) -> None:
    """Answers whatever the device wants stored, until told to stop; ``stored`` counts the windows."""
    topics = Topics(rig.FLEET)
    link = Link(Broker(host=at.host, port=at.port), client_id="aggregator", delay=lambda _: 0.1)
    for what in ("window", "event"):
        link.subscribe(topics.every(what))
    link.start()
    try:
        while not stop.is_set():
            match link.poll(_POLL_SECONDS):
                case Connected():
                    stored.value = max(stored.value, 0)  # from now on it hears everything
                case Received(payload=payload):
                    message = decode(payload)
                    if isinstance(message, Window | Event):
                        ack = Ack(device=message.device, session=message.session, seqs=(message.seq,))
                        link.publish(Outgoing(topics.ack(message.device), encode(ack), ACK))
                        stored.value += isinstance(message, Window)
                case _:
                    pass
    finally:
        link.stop(2.0)


@contextmanager
def acknowledged(at: Address) -> Iterator[Any]:
    """Runs `acknowledge` in a process of its own and gives its counter, once it has connected."""
    spawn = multiprocessing.get_context("spawn")
    stop, stored = spawn.Event(), spawn.Value("q", -1)
    process = spawn.Process(target=acknowledge, args=(at, stop, stored), daemon=True)
    process.start()
    try:
        _wait(lambda: stored.value >= 0, "the process that acknowledges")
        yield stored
    finally:
        stop.set()
        process.join()


def _connected(daemon: Daemon) -> bool:
    return daemon._link is not None and daemon._link.connected


def phase(
    config: Path, rows: Sequence[NDArray[np.float32]], *, seconds: float, pace: float, stored: Any
) -> Phase:
    """Starts the daemon, predicts for ``seconds`` on its runtime, one row every ``pace`` seconds, and stops it."""
    daemon, stop = Daemon(load(config)), threading.Event()

    def application() -> Phase:
        try:
            _wait(lambda: daemon._runtime is not None and _connected(daemon), "the daemon")
            runtime = daemon._runtime
            assert runtime is not None
            _predict(runtime, rows, seconds=WARM_SECONDS, pace=0.0)
            before = stored.value
            durations = _predict(runtime, rows, seconds=seconds, pace=pace)
            return Phase(durations_ns=durations, acknowledged=stored.value - before)
        finally:
            stop.set()

    with ThreadPoolExecutor(1) as pool:
        predicting = pool.submit(application)
        daemon.run(stop)
        return predicting.result()


def _predict(
    runtime: Runtime, rows: Sequence[NDArray[np.float32]], *, seconds: float, pace: float
) -> NDArray[np.int64]:
    clock, predict, count = time.perf_counter_ns, runtime.predict, len(rows)
    durations: list[int] = []
    now = clock()
    last, due = now + int(seconds * 1e9), now
    while now < last:
        if pace:
            due += int(pace * 1e9)
            if due > now:
                time.sleep((due - now) / 1e9)
        row = rows[len(durations) % count]
        start = clock()
        predict(row)
        now = clock()
        durations.append(now - start)
    return np.array(durations, np.int64)


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + rig.WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SkiffError(f"{what} was not ready within {rig.WAIT_SECONDS:.0f} s")
        time.sleep(0.01)


def run(
    *,
    estimator: str = "forest of 100",
    rounds: int = ROUNDS,
    seconds: float = PHASE_SECONDS,
    window_seconds: float = WINDOW_SECONDS["every second"],
) -> list[dict[str, Any]]:
    """One row of figures per pace; raises `NoBroker` without Mosquitto."""
    rows = [np.ascontiguousarray(row) for row in rig.watch_rows()[0][:1000]]
    periods = WINDOW_SECONDS | {"every second": window_seconds}
    found: dict[str, dict[str, list[Phase]]] = {pace: {name: [] for name in periods} for pace in PACE_SECONDS}
    with rig.workplace() as folder:
        model = rig.artifact(folder, estimator)
        with rig.mosquitto(folder / "broker", tls=False) as at, acknowledged(at) as stored:
            for turn in range(rounds):
                for pace, each in found.items():
                    for name, period in periods.items():
                        home = folder / f"{turn}-{PACE_SECONDS[pace]}-{period}"
                        config = rig.provision(home, model, at, source="none", window_seconds=period)
                        one = phase(config, rows, seconds=seconds, pace=PACE_SECONDS[pace], stored=stored)
                        each[name].append(one)
    return [_figures(estimator, pace, each) for pace, each in found.items()]


def _figures(estimator: str, pace: str, found: dict[str, list[Phase]]) -> dict[str, Any]:
    names = {"every second": "windows", "none": "none"}
    p99 = {name: [one.quantile_us(0.99) for one in each] for name, each in found.items()}
    figures: dict[str, Any] = {"model": estimator, "rows": pace}
    for name, each in found.items():
        short = names[name]
        figures |= {
            f"{short} calls": sum(one.durations_ns.size for one in each),
            f"{short} acknowledged": sum(one.acknowledged for one in each),
            f"{short} p50 us": rig.spread([one.quantile_us(0.5) for one in each]),
            f"{short} p99 us": rig.spread(p99[name]),
            f"{short} p99.9 us": rig.spread([one.quantile_us(0.999) for one in each]),
            f"{short} worst us": rig.spread([one.quantile_us(1.0) for one in each]),
        }
    return figures | {"p99 ratio": rig.over(p99["every second"], p99["none"])}


def main() -> int:
    """Prints the table."""
    for figures in run():
        print(f"{figures['model']}, rows {figures['rows']}")
        for name, value in list(figures.items())[2:]:
            print(f"  {name:20} {value}" + (f"   at most {TARGET}" if name == "p99 ratio" else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
