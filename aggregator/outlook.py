"""The fleet at one moment, asked of the stores for whoever shows it."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from aggregator.core.accuracy import by_model
from aggregator.records import DeviceRecord, Outlook, Selection
from aggregator.stores import LedgerStore, WindowStore
from edge_runtime.contract.ids import DeviceId

QUANTILES: Final = (0.5, 0.9, 0.99)
LATENCY_WINDOWS: Final = 200
LATENCY_NUMBERS: Final = 10_000
"""A model's newest windows are looked for among so many of the fleet's newest: one that nobody serves has none."""
MAX_MODELS: Final = 50
"""Models are named by releases, so by people; beyond this many the rest has no latency on the page."""
MAX_ROWS: Final = 10_000
"""Of open incidents, verdicts and requests, the newest."""


def outlook(
    ledger: LedgerStore,
    windows: WindowStore,
    devices: Iterable[DeviceRecord],
    *,
    sent_ns: Callable[[DeviceId], int],
    silent_before_ns: int,
) -> Outlook:
    """Counts what stands; takes milliseconds, whatever the stores hold.

    Silent is who is online and sent the last window or event, at ``sent_ns``, before ``silent_before_ns``.
    """
    records = tuple(devices)
    online = [record for record in records if record.online]
    served = {(record.device, report.serving) for record in online for report in record.models}
    tracks = ledger.tracks()
    incidents = Counter(
        (str(row["kind"]), str(row["severity"])) for row in ledger.table("open_severities", MAX_ROWS)
    )
    verdicts = Counter(
        (str(row["kind"]), str(row["outcome"])) for row in ledger.table("verdict_outcomes", MAX_ROWS)
    )
    latency = []
    after = max(0, windows.numbered()[0] - LATENCY_NUMBERS)
    for model in sorted({track.model for track in tracks})[:MAX_MODELS]:
        histogram = windows.latency(Selection(model=model, after=after, last=LATENCY_WINDOWS))
        if histogram.count:
            latency += [(model, q, histogram.quantile_ns(q)) for q in QUANTILES]
    return Outlook(
        known=len(records),
        online=len(online),
        silent=sum(sent_ns(record.device) < silent_before_ns for record in online),
        store=windows.figures(),
        verdicts=tuple((kind, outcome, n) for (kind, outcome), n in sorted(verdicts.items())),
        incidents=tuple((kind, severity, n) for (kind, severity), n in sorted(incidents.items())),
        retrains=_counted(str(row["state"]) for row in ledger.table("retrain_states", MAX_ROWS)),
        rollouts=_counted(track.rollout.state for track in tracks if track.rollout is not None),
        latency=tuple(latency),
        accuracies=by_model(truth for truth in windows.truths() if (truth.device, truth.digest) in served),
    )


def _counted(names: Iterable[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(names).items()))
