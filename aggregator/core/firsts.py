"""The first looks at devices that came without a past: they become it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from aggregator.core.past import DAY_SECONDS
from aggregator.looks import Reading
from edge_runtime.contract.ids import DeviceId

HOUR_SECONDS: Final = 3600.0
STRANGE_SECONDS: Final = 30.0 * DAY_SECONDS
"""No device is silent for so long in its first day: its clock was set."""
NEARLY: Final = 0.9
"""So much of a day or of an hour will do: windows do not end on the second."""


class Known(Protocol):
    """What is known of a past: its devices, and how many harmonics of the day and of the week."""

    order: tuple[int, int]

    def __contains__(self, device: object, /) -> bool: ...


@dataclass(slots=True)
class _First:
    """``late`` where the others had a past when the device came, ``whole`` when its own is one."""

    late: bool
    start_ns: int
    end_ns: int = 0
    looks: int = 0
    whole: bool = False


class FirstLooks:
    """Counts the first looks at devices; ``need`` of them make a past.

    Who came later than the others has its first looks at other hours than they had. As long as the cycle of the day is
    not known, it is compared with them only when its own past has a day, for which looks are kept that lie an hour
    apart.
    """

    def __init__(self, need: int) -> None:
        self._need = need
        self._devices: dict[DeviceId, _First] = {}

    @property
    def most(self) -> int:
        """The largest number of looks kept of a device."""
        return max((first.looks for first in self._devices.values()), default=0)

    def whole(self, device: DeviceId) -> bool:
        """Whether the device may be judged against its past: it has one from elsewhere, or its first looks are over."""
        return device not in self._devices or self._devices[device].whole

    def wants(self, reading: Reading, past: Known | None) -> bool:
        """Whether a reading is one of its device's first; ``past`` is what is known."""
        first = self._devices.get(reading.device)
        if first is None:
            return past is None or reading.device not in past
        return not first.whole and (not first.late or _apart(reading, first))

    def add(self, readings: Iterable[Reading], past: Known | None) -> bool:
        """Counts readings that were wanted; returns whether a device's past became whole."""
        grown = False
        for reading in readings:
            first = self._devices.setdefault(
                reading.device, _First(late=past is not None, start_ns=reading.start_ns)
            )
            if abs(reading.end_ns - first.end_ns) >= STRANGE_SECONDS * 1e9 and first.looks:
                first.start_ns = (
                    reading.start_ns
                )  # a clock that was set: what went before has no place in its day
            first.looks += 1
            first.end_ns = reading.end_ns
            if not first.whole and self._enough(first, past):
                first.whole = grown = True
        return grown

    def _enough(self, first: _First, past: Known | None) -> bool:
        day = (first.end_ns - first.start_ns) / 1e9 >= NEARLY * DAY_SECONDS
        cycle = past is not None and past.order != (0, 0)
        return first.looks >= self._need and (not first.late or day or cycle)


def _apart(reading: Reading, first: _First) -> bool:
    """Whether a reading lies an hour from the last that was kept; a clock may have been set back."""
    return abs(reading.end_ns - first.end_ns) >= NEARLY * HOUR_SECONDS * 1e9
