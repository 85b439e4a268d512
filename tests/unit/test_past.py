"""What a past knows: means, noise, cycles, and what devices do together."""

from dataclasses import replace

import numpy as np
import pytest

from aggregator.core.components import LOCATION, SHAPE, components_of
from aggregator.core.past import VOTE, Past, capped, fleet_statistic, harmonics
from tests.simulators.streams import SCENARIOS, Traits
from tests.support.looks import Fault, deviations, index_of, mapped, past_of, small


def location(components, owner):
    """Where a column's location is among the components."""
    return int(
        np.flatnonzero(
            (components.owners == owner) & (components.cells == LOCATION) & (components.nature == SHAPE)
        )[0]
    )


def test_the_mean_is_that_of_pooled_counts_and_the_noise_that_of_looks():
    fleet = small(seed=1, devices=12, reference_windows=60, windows=40, rows=100)
    components, past = past_of(fleet)
    found = deviations(past, fleet.slices[0])
    rows = np.stack([one.readings[3].profile.counts for one in fleet.reference]).sum(axis=0)
    sums = np.stack([one.readings[3].profile.sums for one in fleet.reference]).sum(axis=0)
    pooled = components.of_counts(rows[None], sums[None]).values[0]
    np.testing.assert_allclose(found.usual[3], pooled)
    at = location(components, 2)
    away = np.stack([deviations(past, one).away[:, at] for one in fleet.slices])
    noise = np.sqrt(found.variance[:, at])
    assert away.std() == pytest.approx(noise.mean(), rel=0.1)
    assert noise.mean() == pytest.approx(0.1, rel=0.15)  # one over the root of a hundred rows


def test_rows_that_follow_each_other_make_more_noise_and_the_past_knows_how_much():
    fleet = small(seed=2, devices=20, reference_windows=40, windows=20, traits=SCENARIOS["ar"])
    components, past = past_of(fleet)
    at = location(components, 0)
    away = np.stack([deviations(past, one).away[:, at] for one in fleet.slices])
    noise = deviations(past, fleet.slices[0]).variance[:, at].mean() ** 0.5
    assert noise > 0.2  # independent rows: 0.1
    assert away.std() == pytest.approx(noise, rel=0.15)
    votes = np.stack([deviations(past, one).votes for one in fleet.slices])
    assert votes[:, :, components.cells < 0].std() == pytest.approx(1.0, abs=0.15)


def test_a_device_that_strays_more_than_others_has_more_noise():
    options = {"seed": 3, "devices": 10, "reference_windows": 30, "windows": 1}
    fleet = small(**options)
    other = small(**options, faults=(Fault("mean", 1.0, start=-30, columns=(5,), devices=(4,)),)).reference
    coin = np.random.default_rng(0).random(30) < 0.5
    looks = [
        replace(one, readings=other[k].readings) if coin[k] else one for k, one in enumerate(fleet.reference)
    ]
    components = components_of(fleet.info)
    past = Past(components, looks)
    noise = np.sqrt(deviations(past, fleet.slices[0]).variance[:, location(components, 5)])
    assert noise[4] > 2.5 * np.delete(noise, 4).max()
    assert past.design_effects[4, 5] > 4
    assert np.delete(past.design_effects[:, 5], 4).max() < 3.5


def test_fewer_rows_are_noisier_and_more_are_not_believed_to_be_calmer():
    fleet = small(seed=4, devices=10, reference_windows=20, windows=4)
    components, past = past_of(fleet)
    at = location(components, 1)
    one = fleet.slices[0]
    usual = deviations(past, one).variance[0, at] ** 0.5
    training = fleet.info.reference.total
    many = deviations(past, replace(one, readings=(replace(one.readings[0], profile=training),)))
    assert many.variance[0, at] ** 0.5 == pytest.approx(usual)
    few = small(seed=4, devices=10, rows=25, windows=1)
    assert few.spec.layout == fleet.spec.layout
    less = deviations(past, replace(one, readings=(few.slices[0].readings[0],)))
    assert less.variance[0, at] ** 0.5 == pytest.approx(2 * usual, rel=0.1)


# ── cycles ─────────────────────────────────────────────────────────────────────────────────────────────

DAILY = Traits(cycle=0.5)


@pytest.mark.parametrize("hours", [24, 48])
def test_the_hour_of_the_day_is_learned_where_the_looks_cover_a_day(hours):
    fleet = small(seed=5, reference_windows=hours, windows=24, traits=DAILY)
    components, past = past_of(fleet)
    assert past.order[0] >= 1
    at = location(components, 5)
    away = np.array([deviations(past, one).away[:, at].mean() for one in fleet.slices])
    assert np.abs(away).max() < 0.15  # of an amplitude of 0.5
    swing = np.array([deviations(past, one).usual[:, at].mean() for one in fleet.slices])
    assert np.ptp(swing) == pytest.approx(1.0, abs=0.2)


def test_half_a_day_teaches_no_cycle_and_what_was_seen_of_it_is_no_evidence():
    fleet = small(seed=6, reference_windows=12, windows=1, traits=DAILY)
    components, past = past_of(fleet)
    assert past.order == (0, 0)
    assert past.common[location(components, 5)] > 10


