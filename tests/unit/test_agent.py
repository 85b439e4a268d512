"""The device's control plane, one event at a time."""

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract import codec, messages
from edge_runtime.contract.codec import encode
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import DeviceId, SessionId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.release import ShadowGate, TrialGate, from_payload, to_payload
from edge_runtime.contract.topics import STATUS, Topics
from edge_runtime.core.agent import ACK_TIMEOUT_SECONDS, COMPLAINT_SECONDS, MAX_IN_FLIGHT, Agent
from edge_runtime.core.budget import Budget
from edge_runtime.core.events import (
    Append,
    ClockChanged,
    Collect,
    Connected,
    Disconnected,
    GapFound,
    MessageArrived,
    Noticed,
    Publish,
    Save,
    Saved,
    Send,
    Sent,
    Serve,
    Served,
    ServeFailed,
    Started,
    StartUpdate,
    Ticked,
    Trim,
    Unsaved,
    UpdateEnded,
    UpdatePhase,
    update_ended,
    update_phase,
)
from edge_runtime.core.lifecycle import (
    SlotState,
    activate,
    begin_shadow,
    begin_trial,
    compare,
    from_document,
    progress,
    refuse,
    to_document,
)
from edge_runtime.core.offers import MAX_OFFERS
from edge_runtime.core.probation import PROGRESS_SECONDS, SAVE_SECONDS
from tests.support.device import (
    COHORT,
    DEVICE,
    FLEET,
    GATE,
    MODEL,
    SESSION,
    A,
    B,
    C,
    P,
    closed,
    cpu,
    identity,
    release,
    signed,
)

TOPICS = Topics(FLEET)
RELEASES = TOPICS.release(COHORT, MODEL)
ACKS = TOPICS.ack(DEVICE)
COMMANDS = TOPICS.command(DEVICE)
SETTLED = SlotState(model=MODEL, committed=A, previous=P)


def decode(payload: bytes) -> Any:
    """The message, of whatever kind the test expects."""
    return codec.decode(payload)


class Bench:
    """An agent on a bench: a clock that only moves when told, and the actions of the last event."""

    def __init__(self, slots=SETTLED, *, budget=Budget(), connected=True, started=True):  # noqa: B008 (frozen)
        self.agent = Agent(identity(), slots, budget, random.Random(1))
        self.now = 1000.0
        self.actions = []
        if started:
            self.do(Started())
        if connected:
            self.do(Connected())

    def do(self, event, *, after=0.0):
        self.now += after
        self.actions = self._handle(event)
        if any(save.needed for save in self.get(Save)):
            self.actions += self._handle(Saved())
        return self.actions

    def _handle(self, event):
        return self.agent.handle(event, self.now, 1_700_000_000_000_000_000)

    @property
    def trial(self) -> Any:
        return self.agent.slots.trial

    def get(self, kind):
        return [action for action in self.actions if isinstance(action, kind)]

    def one(self, kind):
        (found,) = self.get(kind)
        return found

    @property
    def notes(self):
        found = [decode(append.payload) for append in self.get(Append)]
        return {event.name: dict(event.detail) for event in found if isinstance(event, messages.Event)}

    @property
    def report(self):
        """The model's state in the status of the last event."""
        (publish,) = self.get(Publish)
        return decode(publish.payload).models[0]

    def offer(self, document):
        return self.do(MessageArrived(RELEASES, signed(document)))

    def end(self, document, **result):
        """The child's answer to ``document``."""
        return self.do(UpdateEnded(release=document, **{"ok": True, **result}))

    def try_out(self, model=B, incumbent=A, **wish):
        """Goes as far as a trial of ``model``."""
        document = release(model, incumbent, **wish)
        self.offer(document)
        return self.end(document, installed=True, digest=model)

    def serve(
        self, model=B, *, predictions=100, seconds=1.0, after=1.0, each_ns=50_000, samples=None, **more
    ):
        samples = predictions if samples is None else samples
        fields = {"failed": 0, "rss_bytes": 0, **more}
        event = Served(
            digest=model, predictions=predictions, seconds=seconds, cpu=cpu(samples, each_ns), **fields
        )
        return self.do(event, after=after)


# ── starting ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_start_is_made_durable_before_the_model_is_loaded():
    bench = Bench(begin_trial(SETTLED, B, attempt=1, gate=GATE), connected=False, started=False)
    save, serve, note = bench.do(Started())
    assert decode(note.payload).name == "started"
    assert save == Save(bench.agent.slots)
    assert bench.trial.starts_left == GATE.starts - 1
    assert serve == Serve(B)


def test_what_is_committed_is_loaded_whatever_the_disk_says():
    bench = Bench(connected=False, started=False)
    assert bench.do(Started())[:2] == [Save(SETTLED, needed=False), Serve(A)]


def test_a_virgin_device_serves_nothing_and_says_idle():
    bench = Bench(SlotState(model=MODEL), connected=False, started=False)
    bench.do(Started())
    assert bench.one(Serve) == Serve(None)
    bench.do(Connected())
    assert (bench.report.state, bench.report.serving) == ("idle", None)


def test_a_trial_that_never_gets_going_ends_at_the_start_that_is_one_too_many():
    slots = begin_trial(SETTLED, B, attempt=1, gate=TrialGate(starts=1))
    bench = Bench(slots, connected=False)
    assert bench.trial.starts_left == 0
    bench = Bench(bench.one(Save).slots, connected=False)
    assert bench.trial is None
    assert bench.one(Serve) == Serve(A)
    assert bench.notes["rolled_back"]["digest"] == B
    assert bench.one(Collect) == Collect((A, P))


