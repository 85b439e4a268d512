"""`skiff convert` and `skiff parity`: where pipelines and rows come from, what is shown, and how it fails."""

import json
import pickle
import sys
import warnings
from dataclasses import replace

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.exceptions import InconsistentVersionWarning
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from typer.testing import CliRunner

import converters.artifact
from cli.app import app
from cli.pipelines import load_pipeline
from cli.rows import Wanted, load_rows
from converters.parity import compare
from converters.report import KindResult
from edge_runtime.contract.errors import ConfigError, InputError, UnsupportedPipeline
from edge_runtime.contract.manifest import read_info

pytestmark = pytest.mark.sampled(2)

RUN = CliRunner()
ROWS = 120
COLUMNS = ["size", "load", "site", "zip"]


def people():
    """Rows as a person keeps them: text, gaps, numbers that are names, a target, and whose they are."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "site": rng.choice(["north", "south", "None"], ROWS),
            "size": rng.normal(size=ROWS),
            "zip": rng.choice(["01234", "99999"], ROWS),
            "load": rng.normal(size=ROWS),
            "person": rng.choice(["ann", "bob"], ROWS),
        }
    )
    table.loc[::17, "load"] = np.nan
    table["state"] = np.where(table["size"] + (table["site"] == "north") > 0.4, "hot", "cold")
    return table


def numbers():
    return np.random.default_rng(1).normal(size=(ROWS, 3))


@pytest.fixture(scope="module")
def mixed():
    table = people()
    encode = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["site", "zip"]),
        remainder=make_pipeline(SimpleImputer(), StandardScaler()),
    )
    return make_pipeline(encode, RandomForestClassifier(3, random_state=0)).fit(
        table[COLUMNS], table["state"]
    )


@pytest.fixture(scope="module")
def plain():
    X = numbers()
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(X, X[:, 0] > 0)


@pytest.fixture
def folder(tmp_path, monkeypatch, mixed, plain):
    """A user's working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    people().to_csv("rows.csv", index=False)
    skops.io.dump(mixed, "mixed.skops")
    skops.io.dump(plain, "plain.skops")
    np.save("X.npy", numbers())
    np.save("y.npy", numbers()[:, 0] > 0)
    return tmp_path


def skiff(*words):
    return RUN.invoke(app, list(words))


# ── pipelines ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_pickle_is_not_read_unless_it_is_allowed(folder, mixed):
    class Trap:
        def __reduce__(self):
            return (open, ("sprung", "w"))

    (folder / "trap.pkl").write_bytes(pickle.dumps(Trap()))
    done = skiff("convert", "trap.pkl", "rows.csv")
    assert done.exit_code == 2
    assert not (folder / "sprung").exists()
    for words in ("runs whatever code its writer put there", "--allow-pickle", ".skops", "module:attribute"):
        assert words in done.stderr


@pytest.mark.parametrize("name", ["p.pkl", "p.pickle", "p.joblib"])
def test_a_pickle_that_is_allowed_is_converted(folder, plain, name):
    if name == "p.joblib":
        joblib.dump(plain, name, compress=3)
    else:
        (folder / name).write_bytes(pickle.dumps(plain))
    done = skiff("convert", name, "X.npy", "--allow-pickle", "--probes", "100")
    assert done.exit_code == 0, done.stderr
    assert read_info((folder / "model.onnx").read_bytes()).manifest.task == "classifier"


def truncated(path, mixed):
    path.write_bytes(pickle.dumps(mixed)[:2000])


def foreign(path, mixed):
    path.write_bytes(b"PK not really")


def a_dict(path, mixed):
    path.write_bytes(pickle.dumps({"model": mixed}))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("p.pkl", truncated, "holds no pipeline that can be read"),
        ("p.joblib", foreign, "holds no pipeline that can be read"),
        ("p.skops", truncated, "holds no pipeline that can be read"),
        ("p.skops", foreign, "holds no pipeline that can be read"),
        ("p.pkl", a_dict, "is no fitted pipeline, but of type dict with the keys model"),
        ("absent.pkl", None, "absent.pkl: cannot be read"),
        ("absent.skops", None, "absent.skops: cannot be read"),
    ],
)
def test_a_file_without_a_pipeline_is_refused_in_one_line(folder, mixed, name, write, message):
    if write is not None:
        write(folder / name, mixed)
    done = skiff("convert", name, "rows.csv", "--allow-pickle")
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def saved_by(version, fitted):
    """A pickle as another release writes it."""
    state = pickle.dumps(fitted)
    current = fitted.__getstate__()["_sklearn_version"]
    assert len(version) == len(current)
    return state.replace(current.encode(), version.encode())


