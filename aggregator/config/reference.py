"""Every key of the aggregator's file: ``python -m aggregator.config.reference`` prints docs/reference/aggregator.md.

Keys, defaults and limits are what the reader asks for, see `Noted`; the meanings stand here. A key without one is a
KeyError, so no key can be added without saying what it is for.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aggregator.config import parse
from edge_runtime.contract.errors import ConfigError, SkiffError
from edge_runtime.contract.fields import REQUIRED, Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key of ``section`` ("" is the top); ``default`` may be `REQUIRED`, ``allowed`` is for people."""

    section: str
    name: str
    default: Any
    allowed: str

    @property
    def dotted(self) -> str:
        """The key with its section before it."""
        return f"{self.section}.{self.name}".removeprefix(".")


class Noted(Fields):
    """A mapping being read that notes in ``keys`` what it is asked for, nested tables included."""

    __slots__ = ("_family", "_name", "keys")

    def __init__(
        self, mapping: object, path: str, error: type[SkiffError] = ConfigError, *, name: str = ""
    ) -> None:
        super().__init__(mapping, path, error)
        self._family = error
        self._name = name
        self.keys: list[Key] = []

    def _note(self, name: str, default: object, allowed: str) -> None:
        self.keys.append(Key(section=self._name, name=name, default=default, allowed=allowed))

    def text(
        self,
        name: str,
        default: Any = REQUIRED,
        *,
        max_length: int = 1024,
        pattern: re.Pattern[str] | None = None,
        choices: Sequence[str] | None = None,
    ) -> str:
        """As `Fields.text`."""
        self._note(name, default, ", ".join(f"`{word}`" for word in choices or ()) or "text")
        return super().text(name, default, max_length=max_length, pattern=pattern, choices=choices)

    def integer(self, name: str, default: Any = REQUIRED, *, low: int = 0, high: int = 2**63 - 1) -> int:
        """As `Fields.integer`."""
        self._note(name, default, f"whole, {_limits(low, high if high < 2**63 - 1 else math.inf)}")
        return super().integer(name, default, low=low, high=high)

    def number(
        self, name: str, default: Any = REQUIRED, *, low: float = -math.inf, high: float = math.inf
    ) -> float:
        """As `Fields.number`."""
        self._note(name, default, _limits(low, high))
        return super().number(name, default, low=low, high=high)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """As `Fields.flag`."""
        self._note(name, default, "true, false")
        return super().flag(name, default)

    def items(self, name: str, default: Any = REQUIRED) -> list[object]:
        """As `Fields.items`."""
        self._note(name, default, "list")
        return super().items(name, default)

    def section(self, name: str, default: Any = REQUIRED) -> Fields:
        """As `Fields.section`; notes the keys of the table, not the table."""
        found = Noted(
            self._get(name, default),
            f"{self._path}.{name}",
            self._family,
            name=f"{self._name}.{name}".strip("."),
        )
        found.keys = self.keys
        return found


def _limits(low: float, high: float) -> str:
    match math.isfinite(low), math.isfinite(high):
        case True, True:
            return f"{low:g} to {high:,.10g}"
        case True, False:
            return f"from {low:g}"
        case _:
            return "any number"


def every_key() -> tuple[Key, ...]:
    """Every key in the order in which the file is read."""
    noted = Noted({"fleet": "demo"}, "file")
    parse(noted, Path())
    return tuple(noted.keys)


