"""A real ``skiffd`` on a real broker that lies, with releases that the thief of the director key signed."""

import pytest

from edge_runtime.contract import ids
from edge_runtime.contract.codec import encode
from edge_runtime.contract.messages import SignedRelease
from edge_runtime.contract.release import TrialGate, to_payload
from tests.publisher import director, put
from tests.publisher import release as assigned
from tests.support.chaos import COHORT, FLEET, MODEL, OLD, TOPICS, everything, provision
from tests.support.tiny_models import classifier
from trainer.publish import Repository

GATE = TrialGate(predictions=20, seconds=0.1, starts=3)


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.attack("A51")
def test_a_device_serves_what_it_verified_and_says_why_it_takes_nothing_else(tmp_path, mosquitto):
    repository = Repository.create(tmp_path / "repository")
    repository.enable_auto(MODEL)
    home = provision(
        tmp_path / "d",
        mosquitto.host,
        mosquitto.port,
        window_seconds=5.0,
        more="[update]\ndeadline_seconds = 20\n",
    )
    (home.folder / "root.json").write_bytes(repository.pinned_root.read_bytes())
    model = classifier(seed=5)
    digest = repository.add(put(tmp_path, model.artifact)).digest
    keyid, key = director(repository)

    def signed(candidate, revision):
        document = assigned(candidate, revision=revision, fleet=FLEET, cohort=COHORT, model=MODEL, trial=GATE)
        payload = to_payload(document)
        return encode(SignedRelease(payload=payload, signatures=((keyid, key.sign(payload)),)))

    with everything(mosquitto, home) as (centre, application):

        def serve(*, spoiled):
            for topic, payload, delivery in repository.outgoing(TOPICS, [digest]):
                spoil = spoiled and "/blob/" in topic
                centre.publish(topic, bytes(reversed(payload)) if spoil else payload, delivery)

        def order(candidate, revision):
            centre.publish(TOPICS.release(COHORT, MODEL), signed(candidate, revision))

        serve(spoiled=True)
        process = home.start()
        try:
            centre.wait_birth(process.session)
            application.wait_answers(5)
            # A model that exists nowhere but in the thief's release.
            order(ids.digest("d" * 64), 1)
            failed = process.wait_line("update_failed", stage="release")
            assert any("is no target of family 'tiny'" in text for text in process.text), failed
            delayed = centre.wait_event("update_delayed")
            assert "is no target of family 'tiny'" in dict(delayed.detail)["reason"]
            # A published one, with other bytes.
            order(digest, 2)
            process.wait_line("update_failed", stage="verify")
            assert any("SHA-256" in text for text in process.text)
            application.wait_answers(5)
            state = home.check_state()
            assert (state.committed, state.trial, state.quarantine) == (OLD.digest, None, ())
            assert application.models(0) == {OLD.digest}
            # The honest broker is back, and so is the model.
            serve(spoiled=False)
            process.wait_line("serving", digest=digest)
            application.wait(lambda: digest in application.models(0), "an answer of the new model")
            assert application.refused(0) == []
        finally:
            process.close()
