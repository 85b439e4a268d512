"""One run of the calibration: a simulated fleet, judged, and beside it what tests of its raw rows would say.

A fleet (`tests.simulators.streams`) has 40 devices and 30 features, and a model that was trained on six units of the
same population. All runs are seeded.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import scipy
from threadpoolctl import threadpool_limits

from aggregator.config import DriftConfig
from aggregator.core.judge import Judge
from aggregator.looks import Alarm
from benchmarks import raw_tests, run_cache
from edge_runtime.contract.manifest import ArtifactInfo
from tests.simulators.streams import SCENARIOS, Fault, Fleet

START: Final = 10
COLUMN: Final = 7
HISTORY: Final = 48
ARMS: Final = ("training", "no groups", "history")
"""Against the training units; against training rows without units; with known-good history of the same devices."""

REQUIRED: Final = ("iid", "ar", "heterogeneous", "chatty", "together", "cycle", "everything")
CLEAN: Final = (*REQUIRED, "cycle-varied", "correlated", "mixed")
"""The scenarios without faults; those whose bound is to hold come first."""
HARD: Final = ("iid", "together")
"""The scenarios with faults, and what sets the raw tests' thresholds."""
_CATEGORY: Final = 29

FAULTS: Final[Mapping[str, Fault]] = {
    "mean +0.1": Fault("mean", 0.1),
    "mean +0.15": Fault("mean", 0.15),
    "mean +0.15, half of the fleet": Fault("mean", 0.15, share=0.5),
    "mean +0.3": Fault("mean", 0.3),
    "mean +0.5": Fault("mean", 0.5),
    "mean +1": Fault("mean", 1.0),
    "mean +0.5, half of the fleet": Fault("mean", 0.5, share=0.5),
    "mean +1, a quarter": Fault("mean", 1.0, share=0.25),
    "mean +1, slowly over 10 windows": Fault("mean", 1.0, ramp=10),
    "scale x1.15": Fault("scale", 1.15),
    "scale x1.5": Fault("scale", 1.5),
    "tail, 0.3 % of rows at 6": Fault("tail", 0.003),
    "tail, 1 % of rows at 6": Fault("tail", 0.01),
    "stuck, 3 % of rows": Fault("stuck", 0.03),
    "stuck, 10 % of rows": Fault("stuck", 0.1),
    "clipped at 1.5": Fault("clipped", 1.5),
    "missing, 2 % of rows": Fault("missing", 0.02),
    "missing, 10 % of rows": Fault("missing", 0.1),
    "unseen, 2 % of rows": Fault("unseen", 0.02, columns=(_CATEGORY,)),
    "unseen, 10 % of rows": Fault("unseen", 0.1, columns=(_CATEGORY,)),
    "correlation 0.8 only": Fault("correlation", 0.8, columns=(2, 3)),
}
BROKEN: Final[Mapping[str, Fault]] = {
    "offset +3": Fault("offset", 3.0),
    "stuck": Fault("stuck", 1.0),
    "noise x3": Fault("noise", 3.0),
    "dead at 0": Fault("dead", 0.0),
    "missing": Fault("missing", 1.0),
}
SHIFTS: Final[Mapping[str, Fault]] = {
    "mean +0.5, everywhere": Fault("mean", 0.5),
    "mean +1, everywhere": Fault("mean", 1.0),
    "mean +1, half of the fleet": Fault("mean", 1.0, share=0.5),
    "scale x1.5, everywhere": Fault("scale", 1.5),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run: ``kind`` is clean, faulty or attributed; ``fault`` the name of a fault, empty for none."""

    kind: str
    scenario: str
    seed: int
    fault: str = ""
    arms: tuple[str, ...] = ARMS
    raw: bool = False
    windows: int = 40
    rows: int = 250


def fleet_of(task: Task) -> Fleet:
    """The fleet of one run; ``skiff backtest`` sees the same rows in what its `write` writes."""
    traits = SCENARIOS[task.scenario]
    faults: tuple[Fault, ...] = ()
    if task.kind != "clean" and "category" not in traits.shapes:
        traits = replace(traits, shapes=("category",))
    if task.kind == "faulty" and task.fault:
        faults = (replace(FAULTS[task.fault], start=START),)
    elif task.kind == "attributed":
        faults = (_attributed(task),)
    return Fleet(
        seed=task.seed,
        traits=traits,
        faults=faults,
        windows=task.windows,
        rows=task.rows,
        reference_windows=HISTORY if "history" in task.arms else 0,
    )


def _attributed(task: Task) -> Fault:
    if task.fault in SHIFTS:
        return replace(SHIFTS[task.fault], start=START)
    count = 1 + task.seed % 3
    broken = tuple((task.seed * 7 + 11 * i) % 40 for i in range(count))
    return replace(BROKEN[task.fault], start=START, devices=broken)


def work(task: Task) -> dict[str, Any]:
    """One run as plain data: the alarms of each arm, and the statistics of the raw tests where they are asked for."""
    fleet = fleet_of(task)
    with threadpool_limits(1):
        started = time.process_time()
        pool = (
            raw_tests.Pool(fleet, raw_columns(fleet), start=START if fleet.faults else 0)
            if task.raw
            else None
        )
        if pool is not None:
            fleet.count(pool.take)
        _ = fleet.slices, fleet.info
        counted = time.process_time()
        alarms = {arm: [_alarm(found) for found in judge(fleet, arm)] for arm in task.arms}
        judged = time.process_time()
        raw = {} if pool is None else _raw(task, pool.pooled)
        tested = time.process_time()
    seconds = {
        "count": round(counted - started, 3),
        "judge": round(judged - counted, 3),
        "raw": round(tested - judged, 3),
    }
    hit = [fleet.device_ids[i] for fault in fleet.faults for i in fault.hit(fleet.devices)]
    columns = [fleet.names[j] for fault in fleet.faults for j in fault.columns]
    return {**asdict(task), "columns": columns, "hit": hit, "alarms": alarms, "raw": raw, "seconds": seconds}


def judge(fleet: Fleet, arm: str, config: DriftConfig | None = None) -> tuple[Alarm, ...]:
    """All alarms of one run, in the order in which they opened."""
    history = fleet.reference if arm == "history" else ()
    info = ungrouped(fleet.info) if arm == "no groups" else fleet.info
    engine = Judge(info, config or DriftConfig(), looks=fleet.windows, history=history)
    for part in fleet.slices:
        engine.look(part)
    return engine.alarms


def ungrouped(info: ArtifactInfo) -> ArtifactInfo:
    """The artifact of a trainer who did not say which rows belong together."""
    return replace(info, reference=replace(info.reference, groups=()))


def _alarm(alarm: Alarm) -> dict[str, Any]:
    return {
        "kind": alarm.kind,
        "feature": alarm.feature,
        "opened": alarm.opened_window,
        "closed": alarm.closed_window,
        "devices": list(alarm.devices),
        "severity": alarm.severity,
        "why": alarm.why,
    }


def raw_columns(fleet: Fleet) -> list[int]:
    """The features that raw tests read beside the score: all but categories, or those that the fault moves.

    These tests are of numbers. The column that has categories in faulty runs is left out of drift-free ones, too.
    Where only outputs move, the score is all there is.
    """
    numbers = [j for j in range(fleet.features) if fleet.shapes[j] != "category" and j != _CATEGORY]
    if not fleet.faults:
        return numbers
    (fault,) = fleet.faults
    return [] if fault.kind == "correlation" else [j for j in numbers if j in fault.columns]


def _raw(task: Task, rows: raw_tests.Pooled) -> dict[str, dict[str, list[float]]]:
    """Per arm and test: the largest statistic of a clean run, or the right column's in each window from the fault on.

    Nothing where the right column has no numbers.
    """
    if task.fault and len(rows.training) == 1 and FAULTS[task.fault].kind != "correlation":
        return {}
    found: dict[str, dict[str, list[float]]] = {}
    for arm, reference in (("training", rows.training), ("history", rows.history)):
        if arm in task.arms:
            series = raw_tests.statistics(reference, rows.windows)
            # The faulty column comes first; where only outputs move, that is the score.
            found[arm] = {
                name: [round(float(value), 7) for value in (values[:, 0] if task.fault else [values.max()])]
                for name, values in series.items()
            }
    return found


def sources() -> str:
    """The digest of all that a run depends on: engine, its settings, simulator, tests, and the runs' definitions.

    Not of what is sent, signed and kept: no run has any of it.
    """
    return run_cache.digest_of(
        [__name__],
        [DriftConfig(), np.__version__, scipy.__version__],
        without=[
            "aggregator.config",
            "aggregator.records",
            "benchmarks.run_cache",
            "edge_runtime.contract.messages",
            "edge_runtime.contract.release",
        ],
    )


def key_of(task: Task) -> str:
    """What tells one run from another."""
    return run_cache.key_of(asdict(task))
