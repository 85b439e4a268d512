"""Which message is believed, which is a dead letter, and what a device may forget.

Pure: bytes in, a plan out. The service commits the plan in one transaction, then sends the acknowledgements,
then lets the broker forget the messages. A message that arrives twice is planned twice; the store's unique
key (device, session, seq) counts it once, and the device is told again. Labels have the key (device, source, seq), and
their source is told.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from aggregator.records import Arrival, DeadLetter
from edge_runtime.contract.codec import decode, decode_all
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import DeviceId, Digest, SessionId, SourceId
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.manifest import ArtifactInfo
from edge_runtime.contract.messages import Ack, Event, Labels, Message, Status, Window
from edge_runtime.contract.profile import FIXED_POINT, Profile, fit
from edge_runtime.contract.topics import Topics

MAX_WINDOW_COUNT: Final = 1 << 32
"""No honest window counts more rows; beyond it sums of a few windows would pass 64 bits."""
MAX_TIME_NS: Final = 9_223_372_036 * 10**9
"""No clock shows a later time, however wrong it is: Linux counts no further (``KTIME_SEC_MAX``), but 63 bits do."""
MAX_DURATION_NS: Final = 1 << 58
"""Nine years: predictions of one model come one after another, so all of a record's together took no longer."""
MAX_WAITS: Final = 4 * MAX_WINDOW_COUNT
"""A row waits in the feed and for the model, also one that fails then, and is counted when its answer is there."""
_KNOWN: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One message as it came; ``message`` is what it says, or why it is a dead letter."""

    topic: str
    payload: bytes
    message: Status | Window | Event | Labels | DeadLetter


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to commit together, and the acknowledgements that become true by it."""

    windows: tuple[Arrival, ...] = ()
    events: tuple[Event, ...] = ()
    labels: tuple[Labels, ...] = ()
    statuses: tuple[Status, ...] = ()
    dead: tuple[DeadLetter, ...] = ()
    acks: tuple[Ack, ...] = ()
    labels_acks: tuple[tuple[SourceId, Ack], ...] = ()


def read(topics: Topics, topic: str, payload: bytes) -> Decoded:
    """`read_all` of one message."""
    (found,) = read_all(topics, ((topic, payload),))
    return found


def read_all(topics: Topics, messages: Sequence[tuple[str, bytes]]) -> list[Decoded]:
    """Decodes messages, each a topic and a payload, and holds them against the topics they came on.

    Never raises: the broker would bring a message that ended the service back to the next one. So an error
    that only a mistake in the decoder can make is a dead letter as well.
    """
    opened: Sequence[Message | ContractError | None]
    try:
        opened = decode_all([payload for _, payload in messages])
    except Exception:  # noqa: BLE001 (one of them; alone each says for itself)
        opened = [None] * len(messages)
    found = []
    for (topic, payload), one in zip(messages, opened, strict=True):
        message: Status | Window | Event | Labels | DeadLetter
        try:
            message = _read(topics, topic, payload, _alone(payload) if one is None else one)
        except Exception as e:  # noqa: BLE001
            message = DeadLetter(topic, payload, f"the decoder failed: {type(e).__name__}: {e}", "decoder")
        found.append(Decoded(topic=topic, payload=payload, message=message))
    return found


def _alone(payload: bytes) -> Message | ContractError:
    try:
        return decode(payload)
    except ContractError as e:
        return e


def _read(
    topics: Topics, topic: str, payload: bytes, message: Message | ContractError
) -> Status | Window | Event | Labels | DeadLetter:
    cause = "topic"
    try:
        # A window on its own topic is the common case, and that is one of a device.
        if not isinstance(message, Window) or topic != topics.window(message.device, message.model):
            _check_topic(topics, topic)
        cause = "payload"
        if isinstance(message, ContractError):
            raise message
        cause = "counts"
        check_believable(message)
    except ContractError as e:
        return DeadLetter(topic, payload, str(e), cause)
    match message:
        case Status():
            expected = topics.status(message.device)
        case Event():
            expected = topics.event(message.device)
        case Window():
            expected = topics.window(message.device, message.model)
        case Labels():
            expected = topics.labels(message.source)
        case _:
            return DeadLetter(topic, payload, f"a {type(message).__name__} is not what devices send", "kind")
    if topic != expected:
        return DeadLetter(
            topic, payload, f"the payload belongs on {expected!r}, it came on {topic!r}", "sender"
        )
    return message


