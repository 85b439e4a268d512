"""The update child as the daemon runs it: a process of its own against a real Mosquitto."""

import json
import os
import subprocess
import sys

import pytest

from cli.publishing import publish
from edge_runtime.adapters.slots import Slots
from edge_runtime.contract.topics import BLOB, CHUNK_BYTES, Topics, chunk_count
from edge_runtime.link import Connected, Delivered, Link, Outgoing
from edge_runtime.mqtt.broker import Broker
from tests.publisher import COHORT, DEVICE, FLEET, MODEL, artifact, put, release, signed
from tests.services import free_port
from trainer.publish import Repository

pytestmark = pytest.mark.sampled(2)

BIG = {"trees": 60}


@pytest.fixture
def broker(mosquitto):
    return Broker(host=mosquitto.host, port=mosquitto.port)


@pytest.fixture
def repository(tmp_path):
    repository = Repository.create(tmp_path / "repository")
    repository.enable_auto(MODEL)
    return repository


@pytest.fixture
def job(tmp_path, repository, broker):
    return {
        "state_dir": str(tmp_path / "state"),
        "fleet": FLEET,
        "cohort": COHORT,
        "model": MODEL,
        "device": DEVICE,
        "broker": {"host": broker.host, "port": broker.port},
        "root": str(repository.pinned_root),
        "floor": 0,
        "serving": "",
        "have": [],
        "quarantine": {},
        "budgets": {"predict_p99_ns": 0, "rss_bytes": 0},
        "probe_address_space_bytes": 2_000_000_000,
        "deadline_seconds": 30.0,
    }


class Child:
    """One run of the child; its standard output is read as it comes."""

    def __init__(self, job, message):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime.updater"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**job, "release": message.hex()}).encode())
        self.process.stdin.close()

    def lines(self):
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def result(self):
        """The last line, and the CPU seconds of the child and its probe."""
        *_, last = self.lines()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.close()
        assert self.process.returncode == 0
        return last["result"], usage.ru_utime + usage.ru_stime

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self):
        assert self.process.stdout is not None
        self.process.stdout.close()


def update(job, message, **changes):
    return Child({**job, **changes}, message).result()[0]


def add(repository, tmp_path, data):
    return repository.add(put(tmp_path, data), role="auto").digest


def retain(broker, topic, payload):
    """Replaces one retained chunk behind the publisher's back."""
    link = Link(broker, client_id="meddler", delay=lambda attempt: 0.1)
    link.start()
    try:
        while not isinstance(link.poll(10.0), Connected):
            pass
        link.publish(Outgoing(topic, payload, BLOB))
        while not isinstance(link.poll(10.0), Delivered):
            pass
    finally:
        link.stop(2.0)


def test_a_release_becomes_an_installed_model(repository, broker, job, tmp_path):
    data = artifact(**BIG)
    digest = add(repository, tmp_path, data)
    publish(repository, [digest], fleet=FLEET, broker=broker)
    child = Child(job, signed(repository, release(digest)))
    lines = list(child.lines())
    child.process.wait(30)
    child.close()
    assert [line["progress"] for line in lines[:-1]] == ["fetching", "verified", "probed"]
    assert {line["digest"] for line in lines[:-1]} == {digest}
    result = lines[-1]["result"]
    assert result["ok"], result
    assert result["action"] == "install"
    assert Slots(tmp_path / "state").blob(digest).read_bytes() == data


def test_a_release_that_changes_nothing_is_cheap(repository, broker, job, tmp_path):
    publish(repository, [], fleet=FLEET, broker=broker)
    spent = []
    for revision in (1, 2, 3):
        result, cpu_seconds = Child(job, signed(repository, release(None, revision=revision))).result()
        assert (result["ok"], result["action"]) == (True, "keep")
        spent.append(cpu_seconds)
    print(f"CPU seconds of a child that has nothing to do: {sorted(spent)}")
    # A fleet's devices do this at every revision. Loading ONNX Runtime or a model would pass this.
    assert min(spent) < 1.0


@pytest.mark.slow
def test_a_missing_chunk_is_fetched_by_the_next_run_which_resumes(repository, broker, job, tmp_path):
    data = artifact(**BIG)
    digest = add(repository, tmp_path, data)
    publish(repository, [digest], fleet=FLEET, broker=broker)
    last = chunk_count(len(data)) - 1
    topic = Topics(FLEET).chunk(digest, last)
    retain(broker, topic, b"")
    message = signed(repository, release(digest))
    result = update(job, message, deadline_seconds=2.0)
    assert (result["ok"], result["stage"], result["retry"]) == (False, "fetch", True), result
    staging = Slots(tmp_path / "state").staging(digest)
    assert staging.stat().st_size == last * CHUNK_BYTES
    for index in range(last):
        retain(broker, Topics(FLEET).chunk(digest, index), b"never asked for again")
    retain(broker, topic, data[last * CHUNK_BYTES :])
    assert update(job, message)["ok"]


def test_a_chunk_changed_on_the_broker_never_becomes_a_model(repository, broker, job, tmp_path):
    data = artifact(**BIG)
    digest = add(repository, tmp_path, data)
    publish(repository, [digest], fleet=FLEET, broker=broker)
    retain(broker, Topics(FLEET).chunk(digest, 0), bytes(reversed(data[:CHUNK_BYTES])))
    message = signed(repository, release(digest))
    result = update(job, message)
    assert (result["ok"], result["stage"], result["retry"]) == (False, "verify", True), result
    assert not Slots(tmp_path / "state").has(digest)
    publish(repository, [digest], fleet=FLEET, broker=broker)
    assert update(job, message)["ok"]


@pytest.mark.slow
def test_killed_at_any_instant_the_next_run_finishes(repository, broker, job, tmp_path):
    old_bundle_publisher = signed(repository, release(None))
    publish(repository, [], fleet=FLEET, broker=broker)
    assert update(job, old_bundle_publisher)["ok"]
    data = artifact(**BIG)
    digest = add(repository, tmp_path, data)
    repository.rotate("timestamp")
    publish(repository, [digest], fleet=FLEET, broker=broker)
    message = signed(repository, release(digest, revision=2))
    for milliseconds in range(150, 900, 150):
        child = Child(job, message)
        try:
            child.process.wait(milliseconds / 1000)
        except subprocess.TimeoutExpired:
            child.kill()
        else:
            child.close()
    for phase in ("fetching", "verified"):
        child = Child(job, message)
        for line in child.lines():
            if line.get("progress") == phase:
                break
        child.kill()
    result = update(job, message)
    assert result["ok"], result
    assert Slots(tmp_path / "state").blob(digest).read_bytes() == data
    assert Slots(tmp_path / "state" / "trust").damage == ()


def test_no_broker_ends_in_time_with_a_reason(repository, job):
    port = free_port()
    message = signed(repository, release(None))
    result = update(job, message, broker={"host": "127.0.0.1", "port": port}, deadline_seconds=1.0)
    assert (result["ok"], result["stage"], result["retry"]) == (False, "trust", True)
    assert f"broker 127.0.0.1:{port} cannot be reached (cannot connect" in result["reason"]


def test_devices_that_missed_new_root_keys_follow(repository, broker, job, tmp_path):
    publish(repository, [], fleet=FLEET, broker=broker)
    assert update(job, signed(repository, release(None)))["ok"]
    for role in ("root", "timestamp", "director", "root"):
        repository.rotate(role)
    digest = add(repository, tmp_path, artifact())
    publish(repository, [digest], fleet=FLEET, broker=broker)
    result = update(job, signed(repository, release(digest, revision=2)))
    assert result["ok"], result
