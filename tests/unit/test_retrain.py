"""When a request for a better model is held back, and what it carries."""

import base64
import json

import pytest

from aggregator.config import RetrainConfig
from aggregator.core import retrain
from aggregator.looks import Alarm, Block, Reading, Wish
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.packing import unpack_counts
from tests.support.fleet import FLEET, MODEL, NOW, SECOND, A, B, window

WISH = Wish(window=5, cohort="wrist=right", why="a moved; the answers moved")


def test_one_request_per_artifact_and_not_too_often():
    config = RetrainConfig(cooldown_seconds=60)
    assert retrain.held_back(A, [A], None, RetrainConfig(), NOW)
    assert not retrain.held_back(A, [B], None, RetrainConfig(), NOW)
    assert retrain.held_back(A, [], NOW - 59 * SECOND, config, NOW)
    assert not retrain.held_back(A, [], NOW - 60 * SECOND, config, NOW)


def blocks():
    profile = window(rows=50).profile
    return profile, [
        Block(
            reading=Reading(
                device=DeviceId(name),
                profile=profile,
                start_ns=NOW,
                end_ns=NOW + SECOND,
                windows=2,
                labelled=9,
                correct=5,
            ),
            seconds=1.0,
            first=3 + k,
            last=9 + k,
        )
        for k, name in enumerate(("dev-1", "dev-2"))
    ]


def alarm(cohort):
    return Alarm(
        kind="skew",
        feature="a",
        cohort=cohort,
        opened_window=4,
        closed_window=None,
        devices=(DeviceId("dev-1"),),
        severity="page",
        why="a moved",
    )


@pytest.mark.parametrize(("cohort", "devices"), [("wrist=right", ["dev-1"]), ("fleet", ["dev-1", "dev-2"])])
def test_the_request_carries_the_cohorts_histograms(cohort, devices):
    profile, found = blocks()
    attributes = {DeviceId("dev-1"): {"wrist": "right"}, DeviceId("dev-2"): {"wrist": "left"}}
    wish = Wish(window=5, cohort=cohort, why=WISH.why)
    alarms = [alarm("fleet"), alarm("wrist=right")]
    request = retrain.request(FLEET, MODEL, A, wish, alarms, found, attributes, NOW)
    assert (request.model, request.digest, request.cohort, request.at_ns) == (MODEL, A, cohort, NOW)
    assert request.why == f"{cohort}: a moved; the answers moved"
    document = json.loads(request.document)
    assert document["windows"] == {"first": 3, "last": 9 if len(devices) == 1 else 10}
    assert [a["cohort"] for a in document["alarms"]] == [cohort]
    assert [told["device"] for told in document["devices"]] == devices
    told = document["devices"][0]
    assert (told["attributes"], told["rows"], told["labelled"], told["correct"]) == (
        {"wrist": "right"},
        50,
        9,
        5,
    )
    assert told["layout"] == profile.layout
    assert unpack_counts(base64.b64decode(told["counts"])).tolist() == profile.counts.tolist()
    assert told["sums"] == profile.sums.tolist()


def test_a_request_without_blocks_says_no_windows():
    document = json.loads(retrain.request(FLEET, MODEL, A, WISH, [], [], {}, NOW).document)
    assert document["windows"] == {"first": 0, "last": 0}
    assert document["devices"] == []
