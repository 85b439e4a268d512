"""Permutation tests over many statistics at once, with devices or training groups as their units.

Two sets of units, each unit a vector (points of its distribution functions, say). Under no difference the
units are exchangeable, so every way of dealing them into two sets of the same sizes was equally likely. The
statistic of a component is Welch's |mean difference| / sqrt(max(v1/n1 + v2/n2, floor)); the test's is the
largest over all components (max-T), so the probability of naming any component wrongly is at most alpha
whatever their dependence. Rows are never counted, so neither autocorrelation nor a chatty device can make
evidence. The floor keeps components that hardly vary between units from dominating on differences too small
to matter.

Sources: Westfall and Young, Resampling-Based Multiple Testing (1993), single-step max-T; Phipson and Smyth,
"Permutation p-values should never be zero" (2010), for the Monte Carlo p-value; Janssen, "Studentized
permutation tests for non-i.i.d. hypotheses" (1997).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CHUNK_ELEMENTS: Final = 1 << 14
TOLERANCE: Final = 1e-9
"""Dealings whose statistic is this close (relative) to the observed one count as equal: sums differ by order."""


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
    deals = np.zeros((math.comb(units, first), units), np.float64)
    for row, chosen in enumerate(itertools.combinations(range(units), first)):
        deals[row, list(chosen)] = 1.0
    deals.setflags(write=False)
    return deals


def _deals(
    units: int, first: int, total: int, rng: np.random.Generator | None, chunk: int
) -> Iterator[Floats]:
    """0/1 matrices (rows, units) of the dealings, ``first`` ones a row: all of them, or ``total`` drawn."""
    if rng is None:
        every = _every_deal(units, first)
        for start in range(0, total, chunk):
            yield every[start : start + chunk]
        return
    for start in range(0, total, chunk):
        rows = min(chunk, total - start)
        chosen = np.argpartition(rng.random((rows, units)), first - 1, axis=1)[:, :first]
        deals = np.zeros((rows, units), np.float64)
        np.put_along_axis(deals, chosen, 1.0, axis=1)
        yield deals


def _statistics(deals: Floats, values: Floats, floor: float, *, one_sided: bool) -> Floats:
    """(rows, components) statistics; ``values`` (units, components) are centred, so the second set's sums are
    minus the first's. Works in place: the arrays are large and the time goes into moving them.
    """
    units = len(values)
    n1 = float(deals[0].sum())
    n2 = units - n1
    weight1, weight2 = 1.0 / (n1 * (n1 - 1.0)), 1.0 / (n2 * (n2 - 1.0))
    squares = values * values
    sums = deals @ values
    variance = deals @ squares
    variance *= weight1 - weight2
    variance += squares.sum(axis=0) * weight2
    variance -= sums * sums * (weight1 / n1 + weight2 / n2)
    np.maximum(variance, floor, out=variance)
    np.sqrt(variance, out=variance)
    sums *= 1.0 / n1 + 1.0 / n2
    sums /= variance
    return sums if one_sided else np.abs(sums, out=sums)


def compare(  # noqa: PLR0913 (what is compared, and how long)
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    owners: NDArray[np.int64],
    *,
    floor: float,
    exact_limit: int,
    samples: int,
    seed: int,
    one_sided: bool = False,
    enough: int = 0,
) -> Comparison:
    """Tests ``first`` (n1, components) against ``second`` (n2, components), each with at least two units.

    ``owners`` (components,) gives each component's owner, non-decreasing from 0 without gaps. ``one_sided``
    asks whether ``first`` is larger. When there are at most ``exact_limit``
    dealings all are looked at and p is exact, else ``samples`` are drawn with ``seed``, and fewer where ``enough`` of
    them already reach the strongest owner: p is large then (J. Besag and P. Clifford, "Sequential Monte Carlo
    p-values", 1991).

    Raises:
        ValueError: a set has fewer than two units, or the shapes do not fit.
    """
    n1, n2 = len(first), len(second)
    if min(n1, n2) < 2 or first.shape[1:] != second.shape[1:] or first.shape[1:] != owners.shape:
        raise ValueError(
            f"cannot compare units of shapes {first.shape} and {second.shape} with owners {owners.shape}"
        )
    pooled = np.concatenate([first, second]).astype(np.float64)
    values = pooled - pooled.mean(axis=0)
    own = np.zeros((1, n1 + n2), np.float64)
    own[0, :n1] = 1.0
    observed = _by_owner(_statistics(own, values, floor, one_sided=one_sided), owners)
    total = math.comb(n1 + n2, n1)
    exact = total <= exact_limit
    chunk = max(1, CHUNK_ELEMENTS // max(values.shape[1], n1 + n2))
    rng = None if exact else np.random.default_rng(seed)
    largest: list[Floats] = []
    reached = 0
    for deals in _deals(n1 + n2, n1, total if exact else samples, rng, chunk):
        largest.append(_statistics(deals, values, floor, one_sided=one_sided).max(axis=1))
        reached += int(np.count_nonzero(largest[-1] >= observed.max()))
        if enough and not exact and reached >= enough:
            break
    return _comparison(observed, np.concatenate(largest), exact=exact)


def _by_owner(statistics: Floats, owners: NDArray[np.int64]) -> Floats:
    """The largest of each owner's components, from one row of statistics."""
    found: Floats = np.maximum.reduceat(statistics[0], np.flatnonzero(np.diff(owners, prepend=-1)))
    return found


def _comparison(observed: Floats, largest: Floats, *, exact: bool) -> Comparison:
    null = np.sort(largest)
    bar = observed - TOLERANCE * np.maximum(1.0, np.abs(observed))
    reached = len(null) - np.searchsorted(null, bar, side="left")
    owner_p = reached / len(null) if exact else (1 + reached) / (1 + len(null))
    return Comparison(
        p=float(owner_p.min()), owner_p=owner_p, statistic=observed, permutations=len(null), exact=exact
    )
