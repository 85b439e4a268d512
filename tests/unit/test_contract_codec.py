"""The envelope: versions, kinds, caps and addresses."""

import re
import zlib
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from edge_runtime.contract import ids, messages
from edge_runtime.contract.codec import (
    HEALTH,
    MAX_ITEMS,
    MAX_LABELLED,
    MAX_MESSAGE_BYTES,
    WINDOW,
    decode,
    encode,
)
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.latency import observe_ns
from edge_runtime.contract.packing import IN_STEP, pack_counts, pack_planes, unpack_counts
from edge_runtime.contract.profile import (
    MAX_CLASSES,
    Binner,
    CellSpec,
    FeatureCells,
    cells_from_training,
    empty_profile,
)
from tests.golden import values
from tests.golden.values import DEVICE, SESSION

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
        (envelope(kind=9), "unknown kind 9"),
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
        ({"seq_lo": 42}, r"window\.back: -1 is outside \[0, 41\]"),
        ({"windows": 0}, r"window\.windows: 0 is outside"),
        ({"end_ns": 2**63}, r"window\.span"),
        ({"end_ns": -1}, r"window\.span"),
        ({"failed": -1}, r"window\.failed"),
        ({"refused": (("x" * 5000, 1),)}, "within the caps"),
        ({"start_ns": 2**63}, r"window\.start"),
    ],
)
def test_encode_refuses_what_decode_would(changes, problem):
    with pytest.raises(ContractError, match=problem):
        encode(replace(values.WINDOW, **changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"correct": 121}, r"labels\.correct: 121 is more than the 120 labelled rows"),
        ({"correct": -1}, r"labels\.correct: -1 is outside"),
        ({"labelled": 0, "correct": 0}, r"labels\.labelled: 0 is outside \[1, "),
        ({"labelled": MAX_LABELLED + 1}, r"labels\.labelled: 4294967297 is outside"),
        ({"end_ns": values.LABELS.start_ns - 1}, r"labels\.end"),
        ({"end_ns": 2**63}, r"labels\.end"),
        ({"start_ns": -1}, r"labels\.start"),
        ({"source": "a/b"}, "'a/b' is not a source's name"),
        ({"source": "+"}, r"'\+' is not a source's name"),
        ({"model": ""}, "'' is not a model name"),
        ({"digest": "aa"}, "'aa' is not a SHA-256 digest"),
        ({"device": "#"}, "'#' is not a device name"),
    ],
)
def test_labels_that_no_source_may_tell_are_refused(changes, problem):
    with pytest.raises(ContractError, match=problem):
        encode(replace(values.LABELS, **changes))


def test_labels_of_one_moment_and_of_the_largest_counts_are_read():
    one = replace(
        values.LABELS, end_ns=values.LABELS.start_ns, labelled=MAX_LABELLED, correct=0, seq=2**63 - 1
    )
    assert decode(encode(one)) == one


@pytest.mark.parametrize("name", ["source", "model", "digest", "start", "end", "labelled", "correct"])
def test_no_field_of_labels_may_be_missing(name):
    envelope = msgpack.unpackb(encode(values.LABELS))
    del envelope[-1][name]
    with pytest.raises(ContractError, match=rf"labels\.{name}: is missing"):
        decode(msgpack.packb(envelope))


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
    window = replace(values.WINDOW, profile=empty_profile(spec, probabilities=True))
    assert decode(encode(window)) == window


def test_a_list_of_a_newer_minor_is_read_and_one_of_an_older_has_defaults():
    envelope = msgpack.unpackb(encode(values.WINDOW))
    body = envelope[6]
    latency, health = body[WINDOW.index("latency")], body[WINDOW.index("health")]
    newer = [*body, "added"]
    newer[WINDOW.index("latency")] = [*latency, 7]
    newer[WINDOW.index("health")] = [*health, 7]
    assert decode(msgpack.packb([*envelope[:6], newer])) == values.WINDOW
    older = body[: WINDOW.index("queueing")]
    bare = replace(values.WINDOW, health=messages.Health(), refused=(), failed=0, labelled=0, correct=0)
    assert decode(msgpack.packb([*envelope[:6], older])) == bare
    for name in ("model", "digest", "layout", "start", "synced", "rows", "counts"):
        with pytest.raises(ContractError, match=r"window\.\w+: is missing"):
            decode(msgpack.packb([*envelope[:6], body[: WINDOW.index(name)]]))


@pytest.mark.parametrize("body", [[], {}, None, "x", [None] * len(WINDOW), {"profile": []}])
def test_a_window_without_its_fields_is_refused(body):
    with pytest.raises(ContractError, match="window"):
        decode(msgpack.packb([1, 1, 2, DEVICE, SESSION, 41, body]))


