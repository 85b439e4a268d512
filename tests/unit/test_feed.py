"""The feed joins a source and a runtime: who waits, what is counted, what each refusal is called."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import feed as module
from edge_runtime.adapters.sources.ndjson import Answer, Refusal, Request
from edge_runtime.adapters.sources.replay import ReplaySource
from edge_runtime.adapters.sources.stdio import StdioSource
from edge_runtime.adapters.sources.unix import UnixSource
from edge_runtime.config import SourceConfig
from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, ConfigError
from edge_runtime.feed import Feed, make
from edge_runtime.mqtt.broker import Broker
from edge_runtime.mqtt_source import MqttSource
from edge_runtime.runtime import Runtime
from tests.support.tiny_models import Tiny, classifier, regressor, several

WAIT_SECONDS = 15.0
ROW = [0.5, -0.25, 1.0]


class Counted:
    """A real runtime that also keeps what the feed records."""

    def __init__(self, tiny: Tiny):
        self.runtime = Runtime(tiny.artifact)
        self.queueing: list[int] = []
        self.truths: list[tuple[int, int]] = []
        self.fails: Exception | None = None

    @property
    def engine(self):
        return self.runtime.engine

    def predict(self, rows):
        if self.fails:
            raise self.fails
        return self.runtime.predict(rows)

    def record_queueing(self, durations_ns):
        self.queueing += durations_ns

    def record_truth(self, labelled, correct):
        self.truths.append((labelled, correct))


class Listed:
    """A source of requests that keeps the replies."""

    def __init__(self, *requests: Request | Refusal):
        self.requests = requests
        self.replies: list[Any] = []

    def serve(self, answer, stop):
        for request in self.requests:
            self.replies.append(answer(request))


def fed(tiny, *requests, runtime=None, **options) -> tuple[Any, Any, Any]:
    """The feed after it has served the requests, the runtime, and the replies."""
    source = Listed(*requests)
    made = Feed(source, threading.Event(), **options)
    counted: Any = runtime or Counted(tiny)
    made.attach(counted)
    made.start()
    assert made.done.wait(WAIT_SECONDS)
    made.join(WAIT_SECONDS)
    assert made.failure is None
    return made, counted, source.replies


def test_rows_are_answered_as_the_runtime_does():
    tiny = classifier()
    made, counted, (one, batch) = fed(
        tiny, Request(rows=ROW), Request(rows=[ROW, {"a": 0, "b": 1, "c": 2}], batch=True)
    )
    expected = counted.runtime.predict(np.array(ROW, np.float32))
    assert (one.label, one.model) == (expected.label, tiny.digest)
    assert np.array_equal(one.score, expected.score)
    assert batch.score.shape == (2, 3)
    assert made.answered == 2
    assert made.refused == {}
    assert counted.queueing == []  # nobody said when they arrived


def test_time_spent_waiting_is_recorded_for_what_was_answered():
    ticks = iter((1_500, 2_000, 9_000))
    _, counted, _ = fed(
        classifier(),
        Request(rows=ROW, arrived_ns=1_000),
        Request(rows=[1.0], arrived_ns=1_000),  # refused
        Request(rows=ROW, arrived_ns=9_500),  # a clock read in another order on another core
        clock_ns=lambda: next(ticks),
    )
    assert counted.queueing == [500, 0]


def test_times_are_handed_over_in_bulk_and_when_asked(monkeypatch):
    monkeypatch.setattr(module, "WAITS_AT_ONCE", 3)
    counted: Any = Counted(classifier())
    made = Feed(Listed(), threading.Event(), clock_ns=lambda: 10)
    made.attach(counted)
    sizes = []
    for arrived_ns in range(1, 9):
        made.answer(Request(rows=ROW, arrived_ns=arrived_ns))
        sizes.append(len(counted.queueing))
    assert sizes == [0, 0, 3, 3, 3, 6, 6, 6]
    made.flush()
    made.flush()
    assert counted.queueing == [9, 8, 7, 6, 5, 4, 3, 2]
    made.answer(Request(rows=ROW, arrived_ns=9))
    made.attach(None)
    assert counted.queueing[8:] == [1]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([1.0], "width"),
        ([1.0, None, 2.0], "missing"),
        ([1.0, float("inf"), 2.0], "non_finite"),
        ([1.0, "x", 2.0], "type"),
        ({"a": 1, "b": 2, "d": 3}, "unknown_feature"),
    ],
)
def test_a_bad_row_is_refused_by_the_runtimes_reason_and_counted(rows, reason):
    made, _, (first, second, good) = fed(
        classifier(), Request(rows=rows), Request(rows=rows), Request(rows=ROW)
    )
    assert isinstance(first, Refusal)
    assert first.reason == second.reason == reason
    assert isinstance(good, Answer)
    assert (made.answered, made.refused) == (1, {reason: 2})


def test_what_the_source_refused_is_counted_too():
    refusal = Refusal("json", "not JSON", None)
    made, _, replies = fed(classifier(), refusal)
    assert replies == [refusal]
    assert made.refused == {"json": 1}


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(BudgetExceeded("shedding"), "unavailable"), (ArtifactError("the graph failed"), "failed")],
)
def test_a_model_that_cannot_answer_says_why(failure, reason):
    counted = Counted(classifier())
    counted.fails = failure
    _, _, [reply] = fed(None, Request(rows=ROW), runtime=counted)
    assert reply == Refusal(reason, str(failure))


# ── truth ──────────────────────────────────────────────────────────────────────────────────────────────


def test_truth_is_counted_for_one_row_and_for_a_batch():
    tiny = classifier(labels=("low", "mid", "high"))
    label = tiny.labels[int(tiny.answer(np.array([ROW], np.float32))[0][0])]
    other = next(name for name in tiny.labels if name != label)
    _, counted, _ = fed(
        tiny,
        Request(rows=ROW, truth=label),
        Request(rows=ROW, truth=other),
        Request(rows=ROW, truth="never seen in training"),
        Request(rows=[ROW] * 4, batch=True, truth=[label, None, other, label]),
        Request(rows=[ROW], batch=True, truth=[None]),
    )
    assert counted.truths == [(1, 1), (1, 0), (1, 0), (3, 2)]


def test_truth_of_several_labels_is_right_when_all_are():
    tiny = several()
    raw = tiny.answer(np.array([ROW], np.float32))[0][0]
    right = [labels[i] for labels, i in zip(tiny.multilabels, raw, strict=True)]
    wrong = [right[0], "other"]
    _, counted, replies = fed(
        tiny,
        Request(rows=ROW, truth=right),
        Request(rows=[ROW, ROW], batch=True, truth=[right, wrong]),
        Request(rows=ROW, truth="red"),
    )
    assert counted.truths == [(1, 1), (2, 1)]
    assert replies[2].reason == "truth"


def test_whole_numbers_are_the_same_label_however_they_are_written():
    tiny = classifier(labels=(0, 1, 2))
    label = int(tiny.answer(np.array([ROW], np.float32))[0][0])
    _, counted, _ = fed(tiny, Request(rows=ROW, truth=float(label)))
    assert counted.truths == [(1, 1)]


@pytest.mark.parametrize(
    ("labels", "truth", "message"),
    [
        ((0, 1, 2), "1", "labels are such as 0"),
        (("a", "b", "c"), 1, "labels are such as 'a'"),
        (("a", "b", "c"), ["a"], "one label for a row"),
    ],
)
def test_a_truth_of_another_type_is_refused_before_it_counts_as_a_mistake(labels, truth, message):
    made, counted, replies = fed(classifier(labels=labels), Request(rows=ROW, truth=truth))
    assert replies[0].reason == "truth"
    assert message in replies[0].message
    assert counted.truths == []
    assert counted.runtime.rows == 0
    assert made.refused == {"truth": 1}


def test_a_regressors_truth_is_neither_right_nor_wrong():
    _, counted, [reply] = fed(regressor(), Request(rows=[1.0, 2.0], truth=0.5))
    assert isinstance(reply, Answer)
    assert counted.truths == []


# ── waiting for a model ────────────────────────────────────────────────────────────────────────────────


def test_a_row_waits_for_the_model():
    source = Listed(Request(rows=ROW))
    made = Feed(source, threading.Event(), patience_seconds=float("inf"))
    made.start()
    assert not made.done.wait(0.05)
    made.attach(Counted(classifier()))  # type: ignore[arg-type]
    assert made.done.wait(WAIT_SECONDS)
    assert made.answered == 1


def test_patience_ends_for_all_rows_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made = Feed(Listed(), threading.Event(), patience_seconds=5.0)

    class Passing(threading.Event):
        def wait(self, timeout=None):
            now[0] += timeout
            return False

    made._ready = Passing()
    assert made.answer(Request(rows=ROW)) == Refusal("unavailable", "there is no model yet; try again later")
    assert now[0] == 105.0
    made.answer(Request(rows=ROW))
    assert now[0] == 105.0
    made._ready = threading.Event()
    made.attach(Counted(classifier()))  # type: ignore[arg-type]
    assert isinstance(made.answer(Request(rows=ROW)), Answer)
    now[0] = 200.0
    made.attach(None)
    made.attach(None)
    made._ready = Passing()
    assert isinstance(made.answer(Request(rows=ROW)), Refusal)
    assert now[0] == 205.0


def test_a_waiting_row_does_not_hold_the_end_back():
    stop = threading.Event()
    made = Feed(Listed(Request(rows=ROW)), stop, patience_seconds=float("inf"))
    made.start()
    stop.set()
    assert made.done.wait(WAIT_SECONDS)
    assert made.refused == {"unavailable": 1}


# ── ends ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_source_that_breaks_ends_the_feed_and_says_so(caplog):
    class Broken:
        def serve(self, answer, stop):
            raise OSError("the disk is gone")

    made = Feed(Broken(), threading.Event())
    made.start()
    assert made.done.wait(WAIT_SECONDS)
    made.join(WAIT_SECONDS)
    assert isinstance(made.failure, OSError)
    assert "feed_broken" in caplog.text


def test_each_reason_is_logged_once(caplog):
    fed(classifier(), *[Request(rows=[1.0])] * 5)
    assert caplog.text.count("rows_refused reason=width") == 1


# ── configuration ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def config(tmp_path):
    recording = tmp_path / "rows.npz"
    np.savez(recording, features=np.tile(np.array(ROW, np.float32), (4, 1)))
    return SourceConfig(
        kind="none",
        path=recording,
        rows_per_second=1e5,
        seed=3,
        socket=tmp_path / "rows.sock",
        socket_mode=0o600,
        max_clients=2,
        max_line_bytes=4096,
        topic_in="rows/in",
        topic_out="rows/out",
        broker=Broker(host="localhost"),
    )


@pytest.mark.parametrize(
    ("kind", "source"),
    [("replay", ReplaySource), ("stdio", StdioSource), ("unix", UnixSource), ("mqtt", MqttSource)],
)
def test_the_configuration_names_the_source(config, kind, source):
    made = make(replace(config, kind=kind), threading.Event(), client_id="device-1-rows")
    assert made is not None
    assert isinstance(made._source, source)
    assert (made._patience_seconds == float("inf")) == (kind == "replay")
    if isinstance(made._source, UnixSource):
        made._source.close()


def test_no_source_is_no_feed(config):
    assert make(config, threading.Event(), client_id="x") is None


def test_an_unknown_kind_is_refused(config):
    with pytest.raises(ConfigError, match=r"source\.kind: 'pigeon' is none of"):
        make(replace(config, kind="pigeon"), threading.Event(), client_id="x")


def test_a_replay_runs_until_told_to_stop(config):
    stop = threading.Event()
    made = make(replace(config, kind="replay"), stop, client_id="x")
    assert made is not None
    counted: Any = Counted(classifier())
    enough = threading.Event()
    predict = counted.predict

    def counting(rows):
        if made.answered >= 8:
            enough.set()
        return predict(rows)

    counted.predict = counting
    made.attach(counted)
    made.start()
    assert enough.wait(WAIT_SECONDS)
    assert not made.done.is_set()
    stop.set()
    assert made.done.wait(WAIT_SECONDS)
    assert made.failure is None
    assert counted.queueing == []


def test_a_replay_that_cannot_be_read_is_refused(config):
    with pytest.raises(ConfigError, match=r"gone\.npz"):
        make(replace(config, kind="replay", path=Path("gone.npz")), threading.Event(), client_id="x")