def test_a_pickle_of_another_release_is_refused_with_both_versions(folder, plain):
    (folder / "p.pkl").write_bytes(saved_by("1.2.2", plain))
    with pytest.raises(UnsupportedPipeline, match=r"saved by scikit-learn 1\.2\.2.*fit the pipeline again"):
        load_pipeline("p.pkl", allow_pickle=True)
    assert skiff("convert", "p.pkl", "X.npy", "--allow-pickle").exit_code == 3


def test_a_pickle_of_the_same_release_line_is_read_with_a_note(folder, plain):
    version = plain.__getstate__()["_sklearn_version"]
    near = f"{version[:-1]}{(int(version[-1]) + 1) % 10}"
    (folder / "p.pkl").write_bytes(saved_by(near, plain))
    heard: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", InconsistentVersionWarning)
        assert hasattr(load_pipeline("p.pkl", allow_pickle=True, tell=heard.append), "predict")
    assert len(heard) == 1
    assert f"saved by scikit-learn {near}" in heard[0]


def test_types_that_are_not_scikit_learns_own_need_trust(folder, plain):
    fitted = make_pipeline(FunctionTransformer(np.fft.fft), LinearRegression())
    skops.io.dump(fitted, "f.skops")
    with pytest.raises(ConfigError, match=r"pass --trust numpy\.fft") as caught:
        load_pipeline("f.skops")
    name = str(caught.value).split("--trust ")[1]
    assert hasattr(load_pipeline("f.skops", trusted=[name]), "steps")


def test_categories_by_dtype_are_read_from_text(folder):
    table = people()[["site", "size"]].astype({"site": "category"})
    skops.io.dump(HistGradientBoostingClassifier(max_iter=3).fit(table, people()["state"]), "h.skops")
    done = skiff("convert", "h.skops", "rows.csv", "--probes", "100")
    assert done.exit_code == 0, done.stderr


