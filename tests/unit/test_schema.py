"""What users have, as packed rows: categories as codes, infinities where they are allowed, data frames."""

from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_runtime.contract.errors import InputError
from edge_runtime.contract.manifest import Feature
from edge_runtime.schema import Schema, count_rows

NAN, INF = float("nan"), float("inf")
FEATURES = (
    Feature(name="size", infinite=True),
    Feature(name="colour", kind="category", vocabulary=("red", "blue"), missing=True),
    Feature(name="floor", kind="category", vocabulary=(3, 1, 0.5), unseen=True, missing=True),
)
SCHEMA = Schema(FEATURES)


def same(found, wanted):
    return found.dtype == np.float32 and np.array_equal(found, np.array(wanted, np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("row", "packed"),
    [
        ([1.5, "blue", 3], [1.5, 1, 0]),
        ((1, np.str_("red"), np.int64(1)), [1, 0, 1]),
        ([np.float32(2), "red", np.float64(0.5)], [2, 0, 2]),
        ([2, "red", True], [2, 0, 1]),
        ([2, "red", np.True_], [2, 0, 1]),
        ([2, "red", "3"], [2, 0, -1]),
        ([2, None, NAN], [2, NAN, NAN]),
        ([2, np.float32("nan"), np.float32(7)], [2, NAN, -1]),
        ({"floor": 1.0, "size": 4}, [4, NAN, 1]),
        ({"floor": pd.NA, "size": pd.NA, "colour": "blue"}, [NAN, 1, NAN]),
        (np.array([2.5, "blue", 1], object), [2.5, 1, 1]),
        ([INF, "red", 9], [INF, 0, -1]),
        ([-(10**400), "red", 9], [-INF, 0, -1]),
    ],
)
def test_values_become_codes(row, packed):
    table, single = SCHEMA.convert(row)
    assert single
    assert same(table, [packed])


@pytest.mark.parametrize("kind", [list, lambda rows: np.array(rows, object)])
def test_lists_of_rows_and_object_arrays_become_codes(kind):
    table, single = SCHEMA.convert(kind([[1, "blue", 0.5], [2, "red", 4]]))
    assert not single
    assert same(table, [[1, 1, 2], [2, 0, -1]])


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ([1, "blu", 3], "unseen", r"^feature 'colour' is 'blu', which .* \(did you mean 'blue'\?\)$"),
        ([[1, "red", 3], [1, 7, 3]], "unseen", "^row 1: feature 'colour' is 7"),
        ([1, ["red"], 3], "type", r"^feature 'colour' is list \['red'\], not a category"),
        ([1, "red", {}], "type", "^feature 'floor' is dict"),
        (["1", "red", 3], "type", "^feature 'size' is str '1', not a number"),
        ({"size": 1, "color": "red"}, "unknown_feature", r"'color' \(did you mean 'colour'\?\)"),
        (np.array([1.0, 2.0, 3.0]), "unseen", r"feature 'colour' is 2\.0"),
    ],
)
def test_what_is_no_value_of_a_category_is_refused(row, reason, message):
    with pytest.raises(InputError, match=message) as refused:
        SCHEMA.convert(row)
    assert refused.value.reason == reason


def test_a_numeric_array_holds_values_and_not_codes():
    schema = Schema(
        [Feature(name="x"), Feature(name="floor", kind="category", vocabulary=(3, 1), missing=True)]
    )
    for dtype in (np.float32, np.float64):
        table, single = schema.convert(np.array([[0.5, 1], [1.5, 3], [2.5, NAN]], dtype))
        assert not single
        assert same(table, [[0.5, 1], [1.5, 0], [2.5, NAN]])
    with pytest.raises(InputError, match=r"row 1: feature 'floor' is 0\.0") as refused:
        schema.convert(np.array([[0.5, 1], [1.5, 0]]))
    assert refused.value.reason == "unseen"


def test_an_array_of_texts_is_a_row_of_categories():
    schema = Schema([Feature(name=name, kind="category", vocabulary=("x", "y")) for name in "ab"])
    assert same(schema.convert(np.array([["x", "y"], ["y", "y"]]))[0], [[0, 1], [1, 1]])


