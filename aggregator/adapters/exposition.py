"""Figures for Prometheus: their names, and the page that shows them. The only prometheus_client import.

Names follow https://prometheus.io/docs/practices/naming/: base units, ``_total`` for what only rises, and labels whose
values are few and not for devices to choose. `FIGURES` is the whole list; docs/reference/metrics.md shows it.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aggregator.records import CAUSES, Accuracy, Batch, Outlook, SinkState
from edge_runtime.contract.errors import ConfigError

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
IDENTITIES: Final = ("aggregator", "coordinator")
PARTS: Final = ("intake", "leader", "lease")
"""Who asks the stores: whatever devices send, what the leader decides, and who leads."""
ENDS: Final = ("told", "failed", "given_up")
"""What becomes of an attempt to tell an alarm event, or of the event."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric: its name as expressions write it (a histogram's without its suffix), type, labels and meaning."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


def _named(kind: str, *rows: tuple[str, tuple[str, ...], str]) -> tuple[Figure, ...]:
    return tuple(Figure(f"skiff_{name}", kind, labels, text) for name, labels, text in rows)


OF_PROCESS: Final = (
    *_named("info", ("build_info", ("version",), "The skiff that runs.")),
    *_named(
        "counter",
        ("ingest_messages_total", (), "Messages looked at."),
        ("ingest_windows_total", (), "Windows stored."),
        (
            "ingest_duplicates_total",
            (),
            "Windows and events that were stored already, and acknowledged again.",
        ),
        ("ingest_overlaps_total", (), "Windows that overlap stored ones, and were not counted again."),
        ("ingest_events_total", (), "Events received."),
        ("ingest_statuses_total", (), "Births and deaths received."),
        ("ingest_labels_total", (), "Messages of late labels stored."),
        ("ingest_acks_total", (), "Acknowledgements published, one per device and batch."),
        (
            "ingest_unsaid_acks_total",
            (),
            "Acknowledgements that could not be published; the windows come again.",
        ),
        ("ingest_shed_total", (), "Messages not looked at, because their sender had too many waiting."),
        ("ingest_dead_letters_total", ("cause",), "Messages that break the contract."),
        ("store_errors_total", ("part",), "Times that a store failed: disk full, locked, connection lost."),
        ("alarm_deliveries_total", ("sink", "end"), "Alarm events by what became of telling them."),
    ),
    *_named(
        "histogram",
        ("ingest_batch_seconds", (), "Time from a batch's first decoding to its last acknowledgement."),
        ("store_commit_seconds", (), "Time to commit a batch to the window store."),
    ),
    *_named(
        "gauge",
        ("ingest_newest_window_timestamp_seconds", (), "When this process last stored a window; 0 before."),
        ("link_connected", ("identity",), "Whether the broker has accepted this process (1) or not (0)."),
        ("leader", (), "Whether this process leads (1) or not (0)."),
        ("store_failing", ("part",), "Whether a store fails (1) or not (0); what cannot be stored waits."),
        ("alarm_waiting", ("sink",), "Alarm events that a sink has not taken yet."),
        ("alarm_sink_failing", ("sink",), "Whether a sink fails (1) or not (0); it is tried again."),
    ),
)
OF_FLEET: Final = (
    *_named(
        "counter",
        ("store_windows_total", (), "Windows stored since the store was made."),
        ("store_rows_total", (), "Rows of those windows."),
        ("store_dead_letters_total", (), "Dead letters since the store was made, repeated ones too."),
    ),
    *_named(
        "gauge",
        ("store_unjudged_windows", (), "Windows of artifacts that nobody has published here."),
        ("store_rejected_windows", (), "Windows that contradict the artifact that was published later."),
        ("store_dead_letters", (), "Dead letters kept."),
        ("fleet_devices_known", (), "Devices that ever spoke."),
        ("fleet_devices_online", (), "Devices that are online."),
        ("fleet_devices_silent", (), "Devices that are online and sent no window for a while."),
        ("drift_verdicts", ("kind", "outcome"), "Standing verdicts."),
        ("drift_incidents_open", ("kind", "severity"), "Open incidents."),
        ("retrain_requests", ("state",), "Retrain requests by what became of them."),
        ("rollouts", ("state",), "Cohorts and models by the state of their newest rollout."),
        (
            "model_latency_seconds",
            ("model", "quantile"),
            "Time of a prediction on the fleet's devices, from each model's newest windows.",
        ),
        ("model_labelled_rows", ("model",), "Rows whose right answer is known, told by devices or later."),
        (
            "model_accuracy",
            ("model",),
            "Share of right answers among them, of what devices serve now, the mean over devices.",
        ),
        ("model_accuracy_half_width", ("model",), "Half the width of its 95 % interval over devices."),
        (
            "model_estimated_accuracy",
            ("model",),
            "Estimate without labels, of the same devices and times.",
        ),
        ("model_estimate_error", ("model",), "Estimate minus truth, the mean over devices."),
        ("model_estimate_error_half_width", ("model",), "Half the width of its 95 % interval over devices."),
    ),
)
FIGURES: Final = (*OF_PROCESS, *OF_FLEET)
"""Everything on the page. What only the leader knows (`OF_FLEET`) is absent from other processes' pages."""


