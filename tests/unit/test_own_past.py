"""What a fault is called, whom it names, and what liars can not do."""

from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import Profile
from tests.simulators.streams import Traits
from tests.support.looks import CONFIG, Fault, Fleet, index_of, judged, mapped, small, told

pytestmark = pytest.mark.sampled(3)

FLEET_KINDS = {"skew", "drift", "quality", "prediction", "performance"}
START = 4
HISTORY = {"reference_windows": 12, "windows": 7}


def seen(*faults, **options):
    """The alarms over a fleet with faults from look `START` on, and a known-good past."""
    return judged(small(**(HISTORY | options), faults=faults)).alarms


# ── the fleet as one ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Fault("mean", 0.7, start=START, columns=(5,)), "drift", "f5 moved up by 0.7"),
        (Fault("mean", -0.7, start=START, columns=(5,)), "drift", "f5 moved down by 0."),
        (
            Fault("scale", 1.6, start=START, columns=(5,)),
            "drift",
            "f5 spreads at least 1.5 times as wide as before",
        ),
        (Fault("scale", 0.5, start=START, columns=(5,)), "drift", "f5 spreads 0.4"),
        (Fault("missing", 0.1, start=START, columns=(5,)), "quality", "f5: missing values went from 0 % to "),
        (Fault("stuck", 0.2, start=START, columns=(5,)), "quality", "f5: repeated values went from 0 % to "),
    ],
)
def test_a_fault_in_all_devices_is_called_what_it_is(fault, kind, words):
    (alarm,) = seen(fault)
    assert (alarm.kind, alarm.feature, alarm.cohort, alarm.opened_window) == (kind, "f5", "fleet", START)
    assert words in alarm.why
    assert len(alarm.devices) > 30
    assert alarm.closed_window is None
    evidence = dict(alarm.evidence)
    assert evidence["p"] <= 0.05
    assert {"z", "from", "to", "psi", "ks"} <= evidence.keys()


def test_unseen_categories_are_quality_and_a_moved_category_is_named():
    options = {"traits": Traits(shapes=("category",)), "rows": 200}
    (alarm,) = seen(Fault("unseen", 0.15, start=START, columns=(5,)), **options)
    assert (alarm.kind, alarm.feature) == ("quality", "f5")
    assert "f5: unseen categories went from 0 % to 1" in alarm.why


@pytest.mark.parametrize(("devices", "given"), [(40, True), (40, False), (4, True)], ids=str)
def test_categories_that_are_all_new_are_told_of_as_such_not_as_the_ones_that_are_gone(devices, given):
    options = {"traits": Traits(shapes=("category",)), "rows": 200, "devices": devices}
    if not given:
        options |= {"reference_windows": 0, "windows": 22}
    start = START if given else 16
    (alarm,) = [a for a in seen(Fault("unseen", 1.0, start=start, columns=(5,)), **options) if a.feature]
    assert (alarm.kind, alarm.feature) == ("quality", "f5")
    assert "f5: unseen categories went from 0 % to 100 %" in alarm.why
    assert dict(alarm.evidence)["fault"] == "unseen categories"


def test_a_sensor_whose_categories_are_all_new_is_told_of_as_such():
    options = {"traits": Traits(shapes=("category",)), "rows": 200}
    (alarm,) = seen(Fault("unseen", 1.0, start=START, columns=(5,), devices=(3,)), **options)
    assert (alarm.kind, alarm.feature, alarm.devices) == ("sensor", "f5", ("device-0003",))
    assert "f5: unseen categories went from 0 % to 100 %" in alarm.why


def test_a_column_without_a_value_has_no_figures_to_show():
    (alarm,) = [a for a in seen(Fault("missing", 1.0, start=START, columns=(5,))) if a.feature]
    assert "f5: missing values went from 0 % to 100 %" in alarm.why
    evidence = dict(alarm.evidence)
    assert {"p", "z", "from", "to", "fault"} == evidence.keys()
    assert alarm.severity == "ticket"


def test_what_moves_the_answers_is_a_prediction_that_pages():
    alarms = seen(Fault("mean", 1.5, start=START, columns=(0,)))
    assert {(a.kind, a.feature, a.severity) for a in alarms} >= {
        ("prediction", None, "page"),
        ("drift", "f0", "page"),
    }


