"""The device's configuration: one TOML file, read once into frozen values.

A file may name another as its ``base`` (a hardware class from ``device_configs/``) and override it table by table.
The keys are declared in `config.keys`; unknown ones are refused with the nearest valid one. Secrets come from the
environment: the brokers' passwords from ``SKIFF_BROKER_PASSWORD`` and ``SKIFF_SOURCE_PASSWORD``.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from edge_runtime.config import keys as config_keys
from edge_runtime.config.keys import AUTO, Document
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import CohortId, DeviceId, FleetId, ModelName
from edge_runtime.core.budget import Budget, Limits
from edge_runtime.core.windowing import WindowPolicy
from edge_runtime.mqtt.broker import Broker

Clock = Literal["auto", "synced", "unsynced"]

MAX_JITTER_SECONDS: Final = 30.0
JITTER_SHARE: Final = 0.1
"""Of the period, where nothing else is said: a fleet spreads its windows and none is late by much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where rows come from; what belongs to another ``kind`` has its default and no meaning."""

    kind: str
    path: Path
    rows_per_second: float
    seed: int
    socket: Path
    socket_mode: int
    max_clients: int
    max_line_bytes: int
    topic_in: str
    topic_out: str
    broker: Broker


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the device may cost at its worst, for benchmarks and ``--check``; 0 means no limit.

    The daemon's own limits, which it acts on, are `Limits`; those of one model are `Budget`.
    """

    load_peak_bytes: int
    update_peak_bytes: int
    window_bytes: int
    start_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchConfig:
    """Where models come from besides the broker: ``url`` "" for nowhere; ``prefer`` is one of `topics.CARRIERS`."""

    url: str
    ca: str
    prefer: str
    max_chunk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """Everything ``skiffd`` is told. Paths are absolute; times carry their unit in the name."""

    fleet: FleetId
    device: DeviceId
    cohort: CohortId
    attributes: tuple[tuple[str, str], ...]
    state_dir: Path
    status_socket: Path
    broker: Broker
    model: ModelName
    trust_root: Path
    window: WindowPolicy
    clock: Clock
    source: SourceConfig
    budget: Budget
    limits: Limits
    costs: Costs
    fetch: FetchConfig
    probe_address_space_bytes: int
    update_deadline_seconds: float
    shadow_cpu_share: float
    outbox_bytes: int
    threads: int
    arena: bool
    run_limit_seconds: float
    max_batch: int


def load(path: Path | str) -> DaemonConfig:
    """Reads ``path``; raises `ConfigError` naming the file, the key and what is allowed."""
    path = Path(path)
    document = _read(path)
    if "base" in document:
        base = document.pop("base")
        if not isinstance(base, str):
            raise ConfigError(f"{path}.base: expected the path of a TOML file")
        below = _read(path.parent / base)
        if "base" in below:
            raise ConfigError(f"{path}.base: {base} names a base of its own; one level is all there is")
        document = _override(below, document)
    return _build(config_keys.read(document, str(path)), str(path), path.parent)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"{path}: cannot be read ({e.strerror}); pass the path of a skiffd TOML file"
        ) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not TOML ({e})") from e


