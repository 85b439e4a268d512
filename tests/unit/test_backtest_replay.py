"""Raw rows become the windows that devices would have sent: what the runtime counts, closed when the daemon closes."""

import itertools
import os
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.core import slicing
from aggregator.looks import Reading
from cli.backtest.replay import EveryPeriod, EveryRows, Span, parse_window, replay, replay_devices
from cli.backtest.table import OTHER_LABEL, UNLABELLED, Table, _add_refused, _codes
from edge_runtime.contract.errors import ConfigError, InputError
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import Feature
from edge_runtime.contract.profile import Binner, merge_all
from edge_runtime.core.windowing import WindowPolicy, close_window, is_due, open_window
from edge_runtime.engine import Engine
from edge_runtime.runtime import Runtime
from edge_runtime.schema import Schema
from tests.support.tiny_models import Tiny, categorical, classifier, regressor, several

SECOND = 1_000_000_000
D = DeviceId("d")
START = 1_767_225_600 * SECOND

RANGED = replace(
    classifier(),
    features=(Feature(name="a", low=-1.5, high=2.0), Feature(name="b", missing=True), Feature(name="c")),
    refuses=True,  # NaN in b is let in and has no answer
)
CATEGORIES = categorical(
    Feature(name="colour", kind="category", vocabulary=("red", "blue", "green")),
    Feature(name="size", kind="category", vocabulary=(1, 2), unseen=True),
    Feature(name="weight", high=2.0),
)
POLICY = WindowPolicy(period_ns=60 * SECOND, min_rows=5)


def table_of(tiny: Tiny, raw, times_ns, devices=None, truth=None) -> Table:
    """The table that a file with the ``raw`` rows would give: values as users have them, per feature."""
    features = tiny.manifest.features
    schema = Schema(features, tiny.manifest.input_dtype)
    names = ["d"] * len(raw) if devices is None else devices
    known = sorted(set(names))
    values = np.empty((len(features), len(raw)), schema.dtype)
    refused: dict[str, Any] = {}
    for j, feature in enumerate(features):
        column = [row[j] for row in raw]
        if feature.kind == "category":
            values[j], bad = _codes(pa.array(column), schema, j, (), feature.name)
            _add_refused(refused, bad)
        else:
            values[j] = column
    return Table(
        devices=tuple(DeviceId(name) for name in known),
        device=np.array([known.index(name) for name in names], np.uint16),
        times_ns=np.asarray(times_ns, np.int64),
        values=values,
        refused=refused,
        truth=None if truth is None else np.asarray(truth, np.int64),
        notes=(),
    )


