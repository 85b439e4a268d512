"""What an artifact says about itself: written, read back, and refused when it contradicts itself."""

import base64
import json
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.manifest import (
    TOLERANCE,
    Feature,
    Golden,
    agrees,
    read_info,
    ties,
    to_metadata,
    unsure,
)
from edge_runtime.contract.onnx_metadata import MAX_FIELDS, MAX_METADATA_BYTES, read_metadata
from edge_runtime.contract.packing import pack_counts
from tests.support.tiny_models import IR_VERSION, OPSET, categorical, classifier, regressor, sealed, several

TINY = classifier(("a", "b"), ("no", "yes"), missing=("b",))


def changed(key, change):
    """The artifact with one JSON document changed in place."""
    document = json.loads(TINY.metadata[key])
    change(document)
    return sealed(TINY.graph(), {**TINY.metadata, key: json.dumps(document)})


@pytest.mark.parametrize("tiny", [TINY, regressor(), classifier(score="decision_function")])
def test_what_was_written_is_read(tiny):
    info = read_info(tiny.artifact)
    assert info.manifest == tiny.manifest
    assert info.reference == tiny.reference
    assert info.certificate == {"passed": True}
    assert (info.opset, info.ir_version) == (OPSET, IR_VERSION)
    for name in ("rows", "labels", "scores"):
        found, wanted = getattr(info.golden, name), getattr(tiny.golden, name)
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("label", [0, -3, 2.5, True, "ja", "日本"])
def test_labels_keep_their_type(label):
    info = read_info(classifier(labels=(label, "other")).artifact)
    assert info.manifest.labels == (label, "other")
    assert type(info.manifest.labels[0]) is type(label)


@pytest.mark.parametrize("key", ["skiff.manifest", "skiff.profile", "skiff.certificate", "skiff.golden"])
def test_a_missing_or_broken_document_is_named(key):
    without = {name: text for name, text in TINY.metadata.items() if name != key}
    with pytest.raises(ArtifactError, match=f"not a skiff artifact: {key} is missing"):
        read_info(sealed(TINY.graph(), without))
    for text in ("{", "[" * 100_000, "[]", "3"):
        with pytest.raises(ArtifactError, match=key):
            read_info(sealed(TINY.graph(), {**TINY.metadata, key: text}))


def put(*path_and_value):
    *path, value = path_and_value

    def change(document):
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("key", "change", "problem"),
    [
        ("manifest", put("schema", 2), "schema 2 is not 1"),
        ("manifest", put("name", "Not A Name"), "is not a model name"),
        ("manifest", put("task", "forecaster"), "skiff.manifest.task"),
        ("manifest", put("task", "regressor"), "a regressor with 2 labels"),
        ("manifest", put("labels", []), "a classifier with 0 labels"),
        ("manifest", put("labels", ["no", None]), "skiff.manifest.labels[1]"),
        ("manifest", put("labels", ["no", "yes", "maybe"]), "2 classes, the manifest 3"),
        ("manifest", put("label_output", ""), "skiff.manifest.label_output"),
        ("manifest", put("features", []), "there must be at least one"),
        ("manifest", put("features", 1, "name", "a"), "each with a name of its own"),
        ("manifest", put("features", 1, "name", "c"), "name different features"),
        ("manifest", put("opset", 18), "opset or IR version differ"),
        ("manifest", put("ir_version", 9), "opset or IR version differ"),
        ("manifest", put("layout", "0" * 16), "has layout"),
        ("manifest", put("budgets", "rss_bytes", -1), "skiff.manifest.budgets.rss_bytes"),
        ("profile", put("features", 0, "edges", "AAA"), "is not base64"),
        ("profile", put("features", 0, "edges", "AAAA"), "is not a list of float32 values"),
        ("profile", put("features", 0, "edges", base64.b64encode(b"\0" * 8).decode()), "strictly increasing"),
        ("profile", put("features", 0, "name", "\ud800"), "surrogate"),
        ("profile", put("classes", -1), "skiff.profile.classes"),
        ("profile", put("total", "rows", 3), "in 3 rows"),
        ("profile", put("groups", "a", "counts", ""), "the scheme must be 1 to 9"),
        ("golden", put("rows", "shape", [4, 3]), "skiff.golden.rows.data"),
        ("golden", put("rows", "shape", [2**62, 0]), "is too large"),
        ("golden", put("rows", "shape", [1, 2, 2, 2]), "skiff.golden.rows.data"),
        ("golden", put("rows", "dtype", "<f8"), "skiff.golden.rows.dtype"),
        ("golden", put("rows", {"dtype": "<f4", "shape": [0, 2], "data": ""}), "skiff.golden: rows"),
        (
            "golden",
            put("labels", "data", base64.b64encode(np.array([0, 1, 2, 0], "<i8").tobytes()).decode()),
            "labels must be indices of the 2",
        ),
    ],
)
def test_a_contradiction_is_refused_and_named(key, change, problem):
    with pytest.raises(ArtifactError, match=re.escape(problem)):
        read_info(changed(f"skiff.{key}", change))


