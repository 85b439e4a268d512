"""What the aggregator believes, buries, and acknowledges."""

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.core import ingest
from aggregator.records import DeadLetter
from edge_runtime.contract.codec import encode
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.latency import LatencyHistogram, observe_ns
from edge_runtime.contract.messages import Ack, Event, Status, Window
from edge_runtime.contract.profile import FIXED_POINT, Profile
from edge_runtime.core import rollup
from tests.support.fleet import (
    OTHER_SESSION,
    SESSION,
    TOPICS,
    A,
    artifact_info,
    birth,
    event,
    labels,
    window,
    wire,
)

INFO = artifact_info()


def read(topic, payload):
    return ingest.read(TOPICS, topic, payload)


def plan(*messages, infos=None):
    return ingest.plan([read(*wire(m)) for m in messages], {A: INFO} if infos is None else infos)


def letter(topic, payload):
    found = read(topic, payload).message
    assert isinstance(found, DeadLetter), found
    assert (found.topic, found.payload) == (topic, payload)
    return found.reason


def test_the_three_kinds_are_read():
    assert isinstance(read(*wire(window())).message, Window)
    assert isinstance(read(*wire(birth())).message, Status)
    assert isinstance(read(*wire(event())).message, Event)


@pytest.mark.attack("A81")
def test_a_payload_on_another_devices_topic_is_a_dead_letter():
    _, payload = wire(window("dev-1"))
    topic, _ = wire(window("dev-2"))
    assert "dev-1" in letter(topic, payload)
    assert "dev-2" in letter(topic, payload)


def test_a_window_on_another_models_topic_is_a_dead_letter():
    topic, payload = wire(window())
    assert "belongs on" in letter(topic.replace("tiny", "other"), payload)


def test_a_status_on_the_event_topic_is_a_dead_letter():
    _, payload = wire(birth())
    assert "status" in letter(wire(event())[0], payload)


def test_a_message_of_another_fleet_is_a_dead_letter():
    topic, payload = wire(window())
    assert "not one a device of fleet fleet writes" in letter(
        topic.replace("/fleet/", "/elsewhere/"), payload
    )


def test_what_devices_do_not_send_is_a_dead_letter():
    ack = Ack(device=DeviceId("dev-1"), session=SESSION, seqs=(1,))
    assert "Ack" in letter(TOPICS.event(DeviceId("dev-1")), encode(ack))


def cause(topic, payload):
    found = read(topic, payload).message
    assert isinstance(found, DeadLetter), found
    return found.cause


def test_dead_letters_are_counted_by_cause(monkeypatch):
    topic, payload = wire(window())
    assert cause("skiff/1/fleet/d/dev-1/nothing", payload) == "topic"
    assert cause(topic, payload[:-1]) == "payload"
    ack = Ack(device=DeviceId("dev-1"), session=SESSION, seqs=(1,))
    assert cause(topic, encode(ack)) == "kind"
    assert cause(wire(window("dev-2"))[0], payload) == "sender"
    assert cause(*wire(window(profile=inflated(rows=1 << 33)))) == "counts"
    assert [letter.cause for letter in plan(window(profile=inflated(cell=(3, 1)))).dead] == ["layout"]
    for name in ("decode", "decode_all"):
        monkeypatch.setattr(ingest, name, lambda _: 1 / 0)
    assert cause(topic, payload) == "decoder"


def test_a_devices_statuses_take_turns_of_their_own_and_strangers_share_one():
    senders = [ingest.sender(TOPICS, wire(message)[0]) for message in (window(), event(), birth())]
    assert senders == ["dev-1", "dev-1", "dev-1 status"]
    assert ingest.sender(TOPICS, "a") == ingest.sender(TOPICS, "skiff/1/other/d/dev-1/event")


@given(st.binary(max_size=200))
def test_no_bytes_raise(payload):
    read(TOPICS.event(DeviceId("dev-1")), payload)


@given(st.data())
def test_no_damage_to_an_honest_window_raises(data):
    topic, payload = wire(window())
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    ingest.plan([read(topic, bytes(damaged))], {A: INFO})


def inflated(**changes):
    """An honest profile with some counters changed."""
    honest = window().profile
    counts, sums, rows = honest.counts.copy(), honest.sums.copy(), honest.rows
    if "cell" in changes:
        counts[changes["cell"][0]] += changes["cell"][1]
    if "sum" in changes:
        sums[0] = changes["sum"]
    return Profile(layout=honest.layout, rows=changes.get("rows", rows), counts=counts, sums=sums)


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        (inflated(rows=1 << 33), "more than"),
        (inflated(cell=(3, 1 << 62)), "a cell counts"),
        (inflated(sum=3 * FIXED_POINT * 20), "sum to more"),
    ],
)
def test_counts_that_could_overflow_a_sum_are_dead_letters_under_any_layout(profile, why):
    assert why in letter(*wire(window(profile=profile)))


@pytest.mark.parametrize(
    ("latency", "why"),
    [
        (LatencyHistogram(zero=21), "counts 21 durations where there can be 20"),
        (LatencyHistogram(counts=(1 << 62,), sum_ns=1 << 62, max_ns=1), "counts"),
        (LatencyHistogram(zero=1, sum_ns=2**63 - 1), "1 durations of at most 0 ns sum to"),
        (LatencyHistogram(zero=2, sum_ns=2001, max_ns=1000), "2 durations of at most 1000 ns sum to 2001"),
        (LatencyHistogram(zero=1, sum_ns=1 << 59, max_ns=1 << 59), "a record can take"),
        (LatencyHistogram(zero=2, sum_ns=1 << 59, max_ns=1 << 58), "a record can take"),
    ],
)
def test_durations_that_no_device_measures_are_dead_letters(latency, why):
    found = letter(*wire(replace(window(), latency=latency)))
    assert "window.latency" in found
    assert why in found