def test_a_module_in_the_working_folder_is_found(folder):
    (folder / "my_models.py").write_text(
        "import skops.io\n\ndef make():\n    return skops.io.load('plain.skops')\n\nclass Box:\n    inner = make()\n",
        encoding="utf-8",
    )
    for where in ("my_models:make", "my_models:Box.inner"):
        assert hasattr(load_pipeline(where), "predict")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("no_such_module:x", "No module named 'no_such_module': install it, or run skiff in the folder"),
        ("json:nothing", "has no attribute 'nothing'"),
        ("json:decoder", "is no fitted pipeline, but of type module"),
        ("sklearn.linear_model:Ridge", "is the class Ridge; name a fitted instance"),
        ("model.py:pipeline", "names a file; name the module: model:pipeline"),
        ("broken_module:x", "ZeroDivisionError: division by zero"),
        ("model.onnx", "neither module:attribute nor a .skops file"),
    ],
)
def test_what_is_no_pipeline_is_refused_with_what_would_be(folder, where, message):
    (folder / "broken_module.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(where)
    assert message in str(caught.value)


# ── rows ───────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_are_chosen_by_name_and_read_as_the_encoders_know_them(folder, mixed):
    rows = load_rows(folder / "rows.csv", mixed, Wanted(target="state", groups="person"))
    assert rows.X.columns.tolist() == COLUMNS
    assert set(rows.X["zip"]) == {"01234", "99999"}
    assert set(rows.X["site"]) == {"north", "south", "None"}
    assert int(rows.X["load"].isna().sum()) == people()["load"].isna().sum()
    assert set(rows.y) == {"hot", "cold"}
    assert set(rows.groups) == {"ann", "bob"}


def test_parquet_is_read_like_csv(folder, mixed):
    people().to_parquet("rows.parquet")
    rows = load_rows(folder / "rows.parquet", mixed, Wanted(target="state"))
    pd.testing.assert_frame_equal(rows.X, people()[COLUMNS])


def test_without_pyarrow_parquet_says_what_to_install(folder, mixed, monkeypatch):
    people().to_parquet("rows.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="reading Parquet needs pyarrow: pip install pyarrow"):
        load_rows(folder / "rows.parquet", mixed, Wanted())


def test_without_names_all_other_columns_are_taken(folder, plain):
    X = numbers()
    pd.DataFrame(X, columns=["a", "b", "c"]).assign(id=range(ROWS), y=1).to_csv("n.csv", index=False)
    rows = load_rows(folder / "n.csv", plain, Wanted(target="y", drop=("id",)))
    np.testing.assert_allclose(rows.X.to_numpy(), X)
    with pytest.raises(InputError, match=r"4 columns for a pipeline that takes 3.*'id'.*--drop"):
        load_rows(folder / "n.csv", plain, Wanted(target="y"))
    with pytest.raises(ConfigError, match="no column 'idd' to leave out"):
        load_rows(folder / "n.csv", plain, Wanted(target="y", drop=("idd",)))


def test_arrays_come_with_a_target_of_their_own(folder, plain):
    X, y = numbers(), numbers()[:, 0] > 0
    rows = load_rows(folder / "X.npy", plain, Wanted(target="y.npy"))
    np.testing.assert_array_equal(rows.X, X)
    np.testing.assert_array_equal(rows.y, y)
    np.savez("xy.npz", X=X[:, ::-1], y=y, who=["a"] * ROWS, feature_names=["c", "b", "a"])
    named = make_pipeline(LogisticRegression()).fit(pd.DataFrame(X, columns=["a", "b", "c"]), y)
    rows = load_rows(folder / "xy.npz", named, Wanted(target="y", groups="who"))
    np.testing.assert_array_equal(rows.X[["a", "b", "c"]].to_numpy(), X)
    assert rows.X.columns.tolist() == ["a", "b", "c"]
    assert len(rows.groups) == ROWS
    np.savez("features.npz", features=X)
    np.testing.assert_array_equal(load_rows(folder / "features.npz", plain, Wanted()).X, X)


def write_text(text):
    return lambda path: path.write_bytes(text)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        (
            "x.csv",
            write_text(b"a,b\n1,2\n"),
            "lacks 'size', 'load', 'site', 'zip', which the pipeline was fitted",
        ),
        ("x.csv", write_text(b""), "is not a CSV file"),
        ("x.csv", write_text(b"size,load,site,zip\n1,\xff,x,y\n"), "is not a CSV file in UTF-8"),
        ("x.parquet", write_text(b"PAR1 nothing"), "is not a Parquet file"),
        ("x.npy", write_text(b"nothing"), "is not a readable .npy file"),
        ("x.npz", lambda path: np.savez(path, other=[1]), "no array 'features' or 'X', only 'other'"),
        ("x.npy", lambda path: np.save(path, np.array([None])), "save text as .csv or .parquet"),
        ("x.csv", None, "cannot be read"),
        ("x.txt", None, "read from .npy, .npz, .csv, .parquet"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_in_one_line(folder, name, write, message):
    if write is not None:
        write(folder / name)
    done = skiff("convert", "mixed.skops", name)
    assert done.exit_code in {1, 2}
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_target_that_is_not_there_is_named(folder):
    done = skiff("convert", "mixed.skops", "rows.csv", "--target", "temperature")
    assert done.exit_code == 2
    assert "has no 'temperature'" in done.stderr


# ── what is shown ──────────────────────────────────────────────────────────────────────────────────────


def test_everything_that_convert_takes_reaches_the_artifact(folder):
    assert skiff("convert", "mixed.skops", "rows.csv", "--probes", "100", "-o", "first.onnx").exit_code == 0
    words = "--name watch --version 2 --target state --groups person --layout first.onnx --max-p99-us 50"
    more = "--max-rss-mb 90 --input-dtype float64 --real-rows --probes 200 --seed 3 --html r.html --json"
    done = skiff("convert", "mixed.skops", "rows.csv", *words.split(), *more.split())
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    first, second = (read_info((folder / name).read_bytes()) for name in ("first.onnx", "model.onnx"))
    assert (second.manifest.name, second.manifest.version) == ("watch", "2")
    assert (second.manifest.budgets.predict_p99_ns, second.manifest.budgets.rss_bytes) == (50_000, 90_000_000)
    assert json.loads(skiff("inspect", "model.onnx", "--json").stdout)["budgets"] == {
        "predict_p99_us": 50.0,
        "rss_mb": 90.0,
    }
    assert "budgets        predict_p99_us 50.0, rss_mb 90.0" in skiff("inspect", "model.onnx").stdout
    assert json.loads(skiff("inspect", "first.onnx", "--json").stdout)["budgets"] == {}
    assert second.manifest.input_dtype == told["input_dtype"] == "float64"
    assert [name for name, _ in second.reference.groups] == ["ann", "bob"]
    assert second.manifest.layout == first.manifest.layout == told["layout"]
    assert second.certificate["real_rows"] is told["real_rows"] is True
    assert (told["probes"], told["seed"], told["passed"], told["path"]) == (200, 3, True, "model.onnx")
    assert told["kinds"]["training"]["worst"]["kind"] == "training"
    assert {"remedies", "notes", "outputs", "splits", "worst", "features"} <= told.keys()
    assert "Parity" in (folder / "r.html").read_text(encoding="utf-8")


def test_remedies_notes_and_outputs_are_told(folder):
    X = np.column_stack([1.7e9 + np.arange(ROWS) * 0.25, numbers()])
    skops.io.dump(make_pipeline(StandardScaler(), LinearRegression()).fit(X, X[:, :2] % 7), "t.skops")
    np.save("T.npy", X)
    done = skiff("convert", "t.skops", "T.npy", "--probes", "100")
    assert done.exit_code == 0, done.stderr
    assert "remedy: float64 input, because float32 input changes" in done.stdout
    again = skiff("parity", "t.skops", "model.onnx", "T.npy", "--probes", "100")
    assert again.exit_code == 0
    assert "remedy: float64 input, because float32 input changes" in again.stdout
    outputs = json.loads(
        skiff("parity", "t.skops", "model.onnx", "T.npy", "--probes", "100", "--json").stdout
    )["outputs"]
    assert [output["output"] for output in outputs] == [0, 1]


def test_a_parity_that_fails_is_shown_and_has_its_exit_code(folder, plain):
    assert skiff("convert", "plain.skops", "X.npy", "--probes", "100").exit_code == 0
    X = numbers()
    skops.io.dump(make_pipeline(StandardScaler(), LogisticRegression()).fit(X, X[:, 1] > 0), "other.skops")
    done = skiff(
        "parity", "other.skops", "model.onnx", "X.npy", "--probes", "100", "--html", "r.html", "--json"
    )
    assert done.exit_code == 3
    told = json.loads(done.stdout)
    assert told["passed"] is False
    assert told["worst"][0]["label_differs"]
    assert "failed" in (folder / "r.html").read_text(encoding="utf-8")


def test_a_conversion_that_fails_its_proof_shows_where(folder, monkeypatch):
    def broken(*args, **options):
        report = compare(*args, **options)
        return replace(report, score_mismatches=1, by_probe_kind={"random": KindResult(rows=1)})

    monkeypatch.setattr(converters.artifact, "compare", broken)
    done = skiff("convert", "plain.skops", "X.npy", "--probes", "100", "--json", "--html", "r.html")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["passed"] is False
    assert done.stderr.startswith("refused: ")
    assert (folder / "r.html").exists()
    assert not (folder / "model.onnx").exists()


@pytest.mark.parametrize("command", ["convert", "parity", "train", "inspect"])
def test_help_says_what_exit_codes_mean(command):
    done = RUN.invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert "3 a model was refused" in " ".join(done.stdout.split())


def test_ranges_reach_the_artifact_and_are_shown(folder):
    words = ["--range", "size=-10:10", "--range", "load=:25.5", "--probes", "100"]
    done = skiff("convert", "mixed.skops", "rows.csv", *words)
    assert done.exit_code == 0, done.stderr
    assert "inside the ranges that the manifest declares for 2 of 4 features" in " ".join(done.stdout.split())
    shown = skiff("inspect", "model.onnx").stdout
    assert "ranges         size -10:10, load :25.5\n" in shown
    found = json.loads(skiff("inspect", "model.onnx", "--json").stdout)
    assert found["ranges"] == {"size": [-10.0, 10.0], "load": [None, 25.5]}


def test_the_training_rows_ranges_reach_the_artifact(folder):
    done = skiff("convert", "mixed.skops", "rows.csv", "--range", "training", "--probes", "100")
    assert done.exit_code == 0, done.stderr
    size = people()["size"]
    by_name = {
        feature.name: feature for feature in read_info((folder / "model.onnx").read_bytes()).manifest.features
    }
    assert by_name["size"].low == pytest.approx(size.min() - (size.max() - size.min()))
    assert by_name["size"].high == pytest.approx(size.max() + (size.max() - size.min()))
    assert not by_name["site"].ranged


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("size", "is neither 'training' nor NAME=LOW:HIGH"),
        ("sise=0:1", "the pipeline has no feature 'sise' (did you mean 'size'?)"),
        ("size=1:0", "has low 1.0 above high 0.0"),
        ("site=0:1", "'site' holds categories"),
        ("size=0:100", "training rows lie outside the declared ranges; the first is row"),
    ],
)
def test_ranges_that_cannot_be_are_refused_in_one_line(folder, word, message):
    done = skiff("convert", "mixed.skops", "rows.csv", "--range", word)
    assert done.exit_code in {1, 2}
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_names_are_printed_as_they_are(folder):
    done = skiff("convert", "json:boom", "rows.csv")
    assert "json:boom:" in done.stderr