class Exposition:
    """What one process shows. Counters begin at 0 with it, except those of the store."""

    def __init__(self, version: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry: Final = CollectorRegistry()
        self._of = {figure.name: _made(figure, self.registry) for figure in OF_PROCESS}
        self._fleet = _Fleet()
        self.registry.register(self._fleet)
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self._info("skiff_build_info").info({"version": version})
        for cause in CAUSES:
            self._counter("skiff_ingest_dead_letters_total").labels(cause)
        for identity in IDENTITIES:
            self.link(identity, connected=False)
        for part in PARTS:
            self._counter("skiff_store_errors_total").labels(part)
            self.store(part, failing=False)

    # ── what happened ──────────────────────────────────────────────────────────────────────────────────

    def batch(self, batch: Batch, now_seconds: float) -> None:
        """Counts one batch; ``now_seconds`` is wall-clock time."""
        counts = {
            "messages": batch.messages,
            "windows": batch.windows,
            "duplicates": batch.duplicates,
            "overlaps": batch.overlaps,
            "events": batch.events,
            "statuses": batch.statuses,
            "labels": batch.labels,
            "acks": batch.acks,
            "unsaid_acks": batch.unsaid,
            "shed": batch.shed,
        }
        for name, count in counts.items():
            self._counter(f"skiff_ingest_{name}_total").inc(count)
        for cause, count in batch.dead:
            self._counter("skiff_ingest_dead_letters_total").labels(cause).inc(count)
        self._histogram("skiff_ingest_batch_seconds").observe(batch.seconds)
        if batch.commit_seconds is not None:
            self._histogram("skiff_store_commit_seconds").observe(batch.commit_seconds)
        if batch.windows:
            self._gauge("skiff_ingest_newest_window_timestamp_seconds").set(now_seconds)

    def link(self, identity: str, *, connected: bool) -> None:
        """Whether the broker has accepted one of `IDENTITIES`."""
        self._gauge("skiff_link_connected").labels(identity).set(connected)

    def store_error(self, part: str) -> None:
        """A store failed one of `PARTS`."""
        self._counter("skiff_store_errors_total").labels(part).inc()
        self.store(part, failing=True)

    def store(self, part: str, *, failing: bool) -> None:
        """Whether a store fails one of `PARTS`."""
        self._gauge("skiff_store_failing").labels(part).set(failing)

    def alarm(self, sink: str, end: str) -> None:
        """Counts one of `ENDS` for a sink."""
        self._counter("skiff_alarm_deliveries_total").labels(sink, end).inc()

    def sinks(self, states: Iterable[SinkState]) -> None:
        """How it stands with whoever is told of alarms; nothing waits where nobody leads."""
        for state in states:
            for end in ENDS:
                self._counter("skiff_alarm_deliveries_total").labels(state.sink, end)
            self._gauge("skiff_alarm_waiting").labels(state.sink).set(state.waiting)
            self._gauge("skiff_alarm_sink_failing").labels(state.sink).set(state.failing)

    def fleet(self, outlook: Outlook | None) -> None:
        """What the leader sees; None when this process does not lead."""
        self._gauge("skiff_leader").set(outlook is not None)
        self._fleet.outlook = outlook

    # ── the page ───────────────────────────────────────────────────────────────────────────────────────

    def serve(self, host: str, port: int) -> int:
        """Answers ``GET /metrics`` in a thread of its own until `close`; returns the port.

        Raises:
            ConfigError: nobody can listen there.
        """
        try:
            self._server = start_http_server(port, host, self.registry)
        except OSError as e:
            raise ConfigError(
                f"metrics.listen: cannot listen on {host}:{port} ({e.strerror or e}); name a free port of this machine"
            ) from e
        return self._server[0].server_port

    def close(self) -> None:
        """Stops answering."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _counter(self, name: str) -> Counter:
        found = self._of[name]
        assert isinstance(found, Counter)
        return found

    def _gauge(self, name: str) -> Gauge:
        found = self._of[name]
        assert isinstance(found, Gauge)
        return found

    def _histogram(self, name: str) -> Histogram:
        found = self._of[name]
        assert isinstance(found, Histogram)
        return found

    def _info(self, name: str) -> Info:
        found = self._of[name]
        assert isinstance(found, Info)
        return found


class _Fleet(Collector):
    """The figures of one `Outlook`, all of the same moment."""

    def __init__(self) -> None:
        self.outlook: Outlook | None = None

    def collect(self) -> Iterable[Metric]:
        """One family for each of `OF_FLEET`; none without an outlook."""
        outlook = self.outlook
        if outlook is None:
            return
        values = _values(outlook)
        for figure in OF_FLEET:
            family = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
            made = family(figure.name, figure.help, labels=figure.labels)
            for labels, value in values[figure.name].items():
                made.add_metric(labels, value)
            yield made


def _values(o: Outlook) -> dict[str, Mapping[tuple[str, ...], float]]:
    """Values by labels, for each of `OF_FLEET`."""
    store = o.store
    single = {
        "store_windows_total": store.windows,
        "store_rows_total": store.rows,
        "store_dead_letters_total": store.dead_letters_ever,
        "store_unjudged_windows": store.unjudged,
        "store_rejected_windows": store.rejected,
        "store_dead_letters": store.dead_letters,
        "fleet_devices_known": o.known,
        "fleet_devices_online": o.online,
        "fleet_devices_silent": o.silent,
    }
    return {
        **{f"skiff_{name}": {(): float(value)} for name, value in single.items()},
        "skiff_drift_verdicts": {(kind, outcome): n for kind, outcome, n in o.verdicts},
        "skiff_drift_incidents_open": {(kind, severity): n for kind, severity, n in o.incidents},
        "skiff_retrain_requests": {(state,): n for state, n in o.retrains},
        "skiff_rollouts": {(state,): n for state, n in o.rollouts},
        "skiff_model_latency_seconds": {(model, f"{q:g}"): ns / 1e9 for model, q, ns in o.latency},
        **_accuracies(o.accuracies),
    }


def _accuracies(known: Iterable[Accuracy]) -> dict[str, Mapping[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {
        f"skiff_model_{name}": {}
        for name in (
            *("labelled_rows", "accuracy", "accuracy_half_width", "estimated_accuracy"),
            *("estimate_error", "estimate_error_half_width"),
        )
    }
    for one in known:
        values = (one.labelled, one.known, one.half, one.estimated, one.error, one.error_half)
        for family, value in zip(found.values(), values, strict=True):
            if value is not None:
                family[one.model,] = float(value)
    return dict(found)


def _made(figure: Figure, registry: CollectorRegistry) -> Counter | Gauge | Histogram | Info:
    match figure.kind:
        case "counter":
            return Counter(figure.name, figure.help, figure.labels, registry=registry)
        case "histogram":
            return Histogram(figure.name, figure.help, figure.labels, registry=registry, buckets=SECONDS)
        case "info":
            return Info(figure.name.removesuffix("_info"), figure.help, registry=registry)
    return Gauge(figure.name, figure.help, figure.labels, registry=registry)


def reference() -> str:
    """docs/reference/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "What `[metrics] listen` shows, written by `python -m aggregator.adapters.exposition`.",
        "No label names a device.",
        "",
    ]
    parts = (
        ("Every process", OF_PROCESS),
        ("The leader alone", OF_FLEET),
    )
    for title, figures in parts:
        lines += [f"## {title}", "", "| Name | Type | Labels | What it is |", "| --- | --- | --- | --- |"]
        for f in figures:
            labels = ", ".join(f"`{label}`" for label in f.labels) or "-"
            lines.append(f"| `{f.name}` | {f.kind} | {labels} | {f.help} |")
        lines.append("")
    lines += [f"`cause` is one of {', '.join(f'`{cause}`' for cause in CAUSES)}.", ""]
    lines += [f"`part` is one of {', '.join(f'`{part}`' for part in PARTS)}.", ""]
    lines += [f"`end` is one of {', '.join(f'`{end}`' for end in ENDS)}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    sys.stdout.write(reference())
