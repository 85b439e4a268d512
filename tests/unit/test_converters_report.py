"""Judging and telling: tolerance at its edges, ties, infinities, and the report as JSON and as a page."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from converters import check_parity, convert
from converters.probe_inputs import Coverage
from converters.reference import Answers, Float32Effect
from converters.report import KindResult, ParityReport, WorstRow
from converters.table import Column
from converters.tally import Tally, judge, score_blocks
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.manifest import read_info
from tests.parity.cases import classes_of, scaled_integers


def wanted(labels, scores, ties, accepted=None):
    array = np.asarray(scores, np.float64)
    kept = np.ones(len(array), np.bool_) if accepted is None else np.asarray(accepted)
    return Answers(
        labels=np.asarray(labels, np.int64).reshape(len(array), -1),
        scores=array,
        accepted=kept,
        ties=np.asarray(ties, np.bool_).reshape(len(array), -1),
    )


NUMBERS = tuple(Column(name, None, float("nan"), list) for name in ("rpm", "load"))


@pytest.mark.parametrize(
    ("found", "reference", "fits", "absolute", "relative"),
    [
        (0.5, 0.5, True, 0.0, 0.0),
        (0.25, 0.25 + 9.9e-6, True, 9.9e-6, 9.9e-6),
        (0.25, 0.25 + 1.1e-5, False, 1.1e-5, 1.1e-5),
        (1e6, 1e6 + 9, True, 9.0, 9e-6),
        (1e6, 1e6 + 11, False, 11.0, 11e-6),
        (np.inf, 1e39, True, 0.0, 0.0),
        (-np.inf, 1e39, False, np.inf, np.inf),
        (np.inf, 1.0, False, np.inf, np.inf),
        (np.nan, 1.0, False, np.inf, np.inf),
        (np.nan, np.nan, True, 0.0, 0.0),
        (1.0, np.nan, False, np.inf, np.inf),
    ],
)
def test_a_score_is_judged(found, reference, fits, absolute, relative):
    result = judge(np.array([[found]], np.float32), np.array([[reference]]))
    assert bool(result[0][0, 0]) is fits
    assert result[1][0, 0] == pytest.approx(absolute, rel=1e-3)
    assert result[2][0, 0] == pytest.approx(relative, rel=1e-3)


def test_one_bad_score_of_a_row_is_enough():
    tally = Tally("random", (("a", "b"),), NUMBERS)
    tally.add(
        np.zeros((2, 2), np.float32),
        np.array([1, 1]),
        np.array([[0.2, 0.8], [0.2, 0.7]], np.float32),
        wanted([1, 1], [[0.2, 0.8]] * 2, [False] * 2),
    )
    assert tally.result().score_mismatches == 1
    assert tally.result().max_abs_error == pytest.approx(0.1)


def test_a_tally_tells_labels_ties_and_refusals_apart():
    tally = Tally("random", (("a", "b"),), NUMBERS)
    scores = [[0.4, 0.6], [0.5, 0.5], [0.7, 0.3], [np.nan, np.nan]]
    tally.add(
        np.arange(8, dtype=np.float32).reshape(4, 2),
        np.array([0, 1, 0, 1]),
        np.array([[0.4, 0.6], [0.5, 0.5], [0.71, 0.29], [9, 9]], np.float32),
        wanted([1, 0, 0, -1], scores, [False, True, False, True], [True, True, True, False]),
    )
    result = tally.result()
    assert (result.rows, result.refused, result.ties) == (3, 1, 1)
    assert (result.label_mismatches, result.score_mismatches) == (1, 1)
    assert result.max_abs_error == pytest.approx(0.01, rel=1e-3)
    worst = tally.worst[0]
    assert (worst.label, worst.expected_label, worst.label_differs, worst.values) == (
        "a",
        "b",
        True,
        (0.0, 1.0),
    )
    assert tally.worst[1].rel_error == pytest.approx(0.01, rel=1e-3)


def test_scores_of_another_shape_are_refused():
    tally = Tally("random", (), NUMBERS)
    with pytest.raises(ArtifactError, match=r"\(1, 2\), the pipeline's \(1, 1\)"):
        tally.add(
            np.zeros((1, 1), np.float32), None, np.zeros((1, 2), np.float32), wanted([0], [[0.0]], [False])
        )


def test_each_output_is_judged_by_its_own_ties_and_shown_in_its_own_labels():
    tally = Tally("random", (("a", "b"), (10, 20)), NUMBERS)
    scores = [[0.5, 0.5, 0.1, 0.9]] * 3
    tally.add(
        np.zeros((3, 2), np.float32),
        np.array([[1, 1], [0, 0], [1, 0]]),
        np.array(scores, np.float32),
        wanted([[0, 1]] * 3, scores, [[True, False]] * 3),
    )
    result = tally.result()
    assert (result.label_mismatches, result.score_mismatches, result.ties) == (2, 0, 3)
    shown = {row.label for row in tally.worst if row.label_differs}
    assert shown == {"['a', 10]", "['b', 10]"}
    assert {row.expected_label for row in tally.worst} == {"['a', 20]"}


@pytest.mark.parametrize(
    ("labels", "width", "blocks"),
    [
        ((), 1, []),
        ((), 3, [(0, 1), (1, 2), (2, 3)]),
        ((("a", "b"),), 2, []),
        ((("a", "b"), (1, 2, 3)), 5, [(0, 2), (2, 5)]),
        (((0, 1), (0, 1), (0, 1)), 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_scores_belong_to_outputs(labels, width, blocks):
    assert [(block.start, block.stop) for block in score_blocks(labels, width)] == blocks


def test_each_output_has_figures_and_a_worst_row_of_its_own():
    tally = Tally("random", (("a", "b"), (10, 20)), NUMBERS)
    scores = np.array([[0.2, 0.8, 0.1, 0.9], [0.2, 0.8, 0.1, 0.9]])
    found = scores.copy()
    found[1, 2:] = [0.4, 0.6]
    tally.add(
        np.array([[1, 2], [3, 4]], np.float32),
        np.array([[1, 0], [1, 1]]),
        found.astype(np.float32),
        wanted([[1, 1], [1, 1]], scores, [[False, False]] * 2),
    )
    first, second = tally.outputs()
    assert (first.rows, first.label_mismatches, first.score_mismatches) == (2, 0, 0)
    assert (second.rows, second.label_mismatches, second.score_mismatches) == (2, 1, 1)
    assert second.max_abs_error == pytest.approx(0.3, rel=1e-6)
    assert second.worst is not None
    assert (second.worst.label, second.worst.expected_label, second.worst.values) == (10, 20, (1.0, 2.0))
    assert second.worst.expected_scores == (0.1, 0.9)
    assert first.worst is not None
    assert first.worst.label == "b"


def test_each_target_of_a_regressor_has_figures_of_its_own():
    tally = Tally("random", (), NUMBERS)
    tally.add(
        np.zeros((1, 2), np.float32),
        None,
        np.array([[1.0, 2.5]], np.float32),
        wanted([0], [[1.0, 2.0]], [False]),
    )
    assert [target.max_abs_error for target in tally.outputs()] == [0.0, 0.5]
    assert tally.result().max_rel_error == 0.25


def test_a_worst_row_shows_categories_as_a_person_knows_them():
    nan = float("nan")
    columns = (NUMBERS[0], Column("gait", ("walk", "run"), None, list))
    tally = Tally("category", (), columns)
    tally.add(
        np.array([[1.5, 1.0], [2.5, -1.0], [3.5, nan]], np.float32),
        None,
        np.array([[0.3], [0.2], [0.1]], np.float32),
        wanted([0, 0, 0], [[0.0]] * 3, [False] * 3),
    )
    values = [row.values for row in tally.worst]
    assert values[:2] == [(1.5, "run"), (2.5, "(a value not seen in training)")]
    assert values[2][0] == 3.5
    assert values[2][1] != values[2][1]


def report(**changes):
    kind = KindResult(
        rows=10,
        refused=1,
        ties=2,
        label_mismatches=0,
        score_mismatches=0,
        max_abs_error=1.23456e-7,
        max_rel_error=1e-7,
    )
    row = WorstRow(
        kind="threshold",
        values=(1.5, float("nan")),
        label="<b>",
        expected_label="ok",
        scores=(0.5, float("inf")),
        expected_scores=(0.25, 0.75),
        abs_error=0.25,
        rel_error=0.25,
        label_differs=True,
    )
    made = ParityReport(
        digest=None,
        rows=10,
        refused=1,
        ties=2,
        label_mismatches=0,
        score_mismatches=0,
        max_abs_error=1.23456e-7,
        max_rel_error=1e-7,
        by_probe_kind={"threshold": kind},
        worst_rows=(row, replace(row, kind="random")),
        features=("rpm", "<script>"),
        tolerance=1e-5,
        remedies=("float64 input: <i>x0</i>",),
        notes=("12 training rows",),
        coverage=Coverage(splits=7, distinct=5, reached=6, decisive=4, by_offset=((0, 7), (1, 6))),
        float32=Float32Effect(rows=99, labels_changed=1, scores_changed=2, max_change=0.5),
    )
    return replace(made, **changes)


def test_nothing_compared_is_not_passed():
    assert report().passed
    assert not report(rows=0).passed
    assert not report(label_mismatches=1).passed
    assert not report(score_mismatches=1).passed


def test_the_summary_names_the_worst_row_only_when_it_failed():
    assert "worst row" not in report().summary()
    text = report(score_mismatches=3).summary()
    assert "3 wrong scores" in text
    assert (
        "worst row (threshold): label '<b>' for 'ok', scores [0.5, inf] for [0.25, 0.75] at rpm=1.5" in text
    )


def test_json_is_strict_and_complete():
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    document = json.loads(report().to_json(), parse_constant=refuse)
    assert document["worst"][0]["values"] == [1.5, "nan"]
    assert document["worst"][0]["scores"] == [0.5, "inf"]
    assert document["max_abs_error"] == 1.23456e-7
    assert document["splits"] == {
        "splits": 7,
        "distinct": 5,
        "reached": 6,
        "decisive": 4,
        "by_offset": {"+0": 7, "+1": 6},
    }
    assert document["float32"]["labels_changed"] == 1
    assert document["remedies"] == ["float64 input: <i>x0</i>"]
    assert document["notes"] == ["12 training rows"]
    assert json.loads(report(coverage=None, float32=None).to_json())["splits"] is None


def test_a_certificate_is_short_rounded_and_without_real_rows():
    certificate = report().to_certificate()
    assert certificate["max_abs_error"] == 1.23e-7
    kinds, worst = certificate["kinds"], certificate["worst"]
    assert isinstance(kinds, dict)
    assert isinstance(worst, list)
    assert kinds["threshold"]["max_abs_error"] == 1.23e-7
    assert [row["kind"] for row in worst] == ["random"]
    assert "features" not in certificate
    assert certificate["remedies"] == ["float64 input: <i>x0</i>"]


def test_with_leave_a_certificate_carries_real_rows_and_says_so():
    kind = replace(report().by_probe_kind["threshold"], worst=report().worst_rows[0])
    kept, shown = (
        report(by_probe_kind={"threshold": kind}, by_output=({"threshold": kind},), real_rows=leave)
        for leave in (False, True)
    )
    assert kept.to_certificate()["real_rows"] is False
    assert document_of(kept)["kinds"]["threshold"]["worst"] is None
    assert document_of(kept)["outputs"][0]["worst"] is None
    assert shown.to_certificate()["real_rows"] is True
    assert document_of(shown)["kinds"]["threshold"]["worst"]["values"] == [1.5, "nan"]
    assert document_of(shown)["outputs"][0]["worst"]["kind"] == "threshold"
    assert [row["kind"] for row in document_of(shown)["worst"]] == ["threshold"]


def document_of(made):
    found = json.loads(json.dumps(made.to_certificate()))
    assert isinstance(found, dict)
    return found


def test_a_certificate_of_very_many_outputs_keeps_all_figures_and_the_worst_rows_of_the_worst():
    row = replace(report().worst_rows[1], values=(0.0,) * 100, label_differs=False)
    outputs = tuple(
        {"random": KindResult(rows=1, max_rel_error=k / 1e3, worst=replace(row, rel_error=k / 1e3))}
        for k in range(200)
    )
    found = document_of(report(by_output=outputs))["outputs"]
    assert [output["output"] for output in found] == list(range(200))
    with_row = [output["output"] for output in found if output["worst"]]
    assert with_row == list(range(200 - len(with_row), 200))
    assert 10 < len(with_row) < 50
    assert all(output["worst"] for output in json.loads(report(by_output=outputs).to_json())["outputs"])


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href"}, "the page must need nothing else"

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize(("made", "verdict"), [(report(), "passed"), (report(label_mismatches=2), "failed")])
def test_the_page_shows_the_figures_and_escapes_names(made, verdict, tmp_path):
    made.to_html(tmp_path / "r.html")
    page = Page()
    page.feed((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert not {"b", "i"} & set(page.tags)
    text = " ".join(page.text)
    for wanted_text in (
        verdict,
        "<script>",
        "'<b>'",
        "7 with 5 distinct thresholds",
        "6, 4 of them decisively",
        "rpm",
        "float64 input: <i>x0</i>",
        "12 training rows",
    ):
        assert wanted_text in text
    assert page.tags.count("table") == 1
    assert page.tags.count("details") == 2


def test_a_report_of_a_real_check_is_written(tmp_path):
    X = scaled_integers(100)
    tree = DecisionTreeClassifier(random_state=0).fit(X, classes_of(X, 3))
    artifact = convert(tree, X, tmp_path / "m.onnx", probes=500)
    found = check_parity(tree, artifact.path, X, probes=500)
    found.to_html(tmp_path / "r.html")
    assert artifact.digest in (tmp_path / "r.html").read_text()
    assert json.loads(found.to_json())["digest"] == artifact.digest


def test_an_artifact_of_several_outputs_is_certified_output_by_output(tmp_path):
    X = scaled_integers(100)
    targets = np.stack([classes_of(X, 2), classes_of(X, 3)], axis=1)
    tree = DecisionTreeClassifier(random_state=0).fit(X, targets)
    path = convert(tree, X, tmp_path / "m.onnx", probes=300).path
    certificate = json.loads(json.dumps(read_info(path.read_bytes()).certificate))
    assert [output["rows"] for output in certificate["outputs"]] == [certificate["rows"]] * 2
    assert [len(output["worst"]["scores"]) for output in certificate["outputs"]] == [2, 3]
    assert {output["worst"]["kind"] for output in certificate["outputs"]} == {"random"}
    assert {kind for kind, found in certificate["kinds"].items() if found["worst"]} == {"random"}


def test_a_check_repeats_what_the_artifact_says_of_itself(tmp_path):
    X = np.column_stack([1.7e9 + np.arange(100) * 0.25, scaled_integers(100)])
    model = make_pipeline(StandardScaler(), KNeighborsRegressor(2)).fit(X, X[:, 0] % 7)
    made = convert(model, X, tmp_path / "m.onnx", probes=200, real_rows=True)
    found = check_parity(model, made.path, X, probes=200)
    assert found.remedies == made.report.remedies
    assert found.remedies[0].startswith("float64 input")
    assert set(made.report.notes) <= set(found.notes)
    assert any("training rows" in note for note in found.notes)
    assert len(found.notes) == len(set(found.notes))
    assert found.real_rows


def test_the_page_of_a_wide_row_shows_every_column(tmp_path):
    names = tuple(f"column {j}" for j in range(64))
    row = replace(report().worst_rows[0], values=tuple(float(j) for j in range(64)))
    report(
        features=names, worst_rows=(row,), by_output=({"threshold": report().by_probe_kind["threshold"]},) * 2
    ).to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(f"<span>{name}</span>" in text for name in names)
    assert "output 1" in text