def test_only_what_may_be_infinite_or_missing_passes():
    SCHEMA.check(np.array([[INF, NAN, NAN], [-INF, 0, -1]], np.float32))
    with pytest.raises(InputError, match="row 1: feature 'size' is missing") as refused:
        SCHEMA.check(np.array([[INF, 0, 0], [NAN, 0, 0]], np.float32))
    assert refused.value.reason == "missing"
    with pytest.raises(InputError, match="feature 'b' is -inf; a finite float64 number") as refused:
        Schema([Feature(name="a", infinite=True), Feature(name="b", missing=True)], "float64").check(
            np.array([[INF, -INF]])
        )
    assert refused.value.reason == "non_finite"


@pytest.mark.parametrize("rows", [[0.1, 1e300], {"x": 0.1, "y": 1e300}, np.array([0.1, 1e300])])
def test_a_wide_schema_keeps_every_digit(rows):
    table, _ = Schema([Feature(name="x"), Feature(name="y")], "float64").convert(rows)
    assert table.dtype == np.float64
    assert table.tolist() == [[0.1, 1e300]]


def frame(**changes):
    columns = {"floor": [3, 8], "colour": ["blue", None], "size": [1, 2]}
    return pd.DataFrame({**columns, **changes})


@pytest.mark.parametrize(
    "rows",
    [
        frame(),
        frame(size=[1.0, 2.0]),
        frame(colour=pd.Categorical(["blue", None])),
        frame(size=pd.array([1, 2], "Int64"), floor=pd.array([3, 8], "Int64")),
    ],
)
def test_a_data_frame_goes_by_its_names(rows):
    table, single = SCHEMA.convert(rows)
    assert not single
    assert same(table, [[1, 1, 0], [2, NAN, -1]])
    assert same(SCHEMA.convert(rows[:1])[0], [[1, 1, 0]])


def test_columns_with_numbers_for_names_are_found_by_their_text():
    schema = Schema((Feature(name="0"), Feature(name="1")))
    packed, single = schema.convert(pd.DataFrame({1: [2.0, 3.0], 0: [4, 5]}))
    assert not single
    assert same(packed, [[4, 2], [5, 3]])
    with pytest.raises(InputError, match="two columns '1'"):
        schema.convert(pd.DataFrame([[1, 2, 3]], columns=[0, 1, "1"]))


def test_gaps_of_a_data_frame_are_missing_values():
    rows = frame(size=pd.array([1, None], "Int64"), floor=pd.array([None, 3], "Int64"))
    assert same(SCHEMA.convert(rows)[0], [[1, 1, NAN], [NAN, NAN, 0]])


class Polars:
    """What polars has: names as a list, and columns that are arrays on demand."""

    columns = ("colour", "floor", "size")

    def __getitem__(self, name):
        return {"colour": ["red"], "floor": [1], "size": [0.5]}[name]

    def __len__(self):
        return 1


def test_anything_with_columns_is_a_data_frame():
    assert same(SCHEMA.convert(Polars())[0], [[0.5, 0, 1]])


@pytest.mark.parametrize(
    ("rows", "reason", "message"),
    [
        (frame().drop(columns="colour"), "missing", "no column 'colour'"),
        (frame(sise=[1, 2]), "unknown_feature", r"no feature 'sise' \(did you mean 'size'\?\)"),
        (frame().rename(columns={"floor": 0}), "unknown_feature", "no feature 0"),
        (pd.concat([frame(), frame()], axis=1), "unknown_feature", "two columns 'floor'"),
        (frame(colour=["blue", "green"]), "unseen", "row 1: feature 'colour' is 'green'"),
        (frame(size=["1", "2"]), "type", "row 0: feature 'size' is str"),
        (frame(size=pd.to_datetime(["2020-01-01"] * 2)), "type", "column 'size' holds datetime64"),
    ],
)
def test_a_data_frame_that_does_not_fit_is_refused(rows, reason, message):
    with pytest.raises(InputError, match=message) as refused:
        SCHEMA.convert(rows)
    assert refused.value.reason == reason
    assert count_rows(rows) == 2


def test_a_kind_of_array_is_an_array():
    row = np.zeros(2, np.float32).view(np.memmap)
    table, single = Schema([Feature(name="x"), Feature(name="y")]).convert(row)
    assert single
    assert type(table) is np.ndarray


# ── the quick way for one row ──────────────────────────────────────────────────────────────────────────

