"""`skiff labels import`: what became known later of devices' rows, from a file into the aggregator's store.

Rows become counts by device and period of UTC; no row is kept. They go through the same checks and into the same table
as the labels that a source publishes, but straight into the store that the aggregator's configuration names: this is a
command for the aggregator's host, as `skiff rollout` is, and so it can say what was new when it returns, also while the
broker or the aggregator is down. A laboratory elsewhere publishes (docs/how-to/late-labels.md).

A period's number is its first second, so that a source's period is counted once, in whatever file and order it comes.
"""

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer

from aggregator.adapters.registry import Registry
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig, load
from aggregator.core.ingest import check_labels
from aggregator.records import Selection
from aggregator.stores import WindowStore
from cli.backtest.replay import EveryPeriod, parse_window, right_answers
from cli.backtest.table import Columns, Told, read_table, read_told
from cli.output import FAILED, JsonFlag, note, out, print_json, progress, reported
from cli.texts import listed
from edge_runtime.contract import ids
from edge_runtime.contract.codec import encode
from edge_runtime.contract.errors import ConfigError, ContractError, InputError
from edge_runtime.contract.ids import Digest, ModelName, SourceId
from edge_runtime.contract.messages import Labels
from edge_runtime.engine import Engine

AT_ONCE: Final = 500
"""Messages in one transaction: what devices send meanwhile must not wait for long."""
SHOWN: Final = 5

labels_app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="What became known later of rows that devices predicted."
)


@labels_app.callback()
def _labels() -> None:
    """What became known later of rows that devices predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What a file came to: messages that were new, known already, and in contradiction with what was told before."""

    source: SourceId
    digest: Digest
    devices: int
    labelled: int
    correct: int
    new: int
    known: int
    contradictions: tuple[str, ...]


