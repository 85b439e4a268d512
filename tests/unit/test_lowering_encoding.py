"""Encoders of categories: the graph makes the columns that scikit-learn makes, for values it knows and does not."""

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler, TargetEncoder

from converters.lowering.graph import Lowering
from converters.lowering.rules import RULES
from converters.signature import by_position
from edge_runtime.contract.errors import UnsupportedPipeline
from tests.support import lowered

NUMBERS = np.array(
    [
        [3.0, 0.1],
        [1.0, 7.0],
        [3.0, 7.0],
        [2.0, 0.1],
        [3.0, -1.5],
        [1.0, 7.0],
        [5.0, 7.0],
        [3.0, 0.1],
        [2.0, 7.0],
    ]
)
WORDS = np.array(
    [
        ["a", True],
        ["b", False],
        ["a", False],
        ["c", True],
        ["a", True],
        ["b", True],
        ["d", False],
        ["a", True],
    ],
    dtype=object,
)
VOCABULARIES = (("z", "a", "b", "c", "d"), (False, True))
ONE_HOT = [
    {"handle_unknown": "ignore"},
    {"handle_unknown": "ignore", "sparse_output": False, "dtype": np.float32},
    {"handle_unknown": "ignore", "drop": "first"},
    {"handle_unknown": "ignore", "drop": "if_binary"},
    {"handle_unknown": "ignore", "min_frequency": 2},
    {"handle_unknown": "ignore", "max_categories": 2, "drop": "first"},
    {"handle_unknown": "infrequent_if_exist", "min_frequency": 2},
    {"handle_unknown": "infrequent_if_exist", "max_categories": 3},
    {"handle_unknown": "warn", "min_frequency": 3, "drop": "if_binary"},
]
ORDINAL = [
    {"handle_unknown": "use_encoded_value", "unknown_value": -1},
    {"handle_unknown": "use_encoded_value", "unknown_value": np.nan},
    {"handle_unknown": "use_encoded_value", "unknown_value": -5, "encoded_missing_value": -2},
    {"handle_unknown": "use_encoded_value", "unknown_value": 99, "min_frequency": 2},
    {"handle_unknown": "use_encoded_value", "unknown_value": 99, "max_categories": 2, "dtype": np.int32},
]
ENCODERS = [(OneHotEncoder, each) for each in ONE_HOT] + [(OrdinalEncoder, each) for each in ORDINAL]


def answers(encoder, rows):
    with by_position():
        made = encoder.transform(rows)
    return np.asarray(made.toarray() if hasattr(made, "toarray") else made, np.float64)


def around(values):
    """Each value, its float32 neighbours, what is known of no category, and NaN."""
    exact = np.unique(values.astype(np.float32))
    near = np.concatenate([np.nextafter(exact, np.float32(-np.inf)), np.nextafter(exact, np.float32(np.inf))])
    odd = np.array([0.0, -0.0, 1e30, -1e30, 1e-45, np.nan], np.float32)
    return np.concatenate([exact, near, odd]).astype(np.float64)


def numbers(values):
    tried = around(values)
    return np.column_stack([tried, np.roll(tried, 3)])


def coded(rows, vocabularies=VOCABULARIES):
    """Codes of rows of Python values: -1 for those outside of the vocabulary, NaN for None and NaN."""

    def code(value, vocabulary):
        if value is None or value != value:
            return np.nan
        return float(vocabulary.index(value)) if value in vocabulary else -1.0

    return np.array([[code(value, vocabularies[j]) for j, value in enumerate(row)] for row in rows])


@pytest.mark.parametrize(("kind", "options"), ENCODERS)
@pytest.mark.parametrize("missing", [False, True])
def test_numbers_are_found_by_equality(kind, options, missing):
    if missing and "int" in str(options.get("dtype")):
        options = options | {"encoded_missing_value": -7}
    fitted_on = NUMBERS.astype(np.float32).astype(np.float64)
    if missing:
        fitted_on = np.vstack([fitted_on, [[np.nan, np.nan]] * 2])
    encoder = kind(**options).fit(fitted_on)
    rows = numbers(fitted_on[~np.isnan(fitted_on)])
    np.testing.assert_array_equal(lowered.transform(encoder, rows), answers(encoder, rows))
    np.testing.assert_array_equal(lowered.transform(encoder, rows, "float64"), answers(encoder, rows))


@pytest.mark.parametrize(("kind", "options"), ENCODERS)
@pytest.mark.parametrize("missing", [[], [None, None], [np.nan, np.nan]])
def test_codes_are_looked_up(kind, options, missing):
    if missing and "int" in str(options.get("dtype")):
        options = options | {"encoded_missing_value": -7}
    fitted_on = np.vstack([WORDS, np.array([missing] * 2, dtype=object)]) if missing else WORDS
    encoder = kind(**options).fit(fitted_on)
    rows = np.array(
        [*WORDS.tolist(), ["z", True], ["never", False], ["a", "never"], missing or ["b", None]], object
    )
    made = lowered.transform(encoder, coded(rows), vocabularies=VOCABULARIES)
    np.testing.assert_array_equal(made, answers(encoder, rows))


