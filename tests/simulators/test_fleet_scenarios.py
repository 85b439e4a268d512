"""Stories of a fleet, told on the simulator; most of them in a calm world, so that the end is known exactly."""

import pytest

from aggregator.config import RolloutConfig
from aggregator.core import rollout
from aggregator.records import Gates
from edge_runtime.contract import topics
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.release import desired, stage_hash
from edge_runtime.core import agent
from edge_runtime.core import events as ev
from tests.simulators.fleet import Fleet
from tests.simulators.world import (
    CRASHES,
    DIES_IN_SHADOW,
    DISAGREES,
    GOOD,
    REFUSES,
    ROUGH,
    SLOW_IN_PROBE,
    SLOW_ON_TRIAL,
    TOPICS,
    Faults,
)
from tests.support.device import COHORT, MODEL, A, B, C, release, signed

pytestmark = pytest.mark.sampled(2)

SIZE = 40
RELEASES = TOPICS.release(COHORT, MODEL)


def make(kinds, *, seed=1, size=SIZE, incumbent=A, warm_up=4.0, **more):
    """A fleet whose devices have all been heard of."""
    fleet = Fleet(seed, size, kinds, incumbent=incumbent, **more)
    fleet.run(warm_up)
    assert len(fleet.centre.records) == size
    return fleet


def roll_out(fleet, candidate, name="r", **wish):
    fleet.centre.order("start_rollout", candidate=candidate, name=name, **wish)


# ── good models ────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_model_of_a_fleet_reaches_everyone():
    fleet = make({A: GOOD}, incumbent=None)
    roll_out(fleet, A)
    fleet.run(2.0)
    assert fleet.serving[A] == set()
    fleet.finish()
    assert fleet.centre.rollout.state == rollout.COMPLETED
    assert fleet.serving[A] == set(fleet.devices)


def test_a_good_model_spreads_stage_by_stage():
    fleet = make({A: GOOD, B: GOOD})
    roll_out(fleet, B)
    stages = {}
    while fleet.centre.track.rollout is None or fleet.centre.busy:
        fleet.run(1.0)
        stages[fleet.centre.rollout.stage] = len(fleet.serving[B])
    fleet.finish()
    assert stages == {1: 3, 2: 10, 3: SIZE}
    assert fleet.centre.audit == ["start", "begin", "advance", "advance", "finish"]
    assert fleet.centre.track.release.incumbent == B
    assert all(device.saved.previous == A for device in fleet.devices.values())


def test_a_rollback_after_completion_needs_no_download():
    fleet = make({A: GOOD, B: GOOD})
    roll_out(fleet, B)
    fleet.finish()
    fleet.ever[A].clear()
    fleet.centre.order("rollback")
    fleet.finish()
    assert fleet.centre.rollout.state == rollout.ROLLED_BACK
    assert fleet.serving[A] == set(fleet.devices)
    assert all(device.saved.outcome == "committed" for device in fleet.devices.values())
    assert all(device.fetched == 1 for device in fleet.devices.values())  # B


def test_a_halt_in_the_middle_brings_everybody_back():
    fleet = make({A: GOOD, B: GOOD})
    roll_out(fleet, B)
    fleet.run(60.0, lambda: len(fleet.serving[B]) >= 10)
    fleet.centre.order("halt")
    fleet.finish()
    assert fleet.centre.rollout.state == rollout.HALTED
    assert fleet.serving[A] == set(fleet.devices)
    assert not any(device.saved.quarantine for device in fleet.devices.values())


# ── bad models ─────────────────────────────────────────────────────────────────────────────────────────

BAD = {"slow in the probe": SLOW_IN_PROBE, "slow on trial": SLOW_ON_TRIAL, "crashes": CRASHES}


BESIDE_ANOTHER = {**BAD, "dies in the shadow": DIES_IN_SHADOW, "refuses rows": REFUSES}


@pytest.mark.parametrize("kind", BESIDE_ANOTHER.values(), ids=BESIDE_ANOTHER.keys())
def test_a_bad_model_never_gets_past_the_canaries(kind):
    fleet = make({A: GOOD, B: kind})
    roll_out(fleet, B)
    fleet.finish()
    assert (fleet.centre.rollout.state, fleet.centre.rollout.stage) == (rollout.HALTED, 1)
    assert len(fleet.ever[B]) <= 3
    assert fleet.serving[A] == set(fleet.devices)
    blamed = [device for device in fleet.devices.values() if device.saved.quarantine]
    assert 1 <= len(blamed) <= 3
    assert all(dict(device.saved.quarantine) == {B: 1} for device in blamed)