@labels_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Rows of many devices: .csv or .parquet.")],
    *,
    aggregator: Annotated[Path, typer.Option("--aggregator", "-a", help="The aggregator's TOML file.")],
    model: Annotated[str, typer.Option(help="The model family that predicted.")],
    device_column: Annotated[str, typer.Option(help="Column that says whose a row is.")],
    time_column: Annotated[
        str,
        typer.Option(
            help="Column that says when it was predicted: timestamps, ISO 8601, or numbers since 1970."
        ),
    ],
    label_column: Annotated[str, typer.Option(help="Column with the truth.")] = "",
    prediction_column: Annotated[str, typer.Option(help="Column with what the device answered.")] = "",
    correct_column: Annotated[str, typer.Option(help="Instead of both: column with 1 (right) or 0.")] = "",
    artifact: Annotated[
        str,
        typer.Option(
            help="What predicted: the beginning of its digest, or model.onnx, which predicts again where the file has "
            "features and no predictions. Not needed where only one artifact of the model sent windows."
        ),
    ] = "",
    period: Annotated[str, typer.Option(help="What is counted together: 90s, 15m, 1h, at most 1d.")] = "1h",
    source: Annotated[str, typer.Option(help="Who tells; by default the file's name.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Count what a file knows of right answers; importing it again changes nothing."""
    with reported():
        if correct_column and (label_column or prediction_column):
            raise ConfigError(
                "--correct-column says it all: leave out --label-column and --prediction-column"
            )
        if not correct_column and not label_column:
            raise ConfigError("give --label-column with the truth, or --correct-column with 1 or 0")
        rule = parse_window(period)
        if not isinstance(rule, EveryPeriod) or rule.policy.period_ns % 10**9:
            raise ConfigError(f"--period {period!r}: give a time in whole seconds: 90s, 15m, 1h, at most 1d")
        columns = Columns(device=device_column, time=time_column, labels=label_column)
        told, predicted_by = _read(file, columns, prediction_column, correct_column, artifact)
        for text in told.notes:
            note(f"note: {text}")
        config, name = load(aggregator), ids.model_name(model)
        store = Windows(config.windows_path, dead_letters=config.ingest.dead_letters)
        try:
            digest = predicted_by or _digest(store, name, artifact)
            found = counted(told, rule.policy.period_ns, _source(file, source), name, digest, where=str(file))
            _check(config, store, found, rule.policy.period_ns, named=bool(source))
            done = _put(store, found)
        finally:
            store.close()
        _tell(done, as_json=as_json)
        if done.contradictions:
            raise typer.Exit(FAILED)


def _read(
    file: Path, columns: Columns, prediction: str, correct: str, artifact: str
) -> tuple[Told, Digest | None]:
    """The rows, and the artifact if it had to be read."""
    by_file = artifact.endswith(".onnx")
    digest = None
    if by_file:
        try:
            digest = ids.digest_of(Path(artifact).read_bytes())
        except OSError as e:
            raise ConfigError(f"--artifact {artifact}: cannot be read ({e.strerror or e})") from e
    if prediction or correct:
        return read_told(file, columns, prediction=prediction, correct=correct), digest
    if not by_file:
        raise ConfigError(
            "give --prediction-column with what devices answered, or --artifact model.onnx to predict again from the "
            "file's features"
        )
    engine = Engine(Path(artifact))
    table = read_table(file, engine.info.manifest, columns)
    with progress(f"predict {file.name}") as bar:
        known, right = right_answers(engine, table, bar)
    told = Told(
        devices=table.devices,
        device=table.device,
        times_ns=table.times_ns,
        known=known,
        right=right,
        notes=table.notes,
    )
    return told, digest


def _source(file: Path, source: str) -> SourceId:
    if source:
        return ids.source_id(source)
    return ids.source_id(re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).strip("-")[:64] or "file")


def _digest(store: WindowStore, model: ModelName, start: str) -> Digest:
    """The artifact of the model whose digest begins so, among those that sent windows."""
    if re.fullmatch(ids.DIGEST, start):
        return Digest(start)
    sent = sorted({total.digest for total in store.totals(Selection(model=model))})
    found = [digest for digest in sent if digest.startswith(start)]
    if len(found) == 1:
        return found[0]
    if not sent:
        raise ConfigError(
            f"--model {model}: no device has sent a window of it; give the whole digest as --artifact"
        )
    raise ConfigError(
        f"--artifact {start or 'is needed'}: {model!r} has {listed([digest[:16] for digest in sent])}"
    )


def counted(
    told: Told, period_ns: int, source: SourceId, model: ModelName, digest: Digest, *, where: str
) -> tuple[Labels, ...]:
    """One message for each device and period with any known row, sorted; rows may come in any order.

    Raises:
        InputError: nothing is known of any row, or a device has a name that no device can have.
    """
    periods = told.times_ns[told.known] // period_ns
    if not len(periods):
        raise InputError(
            "type", f"{where}: of none of its {len(told.times_ns)} rows is known whether it was right"
        )
    keys = np.stack([told.device[told.known].astype(np.int64), periods])
    groups, place = np.unique(keys, axis=1, return_inverse=True)
    place = place.ravel()
    labelled = np.bincount(place)
    correct = np.bincount(place, weights=told.right[told.known]).astype(np.int64)
    session = ids.session_id(secrets.token_hex(8))
    found = []
    for (device, index), n, right in zip(groups.T.tolist(), labelled.tolist(), correct.tolist(), strict=True):
        start_ns = index * period_ns
        one = Labels(
            device=told.devices[device],
            session=session,
            seq=start_ns // 10**9,
            source=source,
            model=model,
            digest=digest,
            start_ns=start_ns,
            end_ns=start_ns + period_ns,
            labelled=n,
            correct=right,
        )
        try:
            encode(one)  # what no source may publish is not stored either
        except ContractError as e:
            raise InputError("type", f"{where}: {e}") from e
        found.append(one)
    return tuple(found)


def _check(
    config: AggregatorConfig, store: WindowStore, found: Sequence[Labels], period_ns: int, *, named: bool
) -> None:
    """Raises what keeps the labels from being counted rightly."""
    first = found[0]
    info = Registry(config.registry).info(first.digest, now=True)
    if info is not None:
        check_labels(first, info)
    known = store.periods(first.source)
    if known and known != (period_ns,):
        raise ConfigError(
            f"--period: source {first.source!r} was counted by {listed([f'{ns / 1e9:g} s' for ns in known])} before; "
            "rows counted by another period would count twice: give that period, or another --source for other rows"
        )
    twins = {} if named else store.twins(found)
    for other, n in twins.items():
        if n == len(found) and not known:
            raise ConfigError(
                f"all {n} counts of this file are in the store already, told by {other!r}: the same rows under another "
                f"name? Give --source {other} if so, and nothing changes, or --source {first.source} if they are others"
            )
    sent = {total.device for total in store.totals(Selection(digest=first.digest))}
    strangers = sorted({one.device for one in found} - sent)
    if strangers:
        note(
            f"note: {len(strangers)} devices have sent no window of {first.digest[:16]}, so there is no estimate "
            f"beside their labels: {listed(strangers)}"
        )


def _put(store: WindowStore, found: Sequence[Labels]) -> Imported:
    new, wrong = 0, list[str]()
    with progress("count labels") as bar:
        for start in range(0, len(found), AT_ONCE):
            part = found[start : start + AT_ONCE]
            stored = store.append([], [], [], time.time_ns(), labels=part)
            new += stored.labels
            wrong += stored.contradictions
            bar("counts", start + len(part), len(found))
    return Imported(
        source=found[0].source,
        digest=found[0].digest,
        devices=len({one.device for one in found}),
        labelled=sum(one.labelled for one in found),
        correct=sum(one.correct for one in found),
        new=new,
        known=len(found) - new - len(wrong),
        contradictions=tuple(wrong),
    )


def _tell(done: Imported, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "source": done.source,
                "digest": done.digest,
                "devices": done.devices,
                "labelled": done.labelled,
                "correct": done.correct,
                "new": done.new,
                "known": done.known,
                "contradictions": list(done.contradictions),
            }
        )
    else:
        out.print(
            f"{done.labelled} labelled rows of {done.devices} devices, {done.correct} right, as source {done.source}: "
            f"{done.new} counts are new, {done.known} were known",
            markup=False,
        )
    for why in done.contradictions[:SHOWN]:
        note(f"not counted: {why}")
    if len(done.contradictions) > SHOWN:
        note(f"and {len(done.contradictions) - SHOWN} more; the dead letters have all of them")
