"""Which numbers of a session were counted and are no longer kept one by one, in as few intervals as that takes.

A session's events and the windows of all its models share one row of numbers, so one model's own have gaps that others
fill. Within a stretch of numbers that are all accounted for, one interval for each model says it all: a number in it
is the model's own, counted, or another's, and then no window of this model can have it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

EVENTS = ""
"""Stands where a model's name would, for the session's events."""


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """Numbers ``lo`` to ``hi`` of a model.

    ``whole`` means that each of them is accounted for. A record that a device merged is not: numbers inside it may be
    of other messages, which may yet come.
    """

    model: str
    lo: int
    hi: int
    whole: bool


def compact(intervals: Iterable[Interval]) -> list[Interval]:
    """The same numbers, in fewer intervals: one for each model and stretch of whole ones, sorted."""
    found: dict[tuple[str, int], Interval] = {}
    kept: list[Interval] = []
    stretch, end = -1, -2
    whole: list[Interval] = []
    open_: list[Interval] = []
    for interval in intervals:
        (whole if interval.whole else open_).append(interval)
    for i in sorted(whole, key=lambda i: (i.lo, i.hi)):
        if i.lo > end + 1:
            stretch += 1
        end = max(end, i.hi)
        key = (i.model, stretch)
        before = found.get(key, i)
        found[key] = Interval(i.model, min(before.lo, i.lo), max(before.hi, i.hi), whole=True)
    for i in sorted(open_):
        if kept and kept[-1].model == i.model and i.lo <= kept[-1].hi + 1:
            kept[-1] = Interval(i.model, kept[-1].lo, max(kept[-1].hi, i.hi), whole=False)
        else:
            kept.append(i)
    return sorted([*found.values(), *kept])