def test_a_model_that_answers_otherwise_is_refused_where_that_is_not_allowed_and_never_serves():
    fleet = make({A: GOOD, B: DISAGREES})
    roll_out(fleet, B, shadow={"rows": 120, "max_disagreement": 0.2})
    fleet.finish()
    assert (fleet.centre.rollout.state, fleet.centre.rollout.stage) == (rollout.HALTED, 1)
    assert "otherwise than the model in service" in fleet.centre.rollout.note
    assert fleet.ever[B] == set()
    assert fleet.serving[A] == set(fleet.devices)


def test_how_often_a_candidate_answers_otherwise_is_known_at_the_centre():
    fleet = make({A: GOOD, B: DISAGREES})
    roll_out(fleet, B, shadow={"rows": 120})
    fleet.finish()
    assert fleet.serving[B] == set(fleet.devices)
    reports = [record.report(MODEL) for record in fleet.centre.records.values()]
    assert {(report.shadow_rows, report.shadow_disagreed) for report in reports if report} == {(120, 60)}


@pytest.mark.parametrize("kind", BAD.values(), ids=BAD.keys())
def test_a_bad_first_model_leaves_a_fleet_without_one(kind):
    fleet = make({A: kind}, incumbent=None)
    roll_out(fleet, A)
    fleet.run(120.0, lambda: fleet.centre.track.rollout is not None and not fleet.centre.busy)
    fleet.run(60.0)
    assert fleet.centre.rollout.state == rollout.HALTED
    assert len(fleet.ever[A]) <= 3
    assert fleet.serving[A] == set()


def test_a_model_that_was_quarantined_is_tried_again_under_a_higher_attempt():
    fleet = make({A: GOOD, B: SLOW_ON_TRIAL})
    roll_out(fleet, B, "first")
    fleet.finish()
    held = {device.name for device in fleet.devices.values() if device.saved.quarantine}
    fleet.kinds[B] = GOOD  # whatever made it slow is gone
    roll_out(fleet, B, "second")
    fleet.finish()
    assert fleet.centre.rollout.state == rollout.HALTED  # the same attempt: those devices refuse
    roll_out(fleet, B, "third", attempt=2)
    fleet.run(60.0, lambda: fleet.centre.rollout.rollout == "third" and len(fleet.serving[B]) == 3)
    assert held - fleet.serving[B]  # they are asked in a later stage only
    fleet.finish()
    assert (fleet.centre.rollout.rollout, fleet.centre.rollout.state) == ("third", rollout.COMPLETED)
    assert fleet.serving[B] == set(fleet.devices)
    assert not any(device.saved.quarantine for device in fleet.devices.values())


# ── devices that are away ──────────────────────────────────────────────────────────────────────────────


def test_a_device_that_was_off_during_a_whole_rollout_catches_up():
    fleet = make({A: GOOD, B: GOOD})
    away = fleet.devices[DeviceId("dev-0007")]
    away.switch(on=False)
    roll_out(fleet, B)
    fleet.finish()
    assert away.saved.committed == A
    away.switch(on=True)
    fleet.finish()
    assert away.loaded == B


def test_a_device_that_was_off_during_two_rollouts_goes_straight_to_the_last():
    fleet = make({A: GOOD, B: GOOD, C: GOOD})
    away = fleet.devices[DeviceId("dev-0007")]
    away.switch(on=False)
    for model, name in ((B, "one"), (C, "two")):
        roll_out(fleet, model, name)
        fleet.finish()
    away.switch(on=True)
    fleet.finish()
    assert away.loaded == C
    assert away.name not in fleet.ever[B]


