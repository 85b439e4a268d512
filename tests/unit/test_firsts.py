"""Which looks become the past of devices that came without one."""

import pytest

from aggregator.core.firsts import FirstLooks
from aggregator.looks import Reading
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import empty_profile
from tests.support.looks import small

HOUR_NS = 3_600_000_000_000
PROFILE = empty_profile(small(windows=1).spec, probabilities=True)


class Past:
    """A past, as far as first looks ask for it."""

    def __init__(self, *devices, order=(0, 0)):
        self.devices, self.order = devices, order

    def __contains__(self, device):
        return device in self.devices


def reading(device, hour, hours=1.0):
    end = int((hour + hours) * HOUR_NS)
    return Reading(device=DeviceId(device), profile=PROFILE, start_ns=int(hour * HOUR_NS), end_ns=end)


def kept(first, device, hours, past, *, length=1.0):
    """The hours whose windows were wanted."""
    found = []
    for hour in hours:
        one = reading(device, hour, length)
        if first.wants(one, past):
            found.append(hour)
            first.add([one], past)
    return found


def test_the_first_devices_need_so_many_looks_whatever_time_they_take():
    first = FirstLooks(3)
    assert not first.add([reading("a", 0), reading("b", 0)], None)
    assert not first.add([reading("a", 1)], None)
    assert not first.whole(DeviceId("a"))
    assert first.add([reading("a", 2)], None)
    assert first.whole(DeviceId("a"))
    assert not first.whole(DeviceId("b"))
    assert first.most == 3
    assert not first.wants(reading("a", 3), None)


def test_devices_of_a_given_past_need_none():
    first, past = FirstLooks(3), Past("a")
    assert first.whole(DeviceId("a"))
    assert not first.wants(reading("a", 0), past)
    assert first.wants(reading("b", 0), past)


@pytest.mark.parametrize(
    ("length", "hours", "expected"),
    [
        (1.0, range(60), list(range(22))),  # 21.6 hours are nearly a day
        (0.25, [k / 4 for k in range(200)], [float(k) for k in range(23)]),
        (30.0, range(0, 300, 30), [0, 30, 60]),
    ],
)
def test_who_comes_late_needs_a_day_in_looks_that_lie_an_hour_apart(length, hours, expected):
    first = FirstLooks(3)
    assert kept(first, "late", hours, Past("a"), length=length) == expected
    assert first.whole(DeviceId("late"))


def test_who_comes_late_needs_no_day_where_the_cycle_is_known():
    first = FirstLooks(3)
    assert kept(first, "late", range(60), Past("a", order=(1, 0))) == [0, 1, 2]
    assert first.whole(DeviceId("late"))


def test_a_cycle_that_becomes_known_makes_a_late_devices_looks_enough_with_the_next_of_them():
    first, past = FirstLooks(3), Past("a")
    assert kept(first, "late", range(5), past) == [0, 1, 2, 3, 4]
    assert not first.whole(DeviceId("late"))
    assert kept(first, "late", range(5, 60), Past("a", order=(1, 0))) == [5]
    assert first.whole(DeviceId("late"))


def test_a_clock_set_back_ends_no_first_looks_and_one_set_from_1970_makes_no_day():
    first, past = FirstLooks(3), Past("a")
    assert kept(first, "late", [100, 101, *range(50, 71)], past) == [100, 101, *range(50, 71)]
    first = FirstLooks(3)
    year = 24 * 365
    assert kept(first, "late", [0, 1, *range(50 * year, 50 * year + 30)], past) == [
        *(0, 1),
        *range(50 * year, 50 * year + 22),
    ]


def test_devices_that_start_together_are_whole_together():
    first = FirstLooks(2)
    first.add([reading("a", 0), reading("b", 0)], None)
    assert first.add([reading("a", 1), reading("b", 1)], None)
    assert first.whole(DeviceId("a"))
    assert first.whole(DeviceId("b"))
