"""Files of raw rows: what is read from them, and what is wrong with them, by file, column and row."""

import gzip
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli.backtest.table import OTHER_LABEL, UNLABELLED, Columns, read_table
from edge_runtime.contract.errors import ConfigError, InputError
from edge_runtime.contract.manifest import Feature
from tests.support.tiny_models import categorical, classifier, regressor, several

COLUMNS = Columns(device="device", time="time")
LABELLED = Columns(device="device", time="time", labels="truth")
MANIFEST = classifier().manifest
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOON_NS = 1_772_366_400_000_000_000
SECOND = 1_000_000_000


def data(n=3, **changes):
    """Columns of n good rows, some of them replaced or, where None, left out."""
    found = {
        "device": [f"pump-{i % 2}" for i in range(n)],
        "time": pa.array([NOON + timedelta(seconds=i) for i in range(n)], pa.timestamp("us", "UTC")),
        **{name: np.arange(n) + 0.5 for name in "abc"},
    } | changes
    return {name: values for name, values in found.items() if values is not None}


def parquet(tmp_path, **changes):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(data(**changes)), path)
    return path


def csv(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    return path


# ── what is read ───────────────────────────────────────────────────────────────────────────────────────


def test_the_columns_of_a_parquet_file(tmp_path):
    found = read_table(parquet(tmp_path), MANIFEST, COLUMNS)
    assert found.devices == ("pump-0", "pump-1")
    assert found.device.tolist() == [0, 1, 0]
    assert found.times_ns.tolist() == [NOON_NS, NOON_NS + SECOND, NOON_NS + 2 * SECOND]
    assert found.values.dtype == np.float32
    assert found.values.tolist() == [[0.5, 1.5, 2.5]] * 3
    assert (found.refused, found.truth, found.notes) == ({}, None, ())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1, None, 3]), [1, np.nan, 3]),
        (pa.array([1.0, None, np.nan]), [1, np.nan, np.nan]),
        (pa.array([1e300, -1e300, 1.0]), [np.inf, -np.inf, 1]),
        (pa.array([True, False, None]), [1, 0, np.nan]),
        (pa.array([Decimal("1.50"), None, Decimal("-2.25")]), [1.5, np.nan, -2.25]),
        (pa.array([1, 2, 3], pa.uint8()), [1, 2, 3]),
        (pa.array(np.array([1.5, 2, 3], np.float16)), [1.5, 2, 3]),
        (pa.array(["1.5", "-2e3", "7"]), [1.5, -2000, 7]),
        (pa.array([None, None, None]), [np.nan] * 3),
        (pa.chunked_array([[1.0], [2.0, 3.0]]), [1, 2, 3]),
        (pa.array([4.0, 5.0, 4.0]).dictionary_encode(), [4, 5, 4]),
    ],
)
def test_numbers_of_every_kind(tmp_path, values, expected):
    found = read_table(parquet(tmp_path, a=values), MANIFEST, COLUMNS)
    np.testing.assert_array_equal(found.values[0], np.array(expected, np.float32))


def test_values_are_rounded_only_once(tmp_path):
    wide = np.array([0.1, 1 / 3, 16_777_217.0])
    found = read_table(parquet(tmp_path, a=wide), MANIFEST, COLUMNS)
    assert found.values[0].tolist() == wide.astype(np.float32).tolist()


CATEGORIES = categorical(
    Feature(name="colour", kind="category", vocabulary=("red", "NA", "01"), missing=True),
    Feature(name="size", kind="category", vocabulary=(1, 2), unseen=True),
    Feature(name="a"),
).manifest


def test_categories_become_codes_and_strange_ones_refusals(tmp_path):
    path = parquet(tmp_path, n=5, colour=["red", "01", None, "pink", "NA"], size=[1.0, 2.0, 3.0, 1.0, 2.0])
    found = read_table(path, CATEGORIES, COLUMNS)
    np.testing.assert_array_equal(found.values[0], [0, 2, np.nan, np.nan, 1])
    np.testing.assert_array_equal(found.values[1], [0, 1, -1, 0, 1])
    assert {why: mask.tolist() for why, mask in found.refused.items()} == {
        "unseen": [False, False, False, True, False]
    }


