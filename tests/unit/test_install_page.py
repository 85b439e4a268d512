"""What `docs/how-to/install-a-device.md` tells people to write and run agrees with what is shipped."""

import re
import shlex
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from cli.app import app
from edge_runtime.config import load
from edge_runtime.contract.ids import FleetId
from tests.services import missing_service
from trainer.authority import Authority

UNIT = "device_configs/skiffd.service"


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs/how-to/install-a-device.md").read_text(encoding="utf-8")


def commands(page):
    """Every command line of the page's shell blocks, continuations joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_its_configuration_loads_beside_the_base_that_it_copies(repository, page, tmp_path):
    [text] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    [copied] = [line for line in commands(page) if "raspberry-pi-4.toml" in line]
    for name in shlex.split(copied):
        if name.endswith((".toml", ".json")):
            shutil.copy(repository / "device_configs" / name, tmp_path)
    (tmp_path / "skiffd.toml").write_text(text)
    config = load(tmp_path / "skiffd.toml")
    assert config.broker.key == str(tmp_path.resolve() / "device.key")
    assert str(config.state_dir) == "/var/lib/skiffd"
    assert str(config.trust_root) == "/etc/skiffd/root.json"
    assert (config.source.kind, config.source.socket_mode) == ("unix", 0o666)


def test_the_check_runs_as_the_service_does(repository, page):
    [line] = [line for line in commands(page) if "systemd-run" in line]
    words = shlex.split(line)
    unit = (repository / UNIT).read_text(encoding="utf-8").splitlines()
    properties = [word.removeprefix("--property=") for word in words if word.startswith("--property=")]
    assert len(properties) >= 5
    assert set(properties) <= set(unit), "the page and the unit differ"
    [start] = [entry.removeprefix("ExecStart=").split() for entry in unit if entry.startswith("ExecStart=")]
    assert words[-3:] == [start[0], "--check", start[1]]


def test_its_files_go_where_the_unit_looks_for_them(repository, page):
    unit = (repository / UNIT).read_text(encoding="utf-8")
    told = "\n".join(commands(page))
    assert "python3 -m venv /opt/skiff" in told
    assert "ExecStart=/opt/skiff/bin/skiffd /etc/skiffd/skiffd.toml" in unit
    assert "groupadd --system skiff-keys" in told
    assert "SupplementaryGroups=skiff-keys" in unit


def test_its_certificates_are_ones_that_the_check_accepts(page, tmp_path, monkeypatch):
    """The commands for the key and its certificate, run as they stand except for where the files are."""
    if shutil.which("openssl") is None:
        missing_service("openssl is not installed (Debian: apt-get install openssl)")
    from edge_runtime.check import certificate  # noqa: PLC0415 (only where there is something to look at)

    monkeypatch.chdir(tmp_path)
    Authority.create(tmp_path / "authority", FleetId("demo"))
    lines = [line for line in commands(page) if "openssl " in line or line.startswith("skiff ")]
    assert [line.split()[1] for line in lines] == ["openssl", "pki"]
    made = lines[0].replace("sudo ", "").replace("/etc/skiffd/", "")
    subprocess.run(shlex.split(made), cwd=tmp_path, check=True, capture_output=True)
    done = CliRunner().invoke(app, shlex.split(lines[1])[1:])
    assert done.exit_code == 0, done.output
    seen = certificate.look_at("pump-17/device.crt", "device.key", "pump-17/ca.crt")
    assert (seen.problem, seen.common_name) == ("", "pump-17")
