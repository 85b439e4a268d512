"""Replay: whole recordings in random order, rows in order of time, no faster than asked."""

import threading
from itertools import islice

import numpy as np
import pytest

from edge_runtime.adapters.sources.replay import BURST_SECONDS, CATCH_UP_SECONDS, ReplaySource
from edge_runtime.contract.errors import ConfigError

RECORDINGS = {0: range(3), 1: range(3, 4), 2: range(4, 9)}


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "recordings.npz"
    features = np.arange(18, dtype=np.float64).reshape(9, 2)
    recording = np.repeat([7, 3, 5], [3, 1, 5])
    np.savez(found, features=features, labels=np.array(list("aaabccccc")), recording=recording)
    return found


class Timeline(threading.Event):
    """A clock and a stop event in one: waiting makes the time pass."""

    def __init__(self):
        super().__init__()
        self.now = 100.0
        self.waits: list[float] = []

    def clock(self):
        return self.now

    def wait(self, timeout=None):
        self.waits.append(timeout)
        self.now += timeout
        return self.is_set()


def replayed(path, timeline, n, **options):
    source = ReplaySource(path, rows_per_second=4.0, clock=timeline.clock, **options)
    return list(islice(source.rows(timeline), n))


def indices(found):
    return [int(row[0]) // 2 for row, _ in found]


def test_a_round_is_every_recording_once_each_in_order_of_time(path):
    for seed in range(20):
        order = indices(replayed(path, Timeline(), 18, seed=seed))
        for round_ in (order[:9], order[9:]):
            assert sorted(round_) == list(range(9))
            starts = [round_.index(rows[0]) for rows in RECORDINGS.values()]
            for start, rows in zip(starts, RECORDINGS.values(), strict=True):
                assert round_[start : start + len(rows)] == list(rows)


def test_the_seed_decides_the_order(path):
    orders = {tuple(indices(replayed(path, Timeline(), 90, seed=seed))) for seed in range(10)}
    assert len(orders) > 5
    assert indices(replayed(path, Timeline(), 90, seed=1)) == indices(replayed(path, Timeline(), 90, seed=1))
    assert (
        indices(replayed(path, Timeline(), 90, seed=1))[:9]
        != indices(replayed(path, Timeline(), 90, seed=1))[9:18]
    )


def test_rows_are_float32_with_labels_of_the_pipelines_type(path):
    row, truth = replayed(path, Timeline(), 1)[0]
    assert row.dtype == np.float32
    assert row.shape == (2,)
    assert type(truth) is str
    with pytest.raises(ValueError, match="read-only"):
        row[0] = 1


def test_labels_and_recordings_may_be_absent(tmp_path):
    path = tmp_path / "plain.npz"
    np.savez(path, features=np.arange(8).reshape(4, 2))
    found = replayed(path, Timeline(), 8)
    assert indices(found) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert {truth for _, truth in found} == {None}


def test_whole_number_labels_stay_whole_numbers(tmp_path):
    path = tmp_path / "ints.npz"
    np.savez(path, features=np.zeros((2, 1)), labels=np.array([3, 4], np.uint8))
    assert [(truth, type(truth)) for _, truth in replayed(path, Timeline(), 2)] == [(3, int), (4, int)]


def test_rows_come_at_the_pace_asked_for(path):
    timeline = Timeline()
    replayed(path, timeline, 9)
    assert timeline.waits == pytest.approx([0.25] * 8)
    assert timeline.now == pytest.approx(100.0 + 8 * 0.25)


def test_a_fast_replay_wakes_up_for_several_rows_at_once(path):
    timeline = Timeline()
    source = ReplaySource(path, rows_per_second=1000.0, clock=timeline.clock)
    times = [timeline.now for _ in islice(source.rows(timeline), 500)]
    early = [100.0 + i / 1000.0 - found for i, found in enumerate(times)]
    assert min(early) > -1e-9
    assert max(early) <= BURST_SECONDS + 1e-9
    assert len(timeline.waits) <= 500 / (1000.0 * BURST_SECONDS)


def test_a_slow_consumer_is_waited_for_less(path):
    timeline = Timeline()
    source = ReplaySource(path, rows_per_second=4.0, clock=timeline.clock)
    rows = source.rows(timeline)
    for _ in range(4):
        next(rows)
        timeline.now += 0.2
    assert timeline.waits == pytest.approx([0.05] * 3)


def test_after_a_long_sleep_it_goes_on_from_now(path):
    timeline = Timeline()
    source = ReplaySource(path, rows_per_second=4.0, clock=timeline.clock)
    rows = source.rows(timeline)
    next(rows)
    timeline.now += 0.25 + CATCH_UP_SECONDS + 3600
    next(rows)
    next(rows)
    assert timeline.waits == pytest.approx([0.25])


def test_it_ends_when_told_to(path):
    timeline = Timeline()
    source = ReplaySource(path, rows_per_second=4.0, clock=timeline.clock)
    rows = source.rows(timeline)
    next(rows)
    timeline.set()
    assert list(rows) == []


def saved(tmp_path, **arrays):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"rows": np.zeros((2, 2))}, "needs an array 'features'"),
        ({"features": np.zeros(3)}, r"features have shape \(3,\)"),
        ({"features": np.zeros((0, 3))}, r"features have shape \(0, 3\)"),
        ({"features": np.array([["x"]])}, "not a readable"),
        (
            {"features": np.zeros((2, 2)), "labels": np.zeros(3)},
            r"labels has shape \(3,\), but there are 2 rows",
        ),
        ({"features": np.zeros((2, 2)), "recording": np.zeros((2, 1))}, r"recording has shape \(2, 1\)"),
        ({"features": np.array([[object()]])}, "not a readable"),
    ],
)
def test_a_file_that_is_no_replay_is_refused_and_named(tmp_path, arrays, problem):
    with pytest.raises(ConfigError, match=rf"bad\.npz: .*{problem}"):
        ReplaySource(saved(tmp_path, **arrays), rows_per_second=1.0)


def test_other_files_are_refused_and_named(tmp_path, path):
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    short = tmp_path / "short.npz"
    short.write_bytes(path.read_bytes()[:200])
    plain = tmp_path / "plain.npy"
    np.save(plain, np.zeros(3))
    for bad in (tmp_path / "gone.npz", text, short, plain):
        with pytest.raises(ConfigError, match=bad.name):
            ReplaySource(bad, rows_per_second=1.0)


@pytest.mark.parametrize("pace", [0.0, -1.0])
def test_the_pace_must_be_positive(path, pace):
    with pytest.raises(ConfigError, match="more than 0 is needed"):
        ReplaySource(path, rows_per_second=pace)
