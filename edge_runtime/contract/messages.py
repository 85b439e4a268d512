"""Every message as a frozen value. How they look on the wire is `codec`'s business.

``device``, ``session`` and ``seq`` stand in every envelope: the device that sends or is addressed, the
session (one start of its daemon) and the message's number in it. (device, session, seq) is the key of a
window and of an event, (device, source, seq) that of labels, so duplicates and reordering are harmless.
"""

from dataclasses import dataclass

from edge_runtime.contract.ids import DeviceId, Digest, ModelName, SessionId, SourceId
from edge_runtime.contract.latency import NONE, LatencyHistogram
from edge_runtime.contract.profile import Profile

SLOT_STATES = ("idle", "fetching", "verified", "probed", "shadow", "trial", "committed", "rolled_back")
OUTCOMES = ("", "committed", "refused", "rolled_back")
COMMANDS = ("rebirth",)
CLOCKS = ("", "synced", "unsynced")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """What a device really runs for one model family, read from its slots.

    ``serving`` is the digest that answers predictions, ``previous`` the one kept to fall back to,
    ``candidate`` the one being fetched, proven or tried. ``outcome`` and ``reason`` tell how the last
    rollout ended here; ``rollout`` and ``revision`` name the last release that was verified. ``shadow_rows`` is how
    many live rows the last candidate answered in the shadow of the model in service, ``shadow_disagreed`` how many of
    them otherwise.
    """

    model: ModelName
    state: str = "idle"
    serving: Digest | None = None
    previous: Digest | None = None
    candidate: Digest | None = None
    rollout: str = ""
    revision: int = 0
    outcome: str = ""
    outcome_digest: Digest | None = None
    reason: str = ""
    quarantined: tuple[Digest, ...] = ()
    shadow_rows: int = 0
    shadow_disagreed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Birth (``online``) or death. Retained; published again on every change, with a rising ``seq``.

    A death is the last will of the session it names, so that a late one cannot hide a newer birth.
    ``last_exit`` tells how the process before this one ended, empty when there was none or its end is unknown;
    ``restarts`` counts the starts since the last that was asked for. ``clock`` is one of `CLOCKS`, empty when unknown.
    """

    device: DeviceId
    session: SessionId
    seq: int
    online: bool
    attributes: tuple[tuple[str, str], ...] = ()
    models: tuple[ModelReport, ...] = ()
    last_exit: str = ""
    restarts: int = 0
    clock: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How the device felt at the end of a window; 0 means unknown or none.

    ``cpu_ns`` and the page faults are the daemon's since its start; ``pss_bytes`` is its share of the memory it has in
    common with others. ``memory_limit_bytes`` is its control group's, ``memory_pressure_ppm`` the parts per million of
    the last minute in which some task waited for memory (PSI ``some avg60``). ``temperature_mc`` is in thousandths of a
    degree Celsius, of the hottest thermal zone. ``throttled`` has bit 0 when the board slows itself down now, bit 1
    when it did since it was switched on.
    """

    rss_bytes: int = 0
    peak_rss_bytes: int = 0
    cpu_ns: int = 0
    uptime_ns: int = 0
    pss_bytes: int = 0
    memory_limit_bytes: int = 0
    memory_pressure_ppm: int = 0
    minor_faults: int = 0
    major_faults: int = 0
    temperature_mc: int = 0
    throttled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One closed span of observations of one model on one device, or several of them merged into one record.

    ``start_ns`` and ``end_ns`` are wall-clock nanoseconds since 1970, to be trusted only when ``synced``.
    ``seq_lo`` is the first sequence number merged into this record (``seq`` itself when nothing was) and ``windows``
    how many closed windows it holds: fewer than the numbers from ``seq_lo`` to ``seq`` where other messages of the
    session have some of them, more where windows of an earlier session, never sent, were merged in. ``latency`` is the
    time predictions took, ``queueing`` the time rows had waited before. ``refused`` counts rows that were answered with
    an error, by reason; ``failed`` counts predictions that broke inside the engine. ``labelled`` and ``correct`` count
    rows whose truth was known.
    """

    device: DeviceId
    session: SessionId
    seq: int
    seq_lo: int
    model: ModelName
    digest: Digest
    start_ns: int
    end_ns: int
    synced: bool
    profile: Profile
    latency: LatencyHistogram
    health: Health
    refused: tuple[tuple[str, int], ...] = ()
    failed: int = 0
    labelled: int = 0
    correct: int = 0
    windows: int = 1
    queueing: LatencyHistogram = NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A state transition or an incident on the device; ``name`` is stable, ``detail`` says the rest."""

    device: DeviceId
    session: SessionId
    seq: int
    wall_ns: int
    name: str
    detail: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Truth that became known later than its window was sent: how many of a device's rows were predicted right.

    ``device`` is whose rows they are; it does not send this. Who does is ``source``: a laboratory, a warehouse, a
    person. (device, source, seq) is the key: the same labels told twice are counted once, also by another session of
    the source, and a key never comes again with other counts. ``session`` is one start of the source, to which what is
    stored is acknowledged.

    ``labelled`` rows were predicted by the artifact ``digest`` from ``start_ns`` up to but not including ``end_ns``,
    wall-clock nanoseconds since 1970 (equal for one moment). The estimate of that time's windows is compared with them.
    """

    device: DeviceId
    session: SessionId
    seq: int
    source: SourceId
    model: ModelName
    digest: Digest
    start_ns: int
    end_ns: int
    labelled: int
    correct: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """What the aggregator has durably stored: ``seqs`` of ``session``; only then the sender forgets them.

    Of a window or an event the sender is the device; of labels it is their source, and ``device`` whose rows they are.
    """

    device: DeviceId
    session: SessionId
    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """An order to one device; ``rebirth`` asks it to publish its status again. Never retained."""

    device: DeviceId
    name: str
    correlation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustBundle:
    """All current TUF metadata as one message, for devices whose trusted root has ``root_version``.

    ``files`` maps a metadata file's name to its bytes. A name that is absent does not exist: MQTT has no 404.
    """

    root_version: int
    files: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedRelease:
    """A release document as it was signed: ``payload`` (see `release`) and ``(key id, signature)`` pairs."""

    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]


Message = Status | Window | Event | Labels | Ack | Command | TrustBundle | SignedRelease
