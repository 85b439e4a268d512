"""The smart-watch data set is what its README says, and tables are refused with the place that is wrong."""

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from trainer.datasets import LEFT, RIGHT, WATCH_PATH, DatasetError, WatchData, load_csv, load_watch


@pytest.fixture(scope="module")
def watch() -> WatchData:
    return load_watch()


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_features", WATCH_PATH.with_name("make_features.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shapes_types_and_names(watch: WatchData, maker: ModuleType) -> None:
    assert watch.features.shape == (23_091, 30)
    assert watch.features.dtype == np.float32
    assert watch.features.flags.c_contiguous
    assert np.isfinite(watch.features).all()
    assert watch.feature_names == maker.FEATURE_NAMES
    assert watch.label_names == ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
    assert {column.dtype for column in (watch.labels, watch.person, watch.wrist, watch.recording)} == {
        np.dtype(np.uint8)
    }


def test_twenty_devices_each_with_one_recording_of_every_exercise(watch: WatchData) -> None:
    assert watch.devices == tuple((person, wrist) for person in range(1, 11) for wrist in (LEFT, RIGHT))
    for person, wrist in watch.devices:
        recordings = watch.device_rows(person, wrist).recordings()
        assert sorted(int(one.labels[0]) for one in recordings) == list(range(7))
        assert all(len(set(one.labels.tolist())) == 1 for one in recordings)


def test_statistics_of_a_row_agree_with_each_other(watch: WatchData) -> None:
    mean, std, low, high, step = (watch.features[:, at::5] for at in range(5))
    slack = 2.0**-11 * (np.abs(low) + np.abs(high))
    assert (low <= mean + slack).all()
    assert (mean <= high + slack).all()
    assert (std <= (high - low) / 2 + slack).all()
    assert (step <= high - low + slack).all()
    assert (std > 0).all()


def test_selection_keeps_rows_together_and_in_order(watch: WatchData) -> None:
    train = watch.select(people=(1, 2, 3, 4, 5, 6), wrists=(LEFT,))
    assert len(train) == 7_015
    assert train.devices == tuple((person, LEFT) for person in range(1, 7))
    assert set(train.groups.tolist()) == {f"person-{person:02d}-left" for person in range(1, 7)}
    rows = np.flatnonzero((watch.person <= 6) & (watch.wrist == LEFT))
    np.testing.assert_array_equal(train.features, watch.features[rows])
    np.testing.assert_array_equal(train.labels, watch.labels[rows])


def test_groups_name_the_device_of_every_row(watch: WatchData) -> None:
    last = watch.device_rows(10, RIGHT)
    assert set(last.groups.tolist()) == {"person-10-right"}
    assert len(set(watch.groups.tolist())) == 20


def test_arrays_are_read_only(watch: WatchData) -> None:
    with pytest.raises(ValueError, match="read-only"):
        watch.features[0, 0] = 1.0


def test_absent_devices_are_refused(watch: WatchData) -> None:
    with pytest.raises(DatasetError, match="person 11 has no rows"):
        watch.select(people=(1, 11))
    with pytest.raises(DatasetError, match="person 11, wrist 0 has no rows"):
        watch.device_rows(11, LEFT)


def test_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"absent\.npz: no such file; make it with"):
        load_watch(tmp_path / "absent.npz")


def test_damaged_and_incomplete_files_are_refused(tmp_path: Path) -> None:
    cut = tmp_path / "cut.npz"
    cut.write_bytes(WATCH_PATH.read_bytes()[:5_000])
    with pytest.raises(DatasetError, match="not a readable feature file"):
        load_watch(cut)
    flipped = tmp_path / "flipped.npz"
    payload = bytearray(WATCH_PATH.read_bytes())
    payload[20_000:20_100] = bytes(100)
    flipped.write_bytes(payload)
    with pytest.raises(DatasetError, match="not a readable feature file"):
        load_watch(flipped)
    single = tmp_path / "single.npz"
    with single.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(DatasetError, match="not a readable feature file"):
        load_watch(single)
    partial = tmp_path / "partial.npz"
    np.savez(partial, features=np.zeros((1, 30), np.float32))
    with pytest.raises(DatasetError, match="label is not a file in the archive"):
        load_watch(partial)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, features=np.array([{}], dtype=object))
    with pytest.raises(DatasetError, match="allow_pickle=False"):
        load_watch(pickled)