def _override(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        nested = isinstance(value, dict) and isinstance(below, dict)
        merged[key] = _override(below, value) if nested and below is not None else value
    return merged


def _build(d: Document, where: str, folder: Path) -> DaemonConfig:
    state_dir = _path(d.text("device.state_dir"), folder)
    status_socket = d.text("device.status_socket")
    period_seconds = d.number("window.seconds")
    jitter_seconds = d.number("window.jitter_seconds")
    if jitter_seconds < 0:
        jitter_seconds = min(JITTER_SHARE * period_seconds, MAX_JITTER_SECONDS)
    return DaemonConfig(
        fleet=ids.fleet_id(d.text("device.fleet")),
        device=ids.device_id(d.text("device.id")),
        cohort=ids.cohort_id(d.text("device.cohort")),
        attributes=d.pairs["device.attributes"],
        state_dir=state_dir,
        status_socket=_path(status_socket, folder) if status_socket else state_dir / "status.sock",
        clock=_clock(d),
        broker=_broker(d, folder),
        model=ids.model_name(d.text("model.name")),
        trust_root=_path(d.text("model.trust_root"), folder),
        threads=d.integer("model.threads"),
        arena=bool(d.values["model.arena"]),
        run_limit_seconds=d.number("model.run_limit_seconds"),
        max_batch=d.integer("model.max_batch"),
        window=WindowPolicy(
            period_ns=int(period_seconds * 1e9),
            min_rows=d.integer("window.min_rows"),
            jitter_ns=int(jitter_seconds * 1e9),
        ),
        source=_source(d, folder),
        budget=Budget(
            predict_p99_ns=int(d.number("budgets.predict_p99_us") * 1e3),
            rss_bytes=_megabytes(d, "budgets.rss_mb"),
        ),
        limits=_limits(d, where),
        costs=_costs(d),
        fetch=_fetch(d, folder),
        probe_address_space_bytes=_megabytes(d, "update.probe_address_space_mb"),
        update_deadline_seconds=d.number("update.deadline_seconds"),
        shadow_cpu_share=d.number("update.shadow_cpu_share"),
        outbox_bytes=_megabytes(d, "outbox.max_mb") or int(d.number("outbox.max_kb") * 1024),
    )


def _clock(d: Document) -> Clock:
    told = d.values["device.clock_synced"]
    if told == AUTO:
        return "auto"
    return "synced" if told else "unsynced"


def _broker(d: Document, folder: Path) -> Broker:
    tls = {name: d.text(f"broker.tls.{name}") for name in ("ca", "certificate", "key")}
    return Broker(
        host=d.text("broker.host"),
        port=d.integer("broker.port"),
        username=d.text("broker.username"),
        password=os.environ.get("SKIFF_BROKER_PASSWORD", ""),
        keepalive_seconds=d.integer("broker.keepalive_seconds"),
        protocol=d.text("broker.protocol"),
        **{name: str(_path(path, folder)) if path else "" for name, path in tls.items()},
    )


def _limits(d: Document, where: str) -> Limits:
    try:
        return Limits(
            rss_soft_bytes=_megabytes(d, "budgets.rss_soft_mb"),
            rss_bytes=_megabytes(d, "budgets.rss_mb"),
            temperature_soft_mc=int(d.number("budgets.temperature_c") * 1e3),
            on_hard=d.text("budgets.on_hard_limit"),
        )
    except ConfigError as e:  # two keys that do not go together, which no schema can say
        raise ConfigError(f"{where}.budgets.rss_soft_mb: {e}") from e


def _costs(d: Document) -> Costs:
    return Costs(
        load_peak_bytes=_megabytes(d, "budgets.load_peak_mb"),
        update_peak_bytes=_megabytes(d, "budgets.update_mb"),
        window_bytes=d.integer("budgets.window_bytes"),
        start_seconds=d.number("budgets.start_seconds"),
    )


def _fetch(d: Document, folder: Path) -> FetchConfig:
    ca = d.text("update.ca")
    return FetchConfig(
        url=d.text("update.url"),
        ca=str(_path(ca, folder)) if ca else "",
        prefer=d.text("update.prefer"),
        max_chunk_bytes=d.integer("update.max_chunk_kib") * 1024,
    )


def _source(d: Document, folder: Path) -> SourceConfig:
    path, socket = d.text("source.path"), d.text("source.socket")
    return SourceConfig(
        kind=d.text("source.kind"),
        path=_path(path, folder) if path else Path(),
        rows_per_second=d.number("source.rows_per_second"),
        seed=d.integer("source.seed"),
        socket=_path(socket, folder) if socket else Path(),
        socket_mode=int(d.text("source.socket_mode"), 8),
        max_clients=d.integer("source.max_clients"),
        max_line_bytes=d.integer("source.max_line_kb") * 1024,
        topic_in=d.text("source.topic_in"),
        topic_out=d.text("source.topic_out"),
        broker=Broker(
            host=d.text("source.broker.host"),
            port=d.integer("source.broker.port"),
            username=d.text("source.broker.username"),
            password=os.environ.get("SKIFF_SOURCE_PASSWORD", ""),
        ),
    )


def _megabytes(d: Document, name: str) -> int:
    return int(d.number(name) * 1e6)


def _path(text: str, folder: Path) -> Path:
    return (folder / Path(text).expanduser()).resolve()
