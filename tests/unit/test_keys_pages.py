"""The commands of the pages on certificates and on signing keys, run in their order and as they stand."""

import re
import shlex
import shutil
import subprocess
import tomllib

import pytest
from typer.testing import CliRunner

from aggregator.config import load as load_aggregator
from cli.app import app
from edge_runtime.config import load
from tests.publisher import artifact
from tests.services import missing_service
from tests.unit.test_install_page import commands
from trainer.authority import Authority
from trainer.publish import Repository

ENROL, KEYS = "docs/how-to/enrol-a-device.md", "docs/how-to/signing-keys.md"


@pytest.fixture
def read(repository):
    return lambda page: (repository / page).read_text(encoding="utf-8")


def skiff(line):
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, f"{line}\n{done.output}"
    return done.stdout


def test_the_page_on_enrolling_leads_to_a_device_that_is_renewed_and_revoked(read, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        missing_service("openssl is not installed (Debian: apt-get install openssl)")
    page = read(ENROL)
    monkeypatch.chdir(tmp_path)
    Repository.create("repository")
    (request,) = [line for line in commands(page) if "openssl " in line]
    request = request.replace("sudo ", "").replace("/etc/skiffd/", "")
    states: list[list[bool]] = []
    serial = ""
    for line in (line for line in commands(page) if line.startswith("skiff ")):
        if "--csr" in line:  # "make a new request as above"
            subprocess.run(shlex.split(request), check=True, capture_output=True)
        skiff(line.replace("SERIAL", serial))
        entries = [e for e in Authority(tmp_path / "authority").entries() if e.name == "pump-17"]
        serial = entries[0].serial if entries else ""
        now = [entry.revoked is None for entry in entries]
        states += [now] if states[-1:] != [now] else []
    assert states == [[], [True], [True, True], [False, True], [False, False]]
    assert "user pump-17" in (tmp_path / "mosquitto" / "skiff.acl").read_text()
    shutil.copy("device.key", "pump-17")
    assert str(load(tmp_path / "pump-17" / "skiffd.toml").broker.key) == str(
        tmp_path / "pump-17" / "device.key"
    )


def test_its_aggregator_finds_the_three_identities(read, tmp_path, monkeypatch):
    page = read(ENROL)
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        if line.startswith(("skiff pki ca ", "skiff pki service ")):
            skiff(line)
    [text] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    tomllib.loads(text)
    (tmp_path / "aggregator.toml").write_text(f'fleet = "demo"\nstate_dir = "state"\nregistry = "r"\n{text}')
    broker = load_aggregator(tmp_path / "aggregator.toml").broker
    for identity in (broker.aggregator, broker.coordinator, broker.publisher):
        assert (tmp_path / identity.certificate).exists()
        assert (tmp_path / identity.key).exists()
    assert (tmp_path / broker.ca).exists()


def test_what_the_page_says_a_device_may_do_is_what_the_rules_say(read):
    from cli.broker_config import acl  # noqa: PLC0415 (beside what it is compared with)
    from edge_runtime.contract.ids import FleetId  # noqa: PLC0415 (same)

    told = re.search(r"A device writes its own (.*?), and reads its own(.*?)\.", read(ENROL), re.DOTALL)
    assert told is not None
    for verb, text in zip(("write", "read"), told.groups(), strict=True):
        topics = [
            line.split()[2] for line in acl(FleetId("f")).splitlines() if line.startswith(f"pattern {verb} ")
        ]
        ruled = {word for topic in topics for word in topic.split("/")[3:] if word[0].isalpha()} - {"d"}
        ruled |= {topic.split("/")[3 - 1] for topic in topics} - {"1", "d"}
        assert set(re.findall(r"`([a-z]+)`", text)) == ruled - {"f"}


def test_the_page_on_signing_keys_leads_from_two_of_three_to_three_of_five(read, tmp_path, monkeypatch):
    page = read(KEYS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(artifact(name="watch"))
    digest = ""
    for line in commands(page):
        if "revoke" in line:
            digest = Repository("repository").add("model.onnx", role="targets").digest
        told = skiff(line.replace("DIGEST", digest))
        if line == "skiff pki show repository":
            [shown] = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
            assert [undated(row) for row in told.splitlines()] == [undated(row) for row in shown.splitlines()]
    found = Repository("repository")
    assert found.revoked == {digest}
    roles = {role.name: (role.threshold, len(role.keys)) for role in found.roles()}
    assert roles["root"] == (3, 5)


def undated(row):
    return re.sub(r"\d{4}-\d\d-\d\d", "DATE", row)
