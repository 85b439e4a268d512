"""The command itself: read, replay, judge, tell."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from aggregator.config import DriftConfig
from aggregator.config import load as load_aggregator
from cli.backtest.outcome import Outcome, accuracy, document, judge, moment, rows_of, span
from cli.backtest.replay import Replay, parse_window, replay
from cli.backtest.table import Columns, read_table
from cli.output import JsonFlag, note, out, print_json, progress, reported
from edge_runtime.contract.errors import ConfigError
from edge_runtime.engine import Engine

MOST_SHOWN = 40
WORST = 3


def backtest(
    model: Annotated[Path, typer.Argument(help="A proven artifact, model.onnx.")],
    data: Annotated[Path, typer.Argument(help="Raw rows of many devices: .parquet or .csv.")],
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
        Path | None, typer.Option(help="An aggregator's TOML file, for its [drift] section.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with plots here, too.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Replay raw rows through the devices' windows and the aggregator's judge: which alarms, and when."""
    with reported():
        rule = parse_window(window)
        drift = load_aggregator(config).drift if config is not None else DriftConfig()
        if report is not None and not report.parent.is_dir():
            raise ConfigError(f"--report {report}: there is no folder {report.parent}")
        engine = Engine(model)
        columns = Columns(device=device_column, time=time_column, labels=labels)
        notes: list[str] = []

        def replayed(path: Path) -> Replay:
            table = read_table(path, engine.info.manifest, columns)
            with progress(f"replay {path.name}") as bar:
                found = replay(engine, table, rule, bar)
            notes.extend([*table.notes, *(f"{path}: {text}" for text in found.notes)])
            if not found.slices:
                raise ConfigError(
                    f"{path}: no device has rows enough for one window of {window}; choose a shorter one"
                )
            return found

        history = replayed(reference).slices if reference is not None else ()
        found = replayed(data)
        outcome = judge(engine.info, history, found.slices, drift)
        notes.extend(outcome.notes)
        for text in notes:
            note(f"note: {text}")
        if report is not None:
            from cli.backtest.page import render

            report.write_text(render(outcome, notes, data.name), encoding="utf-8")
            note(f"wrote {report}")
        if as_json:
            print_json(document(outcome, notes))
        else:
            _tell(outcome)


def _tell(outcome: Outcome) -> None:
    for alarm in sorted(outcome.alarms, key=lambda alarm: alarm.opened_window):
        what = f"{alarm.kind} of {alarm.feature}" if alarm.feature is not None else alarm.kind
        colour = "red" if alarm.severity == "page" else "yellow"
        head = Text(f"{alarm.severity:7}", style=f"bold {colour}").append(what, style="bold")
        out.print(head, f"windows {span(alarm)}, {_few(alarm.devices)}", sep="  ", markup=False)
        out.print(f"       {alarm.why}", markup=False)
    if not outcome.alarms:
        out.print("no alarm")
    for wish in outcome.wishes:
        out.print(f"retrain request at window {wish.window}: {wish.why}", markup=False)
    if not outcome.wishes:
        out.print("no retrain request")
    _tell_windows(outcome)


def _few(devices: tuple[str, ...]) -> str:
    return ", ".join(devices) if len(devices) <= WORST else f"{len(devices)} devices"


def _tell_windows(outcome: Outcome) -> None:
    names = {feature.name for feature in outcome.info.manifest.features}
    labelled = any(accuracy(found) is not None for found in outcome.slices)
    head = ["window", "from", "devices", "rows", *(["accuracy"] if labelled else []), "moved most (KS)"]
    grid = Grid(*head, box=box.SIMPLE, pad_edge=False)
    worst = [
        sorted(((f.ks, name) for name, f in figures.items() if name in names), reverse=True)[:WORST]
        for figures in outcome.figures
    ]
    shown = sorted(sorted(range(len(worst)), key=lambda k: worst[k], reverse=True)[:MOST_SHOWN])
    if len(shown) < len(worst):
        out.print(f"the {MOST_SHOWN} windows of {len(worst)} in which a feature moved most:")
    for k in shown:
        found = outcome.slices[k]
        right = accuracy(found)
        grid.add_row(
            str(found.index),
            moment(found.start_ns)[5:16].replace("T", " "),
            str(len(found.readings)),
            str(rows_of(found)),
            *([f"{right:.3f}" if right is not None else ""] if labelled else []),
            escape(", ".join(f"{name} {ks:.2f}" for ks, name in worst[k])),
        )
    out.print(grid)
