"""``skiff drift --replay``: what would have been alarmed over the windows that are stored, judged another way."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.registry import Registry
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig, DriftConfig, load
from aggregator.records import Receipt, Selection
from aggregator.replaying import Replayed, Taken, replayed, same_taking
from cli.backtest.outcome import Outcome, document, moment
from cli.backtest.telling import tell
from cli.output import note, out, print_json, progress
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.manifest import ArtifactInfo

MOST_LOOKS: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is replayed: artifacts whose digest begins with ``artifact``, served ones only unless ``all_of_them``."""

    artifact: str = ""
    all_of_them: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stored:
    """An aggregator's configuration and its stores, open to read."""

    config: AggregatorConfig
    ledger: Ledger
    windows: Windows


def replay(path: Path, other: Path | None, choice: Choice, report: Path | None, *, as_json: bool) -> None:
    """Replays what the aggregator of ``path`` has stored under the ``[drift]`` of ``other``, and tells the outcome."""
    config = load(path)
    drift = load(other).drift if other is not None else config.drift
    with (
        closing(Ledger(config.ledger_at, read_only=True)) as ledger,
        closing(Windows(config.windows_path, read_only=True)) as windows,
    ):
        stored = _Stored(config=config, ledger=ledger, windows=windows)
        found = list(_artifacts(stored, choice))
        if not found:
            raise ConfigError(_nothing(stored, choice))
        if report is not None and len(found) > 1:
            names = ", ".join(digest[:8] for digest, _ in found)
            raise ConfigError(f"--report: a page shows one artifact; name it with --artifact, one of {names}")
        told, pages = [], list[str]()
        for digest, info in found:
            outcome, notes, at_ns = _judged(stored, drift, digest, info)
            name = f"{info.manifest.name} {digest[:8]}"
            for text in notes:
                note(f"note: {name}: {text}")
            told.append(_document(outcome, notes, digest, at_ns))
            if not as_json:
                out.print(name, style="bold", markup=False)
                tell(outcome)
            if report is not None:
                from cli.backtest.page import render

                pages.append(render(outcome, notes, str(config.windows_path)))
    if as_json:
        print_json({"artifacts": told})
    if report is not None:
        from cli.page import write

        write(report, *pages)
        note(f"wrote {report}")


def _artifacts(stored: _Stored, choice: Choice) -> Iterator[tuple[Digest, ArtifactInfo]]:
    registry, windows = Registry(stored.config.registry), stored.windows
    served = {report.serving for device in stored.ledger.devices() for report in device.models}
    for digest in sorted({digest for digest, _, _ in windows.streams()}):
        wanted = (
            digest.startswith(choice.artifact) if choice.artifact else choice.all_of_them or digest in served
        )
        info = registry.info(digest) if wanted else None
        if info is not None and windows.receipts(digest):
            yield digest, info


def _nothing(stored: _Stored, choice: Choice) -> str:
    config = stored.config
    known = ", ".join(sorted({digest[:8] for digest, _, _ in stored.windows.streams()})) or "none"
    if choice.artifact:
        return f"--artifact {choice.artifact}: no such artifact in {config.registry} has windows; there are {known}"
    return (
        f"{config.windows_path}: no artifact that a device serves has windows that are kept one by one; "
        f"--all takes the others too ({known})"
    )


def _judged(
    stored: _Stored, drift: DriftConfig, digest: Digest, info: ArtifactInfo
) -> tuple[Outcome, list[str], tuple[int, ...]]:
    ledger, windows = stored.ledger, stored.windows
    oldest = windows.receipts(digest)[0]
    rows = [row for row in ledger.table("look_times", MOST_LOOKS) if row["digest"] == digest]
    looks = [
        (row["look"], Taken(row["at_ns"], row["newest"])) for row in sorted(rows, key=lambda row: row["look"])
    ]
    gone = [number for number, look in looks if _is_before(look, oldest)]
    first = gone[-1] + 1 if gone else min((number for number, _ in looks), default=0)
    recorded = tuple(look for number, look in looks if number >= first)
    notes = list(_caveats(windows, digest, oldest.received_ns, first))
    taken: tuple[Taken, ...] = ()
    if recorded and same_taking(drift, stored.config.drift):
        taken = recorded
    else:
        notes.append(
            "looks are taken anew, when enough had come: when the aggregator looked is of no use here"
        )
    with progress(f"replay {info.manifest.name}") as bar:
        found = replayed(
            windows,
            info,
            digest,
            drift,
            taken=taken,
            first_looks=[one for one in ledger.first_looks(digest) if one.index < first],
            first_index=first,
            attributes={record.device: dict(record.attributes) for record in ledger.devices()},
            progress=lambda done, of: bar("looks", done, of),
        )
    if not found.looks:
        raise ConfigError(
            f"{info.manifest.name} {digest[:8]}: the stored windows are not enough for one look "
            f"({drift.horizon_rows} rows, {drift.horizon_seconds:.0f} s of each device); choose a shorter horizon"
        )
    return _outcome(info, found), [*notes, *found.notes], found.at_ns


def _is_before(look: Taken, oldest: Receipt) -> bool:
    """Whether nothing that the look saw is kept one by one."""
    return look.newest < oldest.number if look.newest else look.at_ns < oldest.received_ns


def _caveats(windows: Windows, digest: Digest, oldest_ns: int, first: int) -> Iterator[str]:
    totals = windows.totals(Selection(digest=digest))
    if min(t.first_ns for t in totals) < oldest_ns:
        yield (
            f"windows received before {moment(oldest_ns)} are rolled up and cannot be looked at again; "
            f"the replay begins with look {first}, with the past that the ledger remembers of the devices"
        )
    if any(True for _ in windows.late(digest, {})):
        yield "labels that came later than their windows are not counted in a replay"
    yield "cohorts are by the attributes that devices have now; who was online when is not kept"


def _outcome(info: ArtifactInfo, found: Replayed) -> Outcome:
    return Outcome(
        info=info,
        history=(),
        slices=found.slices,
        figures=tuple(look.figures for look in found.looks),
        estimates=tuple(look.estimate for look in found.looks),
        alarms=found.alarms,
        wishes=found.wishes,
        notes=found.notes,
    )


def _document(outcome: Outcome, notes: list[str], digest: Digest, at_ns: tuple[int, ...]) -> dict[str, Any]:
    made = document(outcome, notes)
    for shown, ns in zip(made["windows"], at_ns, strict=True):
        shown["looked"] = moment(ns)
    return {"digest": digest, "model": outcome.info.manifest.name, **made}
