"""How often the drift engine is wrong, how often right and how soon, beside raw-data tests at matched false alarms.

    python -m benchmarks.calibration [--full] [--only PART] [--cache FILE] [--workers N] [--seconds S]
                                     [--json FILE] [--docs [PAGE]]

In a drift-free run any alarm of any kind in any window is a false alarm. In a faulty one what counts is the first
alarm that names the right column after the fault began, and not one that stood before. `benchmarks.calibration_runs`
says what a run is. With ``--cache`` finished runs are kept, and an interrupted report goes on where it was;
``--seconds 0`` reports on what is there. Runs are taken in turns, so that a part of them is a smaller report of the
same kind.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import calibration_text, run_cache
from benchmarks.calibration_runs import (
    BROKEN,
    CLEAN,
    FAULTS,
    HARD,
    REQUIRED,
    SHIFTS,
    START,
    Task,
    key_of,
    sources,
    work,
)

LEVEL: Final = 0.05
PARTS: Final = ("clean", "long", "attribution", "power")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How many runs of each kind, and how long.

    ``clean`` are of each scenario that a bound is claimed for, ``other`` of each other; the first ``matched`` of the
    hard ones set the raw tests' thresholds. ``long`` runs have ``long_windows`` of ``long_rows`` rows, and
    ``attributed`` ones ``attributed_windows``.
    """

    clean: int
    other: int
    matched: int
    long: int
    long_windows: int
    long_rows: int
    faulty: int
    attributed: int
    attributed_windows: int = 25
    windows: int = 40
    rows: int = 250


QUICK: Final = Size(
    clean=3, other=1, matched=20, long=1, long_windows=200, long_rows=60, faulty=1, attributed=1
)
FULL: Final = Size(
    clean=200, other=60, matched=100, long=200, long_windows=400, long_rows=60, faulty=12, attributed=21
)
BOTH: Final = ("training", "history")


def tasks(size: Size, parts: Sequence[str] = PARTS) -> list[Task]:
    """The runs of ``parts`` of a report, all scenarios and faults in turns."""
    groups = {"clean": _clean, "long": _long, "attribution": _attribution, "power": _power}
    return in_turns([group for part in parts for group in groups[part](size)])


def _clean(size: Size) -> list[list[Task]]:
    usual = partial(Task, kind="clean", windows=size.windows, rows=size.rows)
    found = []
    for name in CLEAN:
        matched = size.matched if name in HARD else 0
        runs = max(matched, size.clean if name in REQUIRED else size.other)
        found.append([usual(scenario=name, seed=1000 + s, raw=s < matched) for s in range(runs)])
    return found


def _long(size: Size) -> list[list[Task]]:
    usual = partial(Task, kind="clean", windows=size.long_windows, rows=size.long_rows, arms=BOTH)
    return [[usual(scenario="together", seed=s) for s in range(size.long)]]


def _attribution(size: Size) -> list[list[Task]]:
    usual = partial(Task, kind="attributed", windows=size.attributed_windows, rows=size.rows, arms=BOTH)
    return [
        [usual(scenario=name, fault=fault, seed=4000 + s) for s in range(size.attributed)]
        for name in HARD
        for fault in (*BROKEN, *SHIFTS)
    ]


def _power(size: Size) -> list[list[Task]]:
    usual = partial(Task, kind="faulty", windows=size.windows, rows=size.rows, arms=BOTH, raw=True)
    return [
        [usual(scenario=name, fault=fault, seed=3000 + s) for s in range(size.faulty)]
        for name in HARD
        for fault in FAULTS
    ]


def in_turns(groups: Sequence[Sequence[Task]]) -> list[Task]:
    """All tasks, so that at any point every group has had the same share of its own."""
    placed = [((i + 0.5) / len(group), task) for group in groups for i, task in enumerate(group)]
    return [task for _, task in sorted(placed, key=lambda one: one[0])]


def run(
    size: Size = QUICK,
    *,
    parts: Sequence[str] = PARTS,
    cache: Path | None = None,
    workers: int | None = None,
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """The report as plain data; see `calibration_text.report`."""
    digest = sources()
    kept = run_cache.Cache(cache, digest)
    if kept.others:
        print(f"... {kept.others} runs of other sources are not used", file=sys.stderr)
    todo = {key_of(task): task for task in tasks(size, parts)}
    found = run_cache.perform(work, todo, kept, workers=workers, seconds=seconds)
    report = calibration_text.report(found, level=LEVEL, start=START)
    return {"sources": digest, "asked": asdict(size), **report}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.calibration``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--full", action="store_true", help="as many runs as the bounds need: hours of work")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone; may be given again")
    parser.add_argument(
        "--cache", type=Path, help="keep finished runs in this file, and use those that are there"
    )
    parser.add_argument("--workers", type=int, help="processes; as many as processors unless given")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument(
        "--docs",
        type=Path,
        nargs="?",
        const=calibration_text.PAGE,
        help="write the tables into this page (%(const)s), too",
    )
    given = parser.parse_args(arguments)
    found = run(
        FULL if given.full else QUICK,
        parts=given.only or PARTS,
        cache=given.cache,
        workers=given.workers,
        seconds=given.seconds,
    )
    print(calibration_text.markdown(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.docs:
        calibration_text.write(found, given.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
