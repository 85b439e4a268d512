"""Fitting and the whole run, on real watch rows and on small tables."""

from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError, InputError
from edge_runtime.contract.manifest import Budgets, read_info
from edge_runtime.engine import Engine
from edge_runtime.runtime import Runtime
from trainer.datasets import DatasetError
from trainer.fit import fit, make_pipeline, read_rows
from trainer.release import run
from trainer.spec import KINDS, SCALERS, DeclaredRanges, ModelSpec, TableSource, TrainSpec, WatchSource, load


def spec(source=None, kind="forest", *, scaler="standard", seed=0, ranges=None, **parameters):
    return TrainSpec(
        name=ids.model_name("toy"),
        version="1",
        seed=seed,
        source=source or WatchSource(people=(1, 2), wrists=(0,), evaluation=(7,)),
        model=ModelSpec(kind=kind, scaler=scaler, parameters=tuple(parameters.items())),
        budgets=Budgets(predict_p99_ns=1_000_000),
        probes=300,
        ranges=ranges,
    )


def table(path, *, group="", groups=(), fraction=0.25, target="y"):
    return TableSource(path=path, target=target, group=group, groups=groups, fraction=fraction)


def groups(rows):
    assert rows.groups is not None
    return set(rows.groups.tolist())


@pytest.fixture
def csv_file(tmp_path):
    """120 rows of three devices; the label follows the sign of ``a``."""
    rng = np.random.default_rng(0)
    lines = ["device,a,b,y"]
    for i in range(120):
        a, b = rng.normal(size=2)
        lines.append(f"d{i % 3},{a},{b},{'up' if a > 0 else 'down'}")
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_watch_is_evaluated_per_wrist_on_people_nobody_trained_on():
    source = WatchSource(people=(1, 2, 3, 4, 5, 6), wrists=(0,), evaluation=(7, 8, 9, 10))
    fitted = fit(spec(source, trees=20, max_depth=8))
    assert [name for name, _ in fitted.evaluation] == ["the left wrist", "the right wrist"]
    left, right = (value for _, value in fitted.evaluation)
    assert left > right + 0.05, (
        "a left-wrist model does worse on the right: the story the demonstration tells"
    )
    assert left > 0.75
    assert fitted.measure == "accuracy"
    assert groups(fitted.training) == {f"person-0{person}-left" for person in range(1, 7)}
    assert fitted.training.y.dtype.kind == "U"
    assert set(fitted.pipeline.classes_) == set(fitted.training.y)
    assert tuple(fitted.pipeline.feature_names_in_) == fitted.feature_names
    assert len(fitted.feature_names) == fitted.training.X.shape[1] == 30


