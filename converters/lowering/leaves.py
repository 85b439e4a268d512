"""`RandomTreesEmbedding`: which leaf a row falls into, tree by tree, as columns of 0 and 1."""

from __future__ import annotations

import numpy as np
from sklearn.ensemble import RandomTreesEmbedding

from converters.lowering.graph import Lowering, Value
from converters.lowering.rules import rule
from converters.lowering.trees import grown, place, sums


@rule("transform", RandomTreesEmbedding)
def _embedded(g: Lowering, fitted: RandomTreesEmbedding, x: Value) -> Value:
    """Every tree has a column of its own for the sums, so that a leaf's number is alone in it and exact."""
    members = [member.tree_ for member in fitted.estimators_]
    values = []
    for t, tree in enumerate(members):
        number = np.zeros((tree.node_count, len(members)))
        number[:, t] = np.arange(tree.node_count)
        values.append(number)
    found = sums(g, place(g, fitted, x, grown(members, values), narrow=True))
    leaves = fitted.one_hot_encoder_.categories_
    owner = np.repeat(np.arange(len(leaves)), [len(each) for each in leaves])
    numbers = np.concatenate(leaves).astype(np.float64)
    return g.cast(g.binary("Equal", g.select(found, owner), numbers[None, :]), "float64")
