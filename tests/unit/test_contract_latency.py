"""The latency histogram's layout and its quantiles."""

import math

import numpy as np
import pytest

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.latency import MAX_BUCKETS, SCALE, LatencyHistogram, observe_ns, relative_error

BASE = 2.0 ** (2.0**-SCALE)


def test_buckets_are_opentelemetrys():
    # (base^i, base^(i+1)]: 1024 = base^80 is the upper end of bucket 79, 1025 begins bucket 80.
    assert observe_ns(np.array([1024])) == LatencyHistogram(offset=79, counts=(1,), sum_ns=1024, max_ns=1024)
    assert observe_ns(np.array([1025])).offset == 80
    for value in (2, 3, 1000, 3150, 10**9, 2**53):
        i = observe_ns(np.array([value])).offset
        assert BASE**i < value * (1 + 1e-12)
        assert value <= BASE ** (i + 1) * (1 + 1e-12)


def test_zero_and_negative_durations_are_counted_apart():
    found = observe_ns(np.array([0, -5, 1]))
    assert (found.zero, found.counts, found.sum_ns, found.max_ns) == (2, (1,), 1, 1)
    assert observe_ns(np.array([0])).quantile_ns(0.99) == 0.0
    assert observe_ns(np.zeros(0, np.int64)) == LatencyHistogram()


def test_the_stated_error_is_that_of_the_scale():
    assert relative_error() == pytest.approx(0.0433, abs=1e-4)
    assert relative_error(4) < relative_error(3)


def test_quantiles():
    found = observe_ns(np.arange(1, 1001))
    assert found.quantile_ns(0.5) == pytest.approx(501, rel=relative_error())
    assert found.quantile_ns(0.99) == pytest.approx(991, rel=relative_error())
    assert found.quantile_ns(1.0) == pytest.approx(1000, rel=relative_error())
    assert (
        observe_ns(np.array([940])).quantile_ns(1.0) == 940.0
    )  # the bucket's middle lies beyond the exact maximum
    assert math.isnan(LatencyHistogram().quantile_ns(0.5))


def test_the_longest_duration_has_a_bucket():
    found = observe_ns(np.array([2**63 - 1]))
    assert found.offset + len(found.counts) <= MAX_BUCKETS


@pytest.mark.parametrize(
    "fields",
    [
        {"offset": MAX_BUCKETS, "counts": (1,)},
        {"offset": MAX_BUCKETS - 1, "counts": (1, 1)},
        {"offset": -1, "counts": (1,)},
        {"counts": (1,) * (MAX_BUCKETS + 1)},
        {"counts": (0, 1)},
        {"counts": (1, 0)},
        {"offset": 3},
    ],
)
def test_what_is_not_in_normal_form_is_refused(fields):
    with pytest.raises(ContractError, match="latency"):
        LatencyHistogram(**fields)


def test_any_two_valid_histograms_merge():
    low = LatencyHistogram(offset=0, counts=(1,))
    high = LatencyHistogram(offset=MAX_BUCKETS - 1, counts=(1,))
    assert len(low.merge(high).counts) == MAX_BUCKETS
