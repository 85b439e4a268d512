"""Which message is believed, which is a dead letter, and what a device may forget.

Pure: bytes in, a plan out. The service commits the plan in one transaction, then sends the acknowledgements,
then lets the broker forget the messages. A message that arrives twice is planned twice; the store's unique
key (device, session, seq) counts it once, and the device is told again.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from aggregator.records import Arrival, DeadLetter
from edge_runtime.contract.codec import decode
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import DeviceId, Digest, SessionId
from edge_runtime.contract.manifest import ArtifactInfo
from edge_runtime.contract.messages import Ack, Event, Status, Window
from edge_runtime.contract.profile import FIXED_POINT, Profile
from edge_runtime.contract.topics import Topics

MAX_WINDOW_COUNT: Final = 1 << 32
"""No honest window counts more rows; beyond it sums of a few windows would pass 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One message as it came; ``message`` is what it says, or why it is a dead letter."""

    topic: str
    payload: bytes
    message: Status | Window | Event | DeadLetter


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to commit together, and the acknowledgements that become true by it."""

    windows: tuple[Arrival, ...] = ()
    events: tuple[Event, ...] = ()
    statuses: tuple[Status, ...] = ()
    dead: tuple[DeadLetter, ...] = ()
    acks: tuple[Ack, ...] = ()


def read(topics: Topics, topic: str, payload: bytes) -> Decoded:
    """Decodes one message and holds it against the topic it came on.

    Never raises: the broker would bring a message that ended the service back to the next one. So an error
    that only a mistake in the decoder can make is a dead letter as well.
    """
    message: Status | Window | Event | DeadLetter
    try:
        message = _read(topics, topic, payload)
    except ContractError as e:
        message = DeadLetter(topic, payload, str(e))
    except Exception as e:  # noqa: BLE001
        message = DeadLetter(topic, payload, f"the decoder failed: {type(e).__name__}: {e}")
    return Decoded(topic=topic, payload=payload, message=message)


def _read(topics: Topics, topic: str, payload: bytes) -> Status | Window | Event:
    topics.sender(topic)
    message = decode(payload)
    match message:
        case Status():
            expected = topics.status(message.device)
        case Event():
            expected = topics.event(message.device)
        case Window():
            expected = topics.window(message.device, message.model)
            _check_counts(message)
        case _:
            raise ContractError(f"a {type(message).__name__} is not what devices send")
    if topic != expected:
        raise ContractError(f"the payload belongs on {expected!r}, it came on {topic!r}")
    return message


def _check_counts(w: Window) -> None:
    """Bounds that hold for every honest window under any layout, so that sums stay exact in 64 bits."""
    profile = w.profile
    counts = {
        "rows": profile.rows,
        "failed": w.failed,
        "refused": sum(n for _, n in w.refused),
        "labelled": w.labelled,
        "correct": w.correct,
        "windows": w.windows,
    }
    for name, count in counts.items():
        if count > MAX_WINDOW_COUNT:
            raise ContractError(
                f"window.{name}: {count} is more than the {MAX_WINDOW_COUNT} a window can hold"
            )
    if int(profile.counts.max(initial=0)) > profile.rows:
        raise ContractError(
            f"window.profile: a cell counts {int(profile.counts.max())} of {profile.rows} rows"
        )
    if int(profile.sums.max(initial=0)) > 2 * FIXED_POINT * profile.rows:
        raise ContractError(
            f"window.profile: probabilities of {profile.rows} rows sum to more than {profile.rows}"
        )


def check_profile(profile: Profile, info: ArtifactInfo) -> None:
    """Raises `ContractError` unless ``profile`` is one that a device serving the artifact could have counted."""
    spec = info.reference.spec
    wanted = 1 + spec.classes if info.manifest.probabilities else 0
    profile.check(spec)
    if profile.sums.size != wanted:
        raise ContractError(
            f"profile has {profile.sums.size} sums of probabilities; the artifact's has {wanted}"
        )


def digests(messages: Iterable[Decoded]) -> set[Digest]:
    """The artifacts whose layouts `plan` wants to know."""
    return {m.message.digest for m in messages if isinstance(m.message, Window)}


def plan(messages: Iterable[Decoded], infos: Mapping[Digest, ArtifactInfo]) -> Plan:
    """Sorts a batch.

    ``infos`` holds the artifacts known here. A window of an unknown artifact is kept, and
    acknowledged, unjudged: telemetry is data, and the artifact may be published a minute later. Not
    acknowledging it would only make the device drop it when its outbox is full. A window that contradicts its
    known layout is a dead letter; it is acknowledged too, because sending it again cannot help and the letter
    keeps its bytes.
    """
    windows: list[Arrival] = []
    events: list[Event] = []
    statuses: list[Status] = []
    dead: list[DeadLetter] = []
    done: dict[tuple[DeviceId, SessionId], set[int]] = defaultdict(set)
    for decoded in messages:
        match decoded.message:
            case DeadLetter() as letter:
                dead.append(letter)
            case Status() as status:
                statuses.append(status)
            case Event() as event:
                events.append(event)
                done[event.device, event.session].add(event.seq)
            case Window() as window:
                done[window.device, window.session].add(window.seq)
                info = infos.get(window.digest)
                try:
                    if info is not None:
                        check_profile(window.profile, info)
                except ContractError as e:
                    dead.append(DeadLetter(decoded.topic, decoded.payload, str(e)))
                else:
                    windows.append(Arrival(window=window, payload=decoded.payload, judged=info is not None))
    return Plan(
        windows=tuple(windows),
        events=tuple(events),
        statuses=tuple(statuses),
        dead=tuple(dead),
        acks=tuple(
            Ack(device=device, session=session, seqs=tuple(sorted(seqs)))
            for (device, session), seqs in sorted(done.items())
        ),
    )
