"""Raw rows as the windows that the devices would have sent, by the device's own engine, checks, cells and deadlines."""

import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aggregator.core import slicing
from aggregator.looks import Reading, Slice
from cli.backtest.table import UNLABELLED, Table
from edge_runtime.config.keys import SECTIONS
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import Binner
from edge_runtime.core.windowing import WindowPolicy, close_window, open_window
from edge_runtime.engine import Engine
from edge_runtime.schema import Schema

_WINDOW: Final = {
    key.name: key for section in SECTIONS if section.name == "window" for key in section.keys
}  # of a device's configuration
_UNITS: Final = {"s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86400 * 10**9}
_ALLOWED: Final = "give rows:N (N rows of a device each), or a time like 90s, 15m, 1h, at most 1d"

MUCH: Final = 0.1
"""A device of whose rows so large a share is refused is named."""
_NAMED: Final = 3
_AT_ONCE: Final = 65_536

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class EveryRows:
    """A window ends with every so many rows of a device, whether the model answers them or not."""

    rows: int


@dataclass(frozen=True, slots=True)
class EveryPeriod:
    """A window ends with the period in UTC, as `edge_runtime.core.windowing` has it."""

    policy: WindowPolicy


Rule = EveryRows | EveryPeriod


def parse_window(text: str) -> Rule:
    """``rows:1000``, ``90s``, ``15m``, ``1h`` or ``1d``; raises `ConfigError`."""
    rows = re.fullmatch(r"rows:([1-9]\d{0,9})", text, re.ASCII)
    if rows:
        return EveryRows(int(rows[1]))
    period = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text, re.ASCII)
    if not period:
        raise ConfigError(f"--window {text!r}: {_ALLOWED}")
    period_ns = round(float(period[1]) * _UNITS[period[2]])
    seconds = _WINDOW["seconds"]
    if not seconds.low <= period_ns / 1e9 <= seconds.high:
        raise ConfigError(
            f"--window {text!r}: a device's window lasts from {seconds.low:g} to {seconds.high:g} seconds; rows:N "
            "takes more"
        )
    return EveryPeriod(WindowPolicy(period_ns=period_ns, min_rows=int(_WINDOW["min_rows"].default or 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The slices that a fleet's judge looks at, how many rows the windows hold, and what became of the others.

    ``spans`` are those of all devices' rows, whether they make a window or not.
    """

    slices: tuple[Slice, ...]
    rows: int
    refused: tuple[tuple[str, int], ...]
    spans: Mapping[DeviceId, "Span"]
    notes: tuple[str, ...]


class Span(NamedTuple):
    """How many rows of a device there are, and from when to when."""

    rows: int
    first_ns: int
    last_ns: int


def replay(engine: Engine, table: Table, rule: Rule, progress: Progress | None = None) -> Replay:
    """The fleet's slices, oldest first; raises what `Engine.run` raises."""
    windows, left = replay_devices(engine, table, rule, progress)
    spans = _spans(table)
    notes = []
    if isinstance(rule, EveryRows):
        slices, others = slicing.by_count(windows)
        if others:
            notes.append(
                f"windows of {len(others)} of {len(windows)} devices ({some_of(others)}) are merged by time: many more "
                "or fewer than the others have"
            )
    else:
        slices = slicing.by_period(windows, rule.policy.period_ns)
    if left:
        notes.append(
            f"{counted(left, 'row')} at the end of devices' streams left out: too few for another window"
        )
    silent = [device for device, found in windows.items() if not found]
    if silent:
        names = some_of([f"{device} with {counted(spans[device].rows, 'row')}" for device in silent])
        notes.append(
            f"without a window, and so not judged: {len(silent)} of {counted(len(windows), 'device')} ({names})"
        )
    refused: Counter[str] = Counter()
    for found in windows.values():
        for reading in found:
            refused.update(dict(reading.refused))
    if refused:
        reasons = ", ".join(f"{reason} {rows}" for reason, rows in sorted(refused.items()))
        notes.append(
            f"the model refuses {counted(refused.total(), 'row')} ({reasons}){_mostly(windows, spans)}"
        )
    return Replay(
        slices=slices,
        rows=sum(reading.profile.rows for found in windows.values() for reading in found),
        refused=tuple(sorted(refused.items())),
        spans=spans,
        notes=tuple(notes),
    )


def _spans(table: Table) -> dict[DeviceId, Span]:
    devices = len(table.devices)
    first, last = np.full(devices, np.iinfo(np.int64).max), np.zeros(devices, np.int64)
    np.minimum.at(first, table.device, table.times_ns)
    np.maximum.at(last, table.device, table.times_ns)
    found = zip(
        np.bincount(table.device, minlength=devices).tolist(), first.tolist(), last.tolist(), strict=True
    )
    return {device: Span(*span) for device, span in zip(table.devices, found, strict=True)}


def _mostly(windows: Mapping[DeviceId, Sequence[Reading]], spans: Mapping[DeviceId, Span]) -> str:
    """The devices of whose rows many are refused, the worst first."""
    counts = {
        device: sum(rows for reading in found for _, rows in reading.refused)
        for device, found in windows.items()
    }
    shares = {device: rows / spans[device].rows for device, rows in counts.items()}
    much = sorted((device for device in shares if shares[device] >= MUCH), key=lambda d: (-shares[d], d))
    names = some_of([f"{device} ({counts[device]} of {spans[device].rows})" for device in much])
    return f"; much is refused of {names}" if much else ""


def counted(n: int, what: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def some_of(names: Sequence[str]) -> str:
    """A few of the names, and how many more there are."""
    more = len(names) - _NAMED
    return f"{', '.join(names[:_NAMED])}{f' and {more} more' if more > 0 else ''}"


def replay_devices(
    engine: Engine, table: Table, rule: Rule, progress: Progress | None = None
) -> tuple[dict[DeviceId, tuple[Reading, ...]], int]:
    """Every device's windows, oldest first, and how many rows came after the last window of their device.

    Rows of a device are taken by time, those of the same time in the file's order.
    """
    order = np.argsort(table.device, kind="stable")
    ends = np.cumsum(np.bincount(table.device, minlength=len(table.devices)))
    parts = np.split(order, ends[:-1])
    fleet = _Fleet(engine, table, rule)
    windows: dict[DeviceId, tuple[Reading, ...]] = {}
    left = 0
    for done, (device, stream) in enumerate(zip(table.devices, _answered(fleet, parts), strict=True), 1):
        windows[device], rest = fleet.windows(device, stream)
        left += rest
        if progress is not None:
            progress("rows through the model", done, len(parts))
    return windows, left


def _answered(fleet: "_Fleet", parts: Sequence[NDArray[np.int64]]) -> Iterator["_Stream"]:
    """Each device's stream in turn, predicted by threads that are at most as many devices ahead as there are threads.

    Only the model is theirs: it works without the interpreter. Counting takes many short steps, and threads that do
    such spend their time on handing the interpreter over: two of them need longer than one.
    """
    threads = os.cpu_count() or 1
    ahead: deque[Future[_Stream]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for part in parts:
            ahead.append(pool.submit(fleet.stream, part))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def right_answers(
    engine: Engine, table: Table, progress: Progress | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of every row of the table whether it has a label and the model answers it, and whether that answer is right.

    Raises what `Engine.run` raises.
    """
    rows = len(table.times_ns)
    known, right = np.zeros(rows, np.bool_), np.zeros(rows, np.bool_)
    if table.truth is None:
        return known, right
    fleet = _Fleet(engine, table, EveryRows(1))
    for start in range(0, rows, _AT_ONCE):
        part = np.arange(start, min(start + _AT_ONCE, rows))
        found = fleet.answer(part)
        answered = part[found.kept]
        truth = table.truth[answered]
        known[answered] = truth != UNLABELLED
        right[answered] = known[answered] & (truth == found.labels)
        if progress is not None:
            progress("rows through the model", int(part[-1]) + 1, rows)
    return known, right


class _Window(NamedTuple):
    """Rows ``start`` up to but not including ``stop`` of one device."""

    start: int
    stop: int
    start_ns: int
    end_ns: int


class _Answered(NamedTuple):
    """One device's rows after the model: n came, m were answered.

    ``kept`` (n,) says which; ``rows`` (m, F), ``labels`` (m,) and ``scores`` (m, C) are theirs, ``labels`` 0 where the
    model has not exactly one. ``refused`` has a mask (n,) for each reason.
    """

    kept: NDArray[np.bool_]
    rows: NDArray[np.floating]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    refused: dict[str, NDArray[np.bool_]]


class _Stream(NamedTuple):
    """One device's n rows by time: their places in the table, their times, and what the model said."""

    rows: NDArray[np.int64]
    times_ns: NDArray[np.int64]
    answered: _Answered


class _Fleet:
    """What all devices have in common."""

    def __init__(self, engine: Engine, table: Table, rule: Rule) -> None:
        self._engine, self._table, self._rule = engine, table, rule
        self._schema = Schema(engine.info.manifest.features, engine.info.manifest.input_dtype)

    def stream(self, rows: NDArray[np.int64]) -> _Stream:
        """The table's ``rows`` (n,) of one device by time, and answered."""
        times_ns = self._table.times_ns[rows]
        if (np.diff(times_ns) < 0).any():
            by_time = np.argsort(times_ns, kind="stable")
            rows, times_ns = rows[by_time], times_ns[by_time]
        return _Stream(rows, times_ns, self.answer(rows))

    def windows(self, device: DeviceId, stream: _Stream) -> tuple[tuple[Reading, ...], int]:
        """The windows of the ``device`` whose ``stream`` it is, and how many of its rows come after."""
        table, info = self._table, self._engine.info
        rows, times_ns, found = stream
        truth = None if table.truth is None else table.truth[rows][found.kept]
        binner = Binner(info.reference.spec, probabilities=info.manifest.probabilities)
        # What came before the first row is not known. It is taken to repeat as much as the row after the first does:
        # were it taken to repeat nothing, the first window of every device would have a repeat too few.
        binner.observe(found.rows[1:2], found.labels[1:2], found.scores[1:2])
        binner.take()
        before = np.concatenate([[0], np.cumsum(found.kept)])
        readings = []
        stop = 0
        for window in _windows(times_ns, before, self._rule):
            stop = window.stop
            part = slice(int(before[window.start]), int(before[stop]))
            binner.observe(found.rows[part], found.labels[part], found.scores[part])
            known = np.empty(0, np.int64) if truth is None else truth[part]
            reasons = [(why, int(mask[window.start : stop].sum())) for why, mask in found.refused.items()]
            readings.append(
                Reading(
                    device=device,
                    profile=binner.take(),
                    start_ns=window.start_ns,
                    end_ns=window.end_ns,
                    labelled=int((known != UNLABELLED).sum()),
                    correct=int((known == found.labels[part][: len(known)]).sum()),
                    refused=tuple(sorted((why, n) for why, n in reasons if n)),
                )
            )
        return tuple(readings), len(rows) - stop

    def answer(self, rows: NDArray[np.int64]) -> _Answered:
        """Checks and predicts as `edge_runtime.runtime.Runtime` does, every row on its own."""
        packed = self._table.values[:, rows].T
        refused = {why: mask[rows] for why, mask in self._table.refused.items()}
        kept = _none_of(refused, len(rows))
        for why, mask in self._schema.refused(packed).items():
            refused[why] = refused.get(why, np.zeros(len(rows), np.bool_)) | (mask & kept)
        kept = _none_of(refused, len(rows))
        clean = packed if kept.all() else packed[kept]
        labels, scores = self._engine.run(clean)
        if labels is None or labels.ndim > 1:
            labels = np.zeros(len(clean), np.int64)
        silent = np.isnan(scores).any(axis=1)
        if silent.any() and not self._engine.info.manifest.undefined:
            refused["undefined"] = np.zeros(len(rows), np.bool_)
            refused["undefined"][kept] = silent
            kept &= ~refused["undefined"]
            clean, labels, scores = clean[~silent], labels[~silent], scores[~silent]
        return _Answered(kept, clean, labels, scores, refused)


def _none_of(masks: dict[str, NDArray[np.bool_]], rows: int) -> NDArray[np.bool_]:
    free = np.ones(rows, np.bool_)
    for mask in masks.values():
        free &= ~mask
    return free


def _windows(times_ns: NDArray[np.int64], before: NDArray[np.int64], rule: Rule) -> Iterator[_Window]:
    """Where one device's windows begin and end; ``before`` (n + 1,) counts the answered rows before each row."""
    if isinstance(rule, EveryRows):
        for start in range(0, len(times_ns) - rule.rows + 1, rule.rows):
            stop = start + rule.rows
            yield _Window(start, stop, int(times_ns[start]), int(times_ns[stop - 1]))
        return
    start, now_ns = 0, int(times_ns[0])
    while start < len(times_ns):
        window = open_window(rule.policy, wall_ns=now_ns, mono_ns=now_ns, synced=True)
        stop, now_ns = _close(times_ns, before, start, window.due_mono_ns, rule.policy.min_rows)
        if stop > len(times_ns):
            return
        span = close_window(window, wall_ns=now_ns, mono_ns=now_ns, synced=True)
        yield _Window(start, stop, span.start_ns, span.end_ns)
        start = stop


def _close(
    times_ns: NDArray[np.int64], before: NDArray[np.int64], start: int, due_ns: int, min_rows: int
) -> tuple[int, int]:
    """The row before which the window closes, beyond the last one if never, and when.

    The device looks when the window is due, and then with every row: it closes with rows enough, or with refused ones
    alone.
    """
    seen = int(before[start])
    stop = int(np.searchsorted(times_ns, due_ns))
    answered = int(before[stop]) - seen
    if answered >= min_rows or (stop > start and not answered):
        return stop, due_ns
    if stop == start and stop < len(times_ns) and before[stop + 1] == seen:
        return stop + 1, int(times_ns[stop])
    stop = int(np.searchsorted(before, seen + min_rows))
    return stop, int(times_ns[min(stop, len(times_ns)) - 1])
