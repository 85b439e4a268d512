"""Boundaries are found by asking: between any two values, in few questions, and around rows that are refused."""

import numpy as np
import pytest

from converters import boundaries
from converters.lowering.folding import key_of
from converters.reference import Answers


class Step:
    """A pipeline whose answer jumps where one column exceeds ``edge``; it counts what it is asked."""

    def __init__(self, column, edge, refuses=None):
        self.column, self.edge, self.refuses = column, edge, refuses
        self.calls = self.rows = 0

    def __call__(self, rows):
        self.calls += 1
        self.rows += len(rows)
        above = (rows[:, self.column] > self.edge).astype(np.int64)[:, None]
        taken = np.ones(len(rows), bool) if self.refuses is None else ~self.refuses(rows)
        scores = np.hstack([1.0 - above, above]) if taken.any() else np.full((len(rows), 1), np.nan)
        scores = np.where(taken[:, None], scores, np.nan)
        labels = np.where(taken[:, None], above, -1)
        return Answers(labels=labels, scores=scores, accepted=taken, ties=np.zeros(above.shape, bool))


def rows_of(dtype, scale=1.0):
    return (np.random.default_rng(0).normal(size=(200, 4)) * scale).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_an_edge_between_values_of_both_signs_is_found_to_the_last_bit(dtype, scale):
    ask = Step(2, 0.25 * scale)
    found = key_of(boundaries.find(rows_of(dtype, scale), np.arange(4), ask, 0)[:, 2])
    at = key_of(np.array([0.25 * scale], dtype))[0]
    for offset in (-2, -1, 0, 1, 2, 3):
        assert (found == at + offset).sum() >= 10


def test_each_step_asks_for_the_middle_alone():
    rows = rows_of("float32")
    ask = Step(1, 0.5)
    boundaries.find(rows, np.arange(4), ask, 0)
    steps = 2 + 32  # two halvings of four columns, and those of all float32 values
    assert ask.calls <= steps + 4
    assert ask.rows <= 64 * (steps + 4)


def test_rows_that_the_pipeline_refuses_do_not_stop_the_search():
    ask = Step(0, 0.5, refuses=lambda rows: rows[:, 3] > 0)
    found = boundaries.find(rows_of("float32"), np.arange(4), ask, 0)
    assert np.isfinite(found).all()
    for everything in (np.ones, np.zeros):
        none = Step(0, 0.5, refuses=lambda rows, make=everything: make(len(rows), bool))
        assert boundaries.find(rows_of("float32"), np.arange(4), none, 0).shape == found.shape


def test_without_a_column_of_numbers_there_is_no_boundary():
    rows = rows_of("float32")
    assert boundaries.find(rows, np.zeros(0, np.int64), Step(0, 0.5), 0).shape == (0, 4)
