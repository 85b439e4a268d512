"""What `skiffd --check` says of each thing that can be wrong with a device, and of one where nothing is."""

import datetime as dt
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_runtime import check
from edge_runtime.adapters import sandbox
from edge_runtime.adapters.slots import Slots
from edge_runtime.adapters.status_socket import StatusSocket
from edge_runtime.adapters.unix_socket import MAX_PATH_BYTES
from edge_runtime.check import broker as broker_check
from edge_runtime.check import certificate, storage
from edge_runtime.check.finding import Finding, Level
from edge_runtime.check.machine import Machine, available_bytes, check_machine
from edge_runtime.check.model import check_model
from edge_runtime.config import load
from edge_runtime.contract.ids import digest_of, model_name
from edge_runtime.core import lifecycle
from tests.services import HOST, free_port
from tests.support.certificates import Authority
from tests.support.fake_broker import NOT_AUTHORISED, FakeBroker
from tests.support.tiny_models import classifier, sealed
from trainer.publish import Repository

NOW = dt.datetime(2026, 11, 21, 12, 0, tzinfo=dt.UTC)
TINY = classifier()
ROOT: dict[str, Any] = {
    "signed": {
        "_type": "root",
        "version": 3,
        "expires": "2027-01-01T00:00:00Z",
        "keys": {"k1": {}, "k2": {}},
        "roles": {
            name: {"keyids": ["k1", "k2"], "threshold": 2 if name == "root" else 1} for name in storage.ROLES
        },
    },
    "signatures": [{"keyid": "k1", "sig": "aa"}, {"keyid": "k2", "sig": "bb"}],
}


@pytest.fixture
def configured(tmp_path):
    """A device that is in order; extra TOML is appended."""

    def make(extra="", *, broker=""):
        (tmp_path / "root.json").write_text(json.dumps(ROOT))
        (tmp_path / "state").mkdir(exist_ok=True)
        path = tmp_path / "skiffd.toml"
        path.write_text(
            '[device]\nid = "dev-1"\nfleet = "fleet"\nstate_dir = "state"\n[model]\nname = "tiny"\n'
            f'trust_root = "root.json"\n[broker]\nhost = "{HOST}"\n{broker}\n{extra}\n'
        )
        return load(path)

    return make


def machine(**answers):
    good = {
        "now_seconds": NOW.timestamp(),
        "clock_synced": True,
        "available_bytes": 4_000_000_000,
        "limit_bytes": 0,
        "architecture": "aarch64",
        "pointer_bits": 64,
        "libc": ("glibc", "2.36"),
        "cores": 4,
    }
    return Machine(**{name: (lambda value=value: value) for name, value in {**good, **answers}.items()})


def only(findings, level):
    """The one finding of that level."""
    [found] = [finding for finding in findings if finding.level is level]
    assert level is Level.OK or found.remedy
    return found


def all_good(findings):
    return bool(findings) and all(finding.level is Level.OK for finding in findings)


# ── the whole ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_device_in_order_has_no_complaint(configured, monkeypatch):
    monkeypatch.setattr(storage, "VOLATILE", frozenset())  # the tests' own folders may be in memory
    asked = []

    def connect(broker, client_id, _):
        asked.append((broker.port, broker.protocol, client_id))
        return ""

    with FakeBroker(lambda wire: None) as broker:
        config = configured(broker=f"port = {broker.port}")
        findings = check.check(config, machine=machine(), connect=connect, read=lambda *_: True)
        assert all_good(findings), findings
        assert asked == [(broker.port, "5", "dev-1")]
    assert not list(config.state_dir.iterdir()), "it left something behind"
    places = {finding.where for finding in findings}
    assert places >= {"machine", "clock", "memory", "device.state_dir", "model.trust_root", "model", "broker"}


def test_offline_asks_nobody(configured):
    def connect(*_):
        raise AssertionError("asked")

    findings = check.check(configured(broker="port = 1"), offline=True, machine=machine(), connect=connect)
    assert "broker" not in {finding.where for finding in findings}


