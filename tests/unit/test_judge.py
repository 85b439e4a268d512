"""What a judge makes of looks in a row: from burn-in to a wish for a better model."""

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.config import DriftConfig
from aggregator.core.judge import Judge
from aggregator.looks import Look, Slice
from edge_runtime.contract.ids import LayoutId
from edge_runtime.contract.profile import empty_profile
from tests.support.looks import CONFIG, Fault, index_of, judged, mapped, mean_sure, small, told

MOVED = Fault("mean", 0.7, start=12, columns=(5,))
EFFECT = Fault("mean", 1.5, start=12, columns=(0,))


# ── the past ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_looks_are_the_past_and_nothing_is_judged_against_it_before():
    early = small(faults=(replace(MOVED, start=3),), windows=8)
    judge = Judge(early.info, CONFIG, looks=8)
    for one in early.slices:
        assert not [f for f in judge.look(one).findings if f.kind in {"drift", "sensor", "quality"}]
    assert [one.index for one in judge.first_looks] == list(range(CONFIG.baseline_looks))
    late = judged(small(faults=(MOVED,)))
    assert told(late.alarms) == [("drift", "f5", "fleet", 12)]
    assert len(late.first_looks) == CONFIG.baseline_looks


def test_a_known_good_past_is_judged_against_from_the_first_look():
    fleet = small(reference_windows=12, windows=4, faults=(replace(MOVED, start=0),))
    judge = judged(fleet)
    assert told(judge.alarms) == [("drift", "f5", "fleet", 0)]
    assert judge.first_looks == ()
    assert "skew" not in {f.kind for one in fleet.slices for f in judge.look(one).findings}


def test_figures_are_against_the_training_or_the_past_that_was_given():
    """Devices moved before they were first seen: they are as they always were, and not as in training."""
    moved = small(windows=10, faults=(replace(MOVED, start=0),))
    judge = Judge(moved.info, CONFIG, looks=10)
    for one in moved.slices:
        look = judge.look(one)
        assert look.figures["f5"].mean_shift_sd == pytest.approx(0.7, abs=0.15)
        assert look.figures["f4"].psi < 0.05
    given = small(windows=1, reference_windows=4, faults=(replace(MOVED, start=-4),))
    (one,) = given.slices
    assert abs(Judge(given.info, CONFIG, history=given.reference).look(one).figures["f5"].mean_shift_sd) < 0.1


def test_a_fleet_unlike_its_training_from_the_start_is_skewed_for_as_long_as_it_is():
    judge = judged(small(windows=20, faults=(Fault("mean", 1.0, start=0, columns=(5,)),)))
    assert told(judge.alarms) == [("skew", "f5", "fleet", 9)]
    assert judge.alarms[0].closed_window is None


def test_the_estimate_is_the_mean_over_devices_of_their_mean_probability():
    fleet = small(windows=1, labelled=True)
    estimate = Judge(fleet.info, CONFIG).look(fleet.slices[0]).estimate
    readings = fleet.slices[0].readings
    assert estimate.estimated == pytest.approx(sum(mean_sure(r.profile) for r in readings) / 40)
    assert estimate.known == pytest.approx(sum(r.correct / r.labelled for r in readings) / 40)
    assert estimate.labelled == sum(r.labelled for r in readings)
    assert estimate.half is not None
    assert 0 < estimate.half < 0.05
    assert estimate.estimated == pytest.approx(estimate.known, abs=2 * estimate.half)


# ── few devices ────────────────────────────────────────────────────────────────────────────────────────


def test_few_devices_are_judged_one_by_one_and_it_says_so():
    fleet = small(
        devices=6, reference_windows=12, windows=8, faults=(Fault("mean", 2.0, start=3, columns=(5,)),)
    )
    judge = judged(fleet)
    (alarm,) = judge.alarms
    assert (alarm.kind, alarm.feature, alarm.opened_window) == ("drift", "f5", 3)
    assert alarm.devices == fleet.device_ids
    assert any("6 devices with a past: a fleet verdict needs 10" in note for note in judge.notes)


@pytest.mark.attack("A82")
def test_one_of_few_devices_is_named_and_wishes_for_nothing():
    fleet = small(
        devices=6,
        reference_windows=12,
        windows=8,
        faults=(Fault("mean", 3.0, start=3, columns=(0, 1), devices=(2,)),),
    )
    judge = judged(fleet)
    assert {a.devices for a in judge.alarms} == {(fleet.device_ids[2],)}
    assert judge.wishes == ()


