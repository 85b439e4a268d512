"""Accuracy, known and estimated, with the device as unit: every device weighs the same, whatever it was told of.

The estimate is the mean of the largest probability. It is right where probabilities are calibrated on what devices see,
which only known answers can tell: its error is estimate minus truth on the same devices, artifacts and times.
Intervals are Student's over devices; a single device has none.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from aggregator.core import cohorts
from aggregator.core.evidence import student
from aggregator.looks import Estimate, Reading
from aggregator.records import Accuracy, DeviceTruth
from edge_runtime.contract.ids import DeviceId, Digest
from edge_runtime.contract.profile import FIXED_POINT


def mean_and_half(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and the half width of its 95 % interval; None without any, and without a second."""
    if not values:
        return None, None
    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return mean, None
    return mean, student(n - 1, 0.025) * float(np.std(values, ddof=1)) / math.sqrt(n)


def estimate(readings: Sequence[Reading]) -> Estimate:
    """What one look's readings say, each of a device: the estimate is held against the labels of the same rows."""
    estimated = {
        r.device: int(r.profile.sums[0]) / (FIXED_POINT * r.profile.rows)
        for r in readings
        if r.profile.sums.size and r.profile.rows
    }
    known = {r.device: r.correct / r.labelled for r in readings if r.labelled}
    mean, half = mean_and_half(list(estimated.values()))
    error, error_half = mean_and_half([estimated[d] - right for d, right in known.items() if d in estimated])
    return Estimate(
        estimated=mean,
        half=half,
        known=mean_and_half(list(known.values()))[0],
        labelled=sum(r.labelled for r in readings),
        error=error,
        error_half=error_half,
    )


def accuracies(
    truths: Iterable[DeviceTruth],
    attributes: Mapping[DeviceId, Mapping[str, str]],
    names: Sequence[str],
) -> tuple[Accuracy, ...]:
    """What is known of every artifact, for the fleet and for each cohort of devices by the attributes of ``names``."""
    by_artifact: dict[Digest, dict[DeviceId, DeviceTruth]] = {}
    for one in truths:
        if one.labelled:
            by_artifact.setdefault(one.digest, {})[one.device] = one
    return tuple(
        _of([known[device] for device in devices], cohort)
        for digest, known in sorted(by_artifact.items(), key=lambda item: _model_first(*item))
        for cohort, devices in cohorts.split(known, attributes, names).items()
    )


def by_model(truths: Iterable[DeviceTruth]) -> tuple[Accuracy, ...]:
    """What is known of every model, of all its artifacts together; the digest is that of one of them."""
    found: dict[str, list[DeviceTruth]] = {}
    for one in truths:
        if one.labelled:
            found.setdefault(one.model, []).append(one)
    return tuple(_of(found[model], cohorts.FLEET) for model in sorted(found))


def _model_first(digest: Digest, known: Mapping[DeviceId, DeviceTruth]) -> tuple[str, str]:
    return next(iter(known.values())).model, digest


def _of(truths: Sequence[DeviceTruth], cohort: str) -> Accuracy:
    compared = [t for t in truths if t.compared]
    known, half = mean_and_half([t.correct / t.labelled for t in truths])
    estimated, estimated_half = mean_and_half([t.expected / t.compared for t in compared])
    error, error_half = mean_and_half([(t.expected - t.compared_correct) / t.compared for t in compared])
    assert known is not None
    return Accuracy(
        model=truths[0].model,
        digest=truths[0].digest,
        cohort=cohort,
        devices=len(truths),
        labelled=sum(t.labelled for t in truths),
        correct=sum(t.correct for t in truths),
        known=known,
        half=half,
        compared=len(compared),
        estimated=estimated,
        estimated_half=estimated_half,
        error=error,
        error_half=error_half,
    )