def test_the_last_will_is_a_death_of_this_session():
    will = Bench().agent.death()
    status = decode(will.payload)
    assert (will.topic, will.delivery) == (TOPICS.status(DEVICE), STATUS)
    assert (status.session, status.online, status.models) == (SESSION, False, ())


def test_the_device_reads_its_own_topics_only():
    assert set(Bench().agent.subscriptions) == {ACKS, COMMANDS, RELEASES}


# ── status ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_birth_says_what_the_slots_hold():
    bench = Bench(refuse(SETTLED, C, attempt=1, reason="golden rows"))
    status = decode(bench.one(Publish).payload)
    assert status.online
    assert dict(status.attributes)["cohort"] == COHORT
    report = bench.report
    assert (report.serving, report.previous, report.candidate) == (A, P, None)
    assert (report.state, report.outcome, report.outcome_digest) == ("committed", "refused", C)
    assert report.quarantined == (C,)


def test_status_is_published_on_change_on_reconnect_and_on_rebirth_only():
    bench = Bench()
    bench.do(Ticked())
    assert bench.get(Publish) == []
    bench.do(UpdatePhase("fetching", B))
    assert (bench.report.state, bench.report.candidate) == ("fetching", B)
    bench.do(UpdatePhase("fetching", B))
    assert bench.get(Publish) == []
    bench.do(Disconnected())
    assert bench.get(Publish) == []
    bench.do(Connected())
    first = decode(bench.one(Publish).payload)
    command = messages.Command(device=DEVICE, name="rebirth", correlation="1")
    bench.do(MessageArrived(COMMANDS, encode(command)))
    second = decode(bench.one(Publish).payload)
    assert second.models == first.models
    assert second.seq > first.seq


def test_nothing_is_published_or_sent_while_the_link_is_down():
    bench = Bench(connected=False)
    bench.do(closed(A))
    bench.do(MessageArrived(RELEASES, signed(release(B, A))))
    assert bench.get(Publish) == bench.get(Send) == bench.get(StartUpdate) == []
    bench.do(Connected())
    assert bench.get(Publish)
    assert bench.get(Send)
    assert bench.get(StartUpdate)


def test_a_trial_is_reported_as_one_also_while_the_next_model_is_fetched():
    bench = Bench()
    bench.try_out()
    assert (bench.report.state, bench.report.serving, bench.report.candidate) == ("trial", B, B)
    bench.do(UpdatePhase("fetching", C))
    assert bench.get(Publish) == []


def test_a_trial_under_a_higher_attempt_is_not_reported_as_quarantined():
    bench = Bench(refuse(SETTLED, B, attempt=1, reason="slow"))
    bench.try_out(attempt=2)
    assert bench.report.quarantined == ()
    assert dict(bench.agent.slots.quarantine) == {B: 1}


# ── the outbox ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_window_goes_into_the_outbox_and_is_sent_from_there():
    bench = Bench()
    bench.do(closed(A, rows=7))
    append, send = bench.one(Append), bench.one(Send)
    window = decode(append.payload)
    assert bench.actions.index(append) < bench.actions.index(send)
    assert append.topic == TOPICS.window(DEVICE, MODEL)
    assert (window.device, window.session, window.seq) == (DEVICE, SESSION, append.seq)
    assert (window.seq_lo, window.digest, window.profile.rows) == (window.seq, A, 7)


def test_sequence_numbers_of_a_session_never_repeat():
    bench = Bench()
    seen = []
    for _ in range(5):
        bench.do(closed(A))
        seen += [action.seq for action in bench.get(Append)]
        bench.do(MessageArrived(ACKS, b"junk"), after=COMPLAINT_SECONDS)
        seen += [action.seq for action in bench.get(Append)]
        bench.do(Disconnected())
        bench.do(Connected())
        seen += [decode(action.payload).seq for action in bench.get(Publish)]
    assert len(seen) == 15
    assert sorted(set(seen)) == seen


def test_at_most_twenty_records_are_in_flight():
    bench = Bench()
    assert bench.one(Send) == Send(MAX_IN_FLIGHT, frozenset())
    keys = tuple((SESSION, seq) for seq in range(15))
    assert bench.do(Sent(keys)) == []
    bench.do(Ticked())
    assert bench.one(Send) == Send(MAX_IN_FLIGHT - 15, frozenset(keys))
    bench.do(Sent(tuple((SESSION, seq) for seq in range(15, MAX_IN_FLIGHT))))
    for event in (Ticked(), closed(A), MessageArrived(RELEASES, b"")):
        bench.do(event)
        assert bench.get(Send) == []


def test_an_acknowledgement_trims_and_makes_room():
    bench = Bench()
    bench.do(Sent(tuple((SESSION, seq) for seq in range(MAX_IN_FLIGHT))))
    bench.do(MessageArrived(ACKS, encode(messages.Ack(device=DEVICE, session=SESSION, seqs=(3, 4, 999)))))
    assert bench.one(Trim) == Trim(SESSION, (3, 4, 999))
    assert bench.one(Send).room == 2
    assert (SESSION, 3) not in bench.one(Send).skip


def test_an_acknowledgement_of_an_earlier_session_trims_too():
    bench = Bench()
    earlier = SessionId("00000000000000ee")
    bench.do(MessageArrived(ACKS, encode(messages.Ack(device=DEVICE, session=earlier, seqs=(1,)))))
    assert bench.one(Trim) == Trim(earlier, (1,))


