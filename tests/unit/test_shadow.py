"""Comparing a candidate with the model in service, and the process that does it."""

import os
import signal
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_runtime import shadow as shadow_module
from edge_runtime.adapters.child import Child
from edge_runtime.adapters.marker import Marker
from edge_runtime.adapters.slots import Slots
from edge_runtime.config import load
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.manifest import Feature
from edge_runtime.core.events import Noticed, ServeFailed, Shadowed
from edge_runtime.engine import Engine
from edge_runtime.runtime import Runtime
from edge_runtime.shadow import BATCH_ROWS, LOWEST_PRIORITY, Comparison, Incomparable, ShadowJob
from edge_runtime.shadowing import DEATHS, FAULTS, LONGEST_PAUSE_SECONDS, Shadowing, _Way
from tests.support.strange_shadow import PADDING_BYTES
from tests.support.tiny_models import categorical, classifier, regressor, several

pytestmark = pytest.mark.sampled(2)

PATIENCE_SECONDS = 30.0


OLD, NEW = classifier(seed=0), classifier(seed=5)


def compared(incumbent, candidate, rows):
    return Comparison(Engine(incumbent.artifact), Engine(candidate.artifact)).count(rows)


def rows_of(tiny, n):
    return replace(tiny, seed=91).training[:n]


MANY = rows_of(OLD, 50)


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


def test_predictions_in_neighbouring_cells_agree_and_those_two_apart_do_not():
    old = regressor()
    comparison = Comparison(Engine(old.artifact), Engine(old.artifact))
    edges = comparison._edges[1:]  # between the first two there is no number
    inside = ((edges[1:] + edges[:-1]) / 2)[:, None]
    for apart, differ in ((0, False), (1, False), (2, True), (3, True)):
        before, after = inside[: len(inside) - apart], inside[apart:]
        for one, other in ((before, after), (after, before)):
            assert (comparison._differ((None, one), (None, other)) == differ).all(), apart


@pytest.mark.parametrize("tiny", [classifier(), regressor()], ids=["classifier", "regressor"])
def test_an_answer_where_the_other_has_none_is_another(tiny, monkeypatch):
    engines = [Engine(tiny.artifact), Engine(tiny.artifact)]
    comparison = Comparison(*engines)
    for changed in engines:
        honest = changed.run

        def undefined(rows, honest=honest):
            labels, scores = honest(rows)
            scores[:7] = np.nan
            return labels, scores

        monkeypatch.setattr(changed, "run", undefined)
        # First beside one that answers, then beside one that has no answer for the same rows either.
        assert comparison.count(rows_of(tiny, 40)) == (40, 7 if changed is engines[0] else 0)


@pytest.mark.parametrize(
    ("share", "spent", "pause"), [(0.05, 1.0, 19.0), (0.5, 3.0, 3.0), (1.0, 3.0, 0.02), (0.05, 0.0, 0.02)]
)
def test_it_sleeps_for_as_long_as_its_share_of_the_cpu_asks_for(tmp_path, monkeypatch, share, spent, pause):
    used = [0.0]
    pauses: list[float] = []

    class Clock:
        process_time_ns = staticmethod(time.process_time_ns)
        sleep = staticmethod(pauses.append)

        @staticmethod
        def process_time():
            used[0] += spent
            return used[0]

    monkeypatch.setattr(shadow_module, "time", Clock)
    paths = []
    for tiny in (OLD, NEW):
        paths.append(tmp_path / f"{tiny.digest}.onnx")
        paths[-1].write_bytes(tiny.artifact)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    marker = Marker.make()
    job = ShadowJob(
        incumbent=paths[0],
        incumbent_digest=OLD.digest,
        candidate=paths[1],
        candidate_digest=NEW.digest,
        rows_fd=theirs.fileno(),
        marker_fd=marker.handle,
        cpu_share=share,
        address_space_bytes=1,
        run_limit_seconds=0.0,
    )
    with theirs:
        with ours:
            ours.send(np.ascontiguousarray(rows_of(OLD, BATCH_ROWS + 1)).data)
        shadow_module.work(job, theirs, marker)
    marker.close()
    assert pauses == pytest.approx([pause, pause])


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
        while not self.hungry:
            self.woken.wait(0.1)
            assert list(self.shadowing.listen()) == []
            assert time.perf_counter() < deadline
        self.woken.clear()

    @property
    def hungry(self):
        return self.shadowing._way is not None and self.shadowing._way.hungry

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