def test_the_same_seed_gives_the_same_forest_and_another_does_not():
    rows = read_rows(spec()).training.X[:500]
    first, second, other = (
        fit(spec(trees=5, max_depth=6, seed=seed)).pipeline[1].predict_proba(rows) for seed in (3, 3, 4)
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaler", SCALERS)
def test_every_kind_and_scaler_fits(kind, scaler):
    rng = np.random.default_rng(1)
    X = rng.normal(size=(60, 3))
    y = X[:, 0] if kind in ("ridge", "forest-regressor") else (X[:, 0] > 0).astype(int)
    whole = {"trees": 3, "max_depth": 2} if "forest" in kind or "trees" in kind else {}
    pipeline = make_pipeline(ModelSpec(kind=kind, scaler=scaler, parameters=tuple(whole.items())), seed=0)
    assert pipeline.fit(X, y).score(X, y) > 0.5
    assert len(pipeline) == (1 if scaler == "none" else 2)


def test_named_groups_are_held_out_whole(csv_file):
    fitted = fit(spec(table(csv_file, group="device", groups=("d1",)), kind="logistic"))
    assert groups(fitted.training) == {"d0", "d2"}
    assert len(fitted.training.X) == 80
    assert fitted.feature_names == ("a", "b")
    assert dict(fitted.evaluation)["held-out rows"] > 0.8


def test_a_share_of_the_groups_is_held_out_whole(csv_file):
    split = read_rows(spec(table(csv_file, group="device", fraction=0.3)))
    trained = groups(split.training)
    [(_, held)] = split.evaluation
    assert len(trained) == 2
    assert trained.isdisjoint(groups(held))


def test_without_groups_rows_are_held_out_by_class(tmp_path, csv_file):
    lines = [line.partition(",")[2] for line in csv_file.read_text().splitlines()]
    csv_file.write_text("\n".join(lines))
    split = read_rows(spec(table(csv_file)))
    [(_, held)] = split.evaluation
    assert (len(held.y), len(split.training.y), split.training.groups) == (30, 90, None)
    share = [np.mean(rows.y == "up") for rows in (held, split.training)]
    assert abs(share[0] - share[1]) < 0.02


def test_whole_numbers_in_text_become_labels_of_whole_numbers(csv_file):
    csv_file.write_text(csv_file.read_text().replace("up", "1").replace("down", "0"))
    fitted = fit(spec(table(csv_file, group="device"), kind="tree"))
    assert fitted.pipeline.classes_.tolist() == [0, 1]


def test_an_npz_file_keeps_its_own_target_type(tmp_path):
    rng = np.random.default_rng(2)
    X = rng.normal(size=(80, 2))
    path = tmp_path / "rows.npz"
    np.savez(path, features=X, y=X[:, 0] * 3, who=np.repeat(np.arange(4), 20))
    fitted = fit(spec(table(path, group="who", groups=("3",)), kind="ridge"))
    assert fitted.measure == "R²"
    assert dict(fitted.evaluation)["held-out rows"] > 0.9
    assert fitted.feature_names == ("x0", "x1")
    assert groups(fitted.training) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": "z"}, DatasetError, "with 'z' among them"),
        ({"group": "z"}, DatasetError, "with 'z' among them"),
        ({"group": "device", "groups": ("d9",)}, ConfigError, "no row belongs to device 'd9'"),
        ({"group": "device", "groups": ("d0", "d1", "d2")}, ConfigError, "120 of 120 rows would be held out"),
        ({}, DatasetError, "line 2, column 'device': 'd0' is no number"),
    ],
)
def test_what_the_rows_do_not_allow_is_named(csv_file, changes, error, message):
    kind = "logistic"
    with pytest.raises(error, match=message):
        fit(spec(table(csv_file, **changes), kind=kind, C=1.0))


def test_what_scikit_learn_refuses_is_named(csv_file):
    text = csv_file.read_text()
    first = text.splitlines()[1]
    csv_file.write_text(text.replace(first, "d0,,1.0,up"))
    source = table(csv_file, group="device", groups=("d1",))
    with pytest.raises(ConfigError, match="model toy: cannot be fitted: Input X contains NaN"):
        fit(spec(source, kind="logistic"))
    assert fit(spec(source, trees=3)).training.X.shape == (80, 2), "forests take missing values"
    csv_file.write_text(
        text.replace(first, "d0,1.0,1.0,sideways").replace("device", "x").replace("\nd", "\n")
    )
    with pytest.raises(ConfigError, match=r"cannot hold out 0\.25 of the rows: The least populated class"):
        fit(spec(table(csv_file)))


def test_a_regressor_needs_numbers(csv_file):
    with pytest.raises(ConfigError, match="'y' is not numeric"):
        fit(spec(table(csv_file, group="device"), kind="ridge"))


def test_a_damaged_npz_names_the_array(tmp_path):
    path = tmp_path / "rows.npz"
    np.savez(path, features=np.zeros((3, 2)), y=np.zeros(4))
    with pytest.raises(DatasetError, match=r"y has shape \(4,\), but there are 3 rows"):
        fit(spec(table(path)))
    np.savez(path, features=np.zeros((3, 2)))
    with pytest.raises(DatasetError, match="holds no array 'y'"):
        fit(spec(table(path)))
    path.write_bytes(b"PK\3\4 cut short")
    with pytest.raises(DatasetError, match="not a readable"):
        fit(spec(table(path)))


