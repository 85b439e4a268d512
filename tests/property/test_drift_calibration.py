"""How often the fleet verdict is wrong, and how often right, on fleets that are hard on row-level tests.

Every unit (training group or device) has its own habits (a normal offset per feature), its rows are autocorrelated
(AR 0.8), and one device sends twenty times as many rows as the others. The runs are seeded: these figures do not vary.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.stats import chi2

from aggregator.config import DriftConfig
from aggregator.core import drift
from aggregator.records import Block, Judgement
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import Reference
from edge_runtime.contract.profile import CellSpec, Profile, column_counts
from tests.support.fleet import A, count, make_spec

AUTOREGRESSION = 0.8
HABITS = 0.15
CONFIG = DriftConfig(alpha=0.05, psi_floor=0.0, cdf_floor=0.0, samples=999)


def rows_of(
    rng: np.random.Generator, n: int, features: int, habits: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """(n, features) stationary autoregressive rows of unit variance around the unit's habits (new ones if None)."""
    if habits is None:
        habits = rng.normal(0, HABITS, size=features)
    noise = rng.normal(size=(n, features))
    noise[1:] *= np.sqrt(1 - AUTOREGRESSION**2)
    rows: NDArray[np.float64] = lfilter([1.0], [1.0, -AUTOREGRESSION], noise, axis=0)
    return rows + habits


def fleet(
    rng: np.random.Generator,
    spec: CellSpec,
    *,
    groups: int,
    devices: int,
    rows: int,
    shift: NDArray[np.float64],
) -> tuple[list[Profile], list[Profile]]:
    """Profiles of the training groups and of the devices; ``shift`` (devices, features) is added to the devices."""
    features = len(spec.features)
    sizes = [rows * 20] + [rows] * (devices - 1)
    training = [count(spec, rows_of(rng, rows, features)) for _ in range(groups)]
    serving = [count(spec, rows_of(rng, n, features) + shift[i]) for i, n in enumerate(sizes)]
    return training, serving


def verdict(
    spec: CellSpec,
    training: list[Profile],
    serving: list[Profile],
    config: DriftConfig = CONFIG,
    *,
    before: Sequence[Profile] = (),
) -> Judgement:
    """The skew verdict; with the devices' profiles ``before``, the drift verdict."""
    total = training[0]
    for profile in training[1:]:
        total = total.merge(profile)
    groups = tuple((f"g{i}", profile) for i, profile in enumerate(training))
    blocks = [
        Block(
            device=DeviceId(f"d{i}"),
            profile=p,
            rows=p.rows,
            first=i,
            last=i,
            windows=1,
            seconds=1.0,
            labelled=0,
            correct=0,
        )
        for i, p in enumerate(serving)
    ]
    look = drift.Look(
        digest=A,
        reference=Reference(spec=spec, total=total, groups=groups),
        labels=("a", "b", "c"),
        blocks=tuple(blocks),
        attributes={},
        baseline=None,
        origins={DeviceId(f"d{i}"): profile for i, profile in enumerate(before)},
    )
    return drift.judge(look, config).judgements["fleet", "drift" if before else "skew"]


def pooled_chi_square(spec: CellSpec, training: list[Profile], serving: list[Profile]) -> bool:
    """What counting rows would say at 5 %, Bonferroni over features."""
    smallest = 1.0
    for j in range(len(spec.features)):
        table = np.stack(
            [np.sum([column_counts(spec, p, j) for p in side], axis=0) for side in (training, serving)]
        ).astype(float)
        table = table[:, table.sum(axis=0) > 0]
        expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
        statistic = ((table - expected) ** 2 / expected).sum()
        smallest = min(smallest, float(chi2.sf(statistic, table.shape[1] - 1)))
    return smallest * len(spec.features) <= CONFIG.alpha


def test_false_alarms_stay_near_nominal_where_counting_rows_always_alarms():
    spec, runs = make_spec(features=6), 100
    rng = np.random.default_rng(1)
    alarms = naive = 0
    for _ in range(runs):
        training, serving = fleet(rng, spec, groups=6, devices=10, rows=300, shift=np.zeros((10, 6)))
        alarms += verdict(spec, training, serving).p <= CONFIG.alpha
        naive += pooled_chi_square(spec, training, serving)
    print(f"false alarms {alarms / runs:.3f} at nominal {CONFIG.alpha}, pooled chi-square {naive / runs:.3f}")
    assert alarms <= 0.10 * runs
    assert naive >= 0.95 * runs


