"""The file as a whole: what is in it, what is not, and that it is written in one piece."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import CategoricalNB
from sklearn.neighbors import RadiusNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder, PowerTransformer, SplineTransformer, StandardScaler

import converters
from converters import convert
from edge_runtime.contract.errors import ConfigError, ContractError, InputError, UnsupportedPipeline
from edge_runtime.contract.ids import digest_of
from edge_runtime.contract.manifest import Budgets, agrees, read_info
from edge_runtime.contract.onnx_metadata import MAX_METADATA_BYTES, read_metadata
from edge_runtime.contract.profile import Binner, class_counts, merge_all
from edge_runtime.engine import Engine
from edge_runtime.runtime import Runtime
from tests.parity.cases import classes_of, scaled_integers

GROUPS = np.array(["wrist-b", "wrist-a", "wrist-c"])


@pytest.fixture(scope="module")
def X():
    return scaled_integers(300)


@pytest.fixture(scope="module")
def y(X):
    return np.array(["run", "sit", "walk"])[classes_of(X, 3)]


@pytest.fixture(scope="module")
def forest(X, y):
    return make_pipeline(StandardScaler(), RandomForestClassifier(5, random_state=0)).fit(X, y)


@pytest.fixture(scope="module")
def groups(X):
    return GROUPS[np.arange(len(X)) % 3]


@pytest.fixture(scope="module")
def artifact(forest, X, y, groups, tmp_path_factory):
    return convert(
        forest,
        X,
        tmp_path_factory.mktemp("artifact") / "m.onnx",
        name="watch-2",
        version="3.1.0+b",
        y=y,
        groups=groups,
        probes=1000,
        budgets=Budgets(predict_p99_ns=50_000, rss_bytes=1 << 26),
    )


def test_the_package_exports_what_it_promises():
    assert converters.__all__ == ["Artifact", "ParityReport", "check_parity", "convert"]
    assert all(hasattr(converters, name) for name in converters.__all__)


def test_the_file_says_what_it_is(artifact):
    data = artifact.path.read_bytes()
    info = read_info(data)
    manifest = info.manifest
    assert manifest == artifact.manifest
    assert artifact.digest == artifact.report.digest == digest_of(data)
    assert (manifest.name, manifest.version, manifest.task) == ("watch-2", "3.1.0+b", "classifier")
    assert manifest.labels == ("run", "sit", "walk")
    assert manifest.budgets == Budgets(predict_p99_ns=50_000, rss_bytes=1 << 26)
    libraries = dict(manifest.libraries)
    assert sorted(libraries) == ["numpy", "onnx", "onnxruntime", "scikit-learn", "skiff-edge", "skl2onnx"]
    assert libraries["numpy"] == np.__version__
    assert manifest.layout == info.reference.spec.layout


def test_the_reference_profile_counts_the_training_rows_by_group(artifact, X, groups):
    reference = read_info(artifact.path.read_bytes()).reference
    engine = Engine(artifact.path)
    rows = X.astype(np.float32)
    labels, scores = engine.run(rows)
    assert labels is not None
    assert [name for name, _ in reference.groups] == ["wrist-a", "wrist-b", "wrist-c"]
    assert reference.total.rows == 300
    assert reference.total == merge_all(reference.spec, [p for _, p in reference.groups], probabilities=True)
    for name, profile in reference.groups:
        binner = Binner(reference.spec, probabilities=True)
        at = groups == name
        binner.observe(rows[at], labels[at], scores[at])
        assert profile == binner.take()
    assert class_counts(reference.spec, reference.total).tolist() == np.bincount(labels).tolist()


def test_without_groups_there_is_one_profile(forest, X, tmp_path):
    reference = read_info(convert(forest, X, tmp_path / "m.onnx", probes=500).path.read_bytes()).reference
    assert reference.groups == ()
    assert reference.total.rows == 300


def test_golden_rows_carry_the_pipelines_own_answers_and_come_out_again(artifact, forest):
    golden = read_info(artifact.path.read_bytes()).golden
    assert golden.rows.shape == (64, 5)
    wide = golden.rows.astype(np.float64)
    np.testing.assert_array_equal(golden.scores, forest.predict_proba(wide))
    assert np.array(artifact.manifest.labels)[golden.labels].tolist() == forest.predict(wide).tolist()
    assert len(set(golden.labels.tolist())) == 3
    _, scores = Engine(artifact.path).run(golden.rows)
    assert agrees(scores, golden.scores).all()


def test_no_training_row_travels(artifact, X):
    info = read_info(artifact.path.read_bytes())
    training = {row.tobytes() for row in X.astype(np.float32)}
    assert not training & {row.tobytes() for row in info.golden.rows}
    worst = info.certificate["worst"]
    assert isinstance(worst, list)
    assert [row["kind"] for row in worst] == ["random"]
    # Rows near training rows (a threshold row has all values but one of a real row) stay in the local report.
    assert {row.kind for row in artifact.report.worst_rows} > {"random"}


def test_training_rows_travel_only_with_leave(forest, X, tmp_path):
    info = read_info(convert(forest, X, tmp_path / "m.onnx", probes=500, real_rows=True).path.read_bytes())
    training = {row.tobytes() for row in X.astype(np.float32)}
    real = [row.tobytes() in training for row in info.golden.rows]
    assert sum(real) == 32
    assert info.certificate["real_rows"] is True
    kinds = info.certificate["kinds"]
    assert isinstance(kinds, dict)
    assert kinds["training"]["worst"]["kind"] == "training"


def test_the_certificate_is_the_report_in_short(artifact):
    certificate = read_info(artifact.path.read_bytes()).certificate
    report = artifact.report
    assert certificate["passed"] is True
    assert certificate["rows"] == report.rows
    assert certificate["tolerance"] == 1e-5
    assert certificate["max_rel_error"] == float(f"{report.max_rel_error:.3g}")
    assert certificate["arithmetic"] == "float32"
    kinds = certificate["kinds"]
    assert isinstance(kinds, dict)
    assert {kind: kinds[kind]["rows"] for kind in kinds} == {
        k: r.rows for k, r in report.by_probe_kind.items()
    }
    splits = certificate["splits"]
    assert isinstance(splits, dict)
    assert report.coverage is not None
    assert splits["splits"] == report.coverage.splits


def test_the_same_arguments_give_the_same_bytes(artifact, forest, X, y, groups, tmp_path):
    again = convert(
        forest,
        X,
        tmp_path / "other-name.onnx",
        name="watch-2",
        version="3.1.0+b",
        y=y,
        groups=groups,
        probes=1000,
        budgets=artifact.manifest.budgets,
    )
    assert again.path.read_bytes() == artifact.path.read_bytes()
    seeded = convert(
        forest, X, tmp_path / "seeded.onnx", name="watch-2", version="3.1.0+b", y=y, probes=1000, seed=1
    )
    assert seeded.digest != artifact.digest


SCRIPT = """
import sys
from sklearn.ensemble import RandomForestClassifier
from converters import convert
from tests.parity.cases import classes_of, pipeline_of, scaled_integers
X = scaled_integers(200)
y = classes_of(X, 3)
pipeline = pipeline_of("standard", RandomForestClassifier(4, random_state=0)).fit(X, y)
print(convert(pipeline, X, sys.argv[1], y=y, probes=500).digest)
"""


@pytest.mark.slow
def test_other_processes_give_the_same_bytes(repository, tmp_path):
    digests = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(repository)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "m.onnx")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_a_successor_inherits_the_layout(artifact, forest, X, tmp_path):
    layout = read_info(artifact.path.read_bytes()).reference.spec
    shifted = convert(forest, X * 2, tmp_path / "m.onnx", probes=500, layout=layout)
    assert shifted.manifest.layout == layout.layout
    fresh = convert(forest, X * 2, tmp_path / "m.onnx", probes=500)
    assert fresh.manifest.layout != layout.layout


def test_a_layout_of_other_columns_is_refused(artifact, X, tmp_path):
    layout = read_info(artifact.path.read_bytes()).reference.spec
    other = LogisticRegression(max_iter=2000).fit(X, classes_of(X, 2))
    with pytest.raises(
        ConfigError, match="3 classes; this pipeline has x0, x1, x2, x3, x4 and 2: leave layout out"
    ):
        convert(other, X, tmp_path / "m.onnx", layout=layout)


def test_twelve_groups_of_thirty_columns_fit_into_the_metadata(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2400, 30)).astype(np.float32)
    y = np.array([f"exercise number {k}" for k in range(7)])[classes_of(X.astype(np.float64), 7)]
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
    groups = [f"person-{i % 12:02d}-left" for i in range(len(X))]
    path = convert(pipeline, X, tmp_path / "m.onnx", groups=groups, probes=2000).path
    metadata, _, _ = read_metadata(path.read_bytes())
    size = sum(len(value) for value in metadata.values())
    assert size < MAX_METADATA_BYTES / 4
    assert len(read_info(path.read_bytes()).reference.groups) == 12


def test_a_wide_pipeline_gets_fewer_golden_rows(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 400)).astype(np.float32)
    pipeline = LogisticRegression().fit(X, X[:, 0] > 0)
    golden = read_info(convert(pipeline, X, tmp_path / "m.onnx", probes=1000).path.read_bytes()).golden
    assert golden.rows.shape == (30, 400)


def test_a_regressor_counts_its_predictions(X, tmp_path):
    forest = RandomForestRegressor(5, random_state=0).fit(X, X[:, 0])
    info = read_info(convert(forest, X, tmp_path / "m.onnx", probes=500).path.read_bytes())
    assert (info.manifest.task, info.manifest.score, info.manifest.labels) == ("regressor", "predict", ())
    assert (info.manifest.label_output, info.manifest.score_output) == ("", "score")
    assert (info.reference.spec.classes, info.reference.total.sums.size) == (0, 0)
    assert info.reference.spec.score.edges[-1] == pytest.approx(forest.predict(X).max(), rel=1e-6)
    assert not info.golden.labels.any()


def test_progress_is_told_in_order(forest, X, tmp_path):
    heard: list[tuple[str, int, int]] = []
    convert(forest, X, tmp_path / "m.onnx", probes=500, progress=lambda *event: heard.append(event))
    assert list(dict.fromkeys(stage for stage, _, _ in heard)) == [
        "read",
        "lower",
        "probe",
        "export",
        "look",
        "prove",
        "write",
    ]
    assert all(0 <= done <= total for _, done, total in heard)
    proved = [done for stage, done, _ in heard if stage == "prove"]
    assert proved == sorted(proved)
    assert [(done, total) for stage, done, total in heard if stage == "prove"][-1][0] == heard[-3][2]
    assert heard[-1] == ("write", 1, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "Watch"}, ContractError, "not a model name"),
        ({"version": "1 0"}, ContractError, "'1 0' is not a version"),
        ({"y": [1, 2]}, InputError, "y has 2 values for 300 rows"),
        ({"groups": ["a"]}, InputError, "groups has 1 values for 300 rows"),
        ({"probes": 10}, ConfigError, "at least 100"),
        ({"out": "absent/m.onnx"}, ConfigError, r"absent/m\.onnx: cannot be written"),
    ],
)
def test_bad_arguments_are_refused(forest, X, tmp_path, options, error, message):
    out = tmp_path / options.pop("out", "m.onnx")
    with pytest.raises(error, match=message):
        convert(forest, X, out, **({"probes": 500} | options))
    assert not out.exists()


class Unknown(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A step that nothing can convert."""

    def fit(self, X, y=None):
        """Remembers the width."""
        del y
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X):
        """Sorts each row."""
        return np.sort(X, axis=1)


