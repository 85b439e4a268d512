"""The composition root with a candidate on trial: what ends one, and what serves then."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_runtime.contract.release import TrialGate
from edge_runtime.core import lifecycle
from edge_runtime.core.budget import Budget, EndTrial, Lighten
from edge_runtime.core.events import Save, Serve, ServeFailed, Started, Ticked
from edge_runtime.daemon import Daemon
from edge_runtime.loading import TRIAL_RUN_LIMIT_SECONDS
from edge_runtime.runtime import Runtime
from tests.support.chaos import configured, install
from tests.support.tiny_models import classifier

TINY = classifier()
DIGEST = TINY.digest
GATE = TrialGate(predictions=10, seconds=1.0, starts=1)
OTHER = classifier(seed=7)


@pytest.fixture
def config(tmp_path):
    return configured(tmp_path)


def on_trial(config, *, candidate=OTHER) -> Any:
    """A daemon whose candidate serves, with the committed model in memory beside it."""
    slots = lifecycle.SlotState(model=config.model, committed=DIGEST)
    daemon: Any = Daemon(config)
    for model in (TINY, candidate):
        install(daemon._slots, model)
    daemon._perform(Save(slots))
    daemon = Daemon(config)
    daemon._handle(Started())
    trial = lifecycle.activate(lifecycle.begin_trial(slots, candidate.digest, attempt=1, gate=GATE))
    daemon._perform(Save(trial))
    daemon._agent._models.slots = trial
    daemon._perform(Serve(candidate.digest))
    assert daemon._runtime is not None
    assert daemon._runtime.digest == candidate.digest
    return daemon


def test_the_model_before_serves_again_although_its_file_cannot_be_read_any_more(config):
    daemon = on_trial(config)
    daemon._slots.blob(DIGEST).unlink()
    daemon._handle(ServeFailed(OTHER.digest, "too slow"))
    assert daemon._runtime is not None
    assert daemon._runtime.digest == DIGEST
    assert daemon._agent.slots.outcome == "rolled_back"
    assert daemon._runtime.incumbent is None


def test_a_model_in_memory_that_answers_golden_rows_wrongly_is_read_anew(config, monkeypatch):
    daemon = on_trial(config)
    kept = daemon._runtime.incumbent.engine
    monkeypatch.setattr(type(kept), "golden_problem", lambda self: "wrong" if self is kept else "")
    daemon._handle(ServeFailed(OTHER.digest, "too slow"))
    assert daemon._runtime.digest == DIGEST
    assert daemon._runtime.engine is not kept


def test_a_condemned_candidate_answers_nobody_even_where_nothing_else_can_be_loaded(config):
    daemon = on_trial(config)
    daemon._runtime.incumbent = None
    daemon._slots.blob(DIGEST).unlink()
    daemon._handle(ServeFailed(OTHER.digest, "too slow"))
    assert not daemon._runtime
    install(daemon._slots, TINY)
    daemon._handle(Ticked())
    daemon._agent._models.reload_at = 0.0
    daemon._handle(Ticked())
    assert daemon._runtime.digest == DIGEST


def test_memory_above_the_hard_limit_ends_a_trial_that_has_one_to_go_back_to(config, monkeypatch):
    daemon = on_trial(config)
    said = [[Lighten()], [EndTrial("RSS is above the hard limit")]]
    monkeypatch.setattr(daemon._watch._guard, "observe", lambda *_, on_trial: said.pop(0) if on_trial else [])
    daemon._tick(time.monotonic() + 10.0)
    assert daemon._runtime.incumbent is None
    assert daemon._runtime.digest == OTHER.digest
    daemon._tick(time.monotonic() + 20.0)
    assert (daemon._runtime.digest, daemon._agent.slots.reason) == (DIGEST, "RSS is above the hard limit")


@pytest.mark.parametrize(
    ("did", "reason"),
    [
        ({"failed": 1}, "1 predictions failed in the engine"),
        ({"refused_alone": 3}, "had no answer for 3 calls that the model before it answers"),
    ],
)
def test_what_the_runtime_counts_on_trial_rolls_it_back(config, monkeypatch, did, reason):
    daemon = on_trial(config)
    stats = replace(daemon._runtime.trial_stats(), **did)
    monkeypatch.setattr(Runtime, "trial_stats", lambda _: stats)
    daemon._tick(time.monotonic())
    assert daemon._runtime.digest == DIGEST
    assert daemon._agent.slots.reason.startswith(reason)


def test_resident_memory_above_the_budget_rolls_a_trial_back(config, monkeypatch):
    daemon = on_trial(replace(config, budget=Budget(rss_bytes=1_000_000)))
    for row in np.random.default_rng(1).normal(size=(2 * GATE.predictions, 3)).astype(np.float32):
        daemon._runtime.predict(row)
    daemon._tick(time.monotonic())
    assert daemon._runtime.digest == DIGEST
    assert "RSS of" in daemon._agent.slots.reason


def test_a_run_on_trial_has_a_limit_where_the_configuration_has_none(config):
    daemon = on_trial(config)
    assert daemon._runtime.engine._limit.seconds == TRIAL_RUN_LIMIT_SECONDS
    assert daemon._runtime.incumbent.engine._limit is None