def test_rows_go_on_when_the_answer_is_heard_before_they_are_said_to_be_sent(config):
    """The main thread may run between the system call's return and the feed's next line."""
    old, new = classifier(seed=0), classifier(seed=5)
    lines: list[dict[str, Any]] = []
    said: list[Any] = []
    shadowing = Shadowing(config, Slots(config.state_dir), wake=lambda: None)

    class Speaking:
        pid = 1

        def poll(self):
            return lines.pop(0) if lines else None

        def kill(self): ...

    class Quick:
        def send(self, *_: Any) -> None:
            lines.append({"rows": 5, "disagreed": 1})
            said.extend(shadowing.listen())

        def close(self): ...

    shadowing._candidate, shadowing._incumbent = new.digest, old.digest
    shadowing._child, shadowing._way = Speaking(), _Way(Quick())  # type: ignore[assignment, arg-type]
    shadowing._way.hungry = True
    for _ in range(3):
        shadowing.offer(rows_of(old, 5))
    assert said == [Shadowed(digest=new.digest, rows=5, disagreed=1)] * 3


def test_rows_that_the_kernel_refuses_are_not_waited_for(shade):
    old, new = classifier(seed=0), classifier(seed=5)
    shadow = shade(old, new)
    shadow.follow(new.digest, old.digest)
    way = shadow.shadowing._way
    way._socket.close()
    shadow.shadowing.offer(rows_of(old, 5))
    assert way.hungry


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


@pytest.fixture
def strange(monkeypatch):
    """Has one of the models behave strangely in every child; gives the children's numbers."""

    def make(model, way):
        monkeypatch.setenv("STRANGE_MODEL", model.digest)
        monkeypatch.setenv("STRANGE_WAY", way)
        pids: list[int] = []

        def start(module: str, *args: Any, **kwargs: Any) -> Child:
            assert module == "edge_runtime.shadow"
            child = Child("tests.support.strange_shadow", *args, **kwargs)
            pids.append(child.pid)
            return child

        monkeypatch.setattr("edge_runtime.shadowing.Child", start)
        return pids

    return make


@pytest.fixture
def clock(monkeypatch):
    """The one that pauses are taken from; it stands until somebody sets it."""
    found = [1000.0]
    monkeypatch.setattr("edge_runtime.shadowing.time.monotonic", lambda: found[0])
    return found


def is_interruption(said):
    return isinstance(said, Noticed) and said.name == "shadow_interrupted"


def answer(shadow, said):
    """Goes on listening, and offering rows when some are wanted, until something is said."""
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while not said:
        assert time.perf_counter() < deadline
        shadow.woken.wait(0.05)
        shadow.woken.clear()
        shadow.shadowing.offer(MANY)
        said.extend(shadow.shadowing.listen())
    return said


def test_a_candidate_that_crashes_is_started_again_but_not_for_ever(shade, strange):
    shadow, pids = shade(OLD, NEW), strange(NEW, "crash")
    shadow.shadowing.follow(NEW.digest, OLD.digest)
    [said] = answer(shadow, [])
    assert isinstance(said, ServeFailed)
    assert said.digest == NEW.digest
    assert f"ended {DEATHS} times with code -11" in said.reason
    assert len(set(pids)) == DEATHS


@pytest.mark.parametrize("way", ["crash_loading", "crash", "exceed"])
def test_what_is_wrong_with_the_incumbent_is_not_held_against_the_candidate(shade, strange, clock, way):
    """It is tried again; when it stays so, the candidate is without company, which is said for as long as it lasts."""
    shadow, pids = shade(OLD, NEW), strange(OLD, way)
    shadow.shadowing.follow(NEW.digest, OLD.digest)
    heard = []
    for count in range(1, FAULTS + 2):
        heard += answer(shadow, [])
        assert len(pids) == count, "it waits for the end of the pause"
        clock[0] += LONGEST_PAUSE_SECONDS
    assert all(is_interruption(said) for said in heard[: FAULTS - 1])
    for said in heard[FAULTS - 1 :]:
        assert (said.digest, said.rows, said.disagreed, said.failed) == (NEW.digest, 0, 0, "")
        assert said.alone
    shadow.shadowing.follow(None, OLD.digest)
    assert list(shadow.shadowing.listen()) == []


