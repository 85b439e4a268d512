"""The commands: what they print, how they fail, and what they keep running."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from aggregator.config import load
from cli import broker_config, report
from cli.app import app
from cli.broker import prepare_broker
from cli.operate import broker_of, parse_stages
from cli.processes import ProcessDied, Processes, wait_until
from edge_runtime.contract.errors import ConfigError, LinkError, SkiffError
from edge_runtime.contract.ids import FleetId
from tests.support.tiny_models import classifier

RUN = CliRunner()
FOREVER = "import threading; threading.Event().wait()"


# ── commands ───────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_says_what_an_artifact_is_without_loading_its_graph(tmp_path):
    tiny = classifier()
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny.artifact)
    found = json.loads(RUN.invoke(app, ["inspect", str(path), "--json"]).stdout)
    assert found["digest"] == tiny.digest
    assert found["task"] == "classifier"


def test_a_truncated_artifact_is_refused_in_one_line(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier().artifact[:200])
    done = RUN.invoke(app, ["inspect", str(path)])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr


def test_a_pipeline_that_is_none_is_refused_with_what_would_be(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    done = RUN.invoke(app, ["convert", "model.h5", str(tmp_path / "x.npy")])
    assert done.exit_code == 2
    assert "neither module:attribute nor a .skops file" in done.stderr


def test_without_the_host_extra_it_says_what_to_install():
    program = "import sys; sys.modules['typer'] = None; from cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'skiff-edge[host]'" in done.stderr


@pytest.mark.parametrize(("text", "stages"), [("3,1.0", [3, 1.0]), ("1,0.25,1.0", [1, 0.25, 1.0])])
def test_stages_are_counts_and_shares(text, stages):
    found = parse_stages(text)
    assert found == stages
    assert [type(stage) for stage in found] == [type(stage) for stage in stages]


def test_other_stages_are_refused():
    with pytest.raises(ConfigError, match="'few'"):
        parse_stages("few")


# ── the broker ─────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_coordinator_may_write_releases():
    rules: dict[str, list[str]] = {"": []}
    user = ""
    for line in broker_config.acl(FleetId("f")).splitlines():
        if line.startswith("user "):
            user = line.removeprefix("user ")
        elif line.startswith(("topic ", "pattern ")):
            rules.setdefault(user, []).append(line)
    writers = [who for who, lines in rules.items() if any("write" in x and "/release/" in x for x in lines)]
    assert writers == [broker_config.COORDINATOR]
    assert all("/d/%u/" in line for line in rules[""] if "write" in line)
    tellers = [who for who, lines in rules.items() if any(x.endswith("/alarm") for x in lines)]
    assert tellers == [broker_config.AGGREGATOR]


def test_without_any_broker_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(LinkError, match="install mosquitto"):
        prepare_broker(tmp_path)


# ── processes ──────────────────────────────────────────────────────────────────────────────────────────


def nothing():
    """No condition to check while waiting."""


def test_a_killed_process_is_started_again(tmp_path):
    with Processes(tmp_path) as processes:
        processes.start("one", [sys.executable, "-c", FOREVER], restart=True)
        before = processes.pid("one")
        os.kill(before, signal.SIGKILL)
        wait_until(
            lambda: processes.restarts() == {"one": 1}, timeout_seconds=20, what="a restart", check=nothing
        )
        assert processes.pid("one") != before
        processes.check()
        last = processes.pid("one")
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_a_process_that_fails_is_named_with_its_last_words(tmp_path):
    with Processes(tmp_path) as processes:
        processes.start("two", [sys.executable, "-c", "import sys; sys.exit('no such luck')"])
        wait_until(lambda: not processes.alive("two"), timeout_seconds=20, what="its end", check=nothing)
        with pytest.raises(ProcessDied, match=r"(?s)two ended with code 1.*no such luck"):
            processes.check()


def test_waiting_ends_with_what_was_waited_for():
    with pytest.raises(SkiffError, match="rain: not seen within 0 s"):
        wait_until(lambda: False, timeout_seconds=0, what="rain", check=nothing)


# ── the report ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_report_is_one_page_without_a_network():
    shares = np.array([[0.2, 0.7], [0.3, 0.8]])
    page = report.render(
        report.Report(
            title="a <b> title",
            lead="lead",
            shifts=[
                report.FeatureShift(
                    name="accel",
                    edges=np.array([0.0, 1.0]),
                    reference=shares,
                    fleet=1 - shares,
                    score=9.0,
                    psi=2.0,
                )
            ],
            cohort="wrist=right",
            accuracy=[report.AccuracyPoint(seconds=1.0, arm="left", labelled=10, correct=8)],
            serving=[report.ServingPoint(seconds=1.0, devices={"version 1": 3})],
            moments=[report.Moment(seconds=1.0, text="it began")],
            tables=[("Facts", [("what", "value"), ("rows", "<10>")])],
        )
    )
    assert page.count("<svg") == 3
    assert "a &lt;b&gt; title" in page
    assert "&lt;10&gt;" in page
    assert "<script" not in page
    assert not [word for word in ('src="http', "@import", "url(http") if word in page]


def test_what_publishes_has_an_identity_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIFF_PUBLISHER_PASSWORD", "secret")
    path = tmp_path / "aggregator.toml"
    path.write_text(
        'fleet = "f"\n[broker]\nca = "ca.pem"\n[broker.publisher]\nusername = "p"\n'
        'certificate = "p.pem"\nkey = "p.key"\n',
        encoding="utf-8",
    )
    broker = broker_of(load(path))
    assert (broker.username, broker.password) == ("p", "secret")
    assert (broker.ca, broker.certificate) == (str(tmp_path / "ca.pem"), str(tmp_path / "p.pem"))
