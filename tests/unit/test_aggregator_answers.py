"""What questions to the telemetry store cost: a rollout's gates ask them again and again, and so does the page."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest

from aggregator import outlook as outlooks
from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.arms import REST, Arms
from aggregator.core.coordinator import Ask
from aggregator.core.gates import Evidence
from aggregator.outlook import outlook
from aggregator.records import Selection, Track
from edge_runtime.contract.ids import DeviceId, ModelName, RolloutId
from tests.support.fleet import DAY, MODEL, NOW, SECOND, A, B, window
from tests.support.ledger_kit import RELEASE, ROLLOUT
from tests.support.sqlite_steps import steps
from tests.support.window_kit import OTHER, prune, put

NAMES = tuple(DeviceId(f"dev-{i}") for i in range(8))
ONE = window()


def ask(devices=NAMES):
    return Ask(
        rollout=RolloutId("r1"),
        model=MODEL,
        candidate=B,
        candidate_since_ns=NOW,
        incumbent=A,
        incumbent_since_ns=NOW - 3600 * SECOND,
        devices=devices,
    )


def send(store, seqs, *, at, digest=A, names=NAMES):
    """Every device sends a window of each number."""
    sent = [replace(ONE, device=n, seq=seq, seq_lo=seq, digest=digest) for seq in seqs for n in names]
    assert put(store, *sent, at=at).stored == len(sent)


@pytest.fixture
def opened(tmp_path):
    """Opens a store of each name."""
    made = []

    def store(name):
        made.append(Windows(tmp_path / f"{name}.sqlite"))
        return made[-1]

    yield store
    for one in made:
        one.close()


# ── what a gate asks ───────────────────────────────────────────────────────────────────────────────────


def question(store, asked):
    return steps(store, lambda: Arms(store).evidence([asked]))


@pytest.mark.parametrize("rolled_up", [False, True])
def test_the_gates_do_not_read_what_is_older_than_their_arms(opened, rolled_up):
    """Neither windows of both artifacts, from the same devices, nor the days that they were rolled up to."""
    took = []
    for days in (0, 30):
        store = opened(f"of-{days}-days")
        for k in range(days):
            for digest in (A, B):
                send(store, [2 * k + (digest == B)], at=NOW - (40 - k) * DAY, digest=digest)
        if rolled_up:
            prune(store, NOW - DAY)
        send(store, [1000, 1001], at=NOW - SECOND)
        send(store, [1002], at=NOW + SECOND, digest=B)
        evidence = Arms(store).evidence([ask()])[ask().rollout]
        assert {t.windows for t in evidence.control} == {2}
        assert {t.windows for t in evidence.candidate} == {1}
        took.append(question(store, ask()))
    assert took[1] <= 1.1 * took[0] + 10


def test_the_gates_do_not_read_old_windows_for_an_arm_that_has_none_yet(opened):
    took = []
    for many in (0, 60):
        store = opened(f"with-{many}")
        send(store, range(many), at=NOW - DAY)
        assert Arms(store).evidence([ask()]) == {ask().rollout: Evidence()}
        took.append(question(store, ask()))
    assert took[1] <= took[0] + 10


def test_the_gates_cost_no_more_than_in_proportion_to_devices(opened):
    took = []
    for many in (200, 800):
        names = tuple(DeviceId(f"dev-{i:05d}") for i in range(many))
        store = opened(f"of-{many}")
        send(store, [1], at=NOW - SECOND, names=names)
        took.append(question(store, ask(names)))
    assert took[1] <= 4.4 * took[0] + 10


def test_the_newest_windows_of_an_arm_are_found_without_reading_the_others(opened):
    took = []
    for many in (10, 60):
        store = opened(f"with-{many}")
        send(store, range(many), at=NOW)
        newest = partial(store.latency, Selection(digest=A, devices=NAMES, last=10))
        assert newest().count == 10 * 20
        took.append(steps(store, newest))
    assert took[1] <= took[0] + 1


def test_a_fleet_of_any_size_is_one_parameter(opened):
    store = opened("large")
    send(store, [1], at=NOW)
    store._db._db.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 20)
    names = (*NAMES, *(DeviceId(f"other-{i}") for i in range(100)))
    assert len(store.totals(Selection(devices=names))) == len(NAMES)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Slow(Windows):
    """A store that takes its time, and counts what it was asked."""

    def __init__(self, path, clock, seconds):
        super().__init__(path)
        self._clock = clock
        self._seconds = seconds
        self.asked = 0

    def totals(self, selection):
        self.asked += 1
        self._clock.now += self._seconds
        return super().totals(selection)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def slow(tmp_path, clock):
    with closing(Slow(tmp_path / "slow.sqlite", clock, seconds=0.5)) as store:
        yield store


def test_a_store_that_takes_long_over_the_gates_questions_rests_between_them(slow, clock):
    arms = Arms(slow, clock)
    first = arms.evidence([ask()])
    assert (slow.asked, clock.now) == (2, 1.0)
    send(slow, [1], at=NOW)
    joined = ask((*NAMES, DeviceId("newcomer")))
    clock.now += REST - 0.1
    assert arms.evidence([joined]) == first
    assert slow.asked == 2
    clock.now += 0.2
    assert len(arms.evidence([joined])[ask().rollout].control) == len(NAMES)
    assert slow.asked == 4


def test_another_stage_is_asked_about_at_once_and_the_one_before_is_forgotten(slow, clock):
    arms = Arms(slow, clock)
    arms.evidence([ask()])
    send(slow, [1], at=NOW, digest=B)
    (found,) = arms.evidence([replace(ask(), candidate_since_ns=NOW - 1)]).values()
    assert len(found.candidate) == len(NAMES)
    assert len(arms.evidence([ask()])[ask().rollout].candidate) == len(NAMES)
    assert slow.asked == 6
    assert arms.evidence([]) == {}


def test_a_store_that_is_quick_is_asked_every_time(tmp_path, clock):
    with closing(Slow(tmp_path / "quick.sqlite", clock, seconds=0.0)) as quick:
        arms = Arms(quick, clock)
        for _ in range(3):
            arms.evidence([ask()])
        assert quick.asked == 6


# ── what the page asks ─────────────────────────────────────────────────────────────────────────────────


def test_the_page_costs_the_same_whatever_the_store_holds(opened, tmp_path, monkeypatch):
    """Also for a model that a release names and nobody serves."""
    monkeypatch.setattr(outlooks, "LATENCY_NUMBERS", 40)
    took = []
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        with ledger.transaction():
            for model in (MODEL, ModelName("unserved")):
                release = replace(RELEASE, model=model)
                rollout = replace(ROLLOUT, model=model, rollout=RolloutId(f"of-{model}"))
                ledger.put_track(Track(cohort=RELEASE.cohort, model=model, release=release, rollout=rollout))
        for many in (10, 100):
            store = opened(f"of-{many}")
            send(store, range(many), at=NOW)

            def look(store=store):
                return outlook(ledger, store, (), sent_ns=lambda _: NOW, silent_before_ns=NOW)

            assert {model for model, _, _ in look().latency} == {MODEL}
            took.append(steps(store, look))
    assert took[1] <= took[0] + 10


def test_the_page_shows_a_models_own_newest_windows(opened, tmp_path):
    store = opened("of-two")
    put(store, *(replace(window(seq=seq, latency_ns=1000), model=OTHER) for seq in range(150)))
    put(store, *(window(seq=seq, latency_ns=64_000) for seq in range(150, 400)))
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        with ledger.transaction():
            ledger.put_track(Track(cohort=RELEASE.cohort, model=MODEL, release=RELEASE, rollout=ROLLOUT))
        found = outlook(ledger, store, (), sent_ns=lambda _: NOW, silent_before_ns=NOW)
    wanted = store.latency(Selection(model=MODEL, last=200))
    assert wanted.count == 200 * 20
    assert found.latency == tuple((MODEL, q, wanted.quantile_ns(q)) for q in (0.5, 0.9, 0.99))
