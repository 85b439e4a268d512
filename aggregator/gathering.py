"""What a look sees: which devices are waited for, whether enough of them sent enough, and their windows, merged.

One rule for the monitor, which looks as windows come, and for a replay of what is stored (`aggregator.replaying`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from aggregator.config import DriftConfig
from aggregator.core.judge import Judge
from aggregator.core.readiness import Coverage, Readiness, covers, readiness
from aggregator.looks import Block, Slice, Trace
from aggregator.stores import NEWEST, WindowStore
from edge_runtime.contract.ids import DeviceId, Digest
from edge_runtime.contract.manifest import ArtifactInfo

NOTHING: Final = (0, 0.0, 0)
"""What `WindowStore.pending` says of a device that it leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gathered:
    """What has come since the last look: ``active`` are the devices that count, ``ready`` says which cover a look."""

    active: tuple[DeviceId, ...]
    ready: Readiness


def gathered(
    pending: Callable[[DeviceId], tuple[int, float, int]],
    devices: Iterable[DeviceId],
    config: DriftConfig,
    *,
    serves: Callable[[DeviceId], bool],
    now_ns: int,
) -> Gathered:
    """What ``devices`` sent since their last looks, of each of which ``pending`` says what `WindowStore.pending` does.

    ``serves`` says whether more windows of the artifact may come from a device: it is worth waiting for.
    """
    active, oldest = [], now_ns
    for device in devices:
        rows, seconds, since = pending(device)
        coverage = Coverage(device=device, rows=rows, seconds=seconds)
        if rows and (covers(coverage, config) or serves(device)):
            active.append(coverage)
            oldest = min(oldest, since)
    ready = readiness(active, (now_ns - oldest) / 1e9, config)
    return Gathered(active=tuple(c.device for c in active), ready=ready)


def blocks_of(
    windows: WindowStore,
    config: DriftConfig,
    digest: Digest,
    cursors: Mapping[DeviceId, int],
    *,
    covered: Sequence[DeviceId],
    upto: int = NEWEST,
) -> tuple[Block, ...]:
    """One block of windows for each of ``covered``, numbered up to ``upto``: what devices do in a cycle."""
    found = (
        windows.block(
            digest,
            device,
            cursors[device],
            rows=config.horizon_rows,
            seconds=config.horizon_seconds,
            upto=upto,
        )
        for device in covered
    )
    return tuple(block for block in found if block is not None)


def slice_of(index: int, blocks: Sequence[Block]) -> Slice:
    """What the blocks come to as the look of that number."""
    readings = tuple(block.reading for block in blocks)
    return Slice(
        index=index,
        start_ns=min((r.start_ns for r in readings), default=0),
        end_ns=max((r.end_ns for r in readings), default=0),
        readings=readings,
    )


def judge_of(
    info: ArtifactInfo,
    config: DriftConfig,
    *,
    first_looks: Sequence[Slice] = (),
    traces: Sequence[Trace] = (),
    suspects: Mapping[str, Sequence[DeviceId]] | None = None,
) -> Judge:
    """A judge for such looks: each covers what devices do in a cycle, so that one can be held against the training."""
    return Judge(
        info,
        config,
        settle=0,
        block_looks=1,
        remembered=first_looks,
        traces=traces,
        suspects=suspects,
    )
