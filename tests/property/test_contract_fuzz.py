"""Every decoder of the contract under hostile bytes: a value or an error of ours, and memory that is bounded.

The quick profile runs with the others; the long one (`slow`) takes many more examples of the same.
"""

import contextlib
import json
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.contract import release, trust
from edge_runtime.contract.codec import MAX_MESSAGE_BYTES, WINDOW, decode, latency_body, read_latency
from edge_runtime.contract.errors import ArtifactError, ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.latency import observe_ns
from edge_runtime.contract.manifest import KEYS, read_info
from edge_runtime.contract.onnx_metadata import read_metadata
from edge_runtime.contract.packing import MAX_COUNTERS, pack_counts, unpack_counts
from tests.golden import make, values
from tests.support import strategies as our
from tests.support.tiny_models import classifier, sealed

MOST_BYTES = 64 << 20
"""No input of `MAX_MESSAGE_BYTES` may make any decoder allocate more: its largest list of counters has 8.5 MB."""
LONG = settings(max_examples=2_000, suppress_health_check=[HealthCheck.too_slow])

TINY = classifier(("a", "b"), (0, 1))
GOLDEN = [
    path.read_bytes() for folder in (make.MINOR_0, make.FOLDER) for path in sorted(folder.glob("*.msgpack"))
]
ENVELOPES = [msgpack.unpackb(data) for data in GOLDEN]