def test_columns_of_unequal_length_are_refused(watch: WatchData) -> None:
    with pytest.raises(DatasetError, match="person has shape"):
        WatchData(
            features=watch.features[:4],
            labels=watch.labels[:4],
            label_names=watch.label_names,
            person=watch.person[:3],
            wrist=watch.wrist[:4],
            recording=watch.recording[:4],
            feature_names=watch.feature_names,
        )


def test_features_of_a_known_series(maker: ModuleType) -> None:
    ramp = np.arange(131, dtype=np.float64)
    series = np.stack([ramp, -ramp, 0 * ramp + 3, ramp * 2, ramp % 2, ramp * 0], axis=1)
    features = maker.window_features(series)
    assert features.shape == (4, 30)
    assert features[1, :5] == pytest.approx([59.5, np.sqrt((100**2 - 1) / 12), 10, 109, 1])
    assert features[0, 10:15] == pytest.approx([3, 0, 3, 3, 0])
    assert features[2, 20:25] == pytest.approx([0.5, 0.5, 0, 1, 1])


def test_mantissa_rounding_is_idempotent_and_within_its_bound(maker: ModuleType) -> None:
    values = np.random.default_rng(0).normal(size=10_000) * 10.0 ** np.arange(-5, 5).repeat(1_000)
    rounded = maker.round_mantissa(values)
    assert np.abs(rounded - values).max() > 0
    assert (np.abs(rounded - values) <= np.abs(values) * 2.0 ** -(maker.MANTISSA_BITS + 1) * (1 + 1e-3)).all()
    np.testing.assert_array_equal(maker.round_mantissa(rounded.astype(np.float64)), rounded)
    assert not np.signbit(maker.round_mantissa(np.array([-0.0, -1e-46]))).any()


def test_the_shipped_file_is_rounded_and_carries_no_clock(watch: WatchData, maker: ModuleType) -> None:
    np.testing.assert_array_equal(maker.round_mantissa(watch.features.astype(np.float64)), watch.features)
    with zipfile.ZipFile(WATCH_PATH) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_same_arrays_same_bytes(maker: ModuleType, tmp_path: Path) -> None:
    arrays = {"a": np.arange(5, dtype=np.float32), "b": np.array(["x", "yz"])}
    encoded = maker.encode_npz(arrays)
    assert encoded == maker.encode_npz(dict(arrays))
    target = tmp_path / "kept.npz"
    target.write_bytes(encoded)
    assert maker.describe_difference(arrays, target) == []
    assert maker.describe_difference({**arrays, "a": arrays["a"] + 1}, target) == ["a: values differ"]
    assert maker.describe_difference({"a": arrays["a"]}, target) == ["b: only on one side"]


def test_a_foreign_source_is_refused_before_it_is_unpickled(maker: ModuleType, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign-1.0-py3-none-any.whl"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("seglearn/data/watch_dataset.npy", b"not the one")
    with pytest.raises(ValueError, match="expected " + maker.SOURCE_SHA256):
        maker.read_source(foreign)
    assert maker.main([str(foreign), "--out", str(tmp_path / "out.npz")]) == 1
    assert not (tmp_path / "out.npz").exists()


def test_csv_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,kind,b\n1,x,2.5\n,y,-1e3\n")
    table = load_csv(path, target="kind")
    assert table.feature_names == ("a", "b")
    assert table.target.tolist() == ["x", "y"]
    np.testing.assert_array_equal(table.features, np.array([[1, 2.5], [np.nan, -1000]], np.float32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "'kind' among them"),
        ("a,a,kind\n1,2,x\n", "distinct column names"),
        ("a,kind\n", "no rows"),
        ("a,kind\n1,x\n1\n", "line 3: 1 cells, but the header has 2"),
        ("a,kind,b\n1,x,2\n1,x,two\n", "line 3, column 'b': 'two' is no number"),
        ('a,kind\n1,"x\n', "not a readable CSV"),
    ],
)
def test_csv_refusals_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_csv(path, target="kind")
