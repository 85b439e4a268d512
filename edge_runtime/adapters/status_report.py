"""What ``skiffd --status`` says: the report, its JSON document, and the document as text for a person.

The document is for scripts, too: keys carry their unit, unknown figures are 0, and later versions only add keys. The
text is made from the document alone, so that a newer ``skiffd --status`` can read an older daemon.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Final

from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Health, ModelReport

VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows since the daemon started, by outcome; ``refused`` by reason, rows that were shed among them."""

    answered: int = 0
    failed: int = 0
    refused: tuple[tuple[str, int], ...] = ()
    labelled: int = 0
    correct: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsReport:
    """The limits in force (0: none), which one is passed (``soft``, ``hard`` or ""), and what is done about it."""

    rss_soft_bytes: int = 0
    rss_bytes: int = 0
    cpu_soft_ppm: int = 0
    temperature_soft_mc: int = 0
    on_hard: str = ""
    over: str = ""
    shedding: bool = False
    max_batch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxReport:
    """Records that wait for the aggregator's word; ``lost`` counts those dropped, ``merged`` those joined to others.

    ``trouble`` says why the disk does not hold them now; "" when it does.
    """

    records: int = 0
    size_bytes: int = 0
    max_bytes: int = 0
    merged: int = 0
    lost: int = 0
    trouble: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """The way to the broker; ``since_seconds`` how long it has been as it is, ``reason`` why it is down."""

    broker: str
    connected: bool
    since_seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """Everything the daemon says of itself. ``clock`` is ``synced`` or ``unsynced``; ``wall_ns`` since 1970.

    ``latency`` and ``queueing`` are of the window that is open; ``window_age_seconds`` is how long it has been.
    """

    version: str
    fleet: str
    device: str
    cohort: str
    session: str
    wall_ns: int
    clock: str
    models: tuple[ModelReport, ...] = ()
    rows: Rows = field(default_factory=Rows)
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    queueing: LatencyHistogram = field(default_factory=LatencyHistogram)
    window_age_seconds: float = 0.0
    health: Health = field(default_factory=Health)
    limits: LimitsReport = field(default_factory=LimitsReport)
    outbox: OutboxReport = field(default_factory=OutboxReport)
    link: LinkReport = field(default_factory=lambda: LinkReport(broker="", connected=False))
    last_exit: str = ""
    restarts: int = 0
    starts: int = 0


def to_document(report: DeviceReport) -> dict[str, Any]:
    """The report as JSON can hold it; histograms become their count and quantiles, in nanoseconds."""
    document = {
        name: getattr(report, name)
        for name in (
            "fleet",
            "device",
            "cohort",
            "session",
            "wall_ns",
            "clock",
            "window_age_seconds",
            "last_exit",
            "restarts",
            "starts",
        )
    }
    return {
        "status_version": VERSION,
        "skiffd": report.version,
        **document,
        "models": [asdict(model) for model in report.models],
        "rows": {**asdict(report.rows), "refused": dict(report.rows.refused)},
        "latency": _quantiles(report.latency),
        "queueing": _quantiles(report.queueing),
        "health": asdict(report.health),
        "limits": asdict(report.limits),
        "outbox": asdict(report.outbox),
        "link": asdict(report.link),
    }


def _quantiles(times: LatencyHistogram) -> dict[str, int]:
    count = times.count
    return {
        "count": count,
        **{f"p{q}_ns": round(times.quantile_ns(q / 100)) if count else 0 for q in (50, 90, 99)},
    }


# ── as text ────────────────────────────────────────────────────────────────────────────────────────────


def render(document: Mapping[str, Any]) -> str:
    """A status document as lines of text, a label and what it says. Keys that are absent are left out."""
    d = _Reader(document)
    lines = [
        ("device", f"{d.text('device')} of fleet {d.text('fleet')}, cohort {d.text('cohort')}"),
        ("skiffd", f"{d.text('skiffd')}, session {d.text('session')}"),
    ]
    health = d.section("health")
    lines += [("uptime", _duration(health.number("uptime_ns") / 1e9))]
    lines += _starts(d)
    for model in d.sections("models"):
        lines += _model(model)
    lines += _rows(d.section("rows"))
    age = d.number("window_age_seconds")
    since = f" in the open window ({_duration(age)})" if age else ""
    lines += [(label, _times(d.section(label)) + since) for label in ("latency", "queueing")]
    lines += _health(health)
    lines += _limits(d.section("limits"))
    lines += _outbox(d.section("outbox"))
    lines += _link(d.section("link"))
    lines += [("clock", f"{d.text('clock')}, {_moment(d.number('wall_ns'))}")]
    width = max(len(label) for label, _ in lines) + 2
    return "".join(f"{label:<{width}}{_plain(what)}\n" for label, what in lines)


class _Reader:
    """A mapping of unknown content: what is absent or of another kind reads as nothing."""

    def __init__(self, mapping: object) -> None:
        self._mapping: Mapping[str, Any] = mapping if isinstance(mapping, Mapping) else {}

    def text(self, key: str) -> str:
        value = self._mapping.get(key)
        return value if isinstance(value, str) and value else "unknown"

    def has(self, key: str) -> bool:
        return bool(self._mapping.get(key))

    def number(self, key: str) -> float:
        value = self._mapping.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return 0.0
        return float(value) if abs(value) < 1e300 and math.isfinite(value) else 0.0

    def section(self, key: str) -> "_Reader":
        return _Reader(self._mapping.get(key))

    def sections(self, key: str) -> "list[_Reader]":
        value = self._mapping.get(key)
        return [_Reader(item) for item in value] if isinstance(value, list) else []

    def counts(self) -> list[tuple[str, int]]:
        return [(str(key), round(self.number(key))) for key in self._mapping]


