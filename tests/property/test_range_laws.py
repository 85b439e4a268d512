"""The law of ranges: a row is answered exactly when each value is inside its range, or missing where that is taken."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract.errors import InputError
from edge_runtime.contract.manifest import Feature
from edge_runtime.runtime import Runtime
from tests.support.tiny_models import regressor

WIDTH: dict[str, Literal[32, 64]] = {"float32": 32, "float64": 64}


@st.composite
def features(draw, dtype):
    """Three features with any range, or none."""
    ends = st.floats(width=WIDTH[dtype], allow_nan=False, allow_infinity=False)
    found = []
    for name in "abc":
        low, high = draw(st.tuples(st.none() | ends, st.none() | ends))
        if low is not None and high is not None and low > high:
            low, high = high, low
        missing, infinite = draw(st.booleans()), draw(st.booleans())
        found.append(Feature(name=name, low=low, high=high, missing=missing, infinite=infinite))
    return tuple(found)


def values(feature, dtype):
    """Anything, and often what is at an end or beside one."""
    kind = np.dtype(dtype).type
    ends = [kind(end) for end in (feature.low, feature.high) if end is not None]
    with np.errstate(over="ignore"):  # beside the largest number is an infinity
        near = [
            float(value)
            for end in ends
            for value in (end, np.nextafter(end, kind(-np.inf)), np.nextafter(end, kind(np.inf)))
        ]
    return st.sampled_from([*near, 0.0, -0.0, math.nan, math.inf, -math.inf]) | st.floats(width=WIDTH[dtype])


def reasons(feature, value):
    if math.isnan(value):
        return set() if feature.missing else {"missing"}
    if math.isinf(value) and not feature.infinite:
        return {"non_finite"}
    low = -math.inf if feature.low is None else feature.low
    high = math.inf if feature.high is None else feature.high
    return set() if low <= value <= high else {"range"}


@settings(deadline=None)
@given(st.data(), st.sampled_from(["float32", "float64"]))
def test_a_row_is_answered_exactly_when_every_value_is_inside_or_an_accepted_gap(data, dtype):
    declared = data.draw(features(dtype))
    runtime = Runtime(replace(regressor("abc"), features=declared, input_dtype=dtype).artifact)
    rows = data.draw(st.lists(st.tuples(*(values(f, dtype) for f in declared)), min_size=1, max_size=6))
    answered = 0
    refused: dict[str, int] = {}
    for row in rows:
        wrong = set().union(*(reasons(f, value) for f, value in zip(declared, row, strict=True)))
        packed = np.array(row, dtype)
        for given_as in (packed, packed[None], list(row), dict(zip("abc", row, strict=True))):
            if not wrong:
                runtime.predict(given_as)
                answered += 1
                continue
            with pytest.raises(InputError) as caught:
                runtime.predict(given_as)
            assert caught.value.reason in wrong
            assert (caught.value.reason == "range") == (wrong == {"range"})
            refused[caught.value.reason] = refused.get(caught.value.reason, 0) + 1
    seen = runtime.take_window()
    assert (seen.rows, dict(seen.refused), seen.failed) == (answered, refused, 0)