def test_a_device_switched_off_in_the_middle_of_its_trial_goes_on_where_it_was():
    fleet = make({A: GOOD, B: GOOD})
    roll_out(fleet, B)
    fleet.run(30.0, lambda: any(d.saved.trial and d.saved.trial.progressed for d in fleet.devices.values()))
    canary = next(d for d in fleet.devices.values() if d.saved.trial)
    for _ in range(8):  # far more often than a trial has starts
        canary.switch(on=False)
        fleet.run(1.0)
        canary.switch(on=True)
        fleet.run(2.5)
    fleet.finish()
    assert fleet.centre.rollout.state == rollout.COMPLETED
    assert canary.loaded == B


def test_canaries_that_are_switched_off_do_not_leave_a_stage_empty():
    fleet = make({A: GOOD, B: GOOD})
    order = sorted(fleet.devices.values(), key=lambda d: stage_hash(d.name, release(B, rollout="r").rollout))
    for device in order[:20]:
        device.switch(on=False)
    fleet.run(10.0)
    roll_out(fleet, B)
    fleet.run(20.0, lambda: len(fleet.serving[B]) == 3)
    assert fleet.serving[B] == {device.name for device in order[20:23]}
    assert {device.name for device in order[:20]} <= fleet.centre.latecomers
    for device in order[:20]:
        device.switch(on=True)
    fleet.finish()
    assert fleet.serving[B] == set(fleet.devices)


# ── a hostile or forgetful broker ──────────────────────────────────────────────────────────────────────


def test_a_broker_that_forgets_everything_is_told_again():
    fleet = make({A: GOOD, B: GOOD})
    roll_out(fleet, B)
    fleet.run(8.0)
    fleet.restart_broker()
    fleet.finish()
    assert fleet.centre.rollout.state == rollout.COMPLETED
    assert fleet.serving[B] == set(fleet.devices)


def test_an_old_release_replayed_moves_nobody():
    fleet = make({A: GOOD, B: GOOD})
    old = fleet.broker.retained[RELEASES]
    roll_out(fleet, B)
    fleet.finish()
    fleet.broker.publish(RELEASES, old, topics.RELEASE)
    fleet.run(30.0)
    for device in fleet.devices.values():
        device.cut_power()
    fleet.run(60.0)
    assert fleet.serving[B] == set(fleet.devices)
    assert fleet.serving[A] == set()


def test_forged_releases_move_nobody_and_do_not_hold_up_the_genuine_one():
    fleet = make({A: GOOD, B: GOOD, C: GOOD})
    forged = [signed(release(C, revision=10_000 + k, rollout="evil"), b"forged") for k in range(20)]
    for payload in forged:
        fleet.broker.publish(RELEASES, payload, topics.RELEASE)
    roll_out(fleet, B)
    fleet.finish()
    assert fleet.ever[C] == set()
    assert fleet.serving[B] == set(fleet.devices)


def test_nonsense_on_every_topic_a_device_reads_changes_nothing():
    fleet = make({A: GOOD, B: GOOD})
    for name in fleet.devices:
        for topic in (TOPICS.ack(name), TOPICS.command(name), RELEASES):
            for payload in (b"", b"\xc1", b"\x91" * 3000, fleet.rng.randbytes(200)):
                fleet.broker.publish(topic, payload, topics.COMMAND)
    roll_out(fleet, B)
    fleet.finish()
    assert fleet.serving[B] == set(fleet.devices)


def test_a_last_will_that_comes_after_the_birth_does_not_hide_the_device():
    fleet = make({A: GOOD}, faults=Faults(breaks=0.2, late_wills=True), warm_up=60.0)
    assert sum(not record.online for record in fleet.centre.records.values()) > 3
    fleet.finish()
    assert all(record.online for record in fleet.centre.records.values())


# ── a centre that forgot, devices that nobody misses ───────────────────────────────────────────────────


@pytest.mark.parametrize("known", [True, False], ids=["devices known again", "devices unknown yet"])
def test_a_centre_that_lost_its_ledger_gets_its_fleet_back(known):
    fleet = make({A: GOOD, B: GOOD, C: GOOD})
    roll_out(fleet, B)
    fleet.finish()
    fleet.centre.lose_ledger()
    if known:
        fleet.run(60.0, lambda: len(fleet.centre.records) == SIZE)
    roll_out(fleet, C, "r")  # a name that devices know, for the ledger does not
    fleet.finish()
    assert fleet.centre.rollout.state == rollout.COMPLETED
    assert fleet.serving[C] == set(fleet.devices)


