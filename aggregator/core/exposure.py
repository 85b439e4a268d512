"""How many devices a rollout exposes and how many failed it, kept up to date status by status.

A site that comes back says so with a status of every device: each of them must not cost a look at the whole fleet.
What is counted says when such a look would change anything (`Exposure.calls`), and only then one is taken.
"""

from collections.abc import Iterable

from aggregator.core import gates, rollout
from aggregator.records import DeviceRecord, Rollout


class Exposure:
    """The counts of one rollout as it stands. Not thread-safe, one loop owns it."""

    def __init__(self, r: Rollout, devices: Iterable[DeviceRecord]) -> None:
        self._rollout = r
        self._online = self._failed = 0
        for record in devices:
            self._add(record, 1)

    def stands_for(self, r: Rollout) -> bool:
        """Whether it counts what ``r`` would."""
        return _counted(self._rollout) == _counted(r)

    def saw(self, before: DeviceRecord | None, record: DeviceRecord) -> None:
        """Puts ``record`` in the place of ``before``; O(1)."""
        if before is not None:
            self._add(before, -1)
        self._add(record, 1)

    def calls(self, r: Rollout) -> bool:
        """Whether a look at the whole fleet would begin a draft, lower a threshold or halt."""
        if r.state == rollout.DRAFT:
            return self._online > 0
        crowded = r.cap != rollout.NO_CAP and self._online > r.cap
        return crowded or self._failed > r.gates.max_failures

    def _add(self, record: DeviceRecord, times: int) -> None:
        """A draft counts whom it could begin with, a stage those it tells to run the candidate."""
        r = self._rollout
        of = rollout.eligible if r.state == rollout.DRAFT else rollout.members
        if of(r, [record]):
            self._online += times * record.online
            self._failed += times * bool(gates.failure(record, r))


def _counted(r: Rollout) -> tuple[object, ...]:
    """All that the counts depend on."""
    return (
        *(r.rollout, r.cohort, r.model, r.candidate, r.revision, r.threshold),
        r.state == rollout.DRAFT,
    )
