"""When a look is taken: enough of the active devices have sent what they do in a cycle."""

from collections.abc import Sequence
from dataclasses import dataclass

from aggregator.config import DriftConfig
from edge_runtime.contract.ids import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What a device has sent since the last look that it was part of."""

    device: DeviceId
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether to look now; ``left_out`` names the devices that do not cover the horizon yet, and by how much."""

    ready: bool
    covered: tuple[DeviceId, ...]
    left_out: tuple[tuple[DeviceId, str], ...]
    reason: str


def covers(c: Coverage, config: DriftConfig) -> bool:
    """Whether what the device sent spans the horizon."""
    return c.rows >= config.horizon_rows and c.seconds >= config.horizon_seconds


def readiness(active: Sequence[Coverage], waited_seconds: float, config: DriftConfig) -> Readiness:
    """Decides on a look from what the active devices have sent in ``waited_seconds`` since the last one."""
    covered, left_out = [], []
    for c in active:
        if covers(c, config):
            covered.append(c.device)
        else:
            lacks = (
                f"{c.rows} of {config.horizon_rows} rows, {c.seconds:.0f} of {config.horizon_seconds:.0f} s"
            )
            left_out.append((c.device, lacks))
    waited = waited_seconds >= config.patience_seconds
    quorate = bool(active) and len(covered) >= config.quorum * len(active)
    return Readiness(
        ready=bool(covered) and (quorate or waited),
        covered=tuple(covered),
        left_out=tuple(left_out),
        reason=f"{len(covered)} of {len(active)} active devices cover the horizon",
    )
