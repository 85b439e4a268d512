"""Labels over a real broker: told twice, the aggregator killed between, and taken in by several processes."""

import secrets
import signal
import time
from typing import Any

import pytest

from aggregator.adapters.windows import Windows
from aggregator.records import Selection
from cli.broker_config import LABELLER, acl
from edge_runtime.contract import ids
from edge_runtime.contract.codec import decode
from edge_runtime.contract.messages import Ack
from edge_runtime.contract.topics import LABELS
from edge_runtime.core.backoff import Every
from edge_runtime.link import Link, Outgoing, Received
from edge_runtime.mqtt.broker import Broker
from tests.integration.test_aggregator_service import Site, end
from tests.integration.test_aggregator_shared import SharedSite
from tests.support.fleet import FLEET, NOW, SECOND, TOPICS, A, labels, window, wire

SOURCE = ids.source_id("lab")
RESEND_SECONDS = 0.5


class Labeller:
    """A source of labels, as the how-to page has it: it tells what is not acknowledged again and again."""

    def __init__(self, port):
        self.acked = set()
        self.waiting = {}
        self._again = Every(RESEND_SECONDS)
        self.link = Link(
            Broker(host="127.0.0.1", port=port), client_id=f"lab-{secrets.token_hex(4)}", delay=lambda _: 0.1
        )
        self.link.subscribe(TOPICS.labels_ack(SOURCE))
        self.link.start()

    def tell(self, *told):
        for one in told:
            self.waiting[one.device, one.seq, one.correct] = one
            self.say(one)

    def say(self, one):
        self.link.publish(Outgoing(*wire(one), LABELS))

    def step(self):
        while (event := self.link.poll(0.0)) is not None:
            if isinstance(event, Received):
                ack = decode(event.payload)
                assert isinstance(ack, Ack)
                self.acked |= {(ack.device, seq) for seq in ack.seqs}
                self.waiting = {
                    key: one for key, one in self.waiting.items() if (one.device, one.seq) not in self.acked
                }
        if self._again.due(time.monotonic()) and self.link.connected:
            for one in self.waiting.values():
                self.say(one)

    def close(self):
        self.link.stop(2.0)


@pytest.fixture
def site(tmp_path, mosquitto):
    made = Site(tmp_path, mosquitto)
    yield made
    for device in made.devices:
        device.close()


def labeller(site):
    made = Labeller(site.broker.port)
    site.devices.append(made)
    site.wait(lambda: made.link.connected, "the labeller's connection")
    return made


def known(site):
    return site.windows(lambda it: [(t.device, t.labelled, t.correct, t.compared) for t in it.truths()])


@pytest.mark.slow
def test_labels_told_again_after_the_aggregator_was_killed_are_counted_once(site):
    told = [labels(f"dev-{d}", seq, correct=seq) for d in range(3) for seq in range(5)]
    wanted = {(one.device, one.seq) for one in told}
    process = site.start()
    try:
        device = site.device("dev-0")
        device.put([window("dev-0", 1)])
        lab = labeller(site)
        site.wait(lambda: device.acked, "the window")
        lab.tell(*told)
        site.wait(lambda: lab.acked == wanted, "the first acknowledgements")
    finally:
        end(process, signal.SIGKILL)
    lab.acked.clear()
    lab.tell(*told[:10])  # into the broker's session of a process that is dead
    process = site.start()
    try:
        lab.tell(*told)
        site.wait(lambda: lab.acked == wanted, "the second acknowledgements")
    finally:
        end(process, signal.SIGTERM)
    assert known(site) == [(f"dev-{d}", 50, 10, 0) for d in range(3)]
    assert site.windows(Windows.figures).duplicates_rejected >= 15


def test_what_no_source_may_tell_is_a_dead_letter_and_what_contradicts_is_acknowledged(site):
    process = site.start()
    try:
        lab = labeller(site)
        lab.tell(labels())
        site.wait(lambda: lab.acked, "an acknowledgement")
        lab.acked.clear()
        lab.link.publish(Outgoing(TOPICS.labels(SOURCE), wire(labels(source="other"))[1], LABELS))
        lab.link.publish(Outgoing(TOPICS.labels(SOURCE), b"no message", LABELS))
        lab.tell(labels(correct=1), labels(seq=2, model=site.digest), labels(seq=3, model=site.digest))
        site.wait(lambda: {seq for _, seq in lab.acked} == {1, 2, 3}, "acknowledgements")
    finally:
        end(process, signal.SIGTERM)
    assert sorted(n for _, n, _, _ in known(site)) == [10, 20]
    reasons = [letter["reason"] for letter in site.windows(Windows.dead_letters)]
    assert len(reasons) == 3
    for words in ("belongs on 'skiff/1/fleet/labels/other'", "not valid msgpack", "it told before: 8 of 10"):
        assert any(words in reason for reason in reasons), reasons


def test_the_pages_program_tells_until_everything_is_stored(site, repository):
    page = (repository / "docs" / "how-to" / "late-labels.md").read_text(encoding="utf-8")
    program: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], program)
    told = [labels(f"dev-{d}", seq) for d in range(20) for seq in range(5)]
    waiting = {(one.device, one.seq): one for one in told}
    process = site.start()
    try:
        program["tell"](Broker(host="127.0.0.1", port=site.broker.port), FLEET, SOURCE, waiting)
    finally:
        end(process, signal.SIGTERM)
    assert not waiting
    assert sorted(known(site)) == sorted((f"dev-{d}", 50, 40, 0) for d in range(20))


@pytest.mark.slow
def test_two_processes_that_share_the_labels_count_each_once(tmp_path, mosquitto, repository):
    site = SharedSite(tmp_path, mosquitto, repository)
    told = [
        labels(f"dev-{d}", seq, start_ns=NOW + seq * 10 * SECOND, correct=1)
        for d in range(8)
        for seq in range(6)
    ]
    wanted = {(one.device, one.seq) for one in told}
    try:
        site.start()
        site.wait(lambda: site.leader() == 0, "a leader")
        site.start()
        lab = labeller(site)
        lab.tell(*told, *told)
        site.wait(lambda: lab.acked, "the first acknowledgement")
        end(site.processes[1], signal.SIGKILL)

        site.wait(lambda: lab.acked == wanted, "every acknowledgement")
        end(site.processes[0], signal.SIGTERM)
    finally:
        for device in site.devices:
            device.close()
        for process in site.processes:
            if process.poll() is None:
                process.kill()
                process.wait(10.0)
    assert known(site) == [(f"dev-{d}", 60, 6, 0) for d in range(8)]
    assert site.windows(lambda it: it.totals(Selection(digest=A))) == ()


def test_only_the_labeller_may_tell_labels():
    rules = acl(FLEET).split("\n\n")
    mine = next(part for part in rules if f"user {LABELLER}" in part)
    assert "topic write skiff/1/fleet/labels/+\n" in mine
    assert "topic read skiff/1/fleet/labels/+/ack" in mine
    assert sum("write skiff/1/fleet/labels/+\n" in part + "\n" for part in rules) == 1
    assert "labels" not in rules[0]  # what holds for devices
