"""What the service, the monitor and the command line ask of the two stores, whoever keeps them.

An implementation of either must pass its conformance kit in ``tests/support``. What the kit demands is the contract;
the methods' own words are with the implementations.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

from aggregator.looks import AlarmEvent, Block, Look, Slice, Trace, Verdict
from aggregator.records import (
    Arrival,
    AuditEntry,
    DeadLetter,
    DeviceRecord,
    DeviceTotals,
    DeviceTruth,
    LateLabels,
    Lease,
    Receipt,
    Request,
    RetrainRequest,
    Rollout,
    Selection,
    Stored,
    StoreFigures,
    Telling,
    Track,
)
from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, ModelName, RolloutId, SourceId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Event, Labels, Window
from edge_runtime.contract.profile import Profile

NEWEST: Final = 2**63 - 1
"""Above every window's number, and after every time of receipt."""


class StoreError(SkiffError):
    """A store refused or failed: disk full, connection lost, read-only. Nothing of the transaction is kept."""


class Unstorable(StoreError):
    """A store cannot hold some value, whenever it is tried: whoever brought it must leave it out."""


class CutDay(StoreError):
    """Part of a day is asked for that is rolled up; the message says which day, and what can be asked instead."""


class WindowStore(Protocol):
    """Telemetry: windows counted once each, merged and counted by filter.

    `profiles`, `latency` and `totals` raise `CutDay`.
    """

    def close(self) -> None:
        """Lets go of the store; what was appended stays."""

    def append(
        self,
        windows: Sequence[Arrival],
        events: Sequence[Event],
        dead: Sequence[DeadLetter],
        received_ns: int,
        *,
        labels: Sequence[Labels] = (),
    ) -> Stored:
        """Commits a batch whole, durable on return; each (device, session, seq) once, for ever, and each
        (device, source, seq) of labels. Raises `Unstorable`, with nothing stored, when one of them can never be.
        """

    def settle(self, digest: Digest, check: Callable[[Profile], object]) -> tuple[int, int]:
        """Judges some of what came before its artifact was known: (accepted, rejected), (0, 0) at the end."""

    def prune(self, before_ns: int) -> int:
        """Rolls up some of what was received before ``before_ns``; how many records, 0 at the end."""

    def unjudged(self) -> tuple[Digest, ...]:
        """Artifacts with windows that wait for their layout."""

    def streams(self) -> tuple[tuple[Digest, DeviceId, int], ...]:
        """Every (artifact, device) that ever sent a window, with the number of its newest."""

    def numbered(self) -> tuple[int, int]:
        """The highest number that any window, and any message of labels, was ever kept under; 0 before the first."""

    def pending(
        self, digest: Digest, after: Mapping[DeviceId, int]
    ) -> dict[DeviceId, tuple[int, float, int]]:
        """(rows, seconds, received_ns of the oldest) of each device's judged windows numbered above ``after``.

        A device that has none is left out. Rows are those answered and those refused, here and in `block` and
        `receipts`.
        """

    def block(
        self,
        digest: Digest,
        device: DeviceId,
        after: int,
        *,
        rows: int,
        seconds: float,
        upto: int = NEWEST,
    ) -> Block | None:
        """The newest windows above ``after`` that cover ``rows`` and ``seconds``, merged.

        Those numbered above ``upto`` are left out.
        """

    def receipts(self, digest: Digest) -> tuple[Receipt, ...]:
        """The artifact's judged windows that are kept one by one, by their numbers."""

    def windows(self, selection: Selection) -> Iterator[Window]:
        """The selected windows, oldest first, as far as they are kept one by one."""

    def profiles(self, selection: Selection) -> tuple[Profile, ...]:
        """The merged profile per layout."""

    def latency(self, selection: Selection) -> LatencyHistogram:
        """All latencies."""

    def totals(self, selection: Selection) -> tuple[DeviceTotals, ...]:
        """Counts per device and artifact."""

    def truths(self, digest: Digest | None = None) -> tuple[DeviceTruth, ...]:
        """What is known of the right answers, by device and artifact, of all time."""

    def late(self, digest: Digest, after: Mapping[DeviceId, int]) -> tuple[LateLabels, ...]:
        """The labels of an artifact, of each device those numbered above ``after``."""

    def periods(self, source: SourceId) -> tuple[int, ...]:
        """The different lengths of the periods that a source told labels of, in nanoseconds."""

    def twins(self, told: Sequence[Labels]) -> dict[str, int]:
        """How many of these another source told with the same counts, by its name."""

    def wire_bytes(self, selection: Selection, quantile: float = 0.5) -> int:
        """A quantile of the size on the wire."""

    def figures(self) -> StoreFigures:
        """Totals since the store was made."""

    def dead_letters(self, limit: int = 100) -> tuple[dict[str, Any], ...]:
        """The newest dead letters."""

    def events(self, limit: int = 100) -> tuple[dict[str, Any], ...]:
        """The newest events."""


