"""The aggregator's configuration: one TOML file, read once into frozen values.

Unknown keys are refused with the nearest valid one. Paths are relative to the file. Secrets come from the
environment: the broker's passwords from ``SKIFF_AGGREGATOR_PASSWORD``, ``SKIFF_COORDINATOR_PASSWORD`` and
``SKIFF_PUBLISHER_PASSWORD``, a webhook's token from ``SKIFF_ALARM_TOKEN``.

Each section has a file of its own here: its values with what they mean, and how they are read and refused.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from aggregator.config.alarms import AlarmsConfig, read_alarms
from aggregator.config.broker import BrokerConfig, IdentityConfig, read_broker
from aggregator.config.drift import DriftConfig, read_drift
from aggregator.config.ingest import IngestConfig, read_ingest
from aggregator.config.metrics import MetricsConfig, read_metrics
from aggregator.config.paths import resolved
from aggregator.config.retrain import RetrainConfig, read_retrain
from aggregator.config.rollout import (
    RolloutConfig,
    Stages,
    read_gates,
    read_rollout,
    read_shadow,
    read_stages,
    read_trial,
)
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import FleetId

__all__ = [
    "LEDGER_SCHEME",
    "AggregatorConfig",
    "AlarmsConfig",
    "BrokerConfig",
    "DriftConfig",
    "IdentityConfig",
    "IngestConfig",
    "MetricsConfig",
    "RetrainConfig",
    "RolloutConfig",
    "Stages",
    "load",
    "parse",
    "read_gates",
    "read_shadow",
    "read_stages",
    "read_trial",
]

LEDGER_SCHEME: Final = "postgresql+psycopg://"


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorConfig:
    """Everything the aggregator is told. ``director_key`` None means that releases cannot be signed here.

    ``ledger`` is the URL of the PostgreSQL database that keeps the control state; empty means a file in ``state_dir``.
    """

    fleet: FleetId
    state_dir: Path
    registry: Path
    ledger: str = ""
    director_key: Path | None = None
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    ingest: IngestConfig = field(default_factory=IngestConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)

    @property
    def metadata(self) -> Path:
        """What the publisher signed, where ``registry`` is in its repository; nothing is there otherwise."""
        return self.registry.parent / "metadata"

    @property
    def ledger_path(self) -> Path:
        """The control state's file, unless ``ledger`` names a database."""
        return self.state_dir / "ledger.sqlite"

    @property
    def ledger_at(self) -> Path | str:
        """Where the control state is kept: a path or a URL."""
        return self.ledger or self.ledger_path

    @property
    def windows_path(self) -> Path:
        """The telemetry's database."""
        return self.state_dir / "windows.sqlite"


def load(path: Path | str) -> AggregatorConfig:
    """Reads ``path``; raises `ConfigError` naming the file, the key and what is allowed."""
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"{path}: cannot be read ({e.strerror}); pass the path of an aggregator TOML file"
        ) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not TOML ({e})") from e
    return parse(Fields(document, str(path), ConfigError), path.parent)


def parse(f: Fields, folder: Path) -> AggregatorConfig:
    """The configuration in ``f``, paths relative to ``folder``; raises `ConfigError`."""
    director = f.text("director_key", "")
    try:
        fleet = ids.fleet_id(f.text("fleet"))
    except ContractError as e:
        raise f.fail("fleet", str(e)) from e
    config = AggregatorConfig(
        fleet=fleet,
        state_dir=resolved(f.text("state_dir", "state"), folder),
        registry=resolved(f.text("registry", "registry"), folder),
        ledger=_ledger(f),
        director_key=resolved(director, folder) if director else None,
        broker=read_broker(f.section("broker", {}), folder),
        ingest=read_ingest(f.section("ingest", {})),
        drift=read_drift(f.section("drift", {})),
        rollout=read_rollout(f.section("rollout", {})),
        retrain=read_retrain(f.section("retrain", {})),
        metrics=read_metrics(f.section("metrics", {})),
        alarms=read_alarms(f.section("alarms", {})),
    )
    f.finish()
    return config


def _ledger(f: Fields) -> str:
    url = f.text("ledger", "")
    if url and not url.startswith(LEDGER_SCHEME):
        raise f.fail(
            "ledger", f"{url!r} does not begin with {LEDGER_SCHEME}; leave it out for a file in state_dir"
        )
    if url and urlsplit(url).password is not None:
        raise f.fail("ledger", "holds a password; libpq reads it from PGPASSWORD or ~/.pgpass")
    return url
