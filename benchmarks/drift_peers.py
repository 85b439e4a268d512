"""Evidently, NannyML and whylogs, with their defaults, on the fleets that skiff is judged by.

    python -m benchmarks.drift_peers [--quick] [--cache FOLDER] [--json FILE]

Each peer lives in an environment of its own, made on demand with the versions of ``peer_environments``, and reads the
rows of all devices from files; `benchmarks.drift_peer_child` tells how it is asked. The same history of the same
devices is everybody's reference. A drift-free fleet *alarmed* when any column was named in any window. A shift was
*found* when its column was named in some window after it began and in none before.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.calibration import judge
from benchmarks.calibration_text import share
from tests.simulators.streams import SCENARIOS, Fault, Fleet

HERE: Final = Path(__file__).resolve().parent
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "skiff" / "drift-peers"
PEERS: Final = ("evidently", "nannyml", "whylogs")
POOLED: Final = "scipy"
"""Pooled Kolmogorov-Smirnov with Bonferroni over columns; scipy is here already."""

WINDOWS: Final = 10
START: Final = 5
WINDOW_SECONDS: Final = 8640
"""The history covers one day, and so does what is judged."""
ROWS: Final = 50
COLUMN: Final = 7
INSTALL_SECONDS: Final = 1800
RUN_SECONDS: Final = 7200

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


def environment(peer: str, cache: Path) -> Path | str:
    """The Python of the peer's own environment, made where it is missing or its pins changed; or why there is none."""
    pins = HERE / "peer_environments" / f"{peer}.txt"
    wanted = hashlib.sha256(pins.read_bytes()).hexdigest()
    folder = cache / peer
    stamp, python = folder / "pins.sha256", folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="ascii") == wanted:
        return python
    _tell(f"installing {peer} in {folder}")
    try:
        venv.create(folder, with_pip=True, clear=True)
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-r",
            str(pins),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.CalledProcessError as e:
        text = e.stderr if isinstance(e.stderr, str) else ""
        errors = [line for line in text.splitlines() if line.startswith("ERROR")]
        return f"not installed: {(errors or text.splitlines() or [str(e)])[-1]}"
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"not installed: {e}"
    stamp.write_text(wanted, encoding="ascii")
    return python


def ask(python: Path | str, peer: str, folder: Path) -> Iterator[tuple[str, Named]]:
    """What the peer names in each window of each fleet in ``folder``; raises RuntimeError where it fails."""
    command = [str(python), str(HERE / "drift_peer_child.py"), peer, str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=RUN_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{peer} failed: {(done.stderr.splitlines() or ['no output'])[-1]}")
    for line in done.stdout.splitlines():
        found = json.loads(line)
        yield found["fleet"], [set(named) for named in found["windows"]]


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


def run(todo: Sequence[Case] | None = None, *, cache: Path = CACHE) -> list[dict[str, Any]]:
    """One row for each peer, skiff first; a peer that cannot run has a ``reason`` instead of figures."""
    todo = cases() if todo is None else todo
    _tell("skiff")
    rows: list[dict[str, Any]] = [{"peer": "skiff", **score(todo, {case.name: skiff(case) for case in todo})}]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for case in todo:
            write(case, folder / case.name)
        for peer in (POOLED, *PEERS):
            _tell(peer)
            python = sys.executable if peer == POOLED else environment(peer, cache)
            if isinstance(python, str) and peer != POOLED:
                rows.append({"peer": peer, "reason": python})
                continue
            try:
                rows.append({"peer": peer, **score(todo, dict(ask(python, peer, folder)))})
            except (RuntimeError, subprocess.TimeoutExpired) as e:
                rows.append({"peer": peer, "reason": str(e)})
    return rows


def _tell(what: str) -> None:
    print(f"... {what}", file=sys.stderr)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| | drift-free fleets that alarmed | clear shifts found |", "| --- | --- | --- |"]
    for row in rows:
        cells = [_cell(row["alarmed"]), _cell(row["found"])] if "alarmed" in row else [row["reason"], "-"]
        lines.append(f"| {row['peer']} | {' | '.join(cells)} |")
    return lines


def _cell(found: Mapping[str, Any]) -> str:
    return f"{found['count']} of {found['runs']} ({found['low']:.0%} to {found['high']:.0%})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.drift_peers``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift_peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one drift-free fleet of each kind, not three")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the peers are installed")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    given = parser.parse_args(arguments)
    rows = run(cases(seeds=1 if given.quick else 3), cache=given.cache)
    print("\n".join(table(rows)))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