def test_what_is_not_acknowledged_in_time_is_sent_again():
    bench = Bench()
    bench.do(Sent(((SESSION, 1), (SESSION, 2))))
    bench.do(Ticked(), after=ACK_TIMEOUT_SECONDS - 0.1)
    assert bench.one(Send).skip == {(SESSION, 1), (SESSION, 2)}
    bench.do(Ticked(), after=0.2)
    assert bench.one(Send) == Send(MAX_IN_FLIGHT, frozenset())


def test_a_new_connection_starts_with_nothing_in_flight():
    bench = Bench()
    bench.do(Sent(((SESSION, 1),)))
    bench.do(Disconnected())
    bench.do(Connected())
    assert bench.one(Send) == Send(MAX_IN_FLIGHT, frozenset())


def test_a_window_too_large_for_a_message_is_dropped_with_a_note():
    bench = Bench()
    noise = tuple((f"{k:04d}-" + "x" * 120, k) for k in range(3000))
    bench.do(replace(closed(A), refused=noise))
    assert "larger than" in bench.notes["window_dropped"]["reason"]
    assert len(bench.get(Append)) == 1


# ── messages that do not belong ────────────────────────────────────────────────────────────────────────

NEIGHBOUR = DeviceId("dev-2")
OTHER_DEVICE = messages.Ack(device=NEIGHBOUR, session=SESSION, seqs=(1,))
MINE = messages.Ack(device=DEVICE, session=SESSION, seqs=(1,))
POISON = {
    "empty": (ACKS, b""),
    "not msgpack": (ACKS, b"\xc1\xc1\xc1"),
    "a bare number": (ACKS, b"\x05"),
    "deep": (ACKS, b"\x91" * 5000),
    "too large": (ACKS, bytes(300_000)),
    "foreign major": (ACKS, encode(MINE).replace(b"\x97\x01", b"\x97\x02", 1)),
    "unknown kind": (
        ACKS,
        encode(MINE).replace(bytes([0x97, 1, codec.MINOR, 4]), bytes([0x97, 1, codec.MINOR, 0x7F]), 1),
    ),
    "ack for another device": (ACKS, encode(OTHER_DEVICE)),
    "ack on the release topic": (RELEASES, encode(MINE)),
    "command on the ack topic": (
        ACKS,
        encode(messages.Command(device=DEVICE, name="rebirth", correlation="")),
    ),
    "command for another device": (
        COMMANDS,
        encode(messages.Command(device=NEIGHBOUR, name="rebirth", correlation="")),
    ),
    "release on the ack topic": (ACKS, signed(release(B))),
    "status": (ACKS, encode(messages.Status(device=DEVICE, session=SESSION, seq=1, online=True))),
    "trust bundle": (RELEASES, encode(messages.TrustBundle(root_version=1, files=()))),
    "release that is no JSON": (
        RELEASES,
        encode(messages.SignedRelease(payload=b"\xff{", signatures=())),
    ),
    "release of another cohort": (RELEASES, signed(release(B, cohort="other"))),
    "release of another fleet": (RELEASES, signed(release(B, fleet="other"))),
    "release of another model": (RELEASES, signed(release(B, model="other"))),
}


@pytest.mark.parametrize("topic_and_payload", POISON.values(), ids=POISON.keys())
def test_a_message_that_does_not_belong_changes_nothing_and_is_noted(topic_and_payload):
    bench = Bench()
    before = bench.agent.slots
    bench.do(MessageArrived(*topic_and_payload))
    assert bench.agent.slots == before
    assert set(bench.notes) == {"message_refused"}
    assert bench.notes["message_refused"]["topic"] == topic_and_payload[0]
    assert bench.get(Trim) == bench.get(StartUpdate) == bench.get(Publish) == []


def test_a_flood_of_bad_messages_leaves_one_note_a_minute_and_a_working_device():
    bench = Bench()
    notes = []
    for k in range(1000):
        bench.do(MessageArrived(ACKS, f"junk {k}".encode()), after=0.125)
        notes += [dict(bench.notes["message_refused"])["count"]] if bench.notes else []
    assert notes == ["1", "481", "961"]
    bench.do(MessageArrived(ACKS, encode(MINE)))
    assert bench.one(Trim) == Trim(SESSION, (1,))


@given(data=st.data())
def test_damaged_messages_never_raise_and_never_touch_the_slots(data):
    good = data.draw(st.sampled_from([encode(MINE), signed(release(B, A)), POISON["status"][1]]))
    topic = data.draw(st.sampled_from([ACKS, RELEASES, COMMANDS]))
    bench = Bench()
    before = bench.agent.slots
    for _ in range(5):
        damaged = bytearray(good)
        for _ in range(data.draw(st.integers(0, 4))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(damaged)))
        bench.do(MessageArrived(topic, bytes(damaged[:cut])))
        assert bench.agent.slots == before


# ── releases ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_release_is_given_to_the_child_with_all_it_has_to_know():
    bench = Bench(replace(refuse(SETTLED, C, attempt=2, reason=""), floors=((COHORT, 4),)))
    document = release(B, A, revision=5)
    bench.offer(document)
    assert bench.one(StartUpdate) == StartUpdate(
        release=signed(document), floor=4, serving=A, have=(A, P), quarantine=((C, 2),)
    )


def test_the_same_release_is_looked_at_once():
    bench = Bench()
    document = release(A, revision=5)
    bench.offer(document)
    bench.offer(document)
    assert bench.get(StartUpdate) == []
    bench.end(document, digest=A)
    for event in (MessageArrived(RELEASES, signed(document)), Disconnected(), Connected(), Ticked()):
        bench.do(event)
        assert bench.get(StartUpdate) == []


