"""`skiff backtest` on converted models: its document, its words, its page, and the commands of its how-to page."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from cli.app import app
from converters import convert
from edge_runtime.runtime import Runtime

pytestmark = pytest.mark.sampled(2)

RUN = CliRunner()
NAMES = ["flow", "heat", "load"]
DEVICES = 20
WINDOWS = 12
ROWS = 100
MOVED = 8
OPTIONS = ["--device-column", "device", "--time-column", "time"]


@dataclass(frozen=True)
class Files:
    model: Path
    rows: Path
    good: Path
    folder: Path


def fleet(seed, windows, *, moved=None):
    """Rows of all devices, one every 36 s; from window ``moved`` on, ``heat`` is a standard deviation higher."""
    rng = np.random.default_rng(seed)
    n = windows * ROWS
    parts = []
    for k in range(DEVICES):
        values = rng.normal(size=(n, len(NAMES))) + 0.1 * rng.normal(size=len(NAMES))
        if moved is not None:
            values[moved * ROWS :, 1] += 1.0
        part = pd.DataFrame(values, columns=NAMES)
        part["label"] = np.where(values[:, 0] + values[:, 1] > 0, "hot", "cold")
        part["device"] = f"pump-{k:02}"
        part["time"] = pd.date_range("2026-03-01", periods=n, freq="36s", tz="UTC")
        parts.append(part)
    return pd.concat(parts).sort_values("time", kind="stable")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backtest")
    training = fleet(0, 2)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(training[NAMES], training["label"])
    made = convert(
        pipeline,
        training[NAMES],
        folder / "model.onnx",
        y=training["label"].to_numpy(),
        groups=training["device"].to_numpy(),
        probes=2000,
    )
    rows = fleet(1, WINDOWS, moved=MOVED)
    rows.to_parquet(folder / "rows.parquet", index=False)
    rows.to_csv(folder / "rows.csv", index=False)
    fleet(2, WINDOWS).to_parquet(folder / "good.parquet", index=False)
    return Files(made.path, folder / "rows.parquet", folder / "good.parquet", folder)


def run(files, *arguments, rows=None):
    return RUN.invoke(
        app, ["backtest", str(files.model), str(rows or files.rows), *OPTIONS, *map(str, arguments)]
    )


@pytest.fixture(scope="module")
def replayed(files):
    done = run(files, "--window", "rows:100", "--labels", "label", "--reference", files.good, "--json")
    assert done.exit_code == 0, done.stderr
    return done


def test_the_document_has_the_shape_that_was_promised(replayed):
    found = json.loads(replayed.stdout)
    assert set(found) == {"windows", "alarms", "retrain_requests", "notes"}
    assert [w["index"] for w in found["windows"]] == list(range(WINDOWS))
    for window in found["windows"]:
        assert set(window) == {
            *("index", "start", "end", "devices", "rows", "features"),
            *("refused", "accuracy", "estimated_accuracy", "estimate_error", "estimate_error_half"),
        }
        assert (window["devices"], window["rows"], window["refused"]) == (DEVICES, DEVICES * ROWS, {})
        assert list(window["features"]) == NAMES
        for figures in window["features"].values():
            assert set(figures) == {"psi", "ks", "chi2", "js", "wasserstein"}
            assert all(isinstance(value, float) and value >= 0 for value in figures.values())
    first = found["windows"][0]
    assert (first["start"], first["end"]) == ("2026-03-01T00:00:00Z", "2026-03-01T00:59:24Z")
    assert found["alarms"]
    for alarm in found["alarms"]:
        assert {"kind", "feature", "opened_window", "closed_window", "devices", "severity", "why"} <= set(
            alarm
        )
        assert alarm["severity"] in ("page", "ticket")
    for request in found["retrain_requests"]:
        assert {"window", "why"} <= set(request)


def test_what_moved_is_named_when_it_moved_and_nothing_else(replayed):
    found = json.loads(replayed.stdout)
    inputs = [alarm for alarm in found["alarms"] if alarm["feature"] is not None]
    assert [(alarm["feature"], alarm["kind"]) for alarm in inputs] == [("heat", "drift")]
    assert MOVED <= inputs[0]["opened_window"] <= MOVED + 1
    assert inputs[0]["closed_window"] is None
    assert len(inputs[0]["devices"]) > DEVICES / 2
    figures = [window["features"]["heat"] for window in found["windows"]]
    assert min(f["ks"] for f in figures[MOVED:]) > 0.25 > max(f["ks"] for f in figures[:MOVED])
    np.testing.assert_allclose([f["wasserstein"] for f in figures[MOVED:]], 1.0, atol=0.15)


def test_the_accuracy_is_that_of_the_labels(replayed, files):
    rows = pd.read_parquet(files.rows)
    answers = Runtime(files.model).predict(rows[NAMES].to_numpy(np.float32)).label
    rows["right"] = np.asarray(answers) == rows["label"].to_numpy()
    rows["window"] = rows.groupby("device").cumcount() // ROWS
    expected = rows.groupby("window")["right"].mean()
    found = [window["accuracy"] for window in json.loads(replayed.stdout)["windows"]]
    np.testing.assert_allclose(found, expected)


def test_the_estimates_error_is_estimate_minus_truth_over_devices(replayed):
    for window in json.loads(replayed.stdout)["windows"]:
        # Every device has as many rows and labels as any other here, so means over devices are means over rows.
        error = window["estimated_accuracy"] - window["accuracy"]
        assert window["estimate_error"] == pytest.approx(error, abs=1e-12)
        assert 0 < window["estimate_error_half"] < 0.2


def test_a_csv_file_gives_the_same_as_a_parquet_file(files, replayed):
    done = run(
        files, "--window", "rows:100", "--labels", "label", "--reference", files.good, "--json",
        rows=files.folder / "rows.csv",
    )  # fmt: skip
    found, expected = (json.loads(text) for text in (done.stdout, replayed.stdout))
    assert found["alarms"] == expected["alarms"]
    assert found["windows"] == expected["windows"]


def test_windows_of_an_hour_are_the_same_here(files, replayed):
    found = json.loads(
        run(files, "--window", "1h", "--labels", "label", "--reference", files.good, "--json").stdout
    )
    expected = json.loads(replayed.stdout)
    assert [w["features"] for w in found["windows"]] == [w["features"] for w in expected["windows"]]
    assert [w["end"] for w in found["windows"]][:2] == ["2026-03-01T01:00:00Z", "2026-03-01T02:00:00Z"]


def test_a_person_is_told_the_alarms_first_and_a_page_shows_them(files, tmp_path):
    page = tmp_path / "page.html"
    done = run(
        files, "--window", "rows:100", "--labels", "label", "--reference", files.good, "--report", page
    )
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(("page", "ticket"))
    assert any(re.match(r"(page|ticket) +drift of heat  windows [89] to the end, ", line) for line in lines)
    assert re.search(
        r"^ 11 +03-01 11:00 +20 +2000 +0\.\d{3} +[+-]0\.\d{3} ± 0\.\d{3} +heat 0\.\d\d",
        done.stdout,
        re.MULTILINE,
    )
    assert f"wrote {page}" in done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 3
    assert "src=" not in text
    for word in ("What moved when", "Before and after", "Accuracy", "drift", "heat", "pump-00"):
        assert word in text
    assert "pump-00, pump-01 and 18 more" in text


def test_rows_that_the_model_refuses_are_counted_and_do_not_stop_it(files, tmp_path):
    rows = pd.read_parquet(files.rows)
    rows.loc[rows["device"] == "pump-03", "load"] = np.nan
    rows.to_parquet(tmp_path / "gaps.parquet", index=False)
    done = run(files, "--window", "rows:100", "--json", rows=tmp_path / "gaps.parquet")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert {window["refused"]["missing"] for window in found["windows"]} == {ROWS}
    assert {window["rows"] for window in found["windows"]} == {(DEVICES - 1) * ROWS}
    assert (
        "the model refuses 1200 rows (missing 1200); much is refused of pump-03 (1200 of 1200)" in done.stderr
    )
    table = run(files, "--window", "rows:100", rows=tmp_path / "gaps.parquet").stdout
    assert re.search(r"^ window +from +devices +rows +refused +moved most", table, re.MULTILINE)
    assert re.search(r"^ 11 +03-01 11:00 +20 +1900 +100 +heat 0\.\d\d", table, re.MULTILINE)


def test_a_window_without_an_answered_row_has_figures_that_are_null(files, tmp_path):
    rows = pd.read_parquet(files.rows)
    rows.loc[rows.groupby("device").cumcount() // ROWS == 3, "load"] = np.nan
    rows.to_parquet(tmp_path / "gaps.parquet", index=False)
    page = tmp_path / "page.html"
    done = run(files, "--window", "rows:100", "--json", "--report", page, rows=tmp_path / "gaps.parquet")
    assert done.exit_code == 0, done.stderr
    window = json.loads(done.stdout)["windows"][3]
    assert (window["rows"], list(window["features"])) == (0, NAMES)
    for figures in window["features"].values():
        assert figures == dict.fromkeys(("psi", "ks", "chi2", "js", "wasserstein"))
    assert page.read_text(encoding="utf-8").count("<svg") >= 2
    assert run(files, "--window", "rows:100", rows=tmp_path / "gaps.parquet").exit_code == 0


def test_without_a_reference_the_windows_that_were_learned_are_told(files, tmp_path):
    page = tmp_path / "page.html"
    done = run(files, "--window", "rows:100", "--json", "--report", page)
    told = "windows 0 to 7 were learned as the devices' past; from 8 on windows were judged against it"
    assert told in json.loads(done.stdout)["notes"]
    assert "first windows (0 to 7, against which those from 8 on are judged)" in page.read_text(
        encoding="utf-8"
    )
    config = tmp_path / "aggregator.toml"
    config.write_text('fleet = "f"\n[drift]\nbaseline_looks = 5\n', encoding="utf-8")
    done = run(files, "--window", "rows:100", "--json", "--config", config)
    assert told.replace("7", "4").replace("8", "5") in json.loads(done.stdout)["notes"]


def test_a_reference_of_other_devices_is_no_reference(files, tmp_path):
    rows = pd.read_parquet(files.good)
    rows["device"] = rows["device"].str.upper()
    rows.to_parquet(tmp_path / "good.parquet", index=False)
    done = run(files, "--window", "rows:100", "--json", "--reference", tmp_path / "good.parquet")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "none of its devices (PUMP-00, PUMP-01, PUMP-02 and 17 more) is in" in done.stderr


def test_devices_may_be_numbers_in_one_file_and_text_in_the_other(files, tmp_path):
    rows = pd.read_parquet(files.rows)
    rows["device"] = rows["device"].str[5:].astype(int)
    rows.to_parquet(tmp_path / "rows.parquet", index=False)
    good = pd.read_parquet(files.good)
    good["device"] = good["device"].str[5:].astype(int).astype(str)
    good.to_parquet(tmp_path / "good.parquet", index=False)
    done = run(
        files, "--window", "rows:100", "--json", "--reference", tmp_path / "good.parquet",
        rows=tmp_path / "rows.parquet",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [alarm["feature"] for alarm in found["alarms"] if alarm["feature"]] == ["heat"]
    assert not any("no history" in text for text in found["notes"])


def test_a_reference_needs_no_labels(files, tmp_path):
    pd.read_parquet(files.good).drop(columns="label").to_parquet(tmp_path / "good.parquet", index=False)
    done = run(
        files, "--window", "rows:100", "--labels", "label", "--json", "--reference", tmp_path / "good.parquet"
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(window["accuracy"] is not None for window in found["windows"])
    assert any("good.parquet: has no column 'label', so" in text for text in found["notes"])


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "table"])
def test_an_answer_that_cannot_be_printed_is_an_error_in_one_line(files, options):
    program = "import sys; from cli.app import app; app(sys.argv[1:])"
    arguments = ["backtest", str(files.model), str(files.rows), *OPTIONS, "--window", "1h", *options]
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1] == "error: standard output cannot be written (No space left on device)"
    )
    assert "Traceback" not in done.stderr


def test_the_answer_is_printed_before_the_page_is_written(files, tmp_path):
    page = tmp_path / "page.html"
    page.symlink_to("/dev/full")
    done = run(files, "--window", "1h", "--json", "--report", page)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["windows"]
    assert (
        done.stderr.splitlines()[-1] == f"error: --report {page}: cannot be written (No space left on device)"
    )


def test_one_row_makes_no_window_of_time_and_rows_are_suggested(files, tmp_path):
    pd.read_parquet(files.rows).head(1).to_parquet(tmp_path / "rows.parquet", index=False)
    done = run(files, "--window", "1h", rows=tmp_path / "rows.parquet")
    assert done.exit_code == 2
    assert (
        "stays open until the model has answered 30 rows of the device (the most, 1 row, has" in done.stderr
    )
    assert "take --window rows:N with N of at most 1" in done.stderr


@pytest.mark.parametrize("command", ["backtest", "drift"])
def test_the_help_names_the_section(command):
    done = RUN.invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert re.search(r"TOML file, for its \[drift\] section", done.stdout)


def test_few_devices_are_judged_alone_and_that_is_said(files, tmp_path):
    for name in ("rows", "good"):
        rows = pd.read_parquet(files.folder / f"{name}.parquet")
        rows[rows["device"] < "pump-02"].to_parquet(tmp_path / f"{name}.parquet", index=False)
    done = run(
        files, "--window", "rows:100", "--reference", tmp_path / "good.parquet", "--json",
        rows=tmp_path / "rows.parquet",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert any("2 devices" in text for text in json.loads(done.stdout)["notes"])


def test_the_drift_section_of_a_configuration_counts(files, tmp_path, replayed):
    config = tmp_path / "aggregator.toml"
    config.write_text('fleet = "f"\n[drift]\nmin_devices = 200\nmax_devices = 200\n', encoding="utf-8")
    done = run(files, "--window", "rows:100", "--reference", files.good, "--config", config, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["notes"] != json.loads(replayed.stdout)["notes"]
    assert any("200" in text for text in json.loads(done.stdout)["notes"])
    config.write_text("[drift]\nmin_devices = 200\nmax_devices = 200\n", encoding="utf-8")  # and nothing else
    alone = run(files, "--window", "rows:100", "--reference", files.good, "--config", config, "--json")
    assert json.loads(alone.stdout) == json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--window", "weekly"], 2, "--window 'weekly': give rows:N"),
        (["--window", "rows:5000"], 2, "no device has rows enough for one window of rows:5000"),
        (["--window", "1h", "--labels", "truth"], 2, "no column 'truth' for --labels"),
        (["--window", "1h", "--report", "/no/such/folder/x.html"], 2, "there is no folder"),
        (
            ["--window", "1h", "--report", "/tmp"],
            2,
            "--report /tmp: is a folder; give the name of a file in it",
        ),
        (["--window", "1h", "--reference", "none.parquet"], 1, "none.parquet: cannot be read"),
        (["--window", "1h", "--config", "none.toml"], 2, "none.toml: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(files, arguments, code, message):
    done = run(files, *arguments)
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_extra_columns_are_noted_beside_the_document(files, replayed):
    done = run(files, "--window", "rows:100", "--reference", files.good, "--json")
    assert f"note: {files.rows}: ignored 'label'" in done.stderr
    json.loads(done.stdout)


def test_the_commands_of_the_page_run(files, repository, monkeypatch):
    text = (repository / "docs/how-to/backtest.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(files.folder)
    lines = block.splitlines()
    assert len(lines) == 4
    for line in lines:
        done = RUN.invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, done.stderr
    assert (files.folder / "backtest.html").stat().st_size > 10_000


def test_no_command_waits_for_what_only_others_need(files):
    program = (
        "import sys; from cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "unwanted = {'sklearn', 'skl2onnx', 'onnx', 'matplotlib', 'pandas', 'tuf', 'paho'}\n"
        "print(*unwanted & set(sys.modules), file=sys.stderr)"
    )
    arguments = ["backtest", str(files.model), str(files.rows), *OPTIONS, "--window", "1h", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--reference", str(files.good)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == ""