@pytest.mark.parametrize(
    "queueing",
    [
        LatencyHistogram(zero=(1 << 34) + 1),
        LatencyHistogram(zero=1, sum_ns=2, max_ns=1),
        LatencyHistogram(zero=1, sum_ns=1, max_ns=1 << 59),
    ],
)
def test_waits_that_no_device_measures_are_dead_letters(queueing):
    assert "window.queueing" in letter(*wire(replace(window(), queueing=queueing)))


LATE = ingest.MAX_TIME_NS + 1


@pytest.mark.parametrize(
    "message",
    [
        replace(window(), end_ns=LATE),
        replace(window(), start_ns=LATE),
        replace(event(), wall_ns=LATE),
        replace(labels(), start_ns=LATE, end_ns=LATE),
        replace(labels(), end_ns=2**63 - 1),
    ],
)
def test_times_that_no_clock_shows_are_dead_letters(message):
    topic, payload = wire(message)
    assert cause(topic, payload) == "counts"
    assert "later than any clock shows" in letter(topic, payload)


def test_a_clock_that_is_as_wrong_as_one_can_be_is_believed():
    last = ingest.MAX_TIME_NS
    for message in (
        replace(window(), start_ns=last, end_ns=last),
        replace(event(), wall_ns=last),
        replace(labels(), start_ns=0, end_ns=last),
    ):
        assert read(*wire(message)).message == message


DURATIONS = st.lists(st.integers(-5, 1 << 40), max_size=30)


@given(
    st.lists(
        st.tuples(DURATIONS, DURATIONS, st.integers(1, 3), st.integers(0, 9), st.integers(0, 1 << 20)),
        min_size=1,
        max_size=8,
    )
)
def test_what_devices_measure_passes_merged_or_not(told):
    """Calls of one row or several, which wait more often than they are answered and fail at times."""
    windows = []
    for seq, (took, waited, rows_each, failed, refused) in enumerate(told, 1):
        w = window(seq=seq, rows=rows_each * len(took), failed=failed, refused=(("shed", refused),))
        latency, queueing = (observe_ns(np.array(ns, np.int64)) for ns in (took, waited))
        windows.append(replace(w, latency=latency, queueing=queueing))
    for w in (*windows, reduce(lambda a, b: rollup.merge(a, b) or b, windows)):
        assert read(*wire(w)).message == w


def test_a_profile_that_contradicts_its_known_layout_is_buried_and_acknowledged():
    found = plan(window(profile=inflated(cell=(3, 1))))
    assert not found.windows
    assert "counts 21 values in 20 rows" in found.dead[0].reason
    assert [ack.seqs for ack in found.acks] == [(1,)]


def test_predicted_classes_must_add_up_to_the_rows():
    honest = window().profile
    counts = honest.counts.copy()
    counts[-3:] = (1, 2, 3)
    profile = Profile(layout=honest.layout, rows=honest.rows, counts=counts, sums=honest.sums)
    assert "6 classes in 20 rows" in plan(window(profile=profile)).dead[0].reason


def test_sums_of_probabilities_must_be_those_of_the_artifact():
    honest = window().profile
    profile = Profile(layout=honest.layout, rows=honest.rows, counts=honest.counts, sums=honest.sums[:0])
    assert "0 sums of probabilities" in plan(window(profile=profile)).dead[0].reason


def test_a_window_of_an_unknown_artifact_is_kept_unjudged_and_acknowledged():
    found = plan(window(), infos={})
    assert [w.judged for w in found.windows] == [False]
    assert found.acks
    assert not found.dead


def test_one_acknowledgement_per_device_and_session():
    found = plan(
        window("dev-2", 7),
        window("dev-1", 2),
        event("dev-1", 1),
        window("dev-1", 2),
        window("dev-1", 1, session=OTHER_SESSION),
        birth("dev-1"),
    )
    assert [(a.device, a.session, a.seqs) for a in found.acks] == [
        ("dev-1", SESSION, (1, 2)),
        ("dev-1", OTHER_SESSION, (1,)),
        ("dev-2", SESSION, (7,)),
    ]
    assert len(found.windows) == 4
    assert len(found.statuses) == 1


def test_what_cannot_be_read_is_not_acknowledged_to_the_device():
    topic, payload = wire(window())
    found = ingest.plan([read(topic, payload[:-1])], {A: INFO})
    assert not found.acks
    assert len(found.dead) == 1


def test_the_payload_is_kept_as_it_came():
    topic, payload = wire(window())
    assert ingest.plan([read(topic, payload)], {A: INFO}).windows[0].payload is payload


def test_digests_names_what_has_to_be_known():
    assert ingest.digests([read(*wire(window())), read(*wire(birth()))]) == {A}


def test_the_limits_let_honest_windows_through():
    rng = np.random.default_rng(0)
    for seq in range(20):
        assert plan(window(seq=seq, rows=int(rng.integers(1, 400)))).windows
