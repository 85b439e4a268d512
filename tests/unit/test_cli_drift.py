"""What the command line shows of drift, and how somebody says that an incident is seen."""

import json
from contextlib import closing
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from aggregator.adapters.ledger import Ledger
from aggregator.config import load
from aggregator.looks import Trace
from cli.app import app
from cli.output import out
from tests.support.fleet import MODEL, NOW, SECOND, A, B, device
from tests.support.ledger_kit import ALARM, OPEN, OUTPUT, VERDICT, reopened

WIDTH = 100


class Site:
    def __init__(self, folder):
        self.path = folder / "aggregator.toml"
        self.path.write_text('fleet = "fleet"\n', encoding="utf-8")
        self.where = load(self.path).ledger_path
        self.serves(A)

    def serves(self, digest):
        with closing(Ledger(self.where)) as ledger, ledger.transaction():
            ledger.put_device(device("dev-1", serving=digest))

    def stands(self, *verdicts):
        with closing(Ledger(self.where)) as ledger, ledger.transaction():
            ledger.put_verdicts(A, verdicts)

    def trace(self, *traces, at=NOW):
        with closing(Ledger(self.where)) as ledger, ledger.transaction():
            ledger.put_traces(A, MODEL, traces, at)

    def run(self, command, *arguments, code=0):
        done = CliRunner().invoke(
            app,
            [command, str(self.path), *map(str, arguments)],
        )
        assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
        return done

    def shown(self, command, *arguments):
        return self.run(command, *arguments).stdout

    def data(self, command, *arguments):
        return json.loads(self.shown(command, *arguments, "--json"))


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(out, "width", WIDTH)
    return Site(tmp_path)


CALM = replace(VERDICT, outcome="stable", reason="nothing moved in 10 devices", moved=(), devices=(), p=0.34)
WORSE = Trace(cohort="wrist=left", key="the accuracy", streak=2, alarm=replace(OUTPUT, cohort="wrist=left"))


def test_before_the_first_look_there_is_nothing_to_show(site):
    done = site.run("drift")
    assert (done.stdout, done.stderr) == ("", "nothing stands yet for an artifact that a device serves\n")
    assert site.data("drift") == {"verdicts": [], "incidents": [], "accuracy": []}


def test_drift_shows_what_stands_and_below_it_what_is_open(site):
    lacking = replace(CALM, kind="drift", outcome="insufficient", reason="3 devices, 10 are needed")
    many = replace(VERDICT, cohort="wrist=left", outcome="drifted", moved=tuple("abcde"), judged=12)
    site.stands(CALM, lacking, many)
    site.trace(OPEN, WORSE)
    text = site.shown("drift")
    lines = [line.split() for line in text.splitlines()]
    assert [MODEL, A[:8], "fleet", "skew", "stable", "0.34", "10"] in lines
    assert [MODEL, A[:8], "fleet", "drift", "insufficient", "3", "devices,", "10", "are", "needed"] in lines
    assert "a, b, c and 2 more" in text
    assert "drift: a, fleet" in text
    assert "2 devices: dev-1, dev-2" in text
    assert "performance: wrist=left" in text
    assert text.index("stable") < text.index("drift: a, fleet")
    assert max(map(len, text.splitlines())) <= WIDTH
    found = site.data("drift")
    assert {v["outcome"] for v in found["verdicts"]} == {"stable", "insufficient", "drifted"}
    assert [i["id"] for i in found["incidents"]] == [2, 1]
    assert found["incidents"][1]["document"]["evidence"][2] == ["device", "dev-1"]


def test_what_no_device_serves_is_history(site):
    site.stands(CALM)
    site.serves(B)
    assert site.data("drift")["verdicts"] == []
    assert [v["outcome"] for v in site.data("drift", "--all")["verdicts"]] == ["stable"]


def test_incidents_are_the_open_ones_unless_all_are_asked_for(site):
    assert site.shown("incidents") == "no open incident\n"
    assert site.shown("incidents", "--all") == "no incident\n"
    site.trace(OPEN, WORSE)
    site.trace(Trace(cohort="fleet", key="a"), at=NOW + 90 * SECOND)
    text = site.shown("incidents")
    assert "performance: wrist=left" in text
    assert "drift: a" not in text
    every = site.shown("incidents", "--all")
    assert "closed: the column looks as it did before" in every
    assert "2023-11-14 22:13" in every
    assert "2023-11-14 22:14" in every
    assert [i["closed_ns"] for i in site.data("incidents", "--all")] == [None, NOW + 90 * SECOND]
    assert [i["id"] for i in site.data("incidents")] == [2]


def test_names_of_columns_are_not_taken_for_markup(site):
    odd = replace(ALARM, feature="[red]x[/red]", why="[bold] moved")
    site.trace(replace(OPEN, alarm=odd))
    text = site.shown("incidents")
    assert "[red]x[/red]" in text
    assert "[bold] moved" in text


def test_somebody_acknowledges_an_incident_and_the_audit_log_knows(site):
    site.trace(OPEN)
    assert site.shown("acknowledge", 1, "--by", "ann") == "incident 1 is acknowledged by ann\n"
    assert "ann" in site.shown("incidents")
    (entry,) = reopened(lambda **options: Ledger(site.where, **options), lambda it: it.table("audit"))
    assert (entry["who"], entry["what"]) == ("ann", "acknowledged incident 1")
    again = site.run("acknowledge", 1, "--by", "bob", code=1).stderr
    assert "was acknowledged already, by ann at 20" in again


def test_what_cannot_be_acknowledged_says_why(site):
    site.trace(OPEN)
    site.trace(Trace(cohort="fleet", key="a"), at=NOW + 90 * SECOND)
    assert "incident 1 is closed since 2023-11-14 22:14 UTC" in site.run("acknowledge", 1, code=1).stderr
    assert "there is no incident 7" in site.run("acknowledge", 7, code=1).stderr


def test_who_acknowledges_is_the_user_unless_told(site, monkeypatch):
    monkeypatch.setenv("LOGNAME", "carol")
    site.trace(OPEN)
    assert site.data("acknowledge", 1)["acknowledged_by"] == "carol"
