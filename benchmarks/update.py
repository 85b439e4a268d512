"""Resident peaks of an update, in the whole loop: the daemon's at its first load and over a swap, and its children's.

A TUF repository, an aggregator process and a real Mosquitto offer two versions of a model, one after the other, to
one ``skiffd``. The update child fetches and verifies them, and a sandboxed process of its own tries them. Both are
looked at every few milliseconds for the peak that the kernel keeps of each; their memory must be gone when they end.
"""

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import rig
from tests.services import Mosquitto, find_mosquitto
from tests.support.loop import Loop, wait_for

CHILDREN: Final = {"update child": "edge_runtime.updater", "probe": "edge_runtime.probe"}
LOOK_SECONDS: Final = 0.005


@dataclass(frozen=True, slots=True)
class Seen:
    """A child: what it runs and its resident peak, in MB."""

    what: str
    peak_mb: float


class Children(threading.Thread):
    """Looks at the children of a process, and theirs, until it is told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(name="children", daemon=True)
        self._pid = pid
        self._over = threading.Event()
        self._seen: dict[int, Seen] = {}

    def run(self) -> None:
        """The thread's body."""
        while not self._over.wait(LOOK_SECONDS):
            for child in descendants(self._pid):
                self._look(child)

    def _look(self, pid: int) -> None:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
            peak_mb = rig.peak_mb(pid)
        except (OSError, KeyError):  # it has ended, or is about to
            return
        # Until a fork has become its program it shows its parent's memory and command.
        for what, module in CHILDREN.items():
            if module in command:
                before = self._seen.get(pid)
                self._seen[pid] = Seen(what, max(peak_mb, before.peak_mb if before else 0.0))

    def stop(self) -> list[Seen]:
        """Ends looking; returns every child that was seen."""
        self._over.set()
        self.join()
        return list(self._seen.values())


def descendants(pid: int) -> list[int]:
    """Children of a process and their children (``/proc/PID/task/TID/children``, proc(5)); none of one that is gone."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text(encoding="ascii").split()]
        except OSError:  # the thread has ended
            continue
    return found + [deeper for child in found for deeper in descendants(child)]


def run(*, estimator: str = "forest of 100") -> list[dict[str, Any]]:
    """One row of figures for the first model, and one for the swap; raises `NoBroker` without Mosquitto."""
    binary = find_mosquitto()
    if binary is None:
        raise rig.NoBroker("mosquitto is not installed (Debian: apt-get install mosquitto)")
    rows = []
    with rig.workplace() as folder:
        first = rig.artifact(folder, estimator)
        second = rig.artifact(folder, estimator, version="2", like=first)
        (folder / "broker").mkdir()
        broker = Mosquitto(binary, folder / "broker")
        broker.start()
        loop = Loop(folder, broker)
        try:
            loop.start(devices=1)
            for what, model in (("first model", first), ("swap", second)):
                rows.append(
                    {"model": estimator, "update": what, "kB": model.stat().st_size // 1000}
                    | _offer(loop, model)
                )
        finally:
            loop.close()
            broker.close()
    return rows


def _offer(loop: Loop, model: Path) -> dict[str, Any]:
    (device,) = loop.devices
    process = device._process
    assert process is not None
    before = rig.memory(process.pid)
    children = Children(process.pid)
    children.start()
    try:
        loop.wait_serving(loop.offer(model))
        wait_for(lambda: not descendants(process.pid), "the update child to end")
    finally:
        seen = children.stop()
    after = rig.settled(process.pid)
    peaks = {what: [round(one.peak_mb, 1) for one in seen if one.what == what] for what in CHILDREN}
    return {
        "daemon before MB": round(before.rss_mb, 1),
        "daemon after MB": round(after.rss_mb, 1),
        "daemon peak MB": round(after.peak_mb, 1),
        **{f"{what} peak MB": max(found, default=0.0) for what, found in peaks.items()},
        "children left": len(descendants(process.pid)),
    }


def main() -> int:
    """Prints the table."""
    for row in run():
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
