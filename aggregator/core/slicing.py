"""Windows of many devices as what one look after another judges: at most one reading of each device."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from aggregator.looks import Reading, Slice, merge
from edge_runtime.contract.ids import DeviceId

PACE: Final = 1.5
"""A device keeps the fleet's pace where it has at most this many times more or fewer windows than the median device."""

Windows = Mapping[DeviceId, Sequence[Reading]]


def by_period(windows: Windows, period_ns: int) -> tuple[Slice, ...]:
    """A slice for each period in UTC in which any window ended; a device's windows of one period are merged."""
    parts: dict[int, dict[DeviceId, list[Reading]]] = {}
    for device, found in windows.items():
        for reading in found:
            # A window that ends with its period belongs to it.
            period = max(reading.end_ns - 1, reading.start_ns) // period_ns
            parts.setdefault(period, {}).setdefault(device, []).append(reading)
    return _slices([parts[period] for period in sorted(parts)])


def by_count(windows: Windows) -> tuple[tuple[Slice, ...], tuple[DeviceId, ...]]:
    """Slice k has the k-th window of every device that keeps the fleet's pace, see `PACE`.

    The windows of the other devices, which are returned besides, go by their middle in time into the span of a slice:
    up to the median of the times at which the k-th windows ended. There they are merged.
    """
    having = {device: found for device, found in windows.items() if found}
    if not having:
        return (), ()
    middle = float(np.median([len(found) for found in having.values()]))
    steady = {d: found for d, found in having.items() if middle / PACE <= len(found) <= middle * PACE}
    if not steady:  # the median of two very different devices is like neither
        longest = max(having, key=lambda device: len(having[device]))
        steady = {longest: having[longest]}
    parts: list[dict[DeviceId, list[Reading]]] = [{} for _ in range(max(map(len, steady.values())))]
    ends: list[list[int]] = [[] for _ in parts]
    for device, found in steady.items():
        for k, reading in enumerate(found):
            parts[k][device] = [reading]
            ends[k].append(reading.end_ns)
    borders = np.maximum.accumulate([int(np.median(found)) for found in ends])
    others = tuple(device for device in having if device not in steady)
    for device in others:
        for reading in having[device]:
            k = int(np.searchsorted(borders[:-1], (reading.start_ns + reading.end_ns) // 2))
            parts[k].setdefault(device, []).append(reading)
    return _slices(parts), others


def _slices(parts: Sequence[Mapping[DeviceId, Sequence[Reading]]]) -> tuple[Slice, ...]:
    found = []
    for index, part in enumerate(parts):
        readings = tuple(merge(part[device]) for device in sorted(part))
        found.append(
            Slice(
                index=index,
                start_ns=min(reading.start_ns for reading in readings),
                end_ns=max(reading.end_ns for reading in readings),
                readings=readings,
            )
        )
    return tuple(found)
