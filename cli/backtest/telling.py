"""The outcome in words, for a person."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich import box
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from aggregator.looks import Estimate
from cli.backtest.outcome import Outcome, accuracy, moment, refused_of, rows_of, span
from cli.output import out
from edge_runtime.contract.errors import SkiffError

MOST_SHOWN = 40
WORST = 3


class NotPrinted(SkiffError):
    """The answer could not be printed."""


@contextmanager
def printing() -> Iterator[None]:
    """Turns a standard output that takes no more, such as a file on a full disk, into `NotPrinted`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # whoever reads has seen enough, which is no error
    except OSError as e:
        with suppress(OSError), open(os.devnull, "w") as nowhere:  # noqa: PTH123 - what is left would fail at exit again
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise NotPrinted(f"standard output cannot be written ({e.strerror or e})") from e


def tell(outcome: Outcome) -> None:
    """Prints alarms, requests for a better model, and the windows in which most moved."""
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
    refusing = any(reading.refused for found in outcome.slices for reading in found.readings)
    head = [
        *("window", "from", "devices", "rows"),
        *(["refused"] if refusing else []),
        *(["accuracy", "estimate's error"] if labelled else []),
    ]
    grid = Grid(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for name in head:
        grid.add_column(name, no_wrap=True)
    most = "moved most (KS)"
    grid.add_column(most, min_width=len(most))
    worst = [
        sorted(
            ((f.ks, name) for name, f in figures.items() if name in names and not math.isnan(f.ks)),
            reverse=True,
        )[:WORST]
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
            *([str(refused_of(found).total())] if refusing else []),
            *(
                [f"{right:.3f}" if right is not None else "", _error(outcome.estimates[k])]
                if labelled
                else []
            ),
            escape(", ".join(f"{name} {ks:.2f}" for ks, name in worst[k])),
        )
    out.print(grid)


def _error(estimate: Estimate) -> str:
    """Estimate minus truth, with its 95 % interval over devices."""
    if estimate.error is None:
        return ""
    within = "" if estimate.error_half is None else f" ± {estimate.error_half:.3f}"
    return f"{estimate.error:+.3f}{within}"