@pytest.mark.parametrize("kind", [OneHotEncoder, OrdinalEncoder])
def test_known_values_where_others_are_refused(kind):
    encoder = kind().fit(WORDS)
    made = lowered.transform(encoder, coded(WORDS), vocabularies=VOCABULARIES)
    np.testing.assert_array_equal(made, answers(encoder, WORDS))
    encoder = kind().fit(NUMBERS.astype(np.float32).astype(float))
    rows = NUMBERS.astype(np.float32).astype(float)
    np.testing.assert_array_equal(lowered.transform(encoder, rows), answers(encoder, rows))


@pytest.mark.parametrize("kind", [OneHotEncoder, OrdinalEncoder])
def test_a_vocabulary_wider_than_the_categories(kind):
    encoder = kind(categories=[["b", "a"], [True, False]]).fit(WORDS[:3])
    made = lowered.transform(encoder, coded(WORDS[:3]), vocabularies=VOCABULARIES)
    np.testing.assert_array_equal(made, answers(encoder, WORDS[:3]))


@pytest.mark.parametrize(
    "target",
    [
        np.linspace(-3, 5, 8),
        np.array(["no", "yes", "no", "no", "yes", "yes", "no", "yes"]),
        np.array(["x", "y", "z", "z", "y", "x", "x", "y"]),
    ],
)
@pytest.mark.parametrize("smooth", ["auto", 3.0])
def test_targets_are_averaged(target, smooth):
    encoder = TargetEncoder(smooth=smooth).fit(WORDS, target)
    rows = np.array([*WORDS.tolist(), ["z", True], ["never", False], ["a", "never"], [None, True]], object)
    made = lowered.transform(encoder, coded(rows), vocabularies=VOCABULARIES)
    np.testing.assert_array_equal(made, answers(encoder, rows))
    encoder = TargetEncoder(smooth=smooth).fit(NUMBERS[:8].astype(np.float32).astype(float), target)
    rows = numbers(NUMBERS)
    np.testing.assert_array_equal(lowered.transform(encoder, rows), answers(encoder, rows))


def test_text_and_numbers_in_one_table():
    frame = pd.DataFrame({"size": np.arange(8.0), "kind": WORDS[:, 0], "grade": [1.0, 2, 1, 2, 3, 3, 1, 2]})
    pipeline = make_pipeline(
        ColumnTransformer(
            [
                ("kinds", OneHotEncoder(handle_unknown="ignore"), ["kind", "grade"]),
                ("sizes", StandardScaler(), ["size"]),
            ]
        ),
        LogisticRegression(),
    ).fit(frame, [0, 1, 2, 0, 1, 2, 0, 1])
    vocabularies = (None, VOCABULARIES[0], None)
    more = pd.concat([frame, pd.DataFrame({"size": [2.5], "kind": ["new"], "grade": [2.5]})])
    packed = more.assign(kind=coded(more[["kind"]].to_numpy(), VOCABULARIES[:1])).to_numpy(float)
    found = lowered.run(pipeline, packed, vocabularies=vocabularies)
    np.testing.assert_allclose(found.scores, pipeline.predict_proba(more), rtol=1e-6, atol=1e-7)
    assert (found.labels == pipeline.predict(more)).all()


def test_the_proof_learns_where_categories_are():
    encoder = OneHotEncoder(handle_unknown="ignore").fit(NUMBERS)
    g = Lowering(width=2, dtype="float64", rules=RULES)
    g.call(encoder, "transform", g.start())
    noted = {column: set(values) for column, values in g.edges}
    assert noted == {0: {1.0, 2.0, 3.0, 5.0}, 1: {-1.5, 0.1, 7.0}}


def test_what_cannot_be_told_apart_is_refused():
    both = np.array([["a"], [None], [np.nan]], dtype=object)
    encoder = OneHotEncoder(handle_unknown="ignore").fit(both)
    with pytest.raises(UnsupportedPipeline, match="None from NaN"):
        lowered.transform(encoder, np.zeros((1, 1)), vocabularies=(("a",),))
    encoder = OneHotEncoder(handle_unknown="ignore").fit(WORDS)
    with pytest.raises(UnsupportedPipeline, match="column 0"):
        lowered.transform(encoder, np.zeros((1, 2)))
    with pytest.raises(UnsupportedPipeline, match="keeps no column"):
        lowered.transform(OneHotEncoder(drop="first").fit([[1.0], [1.0]]), np.ones((1, 1)))