@pytest.mark.parametrize("broken", ["changed", "gone"])
def test_an_incumbent_whose_file_is_broken_is_not_held_against_the_candidate(shade, clock, broken):
    shadow = shade(OLD, NEW)
    path = shadow.shadowing._slots.blob(OLD.digest)
    path.unlink()
    if broken == "changed":
        path.write_bytes(b"x" + OLD.artifact[1:])
    shadow.shadowing.follow(NEW.digest, OLD.digest)
    for _ in range(FAULTS - 1):
        assert is_interruption(answer(shadow, [])[0])
        clock[0] += LONGEST_PAUSE_SECONDS
    [said] = answer(shadow, [])
    assert (said.failed, "the model in service" in said.alone) == ("", True)
    path.write_bytes(OLD.artifact)  # it was fetched again meanwhile
    clock[0] += LONGEST_PAUSE_SECONDS
    [said] = answer(shadow, [])
    assert (said.rows, said.failed, said.alone) == (len(MANY), "", "")


@pytest.mark.parametrize("way", ["fail", "exceed", "crash_loading"])
def test_what_is_wrong_with_the_candidate_is(shade, strange, way):
    shadow, _ = shade(OLD, NEW), strange(NEW, way)
    shadow.shadowing.follow(NEW.digest, OLD.digest)
    [said] = answer(shadow, [])
    if way == "crash_loading":
        assert isinstance(said, ServeFailed)
    else:
        assert said.failed
        assert not said.alone


@pytest.mark.parametrize(
    ("model", "way", "held_against_it"),
    [(NEW, "waste_cpu", True), (NEW, "waste_time", False), (OLD, "waste_cpu", False)],
    ids=["the candidate computes", "the candidate waits", "the incumbent computes"],
)
def test_the_limit_of_a_run_is_the_candidates_and_of_its_own_time(
    config, shade, strange, model, way, held_against_it
):
    limited = replace(config, run_limit_seconds=0.25 / BATCH_ROWS)
    strange(model, way)
    shadow = shade(OLD, NEW)
    shadow.shadowing._config = limited
    shadow.shadowing.follow(NEW.digest, OLD.digest)
    [said] = answer(shadow, [])
    assert bool(said.failed) is held_against_it, said
    assert said.rows == (0 if held_against_it else len(MANY))


def test_each_model_has_the_address_space_that_the_probe_allows_one(config, shade, strange):
    strange(NEW, "pad")
    shadow = shade(OLD, NEW)
    shadow.shadowing._config = replace(config, probe_address_space_bytes=PADDING_BYTES * 3 // 2)
    shadow.follow(NEW.digest, OLD.digest)


def test_more_address_space_is_not_to_be_had(config, shade, strange):
    strange(NEW, "pad")
    shadow = shade(OLD, NEW)
    shadow.shadowing._config = replace(config, probe_address_space_bytes=PADDING_BYTES * 9 // 10)
    shadow.shadowing.follow(NEW.digest, OLD.digest)
    [said] = shadow.hear()
    assert "does not fit" in said.failed


def test_every_other_process_comes_first(shade):
    shadow = shade(OLD, NEW)
    shadow.follow(NEW.digest, OLD.digest)
    assert os.getpriority(os.PRIO_PROCESS, shadow.shadowing.pid) == LOWEST_PRIORITY


def test_a_process_that_may_not_lower_its_priority_works_all_the_same(shade, strange):
    strange(NEW, "nice")
    shadow = shade(OLD, NEW)
    shadow.follow(NEW.digest, OLD.digest)
    [said] = answer(shadow, [])
    assert said.rows == len(MANY)


def test_only_a_process_at_work_on_the_candidate_leaves_its_mark():
    marker = Marker.make()
    inherited = Marker(os.dup(marker.handle))
    seen = [marker.is_set]
    with inherited.within():
        seen.append(marker.is_set)
    seen.append(marker.is_set)
    with pytest.raises(KeyError), inherited.within():
        raise KeyError
    assert [*seen, marker.is_set] == [False, True, False, False]
    marker.close()
    inherited.close()


def test_an_incumbent_that_fails_on_rows_is_told_from_the_candidate():
    for broken, error in ((0, Incomparable), (1, ArtifactError)):
        engines = [Engine(OLD.artifact), Engine(NEW.artifact)]
        comparison = Comparison(*engines)
        engines[broken].close()
        with pytest.raises(error, match="engine is closed"):
            comparison.count(MANY)


def test_a_process_that_the_kernel_kills_is_started_again_later_and_nothing_is_held_against_the_model(
    shade, doomed, clock
):
    old, new = classifier(seed=0), classifier(seed=5)
    shadow, pids = shade(old, new), doomed(signal.SIGKILL)
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
    shadow.shadowing._way.close()
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