SECTIONS: Final[Mapping[str, str]] = {
    "": "At the top of the file, before any table.",
    "broker": "Where the broker is.",
    "broker.aggregator": "Who reads telemetry. The password is in `SKIFF_AGGREGATOR_PASSWORD`.",
    "broker.coordinator": "Who writes releases. The password is in `SKIFF_COORDINATOR_PASSWORD`.",
    "broker.publisher": "Who `skiff publish` is. The password is in `SKIFF_PUBLISHER_PASSWORD`.",
    "ingest": "How telemetry is taken in and kept.",
    "drift": "How drift is judged; [how it decides](../explanation/how-it-decides.md#drift).",
    "rollout": "What a rollout does unless its order says otherwise.",
    "rollout.gates": "What a stage has to show before the next one begins, and what halts the rollout.",
    "rollout.trial": "What each device asks of a candidate that serves on trial.",
    "rollout.shadow": "What each device asks of a candidate before its trial.",
    "retrain": "The hook that makes a better model; [how](../how-to/retrain.md).",
    "metrics": "Figures for Prometheus; [which](metrics.md).",
    "alarms": "Who is told when an incident opens, escalates or closes.",
}
_IDENTITY: Final = {
    "username": "The user name; a broker that goes by certificates needs none.",
    "certificate": "Path of the certificate, with `key`.",
    "key": "Path of its private key.",
}
WHY: Final[Mapping[str, str]] = {
    "fleet": "The fleet's name, a part of every topic.",
    "state_dir": "Folder of the two stores.",
    "registry": "Folder of the published artifacts: `targets` of the repository.",
    "director_key": "The key that signs releases; without it no rollout reaches a device.",
    "ledger": "URL of a PostgreSQL database for the ledger; empty: a file in `state_dir`.",
    "broker.host": "Name or address.",
    "broker.port": "TCP port.",
    "broker.ca": "Path of the authority's certificate; turns TLS on.",
    "broker.keepalive_seconds": "Silence after which a connection counts as lost.",
    "broker.protocol": "The version of MQTT; `auto` tries 5 first.",
    **{
        f"broker.{who}.{key}": why
        for who in ("aggregator", "coordinator", "publisher")
        for key, why in _IDENTITY.items()
    },
    "ingest.batch_messages": "The most that one transaction commits.",
    "ingest.device_messages": "The most of one device that wait; it sends again what is beyond.",
    "ingest.dead_letters": "How many messages that break the contract are kept.",
    "ingest.rebirth_seconds": "The least time between two requests to one device to introduce itself.",
    "ingest.retention_days": "Windows received longer ago are rolled up; 0: never.",
    "ingest.share": "Processes with the same word share the messages; empty: there is one process.",
    "ingest.lease_seconds": "How long after the leader's last sign another leads.",
    "drift.attributes": "Device attributes whose values are judged as cohorts of their own.",
    "drift.alpha": "The probability of any false alarm in `budget_looks` looks.",
    "drift.budget_looks": "How many looks `alpha` is for.",
    "drift.skew_alpha": "The same for one look at `skew`.",
    "drift.confirmations": "Looks in a row before an incident of `skew` opens.",
    "drift.clear_p": "A look with p above it counts as calm; at least `alpha` and `skew_alpha`.",
    "drift.clear_confirmations": "Calm looks in a row before an incident closes.",
    "drift.baseline_looks": "The first looks at an artifact, which become the devices' own past.",
    "drift.horizon_rows": "Rows of a device that a look needs.",
    "drift.horizon_seconds": "Seconds of windows of a device that a look needs.",
    "drift.quorum": "Share of the active devices that must have those.",
    "drift.patience_seconds": "After so long a look is taken at those that have.",
    "drift.min_groups": "Groups of the training below which all of it counts as one unit.",
    "drift.min_devices": "Devices below which there is no verdict on the fleet; each is judged alone.",
    "drift.max_devices": "The most devices that one test compares; of more, some are drawn.",
    "drift.few_share": "Up to this share of the devices is a matter of sensors, not of the fleet.",
    "drift.exact_limit": "Up to so many dealings a permutation test looks at all of them.",
    "drift.samples": "Beyond that it draws so many.",
    "drift.enough": "It draws no more when so many have reached what was seen.",
    "drift.variance_floor": "The least variance that a difference between units is measured in.",
    "drift.psi_floor": "PSI below which a movement is too small to matter.",
    "drift.cdf_floor": "The same for the largest difference of the distribution functions.",
    "drift.fault_floor": "The same for the share of faulty values.",
    "drift.sensor_floor": "The same for the distribution function of a single device.",
    "drift.prediction_floor": "The same for the outputs.",
    "drift.accuracy_floor": "The same for the accuracy.",
    "drift.min_labelled": "Known answers below which a device's accuracy is not judged.",
    "drift.check_seconds": "How often it is asked whether a look is due.",
    "rollout.stages": "Counts of devices (`3`), shares of the cohort (`0.25`); the last is `1.0`. `--stages` first.",
    "rollout.tick_seconds": "How often the gates are asked.",
    "rollout.gates.committed_share": "Share of the stage's devices that can be heard which must have committed.",
    "rollout.gates.min_online_share": "Share of the stage's devices that must be heard.",
    "rollout.gates.bake_seconds": "How long the stage has to stand like that before the next.",
    "rollout.gates.timeout_seconds": "A stage that is not through after so long is paused for a person.",
    "rollout.gates.max_failures": "Devices that may refuse the candidate or roll back; one more halts.",
    "rollout.gates.min_rows": "Rows that the candidate must have answered in the stage.",
    "rollout.gates.max_bad_row_rate": "By how much its share of refused and failed rows may exceed the incumbent's.",
    "rollout.gates.max_latency_ratio": "Its median latency over the incumbent's, at most; 0: not asked.",
    "rollout.gates.max_accuracy_drop": "By how much its accuracy may be below the incumbent's.",
    "rollout.gates.min_labelled": "Known answers below which accuracy is not asked.",
    "rollout.gates.design_effect": "Consecutive rows that tell as much of the accuracy as one alone.",
    "rollout.gates.control_seconds": "How long before the rollout the incumbent's windows begin.",
    "rollout.trial.predictions": "Rows it must answer.",
    "rollout.trial.seconds": "How long it must serve.",
    "rollout.trial.starts": "Starts that crash or get nowhere after which the device goes back.",
    "rollout.trial.max_refused": "Share of calls without an answer that its predecessor has one for; 1: only counted.",
    "rollout.shadow.rows": "Live rows it answers unheard; 0: no shadow.",
    "rollout.shadow.max_disagreement": "Share of them it may answer otherwise; 1: only counted.",
    "retrain.command": "Words of the command, `{request}` for the request's path; empty: nothing runs.",
    "retrain.timeout_seconds": "After so long the command is ended.",
    "retrain.cooldown_seconds": "The least time between two requests of a model.",
    "metrics.listen": "HOST:PORT; empty: nobody listens.",
    "metrics.refresh_seconds": "How often the stores are asked.",
    "metrics.silent_seconds": "An online device that sent no window for so long counts as silent.",
    "alarms.mqtt": "Publish at the fleet's alarm topic.",
    "alarms.webhook": "Address for a POST; `SKIFF_ALARM_TOKEN` goes with it as a bearer token.",
    "alarms.command": "Words of a command, `{alarm}` for the path of a JSON file.",
    "alarms.timeout_seconds": "The longest that an attempt may take.",
    "alarms.keep_hours": "What fails is tried again until it is so old.",
}


def text() -> str:
    """The page; raises KeyError where a key or a section has no meaning here."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# The aggregator's file"
    yield ""
    yield "Every key of `aggregator.toml`, written by `python -m aggregator.config.reference`. Others are refused."
    yield "Paths are relative to the file. [run-a-fleet.md](../how-to/run-a-fleet.md) has an example."
    found = every_key()
    for section in dict.fromkeys(key.section for key in found):
        yield from ("", f"## {f'`[{section}]`' if section else 'Top'}", "", SECTIONS[section], "")
        yield from ("| Key | Default | Allowed | What it is |", "| --- | --- | --- | --- |")
        for key in found:
            if key.section == section:
                default = "required" if key.default is REQUIRED else f"`{json.dumps(key.default)}`"
                yield f"| `{key.name}` | {default} | {key.allowed} | {WHY[key.dotted]} |"


if __name__ == "__main__":
    sys.stdout.write(text())
