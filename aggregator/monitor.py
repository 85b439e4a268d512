"""Joins the stores to the judge: when enough has come in, take a look, have it judged, keep what it means."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from aggregator.adapters.registry import Registry
from aggregator.config import AggregatorConfig
from aggregator.core import late, readiness, retrain, standing, telling
from aggregator.core.accuracy import estimate
from aggregator.core.cohorts import FLEET
from aggregator.core.ingest import check_profile
from aggregator.core.judge import Judge
from aggregator.gathering import NOTHING, blocks_of, gathered, judge_of, slice_of
from aggregator.looks import AlarmEvent, Block, Look, Slice, Verdict, Wish
from aggregator.records import AuditEntry, DeviceRecord
from aggregator.stores import DriftLedger, WindowStore
from edge_runtime.contract.ids import DeviceId, Digest, ModelName
from edge_runtime.contract.manifest import ArtifactInfo
from edge_runtime.contract.profile import empty_profile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Taken:
    """One look and what led to it; ``first_looks`` is what it added to `Judge.first_looks`."""

    digest: Digest
    model: ModelName
    at_ns: int
    judge: Judge
    blocks: tuple[Block, ...]
    labels: late.Arrived
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
    enough to compare devices with the training. What became of incidents is put into the ledger's outbox with them.
    """

    def __init__(
        self,
        config: AggregatorConfig,
        windows: WindowStore,
        ledger: DriftLedger,
        registry: Registry,
    ) -> None:
        self._fleet = config.fleet
        self._config = config.drift
        self._retrain = config.retrain
        self._windows = windows
        self._ledger = ledger
        self._registry = registry
        self._sinks = config.alarms.sinks
        self._cursors = ledger.cursors()
        self._label_cursors = ledger.label_cursors()
        self._go_back()
        self._judges: dict[Digest, Judge] = {}
        self._next: dict[Digest, int] = {}
        self._waiting: dict[Digest, str] = {}

    def check(self, devices: Mapping[DeviceId, DeviceRecord], now_ns: int) -> tuple[Verdict, ...]:
        """Takes every look that is due and returns the verdicts it led to."""
        self._settle()
        self._retire(devices, now_ns)
        self._forget(devices)
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

    def _go_back(self) -> None:
        """Where the store holds less than looks have used, they go on from what it holds.

        So it is where an older telemetry store stands in the place of the one that the ledger knows, or an empty one:
        it gives its numbers anew, and what comes would not be looked at before they have risen as far as once.
        """
        windows, labels = self._windows.numbered()
        gone = [key for key, last in self._cursors.items() if last > windows]
        gone_labels = [key for key, last in self._label_cursors.items() if last > labels]
        if not gone and not gone_labels:
            return
        with self._ledger.transaction():
            for key in gone:
                self._ledger.put_cursor(*key, windows)
            for key in gone_labels:
                self._ledger.put_label_cursor(*key, labels)
        self._cursors |= dict.fromkeys(gone, windows)
        self._label_cursors |= dict.fromkeys(gone_labels, labels)
        log.warning(
            "telemetry_went_back windows=%d labels=%d cursors=%d label_cursors=%d: looks had used more than the"
            " telemetry store ever held, so it was restored or begun anew; they go on from what it holds",
            *(windows, labels, len(gone), len(gone_labels)),
        )

    def _forget(self, devices: Mapping[DeviceId, DeviceRecord]) -> None:
        """Lets go of the judges of artifacts that the fleet has moved on from: they are large, and the ledger has them.

        While nobody who serves the model is online, nobody has moved on. `_waiting` stays: it is a line of text, and
        without it the same verdict would be written again and again.
        """
        serving: dict[ModelName, set[Digest]] = {}
        for record in devices.values() if self._judges else ():
            for report in record.models if record.online else ():
                if report.serving is not None:
                    serving.setdefault(report.model, set()).add(report.serving)
        for digest in tuple(self._judges):
            info = self._registry.info(digest)
            served = serving.get(info.manifest.name) if info is not None else None
            if served and digest not in served:
                del self._judges[digest], self._next[digest]

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
            self._judges[digest] = self._judge_from(digest, info, self._ledger.first_looks(digest))
        return self._judges[digest]

    def _judge_from(self, digest: Digest, info: ArtifactInfo, first_looks: Sequence[Slice]) -> Judge:
        return judge_of(
            info,
            self._config,
            first_looks=first_looks,
            traces=self._ledger.traces(digest),
            suspects=self._ledger.suspects(digest),
        )

    def _labels(self, digest: Digest, judge: Judge, blocks: Iterable[Block]) -> late.Arrived:
        """What became known since the last looks."""
        after = {device: last for (of, device), last in self._label_cursors.items() if of == digest}
        return late.arrived(
            self._windows.late(digest, after),
            judge.first_looks,
            [block.reading.device for block in blocks],
            need=self._config.baseline_looks,
        )

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
            _log(events)

    def _check(
        self,
        digest: Digest,
        info: ArtifactInfo,
        senders: Sequence[DeviceId],
        devices: Mapping[DeviceId, DeviceRecord],
        now_ns: int,
    ) -> tuple[Verdict, ...]:
        cursors = {device: self._cursor(digest, device) for device in senders}
        pending = self._windows.pending(digest, cursors)
        seen = gathered(
            lambda device: pending.get(device, NOTHING),
            senders,
            self._config,
            serves=lambda device: _serves(devices.get(device), digest),
            now_ns=now_ns,
        )
        ready = seen.ready
        if not ready.ready:
            self._note_waiting(digest, info, ready, now_ns)
            return ()
        blocks = blocks_of(self._windows, self._config, digest, cursors, covered=ready.covered)
        judge = self._judge(digest, info)
        labels = self._labels(digest, judge, blocks)
        if labels.past:  # a past that is known better is learned anew
            first_looks = late.amended(judge.first_looks, labels.past)
            judge = self._judges[digest] = self._judge_from(digest, info, first_looks)
        judge.attributes = {
            d: dict(devices[d].attributes) for d in (*seen.active, *labels.now) if d in devices
        }
        known = len(judge.first_looks)
        try:
            one = slice_of(self._next[digest], blocks)
            nothing = empty_profile(info.reference.spec, probabilities=info.manifest.probabilities)
            look = judge.look(late.told(one, labels.now, nothing))
            # Late labels are of other times than the look's estimate: here it is held against the windows' own.
            look = replace(look, estimate=estimate(one.readings))
            taken = _Taken(
                digest=digest,
                model=info.manifest.name,
                at_ns=now_ns,
                judge=judge,
                blocks=blocks,
                labels=labels,
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

    def _keep(self, taken: _Taken, verdicts: Sequence[Verdict]) -> None:
        """One transaction: a look is counted once, also when the process dies in the middle."""
        digest, model, look, at_ns = taken.digest, taken.model, taken.look, taken.at_ns
        cursors = {(digest, block.reading.device): block.last for block in taken.blocks}
        with self._ledger.transaction():
            for (_, device), last in cursors.items():
                self._ledger.put_cursor(digest, device, last)
            for device, last in taken.labels.last.items():
                self._ledger.put_label_cursor(digest, device, last)
            for (index, device), (labelled, correct) in taken.labels.past.items():
                self._ledger.amend_first_look(digest, index, device, labelled=labelled, correct=correct)
            for one in taken.first_looks:
                self._ledger.put_first_look(digest, one)
            self._ledger.put_look(digest, model, look, at_ns, max(cursors.values(), default=0))
            events = self._ledger.put_traces(digest, model, taken.judge.book.traces, at_ns)
            self._ledger.put_verdicts(digest, verdicts)
            self._note(events)
            if look.wish is not None:
                self._ask(taken, look.wish)
        self._cursors.update(cursors)
        self._label_cursors.update({(digest, device): last for device, last in taken.labels.last.items()})
        self._next[digest] = look.index + 1
        self._waiting.pop(digest, None)
        for v in verdicts:
            log.info(
                "verdict kind=%s cohort=%s outcome=%s p=%.4g digest=%s reason=%r",
                *(v.kind, v.cohort, v.outcome, v.p, v.digest, v.reason),
            )
        _log(events)

    def _note(self, events: Sequence[AlarmEvent]) -> None:
        """Part of the incidents' own transaction: what is told is what is kept."""
        self._ledger.put_tellings(telling.tellings(self._fleet, events, self._sinks))
        for e in events:
            what = f"{e.what} incident {e.number}: {e.alarm.kind} of {e.alarm.cohort}"
            self._ledger.put_audit(_entry(what, e.why, e.model, e.at_ns))

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


def _serves(record: DeviceRecord | None, digest: Digest) -> bool:
    """Whether more windows of the artifact may come from the device: it is worth waiting for."""
    if record is None:
        return True
    return record.online and any(report.serving == digest for report in record.models)


def _entry(what: str, why: str, model: ModelName, now_ns: int) -> AuditEntry:
    return AuditEntry(at_ns=now_ns, who="monitor", what=what, why=why, model=model)


def _log(events: Iterable[AlarmEvent]) -> None:
    for e in events:
        log.info(
            "incident_%s number=%d kind=%s severity=%s cohort=%s digest=%s why=%r",
            *(e.what, e.number, e.alarm.kind, e.alarm.severity, e.alarm.cohort, e.digest, e.why),
        )
