"""Who speaks of a movement, and of what."""

import numpy as np
import pytest

from aggregator.core.components import LOCATION, MISSING, REPEATED, SCALE, SHAPE, components_of
from aggregator.core.findings import percent
from aggregator.core.speaking import showing, speaker
from tests.support.looks import small

COMPONENTS = components_of(small().info)
OWN = np.flatnonzero(COMPONENTS.owners == 5)


def place(cell=None, nature=SHAPE):
    """The component of column 5 with this cell or nature."""
    here = (COMPONENTS.nature[OWN] == nature) & ((COMPONENTS.cells[OWN] == cell) | (cell is None))
    return int(OWN[here][0])


def speaks(at, moved):
    """What is told of where ``at`` is the surest and ``moved`` has how far others moved, all of them surely."""
    away = moves(moved)
    return speaker(COMPONENTS, OWN, at, away, away != 0)


def moves(moved):
    """How far the components of column 5 moved."""
    found = np.zeros(COMPONENTS.size)
    found[list(moved)] = list(moved.values())
    return found[OWN]


def test_a_fault_speaks_where_it_took_what_the_shapes_lost():
    edge, missing = place(3), place(nature=MISSING)
    assert speaks(edge, {edge: -0.2, missing: 0.3}) == missing
    assert speaks(edge, {edge: -0.2, missing: 0.02}) == edge
    assert speaks(edge, {edge: -0.2, place(nature=REPEATED): 0.3}) == edge


def test_a_fault_that_is_not_sure_does_not_speak():
    edge, missing = place(3), place(nature=MISSING)
    assert speaker(COMPONENTS, OWN, edge, moves({edge: 0.1, missing: 0.5}), edge == OWN) == edge
    assert speaker(COMPONENTS, OWN, edge, moves({edge: np.nan, missing: 0.5}), missing == OWN) == missing


def test_what_moves_far_to_a_side_is_told_of_by_where_it_went():
    scale, location = place(SCALE), place(LOCATION)
    assert speaks(scale, {scale: 3.0, location: 1.0}) == location
    assert speaks(scale, {scale: 3.0, location: 0.5}) == scale


@pytest.mark.parametrize(("share", "far"), [(0.25, 4.0), (0.5, 4.0), (1.0, 2.0)])
def test_those_that_moved_are_named_and_few_others(share, far):
    rng = np.random.default_rng(0)
    named = wrong = missed = 0
    for _ in range(200):
        moved = np.arange(40) < share * 40
        found = showing(rng.standard_normal(40) + np.where(moved, far, 0.0))
        named, wrong, missed = (
            named + found.sum(),
            wrong + (found & ~moved).sum(),
            missed + (moved & ~found).sum(),
        )
    assert wrong <= 0.035 * named
    assert missed <= 0.1 * 200 * share * 40


def test_somebody_is_always_named_and_who_says_nothing_is_not():
    assert showing(np.array([0.5, np.nan, -1.0])).tolist() == [True, False, False]
    assert showing(np.array([9.0, np.nan, 9.0])).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("share", "words"), [(-1e-17, "0 %"), (1e-17, "0 %"), (1.0 + 1e-12, "100 %"), (0.0123, "1.23 %")]
)
def test_a_share_reads_as_one(share, words):
    assert percent(share) == words
