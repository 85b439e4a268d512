"""`skiff pki`: what a dry run announces is what happens, thresholds move and devices follow, files for a device."""

import contextlib
import json
import shutil
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from tuf.api.metadata import Metadata
from typer.testing import CliRunner

from aggregator.adapters.ledger import Ledger
from aggregator.config import load as load_aggregator
from aggregator.records import Track
from cli.app import app
from cli.digests import digest_among
from edge_runtime.check import certificate
from edge_runtime.config import load
from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.messages import TrustBundle
from edge_runtime.truststore import TrustStore
from tests.publisher import MODEL, artifact, put
from tests.support.fleet import device as device_record
from tests.support.ledger_kit import RELEASE
from trainer.authority import SERVICES, Authority
from trainer.keyring import KEYS
from trainer.publish import PublishError, Repository
from trainer.store import LAST_CHANGE

RUN = CliRunner()
DIGEST = "a" * 64


@pytest.fixture
def root(tmp_path):
    return tmp_path / "repository"


@pytest.fixture
def repository(root):
    return Repository.create(root)


def run(*words, code=0):
    done = RUN.invoke(app, ["pki", *map(str, words)])
    assert done.exit_code == code, done.output
    return done


def contents(folder):
    """Every file below ``folder``, with its bytes and mode."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextlib.contextmanager
def device(root, repository):
    """A device that was provisioned with the first root and remembers from visit to visit."""
    with TrustStore(root.parent / "device", (root / "metadata" / "1.root.json").read_bytes()) as store:
        store.refresh(repository.bundle(1))
        yield store


def move_away(root, *names):
    (root.parent / "safe").mkdir(exist_ok=True)
    for name in names:
        shutil.move(root / "keys" / f"{name}.json", root.parent / "safe")


def signatures(root, name):
    """(keys that signed validly, threshold) of a root file, as it says itself."""
    md = Metadata.from_file(str(root / "metadata" / name))
    found = md.signed.get_root_verification_result(None, md.signed_bytes, md.signatures).first
    return len(found.signed), found.threshold


# ── dry runs ───────────────────────────────────────────────────────────────────────────────────────────

CHANGES: dict[str, list[object]] = {
    "threshold-up": ["threshold", "ROOT", "root", 3, "--keys", 5],
    "threshold-down": ["threshold", "ROOT", "root", 1, "--keys", 2],
    "threshold-targets": ["threshold", "ROOT", "targets", 2, "--keys", 3],
    "renew": ["renew", "ROOT"],
    "refresh": ["refresh", "ROOT"],
    "revoke": ["revoke", "ROOT", DIGEST],
    **{f"rotate-{role}": ["rotate", "ROOT", role] for role in KEYS},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_dry_run_announces_exactly_what_is_then_written_and_writes_nothing(repository, root, change):
    repository.enable_auto(MODEL)
    words = [root if word == "ROOT" else word for word in CHANGES[change]]
    before = contents(root)
    announced = run(*words, "--dry-run").stdout
    as_data = json.loads(run(*words, "--dry-run", "--json").stdout)
    assert contents(root) == before
    assert run(*words).stdout == announced
    after = contents(root)
    written = {name for name in after if before.get(name) != after[name]} - {f"keys/{LAST_CHANGE}"}
    removed = set(before) - set(after)
    keys = {f"keys/{name}" for name in as_data["new_keys"]}
    assert written == {f"metadata/{file['name']}" for file in as_data["metadata"]} | keys
    assert removed == {f"keys/{name}" for name in as_data["removed_keys"]}
    for file in as_data["metadata"]:
        signed = json.loads(after[f"metadata/{file['name']}"][0])["signed"]
        assert signed["version"] == file["version"]
        assert f"{datetime.fromisoformat(file['expires']):%Y-%m-%d}" == signed["expires"][:10]
        assert f"metadata/{file['name']}  version {file['version']}, until" in announced
    assert all(mode == 0o600 for name, (_, mode) in after.items() if name in keys)
    with device(root, repository):
        pass


def test_a_dry_run_without_the_keys_says_which_role_lacks_how_many(repository, root):
    move_away(root, "root-1", "root-2", "targets-1")
    before = contents(root)
    done = run("rotate", root, "targets", "--dry-run", code=1)
    assert "2.root.json  version 2" in done.stdout
    assert "signed by 2 of 3 root keys (here: root-3.json, 1 MISSING)" in done.stdout
    assert "signed by 2 of 2 targets keys (here: targets-1.json targets-2.json)" in done.stdout, (
        "they are made by it"
    )
    assert "bring the missing keys back" in done.stderr
    done = run("renew", root, "--dry-run", code=1)
    assert "signed by 2 of 2 targets keys (here: targets-2.json, 1 MISSING)" in done.stdout
    assert contents(root) == before
    run("rotate", root, "targets", code=1)
    assert contents(root) == before


def test_looking_leaves_what_a_crash_left(repository, root):
    shutil.copy(root / "keys" / "root-1.json", root / "keys" / "root-1.next.json")
    before = contents(root)
    run("show", root)
    run("rotate", root, "root", "--dry-run")
    assert contents(root) == before
    run("refresh", root)
    assert not (root / "keys" / "root-1.next.json").exists()


# ── thresholds ─────────────────────────────────────────────────────────────────────────────────────────


def test_from_two_of_three_to_three_of_five_and_devices_follow(repository, root):
    digest = repository.add(put(root.parent, artifact()), role="targets").digest
    with device(root, repository) as store:
        assert store.find(MODEL, digest)
    repository.resize("root", 3, 5)
    assert signatures(root, "2.root.json") == (5, 3)
    assert sorted(path.name for path in (root / "keys").glob("root-*.json")) == [
        f"root-{i}.json" for i in range(1, 6)
    ]
    with device(root, repository) as store:
        assert store.find(MODEL, digest)
    move_away(root, "root-1", "root-2", "root-3")
    with pytest.raises(PublishError, match="needs 3 of the 5 root keys, and 2 are in"):
        repository.rotate("timestamp")
    shutil.copy(root.parent / "safe" / "root-2.json", root / "keys")
    repository.rotate("timestamp")
    assert signatures(root, "3.root.json") == (3, 3)
    with device(root, repository):
        pass


def test_the_new_root_is_signed_as_the_old_one_asks_and_as_it_asks_itself(repository, root):
    """Three of the three keys there are, from two of three: the two that are here are not enough for the new root."""
    move_away(root, "root-2")
    before = contents(root)
    with pytest.raises(PublishError, match="needs 3 of the 3 root keys, and 2 are in"):
        repository.resize("root", 3)
    assert contents(root) == before
    shutil.move(root.parent / "safe" / "root-2.json", root / "keys")
    repository.resize("root", 3)
    with device(root, repository):
        pass
    move_away(root, "root-1", "root-3")
    with pytest.raises(PublishError, match="needs 3 of the 3 root keys, and 1 are in"):
        repository.resize("root", 1)


def test_a_lower_number_of_keys_keeps_the_first_and_takes_the_others_rights(repository, root):
    repository.resize("root", 3, 5)
    dropped = [(root / "keys" / f"root-{i}.json").read_bytes() for i in (4, 5)]
    repository.resize("root", 2, 3)
    assert sorted(path.name for path in (root / "keys").glob("root-*.json")) == [
        f"root-{i}.json" for i in range(1, 4)
    ]
    with device(root, repository):
        pass
    move_away(root, "root-2", "root-3")
    for number, data in zip((2, 3), dropped, strict=True):  # whoever kept them can sign nothing that counts
        (root / "keys" / f"root-{number}.json").write_bytes(data)
    with pytest.raises(PublishError, match="needs 2 of the 3 root keys, and 1 are in"):
        repository.renew()


def test_fewer_keys_need_those_that_stay(repository, root):
    move_away(root, "root-1")
    before = contents(root)
    with pytest.raises(PublishError, match=r"those that stay have to be here: bring back root-1\.json"):
        repository.resize("root", 2, 2)
    assert contents(root) == before


def test_targets_keys_are_added_and_the_new_ones_count(repository, root):
    repository.resize("targets", 2, 3)
    move_away(root, "targets-1")
    digest = repository.add(put(root.parent, artifact()), role="targets").digest
    with device(root, repository) as store:
        assert store.find(MODEL, digest)
    repository.resize("targets", 1, 3)
    move_away(root, "targets-2")
    repository.revoke(digest)
    with device(root, repository) as store:
        assert store.is_revoked(digest)


def test_a_device_that_slept_through_it_all_follows_from_the_first_root(repository, root):
    digest = repository.add(put(root.parent, artifact()), role="targets").digest
    for change in (
        lambda: repository.rotate("root"),
        lambda: repository.resize("root", 3, 5),
        lambda: repository.rotate("root"),
        lambda: repository.rotate("targets"),
        lambda: repository.resize("targets", 3, 4),
        lambda: repository.rotate("snapshot"),
        lambda: repository.resize("root", 2, 3),
        repository.renew,
        lambda: repository.rotate("timestamp"),
    ):
        change()
    assert repository.root_version == 10
    with device(root, repository) as store:
        assert store.find(MODEL, digest)
    with TrustStore(root.parent / "newer", (root / "metadata" / "7.root.json").read_bytes()) as store:
        store.refresh(repository.bundle(7))
        assert store.find(MODEL, digest)


def test_the_old_keys_below_their_threshold_move_no_device(repository, root):
    """The check behind the rule: a root that only one of the old keys signed is refused by devices."""
    with device(root, repository):
        pass
    repository.resize("root", 3, 5)
    files = dict(repository.bundle(1).files)
    path = root / "metadata" / "2.root.json"
    md = Metadata.from_file(str(path))
    old = json.loads((root / "metadata" / "1.root.json").read_bytes())["signed"]["roles"]["root"]["keyids"]
    for keyid in old[1:]:
        del md.signatures[keyid]
    path.write_bytes(md.to_bytes())
    with pytest.raises(PublishError, match=r"2\.root\.json is not signed as 1\.root\.json asks"):
        repository.bundle(1)
    told = TrustBundle(root_version=1, files=tuple(sorted({**files, path.name: path.read_bytes()}.items())))
    with (
        TrustStore(root.parent / "device", (root / "metadata" / "1.root.json").read_bytes()) as store,
        pytest.raises(ContractError, match="root was signed by 1/2 keys"),
    ):
        store.refresh(told)


@pytest.mark.parametrize(
    ("role", "number", "keys"),
    [("root", 0, 3), ("root", 4, 0), ("root", 4, 3), ("root", -1, 0), ("root", 2, 10), ("targets", 3, 0)],
)
def test_thresholds_out_of_bounds_are_refused(repository, root, role, number, keys):
    before = contents(root)
    with pytest.raises(PublishError, match="the threshold is at least 1 and at most the number of keys"):
        repository.resize(role, number, keys)
    assert contents(root) == before


@pytest.mark.parametrize("role", ["snapshot", "timestamp", "builder", "director", "other"])
def test_only_root_and_targets_are_signed_by_several(repository, root, role):
    done = run("threshold", root, role, 1, code=1)
    assert "only root and targets are signed by several" in done.stderr


def test_what_is_so_already_is_not_written_again(repository, root):
    before = contents(root)
    assert "that is so already" in run("threshold", root, "root", 2).stdout
    assert contents(root) == before


# ── show, renew, refresh, revoke ───────────────────────────────────────────────────────────────────────


def test_show_says_who_signs_until_when_and_which_private_keys_are_here(repository, root):
    repository.enable_auto(MODEL)
    repository.resize("root", 3, 4)
    move_away(root, "root-2", "director")
    roles = {role["role"]: role for role in json.loads(run("show", root, "--json").stdout)["roles"]}
    assert list(roles) == ["root", "targets", f"auto-{MODEL}", "timestamp", "snapshot", "director"]
    assert (roles["root"]["threshold"], roles["root"]["version"]) == (3, 2)
    assert [key["file"] for key in roles["root"]["keys"]] == [
        "root-1.json",
        None,
        "root-3.json",
        "root-4.json",
    ]
    assert [key["file"] for key in roles["director"]["keys"]] == [None]
    assert [key["file"] for key in roles[f"auto-{MODEL}"]["keys"]] == ["builder.json"]
    table = run("show", root).stdout.splitlines()
    assert table[0].split()[:6] == ["root", "3", "of", "4", "version", "2"]
    assert table[0].endswith("here: root-1.json root-3.json root-4.json")
    assert table[-1].endswith("here: none")


def test_renew_and_refresh_say_until_when(root):
    start = datetime.now(UTC)
    Repository.create(root, clock=lambda: start - timedelta(days=300))
    year, week = (f"{start + timedelta(days=days):%Y-%m-%d}" for days in (365, 7))
    assert f"timestamp.json  version 2, until {week}" in run("refresh", root).stdout
    assert f"2.root.json  version 2, until {year}" in run("renew", root).stdout


def test_revoke_names_the_models_and_devices_refuse_them(repository, root):
    digest = repository.add(put(root.parent, artifact()), role="targets").digest
    done = run("revoke", root, digest, DIGEST)
    assert f"{digest}  toy 1.0" in done.stderr
    assert f"{DIGEST}  not published here" in done.stderr
    with device(root, repository) as store:
        assert store.is_revoked(digest)
        assert store.is_revoked(Digest(DIGEST))
    assert "is not a SHA-256 digest" in run("revoke", root, "toy", code=2).stderr


def test_what_tables_show_of_a_digest_is_enough(repository, root, monkeypatch):
    digest = repository.add(put(root.parent, artifact()), role="targets").digest
    assert f"{digest}  toy 1.0" in run("revoke", root, digest[:8], "--dry-run").stderr
    assert "is not a SHA-256 digest" in run("revoke", root, digest[:7], code=2).stderr
    assert "no published model's digest begins so" in run("retire", root, "f" * 12, code=2).stderr
    known = [digest, digest[:12] + "0" * 52]
    with pytest.raises(ConfigError, match="begins the digests of 2 models"):
        digest_among(known, digest[:12])
    assert digest_among(known, digest) == digest
    assert run("retire", root, digest[:12]).exit_code == 0
    assert repository.published() == ()


def test_what_has_expired_is_marked_and_refreshing_warns_of_what_it_does_not_renew(root):
    start = datetime.now(UTC) - timedelta(days=400)
    Repository.create(root, clock=lambda: start)
    assert all(" expired 20" in line for line in run("show", root).stdout.splitlines()[:-1])
    states = {
        role["role"]: role["expired"] for role in json.loads(run("show", root, "--json").stdout)["roles"]
    }
    assert states == {"root": True, "targets": True, "timestamp": True, "snapshot": True, "director": False}
    told = run("refresh", root).stderr
    assert f"root expired on {start + timedelta(days=365):%Y-%m-%d}" in told
    assert "targets expired on" in told
    assert "timestamp expired" not in told
    assert "skiff pki renew" in told
    run("renew", root)
    assert "expired on" not in run("refresh", root).stderr
    assert "expired 20" not in run("show", root).stdout


def test_retire_says_what_it_takes_away_and_from_whom_it_does_not(repository, root, tmp_path):
    path = put(tmp_path, artifact())
    digest = repository.add(path, role="targets").digest
    config = tmp_path / "aggregator.toml"
    config.write_text('fleet = "fleet"\n', encoding="utf-8")
    before = contents(root)
    announced = run("retire", root, digest, "--dry-run")
    assert f"{digest}  toy 1.0" in announced.stderr
    assert "3.targets.json  version 3" in announced.stdout
    assert contents(root) == before
    needed = replace(RELEASE, candidate=Digest("b" * 64), incumbent=digest)
    with closing(Ledger(load_aggregator(config).ledger_path)) as ledger, ledger.transaction():
        ledger.put_track(Track(cohort=RELEASE.cohort, model=RELEASE.model, release=needed))
    for more in ([], ["--dry-run"]):
        done = run("retire", root, digest, "--aggregator", config, *more, code=2)
        assert f"{digest}: the release of cohort main names it: roll out another" in done.stderr
    with closing(Ledger(load_aggregator(config).ledger_path)) as ledger, ledger.transaction():
        ledger.put_track(Track(cohort=RELEASE.cohort, model=RELEASE.model, release=RELEASE))
        ledger.put_device(device_record("dev-1", serving=digest))
    assert f"{digest}: dev-1 serves it" in run("retire", root, digest, "-a", config, code=2).stderr
    assert contents(root) == before
    with closing(Ledger(load_aggregator(config).ledger_path)) as ledger, ledger.transaction():
        ledger.put_device(device_record("dev-1", serving=Digest("b" * 64)))
    assert run("retire", root, digest, "-a", config).stdout == announced.stdout
    assert Repository(root).published() == ()
    assert "nothing is written" in run("retire", root, digest).stdout
    assert repository.add(path, role="targets").digest == digest, "it may come back"


def test_retire_says_which_keys_it_lacks(repository, root, tmp_path):
    digest = repository.add(put(tmp_path, artifact()), role="targets").digest
    move_away(root, "targets-1")
    done = run("retire", root, digest, "--dry-run", code=1)
    assert "1 MISSING" in done.stdout
    run("retire", root, digest, code=1)
    assert [model.digest for model in Repository(root).published()] == [digest]


def test_init_makes_opens_and_allows_and_the_old_form_says_what_to_do(root):
    assert "pinned root" in run("init", root).stdout
    before = contents(root)
    run("init", root)
    assert contents(root) == before
    done = run("init", root, "--auto", MODEL)
    assert f"the builder key alone may publish models of {MODEL} from now on" in done.stdout
    assert f"skiff publish --repository {root}" in done.stderr
    assert Repository(root).auto_models == (MODEL,)
    assert "from now on" not in run("init", root, "--auto", MODEL).output
    fresh = run("init", root.parent / "fresh", "--auto", MODEL)
    assert "from now on" in fresh.stdout
    assert "skiff publish" not in fresh.stderr
    done = run(root, code=2)
    assert "skiff pki init" in done.stderr
    assert "no repository here" in run("show", root.parent / "nowhere", code=1).stderr


# ── certificates ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def ca(tmp_path):
    run("ca", tmp_path / "ca", "--fleet", "demo")
    return tmp_path / "ca"


def test_a_folder_for_a_device_is_all_that_it_needs(ca, root, tmp_path):
    Repository.create(root)
    home = tmp_path / "pump-17"
    words = [
        "device",
        ca,
        "pump-17",
        "--out",
        home,
        "-r",
        root,
        "--model",
        "watch",
        "--hardware",
        "raspberry-pi-4",
    ]
    run(*words, "--broker", "broker.example:8884")
    assert sorted(path.name for path in home.iterdir()) == [
        "ca.crt", "device.crt", "device.key", "raspberry-pi-4.toml", "root.json", "skiffd.toml",
    ]  # fmt: skip
    assert stat.S_IMODE((home / "device.key").stat().st_mode) == 0o600
    config = load(home / "skiffd.toml")
    assert (config.device, config.fleet, config.model) == ("pump-17", "demo", "watch")
    assert (config.broker.host, config.broker.port) == ("broker.example", 8884)
    assert config.trust_root.read_bytes() == (root / "metadata" / "1.root.json").read_bytes()
    seen = certificate.look_at(config.broker.certificate, config.broker.key, config.broker.ca)
    assert (seen.problem, seen.common_name) == ("", "pump-17")


def test_without_a_hardware_class_the_configuration_stands_alone(ca, root, tmp_path):
    Repository.create(root)
    home = tmp_path / "pump-17"
    run("device", ca, "pump-17", "--out", home, "-r", root, "--model", "watch", "--broker", "::1")
    config = load(home / "skiffd.toml")
    assert (config.broker.host, config.broker.port) == ("::1", 8883)


def test_what_a_configuration_needs_is_asked_for_before_anything_is_issued(ca, root, tmp_path):
    Repository.create(root)
    words = ["device", ca, "pump-17", "--out", tmp_path / "out", "-r", root, "--model", "watch"]
    for more, message in (
        (["--broker", "b.example", "--model", ""], "--model missing"),
        (["--broker", "b.example:0"], "is no TCP port"),
        (["--broker", 'b"\n[x]'], "neither an address nor a host name"),
        (["--broker", "b.example", "--hardware", "raspberry-pi-44"], "did you mean 'raspberry-pi-4'"),
    ):
        done = RUN.invoke(app, ["pki", *map(str, [*words, *more])])
        assert done.exit_code in {1, 2}
        assert message in done.stderr
    assert Authority(ca).entries() == ()
    assert not (tmp_path / "out").exists()


def test_a_key_is_never_written_over_unless_renewed(ca, tmp_path):
    out = tmp_path / "out"
    run("device", ca, "pump-17", "--out", out)
    key = (out / "device.key").read_bytes()
    assert "is there already" in run("device", ca, "pump-18", "--out", out, code=2).stderr
    assert (out / "device.key").read_bytes() == key
    assert [entry.name for entry in Authority(ca).entries()] == ["pump-17"]
    run("device", ca, "pump-17", "--out", out, "--renew")
    assert (out / "device.key").read_bytes() != key


def test_services_and_the_broker_get_theirs(ca, tmp_path):
    for which, common in SERVICES.items():
        run("service", ca, which, "--out", tmp_path / "host")
        assert (tmp_path / "host" / f"{common}.key").exists()
    run("server", ca, "broker.example", "127.0.0.1", "--out", tmp_path / "certs")
    found = x509.load_pem_x509_certificate((tmp_path / "certs" / "server.crt").read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert "it is one of" in run("service", ca, "pump-17", "--out", tmp_path / "x", code=1).stderr
    assert (
        "is no name for a device"
        in run("device", ca, "skiff-aggregator", "--out", tmp_path / "x", code=1).stderr
    )


def test_the_list_of_devices_and_what_revoking_tells_the_operator_to_do(ca, tmp_path):
    run("device", ca, "pump-17", "--out", tmp_path / "a", "--days", 10)
    run("device", ca, "pump-18", "--out", tmp_path / "b")
    done = run("revoke-device", ca, "pump-17")
    assert "skiff broker-config demo --authority" in done.stderr
    assert "reload Mosquitto" in done.stderr
    assert "was revoked before" in run("revoke-device", ca, "pump-17").stderr
    rows = json.loads(run("devices", ca, "--json").stdout)["certificates"]
    assert [(row["name"], row["state"]) for row in rows] == [("pump-17", "revoked"), ("pump-18", "valid")]
    lines = run("devices", ca).stdout.splitlines()
    assert "pump-17" in lines[0]
    assert f"revoked {datetime.now(UTC):%Y}" in lines[0]
    assert rows[1]["serial"] in lines[1]


def test_enrolling_what_was_revoked_says_that_the_broker_has_to_learn_of_it(ca, tmp_path):
    for words in (["device", ca, "pump-17"], ["service", ca, "observer"]):
        name = "pump-17" if words[0] == "device" else "skiff-observer"
        assert "was revoked" not in run(*words, "--out", tmp_path / f"{name}-1").stderr
        run("revoke-device", ca, name)
        again = run(*words, "--out", tmp_path / f"{name}-2").stderr
        assert (
            "denied everything until then: it counts once the broker has read it: skiff broker-config"
            in again
        )
        assert "was revoked" not in run(*words, "--renew", "--out", tmp_path / f"{name}-3").stderr


@pytest.mark.slow
def test_an_index_from_a_backup_takes_back_no_revocation_and_the_broker_learns_all(ca, tmp_path):
    run("device", ca, "pump-1", "--out", tmp_path / "a")
    backup = (ca / "index.json").read_bytes()
    run("revoke-device", ca, "pump-1")
    run("device", ca, "pump-2", "--out", tmp_path / "b")
    (ca / "index.json").write_bytes(b"{")
    assert "restore it from its backup" in run("devices", ca, code=1).stderr
    (ca / "index.json").write_bytes(backup)
    words = [sys.executable, "-m", "cli.main", "broker-config", "demo", "--out", str(tmp_path / "etc")]
    done = subprocess.run([*words, "--authority", str(ca)], capture_output=True, text=True, check=True)
    assert "is older than what stands beside it" in done.stderr
    assert "revocation of pump-1" in done.stderr
    assert len(x509.load_pem_x509_crl((tmp_path / "etc" / "certs" / "crl.pem").read_bytes())) == 1
    assert "user pump-1\ntopic deny" in (tmp_path / "etc" / "skiff.acl").read_text()
    assert "revoked pump-2" in run("revoke-device", ca, "pump-2").stdout


def test_broker_config_takes_the_authoritys_public_files_and_never_its_key(ca, tmp_path):
    run("device", ca, "pump-17", "--out", tmp_path / "a")
    run("revoke-device", ca, "pump-17")
    etc = tmp_path / "etc"
    done = RUN.invoke(app, ["broker-config", "demo", "--out", str(etc), "--authority", str(ca)])
    assert done.exit_code == 0, done.output
    assert set(contents(etc)) == {"mosquitto.conf", "skiff.acl", "certs/ca.crt", "certs/crl.pem"}
    assert len(x509.load_pem_x509_crl((etc / "certs" / "crl.pem").read_bytes())) == 1
    assert "user pump-17\ntopic deny skiff/1/demo/#" in (etc / "skiff.acl").read_text()
    conf = (etc / "mosquitto.conf").read_text().splitlines()
    assert {
        "listener 8883",
        "crlfile /etc/mosquitto/certs/crl.pem",
        "acl_file /etc/mosquitto/skiff.acl",
    } < set(conf)
    done = RUN.invoke(app, ["broker-config", "other", "--out", str(etc), "--authority", str(ca)])
    assert (done.exit_code, "the authority is that of fleet demo" in done.stderr) == (2, True)


def test_broker_config_again_does_not_reset_what_the_first_options_said(ca, tmp_path):
    etc = tmp_path / "etc"
    site = [
        "--prefix",
        "/srv/mq",
        "--data",
        "/srv/data",
        "--port",
        "8884",
        "--address",
        "127.0.0.1",
        "--user",
        "mq",
    ]

    def configure(*words):
        return RUN.invoke(app, ["broker-config", "demo", "--out", str(etc), *words])

    assert configure("--authority", str(ca), *site).exit_code == 0
    before = contents(etc)
    assert configure("--authority", str(ca), *site).exit_code == 0
    assert contents(etc) == before
    done = configure()
    assert done.exit_code == 2
    assert "'listener 8884 127.0.0.1' would become 'listener 8883'" in done.stderr
    keep = "--port 8884 --address 127.0.0.1 --prefix /srv/mq --data /srv/data/ --user mq --authority FOLDER"
    assert f"To keep what is there: {keep};" in done.stderr
    assert contents(etc) == before
    words = keep.replace("FOLDER", str(ca)).split()
    assert configure(*words).exit_code == 0
    assert contents(etc) == before
    (etc / "mosquitto.conf").unlink()
    assert configure("--authority", str(ca)).exit_code == 0
    assert "listener 8883\n" in (etc / "mosquitto.conf").read_text()


def test_broker_config_without_an_authority_names_no_list_that_would_be_missing(tmp_path):
    RUN.invoke(
        app, ["broker-config", "demo", "--out", str(tmp_path), "--prefix", "/srv/mq/", "--data", "/srv/data"]
    )
    conf = (tmp_path / "mosquitto.conf").read_text()
    assert "crlfile" not in conf
    assert "cafile /srv/mq/certs/ca.crt\n" in conf
    assert "persistence_location /srv/data/\n" in conf
    done = RUN.invoke(
        app, ["broker-config", "demo", "--out", str(tmp_path), "--data", "/a\nallow_anonymous true"]
    )
    assert "cannot stand in mosquitto.conf" in done.stderr
