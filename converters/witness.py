"""Training rows that bear witness to a split: they reach it, and its verdict changes the tree's answer.

A row that turns off before a split proves nothing about its threshold. Neither does a row that ends in equal leaves
whichever way the split sends it.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from converters.rewrite import LARGEST_KEY, Folded, Splits, float_of, key_of
from converters.signature import trees
from converters.table import Rows
from edge_runtime.contract.manifest import TOLERANCE

MAX_ROWS: Final = 20_000
_TRIES: Final = 32


def beside(key: NDArray[np.int64], offset: int, missing: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(S,) the value ``offset`` float32 values above each threshold ``key``; at most 0 goes left, above 0 right.

    A split that sends all numbers one way can only tell them from NaN: beyond its threshold stands NaN where the column
    may be ``missing``, and 0 stands for the numbers.
    """
    values = float_of(np.clip(key + offset, -LARGEST_KEY, LARGEST_KEY))
    numbers_go_left = key >= LARGEST_KEY
    one_way = numbers_go_left | (key < -LARGEST_KEY)
    nan = one_way & missing & (numbers_go_left == (offset > 0))
    return np.where(nan, np.float32(np.nan), np.where(one_way, np.float32(0.0), values))


def find(
    folded: Folded, splits: Splits, rows: Rows, missing: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """A witness for every split (S,), and whether it is decisive (S,).

    The witness is an index into ``rows`` (n, F), -1 where no row looked at reaches the split. At most `MAX_ROWS` rows,
    evenly spread, are looked at, and of those that reach a split up to 32 are tried. ``missing`` (F,) says which
    columns may hold NaN.
    """
    members = trees(folded.estimator)
    picked = np.linspace(0, len(rows) - 1, min(len(rows), MAX_ROWS)).astype(np.int64)
    seen = rows[picked]
    witness = np.full(len(splits.node), -1, np.int64)
    decisive = np.zeros(len(splits.node), np.bool_)
    bounds = np.searchsorted(splits.tree, np.arange(len(members) + 1))
    for tree, start, stop in zip(members, bounds[:-1], bounds[1:], strict=True):
        part = slice(int(start), int(stop))
        witness[part], decisive[part] = _in_tree(
            tree,
            splits.node[part],
            splits.feature[part],
            _sides(key_of(splits.threshold[part]), missing[splits.feature[part]]),
            seen,
            visible=TOLERANCE * len(members),
        )
    return np.where(witness >= 0, picked[witness], -1), decisive


def _sides(key: NDArray[np.int64], missing: NDArray[np.bool_]) -> tuple[Rows, Rows]:
    return beside(key, 0, missing), beside(key, 1, missing)


def _in_tree(
    tree: Any,
    node: NDArray[np.int64],
    feature: NDArray[np.int64],
    sides: tuple[Rows, Rows],
    seen: Rows,
    *,
    visible: float,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    visitors = tree.decision_path(seen).tocsc()
    first = visitors.indptr[node]
    count = visitors.indptr[node + 1] - first
    witness = np.full(len(node), -1, np.int64)
    reached = count > 0
    witness[reached] = visitors.indices[first[reached]]
    decisive = np.zeros(len(node), np.bool_)
    for turn in range(_TRIES):
        left = np.flatnonzero(~decisive & (turn < count))
        if not left.size:
            break
        spread_out = turn * count[left] // np.minimum(count[left], _TRIES)
        candidate = visitors.indices[first[left] + spread_out]
        answer = []
        for side in sides:
            trial = seen[candidate]
            trial[np.arange(len(left)), feature[left]] = side[left]
            answer.append(tree.predict(trial).reshape(len(left), -1))
        changes = np.abs(answer[0] - answer[1]).max(axis=1) > visible
        witness[left[changes]] = candidate[changes]
        decisive[left[changes]] = True
    return witness, decisive
