"""The chunk transfer as a whole: a fake broker that loses, repeats, reorders and lies."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.topics import CHUNK_BYTES, MAX_BLOB_BYTES, chunk_count
from edge_runtime.core.transfer import Append, Ask, Done, Failed, Leave, Transfer

BLOB = random.Random(7).randbytes(6 * CHUNK_BYTES + 1234)


def piece(blob, index):
    return blob[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


def kinds(actions, kind):
    return [action for action in actions if isinstance(action, kind)]


class Broker:
    """Performs a transfer's actions; delivers the chunks asked for in random order, some of them never or twice."""

    def __init__(self, blob, rng, *, loss=0.0, repeat=0.0):
        self.blob, self.rng, self.loss, self.repeat = blob, rng, loss, repeat
        self.queue: list[int] = []
        self.subscribed: set[int] = set()
        self.staging = b""
        self.worst_in_flight = 0
        self.end: Done | Failed | None = None

    def perform(self, actions):
        for action in actions:
            match action:
                case Ask(index):
                    self.subscribed.add(index)
                    self.worst_in_flight = max(self.worst_in_flight, len(self.subscribed))
                    if self.rng.random() >= self.loss:
                        self.queue.append(index)
                    if self.rng.random() < self.repeat:
                        self.queue.append(index)
                case Leave(index):
                    self.subscribed.remove(index)
                case Append(data):
                    self.staging += data
                case Done() | Failed():
                    assert self.end is None
                    self.end = action

    def run(self, transfer, now=0.0):
        self.perform(transfer.start(now))
        while self.end is None:
            if self.queue:
                index = self.queue.pop(self.rng.randrange(len(self.queue)))
                self.perform(transfer.chunk(index, piece(self.blob, index), now))
            else:
                now = transfer.due_seconds()
                self.perform(transfer.tick(now))
        return now


@given(
    length=st.integers(1, len(BLOB)),
    have=st.integers(0, 6),
    in_flight=st.integers(1, 6),
    loss=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 1000),
)
def test_every_byte_once_in_order_whatever_the_broker_does(length, have, in_flight, loss, seed):
    blob = BLOB[:length]
    have = min(have, length // CHUNK_BYTES)
    broker = Broker(blob, random.Random(seed), loss=loss, repeat=0.3)
    broker.staging = blob[: have * CHUNK_BYTES]
    transfer = Transfer(length=length, have=have, in_flight=in_flight, attempts=50, deadline_seconds=1e9)
    broker.run(transfer)
    assert broker.end == Done()
    assert broker.staging == blob
    assert broker.worst_in_flight <= in_flight
    assert not broker.subscribed


def test_a_chunk_that_never_comes_is_asked_for_three_times_then_named():
    transfer = Transfer(length=len(BLOB), deadline_seconds=1000.0, patience_seconds=5.0, attempts=3)
    broker = Broker(BLOB, random.Random(0), loss=1.0)
    assert broker.run(transfer) == 15.0
    assert isinstance(broker.end, Failed)
    assert "chunk 0 of 7 did not arrive in 3 tries of 5 s" in broker.end.reason
    assert not broker.subscribed


def test_the_deadline_ends_a_transfer_that_still_makes_progress():
    transfer = Transfer(length=len(BLOB), deadline_seconds=10.0, in_flight=1, patience_seconds=100.0)
    transfer.start(0.0)
    transfer.chunk(0, piece(BLOB, 0), 4.0)
    assert transfer.tick(9.9) == []
    assert transfer.due_seconds() == 10.0
    [left, failed] = transfer.tick(10.0)
    assert isinstance(failed, Failed)
    assert left == Leave(1)
    assert "deadline passed after 1 of 7 chunks" in failed.reason
    assert transfer.over
    assert transfer.chunk(1, piece(BLOB, 1), 10.1) == []
    assert transfer.tick(11.0) == []


@pytest.mark.parametrize("payload", [b"x", piece(BLOB, 0) + b"x", piece(BLOB, 0)[:-1]])
def test_a_chunk_of_the_wrong_length_is_refused(payload):
    transfer = Transfer(length=len(BLOB), deadline_seconds=10.0)
    transfer.start(0.0)
    actions = transfer.chunk(0, payload, 0.1)
    assert not kinds(actions, Append)
    [failed] = kinds(actions, Failed)
    assert f"chunk 0 of 7 holds {len(payload)} bytes instead of {CHUNK_BYTES}" in failed.reason


def test_the_last_chunk_is_as_long_as_the_rest_of_the_blob():
    transfer = Transfer(length=len(BLOB), have=6, deadline_seconds=10.0)
    assert transfer.start(0.0) == [Ask(6)]
    actions = transfer.chunk(6, piece(BLOB, 6), 0.1)
    assert actions == [Leave(6), Append(piece(BLOB, 6)), Done()]


def test_a_full_staging_file_asks_for_nothing():
    assert Transfer(length=len(BLOB), have=chunk_count(len(BLOB)), deadline_seconds=10.0).start(0.0) == [
        Done()
    ]


def test_a_cleared_chunk_counts_as_absent():
    transfer = Transfer(length=10, deadline_seconds=10.0)
    assert transfer.start(0.0) == [Ask(0)]
    assert transfer.chunk(0, b"", 0.1) == []
    assert transfer.chunk(0, b"0123456789", 0.2) == [Leave(0), Append(b"0123456789"), Done()]


def test_chunks_out_of_turn_are_held_and_bound_what_is_asked_for():
    transfer = Transfer(length=len(BLOB), deadline_seconds=10.0, in_flight=3)
    assert transfer.start(0.0) == [Ask(0), Ask(1), Ask(2)]
    assert transfer.chunk(2, piece(BLOB, 2), 0.1) == [Leave(2)]
    assert transfer.chunk(1, piece(BLOB, 1), 0.1) == [Leave(1)]
    actions = transfer.chunk(0, piece(BLOB, 0), 0.1)
    assert [len(a.data) for a in kinds(actions, Append)] == [CHUNK_BYTES] * 3
    assert kinds(actions, Ask) == [Ask(3), Ask(4), Ask(5)]


@pytest.mark.parametrize("length", [0, -1, MAX_BLOB_BYTES + 1])
def test_an_oversized_or_empty_blob_is_refused_before_anything_is_asked_for(length):
    with pytest.raises(ContractError, match="cannot be fetched over MQTT"):
        Transfer(length=length, deadline_seconds=1.0)
