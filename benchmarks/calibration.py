"""How often the drift engine is wrong, how often right and how soon, beside raw-data tests at matched false alarms.

    python -m benchmarks.calibration [--full] [--json FILE] [--docs]

A run is one simulated fleet (`tests.simulators.streams`): 40 devices, 30 features, a model that was trained on six
units of the same population. In a drift-free run any alarm of any kind in any window is a false alarm. In a faulty one
what counts is the first alarm that names the right column after the fault began, and not one that stood before. All
runs are seeded; the seeds of false alarms are in the JSON.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from threadpoolctl import threadpool_limits

from aggregator.config import DriftConfig
from aggregator.core.judge import Judge
from aggregator.looks import Alarm
from benchmarks import calibration_text, raw_tests
from edge_runtime.contract.manifest import ArtifactInfo
from tests.simulators.streams import SCENARIOS, Fault, Fleet, Traits

LEVEL: Final = 0.05
START: Final = 10
COLUMN: Final = 7
HISTORY: Final = 48
ARMS: Final = ("training", "no groups", "history")
"""Against the training units; against training rows without units; with known-good history of the same devices."""

CLEAN: Final[Mapping[str, Traits]] = {
    name: SCENARIOS[name]
    for name in (
        "iid",
        "ar",
        "heterogeneous",
        "chatty",
        "together",
        "cycle",
        "cycle-varied",
        "correlated",
        "mixed",
        "everything",
    )
}
HARD: Final = ("iid", "together")
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
class Size:
    """How many runs of each kind, and how long."""

    clean: int
    long: int
    long_windows: int
    matched: int
    faulty: int
    attributed: int
    windows: int = 40
    rows: int = 250


QUICK: Final = Size(clean=6, long=1, long_windows=200, matched=20, faulty=2, attributed=1)
FULL: Final = Size(clean=400, long=100, long_windows=400, matched=199, faulty=100, attributed=50)


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
        _ = fleet.slices, fleet.info
        counted = time.process_time()
        alarms = {arm: [_alarm(found) for found in judge(fleet, arm)] for arm in task.arms}
        judged = time.process_time()
        raw = _raw(task, fleet) if task.raw else {}
    seconds = {"count": round(counted - started, 3), "judge": round(judged - counted, 3)}
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


def _raw(task: Task, fleet: Fleet) -> dict[str, dict[str, list[float]]]:
    """Per arm and test: the largest statistic of a clean run, or the right column's in each window from the fault on.

    Categories are left out: these tests are of numbers. The score is a column like the others.
    """
    columns = [j for j in range(fleet.features) if fleet.shapes[j] != "category"]
    if fleet.faults:
        (fault,) = fleet.faults
        columns = [] if fault.kind == "correlation" else [j for j in columns if j in fault.columns]
        if not columns and fault.kind != "correlation":
            return {}
    rows = raw_tests.pooled(fleet, columns, start=START if fleet.faults else 0)
    found: dict[str, dict[str, list[float]]] = {}
    for arm, reference in (("training", rows.training), ("history", rows.history)):
        if arm not in task.arms:
            continue
        series = raw_tests.statistics(reference, rows.windows)
        # The faulty column comes first; where only outputs move, that is the score.
        found[arm] = {
            name: values[:, 0].tolist() if fleet.faults else [float(values.max())]
            for name, values in series.items()
        }
    return found


def tasks(size: Size) -> list[Task]:
    """All runs of a report, the costly ones first."""
    usual = partial(Task, windows=size.windows, rows=size.rows)
    both = ("training", "history")
    found = [
        Task(kind="clean", scenario="together", seed=s, arms=both, windows=size.long_windows, rows=size.rows)
        for s in range(size.long)
    ]
    found += [usual(kind="clean", scenario=name, seed=1000 + s) for name in CLEAN for s in range(size.clean)]
    found += [
        usual(kind="faulty", scenario=name, seed=2000 + s, arms=both, raw=True)
        for name in HARD
        for s in range(size.matched)
    ]
    found += [
        usual(kind="faulty", scenario=name, seed=3000 + s, fault=fault, arms=both, raw=True)
        for name in HARD
        for fault in FAULTS
        for s in range(size.faulty)
    ]
    found += [
        usual(kind="attributed", scenario=name, seed=4000 + s, fault=fault, arms=both)
        for name in HARD
        for fault in (*BROKEN, *SHIFTS)
        for s in range(size.attributed)
    ]
    return found


def run(size: Size = QUICK, *, workers: int | None = None) -> dict[str, Any]:
    """The report as plain data; see `calibration_text.report`."""
    found = perform(tasks(size), workers=workers)
    return calibration_text.report(found, size=asdict(size), level=LEVEL, start=START)


def perform(todo: Sequence[Task], *, workers: int | None = None) -> list[dict[str, Any]]:
    """The results of all tasks, in their order."""
    started = time.monotonic()
    found = []
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for done, result in enumerate(pool.map(work, todo), 1):
            found.append(result)
            if done % 50 == 0:
                print(f"... {done} of {len(todo)} runs, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.calibration``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the long report; hours of work")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--docs", action="store_true", help="write docs/explanation/calibration.md, too")
    given = parser.parse_args(arguments)
    found = run(FULL if given.full else QUICK)
    print(calibration_text.markdown(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.docs:
        calibration_text.write(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
