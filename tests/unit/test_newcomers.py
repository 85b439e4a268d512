"""Outputs and accuracy of devices that came later, against those that were there before."""

from dataclasses import replace

import numpy as np
import pytest

from aggregator.core.components import components_of
from aggregator.core.newcomers import Arms, newcomer_findings
from aggregator.core.own_past import Terms
from tests.support.looks import CONFIG, Fault, index_of, small

LATE = tuple(range(20, 40))


def found(*faults, level=0.01, devices=40, change=None):
    fleet = small(seed=2, devices=devices, windows=1, labelled=True, faults=faults)
    readings = [change(r) if change else r for r in fleet.slices[0].readings]
    terms = Terms(fleet.info, components_of(fleet.info), CONFIG, 20)
    arms = Arms(
        cohort="fleet",
        newcomers={r.device: r for r in readings if index_of(r.device) >= 20},
        others={r.device: r for r in readings if index_of(r.device) < 20},
        level=level,
        seed=0,
    )
    return newcomer_findings(terms, arms)


def test_newcomers_like_the_others_are_found_to_be():
    findings = found()
    assert {f.kind for f in findings} == {"prediction", "performance"}
    assert not [f for f in findings if f.moved]


def test_other_answers_are_a_prediction_of_the_newcomers():
    moved = [f for f in found(Fault("mean", 2.0, start=0, columns=(0,), devices=LATE)) if f.moved]
    assert "prediction" in {f.kind for f in moved}
    finding = next(f for f in moved if f.kind == "prediction")
    assert [index_of(d) for d in finding.devices] == list(LATE)
    assert "20 new devices against 20 known ones" in finding.why
    assert not finding.at_once
    assert finding.grave


def test_wrong_answers_are_a_drop_of_the_known_accuracy():
    (drop,) = [
        f
        for f in found(Fault("concept", 0.4, start=0, columns=(5,), devices=LATE))
        if f.kind == "performance" and "new devices, " in f.why
    ]
    evidence = dict(drop.evidence)
    assert drop.moved
    assert evidence["from"] - evidence["to"] > 0.1


def test_better_answers_are_no_drop():
    def better(reading):
        return replace(reading, correct=reading.labelled) if index_of(reading.device) >= 20 else reading

    assert not [f for f in found(change=better) if f.moved]


def test_a_few_liars_among_newcomers_are_not_the_newcomers():
    def lie(reading):
        return replace(reading, correct=0) if index_of(reading.device) in {20, 21, 22, 23} else reading

    assert not [f for f in found(change=lie) if f.moved]
    liars = Fault("offset", 6.0, start=0, columns=(0,), devices=(20, 21, 22, 23))
    assert not [f for f in found(liars) if f.moved]


@pytest.mark.parametrize("devices", [25, 29])
def test_fewer_newcomers_than_needed_say_nothing(devices):
    assert found(devices=devices) == []


def test_devices_that_know_few_answers_do_not_vote():
    def few(reading):
        return replace(reading, labelled=CONFIG.min_labelled - 1, correct=0)

    assert not [
        f
        for f in found(change=few)
        if f.kind == "performance" and f.key == "the accuracy" and "accuracy is" in f.why
    ]


def test_the_same_arms_are_judged_the_same():
    assert found() == found()
    assert np.isfinite([f.p for f in found()]).all()
