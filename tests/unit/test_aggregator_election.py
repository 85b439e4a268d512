"""One leader at a time: who takes a lease over, when, and what its former holder may still write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.adapters.ledger import Ledger
from aggregator.core.election import Election
from aggregator.records import AuditEntry, Lease, LeaseLost

SECONDS = 9.0
ENTRY = AuditEntry(at_ns=1, who="me", what="something", why="because")


def test_the_first_to_bid_leads_and_renews_thrice_within_its_lease():
    mine = Election("a", SECONDS)
    bid = mine.bid(None, 0.0)
    assert bid == Lease("a", 1)
    assert not mine.leads(0.0)
    mine.win(bid, 0.0)
    assert mine.bid(bid, 2.9) is None
    assert mine.bid(bid, 3.0) == Lease("a", 1, 1)
    assert mine.leads(8.9)
    assert not mine.leads(9.0)


def test_a_lease_is_taken_over_when_it_stood_still_for_its_length_and_not_while_it_moves():
    other = Election("b", SECONDS)
    assert other.bid(Lease("a", 1), 100.0) is None
    assert other.bid(Lease("a", 1, 1), 108.0) is None
    assert other.bid(Lease("a", 1, 1), 116.9) is None
    assert other.bid(Lease("a", 1, 1), 117.0) == Lease("b", 2)


def test_a_lease_laid_down_is_taken_at_once():
    assert Election("b", SECONDS).bid(Lease("", 4, 7), 0.0) == Lease("b", 5)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0.01, 6.0), st.booleans()), max_size=120),
    st.tuples(*[st.floats(-1e6, 1e6)] * 3),
)
def test_no_two_lead_at_once_whatever_their_clocks_say(moves, offsets):
    """Processes look when they happen to; each has a monotonic clock with an origin of its own."""
    processes = [Election(name, SECONDS) for name in "abc"]
    stands, now = None, 0.0
    for who, passed, _ in moves:
        now += passed
        process, clock = processes[who], now + offsets[who]
        if process.held is not None and stands != process.held:
            process.lose()
        bid = process.bid(stands, clock)
        if bid is not None:
            assert stands is None or bid.term >= stands.term
            stands = bid
            process.win(bid, clock)
        leading = [p for p, offset in zip(processes, offsets, strict=True) if p.leads(now + offset)]
        assert len(leading) <= 1


@pytest.fixture
def ledgers(tmp_path):
    opened = [Ledger(tmp_path / "ledger.sqlite") for _ in range(2)]
    yield opened
    for ledger in opened:
        ledger.close()


def test_of_two_who_swap_the_same_lease_one_succeeds(ledgers):
    first, second = ledgers
    assert first.lease() is None
    assert first.swap_lease(None, Lease("a", 1))
    assert not second.swap_lease(None, Lease("b", 1))
    assert second.lease() == Lease("a", 1)
    assert second.swap_lease(Lease("a", 1), Lease("b", 2))
    assert first.lease() == Lease("b", 2)


def test_a_deposed_leader_writes_nothing(ledgers):
    old, new = ledgers
    old.swap_lease(None, Lease("a", 1))
    old.guard(Lease("a", 1))
    with old.transaction():
        old.put_audit(ENTRY)
    old.swap_lease(Lease("a", 1), Lease("a", 1, 1))  # renewed: the same term
    with old.transaction():
        old.put_audit(ENTRY)
    new.swap_lease(Lease("a", 1, 1), Lease("b", 2))
    new.guard(Lease("b", 2))
    with pytest.raises(LeaseLost, match="another process leads"), old.transaction():
        old.put_audit(ENTRY)
    with pytest.raises(LeaseLost):
        old.move_retrain(1, "running")
    with new.transaction():
        new.put_audit(ENTRY)
    assert len(new.table("audit")) == 3
    old.guard(None)
    with old.transaction():
        old.put_audit(ENTRY)
    assert len(new.table("audit")) == 4


def test_orders_from_outside_need_no_lease(ledgers):
    leader, cli = ledgers
    leader.swap_lease(None, Lease("a", 1))
    leader.guard(Lease("a", 1))
    number = cli.request("halt", {}, by="ann", why="because", now_ns=1)
    assert [request.number for request in leader.pending()] == [number]
