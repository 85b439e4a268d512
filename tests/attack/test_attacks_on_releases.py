"""Releases: forged, meant for others, old, and those that the thief of the director key signs."""

import random
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.contract import codec, ids
from edge_runtime.contract.ids import Digest, SessionId
from edge_runtime.contract.messages import Event, SignedRelease
from edge_runtime.contract.release import from_payload, to_payload
from edge_runtime.core.agent import Agent
from edge_runtime.core.budget import Budget
from edge_runtime.core.events import Append, Connected, MessageArrived, Started, StartUpdate, update_ended
from edge_runtime.core.lifecycle import SlotState
from edge_runtime.core.voice import Identity
from tests.publisher import COHORT, DEVICE, FLEET, MODEL, director, release, signed
from tests.support.attacked import TOPICS, Thief

UNKNOWN = Digest("d" * 64)
HIGHEST = 2**63 - 1


def connected(device, **state):
    """The device's control plane, with a state of its own."""
    session = SessionId("00000000000000aa")
    me = Identity(fleet=FLEET, device=DEVICE, cohort=COHORT, session=session, model=MODEL)
    slots = SlotState(model=MODEL, committed=device.serving, **state)
    agent = Agent(me, slots, Budget(), random.Random(0))
    agent.handle(Started(), 0.0, 0)
    agent.handle(Connected(), 0.0, 0)
    return agent


def started(agent, message):
    """The child that is started for a message."""
    arrived = MessageArrived(TOPICS.release(COHORT, MODEL), message)
    [start] = [action for action in agent.handle(arrived, 1.0, 1) if isinstance(action, StartUpdate)]
    return start


# ── without the director key ───────────────────────────────────────────────────────────────────────────


@pytest.mark.attack("A31")
def test_a_release_that_the_director_did_not_sign(device):
    digest = device.publish(seed=1)
    payload = to_payload(release(digest, revision=2))
    keyid, key = director(device.repository)
    thief = Ed25519PrivateKey.generate()
    for signatures in (
        (),
        ((keyid, thief.sign(payload)),),
        (("0" * 64, thief.sign(payload)),),
        ((keyid, key.sign(payload + b" ")),),
        ((keyid, key.sign(payload)[:-1]),),
    ):
        message = codec.encode(SignedRelease(payload=payload, signatures=signatures))
        result = device.refuses(message, "release", "not signed by the director")
        assert result["release"] == ""
        assert result["retry"], "its key may be trusted later; until then others go first"
    # A stranger's signature beside the director's own does no harm.
    both = ((keyid, key.sign(payload)), ("0" * 64, thief.sign(payload)))
    assert device.update(codec.encode(SignedRelease(payload=payload, signatures=both)))["ok"]
    device.follows(seed=2, revision=3)


@pytest.mark.attack("A32")
def test_a_release_signed_with_another_key_of_the_publisher(device):
    digest = device.publish(seed=1)
    payload = to_payload(release(digest, revision=2))
    for name in ("root-1", "targets-1", "snapshot", "timestamp", "builder"):
        signer = Thief(device).signer(name)
        signature = bytes.fromhex(signer.sign(payload).signature)
        for keyid in (signer.public_key.keyid, director(device.repository)[0]):
            message = codec.encode(SignedRelease(payload=payload, signatures=((keyid, signature),)))
            device.refuses(message, "release", "not signed by the director")
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A33")
def test_a_release_for_another_fleet_cohort_or_family(device):
    digest = device.publish(seed=1)
    for changes, words in (
        ({"fleet": ids.fleet_id("other")}, "meant for fleet 'other', this device has 'fleet-1'"),
        ({"cohort": ids.cohort_id("other")}, "meant for cohort 'other', this device has 'main'"),
        ({"model": ids.model_name("other")}, "meant for model 'other', this device has 'toy'"),
    ):
        result = device.refuses(release(digest, revision=2, **changes), "release", words)
        assert result["release"] == ""
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A34")
def test_a_release_played_back(device):
    old = device.publish(seed=1)
    kept = signed(device.repository, release(old, revision=2))
    new = device.follows(seed=2, revision=3)
    assert device.update(release(new, revision=3))["ok"], "the newest may come again"
    device.refuses(kept, "release", "revision 2 is older than 3, which was accepted here")
    device.refuses(kept, "release", "revision 2 is older than 3", serving=new, have=[new], floor=0)
    device.follows(seed=3, revision=4)


@pytest.mark.attack("A35")
def test_a_release_played_back_after_the_trust_record_was_lost(device):
    """Both copies: what is left is what the daemon remembers."""
    old = device.publish(seed=1)
    kept = signed(device.repository, release(old, revision=2))
    device.follows(seed=2, revision=3)
    for path in (device.state / "trust").glob("record.?.json"):
        path.unlink()
    device.refuses(kept, "release", "revision 2 is older than 3", floor=3)
    device.follows(seed=3, revision=4)


# ── with the director key ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.attack("A41")
def test_the_director_assigns_a_digest_that_is_not_published(device):
    result = device.refuses(
        release(UNKNOWN, revision=2), "release", f"model {UNKNOWN} is no target of family 'toy'"
    )
    assert not [topic for topic in device.broker.asked if UNKNOWN in topic]
    assert (result["digest"], result["retry"]) == ("", True), "it may be published later"
    assert from_payload(bytes.fromhex(result["release"])).candidate == UNKNOWN
    device.follows(seed=1, revision=3)


