"""What a client takes from a broker: which packets, how large, and how a message is read. Pure, and without paho.

Sources: MQTT 3.1.1 (OASIS, 2014) and MQTT 5.0 (OASIS, 2019), sections 2 and 3. Narrower than both where this client
never asks for more: no QoS 2, no topic alias, no authentication exchange, and one topic a subscription.
"""

from dataclasses import dataclass, field
from typing import Final

from edge_runtime.contract.codec import MAX_MESSAGE_BYTES
from edge_runtime.contract.errors import LinkError

MAX_PACKET_BYTES: Final = MAX_MESSAGE_BYTES + (64 << 10)
"""The largest packet kept or sent: the largest message, and the longest topic. paho alone would keep 256 MB."""
PUBLISH_OVERHEAD_BYTES: Final = 10
"""What a message adds to its topic and payload: type, lengths, message id, and no properties."""
MAX_CONTROL_BYTES: Final = 2048
"""The largest packet that is no message. paho makes an object of 2.4 kB of every byte of a subscription's answer."""
MAX_HEAD_BYTES: Final = 4 + (64 << 10)
"""Where topic and message id of the longest legal message end, at the latest."""

CONNACK: Final = 0x20
PUBLISH: Final = 0x30
PUBACK: Final = 0x40
_PUBACK: Final = bytes((PUBACK, 2))
_DISCONNECT: Final = 0xE0
_NAMES: Final = {
    CONNACK: "CONNACK",
    PUBACK: "PUBACK",
    0x90: "SUBACK",
    0xB0: "UNSUBACK",
    0xD0: "PINGRESP",
    _DISCONNECT: "DISCONNECT",
}


@dataclass(frozen=True, slots=True)
class Message:
    """A PUBLISH packet; ``mid`` is 0 when the quality of service is 0, ``topic`` None when it is no text or empty."""

    topic: str | None
    payload: bytes = field(repr=False)
    retained: bool
    mid: int


def publish_packet(topic: str, payload: bytes, *, mqtt5: bool) -> bytes:
    """A whole PUBLISH of QoS 0 that is not retained, without properties."""
    name = topic.encode()
    rest = 2 + len(name) + mqtt5 + len(payload)
    head = bytearray((PUBLISH,))
    while rest > 0x7F:
        head.append(rest & 0x7F | 0x80)
        rest >>= 7
    head.append(rest)
    return b"".join((head, len(name).to_bytes(2), name, b"\0" if mqtt5 else b"", payload))


def puback_packet(mid: int) -> bytes:
    """A whole PUBACK: received, without a reason."""
    return _PUBACK + mid.to_bytes(2)


def message_ahead(data: bytes, at: int) -> tuple[int, int] | None:
    """Where the body of the message that begins at ``at`` begins and ends, if all of it is there.

    None for every other packet, a message that goes on beyond ``data``, and a length of more than four bytes.
    """
    if at >= len(data) or data[at] & 0xF0 != PUBLISH:
        return None
    length = 0
    for i, byte in enumerate(data[at + 1 : at + 5]):
        length |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            begin = at + 2 + i
            return (begin, begin + length) if begin + length <= len(data) else None
    return None


def check_size(first: int, length: int) -> None:
    """Refuses a packet by its first byte and remaining length, before anything of it is kept.

    Messages pass whatever their length: the reader keeps the head of one that is too large and forgets the rest.

    Raises:
        LinkError: it is no message and larger than `MAX_CONTROL_BYTES`.
    """
    if first & 0xF0 != PUBLISH and length > MAX_CONTROL_BYTES:
        raise LinkError(
            f"the broker sent a packet 0x{first:02x} of {length} bytes, more than the {MAX_CONTROL_BYTES} allowed"
        )


def check_kind(first: int, *, answered: bool, mqtt5: bool) -> None:
    """Refuses a packet that a broker may not send, or not now; ``answered`` says whether there was a CONNACK.

    Raises:
        LinkError: with what is wrong.
    """
    kind = first & 0xF0
    if kind == PUBLISH:
        qos = first >> 1 & 3
        if qos > 1:
            raise LinkError(f"the broker sent a message of QoS {qos}, and none above 1 was asked for")
    elif kind not in _NAMES or (kind == _DISCONNECT and not mqtt5):
        raise LinkError(f"the broker sent a packet 0x{first:02x}, which is none a broker sends")
    elif first & 0x0F:
        raise LinkError(f"the broker sent {_NAMES[kind]} with reserved bits 0x{first:02x}")
    if (kind == CONNACK) == answered:
        raise LinkError(
            "the broker answered CONNECT twice" if answered else "the broker spoke before CONNACK"
        )


def read_message(first: int, body: bytes | bytearray, *, mqtt5: bool) -> Message:
    """A message from its packet's first byte and what follows the remaining length.

    The properties of MQTT 5 are passed over by their length: nothing here needs them, and one that a parser dislikes,
    sent by any other client, must not end the connection again and again.

    Raises:
        LinkError: lengths do not fit, or the message id is 0.
    """
    topic, mid, at = read_head(first, body)
    if mqtt5:
        length, at = _variable_integer(body, at)
        at += length
    if at > len(body):
        raise LinkError("the broker sent a message that ends before its payload begins")
    return Message(topic, bytes(memoryview(body)[at:]), bool(first & 1), mid)


def read_head(first: int, body: bytes | bytearray) -> tuple[str | None, int, int]:
    """Topic (see `Message`), message id, and where they end.

    Raises:
        LinkError: see `read_message`.
    """
    at = 2 + int.from_bytes(body[:2])
    mid = 0
    with_id = first & 6
    end = at + 2 if with_id else at
    if len(body) < max(end, 2):
        raise LinkError("the broker sent a message that ends within its topic")
    if with_id and not (mid := int.from_bytes(body[at:end])):
        raise LinkError("the broker sent a message with id 0")
    try:
        return body[2:at].decode() or None, mid, end
    except UnicodeDecodeError:
        return None, mid, end


def _variable_integer(body: bytes | bytearray, at: int) -> tuple[int, int]:
    """A variable byte integer of at most four bytes, and where it ends."""
    value = 0
    for i, byte in enumerate(body[at : at + 4]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise LinkError("the broker sent a message whose properties have no length")