def rows_of(tiny: Tiny, n: int, seed: int):
    """Rows as users have them, some of which the model refuses."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        row = []
        for feature in tiny.features:
            if feature.kind == "category":
                row.append(feature.vocabulary[rng.integers(len(feature.vocabulary))])
            else:
                row.append(
                    float(
                        rng.choice(
                            [rng.normal(), rng.normal(), 0.25, 3.0, np.nan, np.inf],
                            p=[0.4, 0.3, 0.2, 0.04, 0.03, 0.03],
                        )
                    )
                )
        if tiny.features[0].kind == "category" and rng.random() < 0.1:
            row[0] = "pink"
        if len(row) > 1 and tiny.features[1].kind == "category" and rng.random() < 0.1:
            row[1] = 9
        found.append(row)
    return found


class Device:
    """One device row by row: the runtime that applications call, and the daemon's way with windows."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny, self.runtime = tiny, Runtime(tiny.artifact)
        self.windows: list[Reading] = []

    def feed(self, row, truth=UNLABELLED):
        try:
            answer = self.runtime.predict(row)
        except InputError:
            return
        if truth != UNLABELLED:
            self.runtime.record_truth(1, int(truth == answer.raw))

    def take(self, start_ns, end_ns):
        seen = self.runtime.take_window()
        self.windows.append(
            Reading(
                device=D,
                profile=seen.profile,
                start_ns=start_ns,
                end_ns=end_ns,
                labelled=seen.labelled,
                correct=seen.correct,
                refused=seen.refused,
            )
        )

    def prime(self, raw):
        """The row after the first stands in for the one before it: of two answered rows, the second comes first."""
        answered = 0
        for row in raw:
            with suppress(InputError):
                self.runtime.predict(row)
                answered += 1
            if answered == 2:
                break
        self.runtime.take_window()
        if answered < 2:
            self.runtime = Runtime(self.tiny.artifact)

    def run_by_rows(self, raw, times_ns, n, truth):
        self.prime(raw)
        for i, row in enumerate(raw[: len(raw) // n * n]):
            self.feed(row, truth[i])
            if (i + 1) % n == 0:
                self.take(times_ns[i + 1 - n], times_ns[i])

    def run_by_period(self, raw, times_ns, policy):
        self.prime(raw)
        opened = open_window(policy, wall_ns=times_ns[0], mono_ns=times_ns[0], synced=True)
        for row, now_ns in zip(raw, times_ns, strict=True):
            if opened.due_mono_ns <= now_ns:
                opened = self.tick(policy, opened, opened.due_mono_ns)
            self.feed(row)
            opened = self.tick(policy, opened, now_ns)
        self.tick(policy, opened, opened.due_mono_ns)

    def tick(self, policy, opened, now_ns):
        times = {"wall_ns": now_ns, "mono_ns": now_ns}
        rows = self.runtime.rows
        if not rows and self.runtime.unanswered:
            rows = policy.min_rows
        if not is_due(policy, opened, rows=rows, **times):
            return opened
        span = close_window(opened, **times, synced=True)
        self.take(span.start_ns, span.end_ns)
        return open_window(policy, **times, synced=True)


@pytest.mark.parametrize("tiny", [RANGED, CATEGORIES], ids=["ranges and gaps", "categories"])
def test_windows_of_rows_are_what_the_runtime_counts_row_by_row(tiny):
    raw = rows_of(tiny, 230, seed=1)
    times = [START + i * SECOND for i in range(230)]
    truth = np.random.default_rng(2).choice([UNLABELLED, OTHER_LABEL, 0, 1, 2], size=230)
    device = Device(tiny)
    device.run_by_rows(raw, times, 50, truth)
    windows, left = replay_devices(
        Engine(tiny.artifact), table_of(tiny, raw, times, truth=truth), EveryRows(50)
    )
    assert list(windows[D]) == device.windows
    assert left == 30
    reasons: Counter[str] = Counter()
    for window in windows[D]:
        reasons.update(dict(window.refused))
    expected = (
        {"missing", "non_finite", "range", "undefined"} if tiny is RANGED else {"unseen", "missing", "range"}
    )
    assert expected <= set(reasons)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=80), st.integers(0, 59), st.integers(0, 2**32 - 1))
