"""``skiff backup`` and ``skiff restore``: both stores of an aggregator, in a folder."""

import datetime as dt
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from aggregator.adapters import backups
from aggregator.config import load
from cli.output import JsonFlag, note, out, print_json, reported
from edge_runtime import __version__

Config = Annotated[Path, typer.Argument(help="The aggregator's TOML file.")]


def backup(
    config: Config,
    folder: Annotated[Path, typer.Option("--out", "-o", help="A new or empty folder for the backup.")],
    as_json: JsonFlag = False,
) -> None:
    """Copy the ledger and the windows, each as it is at one moment, while the aggregator runs."""
    with reported():
        made = backups.back_up(_places(config), folder, skiff=__version__, now=dt.datetime.now(dt.UTC))
        _tell(made, as_json)
        note(f"written to {folder}; keys, registry and configuration are not in it")


def restore(
    config: Config,
    folder: Annotated[Path, typer.Argument(help="The backup's folder.")],
    force: Annotated[bool, typer.Option("--force", help="Replace stores that are there.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Put the stores of a backup in place. The aggregator must not be running."""
    with reported():
        _tell(backups.restore(_places(config), folder, force=force), as_json)
        note("restored; start the aggregator (skiff serve)")


def _places(config: Path) -> backups.Places:
    found = load(config)
    return backups.Places(fleet=found.fleet, ledger=found.ledger_at, windows=found.windows_path)


def _tell(found: backups.Backup, as_json: bool) -> None:
    if as_json:
        print_json(asdict(found))
        return
    out.print(f"fleet {found.fleet}, made {found.made} by skiff {found.skiff}", markup=False)
    for name, copied in (("ledger", found.ledger), ("windows", found.windows)):
        size = f"{copied.size_bytes:,} bytes"
        out.print(f"{name:8} {size}, version {copied.version}, SHA-256 {copied.sha256}", markup=False)