def test_what_devices_run_from_before_a_ledger_was_lost_carries_no_stage():
    fleet = make({A: GOOD, B: GOOD})
    roll_out(fleet, B)
    fleet.finish()
    followed = fleet.centre.track.release.revision
    fleet.centre.lose_ledger()
    roll_out(fleet, B, "again")
    fleet.finish()
    assert fleet.centre.rollout.state == rollout.COMPLETED
    for device in fleet.devices.values():
        assert (device.saved.rollout, device.saved.revision > followed) == ("again", True)


def test_devices_that_die_without_a_last_will_do_not_hold_a_rollout_up():
    fleet = make({A: GOOD, B: GOOD})
    gone = list(fleet.devices.values())[:10]
    for (
        device
    ) in gone:  # a broker that was killed forgets wills, and publishes none for who has no rights any more
        device.switch(on=False)
        device.forget_will()
    roll_out(fleet, B)
    fleet.run(400.0, lambda: fleet.centre.rollout.state == rollout.COMPLETED)
    assert fleet.centre.rollout.state == rollout.COMPLETED
    assert {d.name for d in gone} == {n for n, record in fleet.centre.records.items() if not record.online}


def test_devices_without_rows_stay_online():
    fleet = make({A: GOOD})
    fleet.window_seconds = float("inf")
    assert not fleet.run(300.0, lambda: not all(record.online for record in fleet.centre.records.values()))


# ── the simulator itself ───────────────────────────────────────────────────────────────────────────────


def test_a_seed_is_a_run():
    def run(seed):
        fleet = make({A: GOOD, B: GOOD}, seed=seed, faults=ROUGH, warm_up=20.0, size=20)
        roll_out(fleet, B)
        fleet.finish()
        return fleet.now, fleet.centre.audit, fleet.centre.windows

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_the_law_of_the_cap_can_fail(monkeypatch):
    fleet = make({A: GOOD, B: GOOD})
    monkeypatch.setattr(rollout, "_threshold", lambda r, online, cap: 1 << 63)
    roll_out(fleet, B)
    with pytest.raises(AssertionError, match="devices run a candidate in a stage of 3"):
        fleet.finish()


def test_the_law_of_the_runnable_model_can_fail(monkeypatch):
    fleet = make({A: GOOD, B: GOOD})
    monkeypatch.setattr(agent, "Collect", lambda keep: ev.Collect(keep[:1]))
    roll_out(fleet, B)
    with pytest.raises(AssertionError, match="a blob the state needs was collected"):
        fleet.finish()


def test_the_law_of_the_windows_can_fail(monkeypatch):
    fleet = make({A: GOOD})
    monkeypatch.setattr(fleet.centre, "_store", lambda window, payload: None)
    with pytest.raises(AssertionError, match="what is not stored was trimmed"):
        fleet.run(60.0)


def test_the_law_of_convergence_can_fail(monkeypatch):
    fleet = make({A: GOOD, B: GOOD})
    monkeypatch.setattr(fleet.devices[DeviceId("dev-0003")], "receive", lambda link, topic, payload: None)
    roll_out(fleet, B)
    with pytest.raises(AssertionError, match="did not converge"):
        fleet.finish(120.0)


def test_a_stage_that_nobody_commits_is_paused_for_a_person():
    config = RolloutConfig(stages=(3, 1.0), gates=Gates(bake_seconds=3.0, timeout_seconds=30.0))
    fleet = make({A: GOOD, B: GOOD}, rollouts=config)
    roll_out(fleet, B, trial={"predictions": 10**9})
    fleet.run(60.0)
    r = fleet.centre.rollout
    assert (r.state, r.stage) == (rollout.PAUSED, 1)
    assert "stage 1 was not through in 30 s" in r.note
    assert len(fleet.serving[B]) == 3
    fleet.centre.order("halt")
    fleet.finish()
    assert fleet.serving[A] == set(fleet.devices)


def test_what_a_release_asks_for_is_what_every_device_serves():
    fleet = make({A: GOOD, B: GOOD})
    roll_out(fleet, B)
    fleet.run(25.0, lambda: len(fleet.serving[B]) == 10)
    fleet.run(3.0)
    document = fleet.centre.track.release
    for name, device in fleet.devices.items():
        assert device.loaded == desired(document, name)