def test_the_note_on_few_devices_says_in_how_many_looks_they_were_few():
    fleet = small(devices=12, reference_windows=12, windows=6)
    judge = Judge(fleet.info, CONFIG, looks=6, history=fleet.reference)
    for one in mapped(fleet.slices, lambda k, r: None if k in {2, 4} and index_of(r.device) >= 7 - k else r):
        judge.look(one)
    assert any("2 of 6 looks had fewer than 10 devices with a past, at the least 3" in n for n in judge.notes)


def test_a_device_all_of_whose_rows_are_refused_stays_in_the_look():
    fleet = small(reference_windows=12, windows=6)
    empty = empty_profile(fleet.spec, probabilities=True)
    judge = Judge(fleet.info, CONFIG, looks=6, history=fleet.reference)

    def dead(k, r):
        if index_of(r.device) != 3 or k < 2:
            return r
        return replace(r, profile=empty, refused=(("missing", r.profile.rows),))

    looks = [judge.look(one) for one in mapped(fleet.slices, dead)]
    (alarm,) = judge.alarms
    assert (alarm.kind, alarm.feature, alarm.opened_window) == ("sensor", None, 2)
    assert alarm.devices == (fleet.device_ids[3],)
    assert looks[2].devices == 40


def test_a_fleet_that_refuses_everything_is_told_of():
    fleet = small(reference_windows=12, windows=3)
    empty = empty_profile(fleet.spec, probabilities=True)
    judge = Judge(fleet.info, CONFIG, looks=3, history=fleet.reference)
    for one in mapped(fleet.slices, lambda k, r: replace(r, profile=empty, refused=(("missing", 100),))):
        judge.look(one)
    (alarm,) = judge.alarms
    assert (alarm.kind, alarm.opened_window, len(alarm.devices)) == ("quality", 0, 40)


def test_too_few_for_skew_is_said():
    judge = judged(small(devices=6, windows=10))
    assert any("6 devices, 10 are needed to compare them with the training" in note for note in judge.notes)


def test_an_empty_look_changes_nothing():
    judge = judged(small(windows=14, faults=(MOVED,)))
    empty = Slice(index=14, start_ns=0, end_ns=1, readings=())
    before = judge.book.traces
    assert judge.look(empty).findings == ()
    assert judge.book.traces == before


# ── newcomers ──────────────────────────────────────────────────────────────────────────────────────────


def test_newcomers_have_no_past_before_their_first_looks_are_over():
    fleet = small(devices=50, windows=36)

    def late(index, reading):
        return None if index_of(reading.device) >= 40 and index < 10 else reading

    fleet_of_forty = mapped(fleet.slices, late)
    judge = Judge(fleet.info, CONFIG, looks=36)
    for one in fleet_of_forty:
        judge.look(one)
        new = {r.device for past in judge.first_looks for r in past.readings if index_of(r.device) >= 40}
        assert len(new) == (10 if one.index >= 10 else 0)
    of_newcomers = [
        one.index for one in judge.first_looks if any(index_of(r.device) >= 40 for r in one.readings)
    ]
    assert of_newcomers == list(range(10, 32))  # a day, as no cycle is known
    assert judge.alarms == ()


def test_newcomers_whose_answers_differ_are_found_before_they_have_a_past():
    fleet = small(
        devices=50,
        windows=16,
        faults=(Fault("mean", 2.0, start=0, columns=(0,), devices=tuple(range(40, 50))),),
    )
    attributes = {d: {"site": "new" if i >= 40 else "old"} for i, d in enumerate(fleet.device_ids)}
    judge = Judge(
        fleet.info, replace(CONFIG, attributes=("site",)), looks=16, attributes=attributes, settle=0
    )
    for one in mapped(fleet.slices, lambda k, r: None if index_of(r.device) >= 40 and k < 10 else r):
        judge.look(one)
    found = {(a.kind, a.feature, a.cohort) for a in judge.alarms}
    assert {("skew", "f0", "site=new"), ("prediction", None, "site=new")} <= found
    assert not [a for a in judge.alarms if a.cohort == "site=old"]
    newcomers = next(a for a in judge.alarms if a.kind == "prediction" and a.cohort == "site=new")
    assert {index_of(d) for d in newcomers.devices} == set(range(40, 50))
    assert "site=new" in {w.cohort for w in judge.wishes}


