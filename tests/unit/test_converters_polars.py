"""Pipelines fitted on polars frames: every dtype that holds numbers or categories, with nulls and without."""

import numpy as np
import polars as pl
import pytest
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from converters import check_parity, convert
from converters.signature import read as read_pipeline
from converters.table import STRANGERS, read
from edge_runtime.contract.errors import InputError, UnsupportedPipeline
from edge_runtime.runtime import Runtime

pytestmark = pytest.mark.sampled(2)

ROWS = 120
COLORS = pl.Enum(["blue", "green", "red"])


def plain():
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "size": rng.normal(size=ROWS),
            "count": rng.integers(0, 9, ROWS),
            "color": rng.choice(["red", "blue", "green"], ROWS),
            "open": rng.random(ROWS) > 0.5,
        }
    )


def with_nulls():
    number = pl.int_range(pl.len())
    return plain().with_columns(
        pl.when(number % every != 0).then(pl.col(name))
        for name, every in (("size", 9), ("count", 13), ("color", 7), ("open", 11))
    )


FRAMES = {
    "plain": plain,
    "nulls": with_nulls,
    "categorical": lambda: plain().with_columns(pl.col("color").cast(pl.Categorical)),
    "categorical nulls": lambda: with_nulls().with_columns(pl.col("color").cast(pl.Categorical)),
    "enum": lambda: plain().with_columns(pl.col("color").cast(COLORS)),
    "enum nulls": lambda: with_nulls().with_columns(pl.col("color").cast(COLORS)),
    "narrow": lambda: plain().cast({"size": pl.Float32, "count": pl.UInt8}),
}
TARGET = np.where(plain()["size"] + (plain()["color"] == "red") > 0.3, "hot", "cold")


def one_hot():
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return make_column_transformer((encoder, ["color", "open"]), (SimpleImputer(), ["size", "count"]))


PIPELINES = {
    "one-hot": lambda: make_pipeline(one_hot(), LogisticRegression()),
    "polars between steps": lambda: make_pipeline(
        one_hot(), StandardScaler(), LogisticRegression()
    ).set_output(transform="polars"),
    "ordinal": lambda: make_pipeline(
        make_column_transformer(
            (OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), ["color", "open"]),
            remainder="passthrough",
        ),
        SimpleImputer(),
        RandomForestClassifier(3, random_state=0),
    ),
    "nulls filled": lambda: make_pipeline(
        make_column_transformer(
            (
                make_pipeline(
                    SimpleImputer(missing_values=None, strategy="most_frequent"),
                    OneHotEncoder(handle_unknown="ignore"),
                ),
                ["color"],
            )
        ),
        LogisticRegression(),
    ),
}


@pytest.mark.covering
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_what_was_fitted_on_a_polars_frame_is_proven_on_one(frame, pipeline, tmp_path):
    X = FRAMES[frame]()
    fitted = PIPELINES[pipeline]().fit(X, TARGET)
    artifact = convert(fitted, X, tmp_path / "m.onnx", probes=100)
    assert artifact.manifest.features[2].kind == "category"
    runtime = Runtime(artifact.path)
    rows = X.head(30)
    found = [runtime.predict(row).label for row in rows.to_dicts()]
    assert found == fitted.predict(rows).tolist()


def test_an_artifact_is_checked_on_a_polars_frame(tmp_path):
    X = with_nulls()
    fitted = PIPELINES["one-hot"]().fit(X, TARGET)
    path = convert(fitted, X, tmp_path / "m.onnx", probes=100).path
    assert check_parity(fitted, path, X.drop_nulls(), probes=100).passed


@pytest.mark.parametrize("frame", ["categorical", "categorical nulls", "enum", "enum nulls"])
def test_categories_by_dtype(frame, tmp_path):
    X = FRAMES[frame]()
    fitted = HistGradientBoostingClassifier(max_iter=3).fit(X, TARGET)
    artifact = convert(fitted, X, tmp_path / "m.onnx", probes=100)
    runtime = Runtime(artifact.path)
    assert [runtime.predict(row).label for row in X.head(30).to_dicts()] == fitted.predict(
        X.head(30)
    ).tolist()


def table_of(X, pipeline="one-hot"):
    return read(read_pipeline(PIPELINES[pipeline]().fit(X, TARGET)), X)


@pytest.mark.parametrize("frame", ["nulls", "categorical nulls", "enum nulls"])
def test_nulls_are_restored_as_nulls(frame):
    X = FRAMES[frame]()
    table = table_of(X)
    restored = table.restore(table.wide)
    assert restored["color"].dtype == X["color"].dtype
    assert restored["color"].to_list() == X["color"].to_list()
    assert restored["open"].to_list() == X["open"].to_list()


def test_a_column_of_text_without_nulls_gets_nulls_where_values_are_missing():
    restored = table_of(plain()).restore(np.full((1, 4), np.nan))
    assert restored["color"].to_list() == [None]


def test_truth_values_are_numbers_until_a_null_makes_that_another_answer():
    assert table_of(plain()).columns[3].vocabulary is None
    assert set(table_of(with_nulls()).columns[3].vocabulary or ()) == {True, False}
    filled = table_of(with_nulls(), "nulls filled")
    assert filled.columns[3].vocabulary is None


def test_strangers_to_an_enum_come_as_text():
    table = table_of(FRAMES["enum"]())
    codes = np.zeros((2, 4))
    codes[1, 2] = -1
    restored = table.restore(codes)["color"]
    assert restored.dtype == pl.String
    assert restored[0] == table.columns[2].vocabulary[0]
    assert restored[1] in STRANGERS


def test_strangers_to_truth_values_are_refused(tmp_path):
    X = with_nulls()
    fitted = PIPELINES["one-hot"]().fit(X, TARGET)
    color, flag = convert(fitted, X, tmp_path / "m.onnx", probes=200).manifest.features[2:]
    assert (color.unseen, flag.unseen) == (True, False)
    assert flag.missing


def test_a_lazy_frame_is_refused_with_what_to_do():
    signature = read_pipeline(PIPELINES["one-hot"]().fit(plain(), TARGET))
    with pytest.raises(InputError, match=r"pass X\.collect\(\)"):
        read(signature, plain().lazy())


def test_columns_of_dates_are_refused_by_name():
    X = plain()
    signature = read_pipeline(PIPELINES["one-hot"]().fit(X, TARGET))
    dated = X.with_columns(pl.lit("2020-01-01").str.to_date().alias("size"))
    with pytest.raises(UnsupportedPipeline, match="column 'size' holds a date; turn it into numbers or text"):
        read(signature, dated)


def test_series_are_targets_and_groups(tmp_path):
    X = plain()
    fitted = PIPELINES["one-hot"]().fit(X, TARGET)
    options = {"y": TARGET, "groups": X["color"].to_numpy()}
    series = {"y": pl.Series(TARGET), "groups": X["color"]}
    digests = {
        convert(fitted, X, tmp_path / "m.onnx", probes=200, **given).digest for given in (options, series)
    }
    assert len(digests) == 1
