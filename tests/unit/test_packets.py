"""What a client takes from a broker, packet by packet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.errors import LinkError
from edge_runtime.mqtt import packets
from edge_runtime.mqtt.packets import Message
from tests.support.fake_broker import length

QOS0, QOS1 = 0x30, 0x32


def body(topic: bytes, payload: bytes, mid: int = 0, properties: bytes | None = None) -> bytes:
    head = len(topic).to_bytes(2) + topic + (mid.to_bytes(2) if mid else b"")
    if properties is not None:
        head += length(len(properties)) + properties
    return head + payload


@given(
    topic=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50),
    payload=st.binary(max_size=300),
    mid=st.integers(0, 65535),
    retained=st.booleans(),
    properties=st.one_of(st.none(), st.binary(max_size=300)),
)
def test_a_message_is_read_whatever_its_properties_are(topic, payload, mid, retained, properties):
    first = (QOS1 if mid else QOS0) | retained
    raw = bytearray(body(topic.encode(), payload, mid, properties))
    assert packets.read_message(first, raw, mqtt5=properties is not None) == Message(
        topic, payload, retained, mid
    )


@pytest.mark.parametrize("topic", [b"", b"\xff\xfe", b"a\xc0\x80", b"\xed\xa0\x80"])
def test_a_topic_that_is_no_text_is_none_and_the_id_is_known(topic):
    assert packets.read_message(QOS1, body(topic, b"x", 7), mqtt5=False) == Message(None, b"x", False, 7)


@pytest.mark.parametrize(
    ("first", "raw", "mqtt5", "problem"),
    [
        (QOS0, b"", False, "within its topic"),
        (QOS0, b"\0", False, "within its topic"),
        (QOS0, b"\0\5abcd", False, "within its topic"),
        (QOS0, b"\xff\xff", False, "within its topic"),
        (QOS1, b"\0\1a\0", False, "within its topic"),
        (QOS1, body(b"a", b"") + b"\0\0", False, "id 0"),
        (QOS0, body(b"a", b""), True, "no length"),
        (QOS0, body(b"a", b"\xff\xff\xff\xff"), True, "no length"),
        (QOS0, body(b"a", b"\xff\xff\xff\x7f"), True, "before its payload"),
        (QOS0, body(b"a", b"\5abcd"), True, "before its payload"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(first, raw, mqtt5, problem):
    with pytest.raises(LinkError, match=problem):
        packets.read_message(first, raw, mqtt5=mqtt5)


@given(first=st.integers(0, 255), raw=st.binary(max_size=200), mqtt5=st.booleans())
def test_any_bytes_are_a_message_or_refused(first, raw, mqtt5):
    try:
        message = packets.read_message(first, raw, mqtt5=mqtt5)
    except LinkError:
        return
    assert len(message.payload) <= len(raw) - 2
    assert bool(message.mid) == bool(first & 6)


ALLOWED = {3: {0x20, *range(0x30, 0x34), *range(0x38, 0x3C), 0x40, 0x90, 0xB0, 0xD0}}
ALLOWED[5] = ALLOWED[3] | {0xE0}


@pytest.mark.parametrize("version", [3, 5])
def test_of_all_first_bytes_these_are_allowed(version):
    def allowed(first, answered):
        try:
            packets.check_kind(first, answered=answered, mqtt5=version == 5)
        except LinkError:
            return False
        return True

    assert {first for first in range(256) if allowed(first, True)} == ALLOWED[version] - {0x20}
    assert {first for first in range(256) if allowed(first, False)} == {0x20}


def test_only_messages_may_be_large():
    packets.check_size(QOS0, 268_435_455)
    packets.check_size(0x90, packets.MAX_CONTROL_BYTES)
    with pytest.raises(LinkError, match="more than the 2048 allowed"):
        packets.check_size(0x90, packets.MAX_CONTROL_BYTES + 1)


@given(topic=st.text(min_size=1, max_size=300), payload=st.binary(max_size=20_000), mqtt5=st.booleans())
def test_a_message_that_is_written_is_read_again(topic, payload, mqtt5):
    packet = packets.publish_packet(topic, payload, mqtt5=mqtt5)
    assert packet[0] == 0x30
    length, at = packets._variable_integer(packet, 1)
    assert length == len(packet) - at
    message = packets.read_message(packet[0], packet[at:], mqtt5=mqtt5)
    assert (message.topic, message.payload, message.mid) == (topic, payload, 0)


def test_an_acknowledgement_is_four_bytes():
    assert packets.puback_packet(0x1234) == b"\x40\x02\x12\x34"


@given(st.binary(max_size=400), st.booleans(), st.integers(0, 5))
def test_a_message_is_found_ahead_when_all_of_it_is_there(payload, mqtt5, before):
    data = bytes(before) + packets.publish_packet("a/b", payload, mqtt5=mqtt5) + b"\x90\x03"
    found = packets.message_ahead(data, before)
    assert found is not None
    begin, end = found
    assert end == len(data) - 2
    assert packets.read_message(data[before], data[begin:end], mqtt5=mqtt5) == Message(
        "a/b", payload, False, 0
    )
    assert all(packets.message_ahead(data[:cut], before) is None for cut in range(end))


@pytest.mark.parametrize(
    "data", [b"", b"\x90\x03\0\1\0", b"\x40\x02\0\1", b"\x30" + b"\x80" * 4 + b"\1" + bytes(9)]
)
def test_everything_else_ahead_is_left_to_paho(data):
    assert packets.message_ahead(data, 0) is None
