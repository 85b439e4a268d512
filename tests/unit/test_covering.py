"""What runs every time of a matrix of tests."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from tests.support.covering import covering


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_every_value_is_kept_in_as_few_combinations_as_the_longest_argument_has_values(sizes):
    combinations = [
        {f"argument {k}": value for k, value in enumerate(values)} for values in product(*map(range, sizes))
    ]
    kept = covering(combinations)
    assert len(kept) == max(sizes)
    for k, size in enumerate(sizes):
        assert {combinations[i][f"argument {k}"] for i in kept} == set(range(size))


def test_where_one_argument_has_more_values_the_others_take_turns():
    combinations = [{"a": a, "b": b} for a, b in product(range(6), range(2))]
    kept = [combinations[i]["b"] for i in covering(combinations)]
    assert kept.count(0) == kept.count(1) == 3


def test_holes_in_a_matrix_leave_what_they_leave():
    combinations = [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 0}]
    assert covering(combinations) == [0, 1, 2]
    assert covering([{"a": 0, "b": 1}, {"a": 0, "b": 0}, {"a": 1, "b": 0}]) == [0, 2]
    assert covering([{}, {}]) == []
