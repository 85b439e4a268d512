"""Models beyond float32 rows with one answer: categories, float64, several outputs, clusters and outliers."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest

from edge_runtime.beside import Incumbent
from edge_runtime.contract.errors import ArtifactError, InputError
from edge_runtime.contract.manifest import Feature, agrees
from edge_runtime.contract.profile import class_counts, column_counts
from edge_runtime.engine import Engine
from edge_runtime.probe import check_golden
from edge_runtime.runtime import Runtime
from edge_runtime.serving import RING_ROWS
from tests.support.tiny_models import categorical, classifier, regressor, sealed, several

COLOUR = Feature(
    name="colour", kind="category", vocabulary=("red", "blue", "green"), unseen=True, missing=True
)
SIZE = Feature(name="size")
SHOP = categorical(COLOUR, SIZE)
WIDE = replace(classifier(("a", "b", "c")), input_dtype="float64")
DETECTOR = replace(regressor(("a", "b")), labels=(-1, 1), task="outlier_detector", score="decision_function")
CLUSTERS = replace(classifier(labels=(0, 1, 2), score="negative_distance"), task="clusterer")
TARGETS = regressor(targets=3)
EVERY = [
    SHOP,
    WIDE,
    DETECTOR,
    CLUSTERS,
    TARGETS,
    several(),
    several((("x", "y"),), score="decision_function"),
]


def rows_of(tiny, n):
    return replace(tiny, seed=91).training[:n]


@pytest.mark.parametrize("tiny", EVERY)
def test_the_engine_answers_packed_rows_as_the_model_says(tiny):
    engine: Any = Engine(tiny.artifact, max_batch=3)
    rows = rows_of(tiny, 8)
    labels, scores = engine.run(rows)
    wanted_labels, wanted = tiny.answer(rows)
    assert scores.dtype == np.float32
    assert agrees(scores, wanted).all()
    assert (labels is None) == (not tiny.manifest.label_output)
    for i, row in enumerate(rows):
        label, score = engine.run(row)
        assert np.array_equal(score[0], scores[i])
        if labels is not None:
            assert np.array_equal(labels[i], wanted_labels[i])
            assert np.array_equal(label[0], labels[i])
    empty_labels, empty_scores = engine.run(rows[:0])
    assert empty_scores.shape == (0, wanted.shape[1])
    assert labels is None or empty_labels.shape == (0, *wanted_labels.shape[1:])
    assert check_golden(engine) == len(tiny.golden.rows)


@pytest.mark.parametrize("tiny", [tiny for tiny in EVERY if tiny is not TARGETS])
def test_probing_finds_another_label_in_the_golden_rows(tiny):
    labels = tiny.golden.labels.copy()
    labels.flat[-1] = 1 - min(1, labels.flat[-1])
    wrong = replace(tiny)
    wrong.__dict__["golden"] = replace(tiny.golden, labels=labels)
    with pytest.raises(ArtifactError, match="1 of 4 golden rows are answered differently"):
        check_golden(Engine(wrong.artifact))


def test_the_engine_takes_rows_of_the_manifests_dtype_only():
    for tiny, other in ((WIDE, np.float32), (SHOP, np.float64)):
        wanted = tiny.manifest.input_dtype
        with pytest.raises(InputError, match=f"{wanted} is needed"):
            Engine(tiny.artifact).run(rows_of(tiny, 1).astype(other))


def test_float64_rows_keep_what_float32_loses():
    tiny = replace(
        regressor(("a", "b")),
        weights=np.array([[1, -1]], np.float32),
        bias=np.zeros(1, np.float32),
        input_dtype="float64",
    )
    runtime = Runtime(tiny.artifact)
    row = np.array([1e9 + 1, 1e9])
    for rows in (row, row.tolist(), {"a": 1e9 + 1, "b": 1e9}, row[None]):
        assert runtime.predict(rows).score.ravel().tolist() == [1.0]
    runtime.predict(np.array([1e300, 1e300]))
    profile = runtime.take_window().profile
    assert profile.rows == 5
    spec = tiny.reference.spec
    for j in range(2):
        assert column_counts(spec, profile, j).sum() == 4
        assert profile.counts[spec.offsets[j + 1] - 2] == 1  # 1e300 is infinite to the float32 cells
    with pytest.raises(InputError, match="a finite float64 number"):
        runtime.predict(np.array([np.inf, 0.0]))


@pytest.mark.parametrize("change", ["labels", "multilabels"])
@pytest.mark.parametrize("n", [1, 5])
def test_a_class_no_output_has_is_refused(change, n):
    tiny = several() if change == "multilabels" else classifier()
    graph = tiny.graph()
    for node in graph.graph.node:
        for k, name in enumerate(node.output):
            if name == "label":
                node.output[k] = "index"
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3]), "three"))
    graph.graph.node.append(onnx.helper.make_node("Add", ["index", "three"], ["label"]))
    engine = Engine(sealed(graph, tiny.metadata))
    with pytest.raises(ArtifactError, match=r"the graph answered class \d") as refused:
        engine.run(rows_of(tiny, n))
    assert ("for output 0; the manifest has 2" in str(refused.value)) == (change == "multilabels")


@pytest.mark.parametrize(
    ("tiny", "problem"),
    [
        (classifier(score="predict"), r"needs \(1, 3\)"),
        (several(), r"needs \(1, 5 or 2\) and \(1, 2\)"),
        (replace(CLUSTERS, score="predict_proba"), r"needs \(1, 3\)"),
    ],
)
def test_scores_of_another_width_are_refused(tiny, problem):
    graph = tiny.graph()
    for node in graph.graph.node:
        for k, name in enumerate(node.output):
            if name == "scores":
                node.output[k] = "most"
        for k, name in enumerate(node.input):
            if name == "scores":
                node.input[k] = "most"
    graph.graph.node.append(onnx.helper.make_node("Concat", ["most", "most"], ["scores"], axis=1))
    with pytest.raises(ArtifactError, match=problem):
        Engine(sealed(graph, tiny.metadata))


# ── categories ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_way_to_pass_a_category_gives_the_same_answer():
    runtime, engine = Runtime(SHOP.artifact), Engine(SHOP.artifact)
    wanted = engine.run(np.array([1, 0.5], np.float32))[1][0]
    for row in (["blue", 0.5], {"size": 0.5, "colour": np.str_("blue")}, np.array(["blue", 0.5], object)):
        assert np.array_equal(runtime.predict(row).score, wanted)
        assert np.array_equal(runtime.predict([row, row]).score, [wanted, wanted])
    frame = pd.DataFrame({"size": [0.5], "colour": ["blue"]})
    assert np.array_equal(runtime.predict(frame).score, [wanted])
    assert runtime.take_window().rows == 3 * 3 + 1


def test_what_is_outside_the_vocabulary_is_one_code():
    runtime, engine = Runtime(SHOP.artifact), Engine(SHOP.artifact)
    wanted = engine.run(np.array([-1, 0.5], np.float32))[1][0]
    for value in ("mauve", 1, 7.5, b"red"):
        assert np.array_equal(runtime.predict([value, 0.5]).score, wanted)
    assert np.isnan(runtime.predict([None, 0.5]).score).all()


def test_a_float32_row_is_values_even_in_the_shape_of_the_short_way():
    runtime, engine = Runtime(SHOP.artifact), Engine(SHOP.artifact)
    row = np.array([1, 0.5], np.float32)
    unseen, first = engine.run(np.array([-1, 0.5], np.float32))[1][0], engine.run(row)[1][0]
    assert not np.array_equal(unseen, first)
    assert np.array_equal(runtime.predict(row).score, unseen)
    assert np.array_equal(runtime.predict(row[None]).score[0], unseen)


def test_categories_are_counted_by_code():
    runtime = Runtime(SHOP.artifact)
    for _ in range(RING_ROWS):
        runtime.predict(["green", 0.0])
    runtime.predict([["red", 0.0], [None, 0.0]])
    profile = runtime.take_window().profile
    edges = SHOP.reference.spec.features[0].edges
    counts = column_counts(SHOP.reference.spec, profile, 0)
    assert counts[np.searchsorted(edges, 2)] == RING_ROWS
    assert counts[np.searchsorted(edges, 0)] == 1
    assert profile.check(SHOP.reference.spec) is profile


def test_an_unseen_value_is_counted_as_refused():
    runtime = Runtime(categorical(replace(COLOUR, unseen=False), SIZE).artifact)
    with pytest.raises(InputError, match=r"'rad'.*did you mean 'red'") as refused:
        runtime.predict(pd.DataFrame({"colour": ["red", "rad"], "size": [1, 2]}))
    assert refused.value.reason == "unseen"
    assert runtime.take_window().refused == (("unseen", 2),)


def test_infinity_is_served_where_the_model_accepts_it():
    tiny = replace(regressor(("a", "b")), features=(Feature(name="a", infinite=True), Feature(name="b")))
    runtime = Runtime(tiny.artifact)
    assert np.isinf(runtime.predict(np.array([np.inf, 0], np.float32)).score).all()
    for row in ([0, np.inf], [np.nan, 0]):
        with pytest.raises(InputError):
            runtime.predict(np.array(row, np.float32))
    seen = runtime.take_window()
    assert (seen.rows, seen.refused) == (1, (("missing", 1), ("non_finite", 1)))


def test_a_new_vocabulary_is_swapped_in_with_its_model():
    new = categorical(replace(COLOUR, vocabulary=("green", "red")), SIZE, seed=1)
    runtime = Runtime(SHOP.artifact)
    runtime.swap(Engine(new.artifact))
    wanted = Engine(new.artifact).run(np.array([0, 0.5], np.float32))[1][0]
    assert np.array_equal(runtime.predict(["green", 0.5]).score, wanted)


def test_rows_are_always_coded_for_the_model_that_answers():
    swapped = replace(
        SHOP, features=(replace(COLOUR, vocabulary=("green", "blue", "red")), SIZE), version="2.0.0"
    )
    engines = [Engine(SHOP.artifact), Engine(swapped.artifact)]
    wanted = {
        engine.digest: engine.run(np.array([code, 0.5], np.float32))[1][0]
        for engine, code in zip(engines, (0, 2), strict=True)
    }
    runtime, wrong, stop = Runtime(engines[0]), [], threading.Event()

    def work():
        while not stop.is_set():
            found = runtime.predict(["red", 0.5])
            if not np.array_equal(found.score, wanted[found.model]):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(40):
        runtime.swap(engines[(i + 1) % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            SHOP,
            categorical(Feature(name="colour"), SIZE),
            "'colour' as a number; this stream carries a category",
        ),
        (several(), classifier(), "1 label outputs instead of 2"),
    ],
)
def test_a_model_whose_rows_or_answers_mean_something_else_is_not_swapped_in(old, new, problem):
    runtime = Runtime(old.artifact)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=problem):
            runtime.swap(Engine(new.artifact))
    assert runtime.digest == old.digest


def test_a_wider_model_can_be_swapped_in_and_timed_beside_a_narrow_one():
    narrow = classifier(("a", "b", "c"), seed=3)
    runtime = Runtime(narrow.artifact)
    runtime.swap(Engine(WIDE.artifact))
    row = rows_of(WIDE, 1)[0]
    assert np.array_equal(runtime.predict(row).score, Engine(WIDE.artifact).run(row)[1][0])
    assert runtime.predict(row.astype(np.float32)).model == WIDE.digest
    runtime.measure_cpu, runtime.incumbent = True, Incumbent(Engine(narrow.artifact))
    for _ in range(16):
        runtime.predict(row)
    stats = runtime.trial_stats()
    assert (stats.predictions, stats.cpu.count, stats.incumbent_cpu.count) == (18, 14, 2)


@pytest.mark.parametrize(
    ("row", "alone"),
    [
        ({"colour": "blue", "size": 1.0}, 1),  # the candidate does not know the colour
        ({"colour": "red", "size": None}, 0),
        (["blue", 1.0], 1),
        (["mauve", 1.0], 1),
        ([["red", 1.0], ["blue", 2.0]], 1),
        (pd.DataFrame({"size": [1.0], "colour": ["green"]}), 1),
    ],
)
def test_a_category_that_only_the_candidate_refuses_is_counted(row, alone):
    narrow = categorical(Feature(name="colour", kind="category", vocabulary=("red",)), SIZE)
    runtime = Runtime(narrow.artifact)
    runtime.measure_cpu, runtime.incumbent = True, Incumbent(Engine(SHOP.artifact))
    with pytest.raises(InputError):
        runtime.predict(row)
    assert runtime.trial_stats().refused_alone == alone


# ── other answers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "multilabels", [(("red", "blue"), ("s", "m", "l")), ((0, 1), ("no", "yes")), ((True, False),)]
)
def test_several_outputs_are_answered_side_by_side(multilabels):
    tiny = several(multilabels)
    runtime: Any = Runtime(tiny.artifact)
    rows = rows_of(tiny, 6)
    raw: Any
    raw, scores = Engine(tiny.artifact).run(rows)
    batch = runtime.predict(rows)
    wanted = [[multilabels[k][i] for k, i in enumerate(row)] for row in raw.tolist()]
    assert batch.label.tolist() == wanted
    assert np.array_equal(batch.raw, raw)
    for i, row in enumerate(rows):
        for one in (runtime.predict(row), runtime.predict(row.tolist())):
            assert one.label.tolist() == wanted[i]
            assert [type(x) for x in one.label.tolist()] == [type(x) for x in wanted[i]]
            assert np.array_equal(one.raw, raw[i])
            assert np.array_equal(one.score, scores[i])
    assert runtime.predict(rows[:0]).label.shape == (0, len(multilabels))
    seen = runtime.take_window()
    assert (seen.rows, seen.profile.sums.size) == (18, 0)
    assert seen.profile.check(tiny.reference.spec) is seen.profile


@pytest.mark.parametrize("tiny", [DETECTOR, CLUSTERS])
def test_clusters_and_outliers_are_labels_with_counts(tiny):
    runtime = Runtime(tiny.artifact)
    rows = rows_of(tiny, 50)
    wanted, _ = tiny.answer(rows)
    assert [runtime.predict(row).label for row in rows] == [tiny.labels[i] for i in wanted]
    profile = runtime.take_window().profile
    assert (
        class_counts(tiny.reference.spec, profile).tolist()
        == np.bincount(wanted, minlength=len(tiny.labels)).tolist()
    )
    assert profile.sums.size == 0


def test_several_targets_are_one_score():
    runtime = Runtime(TARGETS.artifact)
    row = rows_of(TARGETS, 1)[0]
    found = runtime.predict(row)
    assert found.label is found.raw is None
    assert agrees(found.score, TARGETS.answer(row[None])[1][0]).all()
    assert runtime.take_window().rows == 1


def test_a_row_that_the_pipeline_refuses_is_refused_and_its_feature_named():
    refusing = replace(classifier(missing=("b", "c")), refuses=True)
    runtime: Any = Runtime(refusing.artifact)
    good = rows_of(refusing, 3)
    bad = good.copy()
    bad[1, 1] = np.nan
    for rows, message in (
        (bad[1], "^feature 'b' is missing, for which the model has no answer: its pipeline refuses"),
        (bad, "^row 1: feature 'b' is missing"),
        ({"a": 0.0}, "^the model has no answer for this combination of values"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            runtime.predict(rows)
        assert refused.value.reason == "undefined"
    runtime.predict(good)
    seen = runtime.take_window()
    assert (seen.rows, seen.refused, seen.failed) == (3, (("undefined", 5),), 0)


def test_a_row_too_wide_to_look_through_is_refused_without_a_name(monkeypatch):
    monkeypatch.setattr("edge_runtime.serving.MOST_BLAMED", 2)
    runtime: Any = Runtime(replace(classifier(missing=("b",)), refuses=True).artifact)
    with pytest.raises(InputError, match="this combination of values"):
        runtime.predict([0.0, None, 1.0])


def test_an_infinite_score_is_an_answer():
    feature = Feature(name="b", infinite=True)
    runtime: Any = Runtime(replace(regressor(("a", "b")), features=(SIZE, feature), refuses=True).artifact)
    assert np.isinf(runtime.predict([0.0, np.inf]).score).all()


@pytest.mark.parametrize(
    "labels", [(0, 1, 2**63 + 5), (-1, 2**62 + 1, 2**63), ("a", "a\0", "b"), (0.0, -1.5), (True, False)]
)
def test_labels_of_a_batch_are_those_of_single_rows(labels):
    tiny = classifier(labels=labels)
    runtime: Any = Runtime(tiny.artifact)
    rows = 30 * rows_of(tiny, 80)
    single = [runtime.predict(row).label for row in rows]
    batch = runtime.predict(rows).label.tolist()
    assert set(batch) <= set(labels)
    assert len(set(batch)) > 1
    assert [(type(a), a) for a in batch] == [(type(a), a) for a in single]
