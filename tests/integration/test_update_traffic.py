"""What updates cost on the wire, counted between a device and a real Mosquitto."""

from datetime import UTC, datetime, timedelta

import pytest

from benchmarks.update import descendants
from cli.publishing import publish
from edge_runtime.adapters.slots import Slots
from edge_runtime.contract.topics import RELEASE
from edge_runtime.mqtt.broker import Broker
from tests.integration.test_updater_mqtt import update
from tests.publisher import COHORT, DEVICE, FLEET, MODEL, artifact, put, release, signed
from tests.support import chaos
from tests.support.loop import wait_for
from tests.support.meter import Meter
from trainer.publish import Repository


@pytest.fixture
def meter(mosquitto):
    meter = Meter(mosquitto.port)
    yield meter
    meter.close()


# ── idle ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def idle(tmp_path, mosquitto, meter):
    """A device that follows a release which asks for nothing, between it and the broker a meter; and its centre."""
    repository = Repository.create(tmp_path / "repository")
    broker = Broker(host=mosquitto.host, port=mosquitto.port)
    publish(repository, [], fleet=chaos.FLEET, broker=broker)
    home = chaos.provision(tmp_path / "d", meter.host, meter.port, source="none")
    (home.folder / "root.json").write_bytes(repository.pinned_root.read_bytes())
    centre = chaos.Centre(mosquitto.host, mosquitto.port)
    wanted = release(chaos.OLD.digest, fleet=chaos.FLEET, model=chaos.MODEL)
    topic = chaos.TOPICS.release(chaos.COHORT, chaos.MODEL)
    centre.publish(topic, signed(repository, wanted))
    process = home.start()
    centre.wait(
        lambda: any(s.online and s.models[0].revision == 1 for s in centre.statuses), "the release's revision"
    )
    try:
        yield home, centre, process, topic
    finally:
        centre.close()


def started(home, meter, *, with_child):
    """What a start costs: the daemon's connection, once it is quiet. Its update child has come and gone."""
    meter.forget()
    process = home.start()
    try:
        process.wait_line("connected")
        if with_child:
            wait_for(lambda: descendants(process.pid), "the update child to start")
            wait_for(lambda: not descendants(process.pid), "the update child to end")
        meter.settle()
        assert not meter.of(f"{home.device}-update")
        [crossed] = meter.of(home.device)
        return crossed
    finally:
        assert process.stop() == 0


@pytest.mark.slow
def test_an_idle_device_checks_for_updates_within_a_kilobyte(idle, meter):
    home, centre, process, topic = idle
    meter.settle()
    [first] = meter.of(f"{home.device}-update")
    meter.forget()
    meter.cut()
    process.wait(lambda: len(process.said("connected")) == 2, "the second connection")
    meter.settle()
    [again] = meter.of(home.device)
    assert not meter.of(f"{home.device}-update")
    assert process.stop() == 0
    start = started(home, meter, with_child=True)
    centre.publish(topic, b"", RELEASE)
    meter.settle()
    nothing = started(home, meter, with_child=False)
    check = start.total - nothing.total
    print(
        f"bytes both ways: a connection {again.total}, a start {start.total}, one with no release retained "
        f"{nothing.total}; the check for updates is {check}; the first one, with trust metadata, was {first.total}"
    )
    assert 200 < check <= 1000
    assert abs(again.total - start.total) < 600  # the same, but for what a start reports of itself


# ── away ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("rotations", [0, 3])
def test_a_device_that_was_off_for_90_days_catches_up_cheaply(tmp_path, mosquitto, meter, rotations):
    now = datetime.now(UTC)
    clock = [now]
    repository = Repository.create(tmp_path / "repository", clock=lambda: clock[0])
    repository.enable_auto(MODEL)
    broker = Broker(host=mosquitto.host, port=mosquitto.port)
    job = {
        "state_dir": str(tmp_path / "state"),
        "fleet": FLEET,
        "cohort": COHORT,
        "model": MODEL,
        "device": DEVICE,
        "broker": {"host": meter.host, "port": meter.port},
        "root": str(repository.pinned_root),
        "floor": 0,
        "serving": "",
        "have": [],
        "quarantine": {},
        "budgets": {},
        "probe_address_space_bytes": 2_000_000_000,
        "deadline_seconds": 30.0,
    }
    first = repository.add(put(tmp_path, artifact())).digest
    publish(repository, [first], fleet=FLEET, broker=broker)
    assert update(job, signed(repository, release(first)))["ok"]
    for day in range(rotations):
        clock[0] = now + timedelta(days=90 * (day + 1) / (rotations + 1))
        repository.rotate("root")
        repository.refresh()
    clock[0] = now + timedelta(days=90)
    data = artifact(trees=60)
    second = repository.add(put(tmp_path, data)).digest
    publish(repository, [second], fleet=FLEET, broker=broker)
    meter.forget()
    result = update(job, signed(repository, release(second, revision=500)), serving=first, have=[first])
    assert result["ok"], result
    assert Slots(tmp_path / "state").blob(second).read_bytes() == data
    [crossed] = meter.of(f"{DEVICE}-update")
    rest = crossed.total - len(data)
    print(
        f"90 days and {rotations} roots later: {crossed.total} bytes both ways, {len(data)} of them the model; "
        f"{rest} for metadata and MQTT"
    )
    assert rest < 7_000
