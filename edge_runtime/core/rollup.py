"""Two neighbouring windows as one record, and which two to take: how a full outbox makes room without losing a count.

A record keeps the exact totals of its windows and loses only when, within its span, something happened. The history
thins with age like that of an exponential histogram (Datar et al., "Maintaining Stream Statistics over Sliding
Windows", SIAM J. Comput. 2002): the width of a record is about proportional to how long ago it was, so that n records
reach back a time exponential in n.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from edge_runtime.contract.messages import Window

MAX_COUNT: Final = 1 << 32
"""What aggregators believe a record at most, of rows and of anything counted beside them; beyond it none is merged."""
_MAX_SUM_NS: Final = 1 << 63


def merge(older: Window, newer: Window) -> Window | None:
    """The record of both; None when one record cannot stand for them.

    They must be of one device, model, artifact and layout, and ``older`` must have come before ``newer`` with no other
    window of the model in between: the caller knows its queue. **Neither may ever have been sent**: an aggregator that
    holds one of them would count it twice.

    Within a session the record covers the numbers of both; events between them share the number space and keep keys of
    their own. Across sessions it bears the newer one's session and numbers alone, for nobody has seen the older's.
    Counts are summed exactly, in any order of merging to the same total. The health is the newer's, the peak the
    larger one. The span is from the start of the first to the end of the last where both are ``synced``; else it ends
    with the newer and lasts as long as both together, because a start by a clock that was set since says nothing.
    """
    a, b = older, newer
    if (a.device, a.model, a.digest) != (b.device, b.model, b.digest) or not _same_layout(a, b):
        return None
    if a.session == b.session and a.seq >= b.seq_lo:
        return None
    refused = Counter(dict(a.refused))
    refused.update(dict(b.refused))
    synced = a.synced and b.synced
    lasted_ns = a.end_ns - a.start_ns + b.end_ns - b.start_ns
    merged = replace(
        b,
        seq_lo=a.seq_lo if a.session == b.session else b.seq_lo,
        start_ns=min(a.start_ns, b.start_ns) if synced else max(0, b.end_ns - lasted_ns),
        end_ns=max(a.end_ns, b.end_ns) if synced else b.end_ns,
        synced=synced,
        profile=a.profile.merge(b.profile),
        latency=a.latency.merge(b.latency),
        queueing=a.queueing.merge(b.queueing),
        health=replace(b.health, peak_rss_bytes=max(a.health.peak_rss_bytes, b.health.peak_rss_bytes)),
        refused=tuple(sorted(refused.items())),
        failed=a.failed + b.failed,
        labelled=a.labelled + b.labelled,
        correct=a.correct + b.correct,
        windows=a.windows + b.windows,
    )
    return merged if _believable(merged) else None


def choose(spans: Sequence[int], apart: Collection[int] = ()) -> int | None:
    """The index i of the next pair (i, i + 1) to merge; None when there is none.

    ``spans`` are how many windows each record of a row of neighbours holds, oldest first; ``apart`` are indices of
    pairs that cannot be merged. Taken is the pair whose record would be narrowest for its age (the number of windows
    since), the older of equals. O(n).
    """
    widths = np.asarray(spans, np.float64)
    if widths.size < 2:
        return None
    since = widths[::-1].cumsum()[::-1] - widths
    cost = (widths[:-1] + widths[1:]) / (since[1:] + 1.0)
    cost[[i for i in apart if 0 <= i < cost.size]] = np.inf
    best = int(cost.argmin())
    return best if np.isfinite(cost[best]) else None


def _same_layout(a: Window, b: Window) -> bool:
    return (
        a.profile.layout == b.profile.layout
        and a.profile.counts.size == b.profile.counts.size
        and a.profile.sums.size == b.profile.sums.size
    )


def _believable(w: Window) -> bool:
    counts = (w.profile.rows, w.failed, sum(n for _, n in w.refused), w.labelled)
    return max(counts) <= MAX_COUNT and max(w.latency.sum_ns, w.queueing.sum_ns) < _MAX_SUM_NS