@pytest.mark.parametrize(("rows", "least"), [(300, 0.6), (1000, 0.9)])
def test_half_a_standard_deviation_in_every_device_is_found_and_named(rows, least):
    spec, runs = make_spec(features=6), 60
    rng = np.random.default_rng(2)
    shift = np.zeros((10, 6))
    shift[:, 3] = 0.5
    found = named = wrongly = 0
    for _ in range(runs):
        judgement = verdict(spec, *fleet(rng, spec, groups=6, devices=10, rows=rows, shift=shift))
        found += judgement.p <= CONFIG.alpha
        named += "f3" in judgement.moved
        wrongly += bool(set(judgement.moved) - {"f3"})
    print(
        f"{rows} rows: power {found / runs:.3f}, named {named / runs:.3f}, others named {wrongly / runs:.3f}"
    )
    assert found >= least * runs
    assert named >= least * runs
    assert wrongly <= 0.10 * runs


def test_against_their_own_past_devices_may_differ_as_much_as_they_like():
    """Habits three times the rows' own spread: skew could see nothing, drift keeps its level and its power."""
    spec, runs = make_spec(features=6), 50
    rng = np.random.default_rng(6)
    shift = np.zeros(6)
    shift[3] = 0.5
    alarms = found = 0
    training = [count(spec, rng.normal(size=(300, 6))) for _ in range(3)]
    sizes = [6000] + [300] * 11
    for _ in range(runs):
        habits = rng.normal(0, 3.0, size=(12, 6)).clip(-2, 2)
        before, same, moved = (
            [count(spec, rows_of(rng, n, 6, own + extra)) for n, own in zip(sizes, habits, strict=True)]
            for extra in (np.zeros(6), np.zeros(6), shift)
        )
        alarms += verdict(spec, training, same, before=before).p <= CONFIG.alpha
        found += "f3" in verdict(spec, training, moved, before=before).moved
    print(f"drift: false alarms {alarms / runs:.3f}, power {found / runs:.3f}")
    assert alarms <= 0.10 * runs
    assert found >= 0.5 * runs


def test_one_broken_device_raises_no_fleet_verdict():
    spec, runs = make_spec(features=6), 40
    rng = np.random.default_rng(3)
    shift = np.zeros((10, 6))
    shift[0] = 30.0  # the chatty one, stuck far outside
    alarms = sum(
        verdict(spec, *fleet(rng, spec, groups=6, devices=10, rows=300, shift=shift)).p <= CONFIG.alpha
        for _ in range(runs)
    )
    assert alarms <= 0.10 * runs


def test_real_but_tiny_is_no_alarm():
    """Hardly any noise, forty devices: p is as small as it gets, and the magnitude floor holds."""
    spec = make_spec(features=6)
    rng = np.random.default_rng(4)
    training = [count(spec, rng.normal(size=(20_000, 6))) for _ in range(12)]
    serving = [count(spec, rng.normal(0.05, 1, size=(20_000, 6))) for _ in range(12)]
    config = replace(CONFIG, variance_floor=1e-9)
    assert verdict(spec, training, serving, config).outcome == drift.MOVED
    floored = verdict(spec, training, serving, replace(config, psi_floor=0.1, cdf_floor=0.1))
    assert floored.outcome == drift.STABLE
    assert floored.p <= 0.001
    assert "below the magnitude floors" in floored.reason


@pytest.mark.slow
def test_a_larger_fleet_with_more_features():
    """Forty devices, twelve groups, thirty features; habits as large as a third of a standard deviation."""
    spec, runs = make_spec(features=30), 300
    rng = np.random.default_rng(5)
    alarms = naive = 0
    for _ in range(runs):
        training, serving = fleet(rng, spec, groups=12, devices=40, rows=300, shift=np.zeros((40, 30)))
        alarms += verdict(spec, training, serving).p <= CONFIG.alpha
        naive += pooled_chi_square(spec, training, serving)
    found = 0
    for _ in range(60):
        shift = np.full((40, 30), 0.0)
        shift[:, 7] = 0.3
        found += (
            verdict(spec, *fleet(rng, spec, groups=12, devices=40, rows=300, shift=shift)).p <= CONFIG.alpha
        )
    print(
        f"false alarms {alarms / runs:.3f}, pooled chi-square {naive / runs:.3f}, power at 0.3 {found / 60:.3f}"
    )
    assert alarms <= 0.08 * runs
    assert naive >= 0.99 * runs
    assert found >= 0.7 * 60