def guarded(read: Callable[[Any], Any], data: bytes) -> None:
    """Fails when ``read`` raises anything but our refusals, or takes too much memory."""
    tracemalloc.start()
    try:
        with contextlib.suppress(ContractError, ArtifactError):
            read(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < MOST_BYTES, f"{peak_bytes} bytes for {len(data)}"


def signed_fields(read: Callable[[Any], Any]) -> Callable[[bytes], Any]:
    """A reader of TUF's own tables, which come as JSON that tuf has parsed."""

    def from_json(data: bytes) -> Any:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return read(found) if isinstance(found, dict) else None

    return from_json


def latency_of(data: bytes) -> Any:
    try:
        found = msgpack.unpackb(data)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return None
    return read_latency(Fields(found, "latency"))


def sealed_with(key: str, value: Any) -> bytes:
    return sealed(TINY.graph(), {**TINY.metadata, key: json.dumps(value)})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
tables = st.dictionaries(
    st.sampled_from(["skiff", "x"]), json_values | our.plain().filter(lambda x: x is None)
)
own_tables = st.one_of(
    tables,
    st.builds(
        lambda t: {"skiff": t}, st.dictionaries(st.sampled_from(["revoked", "signed", "root"]), json_values)
    ),
).map(lambda found: json.dumps(found).encode())
wrong_envelopes = (
    st.sampled_from(ENVELOPES).flatmap(lambda e: our.replaced(e, our.plain())).map(msgpack.packb)
)
packed_counts = st.lists(st.integers(0, 2**40), max_size=80).map(lambda v: pack_counts(np.array(v, np.int64)))
some_release = release.to_payload(values.RELEASE)
wrong_releases = our.replaced(json.loads(some_release), json_values).map(
    lambda found: json.dumps(found).encode()
)
some_latency = msgpack.packb(latency_body(observe_ns(np.arange(1, 500))))
wrong_latencies = our.replaced(msgpack.unpackb(some_latency), our.plain()).map(msgpack.packb)
wrong_artifacts = st.sampled_from(KEYS).flatmap(
    lambda key: our.replaced(json.loads(TINY.metadata[key]), json_values).map(lambda v: sealed_with(key, v))
)

READERS: dict[str, tuple[Callable[[Any], Any], st.SearchStrategy[bytes]]] = {
    "message, any bytes": (decode, st.binary(max_size=400)),
    "message, mutated golden bytes": (decode, our.damaged(st.sampled_from(GOLDEN))),
    "message, wrong types and sizes": (decode, wrong_envelopes),
    "counts": (unpack_counts, our.damaged(packed_counts) | st.binary(max_size=200)),
    "counts in step": (unpack_counts, st.binary(max_size=200).map(lambda rest: b"\x09" + rest)),
    "release, any bytes": (
        release.from_payload,
        our.damaged(st.just(some_release)) | st.binary(max_size=200),
    ),
    "release, wrong types": (release.from_payload, wrong_releases),
    "latency": (latency_of, our.damaged(st.just(some_latency)) | wrong_latencies),
    "artifact, mutated": (read_info, our.damaged(st.just(TINY.artifact)) | st.binary(max_size=200)),
    "artifact, wrong types": (read_info, wrong_artifacts),
    "ONNX metadata": (read_metadata, our.damaged(st.just(TINY.artifact)) | st.binary(max_size=400)),
    "revoked digests": (signed_fields(trust.read_revoked), own_tables | st.binary(max_size=60)),
    "time of signing": (signed_fields(trust.read_signed_seconds), own_tables),
    "version of the root": (signed_fields(trust.read_root_version), own_tables),
}


@pytest.mark.parametrize("name", READERS)
def test_hostile_bytes_are_read_or_refused(name):
    read, inputs = READERS[name]
    given(inputs)(lambda data: guarded(read, data))()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_hostile_bytes_are_read_or_refused(name):
    read, inputs = READERS[name]
    LONG(given(inputs)(lambda data: guarded(read, data)))()


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def leb128(value: int) -> bytes:
    return bytes([value >> shift & 0x7F | 0x80 for shift in (0, 7, 14, 21)]) + bytes([value >> 28])


def window_with(**items: Any) -> bytes:
    """A window whose items are replaced; bytes beyond the limit of a message are cut off."""
    body = list(ENVELOPES[-1][6])
    for name, value in items.items():
        body[WINDOW.index(name)] = value
    return msgpack.packb([*ENVELOPES[-1][:6], body])[:MAX_MESSAGE_BYTES]


def of_counts(data: bytes) -> dict[str, tuple[Callable[[bytes], Any], bytes]]:
    """Hostile counts by themselves and inside a window."""
    return {"": (unpack_counts, data), " in a window": (decode, window_with(counts=data))}


FILL = bytes(MAX_MESSAGE_BYTES - 600)
HOSTILE_COUNTS = {
    "deflate bomb": b"\x08" + deflated(bytes(200 << 20)),
    "as many counters as are allowed, deflated": b"\x08" + deflated(bytes(8 * MAX_COUNTERS)),
    "as many counters as are allowed, of no bits": b"\x09"
    + leb128(MAX_COUNTERS)
    + b"\x01\x00\x00\x00\x00\x00",
    "as many in columns": b"\x09"
    + leb128(MAX_COUNTERS)
    + b"\x01"
    + leb128(MAX_COUNTERS)
    + b"\x00\x00\x00\x00",
    "more counters than are allowed": b"\x09" + leb128(2**31) + b"\x01\x00\x00\x00\x00\x00",
    "more columns than counters": b"\x09\x04\x02" + leb128(2**34) + b"\x00\x00\x00\x00",
    "a number that never ends": b"\x09\x04\x01\x00\x00\x00\x0f\x10" + FILL,
    "numbers without end": b"\x09" + leb128(MAX_COUNTERS) + b"\x01\x00\x00\x00\x01\x10" + b"\xff" * len(FILL),
    "wide numbers": b"\x09" + leb128(MAX_COUNTERS) + b"\x01\x00\x00\x00\x0f\xf0" + b"\xff" * len(FILL),
    "endless lengths": b"\x09" + b"\xff" * 1000,
}
BOMBS: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
    **{
        f"{name}{where}": case
        for name, data in HOSTILE_COUNTS.items()
        for where, case in of_counts(data).items()
    },
    "empty maps as refused": (decode, window_with(refused={str(i): {} for i in range(4000)})),
    "nested lists as health": (decode, window_with(health=json.loads("[" * 400 + "]" * 400))),
    "lists of lists as latency": (decode, window_with(latency=[[[]] * 4000] * 4)),
    "many files": (
        decode,
        msgpack.packb([1, 1, 6, "", "", 0, {"root_version": 1, "files": {}}] + [[{}] * 4000] * 60),
    ),
    "nested JSON release": (release.from_payload, b"[" * MAX_MESSAGE_BYTES),
    "wide JSON release": (release.from_payload, b'{"a":[' + b"{}," * (MAX_MESSAGE_BYTES // 3 - 9) + b"{}]}"),
    "large JSON number": (release.from_payload, b'{"schema":' + b"9" * (MAX_MESSAGE_BYTES - 20) + b"}"),
    "long ONNX numbers": (read_metadata, b"\x80" * MAX_MESSAGE_BYTES),
    "artifact of empty fields": (read_info, b"\x72\x00" * (MAX_MESSAGE_BYTES // 2)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_bounded_memory(name):
    read, data = BOMBS[name]
    assert len(data) <= MAX_MESSAGE_BYTES
    guarded(read, data)


def test_the_guard_sees_what_it_guards_against():
    with pytest.raises(AssertionError, match="bytes for"):
        guarded(lambda data: bytearray(MOST_BYTES + len(data)), b"x")
    with pytest.raises(KeyError):
        guarded(lambda data: {}[data], b"x")