def test_a_failed_conversion_leaves_the_old_file_alone(forest, X, tmp_path):
    path = tmp_path / "m.onnx"
    convert(forest, X, path, probes=500)
    before = path.read_bytes()
    unfit = make_pipeline(Unknown(), LogisticRegression(max_iter=2000)).fit(X, classes_of(X, 2))
    with pytest.raises(UnsupportedPipeline, match="step 'unknown' \\(Unknown\\) has no transform"):
        convert(unfit, X, path, probes=500)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_half_way_leaves_no_trace(forest, X, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        convert(forest, X, tmp_path / "m.onnx", probes=500)
    assert list(tmp_path.iterdir()) == []


def test_the_file_replaces_an_older_one(forest, X, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    convert(forest, X, str(path), probes=500)
    assert read_info(path.read_bytes()).manifest.name == "model"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_the_metadata_is_plain_json(artifact):
    metadata, opset, ir_version = read_metadata(artifact.path.read_bytes())
    assert sorted(metadata) == ["skiff.certificate", "skiff.golden", "skiff.manifest", "skiff.profile"]
    assert (opset, ir_version) == (17, 8)

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    for text in metadata.values():
        json.loads(text, parse_constant=refuse)


def _known_only(rows):
    return make_pipeline(OrdinalEncoder(), RandomForestClassifier(3, random_state=0)), np.rint(rows / 20)


@pytest.mark.parametrize(
    ("make", "bad", "message"),
    [
        (_known_only, 77.0, "feature 'x1' is 77, for which the model has no answer"),
        (
            lambda rows: (make_pipeline(PowerTransformer("box-cox"), LogisticRegression()), np.abs(rows) + 1),
            0.0,
            "feature 'x1' is 0, for which",
        ),
        (
            lambda rows: (
                make_pipeline(SplineTransformer(extrapolation="error"), LogisticRegression()),
                rows,
            ),
            1e4,
            r"feature 'x1' is 10000, for which",
        ),
        (lambda rows: (CategoricalNB(), np.rint(np.abs(rows) / 20)), 9.0, "feature 'x1' is 9, for which"),
    ],
)
def test_a_row_that_the_pipeline_refuses_is_refused_on_the_device(make, bad, message, tmp_path):
    rows = np.random.default_rng(0).uniform(-60, 60, size=(120, 3))
    pipeline, rows = make(rows)
    pipeline.fit(rows, rows[:, 0] > np.median(rows[:, 0]))
    made = convert(pipeline, rows, tmp_path / "m.onnx", probes=300)
    assert not made.manifest.undefined
    runtime = Runtime(made.path)
    odd = rows[0].copy()
    odd[1] = bad
    with pytest.raises(
        (ValueError, IndexError), match=r"unknown categories|positive data|limits of|out of bounds"
    ):
        pipeline.predict(odd[None])
    with pytest.raises(InputError, match=message):
        runtime.predict(odd)
    assert agrees(runtime.predict(rows).score, pipeline.predict_proba(rows)).all()


def test_a_pipeline_that_answers_nan_itself_is_served(tmp_path):
    rows = np.random.default_rng(0).uniform(size=(60, 2))
    pipeline = RadiusNeighborsRegressor(0.3).fit(rows, rows[:, 0])
    made = convert(pipeline, rows, tmp_path / "m.onnx", probes=300)
    assert made.manifest.undefined
    assert np.isnan(Runtime(made.path).predict([9.0, 9.0]).score).all()
