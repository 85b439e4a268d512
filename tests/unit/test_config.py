"""The device's configuration file, and what it says about mistakes."""

from pathlib import Path

import pytest

from edge_runtime.config import load
from edge_runtime.contract.errors import ConfigError

MINIMAL = """
[device]
id = "dev-1"
fleet = "fleet"
state_dir = "state"

[broker]

[model]
name = "watch"
trust_root = "root.json"
"""


@pytest.fixture
def write(tmp_path):
    def put(text, name="device.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return put


def test_a_minimal_file_gets_safe_defaults(write, tmp_path, monkeypatch):
    monkeypatch.delenv("SKIFF_BROKER_PASSWORD", raising=False)
    config = load(write(MINIMAL))
    assert (config.fleet, config.device, config.cohort, config.model) == ("fleet", "dev-1", "main", "watch")
    assert (config.broker.host, config.broker.port, config.broker.password) == ("localhost", 1883, "")
    assert (config.window.period_ns, config.window.min_rows) == (300_000_000_000, 30)
    assert (config.budget.predict_p99_ns, config.budget.rss_bytes) == (0, 0)
    assert (config.source.kind, config.threads, config.clock) == ("none", 1, "auto")
    assert config.state_dir == (tmp_path / "state").resolve()
    assert config.trust_root == (tmp_path / "root.json").resolve()


def test_units_are_converted(write):
    text = (
        MINIMAL
        + "[budgets]\npredict_p99_us = 200.5\nrss_mb = 150\n[window]\nseconds = 2.5\n[outbox]\nmax_mb = 2\n"
    )
    config = load(write(text))
    assert (config.budget.predict_p99_ns, config.budget.rss_bytes) == (200_500, 150_000_000)
    assert (config.window.period_ns, config.outbox_bytes) == (2_500_000_000, 2_000_000)


def test_the_password_comes_from_the_environment_only(write, monkeypatch):
    monkeypatch.setenv("SKIFF_BROKER_PASSWORD", "secret")
    assert load(write(MINIMAL)).broker.password == "secret"
    with pytest.raises(ConfigError, match=r"broker: unknown key 'password'"):
        load(write(MINIMAL.replace("[broker]", '[broker]\npassword = "x"')))


def test_paths_are_relative_to_the_file_and_home_is_known(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = MINIMAL.replace('"state"', '"~/state"').replace('"root.json"', '"/etc/skiffd/root.json"')
    config = load(write(text))
    assert config.state_dir == (tmp_path / "home/state").resolve()
    assert config.trust_root == Path("/etc/skiffd/root.json")


def test_tls_files_are_found(write, tmp_path):
    tls = '[broker.tls]\nca = "ca.pem"\ncertificate = "dev.pem"\nkey = "dev.key"\n'
    broker = load(write(MINIMAL + tls)).broker
    folder = tmp_path.resolve()
    expected = (str(folder / "ca.pem"), str(folder / "dev.pem"), str(folder / "dev.key"))
    assert (broker.ca, broker.certificate, broker.key) == expected


def test_a_source_is_described_with_its_units(write, tmp_path, monkeypatch):
    monkeypatch.setenv("SKIFF_SOURCE_PASSWORD", "local secret")
    text = (
        '[source]\nkind = "unix"\nsocket = "rows.sock"\nsocket_mode = "600"\nmax_clients = 3\nmax_line_kb = 2\n'
        'topic_in = "in"\ntopic_out = "out"\n[source.broker]\nhost = "gateway"\nport = 1884\nusername = "u"\n'
    )
    source = load(write(MINIMAL + text)).source
    assert (source.kind, source.socket, source.socket_mode) == (
        "unix",
        tmp_path.resolve() / "rows.sock",
        0o600,
    )
    assert (source.max_clients, source.max_line_bytes) == (3, 2048)
    assert (source.topic_in, source.topic_out) == ("in", "out")
    there = source.broker
    assert (there.host, there.port, there.username, there.password, there.ca) == (
        "gateway",
        1884,
        "u",
        "local secret",
        "",
    )


def test_a_local_broker_is_on_this_machine_without_tls_unless_told(write):
    there = load(write(MINIMAL)).source.broker
    assert (there.host, there.port, there.ca) == ("localhost", 1883, "")


def test_what_the_device_may_cost_is_kept_in_bytes(write):
    text = (
        '[budgets]\nrss_soft_mb = 90\nrss_mb = 120\non_hard_limit = "roll_back"\ntemperature_c = 80.5\n'
        "load_peak_mb = 150\nupdate_mb = 160\nwindow_bytes = 700\nstart_seconds = 4\n"
    )
    config = load(write(MINIMAL + text))
    limits, costs = config.limits, config.costs
    assert (limits.rss_soft_bytes, limits.rss_bytes, limits.on_hard) == (90_000_000, 120_000_000, "roll_back")
    assert (limits.temperature_soft_mc, config.budget.rss_bytes) == (80_500, 120_000_000)
    assert (costs.load_peak_bytes, costs.update_peak_bytes) == (150_000_000, 160_000_000)
    assert (costs.window_bytes, costs.start_seconds) == (700, 4.0)
    assert load(write(MINIMAL)).limits.on_hard == "shed"


def test_the_engine_is_told_how_to_run(write):
    text = MINIMAL + "arena = true\nrun_limit_seconds = 0.5\nmax_batch = 64\n"
    config = load(write(text))
    assert (config.arena, config.run_limit_seconds, config.max_batch) == (True, 0.5, 64)


@pytest.mark.parametrize(
    ("seconds", "told", "jitter_seconds"),
    [(2.5, "", 0.25), (900, "", 30.0), (900, "jitter_seconds = 0", 0.0), (2, "jitter_seconds = 7", 7.0)],
)
def test_windows_are_spread_over_a_tenth_of_the_period_unless_told(write, seconds, told, jitter_seconds):
    config = load(write(MINIMAL + f"[window]\nseconds = {seconds}\n{told}\n"))
    assert config.window.jitter_ns == int(jitter_seconds * 1e9)


@pytest.mark.parametrize(
    ("told", "clock"),
    [
        ("", "auto"),
        ('clock_synced = "auto"', "auto"),
        ("clock_synced = true", "synced"),
        ("clock_synced = false", "unsynced"),
    ],
)
def test_the_clock_is_trusted_as_told_or_as_the_kernel_says(write, told, clock):
    config = load(write(MINIMAL.replace("[device]", f"[device]\n{told}")))
    assert config.clock == clock


@pytest.mark.parametrize(
    ("told", "size_bytes"),
    [
        ("", 65_536),
        ("max_kb = 32", 32_768),
        ("max_mb = 8", 8_000_000),
        ("max_kb = 32\nmax_mb = 1.5", 1_500_000),
    ],
)
def test_the_outbox_holds_a_month_unless_there_is_more_room(write, told, size_bytes):
    assert load(write(MINIMAL + f"[outbox]\n{told}\n")).outbox_bytes == size_bytes


def test_the_status_socket_stands_in_the_state_folder_unless_told(write, tmp_path):
    assert load(write(MINIMAL)).status_socket == (tmp_path / "state/status.sock").resolve()
    text = MINIMAL.replace("[device]", "[device]\nstatus_socket = '/run/skiffd/s'")
    assert load(write(text)).status_socket == Path("/run/skiffd/s")


@pytest.mark.parametrize("protocol", ["auto", "5", "3.1.1"])
def test_the_version_of_mqtt_reaches_the_link(write, protocol):
    text = MINIMAL.replace("[broker]", f'[broker]\nprotocol = "{protocol}"')
    assert load(write(text)).broker.protocol == protocol


# ── base ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_overrides_its_base_key_by_key(write):
    write(
        MINIMAL + '[window]\nseconds = 60\nmin_rows = 7\n[device.attributes]\nsite = "a"\nhardware = "b"\n',
        "base.toml",
    )
    text = (
        'base = "base.toml"\n[device]\nid = "dev-9"\n[window]\nseconds = 5\n[device.attributes]\nsite = "c"\n'
    )
    config = load(write(text))
    assert (config.device, config.fleet) == ("dev-9", "fleet")
    assert (config.window.period_ns, config.window.min_rows) == (5_000_000_000, 7)
    assert dict(config.attributes) == {"site": "c", "hardware": "b"}


def test_paths_of_a_base_are_relative_to_the_file_that_names_it(write, tmp_path):
    (tmp_path / "classes").mkdir()
    write(MINIMAL, "classes/base.toml")
    assert load(write('base = "classes/base.toml"\n')).state_dir == (tmp_path / "state").resolve()


def test_a_base_that_is_not_there_is_named(write, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot be read \(No such file"):
        load(write('base = "nowhere.toml"\n'))


def test_a_base_of_a_base_is_refused(write):
    write('base = "third.toml"\n', "second.toml")
    with pytest.raises(ConfigError, match=r"device.toml.base: second.toml names a base of its own"):
        load(write('base = "second.toml"\n'))


def test_a_base_that_is_no_path_is_refused(write):
    with pytest.raises(ConfigError, match="base: expected the path"):
        load(write("base = 3\n"))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "device_configs").glob("*.toml")), ids=lambda p: p.stem
)
def test_every_shipped_hardware_class_is_a_base(write, path):
    config = load(write(f'base = "{path}"\n[device]\nid = "my-device"\nfleet = "mine"\n'))
    assert (config.device, config.fleet) == ("my-device", "mine")
    assert config.budget.predict_p99_ns > 0
    assert config.budget.rss_bytes > 0


# ── mistakes ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_file_is_named_with_what_to_do(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no.toml: cannot be read \(No such file or directory\); pass the path"
    ):
        load(tmp_path / "no.toml")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["[device\n", "a = \n", "a = 1\na = 2\n"])
