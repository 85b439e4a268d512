"""The simulated fleets have the properties that they are named for, and the faults that they are given."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from edge_runtime.contract.profile import class_counts, merge_all
from tests.simulators.stream_faults import TAIL_AT
from tests.simulators.stream_rows import answer
from tests.simulators.streams import SCENARIOS, Fault, Fleet, Traits

SMALL = Fleet(seed=3, devices=6, features=10, windows=30, reference_windows=5)
PLAIN = {name: replace(SMALL, traits=traits) for name, traits in SCENARIOS.items()}


def rows(fleet: Fleet, device: int = 1):
    """(F, windows, rows) of all windows from 0 on."""
    whole = np.concatenate([stretch.values for stretch in fleet.stream(device)], axis=1)
    return whole[:, fleet.reference_windows :]


def lag_one(x):
    x = x.reshape(len(x), -1)
    return np.array([np.corrcoef(line[:-1], line[1:])[0, 1] for line in x])


def test_independent_rows_are_standard_normal_and_uncorrelated():
    x = rows(PLAIN["iid"])
    assert abs(x.mean()) < 0.02
    assert abs(x.std() - 1) < 0.02
    assert np.abs(lag_one(x)).max() < 0.06


def test_autoregression_holds_across_windows_and_stretches_and_keeps_unit_variance():
    fleet = replace(PLAIN["ar"], rows=1000, windows=40)
    x = rows(fleet)
    np.testing.assert_allclose(lag_one(x), 0.8, atol=0.02)
    assert abs(x.std() - 1) < 0.03
    seams = np.corrcoef(x[:, :-1, -1].ravel(), x[:, 1:, 0].ravel())[0, 1]
    assert seams == pytest.approx(0.8, abs=0.1)  # 390 pairs


def test_units_differ_as_they_should_and_training_units_come_from_the_same_population():
    fleet = replace(SMALL, traits=Traits(offset_sd=0.3, scale_sd=0.2), devices=40, windows=10, groups=20)
    devices = np.stack([rows(fleet, i).reshape(10, -1) for i in range(40)])
    training = np.stack([unit.T for unit, _ in fleet.training])
    for units in (devices, training):
        assert units.mean(axis=2).std() == pytest.approx(0.3, rel=0.12)
        assert np.log(units.std(axis=2)).std() == pytest.approx(0.2, rel=0.12)


def test_the_day_is_common_to_all_or_each_device_has_its_own_share():
    for name, spread in (("cycle", 0.0), ("cycle-varied", 0.5)):
        fleet = replace(PLAIN[name], windows=48, rows=1000, devices=30)
        hours = np.arange(48) + 0.5
        wave = np.sin(2 * np.pi * hours / 24)
        amplitudes = np.array([rows(fleet, i).mean(axis=2) @ wave / (wave @ wave) for i in range(30)])
        assert np.log(amplitudes).mean() == pytest.approx(np.log(0.5), abs=0.1)
        assert np.log(amplitudes).std() == pytest.approx(spread, abs=0.06)


def test_one_device_talks_twenty_times_as_much():
    fleet = PLAIN["chatty"]
    sizes = [reading.profile.rows for reading in fleet.slices[0].readings]
    assert sizes == [5000, 250, 250, 250, 250, 250]


def test_blocks_of_columns_have_a_factor_in_common():
    x = np.corrcoef(rows(replace(PLAIN["correlated"], rows=1000)).reshape(10, -1))
    inside = x[:5, :5][~np.eye(5, dtype=bool)]
    np.testing.assert_allclose(inside, 0.6, atol=0.05)
    np.testing.assert_allclose(x[:5, 5:], 0, atol=0.06)


def test_mixed_columns_have_their_shapes():
    x = rows(PLAIN["mixed"])
    binary, integer, constant, heavy, zeros, category = x[4:]
    assert set(np.unique(binary)) == {0, 1}
    assert (integer == np.rint(integer)).all()
    assert np.unique(constant) == [3]
    assert heavy.max() > 20 * np.median(heavy) > 0
    assert 0.5 < (zeros == 0).mean() < 0.9
    assert (np.diff(np.bincount(category.astype(int).ravel())) < 0).all()


def test_the_same_seed_gives_the_same_rows_and_another_gives_others():
    fleet = PLAIN["everything"]
    assert fleet.slices == replace(fleet).slices
    assert fleet.slices[0].readings[0].profile != replace(fleet, seed=4).slices[0].readings[0].profile


@pytest.mark.parametrize(
    ("fault", "holds"),
    [
        (Fault("mean", 0.5), lambda old, new: np.allclose(new - old, 0.5, atol=1e-5)),
        (Fault("offset", 0.5), lambda old, new: np.allclose(new - old, 0.5, atol=1e-5)),
        (Fault("mean", 1.0, ramp=10), lambda old, new: np.allclose((new - old)[4], 0.5, atol=1e-5)),
        (Fault("scale", 1.5), lambda old, new: np.allclose(new, 1.5 * old, atol=1e-5)),
        (Fault("tail", 0.02), lambda old, new: 0.01 < (new == TAIL_AT).mean() < 0.03),
        (Fault("stuck", 0.3), lambda old, new: abs((np.diff(new.ravel()) == 0).mean() - 0.3) < 0.05),
        (Fault("stuck", 1.0), lambda old, new: np.unique(new).size == 1),
        (Fault("clipped", 1.0), lambda old, new: np.array_equal(new, np.minimum(old, 1))),
        (Fault("missing", 0.1), lambda old, new: abs(np.isnan(new).mean() - 0.1) < 0.03),
        (Fault("noise", 2.0), lambda old, new: abs((new - old).std() - 2) < 0.1),
        (Fault("dead", -1.0), lambda old, new: (new == -1).all()),
    ],
    ids=lambda value: f"{value.kind}-{value.size}" if isinstance(value, Fault) else "",
)
def test_a_fault_changes_its_cells_and_nothing_else(fault, holds):
    fault = replace(fault, share=0.5)
    healthy, faulty = PLAIN["ar"], replace(PLAIN["ar"], faults=(fault,))
    for device in range(6):
        old, new = rows(healthy, device), rows(faulty, device)
        if device >= 3:
            assert holds(old[7, 20:], new[7, 20:])
            new[7, 20:] = old[7, 20:]
        np.testing.assert_array_equal(old, new)


def test_a_correlation_leaves_the_marginals_and_moves_the_predictions():
    healthy = replace(PLAIN["ar"], rows=2000, windows=30)
    faulty = replace(healthy, faults=(Fault("correlation", 0.9, columns=(2, 3)),))
    x = rows(faulty)
    assert np.corrcoef(x[2, 20:].ravel(), x[3, 20:].ravel())[0, 1] == pytest.approx(0.9, abs=0.03)
    assert abs(np.corrcoef(x[2, :20].ravel(), x[3, :20].ravel())[0, 1]) < 0.05
    assert x[3, 20:].std() == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(lag_one(x[2:4, 20:]), 0.8, atol=0.03)
    (before, after) = (
        class_counts(healthy.spec, f.slices[25].readings[2].profile)[1] for f in (healthy, faulty)
    )
    assert after > before + 150  # of 2,000


def test_unseen_categories_and_turned_labels():
    fleet = replace(
        PLAIN["mixed"],
        labelled=True,
        faults=(Fault("unseen", 0.2, columns=(9,)), Fault("concept", 0.3, columns=())),
    )
    x = rows(fleet)[9]
    assert (x[:20] >= 0).all()
    assert (x[20:] == -1).mean() == pytest.approx(0.2, abs=0.03)
    shares = [np.mean([r.correct / r.labelled for r in s.readings]) for s in fleet.slices]
    assert np.mean(shares[:20]) - np.mean(shares[20:]) > 0.08


def test_truth_follows_the_world_and_not_a_sensor():
    right = {}
    for kind in ("mean", "offset"):
        fleet = replace(PLAIN["iid"], labelled=True, faults=(Fault(kind, 3.0, columns=(0,)),))
        readings = [r for s in fleet.slices[20:] for r in s.readings]
        right[kind] = sum(r.correct for r in readings) / sum(r.labelled for r in readings)
    assert right["mean"] > right["offset"] + 0.2


def test_profiles_are_sound_and_the_artifact_says_what_it_was_trained_on():
    for fleet in PLAIN.values():
        for reading in (*fleet.reference[0].readings, *fleet.slices[-1].readings):
            reading.profile.check(fleet.spec)
        groups = [profile for _, profile in fleet.info.reference.groups]
        assert merge_all(fleet.spec, groups, probabilities=True) == fleet.info.reference.total
        assert [s.index for s in fleet.slices] == list(range(30))
        assert fleet.reference[-1].end_ns == fleet.slices[0].start_ns


def test_the_files_hold_the_rows_that_were_counted(tmp_path):
    faults = (Fault("missing", 0.1, columns=(1, 9)), Fault("unseen", 0.1, columns=(9,)))
    fleet = replace(PLAIN["everything"], labelled=True, faults=faults)
    fleet.write(tmp_path / "data.parquet", tmp_path / "reference.parquet")
    data, reference = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("data", "reference"))
    assert data.column_names == ["device", "time", *fleet.names, "label"]
    assert reference.num_rows == sum(r.profile.rows for s in fleet.reference for r in s.readings)
    found = data.filter(np.asarray(data["device"]) == "device-0002").to_pandas()
    x = rows(fleet, 2).reshape(10, -1)
    np.testing.assert_array_equal(found["f1"], x[1])
    assert (found["f9"] == "new").sum() == (x[9] == -1).sum() > 0
    assert found["f9"].isna().sum() == np.isnan(x[9]).sum() > 0
    assert found["time"].is_monotonic_increasing
    start = found["time"].iloc[250 * 7].value
    assert fleet.slices[7].start_ns <= start * (1 if start > 1e18 else 1000) < fleet.slices[7].end_ns
    labels, _ = answer(x)
    right = (np.where(labels == 1, "yes", "no") == found["label"]).sum()
    assert right == sum(s.readings[2].correct for s in fleet.slices)


def test_training_files(tmp_path):
    fleet = PLAIN["mixed"]
    fleet.write_training(tmp_path / "training.parquet")
    table = pq.read_table(tmp_path / "training.parquet")
    assert table.num_rows == 6 * fleet.group_rows
    assert set(table["label"].to_pylist()) == {"yes", "no"}


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="one of mean"):
        Fault("gremlins", 1.0)
    with pytest.raises(ValueError, match="two columns"):
        Fault("correlation", 0.5)
    with pytest.raises(ValueError, match="four plain columns"):
        Fleet(features=8, traits=SCENARIOS["mixed"])
    with pytest.raises(ValueError, match="marginals"):
        Fleet(traits=SCENARIOS["correlated"], faults=(Fault("correlation", 0.5, columns=(2, 3)),))
