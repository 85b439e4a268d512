"""Commands about what moved: ``drift``, ``incidents``, ``acknowledge``."""

import getpass
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from aggregator.records import Accuracy
from cli.output import JsonFlag, note, out, print_json, reported
from cli.view import FleetView
from edge_runtime.contract.errors import ConfigError, SkiffError

ConfigArgument = Annotated[Path, typer.Argument(help="The aggregator's TOML file.")]

NAMED: Final = 3
STYLES: Final = {"stable": "green", "warning": "yellow", "drifted": "bold red", "page": "bold red"}
MOST_ROWS: Final = 10_000


class NoIncident(SkiffError):
    """There is nothing to acknowledge."""


def drift(
    config: ConfigArgument,
    *,
    all_of_them: Annotated[
        bool, typer.Option("--all", help="Also of artifacts that no device serves any more.")
    ] = False,
    replay: Annotated[
        bool, typer.Option("--replay", help="Judge the stored windows again: which alarms, and when.")
    ] = False,
    other: Annotated[
        Path | None,
        typer.Option("--config", help="With --replay: another TOML file, for its \\[drift] section."),
    ] = None,
    artifact: Annotated[str, typer.Option(help="With --replay: only artifacts whose digest begins so.")] = "",
    report: Annotated[
        Path | None, typer.Option(help="With --replay: write a page with plots here, too.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what stands, for every artifact, cohort and kind, the incidents that are open, and the accuracy known."""
    with reported():
        if replay:
            _replay(config, other, artifact, report, all_of_them=all_of_them, as_json=as_json)
            return
        given = {"--config": other, "--artifact": artifact, "--report": report}
        if named := [name for name, value in given.items() if value]:
            raise ConfigError(f"{', '.join(named)}: is for a replay; add --replay")
        view = FleetView(config)
        verdicts, incidents = view.table("verdicts", MOST_ROWS), view.table("open_incidents", MOST_ROWS)
        served = {report.serving for device in view.devices() for report in device.models}
        known = view.accuracies()
        if not all_of_them:
            verdicts = tuple(row for row in verdicts if row["digest"] in served)
            known = tuple(one for one in known if one.digest in served)
        if as_json:
            accuracy = [asdict(one) for one in known]
            print_json({"verdicts": verdicts, "incidents": incidents, "accuracy": accuracy})
            return
        if not verdicts:
            note("nothing stands yet for an artifact that a device serves")
        if known:
            out.print(accuracy_table(known))
        if not verdicts:
            return
        out.print(_verdict_table(verdicts))
        if incidents:
            out.print(_incident_table(incidents, all_of_them=False))
        else:
            out.print("no open incident")


def _replay(
    config: Path, other: Path | None, artifact: str, report: Path | None, *, all_of_them: bool, as_json: bool
) -> None:
    from cli.replay import Choice
    from cli.replay import replay as replay_stored

    if report is not None:
        from cli.page import check_place

        check_place(report)
    replay_stored(config, other, Choice(artifact=artifact, all_of_them=all_of_them), report, as_json=as_json)


def incidents(
    config: ConfigArgument,
    all_of_them: Annotated[bool, typer.Option("--all", help="Closed ones too, newest first.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the open incidents: what moved where, since when, and who has seen it."""
    with reported():
        view = FleetView(config)
        rows = view.table("incidents" if all_of_them else "open_incidents", MOST_ROWS)
        if as_json:
            print_json(rows)
        elif rows:
            out.print(_incident_table(rows, all_of_them=all_of_them))
        else:
            out.print("no incident" if all_of_them else "no open incident")


def acknowledge(
    config: ConfigArgument,
    number: Annotated[int, typer.Argument(help="The incident's number, from `skiff incidents`.")],
    by: Annotated[str, typer.Option(help="Who has seen it, for the audit log; you, by default.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Say that somebody looks after an open incident."""
    with reported():
        view = FleetView(config)
        who = by or getpass.getuser()
        taken = view.acknowledge(number, by=who)
        row = next((row for row in view.table("incidents", MOST_ROWS) if row["id"] == number), None)
        if row is None:
            raise NoIncident(f"there is no incident {number}; `skiff incidents {config} --all` lists them")
        if not taken and row["closed_ns"] is not None:
            raise NoIncident(f"incident {number} is closed since {_time(row['closed_ns'])} UTC")
        if not taken:
            seen = f"{row['acknowledged_by']} at {_time(row['acknowledged_ns'])} UTC"
            raise NoIncident(f"incident {number} was acknowledged already, by {seen}")
        if as_json:
            print_json(row)
        else:
            out.print(f"incident {number} is acknowledged by {who}", markup=False)


def _verdict_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table()
    table.add_column("model", no_wrap=True)
    table.add_column("cohort", overflow="fold")
    table.add_column("kind", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("p", no_wrap=True, justify="right")
    table.add_column("devices", no_wrap=True, justify="right")
    table.add_column("moved, or lacking", ratio=1, overflow="fold")
    for row in rows:
        verdict = row["document"]
        judged = verdict["outcome"] != "insufficient"
        moved = _listed(verdict["moved"])
        table.add_row(
            Text(f"{row['model']} {row['digest'][:8]}"),
            Text(row["cohort"]),
            row["kind"],
            Text(row["outcome"], STYLES.get(row["outcome"], "dim")),
            f"{verdict['p']:.2g}" if judged else "",
            str(verdict["judged"]) if judged else "",
            Text(moved if judged else row["reason"]),
        )
    return table


def accuracy_table(known: Sequence[Accuracy]) -> Table:
    """What is known of right answers, beside the estimate of the same devices and times."""
    table = _table()
    table.add_column("model", overflow="fold")
    table.add_column("cohort", overflow="fold")
    for name in ("devices", "labelled", "accuracy", "estimated", "its error"):
        table.add_column(name, no_wrap=True, justify="right")
    for one in known:
        table.add_row(
            Text(f"{one.model} {one.digest[:8]}"),
            Text(one.cohort),
            str(one.devices),
            str(one.labelled),
            _with_half(one.known, one.half),
            _with_half(one.estimated, None),
            _with_half(one.error, one.error_half, sign="+"),
        )
    return table


def _with_half(value: float | None, half: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.3f}" if half is None else f"{value:{sign}.3f} ± {half:.3f}"


def _incident_table(rows: Sequence[dict[str, Any]], *, all_of_them: bool) -> Table:
    table = _table()
    table.add_column("no.", no_wrap=True, justify="right")
    table.add_column("severity", no_wrap=True)
    table.add_column("incident", ratio=1, overflow="fold")
    table.add_column("open, UTC" if all_of_them else "since, UTC", no_wrap=True)
    table.add_column("seen by", max_width=14, overflow="fold")
    for row in rows:
        alarm = row["document"]
        feature = f"{alarm['feature']}, " if alarm.get("feature") else ""
        what = Text.assemble((f"{row['kind']}: {feature}{row['cohort']}", "bold"), f"\n{alarm['why']}")
        if alarm["devices"]:
            what.append(f"\n{_devices(alarm['devices'])}", "dim")
        times = [_time(row["opened_ns"])]
        if row["closed_ns"] is not None:
            what.append(f"\nclosed: {row['closed_why']}", "dim")
            times.append(_time(row["closed_ns"]))
        table.add_row(
            str(row["id"]),
            Text(row["severity"], STYLES.get(row["severity"], "")),
            what,
            "\n".join(times),
            Text(row["acknowledged_by"]),
        )
    return table


def _table() -> Table:
    return Table(box=box.SIMPLE, pad_edge=False, expand=True)


def _devices(names: Sequence[str]) -> str:
    return f"{len(names)} device{'s' if len(names) > 1 else ''}: {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _time(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M")
