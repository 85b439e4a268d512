"""Who speaks of a movement, and of what: the component that people are told of, and the devices that are named.

No verdict is made of either.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from aggregator.core.components import LOCATION, MISSING, NON_FINITE, SCALE, SHAPE, UNSEEN, Components, Matrix

FAR: Final = 0.8
"""Standard deviations of the training that a column's middle must move to be what is told of it."""
UNKNOWN: Final = (MISSING, NON_FINITE, UNSEEN)
"""Rows of these say nothing else: where they are many, the other rows' shares move with them."""
STRANGERS: Final = 0.03
"""Of the devices that are named, so many may be ones that did not move."""
APART: Final = 2.5
"""A device so many times its noise away belongs to those that moved, however far the others of them went."""
SOME: Final = 0.25
"""Of all devices; where fewer did not move, those that did are not told apart from them by how far the others went."""


def speaker(
    components: Components, mine: NDArray[np.int64], at: int, away: Matrix, sure: NDArray[np.bool_]
) -> int:
    """The component to tell people of where the surest of a column's, ``mine``, is ``at``.

    ``away`` is how far each of them moved, ``sure`` which of them did by themselves. A fault that took as many rows as
    any shape lost is the cause of it. And what moves far to one side also spreads wider, which may be the surer, but is
    not what people see.
    """
    nature, cells = components.nature[mine], components.cells[mine]
    size = np.abs(np.nan_to_num(away))
    faults = sure & np.isin(nature, UNKNOWN) & (components.owners[mine] < components.features)
    if faults.any():
        most = int(np.where(faults, size, -1.0).argmax())
        if size[most] >= size[(nature == SHAPE) & (cells >= 0)].max(initial=0.0):
            return int(mine[most])
    if components.cells[at] == SCALE:
        location = int(np.flatnonzero(cells == LOCATION)[0])
        if size[location] >= FAR:
            return int(mine[location])
    return at


def showing(scores: Matrix) -> NDArray[np.bool_]:
    """The devices that show a movement by ``scores`` (n,), deviations to its side in units of noise; one at least.

    So many that `STRANGERS` of them did not move, if twice as many did not as are to the other side (Y. Benjamini and
    Y. Hochberg, "Controlling the false discovery rate", JRSS B 1995; J. D. Storey, JRSS B 2002). Of these, one that is
    nearer to those that did not move than to the middle of the others is none.
    """
    scores = np.nan_to_num(scores)
    p = special.ndtr(-scores)
    order, n = np.argsort(p, kind="stable"), len(p)
    unmoved = min(float(n), 2.0 * (1.0 + float((p >= 0.5).sum())))
    within = np.flatnonzero(p[order] * unmoved <= STRANGERS * np.arange(1, n + 1))
    found = np.zeros(n, np.bool_)
    found[order[: int(within.max(initial=0)) + 1]] = True
    if unmoved >= SOME * n:
        found &= scores >= min(APART, float(np.median(scores[found])) / 2.0)
    return found


def loud(votes: Matrix) -> NDArray[np.bool_]:
    """The devices that may show a movement, by at least their noise, and by half of what is usual among such.

    Of what the model answers, these are all that are concerned: who is to be judged beside newcomers rests on it.
    """
    found = votes >= 1.0
    return found & (votes >= float(votes[found].mean()) / 2.0) if found.any() else found