def test_a_regressor_has_no_probabilities():
    tiny = regressor()
    document = json.loads(tiny.metadata["skiff.manifest"])
    document["score"] = "predict_proba"
    with pytest.raises(ArtifactError, match="'predict_proba' for a regressor"):
        read_info(sealed(tiny.graph(), {**tiny.metadata, "skiff.manifest": json.dumps(document)}))


def test_counts_of_a_profile_never_inflate_beyond_its_layout():
    bomb = base64.b64encode(pack_counts(np.zeros(8_000_000, np.int64))).decode()
    model = changed("skiff.profile", put("total", "counts", bomb))
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match="at most"):
            read_info(model)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_what_does_not_fit_is_not_written():
    rows = np.zeros((40_000, 2), np.float32)
    many = Golden(rows=rows, labels=np.zeros(40_000, np.int64), scores=np.zeros((40_000, 2)))
    with pytest.raises(ArtifactError, match=r"use fewer groups, golden rows or features"):
        to_metadata(TINY.manifest, TINY.reference, many, {})


def test_metadata_beyond_the_cap_is_not_read():
    with pytest.raises(ArtifactError, match="metadata is larger than the 262144 bytes"):
        read_metadata(sealed(TINY.graph(), {"anything": "x" * (MAX_METADATA_BYTES + 1024)}))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x08", "cut short"),
        (b"\xff" * 11, "bad number"),
        (b"\x0b", "unknown wire type 3"),
        (b"\x72\x7f", "runs past the end"),
        (b"\x08\x01" * (MAX_FIELDS + 1), f"more than {MAX_FIELDS} fields"),
        (b"\x72\x04\x0a\x02\xff\xfe", "not UTF-8"),
    ],
)
def test_what_is_no_onnx_file_is_refused(data, problem):
    with pytest.raises(ArtifactError, match=problem):
        read_metadata(data)


def test_an_empty_file_says_nothing():
    assert read_metadata(b"") == ({}, 0, 0)
    with pytest.raises(ArtifactError, match="not a skiff artifact"):
        read_info(b"")


def test_agreement_is_absolute_below_one_and_relative_above():
    reference = np.array([0.0, 1e-30, 1.0, 1000.0, np.nan, np.inf, -np.inf])
    inside = np.array(
        [TOLERANCE, 0.0, 1 + 0.99 * TOLERANCE, 1000 * (1 + 0.99 * TOLERANCE), np.nan, np.inf, -np.inf]
    )
    assert agrees(inside, reference).all()
    outside = np.array(
        [
            1.01 * TOLERANCE,
            2 * TOLERANCE,
            1 + 1.01 * TOLERANCE,
            1000 * (1 + 1.01 * TOLERANCE),
            0.0,
            1e308,
            np.inf,
        ]
    )
    assert not agrees(outside, reference).any()


