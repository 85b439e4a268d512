"""Devices against other units: the training's groups, or devices that were seen before.

Nothing says how these would have looked on their own past, so what tells is whether they look like the others. The unit
is a group or a device. Pooled training rows would not do: they are a few units themselves, and testing against them
alarms in nearly every drift-free run. Where no groups were given, the whole training is one unit, and it is asked
whether it could be one more device: a test that only gross differences pass.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from aggregator.config import DriftConfig
from aggregator.core import permutation
from aggregator.core.components import FAULT_WORDS, FAULTS, Components, Matrix
from aggregator.core.evidence import to_normal, without_strongest
from aggregator.core.findings import (
    category,
    fault_as_evidence,
    figures_as_evidence,
    kind_of,
    percent,
    probability,
)
from aggregator.core.own_past import Terms
from aggregator.core.speaking import speaker
from aggregator.looks import Familiar, Finding
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SkewTest:
    """``z`` (K,) signed scores (0 where not tested), ``p`` (owners,) adjusted; 1 for owners without components.

    ``lasting`` (K,) are the scores without the few devices that show each component's movement most. ``there`` and
    ``here`` (K,) are the means of the other units and of the devices, NaN where there is none.
    """

    z: Matrix
    p: Matrix
    units: int
    lasting: Matrix
    there: Matrix
    here: Matrix

    def broad(self, at: int, level: float) -> bool:
        """Whether component ``at`` moved in more than a few devices."""
        return bool(self.lasting[at] * np.sign(self.z[at]) >= -special.ndtri(level))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shared:
    """``variance`` (K,) of the devices' mean from look to look, because of what they all do, and its ``freedom``."""

    variance: Matrix
    freedom: Matrix


def against_groups(
    groups: Sequence[Profile],
    devices: Sequence[Profile],
    components: Components,
    shared: Shared,
    config: DriftConfig,
    *,
    level: float,
    seed: int,
    outputs: bool = False,
) -> SkewTest:
    """Permutes units between ``groups`` and ``devices``, studentised, max-T.

    What the devices have in common from look to look no dealing of them shows, so a column's p is also at least that of
    Student's test with the variance of it, times the number of columns. Dealings are looked at
    only where p could reach ``level``. With ``outputs`` the components of the outputs are compared, else those of the
    inputs.
    """
    chosen = ~components.inputs if outputs else components.inputs
    values = [components.sample(units).values for units in (groups, devices)]
    there, here = (_known_mean(side, np.nan) for side in values)
    sides = [side[:, chosen] for side in values]
    first, second = _filled(sides[0], sides[1]), _filled(sides[1], sides[0])
    varying = np.ptp(np.concatenate([first, second]), axis=0) > 0
    at = np.flatnonzero(chosen)[varying]
    z, p = np.zeros(components.size), np.ones(len(components.names))
    if not at.size:
        return SkewTest(z=z, p=p, units=len(groups), lasting=z, there=there, here=here)
    first, second = first[:, varying], second[:, varying]
    part = Shared(variance=shared.variance[at], freedom=shared.freedom[at])
    z[at] = _welch(first, second, part, config.variance_floor)
    tail = 2.0 * special.ndtr(-_strongest(components, z))
    lasting = z.copy()
    if float(tail.min()) > level:
        p = np.minimum(1.0, at.size * tail)
        return SkewTest(z=z, p=p, units=len(groups), lasting=lasting, there=there, here=here)
    rest = _without_strongest(second, z[at], config.few_share)
    lasting[at] = _welch(first, rest, part, config.variance_floor)
    found, owners = np.unique(components.owners[at], return_inverse=True)
    result = permutation.compare(
        first,
        second,
        owners.astype(np.int64),
        floor=config.variance_floor,
        exact_limit=config.exact_limit,
        samples=config.samples,
        seed=seed,
        enough=config.enough,
    )
    p[found] = result.owner_p
    together = np.zeros(len(components.names), np.bool_)
    np.logical_or.at(together, components.owners, shared.variance > 0)
    p = np.where(together, np.maximum(p, np.minimum(1.0, len(found) * tail)), p)
    return SkewTest(z=z, p=p, units=len(groups), lasting=lasting, there=there, here=here)


