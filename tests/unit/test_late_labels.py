"""Labels that come late: which look they count in, what they come to, and what ingest makes of them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.core import ingest, late
from aggregator.core.accuracy import accuracies, by_model, estimate
from aggregator.looks import Reading, Slice
from aggregator.records import DeviceTruth, LateLabels
from edge_runtime.contract.ids import DeviceId, ModelName, SourceId
from edge_runtime.contract.profile import empty_profile
from tests.support.fleet import (
    CLASSES,
    MODEL,
    NAMES,
    SPEC,
    TOPICS,
    A,
    B,
    artifact_info,
    count,
    labels,
    window,
    wire,
)

NOTHING = empty_profile(SPEC, probabilities=True)


def reading(device, end_ns=10, **counts):
    return Reading(device=DeviceId(device), profile=NOTHING, start_ns=end_ns - 10, end_ns=end_ns, **counts)


def look(index, *devices):
    readings = tuple(reading(d, 10 * (index + 1)) for d in devices)
    return Slice(index=index, start_ns=10 * index, end_ns=10 * index + 10, readings=readings)


def told(number, device, start_ns, labelled=40, correct=30):
    return LateLabels(
        number=number,
        device=DeviceId(device),
        start_ns=start_ns,
        end_ns=start_ns + 2,
        labelled=labelled,
        correct=correct,
    )


def devices(*names):
    return [DeviceId(name) for name in names]


FIRST = (look(0, "a", "b"), look(1, "a"))


def test_labels_of_the_time_that_made_a_past_belong_to_it_and_others_to_the_look():
    found = late.arrived(
        [told(1, "a", 3), told(2, "a", 12), told(3, "a", 13), told(4, "a", 500)], FIRST, devices("a"), need=2
    )
    assert found.past == {(0, "a"): (40, 30), (1, "a"): (80, 60)}
    assert found.now == {"a": (40, 30)}
    assert found.last == {"a": 4}
    amended = late.amended(FIRST, found.past)
    assert [[(r.labelled, r.correct) for r in one.readings] for one in amended] == [
        [(40, 30), (0, 0)],
        [(80, 60)],
    ]


def test_a_device_without_a_window_keeps_its_labels_or_has_them_judged_when_its_past_is_whole():
    arrivals = [told(1, "a", 500), told(2, "b", 500), told(3, "new", 500)]
    found = late.arrived(arrivals, FIRST, devices("c"), need=2)
    assert found.now == {"a": (40, 30)}  # b and new have no whole past, and wait
    assert found.last == {"a": 1}
    found = late.arrived(arrivals, FIRST, devices("b", "c"), need=2)
    assert found.now == {"a": (40, 30), "b": (40, 30)}


def test_few_labels_wait_for_more():
    few = [told(1, "a", 500, 6, 5), told(2, "b", 500, 40, 30)]
    found = late.arrived(few, FIRST, devices("a", "b"), need=2)
    assert (found.now, found.last) == ({"b": (40, 30)}, {"b": 2})
    found = late.arrived([few[0], told(3, "a", 510, 4, 4)], FIRST, devices("a", "b"), need=2)
    assert (found.now, found.last) == ({"a": (10, 9)}, {"a": 3})


def test_a_look_has_a_reading_of_no_rows_for_a_device_that_only_labels_came_of():
    one = Slice(index=7, start_ns=70, end_ns=80, readings=(reading("a", 80, labelled=1, correct=1),))
    found = late.told(one, {DeviceId("a"): (4, 3), DeviceId("z"): (9, 2)}, NOTHING)
    assert [(r.device, r.labelled, r.correct, r.profile.rows, r.windows) for r in found.readings] == [
        ("a", 5, 4, 0, 1),
        ("z", 9, 2, 0, 0),
    ]
    assert late.told(one, {}, NOTHING) == one


@given(st.permutations([told(k, d, 5 * k, k + 1, k) for k in range(6) for d in "ab"]), st.integers(0, 12))
def test_nothing_is_lost_or_counted_twice_however_labels_come(arrivals, cut):
    waiting: list[LateLabels] = []
    counted: list[tuple[int, int]] = []
    for part in (arrivals[:cut], arrivals[cut:]):
        came = [*waiting, *part]
        found = late.arrived(came, FIRST, devices("a", "b"), need=2)
        waiting = [one for one in came if one.device not in found.last]
        counted += [*found.past.values(), *found.now.values()]
    assert sum(n for n, _ in counted) == sum(one.labelled for one in arrivals) - sum(
        w.labelled for w in waiting
    )
    assert sum(right for _, right in counted) == sum(one.correct for one in arrivals) - sum(
        w.correct for w in waiting
    )
    assert all(sum(w.labelled for w in waiting if w.device == d) < 10 * 2 for d in "ab")


# ── what is known ──────────────────────────────────────────────────────────────────────────────────────


def truth(device, labelled, correct, expected=None, digest=A, model=MODEL):
    compared = 0 if expected is None else labelled
    return DeviceTruth(
        device=DeviceId(device),
        digest=digest,
        model=ModelName(model),
        labelled=labelled,
        correct=correct,
        compared=compared,
        compared_correct=correct if compared else 0,
        expected=expected or 0.0,
    )


def test_every_device_weighs_the_same_and_the_error_is_of_those_that_have_an_estimate():
    known = [truth("a", 1000, 900, 950.0), truth("b", 10, 5, 8.0), truth("c", 10, 7)]
    fleet, north = accuracies(known, {DeviceId("a"): {"site": "north"}}, ["site"])
    assert (fleet.cohort, fleet.devices, fleet.labelled, fleet.correct, fleet.compared) == (
        "fleet",
        3,
        1020,
        912,
        2,
    )
    assert fleet.known == pytest.approx((0.9 + 0.5 + 0.7) / 3)
    assert fleet.estimated == pytest.approx((0.95 + 0.8) / 2)
    assert fleet.error == pytest.approx((0.05 + 0.3) / 2)
    # Student's t of one degree of freedom, 12.706, times the standard error of two differences.
    assert fleet.error_half == pytest.approx(12.7062 * np.std([0.05, 0.3], ddof=1) / 2**0.5, rel=1e-4)
    assert (north.cohort, north.known, north.half, north.error_half) == ("site=north", 0.9, None, None)
    assert accuracies([truth("a", 0, 0)], {}, ()) == ()


def test_artifacts_are_told_apart_and_models_put_together():
    known = [
        truth("a", 10, 5),
        truth("b", 10, 9, digest=B),
        truth("c", 10, 10, model="other", digest=B[::-1]),
    ]
    assert [(one.model, one.known) for one in accuracies(known, {}, ())] == [
        ("other", 1.0),
        (MODEL, 0.5),
        (MODEL, 0.9),
    ]
    assert [(one.model, one.known) for one in by_model(known)] == [("other", 1.0), (MODEL, 0.7)]


def test_the_estimates_error_is_of_the_devices_that_have_both():
    scores = np.tile([0.75, 0.25, 0.0], (8, 1))
    profile = count(SPEC, np.zeros((8, len(NAMES))), scores[:, :CLASSES])
    readings = [
        replace(reading("a", labelled=4, correct=2), profile=profile),
        replace(reading("b"), profile=profile),
        reading("c", labelled=2, correct=2),
    ]
    found = estimate(readings)
    assert (found.estimated, found.known, found.labelled) == (0.75, 0.75, 6)
    assert (found.error, found.error_half) == (0.25, None)
    assert estimate([reading("a")]).error is None


# ── ingest ─────────────────────────────────────────────────────────────────────────────────────────────


def planned(*messages, infos=None):
    decoded = ingest.read_all(TOPICS, [wire(m) if not isinstance(m, tuple) else m for m in messages])
    return ingest.plan(decoded, infos or {})


def test_labels_are_planned_and_acknowledged_to_their_source():
    plan = planned(labels(seq=2), labels(seq=1), labels("dev-2", 1, source="shop"), window())
    assert len(plan.labels) == 3
    assert [(source, ack.device, ack.seqs) for source, ack in plan.labels_acks] == [
        ("lab", "dev-1", (1, 2)),
        ("shop", "dev-2", (1,)),
    ]
    assert [(ack.device, ack.seqs) for ack in plan.acks] == [("dev-1", (1,))]


@pytest.mark.parametrize(
    ("topic", "cause"),
    [
        (TOPICS.labels(SourceId("shop")), "sender"),
        (TOPICS.window(DeviceId("dev-1"), MODEL), "sender"),
        (TOPICS.labels(SourceId("lab")) + "/ack", "topic"),
        ("skiff/1/other/labels/lab", "topic"),
        (TOPICS.labels(SourceId("Lab")), "topic"),
    ],
)
def test_labels_on_a_topic_that_is_not_their_sources_are_a_dead_letter(topic, cause):
    plan = planned((topic, wire(labels())[1]))
    assert [letter.cause for letter in plan.dead] == [cause]
    assert (plan.labels, plan.labels_acks) == ((), ())


def test_labels_that_contradict_their_artifact_are_a_dead_letter_and_acknowledged():
    info = artifact_info()
    other = replace(labels(), model=ModelName("other"))
    unlabelled = replace(info, manifest=replace(info.manifest, labels=()))
    for message, known, words in (
        (other, info, "not of 'other'"),
        (labels(), unlabelled, "no single right answer"),
    ):
        plan = planned(message, infos={A: known})
        assert [letter.cause for letter in plan.dead] == ["labels"]
        assert words in plan.dead[0].reason
        assert plan.labels == ()
        assert len(plan.labels_acks) == 1
    assert planned(labels(), infos={A: info}).dead == ()


def test_labels_take_their_sources_turn():
    assert ingest.sender(TOPICS, TOPICS.labels(SourceId("lab"))) == "lab labels"
    assert ingest.sender(TOPICS, TOPICS.labels(SourceId("Lab"))) == "?"
    assert ingest.digests(ingest.read_all(TOPICS, [wire(labels())])) == {A}
