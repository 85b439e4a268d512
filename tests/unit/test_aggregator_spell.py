"""Trouble with a store: told once, rested from longer each time, and over when it is over."""

from hypothesis import given
from hypothesis import strategies as st

from aggregator.core.spell import Spell


def doubling(failures):
    return 2.0**failures


def test_each_failure_rests_longer_and_the_first_success_ends_it():
    spell = Spell(doubling)
    assert spell.may(0.0)
    assert spell.failed(10.0)
    assert (spell.may(10.9), spell.may(11.0)) == (False, True)
    assert not spell.failed(11.0)
    assert (spell.may(12.9), spell.may(13.0)) == (False, True)
    assert spell.worked(13.0) == 3.0
    assert spell.worked(14.0) is None
    assert spell.failed(20.0)
    assert spell.may(21.0)  # it begins anew


def test_who_does_not_always_write_has_to_stay_calm_for_a_while():
    spell = Spell(doubling, calm_seconds=30.0)
    spell.failed(0.0)
    assert spell.worked(29.9) is None
    assert not spell.failed(29.9)
    assert spell.worked(40.0) is None
    assert spell.worked(59.9) == 59.9
    assert spell.worked(60.0) is None


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.booleans()), max_size=60), st.sampled_from([0.0, 30.0]))
def test_beginnings_and_ends_alternate(steps, calm_seconds):
    spell, now, said = Spell(doubling, calm_seconds=calm_seconds), 0.0, []
    for seconds, fails in steps:
        now += seconds
        if fails:
            said += ["begins"] if spell.failed(now) else []
        elif spell.worked(now) is not None:
            said.append("ends")
        assert spell.lasts == (said[-1:] == ["begins"])
    assert said == ["begins", "ends"] * (len(said) // 2) + ["begins"] * (len(said) % 2)