class ControlLedger(Protocol):
    """Devices, releases, rollouts, the audit log and orders: what a rollout is controlled by."""

    def close(self) -> None:
        """Lets go of the store."""

    def transaction(self) -> AbstractContextManager[None]:
        """Everything put inside is kept together, durable at the end, or, when it raises, not at all."""

    def put_device(self, r: DeviceRecord) -> None:
        """Writes one device."""

    def devices(self) -> tuple[DeviceRecord, ...]:
        """Every device that ever spoke, sorted."""

    def put_track(self, track: Track) -> None:
        """Writes a track, its rollout and its cohort's revision, which never falls."""

    def tracks(self) -> tuple[Track, ...]:
        """Every cohort and model's control state."""

    def revisions(self) -> dict[CohortId, int]:
        """The highest revision ever saved, by cohort."""

    def cohorts(self) -> dict[RolloutId, CohortId]:
        """The cohort of every rollout there was."""

    def rollout(self, name: str) -> Rollout | None:
        """A rollout by its name, finished ones too."""

    def put_audit(self, e: AuditEntry) -> None:
        """Appends to the audit log."""

    def request(self, kind: str, document: Mapping[str, object], *, by: str, why: str, now_ns: int) -> int:
        """Leaves an order, in a transaction of its own; any process may."""

    def answer(self, number: int) -> tuple[str, str]:
        """(state, reason) of an order; KeyError when unknown."""

    def pending(self) -> tuple[Request, ...]:
        """The orders nobody has answered yet, oldest first; from now on nobody can withdraw them."""

    def put_answer(self, number: int, *, accepted: bool, reason: str) -> None:
        """Answers an order."""

    def table(self, name: str, limit: int = 100) -> tuple[dict[str, Any], ...]:
        """The newest rows of a table, for people."""


class TellingLedger(Protocol):
    """Alarm events on their way to whoever is told: an outbox, written in the transaction of their incident."""

    def transaction(self) -> AbstractContextManager[None]:
        """See `ControlLedger.transaction`."""

    def put_tellings(self, tellings: Iterable[Telling]) -> None:
        """Keeps what is to be told, under numbers that rise and are never given twice."""

    def tellings(self, after: int = 0) -> tuple[Telling, ...]:
        """What was not told yet and is numbered above ``after``, in the order it was put."""

    def put_told(self, numbers: Collection[int]) -> None:
        """Forgets what was told, or given up; numbers that are not there are none."""


