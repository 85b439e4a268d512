"""Counters unpacked with others are those, or the refusal, that each alone leads to."""

import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.packing import pack_counts, pack_planes, unpack_all, unpack_counts


def alone(data):
    try:
        return unpack_counts(data).tolist()
    except ContractError as e:
        return str(e)


@given(st.data(), st.integers(1, 24), st.integers(1, 30), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_damage_to_some_payloads_changes_nothing_for_others(data, period, columns, tail, seed):
    rng = np.random.default_rng(seed)
    payloads = []
    for _ in range(12):
        table = np.tile(rng.gamma(1.0, 50.0, period), columns) * rng.uniform(0.5, 1.5, period * columns)
        counts = np.concatenate([table, rng.integers(0, 500, tail)]).astype(np.int64)
        payload = bytearray(pack_counts(counts))
        match data.draw(st.sampled_from(("whole", "whole", "flipped", "cut", "longer"))):
            case "flipped":
                payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del payload[data.draw(st.integers(0, len(payload) - 1)) :]
            case "longer":
                payload += b"\0"
        payloads.append(bytes(payload))
    found = [str(one) if isinstance(one, ContractError) else one.tolist() for one in unpack_all(payloads)]
    assert found == [alone(payload) for payload in payloads]


@given(st.lists(st.tuples(st.integers(0, 62), st.integers(1, 3), st.integers(0, 2**32)), max_size=40))
def test_byte_planes_unpacked_together_are_those_unpacked_alone(made):
    counts = [
        np.random.default_rng(seed).integers(0, 2**bits, 7 * size, dtype=np.int64, endpoint=True)
        for bits, size, seed in made
    ]
    for one, found in zip(counts, unpack_all([pack_planes(one) for one in counts]), strict=True):
        np.testing.assert_array_equal(one, found)


def test_a_counter_beyond_its_bits_spoils_only_its_own_payload():
    good = np.array([1, 2**62, 3])
    bad = np.array([1, 2**63, 3], np.uint64).view(np.int64)
    data = [bytes([8]) + deflated(one) for one in (good, bad, good)]
    first, second, third = unpack_all(data)
    np.testing.assert_array_equal(first, good)
    np.testing.assert_array_equal(third, good)
    assert isinstance(second, ContractError)
    assert "beyond 2^63" in str(second)


def deflated(counts):
    """Eight byte planes, as `pack_planes` would write them if these were counts."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    planes = counts.astype("<i8").view(np.uint8).reshape(-1, 8).T
    return packer.compress(planes.tobytes()) + packer.flush()
