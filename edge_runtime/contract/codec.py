"""Messages to bytes and back: a versioned envelope with size and depth caps. The only msgpack import.

An envelope is ``[major, minor, kind, device, session, seq, body]``. An unknown major is refused, an unknown
kind is refused, unknown fields of a body (a newer minor) are ignored. Sizes are checked before anything is
parsed: 1 MB of empty msgpack maps costs 71 MB with a plain ``unpackb``.

A body is a table of named fields. Since minor 1 the body of a window is a list, whose items have the names and the
order of `WINDOW`, as have its parts (`LATENCY`, `HEALTH`): names took a fifth of the message. Items that a sender does
not know yet are missing at the end, items that a reader does not know yet come after those it knows. Minor 2 adds a
kind, `Labels`, which a centre of minor 1 refuses; nothing else is written otherwise than by minor 1. Minor 3 adds the
table ``shadow`` to a model's report; the state ``shadow`` is written there, and as ``probed`` where minor 2 looks: it
refuses states that it does not know.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

import msgpack
import numpy as np

from edge_runtime.contract import ids, messages, plain
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Message
from edge_runtime.contract.packing import pack_counts, unpack_all, unpack_counts
from edge_runtime.contract.profile import MAX_CLASSES, Counts, Profile

MAJOR: Final = 1
MINOR: Final = 3
MAX_MESSAGE_BYTES: Final = 256 * 1024
MAX_ITEMS: Final = MAX_CLASSES + 1
MAX_LABELLED: Final = 1 << 32
"""No honest source counts more rows in one message; sums of a few beyond it would pass 64 bits."""

WINDOW: Final = (
    *("model", "digest", "layout", "back", "windows", "start", "span", "synced", "rows", "counts", "sums"),
    *("latency", "queueing", "health", "refused", "failed", "labelled", "correct"),
)
"""What the items of a window's body are, in this order; new ones come last."""
_COUNTS: Final = WINDOW.index("counts")
_SHADOW: Final = "shadow"
HEALTH: Final = plain.HEALTH
LATENCY: Final = ("offset", "counts", "zero", "sum", "max")


def latency_body(h: LatencyHistogram) -> dict[str, object]:
    """The histogram as plain data."""
    return {
        "offset": h.offset,
        "counts": list(h.counts),
        "zero": h.zero,
        "sum": h.sum_ns,
        "max": h.max_ns,
    }


def read_latency(f: Fields) -> LatencyHistogram:
    """Reads what `latency_body` wrote; raises the reader's error family or `ContractError`."""
    return LatencyHistogram(
        offset=f.integer("offset", 0),
        counts=f.integers("counts", ()),
        zero=f.integer("zero", 0),
        sum_ns=f.integer("sum", 0),
        max_ns=f.integer("max", 0),
    )


def _optional_digest(f: Fields, name: str) -> ids.Digest | None:
    raw = f.blob(name, b"", max_length=32)
    return ids.digest(raw.hex()) if raw else None


def _raw(digest: ids.Digest | None) -> bytes:
    return bytes.fromhex(digest) if digest else b""


def _report_body(r: messages.ModelReport) -> dict[str, object]:
    return {
        "model": r.model,
        "state": "probed" if r.state == _SHADOW else r.state,
        "serving": _raw(r.serving),
        "previous": _raw(r.previous),
        "candidate": _raw(r.candidate),
        "rollout": r.rollout,
        "revision": r.revision,
        "outcome": r.outcome,
        "outcome_digest": _raw(r.outcome_digest),
        "reason": r.reason,
        "quarantined": [_raw(d) for d in r.quarantined],
        **_shadow_body(r),
    }


def _shadow_body(r: messages.ModelReport) -> dict[str, object]:
    """Nothing where there is nothing to tell, so that such reports are what minor 2 wrote."""
    if r.state != _SHADOW and not r.shadow_rows:
        return {}
    return {"shadow": {"now": r.state == _SHADOW, "rows": r.shadow_rows, "disagreed": r.shadow_disagreed}}


