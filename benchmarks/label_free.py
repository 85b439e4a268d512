"""Accuracy without labels: what the windows' sums promise, beside NannyML's estimate from raw rows.

NannyML's confidence-based estimate (`CBPE`) reads every row's score, and the labels of the past to calibrate them;
skiff reads one sum a window, and takes calibrated scores for granted. The truth is known here, and both are held
against it: all devices' rows together, a window's estimate minus its accuracy. Sums and rows must agree.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aggregator.config import DriftConfig
from aggregator.core.judge import Judge
from benchmarks.environments import HERE, OURS, ask, environment
from benchmarks.run_cache import Cache, digest_of, key_of
from edge_runtime.contract.profile import FIXED_POINT
from tests.simulators.stream_rows import Stretch, answer
from tests.simulators.streams import SCENARIOS, Fault, Fleet

PEER: Final = "nannyml"
WINDOWS: Final = 10
START: Final = 5
ROWS: Final = 50
SCENARIO: Final = "heterogeneous"
SURE: Final = 2.0
CHANGES: Final[Mapping[str, tuple[Fault | None, float]]] = {
    "nothing": (None, 1.0),
    "the world: inputs closer together": (Fault("scale", 0.4, columns=(0, 1, 2)), 1.0),
    "the world: inputs further apart": (Fault("scale", 2.0, columns=(0, 1)), 1.0),
    "the world: a mean": (Fault("mean", 1.5, columns=(0,)), 1.0),
    "the world: a correlation": (Fault("correlation", 0.8, columns=(2, 3)), 1.0),
    "a sensor is off": (Fault("offset", 1.5, columns=(0,)), 1.0),
    "the answer changes": (Fault("concept", 0.2, columns=()), 1.0),
    "scores too sure, nothing": (None, SURE),
    "scores too sure, inputs closer together": (Fault("scale", 0.4, columns=(0, 1, 2)), SURE),
}
_NOT_MEANT: Final = (
    "aggregator.config",
    "benchmarks.run_cache",
    "benchmarks.drift_peers",
    "benchmarks.environments",
)
SAID: Final = f"""\
{WINDOWS} windows of 40 devices, the last {WINDOWS - START} after a change, and {WINDOWS} windows of the past with their
labels. The error is the mean absolute one of a window's estimated accuracy after the change. *Alerted* are fleets with
an alarm or alert of performance or predictions after the change and none before. No estimate can see that the answer
itself changed, or that a sensor lies. *Scores too sure* is a model whose logits are twice what they should be: NannyML
calibrates with the labels of the past, skiff believes the scores. Calibrate such a model before it is converted
(`CalibratedClassifierCV`)."""


@dataclass(frozen=True, slots=True)
class Case:
    """One fleet with one of `CHANGES`."""

    change: str
    seed: int

    @property
    def fleet(self) -> Fleet:
        """40 devices with labels, and as much history as there is to judge."""
        fault, sureness = CHANGES[self.change]
        return Fleet(
            seed=self.seed,
            traits=SCENARIOS[SCENARIO],
            faults=(replace(fault, start=START),) if fault else (),
            rows=ROWS,
            windows=WINDOWS,
            reference_windows=WINDOWS,
            window_seconds=86_400 // WINDOWS,
            sureness=sureness,
        )


class Rows:
    """What is known of every row, by window from ``-WINDOWS`` on: score of ``yes``, prediction, label."""

    def __init__(self, fleet: Fleet) -> None:
        self._sureness = fleet.sureness
        self._parts: list[list[tuple[Any, ...]]] = [[] for _ in range(2 * WINDOWS)]

    def take(self, stretch: Stretch) -> None:
        """One device's, as they pass."""
        labels, scores = answer(stretch.values, self._sureness)
        for i in range(stretch.values.shape[1]):
            part = (scores[i, :, 1], labels[i], stretch.labels[i])
            self._parts[stretch.first + i + WINDOWS].append(part)

    def write(self, folder: Path) -> None:
        """As a peer reads them: ``reference.parquet`` and ``data.parquet``."""
        folder.mkdir(parents=True)
        for name, windows in (("reference", range(WINDOWS)), ("data", range(WINDOWS, 2 * WINDOWS))):
            columns: dict[str, list[Any]] = {name: [] for name in ("window", "score", "prediction", "label")}
            for window in windows:
                for score, prediction, label in self._parts[window]:
                    columns["window"].append(np.full(len(score), window - WINDOWS))
                    columns["score"].append(score)
                    columns["prediction"].append(prediction)
                    columns["label"].append(label)
            pq.write_table(
                pa.table({name: np.concatenate(parts) for name, parts in columns.items()}),
                folder / f"{name}.parquet",
            )

    def accuracy(self, window: int) -> float:
        """The share of right answers."""
        right = [prediction == label for _, prediction, label in self._parts[window + WINDOWS]]
        return float(np.concatenate(right).mean())

    def promised(self, window: int) -> float:
        """The mean over devices of their rows' larger probability, from the scores themselves."""
        yes = [score.astype(np.float64) for score, _, _ in self._parts[window + WINDOWS]]
        no = [(1 - score).astype(np.float64) for score, _, _ in self._parts[window + WINDOWS]]
        return float(np.mean([np.maximum(a, b).mean() for a, b in zip(yes, no, strict=True)]))


