"""The aggregator's configuration: one TOML file, read once into frozen values.

Unknown keys are refused with the nearest valid one. Paths are relative to the file. Secrets come from the
environment: the broker's passwords from ``SKIFF_AGGREGATOR_PASSWORD``, ``SKIFF_COORDINATOR_PASSWORD`` and
``SKIFF_PUBLISHER_PASSWORD``, a webhook's token from ``SKIFF_ALARM_TOKEN``.
"""

import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from aggregator.records import Gates
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import FleetId
from edge_runtime.contract.release import TrialGate
from edge_runtime.contract.topics import PROTOCOLS

Stages = tuple[int | float, ...]

LEDGER_SCHEME: Final = "postgresql+psycopg://"
_SHARE = re.compile(r"([a-z0-9-]{1,64})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityConfig:
    """One MQTT identity: the aggregator reads telemetry, the coordinator writes releases, the publisher models."""

    username: str = ""
    password: str = field(default="", repr=False)
    certificate: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """Where the broker is; ``ca`` turns TLS on."""

    host: str = "localhost"
    port: int = 1883
    ca: str = ""
    keepalive_seconds: int = 30
    protocol: str = "auto"
    aggregator: IdentityConfig = IdentityConfig()
    coordinator: IdentityConfig = IdentityConfig()
    publisher: IdentityConfig = IdentityConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestConfig:
    """How telemetry is taken in.

    ``batch_messages`` is the most that one transaction commits. ``device_messages`` is the most of one device that
    wait for a batch: what it sends beyond is left unacknowledged, and comes again from its outbox. Devices have 20 on
    the way at most. ``dead_letters`` bounds how many bad messages are kept. ``rebirth_seconds`` is the least time
    between two rebirth commands to one device. ``retention_days`` drops windows that were received longer ago; 0 keeps
    them for ever.

    Processes with the same ``share`` and ``state_dir`` share the windows and events between them; empty, there is one
    process. One of them leads: it renews a lease, and ``lease_seconds`` after its last renewal another takes over.
    """

    batch_messages: int = 500
    device_messages: int = 64
    dead_letters: int = 1000
    rebirth_seconds: float = 30.0
    retention_days: float = 0.0
    share: str = ""
    lease_seconds: float = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftConfig:
    """How drift is judged; `aggregator.core.judge` gives the method.

    A look is taken when ``quorum`` of the active devices have sent ``horizon_rows`` rows and ``horizon_seconds`` of
    windows since the last look, or some have and ``patience_seconds`` have passed. The first ``baseline_looks`` at an
    artifact are the devices' own past, unless a known-good one is given.

    ``alpha`` is the probability that anything is alarmed falsely in ``budget_looks`` looks. An incident that rests on
    units compared with others opens after ``confirmations`` looks in a row, each at ``skew_alpha``. An incident closes
    after ``clear_confirmations`` looks with p above ``clear_p``. Real is not enough: PSI, or the largest difference of
    the distribution functions, or of the share of faulty values, must reach its floor; ``sensor_floor`` is that of a
    single device's distribution function. A fleet verdict needs ``min_devices``; below, devices are judged one by one.
    Up to ``few_share`` of the devices, and a quarter of that more, are a matter of sensors, not of the fleet.
    """

    attributes: tuple[str, ...] = ()
    alpha: float = 0.05
    budget_looks: int = 1000
    skew_alpha: float = 0.01
    confirmations: int = 2
    clear_p: float = 0.2
    clear_confirmations: int = 2
    baseline_looks: int = 8
    horizon_rows: int = 1000
    horizon_seconds: float = 0.0
    quorum: float = 0.8
    patience_seconds: float = 3600.0
    min_groups: int = 3
    min_devices: int = 10
    max_devices: int = 200
    few_share: float = 0.2
    exact_limit: int = 20_000
    samples: int = 4999
    enough: int = 50
    variance_floor: float = 1e-3
    psi_floor: float = 0.02
    cdf_floor: float = 0.05
    fault_floor: float = 0.01
    sensor_floor: float = 0.1
    prediction_floor: float = 0.1
    accuracy_floor: float = 0.05
    min_labelled: int = 50
    check_seconds: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """What a rollout does unless its request says otherwise.

    ``stages`` are counts of devices (whole numbers) or shares of the cohort (below 1); the last is 1.0,
    everyone.
    """

    stages: Stages = (1, 0.25, 1.0)
    gates: Gates = field(default_factory=Gates)
    trial: TrialGate = field(default_factory=TrialGate)
    tick_seconds: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainConfig:
    """The hook that makes a better model; ``{request}`` in ``command`` is the path of the request's JSON file.

    With no command a request is recorded and nothing runs. ``cooldown_seconds`` is the least time between two requests
    of a model.
    """

    command: tuple[str, ...] = ()
    timeout_seconds: float = 3600.0
    cooldown_seconds: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmsConfig:
    """Who is told when an incident opens, escalates or closes, besides the log and the ledger.

    ``mqtt`` publishes at the fleet's alarm topic, ``webhook`` is an address for a POST (``SKIFF_ALARM_TOKEN`` in the
    environment is sent as a bearer token), ``command`` is given a JSON file in place of ``{alarm}``. An attempt takes
    ``timeout_seconds`` at most, and is made ``attempts`` times.
    """

    mqtt: bool = False
    webhook: str = ""
    command: tuple[str, ...] = ()
    timeout_seconds: float = 10.0
    attempts: int = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Figures for Prometheus, at ``/metrics`` of ``listen`` (host:port); empty: nowhere.

    What has to be asked of the stores is asked every ``refresh_seconds``. An online device counts as silent when
    nothing was heard of it for ``silent_seconds``.
    """

    listen: str = ""
    refresh_seconds: float = 15.0
    silent_seconds: float = 3600.0

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port, None when nobody is to listen."""
        host, _, port = self.listen.rpartition(":")
        return (host, int(port)) if host else None


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
    broker: BrokerConfig = BrokerConfig()
    ingest: IngestConfig = IngestConfig()
    drift: DriftConfig = DriftConfig()
    rollout: RolloutConfig = RolloutConfig()
    retrain: RetrainConfig = RetrainConfig()
    metrics: MetricsConfig = MetricsConfig()
    alarms: AlarmsConfig = AlarmsConfig()

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
        state_dir=_path(f.text("state_dir", "state"), folder),
        registry=_path(f.text("registry", "registry"), folder),
        ledger=_ledger(f),
        director_key=_path(director, folder) if director else None,
        broker=_broker(f.section("broker", {}), folder),
        ingest=_ingest(f.section("ingest", {})),
        drift=_drift(f.section("drift", {})),
        rollout=_rollout(f.section("rollout", {})),
        retrain=_retrain(f.section("retrain", {})),
        metrics=_metrics(f.section("metrics", {})),
        alarms=_alarms(f.section("alarms", {})),
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


def _path(text: str, folder: Path) -> Path:
    return (folder / Path(text).expanduser()).resolve()


def _broker(f: Fields, folder: Path) -> BrokerConfig:
    default = BrokerConfig()
    ca = f.text("ca", "")
    config = BrokerConfig(
        host=f.text("host", default.host),
        port=f.integer("port", default.port, low=1, high=65535),
        ca=str(_path(ca, folder)) if ca else "",
        keepalive_seconds=f.integer("keepalive_seconds", default.keepalive_seconds, low=5, high=3600),
        protocol=f.text("protocol", default.protocol, choices=PROTOCOLS),
        aggregator=_identity(f.section("aggregator", {}), folder, "SKIFF_AGGREGATOR_PASSWORD"),
        coordinator=_identity(f.section("coordinator", {}), folder, "SKIFF_COORDINATOR_PASSWORD"),
        publisher=_identity(f.section("publisher", {}), folder, "SKIFF_PUBLISHER_PASSWORD"),
    )
    f.finish()
    return config


def _identity(f: Fields, folder: Path, secret: str) -> IdentityConfig:
    certificate, key = f.text("certificate", ""), f.text("key", "")
    if bool(certificate) != bool(key):
        raise f.fail("certificate", "and key belong together: give both or neither")
    config = IdentityConfig(
        username=f.text("username", ""),
        password=os.environ.get(secret, ""),
        certificate=str(_path(certificate, folder)) if certificate else "",
        key=str(_path(key, folder)) if key else "",
    )
    f.finish()
    return config


def _ingest(f: Fields) -> IngestConfig:
    default = IngestConfig()
    config = IngestConfig(
        batch_messages=f.integer("batch_messages", default.batch_messages, low=1, high=4096),
        device_messages=f.integer("device_messages", default.device_messages, low=20, high=4096),
        dead_letters=f.integer("dead_letters", default.dead_letters, low=1, high=1_000_000),
        rebirth_seconds=f.number("rebirth_seconds", default.rebirth_seconds, low=0.1),
        retention_days=f.number("retention_days", default.retention_days, low=0.0),
        share=f.text("share", default.share, pattern=_SHARE),
        lease_seconds=f.number("lease_seconds", default.lease_seconds, low=0.5, high=3600.0),
    )
    f.finish()
    return config


def _drift(f: Fields) -> DriftConfig:
    d = DriftConfig()
    config = DriftConfig(
        attributes=f.texts("attributes", d.attributes),
        alpha=f.number("alpha", d.alpha, low=1e-6, high=0.5),
        budget_looks=f.integer("budget_looks", d.budget_looks, low=1, high=100_000_000),
        skew_alpha=f.number("skew_alpha", d.skew_alpha, low=1e-6, high=0.5),
        confirmations=f.integer("confirmations", d.confirmations, low=1, high=100),
        clear_p=f.number("clear_p", d.clear_p, low=0.0, high=1.0),
        clear_confirmations=f.integer("clear_confirmations", d.clear_confirmations, low=1, high=100),
        baseline_looks=f.integer("baseline_looks", d.baseline_looks, low=2, high=1000),
        horizon_rows=f.integer("horizon_rows", d.horizon_rows, low=1),
        horizon_seconds=f.number("horizon_seconds", d.horizon_seconds, low=0.0),
        quorum=f.number("quorum", d.quorum, low=0.0, high=1.0),
        patience_seconds=f.number("patience_seconds", d.patience_seconds, low=0.0),
        min_groups=f.integer("min_groups", d.min_groups, low=2),
        min_devices=f.integer("min_devices", d.min_devices, low=3),
        max_devices=f.integer("max_devices", d.max_devices, low=2, high=10_000),
        few_share=f.number("few_share", d.few_share, low=0.0, high=0.5),
        exact_limit=f.integer("exact_limit", d.exact_limit, low=1, high=1_000_000),
        samples=f.integer("samples", d.samples, low=99, high=1_000_000),
        enough=f.integer("enough", d.enough, low=10, high=1_000_000),
        variance_floor=f.number("variance_floor", d.variance_floor, low=1e-12, high=1.0),
        psi_floor=f.number("psi_floor", d.psi_floor, low=0.0),
        cdf_floor=f.number("cdf_floor", d.cdf_floor, low=0.0, high=1.0),
        fault_floor=f.number("fault_floor", d.fault_floor, low=0.0, high=1.0),
        sensor_floor=f.number("sensor_floor", d.sensor_floor, low=0.0, high=1.0),
        prediction_floor=f.number("prediction_floor", d.prediction_floor, low=0.0, high=1.0),
        accuracy_floor=f.number("accuracy_floor", d.accuracy_floor, low=0.0, high=1.0),
        min_labelled=f.integer("min_labelled", d.min_labelled, low=1),
        check_seconds=f.number("check_seconds", d.check_seconds, low=0.01),
    )
    f.finish()
    if config.clear_p < max(config.alpha, config.skew_alpha):
        raise f.fail(
            "clear_p", f"{config.clear_p} is below alpha or skew_alpha: an incident could never stay open"
        )
    if config.max_devices < config.min_devices:
        raise f.fail("max_devices", f"{config.max_devices} is below min_devices {config.min_devices}")
    return config


def _rollout(f: Fields) -> RolloutConfig:
    default = RolloutConfig()
    config = RolloutConfig(
        stages=read_stages(f, "stages", default.stages),
        gates=read_gates(f.section("gates", {}), default.gates),
        trial=read_trial(f.section("trial", {}), default.trial),
        tick_seconds=f.number("tick_seconds", default.tick_seconds, low=0.01, high=3600.0),
    )
    f.finish()
    return config


def read_stages(f: Fields, name: str, default: Stages) -> Stages:
    """Stages: whole numbers from 1, or shares above 0, rising where they can be compared; the last is 1.0
    (everyone).
    """
    stages: list[int | float] = []
    for i, value in enumerate(f.items(name, list(default))):
        at = f"{name}[{i}]"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise f.fail(at, f"{value!r} is neither a count (1, 2, …) nor a share (0.1, 1.0)")
        if (isinstance(value, int) and value < 1) or (isinstance(value, float) and not 0.0 < value <= 1.0):
            raise f.fail(at, f"{value!r}: a count is at least 1, a share above 0 and at most 1.0")
        before = [stage for stage in stages if type(stage) is type(value)]
        if before and value <= before[-1]:
            raise f.fail(at, f"{value!r} does not rise above the earlier stage {before[-1]!r}")
        stages.append(value)
    if not stages or stages[-1] != 1.0 or not isinstance(stages[-1], float):
        raise f.fail(name, "the last stage must be 1.0, everyone")
    return tuple(stages)


def read_gates(f: Fields, d: Gates) -> Gates:
    """Gates, with ``d`` where a key is absent; raises the reader's error family."""
    gates = Gates(
        committed_share=f.number("committed_share", d.committed_share, low=0.01, high=1.0),
        min_online_share=f.number("min_online_share", d.min_online_share, low=0.0, high=1.0),
        bake_seconds=f.number("bake_seconds", d.bake_seconds, low=0.0),
        timeout_seconds=f.number("timeout_seconds", d.timeout_seconds, low=0.1),
        max_failures=f.integer("max_failures", d.max_failures),
        min_rows=f.integer("min_rows", d.min_rows),
        max_bad_row_rate=f.number("max_bad_row_rate", d.max_bad_row_rate, low=0.0, high=1.0),
        max_latency_ratio=f.number("max_latency_ratio", d.max_latency_ratio, low=0.0),
        max_accuracy_drop=f.number("max_accuracy_drop", d.max_accuracy_drop, low=0.0, high=1.0),
        min_labelled=f.integer("min_labelled", d.min_labelled, low=1),
        design_effect=f.number("design_effect", d.design_effect, low=1.0),
        control_seconds=f.number("control_seconds", d.control_seconds, low=0.0),
    )
    f.finish()
    return gates


def read_trial(f: Fields, d: TrialGate) -> TrialGate:
    """The trial's gate on the device, with ``d`` where a key is absent; raises the reader's error family."""
    trial = TrialGate(
        predictions=f.integer("predictions", d.predictions),
        seconds=f.number("seconds", d.seconds, low=0.0),
        starts=f.integer("starts", d.starts, low=1, high=1000),
    )
    f.finish()
    return trial


def _retrain(f: Fields) -> RetrainConfig:
    default = RetrainConfig()
    config = RetrainConfig(
        command=f.texts("command", default.command),
        timeout_seconds=f.number("timeout_seconds", default.timeout_seconds, low=1.0),
        cooldown_seconds=f.number("cooldown_seconds", default.cooldown_seconds, low=0.0),
    )
    f.finish()
    if config.command and "{request}" not in config.command:
        raise f.fail("command", "has no '{request}' word: the hook needs the path of the request's file")
    return config


def _alarms(f: Fields) -> AlarmsConfig:
    d = AlarmsConfig()
    config = AlarmsConfig(
        mqtt=f.flag("mqtt", d.mqtt),
        webhook=f.text("webhook", d.webhook),
        command=f.texts("command", d.command),
        timeout_seconds=f.number("timeout_seconds", d.timeout_seconds, low=0.1, high=3600.0),
        attempts=f.integer("attempts", d.attempts, low=1, high=1000),
    )
    f.finish()
    url = urlsplit(config.webhook)
    if config.webhook and not (url.scheme in ("http", "https") and url.hostname):
        raise f.fail("webhook", f"{config.webhook!r} is no address; give 'https://HOST/PATH'")
    if url.password is not None:
        raise f.fail("webhook", "holds a password; put a token into SKIFF_ALARM_TOKEN")
    if config.command and "{alarm}" not in config.command:
        raise f.fail("command", "has no '{alarm}' word: the command needs the path of the alarm's file")
    return config


def _metrics(f: Fields) -> MetricsConfig:
    default = MetricsConfig()
    config = MetricsConfig(
        listen=f.text("listen", default.listen),
        refresh_seconds=f.number("refresh_seconds", default.refresh_seconds, low=0.1),
        silent_seconds=f.number("silent_seconds", default.silent_seconds, low=1.0),
    )
    f.finish()
    host, _, port = config.listen.rpartition(":")
    if config.listen and not (host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise f.fail("listen", f"{config.listen!r} is not HOST:PORT, for example '127.0.0.1:9464'")
    return config
