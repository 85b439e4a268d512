"""Evidently, NannyML and whylogs, with their defaults, on the fleets that skiff is judged by.

    python -m benchmarks.drift_peers [--quick] [--cache FOLDER] [--runs FILE] [--json FILE] [--docs [PAGE]]

Each peer lives in an environment of its own (`benchmarks.environments`) and reads the rows of all devices from files;
`benchmarks.drift_peer_child` tells how it is asked. The same history of the same devices is everybody's reference. A
drift-free fleet *alarmed* when any column was named in any window. A shift was *found* when its column was named in
some window after it began and in none before. `benchmarks.label_free` compares the estimates of accuracy. With
``--runs`` the answers are kept in a file, and an interrupted comparison goes on where it was.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aggregator.config import DriftConfig
from benchmarks import label_free
from benchmarks.calibration_runs import judge
from benchmarks.calibration_text import PAGE, fill, share
from benchmarks.environments import CACHE, HERE, OURS, ask, environment
from benchmarks.run_cache import Cache, digest_of, key_of
from tests.simulators.streams import SCENARIOS, Fault, Fleet

PEERS: Final = ("evidently", "nannyml", "whylogs")
POOLED: Final = "scipy"
"""Pooled Kolmogorov-Smirnov with Bonferroni over columns; scipy is here already."""

BEGIN: Final = "<!-- peers: written by python -m benchmarks.drift_peers --docs -->"
END: Final = "<!-- peers: end -->"
WINDOWS: Final = 10
START: Final = 5
WINDOW_SECONDS: Final = 8640
"""The history covers one day, and so does what is judged."""
ROWS: Final = 50
COLUMN: Final = 7

CLEAN: Final = ("iid", "ar", "heterogeneous", "together", "cycle")
SHIFTED: Final = ("iid", "heterogeneous", "together")
SHIFTS: Final[Mapping[str, Fault]] = {
    "mean": Fault("mean", 1.0),
    "half": Fault("mean", 1.0, share=0.5),
    "scale": Fault("scale", 2.0),
    "stuck": Fault("stuck", 0.5),
    "missing": Fault("missing", 0.2),
    "clipped": Fault("clipped", 0.5),
}

_SAID: Final = """\
Everything at its defaults; `scipy` is Kolmogorov-Smirnov on pooled rows with Bonferroni over columns. In brackets the
exact 95 % interval."""

Named = list[set[str]]
"""The columns named in each window."""


@dataclass(frozen=True, slots=True)
class Case:
    """One fleet: ``shift`` names what begins at `START`, nothing where it is empty."""

    scenario: str
    shift: str
    seed: int

    @property
    def name(self) -> str:
        """As a folder."""
        return f"{self.scenario}-{self.shift or 'clean'}-{self.seed}"

    @property
    def fleet(self) -> Fleet:
        """40 devices, 30 features; with as much history as there is to judge."""
        faults = (_begin(SHIFTS[self.shift]),) if self.shift else ()
        return Fleet(
            seed=self.seed,
            traits=SCENARIOS[self.scenario],
            faults=faults,
            rows=ROWS,
            windows=WINDOWS,
            reference_windows=WINDOWS,
            window_seconds=WINDOW_SECONDS,
        )


def _begin(fault: Fault) -> Fault:
    return Fault(fault.kind, fault.size, start=START, columns=(COLUMN,), share=fault.share)


def cases(*, seeds: int = 3) -> tuple[Case, ...]:
    """``seeds`` drift-free fleets of each scenario, and one with each shift."""
    clean = [Case(name, "", 5000 + seed) for name in CLEAN for seed in range(seeds)]
    return (*clean, *(Case(name, shift, 6000 + k) for name in SHIFTED for k, shift in enumerate(SHIFTS)))


def write(case: Case, folder: Path) -> None:
    """Writes the rows of all devices, window after window: ``reference.parquet`` and ``data.parquet``."""
    fleet = case.fleet
    stretches = [stretch for device in range(fleet.devices) for stretch in fleet.stream(device)]
    folder.mkdir(parents=True)
    for name, windows in (("reference", range(-WINDOWS, 0)), ("data", range(WINDOWS))):
        tables = [
            pa.table(
                {
                    "window": np.full(values.shape[1], window, np.int64),
                    **dict(zip(fleet.names, values, strict=True)),
                }
            )
            for window in windows
            for stretch in stretches
            if 0 <= window - stretch.first < stretch.values.shape[1]
            for values in [stretch.values[:, window - stretch.first]]
        ]
        pq.write_table(pa.concat_tables(tables), folder / f"{name}.parquet")


def skiff(case: Case) -> Named:
    """The columns with an incident in each window, of any kind; ``outputs`` stands for those of the model's answers."""
    named: Named = [set() for _ in range(WINDOWS)]
    for alarm in judge(case.fleet, "history"):
        end = WINDOWS if alarm.closed_window is None else alarm.closed_window
        for window in range(alarm.opened_window, end):
            named[window].add(alarm.feature or "outputs")
    return named


