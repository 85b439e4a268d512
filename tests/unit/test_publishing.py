"""`cli.publishing` before a broker in memory: slow ones are waited for, silent ones not; two publishers take turns."""

import threading
from types import SimpleNamespace

import pytest

from cli import publishing
from cli.publishing import publish
from edge_runtime.contract import bundle
from edge_runtime.contract.errors import BudgetExceeded, LinkError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.topics import Topics
from edge_runtime.link import Connected, Delivered, Disconnected
from edge_runtime.mqtt.broker import Broker
from edge_runtime.truststore import TrustStore
from tests.publisher import FLEET, artifact, put
from trainer.publish import Repository

BROKER = Broker(host="broker.example", port=1883)
TOPICS = Topics(FLEET)
REVOKED = Digest("a" * 64)


class SlowBroker:
    """Confirms one message after the other, each after ``seconds`` of its own clock; ``retained`` is what it has.

    ``breaks`` has the numbers of confirmations before which the connection is lost.
    """

    def __init__(self, monkeypatch, *, seconds=0.0, breaks=()):
        self.now = 0.0
        self.seconds = seconds
        self.breaks = set(breaks)
        self.retained = {}
        self.confirmed = 0
        self.published = []
        self.refuses = lambda topic: ""
        self.largest = 1 << 30
        self.before_publish = lambda link, topic: None
        monkeypatch.setattr(publishing, "Link", lambda broker, **_: SlowLink(self))
        monkeypatch.setattr(publishing, "time", SimpleNamespace(monotonic=lambda: self.now))


class SlowLink:
    def __init__(self, broker):
        self.broker = broker
        self.connected = False
        self.events = []
        self.flying = []
        self.tokens = 0
        self.stopped = False

    def start(self):
        self.connected = True
        self.events.append(Connected(False))

    def stop(self, timeout):
        self.stopped = True

    def publish(self, message):
        assert self.connected
        if len(message.payload) > self.broker.largest:
            raise BudgetExceeded(f"the broker takes {self.broker.largest} bytes")
        self.broker.before_publish(self, message.topic)
        if not self.connected:
            raise LinkError("not connected")
        self.tokens += 1
        self.flying.append((self.tokens, message))
        self.broker.published.append(message.topic)
        return self.tokens

    def poll(self, timeout_seconds):
        if self.events:
            event = self.events.pop(0)
            self.connected = isinstance(event, Connected) or self.connected
            return event
        if not self.flying or self.broker.seconds == float("inf"):
            self.broker.now += timeout_seconds
            return None
        self.broker.now += self.broker.seconds
        if self.broker.confirmed in self.broker.breaks:
            self.broker.breaks.discard(self.broker.confirmed)
            self.flying.clear()
            self.connected = False
            self.events.append(Connected(False))
            return Disconnected("the broker went away")
        token, message = self.flying.pop(0)
        self.broker.confirmed += 1
        if refusal := self.broker.refuses(message.topic):
            return Delivered(token, refusal)
        self.broker.retained[message.topic] = message.payload
        return Delivered(token)


@pytest.fixture
def repository(tmp_path):
    return Repository.create(tmp_path / "repository")


def send(repository, *digests, **more):
    return publish(repository, digests, fleet=FLEET, broker=BROKER, **more)


def seen(tmp_path, repository, retained, *, device="device"):
    """A device that reads what is retained."""
    with TrustStore(tmp_path / device, repository.pinned_root.read_bytes()) as store:
        store.refresh(bundle.unpack(retained[TOPICS.packed_trust(1)]))
        return store.is_revoked(REVOKED)


def test_a_slow_broker_is_waited_for_as_long_as_it_confirms_anything(repository, tmp_path, monkeypatch):
    broker = SlowBroker(monkeypatch, seconds=20.0)
    data = artifact(trees=60)
    model = repository.add(put(tmp_path, data), role="targets", chunk_bytes=4096)
    told = []
    size = send(repository, model.digest, progress=lambda *words: told.append(words))
    assert broker.now > 10 * 60
    chunks = [broker.retained[TOPICS.chunk(model.digest, i)] for i in range(model.chunks)]
    assert digest_of(b"".join(chunks)) == model.digest
    assert size == sum(map(len, broker.retained.values()))
    assert told[-1] == ("sent", 2, 2)


def test_a_broker_that_confirms_nothing_more_is_given_up(repository, tmp_path, monkeypatch):
    broker = SlowBroker(monkeypatch, seconds=float("inf"))
    with pytest.raises(LinkError, match=r"confirmed 0 of 2 messages and then none for 60 s .*--chunk-kib"):
        send(repository)
    assert 60.0 < broker.now < 62.0


