"""From a full outbox to the aggregator's store: each window is counted once, however often its record comes."""

import random

import pytest

from aggregator.adapters.windows import Windows
from aggregator.core import ingest
from aggregator.records import Selection
from edge_runtime.adapters.outbox import Outbox
from edge_runtime.contract import ids
from edge_runtime.contract.codec import encode
from edge_runtime.contract.topics import Topics
from edge_runtime.core import rollup
from tests.support import history
from tests.support.history import History, event, session, total

TOPICS = Topics(ids.fleet_id("plant"))


@pytest.fixture
def store(tmp_path):
    opened = Windows(tmp_path / "windows.db")
    yield opened
    opened.close()


def deliver(store, records):
    """What the service does with a batch; its acknowledgements."""
    plan = ingest.plan([ingest.read(TOPICS, r.topic, r.payload) for r in records], {})
    assert plan.dead == ()
    stored = store.append(plan.windows, plan.events, plan.dead, 1)
    assert stored.overlapping == 0
    return plan.acks


@pytest.mark.parametrize("seed", range(4))
def test_merged_records_repeated_and_acknowledged_late_are_counted_once(tmp_path, store, seed):
    """Offline until the outbox is full, then a link that repeats and loses acknowledgements; the same again."""
    rng = random.Random(seed)
    outbox = Outbox(tmp_path / "outbox.db", max_bytes=8_000, merge=rollup.merge, choose=rollup.choose)
    made, closed, noted = History(), [], 0
    seq: dict[int, int] = {}
    for _ in range(3):
        for start in range(1 + len(seq), 4 + len(seq)):
            for n in range(25):
                seq[start] = seq.get(start, 0) + 1
                if n % 9 == 0:  # an event's number lies between those of two windows
                    told = event(start, seq[start])
                    outbox.append(told.session, told.seq, history.EVENT_TOPIC, encode(told))
                    noted += 1
                else:
                    closed.append(made.window(start, seq[start]))
                    outbox.append(session(start), seq[start], history.TOPIC, encode(closed[-1]))
        for _ in range(rng.randrange(4, 9)):
            records = outbox.pending(5)
            outbox.mark_sent((r.session, r.seq) for r in records)
            acks = deliver(store, records)
            if rng.random() < 0.7:
                for ack in acks:
                    outbox.trim(ack.session, ack.seqs)
    while records := outbox.pending(5):
        outbox.mark_sent((r.session, r.seq) for r in records)
        for ack in deliver(store, records):
            outbox.trim(ack.session, ack.seqs)
    assert len(outbox) == 0
    assert total(store.windows(Selection())) == total(closed)
    assert store.figures().overlaps_rejected == 0
    assert store.figures().events == noted - outbox.dropped
    outbox.close()


def test_an_event_whose_number_lies_in_a_windows_interval_is_no_overlap(tmp_path, store):
    made = History()
    merged = rollup.merge(made.window(1, 1), made.window(1, 3))
    assert merged is not None
    inside = event(1, 2)
    window, note = (encode(message) for message in (merged, inside))
    for order in ((window, note), (note, window)):
        plan = ingest.plan(
            [ingest.read(TOPICS, history.TOPIC if p is window else history.EVENT_TOPIC, p) for p in order], {}
        )
        store.append(plan.windows, plan.events, plan.dead, 1)
    figures = store.figures()
    assert (figures.windows, figures.events, figures.overlaps_rejected) == (2, 1, 0)
    assert figures.duplicates_rejected == 2
