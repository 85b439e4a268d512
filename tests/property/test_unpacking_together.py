"""Counters unpacked with others are those, or the refusal, that each alone leads to."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.packing import pack_counts, unpack_all, unpack_counts


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
