"""A reference beside the data: whether it is a past of the data's devices, and what to say of a poor one.

The judge itself asks nothing of a past: to a device that is not in it, it gives one of its own first windows.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from aggregator.looks import Slice
from cli.backtest.replay import Replay, some_of
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import DeviceId

LEAST_WINDOWS: Final = 2
"""Fewer say nothing of a device's noise, see `aggregator.core.past`."""


def history_of(
    reference: Path, past: Replay, data: Path, now: Replay, need: int
) -> tuple[tuple[Slice, ...], list[str]]:
    """What of the reference is the past of devices, and notes; ``need`` is how many first windows make one instead.

    Raises `ConfigError` where it is the past of no device of the data.
    """
    devices = sorted({reading.device for one in now.slices for reading in one.readings})
    shared = [device for device in devices if device in past.spans]
    if not past.rows:
        reasons = ", ".join(f"{reason} {rows}" for reason, rows in past.refused)
        raise ConfigError(f"{reference}: the model answers none of its rows ({reasons}), so it is no history")
    if not shared:
        raise ConfigError(
            f"{reference}: none of its devices ({some_of(list(past.spans))}) is in {data} ({some_of(devices)}); a "
            "reference is history of the same devices by the same names: rename them, or leave --reference out"
        )
    windows = Counter(r.device for one in past.slices for r in one.readings if r.profile.rows)
    lacking = [device for device in devices if windows[device] < LEAST_WINDOWS]
    if len(lacking) == len(devices):
        best = max(shared, key=lambda device: windows[device])
        raise ConfigError(
            f"{reference}: no device of {data} has {LEAST_WINDOWS} windows in it that the model answered (the most, "
            f"{windows[best]}, {best}); give a longer history, or a shorter --window"
        )
    notes = []
    if lacking:
        notes.append(
            f"{reference}: no history of {len(lacking)} of {len(devices)} devices ({some_of(lacking)}): their first "
            f"windows become it, and are not judged (at least {need}, an hour apart, until they span a day)"
        )
    notes += _of_time(reference, past, data, now, shared)
    return _without(past.slices, set(lacking)), notes


def _of_time(
    reference: Path, past: Replay, data: Path, now: Replay, shared: Sequence[DeviceId]
) -> Iterator[str]:
    if past.slices == now.slices:
        yield f"{reference}: has the same windows as {data}, which cannot have moved against itself"
        return
    overlapping, later = [], []
    for device in shared:
        before, after = past.spans[device], now.spans[device]
        if before.first_ns >= after.last_ns:
            later.append(device)
        elif before.last_ns > after.first_ns:
            overlapping.append(device)
    if overlapping:
        yield (
            f"{reference}: overlaps {data} in time for {len(overlapping)} of {len(shared)} devices "
            f"({some_of(overlapping)}): what is judged is partly its own past"
        )
    if later:
        yield (
            f"{reference}: is later than {data} for {len(later)} of {len(shared)} devices ({some_of(later)}): what is "
            "judged is held against what came after it"
        )


def _without(slices: Sequence[Slice], devices: set[DeviceId]) -> tuple[Slice, ...]:
    parts = [
        replace(one, readings=tuple(r for r in one.readings if r.device not in devices)) for one in slices
    ]
    return tuple(one for one in parts if one.readings)