def test_broken_toml_is_told_with_the_line(write, text):
    with pytest.raises(ConfigError, match=r"device.toml: not TOML \(.*line"):
        load(write(text))


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "device.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not TOML"):
        load(path)


TYPOS = {
    "section": (MINIMAL + "[budgts]\n", r"device.toml: unknown key 'budgts' \(did you mean 'budgets'\?\)"),
    "device": (
        MINIMAL.replace("[device]", "[device]\ncohrt = 'x'"),
        r"device: unknown key 'cohrt' \(did you mean 'cohort'",
    ),
    "broker": (
        MINIMAL.replace("[broker]", "[broker]\nprot = 1"),
        r"broker: unknown key 'prot' \(did you mean 'port'",
    ),
    "tls": (MINIMAL + "[broker.tls]\ncert = 'x'\n", "tls: unknown key 'cert'.*certificate"),
    "model": (MINIMAL + "thread = 2\n", r"model: unknown key 'thread' \(did you mean 'threads'"),
    "window": (MINIMAL + "[window]\nsecond = 2\n", r"window: unknown key 'second' \(did you mean 'seconds'"),
    "budgets": (
        MINIMAL + "[budgets]\nrss_bytes = 2\n",
        r"budgets: unknown key 'rss_bytes' \(did you mean 'rss_mb'",
    ),
    "update": (
        MINIMAL + "[update]\ndeadline = 2\n",
        "update: unknown key 'deadline' .did you mean 'deadline_seconds'",
    ),
    "outbox": (MINIMAL + "[outbox]\nmax = 2\n", r"outbox: unknown key 'max' \(did you mean 'max_mb'"),
    "source": (MINIMAL + "[source]\npth = 'x'\n", r"source: unknown key 'pth' \(did you mean 'path'"),
}


