"""Whatever numbers a message may have by the contract, the telemetry store goes on: nothing raises, or fails again."""

from contextlib import closing
from dataclasses import fields, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.adapters.windows import Windows
from aggregator.core import ingest
from aggregator.records import Selection
from edge_runtime.contract.codec import MAX_LABELLED, encode
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import DeviceId, SourceId
from edge_runtime.contract.latency import MAX_BUCKETS, LatencyHistogram
from edge_runtime.contract.messages import Health
from edge_runtime.contract.profile import FIXED_POINT
from tests.support.fleet import NOW, SECOND, TOPICS, A, artifact_info, event, labels, window, wire

TOP = 2**63 - 1
INFO = artifact_info()
EDGES = (0, 1, 2**32, 2**32 + 1, 2**53, 2**58, 2**62, TOP - 1, TOP)
numbers = st.sampled_from(EDGES)
times = st.sampled_from((NOW, NOW, NOW + SECOND, ingest.MAX_TIME_NS, *EDGES))
counts = st.sampled_from((20, *EDGES))
PROFILE = window().profile


@st.composite
def histograms(draw):
    inner = draw(st.lists(counts, max_size=3))
    body = [draw(st.sampled_from((1, 20, *EDGES[1:]))), *inner, draw(st.sampled_from((1, *EDGES[1:])))]
    body = draw(st.sampled_from(([], body[:1], body)))
    return LatencyHistogram(
        offset=draw(st.integers(0, MAX_BUCKETS - len(body))) if body else 0,
        counts=tuple(body),
        zero=draw(counts),
        sum_ns=draw(counts),
        max_ns=draw(counts),
    )


@st.composite
def profiles(draw):
    """Those of the artifact, or of a layout that nobody knows: with numbers of any size."""
    if draw(st.booleans()):
        return PROFILE
    rows = draw(st.sampled_from((0, 1, 2**32, *EDGES)))
    cells = st.sampled_from((0, 1, rows, draw(counts)))
    sums = st.sampled_from((0, min(rows * FIXED_POINT, TOP), draw(counts)))
    return replace(
        PROFILE,
        rows=rows,
        counts=np.array([draw(cells) for _ in range(3)], np.int64),
        sums=np.array([draw(sums) for _ in range(draw(st.integers(0, 2)))], np.int64),
    )


NUMBERS = {
    "start_ns": times,
    "end_ns": times,
    "profile": profiles(),
    "latency": histograms(),
    "queueing": histograms(),
    "health": st.builds(Health, **{f.name: numbers for f in fields(Health)}),
    "refused": st.tuples(counts, counts).map(lambda n: (("shed", n[0]), ("width", n[1]))),
    "failed": counts,
    "labelled": counts,
    "windows": st.sampled_from(EDGES[1:]),
}


@st.composite
def windows(draw):
    """Honest but for a few numbers: with more of them it would hardly ever be believed."""
    seq = draw(st.sampled_from((2, 3, *EDGES)))
    few = draw(st.lists(st.sampled_from(sorted(NUMBERS)), max_size=3, unique=True))
    w = replace(window(), **{name: draw(NUMBERS[name]) for name in few})
    return replace(
        w,
        seq=seq,
        seq_lo=draw(st.sampled_from((seq, seq, min(seq, 1), 0))),
        synced=draw(st.booleans()),
        correct=draw(st.sampled_from((0, w.labelled))),
    )


@st.composite
def told(draw):
    n = draw(st.sampled_from((1, 20, MAX_LABELLED)))
    start = draw(times)
    return replace(
        labels(source=draw(st.sampled_from(("lab", "shop")))),
        seq=draw(numbers),
        start_ns=start,
        end_ns=max(start, draw(times)),
        labelled=n,
        correct=draw(st.sampled_from((0, n))),
    )


@st.composite
def events(draw):
    return replace(event(), seq=draw(numbers), wall_ns=draw(times))


def is_legal(message):
    try:
        encode(message)
    except ContractError:
        return False
    return True


messages = (windows() | told() | events()).filter(is_legal)


def ask_everything(store):
    """Every question that the store answers."""
    everything, device = Selection(), DeviceId("dev-1")
    store.unjudged()
    store.streams()
    for digest in (A, None):
        store.totals(Selection(digest=digest))
        store.profiles(Selection(digest=digest, last=3))
        store.latency(Selection(digest=digest))
        store.truths(digest)
    store.profiles(everything)
    list(store.windows(everything))
    store.wire_bytes(everything)
    store.pending(A, {device: 0})
    store.block(A, device, 0, rows=TOP, seconds=1e300)
    store.receipts(A)
    store.late(A, {})
    store.periods(SourceId("lab"))
    store.twins([labels()])
    store.figures()
    store.events()
    store.dead_letters()


def emptied(store):
    """Prunes until nothing is left; as many calls as that can take."""
    return any(not store.prune(NOW + 10 * SECOND) for _ in range(10))


@settings(max_examples=100)
@given(
    st.lists(st.lists(messages, min_size=1, max_size=6), min_size=1, max_size=4), st.booleans(), st.booleans()
)
def test_no_numbers_that_the_decoder_lets_through_stop_the_store(tmp_path_factory, batches, known, prunes):
    """The law of bad numbers: a message is stored or a dead letter, and either way everything goes on."""
    path = tmp_path_factory.mktemp("store") / "windows.sqlite"
    with closing(Windows(path)) as store:
        for batch in batches * 2:  # all of them come again
            decoded = ingest.read_all(TOPICS, [wire(m) for m in batch])
            plan = ingest.plan(decoded, {A: INFO} if known else {})
            done = store.append(plan.windows, plan.events, plan.dead, NOW, labels=plan.labels)
            assert sum(map(len, (plan.windows, plan.events, plan.labels, plan.dead))) == len(batch)
            assert done.stored + done.overlapping <= len(plan.windows)
            ask_everything(store)
            if prunes:
                assert emptied(store)
        # All are believed, whatever their layouts: so each of them is beside labels.
        while any(store.settle(A, lambda profile: None)):
            pass
        ask_everything(store)
        before = [replace(t, rss_bytes=0) for t in store.totals(Selection())]
        assert emptied(store)
        ask_everything(store)
        assert [replace(t, rss_bytes=0) for t in store.totals(Selection())] == before


@settings(max_examples=50)
@given(st.lists(windows().filter(is_legal), max_size=8))
def test_whatever_is_believed_of_latencies_is_what_durations_can_come_to(found):
    """Of any window that is not a dead letter, and of all of them together."""
    believed = [m.message for m in ingest.read_all(TOPICS, [wire(w) for w in found])]
    for w in found:
        if w not in believed:
            continue
        refused = sum(n for _, n in w.refused)
        assert w.latency.count <= w.profile.rows + w.failed + refused <= 3 * ingest.MAX_WINDOW_COUNT
        assert w.latency.sum_ns <= min(ingest.MAX_DURATION_NS, w.latency.count * w.latency.max_ns)
        assert w.queueing.sum_ns <= w.queueing.count * w.queueing.max_ns