def _read_report(f: Fields) -> messages.ModelReport:
    quarantined = []
    for item in f.items("quarantined", ()):
        if not isinstance(item, bytes):
            raise f.fail("quarantined", "expected digests as bytes")
        quarantined.append(ids.digest(item.hex()))
    shadow = f.section("shadow", {})
    return messages.ModelReport(
        model=ids.model_name(f.text("model")),
        state=_SHADOW if shadow.flag("now", False) else f.text("state", choices=messages.SLOT_STATES),
        serving=_optional_digest(f, "serving"),
        previous=_optional_digest(f, "previous"),
        candidate=_optional_digest(f, "candidate"),
        rollout=f.text("rollout", "", max_length=64),
        revision=f.integer("revision", 0),
        outcome=f.text("outcome", "", choices=messages.OUTCOMES),
        outcome_digest=_optional_digest(f, "outcome_digest"),
        reason=f.text("reason", ""),
        quarantined=tuple(quarantined),
        shadow_rows=shadow.integer("rows", 0),
        shadow_disagreed=shadow.integer("disagreed", 0),
    )


def _status_body(m: messages.Status) -> dict[str, object]:
    return {
        "online": m.online,
        "attributes": dict(m.attributes),
        "models": [_report_body(r) for r in m.models],
        "last_exit": m.last_exit,
        "restarts": m.restarts,
        "clock": m.clock,
    }


def _read_status(origin: "_Origin", f: Fields) -> messages.Status:
    return messages.Status(
        device=origin.device(),
        session=origin.session(),
        seq=origin.seq,
        online=f.flag("online"),
        attributes=f.pairs("attributes", {}),
        models=tuple(_read_report(r) for r in f.sections("models", ())),
        last_exit=f.text("last_exit", ""),
        restarts=f.integer("restarts", 0),
        clock=f.text("clock", "", choices=messages.CLOCKS),
    )


def _latency_list(h: LatencyHistogram) -> list[object]:
    return list(latency_body(h).values())


def _window_body(m: messages.Window) -> list[object]:
    return [
        *(m.model, _raw(m.digest), bytes.fromhex(m.profile.layout), m.seq - m.seq_lo, m.windows),
        *(m.start_ns, m.end_ns - m.start_ns, m.synced),
        *(m.profile.rows, pack_counts(m.profile.counts), m.profile.sums.tolist()),
        *(_latency_list(m.latency), _latency_list(m.queueing)),
        list(dataclasses.astuple(m.health)),
        *(dict(m.refused), m.failed, m.labelled, m.correct),
    ]


def _listed(items: object, names: tuple[str, ...], path: str) -> Fields:
    """The items of a list under their names; further ones are of a newer minor."""
    if not isinstance(items, list):
        raise ContractError(f"{path}: expected a list of {', '.join(names)}")
    return Fields(dict(zip(names, items, strict=False)), path)


def _read_profile(origin: "_Origin", f: Fields) -> Profile:
    layout, rows, packed = f.blob("layout", max_length=8), f.integer("rows"), f.blob("counts")
    counts = unpack_counts(packed) if origin.counts is None else origin.counts
    if isinstance(counts, ContractError):
        raise counts
    return Profile(
        layout=ids.layout_id(layout.hex()),
        rows=rows,
        counts=counts,
        sums=np.asarray(f.integers("sums", ()), np.int64),
    )


def _read_window(origin: "_Origin", f: Fields) -> messages.Window:
    """Both bodies of a window: by position (``f`` has the items' names already), or by name, of minor 0."""
    start_ns = f.integer("start")
    if "profile" in f.names():
        seq_lo, end_ns = f.integer("lo", origin.seq, high=origin.seq), f.integer("end")
        profile, latency = _read_profile(origin, f.section("profile")), read_latency(f.section("latency"))
        queueing = LatencyHistogram()
    else:
        seq_lo = origin.seq - f.integer("back", high=origin.seq)
        end_ns = start_ns + f.integer("span", low=-start_ns, high=2**63 - 1 - start_ns)
        profile = _read_profile(origin, f)
        latency, queueing = (
            read_latency(_listed(f.items(name, ()), LATENCY, f"window.{name}"))
            for name in ("latency", "queueing")
        )
    health = dict(zip(HEALTH, f.integers("health", ()), strict=False))
    window = messages.Window(
        device=origin.device(),
        session=origin.session(),
        seq=origin.seq,
        seq_lo=seq_lo,
        model=ids.model_name(f.text("model")),
        digest=ids.digest(f.blob("digest", max_length=32).hex()),
        start_ns=start_ns,
        end_ns=end_ns,
        synced=f.flag("synced"),
        profile=profile,
        latency=latency,
        health=messages.Health(**health),
        refused=f.counts("refused", {}),
        failed=f.integer("failed", 0),
        labelled=f.integer("labelled", 0),
        correct=f.integer("correct", 0),
        windows=f.integer("windows", 1, low=1),
        queueing=queueing,
    )
    if window.correct > window.labelled:
        raise f.fail("correct", f"{window.correct} is more than the {window.labelled} labelled rows")
    # `windows` may exceed the numbers: those of earlier sessions, never sent, are merged under a later one's.
    return window


