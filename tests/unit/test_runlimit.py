"""The limit of a run: whom it ends, and that nobody else pays for it."""

import gc
import threading
import time
import weakref

import pytest

from edge_runtime.contract.errors import BudgetExceeded
from edge_runtime.runlimit import RunLimit

HOUR_NS = 3600 * 10**9


def test_a_run_is_ended_when_it_is_over_the_limit_and_the_next_one_is_not():
    limit = RunLimit(3600.0)
    wishes: list[bool] = []
    watched = limit.watch(wishes.append)

    def late():
        limit.look(time.monotonic_ns() + HOUR_NS)
        limit.look(time.monotonic_ns() + 2 * HOUR_NS)
        raise RuntimeError("terminated")

    with pytest.raises(BudgetExceeded, match="longer than 3600 s") as caught:
        watched(late)
    assert str(caught.value.__cause__) == "terminated"
    assert wishes == [True, False]  # asked once, and taken back for the next run
    limit.look(time.monotonic_ns() + 2 * HOUR_NS)  # nothing runs
    assert watched(lambda: "answer") == "answer"
    assert wishes == [True, False]


def test_an_answer_that_came_too_late_is_none():
    limit = RunLimit(3600.0)
    watched = limit.watch(lambda _: None)
    with pytest.raises(BudgetExceeded):
        watched(lambda: limit.look(time.monotonic_ns() + 2 * HOUR_NS))


def test_a_run_within_the_limit_keeps_its_own_error():
    limit = RunLimit(3600.0)
    wishes: list[bool] = []

    def broken():
        limit.look(time.monotonic_ns())
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        limit.watch(wishes.append)(broken)
    assert wishes == []


def test_each_run_is_watched_by_itself():
    limit = RunLimit(3600.0)
    mine: list[bool] = []
    others: list[bool] = []
    watched, other = limit.watch(mine.append), limit.watch(others.append)

    def both():
        watched(lambda: limit.look(time.monotonic_ns() + HOUR_NS - 60 * 10**9))  # both began a moment ago
        with pytest.raises(BudgetExceeded):
            watched(lambda: limit.look(time.monotonic_ns() + 2 * HOUR_NS))

    with pytest.raises(BudgetExceeded):
        other(both)
    assert mine == others == [True, False]


def test_a_run_is_timed_on_the_clock_that_was_asked_for():
    """A process that waits for the CPU all day has not run."""
    clock_ns = [1]
    limit = RunLimit(0.001, lambda: clock_ns[0])
    watched = limit.watch(lambda _: None)
    watched(lambda: limit.look(clock_ns[0]))
    watched(lambda: time.sleep(0.01))  # ten times as long, for everybody else

    def late():
        clock_ns[0] += 2_000_000
        limit.look(limit.clock_ns())

    with pytest.raises(BudgetExceeded, match=r"longer than 0\.001 s"):
        watched(late)


def test_the_thread_ends_with_the_limit():
    before = set(threading.enumerate())
    limit = RunLimit(0.08)
    (thread,) = set(threading.enumerate()) - before
    gone = weakref.ref(limit)
    del limit
    gc.collect()
    thread.join(5)
    assert gone() is None
    assert not thread.is_alive()
