"""A real daemon, without a network, whose candidate on trial refuses rows that the model before it answers."""

from dataclasses import replace

import pytest

from edge_runtime.adapters.slots import Slots
from edge_runtime.contract.manifest import Feature
from edge_runtime.contract.release import TrialGate
from edge_runtime.core import lifecycle
from tests.services import free_port
from tests.support.chaos import MODEL, Application, install, provision
from tests.support.tiny_models import classifier

pytestmark = pytest.mark.sampled(2)

LAX = classifier(seed=1)
STRICT = replace(
    classifier(seed=2), features=(Feature(name="a"), Feature(name="b", low=-5.0, high=5.0), Feature(name="c"))
)
FAR = [0.1, 9.0, 0.3]
GATE = TrialGate(predictions=300, seconds=0.3, starts=2)


@pytest.fixture
def tried(tmp_path):
    """Starts a device that has this on trial beside the committed model, and an application that sends the row."""
    applications = []

    def start(row, *, committed=LAX, candidate=STRICT, gate=GATE):
        slots = lifecycle.SlotState(model=MODEL, committed=committed.digest)
        slots = lifecycle.begin_trial(slots, candidate.digest, attempt=1, gate=gate)
        home = provision(tmp_path / "d", "127.0.0.1", free_port(), slots=slots)
        for model in (LAX, STRICT):
            install(Slots(home.state), model)
        process = home.start()
        applications.append(Application(home.socket, row))
        return home, process, applications[-1]

    yield start
    for application in applications:
        application.close()


def test_it_goes_back_by_itself_and_the_rows_are_answered_again(tried):
    home, process, application = tried(FAR)
    application.wait_answers(1)
    assert application.models(0) == {LAX.digest}
    assert set(application.refused(0)) == {"range"}
    assert len(application.refused(0)) < GATE.predictions
    assert process.stop() == 0
    state = home.check_state()
    assert (state.serving, state.outcome, dict(state.quarantine)) == (
        LAX.digest,
        "rolled_back",
        {STRICT.digest: 1},
    )
    assert "calls that the model before it answers" in state.reason


@pytest.mark.parametrize("why", ["both refuse", "it may"])
def test_it_goes_on_where_the_model_before_would_have_refused_too_or_the_release_allows_it(tried, why):
    if why == "both refuse":
        home, process, application = tried([None, 0.2, 0.3])
    else:
        home, process, application = tried(
            FAR, gate=TrialGate(predictions=300, seconds=0.3, starts=2, max_refused=1.0)
        )
    application.wait(lambda: len(application.refused(0)) > GATE.predictions, "refused rows")
    assert process.stop() == 0
    assert home.check_state().serving == STRICT.digest
    assert application.models(0) == set()


def test_a_candidate_whose_process_is_killed_again_and_again_is_left_although_it_answers(tried):
    """Each life answers many rows, all of them together more than the trial needs."""
    gate = TrialGate(predictions=100_000, seconds=1.0, starts=2)
    home, process, application = tried([0.1, 0.2, 0.3], gate=gate)
    lives = 1
    while LAX.digest not in application.models(0):
        application.wait_answers(20)
        if home.check_state().serving == LAX.digest:
            break
        assert lives <= gate.starts, "as often as the gate allows, and once more to find out"
        process.kill()
        process, lives = home.start(), lives + 1
        process.wait_line("serving")
    application.wait(lambda: LAX.digest in application.models(0), "an answer of the model before")
    assert process.stop() == 0
    state = home.check_state()
    assert (state.serving, state.outcome) == (LAX.digest, "rolled_back")
    assert state.reason == "the process crashed while it served in 2 starts"


@pytest.mark.slow
def test_a_candidate_that_is_stopped_again_and_again_is_not(tried):
    gate = TrialGate(predictions=100_000, seconds=1.0, starts=1)
    home, process, application = tried([0.1, 0.2, 0.3], gate=gate)
    for _ in range(3):
        application.wait_answers(20)
        process.wait_line("serving", digest=STRICT.digest)
        assert process.stop() == 0
        process = home.start()
    application.wait_answers(20)
    assert process.stop() == 0
    assert home.check_state().serving == STRICT.digest
