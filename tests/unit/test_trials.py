"""A candidate on trial as the daemon sees it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, InputError
from edge_runtime.contract.manifest import Budgets, Feature
from edge_runtime.engine import Engine
from edge_runtime.runtime import Runtime
from edge_runtime.trials import Trials
from tests.support.tiny_models import classifier

OLD = classifier(seed=1)
NEW = replace(
    classifier(seed=2),
    features=(Feature(name="a"), Feature(name="b", high=5.0), Feature(name="c")),
    budgets=Budgets(predict_p99_ns=70_000),
)
ROW = np.zeros(3, np.float32)
FAR = np.array([0.0, 9.0, 0.0], np.float32)


class Trying:
    """A runtime with a candidate, and a device whose memory and models a test sets."""

    def __init__(self, *, most_rss_bytes: int = 0) -> None:
        self.rss_bytes = 100
        self.models: dict[str, Any] = {OLD.digest: OLD.artifact}
        self.loaded: list[str] = []
        self.trials = Trials(load=self.load, rss_bytes=lambda: self.rss_bytes, most_rss_bytes=most_rss_bytes)
        self.runtime: Any = Runtime(NEW.artifact)

    def load(self, digest: str) -> Engine:
        self.loaded.append(digest)
        if digest not in self.models:
            raise ArtifactError(f"{digest} is gone")
        return Engine(self.models[digest])

    def begin(self, *, tried=NEW.digest, before=None, committed=OLD.digest, at=0.0):
        self.trials.begin(self.runtime, tried, at, before=before, committed=committed)

    def report(self, *, tried=NEW.digest, at=1.0):
        return self.trials.report(self.runtime, tried, at)


def test_each_report_has_what_was_new_since_the_last_one():
    trying = Trying()
    trying.begin(before=Engine(OLD.artifact))
    for n in (5, 3):
        for _ in range(n):
            trying.runtime.predict(ROW)
        for _ in range(n - 1):
            with pytest.raises(InputError):
                trying.runtime.predict(FAR)
        served = trying.report()
        assert (served.digest, served.predictions, served.refused, served.failed) == (NEW.digest, n, n - 1, 0)
        assert (served.rss_bytes, served.declared_p99_ns) == (100, 70_000)
    told = trying.report()
    assert told.cpu.count >= 7, "CPU times are those since the model was loaded"
    assert told.incumbent_cpu.count >= 1


def test_failures_that_are_the_candidates_alone_are_reported_once(monkeypatch):
    trying = Trying()
    trying.begin(before=Engine(OLD.artifact))

    def fail(*_: Any, **__: Any) -> Any:
        raise BudgetExceeded("too large")

    with monkeypatch.context() as patch:
        patch.setattr(trying.runtime.engine, "run", fail)
        with pytest.raises(BudgetExceeded):
            trying.runtime.predict(np.stack([ROW, ROW]))
    assert trying.report().failed == 2
    trying.runtime.take_window()
    assert trying.report().failed == 0


def test_the_time_of_a_trial_goes_on_between_rows_that_come_seldom():
    trying = Trying()
    trying.begin(before=Engine(OLD.artifact), at=10.0)
    spans = []
    for at in (70.0, 130.0, 190.0):
        assert trying.report(at=at - 30.0).predictions == 0
        trying.runtime.predict(ROW)
        spans.append(trying.report(at=at).seconds)
    assert spans == [60.0, 60.0, 60.0]


def test_after_a_start_the_incumbent_is_loaded_once_the_candidate_serves():
    trying = Trying()
    trying.begin()
    assert trying.loaded == []
    trying.report()
    trying.report()
    assert trying.loaded == [OLD.digest]
    with pytest.raises(InputError):
        trying.runtime.predict(FAR)
    assert trying.report().refused == 1


def test_after_a_crash_the_incumbent_is_not_loaded():
    """The memory of both may be what the process died of."""
    trying = Trying()
    trying.trials.begin(trying.runtime, NEW.digest, 0.0, before=None, committed=OLD.digest, crashed=True)
    trying.report()
    assert (trying.loaded, trying.runtime.incumbent) == ([], None)


def test_the_engine_that_a_switch_replaced_needs_no_loading_but_another_one_is_no_incumbent():
    trying = Trying()
    before = Engine(OLD.artifact)
    trying.begin(before=before)
    assert trying.runtime.incumbent.engine is before
    trying.begin(before=Engine(classifier(seed=3).artifact))
    trying.report()
    assert (trying.runtime.incumbent.engine.digest, trying.loaded) == (OLD.digest, [OLD.digest])


@pytest.mark.parametrize("committed", [None, "gone"])
def test_without_an_incumbent_the_candidate_is_judged_alone(committed):
    trying = Trying()
    trying.models = {}
    trying.begin(committed=committed and OLD.digest)
    with pytest.raises(InputError):
        trying.runtime.predict(FAR)
    served = trying.report()
    assert (served.refused, trying.runtime.incumbent) == (0, None)
    trying.report()
    assert len(trying.loaded) == (committed is not None), "it is tried once"


def test_when_the_trial_is_over_nothing_is_measured_and_the_incumbent_is_let_go():
    trying = Trying()
    trying.begin(before=Engine(OLD.artifact))
    assert trying.report(tried=None) is None
    assert (trying.runtime.measure_cpu, trying.runtime.incumbent) == (False, None)
    trying.begin(tried=None, before=Engine(OLD.artifact))
    assert (trying.runtime.measure_cpu, trying.runtime.incumbent) == (False, None)


def test_the_incumbents_memory_is_not_held_against_the_candidate(monkeypatch):
    trying = Trying(most_rss_bytes=150)
    trying.begin(before=Engine(OLD.artifact))
    trying.rss_bytes = 190
    real = trying.runtime.let_incumbent_go

    def go() -> None:
        real()
        trying.rss_bytes = 140

    monkeypatch.setattr(Runtime, "let_incumbent_go", lambda _: go())
    assert trying.report().rss_bytes == 140
    assert trying.runtime.incumbent is None
    trying.rss_bytes = 160
    assert trying.report().rss_bytes == 160, "what is above without it is the candidate's"
