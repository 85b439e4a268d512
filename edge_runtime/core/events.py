"""What happens to a device's control plane, and what it asks for: the events and actions of `agent`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from edge_runtime.contract import ids, topics
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest, SessionId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Health
from edge_runtime.contract.profile import Profile
from edge_runtime.contract.release import Release, from_payload
from edge_runtime.core.lifecycle import SlotState

PHASES: Final = ("fetching", "verified", "probed")


# ── events: what happened ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Started:
    """The daemon is up; the agent was built from the state on disk. ``crashed``: the process before it was killed, or
    ended with an error.
    """

    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Connected:
    """The link to the broker is up and subscribed."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The link is down."""


@dataclass(frozen=True, slots=True)
class MessageArrived:
    """Bytes came in on a topic this device subscribed to."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowClosed:
    """The data plane closed a window."""

    digest: Digest
    start_ns: int
    end_ns: int
    synced: bool
    profile: Profile
    latency: LatencyHistogram
    health: Health
    queueing: LatencyHistogram = field(default_factory=LatencyHistogram)
    refused: tuple[tuple[str, int], ...] = ()
    failed: int = 0
    labelled: int = 0
    correct: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """Records of the outbox were handed to the link."""

    keys: tuple[tuple[SessionId, int], ...]


@dataclass(frozen=True, slots=True)
class UpdatePhase:
    """The update child reached a phase: ``fetching``, ``verified`` or ``probed``."""

    phase: str
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateEnded:
    """The update child's last word.

    ``release`` is the one whose signature was verified, None when none was. ``installed`` means that the model it asks
    for was not here and now is: fetched, verified and probed.
    """

    ok: bool
    release: Release | None = None
    stage: str = ""
    reason: str = ""
    retry: bool = False
    installed: bool = False
    digest: Digest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the serving model did since the last report.

    ``cpu`` has the CPU time of its calls since it was loaded, ``incumbent_cpu`` that of the incumbent in between.
    ``refused`` counts calls that it refused, or answered with NaN, and that the incumbent answers. ``declared_p99_ns``
    is the budget that the model was published with, 0 for none.
    """

    digest: Digest
    predictions: int
    failed: int
    seconds: float
    cpu: LatencyHistogram
    rss_bytes: int
    incumbent_cpu: LatencyHistogram = field(default_factory=LatencyHistogram)
    refused: int = 0
    declared_p99_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadowed:
    """What the candidate in the shadow did since the last report.

    It answered ``rows`` that the serving model had answered, ``disagreed`` of them otherwise; ``failed`` says why it
    answers none any more, "" while it does. ``alone`` says why it cannot be compared, which is not its fault, "" while
    it can; it is said again and again.
    """

    digest: Digest
    rows: int
    disagreed: int
    failed: str = ""
    alone: str = ""


@dataclass(frozen=True, slots=True)
class ServeFailed:
    """The model could not be loaded from its blob, to serve or to answer in the shadow."""

    digest: Digest
    reason: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A `Save` that was needed is durable."""


@dataclass(frozen=True, slots=True)
class Unsaved:
    """The disk refused a `Save` that was needed. What came after it was not done."""

    reason: str


@dataclass(frozen=True, slots=True)
class Noticed:
    """Something on the device that the centre should know of; the same name is told once a minute at most."""

    name: str
    detail: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class GapFound:
    """Records were merged or lost; unlike what is `Noticed`, this is told every time."""

    name: str
    detail: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ClockChanged:
    """The wall clock can be trusted from now on, or no longer."""

    synced: bool


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


AgentEvent = (
    Started
    | Connected
    | Disconnected
    | MessageArrived
    | WindowClosed
    | Sent
    | UpdatePhase
    | UpdateEnded
    | Served
    | Shadowed
    | ServeFailed
    | Saved
    | Unsaved
    | Noticed
    | GapFound
    | ClockChanged
    | Ticked
)


# ── actions: what to do about it ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Save:
    """Make the state durable before the next action is performed.

    ``needed``: the actions after it must not be performed without it. It is answered with `Saved`, or with `Unsaved`
    when the disk refuses. Otherwise they are performed anyway, and saving is tried again.
    """

    slots: SlotState
    needed: bool = True


@dataclass(frozen=True, slots=True)
class Serve:
    """Load this model and answer predictions with it; None stops serving. Failure comes back as `ServeFailed`."""

    digest: Digest | None


@dataclass(frozen=True, slots=True)
class Shadow:
    """Have this model answer some of the rows that the serving one answers; None stops it. See `Shadowed`."""

    digest: Digest | None


@dataclass(frozen=True, slots=True)
class Collect:
    """Delete every blob but these."""

    keep: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish now; lost when the link is down (retained status is published again on connect)."""

    topic: str
    payload: bytes
    delivery: topics.Delivery


@dataclass(frozen=True, slots=True)
class Append:
    """Put a message into the durable outbox."""

    session: SessionId
    seq: int
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Send:
    """Publish up to ``room`` records of the outbox, leaving out those in flight; answer with `Sent`."""

    room: int
    skip: frozenset[tuple[SessionId, int]]


@dataclass(frozen=True, slots=True)
class Trim:
    """The aggregator has stored these: forget them."""

    session: SessionId
    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUpdate:
    """Start the update child on a release that nobody has verified yet."""

    release: bytes
    floor: int
    serving: Digest | None
    have: tuple[Digest, ...]
    quarantine: tuple[tuple[Digest, int], ...]


Action = Save | Serve | Shadow | Collect | Publish | Append | Send | Trim | StartUpdate


# ── the update child's lines ───────────────────────────────────────────────────────────────────────────


def update_phase(line: Mapping[str, object]) -> UpdatePhase:
    """Reads a line of the update child's progress; raises `ContractError` when it is not one."""
    f = Fields(line, "update")
    return UpdatePhase(f.text("progress", choices=PHASES), ids.digest(f.text("digest")))


def update_ended(result: Mapping[str, object]) -> UpdateEnded:
    """Reads the update child's result; raises `ContractError` when it is not one."""
    f = Fields(result, "update")
    ok = f.flag("ok")
    digest = f.text("desired" if ok else "digest", "")
    try:
        payload = bytes.fromhex(f.text("release", "", max_length=1 << 18))
    except ValueError as e:
        raise f.fail("release", "is not hexadecimal") from e
    if ok and not payload:
        raise f.fail("release", "is missing: a success names the release it verified")
    return UpdateEnded(
        ok=ok,
        release=from_payload(payload) if payload else None,
        stage=f.text("stage", ""),
        reason=f.text("reason", "", max_length=1 << 16),
        retry=f.flag("retry", False),
        installed=f.text("action", "") == "install",
        digest=ids.digest(digest) if digest else None,
    )
