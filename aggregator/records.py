"""Values that the cores decide on and the adapters keep. They say nothing about how either is done."""

from dataclasses import dataclass
from typing import Final

from edge_runtime.contract.ids import CohortId, DeviceId, Digest, LayoutId, ModelName, RolloutId, SessionId
from edge_runtime.contract.messages import ModelReport, Window
from edge_runtime.contract.profile import Profile
from edge_runtime.contract.release import Release, TrialGate

COHORT_ATTRIBUTE: Final = "cohort"
DEFAULT_COHORT: Final = "main"

# ── telemetry ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A decoded window on its way into the store.

    ``payload`` is the message as it came. ``judged`` tells whether its profile was checked against the
    artifact's own layout; a window of an artifact nobody has published here yet is kept unjudged.
    """

    window: Window
    payload: bytes
    judged: bool


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that breaks the contract, and why."""

    topic: str
    payload: bytes
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What one committed batch came to: records new, known already, and refused for overlapping a stored one."""

    stored: int
    duplicates: int
    overlapping: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which windows a question is about; every condition left at its default lets everything through.

    ``devices`` None means any device. ``since_ns`` and ``until_ns`` bound the time of receipt (from, up to
    but not including). ``last`` keeps the newest so many windows of what the other conditions let through; 0
    keeps all.
    """

    model: ModelName | None = None
    digest: Digest | None = None
    layout: LayoutId | None = None
    devices: tuple[DeviceId, ...] | None = None
    since_ns: int = 0
    until_ns: int = 2**63 - 1
    last: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTotals:
    """The counts of one device's windows of one artifact; ``rss_bytes`` is the newest, the peak the largest.

    ``windows`` are those that devices closed: a merged record counts as many as it holds.
    ``first_ns`` and ``last_ns`` are times of receipt.
    """

    device: DeviceId
    digest: Digest
    windows: int
    rows: int
    failed: int
    refused: int
    labelled: int
    correct: int
    wire_bytes: int
    rss_bytes: int
    peak_rss_bytes: int
    first_ns: int
    last_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive windows of one device and one artifact, merged: one unit of a drift test.

    ``windows`` are those that the device closed, ``seconds`` is the time they span together; ``first`` and ``last``
    are their records' numbers in the store.
    """

    device: DeviceId
    profile: Profile
    windows: int
    rows: int
    seconds: float
    labelled: int
    correct: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFigures:
    """Totals of the telemetry store since it was made, except ``dead_letters``, which counts what is kept now."""

    windows: int
    rows: int
    unjudged: int
    rejected: int
    duplicates_rejected: int
    overlaps_rejected: int
    events: int
    dead_letters: int
    dead_letters_ever: int


# ── devices ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """What is known of a device from its status messages.

    ``seq`` is the highest number among the births of ``session``, -1 when only its death was seen. ``ended``
    holds sessions that a newer one has replaced, newest last. ``doubted_ns`` is when a message contradicted
    this record, 0 when none did. ``last_exit``, ``restarts`` and ``clock`` are what its last birth said.
    """

    device: DeviceId
    session: SessionId
    seq: int
    online: bool
    attributes: tuple[tuple[str, str], ...] = ()
    models: tuple[ModelReport, ...] = ()
    last_seen_ns: int = 0
    ended: tuple[SessionId, ...] = ()
    doubted_ns: int = 0
    last_exit: str = ""
    restarts: int = 0
    clock: str = ""

    def attribute(self, name: str) -> str:
        """The attribute's value, empty when the device has none of that name."""
        return dict(self.attributes).get(name, "")

    @property
    def cohort(self) -> str:
        """The rollout cohort the device follows."""
        return self.attribute(COHORT_ATTRIBUTE) or DEFAULT_COHORT

    def report(self, model: str) -> ModelReport | None:
        """What the device says about one model family."""
        return next((report for report in self.models if report.model == model), None)


