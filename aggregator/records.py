"""Values that the cores decide on and the adapters keep. They say nothing about how either is done."""

from dataclasses import dataclass, field
from typing import Final

from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, LayoutId, ModelName, RolloutId, SessionId
from edge_runtime.contract.messages import ModelReport, Window
from edge_runtime.contract.release import Release, ShadowGate, TrialGate

COHORT_ATTRIBUTE: Final = "cohort"
DEFAULT_COHORT: Final = "main"
SKIPPED_REVISIONS: Final = 1000
"""Releases that a ledger may have forgotten. Devices ignore one that is older than what they know."""

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


CAUSES: Final = ("topic", "payload", "kind", "sender", "counts", "layout", "overlap", "labels", "decoder")
"""Why a message is a dead letter, few enough to count by.

In this order: no topic of a device; bytes that are no message; a message that devices do not send; one that belongs on
another topic; counts or times beyond any honest sender's; counts that contradict the artifact's layout; windows counted
once already; labels that contradict their artifact, or what their source told before; a mistake in the decoder.
"""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that breaks the contract, and why: ``reason`` in words, ``cause`` as one of `CAUSES`."""

    topic: str
    payload: bytes
    reason: str
    cause: str = "payload"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What one committed batch came to: records new, known already, and refused for overlapping a stored one.

    ``labels`` are messages of labels that were new, ``contradictions`` say what was wrong with others.
    """

    stored: int
    duplicates: int
    overlapping: int
    labels: int = 0
    contradictions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one batch of messages came to.

    ``windows``, ``duplicates`` and ``overlaps`` are records new, known already and refused; ``dead`` counts letters by
    cause, `CAUSES`. ``acks`` were published, ``unsaid`` could not be. ``shed`` were not looked at: their senders had
    too many waiting. ``seconds`` is the batch's time, ``commit_seconds`` the store's share of it, None when there was
    nothing to store.
    """

    messages: int = 0
    windows: int = 0
    duplicates: int = 0
    overlaps: int = 0
    events: int = 0
    statuses: int = 0
    labels: int = 0
    dead: tuple[tuple[str, int], ...] = ()
    acks: int = 0
    unsaid: int = 0
    shed: int = 0
    seconds: float = 0.0
    commit_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which windows a question is about; every condition left at its default lets everything through.

    ``devices`` None means any device. ``since_ns`` and ``until_ns`` bound the time of receipt (from, up to
    but not including). ``after`` lets windows through that are numbered above it, ``last`` keeps the newest so many of
    what the other conditions let through; 0 keeps all. Both are about windows that are kept one by one. Part of a day
    that is rolled up cannot be answered for: such a question is refused, unless ``leave_out_cut_days`` says that the
    answer may lack that day.
    """

    model: ModelName | None = None
    digest: Digest | None = None
    layout: LayoutId | None = None
    devices: tuple[DeviceId, ...] | None = None
    since_ns: int = 0
    until_ns: int = 2**63 - 1
    after: int = 0
    last: int = 0
    leave_out_cut_days: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """When a window was received, under which number it is kept, and what it covers: rows answered or refused."""

    number: int
    received_ns: int
    device: DeviceId
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTotals:
    """The counts of one device's windows of one artifact; ``rss_bytes`` is the newest, the peak the largest.

    ``windows`` are those that devices closed: a merged record counts as many as it holds.
    ``first_ns`` and ``last_ns`` are times of receipt. The last three are sums over the records, each with n labelled
    rows and c correct ones: Σn², Σc·n and Σc², exact as long as they are below 2^53.
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
    labelled_squares: float = 0.0
    products: float = 0.0
    correct_squares: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTruth:
    """How many of a device's rows of one artifact are known to be right, told by the device or by late labels.

    Of the ``labelled`` rows, ``compared`` were predicted in windows that expected ``expected`` right answers of them
    (the mean of their largest probabilities); ``compared_correct`` were right.
    """

    device: DeviceId
    digest: Digest
    model: ModelName
    labelled: int
    correct: int
    compared: int = 0
    compared_correct: int = 0
    expected: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """What is known of an artifact's right answers in a cohort of devices, of all time; a device weighs as any other.

    ``known`` is the mean share of right answers among the ``labelled`` rows of ``devices``. ``compared`` of them have
    an estimate for the same times: ``estimated``, whose ``error`` is estimate minus truth of these devices and times.
    Halves are those of 95 % intervals over devices; None with one.
    """

    model: ModelName
    digest: Digest
    cohort: str
    devices: int
    labelled: int
    correct: int
    known: float
    half: float | None = None
    compared: int = 0
    estimated: float | None = None
    estimated_half: float | None = None
    error: float | None = None
    error_half: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LateLabels:
    """One message of labels as it is kept; ``number`` rises in the order in which they were stored."""

    number: int
    device: DeviceId
    start_ns: int
    end_ns: int
    labelled: int
    correct: int


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


@dataclass(frozen=True, slots=True)
class Lease:
    """Who leads. ``holder`` is empty when the last one laid it down; ``term`` rises with every change of hands,
    ``beat`` with every renewal.
    """

    holder: str
    term: int
    beat: int = 0


class LeaseLost(SkiffError):
    """Another process leads: what this one wanted to write as the leader was not written."""


# ── devices ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """What is known of a device from its status messages.

    ``seq`` is the highest number among the births of ``session``, -1 when only its death was seen. ``ended`` holds
    sessions that another has replaced, newest last, each with its highest number (-1: unknown). ``doubted_ns`` is when
    a message or silence contradicted this record, 0 when neither did. ``last_exit``, ``restarts`` and ``clock`` are
    what its last birth said.
    """

    device: DeviceId
    session: SessionId
    seq: int
    online: bool
    attributes: tuple[tuple[str, str], ...] = ()
    models: tuple[ModelReport, ...] = ()
    last_seen_ns: int = 0
    ended: tuple[tuple[SessionId, int], ...] = ()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """The fleet as its leader sees it at one moment, counted by what is few: never by device.

    ``silent`` devices are online and sent no window for a while. ``verdicts`` counts what stands by (kind, outcome),
    ``incidents`` the open ones by (kind, severity), ``retrains`` requests by state, ``rollouts`` each track's newest by
    state. ``latency`` holds (model, quantile, nanoseconds) of a model's newest windows among the fleet's newest,
    ``accuracies`` what is known of the right answers of each artifact that is served.
    """

    known: int
    online: int
    silent: int
    store: StoreFigures
    verdicts: tuple[tuple[str, str, int], ...] = ()
    incidents: tuple[tuple[str, str, int], ...] = ()
    retrains: tuple[tuple[str, int], ...] = ()
    rollouts: tuple[tuple[str, int], ...] = ()
    latency: tuple[tuple[str, float, float], ...] = ()
    accuracies: tuple[Accuracy, ...] = ()


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
    shadow: ShadowGate = field(default_factory=ShadowGate)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainRequest:
    """A wish for a better model: ``document`` is the JSON text the hook is given in a file."""

    model: ModelName
    digest: Digest
    cohort: str
    at_ns: int
    why: str
    document: str


# ── alarms on their way to whoever is told ─────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """One alarm event for one sink: ``text`` is what it is told, JSON with a stable ``id``.

    ``number`` is the ledger's and rises; 0 until it is kept.
    """

    number: int = 0
    sink: str
    incident: int
    at_ns: int
    text: str


@dataclass(frozen=True, slots=True)
class Told:
    """How an attempt at a telling ended: ``reason`` is empty when the sink has it, else why it has not.

    ``final`` says that the sink refuses this very text: another attempt would end likewise.
    """

    number: int
    reason: str = ""
    final: bool = False


@dataclass(frozen=True, slots=True)
class SinkState:
    """What waits for a sink, and whether its last attempts failed."""

    sink: str
    waiting: int
    failing: bool