def test_a_run_makes_a_proven_artifact_twice_the_same_and_inherits_its_layout(tmp_path):
    told = []
    small = spec(trees=10, max_depth=6)
    made = run(small, tmp_path / "a.onnx", progress=lambda *step: told.append(step))
    info = read_info(made.artifact.path.read_bytes())
    assert made.artifact.report.passed
    assert (info.manifest.name, info.manifest.version) == ("toy", "1")
    assert info.manifest.budgets == small.budgets
    assert info.manifest.features[0].name == "accel_x_mean"
    assert [name for name, _ in info.reference.groups] == ["person-01-left", "person-02-left"]
    assert info.reference.total.rows == made.training_rows
    assert told[0] == ("fit", 0, 1)
    assert {stage for stage, _, _ in told} > {"fit", "prove"}
    assert run(small, tmp_path / "b.onnx").artifact.digest == made.artifact.digest

    other = replace(small, version="2", source=replace(small.source, wrists=(0, 1)))
    own = run(other, tmp_path / "c.onnx")
    heir = run(other, tmp_path / "d.onnx", layout=info.reference.spec)
    assert heir.artifact.manifest.layout == info.manifest.layout != own.artifact.manifest.layout
    labels, scores = Engine(heir.artifact.path).run(read_rows(small).training.X[:5])
    assert labels is not None
    assert scores.shape == (5, 7)


# ── ranges ─────────────────────────────────────────────────────────────────────────────────────────────


def declared(**features):
    return DeclaredRanges(where="spec.toml.conversion.ranges", features=tuple(features.items()))


def test_an_artifact_of_a_spec_with_ranges_refuses_a_row_outside(tmp_path, csv_file):
    spec_file = tmp_path / "spec.toml"
    spec_file.write_text(
        'name = "toy"\nversion = "1"\n[data]\nsource = "rows.csv"\ntarget = "y"\ngroup = "device"\n'
        '[model]\nkind = "logistic"\n[conversion]\nprobes = 300\n'
        "ranges.a = { low = -8.0, high = 8.0 }\nranges.b = { low = -9.0 }\n"
    )
    made = run(load(spec_file), tmp_path / "toy.onnx")
    assert made.artifact.report.passed
    assert made.artifact.report.ranges == {"a": (-8.0, 8.0), "b": (-9.0, None)}
    runtime = Runtime(made.artifact.path)
    for row in ([8.0, 0.0], [-8.0, 1e30], [0.0, -9.0]):
        assert runtime.predict(np.array(row, np.float32)).label in ("up", "down")
    for row, feature in (([8.001, 0.0], "'a'"), ([-8.001, 0.0], "'a'"), ([0.0, -9.001], "'b'")):
        with pytest.raises(InputError, match=feature) as caught:
            runtime.predict(np.array(row, np.float32))
        assert caught.value.reason == "range"
    assert runtime.take_window().refused == (("range", 3),)


def test_the_training_rows_give_every_feature_its_range(tmp_path, csv_file):
    small = spec(table(csv_file, group="device"), kind="logistic", ranges="training")
    made = run(small, tmp_path / "toy.onnx")
    rows = read_rows(small).training.X.astype(np.float64)
    for j, feature in enumerate(made.artifact.manifest.features):
        least, most = rows[:, j].min(), rows[:, j].max()
        assert feature.low == pytest.approx(least - (most - least))
        assert feature.high == pytest.approx(most + (most - least))
    with pytest.raises(InputError, match="outside") as caught:
        Runtime(made.artifact.path).predict(np.full(2, 1e6, np.float32))
    assert caught.value.reason == "range"


def test_a_range_for_a_feature_that_is_not_there_names_the_key_before_anything_is_fitted(
    csv_file, monkeypatch
):
    monkeypatch.setattr("trainer.fit.make_pipeline", None)
    source = table(csv_file, group="device")
    for name, hint in (("aa", r" \(did you mean 'a'\?\)"), ("y", ""), ("device", "")):
        with pytest.raises(
            ConfigError,
            match=rf"^spec\.toml\.conversion\.ranges\.{name}: the rows have no feature.*name{hint}$",
        ):
            fit(spec(source, ranges=declared(**{name: (0.0, 1.0)})))


def test_training_rows_outside_the_ranges_are_an_error(tmp_path, csv_file):
    small = spec(table(csv_file, group="device"), kind="logistic", ranges=declared(b=(None, 0.0)))
    with pytest.raises(InputError, match=r"training rows lie outside the declared ranges.*'b'"):
        run(small, tmp_path / "toy.onnx")
    assert not (tmp_path / "toy.onnx").exists()
