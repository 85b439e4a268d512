"""`RandomTreesEmbedding`: every row in the leaves that scikit-learn finds, on both sides of every split."""

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomTreesEmbedding
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from converters.lowering.graph import Lowering
from converters.lowering.rules import RULES
from tests.support import lowered

IRIS, SPECIES = load_iris(return_X_y=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_estimators": 3, "sparse_output": False},
        {"n_estimators": 2, "max_depth": 1},
        {"n_estimators": 20},
    ],
    ids=lowered.named,
)
def test_a_row_falls_into_the_leaves_that_scikit_learn_finds(options):
    fitted = RandomTreesEmbedding(random_state=0, **options).fit(IRIS)
    thresholds = np.concatenate(
        [tree.tree_.threshold[tree.tree_.feature >= 0] for tree in fitted.estimators_]
    )
    columns = np.concatenate([tree.tree_.feature[tree.tree_.feature >= 0] for tree in fitted.estimators_])
    rows = IRIS[np.arange(len(columns)) % len(IRIS)].astype(np.float32)
    near = thresholds.astype(np.float32)
    beside = [np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf)]
    for values in (near, *beside):
        rows[np.arange(len(rows)), columns] = values
        wanted = fitted.transform(rows.astype(np.float64))
        wanted = wanted if isinstance(wanted, np.ndarray) else wanted.toarray()
        found = lowered.transform(fitted, rows)
        assert (found == wanted).all()
        assert (found.sum(axis=1) == len(fitted.estimators_)).all()


def test_a_tree_that_does_not_split_has_one_leaf():
    fitted = RandomTreesEmbedding(2, max_depth=1, min_samples_leaf=100, random_state=0).fit(IRIS)
    assert (lowered.transform(fitted, IRIS[:3]) == np.ones((3, 2))).all()


def test_scalers_before_the_trees_fold_into_their_splits():
    model = make_pipeline(StandardScaler(), RandomTreesEmbedding(5, random_state=0), LogisticRegression())
    found = lowered.assert_equal(model.fit(IRIS, SPECIES), IRIS)
    assert len(found.lowering.ensembles) == 1
    g = Lowering(width=4, dtype="float32", rules=RULES)
    assert g.call(model[:2], "transform", g.start()).width == model[:2].transform(IRIS).shape[1]
