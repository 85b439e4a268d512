"""The queue between the link's thread and its owner."""

import threading

from edge_runtime.mqtt.inbox import Inbox

WAIT_SECONDS = 10.0


class Putting(threading.Thread):
    """Puts a message in a thread of its own."""

    def __init__(self, inbox, event, size):
        super().__init__(daemon=True)
        self.inbox, self.event, self.size = inbox, event, size
        self.taken = None
        self.start()

    def run(self):
        self.taken = self.inbox.put_bounded(self.event, self.size)

    def waits(self):
        self.join(0.05)
        return self.is_alive()

    def ends(self):
        self.join(WAIT_SECONDS)
        return not self.is_alive()


def test_messages_wait_for_room_and_other_events_do_not():
    inbox: Inbox[str] = Inbox(2, 1000)
    assert inbox.put_bounded("a", 1)
    assert inbox.put_bounded("b", 1)
    third = Putting(inbox, "c", 1)
    assert third.waits()
    inbox.put("event")
    assert inbox.get(0.0) == "a"
    assert third.ends()
    assert third.taken
    assert [inbox.get(0.0) for _ in range(4)] == ["b", "event", "c", None]


def test_bytes_are_bounded_too():
    inbox: Inbox[str] = Inbox(100, 10)
    assert inbox.put_bounded("a", 6)
    second = Putting(inbox, "b", 5)
    assert second.waits()
    assert inbox.get(0.0) == "a"
    assert second.ends()
    assert inbox.get(0.0) == "b"


def test_a_message_larger_than_the_bound_comes_alone():
    inbox: Inbox[str] = Inbox(100, 10)
    assert inbox.put_bounded("huge", 1000)
    second = Putting(inbox, "b", 1)
    assert second.waits()
    assert inbox.get(0.0) == "huge"
    assert second.ends()


def test_closing_lets_a_waiting_message_go_and_keeps_what_is_in():
    inbox: Inbox[str] = Inbox(1, 10)
    assert inbox.put_bounded("a", 1)
    second = Putting(inbox, "b", 1)
    assert second.waits()
    inbox.close()
    assert second.ends()
    assert second.taken is False
    assert inbox.put_bounded("c", 1) is False
    inbox.put("event")
    assert [inbox.get(0.0) for _ in range(3)] == ["a", "event", None]


def test_many_are_taken_at_once_and_make_room_for_who_waits():
    inbox: Inbox[str] = Inbox(3, 1000)
    for event in "abc":
        assert inbox.put_bounded(event, 1)
    fourth = Putting(inbox, "d", 1)
    assert fourth.waits()
    assert inbox.get_many(2, 0.0) == ["a", "b"]
    assert fourth.ends()
    assert fourth.taken
    assert inbox.get_many(10, 0.0) == ["c", "d"]
    assert inbox.get_many(10, 0.0) == []


def test_waiting_for_many_ends_with_the_first_or_a_wake():
    inbox: Inbox[str] = Inbox(3, 1000)
    found: list[list[str]] = []
    reader = threading.Thread(target=lambda: found.append(inbox.get_many(10, WAIT_SECONDS)))
    reader.start()
    inbox.put("a")
    reader.join(WAIT_SECONDS)
    assert found == [["a"]]
    inbox.wake()
    assert inbox.get_many(10, WAIT_SECONDS) == []
