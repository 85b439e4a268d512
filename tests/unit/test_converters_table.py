"""Training rows: arrays, data frames, and what is wrong with them."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from converters import convert
from converters.signature import read as read_pipeline
from converters.table import read, spread, training_digest
from edge_runtime.contract.errors import InputError, UnsupportedPipeline
from tests.parity.cases import classes_of, scaled_integers

NAMES = ("temp", "rpm", "volt", "x y", "ß")


class Frame:
    """The little of a data frame that is used: names, columns by name, and the whole as an array."""

    def __init__(self, columns):
        self._columns = columns
        self.columns = list(columns)

    def __getitem__(self, name):
        return self._columns[name]

    def __array__(self, dtype=None, copy=None):
        return np.stack(list(self._columns.values()), axis=1).astype(dtype or np.float64)


def frame(X, names=NAMES):
    return Frame({name: X[:, j] for j, name in enumerate(names)})


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
    assert table.rows.dtype == np.float32
    assert not table.missing.any()
    np.testing.assert_array_equal(table.rows, X.astype(np.float32))


def test_a_frame_keeps_its_names(forest, X):
    assert read(forest, frame(X)).names == NAMES


def test_a_pipeline_fitted_on_a_frame_is_proven_without_warnings(X, tmp_path):
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=0)).fit(
        X, classes_of(X, 2)
    )
    pipeline[0].feature_names_in_ = np.array(NAMES, dtype=object)
    artifact = convert(pipeline, frame(X), tmp_path / "m.onnx", probes=500)
    assert tuple(feature.name for feature in artifact.manifest.features) == NAMES
    assert convert(pipeline, X, tmp_path / "n.onnx", probes=500).digest == artifact.digest


def test_a_real_data_frame(tmp_path):
    pandas = pytest.importorskip("pandas")
    X = pandas.DataFrame(scaled_integers(80), columns=list(NAMES))
    X["ß"] = X["ß"] > 0
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, classes_of(X.to_numpy(float), 2))
    artifact = convert(pipeline, X, tmp_path / "m.onnx", probes=500)
    assert tuple(feature.name for feature in artifact.manifest.features) == NAMES


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


def test_text_columns_are_named(forest, X):
    columns = {name: X[:, j] for j, name in enumerate(NAMES)} | {"volt": np.array(["high"] * len(X))}
    with pytest.raises(UnsupportedPipeline, match="column 'volt' is not numeric"):
        read(forest, Frame(columns))
    with pytest.raises(UnsupportedPipeline, match="not a table of numbers"):
        read(forest, [["a", "b", "c", "d", "e"]])


@pytest.mark.parametrize("shape", [(0, 5), (5,), (3, 4), (2, 5, 1)])
def test_shapes_that_do_not_fit(forest, shape):
    with pytest.raises(InputError, match=r"the pipeline takes \(n, 5\)"):
        read(forest, np.zeros(shape))


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        (np.inf, "non_finite", "column 'x3', row 7 is infinite"),
        (1e300, "non_finite", "column 'x3', row 7 is too large for float32"),
        (np.nan, "missing", "column 'x3', row 7 is NaN, and LogisticRegression takes no missing values"),
    ],
)
def test_bad_values_are_pointed_at(linear, X, value, reason, message):
    rows = X.copy()
    rows[7, 3] = value
    with pytest.raises(InputError, match=message) as caught:
        read(linear, rows)
    assert caught.value.reason == reason


def test_missing_values_are_declared_by_column(forest, X):
    rows = X.copy()
    rows[7, 3] = np.nan
    assert read(forest, rows).missing.tolist() == [False, False, False, True, False]


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


def test_the_spread_of_a_column_without_values_is_zero():
    rows = np.array([[1.0, np.nan, 2.0], [3.0, np.nan, np.inf]])
    assert spread(rows).tolist() == [1.0, 0.0, 0.0]
