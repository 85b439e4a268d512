"""The permutation test against what can be worked out by hand, and against its own promises."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregator.core.permutation import compare, smallest_p

judge = partial(compare, floor=1e-6, exact_limit=20_000, samples=999, seed=0)


def owners(n: int) -> NDArray[np.int64]:
    return np.arange(n)


def welch(a, b, floor):
    v = a.var(axis=0, ddof=1) / len(a) + b.var(axis=0, ddof=1) / len(b)
    return np.abs(a.mean(axis=0) - b.mean(axis=0)) / np.sqrt(np.maximum(v, floor))


def test_p_and_statistic_equal_a_plain_enumeration():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(3, 4)), rng.normal(0.8, 1, size=(5, 4))
    found = judge(first, second, owners(4))
    pooled = np.concatenate([first, second])
    largest = []
    for chosen in itertools.combinations(range(8), 3):
        rest = [i for i in range(8) if i not in chosen]
        largest.append(welch(pooled[list(chosen)], pooled[rest], 1e-6).max())
    observed = welch(first, second, 1e-6)
    assert found.exact
    assert found.permutations == math.comb(8, 3)
    np.testing.assert_allclose(found.statistic, observed, rtol=1e-4)
    expected = [(np.array(largest) >= o * (1 - 1e-6)).mean() for o in observed]
    np.testing.assert_allclose(found.owner_p, expected)
    assert found.p == min(expected)


def test_components_of_one_owner_are_named_as_one():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    apart = judge(first, second, owners(5))
    joined = judge(first, second, np.array([0, 0, 1, 1, 1]))
    np.testing.assert_allclose(joined.statistic, [apart.statistic[:2].max(), apart.statistic[2:].max()])
    assert joined.p == apart.p


def test_complete_separation_reaches_the_smallest_p():
    first, second = np.arange(4.0)[:, None] / 100, 5 + np.arange(6.0)[:, None] / 100
    found = judge(first, second, owners(1))
    assert found.p == smallest_p(4, 6, exact_limit=20_000, samples=999) == 1 / math.comb(10, 4)


def test_drawn_dealings_agree_with_all_of_them():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(6, 20)), rng.normal(0.4, 1, size=(8, 20))
    exact = judge(first, second, owners(20))
    drawn = judge(first, second, owners(20), exact_limit=1, samples=20_000)
    assert not drawn.exact
    assert drawn.p == pytest.approx(exact.p, abs=0.015)


def test_a_drawn_p_is_never_zero_and_the_seed_decides():
    first, second = np.zeros((9, 1)), np.ones((9, 1)) + np.arange(9.0)[:, None] / 50
    found = judge(first, second, owners(1), exact_limit=1)
    assert found.p == 1 / 1000
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(12, 3)), rng.normal(size=(12, 3))
    one = judge(*noise, owners(3))
    assert one.p == judge(*noise, owners(3)).p
    assert one.p != judge(*noise, owners(3), seed=1).p


def test_the_floor_silences_differences_without_variance():
    first, second = np.full((5, 1), 0.500), np.full((5, 1), 0.501)
    assert judge(first, second, owners(1), floor=1e-3).statistic[0] < 0.05
    assert judge(first, second, owners(1), floor=1e-12).statistic[0] > 100


def test_one_sided_asks_whether_the_first_is_larger():
    low, high = np.arange(5.0)[:, None] / 10, 5 + np.arange(5.0)[:, None] / 10
    assert judge(high, low, owners(1), one_sided=True).p == 1 / math.comb(10, 5)
    assert judge(low, high, owners(1), one_sided=True).p == 1.0


def test_equal_units_move_nothing():
    units = np.random.default_rng(5).normal(size=(5, 3))
    assert judge(units, units, owners(3)).p == 1.0


def test_chunks_do_not_change_the_answer(monkeypatch):
    rng = np.random.default_rng(6)
    units = rng.normal(size=(5, 30)), rng.normal(size=(6, 30))
    whole = judge(*units, owners(30))
    monkeypatch.setattr("aggregator.core.permutation.CHUNK_ELEMENTS", 100)
    np.testing.assert_allclose(judge(*units, owners(30)).owner_p, whole.owner_p)


@pytest.mark.parametrize(("a", "b"), [((1, 2), (4, 2)), ((4, 2), (1, 2)), ((4, 2), (4, 3))])
def test_what_cannot_be_compared_is_refused(a, b):
    with pytest.raises(ValueError, match="cannot compare units"):
        judge(np.zeros(a), np.zeros(b), owners(2))


def test_exchangeable_units_are_named_no_more_often_than_promised():
    """The exact test's own promise, over skewed units that depend on each other across components."""
    rng = np.random.default_rng(7)
    runs, alarms = 300, 0
    for _ in range(runs):
        units = rng.exponential(size=(11, 1)) + 0.2 * rng.exponential(size=(11, 15))
        alarms += judge(units[:5], units[5:], owners(15)).p <= 0.05
    assert alarms <= 0.05 * runs + 3 * math.sqrt(runs * 0.05 * 0.95)


def test_drawing_stops_where_p_is_large_anyhow_and_never_where_it_is_small():
    rng = np.random.default_rng(8)
    alike = rng.normal(size=(12, 3)), rng.normal(size=(12, 3))
    full = judge(*alike, owners(3), samples=4999)
    short = judge(*alike, owners(3), samples=4999, enough=50)
    assert full.permutations == 4999
    assert short.permutations < 4999
    assert short.p == pytest.approx(full.p, abs=0.1)
    apart = alike[0], alike[1] + 5
    assert judge(*apart, owners(3), samples=4999, enough=50).permutations == 4999