def sender(topics: Topics, topic: str) -> str:
    """Whose turn a message takes: its device's, or for statuses one apart; all strangers share one.

    A device whose windows are too many may still say that it is there, and its last will that it is not. Labels take
    their source's turn.
    """
    try:
        return _sender(topics, topic)
    except ContractError:
        return "?"


# What is nobody's topic is not remembered, so this holds short texts only.
@lru_cache(_KNOWN)
def _sender(topics: Topics, topic: str) -> str:
    source = topics.source(topic)
    if source is not None:
        return f"{source} labels"
    device, what = topics.sender(topic)
    return f"{device} status" if what == "status" else device


def _check_topic(topics: Topics, topic: str) -> None:
    """Raises `ContractError` unless a device or a source of labels writes there."""
    if topics.source(topic) is None:
        topics.sender(topic)


def check_labels(labels: Labels, info: ArtifactInfo) -> None:
    """Raises `ContractError` unless the artifact could have given the answers that ``labels`` are about."""
    manifest = info.manifest
    if labels.model != manifest.name:
        raise ContractError(
            f"labels.model: the artifact is one of {manifest.name!r}, not of {labels.model!r}"
        )
    if not manifest.labels:
        raise ContractError(
            f"labels: {manifest.name!r} has no single right answer to count (its task is {manifest.task})"
        )


def _contradiction(labels: Labels, info: ArtifactInfo | None) -> str:
    """What is wrong with labels of an artifact that is known here, empty when nothing is."""
    try:
        if info is not None:
            check_labels(labels, info)
    except ContractError as e:
        return str(e)
    return ""


def check_believable(message: Message) -> None:
    """Raises `ContractError` where a number or a time is one that no honest sender has: so sums stay in 63 bits."""
    match message:
        case Window():
            _check_times("window", start=message.start_ns, end=message.end_ns)
            _check_counts(message)
        case Event():
            _check_times("event", wall=message.wall_ns)
        case Labels():
            _check_times("labels", start=message.start_ns, end=message.end_ns)
        case _:
            pass


def _check_times(what: str, **times_ns: int) -> None:
    for name, at_ns in times_ns.items():
        if at_ns > MAX_TIME_NS:
            raise ContractError(f"{what}.{name}: {at_ns} ns is later than any clock shows ({MAX_TIME_NS})")


def _check_durations(name: str, h: LatencyHistogram, most: int) -> None:
    """Bounds of a histogram of at most ``most`` durations, which hold for merged ones, too."""
    count = h.count
    if count > most:
        raise ContractError(f"window.{name}: counts {count} durations where there can be {most}")
    if h.max_ns > MAX_DURATION_NS:
        raise ContractError(
            f"window.{name}: {h.max_ns} ns is more than the {MAX_DURATION_NS} a record can take"
        )
    if h.sum_ns > count * h.max_ns:
        raise ContractError(f"window.{name}: {count} durations of at most {h.max_ns} ns sum to {h.sum_ns}")


def _check_counts(w: Window) -> None:
    """Bounds that hold for every honest window under any layout, so that sums stay exact in 64 bits."""
    profile = w.profile
    refused = sum(n for _, n in w.refused) if w.refused else 0
    if max(profile.rows, w.failed, refused, w.labelled, w.correct, w.windows) > MAX_WINDOW_COUNT:
        counts = {
            "rows": profile.rows,
            "failed": w.failed,
            "refused": refused,
            "labelled": w.labelled,
            "correct": w.correct,
            "windows": w.windows,
        }
        name, count = next((name, count) for name, count in counts.items() if count > MAX_WINDOW_COUNT)
        raise ContractError(f"window.{name}: {count} is more than the {MAX_WINDOW_COUNT} a window can hold")
    if (top := int(np.maximum.reduce(profile.counts, initial=0))) > profile.rows:
        raise ContractError(f"window.profile: a cell counts {top} of {profile.rows} rows")
    if max(profile.sums.tolist(), default=0) > 2 * FIXED_POINT * profile.rows:
        raise ContractError(
            f"window.profile: probabilities of {profile.rows} rows sum to more than {profile.rows}"
        )
    # One duration for each call that was answered; it may have been of many rows.
    _check_durations("latency", w.latency, profile.rows + w.failed + refused)
    if w.latency.sum_ns > MAX_DURATION_NS:
        raise ContractError(
            f"window.latency: {w.latency.sum_ns} ns is more than the {MAX_DURATION_NS} a record can take"
        )
    _check_durations("queueing", w.queueing, MAX_WAITS)