def test_half_of_the_fleet_moves_the_fleet():
    alarms = seen(Fault("mean", 1.0, start=START, columns=(5,), share=0.5))
    assert told(alarms) == [("drift", "f5", "fleet", START)]
    moved = {index_of(d) for d in alarms[0].devices}
    assert set(range(20, 40)) <= moved


def test_devices_that_did_not_move_are_hardly_named():
    named, wrong, missed = 0, 0, 0
    for seed in range(10):
        alarms = seen(Fault("mean", 0.8, start=START, columns=(5,), share=0.5), seed=seed)
        for found in ({index_of(d) for d in a.devices} for a in alarms if a.feature == "f5"):
            named += len(found)
            wrong += len(found - set(range(20, 40)))
            missed += len(set(range(20, 40)) - found)
    assert named >= 180
    assert wrong <= 0.03 * named
    assert missed <= 0.03 * named


def test_an_open_incident_names_those_that_moved_since():
    """A shift that grows is first seen in some of the devices that it is in."""
    alarms = seen(Fault("mean", 1.0, start=START, columns=(5,), ramp=8), windows=14)
    (alarm,) = [a for a in alarms if a.feature == "f5"]
    assert alarm.opened_window < 10
    assert len(alarm.devices) == 40
    assert "in 40 of 40 devices" in alarm.why
    assert float(alarm.why.split("up by ")[1].split()[0]) > 0.9


# ── devices ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("broken", [(3,), (3, 17, 30)])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("offset", 2.0, start=START, columns=(5,)),
        Fault("dead", 0.0, start=START, columns=(5,)),
        Fault("missing", 1.0, start=START, columns=(5,)),
        Fault("noise", 4.0, start=START, columns=(5,)),
    ],
    ids=lambda fault: fault.kind,
)
def test_broken_sensors_are_named_exactly_and_raise_no_alarm_of_the_fleet(fault, broken):
    alarms = seen(replace(fault, devices=broken))
    assert {(a.kind, a.feature, a.severity) for a in alarms} == {("sensor", "f5", "ticket")}
    (alarm,) = alarms
    assert alarm.opened_window <= START + 1
    assert [index_of(d) for d in alarm.devices] == list(broken)
    assert "f5" in alarm.why
    assert f"device-{broken[0]:04d}" in alarm.why


def test_the_device_whose_figures_are_told_is_named_first():
    weak = Fault("offset", 2.0, start=START, columns=(5,), devices=(3,))
    strong = replace(weak, size=4.0, devices=(17,))
    (alarm,) = seen(weak, strong)
    assert [index_of(d) for d in alarm.devices] == [3, 17]
    assert alarm.why.startswith("device-0017 most: f5: ")
    assert alarm.why.endswith("; also device-0003")


def test_an_honest_fleet_names_nobody():
    assert seen(seed=1) == seen(seed=2) == ()


# ── liars ──────────────────────────────────────────────────────────────────────────────────────────────


def _add(profile: Profile, counts, sums, rows) -> Profile:
    return replace(profile, counts=counts, sums=sums, rows=rows)


def inflate(fleet, liars):
    """Liars say everything a thousand times, of rows that moved."""
    other = Fleet(**{**vars_of(fleet), "faults": (Fault("mean", 1.0, start=START, columns=(4, 5)),)})

    def change(index, reading):
        if index_of(reading.device) not in liars or index < START:
            return reading
        p = other.slices[index].readings[index_of(reading.device)].profile
        return replace(reading, profile=_add(p, p.counts * 1000, p.sums * 1000, p.rows * 1000))

    return mapped(fleet.slices, change)


def shift(size):
    def lie(fleet, liars):
        fault = Fault("offset", size, start=START, columns=(0, 4, 5), devices=tuple(sorted(liars)))
        return Fleet(**{**vars_of(fleet), "faults": (fault,)}).slices

    lie.__name__ = f"shift{size}"
    return lie


def copy(fleet, liars):
    """Liars all send what one of them saw, moved: one body with many mouths."""
    first = min(liars)
    fault = Fault("offset", 1.0, start=START, columns=(4, 5), devices=(first,))
    other = Fleet(**{**vars_of(fleet), "faults": (fault,)}).slices

    def change(index, reading):
        if index_of(reading.device) not in liars or index < START:
            return reading
        return replace(reading, profile=other[index].readings[first].profile)

    return mapped(fleet.slices, change)


