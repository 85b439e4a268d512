"""The wire contract as an AsyncAPI 3.0 document, for readers and writers in other languages.

``python -m tests.golden.asyncapi`` writes docs/reference/asyncapi.json; a test compares the file with a fresh one, and
another holds the bytes of every kind of message against it.
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any, Final

from aggregator.core.standing import KINDS
from edge_runtime.contract import codec, ids, messages, packing, topics
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, FleetId, ModelName, SourceId
from edge_runtime.contract.latency import SCALE, LatencyHistogram
from edge_runtime.contract.profile import Profile
from edge_runtime.contract.topics import Delivery, Topics

PAGE: Final = Path(__file__).parents[2] / "docs" / "reference" / "asyncapi.json"
Schema = dict[str, Any]

TYPES: Final[dict[str, type]] = {
    "status": messages.Status,
    "window": messages.Window,
    "event": messages.Event,
    "labels": messages.Labels,
    "ack": messages.Ack,
    "command": messages.Command,
    "trust": messages.TrustBundle,
    "release": messages.SignedRelease,
}
"""What each kind of `codec.KINDS` carries."""


# ── schemas ────────────────────────────────────────────────────────────────────────────────────────────


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _whole(says: str = "", *, low: int = 0, high: int = 2**63 - 1) -> Schema:
    found: Schema = {"type": "integer", "minimum": low, "maximum": high}
    return {**found, "description": says} if says else found


def _text(
    says: str, pattern: re.Pattern[str] | None = None, choices: tuple[str, ...] = (), most: int = 1024
) -> Schema:
    found: Schema = {"type": "string", "description": says}
    if choices:
        return {**found, "enum": list(choices)}
    return {**found, "pattern": f"^{pattern.pattern}$"} if pattern else {**found, "maxLength": most}


def _bytes(says: str, *, least: int = 0, most: int = codec.MAX_MESSAGE_BYTES) -> Schema:
    """MessagePack's ``bin``; lengths are in bytes."""
    return {"type": "string", "format": "binary", "minLength": least, "maxLength": most, "description": says}


def _flag(says: str) -> Schema:
    return {"type": "boolean", "description": says}


def _many(items: Schema, says: str) -> Schema:
    return {"type": "array", "items": items, "maxItems": codec.MAX_ITEMS, "description": says}


def _table(values: Schema, says: str) -> Schema:
    """A map from text to one kind of value."""
    return {
        "type": "object",
        "additionalProperties": values,
        "maxProperties": codec.MAX_ITEMS,
        "description": says,
    }


