"""Comparing a candidate with the model in service, and the process that does it."""

import os
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_runtime.adapters.child import Child
from edge_runtime.adapters.slots import Slots
from edge_runtime.config import load
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.manifest import Feature
from edge_runtime.core.events import Noticed, ServeFailed, Shadowed
from edge_runtime.engine import Engine
from edge_runtime.runtime import Runtime
from edge_runtime.shadow import Comparison
from edge_runtime.shadowing import DEATHS, LONGEST_PAUSE_SECONDS, Shadowing
from tests.support.tiny_models import categorical, classifier, regressor, several

PATIENCE_SECONDS = 30.0


def compared(incumbent, candidate, rows):
    return Comparison(Engine(incumbent.artifact), Engine(candidate.artifact)).count(rows)


def rows_of(tiny, n):
    return replace(tiny, seed=91).training[:n]


@pytest.mark.parametrize(
    "tiny",
    [
        classifier(),
        regressor(),
        regressor(targets=3),
        several(),
        replace(classifier(), input_dtype="float64"),
    ],
    ids=["classifier", "regressor", "three targets", "two outputs", "float64"],
)
def test_a_model_agrees_with_itself_on_every_row(tiny):
    assert compared(tiny, tiny, rows_of(tiny, 200)) == (200, 0)


def test_rows_of_another_label_are_counted_exactly():
    old, new = classifier(seed=0), classifier(seed=5)
    rows = rows_of(old, 300)
    wanted = int((old.answer(rows)[0] != new.answer(rows)[0]).sum())
    assert 30 < wanted < 300
    assert compared(old, new, rows) == (300, wanted)


def test_labels_are_compared_by_value_wherever_they_stand():
    old = classifier(labels=("low", "mid", "high"))
    turned = replace(
        old, labels=("high", "mid", "low"), weights=old.weights[::-1].copy(), bias=old.bias[::-1].copy()
    )
    assert compared(old, turned, rows_of(old, 200)) == (200, 0)
    renamed = replace(old, labels=("Low", "mid", "high"))
    lows = int((old.answer(rows_of(old, 200))[0] == 0).sum())
    assert compared(old, renamed, rows_of(old, 200)) == (200, lows)


def test_each_of_several_outputs_counts_and_a_row_only_once():
    old, new = several(seed=0), several(seed=3)
    rows = rows_of(old, 200)
    wanted = int((old.answer(rows)[0] != new.answer(rows)[0]).any(axis=1).sum())
    assert compared(old, new, rows) == (200, wanted)


def test_predictions_disagree_when_they_are_cells_apart():
    old = regressor()
    near = replace(old, bias=old.bias + np.float32(0.01))
    far = replace(old, bias=old.bias + np.float32(3.0))
    rows = rows_of(old, 300)
    assert compared(old, near, rows)[1] == 0
    assert compared(old, far, rows)[1] > 200


COLOURS = Feature(
    name="colour", kind="category", vocabulary=("red", "blue", "green"), unseen=True, missing=True
)


def test_categories_are_compared_by_value_and_unknown_ones_are_left_out():
    old = categorical(COLOURS, Feature(name="size"))
    turned = replace(COLOURS, vocabulary=("green", "red", "blue"))
    new = categorical(turned, Feature(name="size"))
    rows = rows_of(old, 100)
    rows[:10, 0] = -1.0
    rows[10:20, 0] = np.nan
    wanted = rows.copy()
    wanted[20:, 0] = np.array([1, 2, 0])[rows[20:, 0].astype(int)]
    differ = old.answer(rows[20:])[0] != new.answer(wanted[20:])[0]
    count, found = compared(old, new, rows)
    assert count == 90
    assert found == int(differ.sum())  # a missing one is missing to both


def test_a_row_that_the_candidate_would_refuse_counts_as_answered_otherwise():
    old = classifier(missing=["a"])
    strict = replace(old, features=classifier().features)
    rows = rows_of(old, 50)
    rows[:5, 0] = np.nan
    assert compared(old, strict, rows) == (50, 5)
    known = categorical(COLOURS, Feature(name="size"))
    fewer = categorical(replace(COLOURS, vocabulary=("red", "blue"), unseen=False), Feature(name="size"))
    rows = np.array([[0.0, 0.1], [2.0, 0.1]], np.float32)
    assert compared(known, fewer, rows[1:]) == (1, 1)


def test_a_candidate_of_other_features_is_none():
    with pytest.raises(ArtifactError, match="reads features"):
        compared(classifier("abc"), classifier("abd"), rows_of(classifier(), 1))


# ── the process ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "skiffd.toml"
    path.write_text(
        '[device]\nid = "d1"\nfleet = "f"\nstate_dir = "state"\n[broker]\nport = 1\n'
        '[model]\nname = "tiny"\ntrust_root = "root.json"\n[update]\nshadow_cpu_share = 1.0\n',
        encoding="utf-8",
    )
    return load(path)


