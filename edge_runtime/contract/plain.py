"""Windows as nearly every device sends them, read without a reader for each field.

Whatever is unusual in any way, an error or not, is left to `codec`, which reads the same fields one by one and has the
words for what is wrong: what is read here, it reads the same. An aggregator spends most of its time in this.
"""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, cast

import numpy as np

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Health, Window
from edge_runtime.contract.profile import Counts, Profile

HEALTH: Final = tuple(field.name for field in dataclasses.fields(Health))
_ITEMS: Final = 18
_LATENCY_ITEMS: Final = 5
_END: Final = 2**63
_INT: Final = {int}
_KNOWN: Final = 8192
_FEW: Final = 1024
"""Far fewer items than a reader allows."""

# What is no name is not remembered, so these hold short texts only.
_device = lru_cache(_KNOWN)(ids.device_id)
_session = lru_cache(_KNOWN)(ids.session_id)
_model = lru_cache(_KNOWN)(ids.model_name)


def read_window(device: str, session: str, seq: int, body: Sequence[Any], counts: Counts) -> Window | None:
    """The window of a body by position, or None when a closer look is needed.

    ``body`` is as msgpack gives it, of any items. The envelope's fields are of their types, and ``counts`` were
    unpacked from the body already.
    """
    if len(body) < _ITEMS:
        return None
    model, digest, layout, back, windows, start_ns, span_ns, synced, rows, _, sums = body[:11]
    latency, queueing, health, refused, failed, labelled, correct = body[11:_ITEMS]
    if not (
        type(model) is str
        and type(digest) is type(layout) is bytes
        and len(digest) == 32
        and len(layout) == 8
        and type(synced) is bool
        and type(sums) is type(health) is type(latency) is type(queueing) is list
        and type(refused) is dict
        and (not refused or all(type(key) is str and key.isascii() for key in refused))
        and len(latency) >= _LATENCY_ITEMS <= len(queueing)
        and type(latency[1]) is type(queueing[1]) is list
    ):
        return None
    numbers = [
        back,
        windows,
        start_ns,
        span_ns,
        rows,
        failed,
        labelled,
        correct,
        *sums,
        *health,
        *refused.values(),
    ]
    for h in (latency, queueing):
        numbers += (h[0], h[2], h[3], h[4])
        numbers += h[1]
    if (
        not are_counts(numbers)
        or windows < 1
        or back > seq
        or start_ns + span_ns >= _END
        or correct > labelled
    ):
        return None
    try:
        return Window(
            device=_device(device),
            session=_session(session),
            seq=seq,
            seq_lo=seq - back,
            model=_model(model),
            digest=ids.Digest(digest.hex()),
            start_ns=start_ns,
            end_ns=start_ns + span_ns,
            synced=synced,
            profile=Profile.counted(ids.LayoutId(layout.hex()), rows, counts, np.array(sums, np.int64)),
            latency=_latency(latency),
            health=Health(**dict(zip(HEALTH, health, strict=False))),
            refused=tuple(sorted(refused.items())) if refused else (),
            failed=failed,
            labelled=labelled,
            correct=correct,
            windows=windows,
            queueing=_latency(queueing),
        )
    except ContractError:
        return None


def is_ack(device: str, session: str, seqs: Sequence[int]) -> bool:
    """Whether an acknowledgement is one that its reader takes without a closer look."""
    try:
        return bool(_device(device) and _session(session)) and len(seqs) <= _FEW and are_counts(seqs)
    except ContractError:
        return False


def are_counts(items: Sequence[object]) -> bool:
    """Whether all are whole numbers in [0, 2^63)."""
    if not items:
        return True
    if set(map(type, items)) != _INT:
        return False
    numbers = cast("Sequence[int]", items)
    return min(numbers) >= 0 and max(numbers) < _END


def _latency(items: list[Any]) -> LatencyHistogram:
    """Of numbers that were looked at already; raises `ContractError`."""
    offset, counts, zero, sum_ns, max_ns = items[:_LATENCY_ITEMS]
    return LatencyHistogram(offset=offset, counts=tuple(counts), zero=zero, sum_ns=sum_ns, max_ns=max_ns)
