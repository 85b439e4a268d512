"""Values of drift: what devices saw, what a look at them found, what stands after it. See `aggregator.core.judge`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edge_runtime.contract.ids import DeviceId, Digest, ModelName
from edge_runtime.contract.profile import Profile, merged

# ── what devices saw ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one device saw in the span of one look: one window, or several merged.

    ``start_ns`` and ``end_ns`` are wall-clock times since 1970. ``labelled`` and ``correct`` count rows whose truth is
    known, of other times too where labels came late; ``refused`` counts rows answered with an error, by reason.
    """

    device: DeviceId
    profile: Profile
    start_ns: int
    end_ns: int
    windows: int = 1
    labelled: int = 0
    correct: int = 0
    refused: tuple[tuple[str, int], ...] = ()


def merge(readings: Sequence[Reading]) -> Reading:
    """Readings of one device, at least one, as one; counts are exact. Raises `ContractError` when layouts differ."""
    first = readings[0]
    if len(readings) == 1:
        return first
    refused: Counter[str] = Counter()
    for reading in readings:
        refused.update(dict(reading.refused))
    return Reading(
        device=first.device,
        profile=merged([reading.profile for reading in readings]),
        start_ns=min(reading.start_ns for reading in readings),
        end_ns=max(reading.end_ns for reading in readings),
        windows=sum(reading.windows for reading in readings),
        labelled=sum(reading.labelled for reading in readings),
        correct=sum(reading.correct for reading in readings),
        refused=tuple(sorted(refused.items())),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive windows of one device and one artifact, merged: one unit of a look.

    ``seconds`` is the time they span together; ``first`` and ``last`` are their records' numbers in the store.
    """

    reading: Reading
    seconds: float
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one look at a fleet judges: at most one reading of each device. ``index`` counts looks from 0."""

    index: int
    start_ns: int
    end_ns: int
    readings: tuple[Reading, ...]


# ── what a look found ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Familiar:
    """One column, reference against fleet.

    ``sd_ratio`` is the fleet's standard deviation in the reference's. ``cut`` is the value where the distributions
    differ most and ``below`` the shares at or below it (reference, fleet); ``missing``, ``non_finite`` and
    ``repeated`` are the shares of all rows (reference, fleet). All but these are NaN where one of the two has no finite
    value.
    """

    psi: float
    ks: float
    chi2: float
    js: float
    wasserstein_sd: float
    mean_shift_sd: float
    sd_ratio: float
    cut: float
    below: tuple[float, float]
    missing: tuple[float, float]
    non_finite: tuple[float, float]
    repeated: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Accuracy of the devices now, each weighing the same: the mean of the largest probability, None without any.

    ``half`` is the half width of its 95 % interval over devices. ``known`` is the share of right answers among
    ``labelled`` rows, whose truth was told; None without any. ``error`` is estimate minus truth of the devices that
    have both, ``error_half`` the half width of its 95 % interval.
    """

    estimated: float | None = None
    half: float | None = None
    known: float | None = None
    labelled: int = 0
    error: float | None = None
    error_half: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One column of one cohort in one look.

    ``moved`` is whether it moved: surely and by enough. ``clear`` is whether it looks as it always did. ``at_once``
    says that one look is proof enough; ``grave`` that it is worth waking somebody for. ``key`` tells incidents apart:
    the column's name, or what an output does. Each of ``devices`` moved by itself where they were judged
    ``one_by_one``.
    """

    kind: str
    cohort: str
    key: str
    feature: str | None
    moved: bool
    clear: bool
    at_once: bool
    p: float
    devices: tuple[DeviceId, ...] = ()
    judged: int = 0
    why: str = ""
    evidence: tuple[tuple[str, float | str], ...] = ()
    grave: bool = False
    one_by_one: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One incident of one column of one cohort, from the look that opened it to the one that closed it.

    ``kind`` is one of skew, drift, sensor, quality, prediction, performance; ``feature`` is None for the last two, and
    where the model refuses rows.
    ``devices`` are those concerned. ``severity`` is ``page`` or ``ticket``. ``why`` is one sentence; ``evidence`` is
    the same in data, by name. While it is open, these are of the newest look that moved; of the answers of a whole
    cohort they stay those of the look that opened it.
    """

    kind: str
    feature: str | None
    cohort: str
    opened_window: int
    closed_window: int | None
    devices: tuple[DeviceId, ...]
    severity: str
    why: str
    evidence: tuple[tuple[str, float | str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """At which look, and why, a better model is asked for."""

    window: int
    cohort: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one look came to; ``figures`` by column, the score under ``score``.

    ``suspects`` are the devices that were past their own threshold in it, by column: in the next look they are named.
    """

    index: int
    devices: int = 0
    rows: int = 0
    figures: Mapping[str, Familiar]
    estimate: Estimate = Estimate()
    findings: tuple[Finding, ...] = ()
    opened: tuple[Alarm, ...] = ()
    closed: tuple[Alarm, ...] = ()
    wish: Wish | None = None
    suspects: Mapping[str, tuple[DeviceId, ...]] = field(default_factory=dict)


# ── what stands after it ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What is remembered of one column of one cohort.

    ``streak`` counts the looks in a row that moved in more than a few sensors, ``clear`` those that were clear.
    """

    cohort: str
    key: str
    streak: int = 0
    clear: int = 0
    alarm: Alarm | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmEvent:
    """What became of an incident at ``at_ns``.

    ``what`` is ``opened``, ``escalated`` (to severity ``page``) or ``closed``.
    ``number`` is the ledger's. ``why`` is the alarm's, or, of one that closed, why it did.
    """

    what: str
    number: int
    model: ModelName
    digest: Digest
    at_ns: int
    alarm: Alarm
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What stands for an artifact, cohort of devices and kind: ``stable``, ``warning``, ``drifted``, ``insufficient``.

    ``cohort`` is ``fleet`` or ``attribute=value``. ``p`` is the smallest of the last look's, ``look`` that look's
    number, ``judged`` how many devices it judged. ``moved`` names the columns, ``devices`` those concerned;
    ``left_out`` names devices that were not judged, with the reason.
    """

    kind: str
    model: ModelName
    digest: Digest
    cohort: str
    at_ns: int
    outcome: str
    reason: str
    p: float = 1.0
    look: int = 0
    judged: int = 0
    moved: tuple[str, ...] = ()
    devices: tuple[DeviceId, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
