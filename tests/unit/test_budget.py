"""Budgets and backoff."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.latency import observe_ns
from edge_runtime.core.backoff import next_delay_seconds
from edge_runtime.core.budget import (
    COLD_FACTOR,
    COMPARED_FACTOR,
    MIN_COMPARED,
    Budget,
    breaches,
    on_trial,
    surest_p99_ns,
)
from tests.support.device import cpu


def test_inside_the_budget_there_is_nothing_to_say():
    budget = Budget(predict_p99_ns=1000, rss_bytes=100)
    assert breaches(budget, predict_p99_ns=1000.0, rss_bytes=100) == []


def test_every_breach_is_told_with_both_figures():
    budget = Budget(predict_p99_ns=200_000, rss_bytes=150_000_000)
    latency, memory = breaches(budget, predict_p99_ns=250_400.0, rss_bytes=151_200_000)
    assert latency == "predict p99 of 250.4 us CPU is above the budget of 200.0 us"
    assert memory == "RSS of 151.2 MB is above the budget of 150.0 MB"


def test_zero_means_no_limit():
    assert breaches(Budget(), predict_p99_ns=1e18, rss_bytes=2**60) == []


def test_no_measurement_is_no_breach():
    assert breaches(Budget(predict_p99_ns=1), predict_p99_ns=float("nan"), rss_bytes=0) == []


@pytest.mark.parametrize(("a", "b", "tightest"), [(0, 0, 0), (5, 0, 5), (0, 5, 5), (3, 5, 3), (5, 3, 3)])
def test_the_tightest_of_two_budgets(a, b, tightest):
    both = Budget(predict_p99_ns=a, rss_bytes=b).tightest(Budget(predict_p99_ns=b, rss_bytes=a))
    assert both == Budget(predict_p99_ns=tightest, rss_bytes=tightest)


@given(
    attempt=st.integers(0, 10**9),
    seed=st.integers(),
    base=st.floats(0.01, 10.0),
    cap=st.floats(0.01, 1000.0),
)
def test_a_delay_lies_below_both_the_doubling_and_the_cap(attempt, seed, base, cap):
    delay = next_delay_seconds(attempt, random.Random(seed), base=base, cap=cap)
    assert 0.0 <= delay <= min(cap, base * 2.0 ** min(attempt, 32))


def test_delays_of_a_fleet_are_spread_over_the_whole_range():
    rng = random.Random(5)
    delays = sorted(next_delay_seconds(4, rng) for _ in range(4000))
    for k in range(10):
        share = sum(0.8 * k <= d < 0.8 * (k + 1) for d in delays) / len(delays)
        assert 0.07 < share < 0.13


def test_a_trial_is_held_to_the_incumbent_where_there_is_one():
    budget = Budget(predict_p99_ns=1000, rss_bytes=7)
    few, enough = cpu(MIN_COMPARED - 1, 10), cpu(MIN_COMPARED, 50_000)
    for cold in (few, cpu(0, 10)):
        assert on_trial(budget, cold) == Budget(predict_p99_ns=COLD_FACTOR * 1000, rss_bytes=7)
    slow = on_trial(budget, cpu(MIN_COMPARED - 1, 50_000))
    assert slow.predict_p99_ns == pytest.approx(COMPARED_FACTOR * 50_000, rel=0.1)
    assert on_trial(budget, enough).predict_p99_ns == pytest.approx(COMPARED_FACTOR * 50_000, rel=0.1)
    assert on_trial(budget, cpu(MIN_COMPARED, 10)).predict_p99_ns == 1000
    assert on_trial(Budget(), enough) == Budget()


@pytest.mark.parametrize(("rows", "allowed"), [(50, 6), (200, 12), (20_000, 270)])
def test_a_few_slow_rows_are_the_devices_many_are_the_models(rows, allowed):
    times = np.full(rows, 10_000)
    times[:allowed] = 400_000
    assert surest_p99_ns(observe_ns(times)) < 11_000
    times[: 2 * allowed] = 400_000
    assert surest_p99_ns(observe_ns(times)) > 380_000


def test_three_slow_rows_of_three_are_enough_and_two_are_not():
    assert np.isnan(surest_p99_ns(cpu(2, 400_000)))
    assert surest_p99_ns(cpu(3, 400_000)) == pytest.approx(400_000, rel=0.05)


@given(rows=st.integers(3, 3000), seed=st.integers(0, 2**32 - 1))
def test_the_surest_p99_lies_between_the_median_and_the_p99_that_was_seen(rows, seed):
    times = observe_ns(np.random.default_rng(seed).integers(1, 10**6, rows))
    assert surest_p99_ns(times) <= times.quantile_ns(0.99)
    assert rows < 40 or surest_p99_ns(times) >= times.quantile_ns(0.5)
