"""The aggregator's TOML: defaults, meaning, and refusals that name the key."""

import pytest

from aggregator.config import (
    AggregatorConfig,
    AlarmsConfig,
    DriftConfig,
    IngestConfig,
    RetrainConfig,
    RolloutConfig,
    load,
)
from aggregator.records import Gates
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import FleetId
from edge_runtime.contract.release import TrialGate


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "aggregator.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


def test_a_fleet_is_all_that_is_needed(write, tmp_path):
    config = load(write('fleet = "demo"'))
    assert config == AggregatorConfig(
        fleet=FleetId("demo"), state_dir=tmp_path / "state", registry=tmp_path / "registry"
    )
    assert config.ledger_path == tmp_path / "state" / "ledger.sqlite"
    assert config.windows_path == tmp_path / "state" / "windows.sqlite"
    assert (config.drift, config.ingest) == (DriftConfig(), IngestConfig())
    assert (config.rollout, config.retrain) == (RolloutConfig(), RetrainConfig())
    assert config.alarms == AlarmsConfig()


def test_everything_can_be_said(write, tmp_path, monkeypatch):
    monkeypatch.setenv("SKIFF_COORDINATOR_PASSWORD", "secret")
    config = load(
        write(
            """
            fleet = "demo"
            state_dir = "/var/lib/skiff"
            registry = "repository/targets"
            director_key = "keys/director.json"
            [broker]
            host = "broker"
            port = 8883
            ca = "ca.pem"
            [broker.aggregator]
            certificate = "a.pem"
            key = "a.key"
            [broker.coordinator]
            username = "coordinator"
            [ingest]
            batch_messages = 10
            device_messages = 20
            share = "aggregators"
            lease_seconds = 2
            [drift]
            attributes = ["wrist"]
            alpha = 0.05
            confirmations = 3
            [rollout]
            stages = [1, 0.2, 1.0]
            [rollout.gates]
            bake_seconds = 1
            max_failures = 2
            [rollout.trial]
            predictions = 5
            [retrain]
            command = ["train", "{request}"]
            cooldown_seconds = 5
            [alarms]
            mqtt = true
            webhook = "https://pager.example:8443/skiff?team=a"
            command = ["page", "{alarm}"]
            timeout_seconds = 2
            keep_hours = 24.0
            """
        )
    )
    assert str(config.state_dir) == "/var/lib/skiff"
    assert config.director_key == tmp_path / "keys" / "director.json"
    assert config.broker.ca == str(tmp_path / "ca.pem")
    assert config.broker.aggregator.certificate == str(tmp_path / "a.pem")
    assert config.broker.coordinator.password == "secret"
    assert "secret" not in repr(config)
    assert config.ingest == IngestConfig(
        batch_messages=10, device_messages=20, share="aggregators", lease_seconds=2.0
    )
    assert config.drift == DriftConfig(attributes=("wrist",), alpha=0.05, confirmations=3)
    assert config.rollout.stages == (1, 0.2, 1.0)
    assert config.rollout.gates == Gates(bake_seconds=1.0, max_failures=2)
    assert config.rollout.trial == TrialGate(predictions=5)
    assert config.retrain == RetrainConfig(command=("train", "{request}"), cooldown_seconds=5.0)
    assert config.alarms == AlarmsConfig(
        mqtt=True,
        webhook="https://pager.example:8443/skiff?team=a",
        command=("page", "{alarm}"),
        timeout_seconds=2.0,
        keep_hours=24.0,
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", r"aggregator\.toml\.fleet: is missing"),
        ('fleet = "De mo"', r"fleet: .*not a fleet name"),
        ('fleet = "demo"\nfeet = 1', "unknown key 'feet' .did you mean 'fleet'"),
        ('fleet = "demo"\n[drift]\nalfa = 0.1', r"\.drift: unknown key 'alfa' .did you mean 'alpha'"),
        ('fleet = "demo"\n[drift]\nalpha = 0.4\nclear_p = 0.3', "could never stay open"),
        ('fleet = "demo"\n[drift]\nmax_devices = 3', "below min_devices"),
        ('fleet = "demo"\n[ingest]\nshare = "a/b"', "ingest.share: 'a/b' does not match"),
        ('fleet = "demo"\n[ingest]\ndevice_messages = 19', r"device_messages: 19 is outside"),
        ('fleet = "demo"\n[drift]\nalpha = "x"', r"drift\.alpha: expected a number"),
        ('fleet = "demo"\n[broker]\nport = 70000', r"broker\.port: 70000 is outside"),
        ('fleet = "demo"\n[broker.aggregator]\nkey = "a"', "belong together"),
        ('fleet = "demo"\n[rollout]\nstages = [1]', "the last stage must be 1.0"),
        ('fleet = "demo"\n[rollout]\nstages = [0.5, 0.2, 1.0]', "does not rise"),
        ('fleet = "demo"\n[rollout.gates]\nbake = 1', "unknown key 'bake'"),
        ('fleet = "demo"\n[retrain]\ncommand = ["train"]', "no '{request}' word"),
        ('fleet = "demo"\n[alarms]\ncommand = ["page"]', "no '{alarm}' word"),
        ('fleet = "demo"\n[alarms]\nwebhook = "pager.example"', r"alarms\.webhook: .* is no address"),
        ('fleet = "demo"\n[alarms]\nwebhook = "ftp://pager.example/"', "is no address; give 'https"),
        ('fleet = "demo"\n[alarms]\nwebhook = "https://a:b@pager.example"', "SKIFF_ALARM_TOKEN"),
        ('fleet = "demo"\n[alarms]\nkeep_hours = -1.0', r"keep_hours: -1.0 is not a finite number"),
        ("fleet =", "not TOML"),
    ],
)
def test_a_mistake_is_named(write, text, why):
    with pytest.raises(ConfigError, match=why):
        load(write(text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load(tmp_path / "none.toml")


def test_the_ledger_may_be_a_database(write, tmp_path):
    url = "postgresql+psycopg://skiff@db.example/fleet"
    assert load(write(f'fleet = "demo"\nledger = "{url}"')).ledger_at == url
    assert load(write('fleet = "demo"')).ledger_at == tmp_path / "state" / "ledger.sqlite"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://db/fleet", "does not begin with postgresql"),
        ("postgresql+psycopg://skiff:secret@db/fleet", "PGPASSWORD"),
    ],
)
def test_a_ledger_elsewhere_or_with_a_password_is_refused(write, url, words):
    with pytest.raises(ConfigError, match=f"ledger.*{words}"):
        load(write(f'fleet = "demo"\nledger = "{url}"'))
