"""Laws of a fleet in a rough world, over many seeds and over whatever hypothesis thinks of.

`Fleet` asserts as it runs: a committed device always has a runnable model, no candidate runs on more devices than
its stage allows (those apart that could not be reached when the stage was cut), nothing unstored is trimmed.
`Fleet.finish` asserts that everyone converges once the world is calm, that the centre knows, and that no window was
lost and none counted twice.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.core import rollout
from tests.simulators.fleet import Fleet
from tests.simulators.world import CRASHES, GOOD, HARSH, REFUSES, ROUGH, SLOW_IN_PROBE, SLOW_ON_TRIAL, Faults
from tests.support.device import A, B, C

BAD = (SLOW_IN_PROBE, SLOW_ON_TRIAL, CRASHES, REFUSES)


def story(seed, size, kind, faults, chaos_seconds):
    """A candidate is rolled out over a fleet on A while the world is rough; then it calms."""
    fleet = Fleet(seed, size, {A: GOOD, B: kind}, incumbent=A, faults=faults)
    fleet.run(5.0)
    fleet.centre.order("start_rollout", candidate=B, name=f"r-{seed}")
    fleet.run(chaos_seconds)
    fleet.finish()
    return fleet


def check_end(fleet, kind):
    """What came of it; a good model may have been condemned by power that failed three times in a row."""
    r = fleet.centre.rollout
    everyone = set(fleet.devices)
    if kind == GOOD and r.state == rollout.COMPLETED:
        held = {name for name, device in fleet.devices.items() if device.saved.quarantine}
        assert fleet.serving[B] == everyone - held
        return
    assert r.state == rollout.HALTED
    assert fleet.serving[A] == everyone
    if kind == GOOD:
        assert "made no progress" in r.note
    else:
        assert r.stage == 1
        assert len(fleet.ever[B] - fleet.centre.latecomers) <= 3


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_a_good_model_reaches_a_rough_fleet(seed):
    fleet = story(seed, 100, GOOD, ROUGH, 40.0)
    assert fleet.centre.rollout.state == rollout.COMPLETED
    check_end(fleet, GOOD)


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_model_goes_no_further_than_the_canaries_of_a_rough_fleet(seed):
    kind = BAD[seed % 3]
    check_end(story(100 + seed, 100, kind, ROUGH, 25.0), kind)


@pytest.mark.parametrize("seed", range(4))
def test_a_harsh_world(seed):
    kind = (GOOD, *BAD)[seed % 4]
    check_end(story(200 + seed, 30, kind, HARSH, 40.0), kind)


@pytest.mark.slow
def test_three_hundred_devices():
    fleet = story(1, 300, GOOD, ROUGH, 40.0)
    assert fleet.centre.rollout.state == rollout.COMPLETED
    check_end(fleet, GOOD)


SHARE = st.sampled_from([0.0, 0.1, 0.5])
FAULTS = st.builds(
    Faults,
    late=SHARE,
    repeat=SHARE,
    lose=st.sampled_from([0.0, 0.3, 0.9]),
    breaks=st.sampled_from([0.0, 0.02, 0.2]),
    power=st.sampled_from([0.0, 0.002, 0.05]),
    disk=st.sampled_from([0.0, 0.1, 0.9]),
    child=SHARE,
    centre=SHARE,
)
DEEDS = st.lists(
    st.tuples(
        st.sampled_from(
            ["start B", "start C", "halt", "rollback", "cut", "off", "on", "links", "broker", "centre"]
        ),
        st.integers(0, 11),
        st.floats(0.5, 25.0),
    ),
    max_size=10,
)


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 12),
    kinds=st.tuples(*[st.sampled_from([GOOD, GOOD, *BAD])] * 2),
    first=st.booleans(),
    faults=FAULTS,
    deeds=DEEDS,
)
def test_whatever_happens(seed, size, kinds, first, faults, deeds):
    fleet = Fleet(
        seed,
        size,
        {A: GOOD, B: kinds[0], C: kinds[1]},
        incumbent=A if first else None,
        faults=faults,
    )
    devices = list(fleet.devices.values())
    fleet.run(3.0)
    for number, (deed, which, seconds) in enumerate(deeds):
        device = devices[which % size]
        match deed.split():
            case ["start", name]:
                candidate, attempt = {"B": B, "C": C}[name], 1 + number // 4
                fleet.centre.order("start_rollout", candidate=candidate, name=f"r-{number}", attempt=attempt)
            case ["halt" | "rollback"]:
                fleet.centre.order(deed)
            case ["cut"]:
                device.cut_power()
            case ["off" | "on"]:
                device.switch(on=deed == "on")
            case ["links"]:
                device.lose_link()
            case ["broker"]:
                fleet.restart_broker()
            case ["centre"]:
                fleet.centre.die()
        fleet.run(seconds)
    for device in devices:
        device.switch(on=True)
    fleet.finish()


@pytest.mark.slow
@pytest.mark.parametrize("faults", [ROUGH, HARSH], ids=["rough", "harsh"])
@pytest.mark.parametrize("seed", range(1000, 1040))
def test_many_seeds_of_a_larger_fleet(seed, faults):
    kind = (GOOD, *BAD)[seed % 4]
    check_end(story(seed, 250, kind, faults, (10.0, 40.0, 90.0)[seed % 3]), kind)
