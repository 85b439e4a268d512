"""What the daemon tells its update child is what the configuration says, as the child reads it."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime import updates
from edge_runtime.adapters import child
from edge_runtime.carriers.https import Web
from edge_runtime.config import load
from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.core.budget import Budget
from edge_runtime.core.events import StartUpdate, UpdateEnded
from edge_runtime.update_job import Job
from edge_runtime.updates import _job

BASE = """\
[device]
id = "d"
fleet = "f"
state_dir = "state"
[broker]
host = "broker.example"
[broker.tls]
ca = "ca.pem"
certificate = "d.pem"
key = "d.key"
[model]
name = "m"
trust_root = "root.json"
[budgets]
predict_p99_us = 50.0
rss_mb = 120.0
load_peak_mb = 150.0
"""
ACTION = StartUpdate(release=b"\x01\x02", floor=3, serving=None, have=(), quarantine=())


@pytest.fixture
def config(tmp_path):
    def read(more):
        path = tmp_path / "skiffd.toml"
        path.write_text(BASE + more, encoding="utf-8")
        return load(path)

    return read


def job(config):
    return Job.read(json.loads(json.dumps(_job(config, ACTION))))


def test_without_an_address_there_is_the_broker(config, tmp_path):
    found = job(config(""))
    assert (found.web, found.prefer, found.max_chunk_bytes) == (None, "mqtt", 256 * 1024)
    assert (found.release, found.floor, found.root) == (b"\x01\x02", 3, tmp_path / "root.json")
    assert found.budget == Budget(predict_p99_ns=50_000, rss_bytes=120_000_000)
    assert found.load_peak_bytes == 150_000_000


def test_a_web_server_is_shown_the_brokers_certificate(config, tmp_path):
    found = job(
        config(
            '[update]\nurl = "https://web.example/skiff/"\nca = "web.pem"\nprefer = "https"\nmax_chunk_kib = 16\n'
        )
    )
    assert found.web == Web(
        url="https://web.example/skiff/",
        ca=str(tmp_path / "web.pem"),
        certificate=str(tmp_path / "d.pem"),
        key=str(tmp_path / "d.key"),
    )
    assert (found.prefer, found.max_chunk_bytes) == ("https", 16 * 1024)
    assert job(config('[update]\nurl = "https://web.example"\n')).web.ca == ""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            'url = "http://web.example/"',
            r"update\.url: .* is not the address of a repository.* localhost only",
        ),
        ('url = "https://u:p@web.example/"', r"update\.url"),
        ('prefer = "https"', r"update\.url: is missing: prefer names it"),
        ('prefer = "ftp"', r"update\.prefer: 'ftp' is not one of mqtt, https"),
        ("max_chunk_kib = 0", r"update\.max_chunk_kib: 0 is outside \[1, 256\]"),
        ("max_chunk_kib = 257", r"update\.max_chunk_kib"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(config, line, problem):
    with pytest.raises(ConfigError, match=problem):
        config(f"[update]\n{line}\n")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"web": {"url": "http://web.example/"}}, "is not the address"),
        ({"web": {"url": 3}}, r"job\.web\.url"),
        ({"prefer": "ftp"}, r"job\.prefer"),
        ({"max_chunk_bytes": 1 << 20}, r"job\.max_chunk_bytes"),
        ({"load_peak_bytes": -1}, r"job\.load_peak_bytes"),
    ],
)
def test_a_job_that_is_none_names_the_field(config, change, where):
    with pytest.raises(ContractError, match=where):
        Job.read({**_job(config(""), ACTION), **change})


def test_a_job_of_an_older_daemon_is_read(config):
    document = _job(config(""), ACTION)
    for name in ("web", "prefer", "max_chunk_bytes", "load_peak_bytes"):
        del document[name]
    found = Job.read(document)
    assert (found.web, found.load_peak_bytes, found.state_dir) == (None, 0, Path(document["state_dir"]))


def test_a_child_that_ignores_its_own_deadline_is_killed(config, tmp_path, monkeypatch):
    (tmp_path / "deaf.py").write_text("import time; time.sleep(120)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(updates, "GRACE_SECONDS", 0.2)
    honest = child.Child
    monkeypatch.setattr(child, "Child", lambda _, *args, **options: honest("deaf", *args, **options))
    woken, killed = threading.Event(), threading.Event()
    limited = replace(config(""), update_deadline_seconds=0.3)
    watched = updates.Updates(limited, wake=woken.set, killed=killed.set)
    watched.start(ACTION)
    try:
        assert woken.wait(30.0)
        [ended] = watched.listen()
    finally:
        watched.kill()
    assert isinstance(ended, UpdateEnded)
    assert (ended.ok, ended.retry) == (False, True)
    assert "it was not done in 0.5 s" in ended.reason
    assert killed.is_set()
    assert not watched.running
