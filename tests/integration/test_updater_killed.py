"""Update children killed by SIGKILL at random instants of every stage; test_daemon_killed.py has the daemon's."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from cli.publishing import publish
from edge_runtime import updates
from edge_runtime.adapters.slots import Slots
from edge_runtime.config import load
from edge_runtime.core import events as core
from edge_runtime.core import lifecycle
from edge_runtime.mqtt.broker import Broker
from tests.publisher import DEVICE, FLEET, MODEL, artifact, put, release, signed
from tests.support.crash_bench import CONFIG
from tests.support.tiny_models import classifier
from tests.support.update_kill import STAGES
from trainer.publish import Repository

BIG = {"trees": 60}
CHUNK_BYTES = 4096


def kill(tmp_path, mosquitto, repository_root, *, seed, count):
    """So many kills; what each of them met."""
    repository = Repository.create(tmp_path / "repository")
    repository.enable_auto(MODEL)
    wanted = repository.add(put(tmp_path, artifact(**BIG)), role="auto", chunk_bytes=CHUNK_BYTES).digest
    publish(repository, [wanted], fleet=FLEET, broker=Broker(host=mosquitto.host, port=mosquitto.port))
    home = tmp_path / "device"
    home.mkdir()
    path = home / "skiffd.toml"
    text = CONFIG.format(device=DEVICE, fleet=FLEET, model=MODEL)
    path.write_text(text.replace("port = 1", f"port = {mosquitto.port}"), encoding="utf-8")
    (home / "root.json").write_bytes(repository.pinned_root.read_bytes())
    config = load(path)
    slots = Slots(config.state_dir)
    old = classifier(name=MODEL)
    slots.staging(old.digest).write_bytes(old.artifact)
    slots.install(old.digest)
    slots.write_record(lifecycle.to_document(lifecycle.SlotState(model=MODEL, committed=old.digest)))
    action = core.StartUpdate(
        release=signed(repository, release(wanted)),
        floor=0,
        serving=old.digest,
        have=(old.digest,),
        quarantine=(),
    )
    plan = {
        "job": updates._job(config, action),
        "kills": count,
        "seed": seed,
        "committed": old.digest,
        "wanted": wanted,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.update_kill", str(tmp_path / "plan.json")],
        cwd=repository_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_five_hundred_kills_leave_a_device_that_serves_and_updates(tmp_path, mosquitto, repository, seed):
    killed = kill(tmp_path, mosquitto, repository, seed=seed, count=100)
    stages = Counter(line["stage"] for line in killed)
    print(
        f"{len(killed)} kills by stage: {dict(stages)}; mid-download {sum(line['staged'] > 0 for line in killed)}, "
        f"with TUF at work {sum(line['scratch'] for line in killed)}, "
        f"with the model in place {sum(line['installed'] for line in killed)}; not in time {killed[-1]['missed']}"
    )
    assert len(killed) == 100
    assert not set(stages) - set(STAGES)
    assert min(stages[stage] for stage in STAGES[:3]) >= 10
    assert len({line["staged"] for line in killed}) > 5, "downloads were cut off at few places"