class DriftLedger(Protocol):
    """What the monitor remembers between looks, and what it asks for."""

    def transaction(self) -> AbstractContextManager[None]:
        """See `ControlLedger.transaction`."""

    def put_tellings(self, tellings: Iterable[Telling]) -> None:
        """See `TellingLedger.put_tellings`."""

    def put_audit(self, e: AuditEntry) -> None:
        """Appends to the audit log."""

    def put_verdicts(self, digest: Digest, verdicts: Iterable[Verdict]) -> None:
        """Writes what stands for an artifact, in the place of what stood."""

    def verdicts(self) -> tuple[Verdict, ...]:
        """Every standing verdict, newest look first."""

    def put_look(self, digest: Digest, model: ModelName, look: Look, at_ns: int, newest: int = 0) -> None:
        """Keeps what a look came to, for people, and the newest window that was part of it, for a replay."""

    def prune_looks(self, before_ns: int) -> None:
        """Forgets looks taken before ``before_ns``, but each artifact's last; in a transaction of its own."""

    def next_look(self, digest: Digest) -> int:
        """The number of the artifact's next look."""

    def suspects(self, digest: Digest) -> Mapping[str, tuple[DeviceId, ...]]:
        """`Look.suspects` of the artifact's last look."""

    def put_first_look(self, digest: Digest, one: Slice) -> None:
        """Keeps what devices without a past saw in a look."""

    def first_looks(self, digest: Digest) -> tuple[Slice, ...]:
        """What was kept of the devices' first looks, oldest first."""

    def put_traces(
        self, digest: Digest, model: ModelName, traces: Iterable[Trace], at_ns: int
    ) -> tuple[AlarmEvent, ...]:
        """Writes what is remembered of columns, and opens and closes their incidents; what became of them."""

    def traces(self, digest: Digest) -> tuple[Trace, ...]:
        """What is remembered of the artifact's columns."""

    def alarming(self) -> tuple[tuple[Digest, ModelName], ...]:
        """The artifacts with an open incident."""

    def retire(
        self, digest: Digest, model: ModelName, trace: Trace, at_ns: int, why: str
    ) -> tuple[AlarmEvent, ...]:
        """Ends an incident that no look will ever clear, and the verdict that rests on it."""

    def acknowledge(self, number: int, *, by: str, at_ns: int) -> bool:
        """Somebody has seen an incident, in a transaction of its own; any process may."""

    def amend_first_look(
        self, digest: Digest, look: int, device: DeviceId, *, labelled: int, correct: int
    ) -> None:
        """Adds late labels to what is kept of a device's first look."""

    def put_label_cursor(self, digest: Digest, device: DeviceId, last: int) -> None:
        """A look has used the device's late labels up to ``last``."""

    def label_cursors(self) -> dict[tuple[Digest, DeviceId], int]:
        """The newest late labels that a look has used."""

    def put_cursor(self, digest: Digest, device: DeviceId, last: int) -> None:
        """A look has used the device's windows up to ``last``."""

    def cursors(self) -> dict[tuple[Digest, DeviceId], int]:
        """The newest window that a look has used."""

    def put_retrain(self, r: RetrainRequest, state: str) -> int:
        """Keeps a retrain request; its number."""

    def move_retrain(
        self,
        number: int,
        state: str,
        *,
        exit_code: int | None = None,
        output: str = "",
        ended_ns: int | None = None,
    ) -> None:
        """Records what the hook does, in a transaction of its own."""

    def retrains(self, state: str) -> tuple[tuple[int, str], ...]:
        """(number, document) of the requests in ``state``, oldest first."""

    def asked(self, model: ModelName) -> tuple[frozenset[Digest], int | None]:
        """The artifacts that a request was made for, and when the newest was."""


class LeaseLedger(Protocol):
    """Who leads, where several processes share a ledger."""

    def lease(self) -> Lease | None:
        """The lease as it stands."""

    def swap_lease(self, old: Lease | None, new: Lease) -> bool:
        """Puts ``new`` in the place of ``old``, durably; False when another stands there by now."""

    def guard(self, lease: Lease | None) -> None:
        """From now on every transaction raises `LeaseLost` unless ``lease``'s holder still has that term."""


class LedgerStore(ControlLedger, DriftLedger, TellingLedger, LeaseLedger, Protocol):
    """The whole control state."""
