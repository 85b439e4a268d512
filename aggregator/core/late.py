"""Labels that became known since the last look: which look they count in.

Labels of the time in which a device's past was made belong to that past, whenever they come: what a device usually gets
right is else never known where laboratories are slower than devices. Others count in the look in which they arrive,
also when the device sent no window for it. A device that is not in the look and has no whole past yet keeps its labels
waiting for the next look.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from aggregator.core.rates import FEWEST_ROWS
from aggregator.looks import Reading, Slice
from aggregator.records import LateLabels
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """``past`` adds to first looks, by look and device; ``now`` to the look that is taken; each (labelled, correct).

    ``last`` is the newest number taken of each device.
    """

    past: Mapping[tuple[int, DeviceId], tuple[int, int]]
    now: Mapping[DeviceId, tuple[int, int]]
    last: Mapping[DeviceId, int]


def arrived(
    late: Iterable[LateLabels], first_looks: Sequence[Slice], present: Iterable[DeviceId], *, need: int
) -> Arrived:
    """Sorts ``late`` in. ``present`` devices are in the look; ``need`` first looks are a whole past.

    A device's labels wait until they are `FEWEST_ROWS`: fewer are not judged, and would be lost to it.
    """
    here = frozenset(present)
    ends: dict[DeviceId, list[tuple[int, int]]] = defaultdict(list)
    for one in first_looks:
        for reading in one.readings:
            ends[reading.device].append((reading.end_ns, one.index))
    past: dict[tuple[int, DeviceId], tuple[int, int]] = {}
    now: dict[DeviceId, tuple[int, int]] = {}
    last: dict[DeviceId, int] = {}
    for labels in late:
        device, counts = labels.device, (labels.labelled, labels.correct)
        known = sorted(ends.get(device, ()))
        if device not in here and len(known) < need:
            continue
        last[device] = max(labels.number, last.get(device, 0))
        middle = (labels.start_ns + labels.end_ns) // 2
        look = next((index for end_ns, index in known if middle < end_ns), None)
        if look is None:
            now[device] = _added(now.get(device), counts)
        else:
            past[look, device] = _added(past.get((look, device)), counts)
    waiting = {device for device, (labelled, _) in now.items() if labelled < FEWEST_ROWS}
    return Arrived(
        past={key: counts for key, counts in past.items() if key[1] not in waiting},
        now={device: counts for device, counts in now.items() if device not in waiting},
        last={device: number for device, number in last.items() if device not in waiting},
    )


def _added(a: tuple[int, int] | None, b: tuple[int, int]) -> tuple[int, int]:
    return b if a is None else (a[0] + b[0], a[1] + b[1])


def amended(
    first_looks: Sequence[Slice], past: Mapping[tuple[int, DeviceId], tuple[int, int]]
) -> tuple[Slice, ...]:
    """First looks with what became known of them."""
    return tuple(
        replace(
            one,
            readings=tuple(
                replace(r, labelled=r.labelled + more[0], correct=r.correct + more[1])
                if (more := past.get((one.index, r.device)))
                else r
                for r in one.readings
            ),
        )
        for one in first_looks
    )


def told(one: Slice, now: Mapping[DeviceId, tuple[int, int]], nothing: Profile) -> Slice:
    """The look with what became known by it; a device that sent no window has a reading of ``nothing`` else."""
    here = {reading.device for reading in one.readings}
    (looked_at,) = amended((one,), {(one.index, device): counts for device, counts in now.items()})
    others = tuple(
        Reading(
            device=device,
            profile=nothing,
            start_ns=one.start_ns,
            end_ns=one.end_ns,
            windows=0,
            labelled=labelled,
            correct=correct,
        )
        for device, (labelled, correct) in sorted(now.items())
        if device not in here
    )
    return replace(looked_at, readings=(*looked_at.readings, *others))
