"""What is stored, judged again: the same configuration opens what the monitor opened, another one otherwise."""

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from aggregator.config import DriftConfig
from aggregator.replaying import OF_TAKING, replayed, same_taking
from cli.app import app
from tests.unit.test_aggregator_monitor import DRIFT, LEFT, RIGHT, Fleet

TOML = """
fleet = "fleet"
registry = "registry"
[drift]
attributes = ["wrist"]
horizon_rows = 400
baseline_looks = 3
budget_looks = 100
"""


class Stored(Fleet):
    """A fleet whose left watches stay and whose right ones move, with what the monitor made of it."""

    def play(self):
        self.join(*LEFT)
        self.join(*RIGHT, wrist="right")
        with self.ledger.transaction():
            for record in self.devices.values():
                self.ledger.put_device(record)
        self.settle(*LEFT, *RIGHT)
        for _ in range(2):
            self.send(*LEFT)
            self.look(*RIGHT, shift=2.0, right=0.4)
        for _ in range(3):
            self.look(*LEFT, *RIGHT)
        self.close()

    def run(self, *arguments, text=TOML, code=0):
        path = self.folder / "aggregator.toml"
        path.write_text(TOML, encoding="utf-8")
        (self.folder / "other.toml").write_text(text, encoding="utf-8")
        done = CliRunner().invoke(app, ["drift", str(path), *map(str, arguments)])
        assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
        return done

    def replay(self, text=TOML):
        done = self.run("--replay", "--config", self.folder / "other.toml", "--json", text=text)
        (found,) = json.loads(done.stdout)["artifacts"]
        return found

    def opened(self):
        """(cohort, feature, kind, look, devices, why at its end, severity) of what the monitor opened."""
        self.open()
        rows = self.ledger.table("incidents", 1000)
        documents = [row["document"] for row in rows]
        self.close()
        return sorted(
            (d["cohort"], d.get("feature") or "", d["kind"], d["opened_window"], d["devices"], d["severity"])
            for d in documents
        )


def alarmed(found):
    return sorted(
        (a["cohort"], a["feature"] or "", a["kind"], a["opened_window"], a["devices"], a["severity"])
        for a in found["alarms"]
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    made = Stored(tmp_path_factory.mktemp("fleet"))
    made.play()
    return made


def test_the_same_configuration_opens_what_the_monitor_opened(stored):
    found = stored.replay()
    assert alarmed(found) == stored.opened() != []
    stored.open()
    looks = stored.ledger.table("looks", 1000)[::-1]
    closed = {row["column_key"] for row in stored.ledger.table("incidents") if row["closed_ns"] is not None}
    stored.close()
    assert [w["index"] for w in found["windows"]] == [row["look"] for row in looks]
    assert [w["devices"] for w in found["windows"]] == [row["devices"] for row in looks]
    assert [w["rows"] for w in found["windows"]] == [row["row_count"] for row in looks]
    assert closed
    assert {a["closed_window"] is not None for a in found["alarms"]} == {True}


def test_looks_without_their_times_are_taken_when_enough_had_come(stored):
    """The windows of a look came at one moment here, so that the monitor could not have looked at another."""
    stored.open()
    info = stored.registry.info(stored.digest)
    attributes = {device: dict(record.attributes) for device, record in stored.devices.items()}
    found = replayed(stored.windows, info, stored.digest, DRIFT, attributes=attributes)
    stored.close()
    assert len(found.looks) == 8
    assert sorted((a.cohort, a.feature or "", a.kind, a.opened_window) for a in found.alarms) == [
        row[:4] for row in stored.opened()
    ]


def test_another_configuration_alarms_otherwise(stored):
    deaf = stored.replay(
        TOML + "psi_floor = 50.0\ncdf_floor = 1.0\nprediction_floor = 1.0\naccuracy_floor = 1.0\n"
    )
    assert {a["feature"] for a in deaf["alarms"]} != {a["feature"] for a in stored.replay()["alarms"]}
    whole = stored.replay(TOML.replace('attributes = ["wrist"]', "attributes = []"))
    assert {a["cohort"] for a in whole["alarms"]} == {"fleet"}
    assert {a["cohort"] for a in stored.replay()["alarms"]} == {"wrist=right"}


def test_longer_looks_are_taken_anew_and_said_so(stored):
    found = stored.replay(TOML.replace("horizon_rows = 400", "horizon_rows = 800"))
    assert len(found["windows"]) == 4
    assert {w["rows"] for w in found["windows"]} == {20 * 800}
    assert any("looks are taken anew" in text for text in found["notes"])
    assert not any("looks are taken anew" in text for text in stored.replay()["notes"])


def test_a_person_is_told_the_same_way_as_of_a_backtest(stored, tmp_path):
    page = tmp_path / "page.html"
    done = stored.run("--replay", "--report", page)
    assert "windows 3 to" in done.stdout
    assert "moved most (KS)" in done.stdout
    assert "who was online when is not kept" in done.stderr
    assert "<svg" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "text", "why"),
    [
        (("--config", "other.toml"), TOML, "--config: is for a replay"),
        (("--replay", "--artifact", "zz"), TOML, "no such artifact in .* has windows"),
        (("--replay", "--report", "nowhere/page.html"), TOML, "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_replayed_is_named(stored, arguments, text, why):
    done = stored.run(*arguments, text=text, code=2)
    assert re.search(why, done.stderr)


def test_too_long_a_horizon_is_named(stored):
    text = TOML.replace("horizon_rows = 400", "horizon_rows = 1000000")
    done = stored.run("--replay", "--config", stored.folder / "other.toml", text=text, code=2)
    assert "not enough for one look (1000000 rows" in done.stderr


@pytest.mark.parametrize("forgotten", [False, True])
def test_what_was_rolled_up_is_not_looked_at_again_but_remembered(tmp_path, forgotten):
    made = Stored(tmp_path)
    made.play()
    made.open()
    third = sorted(row["at_ns"] for row in made.ledger.table("looks", 100))[2]
    while made.windows.prune(third):
        pass
    if forgotten:
        made.ledger.prune_looks(third + 1)
    made.close()
    found = made.replay()
    assert found["windows"][0]["index"] == 3
    assert any("are rolled up and cannot be looked at again" in text for text in found["notes"])
    assert {(a["cohort"], a["feature"]) for a in found["alarms"]} >= {("wrist=right", "a")}


def test_the_rule_of_taking_looks_is_told_from_the_rule_of_judging():
    config = DriftConfig()
    assert same_taking(config, replace(config, alpha=0.01, psi_floor=1.0, attributes=("site",)))
    for name in OF_TAKING:
        assert not same_taking(config, replace(config, **{name: getattr(config, name) + 1}))


def test_nothing_is_written(stored):
    before = {p.name: p.read_bytes() for p in (stored.folder / "state").glob("*.sqlite")}
    stored.replay()
    assert {p.name: p.read_bytes() for p in (stored.folder / "state").glob("*.sqlite")} == before