def skiff(case: Case, folder: Path | None = None) -> dict[str, Any]:
    """Estimates, truth and alarms of one fleet; its rows are written to ``folder`` where one is given."""
    fleet = case.fleet
    rows = Rows(fleet)
    fleet.count(rows.take)
    if folder is not None:
        rows.write(folder)
    judge = Judge(fleet.info, DriftConfig(), looks=WINDOWS, history=fleet.reference)
    estimates, apart = [], 0.0
    for window, part in enumerate(fleet.slices):
        estimate = judge.look(part).estimate.estimated
        assert estimate is not None
        apart = max(apart, abs(estimate - rows.promised(window)))
        sums = [(int(r.profile.sums[0]), r.profile.rows) for r in part.readings]
        estimates.append(sum(s for s, _ in sums) / FIXED_POINT / sum(n for _, n in sums))
    opened = [alarm.opened_window for alarm in judge.alarms if alarm.kind in {"performance", "prediction"}]
    return {
        "truth": [rows.accuracy(window) for window in range(WINDOWS)],
        "estimates": estimates,
        "apart": apart,
        "alerts": [window in opened for window in range(WINDOWS)],
    }


def run(*, cache: Path, runs: Path | None = None, seeds: int = 3) -> list[dict[str, Any]]:
    """One row for each change; without NannyML's figures, and with the ``reason``, where it cannot run."""
    cases = [Case(change, 7000 + seed) for change in CHANGES for seed in range(seeds)]
    ours = Cache(runs, digest_of([__name__], [DriftConfig(), np.__version__], without=_NOT_MEANT))
    pins = (HERE / "peer_environments" / f"{PEER}.txt").read_text(encoding="utf-8")
    theirs = Cache(
        runs,
        digest_of(["benchmarks.drift_peer_child", "tests.simulators.streams"], [pins, CHANGES], without=OURS),
    )
    reason = ""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        missing = {}
        for number, case in enumerate(cases):
            key, name = _key(case), f"{number:03d}"
            if theirs.get(key) is None:
                missing[name] = key
            if ours.get(key) is None or name in missing:
                ours.add(key, skiff(case, folder / name if name in missing else None))
        python = environment(PEER, cache) if missing else ""
        if isinstance(python, Path):
            try:
                for found in ask(python, "cbpe", folder, list(missing)):
                    theirs.add(missing[found["fleet"]], {"windows": found["windows"]})
            except RuntimeError as e:
                reason = str(e)
        elif missing:
            reason = python
    return [
        _row(change, [case for case in cases if case.change == change], ours, theirs, reason)
        for change in CHANGES
    ]


def _key(case: Case) -> str:
    return key_of({"label_free": asdict(case)})


def _row(change: str, cases: Sequence[Case], ours: Cache, theirs: Cache, reason: str) -> dict[str, Any]:
    mine = [found for case in cases if (found := ours.get(_key(case)))]
    truth = np.array([found["truth"] for found in mine])
    row: dict[str, Any] = {
        "change": change,
        "fleets": len(mine),
        "before": round(float(truth[:, :START].mean()), 4),
        "after": round(float(truth[:, START:].mean()), 4),
        "apart": max(found["apart"] for found in mine),
        "skiff": _judged(truth, mine),
    }
    peer = [theirs.get(_key(case)) for case in cases]
    told = [
        {
            "estimates": [value for value, _ in found["windows"]],
            "alerts": [alert for _, alert in found["windows"]],
        }
        for found in peer
        if found
    ]
    row[PEER] = _judged(truth, told) if len(told) == len(mine) else {"reason": reason}
    return row


def _judged(truth: Any, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = np.array([one["estimates"] for one in found]) - truth
    alerted = [any(one["alerts"][START:]) and not any(one["alerts"][:START]) for one in found]
    return {
        "before": round(float(np.abs(errors[:, :START]).mean()), 4),
        "after": round(float(np.abs(errors[:, START:]).mean()), 4),
        "bias": round(float(errors[:, START:].mean()), 4),
        "alerted": sum(alerted),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        f"| change | accuracy before and after | error, skiff | error, {PEER} | alerted, skiff | alerted, {PEER} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["change"], f"{row['before']:.3f} to {row['after']:.3f}"]
        told = [row["skiff"], row[PEER]]
        cells += [one.get("reason") or f"{one['after']:.4f}" for one in told]
        cells += ["-" if "reason" in one else f"{one['alerted']} of {row['fleets']}" for one in told]
        lines.append(f"| {' | '.join(cells)} |")
    apart = max(row["apart"] for row in rows)
    return [
        *lines,
        "",
        f"skiff's estimate from sums and the same from raw scores differ by {apart:.1e} at most.",
    ]
