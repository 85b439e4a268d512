"""TLS files that cannot be used: the device serves without its broker, says why, and connects once they are mended."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_runtime.adapters.status_report import render
from edge_runtime.adapters.status_socket import read_status
from edge_runtime.check.broker import check_certificate
from edge_runtime.check.finding import Level
from edge_runtime.config import load
from tests.services import Mosquitto, find_mosquitto, missing_service
from tests.support.certificates import Authority
from tests.support.chaos import Application, provision
from tests.support.loop import wait_for

pytestmark = pytest.mark.sampled(2)

NOW_SECONDS = 1_780_272_000.0
TLS = '[broker.tls]\nca = "{0}/ca.pem"\ncertificate = "{0}/d.crt"\nkey = "{0}/d.key"\n'


@pytest.fixture
def secured(tmp_path):
    """A broker that asks for certificates, and the device's files, whole, in a folder of their own."""
    binary = find_mosquitto()
    if binary is None:
        missing_service("mosquitto is not installed (Debian: apt-get install mosquitto)")
    authority = Authority(tmp_path / "authority")
    server, device = authority.issue("broker"), authority.issue("d")
    files = tmp_path / "files"
    files.mkdir()
    for source, name in ((authority.path, "ca.pem"), (device.certificate, "d.crt"), (device.key, "d.key")):
        shutil.copy(source, files / name)
    (tmp_path / "broker").mkdir()
    broker = Mosquitto(
        binary,
        tmp_path / "broker",
        extra_config=f"cafile {authority.path}\ncertfile {server.certificate}\nkeyfile {server.key}\n"
        "require_certificate true\n",
    )
    broker.start()
    try:
        yield broker, files
    finally:
        broker.close()


def missing(path: Path) -> None:
    path.unlink()


def unreadable(path: Path) -> None:
    """No file: whoever runs the tests may read all of them."""
    path.unlink()
    path.mkdir()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def another_ones(path: Path) -> None:
    stranger = Authority(path.parent / "stranger").issue("stranger")
    shutil.copy(stranger.key, path)


@pytest.mark.broker
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("ca.pem", missing),
        ("ca.pem", cut_short),
        ("d.crt", missing),
        ("d.key", unreadable),
        ("d.key", another_ones),
    ],
)
def test_with_a_broken_tls_file_a_daemon_serves_says_why_and_connects_once_it_is_mended(
    tmp_path, secured, name, spoil
):
    broker, files = secured
    home = provision(tmp_path / "d", broker.host, broker.port, more=TLS.format(files))
    whole = (files / name).read_bytes()
    spoil(files / name)
    config = load(home.config)
    assert Level.ERROR in {finding.level for finding in check_certificate(config, NOW_SECONDS)}
    with ExitStack() as stack:
        application = Application(home.socket)
        stack.callback(application.close)
        process = home.start()
        stack.callback(process.close)
        application.wait_answers(20)
        process.wait_line("disconnected")
        assert any("cannot use the TLS files" in text for text in process.text)
        status = read_status(config.status_socket)
        assert status["link"]["connected"] is False
        assert f"not connected to {broker.host}:{broker.port} for" in render(status)
        assert "cannot use the TLS files" in render(status)

        if (files / name).is_dir():
            (files / name).rmdir()
        (files / name).write_bytes(whole)
        process.wait_line("connected")
        wait_for(lambda: " as d " in broker.log, "the broker's word")
        assert read_status(config.status_socket)["link"]["connected"] is True
        application.wait_answers(20)
        assert process.stop() == 0, "".join(process.text)
        application.wait_gone()
