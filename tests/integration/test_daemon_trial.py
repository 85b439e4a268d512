"""A real daemon, without a network, whose candidate on trial refuses rows that the model before it answers."""

import pytest

from edge_runtime.adapters.slots import Slots
from edge_runtime.contract.release import TrialGate
from edge_runtime.core import lifecycle
from tests.services import free_port
from tests.support.chaos import MODEL, Application, install, provision
from tests.support.tiny_models import classifier

LAX, STRICT = classifier(missing=("b",), seed=1), classifier(seed=2)
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
    home, process, application = tried([0.1, None, 0.3])
    application.wait_answers(1)
    assert application.models(0) == {LAX.digest}
    assert set(application.refused(0)) == {"missing"}
    assert len(application.refused(0)) < GATE.predictions
    assert process.stop() == 0
    state = home.check_state()
    assert (state.serving, state.outcome, dict(state.quarantine)) == (
        LAX.digest,
        "rolled_back",
        {STRICT.digest: 1},
    )
    assert "live rows that the model before it answers" in state.reason


@pytest.mark.parametrize("why", ["both refuse", "it may"])
def test_it_goes_on_where_the_model_before_would_have_refused_too_or_the_release_allows_it(tried, why):
    if why == "both refuse":
        home, process, application = tried([None, 0.2, 0.3])
    else:
        home, process, application = tried(
            [0.1, None, 0.3], gate=TrialGate(predictions=300, seconds=0.3, starts=2, max_refused=1.0)
        )
    application.wait(lambda: len(application.refused(0)) > GATE.predictions, "refused rows")
    assert process.stop() == 0
    assert home.check_state().serving == STRICT.digest
    assert application.models(0) == set()