def test_one_child_at_a_time_and_the_newest_release_next():
    bench = Bench()
    first, second, third, fourth = (release(A, revision=k) for k in (5, 6, 7, 8))
    bench.offer(first)
    for later in (second, fourth, third):
        bench.offer(later)
        assert bench.get(StartUpdate) == []
    bench.end(first, digest=A)
    assert bench.one(StartUpdate).release == signed(fourth)
    bench.end(fourth, digest=A)
    assert bench.get(StartUpdate) == []
    assert bench.agent.slots.revision == 8


def test_a_release_below_the_floor_costs_one_child_once():
    """Whether the floor still stands is the child's to say: a new director key starts it anew."""
    bench = Bench(replace(SETTLED, floors=((COHORT, 9),)))
    old = release(B, revision=8)
    bench.offer(old)
    assert bench.one(StartUpdate).floor == 9
    bench.do(UpdateEnded(ok=False, stage="release", reason="below the floor"))
    bench.offer(old)
    bench.do(Ticked(), after=1000.0)
    assert bench.get(StartUpdate) == []


def test_the_first_release_of_a_new_director_key_may_start_below_the_old_floor():
    bench = Bench(replace(SETTLED, floors=((COHORT, 2**62),)))
    first = release(A, revision=1)
    bench.offer(first)
    bench.end(first, digest=A)
    assert bench.agent.slots.floor(COHORT) == 1
    bench.offer(release(B, revision=9))
    assert bench.get(StartUpdate)


def test_a_forged_release_with_a_high_revision_does_not_shut_out_the_genuine_one():
    bench = Bench()
    genuine = release(B, A, revision=5)
    forged = MessageArrived(RELEASES, signed(release(C, revision=999), b"forged"))
    bench.do(forged)
    bench.offer(genuine)
    bench.do(UpdateEnded(ok=False, stage="release", reason="signature", digest=None))
    assert bench.agent.slots == SETTLED
    assert bench.notes["release_refused"]["reason"] == "signature"
    bench.do(Ticked(), after=60.0)
    assert bench.one(StartUpdate).release == signed(genuine)
    bench.do(forged)
    bench.end(genuine, installed=True, digest=B)
    assert bench.get(StartUpdate) == []
    assert bench.agent.slots.serving == B


@pytest.mark.attack("A36")
@pytest.mark.parametrize("retry", [True, False])
def test_a_burst_of_forged_releases_does_not_shut_out_the_genuine_one(retry):
    bench = Bench()
    for k in range(20):
        bench.do(MessageArrived(RELEASES, signed(release(C, revision=1000 + k), b"forged")))
    genuine = release(B, A, revision=5)
    bench.offer(genuine)
    for _ in range(MAX_OFFERS + 1):
        bench.do(UpdateEnded(ok=False, stage="release", reason="signature", retry=retry))
        bench.do(Ticked(), after=600.0)
        if bench.one(StartUpdate).release == signed(genuine):
            return
    pytest.fail("the genuine release was never looked at")


@pytest.mark.attack("A37")
@pytest.mark.parametrize("retry", [True, False])
def test_a_flood_of_forged_releases_is_slowed_down_and_noted_once_a_minute(retry):
    bench = Bench()
    children = notes = 0
    for k in range(2000):
        bench.do(MessageArrived(RELEASES, signed(release(C, revision=1000 + k), b"forged")), after=0.1)
        if bench.get(StartUpdate):
            children += 1
            bench.do(UpdateEnded(ok=False, stage="release", reason="signature", retry=retry))
            notes += len(bench.notes)
    assert len(bench.agent._offers) <= MAX_OFFERS
    assert children < 30
    assert notes <= 1 + 200 / COMPLAINT_SECONDS


def test_an_accepted_release_is_saved_with_its_floor_even_when_nothing_changes():
    bench = Bench()
    document = release(A, revision=5, rollout="r9")
    bench.offer(document)
    bench.end(document, digest=A)
    assert bench.one(Save).slots == replace(SETTLED, floors=((COHORT, 5),), rollout="r9", revision=5)
    assert bench.get(Serve) == []
    assert (bench.report.rollout, bench.report.revision) == ("r9", 5)


def test_a_network_failure_is_retried_with_backoff_and_noted_once():
    bench = Bench()
    bench.offer(release(B, A))
    waits = []
    for k in range(12):
        bench.do(UpdateEnded(ok=False, stage="fetch", reason="timeout", retry=True))
        assert ("update_delayed" in bench.notes) == (k == 0)
        assert bench.agent.slots == SETTLED
        started = bench.now
        while not bench.get(StartUpdate):
            bench.do(Ticked(), after=0.25)
        waits.append(bench.now - started)
    assert max(waits) <= 60.5
    assert max(waits) > 10.0


def test_a_retry_waits_for_the_link():
    bench = Bench()
    bench.offer(release(B, A))
    bench.do(UpdateEnded(ok=False, stage="fetch", reason="timeout", retry=True))
    bench.do(Disconnected())
    bench.do(Ticked(), after=100.0)
    assert bench.get(StartUpdate) == []
    bench.do(Connected())
    assert bench.get(StartUpdate)


def test_a_refused_candidate_is_quarantined_and_the_rest_goes_on():
    bench = Bench()
    document = release(B, A, attempt=2)
    bench.offer(document)
    bench.end(document, ok=False, stage="probe", reason="golden rows differ", digest=B)
    slots = bench.one(Save).slots
    assert slots.serving == A
    assert dict(slots.quarantine) == {B: 2}
    assert bench.notes["refused"]["reason"] == "golden rows differ"
    assert (bench.report.outcome, bench.report.outcome_digest) == ("refused", B)
    assert bench.get(Serve) == []
    assert bench.one(Collect).keep == (A, P)


