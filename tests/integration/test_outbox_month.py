"""A device that is offline for a month keeps every count of it in 64 KiB, and tells what it no longer resolves."""

import statistics
import time
from itertools import pairwise

import pytest

from edge_runtime.adapters.outbox import Outbox
from edge_runtime.contract.codec import encode
from edge_runtime.core import rollup
from tests.support import history
from tests.support.history import History, event, read_windows, total


@pytest.mark.parametrize(
    ("windows", "sessions", "max_bytes"),
    [
        (160, 8, 24 << 10),
        (160, 80, 24 << 10),
        pytest.param(8640, 30, 64 << 10, marks=pytest.mark.slow),
        pytest.param(8640, 300, 64 << 10, marks=pytest.mark.slow),
    ],
)
def test_a_month_offline_fits_and_every_count_of_it_is_exact(tmp_path, windows, sessions, max_bytes):
    """Windows of 1,000 rows of 30 features, 5 minutes each; the daemon starts anew again and again."""
    path = tmp_path / "outbox.db"
    made, closed, events = History(features=30, rows=1000, kinds=24), [], 0
    normal: list[float] = []
    full: list[float] = []
    for start in range(1, sessions + 1):
        outbox = Outbox(path, max_bytes=max_bytes, merge=rollup.merge, choose=rollup.choose)
        started = event(start, 1)
        outbox.append(started.session, 1, history.EVENT_TOPIC, encode(started))
        events += 1
        for seq in range(2, 2 + windows // sessions):
            window = made.window(start, seq)
            closed.append(window)
            payload, begin, before = encode(window), time.perf_counter(), len(outbox)
            outbox.append(window.session, seq, history.TOPIC, payload)
            (normal if len(outbox) > before else full).append(time.perf_counter() - begin)
            assert outbox.size_bytes <= max_bytes
        outbox.close()
    outbox = Outbox(path, max_bytes=max_bytes, merge=rollup.merge, choose=rollup.choose)
    records = outbox.pending(10_000)
    found = read_windows(record.payload for record in records)
    assert total(found) == total(closed)
    assert sum(len(r.payload) + len(r.topic) for r in records) < outbox.size_bytes <= max_bytes
    # Every hour of it is covered, in order, the last windows one by one.
    assert found[0].start_ns == closed[0].start_ns
    assert all(a.end_ns == b.start_ns for a, b in pairwise(found))
    assert [w.windows for w in found[-3:]] == [1, 1, 1]
    gaps = {(gap.topic, gap.kind): gap for gap in outbox.gaps()}
    merged = gaps[history.TOPIC, "merged"]
    assert merged.records == len(closed) - len(found)
    assert merged.windows == sum(w.windows for w in found if w.windows > 1)
    # No window was dropped; events may have been, and that is said.
    dropped = gaps.get((history.EVENT_TOPIC, "dropped"))
    assert outbox.dropped == (dropped.records if dropped else 0) == events - (len(records) - len(found))
    outbox.close()
    print(
        f"{windows} windows of {sessions} sessions in {len(found)} records: {outbox.size_bytes} bytes charged, "
        f"the file has {path.stat().st_size}; an append takes {statistics.median(normal) * 1e6:.0f} us, "
        f"{statistics.median(full) * 1e6:.0f} us when full (p99 {statistics.quantiles(full, n=100)[98] * 1e6:.0f} us)"
    )