def _event_body(m: messages.Event) -> dict[str, object]:
    return {"wall": m.wall_ns, "name": m.name, "detail": dict(m.detail)}


def _read_event(origin: "_Origin", f: Fields) -> messages.Event:
    return messages.Event(
        device=origin.device(),
        session=origin.session(),
        seq=origin.seq,
        wall_ns=f.integer("wall"),
        name=f.text("name", max_length=64),
        detail=f.pairs("detail", {}),
    )


def _labels_body(m: messages.Labels) -> dict[str, object]:
    return {
        "source": m.source,
        "model": m.model,
        "digest": _raw(m.digest),
        "start": m.start_ns,
        "end": m.end_ns,
        "labelled": m.labelled,
        "correct": m.correct,
    }


def _read_labels(origin: "_Origin", f: Fields) -> messages.Labels:
    start_ns = f.integer("start")
    labels = messages.Labels(
        device=origin.device(),
        session=origin.session(),
        seq=origin.seq,
        source=ids.source_id(f.text("source")),
        model=ids.model_name(f.text("model")),
        digest=ids.digest(f.blob("digest", max_length=32).hex()),
        start_ns=start_ns,
        end_ns=f.integer("end", low=start_ns),
        labelled=f.integer("labelled", low=1, high=MAX_LABELLED),
        correct=f.integer("correct"),
    )
    if labels.correct > labels.labelled:
        raise f.fail("correct", f"{labels.correct} is more than the {labels.labelled} labelled rows")
    return labels


def _read_ack(origin: "_Origin", f: Fields) -> messages.Ack:
    return messages.Ack(device=origin.device(), session=origin.session(), seqs=f.integers("seqs"))


def _read_command(origin: "_Origin", f: Fields) -> messages.Command:
    return messages.Command(
        device=origin.device(),
        name=f.text("name", choices=messages.COMMANDS),
        correlation=f.text("correlation", "", max_length=64),
    )


def _read_bundle(_: "_Origin", f: Fields) -> messages.TrustBundle:
    files = f.section("files")
    return messages.TrustBundle(
        root_version=f.integer("root_version", low=1),
        files=tuple(sorted((name, files.blob(name)) for name in files.names())),
    )


def _read_release(_: "_Origin", f: Fields) -> messages.SignedRelease:
    signatures = f.section("signatures")
    return messages.SignedRelease(
        payload=f.blob("payload", max_length=64 * 1024),
        signatures=tuple(sorted((key, signatures.blob(key, max_length=1024)) for key in signatures.names())),
    )


class _Origin:
    """The envelope's address fields, validated when a kind needs them.

    ``counts`` are a window's, where they were unpacked with others' already, or what is wrong with them.
    """

    __slots__ = ("counts", "name", "run", "seq")

    def __init__(self, device: str, session: str, seq: int) -> None:
        self.name = device
        self.run = session
        self.seq = seq
        self.counts: Counts | ContractError | None = None

    def device(self) -> ids.DeviceId:
        return ids.device_id(self.name)

    def session(self) -> ids.SessionId:
        return ids.session_id(self.run)


_Envelope = tuple[int, _Origin, object]

KINDS: Final = {
    1: "status",
    2: "window",
    3: "event",
    4: "ack",
    5: "command",
    6: "trust",
    7: "release",
    8: "labels",
}
_WINDOW: Final = 2
_READERS: Final[dict[int, Callable[[_Origin, Fields], Message]]] = {
    1: _read_status,
    2: _read_window,
    3: _read_event,
    4: _read_ack,
    5: _read_command,
    6: _read_bundle,
    7: _read_release,
    8: _read_labels,
}