def test_a_trusted_release_that_fails_without_a_model_to_blame_raises_the_floor():
    bench = Bench()
    document = release(B, A, revision=7)
    bench.offer(document)
    bench.end(document, ok=False, stage="verify", reason="no such target")
    assert bench.one(Save).slots.floor(COHORT) == 7
    assert "release_refused" in bench.notes


def test_a_quarantined_candidate_of_a_new_rollout_is_reported_as_refused():
    bench = Bench(replace(refuse(SETTLED, B, attempt=1, reason="slow"), rollout="r1"))
    document = release(B, A, rollout="r2")
    bench.offer(document)
    bench.end(document, digest=B)
    assert (bench.report.rollout, bench.report.outcome, bench.report.outcome_digest) == ("r2", "refused", B)
    assert bench.get(Serve) == []


def test_an_installed_candidate_goes_on_trial_durable_first():
    bench = Bench()
    bench.try_out()
    kinds = [type(action) for action in bench.actions]
    assert kinds.index(Save) < kinds.index(Serve)
    trial = bench.one(Save).slots.trial
    assert (trial.digest, trial.starts_left, trial.gate) == (B, GATE.starts - 1, GATE)
    assert bench.one(Serve) == Serve(B)
    assert set(bench.one(Collect).keep) == {A, P, B}


def test_a_release_that_halts_a_rollout_brings_the_incumbent_back():
    bench = Bench()
    bench.try_out()
    halted = release(None, A, revision=2, threshold=0)
    bench.offer(halted)
    bench.end(halted, digest=A)
    assert bench.one(Serve) == Serve(A)
    slots = bench.one(Save).slots
    assert (slots.trial, slots.serving, slots.quarantine) == (None, A, ())


def test_a_release_that_asks_for_nothing_ends_a_trial():
    bench = Bench()
    bench.try_out(incumbent=None)
    halted = release(None, None, revision=2, threshold=0)
    bench.offer(halted)
    bench.end(halted)
    assert bench.one(Serve) == Serve(A)


def test_a_first_model_on_trial_stays_when_nothing_is_asked_for():
    bench = Bench(SlotState(model=MODEL))
    bench.try_out(incumbent=None)
    halted = release(None, None, revision=2, threshold=0)
    bench.offer(halted)
    bench.end(halted)
    assert bench.get(Serve) == []
    assert bench.agent.slots.serving == B


def test_a_rollback_after_the_commit_goes_to_the_model_before():
    bench = Bench()
    document = release(P, revision=4)
    bench.offer(document)
    bench.end(document, digest=P)
    assert bench.one(Serve) == Serve(P)
    assert (bench.agent.slots.committed, bench.agent.slots.previous) == (P, A)
    assert bench.notes["switched"]["digest"] == P


def test_an_answer_overtaken_by_the_devices_own_state_is_asked_for_again():
    bench = Bench()
    bench.try_out()  # B on trial, A committed, P before
    back = release(P, revision=2)
    bench.offer(back)
    assert P in bench.one(StartUpdate).have
    bench.serve(predictions=300, seconds=6.0)  # the trial commits while the child works: P is gone
    assert bench.agent.slots.known == (B, A)
    bench.end(back, digest=P)
    assert bench.agent.slots.serving == B
    assert bench.agent.slots.floor(COHORT) == 2
    bench.do(Ticked(), after=5.0)
    start = bench.one(StartUpdate)
    assert (start.release, start.have) == (signed(back), (B, A))


def test_no_blob_is_collected_while_the_child_may_have_just_installed_one():
    bench = Bench()
    bench.try_out()
    other = release(C, A, revision=2, rollout="r2")
    bench.offer(other)
    bench.serve(predictions=300, seconds=6.0)
    assert bench.agent.slots.committed == B
    assert bench.get(Collect) == []
    bench.end(other, installed=True, digest=C)
    assert set(bench.one(Collect).keep) == {B, A, C}


# ── a trial ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_trial_inside_its_budget_is_committed():
    bench = Bench(budget=Budget(predict_p99_ns=1_000_000, rss_bytes=100))
    bench.try_out()
    bench.serve(predictions=150, seconds=3.0)
    assert bench.trial is not None
    bench.serve(predictions=150, seconds=3.0, samples=300)
    slots = bench.one(Save).slots
    assert (slots.committed, slots.previous) == (B, A)
    assert bench.one(Collect) == Collect((B, A))
    assert bench.notes["committed"]["digest"] == B
    assert (bench.report.state, bench.report.outcome) == ("committed", "committed")
    assert bench.get(Serve) == []


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        ({"failed": 1}, "1 predictions failed in the engine"),
        (
            {"refused": 30},
            "had no answer for 30 calls that the model before it answers, and one for 100; 1 % are allowed",
        ),
        ({"refused": 3, "predictions": 0}, "had no answer for 3 calls that the model before it answers"),
        ({"each_ns": 9_000_000, "predictions": 200}, "predict p99 of"),
        ({"rss_bytes": 101, "predictions": 200}, "RSS of"),
    ],
)
def test_a_trial_that_breaks_a_gate_is_rolled_back(evidence, reason):
    bench = Bench(budget=Budget(predict_p99_ns=1_000_000, rss_bytes=100))
    bench.try_out()
    bench.serve(**evidence)
    slots = bench.one(Save).slots
    assert (slots.serving, dict(slots.quarantine)) == (A, {B: 1})
    assert bench.one(Serve) == Serve(A)
    assert reason in bench.notes["rolled_back"]["reason"]
    assert (bench.report.state, bench.report.outcome) == ("rolled_back", "rolled_back")