def test_a_csv_file_keeps_zeros_of_names_and_knows_its_gaps(tmp_path):
    path = csv(
        tmp_path,
        "device,time,colour,size,a\n007,2026-03-01T12:00:00Z,01,1,0.5\n7,2026-03-01T12:00:01Z,NA,,1\n"
        "007,2026-03-01T12:00:02Z,,2,NaN\n",
    )
    found = read_table(path, CATEGORIES, COLUMNS)
    assert found.devices == ("007", "7")
    assert found.times_ns.tolist() == [NOON_NS, NOON_NS + SECOND, NOON_NS + 2 * SECOND]
    np.testing.assert_array_equal(found.values, np.array([[2, 1, np.nan], [0, np.nan, 1], [0.5, 1, np.nan]]))


@pytest.mark.parametrize(
    ("manifest", "truth", "expected"),
    [
        (MANIFEST, ["low", None, "high"], [0, UNLABELLED, 2]),
        (MANIFEST, ["low", "odd", "mid"], [0, OTHER_LABEL, 1]),
        (classifier(labels=(0, 1)).manifest, pa.array([1, 0, None]), [1, 0, UNLABELLED]),
        (classifier(labels=(0, 1)).manifest, [1.0, np.nan, 0.0], [1, UNLABELLED, 0]),
        (classifier(labels=(False, True)).manifest, [True, False, True], [1, 0, 1]),
    ],
)
def test_the_truth_is_the_models_own_labels(tmp_path, manifest, truth, expected):
    found = read_table(parquet(tmp_path, truth=truth), manifest, LABELLED)
    assert found.truth is not None
    assert found.truth.tolist() == expected
    assert any("'odd'" in text for text in found.notes) == (OTHER_LABEL in expected)


@pytest.mark.parametrize("tiny", [regressor(("a", "b", "c")), several()])
def test_the_truth_of_models_without_one_label_is_not_used(tmp_path, tiny):
    found = read_table(parquet(tmp_path, truth=[1.0, 2.0, 3.0]), tiny.manifest, LABELLED)
    assert found.truth is None
    assert "not used" in found.notes[-1]


def test_labels_may_lack_where_they_are_not_needed(tmp_path):
    found = read_table(parquet(tmp_path), MANIFEST, LABELLED, truth_needed=False)
    assert found.truth is None
    assert "has no column 'truth'" in found.notes[0]
    with pytest.raises(ConfigError, match="no column 'truth' for --labels"):
        read_table(parquet(tmp_path), MANIFEST, LABELLED)


UUIDS = ("00000000-0000-0000-0000-000000000007", "12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (pa.array([b"p1", b"p0", b"p1"]), ("p0", "p1")),
        (pa.array([b"p1", b"p0", b"p1"], pa.large_binary()), ("p0", "p1")),
        (pa.array([b"p1", b"p0", b"p1"], pa.binary(2)), ("p0", "p1")),
        (pa.array([b"p1", b"p0", b"p1"]).dictionary_encode(), ("p0", "p1")),
        (pa.array(["p1", "p0", "p1"], pa.string_view()), ("p0", "p1")),
        (pa.array([UUID(text).bytes for text in (UUIDS[1], *UUIDS)], pa.uuid()), UUIDS),
        (pa.array([7, 12, 7]), ("12", "7")),
    ],
)
def test_devices_are_named_by_text_however_it_is_stored(tmp_path, values, names):
    found = read_table(parquet(tmp_path, device=values), MANIFEST, COLUMNS)
    assert found.devices == names