def _parts(message: Message) -> tuple[int, str, str, int, object]:  # noqa: PLR0911 (one per kind)
    """Kind, device, session, seq and body."""
    match message:
        case messages.Status():
            return 1, message.device, message.session, message.seq, _status_body(message)
        case messages.Window():
            return 2, message.device, message.session, message.seq, _window_body(message)
        case messages.Event():
            return 3, message.device, message.session, message.seq, _event_body(message)
        case messages.Ack():
            return 4, message.device, message.session, 0, {"seqs": list(message.seqs)}
        case messages.Command():
            return 5, message.device, "", 0, {"name": message.name, "correlation": message.correlation}
        case messages.TrustBundle():
            return 6, "", "", 0, {"root_version": message.root_version, "files": dict(message.files)}
        case messages.SignedRelease():
            return 7, "", "", 0, {"payload": message.payload, "signatures": dict(message.signatures)}
        case messages.Labels():
            return 8, message.device, message.session, message.seq, _labels_body(message)


def encode(message: Message) -> bytes:
    """The message's bytes; raises `ContractError` when the other side would refuse them, for their size or a field."""
    data = msgpack.packb([MAJOR, MINOR, *_parts(message)], use_bin_type=True)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ContractError(
            f"{type(message).__name__} of {len(data)} bytes is larger than the {MAX_MESSAGE_BYTES} allowed"
        )
    if not (
        isinstance(message, messages.Ack) and plain.is_ack(message.device, message.session, message.seqs)
    ):
        decode(data)
    return data


def decode(data: bytes) -> Message:
    """The message in ``data``; raises `ContractError` on anything a peer of this major would not send."""
    (found,) = decode_all((data,))
    if isinstance(found, ContractError):
        raise found
    return found


def decode_all(messages: Sequence[bytes]) -> list[Message | ContractError]:
    """`decode` of many at once: each one's message, or what it would raise. Windows' counters are unpacked together."""
    opened: list[_Envelope | ContractError] = []
    windows: list[tuple[_Origin, bytes]] = []
    for data in messages:
        try:
            envelope = _open(data)
        except ContractError as e:
            opened.append(e)
            continue
        opened.append(envelope)
        kind, origin, body = envelope
        if (
            kind == _WINDOW
            and type(body) is list
            and len(body) > _COUNTS
            and isinstance(body[_COUNTS], bytes)
        ):
            windows.append((origin, body[_COUNTS]))
    for (origin, _), counts in zip(windows, unpack_all([packed for _, packed in windows]), strict=True):
        origin.counts = counts
    found: list[Message | ContractError] = []
    for one in opened:
        try:
            found.append(one if isinstance(one, ContractError) else _read(*one))
        except ContractError as e:
            found.append(e)
    return found


def _read(kind: int, origin: _Origin, body: object) -> Message:
    if kind == _WINDOW and isinstance(body, list):
        if isinstance(origin.counts, np.ndarray):
            window = plain.read_window(origin.name, origin.run, origin.seq, body, origin.counts)
            if window is not None:
                return window
        return _read_window(origin, _listed(body, WINDOW, "window"))
    return _READERS[kind](origin, Fields(body, KINDS[kind]))


def _open(data: bytes) -> _Envelope:
    """The envelope: the message's kind, its address and its body."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ContractError(f"message of {len(data)} bytes is larger than the {MAX_MESSAGE_BYTES} allowed")
    try:
        found = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=4096,
            max_bin_len=MAX_MESSAGE_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as e:
        raise ContractError(f"message is not valid msgpack within the caps: {e}") from e
    if not isinstance(found, list) or len(found) < 7:
        raise ContractError("message is not an envelope [major, minor, kind, device, session, seq, body]")
    major, _minor, kind, device, session, seq, body = found[:7]
    if isinstance(major, bool) or not isinstance(major, int) or major != MAJOR:
        raise ContractError(
            f"message of contract version {major!r}; this side speaks {MAJOR}: update the older one"
        )
    if isinstance(kind, bool) or not isinstance(kind, int) or kind not in _READERS:
        raise ContractError(f"message of unknown kind {kind!r}; known kinds: {sorted(_READERS)}")
    if not (isinstance(device, str) and isinstance(session, str)):
        raise ContractError("envelope: device and session must be text")
    if isinstance(seq, bool) or not isinstance(seq, int) or not 0 <= seq < 2**63:
        raise ContractError(f"envelope: seq {seq!r} is not a whole number in [0, 2^63)")
    return kind, _Origin(device, session, seq), body