def test_a_start_after_a_crash_is_one_less_whatever_the_trial_had_answered():
    slots = begin_trial(SETTLED, B, attempt=1, gate=GATE)
    for left in reversed(range(GATE.starts)):
        bench = Bench(slots, started=False)
        bench.do(Started(crashed=left < GATE.starts - 1))
        assert (bench.trial.starts_left, bench.one(Serve)) == (left, Serve(B))
        bench.serve(predictions=50, after=20.0)
        assert bench.trial.progressed
        slots = bench.agent.slots
    again = Bench(slots, started=False)
    again.do(Started())  # a power cut is nobody's fault
    assert again.trial.starts_left == 0
    bench = Bench(slots, started=False)
    bench.do(Started(crashed=True))
    assert bench.one(Serve) == Serve(A)
    assert bench.notes["rolled_back"]["reason"] == "the process crashed while it served in 3 starts"


def test_a_crash_of_the_only_model_there_is_costs_it_nothing():
    first = progress(
        begin_trial(SlotState(model=MODEL), B, attempt=1, gate=GATE),
        predictions=5,
        seconds=1.0,
        cpu=cpu(5, 9),
    )
    assert activate(first, crashed=True) == activate(first)


def test_a_crash_beside_a_candidate_in_the_shadow_is_not_held_against_it():
    gate = ShadowGate(rows=500)
    slots = compare(begin_shadow(SETTLED, B, attempt=1, gate=GATE, shadow=gate), rows=5, disagreed=0)
    assert activate(slots, crashed=True) == activate(slots)


def test_a_trial_is_held_to_the_budget_that_the_model_was_published_with():
    bench = Bench()
    bench.try_out()
    bench.serve(predictions=200, each_ns=9_000_000, declared_p99_ns=1_000_000)
    assert "predict p99 of" in bench.notes["rolled_back"]["reason"]


def test_when_a_trial_of_200_rows_is_judged_enough_were_the_incumbents_to_compare_with():
    """Of 228 rows every eighth is the incumbent's."""
    bench = Bench(budget=Budget(predict_p99_ns=500_000))
    bench.try_out()
    bench.serve(predictions=228, samples=200, each_ns=3_000_000, incumbent_cpu=cpu(28, 10_000))
    assert "predict p99 of" in bench.notes["rolled_back"]["reason"]


@pytest.mark.parametrize(
    ("max_refused", "answered", "refused", "kept"),
    [
        (0.01, 0, 2, True),  # twice may be chance
        (0.01, 0, 3, False),
        (0.01, 9, 4, True),
        (0.01, 9, 5, False),
        (0.01, 197, 13, True),  # so may 13 of 210
        (0.01, 197, 14, False),
        (0.01, 2000, 60, False),
        (0.05, 0, 4, True),
        (0.05, 0, 5, False),
        (0.05, 950, 50, True),
        (0.0, 5000, 1, False),
        (1.0, 0, 5000, True),
    ],
)
def test_a_trial_ends_when_more_calls_were_refused_than_chance_explains(max_refused, answered, refused, kept):
    bench = Bench()
    bench.try_out(trial=TrialGate(predictions=200, seconds=1e9, max_refused=max_refused))
    bench.serve(predictions=answered, refused=refused)
    assert (bench.trial is not None) is kept


def test_a_trial_is_not_passed_while_more_calls_were_refused_than_allowed():
    bench = Bench()
    bench.try_out()
    bench.serve(predictions=250, seconds=10.0, refused=4)
    assert bench.trial.predictions == 250
    bench.serve(predictions=150, samples=400, seconds=10.0)
    assert bench.agent.slots.committed == B


def test_refused_rows_are_no_progress_and_outlive_a_restart():
    bench = Bench()
    bench.try_out()
    bench.serve(predictions=0, refused=1, after=20.0)
    saved = bench.one(Save).slots
    assert (saved.trial.refused, saved.trial.progressed) == (1, False)
    again = Bench(from_document(to_document(saved), MODEL))
    assert again.trial.starts_left == saved.trial.starts_left - 1
    again.serve(predictions=0, refused=2)
    assert again.notes["rolled_back"]["reason"].startswith("had no answer for 3 calls")


@pytest.mark.parametrize(("incumbent_ns", "kept"), [(4_000_000, True), (1_000_000, False)])
def test_a_busy_device_does_not_condemn_a_model_that_costs_what_the_incumbent_costs(incumbent_ns, kept):
    bench = Bench(budget=Budget(predict_p99_ns=1_000_000))
    bench.try_out()
    bench.serve(predictions=250, each_ns=5_000_000, incumbent_cpu=cpu(50, incumbent_ns))
    assert (bench.trial is not None) is kept


def test_a_few_slow_predictions_condemn_nobody():
    bench = Bench(budget=Budget(predict_p99_ns=1_000_000))
    bench.try_out()
    bench.serve(predictions=199, each_ns=9_000_000)
    assert bench.trial is not None


def test_a_slow_model_is_not_judged_afresh_after_every_restart():
    budget = Budget(predict_p99_ns=1_000_000)
    bench = Bench(budget=budget)
    bench.try_out()
    for _ in range(3):
        bench.serve(predictions=90, seconds=3.0, each_ns=9_000_000)
        if not bench.trial:
            break
        bench = Bench(bench.agent.slots, budget=budget)
    assert bench.agent.slots.committed == A
    assert "p99" in bench.agent.slots.reason


