"""What a fleet's judge would have said about replayed slices, and its JSON document."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aggregator.config import DriftConfig
from aggregator.core.judge import Judge
from aggregator.looks import Alarm, Estimate, Familiar, Slice, Wish
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import ArtifactInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was replayed and what came of it.

    ``figures`` has for each slice the familiar figures of every feature and of ``score``; ``estimates`` the accuracy
    of devices, estimated and known. ``history`` is what ``--reference`` came to; ``learned`` of the first slices became
    the devices' past instead, where that is known.
    """

    info: ArtifactInfo
    history: tuple[Slice, ...]
    slices: tuple[Slice, ...]
    figures: tuple[Mapping[str, Familiar], ...]
    estimates: tuple[Estimate, ...]
    alarms: tuple[Alarm, ...]
    wishes: tuple[Wish, ...]
    notes: tuple[str, ...]
    learned: int = 0


def judge(
    info: ArtifactInfo, history: Sequence[Slice], slices: Sequence[Slice], drift: DriftConfig
) -> Outcome:
    """Shows ``slices`` to the aggregator's judge, one look after another."""
    judging = Judge(info, drift, looks=len(slices), history=history)
    looks = [judging.look(found) for found in slices]
    first = 0 if history else learned(slices, drift.baseline_looks)
    return Outcome(
        info=info,
        history=tuple(history),
        slices=tuple(slices),
        figures=tuple(look.figures for look in looks),
        estimates=tuple(look.estimate for look in looks),
        alarms=tuple(judging.alarms),
        wishes=tuple(judging.wishes),
        notes=(*_of_learning(first, slices), *judging.notes),
        learned=first,
    )


def learned(slices: Sequence[Slice], need: int) -> int:
    """How many of the first slices become the devices' past: until the first device has ``need`` windows; 0 if none."""
    windows: Counter[DeviceId] = Counter()
    for k, one in enumerate(slices):
        windows.update(reading.device for reading in one.readings if reading.profile.rows)
        if max(windows.values(), default=0) >= need:
            return k + 1
    return 0


def _of_learning(first: int, slices: Sequence[Slice]) -> Iterator[str]:
    if first:
        rest = f"from {first} on windows were" if first < len(slices) else "there is none after them to be"
        yield f"windows 0 to {first - 1} were learned as the devices' past; {rest} judged against it"
    if not any(map(rows_of, slices)):
        yield "the model answers none of the rows: nothing was judged"


def accuracy(found: Slice) -> float | None:
    """The share of a slice's labelled rows that were predicted right; None where no label is known."""
    labelled = sum(reading.labelled for reading in found.readings)
    return sum(reading.correct for reading in found.readings) / labelled if labelled else None


def rows_of(found: Slice) -> int:
    """How many rows of the slice the model answered."""
    return sum(reading.profile.rows for reading in found.readings)


def refused_of(found: Slice) -> Counter[str]:
    """How many rows of the slice the model refused, by reason."""
    refused: Counter[str] = Counter()
    for reading in found.readings:
        refused.update(dict(reading.refused))
    return refused


def moment(at_ns: int) -> str:
    """ISO 8601 in UTC, as exact as the time is, down to microseconds."""
    seconds, rest_ns = divmod(at_ns, 1_000_000_000)
    text = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest_ns // 1000).isoformat()
    return text.replace("+00:00", "Z")


def span(alarm: Alarm) -> str:
    """From which window to which an alarm stood."""
    return f"{alarm.opened_window} to {'the end' if alarm.closed_window is None else alarm.closed_window}"


def document(outcome: Outcome, notes: Sequence[str]) -> dict[str, Any]:
    """The outcome for a machine; figures that are not finite are null."""
    names = [feature.name for feature in outcome.info.manifest.features]
    return {
        "windows": [
            _window(found, figures, estimate, names)
            for found, figures, estimate in zip(
                outcome.slices, outcome.figures, outcome.estimates, strict=True
            )
        ],
        "alarms": [
            {
                "kind": alarm.kind,
                "feature": alarm.feature,
                "opened_window": alarm.opened_window,
                "closed_window": alarm.closed_window,
                "devices": list(alarm.devices),
                "severity": alarm.severity,
                "why": alarm.why,
                "cohort": alarm.cohort,
                "evidence": {name: _finite(value) for name, value in alarm.evidence},
            }
            for alarm in outcome.alarms
        ],
        "retrain_requests": [
            {"window": wish.window, "why": wish.why, "cohort": wish.cohort} for wish in outcome.wishes
        ],
        "notes": list(notes),
    }


def _window(
    found: Slice, figures: Mapping[str, Familiar], estimate: Estimate, names: Sequence[str]
) -> dict[str, Any]:
    return {
        "index": found.index,
        "start": moment(found.start_ns),
        "end": moment(found.end_ns),
        "devices": len(found.readings),
        "rows": rows_of(found),
        "refused": dict(sorted(refused_of(found).items())),
        "accuracy": accuracy(found),
        "estimated_accuracy": estimate.estimated,
        "estimate_error": estimate.error,
        "estimate_error_half": estimate.error_half,
        "features": {name: _figures(figures.get(name)) for name in names},
    }


def _figures(found: Familiar | None) -> dict[str, Any]:
    """A feature's figures, all null in a window without an answered row."""
    if found is None:
        return dict.fromkeys(("psi", "ks", "chi2", "js", "wasserstein"))
    return {
        "psi": _finite(found.psi),
        "ks": _finite(found.ks),
        "chi2": _finite(found.chi2),
        "js": _finite(found.js),
        "wasserstein": _finite(found.wasserstein_sd),
    }


def _finite(value: float | str) -> float | str | None:
    return value if isinstance(value, str) or math.isfinite(value) else None
