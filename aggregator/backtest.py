"""What the verdicts would have been under another configuration: the stored windows, through the same monitor again."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.registry import Registry
from aggregator.adapters.windows import Windows
from aggregator.config import AggregatorConfig
from aggregator.monitor import Monitor
from aggregator.records import Arrival, DeviceRecord, Verdict
from edge_runtime.contract.codec import encode
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.messages import ModelReport, Window


def backtest(
    config: AggregatorConfig,
    windows: Iterable[Window],
    devices: Mapping[DeviceId, DeviceRecord],
    folder: Path,
) -> tuple[Verdict, ...]:
    """Every verdict that ``config`` would have led to, oldest first.

    ``windows`` are replayed in their order into new stores in ``folder``, time being when they ended; a device serves
    what its newest window came from. ``devices`` gives their attributes. Nothing but ``folder`` is written, and no
    retrain hook runs.
    """
    store, ledger = Windows(folder / "windows.sqlite"), Ledger(folder / "ledger.sqlite")
    monitor = Monitor(config, store, ledger, Registry(config.registry))
    step_ns = int(config.drift.check_seconds * 1e9)
    serving: dict[DeviceId, DeviceRecord] = {}
    batch: list[Arrival] = []
    found: list[Verdict] = []
    now_ns = due_ns = 0
    try:
        for window in windows:
            now_ns = max(now_ns, window.end_ns)
            due_ns = due_ns or now_ns + step_ns
            # Unjudged, as if it had come before its artifact: the monitor then checks it against the layout itself.
            batch.append(Arrival(window=window, payload=encode(window), judged=False))
            if window.device in devices:
                report = ModelReport(model=window.model, state="committed", serving=window.digest)
                serving[window.device] = replace(devices[window.device], online=True, models=(report,))
            if now_ns >= due_ns:
                found += _look(store, monitor, batch, serving, now_ns)
                batch, due_ns = [], now_ns + step_ns
        found += _look(store, monitor, batch, serving, now_ns)
    finally:
        store.close()
        ledger.close()
    return tuple(found)


def _look(
    store: Windows,
    monitor: Monitor,
    batch: list[Arrival],
    serving: Mapping[DeviceId, DeviceRecord],
    now_ns: int,
) -> tuple[Verdict, ...]:
    store.append(batch, (), (), now_ns)
    return monitor.check(serving, now_ns)
