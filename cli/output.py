"""How commands talk: data on stdout, everything else on stderr, errors in one line with a stable exit code."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from edge_runtime.contract.errors import (
    ConfigError,
    ContractError,
    ParityError,
    SkiffError,
    UnsupportedPipeline,
)

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
REFUSED: Final = 3
EXIT_CODES: Final = (
    "Exit codes: 0 done, 1 something failed, 2 bad arguments or configuration, 3 a model was refused (the artifact "
    "disagrees with its pipeline, or the pipeline cannot be converted)."
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print data for a machine on stdout.")]

err: Final = Console(stderr=True, highlight=False, emoji=False)
out: Final = Console(highlight=False, soft_wrap=True, emoji=False)


def print_json(data: Any) -> None:
    """Data for a machine, on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, sort_keys=True, default=str) + "\n")


def shown(text: str) -> Text:
    """What a device says of itself, for a person's terminal: it obeys no control character in it, and no markup.

    A device may be anybody's by now, and a terminal that obeys can be made to show what is not so.
    """
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), overflow="fold")


def note(text: str) -> None:
    """A line for a person, on stderr."""
    err.print(text, markup=False, soft_wrap=True)


@contextmanager
def reported() -> Iterator[None]:
    """Turns skiff's errors into one line on stderr and an exit code."""
    try:
        yield
    except (ParityError, UnsupportedPipeline) as e:
        err.print(f"refused: {e}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(REFUSED) from e
    except (ConfigError, ContractError) as e:
        err.print(f"error: {e}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(USAGE) from e
    except SkiffError as e:
        err.print(f"error: {e}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from e


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr; call the value with what is being done, how much is done, and of how much."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {what}", completed=done, total=total or None)

        yield update