def test_ties_are_of_the_two_best():
    scores = np.array([[0.4, 0.4, 0.2], [0.5, 0.3, 0.2], [0.1, 0.45, 0.450005]])
    assert ties(scores).tolist() == [True, False, True]
    assert ties(np.array([[1.0], [2.0]])).tolist() == [False, False]


def test_a_tie_is_relative_to_scores_above_one():
    scores = np.array([[1e4, 1e4 - 0.09], [1e4, 1e4 - 0.11], [-1e4, -1e4 - 0.09], [2e-5, 0.0]])
    assert ties(scores).tolist() == [True, False, True, False]
    odd = np.array([[np.inf, 0.0], [np.inf, np.inf], [-np.inf, 0.0], [np.nan, 0.0]])
    assert ties(odd).tolist() == [False, True, False, False]


def test_one_decision_value_ties_near_zero():
    column = np.array([[0.0], [TOLERANCE], [-TOLERANCE], [2 * TOLERANCE], [np.nan]])
    assert ties(column, signed=True).tolist() == [True, True, True, False, False]
    assert not ties(column).any()


def test_only_decision_values_are_signed():
    column = np.array([[0.0], [1.0]])
    detector = replace(TINY.manifest, task="outlier_detector", score="decision_function")
    assert unsure(detector, column).tolist() == [True, False]
    for manifest in (regressor().manifest, replace(TINY.manifest, score="negative_distance")):
        assert not unsure(manifest, column).any()


def test_each_output_is_unsure_by_itself():
    manifest = several().manifest
    blocks = np.array([[0.5, 0.5, 0.1, 0.2, 0.7], [0.1, 0.9, 0.3, 0.35, 0.35]])
    assert unsure(manifest, blocks).tolist() == [[True, False], [False, True]]
    columns = np.array([[0.5, 0.0], [0.0, 0.5]])
    assert unsure(manifest, columns).tolist() == [[True, False], [False, True]]
    signed = replace(manifest, score="decision_function")
    assert unsure(signed, columns).tolist() == [[False, True], [True, False]]
    assert not unsure(replace(manifest, score="predict"), columns).any()


RANGED = categorical(
    Feature(name="a", low=-1.5, high=float(np.float32(0.1))),
    Feature(name="b", high=0.0, missing=True),
    Feature(name="c", low=2.0, infinite=True),
    Feature(name="d"),
    Feature(name="e", kind="category", vocabulary=("x", "y")),
)

MIXED = categorical(
    Feature(name="colour", kind="category", vocabulary=("red", 3, 0.5, True), unseen=True, missing=True),
    Feature(name="size", infinite=True),
    input_dtype="float64",
)


@pytest.mark.parametrize(
    "tiny",
    [
        MIXED,
        RANGED,
        several(),
        several((("only",),), score="decision_function"),
        regressor(targets=3),
        replace(classifier(score="negative_distance"), task="clusterer"),
        replace(classifier(labels=(-1, 1), score="decision_function"), task="outlier_detector"),
    ],
)
def test_what_newer_artifacts_say_is_read(tiny):
    info = read_info(tiny.artifact)
    assert info.manifest == tiny.manifest
    assert info.reference == tiny.reference
    for name in ("rows", "labels", "scores"):
        found, wanted = getattr(info.golden, name), getattr(tiny.golden, name)
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)
    assert [type(v) for v in info.manifest.features[0].vocabulary] == [
        type(v) for v in tiny.features[0].vocabulary
    ]


def test_a_plain_manifest_says_nothing_of_what_came_later():
    document = json.loads(TINY.metadata["skiff.manifest"])
    assert document["features"] == [{"name": "a", "missing": False}, {"name": "b", "missing": True}]
    assert not {"input_dtype", "multilabels"} & set(document)


def test_several_outputs_have_no_class_counts():
    manifest = several().manifest
    assert not manifest.probabilities
    assert manifest.outputs == (("red", "blue"), ("s", "m", "l"))
    assert several().reference.spec.classes == several().reference.total.sums.size == 0
    assert TINY.manifest.outputs == (("no", "yes"),)
    assert regressor().manifest.outputs == ()