def test_the_order_of_lists_is_kept_for_ever():
    # New items come last: whoever changes this breaks every device that is out.
    assert WINDOW[:18] == (
        *(
            "model",
            "digest",
            "layout",
            "back",
            "windows",
            "start",
            "span",
            "synced",
            "rows",
            "counts",
            "sums",
        ),
        *("latency", "queueing", "health", "refused", "failed", "labelled", "correct"),
    )
    assert HEALTH[:11] == (
        *("rss_bytes", "peak_rss_bytes", "cpu_ns", "uptime_ns", "pss_bytes", "memory_limit_bytes"),
        *("memory_pressure_ppm", "minor_faults", "major_faults", "temperature_mc", "throttled"),
    )


def seen(rows: int, classes: int, shift: float = 0.0) -> messages.Window:
    """A full window of 30 numeric features, latency with 25 to 45 buckets and every measure of health."""
    rng = np.random.default_rng(0)
    train = rng.normal(size=(5000, 30)).astype(np.float32)
    spec = CellSpec(
        tuple(cells_from_training(f"f{j}", train[:, j]) for j in range(30)),
        cells_from_training("score", rng.uniform(0.5, 1, 5000)),
        classes,
    )
    binner = Binner(spec, probabilities=True)
    p = rng.dirichlet(np.ones(classes), rows).astype(np.float32)
    binner.observe((rng.normal(size=(rows, 30)) + shift).astype(np.float32), p.argmax(axis=1), p)
    return replace(
        values.WINDOW,
        seq=1234,
        seq_lo=1234,
        profile=binner.take(),
        latency=observe_ns(rng.lognormal(np.log(5000), 0.5, rows).astype(np.int64)),
        queueing=observe_ns(rng.lognormal(np.log(900), 0.3, rows).astype(np.int64)),
        health=values.MERGED.health,
        refused=(("missing", 3),),
    )


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_window_is_small(shift):
    # The figures the fleet is sized by; docs/adr has them with their parts.
    two, seven, forty = (len(encode(seen(1000, classes, shift))) for classes in (2, 7, 40))
    assert two <= 700
    assert seven - two <= 5 * 20
    assert forty - seven <= 33 * 20
    assert len(encode(seen(100, 2, shift))) <= 560
    assert len(encode(seen(10_000, 2, shift))) <= 1000


def test_empty_windows_and_single_rows_are_small():
    assert len(encode(seen(1, 2))) < 350
    spec = CellSpec((FeatureCells("x", (0.0,)),), FeatureCells("score", (0.5,)), 0)
    nothing = replace(values.WINDOW, profile=empty_profile(spec, probabilities=False))
    assert decode(encode(nothing)) == nothing


def test_counters_in_step_take_less_than_byte_planes_and_what_is_too_large_is_left_to_those():
    counts = seen(1000, 2).profile.counts
    assert pack_counts(counts)[0] == IN_STEP
    assert len(pack_counts(counts)) < 0.85 * len(pack_planes(counts))
    large = counts << 40
    assert pack_counts(large) == pack_planes(large)
    assert unpack_counts(pack_counts(large)).tolist() == large.tolist()


SMALL = bytes([9, 4, 2, 2, 0, 0, 0x11, 0x10, 0b11111100])  # four counters, all 0, of one bit each


@pytest.mark.parametrize(
    ("at", "value", "problem"),
    [
        (1, 0x80, "cut short"),  # the number of counters runs on into the period
        (2, 0, "columns of 0"),
        (2, 3, "2 columns of 3 in 4"),
        (3, 3, "3 columns of 2 in 4"),
        (4, 2, "2 implied"),
        (7, 0x00, "8 bits where 4 are needed"),
        (8, 0b11111000, "cut short in the numbers"),
        (8, 0b11111110, "bits where"),
        (8, 0b01111100, "cut short in the numbers"),
        (8, 0b11011110, "below 0"),
    ],
)
def test_damaged_columns_in_step_are_refused(at, value, problem):
    assert unpack_counts(SMALL).tolist() == [0, 0, 0, 0]
    damaged = bytearray(SMALL)
    damaged[at] = value
    with pytest.raises(ContractError, match=problem):
        unpack_counts(bytes(damaged))
    for length in range(1, len(SMALL)):
        with pytest.raises(ContractError, match="counts"):
            unpack_counts(SMALL[:length])
    with pytest.raises(ContractError, match="bits where"):
        unpack_counts(SMALL + b"\x00")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x09",
        b"\x0a",
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
    two = pack_planes(np.array([256, 1, 2]))  # two planes of three bytes
    assert two[0] == 2
    with pytest.raises(ContractError, match="not 4 equal byte planes"):
        unpack_counts(b"\x04" + two[1:])


def test_a_counter_with_the_sign_bit_is_refused():
    assert unpack_counts(pack_counts(np.array([2**63 - 1]))).tolist() == [2**63 - 1]
    raw = b"\x08" + zlib.compress(b"\xff" * 8, wbits=-15)
    with pytest.raises(ContractError, match=r"beyond 2\^63"):
        unpack_counts(raw)