@pytest.mark.parametrize(("labelled", "wishes"), [(False, 1), (True, 0)])
def test_newcomers_without_a_cohort_wish_for_a_better_model_unless_it_is_right_about_them(labelled, wishes):
    fleet = small(
        devices=40,
        labelled=labelled,  # the model is as right as ever
        faults=(Fault("mean", 2.0, start=0, columns=(0,), devices=tuple(range(28, 40))),),
    )
    # Without groups the fleet as one, most of which is as ever, is no skew.
    info = replace(fleet.info, reference=replace(fleet.info.reference, groups=()))
    judge = Judge(info, CONFIG, looks=16)
    for one in mapped(fleet.slices, lambda k, r: None if index_of(r.device) >= 28 and k < 10 else r):
        judge.look(one)
    inputs = [a for a in judge.alarms if a.kind == "skew"]
    assert [(a.feature, {index_of(d) for d in a.devices}) for a in inputs] == [("f0", set(range(28, 40)))]
    assert {a.kind for a in judge.alarms} >= {"prediction"}
    assert ["f0" in wish.why for wish in judge.wishes] == [True] * wishes


# ── incidents ──────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_over_is_closed():
    judge = judged(small(windows=20, faults=(replace(MOVED, end=16),)))
    assert [(a.opened_window, a.closed_window) for a in judge.alarms] == [(12, 17)]


def test_a_cohort_is_judged_by_itself_and_has_one_incident_a_column():
    fleet = small(
        reference_windows=12,
        windows=6,
        faults=(Fault("mean", 1.0, start=2, columns=(5,), devices=tuple(range(20, 40))),),
    )
    attributes = {d: {"site": "b" if i >= 20 else "a"} for i, d in enumerate(fleet.device_ids)}
    judge = judged(fleet, replace(CONFIG, attributes=("site",)), attributes=attributes)
    assert {(a.kind, a.feature, a.cohort) for a in judge.alarms} == {
        ("drift", "f5", "fleet"),
        ("drift", "f5", "site=b"),
    }
    keys = [(a.cohort, a.feature) for a in judge.alarms]
    assert len(keys) == len(set(keys))


def test_rows_of_another_layout_are_not_judged():
    fleet = small(windows=2, reference_windows=12)
    odd = mapped(fleet.slices, lambda k, r: replace(r, profile=replace(r.profile, layout=LayoutId("f" * 16))))
    judge = Judge(fleet.info, CONFIG, history=fleet.reference)
    assert judge.look(odd[0]).devices == 0


# ── a better model ─────────────────────────────────────────────────────────────────────────────────────


def test_a_better_model_is_wished_for_when_inputs_persist_and_outputs_moved():
    judge = judged(small(faults=(EFFECT,)))
    (wish,) = judge.wishes
    assert (wish.window, wish.cohort) == (13, "fleet")
    assert "f0" in wish.why
    assert {"drift", "prediction"} <= {a.kind for a in judge.alarms}


def test_predictions_that_move_where_the_truth_says_that_nothing_is_lost_wish_for_nothing():
    def known(right):
        def change(k, r):
            return replace(r, labelled=1000, correct=right(k))

        return change

    fleet = small(faults=(EFFECT,), reference_windows=8)
    for right, wishes in ((lambda k: 900, 0), (lambda k: 900 if k < 12 else 700, 1)):
        history = mapped(fleet.reference, known(lambda k: 900))
        judge = Judge(fleet.info, CONFIG, looks=fleet.windows, history=history)
        for one in mapped(fleet.slices, known(right)):
            judge.look(one)
        assert "prediction" in {a.kind for a in judge.alarms}
        assert len(judge.wishes) == wishes


def test_two_who_know_do_not_silence_the_estimate_of_all():
    """The fleet is judged by known answers only where enough devices have them."""
    fleet = small(reference_windows=12, windows=6)

    def told(shown):
        def change(k, r):
            counts = {"labelled": 100, "correct": 90} if index_of(r.device) < 2 else {}
            sums = r.profile.sums.copy()
            sums[0] = int(r.profile.sums[0] * shown(k))
            return replace(r, profile=replace(r.profile, sums=sums), **counts)

        return change

    judge = Judge(fleet.info, CONFIG, looks=6, history=mapped(fleet.reference, told(lambda k: 1.0)))
    for one in mapped(fleet.slices, told(lambda k: 1.0 if k < 2 else 0.85)):
        judge.look(one)
    assert [(a.kind, a.opened_window) for a in judge.alarms] == [("performance", 2)]
    assert "the estimated accuracy" in judge.alarms[0].why


