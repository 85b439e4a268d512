"""Rows outside a declared range: refused, named and counted, alone and in batches, and no cost to other models."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from edge_runtime.contract.errors import ArtifactError, InputError
from edge_runtime.contract.manifest import Feature
from edge_runtime.engine import Block, Engine
from edge_runtime.runtime import Runtime
from tests.support.tiny_models import categorical, classifier, several

FREE = classifier()
FEATURES = (
    Feature(name="a", low=-1.0, high=2.0),
    Feature(name="b", low=0.0, missing=True, infinite=True),
    Feature(name="c"),
)
RANGED = replace(FREE, features=FEATURES, refuses=True)
INF = float("inf")


def built(tiny=RANGED) -> Any:
    return Runtime(tiny.artifact)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([-1.5, 0, 0], "feature 'a' is -1.5, outside [-1.0, 2.0], the range the model is proven for"),
        ([np.nextafter(np.float32(2), np.float32(3)), 0, 0], "feature 'a' is 2.0000002, outside [-1.0, 2.0]"),
        ([0, -1e-30, 0], "feature 'b' is -1e-30, outside [0.0, inf)"),
        ([0, -INF, 0], "feature 'b' is -inf, outside [0.0, inf)"),
        ([3, -1, 0], "feature 'a' is 3.0, outside"),
    ],
)
def test_a_row_outside_is_refused_alone_and_in_a_batch(row, message):
    runtime = built()
    packed = np.array(row, np.float32)
    for rows in (packed, packed[None], list(row), dict(zip("abc", row, strict=True))):
        with pytest.raises(InputError) as caught:
            runtime.predict(rows)
        assert caught.value.reason == "range"
        assert str(caught.value).startswith(message)
    with pytest.raises(InputError, match="row 1: feature") as caught:
        runtime.predict(np.stack([np.zeros(3, np.float32), packed]))
    assert caught.value.reason == "range"
    seen = runtime.take_window()
    assert (seen.rows, seen.refused, seen.failed) == (0, (("range", 6),), 0)


def test_a_data_frame_is_looked_at_too():
    with pytest.raises(InputError, match=r"^row 2: feature 'a' is 7\.0"):
        built().predict(pd.DataFrame({"c": [0.0, 1, 2], "a": [0.0, 1, 7], "b": [0.0, 1, 2]}))


@pytest.mark.parametrize(
    "row", [[-1, 0, 1e30], [2, 5, -1e30], [0, -0.0, 0], [0, 3e38, 0], [-0.5, 1, 0]], ids=str
)
def test_a_row_inside_is_answered_as_without_ranges(row):
    packed = np.array(row, np.float32)
    found, wanted = built().predict(packed), built(FREE).predict(packed)
    assert found.label == wanted.label
    assert np.array_equal(found.score, wanted.score, equal_nan=True)


def test_a_missing_value_is_outside_of_no_range():
    tiny = replace(RANGED, refuses=False)
    assert np.isnan(built(tiny).predict(np.array([0, np.nan, 0], np.float32)).score).all()
    with pytest.raises(InputError, match="'a' is missing"):
        built(tiny).predict(np.array([np.nan, 0, 0], np.float32))


def test_an_accepted_infinity_passes_where_the_range_has_no_end():
    tiny = replace(RANGED, refuses=False)
    assert np.isnan(built(tiny).predict(np.array([0, INF, 0], np.float32)).score).any()
    for row in ([INF, 0, 0], [0, 0, INF]):
        with pytest.raises(InputError, match="is inf; a finite float32 number is needed") as caught:
            built(tiny).predict(np.array(row, np.float32))
        assert caught.value.reason == "non_finite"


def test_the_graph_does_not_run_for_a_row_outside():
    runtime = built()
    serves: Any = runtime._serving
    serves._block.scores[:] = 7
    with pytest.raises(InputError):
        runtime.predict(np.array([9, 0, 0], np.float32))
    assert (serves._block.scores == 7).all()
    runtime.predict(np.zeros(3, np.float32))
    assert not (serves._block.scores == 7).any()


def test_a_model_without_ranges_runs_the_bound_run_itself():
    runs = [Runtime(tiny.artifact)._serving.hot[1] for tiny in (FREE, RANGED)]
    assert type(runs[0]) is type(Engine(FREE.artifact).bind().run)
    assert type(runs[1]) is not type(runs[0])


def test_a_swap_brings_the_new_models_ranges():
    wide = replace(RANGED, features=(replace(FEATURES[0], high=10.0), *FEATURES[1:]), version="2.0.0")
    runtime = built()
    row = np.array([5, 0, 0], np.float32)
    with pytest.raises(InputError):
        runtime.predict(row)
    runtime.swap(Engine(wide.artifact))
    runtime.predict(row)
    runtime.swap(Engine(FREE.artifact))
    runtime.predict(row * 1e6)
    runtime.swap(Engine(RANGED.artifact))
    with pytest.raises(InputError):
        runtime.predict(row)


def test_a_failing_graph_is_no_row_outside():
    runtime = built()
    serves: Any = runtime._serving
    row, _, *after = serves.hot

    def fail():
        raise Block.failures[1]("boom")

    serves.hot = (row, fail, *after)
    with pytest.raises(ArtifactError, match="boom"):
        runtime.predict(np.zeros(3, np.float32))
    with pytest.raises(InputError, match="outside"):
        runtime.predict(np.array([9, 0, 0], np.float32))


@pytest.mark.parametrize(
    ("tiny", "good", "bad"),
    [
        (replace(several(), features=FEATURES), [0, 0, 0], [3, 0, 0]),
        (
            categorical(
                Feature(name="colour", kind="category", vocabulary=("red", "green", "blue")), FEATURES[0]
            ),
            ["blue", 2.0],
            ["blue", 2.5],
        ),
        (replace(RANGED, input_dtype="float64"), [2.0, 0, 0], [2.0000000000000004, 0, 0]),
    ],
    ids=["several", "categories", "float64"],
)
def test_every_kind_of_model_looks_at_ranges(tiny, good, bad):
    runtime = built(tiny)
    runtime.predict(good)
    runtime.predict([good, good])
    for rows in (bad, [good, bad]):
        with pytest.raises(InputError, match="outside") as caught:
            runtime.predict(rows)
        assert caught.value.reason == "range"
    assert runtime.take_window().refused == (("range", 3),)


@pytest.mark.filterwarnings("error")
def test_looking_at_ranges_warns_of_nothing():
    runtime = built()
    with pytest.raises(InputError):
        runtime.predict(np.array([np.nan, np.nan, np.nan], np.float32))
    with pytest.raises(InputError):
        runtime.predict(np.array([[INF, -INF, np.nan], [0, 0, 0]], np.float32))