def test_categories_and_labels_may_be_stored_as_bytes(tmp_path):
    path = parquet(tmp_path, colour=[b"red", b"01", b"pink"], size=[1, 2, 1])
    found = read_table(path, CATEGORIES, COLUMNS)
    np.testing.assert_array_equal(found.values[0], [0, 2, np.nan])
    labels = read_table(parquet(tmp_path, truth=[b"low", None, b"high"]), MANIFEST, LABELLED)
    assert labels.truth is not None
    assert labels.truth.tolist() == [0, UNLABELLED, 2]


@pytest.mark.parametrize(
    ("manifest", "column", "values", "message"),
    [
        (MANIFEST, "device", [["a"], ["b"], ["c"]], "holds list<.*; names, categories and labels are text"),
        (MANIFEST, "device", [{"id": 1}] * 3, "holds struct<.*; names, categories and labels are text"),
        (MANIFEST, "device", [b"a", b"\xff\xfe", b"c"], "holds binary that is not UTF-8 text"),
        (MANIFEST, "truth", [["low"], None, None], "holds list<"),
        (CATEGORIES, "colour", [["red"], None, None], "holds list<"),
    ],
)
def test_a_column_of_what_names_nothing_is_named_with_its_type(tmp_path, manifest, column, values, message):
    path = parquet(
        tmp_path, **({"truth": [None] * 3, "size": [1, 2, 1], "colour": ["red"] * 3} | {column: values})
    )
    with pytest.raises(InputError, match=rf"rows\.parquet: column '{column}': {message}"):
        read_table(path, manifest, LABELLED if manifest is MANIFEST else COLUMNS)


def test_extra_columns_are_not_even_read(tmp_path):
    path = parquet(tmp_path, other=[object.__name__] * 3, more=[1, 2, 3])
    found = read_table(path, MANIFEST, COLUMNS)
    assert found.notes == (f"{path}: ignored 'other', 'more', which the model does not read",)


# ── times ──────────────────────────────────────────────────────────────────────────────────────────────

BASE = NOON_NS // SECOND