def identities(fleet, liars):
    """Liars send as they did, and as many devices that nobody has heard of say something else."""
    fault = Fault("offset", 2.0, start=START, columns=(4, 5), devices=tuple(sorted(liars)))
    other = Fleet(**{**vars_of(fleet), "faults": (fault,)}).slices
    looks = []
    for one, lies in zip(fleet.slices, other, strict=True):
        new = tuple(
            replace(r, device=DeviceId(f"x-{r.device}")) for r in lies.readings if index_of(r.device) in liars
        )
        looks.append(replace(one, readings=one.readings + new) if one.index >= START else one)
    return tuple(looks)


def vars_of(fleet):
    return {name: getattr(fleet, name) for name in fleet.__dataclass_fields__}


class Told:
    """A fleet whose devices send ``looks``."""

    def __init__(self, fleet, looks):
        self.info, self.reference, self.slices, self.windows = (
            fleet.info,
            fleet.reference,
            looks,
            fleet.windows,
        )


@pytest.mark.covering
@pytest.mark.parametrize(
    "lie", [inflate, shift(0.3), shift(1.0), shift(5.0), copy, identities], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("given", [True, False], ids=["history", "training"])
@pytest.mark.parametrize("devices", [40, 400])
def test_a_fifth_of_lying_devices_never_moves_the_fleet(devices, given, lie):
    options = {"reference_windows": 10 if given else 0, "windows": 7, "group_rows": 400}
    fleet = small(seed=11, devices=devices, rows=50, **options)
    liars = set(range(devices // 5))
    config = CONFIG if given else replace(CONFIG, baseline_looks=START)
    judge = judged(Told(fleet, lie(fleet, liars)), config)  # type: ignore[arg-type]
    assert not FLEET_KINDS & {a.kind for a in judge.alarms}, told(judge.alarms)
    assert judge.wishes == ()


def test_no_lie_of_one_device_can_move_a_fleet_of_the_least_size():
    fleet = small(seed=12, devices=CONFIG.min_devices, reference_windows=12, windows=8)
    for lie in (shift(50.0), inflate):
        judge = judged(Told(fleet, lie(fleet, {0})))  # type: ignore[arg-type]
        assert not FLEET_KINDS & {a.kind for a in judge.alarms}


def test_liars_cannot_hide_a_shift_of_the_others():
    """A fifth says the opposite of what all others see."""
    lies = Fault("offset", -1.0, start=START, columns=(5,), devices=tuple(range(8)))
    truth = Fault("mean", 0.6, start=START, columns=(5,), devices=tuple(range(8, 40)))
    assert ("drift", "f5", "fleet", START) in told(seen(lies, truth))


def test_false_truths_of_a_fifth_do_not_move_the_accuracy():
    fleet = Fleet(seed=13, devices=400, features=6, rows=60, windows=6, reference_windows=8, labelled=True)

    def change(index, reading):
        lying = index_of(reading.device) < 80 and index >= 2
        return replace(reading, correct=0) if lying else reading

    assert judged(Told(fleet, mapped(fleet.slices, change))).alarms == ()  # type: ignore[arg-type]


def test_skew_needs_more_than_a_few_devices_however_many_groups_there_are():
    """Thirty training units: eight odd devices of forty could not all have been dealt to one side by chance."""
    fault = Fault("offset", 3.0, start=0, columns=(5,), devices=tuple(range(8)))
    fleet = small(seed=14, groups=30, group_rows=300, windows=8, faults=(fault,))
    judge = judged(fleet, settle=0, block_looks=1)
    assert not FLEET_KINDS & {a.kind for a in judge.alarms}
    everyone = replace(fault, devices=None)
    moved = judged(
        small(seed=14, groups=30, group_rows=300, windows=8, faults=(everyone,)), settle=0, block_looks=1
    )
    assert ("skew", "f5") in {(a.kind, a.feature) for a in moved.alarms}


def test_the_same_looks_raise_the_same_alarms():
    fleet = small(seed=15, **HISTORY, faults=(Fault("mean", 0.5, start=START, columns=(5,)),))
    first, second = judged(fleet), judged(fleet)
    assert first.alarms == second.alarms != ()
    assert np.array_equal([a.evidence for a in first.alarms], [a.evidence for a in second.alarms])
