"""Commands that are imported when they are asked for: none has to wait for what only others need."""

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from cli.output import EXIT_CODES

COMMANDS: Final[Mapping[str, str]] = {
    "train": "cli.models:train",
    "convert": "cli.models:convert_command",
    "parity": "cli.models:parity",
    "inspect": "cli.models:inspect",
    "pki": "cli.pki:pki_app",
    "publish": "cli.operate:publish",
    "broker-config": "cli.provision:broker_config",
    "serve": "cli.operate:serve",
    "fleet": "cli.operate:fleet",
    "drift": "cli.drift:drift",
    "incidents": "cli.drift:incidents",
    "acknowledge": "cli.drift:acknowledge",
    "labels": "cli.labels:labels_app",
    "backtest": "cli.backtest.command:backtest",
    "rollout": "cli.operate:rollout_app",
    "retrain": "cli.operate:retrain",
    "backup": "cli.backup:backup",
    "restore": "cli.backup:restore",
    "demo": "cli.demo.command:demo",
    "doctor": "cli.provision:doctor",
}
"""Where each command is: a function, or a `typer.Typer` with commands of its own."""


class OnDemand(MutableMapping[str, Any]):
    """The commands by name; one is imported when it is taken."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            module, _, attribute = self._places[name].partition(":")
            self._made[name] = _made(name, getattr(import_module(module), attribute))
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._places[name], self._made[name] = "", command

    def __delitem__(self, name: str) -> None:
        del self._places[name]
        self._made.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _made(name: str, found: Any) -> Any:
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False)
        alone.command(name, epilog=EXIT_CODES)(found)
        found = alone
    made = get_command(found)
    made.name = name
    return made


class Commands(TyperGroup):
    """The group of all of them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**{**attributes, "commands": OnDemand(COMMANDS)})