def test_it_prints_lines_or_json_and_fails_only_on_errors(configured, capsys, monkeypatch):
    config = configured()
    found = [Finding(Level.OK, "a", "fine"), Finding(Level.WARNING, "b", "hm", "look")]
    monkeypatch.setattr(check, "check", lambda *_, **__: found)
    assert check.main(config) == 0
    assert capsys.readouterr().out.splitlines() == ["OK      a: fine", "WARNING b: hm; look"]
    found.append(Finding(Level.ERROR, "c", "bad", "mend"))
    assert check.main(config, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)[2] == {
        "level": "error",
        "where": "c",
        "what": "bad",
        "remedy": "mend",
    }


def test_it_runs_as_a_command_without_loading_the_engine(configured, tmp_path):
    configured(broker="port = 1")
    script = (
        "import sys; from edge_runtime.check.__main__ import main; code = main(sys.argv[1:]);"
        "assert 'onnxruntime' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "skiffd.toml"), "--offline", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ONNX Runtime runs" in done.stdout
    done = subprocess.run([*command[:3], "absent.toml"], capture_output=True, text=True, check=False)
    assert (done.returncode, "absent.toml: cannot be read" in done.stderr) == (2, True)


@pytest.mark.parametrize("key", ["device.id", "device.fleet", "model.name"])
def test_a_placeholder_that_was_not_replaced(configured, key):
    name = {"device.id": "device", "device.fleet": "fleet", "model.name": "model"}[key]
    config = replace(configured(), **{name: "change-me"})
    assert only(storage.check_names(config), Level.ERROR).where == key


# ── machine ────────────────────────────────────────────────────────────────────────────────────────────

MACHINES = {
    "32-bit processor": ({"architecture": "armv7l"}, Level.ERROR, "machine", "armv7l"),
    "32-bit system": ({"pointer_bits": 32}, Level.ERROR, "machine", "32-bit Python"),
    "musl": ({"libc": ("", "")}, Level.ERROR, "machine", "other than glibc"),
    "old glibc": ({"libc": ("glibc", "2.27")}, Level.ERROR, "machine", "2.28 or newer"),
    "1970": ({"now_seconds": 12.0}, Level.ERROR, "clock", "1970-01-01"),
    "far future": ({"now_seconds": 4.2e9}, Level.ERROR, "clock", "2103"),
    "nobody keeps the clock": ({"clock_synced": False}, Level.WARNING, "clock", "no NTP client"),
    "nobody tells of the clock": ({"clock_synced": None}, Level.WARNING, "device.clock_synced", "not tell"),
    "little memory": ({"available_bytes": 10**8}, Level.WARNING, "budgets", "100 MB are available"),
    "little allowed": ({"limit_bytes": 250_000_000}, Level.ERROR, "budgets", "killed at 250 MB"),
    "few cores": ({"cores": 1}, Level.WARNING, "model.threads", "2 threads for 1 cores"),
}


@pytest.mark.parametrize(("answers", "level", "where", "what"), MACHINES.values(), ids=MACHINES)
def test_a_machine_that_does_not_fit(configured, answers, level, where, what):
    config = configured("[budgets]\nrss_mb = 200\nrss_soft_mb = 150\nupdate_mb = 150\n")
    config = replace(config, threads=2)
    assert all_good(list(check_machine(config, machine())))
    found = only(check_machine(config, machine(**answers)), level)
    assert found.where == where
    assert what in found.what


def test_a_clock_that_is_told_to_be_bad_needs_no_warning(configured):
    config = replace(configured(), clock="unsynced")
    assert all_good(list(check_machine(config, machine(clock_synced=False))))


def test_this_machine_has_memory_and_not_more_than_it_has():
    with Path("/proc/meminfo").open(encoding="ascii") as figures:
        total = int(figures.readline().split()[1])
    assert 10_000_000 < available_bytes() <= total * 1024


# ── state folder ───────────────────────────────────────────────────────────────────────────────────────


def test_a_state_folder_that_does_not_exist_is_not_made(configured):
    config = configured()
    config.state_dir.rmdir()
    assert only(storage.check_state_dir(config), Level.OK).what.endswith("will be created")
    assert not config.state_dir.exists()


def test_a_state_folder_that_is_a_file(configured):
    config = configured()
    config.state_dir.rmdir()
    config.state_dir.write_text("")
    assert only(storage.check_state_dir(config), Level.ERROR).what.endswith("is no folder")


def test_a_state_folder_that_cannot_be_written(configured, monkeypatch):
    config = configured()

    def refuse(_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    found = only(storage.check_state_dir(config), Level.ERROR)
    assert "Read-only file system" in found.what
    assert not list(config.state_dir.iterdir())


def test_a_place_where_no_state_folder_can_be_made(configured, monkeypatch):
    config = replace(configured(), state_dir=configured().state_dir / "below")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not writable" in only(storage.check_state_dir(config), Level.ERROR).what


@pytest.mark.parametrize("kind", ["tmpfs", "overlay"])
def test_a_state_folder_in_memory_is_warned_of(configured, tmp_path, kind):
    config = configured()
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/sda1 / ext4 rw 0 0\nx {tmp_path} {kind} rw 0 0\ny {tmp_path}/other ext4 rw 0 0\n"
    )
    assert kind in only(storage.check_state_dir(config, mounts), Level.WARNING).what
    mounts.write_text(f"/dev/sda1 / tmpfs rw 0 0\nx {tmp_path} ext4 rw 0 0\n")
    assert all_good(list(storage.check_state_dir(config, mounts)))


@pytest.mark.parametrize(("free_mb", "level"), [(5, Level.ERROR), (100, Level.WARNING)])
def test_a_disk_that_is_nearly_full(configured, tmp_path, monkeypatch, free_mb, level):
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/sda1 / ext4 rw 0 0\n")
    usage = os.statvfs(tmp_path)
    full = os.statvfs_result((*usage[:1], 1_000_000, usage[2], free_mb, free_mb, *usage[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    assert f"{free_mb} MB are free" in only(storage.check_state_dir(configured(), mounts), level).what


# ── trust root ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_root_as_the_publisher_makes_it_is_good(configured, tmp_path):
    config = configured()
    root = Repository.create(tmp_path / "repository").pinned_root
    found = only(storage.check_trust_root(replace(config, trust_root=root), NOW.timestamp()), Level.OK)
    assert "is version 1" in found.what


def changed(**changes):
    document = json.loads(json.dumps(ROOT))
    document["signed"].update(changes)
    return json.dumps(document)


ROOTS = {
    "nothing": ("", "is no TUF root"),
    "no JSON": ("{", "is no TUF root"),
    "a list": ("[]", "is no TUF root"),
    "deep": ("[" * 100_000, "is no TUF root"),
    "another role": (changed(_type="targets"), "type 'targets'"),
    "no roles": (changed(roles={}), "is no TUF root"),
    "keys that are not there": (changed(keys={"k1": {}}), "asks for 2 signatures of root and has 1 keys"),
    "no date": (changed(expires="soon"), "is no TUF root"),
    "one signature": (
        json.dumps({**ROOT, "signatures": ROOT["signatures"][:1]}),
        "signed by 1 of 2 root keys",
    ),
}


@pytest.mark.parametrize(("text", "what"), ROOTS.values(), ids=ROOTS)
def test_a_root_that_is_none(configured, text, what):
    config = configured()
    config.trust_root.write_text(text)
    assert what in only(storage.check_trust_root(config, NOW.timestamp()), Level.ERROR).what


def test_a_root_that_is_missing_or_expired(configured):
    config = configured()
    later = dt.datetime(2028, 1, 1, tzinfo=dt.UTC).timestamp()
    assert "expired on 2027-01-01" in only(storage.check_trust_root(config, later), Level.WARNING).what
    config.trust_root.unlink()
    assert "No such file" in only(storage.check_trust_root(config, later), Level.ERROR).what


# ── model ──────────────────────────────────────────────────────────────────────────────────────────────


def install(config, artifact, digest):
    slots = Slots(config.state_dir)
    slots.staging(digest).write_bytes(artifact)
    slots.install(digest)
    slots.write_record(lifecycle.to_document(lifecycle.SlotState(model=model_name("tiny"), committed=digest)))


def test_an_installed_model_is_asked_its_golden_row(configured):
    config = configured("[budgets]\nrss_mb = 1000\nload_peak_mb = 1000\n")
    install(config, TINY.artifact, TINY.digest)
    assert f"model {TINY.digest[:12]} gives its known answer" in only(check_model(config), Level.OK).what


def test_a_model_that_answers_otherwise_is_an_error(configured):
    config = configured()
    artifact = sealed(replace(TINY, weights=-TINY.weights).graph(), TINY.metadata)
    install(config, artifact, digest_of(artifact))
    assert "golden" in only(check_model(config), Level.ERROR).what


def test_a_damaged_model_is_an_error(configured):
    config = configured()
    install(config, TINY.artifact, TINY.digest)
    blob = Slots(config.state_dir).blob(TINY.digest)
    blob.write_bytes(TINY.artifact[:-1])
    assert "SHA-256" in only(check_model(config), Level.ERROR).what


def test_a_damaged_record_is_an_error(configured):
    config = configured()
    for copy in "ab":
        (config.state_dir / f"record.{copy}.json").write_text("{")
    assert "not a record" in only(check_model(config), Level.ERROR).what


def test_the_engine_alone_may_be_too_large_for_the_budgets(configured):
    config = configured("[budgets]\nrss_mb = 20\n")
    found = only(check_model(config), Level.ERROR)
    assert found.where == "budgets.rss_mb"


def test_an_engine_that_crashes_is_reported(configured, monkeypatch):
    monkeypatch.setattr("edge_runtime.check.model.sandbox.run", lambda *_, **__: sandbox.Ended(-4, b"", ""))
    assert "crashed with SIGILL" in only(check_model(configured()), Level.ERROR).what


def test_an_engine_that_does_not_answer_is_reported(configured, monkeypatch):
    def slow(*_, **__):
        raise TimeoutError("not done after 120 s")

    monkeypatch.setattr("edge_runtime.check.model.sandbox.run", slow)
    assert "not done" in only(check_model(configured()), Level.ERROR).what


# ── source and sockets ─────────────────────────────────────────────────────────────────────────────────


def test_a_recorded_file(configured, tmp_path):
    config = configured('[source]\nkind = "replay"\npath = "rows.npz"\n')
    assert only(storage.check_source(config), Level.ERROR).where == "source.path"
    (tmp_path / "rows.npz").write_text("a,b\n")
    assert "no .npz" in only(storage.check_source(config), Level.ERROR).what
    np.savez(tmp_path / "rows.npz", features=np.zeros(3))
    assert all_good(list(storage.check_source(config)))


def test_a_socket_whose_path_is_too_long_for_the_kernel(configured, tmp_path):
    path = tmp_path / ("x" * (MAX_PATH_BYTES - len(str(tmp_path)) - 1))
    config = configured(f'[source]\nkind = "unix"\nsocket = "{path}"\n')
    assert all_good(list(storage.check_source(config)))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))  # so many the kernel does take
    config = configured(f'[source]\nkind = "unix"\nsocket = "{path}y"\n')
    assert "108 bytes" in only(storage.check_source(config), Level.ERROR).what


def test_a_socket_in_a_folder_that_is_not_there(configured):
    config = configured('[source]\nkind = "unix"\nsocket = "nowhere/s"\n')
    assert "is not there" in only(storage.check_source(config), Level.ERROR).what


def test_a_socket_where_a_file_is(configured, tmp_path):
    (tmp_path / "s").write_text("precious")
    config = configured('[source]\nkind = "unix"\nsocket = "s"\n')
    assert "no socket" in only(storage.check_source(config), Level.ERROR).what


def test_a_socket_in_a_folder_of_somebody_else(configured, monkeypatch):
    config = configured('[source]\nkind = "unix"\nsocket = "s"\n')
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = list(storage.check_source(config))
    assert only(found, Level.ERROR).where == "source.socket"
    assert only(found, Level.WARNING).where == "device.status_socket", "the status has a second place"


def test_a_status_socket_where_a_file_is(configured):
    config = configured()
    config.status_socket.write_text("precious")
    assert only(storage.check_source(config), Level.ERROR).where == "device.status_socket"


# ── certificate ────────────────────────────────────────────────────────────────────────────────────────


def issue(folder, *, name="dev-1", start=-1, end=300, usage=None):
    """A certificate and key; ``start`` and ``end`` in days from today."""
    today = dt.datetime.now(dt.UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(today + dt.timedelta(days=start))
        .not_valid_after(today + dt.timedelta(days=end))
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    made = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    (folder / "dev.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "dev.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


TLS = '[broker.tls]\nca = "ca.pem"\ncertificate = "dev.pem"\nkey = "dev.key"\n'


@pytest.fixture
def enrolled(configured, tmp_path):
    Authority(tmp_path)
    return configured(TLS)


CERTIFICATES = {
    "good": ({}, Level.OK, "made out to dev-1, valid until"),
    "for clients": ({"usage": ExtendedKeyUsageOID.CLIENT_AUTH}, Level.OK, "made out to dev-1"),
    "for servers only": ({"usage": ExtendedKeyUsageOID.SERVER_AUTH}, Level.ERROR, "purpose"),
    "expired": ({"start": -9, "end": -2}, Level.ERROR, "expired"),
    "not yet valid": ({"start": 2}, Level.ERROR, "not yet valid"),
    "another device's": ({"name": "dev-2"}, Level.ERROR, "made out to 'dev-2'"),
    "expires soon": ({"end": 20}, Level.WARNING, "it expires on"),
}


@pytest.mark.parametrize(("made", "level", "what"), CERTIFICATES.values(), ids=CERTIFICATES)
def test_a_certificate_is_judged_as_a_broker_would(enrolled, tmp_path, made, level, what):
    issue(tmp_path, **made)
    now = dt.datetime.now(dt.UTC).timestamp()
    assert what in only(broker_check.check_certificate(enrolled, now), level).what


def test_the_key_of_another_certificate(enrolled, tmp_path):
    issue(tmp_path)
    key = (tmp_path / "dev.key").read_bytes()
    issue(tmp_path)
    (tmp_path / "dev.key").write_bytes(key)
    found = only(broker_check.check_certificate(enrolled, 0.0), Level.ERROR)
    assert "KEY_VALUES_MISMATCH" in found.what


def test_files_that_are_missing_or_are_none(enrolled, tmp_path):
    missing = list(broker_check.check_certificate(enrolled, 0.0))
    assert [finding.where for finding in missing] == ["broker.tls.certificate", "broker.tls.key"]
    (tmp_path / "dev.pem").write_text("no certificate")
    (tmp_path / "dev.key").write_text("no key")
    assert only(broker_check.check_certificate(enrolled, 0.0), Level.ERROR).where == "broker.tls.certificate"


def test_the_port_of_tls_without_an_authority(configured):
    config = configured(broker="port = 8883")
    assert only(broker_check.check_certificate(config, 0.0), Level.ERROR).where == "broker.tls.ca"


def test_a_certificate_from_the_authority_of_the_suite(tmp_path):
    authority = Authority(tmp_path)
    pair = authority.issue("dev-1")
    seen = certificate.look_at(pair.certificate, pair.key, authority.path)
    assert (seen.problem, seen.common_name) == ("", "dev-1")
    assert dt.datetime.fromtimestamp(seen.expires_seconds, dt.UTC).year == 2099


# ── broker ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_host_without_an_address(configured):
    config = configured()
    config = replace(config, broker=replace(config.broker, host="no-such-host.invalid"))
    found = only(broker_check.check_fleet_broker(config), Level.ERROR)
    assert found.where == "broker.host"


def test_a_port_where_nobody_listens(configured):
    config = configured(broker=f"port = {free_port()}")
    assert "nothing answers" in only(broker_check.check_fleet_broker(config), Level.ERROR).what


def test_a_broker_that_refuses_us(configured):
    with FakeBroker(lambda wire: broker.answer(wire, NOT_AUTHORISED), welcome=False) as broker:
        config = configured(broker=f'port = {broker.port}\nprotocol = "3.1.1"')
        found = only(broker_check.check_fleet_broker(config), Level.ERROR)
    assert "uthor" in found.what
    assert "SKIFF_BROKER_PASSWORD" in found.remedy


def drained(wire):
    while wire.recv(4096):
        pass


def test_a_broker_that_says_nothing(configured, monkeypatch):
    monkeypatch.setattr(broker_check, "CONNECT_SECONDS", 0.3)
    with FakeBroker(drained, welcome=False) as broker:
        config = configured(broker=f'port = {broker.port}\nprotocol = "3.1.1"')
        assert "no answer within 0.3 s" in only(broker_check.check_fleet_broker(config), Level.ERROR).what


def test_an_older_broker_is_told_by_the_version_it_takes(configured):
    def connect(broker, *_):
        return "" if broker.protocol == "3.1.1" else "unsupported"

    with FakeBroker(lambda wire: None) as broker:
        config = configured(broker=f"port = {broker.port}")
        found = only(broker_check.check_fleet_broker(config, connect, lambda *_: True), Level.OK)
        assert "MQTT 3.1.1, without TLS" in found.what
        config = configured(broker=f'port = {broker.port}\nprotocol = "5"')
        assert (
            "MQTT 5: unsupported" in only(broker_check.check_fleet_broker(config, connect), Level.ERROR).what
        )


def test_a_broker_that_shows_nothing_of_the_fleet(configured):
    asked = []

    def read(broker, client_id, topics, _):
        asked.append((client_id, topics))
        return False

    with FakeBroker(lambda wire: None) as broker:
        config = configured(broker=f"port = {broker.port}")
        found = only(broker_check.check_fleet_broker(config, lambda *_: "", read), Level.WARNING)
    assert asked == [("dev-1", ("skiff/1/fleet/tuf/1z", "skiff/1/fleet/tuf/1"))]
    assert "access rules deny dev-1 everything" in found.what
    assert "skiff broker-config" in found.remedy


def test_a_daemon_that_runs_keeps_its_connection(configured):
    config = configured(broker="port = 1")
    server = StatusSocket(config.status_socket, lambda: {"fine": True})
    server.start()
    try:
        assert "skiffd runs" in only(broker_check.check_fleet_broker(config), Level.OK).what
    finally:
        server.stop()


def test_the_broker_that_rows_come_from(configured):
    asked = []

    def connect(broker, client_id, _):
        asked.append((broker.port, client_id))
        return "no"

    assert not list(broker_check.check_source_broker(configured(), connect))
    with FakeBroker(lambda wire: None) as broker:
        local = f'[source]\nkind = "mqtt"\ntopic_in = "rows"\n[source.broker]\nhost = "{HOST}"\nport = {broker.port}\n'
        found = only(broker_check.check_source_broker(configured(local), connect), Level.ERROR)
        assert found.where == "source.broker"
        assert asked == [(broker.port, "dev-1-check")] * 2