def test_a_broker_that_is_not_there_is_not_answered_with_smaller_chunks(repository, monkeypatch):
    broker = SlowBroker(monkeypatch, seconds=float("inf"))
    monkeypatch.setattr(
        SlowLink, "start", lambda link: link.events.append(Disconnected("Connection refused"))
    )
    with pytest.raises(LinkError, match=r"could not be reached for 60 s \(Connection refused\)") as told:
        send(repository)
    assert "chunk" not in str(told.value)
    assert broker.published == []


def test_what_a_connection_took_with_it_is_sent_again_and_nothing_else(repository, tmp_path, monkeypatch):
    broker = SlowBroker(monkeypatch, breaks=(3, 9))
    model = repository.add(put(tmp_path, artifact(trees=60)), role="targets", chunk_bytes=4096)
    send(repository, model.digest)
    again = len(broker.published) - len(set(broker.published))
    assert 0 < again <= 2 * publishing.IN_FLIGHT
    assert set(broker.published) == set(broker.retained)
    assert list(broker.retained)[-2:] == [TOPICS.packed_trust(1), TOPICS.trust(1)], "the metadata comes last"


def test_a_connection_that_is_lost_while_it_is_written_to_is_not_the_end(repository, monkeypatch):
    broker = SlowBroker(monkeypatch)

    def lose(link, topic):
        broker.before_publish = lambda link, topic: None
        link.connected = False
        link.events += [Disconnected("gone"), Connected(False)]

    broker.before_publish = lose
    assert send(repository) > 0
    assert TOPICS.trust(1) in broker.retained


@pytest.mark.parametrize(
    ("largest", "refused", "problem"),
    [
        (3000, "", "the broker takes 3000 bytes, or publish the model in smaller chunks: --chunk-kib"),
        (1 << 30, "no", "no"),
    ],
)
def test_what_the_broker_refuses_is_said(repository, tmp_path, monkeypatch, largest, refused, problem):
    broker = SlowBroker(monkeypatch)
    broker.largest, broker.refuses = largest, lambda topic: refused
    model = repository.add(put(tmp_path, artifact(trees=60)), role="targets")
    with pytest.raises(LinkError, match=problem):
        send(repository, model.digest)


# ── two publishers ─────────────────────────────────────────────────────────────────────────────────────


def paused(broker, wanted):
    """Holds up the first publisher, and only it, before it sends a topic that is ``wanted``."""
    here, go = threading.Event(), threading.Event()
    mine: list[SlowLink] = []

    def hold(link, topic):
        if wanted(topic) and not mine:
            mine.append(link)
            here.set()
            assert go.wait(20)

    broker.before_publish = hold
    return here, go


@pytest.mark.parametrize("what", ["metadata", "chunks"])
def test_a_publisher_that_is_slow_never_takes_a_revocation_back(repository, tmp_path, monkeypatch, what):
    broker = SlowBroker(monkeypatch)
    model = repository.add(put(tmp_path, artifact(trees=60)), role="targets", chunk_bytes=4096)
    here, go = paused(broker, lambda topic: ("/tuf/" in topic) == (what == "metadata"))
    slow = threading.Thread(target=send, args=(repository, model.digest))
    slow.start()
    assert here.wait(20)
    other = Repository(tmp_path / "repository")
    other.revoke(REVOKED)  # signing waits for nobody
    quick = threading.Thread(target=send, args=(other,))
    quick.start()
    quick.join(0.5 if what == "metadata" else 20)
    if what == "chunks":
        assert not quick.is_alive(), "a revocation does not wait for a large model"
        assert seen(tmp_path, repository, broker.retained)
    go.set()
    slow.join(20)
    quick.join(20)
    assert not slow.is_alive()
    assert not quick.is_alive()
    assert seen(tmp_path, repository, broker.retained)
    assert bundle.unpack(broker.retained[TOPICS.packed_trust(1)]) == repository.bundle(1)
    assert TOPICS.chunk(model.digest, model.chunks - 1) in broker.retained


def test_a_size_that_was_signed_while_chunks_were_sent_is_what_the_broker_ends_with(
    repository, tmp_path, monkeypatch
):
    broker = SlowBroker(monkeypatch)
    path = put(tmp_path, artifact(trees=60))
    model = repository.add(path, role="targets", chunk_bytes=8192)
    here, go = paused(broker, lambda topic: topic == TOPICS.chunk(model.digest, 3))
    slow = threading.Thread(target=send, args=(repository, model.digest))
    slow.start()
    assert here.wait(20)
    other = Repository(tmp_path / "repository")
    after = other.add(path, role="targets", chunk_bytes=4096)
    send(other, after.digest)
    go.set()
    slow.join(20)
    chunks = [broker.retained[TOPICS.chunk(model.digest, i)] for i in range(after.chunks)]
    assert digest_of(b"".join(chunks)) == model.digest
    assert {len(chunk) for chunk in chunks[:-1]} == {4096}
