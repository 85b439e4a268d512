"""The device's configuration: one TOML file, read once into frozen values.

A file may name another as its ``base`` (a hardware class from ``device_configs/``) and override it table by table.
Unknown keys are refused with the nearest valid one. Secrets come from the environment: the broker's password from
``SKIFF_BROKER_PASSWORD``.
"""

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import CohortId, DeviceId, FleetId, ModelName
from edge_runtime.core.budget import Budget
from edge_runtime.core.windowing import WindowPolicy
from edge_runtime.link import Broker

T = TypeVar("T")

SOURCES = ("none", "replay")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where rows come from: ``none`` (nothing is read) or ``replay`` of a recorded file."""

    kind: str
    path: Path
    rows_per_second: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """Everything ``skiffd`` is told. Paths are absolute; times carry their unit in the name."""

    fleet: FleetId
    device: DeviceId
    cohort: CohortId
    attributes: tuple[tuple[str, str], ...]
    state_dir: Path
    broker: Broker
    model: ModelName
    trust_root: Path
    window: WindowPolicy
    clock_synced: bool
    source: SourceConfig
    budget: Budget
    probe_address_space_bytes: int
    update_deadline_seconds: float
    outbox_bytes: int
    threads: int


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
    return _parse(Fields(document, str(path), ConfigError), path.parent)


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


def _parse(f: Fields, folder: Path) -> DaemonConfig:
    device = f.section("device")
    model = f.section("model")
    window = f.section("window", {})
    budgets = f.section("budgets", {})
    update = f.section("update", {})
    outbox = f.section("outbox", {})
    config = DaemonConfig(
        fleet=_name(device, "fleet", ids.fleet_id),
        device=_name(device, "id", ids.device_id),
        cohort=_name(device, "cohort", ids.cohort_id, "main"),
        attributes=device.pairs("attributes", {}),
        state_dir=_path(device.text("state_dir"), folder),
        clock_synced=device.flag("clock_synced", True),
        broker=_broker(f.section("broker"), folder),
        model=_name(model, "name", ids.model_name),
        trust_root=_path(model.text("trust_root"), folder),
        threads=model.integer("threads", 1, low=1, high=64),
        window=WindowPolicy(
            period_ns=int(window.number("seconds", 300.0, low=0.1, high=86400.0) * 1e9),
            min_rows=window.integer("min_rows", 30, low=1),
        ),
        source=_source(f.section("source", {}), folder),
        budget=Budget(
            predict_p99_ns=int(budgets.number("predict_p99_us", 0.0, low=0.0) * 1e3),
            rss_bytes=int(budgets.number("rss_mb", 0.0, low=0.0) * 1e6),
        ),
        probe_address_space_bytes=int(update.number("probe_address_space_mb", 2048.0, low=64.0) * 1e6),
        update_deadline_seconds=update.number("deadline_seconds", 600.0, low=1.0),
        outbox_bytes=int(outbox.number("max_mb", 8.0, low=0.1) * 1e6),
    )
    for section in (device, model, window, budgets, update, outbox):
        section.finish()
    f.finish()
    return config


def _name(f: Fields, key: str, check: Callable[[object], T], *default: str) -> T:
    text = f.text(key, *default)
    try:
        return check(text)
    except ContractError as e:
        raise f.fail(key, str(e)) from e


def _broker(f: Fields, folder: Path) -> Broker:
    tls = f.section("tls", {})

    def file(name: str) -> str:
        found = tls.text(name, "")
        return str(_path(found, folder)) if found else ""

    broker = Broker(
        host=f.text("host", "localhost"),
        port=f.integer("port", 1883, low=1, high=65535),
        username=f.text("username", ""),
        password=os.environ.get("SKIFF_BROKER_PASSWORD", ""),
        ca=file("ca"),
        certificate=file("certificate"),
        key=file("key"),
        keepalive_seconds=f.integer("keepalive_seconds", 30, low=5, high=3600),
    )
    if bool(broker.certificate) != bool(broker.key):
        raise tls.fail("certificate", "and key belong together: give both or neither")
    tls.finish()
    f.finish()
    return broker


def _source(f: Fields, folder: Path) -> SourceConfig:
    kind = f.text("kind", "none", choices=SOURCES)
    path = f.text("path", "")
    if kind == "replay" and not path:
        raise f.fail("path", "is missing: a replay needs the .npz file to replay")
    source = SourceConfig(
        kind=kind,
        path=_path(path, folder) if path else Path(),
        rows_per_second=f.number("rows_per_second", 5.0, low=0.01, high=1e6),
        seed=f.integer("seed", 0),
    )
    f.finish()
    return source


def _path(text: str, folder: Path) -> Path:
    return (folder / Path(text).expanduser()).resolve()
