"""The tests against devices' own past keep their promises, and no device weighs more than its vote."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kstest, norm
from scipy.stats import t as students

from aggregator.core.evidence import Flips, student, test_devices, test_fleet, to_normal, without_strongest
from aggregator.core.past import VOTE, fleet_statistic
from tests.support.looks import deviations, index_of, past_of, small

judge_devices, judge_fleet = test_devices, test_fleet
del test_devices, test_fleet  # they are no tests of pytest's

FLEET = small(seed=1, devices=24, features=5, rows=60, windows=2, reference_windows=10)
COMPONENTS, PAST = past_of(FLEET)
NOW = deviations(PAST, FLEET.slices[0])
EVERYBODY = np.arange(24)


def fleet_test(votes, *, level=1.0, samples=299, seed=0):
    """The fleet's test of votes (n, K) on the inputs, with a past in which nothing is common."""
    found = replace(NOW, away=votes, variance=np.ones_like(votes), devices=NOW.devices[: len(votes)])
    return judge_fleet(
        found,
        np.arange(len(votes)),
        PAST,
        COMPONENTS,
        COMPONENTS.inputs,
        level=level,
        flips=Flips(samples=samples, limit=200, seed=seed),
    )


@pytest.fixture(autouse=True)
def nothing_in_common(monkeypatch):
    monkeypatch.setattr(PAST, "common", np.ones(COMPONENTS.size))
    monkeypatch.setattr(PAST, "freedom", np.full(COMPONENTS.size, np.inf))


def test_under_no_change_p_is_uniform():
    """Skewed, dependent votes that are symmetric together: what swapping past and present allows."""
    rng = np.random.default_rng(2)
    found = []
    for run in range(150):
        common = rng.exponential(size=(24, 1)) * rng.choice([-1.0, 1.0], size=(24, 1))
        votes = common + 0.5 * rng.normal(size=(24, COMPONENTS.size))
        found.append(fleet_test(votes, seed=run).p[:5].min())
    assert kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)


def test_more_of_a_movement_is_more_evidence():
    rng = np.random.default_rng(3)
    votes = rng.normal(size=(24, COMPONENTS.size))
    at = int(np.flatnonzero(COMPONENTS.owners == 2)[0])
    ps, zs = [], []
    for size in (0.0, 0.5, 1.0, 1.5, 2.0):
        moved = votes.copy()
        moved[:, at] += size
        result = fleet_test(moved)
        ps.append(result.p[2])
        zs.append(result.z[at])
    assert zs == sorted(zs)
    assert ps == sorted(ps, reverse=True)
    assert ps[-1] < 1e-3 < ps[0]


def test_flips_are_spared_where_p_cannot_be_small_and_its_bound_is_no_smaller():
    votes = np.random.default_rng(4).normal(size=(24, COMPONENTS.size))
    spared, looked = fleet_test(votes, level=1e-9), fleet_test(votes)
    assert (spared.exact, looked.exact) == (False, True)
    assert spared.worth == COMPONENTS.inputs.sum() > looked.worth > 1
    assert looked.independent(10) == pytest.approx(max(1.0, looked.worth * 10 / COMPONENTS.inputs.sum()))
    assert (spared.p >= looked.p - 0.05).all()


def test_a_liar_has_one_capped_vote():
    """Sixteen honest devices; a seventeenth says something absurd in every column."""
    rng = np.random.default_rng(5)
    honest = rng.normal(size=(16, COMPONENTS.size))
    shifts = []
    for lie in (VOTE, 1e6):
        votes = np.concatenate([honest, np.full((1, COMPONENTS.size), lie)])
        found = replace(NOW, away=votes, variance=np.ones_like(votes), devices=NOW.devices[:17])
        shifts.append(fleet_statistic(found.votes))
        assert (found.votes.mean(axis=0) <= honest.mean(axis=0) + (VOTE + 4) / 17).all()
    np.testing.assert_array_equal(shifts[0], shifts[1])


