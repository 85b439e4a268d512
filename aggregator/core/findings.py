"""What one look found, in words and in data, before anybody decides what it means over looks."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from aggregator.core.components import (
    ACCURACY,
    CLASS,
    FAULT_WORDS,
    FAULTS,
    LOCATION,
    SCALE,
    SHAPE,
    UNSEEN,
    Components,
    Matrix,
)
from aggregator.looks import Alarm, Familiar
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import ArtifactInfo

NAMED: Final = 3
EFFECTS: Final = ("prediction", "performance")
"""Kinds that tell of the answers; the others tell of the inputs."""
OUTSIDE: Final = 0.01
"""Where so many more values lie in a column's two open cells, whose width nobody knows, its spread is a bound."""


def kind_of(components: Components, at: int, *, own: str) -> str:
    """The kind of alarm that component ``at`` raises; ``own`` for the shape of an input."""
    nature = int(components.nature[at])
    if nature == ACCURACY:
        return "performance"
    if components.owners[at] >= components.features:
        return "prediction"
    return "quality" if nature in FAULTS else own


def key_of(kind: str, name: str) -> str:
    """What tells incidents of a cohort apart: all that outputs do is one."""
    return {"prediction": "the predictions", "performance": "the accuracy"}.get(kind, name)


def movement(  # noqa: PLR0911 (a sentence for each nature)
    info: ArtifactInfo, components: Components, at: int, usual: Matrix, present: Matrix
) -> str:
    """In words, what component ``at`` did: from ``usual`` to ``present``, the values (K,) of all components."""
    before, now = float(usual[at]), float(present[at])
    nature, cell, owner = int(components.nature[at]), int(components.cells[at]), int(components.owners[at])
    name = components.names[owner]
    if nature == ACCURACY:
        return f"the estimated accuracy went from {before:.3f} to {now:.3f}"
    if nature == CLASS:
        return f"class {info.manifest.labels[cell]} is predicted for {percent(now)} of rows, {percent(before)} before"
    if nature in FAULTS:
        return f"{name}: {FAULT_WORDS[nature]} went from {percent(before)} to {percent(now)}"
    if cell == LOCATION:
        return (
            f"{name} moved {'up' if now > before else 'down'} by {abs(now - before):.2f} standard deviations"
        )
    if cell == SCALE:
        return f"{name} spreads {_wider(info, components, at, usual, present)} before"
    what = category(info, components, at)
    if what is not None:
        return f"{name} is {what} in {percent(now)} of rows, {percent(before)} before"
    edge = info.reference.spec.columns[owner].edges[cell]
    return f"{name}: {percent(now)} of values are at most {edge:.4g}, {percent(before)} before"


def category(info: ArtifactInfo, components: Components, at: int) -> str | None:
    """The category that component ``at`` is the share of; None where its column is none of categories."""
    owner, cell = int(components.owners[at]), int(components.cells[at])
    if owner >= components.features or info.manifest.features[owner].kind != "category":
        return None
    words = info.manifest.features[owner].vocabulary
    return str(words[cell - 1]) if 0 < cell <= len(words) else f"cell {cell}"


def _wider(info: ArtifactInfo, components: Components, at: int, usual: Matrix, present: Matrix) -> str:
    """How much wider, or less wide, the column of ``at`` spreads: a ratio of standard deviations, or only which."""
    owner, wider = components.owners[at], bool(present[at] > usual[at])
    edges = np.asarray(info.reference.spec.columns[owner].edges)
    mine = (components.owners == owner) & (components.nature == SHAPE) & (components.cells >= 0)
    (before, lay), (now, lies) = (_spread(edges, values[mine]) for values in (usual, present))
    ratio = now / before if before > 0 else math.nan
    if not math.isfinite(ratio) or (ratio > 1.0) != wider:
        return "wider than" if wider else "less wide than"
    more = lies - lay if wider else lay - lies
    bound = ("at least " if wider else "at most ") if more >= OUTSIDE else ""
    return f"{bound}{ratio:.3g} times as wide as"


def _spread(edges: Matrix, below: Matrix) -> tuple[float, float]:
    """(standard deviation, share in the two open cells) of values whose shares at or below the edges are ``below``,
    each at the middle of its cell, those in the open cells at their edge.
    """
    shares = np.diff(np.clip(below, 0.0, 1.0), prepend=0.0, append=1.0)
    places = np.concatenate([edges[:1], edges[:-1] / 2.0 + edges[1:] / 2.0, edges[-1:]])
    variance = float(shares @ (places - float(shares @ places)) ** 2)
    return math.sqrt(max(0.0, variance)), float(shares[0] + shares[-1])


def figures_as_evidence(found: Familiar) -> tuple[tuple[str, float | str], ...]:
    """The familiar figures beside an alarm's own evidence, as far as there are any."""
    figures = (
        ("psi", found.psi),
        ("ks", found.ks),
        ("js", found.js),
        ("wasserstein_sd", found.wasserstein_sd),
        ("mean_shift_sd", found.mean_shift_sd),
        ("sd_ratio", found.sd_ratio),
        ("cut", found.cut),
        ("below_before", found.below[0]),
        ("below_now", found.below[1]),
    )
    return tuple((name, value) for name, value in figures if math.isfinite(value))


def floors(
    components: Components, *, shape: float, fault: float, prediction: float, accuracy: float
) -> Matrix:
    """(K,) the least movement of each component that matters. A shift of d standard deviations moves a distribution
    function by 0.4 d at most, so scores have 2.5 times the floor of shapes.
    """
    found = np.full(components.size, shape)
    found[np.isin(components.nature, FAULTS)] = fault
    outputs = components.owners >= components.features
    found[outputs] = prediction
    found[np.isin(components.cells, (LOCATION, SCALE)) & (components.nature != CLASS)] *= 2.5
    found[components.nature == ACCURACY] = accuracy
    found[(components.nature == UNSEEN) & ~outputs] = fault
    return found


def fault_as_evidence(components: Components, at: int) -> tuple[tuple[str, float | str], ...]:
    """Which fault component ``at`` tells of, where it does."""
    nature = int(components.nature[at])
    of_input = components.owners[at] < components.features
    return (("fault", FAULT_WORDS[nature]),) if of_input and nature in FAULTS else ()


def is_broken(alarm: Alarm) -> bool:
    """Whether an alarm tells of values that nobody measured: no model is better at these. A new category is a value."""
    return alarm.kind == "quality" and dict(alarm.evidence).get("fault") != FAULT_WORDS[UNSEEN]


def some(devices: Sequence[DeviceId]) -> str:
    """The first of the names, and how many more there are."""
    shown = ", ".join(devices[:NAMED])
    return shown if len(devices) <= NAMED else f"{shown} and {len(devices) - NAMED} more"


def led_by(most: DeviceId, devices: Sequence[DeviceId], what: str) -> str:
    """``what`` device ``most`` did, and which of ``devices`` did the like: the figures are the first one's alone."""
    others = [device for device in devices if device != most]
    return f"{most} most: {what}; also {some(others)}" if others else f"{most}: {what}"


def probability(p: float) -> str:
    """``p`` as people read it."""
    return f"p {p:.2g}" if p >= 1e-12 else "p below 1e-12"


def percent(share: float) -> str:
    """``share`` as people read it."""
    return f"{100.0 * min(1.0, max(0.0, round(share, 9))):.3g} %"
