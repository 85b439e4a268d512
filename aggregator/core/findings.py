"""What one look found, in words and in data, before anybody decides what it means over looks."""

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
    info: ArtifactInfo, components: Components, at: int, before: float, now: float
) -> str:
    """In words, what component ``at`` did: from ``before`` to ``now``, its values in the two."""
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
        return f"{name} spreads {'wider' if now > before else 'less wide'} than before"
    columns = info.reference.spec.columns[owner]
    kinds = [feature.kind for feature in info.manifest.features]
    if owner < components.features and kinds[owner] == "category":
        words = info.manifest.features[owner].vocabulary
        what = str(words[cell - 1]) if 0 < cell <= len(words) else f"cell {cell}"
        return f"{name} is {what} in {percent(now)} of rows, {percent(before)} before"
    return f"{name}: {percent(now)} of values are at most {columns.edges[cell]:.4g}, {percent(before)} before"


def figures_as_evidence(found: Familiar) -> tuple[tuple[str, float | str], ...]:
    """The familiar figures beside an alarm's own evidence."""
    return (
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


def probability(p: float) -> str:
    """``p`` as people read it."""
    return f"p {p:.2g}" if p >= 1e-12 else "p below 1e-12"


def percent(share: float) -> str:
    """``share`` as people read it."""
    return f"{100.0 * share:.3g} %"
