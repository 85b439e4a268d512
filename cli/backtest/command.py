"""The command itself: read, replay, judge, tell."""

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from aggregator.config import DriftConfig
from aggregator.config import load as load_aggregator
from cli.backtest.replay import Replay, parse_window, replay
from cli.backtest.table import Columns, read_table
from cli.output import JsonFlag, note, print_json, progress, reported
from edge_runtime.contract.errors import ConfigError
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

        with ThreadPoolExecutor(1) as beside:  # the judge's libraries load while Arrow decodes
            loaded = beside.submit(import_module, "cli.backtest.outcome")
            history = replayed(reference).slices if reference is not None else ()
            found = replayed(data)
            loaded.result()
        from cli.backtest.outcome import document, judge

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
            from cli.backtest.telling import tell

            tell(outcome)
