"""Pipelines with declared ranges: proven inside them and on their ends, refused on the device outside."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import KBinsDiscretizer, PolynomialFeatures, StandardScaler

from converters import parity
from converters.artifact import convert
from converters.parity import ParityFailure, check_parity
from converters.probe_inputs import LIMIT
from converters.report import KindResult, ParityReport
from edge_runtime.contract.errors import InputError
from edge_runtime.contract.manifest import TOLERANCE, read_info
from edge_runtime.contract.ranges import Limits
from edge_runtime.runtime import Runtime

pytestmark = pytest.mark.sampled(2)

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(300, 4)) * [1, 10, 0.1, 100]
KIND = (ROWS[:, 0] + ROWS[:, 1] / 10 > 0).astype(int) + (ROWS[:, 3] > 50)
GAPS = np.where(RNG.random(ROWS.shape) < 0.1, np.nan, ROWS)
SIDES = {"x0": (-4.0, 4.5), "x1": (None, 50.0), "x2": (-0.5, None)}


def probed(monkeypatch):
    """Every chunk of rows that a comparison is given from here on, by kind."""
    seen: dict[str, list[np.ndarray]] = {}
    compare = parity.compare

    def noting(engine, signature, table, probes, **options):
        def noted():
            for kind, rows in probes:
                seen.setdefault(kind, []).append(rows.copy())
                yield kind, rows

        return compare(engine, signature, table, noted(), **options)

    monkeypatch.setattr("converters.artifact.compare", noting)
    monkeypatch.setattr("converters.parity.compare", noting)
    return seen


def test_a_pipeline_that_only_fails_far_out_is_told_to_declare_ranges_and_is_proven_with_them(tmp_path):
    X, y = load_breast_cancer(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), PCA(10), KNeighborsClassifier()).fit(X, y)
    with pytest.raises(ParityFailure, match=r"pass ranges='training' \(or --range training\)"):
        convert(pipeline, X, tmp_path / "m.onnx", probes=3000)
    assert convert(pipeline, X, tmp_path / "m.onnx", probes=3000, ranges="training").report.passed


def test_a_device_refuses_what_was_not_proven_and_answers_the_rest_as_the_pipeline(tmp_path):
    X, y = load_wine(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), PCA(5), KNeighborsClassifier()).fit(X, y)
    made = convert(pipeline, X, tmp_path / "m.onnx", probes=3000, ranges="training")
    runtime = Runtime(made.path)
    low, high = (np.array([getattr(f, end) for f in made.manifest.features]) for end in ("low", "high"))
    assert (low < X.min(axis=0)).all()
    assert (high > X.max(axis=0)).all()
    rng = np.random.default_rng(1)
    inside = (low + rng.random((500, 13)) * (high - low)).astype(np.float32)
    inside = np.clip(np.concatenate([inside, X.astype(np.float32), [low, high]]), low, high).astype(
        np.float32
    )
    for rows in (inside, inside[:1]):
        found: Any = runtime.predict(rows)
        wanted = pipeline.predict_proba(rows.astype(np.float64))
        np.testing.assert_allclose(found.score, wanted, atol=TOLERANCE)
        best = np.sort(wanted, axis=1)
        clear = best[:, -1] - best[:, -2] > TOLERANCE
        assert np.array_equal(found.label[clear], pipeline.predict(rows.astype(np.float64))[clear])
    for j in range(13):
        for end, away in ((low, -np.inf), (high, np.inf)):
            row = X[0].astype(np.float32)
            row[j] = np.nextafter(np.float32(end[j]), np.float32(away))
            with pytest.raises(InputError, match=f"feature 'x{j}' is .*, outside") as caught:
                runtime.predict(row)
            assert caught.value.reason == "range"
            row[j] = end[j]
            assert runtime.predict(row).label == pipeline.predict(row[None].astype(np.float64))[0]
    assert dict(runtime.take_window().refused) == {"range": 26}


@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("wanted", ["training", SIDES], ids=["training", "sides"])
@pytest.mark.parametrize(
    ("model", "X"),
    [
        (make_pipeline(StandardScaler(), RandomForestClassifier(5, random_state=0)), ROWS),
        (HistGradientBoostingClassifier(max_iter=5), GAPS),
        (make_pipeline(KBinsDiscretizer(4), LogisticRegression()), ROWS),
        (make_pipeline(PolynomialFeatures(2), StandardScaler(), KNeighborsClassifier(3)), ROWS),
    ],
    ids=["forest", "boosting", "bins", "neighbours"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_probes_never_leave_the_ranges_and_reach_both_ends(model, X, wanted, dtype, tmp_path, monkeypatch):
    model.fit(X, KIND)
    seen = probed(monkeypatch)
    made = convert(model, X, tmp_path / "m.onnx", probes=2000, ranges=wanted, input_dtype=dtype)
    limits = Limits.of(made.manifest.features, dtype)
    assert limits is not None
    proven = {kind: np.concatenate(chunks) for kind, chunks in seen.items()}
    seen.clear()
    assert check_parity(model, made.path, X, probes=2000, seed=3).passed
    checked = {kind: np.concatenate(chunks) for kind, chunks in seen.items()}
    for found in (proven, checked):
        assert LIMIT in found
        for kind, rows in found.items():
            assert not limits.outside(rows).any(), kind
        ends = found[LIMIT]
        for j in np.flatnonzero(limits.ranged):
            for end, inwards in ((limits.low[j], np.inf), (limits.high[j], -np.inf)):
                if np.isfinite(end):
                    beside = np.nextafter(end, end.dtype.type(inwards))
                    assert np.isin(
                        [end, beside, np.nextafter(beside, end.dtype.type(inwards))], ends[:, j]
                    ).all()
    assert ("huge" in proven) == (wanted is SIDES)


def test_infinities_are_tried_only_where_the_range_has_no_end(tmp_path, monkeypatch):
    model = HistGradientBoostingClassifier(max_iter=5).fit(GAPS, KIND)
    seen = probed(monkeypatch)
    made = convert(model, GAPS, tmp_path / "m.onnx", probes=2000, ranges=SIDES)
    assert all(feature.infinite for feature in made.manifest.features)
    rows = np.concatenate(seen["infinite"])
    found = {(int(j), float(rows[i, j])) for i, j in np.argwhere(np.isinf(rows))}
    assert found == {(1, -np.inf), (2, np.inf), (3, -np.inf), (3, np.inf)}


def test_thresholds_outside_are_not_counted_as_covered(tmp_path):
    model = RandomForestClassifier(5, random_state=0).fit(ROWS, KIND)
    inner = ROWS[(np.abs(ROWS) < [0.5, 5, 0.05, 50]).all(axis=1)]
    whole = convert(model, ROWS, tmp_path / "a.onnx", probes=1000).report
    narrow = convert(
        model, inner, tmp_path / "b.onnx", probes=1000, ranges={"x0": (-0.5, 0.5), "x3": (-50, 50)}
    ).report
    assert whole.passed
    assert narrow.passed
    assert whole.coverage is not None
    assert narrow.coverage is not None
    assert narrow.coverage.distinct < whole.coverage.distinct
    assert dict(narrow.coverage.by_offset)[0] >= narrow.coverage.distinct


def test_rows_outside_an_artifacts_ranges_are_left_out_when_it_is_checked(tmp_path):
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(ROWS, KIND)
    made = convert(model, ROWS, tmp_path / "m.onnx", probes=500, ranges="training")
    wild = np.concatenate([ROWS, 1e6 * ROWS[:50]])
    report = check_parity(model, made.path, wild, probes=5000)
    assert report.passed
    assert report.by_probe_kind["training"].rows == 300
    with pytest.raises(InputError, match="none of 300 rows lies inside the artifact's ranges"):
        check_parity(model, made.path, 1e6 * ROWS, probes=500)


def test_the_report_and_the_certificate_say_so(tmp_path):
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(ROWS, KIND)
    made = convert(model, ROWS, tmp_path / "m.onnx", probes=500, ranges=SIDES)
    told = json.loads(made.report.to_json())
    assert told["ranges"] == {"x0": [-4.0, 4.5], "x1": [None, 50.0], "x2": [-0.5, None]}
    note = (
        "proven inside the ranges that the manifest declares for 3 of 4 features; devices refuse other rows"
    )
    certificate: Any = read_info(made.path.read_bytes()).certificate
    assert note in certificate["notes"]
    assert "ranges" not in certificate
    again = check_parity(model, made.path, ROWS, probes=500)
    assert again.ranges == made.report.ranges
    assert again.notes.count(note) == 1
    made.report.to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<span>x1</span>…50" in page
    free = convert(model, ROWS, tmp_path / "n.onnx", probes=500)
    assert "range" not in json.dumps(read_info(free.path.read_bytes()).certificate)
    free.report.to_html(tmp_path / "r.html")
    assert "<h2>Ranges" not in (tmp_path / "r.html").read_text()


def test_what_fails_inside_wide_ranges_is_told_to_narrow_them():
    wrong = KindResult(rows=1, score_mismatches=1)
    report = ParityReport(
        digest=None,
        rows=1,
        refused=0,
        ties=0,
        label_mismatches=0,
        score_mismatches=1,
        max_abs_error=1.0,
        max_rel_error=1.0,
        by_probe_kind={LIMIT: wrong},
        worst_rows=(),
        features=("a",),
        tolerance=TOLERANCE,
        ranges={"a": (0.0, 1e30)},
    )
    assert "declare narrower ranges" in str(ParityFailure(report, "step"))
    assert "pass ranges='training'" in str(ParityFailure(replace(report, ranges={}), "step"))