def test_a_model_is_not_committed_before_its_latency_was_judged():
    bench = Bench(budget=Budget(predict_p99_ns=1_000_000))
    bench.try_out()
    bench.serve(predictions=1000, seconds=10.0, samples=10)  # ten calls of a hundred rows
    assert bench.trial is not None
    bench.serve(predictions=1000, seconds=10.0, samples=200)
    assert bench.agent.slots.committed == B


def test_progress_is_saved_when_it_begins_and_then_now_and_again():
    bench = Bench()
    bench.try_out(trial=TrialGate(predictions=10_000, seconds=1000.0, starts=3))
    saves = 0
    for k in range(100):
        bench.serve(predictions=1, seconds=0.25, after=0.25)
        saves += len(bench.get(Save))
        if k == 0:
            assert bench.one(Save).slots.trial.progressed
    assert saves == 1 + int(99 * 0.25 / PROGRESS_SECONDS)
    assert bench.trial.predictions == 100


def test_reports_about_another_model_or_of_nothing_do_not_count():
    bench = Bench()
    bench.try_out()
    bench.serve(A, predictions=10_000, seconds=100.0)
    bench.serve(B, predictions=0, seconds=100.0)
    assert bench.get(Save) == []
    assert bench.trial.predictions == 0


# ── models that cannot be loaded ───────────────────────────────────────────────────────────────────────


def test_a_trial_that_cannot_be_loaded_is_rolled_back():
    bench = Bench()
    bench.try_out()
    bench.do(ServeFailed(B, "truncated"))
    assert bench.one(Serve) == Serve(A)
    assert dict(bench.one(Save).slots.quarantine) == {B: 1}
    assert bench.notes["rolled_back"]["reason"] == "truncated"


def test_a_broken_committed_model_falls_back_without_a_network_and_is_fetched_again_with_one():
    bench = Bench(connected=False)
    bench.do(ServeFailed(A, "disk"))
    assert bench.one(Serve) == Serve(P)
    assert bench.one(Save).slots.committed == P
    assert bench.notes["model_broken"] == {"digest": A, "reason": "disk"}
    bench.do(Connected())
    document = release(A)
    bench.offer(document)
    assert bench.one(StartUpdate).have == (P,)
    bench.end(document, installed=True, digest=A)
    assert bench.trial.digest == A


def test_a_release_followed_before_is_looked_at_again_when_its_model_breaks():
    bench = Bench()
    document = release(A)
    bench.offer(document)
    bench.end(document, digest=A)
    bench.do(ServeFailed(A, "disk"))
    start = bench.one(StartUpdate)
    assert (start.release, start.serving, start.have) == (signed(document), P, (P,))


def test_a_model_that_breaks_while_the_child_finds_it_in_place_is_not_tried_unfetched():
    bench = Bench()
    document = release(A)
    bench.offer(document)
    bench.do(ServeFailed(A, "disk"))
    bench.end(document, digest=A)  # the child saw A serving and installed nothing
    assert (bench.trial, bench.agent.slots.serving) == (None, P)
    bench.do(Ticked(), after=5.0)
    assert bench.one(StartUpdate).serving == P


def test_the_only_model_is_kept_loaded_again_later_and_fetched_again():
    only = SlotState(model=MODEL, committed=A)
    bench = Bench(only)
    document = release(A)
    bench.offer(document)
    bench.end(document, digest=A)
    bench.do(ServeFailed(A, "no memory"))
    assert bench.get(Serve) == bench.get(Save) == []
    assert bench.agent.slots.serving == A
    assert (bench.report.serving, bench.report.state) == (None, "idle")
    bench.do(Ticked(), after=60.0)
    assert bench.one(Serve) == Serve(A)
    start = bench.one(StartUpdate)
    assert (start.serving, start.have) == (None, ())
    bench.end(document, installed=True, digest=A)
    assert bench.one(Serve) == Serve(A)
    assert (bench.agent.slots.committed, bench.trial) == (A, None)
    assert (bench.report.serving, bench.report.state) == (A, "committed")


def test_a_model_that_never_loads_is_tried_ever_less_often_and_noted_once():
    bench = Bench(SlotState(model=MODEL, committed=A))
    notes, loads = 0, 0
    bench.do(ServeFailed(A, "no memory"))
    notes += "model_broken" in bench.notes
    for _ in range(2400):
        bench.do(Ticked(), after=0.25)
        if bench.get(Serve):
            loads += 1
            bench.do(ServeFailed(A, "no memory"))
            notes += "model_broken" in bench.notes
    assert notes == 1
    assert 5 < loads < 60


def test_a_model_that_loads_after_all_is_reported_again():
    bench = Bench(SlotState(model=MODEL, committed=A))
    bench.do(ServeFailed(A, "no memory"))
    bench.do(closed(A))
    assert bench.report.serving == A
    bench.do(Ticked(), after=100.0)
    assert bench.get(Serve) == []


def test_a_stranger_that_fails_to_load_changes_nothing():
    bench = Bench()
    assert bench.do(ServeFailed(C, "late")) == []


# ── the child's lines ──────────────────────────────────────────────────────────────────────────────────


def test_the_childs_result_is_read():
    document = release(B, A)
    line = {
        "ok": True,
        "release": to_payload(document).hex(),
        "desired": B,
        "action": "install",
        "probe": None,
    }
    assert update_ended(line) == UpdateEnded(ok=True, release=document, installed=True, digest=B)
    assert from_payload(to_payload(document)) == document
    keep = {**line, "action": "keep", "desired": ""}
    assert update_ended(keep) == UpdateEnded(ok=True, release=document)
    failed = {"ok": False, "stage": "probe", "reason": "slow", "retry": False, "digest": B, "release": ""}
    assert update_ended(failed) == UpdateEnded(ok=False, stage="probe", reason="slow", digest=B)


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"ok": "yes"},
        {"ok": True},
        {"ok": True, "release": "zz"},
        {"ok": True, "release": "7b7"},
        {"ok": True, "release": b"{}".hex()},
        {"ok": False, "digest": "short"},
        {"ok": False, "retry": "no"},
        None,
    ],
)
def test_a_result_that_is_none_is_refused(line):
    with pytest.raises(ContractError):
        update_ended(line)


