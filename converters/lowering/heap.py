"""Which of equally far rows a search keeps: scikit-learn's bounded heap, unrolled.

A search of k rows hands every row it meets, in order, to a heap of the k nearest so far
(``sklearn/utils/_heap.pyx``). A row as far as the farthest of them is turned away, so at first those that came first
stay; but a nearer row that comes later pushes out the one on top of the heap, and which of several equally far ones
that is depends on all that went before. So the heap itself is in the graph: ten nodes or so for each row it is handed.

Few rows have to be handed to it. One that finds k rows before it that are as near is turned away and changes nothing;
so a first pass through the rows in blocks keeps those nearer than the k-th of the blocks before, a few for each
doubling of the training set (`Plan`). Rows beyond the room that the plan has are left out, those that came first and
lie beyond the k-th: then the k nearest are still found, but a tie among them may fall otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from converters.lowering.graph import Dtype, Lowering, Shape, Value, Wide

MAX_NODES: Final = 4096
"""Nodes that the pushes of one search may take, some three milliseconds."""

_MARGIN: Final = 1.2
_SIZES: Final = (8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rows are sifted before they are handed to the heap.

    Attributes:
        blocks: ends of the blocks; all rows of the first are handed on.
        room: how many rows of the other blocks are handed on at most.
    """

    blocks: tuple[int, ...]
    room: int

    @property
    def pushes(self) -> int:
        """Rows handed to the heap."""
        return self.blocks[0] + self.room


def plan(arrivals: Wide, count: int) -> Plan | None:
    """The cheapest plan with room for the searches seen; None where the heap would take more than `MAX_NODES`.

    ``arrivals`` (m, P) are distances of m queries to the training rows in the order in which each search meets them.
    """
    total = arrivals.shape[1]
    found = [Plan((total,), 0)]
    for size in _SIZES:
        first = max(size, count)
        uniform = range(first, total, first)
        doubling = [first << i for i in range(total.bit_length()) if first << i < total]
        for ends in (tuple(uniform), tuple(doubling)):
            if ends and len(ends) <= _SIZES[-1]:
                blocks = (*ends, total)
                room = int(np.ceil(_MARGIN * _candidates(arrivals, blocks, count))) + count
                found.append(Plan(blocks, min(room, total - first)))
    cheapest = min(found, key=lambda each: _cost(each, count))
    return cheapest if _cost(cheapest, count) <= MAX_NODES else None


def _cost(each: Plan, count: int) -> int:
    return each.pushes * (6 + 2 * count.bit_length()) + 3 * len(each.blocks)


def _candidates(arrivals: Wide, blocks: tuple[int, ...], count: int) -> int:
    """How many rows beyond the first block one of the queries hands on."""
    handed = np.zeros(len(arrivals), np.int64)
    nearest = np.sort(arrivals[:, : blocks[0]], axis=1)[:, :count]
    for start, end in pairwise(blocks):
        block = arrivals[:, start:end]
        handed += (block < nearest[:, -1:]).sum(axis=1)
        nearest = np.sort(np.concatenate([nearest, block], axis=1), axis=1)[:, :count]
    return int(handed.max(initial=0))


def survivors(g: Lowering, arrived: Value, count: int, sieve: Plan) -> tuple[Value, Value]:
    """(n, k) distances and int64 places in ``arrived`` (n, P), distances in order of arrival, of the rows kept.

    Infinite distances are never kept while there are others; where they are, the place means nothing.
    """
    places: Value | None = None
    handed = arrived
    if len(sieve.blocks) > 1:
        places, handed = _sift(g, arrived, count, sieve)
    kept = _pushed(g, handed, count)
    distances = g.node("GatherElements", [handed, kept], (None, count), axis=1)
    if places is not None:
        kept = g.node("GatherElements", [places, kept], (None, count), "int64", axis=1)
    return distances, kept


def smallest(g: Lowering, x: Value, count: int) -> tuple[Value, Value]:
    """(n, k) the smallest of each row in order, and their int64 places; of equal ones the first come first."""
    outputs: list[tuple[Shape, Dtype]] = [((None, count), x.dtype), ((None, count), "int64")]
    values, places = g.node_many("TopK", [x, np.array([count])], outputs, axis=1, largest=0, sorted=1)
    return values, places


def _part(g: Lowering, x: Value, start: int, end: int) -> Value:
    bounds = [np.array([each]) for each in (start, end, 1)]
    return g.node("Slice", [x, *bounds], (None, end - start), x.dtype)


