"""What stands after a look, when a look is taken, and which incidents nobody can clear."""

from dataclasses import replace

import pytest

from aggregator.config import DriftConfig
from aggregator.core import cohorts, standing
from aggregator.looks import Alarm, Finding, Look, Trace
from edge_runtime.contract.ids import DeviceId
from tests.support.fleet import MODEL, NOW, A, B, device

DEVICES = tuple(DeviceId(f"d{i}") for i in range(3))
CALM = Finding(
    kind="drift",
    cohort="fleet",
    key="a",
    feature="a",
    moved=False,
    clear=True,
    at_once=True,
    p=0.7,
    judged=12,
)
ALARM = Alarm(
    kind="skew",
    feature="b",
    cohort="wrist=right",
    opened_window=2,
    closed_window=None,
    devices=DEVICES,
    severity="ticket",
    why="b is not as in training",
)


def stand(findings=(), alarms=(), notes=(), left_out=()):
    look = Look(index=7, figures={}, findings=tuple(findings))
    found = standing.verdicts(MODEL, A, look, alarms, notes, left_out=left_out, at_ns=NOW)
    return {(v.cohort, v.kind): v for v in found}


def test_what_was_judged_and_did_not_move_is_stable():
    other = replace(CALM, key="b", feature="b", p=0.3)
    (verdict,) = stand([CALM, other]).values()
    assert (verdict.outcome, verdict.p, verdict.look, verdict.judged) == (standing.STABLE, 0.3, 7, 12)
    assert verdict.reason == "nothing moved in 12 devices"
    assert (verdict.model, verdict.digest, verdict.at_ns) == (MODEL, A, NOW)


def test_what_moved_without_an_incident_is_a_warning():
    moved = replace(CALM, kind="skew", moved=True, p=0.002, why="b moved", devices=DEVICES[:1])
    verdict = stand([moved, CALM])["fleet", "skew"]
    assert (verdict.outcome, verdict.reason, verdict.moved) == (standing.WARNING, "b moved", ("a",))
    assert verdict.devices == DEVICES[:1]


def test_an_open_incident_stands_even_where_this_look_judged_nothing():
    verdict = stand([CALM], [ALARM])["wrist=right", "skew"]
    assert (verdict.outcome, verdict.reason) == (standing.DRIFTED, "b is not as in training")
    assert (verdict.moved, verdict.devices, verdict.p) == (("b",), DEVICES, 1.0)


def test_outputs_are_named_by_what_they_are():
    alarm = replace(ALARM, kind="performance", feature=None, cohort="fleet")
    assert stand([], [alarm])["fleet", "performance"].moved == ("performance",)


def test_the_fleet_comes_first_and_kinds_in_their_order():
    alarms = [
        replace(ALARM, cohort=c, kind=k) for c in ("a=1", "fleet") for k in ("performance", "drift", "skew")
    ]
    keys = [key for key in stand([], alarms) if key[1] != "sensor"]
    assert keys == [(c, k) for c in ("fleet", "a=1") for k in ("skew", "drift", "performance")]


def test_what_could_not_be_judged_is_insufficient_and_says_why():
    found = stand(notes=["3 devices, 10 are needed"], left_out=(("d9", "1 of 10 rows"),))
    (verdict,) = found.values()
    assert (verdict.kind, verdict.outcome) == ("skew", standing.INSUFFICIENT)
    assert verdict.reason == "3 devices, 10 are needed"
    assert verdict.left_out == (("d9", "1 of 10 rows"),)


# ── retired ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cohort", "devices", "gone"),
    [
        ("fleet", [("a", A, "left")], False),
        ("fleet", [("a", B, "left")], True),
        ("fleet", [("a", B, "left"), ("b", A, "right")], False),
        ("wrist=left", [("a", B, "left"), ("b", A, "right")], True),
        ("wrist=left", [("b", A, "right")], False),
        ("fleet", [], False),
    ],
)
def test_an_incident_retires_when_its_cohort_serves_something_else(cohort, devices, gone):
    records = [
        replace(device(name, serving=digest, state="committed"), attributes=(("wrist", wrist),))
        for name, digest, wrist in devices
    ]
    records.append(device("off", online=False, serving=A))
    open_one = Trace(cohort=cohort, key="b", alarm=replace(ALARM, cohort=cohort))
    closed = Trace(cohort=cohort, key="c")
    assert standing.retired(A, MODEL, [open_one, closed], records) == ((open_one,) if gone else ())


# ── cohorts ────────────────────────────────────────────────────────────────────────────────────────────


def test_cohorts_are_the_fleet_and_the_values_that_divide_it():
    names = [DeviceId(n) for n in ("a", "b", "c")]
    attributes = {
        DeviceId("a"): {"wrist": "left", "site": "x"},
        DeviceId("b"): {"wrist": "right", "site": "x"},
        DeviceId("c"): {"site": "x"},
    }
    assert cohorts.split(names, attributes, ("wrist", "site", "none")) == {
        "fleet": ("a", "b", "c"),
        "wrist=left": ("a",),
        "wrist=right": ("b",),
    }
    assert DriftConfig().attributes == ()
