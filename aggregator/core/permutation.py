"""A two-sample permutation test over many statistics at once, with devices or training groups as its units.

Two sets of units, each unit a vector (points of its distribution functions, say). Under no difference the units are
exchangeable, so every way of dealing them into two sets of the same sizes was equally likely. The statistic of a
component is Welch's |mean difference| / sqrt(max(v1/n1 + v2/n2, floor)); the test's is the largest over all components
(max-T), so the probability of naming any component wrongly is at most alpha whatever their dependence. Rows are never
counted, so neither autocorrelation nor a chatty device can make evidence. The floor keeps components that hardly vary
between units from dominating on differences too small to matter.

Sources: Westfall and Young, Resampling-Based Multiple Testing (1993), single-step max-T; Phipson and Smyth,
"Permutation p-values should never be zero" (2010), for the Monte Carlo p-value; Janssen, "Studentized permutation tests
for non-i.i.d. hypotheses" (1997).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CHUNK_ELEMENTS: Final = 1 << 20
TOLERANCE: Final = 1e-4
"""Dealings whose statistic is this close (relative) to the observed one count as equal: float32 sums differ by order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """``p`` is for all components together; ``owner_p`` (owners,) adjusted for all, ``statistic`` (owners,) observed.

    An owner is a group of components that is named as one (a feature's cut points). ``permutations`` were
    looked at: all there are when ``exact``, else drawn with the seed.
    """

    p: float
    owner_p: NDArray[np.float64]
    statistic: NDArray[np.float64]
    permutations: int
    exact: bool


def smallest_p(first: int, second: int, *, exact_limit: int, samples: int) -> float:
    """The smallest p-value that two sets of ``first`` and ``second`` units can reach."""
    total = math.comb(first + second, first)
    return 1.0 / total if total <= exact_limit else 1.0 / (1 + samples)


@lru_cache(maxsize=16)
def _every_deal(units: int, first: int) -> Floats:
    deals = np.zeros((math.comb(units, first), units), np.float32)
    for row, chosen in enumerate(itertools.combinations(range(units), first)):
        deals[row, list(chosen)] = 1.0
    deals.setflags(write=False)
    return deals


def _deals(units: int, first: int, total: int, rng: np.random.Generator | None, chunk: int) -> Iterator[Floats]:
    """0/1 matrices (rows, units) of the dealings, ``first`` ones a row: all of them, or ``total`` drawn."""
    if rng is None:
        every = _every_deal(units, first)
        for start in range(0, total, chunk):
            yield every[start : start + chunk]
        return
    for start in range(0, total, chunk):
        rows = min(chunk, total - start)
        chosen = np.argpartition(rng.random((rows, units)), first - 1, axis=1)[:, :first]
        deals = np.zeros((rows, units), np.float32)
        np.put_along_axis(deals, chosen, 1.0, axis=1)
        yield deals


def _statistics(deals: Floats, values: Floats, floor: float, *, one_sided: bool) -> Floats:
    """(rows, components) statistics; ``values`` (units, components) are centred, which keeps float32 sums honest."""
    units = len(values)
    n1 = float(deals[0].sum())
    n2 = units - n1
    squares = values * values
    sum1, square1 = deals @ values, deals @ squares
    sum2, square2 = values.sum(axis=0) - sum1, squares.sum(axis=0) - square1
    mean1, mean2 = sum1 / n1, sum2 / n2
    variance = (square1 - n1 * mean1**2) / ((n1 - 1.0) * n1) + (square2 - n2 * mean2**2) / ((n2 - 1.0) * n2)
    difference = mean1 - mean2
    if not one_sided:
        difference = np.abs(difference)
    result: Floats = difference / np.sqrt(np.maximum(variance, np.float32(floor)))
    return result


def compare(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    owners: NDArray[np.int64],
    *,
    floor: float,
    exact_limit: int,
    samples: int,
    seed: int,
    one_sided: bool = False,
) -> Comparison:
    """Tests ``first`` (n1, components) against ``second`` (n2, components), each with at least two units.

    ``owners`` (components,) gives each component's owner, non-decreasing from 0 without gaps. ``one_sided`` asks whether
    ``first`` is larger. When there are at most ``exact_limit`` dealings all are looked at and p is exact, else
    ``samples`` are drawn with ``seed``.

    Raises:
        ValueError: a set has fewer than two units, or the shapes do not fit.
    """
    n1, n2 = len(first), len(second)
    if min(n1, n2) < 2 or first.shape[1:] != second.shape[1:] or first.shape[1:] != owners.shape:
        raise ValueError(f"cannot compare units of shapes {first.shape} and {second.shape} with owners {owners.shape}")
    pooled = np.concatenate([first, second]).astype(np.float64)
    values = (pooled - pooled.mean(axis=0)).astype(np.float32)
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    own = np.zeros((1, n1 + n2), np.float32)
    own[0, :n1] = 1.0
    observed = np.maximum.reduceat(_statistics(own, values, floor, one_sided=one_sided)[0], starts)
    total = math.comb(n1 + n2, n1)
    exact = total <= exact_limit
    largest = []
    chunk = max(1, CHUNK_ELEMENTS // max(values.shape[1], n1 + n2))
    rng = None if exact else np.random.default_rng(seed)
    for deals in _deals(n1 + n2, n1, total if exact else samples, rng, chunk):
        largest.append(_statistics(deals, values, floor, one_sided=one_sided).max(axis=1))
    null = np.sort(np.concatenate(largest).astype(np.float64))
    bar = observed.astype(np.float64)
    bar -= TOLERANCE * np.maximum(1.0, np.abs(bar))
    reached = len(null) - np.searchsorted(null, bar, side="left")
    owner_p = reached / len(null) if exact else (1 + reached) / (1 + len(null))
    return Comparison(
        p=float(owner_p.min()),
        owner_p=owner_p.astype(np.float64),
        statistic=observed.astype(np.float64),
        permutations=len(null),
        exact=exact,
    )