def _sift(g: Lowering, arrived: Value, count: int, sieve: Plan) -> tuple[Value, Value]:
    """(n, L) places in order of arrival and distances of the rows handed on; infinite where there are fewer."""
    first, total = sieve.blocks[0], sieve.blocks[-1]
    head = _part(g, arrived, 0, first)
    running, limits = smallest(g, head, count)[0], []
    for start, end in pairwise(sieve.blocks):
        limits.append(g.select(running, [count - 1]))
        running = smallest(g, g.concat([running, _part(g, arrived, start, end)]), count)[0]
    block = np.searchsorted(sieve.blocks, np.arange(first, total), side="right") - 1
    limit = g.node("Gather", [g.concat(limits), block], (None, total - first), axis=1)
    later, kth = _part(g, arrived, first, total), g.select(running, [count - 1])
    # In order of importance: the nearer ones, the first of those as far as the k-th, the last of the rest.
    at = np.arange(first, total, dtype=np.float64)[None]
    rest = g.where(g.binary("Greater", later, kth), 3.0 * total - at, at)
    rest = g.where(g.binary("Less", later, limit), rest, np.full((1, 1), 4.0 * total))
    rank = g.where(g.binary("Less", later, kth), at - total, rest)
    worth, found = smallest(g, rank, sieve.room)
    place = g.add(found, np.full((1, 1), first))
    none = np.full((1, 1), total)
    place = smallest(g, g.where(g.binary("Less", worth, 4.0 * total), place, none), sieve.room)[0]
    inside = g.where(g.binary("Less", place, none), place, np.zeros((1, 1), np.int64))
    distance = g.node("GatherElements", [arrived, inside], (None, sieve.room), axis=1)
    distance = g.where(g.binary("Less", place, none), distance, np.full((1, 1), np.inf))
    # The same for every row, but as many rows as there are queries.
    ahead = g.add(g.mul(g.select(place, [0]), np.zeros((1, 1), np.int64)), np.arange(first)[None])
    return g.concat([ahead, inside]), g.concat([head, distance])


def _pushed(g: Lowering, handed: Value, count: int) -> Value:
    """(n, k) int64: which of ``handed`` (n, L) are in the heap at the end.

    A number stands for each row: its rank among the distances times 2L, and its place below L. So what differs by more
    than L differs in rank, and numbers are moved by products with matrices of ones and zeros.
    """
    size = handed.width
    numbers = g.add(g.mul(_ranks(g, handed), 2.0 * size), np.arange(size, dtype=np.float64)[None])
    parts: list[tuple[Shape, Dtype]] = [((None, 1), "float64")] * size
    ones = np.ones(size, np.int64)
    rows = g.node_many("Split", [numbers, ones], parts, axis=1)
    above = g.node_many("Split", [g.add(numbers, float(size)), ones], parts, axis=1)
    siblings, limits, moves, parents, depth = _tree(count, size)
    heap: Value | Wide = np.full((1, count), 2.0 * size * (size + 2))
    for row, limit in zip(rows, above, strict=True):
        apart = g.node("MatMul", [heap, siblings], (None, count))
        path = g.binary("Greater", apart, limits)
        for _ in range(depth - 1):
            # On the way down to a place is the larger child at every step, the left one of equal ones.
            up = g.node("Gather", [path, parents], (None, count), "bool", axis=1)
            path = g.binary("And", path, up)
        path = g.binary("And", path, g.node("Greater", [heap, limit], (None, count), "bool"))
        moved = g.node("MatMul", [g.where(path, heap, 0.0), moves], (None, count))
        filled = g.node("Max", [moved, row], (None, count))
        heap = g.where(path, filled, heap)
    assert isinstance(heap, Value), "a search hands at least k rows to its heap"
    return g.cast(g.node("Mod", [heap, np.array(2.0 * size)], (None, count), fmod=1), "int64")


def _ranks(g: Lowering, values: Value) -> Value:
    """(n, L) float64: how many different values are smaller; L + 2 for infinity, which the heap turns away."""
    size = values.width
    ordered, at = smallest(g, values, size)
    rises = g.cast(g.binary("Greater", _part(g, ordered, 1, size), _part(g, ordered, 0, size - 1)), "float64")
    padded = g.node("Pad", [rises, np.array([0, 1, 0, 0])], (None, size))
    ranks = g.node("CumSum", [padded, np.array(1)], (None, size))
    ranks = g.where(g.unary("IsInf", ordered), np.full((1, 1), size + 2.0), ranks)
    # Written over a product with the input, for the sake of its shape: without a known number of rows ONNX Runtime
    # compares every buffer with every other, and takes seconds to open the file.
    ground = g.matmul(g.cast(g.input, "float64"), np.zeros((g.width, size)))
    return g.node("ScatterElements", [ground, at, ranks], (None, size), axis=1)


def _tree(count: int, size: int) -> tuple[Wide, Wide, Wide, NDArray[np.int64], int]:
    """The heap's shape as matrices.

    First (k, k) and (1, k): a place holds the larger of two siblings where its column of the product is above the
    limit. Then (k, k), which moves numbers to their parents, the parents (k,), and the levels below the top.
    """
    siblings, limits, moves = np.eye(count), np.full((1, count), -1.0), np.zeros((count, count))
    parents = np.maximum((np.arange(count) - 1) // 2, 0)
    for place in range(1, count):
        moves[place, parents[place]] = 1.0
        left = place % 2 == 1
        sibling = place + 1 if left else place - 1
        if sibling < count:
            siblings[sibling, place] = -1.0
            limits[0, place] = -size if left else size
    return siblings, limits, moves, parents, count.bit_length() - 1
