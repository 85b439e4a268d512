"""What is counted beside the profiles: right answers, and rows that the model refuses."""

from dataclasses import replace

import numpy as np
import pytest

from aggregator.core.components import components_of
from aggregator.core.own_past import REFUSED_SHARE, TRUTH_SHARE, Terms
from aggregator.core.truth import REFUSED, Tallies, nothing_lost
from aggregator.looks import Reading, Slice
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import Profile, empty_profile
from tests.support.looks import CONFIG, small

FLEET = small(windows=1)
TERMS = Terms(FLEET.info, components_of(FLEET.info), CONFIG, 40)
NOBODY = empty_profile(FLEET.spec, probabilities=True)


def look(index, rates, labelled=100, *, rng):
    readings = tuple(
        Reading(
            device=DeviceId(f"d{i}"),
            profile=NOBODY,
            start_ns=index,
            end_ns=index + 1,
            labelled=labelled,
            correct=int(rng.binomial(labelled, rate)),
        )
        for i, rate in enumerate(rates)
    )
    return Slice(index=index, start_ns=index, end_ns=index + 1, readings=readings)


def past(rng, devices=20, rate=0.8, looks=8):
    rates = np.clip(rng.normal(rate, 0.05, devices), 0.5, 0.95)
    return rates, Tallies(TERMS, [look(k, rates, rng=rng) for k in range(looks)])


def members(one):
    return {"fleet": [r.device for r in one.readings]}


def judge(tallies, one, level=1e-4, key="the accuracy"):
    """The finding on the fleet as one, at ``level``; None where there is none."""
    share = TRUTH_SHARE if key == "the accuracy" else REFUSED_SHARE
    found = tallies.findings(one, members(one), 2.0 * level / share)
    return next((f for f in found if f.key == key and not f.one_by_one), None)


def test_a_drop_is_found_with_the_figures_that_say_so():
    rng = np.random.default_rng(0)
    rates, truth = past(rng)
    one = look(9, rates - 0.15, rng=rng)
    found = judge(truth, one)
    now = np.mean([r.correct / r.labelled for r in one.readings])
    evidence = dict(found.evidence)
    assert found.moved
    assert evidence["to"] == pytest.approx(now)
    assert evidence["from"] == pytest.approx(rates.mean(), abs=0.02)
    assert evidence["from"] - evidence["to"] == pytest.approx(0.15, abs=0.03)
    assert 0 < evidence["half_width"] < 0.05
    assert (found.kind, found.feature, found.grave, found.judged) == ("performance", None, True, 20)


def test_no_change_and_better_answers_are_no_drop():
    rng = np.random.default_rng(1)
    rates, truth = past(rng)
    ps = [judge(truth, look(k, rates, rng=rng)).p for k in range(60)]
    assert min(ps) > 1e-4
    assert np.mean(np.array(ps) <= 0.1) < 0.25
    better = judge(truth, look(9, rates + 0.05, rng=rng))
    assert not better.moved
    assert better.clear


def test_a_drop_below_the_floor_is_none_however_sure():
    rng = np.random.default_rng(2)
    rates, truth = past(rng, looks=40)
    found = judge(truth, look(9, rates - 0.03, labelled=20_000, rng=rng))
    assert found.p < 1e-4
    assert not found.moved


def test_a_few_who_claim_that_all_is_wrong_do_not_make_a_drop():
    rng = np.random.default_rng(3)
    rates, truth = past(rng, devices=400)
    one = look(9, rates, rng=rng)
    lies = tuple(replace(r, correct=0) if i < 80 else r for i, r in enumerate(one.readings))
    found = judge(truth, replace(one, readings=lies))
    assert dict(found.evidence)["from"] - dict(found.evidence)["to"] > CONFIG.accuracy_floor
    assert not found.moved


def test_too_little_truth_is_none():
    rng = np.random.default_rng(4)
    rates, truth = past(rng)
    assert judge(truth, look(9, rates, labelled=9, rng=rng)) is None
    assert judge(truth, look(9, rates[:1], rng=rng)) is None
    little = Tallies(TERMS, [look(0, rates, labelled=20, rng=rng)])
    everybody = members(look(9, rates, rng=rng))["fleet"]
    assert truth.judges(everybody)
    assert not little.judges(everybody)
    assert judge(little, look(9, rates, rng=rng)) is None


def test_answers_that_vary_from_look_to_look_need_more_of_a_drop():
    rng = np.random.default_rng(5)
    rates, calm = past(rng)
    swings = [0.1, -0.1, 0.08, -0.08, 0.1, -0.1, 0.05, -0.05]
    wild = Tallies(TERMS, [look(k, rates + s, rng=rng) for k, s in enumerate(swings)])
    one = look(9, rates - 0.08, rng=rng)
    assert judge(calm, one).p < 1e-4 < judge(wild, one).p


