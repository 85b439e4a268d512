"""Outputs and accuracy of devices without a past of their own, against devices that were seen before them.

Not against training: a model is surer of rows that it was fitted on. The unit is the device on both sides, and devices
are permuted between the two. New devices may well see another world than the known ones; only where the model is worse
at it is it asked which of the inputs differ.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aggregator.core import permutation
from aggregator.core.evidence import student, without_strongest
from aggregator.core.findings import EFFECTS, fault_as_evidence, key_of, kind_of, movement, probability
from aggregator.core.own_past import Terms
from aggregator.core.skew import Shared, against_groups, some_of
from aggregator.looks import Finding, Reading
from edge_runtime.contract.ids import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arms:
    """``newcomers`` of a cohort with what each saw last, ``others`` with their past; ``level`` is for one look.

    ``worse`` says that an incident of what the newcomers are answered is open.
    """

    cohort: str
    newcomers: Mapping[DeviceId, Reading]
    others: Mapping[DeviceId, Reading]
    level: float
    seed: int
    worse: bool = False


def newcomer_findings(terms: Terms, arms: Arms) -> list[Finding]:
    """What the model answers the newcomers, and how right it is, where both arms have enough devices."""
    need = terms.config.min_devices
    accuracy = _accuracy(terms, arms)
    limits = {"exact_limit": terms.config.exact_limit, "samples": terms.config.samples}
    found = []
    if min(len(arms.newcomers), len(arms.others)) >= need:
        smallest = permutation.smallest_p(len(arms.others), len(arms.newcomers), **limits)
        if smallest <= arms.level:
            found += _compared(terms, arms, outputs=True)
            if arms.worse:
                found += _compared(terms, arms, outputs=False)
    if accuracy is None:
        return found
    return [*(f for f in found if f.kind != accuracy.kind), accuracy]  # what is known needs no estimate


def _compared(terms: Terms, arms: Arms, *, outputs: bool) -> list[Finding]:
    components, config = terms.components, terms.config
    before, now = (
        [arm[device].profile for device in some_of(arm, config.max_devices)]
        for arm in (arms.others, arms.newcomers)
    )
    none = np.zeros(components.size)
    shared = Shared(variance=none, freedom=none + np.inf)
    test = against_groups(
        before, now, components, shared, config, level=arms.level, seed=arms.seed, outputs=outputs
    )
    first = np.nan_to_num(components.sample(before).values).mean(axis=0)
    second = np.nan_to_num(components.sample(now).values).mean(axis=0)
    away = second - first
    found = []
    everything = len(components.names)
    for owner in range(components.features, everything) if outputs else range(components.features):
        mine = terms.of(owner)
        if mine.size:
            matters = np.abs(away[mine]) >= terms.floors[mine]
            at = int(mine[np.where(matters, np.abs(test.z[mine]), -1.0).argmax()])
            kind = kind_of(components, at, own="skew")
            p, large = (
                float(test.p[owner]),
                bool(matters.any()) and not (kind == "performance" and away[at] > 0),
            )
            words = movement(terms.info, components, at, first, second)
            found.append(
                Finding(
                    kind=kind,
                    cohort=arms.cohort,
                    key=key_of(kind, components.names[owner]),
                    feature=terms.feature(owner),
                    moved=p <= arms.level and large and test.broad(at, arms.level),
                    clear=p > config.clear_p or not large,
                    at_once=False,
                    p=p,
                    devices=tuple(sorted(arms.newcomers)),
                    judged=len(now),
                    why=(
                        f"{words}: {len(arms.newcomers)} new devices against {len(before)} known ones "
                        f"({probability(p)})"
                    ),
                    evidence=(
                        ("p", p),
                        ("from", float(first[at])),
                        ("to", float(second[at])),
                        *fault_as_evidence(components, at),
                    ),
                    grave=kind in EFFECTS,
                )
            )
    return found


def _accuracy(terms: Terms, arms: Arms) -> Finding | None:
    """Whether the newcomers' known accuracy is lower; None where too few devices know it."""
    config = terms.config
    sides = [
        np.array([r.correct / r.labelled for r in arm.values() if r.labelled >= config.min_labelled])
        for arm in (arms.others, arms.newcomers)
    ]
    if min(len(side) for side in sides) < config.min_devices:
        return None
    before, now = sides
    test = permutation.compare(
        before[:, None],
        now[:, None],
        np.zeros(1, np.int64),
        floor=config.variance_floor,
        exact_limit=config.exact_limit,
        samples=config.samples,
        seed=arms.seed,
        one_sided=True,
        enough=config.enough,
    )
    rest = -without_strongest(-now, config.few_share)
    variance = float(before.var(ddof=1)) / len(before) + float(now.var(ddof=1)) / len(now)
    half = student(min(len(before), len(now)) - 1, 0.025) * math.sqrt(variance)
    dropped = (
        float(before.mean() - now.mean()) >= config.accuracy_floor
        and float(before.mean() - rest.mean()) >= config.accuracy_floor / 2.0
    )
    return Finding(
        kind="performance",
        cohort=arms.cohort,
        key=key_of("performance", ""),
        feature=None,
        moved=test.p <= arms.level and dropped,
        clear=test.p > config.clear_p or not dropped,
        at_once=False,
        p=test.p,
        devices=tuple(sorted(arms.newcomers)),
        judged=len(now),
        why=(
            f"accuracy is {now.mean():.3f} over {len(now)} new devices, {before.mean():.3f} over {len(before)} known "
            f"ones ({probability(test.p)})"
        ),
        evidence=(
            ("p", test.p),
            ("from", float(before.mean())),
            ("to", float(now.mean())),
            ("half_width", half),
        ),
        grave=True,
    )
