"""The commands of ``skiff``, put together."""

from typing import Annotated

import typer

from cli.commands import Commands
from cli.output import EXIT_CODES, out
from edge_runtime import __version__

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From a fitted scikit-learn pipeline to a fleet that updates itself. Data on stdout, logs on stderr.",
    epilog=EXIT_CODES,
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"skiff {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """From a fitted scikit-learn pipeline to a fleet that updates itself."""
    del version
