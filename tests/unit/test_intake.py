"""What the intake makes of a store that refuses: messages that none can hold are left out, others are stored."""

from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from unittest.mock import Mock

import pytest

from aggregator.adapters.registry import Registry
from aggregator.adapters.windows import Windows
from aggregator.config import IngestConfig
from aggregator.core import ingest
from aggregator.intake import Intake
from aggregator.records import Batch, Selection
from aggregator.stores import StoreError, Unstorable
from edge_runtime.contract.codec import decode
from edge_runtime.contract.messages import Ack
from edge_runtime.link import Received
from tests.support.fleet import NOW, TOPICS, birth, event, labels, window, wire


@dataclass
class Messages:
    """A link to a broker that has messages."""

    waiting: deque[Received] = field(default_factory=deque)
    published: list[tuple[str, bytes]] = field(default_factory=list)
    forgotten: list[Received] = field(default_factory=list)

    def bring(self, *messages):
        start = len(self.forgotten) + len(self.waiting)
        self.waiting.extend(
            Received(*wire(m), retained=False, token=token) for token, m in enumerate(messages, start + 1)
        )

    def poll_many(self, limit, timeout_seconds):
        return [self.waiting.popleft() for _ in range(min(limit, len(self.waiting)))]

    def publish_all(self, messages):
        self.published += messages
        return len(messages)

    def acknowledge_all(self, messages):
        self.forgotten += messages


@dataclass
class Site:
    intake: Intake
    link: Messages
    windows: Windows
    batches: list[Batch]

    def acks(self):
        found = [decode(payload) for _, payload in self.link.published]
        return {seq for ack in found if isinstance(ack, Ack) for seq in ack.seqs}


@pytest.fixture
def site(tmp_path):
    link, batches = Messages(), list[Batch]()
    with closing(Windows(tmp_path / "windows.sqlite")) as windows:
        intake = Intake(
            IngestConfig(),
            TOPICS,
            link,  # type: ignore[arg-type]
            windows=windows,
            registry=Registry(tmp_path),
            tell=lambda statuses, now_ns: None,
            note=batches.append,
            wall_ns=lambda: NOW,
        )
        yield Site(intake, link, windows, batches)


@pytest.fixture
def careless(monkeypatch):
    """Ingest that believes any number, so that the store meets what it cannot hold."""
    monkeypatch.setattr(ingest, "check_believable", lambda message: None)


TOP = 2**63 - 1
HUGE = window(seq=3, failed=TOP, refused=(("shed", TOP), ("width", TOP)))


def test_a_message_that_no_store_can_hold_is_a_dead_letter_and_the_rest_is_stored(site, careless):
    good = [window(seq=1), event(seq=2), window(seq=4), labels()]
    site.link.bring(good[0], birth(), HUGE, *good[1:])
    site.intake.step(0.0)
    assert [w.seq for w in site.windows.windows(Selection())] == [1, 4]
    assert (site.windows.figures().events, site.windows.truths()[0].labelled) == (1, 10)
    (letter,) = site.windows.dead_letters()
    assert (letter["topic"], "too large" in letter["reason"]) == (wire(HUGE)[0], True)
    assert len(site.link.forgotten) == 6
    assert site.acks() == {1, 2, 3, 4}  # sending it again cannot help
    (batch,) = site.batches
    assert (batch.windows, batch.events, batch.labels, dict(batch.dead)) == (2, 1, 1, {"counts": 1})
    site.link.bring(HUGE, *good)
    site.intake.step(0.0)
    (letter,) = site.windows.dead_letters()
    assert letter["times"] == 2
    assert site.windows.figures().windows == 2
    assert site.batches[1].duplicates == 4


def test_a_store_that_fails_otherwise_is_tried_again_with_the_same_batch(site, monkeypatch):
    plain, failures = site.windows.append, [StoreError("disk full"), Unstorable("of one"), StoreError("full")]

    def append(*arguments, **more):
        if failures:
            raise failures.pop(0)
        return plain(*arguments, **more)

    monkeypatch.setattr(site.windows, "append", append)
    site.link.bring(window(seq=1), event(seq=2))
    for _ in range(2):
        with pytest.raises(StoreError, match="full"):
            site.intake.step(0.0)
        assert (site.link.forgotten, site.link.published) == ([], [])
    site.intake.step(0.0)
    assert (site.windows.figures().windows, site.windows.figures().events) == (1, 1)
    assert site.windows.dead_letters() == ()
    assert len(site.link.forgotten) == 2


def test_numbers_at_the_end_of_63_bits_never_reach_the_store(site, monkeypatch):
    append = Mock(side_effect=site.windows.append)
    monkeypatch.setattr(site.windows, "append", append)
    site.link.bring(HUGE, window(seq=1))
    site.intake.step(0.0)
    assert append.call_count == 1
    assert site.windows.figures().windows == 1
    assert [letter["topic"] for letter in site.windows.dead_letters()] == [wire(HUGE)[0]]