def test_without_a_cycle_none_is_learned():
    for seed in range(2):
        _, past = past_of(small(seed=seed, devices=12, reference_windows=48, windows=1))
        assert past.order == (0, 0)


def test_the_week_is_learned_from_two():
    def workdays(index, reading):
        day = (reading.start_ns // 86_400_000_000_000) % 7
        other = moved[index] if day in {2, 3} else calm[index]
        return replace(reading, profile=other.readings[index_of(reading.device)].profile)

    options = {"seed": 7, "devices": 12, "reference_windows": 30, "windows": 1, "window_seconds": 43_200}
    calm = small(**options).reference
    moved = small(**options, faults=(Fault("mean", 1.0, start=-28, columns=(4,)),)).reference
    components = components_of(small(**options).info)
    looks = mapped(calm, workdays)
    assert Past(components, looks).order[1] >= 1
    assert Past(components, looks[:13]).order == (0, 0)


def test_harmonics_are_cosines_and_sines_of_the_day_and_of_the_week():
    found = harmonics(np.array([0.0, 21_600.0]), (1, 1))
    week = 2 * np.pi / 28
    np.testing.assert_allclose(found, [[1, 0, 1, 0], [0, 1, np.cos(week), np.sin(week)]], atol=1e-12)
    assert harmonics(np.zeros(3), (0, 0)).shape == (3, 0)


# ── together ───────────────────────────────────────────────────────────────────────────────────────────


def test_what_devices_do_together_takes_its_share_off_and_few_looks_say_little():
    _, calm = past_of(small(seed=8, reference_windows=12, windows=1))
    assert np.median(calm.common) < 1.6
    _, moving = past_of(small(seed=8, reference_windows=12, windows=1, traits=DAILY))
    assert np.median(moving.common) > 5 * np.median(calm.common)
    assert moving.freedom[moving.common > 2].max() < 60
    assert (moving.shared_variance(40) >= 0).all()
    assert moving.shared_variance(40).mean() > 5 * calm.shared_variance(40).mean()


def test_votes_are_capped_and_unknown_ones_are_none():
    np.testing.assert_array_equal(capped(np.array([[9.0, -9.0, 1.0, np.nan]])), [[VOTE, -VOTE, 1.0, 0.0]])


def test_the_fleets_statistic_is_students_with_a_floor_under_the_deviation():
    rng = np.random.default_rng(0)
    votes = rng.normal(0.5, 2.0, size=(30, 4))
    expected = votes.mean(axis=0) / votes.std(axis=0, ddof=1) * np.sqrt(30)
    np.testing.assert_allclose(fleet_statistic(votes), expected)
    calm = np.full((9, 1), 0.5)
    assert fleet_statistic(calm) == pytest.approx(1.5)


# ── gaps ───────────────────────────────────────────────────────────────────────────────────────────────


def test_devices_that_miss_looks_keep_a_past_and_one_look_is_none():
    fleet = small(seed=9, devices=12, reference_windows=16, windows=1)
    components, _ = past_of(fleet)

    def change(index, reading):
        at = index_of(reading.device)
        return None if (at == 0 and index % 2) or (at == 1 and index) else reading

    past = Past(components, mapped(fleet.reference, change))
    assert fleet.device_ids[0] in past.devices
    assert fleet.device_ids[1] not in past.devices
    assert len(past.devices) == 11
    found = deviations(past, fleet.slices[0])
    assert found.devices == (fleet.device_ids[0], *fleet.device_ids[2:])
    assert not np.isnan(found.variance).any()
    assert past.deviations([fleet.slices[0].readings[1]]) is None


def test_a_past_of_one_look_is_refused_and_one_without_devices_too():
    fleet = small(seed=9, devices=12, reference_windows=2, windows=1)
    components = components_of(fleet.info)
    with pytest.raises(ValueError, match="two are needed"):
        Past(components, fleet.reference[:1])
    apart = mapped(fleet.reference, lambda k, r: r if index_of(r.device) % 2 == k % 2 else None)
    with pytest.raises(ValueError, match="no device has two looks"):
        Past(components, apart)


def test_a_past_of_hours_believes_less_in_the_tails_of_what_moves_with_them():
    def tails(looks, **traits):
        """By how much more the tails of a plain column may vary over a long time than they did from look to look."""
        fleet = small(seed=4, reference_windows=looks, windows=1, traits=Traits(**traits))
        components, past = past_of(fleet)
        variance = deviations(past, fleet.slices[0]).variance
        mine = (components.owners == 5) & (components.nature == SHAPE) & (components.cells == 1)
        return float(np.median((past.long_variance(variance) / variance)[:, mine]))

    assert tails(8) < 1.5
    assert tails(8, cycle=0.5) > 20.0
    assert tails(30, cycle=0.5) < 3.0  # the cycle is known


def test_devices_that_came_later_do_not_say_what_all_do_together():
    fleet = small(seed=5, reference_windows=16, windows=1)
    first = fleet.reference[:8]
    late = mapped(fleet.reference[8:], lambda k, r: r if index_of(r.device) >= 34 else None)
    both = Past(
        components_of(fleet.info),
        [*mapped(first, lambda k, r: r if index_of(r.device) < 34 else None), *late],
    )
    assert both.looks == 8
    assert len(both.devices) == 40