@pytest.mark.attack("A42")
def test_the_director_assigns_a_model_of_another_family(device):
    other = ids.model_name("other")
    device.repository.enable_auto(other)
    digest = device.publish(seed=1, name=other)
    device.refuses(release(digest, revision=2), "release", "is no target of family 'toy'")
    device.follows(seed=1, revision=3)


@pytest.mark.attack("A43")
def test_the_director_assigns_a_revoked_model(device):
    digest = device.publish(seed=1)
    device.repository.revoke(digest)
    device.broker.publish(device.repository)
    result = device.refuses(release(digest, revision=2), "release", "was revoked: release another one")
    assert result["digest"] == digest
    # Nor does having had it before help.
    device.refuses(release(digest, revision=3), "release", "was revoked", have=[device.serving, digest])
    # What serves already goes on until a release names another.
    assert device.update(release(digest, revision=3), serving=digest)["action"] == "keep"
    device.follows(seed=2, revision=4)


@pytest.mark.attack("A44")
def test_the_director_signs_one_revision_twice(device):
    """Different devices must not be told different things by one revision; nobody could audit that."""
    first, second = device.publish(seed=1), device.publish(seed=2)
    assert device.update(release(first, revision=2))["ok"]
    device.refuses(release(second, revision=2), "release", "revision 2 was accepted here with other contents")
    device.follows(seed=3, revision=3)


@pytest.mark.attack("A45")
def test_a_quarantined_digest_is_not_tried_again(device):
    """The whole way: the message, the agent, the child, the agent, and the note that goes to the aggregator."""
    digest = device.publish(seed=1)
    agent = connected(device, quarantine=((digest, 1),), floors=((COHORT, 1),))

    def offer(document):
        start = started(agent, signed(device.repository, document))
        result = device.update(
            start.release, floor=start.floor, quarantine=dict(start.quarantine), have=list(start.have)
        )
        return result, agent.handle(update_ended(result), 2.0, 2)

    device.broker.asked.clear()
    result, actions = offer(release(digest, revision=2))
    assert result["action"] == "skip_quarantined"
    assert not [topic for topic in device.broker.asked if "/blob/" in topic]
    assert agent.slots.serving == device.serving
    [note] = [codec.decode(a.payload) for a in actions if isinstance(a, Append)]
    assert isinstance(note, Event)
    assert note.name == "refused"
    assert dict(note.detail)["reason"] == "quarantined here by an earlier rollout"
    # On purpose, and for everybody to see, it may be offered again.
    result, _ = offer(release(digest, revision=3, attempt=2))
    assert result["action"] == "install"


@pytest.mark.attack("A46")
def test_the_stolen_director_key_does_not_lock_out_the_true_director(device):
    """He signs the highest revision there is. Another director key is the remedy, and the floor falls with his."""
    chosen = device.publish(seed=1)
    message = signed(device.repository, release(chosen, revision=HIGHEST))
    assert device.update(message)["ok"], "an approved model is what he can assign"
    device.refuses(release(None, revision=2), "release", f"revision 2 is older than {HIGHEST}", floor=HIGHEST)
    device.repository.rotate("director")
    device.broker.publish(device.repository)
    # The daemon's own floor, which is as high, keeps nobody out either.
    agent = connected(device, floors=((COHORT, HIGHEST),))
    digest = device.publish(seed=2)
    start = started(agent, signed(device.repository, release(digest, revision=2)))
    result = device.update(start.release, floor=start.floor, have=list(start.have))
    assert (result["ok"], result["action"]) == (True, "install"), result
    agent.handle(update_ended(result), 2.0, 2)
    assert (agent.slots.floor(COHORT), agent.slots.revision) == (2, 2)
    # What he signed is no release any more, of whatever revision.
    changes = {"serving": digest, "have": [digest]}
    device.refuses(message, "release", "not signed by the director", **changes)
    # And the true director's own old releases stay old.
    kept = signed(device.repository, release(chosen, revision=3))
    device.follows(seed=3, revision=4)
    device.refuses(kept, "release", "revision 3 is older than 4", **changes)


@pytest.mark.attack("A47")
def test_a_hostile_broker_with_a_stolen_director_key(device):
    """All at once: whatever he signs and whatever he serves, the device runs what it ran, or an approved model."""
    approved, revoked = device.publish(seed=1), device.publish(seed=2)
    before = device.told
    device.repository.revoke(revoked)
    device.broker.publish(device.repository)
    assert device.update(release(None, revision=2))["ok"]
    for revision, (candidate, stage, words) in enumerate(
        (
            (UNKNOWN, "release", "is no target of family 'toy'"),
            (revoked, "release", "was revoked"),
        ),
        start=3,
    ):
        device.refuses(release(candidate, revision=revision), stage, words)
    device.tell(before)
    device.refuses(release(revoked, revision=10), "trust", "older than what this device has verified before")
    device.broker.publish(device.repository)
    for topic in [t for t in device.broker.retained if f"/blob/{approved}/" in t]:
        device.broker.retained[topic] = bytes(len(device.broker.retained[topic]))
    device.refuses(release(approved, revision=11), "verify", "SHA-256")
    everybody = release(None, revision=12)
    device.refuses(replace(everybody, fleet=ids.fleet_id("other")), "release", "meant for fleet")
    # What he can do: have it run an older model that the publisher still stands by.
    device.broker.publish(device.repository, [approved])
    assert device.update(release(approved, revision=13))["ok"]
    assert device.installed == {device.serving, approved}
