"""Fitting for a fleet that has moved: what it gains, and when rows count alike instead."""

import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.manifest import Budgets, read_info
from edge_runtime.engine import Engine
from tests.support.counted import cells, counted
from trainer.aimed import Aim, fit_to
from trainer.datasets import DatasetError, load_watch
from trainer.fit import Rows, Split, fit, fitted_to, make_pipeline
from trainer.release import run
from trainer.spec import KINDS, REGRESSORS, ModelSpec, TableSource, TrainSpec, WatchSource

NAMES = ("a", "b")


def truth(X):
    """Three stretches, which one cut cannot tell apart: where it is best depends on where rows are."""
    return np.where((X[:, 0] < -1.0) | (X[:, 0] > 2.0), "up", "down")


def training(seed=0, n=3000):
    rng = np.random.default_rng(seed)
    return np.stack([rng.uniform(-3.0, 3.0, n), rng.normal(size=n)], axis=1)


def fleet_rows(device, n=400, mean=1.8):
    rng = np.random.default_rng([device, 77])
    return np.stack([rng.normal(mean, 0.5, n), rng.normal(size=n)], axis=1)


def aim(*, mean=1.8, **how):
    spec = cells(training(), NAMES, 2)
    return Aim(spec=spec, devices=[counted(spec, fleet_rows(d, mean=mean)) for d in range(20)], **how)


def on_fleet(fitted):
    rows = np.concatenate([fleet_rows(device) for device in range(100, 110)])
    return float((fitted.pipeline.predict(pd.DataFrame(rows, columns=NAMES)) == truth(rows)).mean())


def spec_of(source, kind="tree", **parameters):
    return TrainSpec(
        name=ids.model_name("toy"),
        version="2",
        seed=0,
        source=source,
        model=ModelSpec(kind=kind, scaler="none", parameters=tuple(parameters.items())),
        budgets=Budgets(),
        probes=300,
    )


def table(path, X, y, names=NAMES):
    np.savez(path, features=X.astype(np.float32), feature_names=np.array(names), y=y)
    return TableSource(path=path, target="y", group="", groups=(), fraction=0.3)


@pytest.fixture
def stump(tmp_path):
    """A tree of one cut, to be fitted to rows from all over."""
    X = training()
    return spec_of(table(tmp_path / "rows.npz", X, truth(X)), max_depth=1)


@pytest.mark.parametrize("insist", [False, True])
def test_a_model_that_is_too_simple_for_the_world_is_made_right_where_the_fleet_is(stump, insist):
    plain = on_fleet(fit(stump))
    fitted, outcome = fit_to(stump, aim(insist=insist))
    assert outcome.used
    assert plain < 0.7
    assert on_fleet(fitted) > 0.95
    assert (outcome.trial is None) == insist
    if outcome.trial is not None:
        assert outcome.trial.reweighted > 0.95, "the trial told so without a labelled row of the fleet"
        assert abs(outcome.trial.plain - plain) < 0.05
    assert "re-weighted to 20 devices in 1 of 2 features" in outcome.summary


def test_weights_that_would_cost_devices_elsewhere_are_left(stump):
    fitted, outcome = fit_to(stump, aim(others=True))
    assert not outcome.used
    assert "worse on held-out rows as they are, accuracy" in outcome.why
    assert fitted.evaluation == fit(stump).evaluation


def test_weights_that_do_not_help_are_left(tmp_path):
    """The model is right everywhere: weights only take rows from it."""
    rng = np.random.default_rng(12)
    X = np.stack([rng.uniform(-3.0, 3.0, 400), rng.normal(size=400)], axis=1)
    y = X @ [1.0, 2.0] + 3.0 * rng.normal(size=400)
    spec = spec_of(table(tmp_path / "rows.npz", X, y), kind="ridge")
    fitted, outcome = fit_to(spec, aim())
    assert not outcome.used
    assert outcome.trial is not None
    assert outcome.trial.measure == "R²"
    assert outcome.trial.reweighted < outcome.trial.plain
    assert "worse on held-out rows that are weighted to the fleet" in outcome.why
    assert fitted.evaluation == fit(spec).evaluation


def test_poor_overlap_is_told_and_refused_where_weights_are_insisted_on(stump):
    fitted, outcome = fit_to(stump, aim(mean=6.0))
    assert not outcome.used
    assert outcome.trial is None
    assert "rows count alike: part of the fleet lies where" in outcome.summary
    assert "a: 100%, mostly above 2.99" in outcome.summary
    assert fitted.evaluation == fit(stump).evaluation
    with pytest.raises(
        DatasetError, match=r"model toy: .*a: 100%, mostly above 2\.99.*collect labelled rows"
    ):
        fit_to(stump, aim(mean=6.0, insist=True))