def test_windows_of_time_close_when_the_devices_rule_says(gaps, first, seed):
    times = [int(t) for t in START + (first + np.cumsum(gaps)) * SECOND]
    raw = rows_of(RANGED, len(times), seed)
    device = Device(RANGED)
    device.run_by_period(raw, times, POLICY)
    table = table_of(RANGED, raw, times)
    windows, left = replay_devices(Engine(RANGED.artifact), table, EveryPeriod(POLICY))
    assert list(windows[D]) == device.windows
    assert left == device.runtime.rows + device.runtime.unanswered


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(0, 2**32 - 1))
def test_however_a_stream_is_cut_its_counts_are_the_same(sizes, seed):
    tiny = classifier()
    rows = np.random.default_rng(seed).normal(size=(sum(sizes), 3)).round(1).astype(np.float32)
    engine = Engine(tiny.artifact)
    labels, scores = engine.run(rows)
    assert labels is not None
    spec = tiny.reference.spec
    binner = Binner(spec, probabilities=True)
    binner.observe(rows[1:2], labels[1:2], scores[1:2])  # stands in for the row before the first
    binner.take()
    binner.observe(rows, labels, scores)
    whole = binner.take()
    times = START + np.arange(len(rows)) * SECOND
    for n in {1, *sizes}:
        windows, left = replay_devices(
            engine, table_of(tiny, rows[: len(rows) // n * n], times[: len(rows) // n * n]), EveryRows(n)
        )
        assert left == 0
        if len(rows) % n == 0:
            assert merge_all(spec, [w.profile for w in windows[D]], probabilities=True) == whole


def test_rows_are_taken_by_time_and_equal_times_in_the_files_order():
    tiny = classifier()
    rows = np.random.default_rng(3).normal(size=(40, 3)).round(0)
    times = START + np.repeat(np.arange(20), 2) * SECOND
    device = Device(tiny)
    device.run_by_rows([list(row) for row in rows], [int(t) for t in times], 10, [UNLABELLED] * 40)
    shuffled = np.argsort(np.random.default_rng(4).permutation(20).repeat(2), kind="stable")
    windows, _ = replay_devices(
        Engine(tiny.artifact), table_of(tiny, rows[shuffled], times[shuffled]), EveryRows(10)
    )
    assert list(windows[D]) == device.windows


@pytest.mark.parametrize("tiny", [regressor(), several()], ids=["regressor", "several labels"])
def test_models_without_one_label_are_replayed_too(tiny):
    rows = np.random.default_rng(5).normal(size=(60, len(tiny.features)))
    times = [START + i * SECOND for i in range(60)]
    device = Device(tiny)
    device.run_by_rows([list(row) for row in rows], times, 20, [UNLABELLED] * 60)
    windows, _ = replay_devices(Engine(tiny.artifact), table_of(tiny, rows, times), EveryRows(20))
    assert list(windows[D]) == device.windows


def test_the_model_is_a_few_devices_ahead_of_the_counting_and_no_more(monkeypatch):
    tiny, devices = classifier(), 60
    rows = np.random.default_rng(6).normal(size=(devices * 10, 3))
    names = [f"d{i % devices:02}" for i in range(len(rows))]
    table = table_of(tiny, rows, START + np.arange(len(rows)) * SECOND, names)
    engine, asked = Engine(tiny.artifact), itertools.count(1)
    run, last, counted = engine.run, 0, []

    def asking(part):
        nonlocal last
        last = next(asked)
        return run(part)

    monkeypatch.setattr(engine, "run", asking)

    def progress(_, done, whole):
        assert whole == devices
        assert last <= done + (os.cpu_count() or 1)  # what waits to be counted is held in memory
        counted.append(done)

    windows, _ = replay_devices(engine, table, EveryRows(5), progress)
    assert counted == list(range(1, devices + 1))
    assert list(windows) == [DeviceId(f"d{i:02}") for i in range(devices)]
    for i in range(devices):
        alone = table_of(tiny, rows[i::devices], table.times_ns[i::devices])
        (found,) = replay_devices(engine, alone, EveryRows(5))[0].values()
        assert [one.profile for one in windows[DeviceId(f"d{i:02}")]] == [one.profile for one in found]


# ── slices ─────────────────────────────────────────────────────────────────────────────────────────────


def fleet(counts, *, seconds=100):
    """Devices with so many windows each over the same time: rows of a one-column model, 10 a window."""
    tiny = classifier()
    engine = Engine(tiny.artifact)
    rng = np.random.default_rng(6)
    names, times = [], []
    for k, count in enumerate(counts):
        n = count * 10
        names += [f"d{k}"] * n
        times += [START + int(t) for t in np.linspace(0, seconds * SECOND, n, endpoint=False)]
    table = table_of(tiny, rng.normal(size=(len(names), 3)), times, names)
    return replay(engine, table, EveryRows(10))


def test_a_chatty_device_is_merged_into_the_fleets_slices_and_loses_no_row():
    found = fleet([10, 10, 11, 9, 200])
    assert len(found.slices) == 11
    assert [s.index for s in found.slices] == list(range(11))
    for part in found.slices:
        assert len({r.device for r in part.readings}) == len(part.readings)
    chatty = [r for part in found.slices for r in part.readings if r.device == "d4"]
    assert sum(r.windows for r in chatty) == 200
    assert sum(r.profile.rows for r in chatty) == 2000
    assert all(10 <= r.windows <= 30 for r in chatty[:9])
    assert found.rows == sum(r.profile.rows for part in found.slices for r in part.readings) == 2400
    assert any("d4" in text and "merged by time" in text for text in found.notes)
    for k in range(9):  # its rows came while the others' did
        others = [r for r in found.slices[k].readings if r.device != "d4"]
        mine = next(r for r in found.slices[k].readings if r.device == "d4")
        assert mine.end_ns > min(r.start_ns for r in others)
        assert mine.start_ns < max(r.end_ns for r in others)


def test_devices_near_the_median_keep_their_own_count():
    found = fleet([10, 14, 8])
    assert len(found.slices) == 14
    assert [len(part.readings) for part in found.slices] == [3] * 8 + [2] * 2 + [1] * 4


def test_two_devices_of_very_different_pace_follow_the_longer_one():
    found = fleet([4, 40])
    assert sum(r.windows for part in found.slices for r in part.readings) == 44
    assert len(found.slices) == 40


def test_a_device_of_much_refused_rows_is_named_and_so_is_one_without_a_window():
    tiny = classifier()
    names = [name for name, n in (("dead", 20), ("fine", 20), ("new", 4)) for _ in range(n)]
    raw = np.random.default_rng(1).normal(size=(len(names), 3))
    raw[5:20, 1] = np.nan  # of the dead device
    raw[20, 1] = np.nan
    found = replay(
        Engine(tiny.artifact), table_of(tiny, raw, START + np.arange(44) * SECOND, names), EveryRows(10)
    )
    assert found.notes == (
        "4 rows at the end of devices' streams left out: too few for another window",
        "without a window, and so not judged: 1 of 3 devices (new with 4 rows)",
        "the model refuses 16 rows (missing 16); much is refused of dead (15 of 20)",
    )
    assert found.spans[DeviceId("new")] == Span(
        rows=4, first_ns=START + 40 * SECOND, last_ns=START + 43 * SECOND
    )


def test_one_row_is_not_ones():
    tiny = classifier()
    raw = np.random.default_rng(1).normal(size=(21, 3))
    raw[3, 1] = np.nan
    found = replay(Engine(tiny.artifact), table_of(tiny, raw, START + np.arange(21) * SECOND), EveryRows(10))
    assert found.notes == (
        "1 row at the end of devices' streams left out: too few for another window",
        "the model refuses 1 row (missing 1)",
    )


@pytest.mark.parametrize("window", ["rows:10", "rows:1", "30s"])
def test_what_never_changes_repeats_as_much_in_the_first_window_as_in_any(window):
    tiny = classifier()
    raw = np.random.default_rng(1).normal(size=(90, 3))
    raw[:, 1] = 1.0
    found = replay(
        Engine(tiny.artifact), table_of(tiny, raw, START + np.arange(90) * SECOND), parse_window(window)
    )
    repeats = tiny.reference.spec.offsets[1:4] - 1
    for one in found.slices:
        (seen,) = one.readings
        assert [seen.profile.counts[at] for at in repeats] == [0, seen.profile.rows, 0]
    assert found.rows == 90


def test_a_tail_is_left_out_and_counted():
    tiny = classifier()
    times = START + np.arange(25) * SECOND
    found = replay(Engine(tiny.artifact), table_of(tiny, np.zeros((25, 3)), times), EveryRows(10))
    assert found.rows == 20
    assert any(text.startswith("5 rows at the end") for text in found.notes)


def reading(device, start, end, rows=1):
    tiny = classifier()
    return Reading(
        device=DeviceId(device),
        profile=merge_all(tiny.reference.spec, [tiny.reference.total] * rows, probabilities=True),
        start_ns=START + start * SECOND,
        end_ns=START + end * SECOND,
        labelled=2,
        correct=1,
        refused=(("missing", rows),),
    )


def test_periods_are_slices_and_a_window_belongs_to_the_one_it_ended_in():
    windows = {
        DeviceId("a"): [reading("a", 0, 60), reading("a", 60, 250), reading("a", 250, 300, 2)],
        DeviceId("b"): [reading("b", 10, 60)],
    }
    found = slicing.by_period(windows, 60 * SECOND)
    assert [[r.device for r in part.readings] for part in found] == [["a", "b"], ["a"]]
    merged = found[1].readings[0]
    assert (merged.windows, merged.labelled, merged.correct, merged.refused) == (2, 4, 2, (("missing", 3),))
    assert merged.profile == reading("a", 0, 0, 3).profile
    assert (found[1].start_ns, found[1].end_ns) == (START + 60 * SECOND, START + 300 * SECOND)


def test_no_window_is_no_slice():
    assert slicing.by_count({DeviceId("a"): ()}) == ((), ())
    assert slicing.by_period({}, SECOND) == ()


# ── --window ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("1h", 3600), ("1d", 86400), ("0.5h", 1800)]
)
def test_a_window_of_time(text, seconds):
    rule = parse_window(text)
    assert isinstance(rule, EveryPeriod)
    assert rule.policy.period_ns == seconds * SECOND
    assert rule.policy.min_rows == 30, "a device's own default"


def test_a_window_of_rows():
    assert parse_window("rows:1000") == EveryRows(1000)


@pytest.mark.parametrize(
    "text", ["", "1000", "rows:", "rows:0", "rows:-1", "rows:1e3", "1 h", "1w", "h", "-1h", "٣h"]
)
def test_other_windows_are_refused_with_what_is_allowed(text):
    with pytest.raises(ConfigError, match="rows:N"):
        parse_window(text)


@pytest.mark.parametrize("text", ["2d", "0s", "0.01s"])
def test_no_device_has_windows_so_long_or_short(text):
    with pytest.raises(ConfigError, match=r"from 0\.1 to 86400 seconds"):
        parse_window(text)
