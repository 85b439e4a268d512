"""The envelope: versions, kinds, caps and addresses."""

import re
import zlib
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from edge_runtime.contract import ids, messages
from edge_runtime.contract.codec import (
    MAX_ITEMS,
    MAX_MESSAGE_BYTES,
    decode,
    encode,
    pack_counts,
    unpack_counts,
)
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.profile import MAX_CLASSES, CellSpec, FeatureCells, Profile, empty_profile
from tests.golden.values import DEVICE, SESSION, WINDOW

ACK = messages.Ack(device=DEVICE, session=SESSION, seqs=(1,))


def envelope(**changes):
    names = ("major", "minor", "kind", "device", "session", "seq", "body")
    parts = dict(zip(names, msgpack.unpackb(encode(ACK)), strict=True))
    return msgpack.packb(list({**parts, **changes}.values()))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not valid msgpack"),
        (b"\xc1", "not valid msgpack"),
        (msgpack.packb({"a": 1}), "not an envelope"),
        (msgpack.packb([1, 0, 4, "dev", "0" * 16, 0]), "not an envelope"),
        (envelope() + b"\x00", "not valid msgpack"),
        (envelope(major=2), "contract version 2; this side speaks 1: update the older one"),
        (envelope(major=0), "contract version 0"),
        (envelope(major=True), "contract version True"),
        (envelope(major=1.0), "contract version 1.0"),
        (envelope(kind=8), "unknown kind 8"),
        (envelope(kind=True), "unknown kind True"),
        (envelope(kind=[]), "unknown kind []"),
        (envelope(device=3), "device and session must be text"),
        (envelope(device="a/b"), "'a/b' is not a device name"),
        (envelope(device="#"), "'#' is not a device name"),
        (envelope(session="short"), "'short' is not a session"),
        (envelope(seq=-1), "seq -1 is not a whole number"),
        (envelope(seq=2**63), "is not a whole number"),
        (envelope(seq=True), "seq True"),
        (envelope(body=[]), "ack: expected a table"),
        (envelope(body={}), "ack.seqs: is missing"),
        (envelope(body={"seqs": [1, "2"]}), "ack.seqs[1]"),
        (envelope(body={"seqs": [1, -2]}), "ack.seqs[1]"),
        (bytes(MAX_MESSAGE_BYTES + 1), "larger than"),
    ],
)
def test_what_a_peer_of_this_major_would_not_send_is_refused(data, problem):
    with pytest.raises(ContractError, match=re.escape(problem)):
        decode(data)


def test_a_newer_minor_is_read():
    assert decode(envelope(minor=99, body={"seqs": [1], "new": {"deep": [1]}})) == ACK


def test_all_fields_of_a_body_that_came_later_have_defaults():
    # A sender of minor 0 leaves out what minor 1 adds: only what 1.0 always sent may be required.
    bare = msgpack.packb([1, 0, 1, "dev", "0" * 16, 0, {"online": False}])
    assert decode(bare) == messages.Status(
        device=ids.device_id("dev"), session=ids.session_id("0" * 16), seq=0, online=False
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"correct": 11}, r"window\.correct: 11 is more than the 10 labelled rows"),
        ({"seq_lo": 42}, r"window\.lo: 42 is outside \[0, 41\]"),
        ({"failed": -1}, r"window\.failed"),
        ({"refused": (("x" * 5000, 1),)}, "within the caps"),
        ({"start_ns": 2**63}, r"window\.start"),
    ],
)
def test_encode_refuses_what_decode_would(changes, problem):
    with pytest.raises(ContractError, match=problem):
        encode(replace(WINDOW, **changes))


def test_the_caps_of_encode_are_those_of_decode():
    longest = replace(ACK, seqs=tuple(range(MAX_ITEMS)))
    assert decode(encode(longest)) == longest
    with pytest.raises(ContractError, match="within the caps"):
        encode(replace(ACK, seqs=tuple(range(MAX_ITEMS + 1))))
    with pytest.raises(ContractError, match="larger than the 262144 allowed"):
        encode(messages.TrustBundle(root_version=1, files=(("root.json", bytes(MAX_MESSAGE_BYTES)),)))
    event = messages.Event(device=DEVICE, session=SESSION, seq=1, wall_ns=0, name="x")
    with pytest.raises(ContractError, match="is 1025 characters long"):
        encode(replace(event, detail=(("reason", "x" * 1025),)))


def test_the_largest_layout_fits_into_a_message():
    spec = CellSpec(
        tuple(FeatureCells(f"f{j}", (0.0, 1.0)) for j in range(64)),
        FeatureCells("score", (0.5,)),
        MAX_CLASSES,
    )
    window = replace(WINDOW, profile=empty_profile(spec, probabilities=True))
    assert decode(encode(window)) == window


def test_a_window_is_small():
    # 30 features with 22 cells each and 7 classes, a thousand rows: the figure the fleet is sized by.
    rng = np.random.default_rng(0)
    edges = tuple(float(x) for x in np.sort(rng.normal(size=21)).astype(np.float32))
    spec = CellSpec(
        tuple(FeatureCells(f"feature-{j}", edges) for j in range(30)), FeatureCells("score", (0.5,)), 7
    )
    profile = empty_profile(spec, probabilities=True)
    counts = rng.poisson(1000 / 22, size=spec.size)
    sums = rng.integers(0, 1000 << 20, size=8)
    full = Profile(layout=spec.layout, rows=1000, counts=counts, sums=sums)
    assert len(encode(replace(WINDOW, profile=profile))) < 550
    assert len(encode(replace(WINDOW, profile=full))) < 1200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x09",
        b"\x01",
        b"\x01abc",
        pack_counts(np.arange(9)) + b"x",
        pack_counts(np.arange(9))[:-1],
    ],
)
def test_damaged_counts_are_refused(data):
    with pytest.raises(ContractError, match="counts"):
        unpack_counts(data)


def test_planes_that_differ_in_length_are_refused():
    two = pack_counts(np.array([256, 1, 2]))  # two planes of three bytes
    assert two[0] == 2
    with pytest.raises(ContractError, match="not 4 equal byte planes"):
        unpack_counts(b"\x04" + two[1:])


def test_a_counter_with_the_sign_bit_is_refused():
    assert unpack_counts(pack_counts(np.array([2**63 - 1]))).tolist() == [2**63 - 1]
    raw = b"\x08" + zlib.compress(b"\xff" * 8, wbits=-15)
    with pytest.raises(ContractError, match=r"beyond 2\^63"):
        unpack_counts(raw)
