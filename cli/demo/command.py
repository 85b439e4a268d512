"""The command itself: a work folder, the steps, the summary, the report, and an honest exit code."""

import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.demo.story import Story
from cli.demo.summary import build_report, summarise, summary_table
from cli.output import FAILED, err, out
from cli.processes import Processes
from cli.report import render
from edge_runtime.contract.errors import SkiffError

REPORT_NAME = "skiff-demo.html"


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running until Ctrl-C.")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the summary for a machine here.")
    ] = None,
    report: Annotated[Path, typer.Option(help="Where to write the page.")] = Path(REPORT_NAME),
    work: Annotated[
        Path | None, typer.Option(help="Work folder, kept; default: a temporary one, removed.")
    ] = None,
    embedded_broker: Annotated[
        bool, typer.Option(help="Use the embedded broker even if Mosquitto is here.")
    ] = False,
) -> None:
    """Run the whole loop once, on real data, and verify every step."""
    folder = work or Path(tempfile.mkdtemp(prefix="skiff-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with Processes(folder / "logs") as processes:
        story = Story(folder.resolve(), processes, embedded_broker=embedded_broker)
        problem = _tell(story)
        if problem is None:
            summary = {"passed": True, "seconds": round(time.monotonic() - began, 1), **summarise(story)}
            _finish(story, summary, report, json_path)
        elif json_path is not None:
            failed = {"passed": False, "reason": problem, "seconds": round(time.monotonic() - began, 1)}
            json_path.write_text(json.dumps(failed, indent=2) + "\n", encoding="utf-8")
        if keep and problem is None:
            _stay(story)
    if problem is not None:
        err.print(f"\nthe demo failed: {problem}", style="bold red", markup=False)
        err.print(f"logs: {folder / 'logs'}", markup=False)
        raise typer.Exit(FAILED)
    if work is None:
        shutil.rmtree(folder, ignore_errors=True)


def _tell(story: Story) -> str | None:
    """Runs the steps; the reason when one of them failed."""
    try:
        for step in (
            story.train,
            story.publish,
            story.healthy,
            story.world_moves,
            story.retrain,
            story.bad_release,
        ):
            step()
            story.processes.check()
    except SkiffError as e:
        return str(e)
    except KeyboardInterrupt:
        return "interrupted"
    return None


def _finish(story: Story, summary: dict[str, Any], report: Path, json_path: Path | None) -> None:
    err.print("\n[bold]7. Summary[/bold]")
    out.print(summary_table(summary, story))
    report.write_text(render(build_report(story, summary)), encoding="utf-8")
    err.print(f"report: {report.resolve()}   took {summary['seconds']:.0f} s", markup=False)
    if json_path is not None:
        json_path.write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stay(story: Story) -> None:
    config = story.work / "aggregator.toml"
    err.print("\nstill running; press Ctrl-C to end it. From another shell:", markup=False)
    for words in ("fleet", "drift", "incidents --all", "rollout status"):
        err.print(f"  {Path(sys.executable).parent / 'skiff'} {words} {config}", markup=False)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        err.print("ending", markup=False)