@pytest.mark.parametrize(
    ("tiny", "key", "change", "problem"),
    [
        (MIXED, "manifest", put("input_dtype", "float16"), "skiff.manifest.input_dtype"),
        (MIXED, "manifest", put("input_dtype", "float32"), "skiff.golden.rows.dtype"),
        (MIXED, "manifest", put("features", 0, "kind", "text"), "skiff.manifest.features[0].kind"),
        (MIXED, "manifest", put("features", 0, "kind", "number"), "a number has no vocabulary"),
        (MIXED, "manifest", put("features", 0, "infinite", True), "a category is not infinite"),
        (
            RANGED,
            "manifest",
            put("features", 0, "low", 0.25),
            "features[0].low: 0.25 is larger than high, 0.1",
        ),
        (RANGED, "manifest", put("features", 0, "high", 0.1), "features[0].high: 0.1 is no float32 number"),
        (
            RANGED,
            "manifest",
            put("features", 0, "high", 1e39),
            "features[0].high: 1e+39 is no float32 number",
        ),
        (RANGED, "manifest", put("features", 1, "high", float("inf")), "features[1].high"),
        (RANGED, "manifest", put("features", 1, "high", float("nan")), "features[1].high"),
        (RANGED, "manifest", put("features", 1, "low", None), "features[1].low: expected a number"),
        (RANGED, "manifest", put("features", 3, "low", "0"), "features[3].low: expected a number"),
        (RANGED, "manifest", put("features", 4, "low", 0.0), "features[4].low: a category has no range"),
        (RANGED, "manifest", put("features", 4, "high", 1), "features[4].high: a category has no range"),
        (MIXED, "manifest", put("features", 0, "vocabulary", [1, 1.0]), "each value must be there once"),
        (MIXED, "manifest", put("features", 0, "vocabulary", [float("nan")]), "NaN is a missing value"),
        (MIXED, "manifest", put("features", 0, "vocabulary", [None]), "features[0].vocabulary[0]"),
        (MIXED, "manifest", put("features", 1, "unseen", True), "no unseen values"),
        (several(), "manifest", put("task", "regressor"), "a regressor with 2 labels"),
        (several(), "manifest", put("task", "clusterer"), "only a classifier"),
        (several(), "manifest", put("labels", ["a"]), "instead of labels"),
        (several(), "manifest", put("multilabels", [["a", "b"], []]), "at least one for each output"),
        (several(), "manifest", put("multilabels", ["ab"]), "not a list of labels"),
        (several(), "manifest", put("multilabels", [["red", "blue"]] * 2), "indices of the 2, 2 in"),
        (several(), "manifest", put("multilabels", [["a", "b", "c"]]), "labels (4, 2)"),
        (several(), "manifest", put("label_output", ""), "skiff.manifest.label_output"),
        (several(), "profile", put("classes", 2), "100 counters and 0 sums"),
    ],
)
def test_a_contradiction_of_newer_artifacts_is_refused(tiny, key, change, problem):
    document = json.loads(tiny.metadata[f"skiff.{key}"])
    change(document)
    with pytest.raises(ArtifactError, match=re.escape(problem)):
        read_info(sealed(tiny.graph(), {**tiny.metadata, f"skiff.{key}": json.dumps(document)}))


def test_ranges_are_written_only_where_there_are_some():
    features = json.loads(RANGED.metadata["skiff.manifest"])["features"]
    assert [{key: f[key] for key in ("low", "high") if key in f} for f in features] == [
        {"low": -1.5, "high": 0.10000000149011612},
        {"high": 0.0},
        {"low": 2.0},
        {},
        {},
    ]
    assert not any(
        {"low", "high"} & f.keys() for f in json.loads(TINY.metadata["skiff.manifest"])["features"]
    )
    assert [feature.ranged for feature in RANGED.features] == [True, True, True, False, False]
