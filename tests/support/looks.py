"""Looks at simulated fleets, for tests of the drift engine."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregator.config import DriftConfig
from aggregator.core.components import Components, components_of
from aggregator.core.judge import Judge
from aggregator.core.past import Deviations, Past
from aggregator.looks import Alarm, Reading, Slice
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import FIXED_POINT, Binner, Profile
from tests.simulators.stream_rows import answer
from tests.simulators.streams import Fault, Fleet

CONFIG = DriftConfig()
HOUR = 3600


def small(**options: Any) -> Fleet:
    """Forty devices that count six columns, the first four of which the model reads."""
    return Fleet(**({"devices": 40, "features": 6, "rows": 100, "windows": 16, "group_rows": 800} | options))


def judged(fleet: Fleet, config: DriftConfig = CONFIG, **options: Any) -> Judge:
    """The judge of a fleet after its last look."""
    given: dict[str, Any] = {"looks": fleet.windows, "history": fleet.reference}
    judge = Judge(fleet.info, config, **(given | options))
    for one in fleet.slices:
        judge.look(one)
    return judge


def told(alarms: Iterable[Alarm]) -> list[tuple[str, str | None, str, int]]:
    """Kind, feature, cohort and look of the alarms."""
    return [(a.kind, a.feature, a.cohort, a.opened_window) for a in alarms]


def binned(fleet: Fleet, rows: NDArray[np.floating]) -> Profile:
    """The profile of ``rows`` (n, F) and the model's answers to them."""
    labels, scores = answer(rows.T.astype(np.float32))
    binner = Binner(fleet.spec, probabilities=True)
    binner.observe(rows, labels, scores)
    return binner.take()


def mapped(looks: Sequence[Slice], change: Callable[[int, Reading], Reading | None]) -> tuple[Slice, ...]:
    """The looks with every reading changed, or dropped where ``change(look, reading)`` is None."""
    return tuple(
        replace(one, readings=tuple(r for old in one.readings if (r := change(one.index, old)) is not None))
        for one in looks
    )


def index_of(device: DeviceId) -> int:
    """The number that `Fleet` gave the device."""
    return int(device.rpartition("-")[2])


def past_of(fleet: Fleet) -> tuple[Components, Past]:
    """What the fleet's known-good history tells."""
    components = components_of(fleet.info)
    return components, Past(components, fleet.reference)


def deviations(past: Past, one: Slice) -> Deviations:
    """How far the devices of ``one`` are from their past; some have one."""
    found = past.deviations(one.readings)
    assert found is not None
    return found


def mean_sure(profile: Profile) -> float:
    """The mean of the largest probability."""
    return float(profile.sums[0]) / FIXED_POINT / profile.rows


__all__ = [
    "CONFIG",
    "HOUR",
    "Fault",
    "Fleet",
    "binned",
    "deviations",
    "index_of",
    "judged",
    "mapped",
    "mean_sure",
    "past_of",
    "small",
    "told",
]
