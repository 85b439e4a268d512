"""Has the world moved? The verdict of one look at a fleet that runs one artifact.

The unit is the device (and the training group), never the row: see `aggregator.core.permutation`. Four
kinds:

- ``skew``: the inputs of the devices against the training groups. Pooled training rows would not do: they are
  a few units themselves, and testing against them alarms in nearly every drift-free run.
- ``drift``: the inputs of each device against its own first look under this artifact. What devices differ in
  from each other cancels, so a change in part of a fleet is seen that skew has no power for.
- ``prediction``: the outputs of the devices against the *baseline*, the outputs of those devices at the
  artifact's first look whose inputs the training covers. Not against training: a model is surer of rows it
  was fitted on.
- ``performance``: the share of right answers, where truth is known, against the same baseline; only a drop
  counts.

Each test of each cohort is held to alpha / (cohorts judged), so one look names any cohort wrongly with
probability of at most alpha per kind. A look covers, for each device, a block of windows long enough for what
the device does in a cycle; looks do not overlap. What looks in a row mean is `aggregator.core.incidents`'
business.

Statistically real is not enough: a column has *moved* when its adjusted p is small **and** PSI or the largest
difference of the distribution functions reaches its floor.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from aggregator.config import DriftConfig
from aggregator.core import cohorts, figures, permutation
from aggregator.core.figures import ColumnFigures, Columns
from aggregator.records import Block, Figure, Judgement, Unit
from edge_runtime.contract.ids import DeviceId, Digest
from edge_runtime.contract.manifest import Reference
from edge_runtime.contract.profile import Profile

KINDS: Final = ("skew", "drift", "prediction", "performance")
STABLE: Final = "stable"
MOVED: Final = "moved"
INSUFFICIENT: Final = "insufficient"


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What a device has sent since the last look that it was part of."""

    device: DeviceId
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether to look now; ``left_out`` names the devices that do not cover the horizon yet, and by how much."""

    ready: bool
    covered: tuple[DeviceId, ...]
    left_out: tuple[tuple[DeviceId, str], ...]
    reason: str


def covers(c: Coverage, config: DriftConfig) -> bool:
    """Whether what the device sent spans the horizon."""
    return c.rows >= config.horizon_rows and c.seconds >= config.horizon_seconds


def readiness(active: Sequence[Coverage], waited_seconds: float, config: DriftConfig) -> Readiness:
    """Decides on a look from what the active devices have sent in ``waited_seconds`` since the last one."""
    covered, left_out = [], []
    for c in active:
        if covers(c, config):
            covered.append(c.device)
        else:
            lacks = (
                f"{c.rows} of {config.horizon_rows} rows, {c.seconds:.0f} of {config.horizon_seconds:.0f} s"
            )
            left_out.append((c.device, lacks))
    enough = len(covered) >= config.min_devices
    waited = waited_seconds >= config.patience_seconds
    quorate = bool(active) and len(covered) >= config.quorum * len(active)
    return Readiness(
        ready=enough and (quorate or waited),
        covered=tuple(covered),
        left_out=tuple(left_out),
        reason=f"{len(covered)} of {len(active)} active devices cover the horizon; {config.min_devices} are needed",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Everything one look judges: the artifact's reference, one block per device, and what the devices are.

    ``baseline`` and ``origins`` come from earlier looks at the artifact: the outputs to compare with, and
    each device's own first profile.
    """

    digest: Digest
    reference: Reference
    labels: tuple[object, ...]
    blocks: tuple[Block, ...]
    attributes: Mapping[DeviceId, Mapping[str, str]]
    baseline: tuple[Unit, ...] | None
    origins: Mapping[DeviceId, Profile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """One judgement per (cohort, kind), the devices of each cohort, and the baseline, made now if there was none."""

    judgements: Mapping[tuple[str, str], Judgement]
    devices: Mapping[str, tuple[DeviceId, ...]]
    baseline: tuple[Unit, ...] | None


@dataclass(frozen=True, slots=True)
class _Terms:
    """What one test is held to."""

    config: DriftConfig
    level: float
    seed: int


def judge(look: Look, config: DriftConfig) -> Findings:
    """Judges the fleet and every cohort, each kind."""
    blocks = {block.device: block for block in look.blocks}
    members = cohorts.split(blocks, look.attributes, config.attributes)
    level = config.alpha / max(1, sum(len(devices) >= config.min_devices for devices in members.values()))
    chosen = {
        cohort: _capped([blocks[d] for d in devices], config.max_devices, look.digest)
        for cohort, devices in members.items()
    }
    found: dict[tuple[str, str], Judgement] = {}
    for cohort in members:
        terms = _Terms(config, level, _seed(look, cohort, "skew"))
        found[cohort, "skew"] = _skew(look, chosen[cohort], terms)
        terms = _Terms(config, level, _seed(look, cohort, "drift"))
        found[cohort, "drift"] = _drift(look, chosen[cohort], terms)
    baseline = look.baseline or _baseline(members, found, blocks, config)
    for cohort in members:
        terms = _Terms(config, level, _seed(look, cohort, "prediction"))
        found[cohort, "prediction"] = _prediction(look, baseline or (), chosen[cohort], terms)
        terms = _Terms(config, level, _seed(look, cohort, "performance"))
        found[cohort, "performance"] = _performance(baseline or (), chosen[cohort], terms)
    return Findings(judgements=found, devices=members, baseline=baseline)


def _seed(look: Look, cohort: str, kind: str) -> int:
    """The same look draws the same dealings, wherever it is judged."""
    last = max((block.last for block in look.blocks), default=0)
    return zlib.crc32(f"{look.digest} {cohort} {kind} {last}".encode())


def _capped(blocks: list[Block], limit: int, digest: Digest) -> list[Block]:
    """At most ``limit`` blocks, always the same devices for one artifact: a test's cost must not grow with
    the fleet.
    """
    if len(blocks) <= limit:
        return blocks
    return sorted(blocks, key=lambda block: zlib.crc32(f"{digest} {block.device}".encode()))[:limit]


def _lacking(reference: int, fleet: int, needs: int, what: str, terms: _Terms) -> str:
    """Why ``reference`` and ``fleet`` units cannot be judged; empty when they can."""
    config = terms.config
    if fleet < config.min_devices:
        return f"{fleet} devices cover the horizon; {config.min_devices} are needed"
    if reference < needs:
        return f"{reference} {what}; {needs} are needed"
    smallest = permutation.smallest_p(
        reference, fleet, exact_limit=config.exact_limit, samples=config.samples
    )
    return _unreachable(smallest, f"{reference} {what} and {fleet} devices", terms)


def _unreachable(smallest: float, units: str, terms: _Terms) -> str:
    if smallest <= terms.level:
        return ""
    return (
        f"{units} allow no p below {smallest:.4f}, the level is {terms.level:.4f}: "
        "more devices or a larger alpha are needed"
    )


def _insufficient(reason: str, reference: int, fleet: int, terms: _Terms) -> Judgement:
    return Judgement(
        outcome=INSUFFICIENT,
        reason=reason,
        alpha=terms.level,
        reference_units=reference,
        fleet_units=fleet,
    )


def _skew(look: Look, blocks: list[Block], terms: _Terms) -> Judgement:
    groups = [profile for _, profile in look.reference.groups if profile.rows]
    lacking = _lacking(len(groups), len(blocks), terms.config.min_groups, "training groups", terms)
    if not look.reference.groups:
        lacking = "the artifact has no training groups to compare devices with: convert(…, groups=…)"
    if lacking:
        return _insufficient(lacking, len(groups), len(blocks), terms)
    spec = look.reference.spec
    fleet = [block.profile for block in blocks]
    columns = figures.input_columns(spec, [*groups, *fleet])
    readings = [figures.column_figures(spec, j, groups, fleet) for j in range(len(spec.features))]
    test = _compare(columns, len(groups), terms)
    return _judgement(columns.names, readings, test, (len(groups), len(fleet)), terms)


def _drift(look: Look, blocks: list[Block], terms: _Terms) -> Judgement:
    config = terms.config
    known = [block for block in blocks if block.device in look.origins]
    n = len(known)
    smallest = permutation.smallest_p_of_pairs(n, exact_limit=config.exact_limit, samples=config.samples)
    lacking = _unreachable(smallest, f"{n} devices with a past", terms)
    if n < config.min_devices:
        lacking = f"{n} devices were part of an earlier look; {config.min_devices} are needed"
    if lacking:
        return _insufficient(lacking, n, n, terms)
    spec = look.reference.spec
    before, now = [look.origins[block.device] for block in known], [block.profile for block in known]
    columns = figures.input_columns(spec, [*before, *now])
    test = permutation.compare_pairs(
        columns.values[n:] - columns.values[:n],
        columns.owners,
        floor=config.variance_floor,
        exact_limit=config.exact_limit,
        samples=config.samples,
        seed=terms.seed,
    )
    readings = [figures.column_figures(spec, j, before, now) for j in range(len(spec.features))]
    return _judgement(columns.names, readings, test, (n, n), terms)


def _prediction(look: Look, baseline: Sequence[Unit], blocks: list[Block], terms: _Terms) -> Judgement:
    before = [unit.profile for unit in baseline]
    lacking = _lacking(len(before), len(blocks), terms.config.min_devices, "baseline devices", terms)
    if lacking:
        return _insufficient(lacking, len(before), len(blocks), terms)
    spec = look.reference.spec
    fleet = [block.profile for block in blocks]
    columns = figures.output_columns(spec, [*before, *fleet], look.labels)
    readings = [figures.column_figures(spec, len(spec.features), before, fleet)]
    for owner in range(1, len(columns.names)):
        share = columns.values[:, columns.owners == owner][:, 0]
        readings.append(figures.share_figures(share[: len(before)], share[len(before) :]))
    test = _compare(columns, len(before), terms)
    return _judgement(columns.names, readings, test, (len(before), len(fleet)), terms)


def _performance(baseline: Sequence[Unit], blocks: list[Block], terms: _Terms) -> Judgement:
    config = terms.config
    before = _accuracies([(u.labelled, u.correct) for u in baseline], config.min_labelled)
    now = _accuracies([(b.labelled, b.correct) for b in blocks], config.min_labelled)
    what = "baseline devices with known truth"
    lacking = _lacking(len(before), len(now), config.min_devices, what, terms)
    if len(now) < config.min_devices:
        lacking = (
            f"{len(now)} devices know {config.min_labelled} true answers; {config.min_devices} are needed"
        )
    if lacking:
        return _insufficient(lacking, len(before), len(now), terms)
    columns = Columns(
        names=("accuracy",), values=np.concatenate([before, now])[:, None], owners=np.zeros(1, np.int64)
    )
    test = _compare(columns, len(before), terms, one_sided=True)
    dropped = float(before.mean() - now.mean()) >= config.accuracy_floor
    moved = test.p <= terms.level and dropped
    reading = figures.share_figures(before, now)
    return Judgement(
        outcome=MOVED if moved else STABLE,
        reason=f"accuracy {_interval(now)} now, {_interval(before)} at the baseline",
        p=test.p,
        alpha=terms.level,
        reference_units=len(before),
        fleet_units=len(now),
        permutations=test.permutations,
        exact=test.exact,
        figures=(_figure("accuracy", reading, test.p, float(test.statistic[0]), moved=moved),),
    )


def _accuracies(counts: Sequence[tuple[int, int]], min_labelled: int) -> NDArray[np.float64]:
    return np.array([correct / labelled for labelled, correct in counts if labelled >= min_labelled])


def _interval(values: NDArray[np.float64]) -> str:
    """The mean over devices with Student's 95 % interval: the device is the unit, its rows are not."""
    half = float(stdtrit(len(values) - 1, 0.975)) * float(values.std(ddof=1)) / len(values) ** 0.5
    return f"{values.mean():.3f} ± {half:.3f} over {len(values)} devices"


def _compare(
    columns: Columns, reference: int, terms: _Terms, *, one_sided: bool = False
) -> permutation.Comparison:
    return permutation.compare(
        columns.values[:reference],
        columns.values[reference:],
        columns.owners,
        floor=terms.config.variance_floor,
        exact_limit=terms.config.exact_limit,
        samples=terms.config.samples,
        seed=terms.seed,
        one_sided=one_sided,
    )


def _figure(name: str, reading: ColumnFigures, p: float, statistic: float, *, moved: bool) -> Figure:
    return Figure(
        name=name,
        p=p,
        statistic=statistic,
        moved=moved,
        psi=reading.psi,
        ks=reading.ks,
        js_bits=reading.js_bits,
        wasserstein_sd=reading.wasserstein_sd,
        mean_shift_sd=reading.mean_shift_sd,
        missing=reading.missing,
        cut=reading.cut,
        below=reading.below,
        broad=reading.broad,
    )


def _judgement(
    names: Sequence[str],
    readings: Sequence[ColumnFigures],
    test: permutation.Comparison,
    units: tuple[int, int],
    terms: _Terms,
) -> Judgement:
    """The judgement of ``test``, whose owners have these ``names`` and ``readings``."""
    config = terms.config
    found = []
    for j, (name, reading) in enumerate(zip(names, readings, strict=True)):
        missing = abs(reading.missing[1] - reading.missing[0])
        large = reading.psi >= config.psi_floor or max(reading.ks, missing) >= config.cdf_floor
        p, statistic = float(test.owner_p[j]), float(test.statistic[j])
        found.append(_figure(name, reading, p, statistic, moved=p <= terms.level and large))
    found.sort(key=lambda figure: (-figure.moved, figure.p, -figure.statistic))
    moved = [figure for figure in found if figure.moved]
    if moved:
        reason = f"{len(moved)} of {len(found)} columns moved, most of all {moved[0].name}"
    elif test.p <= terms.level:
        reason = "differences are real but below the magnitude floors"
    else:
        reason = f"p {test.p:.4f} is above the level {terms.level:.4f}"
    return Judgement(
        outcome=MOVED if moved else STABLE,
        reason=reason,
        p=test.p,
        alpha=terms.level,
        reference_units=units[0],
        fleet_units=units[1],
        permutations=test.permutations,
        exact=test.exact,
        figures=tuple(found),
    )


def _baseline(
    members: Mapping[str, tuple[DeviceId, ...]],
    found: Mapping[tuple[str, str], Judgement],
    blocks: Mapping[DeviceId, Block],
    config: DriftConfig,
) -> tuple[Unit, ...] | None:
    """The devices whose inputs the training covers, as far as this look can tell; None when they are too few.

    A device counts by the cohorts of its attributes that could be judged, else by the fleet's verdict. When
    skew cannot be judged at all (no groups), every device counts: its start is all there is to compare with.
    """
    outcome = {cohort: found[cohort, "skew"].outcome for cohort in members}
    units = []
    for device, block in blocks.items():
        own = [
            outcome[cohort]
            for cohort, devices in members.items()
            if cohort != cohorts.FLEET and device in devices and outcome[cohort] != INSUFFICIENT
        ]
        if MOVED not in (own or [outcome[cohorts.FLEET]]):
            units.append(
                Unit(device=device, profile=block.profile, labelled=block.labelled, correct=block.correct)
            )
    return tuple(units) if len(units) >= config.min_devices else None
