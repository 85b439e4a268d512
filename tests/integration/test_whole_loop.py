"""Everything at once, as it is deployed: skiffd processes, an aggregator process, a TUF repository, a real Mosquitto.

Nothing is simulated, and whatever can be killed is killed: daemons during an update, the aggregator, the broker.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from typer.testing import CliRunner

from aggregator.records import Selection
from cli.app import app
from converters import convert
from edge_runtime.contract import codec, ids
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.topics import WINDOW, Topics
from edge_runtime.engine import Engine
from edge_runtime.link import Connected, Delivered, Link, Outgoing
from tests.support.loop import FLEET, MODEL, SKIFFD, Device, Loop, wait_for
from trainer.datasets import load_watch

SEED = int(os.environ.get("SKIFF_KILL_SEED", "20"))
"""When the daemons are killed; other numbers explore other instants."""
KILLS = (
    *(("connected", 0.5), ("connected", 1.0), ("connected", 1.5), ("fetching", 0.3), ("verified", 0.3)),
    *(("probed", 0.1), ("trial", 2.0), ("trial", 2.0)),
)
"""What a daemon is waited for to reach, and how many seconds later at most it is killed."""


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """Two proven forests of the watch family: one of a chunk, one of several."""
    folder = tmp_path_factory.mktemp("artifacts")
    data = load_watch().select(people=(1, 2, 3), wrists=(0,))
    rows = data.take(np.arange(0, len(data), 6))
    made: list[Path] = []
    for version, trees in (("1", 8), ("2", 60)):
        forest = RandomForestClassifier(trees, max_depth=7, random_state=0)
        forest.fit(rows.features, np.asarray(rows.label_names)[rows.labels])
        made.append(
            convert(
                forest,
                rows.features,
                folder / f"watch-{version}.onnx",
                name=MODEL,
                version=version,
                groups=rows.groups,
                probes=500,
                layout=Engine(made[0]).info.reference.spec if made else None,
            ).path
        )
    return made


@pytest.fixture
def loop(tmp_path, mosquitto):
    made = Loop(tmp_path, mosquitto)
    yield made
    made.close()


# ── killed at any instant ──────────────────────────────────────────────────────────────────────────────


def reached(device: Device, phase: str, new: str) -> bool:
    """Whether the current start has come as far as ``phase``, or tries ``new`` already."""
    if device.seen("serving", digest=new):
        return True
    return bool(device.seen(phase) or device.seen("update_progress", phase=phase, digest=new))


def missed(device: Device, phase: str) -> str:
    """Everything this start has said, for a failure to show why ``phase`` never came."""
    return f"{phase} of {device.name}, start {device.starts}:\n{device.text}"


def torment(device: Device, old: str, new: str, kills: Sequence[tuple[str, float]]) -> list[str]:
    """Kills one daemon again and again while it updates; returns what each kill has hit.

    Every kill must leave a whole state, and every start must serve the model that state names.
    """
    rng = random.Random(f"{SEED}-{device.name}")
    hit = []
    for phase, longest_seconds in kills:
        wait_for(partial(reached, device, phase, new), partial(missed, device, phase))
        time.sleep(rng.uniform(0.0, longest_seconds))
        device.kill()
        state = device.check_state()
        assert state.committed in (old, new)
        assert state.quarantine == ()
        hit.append("trial" if state.trial else "committed" if state.committed == new else "before the trial")
        device.start()
        wait_for(lambda: device.seen("serving"), lambda: f"a model to serve:\n{device.text}")
        served = device.seen("serving")
        assert served is not None
        assert served.values["digest"] == state.serving
    return hit


def watch(loop: Loop, over: threading.Event) -> dict[tuple[str, str], set[str | None]]:
    """What the ledger says, until it is over, that each session of each device serves."""
    said: dict[tuple[str, str], set[str | None]] = {}
    while not over.wait(0.1):
        for record in loop.view.devices():
            if (report := record.report(MODEL)) is not None:
                said.setdefault((record.device, record.session), set()).add(report.serving)
    return said


def check_nothing_lost(loop: Loop) -> None:
    """Holds at any instant: what a daemon said it keeps is in its outbox or in the store.

    The order of reading makes it sound: a record that has left the outbox was stored before.
    """
    kept = {key for device in loop.devices for key in device.kept()}
    waiting = set[tuple[str, str, int]]().union(*(device.waiting()[0] for device in loop.devices))
    windows, events = loop.stored()
    assert kept <= waiting | {key for key, _ in windows} | set(events)


@pytest.mark.parametrize(
    ("devices", "kills"),
    [(2, KILLS[2:]), (3, KILLS)],
    ids=["2", "3"],
)
@pytest.mark.slow
def test_whatever_is_killed_devices_serve_the_fleet_converges_and_every_window_counts_once(
    loop, artifacts, devices, kills
):
    loop.start(devices)
    old = loop.offer(artifacts[0])
    loop.wait_serving(old)
    wait_for(lambda: len(loop.stored()[0]) >= 6, "windows under version 1")

    new = loop.offer(artifacts[1], trial_seconds=4.0)
    offered = time.time()
    over = threading.Event()
    with ThreadPoolExecutor(1 + devices) as pool:
        watching = pool.submit(watch, loop, over)
        torments = [pool.submit(torment, device, old, new, kills) for device in loop.devices]
        try:
            time.sleep(1.0)
            loop.aggregator.kill()
            check_nothing_lost(loop)
            loop.aggregator.start()
            wait_for(lambda: all(d.starts >= 3 for d in loop.devices), "two kills of every device")
            check_nothing_lost(loop)
            wait_for(lambda: loop.mosquitto.saved_since(offered), "what was published on the broker's disk")
            loop.mosquitto.kill()
            time.sleep(0.5)
            loop.mosquitto.start()
            failures = [e for torment in torments if (e := torment.exception()) is not None]
            if failures:  # the first one told may only follow from another
                raise BaseExceptionGroup("tormented devices", failures)
            hits = [torment.result() for torment in torments]
            loop.wait_serving(new)
        finally:
            over.set()
        said = watching.result()
    print(
        f"what the kills hit: {hits}; the ledger heard {len(said)} births of {sum(map(len, hits)) + devices} starts"
    )
    assert {"before the trial", "trial"} <= {hit for of_one in hits for hit in of_one}
    assert set().union(*said.values()) == {old, new}

    for device in loop.devices:
        assert device.end(signal.SIGTERM) == 0
        assert device.check_state().committed == new
    wait_for(lambda: not loop.view.online(), "a goodbye of each")
    check_nothing_lost(loop)
    assert loop.aggregator.end(signal.SIGTERM) == 0
    wait_for(lambda: not list(loop.survivors()), "the update children to end")

    windows, events = loop.stored()
    stored = dict(windows)
    assert len(stored) == len(windows)
    assert len(set(events)) == len(events)
    assert loop.dead_letters() == ()
    for device in loop.devices:
        kept, (waiting, dropped) = device.kept(), device.waiting()
        closed = {key: rows for key, rows in kept.items() if rows is not None}
        assert dropped == 0
        assert sum(closed.values()) > 0
        # A kill between the outbox's commit and the log line leaves a record that the log does not know.
        unlogged = {key for key in stored.keys() | set(events) | waiting if key[0] == device.name} - set(kept)
        assert len(unlogged) < device.starts
        for key, rows in closed.items():
            assert stored[key] == rows if key in stored else key in waiting
    figures = loop.view.figures()
    print(f"{figures.windows} windows stored once, {figures.duplicates_rejected} records came twice")
    assert {loop.record(device).report(MODEL).outcome for device in loop.devices} <= {"committed", ""}


# ── bad input ──────────────────────────────────────────────────────────────────────────────────────────


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=60, check=False
    )


def test_an_unknown_key_ends_the_daemon_with_its_name_and_the_nearest_valid_one(tmp_path):
    text = SKIFFD.format(device="d", fleet=FLEET, host="127.0.0.1", port=1, model=MODEL, root="root.json")
    config = tmp_path / "skiffd.toml"
    config.write_text(text.replace("min_rows", "min_row"), encoding="utf-8")
    ended = run("edge_runtime.skiffd", str(config))
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"skiffd: {config}.window: unknown key 'min_row' (did you mean 'min_rows'?)")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, "last byte"])
def test_a_truncated_artifact_is_refused_by_the_engine(artifacts, share):
    data = artifacts[1].read_bytes()
    with pytest.raises(ArtifactError):
        Engine(data[:-1] if share == "last byte" else data[: int(len(data) * share)])


def test_a_truncated_artifact_is_refused_by_inspect_and_publish_in_one_line(artifacts, tmp_path):
    data = artifacts[0].read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(data[: len(data) // 2])
    aggregator = tmp_path / "aggregator.toml"
    aggregator.write_text(f'fleet = "{FLEET}"\n', encoding="utf-8")
    repository = tmp_path / "repository"
    assert CliRunner().invoke(app, ["pki", "init", str(repository)]).exit_code == 0
    for command in (
        ("inspect", str(cut)),
        ("publish", str(cut), "--repository", str(repository), "--aggregator", str(aggregator)),
    ):
        ended = CliRunner().invoke(app, command)
        assert ended.exit_code == 1, ended.stderr
        assert ended.stdout == ""
        (line,) = ended.stderr.splitlines()
        assert line.startswith(f"error: {cut}: ")
    assert not list(repository.glob("targets/**/*.onnx"))


@pytest.mark.slow
def test_a_message_of_another_major_version_is_buried_with_its_reason_and_windows_go_on(loop, artifacts):
    loop.start(devices=1)
    loop.offer(artifacts[0])
    (device,) = loop.devices
    topic = Topics(FLEET).window(ids.device_id(device.name), MODEL)
    wait_for(lambda: loop.stored()[0], "the first window in the store")
    payload = codec.encode(loop.view.windows(Selection())[0])
    future = payload[:1] + bytes([codec.MAJOR + 1]) + payload[2:]
    link = Link(loop.broker, client_id="stranger", delay=lambda attempt: 0.1)
    link.start()
    try:
        while not isinstance(link.poll(10.0), Connected):
            pass
        link.publish(Outgoing(topic, future, WINDOW))
        while not isinstance(link.poll(10.0), Delivered):
            pass
    finally:
        link.stop(2.0)
    wait_for(loop.dead_letters, "the dead letter")
    before = len(loop.stored()[0])
    wait_for(lambda: len(loop.stored()[0]) >= before + 3, "more windows after it")
    (letter,) = loop.dead_letters()
    assert letter["topic"] == topic
    assert letter["payload"] == future
    assert f"contract version {codec.MAJOR + 1}" in letter["reason"]
