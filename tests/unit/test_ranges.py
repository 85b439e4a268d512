"""What a maker declares as ranges: read, rounded, checked against the training rows, and told in words."""

import math

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from cli.ranges import parse_ranges
from converters import ranges, signature, table
from converters.artifact import convert
from edge_runtime.contract.errors import ConfigError, InputError
from edge_runtime.contract.manifest import Feature
from edge_runtime.contract.ranges import Limits

INF = math.inf
X = np.array([[0.0, 5.0, 7.0], [1.0, 5.0, 7.0], [4.0, 5.0, np.nan]])


def table_of(X):
    fitted = make_pipeline(StandardScaler()).fit(X)
    pipeline = make_pipeline(*(step for _, step in fitted.steps), LinearRegression())
    pipeline.fit(np.nan_to_num(X), np.arange(len(X)))
    return table.read(signature.read(pipeline), X)


TABLE = table_of(X)


# ── limits ─────────────────────────────────────────────────────────────────────────────────────────────


def test_features_without_ranges_have_no_limits():
    assert Limits.of([Feature(name="a"), Feature(name="b", infinite=True)], "float32") is None


def test_both_ends_are_inside_and_a_gap_is_nowhere():
    limits = Limits.of([Feature(name="a", low=-1.0, high=2.0), Feature(name="b", high=0.5)], "float32")
    assert limits is not None
    rows = np.array([[-1, -INF], [2, 0.5], [np.nan, np.nan], [-1.1, 0], [2.1, 0.6], [INF, INF]], np.float32)
    assert limits.outside(rows).tolist() == [
        [False, False],
        [False, False],
        [False, False],
        [True, False],
        [True, True],
        [True, True],
    ]
    assert [limits.text(j) for j in range(2)] == ["[-1.0, 2.0]", "(-inf, 0.5]"]


# ── what a maker asks for ──────────────────────────────────────────────────────────────────────────────


def test_no_ranges_are_no_limits():
    assert ranges.read(None, TABLE) is None
    assert ranges.read({}, TABLE) is None
    assert ranges.read({"x0": (None, None)}, TABLE) is None


def test_training_widens_each_range_by_itself():
    limits = ranges.read("training", TABLE)
    assert limits is not None
    assert limits.low.tolist() == [-4.0, 0.0, 0.0]  # a column that never changes: by its own size
    assert limits.high.tolist() == [8.0, 10.0, 14.0]


def test_training_leaves_out_what_has_no_numbers():
    frame = pd.DataFrame({"kind": ["a", "b", "a", "c"]})
    pipeline = make_pipeline(OneHotEncoder(), LinearRegression()).fit(frame, range(4))
    assert ranges.read("training", table.read(signature.read(pipeline), frame)) is None


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"x9": (0, 1)}, r"the pipeline has no feature 'x9' \(did you mean 'x"),
        ({"x0": (9, -9)}, r"feature 'x0' has low 9.0 above high -9.0"),
        ({"x0": (0, math.nan)}, r"feature 'x0' has the limit nan; a finite number is needed, or None"),
        ({"x0": (-INF, 1)}, r"feature 'x0' has the limit -inf"),
        ({"x0": ("0", 1)}, r"feature 'x0' has the limit '0'"),
        ({"x0": (True, 1)}, r"feature 'x0' has the limit True"),
        ({"x0": 3}, r"feature 'x0' has 3; \(low, high\) is needed"),
        ({"x0": (1, 2, 3)}, r"\(low, high\) is needed"),
        ("trainig", r"ranges is 'trainig'; pass 'training'"),
    ],
)
def test_what_is_no_range_is_refused(wanted, message):
    with pytest.raises(ConfigError, match=message):
        ranges.read(wanted, TABLE)


def test_a_category_has_no_range():
    frame = pd.DataFrame({"kind": ["a", "b", "a", "c"]})
    pipeline = make_pipeline(OneHotEncoder(), LinearRegression()).fit(frame, range(4))
    with pytest.raises(ConfigError, match="feature 'kind' holds categories, which have no range"):
        ranges.read({"kind": (0, 1)}, table.read(signature.read(pipeline), frame))


def test_training_rows_outside_are_counted_and_the_first_is_named():
    with pytest.raises(
        InputError, match=r"2 of 3 training rows lie .* the first is row 1, whose 'x0' is 1\.0, outside"
    ):
        ranges.read({"x0": (None, 0.5)}, TABLE)
    with pytest.raises(InputError, match=r"1 of 3 training row lies .* row 2, whose 'x0' is 4\.0") as caught:
        ranges.read({"x0": (0, 3), "x2": (7, 7)}, TABLE)
    assert caught.value.reason == "range"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ends_are_rounded_as_rows_are(dtype):
    found = ranges.rounded(Limits(np.array([0.1, -INF]), np.array([0.1, 1e300])), dtype)
    assert found.low.dtype == found.high.dtype == dtype
    assert not found.outside(np.array([[0.1, 0.0]]).astype(dtype)).any()
    assert found.low[1] == -INF
    assert found.high[1] == min(1e300, float(np.finfo(dtype).max))


def test_a_training_row_at_an_end_that_float32_does_not_have_stays_inside(tmp_path):
    rows = np.array([[0.1], [0.2], [0.3], [0.7]])
    made = convert(
        LinearRegression().fit(rows, [1, 2, 3, 7]),
        rows,
        tmp_path / "m.onnx",
        probes=200,
        ranges={"x0": (0.1, 0.7)},
    )
    [feature] = made.manifest.features
    assert (feature.low, feature.high) == (float(np.float32(0.1)), float(np.float32(0.7)))


# ── words of a command line ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], None),
        (["training"], "training"),
        (["a=0:1", "b=-1e3:"], {"a": (0.0, 1.0), "b": (-1000.0, None)}),
        (["a=b=:2.5"], {"a=b": (None, 2.5)}),
    ],
)
def test_words_become_ranges(words, found):
    assert parse_ranges(words) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "neither 'training' nor NAME=LOW:HIGH"),
        (["a=1"], "neither"),
        (["a=:"], "neither"),
        (["=1:2"], "neither"),
        (["a=1:x"], "'x' is not a number"),
        (["a=1:2:3"], "'2:3' is not a number"),
        (["a=1:2", "a=0:4"], "names 'a' twice"),
        (["training", "a=0:1"], "stands alone"),
    ],
)
def test_words_that_are_no_ranges_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_ranges(words)
