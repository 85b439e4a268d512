"""Senders take turns, and nobody has more than its share waiting."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from aggregator.core.turns import Turns

MESSAGES = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3)), max_size=80)


def test_a_batch_holds_one_of_everybody_before_a_second_of_anybody():
    turns: Turns[str] = Turns(10)
    for message in ("a1", "a2", "a3", "b1", "c1", "b2"):
        assert turns.put(message[0], message)
    assert turns.take(4) == ["a1", "b1", "c1", "a2"]
    assert turns.take(9) == ["b2", "a3"]
    assert turns.take(9) == []


def test_the_next_batch_goes_on_where_the_last_one_ended():
    turns: Turns[str] = Turns(10)
    for sender in "abcd":
        turns.put(sender, sender + "1")
        turns.put(sender, sender + "2")
    assert turns.take(3) == ["a1", "b1", "c1"]
    assert turns.take(3) == ["d1", "a2", "b2"]


def test_who_has_too_many_waiting_is_refused_until_some_were_taken():
    turns: Turns[int] = Turns(2)
    assert [turns.put("a", n) for n in range(3)] == [True, True, False]
    assert turns.put("b", 9)
    assert len(turns) == 3
    assert turns.take(1) == [0]
    assert turns.put("a", 3)
    assert turns.take(9) == [9, 1, 3]
    assert len(turns) == 0


@given(MESSAGES, st.integers(1, 5), st.integers(1, 20))
def test_each_senders_messages_leave_in_order_and_a_flood_delays_others_by_a_bounded_number_of_batches(
    messages, per_sender, batch
):
    turns: Turns[tuple[str, int]] = Turns(per_sender)
    kept = [(sender, n) for n, (sender, _) in enumerate(messages) if turns.put(sender, (sender, n))]
    assert max(Counter(sender for sender, _ in kept).values(), default=0) <= per_sender
    batches = []
    while found := turns.take(batch):
        batches.append(found)
    left = [message for found in batches for message in found]
    assert sorted(left) == sorted(kept)
    for sender in "abcdef":
        assert [m for m in left if m[0] == sender] == [m for m in kept if m[0] == sender]
    rounds = {message: sum(1 for m in kept if m[0] == message[0] and m[1] < message[1]) for message in kept}
    for message in kept:  # everyone who is before it in its round, and all earlier rounds
        before = sum(1 for other in kept if rounds[other] <= rounds[message])
        assert left.index(message) < before