def _welch(first: Matrix, second: Matrix, shared: Shared, floor: float) -> Matrix:
    """(K,) scores of the second units against the first, with Welch's degrees of freedom."""
    parts = [x.var(axis=0, ddof=1) / len(x) for x in (first, second)]
    total = np.maximum(parts[0] + parts[1], floor) + shared.variance
    # What the floor adds is known, not estimated.
    lost = parts[0] ** 2 / (len(first) - 1) + parts[1] ** 2 / (len(second) - 1)
    freedom = total**2 / (lost + shared.variance**2 / shared.freedom + 1e-300)
    return to_normal((second.mean(axis=0) - first.mean(axis=0)) / np.sqrt(total), freedom)


def _without_strongest(devices: Matrix, z: Matrix, share: float) -> Matrix:
    """(m, K) the devices' values without the few that are furthest to the side of ``z``, component by component."""
    sign = np.where(z < 0, -1.0, 1.0)
    return without_strongest(devices * sign, share) * sign


def _strongest(components: Components, z: Matrix) -> Matrix:
    """(owners,) the largest absolute score of each column."""
    found = np.zeros(len(components.names))
    np.maximum.at(found, components.owners, np.abs(z))
    return found


def against_pool(
    pool: Profile, devices: Sequence[Profile], components: Components, shared: Shared, config: DriftConfig
) -> SkewTest:
    """Whether ``pool`` could be one more of ``devices``: Student's test of a new observation, Bonferroni's bound."""
    sides = [components.sample(units).values for units in ([pool], devices)]
    pooled, values = _filled(sides[0], sides[1])[0], _filled(sides[1], sides[0])
    grain = components.variance_of_a_row(values.mean(axis=0)) / max(
        1.0, float(np.mean([d.rows for d in devices]))
    )

    def scores(values: Matrix) -> Matrix:
        n = len(values)
        # Tails vary from unit to unit more than Student's distribution knows: the floor leaves them out.
        own = np.maximum((values.var(axis=0, ddof=1) + grain) * (1.0 + 1.0 / n), config.variance_floor)
        total = own + shared.variance
        freedom = total**2 / (own**2 / (n - 1.0) + shared.variance**2 / shared.freedom)
        found = to_normal((values.mean(axis=0) - pooled) / np.sqrt(total), freedom)
        return np.where(components.inputs, found, 0.0)

    z = scores(values)
    p = np.minimum(1.0, 2.0 * int(components.inputs.sum()) * special.ndtr(-_strongest(components, z)))
    lasting = scores(_without_strongest(values, z, config.few_share))
    there, here = (_known_mean(side, np.nan) for side in sides)
    return SkewTest(z=z, p=p, units=1, lasting=lasting, there=there, here=here)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Newcomers:
    """The ``devices`` of ``cohort`` with what each saw last; ``level`` is what one look is held to."""

    cohort: str
    devices: Mapping[DeviceId, Profile]
    level: float
    seed: int


def skew_findings(
    terms: Terms,
    who: Newcomers,
    shared: Shared,
    figures: Mapping[str, Familiar],
    present: Mapping[str, Familiar],
) -> tuple[list[Finding], str]:
    """One finding for every feature, and a note on what could not be seen.

    ``figures`` are of all that the devices saw, ``present`` of this look alone: what is over is no skew any more.
    """
    config, components = terms.config, terms.components
    groups = [profile for _, profile in terms.info.reference.groups if profile.rows]
    devices = [who.devices[device] for device in some_of(who.devices, config.max_devices)]
    if len(devices) < config.min_devices:
        need = f"{config.min_devices} are needed to compare them with the training"
        have = "1 device" if len(devices) == 1 else f"{len(devices)} devices"
        return [], f"{who.cohort}: {have}, {need}"
    note = ""
    if len(groups) >= config.min_groups:
        limits = {"exact_limit": config.exact_limit, "samples": config.samples}
        smallest = permutation.smallest_p(len(groups), len(devices), **limits)
        if smallest > who.level:
            return [], (
                f"{who.cohort}: {len(groups)} training groups and {len(devices)} devices allow no p below "
                f"{smallest:.4f}, the level is {who.level:.4f}: more devices or groups, or a larger "
                "skew_alpha, are needed"
            )
        test = against_groups(groups, devices, components, shared, config, level=who.level, seed=who.seed)
    else:
        note = (
            f"{who.cohort}: the training has {len(groups)} groups, {config.min_groups} are needed; all of it counts as "
            "one unit, and only gross skew is seen: convert(…, groups=…)"
        )
        test = against_pool(terms.info.reference.total, devices, components, shared, config)
    found = []
    for owner, name in enumerate(components.names[: components.features]):
        large = all(_large(x[name], config) for x in (figures, present))
        found.append(_finding(terms, who, test, figures[name], owner, large=large))
    return found, note


