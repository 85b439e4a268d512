"""Training rows that bear witness to a split: they reach it, and its verdict changes the tree's answer.

A row that turns off before a split proves nothing about its threshold. Neither does a row that ends in equal leaves
whichever way the split sends it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from converters.lowering.folding import LARGEST_KEYS, Keys, float_of, key_of
from converters.lowering.graph import Ensemble
from converters.table import Rows
from edge_runtime.contract.manifest import TOLERANCE

MAX_ROWS: Final = 20_000
_MIN_ROWS: Final = 256
_STEPS: Final = 20_000_000  # rows times trees times levels: some two seconds
_TRIES: Final = 32
_BLOCK: Final = 500_000  # rows times trees on their way at once

Index = NDArray[np.int64]
Flags = NDArray[np.bool_]


def beside(
    key: Keys, offset: int, missing: Flags, dtype: str | np.dtype[np.floating] = "float32"
) -> NDArray[np.floating]:
    """(S,) the value ``offset`` floats above each threshold ``key``; at most 0 goes left, above 0 right.

    A split that sends all numbers one way can only tell them from NaN: beyond its threshold stands NaN where the column
    may be ``missing``, and 0 stands for the numbers.
    """
    largest = LARGEST_KEYS[np.dtype(dtype).name]
    numbers_go_left = key >= largest
    one_way = numbers_go_left | (key < -largest)
    values = float_of(np.clip(np.where(one_way, 0, key) + offset, -largest, largest), dtype)
    nan = one_way & missing & (numbers_go_left == (offset > 0))
    return np.where(nan, np.nan, np.where(one_way, 0.0, values)).astype(dtype)


def find(ensemble: Ensemble, rows: Rows, missing: Flags) -> tuple[Index, Flags]:
    """A witness for every inner node (S,), in the order of the nodes, and whether it is decisive (S,).

    The witness is an index into ``rows`` (n, F), -1 where no row looked at reaches the node. At most `MAX_ROWS` rows,
    evenly spread, are looked at, fewer when the trees are many and deep, and of those that reach a node up to 32
    are tried. ``missing`` (F,) says which columns may hold NaN.
    """
    inner = np.flatnonzero(ensemble.left >= 0)
    roots = np.flatnonzero(np.r_[True, np.diff(ensemble.tree) != 0])
    depth = _depths(ensemble, roots)
    per_row = len(roots) * (int(depth.max(initial=0)) + 1)
    looked_at = min(len(rows), MAX_ROWS, max(_MIN_ROWS, _STEPS // per_row))
    picked = np.linspace(0, len(rows) - 1, looked_at).astype(np.int64)
    seen = rows[picked]
    kept, count = _visitors(ensemble, roots, seen, depth)
    witness, decisive = _decide(ensemble, roots, kept[inner], count[inner], seen, missing)
    return np.where(witness >= 0, picked[witness], -1), decisive


def _depths(ensemble: Ensemble, roots: Index) -> Index:
    """(N,) how far every node is from its root."""
    depth = np.zeros(len(ensemble.left), np.int64)
    level, number = roots, 0
    while level.size:
        depth[level] = number
        open_ = level[ensemble.left[level] >= 0]
        level = np.concatenate([ensemble.left[open_], ensemble.right[open_]])
        number += 1
    return depth


def _down(ensemble: Ensemble, node: Index, rows: Rows, at: Index) -> Index:
    """The leaf (m,) where ``rows[at]`` (m,) end when they start at ``node`` (m,)."""
    node = node.copy()
    open_ = np.flatnonzero(ensemble.left[node] >= 0)
    while open_.size:
        here = node[open_]
        value = rows[at[open_], ensemble.feature[here]]
        left = np.where(np.isnan(value), ensemble.missing_left[here], value <= ensemble.threshold[here])
        node[open_] = np.where(left, ensemble.left[here], ensemble.right[here])
        open_ = open_[ensemble.left[node[open_]] >= 0]
    return node


def _visitors(ensemble: Ensemble, roots: Index, seen: Rows, depth: Index) -> tuple[NDArray[np.int32], Index]:
    """For every node up to `_TRIES` rows that pass it: (N, tries) int32, -1 where there are no more, and how many.

    The rows are kept per leaf first and then handed up, level by level, taking from both sides in turn.
    """
    total = len(ensemble.left)
    kept = np.full((total, _TRIES), -1, np.int32)
    count = np.zeros(total, np.int64)
    block = max(1, _BLOCK // max(1, len(seen)))
    for start in range(0, len(roots), block):
        part = roots[start : start + block]
        at = np.tile(np.arange(len(seen)), len(part))
        leaf = _down(ensemble, np.repeat(part, len(seen)), seen, at)
        order = np.argsort(leaf, kind="stable")
        leaf, at = leaf[order], at[order]
        place = np.arange(len(leaf)) - np.searchsorted(leaf, leaf)
        few = place < _TRIES
        kept[leaf[few], place[few]] = at[few]
        count += np.bincount(leaf[few], minlength=total)
    for level in range(int(depth.max(initial=0)) - 1, -1, -1):
        node = np.flatnonzero((depth == level) & (ensemble.left >= 0))
        sides = (ensemble.left[node], ensemble.right[node])
        both = np.stack([kept[sides[0]], kept[sides[1]]], axis=2).reshape(len(node), 2 * _TRIES)
        order = np.argsort(both < 0, axis=1, kind="stable")[:, :_TRIES]
        kept[node] = np.take_along_axis(both, order, axis=1)
        count[node] = np.minimum(count[sides[0]] + count[sides[1]], _TRIES)
    return kept, count


def _decide(  # noqa: PLR0917 - what a split is tried with
    ensemble: Ensemble, roots: Index, kept: NDArray[np.int32], count: Index, seen: Rows, missing: Flags
) -> tuple[Index, Flags]:
    inner = np.flatnonzero(ensemble.left >= 0)
    feature, root = ensemble.feature[inner], roots[ensemble.tree[inner]]
    key = key_of(ensemble.threshold[inner])
    sides = [beside(key, offset, missing[feature], seen.dtype) for offset in (0, 1)]
    witness = np.where(count > 0, kept[:, 0].astype(np.int64), -1)
    decisive = np.zeros(len(inner), np.bool_)
    for turn in range(_TRIES):
        left = np.flatnonzero(~decisive & (turn < count))
        for start in range(0, len(left), _BLOCK):
            split = left[start : start + _BLOCK]
            at = np.arange(len(split))
            candidate = kept[split, turn].astype(np.int64)
            leaves = []
            for side in sides:
                trial = seen[candidate]
                trial[at, feature[split]] = side[split]
                # From the root: with another value the row may turn off before the split.
                leaves.append(_down(ensemble, root[split], trial, at))
            change = np.abs(ensemble.value[leaves[0]] - ensemble.value[leaves[1]]).max(axis=1)
            found = change > TOLERANCE
            witness[split[found]] = candidate[found]
            decisive[split[found]] = True
    return witness, decisive
