"""What an artifact says about itself: written, read back, and refused when it contradicts itself."""

import base64
import json
import re
import tracemalloc

import numpy as np
import pytest

from edge_runtime.contract.codec import pack_counts
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.manifest import (
    TOLERANCE,
    Golden,
    agrees,
    read_info,
    ties,
    to_metadata,
)
from edge_runtime.contract.onnx_metadata import MAX_FIELDS, MAX_METADATA_BYTES, read_metadata
from tests.support.tiny_models import IR_VERSION, OPSET, classifier, regressor, sealed

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
        ("manifest", put("task", "clusterer"), "skiff.manifest.task"),
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
        ("profile", put("groups", "a", "counts", ""), "byte planes"),
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
