"""Training rows: arrays, data frames, and what is wrong with them."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from converters import convert
from converters.signature import read as read_pipeline
from converters.table import STRANGERS, read, spread, training_digest
from edge_runtime.contract.errors import InputError, UnsupportedPipeline
from edge_runtime.contract.manifest import agrees
from edge_runtime.runtime import Runtime
from tests.parity.cases import classes_of, scaled_integers

NAMES = ("temp", "rpm", "volt", "x y", "ß")


def frame(X, names=NAMES):
    return pd.DataFrame(X, columns=list(names))


@pytest.fixture(scope="module")
def X():
    return scaled_integers(80)


@pytest.fixture(scope="module")
def forest(X):
    return read_pipeline(RandomForestClassifier(2, random_state=0).fit(X, classes_of(X, 2)))


@pytest.fixture(scope="module")
def linear(X):
    return read_pipeline(LogisticRegression().fit(X, classes_of(X, 2)))


def test_an_array_gets_names(forest, X):
    table = read(forest, X.tolist())
    assert table.names == ("x0", "x1", "x2", "x3", "x4")
    assert table.vocabularies == ()
    assert not table.coded.any()
    assert table.assemble is None
    np.testing.assert_array_equal(table.wide, X)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_are_what_a_device_sends(forest, X, dtype):
    third = X / 3
    rows = read(forest, np.asfortranarray(third)).rows(dtype)
    assert rows.dtype == dtype
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows, third.astype(dtype))


def test_numbers_are_restored_widened(forest, X):
    table = read(forest, X)
    rows = (X / 3).astype(np.float32)
    restored = table.restore(rows)
    assert restored.dtype == np.float64
    np.testing.assert_array_equal(restored, rows.astype(np.float64))


def test_a_frame_keeps_its_names(forest, X):
    assert read(forest, frame(X)).names == NAMES


def test_a_pipeline_fitted_on_a_frame_is_proven_without_warnings(X, tmp_path):
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=0)).fit(
        frame(X), classes_of(X, 2)
    )
    artifact = convert(pipeline, frame(X), tmp_path / "m.onnx", probes=500)
    assert tuple(feature.name for feature in artifact.manifest.features) == NAMES
    assert convert(pipeline, X, tmp_path / "n.onnx", probes=500).digest == artifact.digest


def test_truth_values_are_numbers(tmp_path):
    X = frame(scaled_integers(80))
    X["ß"] = X["ß"] > 0
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, classes_of(X.to_numpy(float), 2))
    table = read(read_pipeline(pipeline), X)
    assert table.vocabularies == ()
    assert set(table.wide[:, 4].tolist()) == {0.0, 1.0}
    assert convert(pipeline, X, tmp_path / "m.onnx", probes=500).report.passed


def test_an_array_for_a_pipeline_that_selects_by_name_becomes_a_frame(X):
    pipeline = make_pipeline(
        make_column_transformer((StandardScaler(), ["temp", "volt"])), LogisticRegression()
    ).fit(frame(X), classes_of(X, 2))
    restored = read(read_pipeline(pipeline), X).restore(X[:3])
    pd.testing.assert_frame_equal(restored, frame(X[:3]))


def test_an_array_for_a_pipeline_that_selects_by_name_is_converted(X, tmp_path):
    select = make_column_transformer((StandardScaler(), ["rpm", "temp"]), remainder="passthrough")
    pipeline = make_pipeline(select, LogisticRegression()).fit(frame(X), classes_of(X, 2))
    made = convert(pipeline, X, tmp_path / "m.onnx", probes=200)
    assert agrees(Runtime(made.path).predict(X).score, pipeline.predict_proba(frame(X))).all()


def test_a_frame_that_the_pipeline_does_not_take_is_refused(linear, X, tmp_path):
    mixed = frame(X, ("a", 1, "b", 2, "c"))
    with pytest.raises(InputError, match=r"X: the pipeline refuses it \(Feature names are only supported"):
        convert(linear.pipeline, mixed, tmp_path / "m.onnx", probes=200)


def test_other_columns_than_in_training_are_refused(X):
    pipeline = LogisticRegression().fit(X, classes_of(X, 2))
    pipeline.feature_names_in_ = np.array(NAMES, dtype=object)
    signature = read_pipeline(pipeline)
    with pytest.raises(
        UnsupportedPipeline, match=r"\('rpm' for 'temp'\); pass the same columns in the same order"
    ):
        read(signature, frame(X, ("rpm", "temp", *NAMES[2:])))
    with pytest.raises(UnsupportedPipeline, match="4 columns, not 5"):
        read(signature, frame(X[:, :4], NAMES[:4]))


def test_names_must_differ(X):
    pipeline = LogisticRegression().fit(X, classes_of(X, 2))
    pipeline.feature_names_in_ = np.array(["a", "b", "a", "c", "d"], dtype=object)
    with pytest.raises(UnsupportedPipeline, match="'a' appears more than once"):
        read(read_pipeline(pipeline), X)


# --- columns of categories -----------------------------------------------------------------------------------------

COLORS = ["red", "blue", "blue", "green", None, "blue", "red", "blue"]
SIZES = [1.0, 2.0, np.nan, 4.0, 5.0, 6.0, 7.0, 8.0]
TARGET = [0, 1, 1, 0, 1, 0, 1, 0]


def encoded(rows, columns, encoder=None):
    """A pipeline that encodes the named columns of ``rows``, or those at the given places."""
    steps = (
        make_pipeline(SimpleImputer(missing_values=None, strategy="constant", fill_value="?"), encoder)
        if encoder
        else None
    )
    chosen = steps or OneHotEncoder(handle_unknown="ignore")
    transformer = make_column_transformer((chosen, columns), remainder=SimpleImputer())
    return read_pipeline(make_pipeline(transformer, LogisticRegression()).fit(rows, TARGET))


def objects(color=None, size=None):
    table = np.empty((8, 2), object)
    table[:, 0] = COLORS if color is None else color
    table[:, 1] = SIZES if size is None else size
    return table


def test_text_in_an_object_array_becomes_codes_by_how_often_it_occurs():
    rows = objects()
    table = read(encoded(rows, [0]), rows)
    assert table.vocabularies == (("blue", "red", "green"), None)
    assert table.coded.tolist() == [True, False]
    np.testing.assert_array_equal(table.wide[:, 0], [1, 0, 0, 2, np.nan, 0, 1, 0])
    np.testing.assert_array_equal(table.wide[:, 1], SIZES)
    restored = table.restore(table.rows("float32"))
    assert restored.dtype == object
    assert restored[:, 0].tolist() == COLORS
    np.testing.assert_array_equal(restored[:, 1].astype(float), SIZES)


def test_equally_frequent_values_are_in_order_of_their_text():
    rows = objects(["b", "a", "c", "d", "d", "a", "b", "c"])
    assert read(encoded(rows, [0]), rows).vocabularies[0] == ("a", "b", "c", "d")


def test_an_array_of_text_is_one_of_objects():
    rows = np.array([["a", "x"], ["b", "x"]] * 4)
    table = read(encoded(rows, [0, 1]), rows)
    assert table.vocabularies == (("a", "b"), ("x",))
    assert table.restore(table.wide).tolist() == rows.tolist()


@pytest.mark.parametrize("missing", [None, math.nan])
def test_what_was_missing_is_restored_as_it_was(missing):
    rows = objects([missing if color is None else color for color in COLORS])
    table = read(encoded(rows, [0]), rows)
    assert table.columns[0].missing is missing
    [found] = table.restore(np.array([[np.nan, np.nan]]))[:, 0]
    assert found is missing


def test_two_kinds_of_missing_values_in_one_column_are_refused():
    signature = encoded(objects(), [0])
    mixed = objects([None, math.nan, *COLORS[2:]])
    with pytest.raises(
        UnsupportedPipeline,
        match=r"column 'x0' holds several kinds of missing values \(NoneType, float\); use one",
    ):
        read(signature, mixed)


def test_none_among_numbers_is_nan():
    rows = objects(size=[1, 2, None, 4, 5, 6, 7, np.float32(8)])
    table = read(encoded(objects(), [0]), rows)
    assert table.vocabularies[1] is None
    np.testing.assert_array_equal(table.wide[:, 1], SIZES)


def test_what_is_neither_number_nor_text_is_named():
    signature = encoded(objects(), [0])
    with pytest.raises(UnsupportedPipeline, match="column 'x1' holds a list; turn it into numbers or text"):
        read(signature, objects(size=[[1], *SIZES[1:]]))


def test_unseen_codes_are_restored_as_strangers():
    rows = objects(["", "nan", *COLORS[2:]])
    table = read(encoded(rows, [0]), rows)
    unseen = np.full((200, 2), -1.0)
    found = table.restore(unseen)[:, 0].tolist()
    assert set(found) == set(STRANGERS) - {"", "nan"}
    assert table.restore(unseen)[:, 0].tolist() == found
    assert table.restore(unseen, seed=1)[:, 0].tolist() != found


def test_the_encoders_know_more_than_the_rows():
    rows = objects(["a", "b", "b", "a", None, "b", "a", "b"])
    known = OrdinalEncoder(categories=[["z", "?", "b", "a"]])
    assert read(encoded(rows, [0], known), rows).vocabularies == (("b", "a", "?", "z"), None)


def test_a_fraction_that_only_the_encoder_names_is_known(tmp_path):
    rng = np.random.default_rng(0)
    size = pd.Series(pd.Categorical(rng.choice([0.5, 1.5], 60))).mask(np.arange(60) % 6 == 0)
    X = pd.DataFrame({"a": rng.normal(size=60), "size": size})
    fill = make_pipeline(
        SimpleImputer(strategy="constant", fill_value=0.0), OneHotEncoder(handle_unknown="ignore")
    )
    pipeline = make_pipeline(make_column_transformer((fill, ["size"])), LogisticRegression())
    pipeline.fit(X, size.isna() | (X.a > 1))
    made = convert(pipeline, X, tmp_path / "m.onnx", probes=200)
    zero = pd.DataFrame({"a": [1.0], "size": pd.Categorical([0.0])})
    found = Runtime(made.path).predict({"a": 1.0, "size": 0.0}).score
    assert agrees(found[None], pipeline.predict_proba(zero)).all()


def test_fixed_vocabularies_decide_the_codes():
    rows = objects()
    fixed = (("green", "violet", "red"), None)
    table = read(encoded(rows, [0]), rows, vocabularies=fixed)
    assert table.vocabularies == fixed
    np.testing.assert_array_equal(table.wide[:, 0], [2, -1, -1, 0, np.nan, -1, 2, -1])


def test_numbers_under_a_fixed_vocabulary_are_codes():
    rows = objects([3, 1, 1, 2, None, 1, 3, 9])
    table = read(encoded(rows, [0]), rows, vocabularies=((1, 2, 3), None))
    np.testing.assert_array_equal(table.wide[:, 0], [2, 0, 0, 1, np.nan, 0, 2, -1])


@pytest.mark.parametrize("dtype", ["str", "object", "category", "string"])
def test_a_text_column_of_a_frame_is_restored_in_its_dtype(dtype):
    X = pd.DataFrame({"color": pd.Series(COLORS, dtype=dtype), "size": SIZES})
    fitted = X.assign(color=X["color"].astype(object).fillna("none"))
    table = read(encoded(fitted, ["color"]), X, vocabularies=(("blue", "red", "green"), None))
    np.testing.assert_array_equal(table.wide[:, 0], [1, 0, 0, 2, np.nan, 0, 1, 0])
    pd.testing.assert_frame_equal(table.restore(table.wide), X)


def test_a_pandas_categorical_of_numbers_is_one_of_categories():
    sizes = pd.Series(
        pd.Categorical([10, 20, 20, 10, 20, 20, None, 20], categories=[30, 20, 10], ordered=True)
    )
    X = pd.DataFrame({"color": ["r", "b"] * 4, "size": sizes})
    pipeline = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression()).fit(X, TARGET)
    table = read(read_pipeline(pipeline), X)
    assert (table.vocabularies[1] or ())[:2] == (20, 10)
    pd.testing.assert_frame_equal(table.restore(table.wide), X)


def test_strangers_to_a_pandas_categorical_are_no_missing_values():
    X = pd.DataFrame({"color": pd.Categorical(COLORS), "size": SIZES})
    table = read(encoded(X, ["color"]), X)
    restored = table.restore(np.array([[-1.0, 1.0], [np.nan, 2.0], [0.0, 3.0]]))["color"]
    assert restored.isna().tolist() == [False, True, False]
    assert restored[0] in STRANGERS
    assert restored[2] == "blue"
    assert restored.cat.categories.tolist() == ["blue", "green", "red", restored[0]]


def test_a_frame_with_categories_is_converted(tmp_path):
    rng = np.random.default_rng(0)
    X = pd.DataFrame(
        {
            "color": pd.Categorical(rng.choice(["red", "blue", "green"], 120)),
            "site": rng.choice(["north", "south"], 120),
            "size": rng.normal(size=120),
        }
    )
    encoder = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["color", "site"]), remainder=StandardScaler()
    )
    y = (X["size"] + (X["color"] == "red") > 0.4).to_numpy()
    artifact = convert(
        make_pipeline(encoder, LogisticRegression()).fit(X, y), X, tmp_path / "m.onnx", probes=500
    )
    color, site, size = artifact.manifest.features
    assert (color.kind, set(color.vocabulary), color.unseen) == ("category", {"red", "blue", "green"}, True)
    assert (site.kind, set(site.vocabulary), site.unseen) == ("category", {"north", "south"}, True)
    assert (size.kind, size.vocabulary) == ("number", ())


# --- what is wrong with rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (5,), (3, 4), (2, 5, 1)])
def test_shapes_that_do_not_fit(forest, shape):
    with pytest.raises(InputError, match=r"the pipeline takes \(n, 5\)"):
        read(forest, np.zeros(shape))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.asarray, frame, lambda rows: rows.astype(object)])
def test_infinite_values_are_pointed_at(linear, X, value, kind):
    rows = X.copy()
    rows[7, 3] = value
    with pytest.raises(
        InputError, match=r"column '(x3|x y)', row 7 is infinite; drop or replace it"
    ) as caught:
        read(linear, kind(rows))
    assert caught.value.reason == "non_finite"


def test_what_float32_cannot_hold_is_left_to_float64(linear, X):
    rows = X.copy()
    rows[7, 3] = 1e300
    table = read(linear, rows)
    assert np.isinf(table.rows("float32")[7, 3])
    assert table.rows("float64")[7, 3] == 1e300


def test_the_training_digest_tells_data_apart_and_dtypes_together(forest, X):
    table = read(forest, X)
    digest = training_digest(table, None)
    assert training_digest(read(forest, X.astype(np.float32)), None) == digest
    y = classes_of(X, 2)
    labelled = {
        training_digest(table, y),
        training_digest(table, y == 1),
        training_digest(table, y.astype(np.int8)),
    }
    assert len(labelled) == 1
    text = training_digest(table, y.astype(str))
    other = X.copy()
    other[0, 0] += 1
    assert len({digest, *labelled, text, training_digest(read(forest, other), None)}) == 4
    assert training_digest(table, np.array(["ab", "c"] * 40)) != training_digest(
        table, np.array(["a", "bc"] * 40)
    )
    with pytest.raises(InputError, match="y has 3 values for 80 rows"):
        training_digest(table, [0, 1, 0])


def test_the_training_digest_tells_vocabularies_apart():
    rows, other = objects(), objects(["rot" if color == "red" else color for color in COLORS])
    tables = [read(encoded(each, [0]), each) for each in (rows, other)]
    np.testing.assert_array_equal(tables[0].wide, tables[1].wide)
    assert training_digest(tables[0], None) != training_digest(tables[1], None)


def test_the_spread_of_a_column_without_values_is_zero():
    rows = np.array([[1.0, np.nan, 2.0], [3.0, np.nan, np.inf]])
    assert spread(rows).tolist() == [1.0, 0.0, 0.0]


def test_a_sparse_matrix_is_refused_with_a_remedy(X):
    pipeline = LogisticRegression().fit(X, classes_of(X, 2))
    with pytest.raises(UnsupportedPipeline, match=r"sparse matrix.*pass X\.toarray\(\)"):
        read(read_pipeline(pipeline), csr_matrix(X))


def test_gaps_of_a_masked_array_are_the_callers_to_fill(forest, X):
    with pytest.raises(InputError, match=r"masked array; pass X.filled\(numpy.nan\)"):
        read(forest, np.ma.masked_greater(X, 3))


def test_rows_of_different_lengths_are_no_table(forest):
    with pytest.raises(InputError, match="give every row the same number of values"):
        read(forest, [[1, 2, 3, 4, 5], [1, 2]])


@pytest.mark.parametrize("kind", [OneHotEncoder, OrdinalEncoder])
def test_truth_values_among_objects_are_categories_to_an_encoder(kind, tmp_path):
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=60), "on": pd.Series(rng.random(60) > 0.5, dtype=object)})
    encode = make_column_transformer((kind(), ["on"]), remainder="passthrough")
    pipeline = make_pipeline(encode, LogisticRegression()).fit(X, X.on.astype(bool))
    made = convert(pipeline, X, tmp_path / "m.onnx", probes=200)
    assert set(made.manifest.features[1].vocabulary) == {False, True}
    found = Runtime(made.path).predict(X)
    assert agrees(found.score, pipeline.predict_proba(X)).all()


def test_whole_numbers_among_objects_are_categories_to_an_encoder(tmp_path):
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"a": rng.normal(size=60), "k": pd.Series(rng.integers(0, 4, 60), dtype=object)})
    encode = make_column_transformer((OneHotEncoder(), ["k"]), remainder="passthrough")
    pipeline = make_pipeline(encode, LogisticRegression()).fit(X, X.a > 0)
    made = convert(pipeline, X, tmp_path / "m.onnx", probes=200)
    assert agrees(Runtime(made.path).predict(X).score, pipeline.predict_proba(X)).all()