_Lines = Iterator[tuple[str, str]]


def _starts(d: _Reader) -> _Lines:
    restarts = round(d.number("restarts"))
    streak = f"; {restarts} start{'s'[: restarts != 1]} in a row after no clean stop" if restarts else ""
    yield "last exit", f"{d.text('last_exit')}{streak}"


def _model(model: _Reader) -> _Lines:
    yield "model", f"{model.text('model')}: {model.text('state')}, serving {_digest(model, 'serving')}"
    if model.has("candidate"):
        yield "", f"candidate {_digest(model, 'candidate')}"
    if model.has("previous"):
        yield "", f"to fall back to: {_digest(model, 'previous')}"
    if model.has("rollout"):
        yield "", f"rollout {model.text('rollout')}, revision {model.number('revision'):.0f}"
    if model.has("outcome"):
        why = f": {model.text('reason')}" if model.has("reason") else ""
        yield "", f"last rollout {model.text('outcome')} {_digest(model, 'outcome_digest')}{why}"


def _rows(rows: _Reader) -> _Lines:
    parts = [f"{rows.number('answered'):.0f} answered", f"{rows.number('failed'):.0f} failed"]
    parts += [f"{count} refused ({reason})" for reason, count in rows.section("refused").counts()]
    if labelled := rows.number("labelled"):
        parts.append(f"{rows.number('correct') / labelled:.1%} of {labelled:.0f} with a known truth correct")
    yield "rows", ", ".join(parts)


def _times(times: _Reader) -> str:
    if not times.number("count"):
        return "none"
    parts = (f"{name} {_span(times.number(f'{name}_ns'))}" for name in ("p50", "p90", "p99"))
    return f"{', '.join(parts)} of {times.number('count'):.0f} rows"


def _health(health: _Reader) -> _Lines:
    parts = [f"RSS {_mb(health.number('rss_bytes'))}, peak {_mb(health.number('peak_rss_bytes'))}"]
    if health.has("pss_bytes"):
        parts.append(f"PSS {_mb(health.number('pss_bytes'))}")
    limit = health.number("memory_limit_bytes")
    parts.append(f"control group limit {_mb(limit)}" if limit else "no control group limit")
    yield "memory", ", ".join(parts)
    faults = f"{health.number('major_faults'):.0f} major faults, {health.number('minor_faults'):.0f} minor"
    yield "", f"pressure {health.number('memory_pressure_ppm') / 1e4:.2f} %, {faults}"
    cpu, uptime = health.number("cpu_ns"), health.number("uptime_ns")
    share = f", {cpu / uptime:.2%} of a core" if uptime else ""
    yield "CPU", f"{cpu / 1e9:.1f} s{share}"
    throttled = ("not slowed down", "slowed down now", "slowed down since boot, not now", "slowed down now")
    slowed = throttled[int(health.number("throttled")) & 3]
    degrees = health.number("temperature_mc")
    yield "heat", f"{f'{degrees / 1e3:.1f} °C' if degrees else 'no sensor'}, {slowed}"


def _limits(limits: _Reader) -> _Lines:
    figures = (
        ("RSS soft", limits.number("rss_soft_bytes"), _mb),
        ("hard", limits.number("rss_bytes"), _mb),
        ("CPU soft", limits.number("cpu_soft_ppm"), lambda ppm: f"{ppm / 1e4:.1f} %"),
        ("temperature soft", limits.number("temperature_soft_mc"), lambda mc: f"{mc / 1e3:.1f} °C"),
    )
    parts = [f"{label} {unit(value)}" for label, value, unit in figures if value]
    yield "limits", ", ".join(parts) or "none"
    if limits.has("over"):
        shedding = "; rows are answered with an error" if limits.has("shedding") else ""
        batch = f"; at most {limits.number('max_batch'):.0f} rows at once" if limits.has("max_batch") else ""
        yield "", f"over the {limits.text('over')} limit of memory{shedding}{batch}"


def _outbox(outbox: _Reader) -> _Lines:
    size = f"{outbox.number('size_bytes') / 1e3:.1f} kB of {_mb(outbox.number('max_bytes'))}"
    parts = [f"{outbox.number('records'):.0f} waiting, {size}"]
    parts += [f"{outbox.number(key):.0f} {key}" for key in ("merged", "lost") if outbox.has(key)]
    yield "outbox", ", ".join(parts)
    if outbox.has("trouble"):
        yield "", outbox.text("trouble")


def _link(link: _Reader) -> _Lines:
    state = "connected to" if link.has("connected") else "not connected to"
    why = f": {link.text('reason')}" if link.has("reason") and not link.has("connected") else ""
    yield "link", f"{state} {link.text('broker')} for {_duration(link.number('since_seconds'))}{why}"


def _digest(reader: _Reader, key: str) -> str:
    return reader.text(key)[:12] if reader.has(key) else "none"


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _span(ns: float) -> str:
    return f"{ns / 1e3:.1f} us" if ns < 1e6 else f"{ns / 1e6:.1f} ms" if ns < 1e9 else f"{ns / 1e9:.2f} s"


def _duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (unit, size), (smaller, part) in pairwise(units):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"


def _moment(wall_ns: float) -> str:
    if not 0 < wall_ns < 253402300800e9:  # the year 10000
        return "time unknown"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall_ns / 1e9))


def _plain(text: str) -> str:
    """Without control characters: reasons may quote what a peer sent, and a terminal obeys escapes."""
    return "".join(c if c.isprintable() else "?" for c in text)