def score(todo: Sequence[Case], found: Mapping[str, Named]) -> dict[str, Any]:
    """How many drift-free fleets alarmed, and how many shifts were found."""
    column = f"f{COLUMN}"
    alarmed = [case.name for case in todo if not case.shift and any(found[case.name])]
    hit = [case.name for case in todo if case.shift and found_newly(found[case.name], column)]
    clean = sum(not case.shift for case in todo)
    return {
        "alarmed": {**share(len(alarmed), clean), "fleets": alarmed},
        "found": {**share(len(hit), len(todo) - clean), "fleets": hit},
    }


def found_newly(named: Named, column: str) -> bool:
    """Whether the column was named after the shift began, and never before."""
    return any(column in names for names in named[START:]) and not any(
        column in names for names in named[:START]
    )


def answers(
    peer: str, todo: Sequence[Case], folder: Path, cache: Path, kept: Cache
) -> Mapping[str, Named] | str:
    """What ``peer`` named in each window of each case, or why it says nothing; ``folder`` takes the rows."""
    keys = {case.name: key_of({"peer": peer, **asdict(case)}) for case in todo}
    missing = [case for case in todo if kept.get(keys[case.name]) is None]
    if missing:
        _tell(f"{peer}: {len(missing)} of {len(todo)} fleets")
        python = sys.executable if peer == POOLED else environment(peer, cache)
        if isinstance(python, str) and peer != POOLED:
            return python
        for case in missing:
            if not (folder / case.name).exists():
                write(case, folder / case.name)
        try:
            for found in ask(python, peer, folder, [case.name for case in missing]):
                kept.add(keys[found["fleet"]], {"windows": found["windows"], "seconds": found["seconds"]})
        except RuntimeError as e:
            return str(e)
    runs = {name: kept.get(key) for name, key in keys.items()}
    return {name: [set(named) for named in found["windows"]] for name, found in runs.items() if found}


def own(todo: Sequence[Case], kept: Cache) -> Mapping[str, Named]:
    """What skiff named."""
    found = {}
    for case in todo:
        key = key_of({"peer": "skiff", **asdict(case)})
        done = kept.get(key)
        if done is None:
            done = {"windows": [sorted(named) for named in skiff(case)]}
            kept.add(key, done)
        found[case.name] = [set(named) for named in done["windows"]]
    return found


def engine() -> str:
    """The digest of what skiff's own answers depend on."""
    return digest_of(
        ["benchmarks.calibration_runs", __name__],
        [DriftConfig(), np.__version__],
        without=["aggregator.config", "benchmarks.run_cache"],
    )


def others() -> str:
    """The digest of what the peers' answers depend on: their pins, how they are asked, and the rows."""
    pins = [(HERE / "peer_environments" / f"{peer}.txt").read_text(encoding="utf-8") for peer in PEERS]
    setting = [WINDOWS, START, WINDOW_SECONDS, ROWS, COLUMN, SHIFTS, np.__version__]
    return digest_of(
        ["benchmarks.drift_peer_child", "tests.simulators.streams"], [*pins, *setting], without=OURS
    )


def run(
    todo: Sequence[Case] | None = None, *, cache: Path = CACHE, runs: Path | None = None, seeds: int = 3
) -> dict[str, Any]:
    """``drift``: a row for each peer, skiff first, with a ``reason`` where one cannot run; and ``label_free``."""
    todo = cases(seeds=seeds) if todo is None else todo
    _tell("skiff")
    ours, theirs = Cache(runs, engine()), Cache(runs, others())
    rows: list[dict[str, Any]] = [{"peer": "skiff", **score(todo, own(todo, ours))}]
    with tempfile.TemporaryDirectory() as scratch:
        for peer in (POOLED, *PEERS):
            found = answers(peer, todo, Path(scratch), cache, theirs)
            rows.append(
                {"peer": peer, **({"reason": found} if isinstance(found, str) else score(todo, found))}
            )
    return {"drift": rows, "label_free": label_free.run(cache=cache, runs=runs, seeds=seeds)}


def _tell(what: str) -> None:
    print(f"... {what}", file=sys.stderr)


def markdown(found: Mapping[str, Any]) -> str:
    """Both tables."""
    lines = ["| | drift-free fleets that alarmed | clear shifts found |", "| --- | --- | --- |"]
    for row in found["drift"]:
        cells = [_cell(row["alarmed"]), _cell(row["found"])] if "alarmed" in row else [row["reason"], "-"]
        lines.append(f"| {row['peer']} | {' | '.join(cells)} |")
    text = ["### Named columns", "", _SAID, "", *lines, "", "### Accuracy without labels", ""]
    return "\n".join([*text, label_free.SAID, "", *label_free.table(found["label_free"])])


def _cell(found: Mapping[str, Any]) -> str:
    return f"{found['count']} of {found['runs']} ({found['low']:.0%} to {found['high']:.0%})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.drift_peers``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drift_peers", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one drift-free fleet of each kind, not three")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the peers are installed")
    parser.add_argument(
        "--runs", type=Path, help="keep the answers in this file, and use those that are there"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument(
        "--docs", type=Path, nargs="?", const=PAGE, help="write the tables into this page (%(const)s), too"
    )
    given = parser.parse_args(arguments)
    found = run(cache=given.cache, runs=given.runs, seeds=1 if given.quick else 3)
    print(markdown(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.docs:
        fill(given.docs, BEGIN, END, markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
