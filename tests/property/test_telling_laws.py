"""Laws of telling alarms, whatever sinks do and whenever the process dies. The ledger here is a list."""

from collections import defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aggregator.core.telling import (
    MAX_WAITING,
    Deliver,
    Done,
    Failing,
    GivenUp,
    Outbox,
    Works,
)
from aggregator.records import Telling, Told
from tests.support.fleet import NOW

SINKS = ("mqtt", "webhook", "command")
KEEP_SECONDS = 1000.0
MOST_DELAY = 8.0
ENDS = ("takes", "fails", "fails", "refuses", "hangs")


def delay(attempt):
    return min(MOST_DELAY, 0.5 * 2.0**attempt)


class Telltale(RuleBasedStateMachine):
    """Sinks that take, refuse, fail and fall silent, under a process that dies at any time."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.number = 0
        self.ledger = []
        self.told = defaultdict(list)
        self.given_up = []
        self.written = defaultdict(list)
        self.says = defaultdict(list)
        self.start()

    def start(self):
        """A process that knows what the ledger holds, and nothing else."""
        self.outbox = Outbox(SINKS, keep_seconds=KEEP_SECONDS, delay=delay)
        self.under_way = {}
        self.troubled = set()
        self.perform(self.outbox.found(self.ledger))

    def perform(self, actions):
        for action in actions:
            match action:
                case Deliver(telling):
                    assert telling.sink not in self.under_way
                    self.under_way[telling.sink] = telling
                case Done(telling):
                    self.told[telling.sink].append(telling)
                    self.ledger.remove(telling)
                case GivenUp(telling, reason):
                    assert reason
                    self.given_up.append(telling)
                    self.ledger.remove(telling)
                case Failing(sink, _):
                    assert sink not in self.troubled
                    self.troubled.add(sink)
                case Works(sink):
                    self.troubled.remove(sink)

    @rule(incident=st.integers(1, 2))
    def an_event_is_written(self, incident):
        new = []
        for sink in SINKS:
            self.number += 1
            at_ns = NOW + int(self.now * 1e9)
            new.append(Telling(number=self.number, sink=sink, incident=incident, at_ns=at_ns, text="{}"))
            self.written[sink].append(new[-1])
        self.ledger += new
        self.perform(self.outbox.found(new))

    @rule(
        seconds=st.sampled_from([0.0, 0.5, MOST_DELAY, 400.0]),
        ends=st.fixed_dictionaries({sink: st.sampled_from(ENDS) for sink in SINKS}),
    )
    def time_passes_and_attempts_end(self, seconds, ends):
        self.now += seconds
        self.perform(self.outbox.due(self.now))
        for sink, end in ends.items():
            if sink in self.under_way and end != "hangs":
                self.an_attempt_ends(sink, "" if end == "takes" else end, final=end == "refuses")

    def an_attempt_ends(self, sink, reason, *, final):
        told = Told(self.under_way.pop(sink).number, reason, final)
        now_ns = NOW + int(self.now * 1e9)
        self.perform(self.outbox.ended(sink, told, now_seconds=self.now, now_ns=now_ns))

    @rule()
    def the_process_dies(self):
        self.start()

    @invariant()
    def nothing_is_lost(self):
        """Whatever was written waits in the ledger, was told, or was given up with a reason."""
        for sink, written in self.written.items():
            known = {t.number for t in [*self.ledger, *self.told[sink], *self.given_up]}
            assert {t.number for t in written} <= known

    @invariant()
    def each_incident_is_told_in_order(self):
        for told in self.told.values():
            for incident in {t.incident for t in told}:
                numbers = [t.number for t in told if t.incident == incident]
                assert numbers == sorted(numbers)

    @invariant()
    def what_waits_is_counted(self):
        for state in self.outbox.states:
            assert state.waiting == sum(t.sink == state.sink for t in self.ledger)
            assert state.failing == (state.sink in self.troubled)

    def teardown(self):
        """Sinks that work again get everything, in a bounded time; trouble is over then."""
        for _ in range(10 + 2 * len(self.ledger)):
            self.now += MOST_DELAY
            self.perform(self.outbox.due(self.now))
            for sink in sorted(self.under_way):
                self.an_attempt_ends(sink, "", final=False)
        assert self.ledger == []
        assert self.troubled == set()


TestTelltale = Telltale.TestCase
TestTelltale.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def telling(number, incident=1, sink="webhook", at_ns=NOW):
    return Telling(number=number, sink=sink, incident=incident, at_ns=at_ns, text="{}")


def outbox(*sinks, **options):
    return Outbox(sinks or ("webhook",), **{"keep_seconds": KEEP_SECONDS, "delay": delay, **options})


def begun(actions):
    return [action.telling.number for action in actions]


def test_an_event_that_always_fails_stands_before_nobody_but_its_own_incident():
    box = outbox()
    box.found(
        [telling(1, incident=1), telling(2, incident=1), telling(3, incident=2), telling(4, incident=3)]
    )
    told, now = [], 0.0
    for _ in range(8):
        now += MOST_DELAY
        for number in begun(box.due(now)):
            poisoned = number == 1
            told += [] if poisoned else [number]
            box.ended("webhook", Told(number, "status 500" if poisoned else ""), now_seconds=now, now_ns=NOW)
    assert told == [3, 4]
    assert [(s.waiting, s.failing) for s in box.states] == [(2, True)]


def test_a_sink_that_is_silent_holds_up_no_other():
    box = outbox("webhook", "command")
    box.found([telling(1), telling(2, sink="command"), telling(3, incident=2, sink="command")])
    assert begun(box.due(0.0)) == [1, 2]
    assert box.ended("command", Told(2), now_seconds=0.0, now_ns=NOW) == (Done(telling(2, sink="command")),)
    assert begun(box.due(0.0)) == [3]


def test_a_sink_that_fails_rests_longer_each_time_and_its_trouble_is_told_once():
    box = outbox(delay=lambda failures: 2.0**failures)
    box.found([telling(1)])
    now, said = 0.0, []
    for failures in range(5):
        assert begun(box.due(now)) == [1]
        said += box.ended("webhook", Told(1, "no route"), now_seconds=now, now_ns=NOW)
        assert box.due(now + 2.0**failures - 0.01) == ()
        now += 2.0**failures
    assert said == [Failing("webhook", "no route")]
    assert begun(box.due(now)) == [1]
    assert box.ended("webhook", Told(1), now_seconds=now, now_ns=NOW) == (Done(telling(1)), Works("webhook"))


def test_what_failed_and_is_too_old_is_given_up_and_what_was_never_tried_is_tried_however_old():
    box = outbox()
    old = telling(1, at_ns=NOW - int(2 * KEEP_SECONDS * 1e9))
    box.found([old])
    assert begun(box.due(0.0)) == [1]
    assert box.ended("webhook", Told(1, "no"), now_seconds=0.0, now_ns=NOW) == (
        Failing("webhook", "no"),
        GivenUp(old, "no"),
        Works("webhook"),
    )


def test_the_oldest_are_given_up_when_too_many_wait_but_not_what_is_under_way():
    box = outbox()
    box.found([telling(1)])
    box.due(0.0)
    actions = box.found([telling(number) for number in range(2, MAX_WAITING + 3)])
    assert [a.telling.number for a in actions] == [2, 3]
    assert box.states[0].waiting == MAX_WAITING
    assert box.ended("webhook", Told(1), now_seconds=0.0, now_ns=NOW) == (Done(telling(1)),)


def test_a_sink_that_is_not_configured_any_more_is_named():
    (given_up,) = outbox("mqtt").found([telling(1)])
    assert given_up == GivenUp(telling(1), "[alarms] names no webhook any more")