@pytest.mark.parametrize(
    ("times", "first_ns", "note"),
    [
        (pa.array([NOON], pa.timestamp("ms", "Europe/Berlin")), NOON_NS, ""),
        (pa.array([NOON.replace(tzinfo=None)], pa.timestamp("s")), NOON_NS, "no time zone"),
        (pa.array([NOON.date()]), NOON_NS - 43_200 * SECOND, ""),
        (pa.array(["2026-03-01T12:00:00Z"]), NOON_NS, ""),
        (pa.array(["2026-03-01 12:00:00.25"]), NOON_NS + SECOND // 4, "no time zone"),
        (pa.array(["2026-03-01T14:00:00+02:00"]), NOON_NS, ""),
        (pa.array([BASE]), NOON_NS, "taken as seconds"),
        (pa.array([BASE + 0.125]), NOON_NS + SECOND // 8, "taken as seconds"),
        (pa.array([BASE * 1000 + 7]), NOON_NS + 7_000_000, "taken as milliseconds"),
        (pa.array([BASE * 10**6 + 7]), NOON_NS + 7_000, "taken as microseconds"),
        (pa.array([NOON_NS + 7]), NOON_NS + 7, "taken as nanoseconds"),
        (pa.array([0]), 0, "taken as seconds"),
        (pa.array([f"{BASE}.125"]), NOON_NS + SECOND // 8, "taken as seconds"),
        (pa.array([str(NOON_NS + 7)]), NOON_NS + 7, "taken as nanoseconds"),
        (pa.array(["1701010112345"]), 1_701_010_112_345_000_000, "taken as milliseconds"),
        (pa.array(["20260301"]), NOON_NS - 43_200 * SECOND, "no time zone"),
        (pa.array(["2026-03-01T12:00:00Z"], pa.string_view()), NOON_NS, ""),
    ],
)
def test_times_of_every_kind(tmp_path, times, first_ns, note):
    found = read_table(parquet(tmp_path, n=1, time=times), MANIFEST, COLUMNS)
    assert found.times_ns.tolist() == [first_ns]
    assert [note in text for text in found.notes] == ([True] if note else [])


def test_a_few_times_that_look_like_another_unit_are_noted(tmp_path):
    times = [BASE * 1000, BASE * 1000 + 1000, 5]  # the last one's clock was not set
    found = read_table(parquet(tmp_path, time=times), MANIFEST, COLUMNS)
    assert found.times_ns.tolist() == [NOON_NS, NOON_NS + SECOND, 5_000_000]
    assert "taken as milliseconds since 1970, though 1 of 3 rows (the first is row 3: 5)" in found.notes[0]


def test_texts_of_both_kinds_may_be_mixed(tmp_path):
    times = ["2026-03-01T12:00:00Z", "2026-03-01 12:00:01", "2026-03-01T13:00:02+01:00"]
    found = read_table(parquet(tmp_path, time=times), MANIFEST, COLUMNS)
    assert found.times_ns.tolist() == [NOON_NS, NOON_NS + SECOND, NOON_NS + 2 * SECOND]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (["2026-03-01T12:00:00Z", "yesterday", "x"], "row 2: 'yesterday' is no time"),
        (pa.array([NOON, NOON, None]), "row 3: no time"),
        ([1.0, np.nan, 2.0], "row 2: no time"),
        ([1.0, -5.0, 2.0], r"row 2: -5\.0 is before 1970"),
        (pa.array([0, 1, 1 << 62], pa.timestamp("us")), "row 3: .* beyond the years"),
        ([1e30, 1.0, 1.0], "row 1: .* beyond the years"),
        (
            [BASE, BASE * 1000, BASE + 1],
            rf"row 2: {BASE * 1000} is a time in milliseconds, but 2 of 3 rows look like seconds \(row 1: {BASE}\)",
        ),
        (pa.array([1, 2, 3], pa.time32("ms")), r"holds time32\[ms\], which is no time"),
    ],
)
def test_a_time_that_is_none_is_named(tmp_path, times, message):
    with pytest.raises(InputError, match=rf"rows\.parquet: column 'time'.*{message}"):
        read_table(parquet(tmp_path, time=times), MANIFEST, COLUMNS)


# ── what is wrong ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": ["a", None, "b"]}, "column 'device', row 2: no device's name"),
        ({"device": [1.0, 2.0, np.nan]}, "column 'device', row 3: no device's name"),
        ({"device": ["a", "b", ""]}, "column 'device', row 3: no device's name"),
        ({"a": ["1", "two", "3"]}, "column 'a', row 2: 'two' is not a number"),
        ({"a": [[1], [2], [3]]}, "column 'a': holds list<.*the model reads numbers"),
        ({"b": None, "bb": [1, 2, 3]}, r"lacks 'b', which the model reads \(did you mean 'bb'\?\)"),
        ({"n": 0, "time": pa.array([], pa.timestamp("ns"))}, "has no rows"),
    ],
)
def test_what_no_row_may_have_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=rf"rows\.parquet: {message}"):
        read_table(parquet(tmp_path, **changes), MANIFEST, COLUMNS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            Columns(device="devise", time="time"),
            r"no column 'devise' for --device-column \(did you mean 'device'\?\)",
        ),
        (
            Columns(device="device", time="when"),
            "no column 'when' for --time-column.*it has 'device', 'time'",
        ),
        (LABELLED, "no column 'truth' for --labels"),
    ],
)
def test_an_option_that_names_nothing(tmp_path, columns, message):
    with pytest.raises(ConfigError, match=message):
        read_table(parquet(tmp_path), MANIFEST, columns)


