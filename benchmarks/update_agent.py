"""What the update agent adds to the daemon's resident memory: before it was ever needed, and after an update child.

Three daemons take turns, with the same model on their disks and the same Mosquitto: one without the agent
(`benchmarks.without_updates`), one that no release was ever retained for, and one that has had a child look at a
release that asks for nothing, so that everything the agent needs has been loaded and used. Differences are taken start
by start, once memory stands still.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks import rig
from benchmarks.rig import Address, Running
from benchmarks.update import descendants
from cli.publishing import publish
from edge_runtime.contract import ids
from edge_runtime.contract.topics import RELEASE, Topics
from edge_runtime.link import Connected, Delivered, Link, Outgoing
from edge_runtime.mqtt.broker import Broker
from tests.publisher import release, signed
from tests.support.loop import wait_for
from trainer.publish import Repository

STARTS: Final = 9
TARGET_KIB: Final = 1024
"""Most that the whole agent may add."""
ARMS: Final = ("without", "waiting", "used")
_WAIT_SECONDS: Final = 10.0


def run(*, starts: int = STARTS) -> list[dict[str, Any]]:
    """One row of figures: KiB of RSS and PSS that the agent adds; raises `NoBroker` without Mosquitto."""
    row = rig.watch_rows()[0][0].tolist()
    with rig.workplace() as folder:
        model = rig.artifact(folder, "logistic")
        repository = Repository.create(folder / "repository")
        found: dict[str, list[rig.Memory]] = {arm: [] for arm in ARMS}
        with (
            rig.mosquitto(folder / "quiet", tls=False) as quiet,
            rig.mosquitto(folder / "busy", tls=False) as busy,
        ):
            _offer(repository, model, busy)
            for turn in range(starts + 1):  # the first leaves byte code and warm caches
                for arm in ARMS:
                    home = folder / f"{arm}-{turn}"
                    one = _settled(arm, home, model, busy if arm == "used" else quiet, repository, row)
                    if turn:
                        found[arm].append(one)
    return [_figures(found)]


def _offer(repository: Repository, model: Path, at: Address) -> None:
    """Retains a release of the model that the devices serve already, and what they need to believe it."""
    broker = Broker(host=at.host, port=at.port)
    publish(repository, [], fleet=rig.FLEET, broker=broker)
    wanted = release(ids.digest_of(model.read_bytes()), fleet=rig.FLEET, model=rig.MODEL)
    topic = Topics(rig.FLEET).release(wanted.cohort, wanted.model)
    link = Link(broker, client_id="director", delay=lambda _: 0.1)
    link.start()
    try:
        _until(link, Connected)
        link.publish(Outgoing(topic, signed(repository, wanted), RELEASE))
        _until(link, Delivered)
    finally:
        link.stop(2.0)


def _until(link: Link, kind: type) -> None:
    while not isinstance(event := link.poll(_WAIT_SECONDS), kind):
        if event is None:
            raise rig.NoBroker(f"no {kind.__name__} from the broker in {_WAIT_SECONDS:g} s")


def _settled(  # noqa: PLR0917 (a start, whole)
    arm: str, home: Path, model: Path, at: Address, repository: Repository, row: list[float]
) -> rig.Memory:
    config = rig.provision(home, model, at, source="stdio", window_seconds=1.0)
    (home / "root.json").write_bytes(repository.pinned_root.read_bytes())
    module = "benchmarks.without_updates" if arm == "without" else "edge_runtime.skiffd"
    with Running(module, str(config), row=row, events=("connected", "window_closed")) as running:
        if arm == "used":
            accepted = home / "state" / "trust" / "record.a.json"
            wait_for(accepted.exists, "the update child to accept the release")
        wait_for(lambda: not descendants(running.pid), "the update child to end")
        return running.settled()


def _figures(found: dict[str, list[rig.Memory]]) -> dict[str, Any]:
    def added(arm: str, of: Callable[[rig.Memory], float]) -> list[float]:
        pairs = zip(found[arm], found["without"], strict=True)
        return [(of(one) - of(bare)) * 1e6 / 1024 for one, bare in pairs]

    figures: dict[str, Any] = {"starts": len(found["without"])}
    figures["without rss MB"] = rig.spread([one.rss_mb for one in found["without"]])
    for arm in ARMS[1:]:
        figures[f"{arm} adds rss KiB"] = rig.spread(added(arm, lambda one: one.rss_mb), 0)
        figures[f"{arm} adds pss KiB"] = rig.spread(added(arm, lambda one: one.pss_mb), 0)
    worst = statistics.median(added("used", lambda one: one.rss_mb))
    figures["verdict"] = f"{'within' if worst <= TARGET_KIB else 'OVER'} {TARGET_KIB} KiB"
    return figures


def main() -> int:
    """Prints the table."""
    for figures in run():
        print("\n".join(f"{name:20} {value}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