def test_progress_is_read():
    assert update_phase({"progress": "verified", "digest": B}) == UpdatePhase("verified", B)


@pytest.mark.parametrize(
    "line", [{"progress": "dancing", "digest": B}, {"progress": "fetching"}, {"digest": B}]
)
def test_progress_that_is_none_is_refused(line):
    with pytest.raises(ContractError):
        update_phase(line)


def test_an_empty_histogram_means_no_cpu_times_yet():
    bench = Bench(budget=Budget(predict_p99_ns=1))
    bench.try_out(trial=TrialGate(predictions=0, seconds=0.0))
    bench.do(
        Served(digest=B, predictions=0, failed=0, seconds=1.0, cpu=LatencyHistogram(), rss_bytes=0), after=1.0
    )
    assert bench.trial is not None


# ── a disk that refuses ────────────────────────────────────────────────────────────────────────────────


def refuse_disk(bench, event):
    """``event`` happens, and the disk refuses the first state that is needed: what the agent then asks for."""
    actions = bench.agent.handle(event, bench.now, 1)
    (save,) = [action for action in actions if isinstance(action, Save)]
    assert save.needed
    assert actions.index(save) < min(i for i, a in enumerate(actions) if not isinstance(a, Save))
    bench.actions = bench.agent.handle(Unsaved("No space left on device"), bench.now, 1)
    return bench.actions


def test_a_trial_is_not_begun_while_the_disk_refuses_and_is_asked_for_again():
    bench = Bench()
    offered = signed(release(B))
    bench.do(MessageArrived(RELEASES, offered))
    ended = UpdateEnded(ok=True, release=release(B), installed=True, digest=B)
    refuse_disk(bench, ended)
    assert bench.agent.slots == SETTLED
    assert bench.get(Serve) == []
    assert bench.notes["state_unsaved"]["reason"] == "No space left on device"
    bench.do(Ticked(), after=60.0)
    assert bench.one(StartUpdate).release == offered


def test_a_commit_waits_for_the_disk_while_the_trial_serves_on():
    slots = begin_trial(SETTLED, B, attempt=1, gate=TrialGate(predictions=200, seconds=1.0, starts=3))
    bench = Bench(slots)
    served = Served(digest=B, predictions=300, failed=0, seconds=2.0, cpu=cpu(300), rss_bytes=1)
    actions = bench.agent.handle(served, bench.now, 1)
    assert [type(action) for action in actions] == [Save, Append]
    bench.actions = bench.agent.handle(Unsaved("full"), bench.now, 1)
    assert bench.trial is not None
    assert bench.get(Serve) == []
    bench.do(served, after=1.0)
    assert bench.agent.slots.committed == A, "not before the disk is asked again"
    bench.do(served, after=SAVE_SECONDS)
    assert bench.agent.slots.committed == B


def test_a_start_that_cannot_be_counted_serves_what_is_committed_until_it_can():
    slots = begin_trial(SETTLED, B, attempt=1, gate=GATE)
    bench = Bench(slots, connected=False, started=False)
    refuse_disk(bench, Started())
    assert bench.one(Serve) == Serve(A)
    assert bench.agent.slots == slots
    assert bench.do(Ticked(), after=SAVE_SECONDS - 1.0) == []
    bench.do(Ticked(), after=1.0)
    assert bench.one(Serve) == Serve(B)
    assert slots.trial is not None
    assert bench.trial.starts_left == slots.trial.starts_left - 1


def test_to_step_back_needs_no_disk():
    slots = begin_trial(SETTLED, B, attempt=1, gate=GATE)
    bench = Bench(slots)
    bench.do(Served(digest=B, predictions=1, failed=1, seconds=1.0, cpu=cpu(1), rss_bytes=1))
    assert not bench.one(Save).needed
    assert bench.one(Serve) == Serve(A)


def test_what_the_device_noticed_is_told_once_a_minute_and_a_gap_every_time():
    bench = Bench()
    noticed = Noticed("limit_rss_passed", (("reason", "RSS"),))
    bench.do(noticed)
    assert bench.notes["limit_rss_passed"]["reason"] == "RSS"
    bench.do(noticed)
    assert bench.get(Append) == []
    for _ in range(2):
        bench.do(GapFound("records_merged", (("windows", "7"),)))
        assert bench.notes["records_merged"] == {"windows": "7"}


def test_the_clock_stands_in_the_birth():
    bench = Bench()
    bench.do(ClockChanged(synced=True))
    assert decode(bench.one(Publish).payload).clock == "synced"
    bench.do(ClockChanged(synced=False))
    assert decode(bench.one(Publish).payload).clock == "unsynced"


def test_the_birth_says_how_the_process_before_ended():
    agent = Agent(replace(identity(), last_exit="killed", restarts=2), SETTLED, Budget(), random.Random(1))
    agent.handle(Started(), 0.0, 1)
    (birth,) = [a for a in agent.handle(Connected(), 0.0, 1) if isinstance(a, Publish)]
    assert (decode(birth.payload).last_exit, decode(birth.payload).restarts) == ("killed", 2)
