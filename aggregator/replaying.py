"""What the monitor would have found in the windows that are stored, judged another way.

The looks are the monitor's own (`aggregator.gathering`). When they were taken is known where the ledger kept it, and
used as long as the rule of taking looks is the same; under another rule they are taken when the windows that had come
by then would have been enough, every ``check_seconds`` at most.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from aggregator.config import DriftConfig
from aggregator.gathering import NOTHING, blocks_of, gathered, judge_of, slice_of
from aggregator.looks import Alarm, Look, Slice, Wish
from aggregator.records import Receipt
from aggregator.stores import WindowStore
from edge_runtime.contract.ids import DeviceId, Digest
from edge_runtime.contract.manifest import ArtifactInfo

OF_TAKING: Final = ("horizon_rows", "horizon_seconds", "quorum", "patience_seconds")
"""What of the configuration says when a look is taken and what it sees; the rest says how it is judged."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A look that the monitor took: when, and the newest window that was part of it (0: not known)."""

    at_ns: int
    newest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Looks in their order, with what each saw, and what stands after the last."""

    slices: tuple[Slice, ...]
    looks: tuple[Look, ...]
    at_ns: tuple[int, ...]
    alarms: tuple[Alarm, ...]
    wishes: tuple[Wish, ...]
    notes: tuple[str, ...]


def same_taking(a: DriftConfig, b: DriftConfig) -> bool:
    """Whether both configurations take the same looks."""
    return all(getattr(a, name) == getattr(b, name) for name in OF_TAKING)


def replayed(  # noqa: PLR0913 (what is stored, what is known, how to judge: all by name)
    windows: WindowStore,
    info: ArtifactInfo,
    digest: Digest,
    config: DriftConfig,
    *,
    taken: Sequence[Taken] = (),
    first_looks: Sequence[Slice] = (),
    first_index: int = 0,
    attributes: Mapping[DeviceId, Mapping[str, str]] | None = None,
    progress: Callable[[int, int], object] = lambda _done, _of: None,
) -> Replayed:
    """Judges every look at the artifact under ``config``, as the monitor would have.

    ``taken`` are the looks that the monitor took, in order; empty, looks are taken when they are due. ``first_looks``
    and ``first_index`` are what was learned before the oldest of the stored windows. ``attributes`` tell cohorts apart.
    """
    receipts = windows.receipts(digest)
    ends = {receipt.device: receipt.number for receipt in receipts}
    cursors = dict.fromkeys(sorted(ends), 0)
    waiting = _Waiting(receipts)
    judge = judge_of(info, config, first_looks=first_looks)
    slices: list[Slice] = []
    looks: list[Look] = []
    taken_ns: list[int] = []
    moments = _seen(taken, receipts) or _checks(receipts, config.check_seconds)
    for done, (now_ns, newest) in enumerate(moments):
        progress(done, len(moments))
        waiting.until(newest)
        seen = gathered(
            waiting.pending,
            cursors,
            config,
            serves=partial(_sends_more, ends, newest),
            now_ns=now_ns,
        )
        if not (seen.ready.ready or (taken and seen.ready.covered)):
            continue
        blocks = blocks_of(windows, config, digest, cursors, covered=seen.ready.covered, upto=newest)
        judge.attributes = {d: attributes[d] for d in seen.active if d in attributes} if attributes else {}
        one = slice_of(first_index + len(looks), blocks)
        looks.append(judge.look(one))
        slices.append(one)
        taken_ns.append(now_ns)
        for block in blocks:
            cursors[block.reading.device] = block.last
            waiting.used(block.reading.device)
    progress(len(moments), len(moments))
    return Replayed(
        slices=tuple(slices),
        looks=tuple(looks),
        at_ns=tuple(taken_ns),
        alarms=judge.alarms,
        wishes=judge.wishes,
        notes=judge.notes,
    )


class _Waiting:
    """What the store's `WindowStore.pending` said as time went by, without asking it at every moment."""

    def __init__(self, receipts: Sequence[Receipt]) -> None:
        self._receipts = receipts
        self._came = 0
        self._pending: dict[DeviceId, tuple[int, float, int]] = {}

    def until(self, newest: int) -> None:
        """Lets in what is numbered up to ``newest``."""
        while self._came < len(self._receipts) and self._receipts[self._came].number <= newest:
            r = self._receipts[self._came]
            rows, seconds, since = self._pending.get(r.device, (0, 0.0, r.received_ns))
            self._pending[r.device] = rows + r.rows, seconds + r.seconds, since
            self._came += 1

    def pending(self, device: DeviceId) -> tuple[int, float, int]:
        """(rows, seconds, received_ns of the oldest) that no look has used."""
        return self._pending.get(device, NOTHING)

    def used(self, device: DeviceId) -> None:
        """A look has used everything of the device."""
        self._pending.pop(device, None)


def _sends_more(ends: Mapping[DeviceId, int], newest: int, device: DeviceId) -> bool:
    """Who was online is not kept; a device that went on sending was worth waiting for."""
    return ends[device] > newest


def _seen(taken: Sequence[Taken], receipts: Sequence[Receipt]) -> list[tuple[int, int]]:
    """When the monitor looked, and the newest window that it saw: older ledgers do not say, but when it came."""
    return [
        (
            look.at_ns,
            look.newest or max((r.number for r in receipts if r.received_ns <= look.at_ns), default=0),
        )
        for look in taken
    ]


def _checks(receipts: Sequence[Receipt], check_seconds: float) -> list[tuple[int, int]]:
    """When the monitor would have looked for something new: as soon as it came, and not more often than it does."""
    step_ns = max(1, int(check_seconds * 1e9))
    checks: list[tuple[int, int]] = []
    for r in receipts:
        if checks and r.received_ns <= checks[-1][0]:
            checks[-1] = checks[-1][0], r.number
        else:
            checks.append((max(r.received_ns, checks[-1][0] + step_ns if checks else 0), r.number))
    return checks