def check_profile(profile: Profile, info: ArtifactInfo) -> None:
    """Raises `ContractError` unless ``profile`` is one that a device serving the artifact could have counted."""
    profile.check(info.reference.spec)
    wanted = _sums(info)
    if profile.sums.size != wanted:
        raise ContractError(
            f"profile has {profile.sums.size} sums of probabilities; the artifact's has {wanted}"
        )


def _sums(info: ArtifactInfo) -> int:
    """How many sums of probabilities a device that serves the artifact keeps."""
    return 1 + info.reference.spec.classes if info.manifest.probabilities else 0


def _fitting(messages: Sequence[Decoded], infos: Mapping[Digest, ArtifactInfo]) -> set[int]:
    """The places of the windows that `check_profile` would let pass under their artifacts; all of one at once."""
    of: dict[Digest, list[tuple[int, Profile]]] = defaultdict(list)
    for i, decoded in enumerate(messages):
        window = decoded.message
        if isinstance(window, Window) and window.digest in infos:
            of[window.digest].append((i, window.profile))
    found = set()
    for digest, members in of.items():
        info = infos[digest]
        wanted = _sums(info)
        fits = fit([profile for _, profile in members], info.reference.spec)
        found |= {
            i
            for (i, profile), is_fit in zip(members, fits, strict=True)
            if is_fit and profile.sums.size == wanted
        }
    return found


def digests(messages: Iterable[Decoded]) -> set[Digest]:
    """The artifacts whose layouts `plan` wants to know."""
    return {m.message.digest for m in messages if isinstance(m.message, Window | Labels)}


def plan(messages: Sequence[Decoded], infos: Mapping[Digest, ArtifactInfo]) -> Plan:
    """Sorts a batch.

    ``infos`` holds the artifacts known here. A window of an unknown artifact is kept, and
    acknowledged, unjudged: telemetry is data, and the artifact may be published a minute later. Not
    acknowledging it would only make the device drop it when its outbox is full. A window that contradicts its
    known layout is a dead letter; it is acknowledged too, because sending it again cannot help and the letter
    keeps its bytes. Labels are kept and acknowledged likewise.
    """
    windows: list[Arrival] = []
    events: list[Event] = []
    labels: list[Labels] = []
    statuses: list[Status] = []
    dead: list[DeadLetter] = []
    told: dict[tuple[SourceId, DeviceId, SessionId], set[int]] = defaultdict(set)
    done: dict[tuple[DeviceId, SessionId], set[int]] = defaultdict(set)
    fitting = _fitting(messages, infos)
    for i, decoded in enumerate(messages):
        match decoded.message:
            case DeadLetter() as letter:
                dead.append(letter)
            case Status() as status:
                statuses.append(status)
            case Event() as event:
                events.append(event)
                done[event.device, event.session].add(event.seq)
            case Labels() as one:
                told[one.source, one.device, one.session].add(one.seq)
                wrong = _contradiction(one, infos.get(one.digest))
                if wrong:
                    dead.append(DeadLetter(decoded.topic, decoded.payload, wrong, "labels"))
                else:
                    labels.append(one)
            case Window() as window:
                done[window.device, window.session].add(window.seq)
                info = infos.get(window.digest)
                try:
                    if info is not None and i not in fitting:
                        check_profile(window.profile, info)
                except ContractError as e:
                    dead.append(DeadLetter(decoded.topic, decoded.payload, str(e), "layout"))
                else:
                    windows.append(Arrival(window=window, payload=decoded.payload, judged=info is not None))
    return Plan(
        windows=tuple(windows),
        events=tuple(events),
        labels=tuple(labels),
        statuses=tuple(statuses),
        dead=tuple(dead),
        acks=tuple(
            Ack(device=device, session=session, seqs=tuple(sorted(seqs)))
            for (device, session), seqs in sorted(done.items())
        ),
        labels_acks=tuple(
            (source, Ack(device=device, session=session, seqs=tuple(sorted(seqs))))
            for (source, device, session), seqs in sorted(told.items())
        ),
    )