@pytest.mark.parametrize(("text", "message"), TYPOS.values(), ids=TYPOS.keys())
def test_an_unknown_key_is_named_with_the_nearest_valid_one(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load(write(text))


WRONG = {
    "no device": ("[broker]\n", "device.toml.device: is missing"),
    "no id": (MINIMAL.replace('id = "dev-1"\n', ""), "device.id: is missing"),
    "device with a slash": (
        MINIMAL.replace("dev-1", "a/b"),
        "device.toml.device.id: 'a/b' is not a device name",
    ),
    "fleet in capitals": (MINIMAL.replace('"fleet"', '"Fleet"'), "device.fleet: 'Fleet' is not a fleet name"),
    "model": (MINIMAL.replace("watch", "#"), "model.name: '#' is not a model name"),
    "cohort": (
        MINIMAL.replace("[device]", "[device]\ncohort = '+'"),
        "device.cohort: '.' is not a cohort name",
    ),
    "port": (
        MINIMAL.replace("[broker]", "[broker]\nport = 70000"),
        r"broker.port: 70000 is outside \[1, 65535\]",
    ),
    "port as text": (
        MINIMAL.replace("[broker]", "[broker]\nport = '1'"),
        "broker.port: expected a whole number",
    ),
    "attribute": (MINIMAL + "[device.attributes]\nfloor = 3\n", "attributes.floor: expected text"),
    "window": (MINIMAL + "[window]\nseconds = 0\n", "window.seconds: 0.0 is not a finite number in"),
    "infinite": (MINIMAL + "[budgets]\nrss_mb = inf\n", "budgets.rss_mb: inf is not a finite number"),
    "replay of nothing": (MINIMAL + "[source]\nkind = 'replay'\n", "source.path: is missing: a replay needs"),
    "source": (
        MINIMAL + "[source]\nkind = 'reply'\n",
        r"source.kind: 'reply' is not one of none, replay, stdio, unix, mqtt \(did you mean 'replay'",
    ),
    "half a certificate": (MINIMAL + "[broker.tls]\nkey = 'x'\n", "tls.certificate: and key belong together"),
    "soft above hard": (
        MINIMAL + "[budgets]\nrss_soft_mb = 9\nrss_mb = 8\n",
        r"device.toml.budgets.rss_soft_mb: the soft limit of 9.* is above the hard limit of 8",
    ),
    "action": (
        MINIMAL + "[budgets]\non_hard_limit = 'shedd'\n",
        r"on_hard_limit: 'shedd' is not one of .*did you mean 'shed'",
    ),
    "clock": (MINIMAL.replace("[device]", "[device]\nclock_synced = 3"), "device.clock_synced: expected"),
    "clock as text": (
        MINIMAL.replace("[device]", "[device]\nclock_synced = 'no'"),
        "device.clock_synced: expected true or false",
    ),
    "protocol": (MINIMAL.replace("[broker]", "[broker]\nprotocol = '4'"), "'4' is not one of auto, 5, 3.1.1"),
    "mode": (
        MINIMAL + "[source]\nsocket_mode = 'rw'\n",
        r"source.socket_mode: 'rw' does not match 0\?\[0-7\]\{3\}",
    ),
    "socket of nothing": (MINIMAL + "[source]\nkind = 'unix'\n", "source.socket: is missing"),
    "topic of nothing": (MINIMAL + "[source]\nkind = 'mqtt'\n", "source.topic_in: is missing"),
    "tls of a local broker": (
        MINIMAL + "[source.broker]\ntls = {}\n",
        "source.broker: unknown key 'tls'",
    ),
    "section that is a value": ("window = 3\n" + MINIMAL, "window: expected a table"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_told_by_its_key(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load(write(text))
