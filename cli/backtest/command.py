"""The command itself: read, replay, judge, tell."""

import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from aggregator.config import DriftConfig
from aggregator.config import load as load_aggregator
from aggregator.config.drift import read_drift
from aggregator.looks import Slice
from cli.backtest.baseline import history_of
from cli.backtest.replay import EveryRows, Replay, Rule, counted, parse_window, replay
from cli.backtest.table import Columns, read_table
from cli.output import JsonFlag, note, print_json, progress, reported
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.fields import Fields
from edge_runtime.engine import Engine


def backtest(
    model: Annotated[Path, typer.Argument(help="A proven artifact, model.onnx.")],
    data: Annotated[Path, typer.Argument(help="Raw rows of many devices: .parquet, .csv or .csv.gz.")],
    *,
    device_column: Annotated[str, typer.Option(help="Column that says whose a row is.")],
    time_column: Annotated[
        str, typer.Option(help="Column that says when: timestamps, ISO 8601 text, or numbers since 1970.")
    ],
    window: Annotated[
        str, typer.Option(help="rows:1000 (rows of a device each), or a time: 90s, 15m, 1h, at most 1d.")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Known-good history of the same devices, columns as in the data; "
            "without it the training profile is the baseline."
        ),
    ] = None,
    labels: Annotated[str, typer.Option(help="Column with the truth, for the real accuracy.")] = "",
    config: Annotated[
        Path | None, typer.Option(help="An aggregator's TOML file, for its \\[drift] section.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with plots here, too.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Replay raw rows through the devices' windows and the aggregator's judge: which alarms, and when."""
    with reported():
        rule = parse_window(window)
        drift = _drift_of(config) if config is not None else DriftConfig()
        if report is not None:
            from cli.page import check_place

            check_place(report)
        engine = Engine(model)
        columns = Columns(device=device_column, time=time_column, labels=labels)
        notes: list[str] = []

        def replayed(path: Path, *, truth_needed: bool) -> Replay:
            table = read_table(path, engine.info.manifest, columns, truth_needed=truth_needed)
            with progress(f"replay {path.name}") as bar:
                found = replay(engine, table, rule, bar)
            notes.extend([*table.notes, *(f"{path}: {text}" for text in found.notes)])
            if not found.slices:
                raise ConfigError(f"{path}: {_no_window(window, rule, found)}")
            return found

        with ThreadPoolExecutor(1) as beside:  # the judge's libraries load while Arrow decodes
            loaded = beside.submit(import_module, "cli.backtest.outcome")
            past = replayed(reference, truth_needed=False) if reference is not None else None
            found = replayed(data, truth_needed=True)
            loaded.result()
        from cli.backtest.outcome import document, judge

        history: tuple[Slice, ...] = ()
        if reference is not None and past is not None:
            history, about = history_of(reference, past, data, found, drift.baseline_looks)
            notes.extend(about)
        outcome = judge(engine.info, history, found.slices, drift)
        notes.extend(outcome.notes)
        for text in notes:
            note(f"note: {text}")
        from cli.backtest.telling import printing, tell

        with printing():
            if as_json:
                print_json(document(outcome, notes))
            else:
                tell(outcome)
        if report is not None:
            from cli.backtest.page import render
            from cli.page import write

            write(report, render(outcome, notes, data.name))
            note(f"wrote {report}")


def _drift_of(path: Path) -> DriftConfig:
    """The ``[drift]`` of an aggregator's file, or of one that holds nothing else."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = {}  # what is wrong with it is said below
    if set(document) == {"drift"}:
        return read_drift(Fields(document, str(path), ConfigError).section("drift"))
    return load_aggregator(path).drift


def _no_window(window: str, rule: Rule, found: Replay) -> str:
    device, most = max(found.spans.items(), key=lambda item: item[1].rows)
    has = f"(the most, {counted(most.rows, 'row')}, has {device})"
    if isinstance(rule, EveryRows):
        return f"no device has rows enough for one window of {window} {has}; choose a shorter one"
    return (
        f"no device has a window of {window}: it stays open until the model has answered {rule.policy.min_rows} rows "
        f"of the device {has}; take --window rows:N with N of at most {most.rows}"
    )
