"""Joins the stores to the judge: when enough has come in, take a look, have it judged, keep what it means."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from aggregator.adapters.registry import Registry
from aggregator.config import AggregatorConfig
from aggregator.core import readiness, retrain, standing
from aggregator.core.cohorts import FLEET
from aggregator.core.ingest import check_profile
from aggregator.core.judge import Judge
from aggregator.looks import AlarmEvent, Block, Look, Slice, Verdict, Wish
from aggregator.records import AuditEntry, DeviceRecord
from aggregator.stores import DriftLedger, WindowStore
from edge_runtime.contract.ids import DeviceId, Digest, ModelName
from edge_runtime.contract.manifest import ArtifactInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Taken:
    """One look and what led to it; ``first_looks`` is what it added to `Judge.first_looks`."""

    digest: Digest
    model: ModelName
    at_ns: int
    judge: Judge
    blocks: tuple[Block, ...]
    look: Look
    first_looks: tuple[Slice, ...]
    left_out: tuple[tuple[DeviceId, str], ...]

    def verdicts(self) -> tuple[Verdict, ...]:
        """What stands after it."""
        return standing.verdicts(
            self.model,
            self.digest,
            self.look,
            self.judge.book.open,
            self.judge.notes,
            left_out=self.left_out,
            at_ns=self.at_ns,
        )


class Monitor:
    """Judges the fleet from what the stores hold. Owned by the service's loop; `check` may take a second on a look.

    A look is one block of windows per device that covers the horizon: what devices do in a cycle. So one look is
    enough to compare devices with the training. ``tell`` is given what became of incidents once it is durable.
    """

    def __init__(
        self,
        config: AggregatorConfig,
        windows: WindowStore,
        ledger: DriftLedger,
        registry: Registry,
        tell: Callable[[AlarmEvent], None] = lambda _: None,
    ) -> None:
        self._fleet = config.fleet
        self._config = config.drift
        self._retrain = config.retrain
        self._windows = windows
        self._ledger = ledger
        self._registry = registry
        self._tell = tell
        self._cursors = ledger.cursors()
        self._judges: dict[Digest, Judge] = {}
        self._next: dict[Digest, int] = {}
        self._waiting: dict[Digest, str] = {}

    def check(self, devices: Mapping[DeviceId, DeviceRecord], now_ns: int) -> tuple[Verdict, ...]:
        """Takes every look that is due and returns the verdicts it led to."""
        self._settle()
        self._retire(devices, now_ns)
        found: list[Verdict] = []
        streams: dict[Digest, list[DeviceId]] = {}
        for digest, device, newest in self._windows.streams():
            if newest > self._cursor(digest, device):
                streams.setdefault(digest, []).append(device)
        for digest, members in streams.items():
            info = self._registry.info(digest)
            if info is not None:
                found += self._check(digest, info, members, devices, now_ns)
        return tuple(found)

    def _settle(self) -> None:
        """Judges windows that came before their artifact was published here, all of them before any look."""
        for digest in self._windows.unjudged():
            info = self._registry.info(digest)
            if info is None:
                continue
            check = partial(check_profile, info=info)
            while any(counts := self._windows.settle(digest, check)):
                log.info("windows_settled digest=%s accepted=%d rejected=%d", digest, *counts)

    def _judge(self, digest: Digest, info: ArtifactInfo) -> Judge:
        """The artifact's judge, where the one of an earlier process left off."""
        if digest not in self._judges:
            self._next[digest] = self._ledger.next_look(digest)
            self._judges[digest] = Judge(
                info,
                self._config,
                settle=0,
                block_looks=1,
                remembered=self._ledger.first_looks(digest),
                traces=self._ledger.traces(digest),
                suspects=self._ledger.suspects(digest),
            )
        return self._judges[digest]

    def _retire(self, devices: Mapping[DeviceId, DeviceRecord], now_ns: int) -> None:
        why = "no online device of the cohort serves the artifact any more"
        for digest, model in self._ledger.alarming():
            gone = standing.retired(digest, model, self._ledger.traces(digest), devices.values())
            if not gone:
                continue
            events: list[AlarmEvent] = []
            with self._ledger.transaction():
                for trace in gone:
                    events += self._ledger.retire(digest, model, trace, now_ns, why)
                self._note(events)
            if digest in self._judges:
                for trace in gone:
                    self._judges[digest].book.retire(trace)
            self._spread(events)

    def _check(
        self,
        digest: Digest,
        info: ArtifactInfo,
        senders: Sequence[DeviceId],
        devices: Mapping[DeviceId, DeviceRecord],
        now_ns: int,
    ) -> tuple[Verdict, ...]:
        active, oldest = [], now_ns
        for device in senders:
            rows, seconds, since = self._windows.pending(digest, device, self._cursor(digest, device))
            coverage = readiness.Coverage(device=device, rows=rows, seconds=seconds)
            if rows and (readiness.covers(coverage, self._config) or _serves(devices.get(device), digest)):
                active.append(coverage)
                oldest = min(oldest, since)
        ready = readiness.readiness(active, (now_ns - oldest) / 1e9, self._config)
        if not ready.ready:
            self._note_waiting(digest, info, ready, now_ns)
            return ()
        blocks = [block for device in ready.covered if (block := self._block(digest, device)) is not None]
        judge = self._judge(digest, info)
        judge.attributes = {
            c.device: dict(devices[c.device].attributes) for c in active if c.device in devices
        }
        known = len(judge.first_looks)
        try:
            look = judge.look(_slice(self._next[digest], blocks))
            taken = _Taken(
                digest=digest,
                model=info.manifest.name,
                at_ns=now_ns,
                judge=judge,
                blocks=tuple(blocks),
                look=look,
                first_looks=judge.first_looks[known:],
                left_out=ready.left_out,
            )
            verdicts = taken.verdicts()
            self._keep(taken, verdicts)
        except BaseException:
            del self._judges[digest]  # it has seen what the ledger has not: it is made again from the ledger
            raise
        return verdicts

    def _cursor(self, digest: Digest, device: DeviceId) -> int:
        return self._cursors.get((digest, device), 0)

    def _block(self, digest: Digest, device: DeviceId) -> Block | None:
        return self._windows.block(
            digest,
            device,
            self._cursor(digest, device),
            rows=self._config.horizon_rows,
            seconds=self._config.horizon_seconds,
        )

    def _keep(self, taken: _Taken, verdicts: Sequence[Verdict]) -> None:
        """One transaction: a look is counted once, also when the process dies in the middle."""
        digest, model, look, at_ns = taken.digest, taken.model, taken.look, taken.at_ns
        cursors = {(digest, block.reading.device): block.last for block in taken.blocks}
        with self._ledger.transaction():
            for (_, device), last in cursors.items():
                self._ledger.put_cursor(digest, device, last)
            for one in taken.first_looks:
                self._ledger.put_first_look(digest, one)
            self._ledger.put_look(digest, model, look, at_ns)
            events = self._ledger.put_traces(digest, model, taken.judge.book.traces, at_ns)
            self._ledger.put_verdicts(digest, verdicts)
            self._note(events)
            if look.wish is not None:
                self._ask(taken, look.wish)
        self._cursors.update(cursors)
        self._next[digest] = look.index + 1
        self._waiting.pop(digest, None)
        for v in verdicts:
            log.info(
                "verdict kind=%s cohort=%s outcome=%s p=%.4g digest=%s reason=%r",
                *(v.kind, v.cohort, v.outcome, v.p, v.digest, v.reason),
            )
        self._spread(events)

    def _note(self, events: Iterable[AlarmEvent]) -> None:
        for e in events:
            what = f"{e.what} incident {e.number}: {e.alarm.kind} of {e.alarm.cohort}"
            self._ledger.put_audit(_entry(what, e.why, e.model, e.at_ns))

    def _spread(self, events: Iterable[AlarmEvent]) -> None:
        for e in events:
            log.info(
                "incident_%s number=%d kind=%s severity=%s cohort=%s digest=%s why=%r",
                *(e.what, e.number, e.alarm.kind, e.alarm.severity, e.alarm.cohort, e.digest, e.why),
            )
            self._tell(e)

    def _ask(self, taken: _Taken, wish: Wish) -> None:
        """Asks for a better model, in the look's own transaction, unless it was asked for or it is too soon."""
        asked, latest_ns = self._ledger.asked(taken.model)
        if retrain.held_back(taken.digest, asked, latest_ns, self._retrain, taken.at_ns):
            return
        request = retrain.request(
            self._fleet,
            taken.model,
            taken.digest,
            wish,
            taken.judge.book.open,
            taken.blocks,
            taken.judge.attributes,
            taken.at_ns,
        )
        self._ledger.put_retrain(request, "waiting" if self._retrain.command else "recorded")
        self._ledger.put_audit(_entry("retrain request", request.why, request.model, taken.at_ns))
        log.warning("retrain_requested model=%s digest=%s why=%r", request.model, request.digest, request.why)

    def _note_waiting(
        self, digest: Digest, info: ArtifactInfo, ready: readiness.Readiness, now_ns: int
    ) -> None:
        """Before the first look of an artifact its verdict is ``insufficient``, with what is lacking."""
        if self._ledger.next_look(digest) or self._waiting.get(digest) == ready.reason:
            return
        self._waiting[digest] = ready.reason
        verdict = Verdict(
            kind="skew",
            model=info.manifest.name,
            digest=digest,
            cohort=FLEET,
            at_ns=now_ns,
            outcome=standing.INSUFFICIENT,
            reason=ready.reason,
            devices=ready.covered,
            left_out=ready.left_out,
        )
        with self._ledger.transaction():
            self._ledger.put_verdicts(digest, (verdict,))


def _slice(index: int, blocks: Sequence[Block]) -> Slice:
    readings = tuple(block.reading for block in blocks)
    return Slice(
        index=index,
        start_ns=min((r.start_ns for r in readings), default=0),
        end_ns=max((r.end_ns for r in readings), default=0),
        readings=readings,
    )


def _serves(record: DeviceRecord | None, digest: Digest) -> bool:
    """Whether more windows of the artifact may come from the device: it is worth waiting for."""
    if record is None:
        return True
    return record.online and any(report.serving == digest for report in record.models)


def _entry(what: str, why: str, model: ModelName, now_ns: int) -> AuditEntry:
    return AuditEntry(at_ns=now_ns, who="monitor", what=what, why=why, model=model)
