"""Joins the stores to the drift core: when enough has come in, take a look, judge it, keep what it means."""

import logging
from collections.abc import Mapping
from functools import partial

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.registry import Registry
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig
from aggregator.core import drift, incidents, retrain
from aggregator.core.cohorts import FLEET
from aggregator.core.ingest import check_profile
from aggregator.records import AuditEntry, Block, DeviceRecord, Judgement, Verdict
from edge_runtime.contract.ids import DeviceId, Digest, ModelName
from edge_runtime.contract.manifest import ArtifactInfo

log = logging.getLogger(__name__)


class Monitor:
    """Judges the fleet from what the stores hold. Owned by the service's loop; `check` may take a second on a look."""

    def __init__(
        self, config: AggregatorConfig, windows: Windows, ledger: Ledger, registry: Registry
    ) -> None:
        self._fleet = config.fleet
        self._config = config.drift
        self._retrain = config.retrain
        self._windows = windows
        self._ledger = ledger
        self._registry = registry
        self._cursors = ledger.cursors()
        self._looked = {trail.digest for trail in ledger.trails()}
        self._waiting: dict[Digest, str] = {}

    def check(self, devices: Mapping[DeviceId, DeviceRecord], now_ns: int) -> tuple[Verdict, ...]:
        """Takes every look that is due and returns the verdicts it led to."""
        self._settle()
        self._retire(devices, now_ns)
        found: list[Verdict] = []
        streams: dict[Digest, list[tuple[DeviceId, int]]] = {}
        for digest, device, newest in self._windows.streams():
            if newest > self._cursors.get((digest, device), 0):
                streams.setdefault(digest, []).append((device, newest))
        for digest, members in streams.items():
            info = self._registry.info(digest)
            if info is not None:
                found += self._check(digest, info, [device for device, _ in members], devices, now_ns)
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

    def _retire(self, devices: Mapping[DeviceId, DeviceRecord], now_ns: int) -> None:
        gone = incidents.retired(self._ledger.trails(), devices.values())
        if not gone:
            return
        why = "no online device of the cohort serves the artifact any more"
        with self._ledger.transaction():
            for trail in gone:
                self._ledger.retire(trail, now_ns, why)
                self._ledger.put_audit(
                    _entry(f"closed {trail.kind} of {trail.cohort}", why, trail.model, now_ns)
                )
                log.info(
                    "incident_retired kind=%s cohort=%s digest=%s", trail.kind, trail.cohort, trail.digest
                )

    def _check(
        self,
        digest: Digest,
        info: ArtifactInfo,
        senders: list[DeviceId],
        devices: Mapping[DeviceId, DeviceRecord],
        now_ns: int,
    ) -> tuple[Verdict, ...]:
        active, oldest = [], now_ns
        for device in senders:
            rows, seconds, since = self._windows.pending(digest, device, self._cursor(digest, device))
            coverage = drift.Coverage(device=device, rows=rows, seconds=seconds)
            if rows and (drift.covers(coverage, self._config) or _serves(devices.get(device), digest)):
                active.append(coverage)
                oldest = min(oldest, since)
        readiness = drift.readiness(active, (now_ns - oldest) / 1e9, self._config)
        if not readiness.ready:
            self._note_waiting(digest, info, readiness, now_ns)
            return ()
        blocks = [block for device in readiness.covered if (block := self._block(digest, device)) is not None]
        look = drift.Look(
            digest=digest,
            reference=info.reference,
            labels=info.manifest.labels,
            blocks=tuple(blocks),
            attributes={c.device: dict(devices[c.device].attributes) for c in active if c.device in devices},
            baseline=self._ledger.baseline(digest),
            origins=self._ledger.origins(digest),
        )
        findings = drift.judge(look, self._config)
        trails = {(t.cohort, t.kind): t for t in self._ledger.trails() if t.digest == digest}
        verdicts = incidents.verdicts(
            info.manifest.name,
            look,
            findings,
            before=trails,
            left_out=readiness.left_out,
            config=self._config,
            now_ns=now_ns,
        )
        self._keep(look, findings, verdicts, now_ns)
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

    def _keep(
        self, look: drift.Look, findings: drift.Findings, verdicts: tuple[Verdict, ...], now_ns: int
    ) -> None:
        """One transaction: a look is counted once, also when the process dies in the middle."""
        cursors = {(look.digest, block.device): block.last for block in look.blocks}
        with self._ledger.transaction():
            for (digest, device), last in cursors.items():
                self._ledger.put_cursor(digest, device, last)
            for block in look.blocks:
                if block.device not in look.origins:
                    self._ledger.put_origin(look.digest, block.device, block.profile)
            if look.baseline is None and findings.baseline is not None:
                self._ledger.put_baseline(look.digest, findings.baseline, now_ns)
            for v in verdicts:
                self._ledger.put_verdict(v, look=True)
                if v.changed:
                    what = f"{v.changed} {v.kind} of {v.cohort}"
                    self._ledger.put_audit(_entry(what, v.reason, v.model, now_ns))
            self._ask(look, verdicts, now_ns)
        self._cursors.update(cursors)
        self._looked.add(look.digest)
        self._waiting.pop(look.digest, None)
        for v in verdicts:
            log.info(
                "verdict kind=%s cohort=%s outcome=%s p=%.4f digest=%s reason=%r",
                *(v.kind, v.cohort, v.outcome, v.judgement.p, v.digest, v.reason),
            )

    def _ask(self, look: drift.Look, verdicts: tuple[Verdict, ...], now_ns: int) -> None:
        """Asks for a better model, when the verdicts call for one, in the look's own transaction."""
        asked, latest = self._ledger.asked(verdicts[0].model)
        calls = retrain.wanted(verdicts, asked, latest, self._retrain, now_ns)
        if calls:
            wish = retrain.request(self._fleet, calls, look.blocks, look.attributes, now_ns)
            self._ledger.put_retrain(wish, "waiting" if self._retrain.command else "recorded")
            self._ledger.put_audit(_entry("retrain request", wish.why, wish.model, now_ns))
            log.warning("retrain_requested model=%s digest=%s why=%r", wish.model, wish.digest, wish.why)

    def _note_waiting(
        self, digest: Digest, info: ArtifactInfo, readiness: drift.Readiness, now_ns: int
    ) -> None:
        """Before the first look of an artifact its verdict is ``insufficient``, with what is lacking."""
        if digest in self._looked or self._waiting.get(digest) == readiness.reason:
            return
        self._waiting[digest] = readiness.reason
        verdict = Verdict(
            kind="skew",
            model=info.manifest.name,
            digest=digest,
            cohort=FLEET,
            at_ns=now_ns,
            outcome=drift.INSUFFICIENT,
            reason=readiness.reason,
            judgement=Judgement(outcome=drift.INSUFFICIENT, reason=readiness.reason),
            devices=readiness.covered,
            left_out=readiness.left_out,
        )
        with self._ledger.transaction():
            self._ledger.put_verdict(verdict, look=False)


def _serves(record: DeviceRecord | None, digest: Digest) -> bool:
    """Whether more windows of the artifact may come from the device: it is worth waiting for."""
    if record is None:
        return True
    return record.online and any(report.serving == digest for report in record.models)


def _entry(what: str, why: str, model: ModelName, now_ns: int) -> AuditEntry:
    return AuditEntry(at_ns=now_ns, who="monitor", what=what, why=why, model=model)
