"""What the aggregator has stored, read from another process while it runs."""

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from aggregator.adapters.ledger import Ledger, exists
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig, load
from aggregator.core.accuracy import accuracies
from aggregator.records import (
    Accuracy,
    DeviceRecord,
    DeviceTotals,
    DeviceTruth,
    Rollout,
    Selection,
    StoreFigures,
)
from edge_runtime.contract.ids import DeviceId, Digest, RolloutId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Window


class FleetView:
    """Questions to the stores of the aggregator that ``config`` describes; opened anew for each question.

    Raises `ConfigError` when the stores are not there yet; see `ready`.
    """

    def __init__(self, config: Path | AggregatorConfig) -> None:
        self.config = config if isinstance(config, AggregatorConfig) else load(config)

    def ready(self) -> bool:
        """Whether both stores exist."""
        return exists(self.config.ledger_at) and self.config.windows_path.exists()

    def _ledger(self) -> Ledger:
        return Ledger(self.config.ledger_at, read_only=True)

    def _ledger_to_write(self) -> Ledger:
        """The ledger as the service left it: whoever asks for something neither makes one nor takes one forward."""
        self._ledger().close()
        return Ledger(self.config.ledger_at)

    def _windows(self) -> Windows:
        return Windows(self.config.windows_path, read_only=True)

    # ── devices ────────────────────────────────────────────────────────────────────────────────────────

    def devices(self) -> tuple[DeviceRecord, ...]:
        """Every device that ever spoke."""
        ledger = self._ledger()
        try:
            return ledger.devices()
        finally:
            ledger.close()

    def online(self) -> tuple[DeviceRecord, ...]:
        """The devices whose session lives."""
        return tuple(device for device in self.devices() if device.online)

    def serving(self, model: str) -> dict[str, int]:
        """How many online devices say that they serve each digest, and have committed it."""
        found: dict[str, int] = {}
        for device in self.online():
            report = device.report(model)
            if report is not None and report.serving is not None and report.state != "trial":
                found[report.serving] = found.get(report.serving, 0) + 1
        return found

    def outcomes(self, model: str, digest: Digest) -> tuple[tuple[DeviceId, str, str], ...]:
        """The devices that refused ``digest`` or rolled back from it: name, outcome, reason."""
        found = []
        for device in self.devices():
            report = device.report(model)
            if (
                report is not None
                and report.outcome_digest == digest
                and report.outcome in ("refused", "rolled_back")
            ):
                found.append((device.device, report.outcome, report.reason))
        return tuple(found)

    def shadow(self, model: str, rollout: RolloutId) -> tuple[int, int]:
        """How many live rows the candidate answered in the shadow on all devices, and how many otherwise."""
        reports = [report for device in self.devices() if (report := device.report(model)) is not None]
        of_it = [report for report in reports if report.rollout == rollout]
        return sum(r.shadow_rows for r in of_it), sum(r.shadow_disagreed for r in of_it)

    def named(self, attributes: Mapping[str, Collection[str]]) -> tuple[DeviceId, ...]:
        """The devices whose attributes have one of the given values each."""
        return tuple(
            device.device
            for device in self.devices()
            if all(device.attribute(name) in values for name, values in attributes.items())
        )

    def needed(self) -> dict[Digest, str]:
        """The models that a device serves or the newest release or rollout of a cohort names, and which of these."""
        ledger = self._ledger()
        try:
            tracks, devices = ledger.tracks(), ledger.devices()
        finally:
            ledger.close()
        found: dict[Digest, str] = {}
        for track in tracks:
            for what, named in (("rollout", track.rollout), ("release", track.release)):
                for digest in (named.candidate, named.incumbent) if named is not None else ():
                    if digest is not None:
                        found[digest] = f"the {what} of cohort {track.cohort} names it"
        for device in devices:
            for report in device.models:
                if report.serving is not None:
                    found[report.serving] = f"{device.device} serves it"
        return found

    # ── control ────────────────────────────────────────────────────────────────────────────────────────

    def table(self, name: str, limit: int = 100) -> tuple[dict[str, Any], ...]:
        """The newest rows of a table of the ledger; see `Ledger.table`."""
        ledger = self._ledger()
        try:
            return ledger.table(name, limit)
        finally:
            ledger.close()

    def rollout(self, model: str, cohort: str = "main") -> Rollout | None:
        """The newest rollout of a model in a cohort."""
        ledger = self._ledger()
        try:
            return next((t.rollout for t in ledger.tracks() if (t.cohort, t.model) == (cohort, model)), None)
        finally:
            ledger.close()

    def answer(self, number: int) -> tuple[str, str]:
        """What became of a request; see `Ledger.answer`."""
        ledger = self._ledger()
        try:
            return ledger.answer(number)
        finally:
            ledger.close()

    def request(self, kind: str, document: Mapping[str, object], *, by: str, why: str) -> int:
        """Leaves an order for the running service and returns its number."""
        ledger = self._ledger_to_write()
        try:
            return ledger.request(kind, document, by=by, why=why, now_ns=time.time_ns())
        finally:
            ledger.close()

    def withdraw(self, number: int) -> tuple[str, str]:
        """Takes a request back unless the service has it; see `Ledger.withdraw`."""
        ledger = self._ledger_to_write()
        try:
            return ledger.withdraw(number)
        finally:
            ledger.close()

    def acknowledge(self, number: int, *, by: str) -> bool:
        """Somebody has seen an incident; see `Ledger.acknowledge`."""
        ledger = self._ledger_to_write()
        try:
            return ledger.acknowledge(number, by=by, at_ns=time.time_ns())
        finally:
            ledger.close()

    # ── telemetry ──────────────────────────────────────────────────────────────────────────────────────

    def figures(self) -> StoreFigures:
        """The telemetry store's totals."""
        windows = self._windows()
        try:
            return windows.figures()
        finally:
            windows.close()

    def totals(self, selection: Selection) -> tuple[DeviceTotals, ...]:
        """Counts per device and artifact."""
        windows = self._windows()
        try:
            return windows.totals(selection)
        finally:
            windows.close()

    def accuracy(self, digest: Digest, attributes: Mapping[str, Collection[str]]) -> tuple[int, int]:
        """Labelled and correct rows in the windows of one artifact from devices with these attributes."""
        devices = self.named(attributes)
        if not devices:
            return 0, 0
        totals = self.totals(Selection(digest=digest, devices=devices))
        return sum(t.labelled for t in totals), sum(t.correct for t in totals)

    def truths(self) -> tuple[DeviceTruth, ...]:
        """What is known of right answers, by device and artifact; nothing before there is a store."""
        if not self.config.windows_path.exists():
            return ()
        windows = self._windows()
        try:
            return windows.truths()
        finally:
            windows.close()

    def accuracies(self) -> tuple[Accuracy, ...]:
        """The same by artifact and cohort, beside the estimate."""
        attributes = {device.device: dict(device.attributes) for device in self.devices()}
        return accuracies(self.truths(), attributes, self.config.drift.attributes)

    def latency(self, selection: Selection) -> LatencyHistogram:
        """All latencies of the selected windows."""
        windows = self._windows()
        try:
            return windows.latency(selection)
        finally:
            windows.close()

    def wire_bytes_p50(self) -> int:
        """The median size of a stored window on the wire."""
        windows = self._windows()
        try:
            return windows.wire_bytes(Selection())
        finally:
            windows.close()

    def windows(self, selection: Selection) -> Sequence[Window]:
        """The selected windows, oldest first."""
        windows = self._windows()
        try:
            return tuple(windows.windows(selection))
        finally:
            windows.close()