class Shade:
    """A `Shadowing` with the models installed; `hear` waits for what it says."""

    def __init__(self, config, *models):
        slots = Slots(config.state_dir)
        for model in models:
            slots.blob(model.digest).write_bytes(model.artifact)
        self.woken = threading.Event()
        self.shadowing = Shadowing(config, slots, wake=self.woken.set)

    def follow(self, candidate, incumbent):
        """Starts the process and waits until it is ready for rows."""
        self.shadowing.follow(candidate, incumbent)
        deadline = time.perf_counter() + PATIENCE_SECONDS
        while not self.shadowing._hungry:
            self.woken.wait(0.1)
            assert list(self.shadowing.listen()) == []
            assert time.perf_counter() < deadline
        self.woken.clear()

    def hear(self):
        deadline = time.perf_counter() + PATIENCE_SECONDS
        while time.perf_counter() < deadline:
            self.woken.wait(PATIENCE_SECONDS)
            self.woken.clear()
            if found := list(self.shadowing.listen()):
                return found
        pytest.fail("nothing was said")


@pytest.fixture
def shade(config):
    made: list[Any] = []

    def make(*models):
        made.append(Shade(config, *models))
        return made[-1]

    yield make
    for each in made:
        each.shadowing.stop()


def test_what_a_runtime_answers_is_compared_in_another_process(shade):
    old, new = classifier(seed=0), classifier(seed=5)
    shadow = shade(old, new)
    runtime = Runtime(old.artifact)
    shadow.follow(new.digest, runtime.digest)
    runtime.tap = shadow.shadowing.offer
    rows = rows_of(old, 340)
    for part in (rows[:40], rows[40:]):
        for row in part[:20]:
            runtime.predict(row)
        runtime.count()
        wanted = int((old.answer(part[:20])[0] != new.answer(part[:20])[0]).sum())
        assert shadow.hear() == [Shadowed(digest=new.digest, rows=20, disagreed=wanted)]
        runtime.predict(part[20:])  # a batch
        runtime.count()
        wanted = int((old.answer(part[20:])[0] != new.answer(part[20:])[0]).sum())
        assert shadow.hear() == [Shadowed(digest=new.digest, rows=len(part) - 20, disagreed=wanted)]
    assert runtime.take_window().rows == 340


def test_a_candidate_that_is_no_good_says_why(shade):
    old, other = classifier("abc"), classifier("abd")
    shadow = shade(old, other)
    shadow.shadowing.follow(other.digest, old.digest)
    [said] = shadow.hear()
    assert "reads features" in said.failed


@pytest.fixture
def doomed(monkeypatch):
    """Has every child die of this signal as soon as it was started; gives their numbers."""

    def make(number):
        pids: list[int] = []

        def die(*args: Any, **kwargs: Any) -> Child:
            child = Child(*args, **kwargs)
            pids.append(child.pid)
            os.kill(child.pid, number)
            return child

        monkeypatch.setattr("edge_runtime.shadowing.Child", die)
        return pids

    return make


def test_a_process_that_crashes_is_started_again_but_not_for_ever(shade, doomed):
    old, new = classifier(seed=0), classifier(seed=5)
    shadow, pids = shade(old, new), doomed(signal.SIGSEGV)
    shadow.shadowing.follow(new.digest, old.digest)
    [said] = shadow.hear()
    assert isinstance(said, ServeFailed)
    assert said.digest == new.digest
    assert f"ended {DEATHS} times with code -11" in said.reason
    assert len(set(pids)) == DEATHS


def test_a_process_that_the_kernel_kills_is_started_again_later_and_nothing_is_held_against_the_model(
    shade, doomed, monkeypatch
):
    old, new = classifier(seed=0), classifier(seed=5)
    shadow, pids = shade(old, new), doomed(signal.SIGKILL)
    clock = [1000.0]
    monkeypatch.setattr("edge_runtime.shadowing.time.monotonic", lambda: clock[0])
    shadow.shadowing.follow(new.digest, old.digest)
    pauses = []
    for count in range(1, 11):
        [said] = shadow.hear()
        assert said == Noticed("shadow_interrupted", (("code", "-9"), ("reason", "")))
        before = clock[0]
        while len(pids) == count:
            clock[0] += 1.0
            list(shadow.shadowing.listen())
        pauses.append(clock[0] - before)
    assert pauses[:3] == [2.0, 4.0, 8.0]
    assert max(pauses) == LONGEST_PAUSE_SECONDS


def test_it_ends_with_whoever_started_it(shade):
    old, new = classifier(seed=0), classifier(seed=5)
    shadow = shade(old, new)
    shadow.shadowing.follow(new.digest, old.digest)
    child = shadow.shadowing._child
    shadow.shadowing._rows.close()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (line := child.poll()) is None or "exit" not in line:
        shadow.woken.wait(0.1)
        assert time.monotonic() < deadline
    assert line["exit"] == 0
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_rows_that_nobody_has_time_for_are_let_go(shade):
    old, new = classifier(seed=0), classifier(seed=5)
    shadow = shade(old, new)
    rows = rows_of(old, 500)
    shadow.shadowing.offer(rows)  # nobody is there yet
    shadow.follow(new.digest, old.digest)
    for _ in range(2000):
        shadow.shadowing.offer(rows)
    assert [said.rows for said in shadow.hear()] == [500]  # those of the first time
    shadow.shadowing.offer(rows[:7])
    assert [said.rows for said in shadow.hear()] == [7]


def test_a_swap_takes_the_tap_off_and_what_came_before_is_still_given():
    old, new = classifier(seed=0), classifier(seed=5)
    runtime = Runtime(old.artifact)
    given: list[int] = []
    runtime.tap = lambda rows: given.append(len(rows))
    runtime.predict(rows_of(old, 1)[0])
    runtime.swap(Engine(new.artifact))
    assert given == [1]
    runtime.predict(rows_of(old, 1)[0])
    runtime.count()
    assert given == [1]