def test_outputs_and_inputs_are_tested_apart():
    votes = np.random.default_rng(6).normal(size=(24, COMPONENTS.size))
    votes[:, ~COMPONENTS.inputs] += 5
    result = fleet_test(votes)
    assert (result.z[~COMPONENTS.inputs] == 0).all()
    assert (result.p[5:] == 1).all()


def test_a_common_movement_of_the_past_takes_its_share_off(monkeypatch):
    votes = np.random.default_rng(7).normal(0.8, 1, size=(24, COMPONENTS.size))
    before = fleet_test(votes)
    monkeypatch.setattr(PAST, "common", np.full(COMPONENTS.size, 4.0))
    monkeypatch.setattr(PAST, "freedom", np.full(COMPONENTS.size, 5.0))
    after = fleet_test(votes)
    assert (np.abs(after.z) <= np.abs(before.z) / 1.9 + 1e-9).all()


def test_scores_have_the_tail_of_students_distribution():
    values = np.array([-3.0, 0.0, 0.5, 2.0, 8.0])
    np.testing.assert_allclose(norm.sf(to_normal(values, 7.0)[2:]), students.sf(values[2:], 7.0), rtol=1e-6)
    assert to_normal(values, 7.0)[0] == pytest.approx(norm.ppf(students.cdf(-3.0, 7.0)))
    assert np.isfinite(to_normal(np.array([1e9]), 1e5)).all()
    assert student(9.0, 0.025) == pytest.approx(students.isf(0.025, 9.0))


def test_the_strongest_few_are_left_out_rounded_up():
    values = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    assert without_strongest(values, 0.2).tolist() == [1, 2, 3, 4]
    assert without_strongest(values, 0.3).tolist() == [1, 2, 3]
    assert without_strongest(np.arange(40.0), 0.2).size == 32


# ── single devices ─────────────────────────────────────────────────────────────────────────────────────

FLOORS = np.where(COMPONENTS.inputs, 0.1, np.nan)


def device_test(away, *, against_fleet=True, level=0.01):
    return judge_devices(replace(NOW, away=away), PAST, FLOORS, against_fleet=against_fleet, level=level)


def test_one_device_beyond_its_noise_is_found_alone():
    away = NOW.away.copy()
    at = int(np.flatnonzero(COMPONENTS.owners == 1)[5])
    away[7, at] += 0.9
    found = device_test(away)
    assert found.hit.tolist() == [7]
    assert np.argwhere(found.beyond).tolist() == [[0, at]]


def test_what_all_do_is_no_devices_own_doing():
    away = NOW.away + np.where(COMPONENTS.inputs, 0.9, 0.0)
    assert not device_test(away).beyond.any()
    assert device_test(away, against_fleet=False).beyond.any()


def test_less_than_the_floor_is_not_beyond_it_however_sure():
    quiet = replace(
        NOW,
        away=np.zeros_like(NOW.away),
        variance=np.full_like(NOW.variance, 1e-12),
        grain=np.zeros_like(NOW.grain),
    )
    for size, expected in ((0.09, False), (0.11, True)):
        away = quiet.away.copy()
        away[3, 2] = size
        found = judge_devices(replace(quiet, away=away), PAST, FLOORS, against_fleet=False, level=0.01)
        assert found.hit.tolist() == [3] * expected
        assert np.argwhere(found.beyond).tolist() == [[0, 2]] * expected


def test_one_look_rarely_accuses_anybody():
    accused = sum(
        bool(judge_devices(deviations(PAST, one), PAST, FLOORS, against_fleet=True, level=0.05).beyond.any())
        for seed in range(1)
        for one in FLEET.slices
    )
    assert accused == 0


def test_a_device_without_values_is_not_accused_of_a_shape():
    away = NOW.away.copy()
    away[index_of(NOW.devices[2]), COMPONENTS.owners == 0] = np.nan
    result = device_test(away)
    assert 2 not in result.hit
    assert not np.isnan(result.u).any()