def test_harmless_drift_wishes_for_nothing():
    judge = judged(small(faults=(MOVED,)))
    assert [a.kind for a in judge.alarms] == ["drift"]
    assert judge.wishes == ()


def test_one_look_of_movement_wishes_for_nothing():
    assert judged(small(faults=(replace(EFFECT, end=13),))).wishes == ()


def test_answers_that_move_alone_wish_for_nothing():
    """A correlation of the model's two interacting inputs: no input's own distribution moves."""
    judge = judged(small(rows=300, faults=(Fault("correlation", 0.9, start=12, columns=(2, 3)),)))
    assert {a.kind for a in judge.alarms} <= {"prediction", "performance"}
    assert judge.alarms
    assert judge.wishes == ()


# ── the same again ─────────────────────────────────────────────────────────────────────────────────────

LATER = Fault("offset", 1.2, start=9, columns=(4,), devices=(7, 8))
RESTORED = replace(CONFIG, baseline_looks=4, attributes=("site",))


@cache
def story():
    """Newcomers at 5, two sensors that go wrong at 9, and the fleet's drift at 12."""
    fleet = small(devices=24, seed=3, rows=60, windows=16, faults=(LATER, replace(EFFECT, start=11)))
    looks = mapped(fleet.slices, lambda k, r: None if index_of(r.device) >= 14 and k < 5 else r)
    sites = {d: {"site": "ab"[i % 2]} for i, d in enumerate(fleet.device_ids)}
    return fleet.info, looks, sites


def begin(**kept):
    info, _, sites = story()
    return Judge(info, RESTORED, looks=16, attributes=sites, settle=0, block_looks=1, **kept)


@cache
def uninterrupted():
    judge = begin()
    return tuple(judge.look(one) for one in story()[1])


def test_the_story_has_all_that_a_restored_judge_could_forget():
    kinds = {a.kind for look in uninterrupted() for a in look.opened}
    assert {"sensor", "drift", "prediction"} <= kinds
    assert any(look.suspects for look in uninterrupted())
    assert any(look.wish for look in uninterrupted())


@settings(max_examples=4)
@given(st.sets(st.integers(1, 15), min_size=1, max_size=3))
def test_a_restored_judge_goes_on_as_if_nothing_had_happened(cuts):
    judge = begin()
    found: list[Look] = []
    for one in story()[1]:
        if one.index in cuts:
            judge = begin(remembered=judge.first_looks, traces=judge.book.traces, suspects=found[-1].suspects)
        found.append(judge.look(one))
    assert tuple(found) == uninterrupted()


def test_the_judge_is_a_function_of_its_looks():
    looks = story()[1]
    again = begin()
    assert tuple(again.look(one) for one in looks) == uninterrupted()
    shuffled = begin()
    for one, before in zip(looks, uninterrupted(), strict=True):
        look = shuffled.look(replace(one, readings=one.readings[::-1]))
        assert [(f.kind, f.key, f.moved) for f in look.findings] == [
            (f.kind, f.key, f.moved) for f in before.findings
        ]


def test_a_feature_called_score_keeps_its_own_figures():
    fleet = small(windows=1)
    spec = replace(
        fleet.spec, features=(*fleet.spec.features[:5], replace(fleet.spec.features[5], name="score"))
    )
    features = (*fleet.info.manifest.features[:5], replace(fleet.info.manifest.features[5], name="score"))
    old = fleet.info.reference

    def relaid(profile):
        return replace(profile, layout=spec.layout)

    info = replace(
        fleet.info,
        manifest=replace(fleet.info.manifest, features=features, layout=spec.layout),
        reference=replace(
            old, spec=spec, total=relaid(old.total), groups=tuple((n, relaid(p)) for n, p in old.groups)
        ),
    )
    moved = small(windows=1, faults=(replace(MOVED, start=0),)).slices
    (one,) = mapped(moved, lambda k, r: replace(r, profile=relaid(r.profile)))
    figures = Judge(info, DriftConfig()).look(one).figures
    assert figures["score"].mean_shift_sd == pytest.approx(0.7, abs=0.15)
