"""Devices against the training's groups, and against all of it where there are none."""

from dataclasses import replace

import numpy as np
import pytest

from aggregator.adapters.documents import look_text
from aggregator.core.components import components_of
from aggregator.core.judge import Judge
from aggregator.core.own_past import Terms
from aggregator.core.skew import Newcomers, Shared, against_groups, against_pool, skew_findings
from tests.simulators.streams import Traits
from tests.support.looks import CONFIG, Fault, judged, small

FLEET = small(seed=1, devices=20, windows=1)
COMPONENTS = components_of(FLEET.info)
GROUPS = [profile for _, profile in FLEET.info.reference.groups]
NOTHING = Shared(variance=np.zeros(COMPONENTS.size), freedom=np.full(COMPONENTS.size, np.inf))


def profiles(size=0.0, column=5, **options):
    faults = (Fault("mean", size, start=0, columns=(column,)),) if size else ()
    fleet = small(**({"seed": 1, "devices": 20, "windows": 1} | options), faults=faults)
    return [reading.profile for reading in fleet.slices[0].readings]


def groups_test(devices, shared=NOTHING, **options):
    return against_groups(
        GROUPS, devices, COMPONENTS, shared, CONFIG, **({"level": 0.01, "seed": 0} | options)
    )


def test_a_moved_column_is_found_with_its_direction_and_no_other():
    for size in (1.0, -1.0):
        test = groups_test(profiles(size))
        assert np.flatnonzero(test.p <= 0.01).tolist() == [5]
        at = np.flatnonzero((COMPONENTS.owners == 5) & (COMPONENTS.cells == -1))[0]
        assert np.sign(test.z[at]) == np.sign(size)
        assert test.broad(int(at), 0.01)
    assert groups_test(profiles()).units == 6


def test_units_that_differ_as_much_as_devices_do_are_no_skew():
    traits = Traits(offset_sd=0.3, scale_sd=0.2)
    wrong = 0
    for seed in range(12):
        fleet = small(seed=seed, devices=20, windows=1, traits=traits)
        groups = [p for _, p in fleet.info.reference.groups]
        devices = [r.profile for r in fleet.slices[0].readings]
        test = against_groups(groups, devices, components_of(fleet.info), NOTHING, CONFIG, level=1.0, seed=0)
        wrong += bool((test.p <= 0.05).any())
    assert wrong <= 3


def test_only_the_outputs_are_compared_when_asked():
    moved = profiles(2.0, column=0)
    outputs = groups_test(moved, outputs=True)
    assert (outputs.z[COMPONENTS.inputs] == 0).all()
    assert outputs.p[6:].min() <= 0.01
    assert (outputs.p[:6] == 1).all()


def test_what_devices_do_together_from_look_to_look_is_no_skew():
    shared = Shared(variance=np.full(COMPONENTS.size, 0.5), freedom=np.full(COMPONENTS.size, 8.0))
    assert (groups_test(profiles(1.0), shared).p > 0.05).all()


def test_a_single_training_unit_sees_gross_differences_only():
    total = FLEET.info.reference.total
    small_shift = against_pool(total, profiles(0.1), COMPONENTS, NOTHING, CONFIG)
    assert (small_shift.p > 0.01).all()
    gross = against_pool(total, profiles(2.0), COMPONENTS, NOTHING, CONFIG)
    assert np.flatnonzero(gross.p <= 0.01).tolist() == [5]
    assert gross.units == 1


def test_one_unit_is_not_confused_by_devices_that_differ():
    traits = Traits(offset_sd=0.3, scale_sd=0.2)
    for seed in range(6):
        fleet = small(seed=seed, devices=20, windows=1, traits=traits)
        devices = [r.profile for r in fleet.slices[0].readings]
        one = fleet.info.reference.groups[0][1]
        test = against_pool(one, devices, components_of(fleet.info), NOTHING, CONFIG)
        assert (test.p > 0.01).all()


@pytest.mark.parametrize(
    ("groups", "devices", "level", "note"),
    [
        (6, 9, 0.01, "fleet: 9 devices, 10 are needed"),
        (3, 10, 0.001, "allow no p below 0.0035, the level is 0.0010"),
        (2, 20, 0.01, "the training has 2 groups, 3 are needed"),
    ],
)
def test_too_few_units_are_said(groups, devices, level, note):
    info = replace(
        FLEET.info, reference=replace(FLEET.info.reference, groups=FLEET.info.reference.groups[:groups])
    )
    terms = Terms(info, COMPONENTS, CONFIG, 20)
    readings = FLEET.slices[0].readings[:devices]
    who = Newcomers(cohort="fleet", devices={r.device: r.profile for r in readings}, level=level, seed=0)
    figures = judged(FLEET)
    look = figures.look(replace(FLEET.slices[0], index=1))
    findings, told = skew_findings(terms, who, NOTHING, look.figures, look.figures)
    assert note in told
    assert len(findings) == (6 if groups == 2 else 0)


def test_a_column_that_nobody_has_values_of_speaks_for_neither_side():
    hole = Fault("missing", 1.0, start=0, columns=(3,), devices=tuple(range(20)))
    fleet = small(seed=1, devices=20, windows=1, faults=(hole,))
    test = groups_test([r.profile for r in fleet.slices[0].readings])
    shapes = (COMPONENTS.owners == 3) & (COMPONENTS.nature == 0)
    assert np.abs(test.z[shapes]).max() < 8
    assert test.p[3] <= 0.01  # that they are missing speaks
    assert not np.isnan(test.z).any()


@pytest.mark.parametrize("groups", [6, 0])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            Fault("missing", 1.0, start=0, columns=(5,)),
            "f5 is not as in training: missing values are 100 % of rows, 0 %",
        ),
        (
            Fault("unseen", 1.0, start=0, columns=(5,)),
            "f5 is not as in training: unseen categories are 100 % of rows",
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_fault_that_training_did_not_have_is_told_as_the_share_it_has(fault, words, groups):
    traits = Traits(shapes=("category",)) if fault.kind == "unseen" else Traits()
    fleet = small(seed=1, devices=20, windows=4, traits=traits, faults=(fault,))
    info = replace(
        fleet.info, reference=replace(fleet.info.reference, groups=fleet.info.reference.groups[:groups])
    )
    judge = Judge(info, CONFIG, looks=4, settle=0, block_looks=1)
    looks = [judge.look(one) for one in fleet.slices]
    (alarm,) = [a for a in judge.alarms if a.feature == "f5"]
    assert (alarm.kind, words in alarm.why) == ("quality", True), alarm.why
    assert not any(isinstance(value, float) and np.isnan(value) for _, value in alarm.evidence)
    assert "NaN" not in look_text(looks[-1])