def test_few_devices_are_judged_by_their_own_past_and_many_are_not():
    rng = np.random.default_rng(6)
    worse = np.array([0.0, 0.25, 0.0])
    rates, few = past(rng, devices=3)
    one = look(9, rates - worse, rng=rng)
    (found,) = [f for f in few.findings(one, members(one), 0.01) if f.one_by_one]
    assert (found.kind, found.feature, found.devices, found.moved) == ("performance", None, ("d1",), True)
    assert "d1: accuracy is" in found.why
    calm = look(10, rates, rng=rng)
    (found,) = [f for f in few.findings(calm, members(calm), 0.01) if f.one_by_one]
    assert found.clear
    assert not found.moved
    rates, many = past(rng, devices=20)
    one = look(9, rates - np.append(worse, np.zeros(17)), rng=rng)
    assert all(f.key == REFUSED for f in many.findings(one, members(one), 0.01) if f.one_by_one)


def test_of_several_devices_the_one_whose_figures_are_told_comes_first():
    rng = np.random.default_rng(6)
    rates, few = past(rng, devices=3)
    one = look(9, rates - [0.3, 0.5, 0.0], rng=rng)
    (found,) = [f for f in few.findings(one, members(one), 0.01) if f.one_by_one]
    assert found.devices == ("d0", "d1")
    assert found.why.startswith("d1 most: accuracy is")
    assert found.why.endswith("; also d0")


def test_single_devices_are_rarely_accused():
    rng = np.random.default_rng(7)
    accused = 0
    for _ in range(150):
        rates, few = past(rng, devices=5)
        one = look(9, rates, rng=rng)
        accused += any(f.moved for f in few.findings(one, members(one), 0.5) if f.one_by_one)
    assert accused <= 10  # the level of all devices together is 0.025


def test_nothing_is_lost_only_where_the_truth_is_sure_of_it():
    rng = np.random.default_rng(8)
    rates, tallies = past(rng, looks=40)
    sure = look(9, rates, labelled=2000, rng=rng)
    names = members(sure)["fleet"]
    assert nothing_lost(tallies.findings(sure, members(sure), 0.01), names[:3], 0.05)
    assert not nothing_lost(tallies.findings(sure, members(sure), 0.01), [DeviceId("stranger"), *names], 0.05)
    worse = look(9, rates - 0.2, labelled=2000, rng=rng)
    assert not nothing_lost(tallies.findings(worse, members(worse), 0.01), names, 0.05)
    unsure = look(9, rates[:3], labelled=20, rng=rng)
    assert not nothing_lost(tallies.findings(unsure, members(unsure), 0.01), names[:3], 0.05)
    assert not nothing_lost([], names, 0.05)


def refusing(index, shares, rows=200, *, rng):
    """A look in which the model refuses ``shares`` of the devices' rows."""
    readings = []
    for i, share in enumerate(shares):
        refused = int(rng.binomial(rows, share))
        profile = Profile(layout=NOBODY.layout, rows=rows - refused, counts=NOBODY.counts, sums=NOBODY.sums)
        readings.append(
            Reading(
                device=DeviceId(f"d{i}"),
                profile=profile,
                start_ns=index,
                end_ns=index + 1,
                refused=(("missing", refused),) if refused else (),
            )
        )
    return Slice(index=index, start_ns=index, end_ns=index + 1, readings=tuple(readings))


@pytest.mark.parametrize("usual", [0.0, 0.05])
def test_rows_that_more_devices_refuse_are_quality(usual):
    rng = np.random.default_rng(9)
    tallies = Tallies(TERMS, [refusing(k, np.full(20, usual), rng=rng) for k in range(8)])
    found = judge(tallies, refusing(9, np.full(20, usual + 0.1), rng=rng), key=REFUSED)
    assert (found.kind, found.feature, found.moved, found.judged) == ("quality", None, True, 20)
    assert "the model refuses" in found.why
    assert "missing" in found.why
    calm = judge(tallies, refusing(10, np.full(20, usual), rng=rng), key=REFUSED)
    assert calm.clear
    assert not calm.moved


@pytest.mark.parametrize(("share", "grave"), [(0.3, False), (0.7, True), (1.0, True)])
@pytest.mark.parametrize("devices", [20, 3])
def test_a_fleet_most_of_whose_rows_are_refused_is_a_page(devices, share, grave):
    rng = np.random.default_rng(11)
    tallies = Tallies(TERMS, [refusing(k, np.zeros(devices), rng=rng) for k in range(8)])
    one = refusing(9, np.full(devices, share), rng=rng)
    found = [f for f in tallies.findings(one, members(one), 0.001) if f.moved and f.key == REFUSED]
    assert found
    assert {(f.kind, f.grave) for f in found} == {("quality", grave)}


@pytest.mark.parametrize(("devices", "kind"), [(20, "sensor"), (3, "quality")])
def test_a_device_all_of_whose_rows_are_refused_is_named(devices, kind):
    rng = np.random.default_rng(10)
    tallies = Tallies(TERMS, [refusing(k, np.zeros(devices), rng=rng) for k in range(8)])
    one = refusing(9, np.eye(devices)[1], rng=rng)
    (found,) = [f for f in tallies.findings(one, members(one), 0.001) if f.one_by_one]
    assert (found.kind, found.devices, found.moved, found.grave) == (kind, ("d1",), True, False)
    assert "the model refuses 100 % of rows, 0 % before (missing 200)" in found.why
    fleet = judge(tallies, one, key=REFUSED)
    assert fleet is None or not fleet.moved
