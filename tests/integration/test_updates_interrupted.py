"""Updates that come to no end: what stays on the disk, and how often a whole device tries again."""

import pytest

from edge_runtime.contract.release import TrialGate
from edge_runtime.contract.topics import Topics
from tests.publisher import FLEET
from tests.support.crash_bench import CHUNK_BYTES, TURN_SECONDS, Bench, Device, heavy

TOPICS = Topics(FLEET)
GATE = TrialGate(predictions=20, seconds=0.01, starts=2)


@pytest.fixture
def bench(tmp_path):
    made = Bench.make(tmp_path)
    with made.standing():
        yield made


@pytest.fixture
def device(bench, tmp_path):
    """With a model in service."""
    made = Device(bench.configure(tmp_path / "device"), bench.clocks)
    made.boot()
    model = bench.publish(heavy(1))
    made.hear(bench.offer(model, trial=GATE))
    made.turn_until(lambda slots: slots.committed == model and slots.trial is None, rows=8)
    yield made
    made.power_off()


def begun(device):
    return [path.stem for path in (device.config.state_dir / "staging").glob("*.part")]


def test_of_releases_that_never_got_through_only_the_last_is_kept_and_gone_on_with(bench, device):
    missing, kept = "", b""
    for week in range(6):
        model = bench.publish(heavy(100 + week))
        missing = TOPICS.chunk(model, 2)
        kept = bench.broker.retained.pop(missing)
        message = bench.offer(model, trial=GATE)
        device.hear(message)
        device.turn_until(lambda _, model=model: model in begun(device))
        device.turn()
        assert begun(device) == [model]
        if week % 2:
            device.reboot()
            assert begun(device) == [model], "a restart does not know what is wanted before it is told"
            device.hear(message)
            assert begun(device) == [model]
    bench.broker.retained[missing] = kept
    bench.broker.asked.clear()
    device.turn_until(lambda slots: slots.committed == model, rows=8)
    assert {topic for topic in bench.broker.asked if "/blob/" in topic} == {missing}
    blobs = {path.stem for path in (device.config.state_dir / "blobs").iterdir()}
    assert blobs == set(device.slots.known)
    assert begun(device) == []


def test_a_damaged_chunk_is_fetched_a_few_times_an_hour_and_no_more_once_another_release_comes(bench, device):
    damaged = bench.publish(heavy(2))
    topic = TOPICS.chunk(damaged, 2)
    bench.broker.retained[topic] = b"x" * len(bench.broker.retained[topic])
    bench.broker.asked.clear()
    device.hear(bench.offer(damaged))
    for _ in range(int(1800 / TURN_SECONDS)):
        device.turn()
    assert 5 <= bench.broker.asked.count(topic) <= 11
    assert len(heavy(2)) > 2 * CHUNK_BYTES
    mended = bench.publish(heavy(3))
    device.hear(bench.offer(mended, trial=GATE))
    device.turn_until(lambda slots: slots.committed == mended, rows=8)
