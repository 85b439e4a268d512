"""One look: who is judged, against whom, and what it is called."""

from dataclasses import replace

import numpy as np
import pytest

from aggregator.config import DriftConfig
from aggregator.core import cohorts, drift
from aggregator.core.drift import INSUFFICIENT, MOVED, STABLE, Coverage
from aggregator.records import Block
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import Reference
from edge_runtime.contract.profile import empty_profile
from tests.support.fleet import CLASSES, NAMES, SPEC, A, count

CONFIG = DriftConfig(attributes=("wrist",), min_labelled=50)
LABELS = ("low", "mid", "high")
ROWS = 400


def unit(rng, shift=0.0, sure=0.6):
    """The profile of one unit: ``shift`` on feature a, and a model that is ``sure`` of the class it picks."""
    rows = rng.normal(size=(ROWS, len(NAMES)))
    rows[:, 0] += shift
    scores = rng.dirichlet(np.ones(CLASSES), size=ROWS) * (1 - sure)
    scores[np.arange(ROWS), rng.integers(0, CLASSES, ROWS)] += sure
    return count(SPEC, rows, scores)


def block(name, profile, *, number=1, labelled=0, correct=0):
    return Block(
        device=DeviceId(name),
        profile=profile,
        windows=1,
        rows=profile.rows,
        seconds=10.0,
        labelled=labelled,
        correct=correct,
        first=number,
        last=number,
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def reference(rng):
    groups = tuple((f"g{i}", unit(rng)) for i in range(6))
    return Reference(spec=SPEC, total=empty_profile(SPEC, probabilities=True), groups=groups)


def look(reference, blocks, *, baseline=None, origins=None):
    attributes = {b.device: {"wrist": b.device.partition("-")[0]} for b in blocks}
    return drift.Look(
        digest=A,
        reference=reference,
        labels=LABELS,
        blocks=tuple(blocks),
        attributes=attributes,
        baseline=baseline,
        origins=origins or {},
    )


def lefts(rng, n=10, **options):
    return [block(f"left-{i}", unit(rng), number=i, **options) for i in range(n)]


def rights(rng, n=10, shift=1.5, sure=0.6, **options):
    return [block(f"right-{i}", unit(rng, shift, sure), number=50 + i, **options) for i in range(n)]


def outcomes(findings):
    return {key: judgement.outcome for key, judgement in findings.judgements.items()}


def test_a_fleet_like_the_training_is_stable_in_every_kind(reference, rng):
    found = drift.judge(look(reference, lefts(rng, labelled=100, correct=80)), CONFIG)
    expected = dict.fromkeys([("fleet", kind) for kind in drift.KINDS], STABLE)
    assert outcomes(found) == {**expected, ("fleet", "drift"): INSUFFICIENT}
    assert "0 devices were part of an earlier look" in found.judgements["fleet", "drift"].reason
    assert found.judgements["fleet", "skew"].alpha == CONFIG.alpha
    assert {u.device for u in found.baseline or ()} == {f"left-{i}" for i in range(10)}


def test_the_moved_cohort_and_feature_are_named_and_the_baseline_leaves_them_out(reference, rng):
    found = drift.judge(look(reference, lefts(rng) + rights(rng)), CONFIG)
    assert outcomes(found)["wrist=right", "skew"] == MOVED
    assert outcomes(found)["wrist=left", "skew"] == STABLE
    judged = found.judgements["wrist=right", "skew"]
    assert judged.moved == ("a",)
    assert judged.alpha == pytest.approx(CONFIG.alpha / 3)
    assert judged.figures[0].broad == 1.0
    assert judged.figures[0].mean_shift_sd == pytest.approx(1.5, abs=0.3)
    assert found.devices["wrist=right"] == tuple(DeviceId(f"right-{i}") for i in range(10))
    assert {u.device for u in found.baseline or ()} == {f"left-{i}" for i in range(10)}


def habits(rng, n=12, shift=0.0, moved=12):
    """Devices that differ from each other far more than they change: (origins, blocks now)."""
    origins, blocks = {}, []
    for i in range(n):
        own = rng.normal(0, 1.0)
        origins[DeviceId(f"left-{i}")] = unit(rng, own)
        blocks.append(block(f"left-{i}", unit(rng, own + (shift if i < moved else 0.0)), number=i))
    return origins, blocks


def test_a_change_is_found_against_the_devices_own_past_where_skew_sees_nothing(reference, rng):
    origins, blocks = habits(rng, shift=0.6, moved=9)
    found = drift.judge(look(reference, blocks, origins=origins), CONFIG)
    judged = found.judgements["fleet", "drift"]
    assert judged.outcome == MOVED
    assert judged.moved == ("a",)
    assert (judged.reference_units, judged.fleet_units) == (12, 12)
    assert outcomes(found)["fleet", "skew"] == STABLE


def test_devices_that_stay_as_they_were_are_stable_however_much_they_differ(reference, rng):
    origins, blocks = habits(rng)
    assert outcomes(drift.judge(look(reference, blocks, origins=origins), CONFIG))["fleet", "drift"] == STABLE


def test_only_devices_with_a_past_are_compared_with_it(reference, rng):
    origins, blocks = habits(rng, shift=0.6)
    few = dict(list(origins.items())[:8])
    judged = drift.judge(look(reference, blocks, origins=few), CONFIG).judgements["fleet", "drift"]
    assert judged.fleet_units == 8
    fewer = dict(list(origins.items())[:6])
    judged = drift.judge(look(reference, blocks, origins=fewer), CONFIG).judgements["fleet", "drift"]
    assert "6 devices with a past allow no p below 0.0312" in judged.reason


def test_surer_or_less_sure_predictions_are_found_against_the_baseline(reference, rng):
    before = drift.judge(look(reference, lefts(rng)), CONFIG).baseline
    found = drift.judge(look(reference, rights(rng, shift=0, sure=0.1), baseline=before), CONFIG)
    assert outcomes(found)["fleet", "skew"] == STABLE
    judged = found.judgements["fleet", "prediction"]
    assert judged.outcome == MOVED
    assert judged.moved == ("score",)
    assert [f.name for f in judged.figures if f.name != "score"]
    assert found.baseline == before


def test_only_a_drop_of_accuracy_counts(reference, rng):
    before = drift.judge(look(reference, lefts(rng, labelled=200, correct=160)), CONFIG).baseline
    spread = [0.5, 0.52, 0.48, 0.55, 0.45, 0.5, 0.51, 0.49, 0.53, 0.47]
    worse = [replace(b, labelled=200, correct=int(200 * s)) for b, s in zip(lefts(rng), spread, strict=True)]
    judged = drift.judge(look(reference, worse, baseline=before), CONFIG).judgements["fleet", "performance"]
    assert judged.outcome == MOVED
    assert judged.figures[0].below == pytest.approx((0.8, 0.5))
    assert "0.500" in judged.reason
    assert "0.800" in judged.reason
    better = [replace(b, labelled=200, correct=198) for b in lefts(rng)]
    assert drift.judge(look(reference, better, baseline=before), CONFIG).judgements[
        "fleet", "performance"
    ].outcome == (STABLE)


def test_a_drop_below_the_floor_is_no_alarm(reference, rng):
    before = drift.judge(look(reference, lefts(rng, labelled=1000, correct=800)), CONFIG).baseline
    worse = [replace(b, labelled=1000, correct=760) for b in lefts(rng)]
    config = replace(CONFIG, variance_floor=1e-9)
    strict = replace(config, accuracy_floor=0.03)
    assert (
        drift.judge(look(reference, worse, baseline=before), strict).judgements["fleet", "performance"].moved
    )
    assert (
        not drift.judge(look(reference, worse, baseline=before), config)
        .judgements["fleet", "performance"]
        .moved
    )


def test_devices_with_few_answers_do_not_vote(reference, rng):
    found = drift.judge(look(reference, lefts(rng, labelled=49, correct=49)), CONFIG)
    assert "0 devices know 50 true answers" in found.judgements["fleet", "performance"].reason


@pytest.mark.parametrize(
    ("groups", "devices", "config", "why"),
    [
        (6, 4, CONFIG, "4 devices cover the horizon; 5 are needed"),
        (2, 10, CONFIG, "2 training groups; 3 are needed"),
        (0, 10, CONFIG, "no training groups"),
        (3, 5, replace(CONFIG, alpha=0.01), "allow no p below 0.0179"),
    ],
)
def test_too_few_units_are_insufficient_and_say_why(reference, rng, groups, devices, config, why):
    reference = replace(reference, groups=reference.groups[:groups])
    judged = drift.judge(look(reference, lefts(rng, devices)), config).judgements["fleet", "skew"]
    assert judged.outcome == INSUFFICIENT
    assert why in judged.reason


def test_without_groups_the_start_is_the_baseline(reference, rng):
    nobody = replace(reference, groups=())
    assert len(drift.judge(look(nobody, lefts(rng)), CONFIG).baseline or ()) == 10


def test_a_fleet_that_moved_from_the_start_has_no_baseline(reference, rng):
    found = drift.judge(look(reference, rights(rng)), CONFIG)
    assert found.baseline is None
    assert "0 baseline devices" in found.judgements["fleet", "prediction"].reason


def test_missing_values_are_a_shift_too(reference, rng):
    blocks = []
    for i in range(10):
        rows = rng.normal(size=(ROWS, len(NAMES)))
        rows[: ROWS // 4, 1] = np.nan
        blocks.append(block(f"left-{i}", count(SPEC, rows)))
    judged = drift.judge(look(reference, blocks), CONFIG).judgements["fleet", "skew"]
    assert judged.moved == ("b",)
    assert judged.figures[0].missing == pytest.approx((0.0, 0.25))


def test_the_cost_of_a_large_fleet_is_capped(reference, rng):
    config = replace(CONFIG, max_devices=7)
    first = drift.judge(look(reference, lefts(rng, 30)), config)
    assert first.judgements["fleet", "skew"].fleet_units == 7
    assert len(first.devices["fleet"]) == 30


def test_a_look_is_judged_the_same_twice(reference, rng):
    config = replace(CONFIG, exact_limit=1)
    subject = look(reference, lefts(rng))
    assert drift.judge(subject, config) == drift.judge(subject, config)


# ── when to look ───────────────────────────────────────────────────────────────────────────────────────


def cover(*rows, seconds=100.0):
    return [Coverage(device=DeviceId(f"d{i}"), rows=n, seconds=seconds) for i, n in enumerate(rows)]


def test_a_look_waits_for_a_quorum_of_the_active_devices():
    config = DriftConfig(horizon_rows=100, min_devices=5, quorum=0.8, patience_seconds=60)
    assert drift.readiness(cover(*[100] * 8, 99, 99), 0, config).ready
    short = drift.readiness(cover(*[100] * 7, 99, 50, 1), 0, config)
    assert not short.ready
    assert dict(short.left_out)[DeviceId("d8")] == "50 of 100 rows, 100 of 0 s"
    assert drift.readiness(cover(*[100] * 7, 99, 50, 1), 60, config).ready
    assert not drift.readiness(cover(*[100] * 4), 1e9, config).ready
    assert not drift.readiness([], 1e9, config).ready


def test_the_horizon_is_rows_and_seconds():
    config = DriftConfig(horizon_rows=100, horizon_seconds=200, min_devices=2)
    assert not drift.readiness(cover(100, 100), 0, config).ready
    assert drift.readiness(cover(100, 100, seconds=200.0), 0, config).ready


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