def test_where_held_out_rows_have_the_same_need_nothing_is_shown_and_rows_count_alike(tmp_path):
    X = training()
    moved = X[:, 0] > 1.0
    path = tmp_path / "rows.npz"
    np.savez(
        path, features=X.astype(np.float32), feature_names=np.array(NAMES), y=truth(X), g=moved.astype("U5")
    )
    source = TableSource(path=path, target="y", group="g", groups=("False",), fraction=0.0)
    spec = spec_of(source, max_depth=1)
    _, outcome = fit_to(spec, aim())
    assert not outcome.used
    assert "that it helps cannot be shown" in outcome.why


def test_a_fleet_that_has_not_moved_leaves_the_model_as_it_is(stump):
    layout = cells(training(), NAMES, 2)
    same = Aim(spec=layout, devices=[counted(layout, training(seed)) for seed in range(10)])
    fitted, outcome = fit_to(stump, same)
    assert not outcome.used
    assert outcome.why == "they look like the fleet as they are"
    assert fitted.evaluation == fit(stump).evaluation


def test_the_certificate_says_what_the_rows_were_weighted_to_and_nothing_else_changes(stump, tmp_path):
    layout = aim().spec
    made = run(stump, tmp_path / "a.onnx", layout=layout, aim=aim())
    plain = run(stump, tmp_path / "b.onnx", layout=layout)
    assert made.outcome is not None
    certificate = read_info((tmp_path / "a.onnx").read_bytes()).certificate
    assert certificate["passed"]
    assert certificate["notes"] == [made.outcome.summary]
    assert made.artifact.manifest.layout == plain.artifact.manifest.layout
    again = run(stump, tmp_path / "c.onnx", layout=layout, aim=aim())
    assert again.artifact.digest == made.artifact.digest != plain.artifact.digest
    rows = fleet_rows(200).astype(np.float32)
    labels, _ = Engine(tmp_path / "a.onnx").run(rows)
    assert labels is not None
    names = np.asarray(made.artifact.manifest.labels)
    assert (names[labels] == truth(rows)).mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_takes_weights_and_heeds_them(kind):
    X = training(n=300).astype(np.float32)
    y = X[:, 0] ** 2 if kind in REGRESSORS else truth(X)
    split = Split(training=Rows(X=X, y=y), evaluation=(), feature_names=NAMES)
    parameters = {"trees": 3} if "trees" in KINDS[kind] else {}
    model = ModelSpec(kind=kind, scaler="standard", parameters=(*parameters.items(), *_shallow(kind)))
    weights = np.where(X[:, 0] > 0, 1.99, 0.01)
    equal, weighted = (fitted_to(split, make_pipeline(model, 0), "toy", w) for w in (None, weights))
    answer = "predict" if kind in REGRESSORS else "predict_proba"
    assert not np.array_equal(getattr(equal, answer)(X), getattr(weighted, answer)(X))


def _shallow(kind):
    return (("max_depth", 1),) if "max_depth" in KINDS[kind] else ()


def test_an_estimator_that_takes_no_weights_is_refused_by_name():
    X = training(n=50).astype(np.float32)
    split = Split(training=Rows(X=X, y=truth(X)), evaluation=(), feature_names=NAMES)
    pipeline = Pipeline([("scaler", StandardScaler()), ("neighbours", KNeighborsClassifier())])
    with pytest.raises(ConfigError, match=r"KNeighborsClassifier takes no weights of rows.*--reweight off"):
        fitted_to(split, pipeline, "toy", np.ones(50))
    assert fitted_to(split, pipeline, "toy").predict(X).shape == (50,)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("a", "bee"), "column 2 is 'bee'.* count 'b'"),
        (("a",), "column 2 is nothing where devices of the fleet count 'b'"),
        (("a", "b", "c"), "do not count 'c'; leave the column out"),
    ],
)
def test_columns_that_devices_do_not_count_are_named(tmp_path, names, problem):
    X = np.random.default_rng(0).normal(size=(60, len(names)))
    source = table(tmp_path / "rows.npz", X, truth(X), names)
    with pytest.raises(ConfigError, match=problem):
        fit_to(spec_of(source), aim())


def test_rows_of_left_wrists_do_not_stand_for_a_fleet_of_right_wrists():
    """Real rows: the watch hangs the other way round, so gravity has another sign."""
    data = load_watch()
    source = WatchSource(people=(1, 2, 3, 4, 5, 6), wrists=(0,), evaluation=(7, 8, 9, 10))
    layout = cells(data.select(people=source.people, wrists=(0,)).features, data.feature_names)
    right = [counted(layout, data.device_rows(person, 1).features) for person in range(1, 11)]
    with pytest.raises(
        DatasetError, match=r"accel_x_min: \d\d%, mostly at or below -.*collect labelled rows"
    ):
        fit_to(spec_of(source, max_depth=4), Aim(spec=layout, devices=right, insist=True))