def _named(properties: dict[str, Schema], required: tuple[str, ...], says: str) -> Schema:
    """A map with these keys; readers ignore others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": True,
        "description": says,
    }


def _listed(items: dict[str, Schema], required: int, says: str) -> Schema:
    """A list whose items stand for names; readers ignore further ones, and take defaults for those not there."""
    return {
        "type": "array",
        "items": [
            {"title": name, **({"allOf": [schema]} if "$ref" in schema else schema)}
            for name, schema in items.items()
        ],
        "minItems": required,
        "additionalItems": True,
        "description": says,
    }


def _doc(what: type) -> str:
    return inspect.cleandoc(what.__doc__ or "")


def _digest(says: str, *, optional: bool = True) -> Schema:
    return _bytes(f"SHA-256, 32 bytes: {says}" + ("; empty when there is none" if optional else ""), most=32)


def _window() -> Schema:
    duration = "as `latency`; what a row waited before it was predicted"
    fields: dict[str, Schema] = {
        "model": _text("the model family", ids.NAME),
        "digest": _bytes("SHA-256 of the artifact that predicted", least=32, most=32),
        "layout": _bytes("id of the layout the counters are cut by", least=8, most=8),
        "back": _whole("how far the first number merged into this record (`seq_lo`) lies before `seq`"),
        "windows": _whole("how many closed windows the record holds", low=1),
        "start": _whole("nanoseconds since 1970"),
        "span": _whole("nanoseconds from start to end; below 0 when the clock was set back", low=-(2**63)),
        "synced": _flag("whether the clock could be trusted"),
        "rows": _whole("rows that were counted"),
        "counts": _ref("Counts"),
        "sums": _many(
            _whole(), "sums of probabilities in units of 2^-20: of the largest, then of each class"
        ),
        "latency": _ref("Latency"),
        "queueing": {"allOf": [_ref("Latency")], "description": duration},
        "health": _ref("Health"),
        "refused": _table(_whole(), "rows answered with an error, by reason"),
        "failed": _whole("predictions that broke inside the engine"),
        "labelled": _whole("rows whose truth was known"),
        "correct": _whole("how many of those were right; never more than `labelled`"),
    }
    if tuple(fields) != codec.WINDOW:
        raise ValueError(f"the document describes {tuple(fields)}, the codec writes {codec.WINDOW}")
    return _listed(fields, codec.WINDOW.index("sums"), f"{_doc(messages.Window)}\n\nProfile: {_doc(Profile)}")


def _latency() -> Schema:
    fields = {
        "offset": _whole("index of the first bucket"),
        "counts": _many(_whole(), "one count a bucket; neither the first nor the last is 0"),
        "zero": _whole("durations of 0 ns"),
        "sum": _whole("sum of all durations in nanoseconds"),
        "max": _whole("the longest in nanoseconds"),
    }
    buckets = f"Bucket i holds durations d with base^i < d <= base^(i+1), base = 2^(2^-{SCALE})."
    says = f"{_doc(LatencyHistogram)}\n\n{buckets}"
    return _listed({name: fields[name] for name in codec.LATENCY}, 0, says)


def _status() -> Schema:
    return _named(
        {
            "online": _flag("true for a birth, false for a death"),
            "attributes": _table(_text("value"), "what the device is, by name"),
            "models": _many(_ref("ModelReport"), "one report for each model family"),
            "last_exit": _text("how the process before this one ended"),
            "restarts": _whole("starts since the last that was asked for"),
            "clock": _text("the clock's state; empty when unknown", choices=messages.CLOCKS),
        },
        ("online",),
        _doc(messages.Status),
    )


def _report() -> Schema:
    return _named(
        {
            "model": _text("the model family", ids.NAME),
            "state": _text("where its slots are", choices=messages.SLOT_STATES),
            "serving": _digest("what answers predictions"),
            "previous": _digest("what is kept to fall back to"),
            "candidate": _digest("what is fetched, proven or tried"),
            "rollout": _text("the last release that was verified", most=64),
            "revision": _whole("its revision"),
            "outcome": _text("how the last rollout ended here", choices=messages.OUTCOMES),
            "outcome_digest": _digest("what it was about"),
            "reason": _text("why it ended so"),
            "quarantined": _many(_digest("never tried again", optional=False), "artifacts refused here"),
        },
        ("model", "state"),
        _doc(messages.ModelReport),
    )


def _bodies() -> dict[str, Schema]:
    event = {
        "wall": _whole("nanoseconds since 1970"),
        "name": _text("stable name", most=64),
        "detail": _table(_text("value"), "the rest, by name"),
    }
    labels = {
        "source": _text("who tells; the same as in the topic", ids.NAME),
        "model": _text("the model family", ids.NAME),
        "digest": _bytes("SHA-256 of the artifact that predicted", least=32, most=32),
        "start": _whole("nanoseconds since 1970: when the first of the rows may have been predicted"),
        "end": _whole("when the time ends that the rows were predicted in; not before `start`"),
        "labelled": _whole("rows whose truth is known", low=1, high=codec.MAX_LABELLED),
        "correct": _whole(
            "how many of those were right; never more than `labelled`", high=codec.MAX_LABELLED
        ),
    }
    command = {
        "name": _text("the order", choices=messages.COMMANDS),
        "correlation": _text("who asked", most=64),
    }
    trust = {
        "root_version": _whole("for devices whose trusted root is this", low=1),
        "files": _table(_bytes("content"), "metadata by file name"),
    }
    release = {
        "payload": _bytes("the release document, JSON, as it was signed", most=64 * 1024),
        "signatures": _table(_bytes("signature", most=1024), "signatures by key id"),
    }
    return {
        "status": _status(),
        "window": _window(),
        "event": _named(event, ("wall", "name"), _doc(messages.Event)),
        "labels": _named(labels, tuple(labels), _doc(messages.Labels)),
        "ack": _named({"seqs": _many(_whole(), "what is stored")}, ("seqs",), _doc(messages.Ack)),
        "command": _named(command, ("name",), _doc(messages.Command)),
        "trust": _named(trust, ("root_version", "files"), _doc(messages.TrustBundle)),
        "release": _named(release, ("payload", "signatures"), _doc(messages.SignedRelease)),
    }


def _envelope(kind: int, body: Schema, what: type) -> Schema:
    """``[major, minor, kind, device, session, seq, body]``; what a kind does not use is empty or 0."""
    has = {field.name for field in dataclasses.fields(what)}
    nobody: Schema = {"type": "string", "description": "not used by this kind: empty"}
    fields = {
        "major": {"const": codec.MAJOR, "description": "another is refused"},
        "minor": _whole(f"{codec.MINOR} today; readers take any"),
        "kind": {"const": kind},
        "device": _text("the sender, or who is addressed, or whose rows they are", ids.NAME)
        if "device" in has
        else nobody,
        "session": _text("one start of its daemon", ids.SESSION) if "session" in has else nobody,
        "seq": _whole("number of the message in its session"),
        "body": body,
    }
    return _listed(fields, len(fields), _doc(what))


def _alarm() -> Schema:
    fields = {
        "schema": _whole("1"),
        "id": _text("the same when the event is told again"),
        "fleet": _text("the fleet's name", ids.NAME),
        "event": _text("what became of the incident", choices=("opened", "escalated", "closed")),
        "incident": _whole("its number in the ledger", low=1),
        "model": _text("the model family", ids.NAME),
        "digest": _text("SHA-256 of the artifact", ids.DIGEST),
        "at_ns": _whole("when, in nanoseconds since 1970"),
        "kind": _text("what moved", choices=KINDS),
        "feature": {"type": ["string", "null"], "description": "the column; null when an output moved"},
        "cohort": _text("`fleet`, or `attribute=value`"),
        "opened_window": _whole("the number of the look that opened it"),
        "severity": _text("whether to wake somebody", choices=("page", "ticket")),
        "devices": _many(_text("a device's name", ids.NAME), "those concerned"),
        "why": {"type": "string", "description": "one sentence: what moved, or why it closed"},
        "evidence": _table({"type": ["number", "string"]}, "the same in data, by name"),
    }
    return _named(fields, tuple(fields), "What became of an incident: JSON, not retained.")


def _schemas() -> dict[str, Schema]:
    health = {field.name: _whole() for field in dataclasses.fields(messages.Health)}
    bodies = _bodies()
    return {
        "Counts": _bytes(inspect.cleandoc(packing.__doc__ or ""), least=1),
        "Latency": _latency(),
        "Health": _listed({name: health[name] for name in codec.HEALTH}, 0, _doc(messages.Health)),
        "ModelReport": _report(),
        "Chunk": _bytes(
            "A piece of a blob as it is; all have the size that is signed with the model "
            f"({topics.CHUNK_BYTES} unless told), and only the last is shorter.",
            least=1,
            most=topics.MAX_CHUNK_BYTES,
        ),
        "PackedTrustBundle": _bytes(
            "A zlib stream (RFC 1950) of the bytes of a TrustBundle.", least=1, most=codec.MAX_MESSAGE_BYTES
        ),
        "Alarm": _alarm(),
        **{
            TYPES[name].__name__: _envelope(kind, bodies[name], TYPES[name])
            for kind, name in codec.KINDS.items()
        },
    }


# ── channels and operations ────────────────────────────────────────────────────────────────────────────

PARAMETERS: Final = {
    "fleet": f"the fleet's name, {ids.NAME.pattern}",
    "device": f"the device's name, {ids.NAME.pattern}",
    "source": f"the name of a source of labels, {ids.NAME.pattern}",
    "model": f"the model family's name, {ids.NAME.pattern}",
    "cohort": f"the rollout cohort's name, {ids.NAME.pattern}",
    "version": "the version of the root the device trusts",
    "digest": f"SHA-256 of the whole blob, {ids.DIGEST.pattern}",
    "index": "which chunk, from 0",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Channel:
    """One family of topics: the method of `Topics`, its address, who sends, what, and how."""

    name: str
    address: str
    sender: str
    message: str
    delivery: Delivery


def channels() -> tuple[Channel, ...]:
    """Every family of topics, with addresses as `Topics` makes them."""
    t, device, model = Topics(FleetId("{fleet}")), DeviceId("{device}"), ModelName("{model}")
    source = SourceId("{source}")
    trust = t.trust(0).removesuffix("0") + "{version}"
    chunk = t.chunk(Digest("{digest}"), 0).removesuffix("0") + "{index}"
    return (
        Channel("status", t.status(device), "device", "Status", topics.STATUS),
        Channel("window", t.window(device, model), "device", "Window", topics.WINDOW),
        Channel("event", t.event(device), "device", "Event", topics.EVENT),
        Channel("labels", t.labels(source), "labeller", "Labels", topics.LABELS),
        Channel("labels_ack", t.labels_ack(source), "aggregator", "Ack", topics.LABELS_ACK),
        Channel("ack", t.ack(device), "aggregator", "Ack", topics.ACK),
        Channel("command", t.command(device), "aggregator", "Command", topics.COMMAND),
        Channel(
            "release", t.release(CohortId("{cohort}"), model), "aggregator", "SignedRelease", topics.RELEASE
        ),
        Channel("alarm", t.alarm(), "aggregator", "Alarm", topics.ALARM),
        Channel("trust", trust, "publisher", "TrustBundle", topics.TRUST),
        Channel("packed_trust", f"{trust}z", "publisher", "PackedTrustBundle", topics.TRUST),
        Channel("chunk", chunk, "publisher", "Chunk", topics.BLOB),
    )


def _channel(c: Channel) -> Schema:
    names = re.findall(r"{(\w+)}", c.address)
    return {
        "address": c.address,
        "description": inspect.cleandoc(getattr(Topics, c.name).__doc__ or ""),
        "parameters": {name: {"description": PARAMETERS[name]} for name in names},
        "messages": {c.message: {"$ref": f"#/components/messages/{c.message}"}},
    }


def _operations(c: Channel) -> dict[str, Schema]:
    receiver = {
        "status": "aggregator",
        "window": "aggregator",
        "event": "aggregator",
        "labels": "aggregator",
        "labels_ack": "labeller",
        "alarm": "listener",
    }.get(c.name, "device")
    common = {
        "channel": {"$ref": f"#/channels/{c.name}"},
        "messages": [{"$ref": f"#/channels/{c.name}/messages/{c.message}"}],
    }
    sent = {"qos": c.delivery.qos, "retain": c.delivery.retain, "bindingVersion": "0.2.0"}
    return {
        f"{c.sender}.sends.{c.name}": {
            "action": "send",
            "summary": f"The {c.sender} publishes.",
            **common,
            "bindings": {"mqtt": sent},
        },
        f"{receiver}.receives.{c.name}": {
            "action": "receive",
            "summary": f"The {receiver} subscribes.",
            **common,
            "bindings": {"mqtt": {"qos": c.delivery.qos, "bindingVersion": "0.2.0"}},
        },
    }


def _message(name: str) -> Schema:
    kinds = {
        "Chunk": "application/octet-stream",
        "PackedTrustBundle": "application/octet-stream",
        "Alarm": "application/json",
    }
    return {
        "name": name,
        "contentType": kinds.get(name, "application/msgpack"),
        "payload": _ref(name),
    }


def document() -> Schema:
    """The AsyncAPI document as plain data."""
    found = channels()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "skiff: devices and their centre",
            "version": f"{codec.MAJOR}.{codec.MINOR}.0",
            "description": f"{inspect.cleandoc(codec.__doc__ or '')}\n\n{inspect.cleandoc(topics.__doc__ or '')}\n\n"
            "Chunks are plain bytes, packed trust metadata is compressed, alarms are JSON, other payloads MessagePack, "
            f"of at most {codec.MAX_MESSAGE_BYTES} bytes, lists and maps of at most "
            f"{codec.MAX_ITEMS} items. `format: binary` is MessagePack's bin; its lengths are in bytes.",
        },
        "defaultContentType": "application/msgpack",
        "channels": {c.name: _channel(c) for c in found},
        "operations": {name: value for c in found for name, value in _operations(c).items()},
        "components": {
            "messages": {c.message: _message(c.message) for c in found},
            "schemas": _schemas(),
        },
    }


def text() -> str:
    """The document as it stands in the file."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
    print(f"{PAGE.name}: {len(text())} characters")