PLAIN = (Feature(name="a"), Feature(name="b", missing=True), Feature(name="c", infinite=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "values",
    [
        [1.5, 2, True],
        [0.1, NAN, INF],
        [np.float32(0.1), np.float64(0.1), np.int64(7)],
        [1e39, -1e39, 2**60 + 1],
        [16777217, 0.1, 1e-45],
        [np.bool_(True), np.float16(0.1), np.int8(-3)],
    ],
)
def test_the_quick_way_packs_the_same_bits(values, dtype):
    schema = Schema(PLAIN, dtype)
    wanted, single = schema.convert(values)
    assert single
    mapping = dict(zip("abc", values, strict=True))
    for given in (values, tuple(values), mapping, dict(reversed(mapping.items()))):
        found: Any = schema.pack(given)
        assert found.dtype == wanted.dtype
        assert found.tobytes() == wanted[0].tobytes()


@pytest.mark.parametrize(
    "given",
    [
        [1.0, 2.0],
        [1.0, 2.0, "3"],
        [1.0, None, 3.0],
        [1.0, 2.0, 10**400],
        [1.0, 2.0, 3j],
        [[1.0, 2.0, 3.0]],
        {"a": 1.0, "b": 2.0},
        {"a": 1.0, "b": 2.0, "d": 3.0},
        {"a": 1.0, "b": 2.0, "c": "3"},
        {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0},
        np.array([1.0, 2.0, 3.0]),
        "abc",
        None,
    ],
)
def test_what_is_not_three_numbers_goes_the_long_way(given):
    assert Schema(PLAIN).pack(given) is None


def test_one_feature_and_categories_go_the_long_way_as_mappings():
    assert Schema(PLAIN[:1]).pack({"a": 1.0}) is None
    one: Any = Schema(PLAIN[:1]).pack([1.0])
    assert one.tolist() == [1.0]
    assert SCHEMA.pack([1.0, 1, 3]) is None


def test_a_packed_batch_is_copied():
    rows = np.ones((2, 3), np.float32)
    table, single = Schema(PLAIN).convert(rows)
    assert not single
    rows[:] = 2
    assert (table == 1).all()


@pytest.mark.parametrize(
    ("table", "reason", "message"),
    [
        (
            [[0, 0], [5, 0]],
            "range",
            r"^row 1: feature 'a' is 5\.0, outside \[-1\.0, 1\.0\], the range the model",
        ),
        ([[0, -3]], "range", r"^feature 'b' is -3\.0, outside \[-2\.0, inf\)"),
        ([[0, -INF]], "range", r"^feature 'b' is -inf, outside"),
        ([[5, 0], [NAN, 0]], "missing", r"^row 1: feature 'a' is missing"),
        ([[5, 0], [INF, 0]], "non_finite", r"^row 1: feature 'a' is inf"),
        ([[0, 0], [0, NAN], [0, INF], [1, -2], [-1, 3e38]], "", ""),
        (np.zeros((0, 2)), "", ""),
    ],
)
def test_what_lies_outside_a_range_is_refused_after_what_is_not_finite(table, reason, message):
    schema = Schema(
        [Feature(name="a", low=-1.0, high=1.0), Feature(name="b", low=-2.0, missing=True, infinite=True)]
    )
    rows = np.array(table, np.float32)
    if not reason:
        schema.check(rows)
        return
    with pytest.raises(InputError, match=message) as refused:
        schema.check(rows)
    assert refused.value.reason == reason


@hypothesis.given(
    arrays(
        np.float32, (12, 3), elements=st.sampled_from([0.0, 1.0, -3.0, 3.0, np.nan, np.inf, -np.inf])
    ),
    st.lists(st.booleans(), min_size=6, max_size=6),
)  # fmt: skip
def test_rows_refused_in_bulk_are_those_refused_one_by_one_and_for_the_same_reason(table, flags):
    schema = Schema(
        [
            Feature(name="a", missing=flags[0], infinite=flags[1], low=-2.0 if flags[4] else None),
            Feature(name="b", missing=flags[2], infinite=flags[3]),
            Feature(name="c", high=2.0 if flags[5] else None),
        ]
    )
    expected: list[str] = []
    for row in table:
        try:
            schema.check(row[None])
            expected.append("")
        except InputError as e:
            expected.append(e.reason)
    found = [""] * len(table)
    for reason, mask in schema.refused(table).items():
        assert mask.any()
        for i in np.flatnonzero(mask):
            assert not found[i]
            found[i] = reason
    assert found == expected
