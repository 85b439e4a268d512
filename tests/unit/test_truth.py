"""Accuracy where right answers are known."""

from dataclasses import replace

import numpy as np
import pytest

from aggregator.core.components import components_of
from aggregator.core.own_past import Terms
from aggregator.core.truth import Truth, performance_finding
from aggregator.looks import Reading, Slice
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import empty_profile
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
    return rates, Truth([look(k, rates, rng=rng) for k in range(looks)], least=50)


def judge(truth, one, level=1e-4):
    return performance_finding(TERMS, truth, "fleet", one, level)


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
    little = Truth([look(0, rates, labelled=20, rng=rng)], least=50)
    assert not little.known
    assert judge(little, look(9, rates, rng=rng)) is None


def test_answers_that_vary_from_look_to_look_need_more_of_a_drop():
    rng = np.random.default_rng(5)
    rates, calm = past(rng)
    swings = [0.1, -0.1, 0.08, -0.08, 0.1, -0.1, 0.05, -0.05]
    wild = Truth([look(k, rates + s, rng=rng) for k, s in enumerate(swings)], least=50)
    one = look(9, rates - 0.08, rng=rng)
    assert judge(calm, one).p < 1e-4 < judge(wild, one).p
