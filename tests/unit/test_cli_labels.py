"""`skiff labels import`: files of every shape a user has, counted once."""

import json
import random
import time
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.config import load
from aggregator.records import Arrival, DeadLetter
from cli.app import app
from edge_runtime.contract.codec import encode
from tests.support.fleet import MODEL, NAMES, NOW, SECOND, device, publish_artifact, tiny_count, window

HOUR = 3600
T0 = NOW // SECOND // HOUR * HOUR


class Site:
    """An aggregator's stores with windows of two devices, and the rows that were in them."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "aggregator.toml"
        self.path.write_text('fleet = "fleet"\n', encoding="utf-8")
        self.where = load(self.path).windows_path
        self.tiny, self.digest = publish_artifact(folder / "registry")
        rng = np.random.default_rng(0)
        self.rows, arrivals = [], []
        for name in ("dev-1", "dev-2"):
            for hour in range(3):
                x = rng.normal(size=(20, len(NAMES))).astype(np.float32)
                start = T0 + hour * HOUR
                w = window(
                    name,
                    hour,
                    model=self.digest,
                    profile=tiny_count(self.tiny, x),
                    start_ns=start * SECOND,
                    seconds=HOUR,
                )
                arrivals.append(Arrival(window=w, payload=encode(w), judged=True))
                answers = [("low", "mid", "high")[label] for label in self.tiny.answer(x)[0]]
                self.rows += [
                    (name, start + 60 * i, *map(float, x[i]), answer, answer if i % 5 else "other")
                    for i, answer in enumerate(answers)
                ]
        with closing(Windows(self.where)) as store:
            store.append(arrivals, [], [], NOW)

    def csv(self, name, rows=None, columns=("device", "time", *NAMES, "answer", "truth")):
        path = self.folder / name
        every = ("device", "time", *NAMES, "answer", "truth")
        lines = [",".join(columns)]
        lines += [
            ",".join(str(row[every.index(c)]) for c in columns)
            for row in (self.rows if rows is None else rows)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def run(self, path, *arguments, code=0, model=MODEL):
        words = [
            "labels",
            "import",
            str(path),
            "-a",
            str(self.path),
            "--model",
            model,
            "--device-column",
            "device",
        ]
        done = CliRunner().invoke(app, [*words, "--time-column", "time", *arguments])
        assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
        return done

    def imported(self, path, *arguments, code=0):
        return json.loads(self.run(path, *arguments, "--json", code=code).stdout)

    def known(self):
        with closing(Windows(self.where, read_only=True)) as store:
            return [(t.device, t.labelled, t.correct, t.compared) for t in store.truths(self.digest)]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


PREDICTED = ("--label-column", "truth", "--prediction-column", "answer")
WHOLE = [("dev-1", 60, 48, 60), ("dev-2", 60, 48, 60)]


def test_a_file_with_truth_and_predictions_is_counted_by_device_and_hour(site):
    found = site.imported(site.csv("march.csv"), *PREDICTED)
    assert found == {
        "source": "march",
        "digest": site.digest,
        "devices": 2,
        "labelled": 120,
        "correct": 96,
        "new": 6,
        "known": 0,
        "contradictions": [],
    }
    assert site.known() == WHOLE


def test_the_same_file_again_in_any_order_and_form_changes_nothing(site):
    site.imported(site.csv("march.csv"), *PREDICTED)
    shuffled = random.Random(0).sample(site.rows, len(site.rows))
    again = site.imported(site.csv("march.csv", shuffled), *PREDICTED)
    assert (again["new"], again["known"]) == (0, 6)
    columns = dict(
        zip(("device", "time", *NAMES, "answer", "truth"), zip(*site.rows, strict=True), strict=True)
    )
    columns["time"] = pa.array(np.array(columns["time"], "datetime64[s]"))
    pq.write_table(pa.table(columns), site.folder / "march.parquet")
    again = site.imported(site.folder / "march.parquet", *PREDICTED)
    assert (again["new"], again["known"]) == (0, 6)
    assert site.known() == WHOLE


def test_rows_with_the_truth_alone_are_predicted_again_by_the_artifact(site):
    path = site.csv("raw.csv", columns=("device", "time", *NAMES, "truth"))
    artifact = site.folder / "registry" / f"{site.digest}.onnx"
    rows = [
        (*row[:-1], row[-1] if row[-1] != "other" else ("low" if row[-2] != "low" else "mid"))
        for row in site.rows
    ]
    path = site.csv("raw.csv", rows, columns=("device", "time", *NAMES, "truth"))
    found = site.imported(path, "--label-column", "truth", "--artifact", str(artifact))
    assert (found["labelled"], found["correct"], found["digest"]) == (120, 96, site.digest)
    assert site.known() == WHOLE


@pytest.mark.parametrize("words", [("1", "0"), ("true", "False"), ("1.0", "0.0")])
def test_a_column_may_say_whether_the_answer_was_right(site, words):
    rows = [(*row[:-1], words[0] if row[-1] == row[-2] else words[1]) for row in site.rows]
    rows[0] = (*rows[0][:-1], "")  # one that nobody knows of yet
    found = site.imported(site.csv("right.csv", rows), "--correct-column", "truth")
    assert (found["labelled"], found["correct"]) == (119, 96)


def test_numbers_are_the_same_however_they_are_written(site):
    rows = [(*row[:-2], "1.0", "1") for row in site.rows]
    assert site.imported(site.csv("numbers.csv", rows), *PREDICTED)["correct"] == 120


def test_a_longer_file_of_the_same_source_adds_its_new_hours_and_says_what_it_left_out(site):
    early = [row for row in site.rows if row[1] < T0 + HOUR + 600]  # an hour and ten minutes
    assert site.imported(site.csv("log.csv", early), *PREDICTED)["new"] == 4
    found = site.imported(site.csv("log.csv"), *PREDICTED, code=1)
    assert (found["new"], found["known"], len(found["contradictions"])) == (2, 2, 2)
    assert "it told before: 8 of 10" in found["contradictions"][0]
    assert site.known() == [("dev-1", 50, 40, 50), ("dev-2", 50, 40, 50)]


def test_what_contradicts_leaves_as_many_dead_letters_as_the_aggregator_keeps(site):
    site.path.write_text('fleet = "fleet"\n[ingest]\ndead_letters = 3\n', encoding="utf-8")
    strange = [DeadLetter(f"skiff/1/fleet/x/{k}", b"", "strange", "topic") for k in range(3)]
    with closing(Windows(site.where, dead_letters=3)) as store:
        store.append([], [], strange, NOW)
    site.imported(site.csv("log.csv", [row for row in site.rows if row[1] < T0 + 600]), *PREDICTED)
    assert len(site.imported(site.csv("log.csv"), *PREDICTED, code=1)["contradictions"]) == 2
    with closing(Windows(site.where, read_only=True)) as store:
        assert len(store.dead_letters()) == 3


def test_the_same_rows_under_another_name_are_refused_unless_it_is_said(site):
    site.imported(site.csv("march.csv"), *PREDICTED)
    copy = site.csv("Copy of MARCH (1).csv")
    done = site.run(copy, *PREDICTED, code=2)
    assert "told by 'march': the same rows under another name?" in done.stderr
    assert site.imported(copy, *PREDICTED, "--source", "march")["new"] == 0
    assert site.known() == WHOLE
    assert site.imported(copy, *PREDICTED, "--source", "copy-of-march-1")["new"] == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give --label-column with the truth, or --correct-column"),
        (("--label-column", "truth"), "or --artifact model.onnx to predict again"),
        ((*PREDICTED, "--correct-column", "truth"), "says it all"),
        (
            ("--label-column", "trut", "--prediction-column", "answer"),
            "has no column 'trut' for --label-column (did you",
        ),
        ((*PREDICTED, "--period", "rows:5"), "give a time in whole seconds"),
        ((*PREDICTED, "--period", "0.5s"), "whole seconds"),
        ((*PREDICTED, "--artifact", "ffff"), "--artifact ffff: 'tiny' has"),
        ((*PREDICTED, "--source", "A/B"), "'A/B' is not a source's name"),
        ((*PREDICTED, "--model", "other"), "no device has sent a window of it"),
        ((*PREDICTED, "--artifact", "no.onnx"), "no.onnx: cannot be read"),
    ],
)
def test_what_is_not_told_well_is_refused_with_what_to_do(site, arguments, words):
    done = site.run(site.csv("march.csv"), *arguments, code=2)
    assert words in done.stderr
    assert site.known() == []


def test_another_period_of_the_same_source_would_count_twice(site):
    path = site.csv("march.csv")
    site.imported(path, *PREDICTED)
    assert "was counted by '3600 s' before" in site.run(path, *PREDICTED, "--period", "15m", code=2).stderr
    assert site.known() == WHOLE


def test_another_period_is_refused_also_when_the_counts_were_rolled_up(site):
    path = site.csv("march.csv")
    site.imported(path, *PREDICTED)
    with closing(Windows(site.where)) as store:
        while store.prune(time.time_ns() + 1):
            pass
    assert "was counted by '3600 s' before" in site.run(path, *PREDICTED, "--period", "15m", code=2).stderr
    assert site.imported(path, *PREDICTED)["known"] == 6
    assert site.known() == WHOLE


def test_values_that_say_nothing_are_named_by_their_row(site):
    done = site.run(site.csv("march.csv"), "--correct-column", "truth", code=1)
    assert "row 1: 'other' is not 1, 0, true or false" in done.stderr
    nearly = [(*row[:-1], "0.9999999") for row in site.rows]
    done = site.run(site.csv("nearly.csv", nearly), "--correct-column", "truth", code=1)
    assert "is not 1, 0, true or false" in done.stderr
    nobody = [(*row[:-1], "") for row in site.rows]
    done = site.run(site.csv("march.csv", nobody), *PREDICTED, code=1)
    assert "of none of its 120 rows is known" in done.stderr
    odd = [("Dev 1", *row[1:]) for row in site.rows]
    assert "'Dev 1' is not a device name" in site.run(site.csv("march.csv", odd), *PREDICTED, code=1).stderr


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8, deadline=None)
@given(order=st.permutations([0, 1, 2, 0, 1]))
def test_the_order_and_repetition_of_files_never_changes_what_is_known(tmp_path_factory, order):
    site = Site(tmp_path_factory.mktemp("site"))
    hours = [[row for row in site.rows if (int(row[1]) - T0) // HOUR == hour] for hour in range(3)]
    paths = [site.csv(f"hour-{hour}.csv", rows) for hour, rows in enumerate(hours)]
    for hour in (*order, 2):
        site.imported(paths[hour], *PREDICTED)
    assert site.known() == WHOLE


def test_drift_and_fleet_show_what_became_known(site):
    site.imported(site.csv("march.csv"), *PREDICTED)
    with closing(Ledger(load(site.path).ledger_path)) as ledger, ledger.transaction():
        for name in ("dev-1", "dev-2"):
            ledger.put_device(device(name, serving=site.digest))
    runner = CliRunner()
    found = json.loads(runner.invoke(app, ["drift", str(site.path), "--json"]).stdout)
    (one,) = found["accuracy"]
    assert (one["labelled"], one["correct"], one["devices"], one["compared"]) == (120, 96, 2, 2)
    assert one["known"] == pytest.approx(0.8)
    assert one["error"] == pytest.approx(one["estimated"] - 0.8)
    shown = runner.invoke(app, ["drift", str(site.path)]).stdout
    assert "0.800 ± 0.000" in shown
    rows = json.loads(runner.invoke(app, ["fleet", str(site.path), "--json"]).stdout)
    assert [(row["labelled"], row["accuracy"]) for row in rows] == [(60, 0.8), (60, 0.8)]
    assert "0.800 of 60" in runner.invoke(app, ["fleet", str(site.path)]).stdout
