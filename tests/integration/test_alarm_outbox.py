"""Alarms whose aggregator dies between the commit and the telling: a real process, killed at named points."""

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, contextmanager

import numpy as np
import pytest

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.config import load
from aggregator.records import Arrival
from edge_runtime.contract.codec import encode
from tests.integration.test_alarm_sinks import Site, until
from tests.services import free_port
from tests.support.fleet import FLEET, NAMES, publish_artifact, tiny_count, window

DEVICES = tuple(f"dev-{k}" for k in range(10))


class Watched:
    """An aggregator without a broker, whose windows are there already, and whoever is told."""

    def __init__(self, folder, repository, url, extra=""):
        self.folder, self.repository = folder, repository
        self.tiny, self.digest = publish_artifact(folder / "registry")
        self.path = folder / "aggregator.toml"
        self.path.write_text(
            f"""
            fleet = "{FLEET}"
            [broker]
            host = "127.0.0.1"
            port = {free_port()}
            [drift]
            horizon_rows = 400
            check_seconds = 0.05
            [alarms]
            webhook = "{url}"
            {extra}
            """,
            encoding="utf-8",
        )
        self.config = load(self.path)
        Ledger(self.config.ledger_path).close()

    @contextmanager
    def process(self, *point):
        """The aggregator, killed at a point or told to stop at the end."""
        log = (self.folder / "aggregator.log").open("ab")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.run_aggregator", str(self.path), *point],
                stdin=subprocess.DEVNULL,
                stderr=log,
                cwd=self.repository,
            )
        try:
            yield process
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(30.0)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10.0)

    def look(self, seq):
        """All devices at once, moved: what is there is enough for a look."""
        arrivals = []
        for k, name in enumerate(DEVICES):
            rows = np.random.default_rng([seq, k]).normal(2.0, 1.0, (400, len(NAMES))).astype(np.float32)
            w = window(name, seq, model=self.digest, profile=tiny_count(self.tiny, rows))
            arrivals.append(Arrival(window=w, payload=encode(w), judged=True))
        with closing(Windows(self.config.windows_path)) as store:
            store.append(arrivals, [], [], time.time_ns())

    def ledger(self, name):
        with closing(Ledger(self.config.ledger_path, read_only=True)) as ledger:
            return ledger.table(name)

    def looks(self):
        return len(self.ledger("looks"))

    def log(self):
        return (self.folder / "aggregator.log").read_text(encoding="utf-8")


@pytest.fixture
def pager():
    with closing(Site()) as site:
        yield site


@pytest.mark.parametrize(
    ("point", "told_before"),
    [
        pytest.param(  # committed, and nobody has looked into the outbox
            ("aggregator.monitor:_log", "before", "2"), 0, marks=pytest.mark.slow
        ),
        pytest.param(  # taken out, and not begun
            ("aggregator.adapters.sinks:Worker.begin", "before", "1"), 0, marks=pytest.mark.slow
        ),
        (  # told, and not forgotten
            ("aggregator.adapters.ledger.tellings:Tellings.put_told", "before", "1"),
            1,
        ),
        pytest.param(  # forgotten, not committed
            ("aggregator.adapters.ledger.tellings:Tellings.put_told", "after", "1"), 1, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_was_committed_is_told_whenever_the_aggregator_is_killed(
    tmp_path, repository, pager, point, told_before
):
    site = Watched(tmp_path, repository, pager.url)
    with site.process(*point) as doomed:
        site.look(1)
        until(lambda: site.looks() == 1, "the first look")
        site.look(2)
        until(lambda: doomed.poll() is not None, "its end")
    assert doomed.returncode == -signal.SIGKILL
    opened = {row["id"] for row in site.ledger("incidents")}
    assert len(opened) == len(NAMES)
    assert len(pager.seen) == told_before
    assert len(site.ledger("tellings")) == len(opened)
    with site.process():
        until(lambda: {e["incident"] for _, _, e in pager.seen} == opened, "every incident to be told")
        until(lambda: not site.ledger("tellings"), "the outbox to be empty")
    told = Counter(event["id"] for _, _, event in pager.seen)
    assert len(told) == len(opened)
    assert told.total() == len(opened) + told_before  # what may have been told comes again under its id
    assert {row["closed_ns"] for row in site.ledger("incidents")} == {None}
    assert site.looks() == 2


@pytest.mark.slow
def test_another_leader_goes_on_with_the_telling(tmp_path, repository, pager):
    shared = '[ingest]\nshare = "aggregators"\nlease_seconds = 1.0'
    site = Watched(tmp_path, repository, pager.url, extra=shared)
    site.look(1)
    pager.hold.clear()  # the first leader's attempt hangs
    with site.process() as first:
        until(lambda: site.looks() == 1, "the first look")
        site.look(2)
        until(lambda: pager.seen, "the first attempt")
        with site.process():
            first.kill()
            pager.hold.set()
            until(lambda: len({e["id"] for _, _, e in pager.seen}) == len(NAMES), "every incident to be told")
            until(lambda: not site.ledger("tellings"), "the outbox to be empty")
    terms = [int(term) for term in re.findall(r"elected process=\w+ term=(\d+)", site.log())]
    assert terms == [1, 2]


@pytest.mark.slow
def test_a_pager_that_is_away_for_long_is_told_of_in_two_lines_and_gets_everything(
    tmp_path, repository, pager
):
    copies = tmp_path / "copies"
    copies.mkdir()
    script = f"import sys, shutil, uuid; shutil.copy(sys.argv[1], {str(copies)!r} + '/' + uuid.uuid4().hex)"
    command = json.dumps([sys.executable, "-c", script, "{alarm}"])
    site = Watched(tmp_path, repository, pager.url, extra=f"command = {command}")
    pager.answers = [503] * 4
    with site.process():
        site.look(1)
        until(lambda: site.looks() == 1, "the first look")
        site.look(2)
        until(lambda: len(list(copies.iterdir())) == len(NAMES), "the other sink, which waits for nobody")
        until(lambda: "alarm_sink_works sink=webhook" in site.log(), "the pager's recovery")
        until(lambda: not site.ledger("tellings"), "the outbox to be empty")
    assert site.log().count("alarm_sink_failing sink=webhook reason='status 503'") == 1
    assert site.log().count("alarm_sink_works") == 1
    assert len({event["id"] for _, _, event in pager.seen}) == len(NAMES)
    assert "Traceback" not in site.log()
