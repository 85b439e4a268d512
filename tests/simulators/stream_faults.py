"""Faults that begin at a known window, in some columns of some devices."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.simulators.stream_rows import Stretch, Values

TAIL_AT: Final = 6.0
WORLD: Final = (
    "mean",  # + size, or growing to it over `ramp` windows
    "scale",  # times size
    "tail",  # a share of size of the rows at + 6
    "correlation",  # the second column follows the first with this correlation; marginals stay what they are
)
"""Changes of the world: the truth follows the changed values."""
SENSOR: Final = (
    "offset",  # + size
    "stuck",  # a share of size of the rows repeats the row before
    "clipped",  # at most size
    "missing",  # a share of size of the rows has no value
    "unseen",  # a share of size of the rows has a category that training never saw
    "noise",  # + normal noise of standard deviation size
    "dead",  # always size
)
"""Changes of what is measured: the truth stays what it was."""
KINDS: Final = (*WORLD, *SENSOR, "concept")
"""``concept`` turns a share of size of the labels round; inputs and outputs stay what they are."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong from window ``start`` on, up to but not including ``end``.

    ``kind`` is one of `KINDS`, which tells what ``size`` is. ``devices`` are indices; None means the last
    ``share`` of the fleet. ``ramp`` windows pass until a mean shift has reached its size.
    """

    kind: str
    size: float
    start: int = 20
    columns: tuple[int, ...] = (7,)
    share: float = 1.0
    devices: tuple[int, ...] | None = None
    ramp: int = 0
    end: int = 1 << 30

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault {self.kind!r}: one of {', '.join(KINDS)}")
        if self.kind == "correlation" and len(self.columns) != 2:
            raise ValueError(f"a fault of correlation needs two columns, not {self.columns}")

    def hit(self, devices: int) -> tuple[int, ...]:
        """The indices of the devices concerned, of a fleet of so many."""
        if self.devices is not None:
            return self.devices
        return tuple(range(devices - max(1, round(self.share * devices)), devices))


class Faulty:
    """Applies the faults of one device to its stretches, in place and in order."""

    def __init__(self, faults: Iterable[Fault], rng: np.random.Generator) -> None:
        self._rng = rng
        self._faults = tuple(faults)
        self._last: dict[int, np.float32] = {}

    def apply(self, stretch: Stretch) -> None:
        for kinds in (WORLD, SENSOR):
            for fault in self._faults:
                if fault.kind in kinds and fault.kind != "correlation":
                    self._apply(fault, stretch)
            if kinds == WORLD:
                stretch.settle()
        for fault in self._faults:
            for j in fault.columns:
                self._last[j] = stretch.values[j, -1, -1]
            if fault.kind == "concept":
                labels = stretch.labels[part_of(fault, stretch.first, stretch.labels.shape[0])]
                labels ^= self._rng.random(labels.shape) < fault.size

    def _apply(self, fault: Fault, stretch: Stretch) -> None:
        part = part_of(fault, stretch.first, stretch.values.shape[1])
        if part.start >= part.stop:
            return
        since = np.arange(part.start, part.stop) + stretch.first - fault.start
        for j in fault.columns:
            values = stretch.values[j]
            if fault.kind == "stuck":
                before = self._last.get(j) if part.start == 0 else values[part.start - 1, -1]
                _stick(values[part], self._rng, fault.size, before)
            else:
                _damage(fault, values[part], since, self._rng)


def part_of(fault: Fault, first: int, count: int) -> slice:
    """Which of ``count`` windows from number ``first`` on the fault concerns."""
    return slice(min(max(fault.start - first, 0), count), min(max(fault.end - first, 0), count))


def _damage(fault: Fault, values: Values, since: NDArray[np.int64], rng: np.random.Generator) -> None:
    """Changes ``values`` (windows, rows) in place, ``since`` (windows,) windows after the fault began."""
    size = np.float32(fault.size)
    match fault.kind:
        case "mean":
            grown = np.minimum(1.0, (since + 1) / fault.ramp) if fault.ramp else np.ones(len(since))
            values += size * grown.astype(np.float32)[:, None]
        case "offset":
            values += size
        case "scale":
            values *= size
        case "tail":
            values[rng.random(values.shape) < fault.size] = TAIL_AT
        case "clipped":
            np.minimum(values, size, out=values)
        case "missing":
            values[rng.random(values.shape) < fault.size] = np.nan
        case "unseen":
            values[rng.random(values.shape) < fault.size] = -1
        case "noise":
            values += size * rng.standard_normal(values.shape, dtype=np.float32)
        case "dead":
            values[:] = size


def _stick(values: Values, rng: np.random.Generator, share: float, before: np.float32 | None) -> None:
    """A ``share`` of ``values`` (windows, rows), in place, repeats the one before; the first of all has ``before``."""
    flat = values.reshape(-1)
    fresh = rng.random(flat.size) >= share
    if before is None:
        fresh[0] = True
    source = np.maximum.accumulate(np.where(fresh, np.arange(flat.size), -1))
    held = flat[source]
    if before is not None:
        held[source < 0] = before
    values[:] = held.reshape(values.shape)