def some_of(devices: Iterable[DeviceId], limit: int) -> list[DeviceId]:
    """At most ``limit`` of them, sorted, always the same: a test's cost must not grow with the fleet."""
    found = sorted(devices)
    return (
        found if len(found) <= limit else sorted(sorted(found, key=lambda d: zlib.crc32(d.encode()))[:limit])
    )


def _large(reading: Familiar, config: DriftConfig) -> bool:
    faults = max(abs(now - before) for before, now in (reading.missing, reading.non_finite))
    # Figures are NaN where nothing finite is left to compare: that is a fault.
    return reading.psi >= config.psi_floor or reading.ks >= config.cdf_floor or faults >= config.cdf_floor


def _finding(
    terms: Terms, who: Newcomers, test: SkewTest, reading: Familiar, owner: int, *, large: bool
) -> Finding:
    config, components = terms.config, terms.components
    name = components.names[owner]
    mine = terms.of(owner)
    at = int(mine[np.abs(test.z[mine]).argmax()])
    p = float(test.p[owner])
    away = np.nan_to_num(test.here[mine] - test.there[mine])
    sure = 2.0 * components.size * special.ndtr(-np.abs(test.z[mine])) <= who.level
    told = speaker(components, mine, at, away, sure & (np.abs(away) >= terms.floors[mine]))
    units = f"{len(who.devices)} devices against {test.units} training unit{'s' if test.units > 1 else ''}"
    return Finding(
        kind=kind_of(components, told, own="skew"),
        cohort=who.cohort,
        key=name,
        feature=name,
        moved=p <= who.level and large and test.broad(at, who.level),
        clear=p > config.clear_p or not large,
        at_once=False,
        p=p,
        devices=tuple(sorted(who.devices)),
        judged=len(who.devices),
        why=f"{name} is not as in training: {_difference(terms, test, told, reading)} ({units}, {probability(p)})",
        evidence=(
            ("p", p),
            ("z", float(test.z[told])),
            *fault_as_evidence(components, told),
            *figures_as_evidence(reading),
        ),
    )


def _difference(terms: Terms, test: SkewTest, told: int, reading: Familiar) -> str:
    """In words, what devices and training differ in: a share of all rows, or where the distributions do most."""
    components, there, here = terms.components, test.there[told], test.here[told]
    nature, what = int(components.nature[told]), category(terms.info, components, told)
    if nature in FAULTS:
        return f"{FAULT_WORDS[nature]} are {percent(here)} of rows, {percent(there)} there"
    if math.isnan(reading.cut):
        return "there are no values to compare"
    if what is not None:
        return f"{what} in {percent(here)} of rows, {percent(there)} there"
    before, now = reading.below
    return f"{100 * now:.0f} % of values are at most {reading.cut:.4g}, {100 * before:.0f} % there"


def _filled(values: Matrix, others: Matrix) -> Matrix:
    """NaN replaced by the mean over the units that have a value, those of the other side where none has."""
    return np.where(np.isnan(values), _known_mean(values, _known_mean(others, 0.5)), values)


def _known_mean(values: Matrix, otherwise: Matrix | float) -> Matrix:
    known = ~np.isnan(values)
    n = known.sum(axis=0)
    mean = np.where(known, values, 0.0).sum(axis=0) / np.maximum(n, 1)
    return np.where(n > 0, mean, otherwise)
