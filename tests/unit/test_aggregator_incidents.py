"""What looks in a row mean, and when a better model is asked for."""

import base64
import json
from dataclasses import replace

import pytest

from aggregator.config import DriftConfig, RetrainConfig
from aggregator.core import incidents, retrain
from aggregator.records import Block, Judgement, Trail, Verdict
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.packing import unpack_counts
from tests.support.fleet import FLEET, MODEL, NOW, SECOND, A, B, device, window

CONFIG = DriftConfig(confirmations=2, clear_confirmations=2, clear_p=0.2)
MOVED = Judgement(outcome="moved", reason="", p=0.001, alpha=0.01)
CLOSE = Judgement(outcome="stable", reason="", p=0.1, alpha=0.01)
CALM = Judgement(outcome="stable", reason="", p=0.9, alpha=0.01)
BLIND = Judgement(outcome="insufficient", reason="")


def trail(outcome="", streak=0, clear=0, *, incident=False, digest=A, cohort="fleet", kind="skew"):
    return Trail(
        model=MODEL, digest=digest, cohort=cohort, kind=kind, streak=streak, clear=clear, incident=incident
    )


def follow(*judgements):
    """The outcomes and changes of looks in a row."""
    before, found = None, []
    for judgement in judgements:
        outcome, streak, clear, incident, changed = incidents.advance(before, judgement, CONFIG)
        before = trail(streak=streak, clear=clear, incident=incident)
        found.append((outcome, changed))
    return found


def test_one_look_warns_and_the_second_in_a_row_opens_an_incident():
    assert follow(MOVED, MOVED, MOVED) == [("warning", ""), ("drifted", "opened"), ("drifted", "")]


def test_a_quiet_look_in_between_starts_anew():
    assert follow(MOVED, CLOSE, MOVED, CALM) == [
        ("warning", ""),
        ("stable", ""),
        ("warning", ""),
        ("stable", ""),
    ]


def test_an_incident_needs_clear_looks_in_a_row_to_close():
    opened = [("warning", ""), ("drifted", "opened")]
    assert follow(MOVED, MOVED, CALM, CALM) == [*opened, ("drifted", ""), ("stable", "closed")]
    assert follow(MOVED, MOVED, CALM, CLOSE, CALM, MOVED, CALM) == [*opened, *[("drifted", "")] * 5]


def test_a_look_that_cannot_judge_changes_nothing():
    assert follow(BLIND, MOVED, BLIND, MOVED, BLIND, CALM, BLIND, CALM) == [
        ("insufficient", ""),
        ("warning", ""),
        ("insufficient", ""),
        ("drifted", "opened"),
        ("drifted", ""),
        ("drifted", ""),
        ("drifted", ""),
        ("stable", "closed"),
    ]


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
    open_one = trail(incident=True, cohort=cohort)
    assert incidents.retired([open_one, trail(cohort=cohort)], records) == ((open_one,) if gone else ())


# ── retraining ─────────────────────────────────────────────────────────────────────────────────────────


def verdict(kind, outcome="drifted", cohort="wrist=right", p=0.001, digest=A):
    return Verdict(
        kind=kind,
        model=MODEL,
        digest=digest,
        cohort=cohort,
        at_ns=NOW,
        outcome=outcome,
        reason=f"{kind} says so",
        judgement=replace(MOVED, p=p),
        devices=(DeviceId("dev-1"),),
        first=3,
        last=9,
    )


ALWAYS = RetrainConfig()


def wanted(*verdicts, asked=(), latest=None, config=ALWAYS):
    return retrain.wanted(verdicts, asked, latest, config, NOW)


def test_drift_alone_asks_for_nothing():
    assert not wanted(verdict("skew"))
    assert not wanted(verdict("prediction"), verdict("performance"))
    assert not wanted(verdict("skew"), verdict("prediction", cohort="fleet"))
    assert not wanted(verdict("skew"), verdict("prediction", digest=B))
    assert not wanted(verdict("skew", "warning"), verdict("prediction"))


@pytest.mark.parametrize("effect", ["prediction", "performance"])
@pytest.mark.parametrize("moved", ["skew", "drift"])
def test_inputs_that_moved_with_an_effect_ask_for_a_better_model(moved, effect):
    calls = wanted(verdict(effect), verdict(moved), verdict("skew", "stable", "fleet"))
    assert [(c.kind, c.cohort) for c in calls] == [(moved, "wrist=right"), (effect, "wrist=right")]


def test_drift_alone_is_enough_when_configured():
    assert wanted(verdict("skew"), config=RetrainConfig(require_effect=False))


def test_the_worst_cohort_is_named():
    calls = wanted(
        *(verdict(kind, cohort="fleet", p=0.005) for kind in ("skew", "performance")),
        *(verdict(kind, p=0.0001) for kind in ("skew", "performance")),
    )
    assert {c.cohort for c in calls} == {"wrist=right"}


def test_one_request_per_artifact_and_not_too_often():
    both = verdict("skew"), verdict("performance")
    assert not wanted(*both, asked=[A])
    assert wanted(*both, asked=[B])
    config = RetrainConfig(cooldown_seconds=60)
    assert not wanted(*both, latest=NOW - 59 * SECOND, config=config)
    assert wanted(*both, latest=NOW - 60 * SECOND, config=config)


def test_the_request_carries_the_cohorts_histograms():
    profile = window(rows=50).profile
    blocks = [
        Block(
            device=DeviceId(name),
            profile=profile,
            windows=2,
            rows=50,
            seconds=1.0,
            labelled=9,
            correct=5,
            first=3,
            last=9,
        )
        for name in ("dev-1", "dev-2")
    ]
    attributes = {DeviceId("dev-1"): {"wrist": "right"}}
    found = retrain.request(FLEET, [verdict("skew"), verdict("performance")], blocks, attributes, NOW)
    assert found.why == (
        "wrist=right: skew drifted (skew says so); performance drifted (performance says so)"
    )
    document = json.loads(found.document)
    assert document["windows"] == {"first": 3, "last": 9}
    assert [v["kind"] for v in document["verdicts"]] == ["skew", "performance"]
    (told,) = document["devices"]
    assert (told["device"], told["attributes"], told["rows"]) == ("dev-1", {"wrist": "right"}, 50)
    assert told["layout"] == profile.layout
    assert unpack_counts(base64.b64decode(told["counts"])).tolist() == profile.counts.tolist()
    assert told["sums"] == profile.sums.tolist()
