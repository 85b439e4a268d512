"""Labels that come late, as the monitor has them judged, over its stores."""

from dataclasses import replace

import pytest

from aggregator.records import Arrival
from edge_runtime.contract.codec import encode
from tests.support.fleet import NOW, SECOND, labels
from tests.unit.test_aggregator_monitor import DRIFT, Fleet

NAMES = tuple(f"dev-{i:02}" for i in range(12))
LOOKS = DRIFT.baseline_looks
SPAN = 100 * SECOND


class Late(Fleet):
    """A fleet whose windows have no labels; its looks are `SPAN` apart."""

    def arrival(self, *what):
        found = super().arrival(*what)
        start_ns = NOW + self.seq * SPAN
        w = replace(found.window, labelled=0, correct=0, start_ns=start_ns, end_ns=start_ns + SPAN)
        return Arrival(window=w, payload=encode(w), judged=found.judged)

    def know(self, names, right, *, seq, start_ns, labelled=200):
        told = [
            labels(
                name,
                seq,
                model=self.digest,
                labelled=labelled,
                correct=round(labelled * right) + i % 5,
                start_ns=start_ns,
                seconds=1.0,
            )
            for i, name in enumerate(names)
        ]
        return self.windows.append([], [], [], self.now, labels=told)

    def know_the_past(self):
        """What was right in the windows of the first looks, each of which has two."""
        for seq in range(1, 2 * LOOKS + 1):
            self.know(NAMES, 0.8, seq=seq, start_ns=NOW + seq * SPAN)

    def now_ns(self):
        return NOW + (self.seq + 1) * SPAN

    def known_past(self):
        return [
            sum(r.labelled for r in one.readings if r.device == NAMES[0])
            for one in self.ledger.first_looks(self.digest)
        ]


@pytest.fixture
def fleet(tmp_path):
    made = Late(tmp_path, drift=DRIFT)
    made.join(*NAMES)
    yield made
    made.close()


def test_a_past_that_became_known_late_and_a_drop_that_did_are_an_incident(fleet):
    fleet.settle(*NAMES)
    fleet.know_the_past()
    fleet.look(*NAMES)
    assert not fleet.incidents()
    assert fleet.known_past() == [400] * LOOKS
    fleet.know(NAMES, 0.5, seq=100, start_ns=fleet.now_ns())
    found = fleet.look(*NAMES)
    assert found["fleet", "performance"].outcome == "drifted"
    assert found["fleet", "performance"].judged == len(NAMES)


def test_labels_are_used_by_one_look_also_when_another_process_goes_on(fleet):
    fleet.settle(*NAMES)
    fleet.know_the_past()
    fleet.look(*NAMES)
    fleet.again()
    fleet.look(*NAMES)
    assert fleet.known_past() == [400] * LOOKS
    fleet.know(NAMES, 0.5, seq=100, start_ns=fleet.now_ns())
    assert fleet.look(*NAMES)["fleet", "performance"].outcome == "drifted"
    assert len(fleet.ledger.label_cursors()) == len(NAMES)
    fleet.again()
    later = fleet.look(*NAMES)["fleet", "performance"]
    assert (later.outcome, later.judged) == ("drifted", 0)  # the incident stands; nothing was judged anew


def test_labels_of_devices_that_sent_no_window_count_in_the_look(fleet):
    fleet.settle(*NAMES)
    fleet.know_the_past()
    fleet.look(*NAMES)
    silent, here = NAMES[:8], NAMES[8:]
    for name in silent:
        fleet.join(name, online=False)
    fleet.know(silent, 0.4, seq=100, start_ns=fleet.now_ns())
    fleet.know(here, 0.4, seq=100, start_ns=fleet.now_ns())
    found = fleet.look(*here)
    assert found["fleet", "performance"].outcome == "drifted"
    assert found["fleet", "performance"].judged == len(NAMES)


def test_labels_of_a_device_without_a_past_wait_until_it_is_seen(fleet):
    fleet.settle(*NAMES)
    fleet.know(("stranger",), 0.5, seq=1, start_ns=NOW)
    fleet.look(*NAMES)
    assert not fleet.ledger.label_cursors()
    fleet.join("stranger")
    fleet.look(*NAMES, "stranger")
    assert {device for _, device in fleet.ledger.label_cursors()} == {"stranger"}