# ── rollouts ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """What a stage has to show before the next one; see `aggregator.core.gates`.

    ``design_effect`` is how many consecutive rows carry the information of one independent row.
    """

    committed_share: float = 0.9
    min_online_share: float = 0.5
    bake_seconds: float = 60.0
    timeout_seconds: float = 86_400.0
    max_failures: int = 0
    min_rows: int = 0
    max_bad_row_rate: float = 0.01
    max_latency_ratio: float = 3.0
    max_accuracy_drop: float = 0.05
    min_labelled: int = 100
    design_effect: float = 10.0
    control_seconds: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One controlled spread of ``candidate`` over a cohort.

    ``stage`` counts from 1, 0 in a draft; ``cap`` is how many devices the stage may expose (-1: everyone).
    ``threshold`` is the release's. ``ready_since_ns`` is when the stage's devices had committed, None before.
    ``note`` tells why the state is what it is. ``revision`` is the cohort's when the rollout was published
    first, 0 before.
    """

    rollout: RolloutId
    cohort: CohortId
    model: ModelName
    candidate: Digest
    incumbent: Digest | None
    stages: tuple[int | float, ...]
    gates: Gates
    trial: TrialGate
    attempt: int
    by: str
    why: str
    created_ns: int
    state: str = "draft"
    stage: int = 0
    cap: int = 0
    threshold: int = 0
    stage_since_ns: int = 0
    ready_since_ns: int | None = None
    revision: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """A cohort and model's control state: the release in force and the rollout that led to it, if any."""

    cohort: CohortId
    model: ModelName
    release: Release | None = None
    rollout: Rollout | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An order from outside (the command line), waiting in the ledger."""

    number: int
    kind: str
    document: str
    by: str
    why: str
    created_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line of the audit log: who did what to which cohort and model, and why."""

    at_ns: int
    who: str
    what: str
    why: str
    cohort: str = ""
    model: str = ""
    rollout: str = ""


# ── drift ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One column compared between the reference and the fleet, both as the mean of their units.

    ``p`` is adjusted for all columns of the test. ``psi``, ``ks``, ``js_bits`` and the two in standard
    deviations of the reference are the familiar figures, for reading; the verdict is the test's. ``cut`` is
    the value where the distributions differ most and ``below`` the shares at or below it (reference, fleet);
    ``broad`` is the share of the fleet's units on the fleet's side of the reference there.
    """

    name: str
    p: float
    statistic: float
    moved: bool
    psi: float
    ks: float
    js_bits: float
    wasserstein_sd: float
    mean_shift_sd: float
    missing: tuple[float, float]
    cut: float
    below: tuple[float, float]
    broad: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The outcome of one test on one look: ``stable``, ``moved`` or ``insufficient``.

    ``alpha`` is the level this test was held to; ``figures`` are sorted, most surprising first.
    """

    outcome: str
    reason: str
    p: float = 1.0
    alpha: float = 0.0
    reference_units: int = 0
    fleet_units: int = 0
    permutations: int = 0
    exact: bool = False
    figures: tuple[Figure, ...] = ()

    @property
    def moved(self) -> tuple[str, ...]:
        """The names of the columns that moved."""
        return tuple(figure.name for figure in self.figures if figure.moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What stands for one artifact, cohort of devices and kind: ``stable``, ``warning``, ``drifted`` or
    ``insufficient``.

    ``cohort`` is ``fleet`` or ``attribute=value``. ``left_out`` names devices that were not judged, with the
    reason. ``streak`` counts looks that moved in a row, ``clear`` looks beyond the clear threshold since.
    ``first`` and ``last`` are the window numbers the look covered; ``changed`` is ``opened`` or ``closed``
    when this look did that to the incident.
    """

    kind: str
    model: ModelName
    digest: Digest
    cohort: str
    at_ns: int
    outcome: str
    reason: str
    judgement: Judgement
    devices: tuple[DeviceId, ...] = ()
    left_out: tuple[tuple[DeviceId, str], ...] = ()
    streak: int = 0
    clear: int = 0
    incident: bool = False
    changed: str = ""
    first: int = 0
    last: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """What a verdict remembers of the looks before it; see `Verdict`."""

    model: ModelName
    digest: Digest
    cohort: str
    kind: str
    streak: int
    clear: int
    incident: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A device's outputs at the baseline look: its profile, and its share of right answers where truth was known."""

    device: DeviceId
    profile: Profile
    labelled: int
    correct: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainRequest:
    """A wish for a better model: ``document`` is the JSON text the hook is given in a file."""

    model: ModelName
    digest: Digest
    cohort: str
    at_ns: int
    why: str
    document: str