def test_columns_are_read_side_by_side_and_the_first_that_is_wrong_is_named(tmp_path):
    wrong = {"device": ["a", None, "b"], "a": ["1", "two", "3"], "truth": [1, 2, 1]}
    late = {"time": pa.array([NOON, NOON, None])}
    for name, changes in (("time", late | wrong), ("device", wrong), ("a", wrong | {"device": ["x"] * 3})):
        with pytest.raises(InputError, match=rf"column {name!r}, row"):
            read_table(parquet(tmp_path, **changes), MANIFEST, LABELLED)


def test_labels_of_another_model(tmp_path):
    with pytest.raises(InputError, match="holds 1, 2, none of which the model knows; its labels are 'low'"):
        read_table(parquet(tmp_path, truth=[1, 2, 1]), MANIFEST, LABELLED)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.csv", "", "is empty"),
        ("rows.csv", "device,time,a,b,c\n", "has no rows"),
        ("rows.csv", "device,time,a,b,c\nx,1,2\n", "row 1: has 3 values where the header names 5 columns"),
        (
            "rows.csv",
            "device,time,a,b,c\n" + "x,1,2,3,4\n" * 4 + "x,1,2,3,4,5\n" + "x,1,2,3,4\n" * 4,
            r"row 5: has 6 values where the header names 5 columns \(x,1,2,3,4,5\)",
        ),
        ("rows.csv", "device,time,a,a,b,c\nx,1,2,3,4,5\n", "two columns 'a'"),
        (
            "rows.csv",
            "device,time,a,b,c\nx,1,2,3,4\nx,2,oops,3,4\n",
            "column 'a', row 2: 'oops' is not a number",
        ),
        ("rows.parquet", "device,time\n", "is not a Parquet file"),
    ],
)
def test_a_damaged_file(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_table(path, MANIFEST, COLUMNS)


def test_a_file_that_is_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(InputError, match=r"none\.parquet: cannot be read"):
        read_table(tmp_path / "none.parquet", MANIFEST, COLUMNS)
    with pytest.raises(
        ConfigError, match=r"rows\.xlsx: is of no known kind; rows are read from \.parquet, \.csv, \.csv\.gz"
    ):
        read_table(tmp_path / "rows.xlsx", MANIFEST, COLUMNS)


# ── what people have ───────────────────────────────────────────────────────────────────────────────────

LINES = "device,time,a,b,c\np1,2026-03-01T12:00:00Z,1,2,3\np0,2026-03-01T13:00:00+02:00,4,5,6\n"


def test_a_csv_file_may_be_compressed(tmp_path):
    plain = read_table(csv(tmp_path, LINES), MANIFEST, COLUMNS)
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(("\ufeff" + LINES).encode()))
    found = read_table(path, MANIFEST, COLUMNS)
    assert found.devices == plain.devices == ("p0", "p1")
    assert found.times_ns.tolist() == plain.times_ns.tolist()
    assert found.values.tolist() == plain.values.tolist()


@pytest.mark.parametrize("kept", [5, 20, 60])
def test_a_compressed_file_that_ends_too_soon_or_is_none(tmp_path, kept):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(LINES.encode())[:kept])
    with pytest.raises(InputError, match=r"rows\.csv\.gz: "):
        read_table(path, MANIFEST, COLUMNS)
    path.write_text(LINES, encoding="utf-8")
    with pytest.raises(InputError, match=r"rows\.csv\.gz: cannot be read"):
        read_table(path, MANIFEST, COLUMNS)


@pytest.mark.parametrize("other", [";", "\t"])
def test_columns_that_are_not_set_apart_by_commas(tmp_path, other):
    with pytest.raises(InputError, match=r"its columns are set apart by .*; save it with commas"):
        read_table(csv(tmp_path, LINES.replace(",", other)), MANIFEST, COLUMNS)


def test_labels_that_are_numbers_may_be_written_as_text(tmp_path):
    whole = replace(MANIFEST, labels=(0, 1, 2))
    found = read_table(parquet(tmp_path, truth=["2", "0", "7"]), whole, LABELLED)
    assert found.truth is not None
    assert found.truth.tolist() == [2, 0, OTHER_LABEL]
