"""What a look at many devices costs the judge.

Profiles are drawn as counts under one layout, so that ten thousand devices are made in seconds.
"""

import statistics
import time
from typing import Final

import numpy as np

from aggregator.config import DriftConfig
from aggregator.core.judge import Judge
from aggregator.looks import Reading, Slice
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import ArtifactInfo
from edge_runtime.contract.profile import FIXED_POINT, Profile
from tests.simulators.streams import Fleet

DEVICES: Final = 10_000
LOOKS: Final = 5
ROWS: Final = 1000
SECOND_NS: Final = 1_000_000_000


def looks_of(info: ArtifactInfo, devices: int, looks: int, *, seed: int = 0, rows: int = ROWS) -> list[Slice]:
    """Looks at ``devices`` devices of ``rows`` rows each, drawn from the training's shares."""
    rng = np.random.default_rng(seed)
    spec = info.reference.spec
    total = info.reference.total.counts
    ids = [DeviceId(f"device-{i:05d}") for i in range(devices)]
    found = []
    for index in range(looks):
        counts = np.zeros((devices, spec.size), np.int64)
        for j, column in enumerate(spec.columns):
            start = int(spec.offsets[j])
            shares = total[start : start + column.cells] / total[start : start + column.cells].sum()
            counts[:, start : start + column.cells] = rng.multinomial(rows, shares, size=devices)
        yes = rng.binomial(rows, 0.5, size=devices)
        counts[:, -2], counts[:, -1] = rows - yes, yes
        sums = np.zeros((devices, 1 + spec.classes), np.int64)
        sums[:, 0] = int(0.8 * rows * FIXED_POINT)
        at = index * 3600 * SECOND_NS
        readings = tuple(
            Reading(
                device=device,
                profile=Profile(layout=spec.layout, rows=rows, counts=counts[i], sums=sums[i]),
                start_ns=at,
                end_ns=at + 3600 * SECOND_NS,
            )
            for i, device in enumerate(ids)
        )
        found.append(Slice(index=index, start_ns=at, end_ns=at + 3600 * SECOND_NS, readings=readings))
    return found


def run(devices: int = DEVICES) -> list[dict[str, object]]:
    """Seconds that one look takes once the past is known, and that learning the past takes."""
    info = Fleet(seed=0).info
    config = DriftConfig(baseline_looks=3)
    slices = looks_of(info, devices, 3 + LOOKS)
    judge = Judge(info, config, settle=0, block_looks=1)  # as the monitor makes it
    seconds = []
    for one in slices:
        start = time.perf_counter()
        judge.look(one)
        seconds.append(time.perf_counter() - start)
    later = seconds[3:]
    return [
        {
            "devices": devices,
            "features": len(info.manifest.features),
            "look s": round(statistics.median(later), 3),
            "slowest look s": round(max(later), 3),
            "learning the past s": round(seconds[2], 3),
            "alarms": len(judge.alarms),
        }
    ]
