"""Which way is tried when, with ways in memory and real slots; then both real ways under the whole child."""

import errno
import time
from dataclasses import replace

import pytest

from edge_runtime.adapters.slots import Slots
from edge_runtime.carriers.https import HttpsCarrier, Web
from edge_runtime.contract import topics
from edge_runtime.contract.errors import ContractError, LinkError
from edge_runtime.contract.ids import digest_of
from edge_runtime.contract.trust import Target
from edge_runtime.fetching import Fetching
from edge_runtime.update_job import Job, Refusal
from edge_runtime.updater import Update
from tests.publisher import COHORT, DEVICE, FLEET, MODEL, artifact, put, release, signed
from tests.support.certificates import Authority
from tests.support.memory_broker import MemoryBroker
from tests.support.recorder import Fault, Recorder
from tests.support.web import WebServer
from trainer.publish import Repository

DATA = b"a model" * 100
TARGET = Target(digest=digest_of(DATA), path="models/toy/m.onnx", length=len(DATA))
SECONDS = 100.0


class Way:
    """A carrier that brings ``data``, up to an error after ``until_byte`` of it, if that is given."""

    def __init__(self, name, data=DATA, *, problem="", until_byte=None, error=LinkError):
        self.name, self.data, self.told, self.until_byte, self.error = name, data, problem, until_byte, error
        self.calls = []

    def metadata(self, root_version, until):
        self.calls.append((root_version, until))
        if self.until_byte is not None:
            raise self.error(f"{self.name} is out of order")
        return {"by": self.name.encode()}.get

    def problem(self, target):
        return self.told

    def blob(self, target, into, until):
        have = into.stat().st_size if into.exists() else 0
        self.calls.append((have, until))
        end = len(self.data) if self.until_byte is None else self.until_byte
        with into.open("ab") as stream:
            stream.write(self.data[have:end])
        if self.until_byte is not None:
            raise self.error(f"{self.name} is out of order")


class Trust:
    """A trust store that believes what some ways bring."""

    known_version = 7

    def __init__(self, *believed):
        self.believed = believed
        self.seen = []

    def refresh_from(self, file):
        self.seen.append(file("by").decode())
        if self.seen[-1] not in self.believed:
            raise ContractError("trust metadata is expired")


@pytest.fixture
def slots(tmp_path):
    return Slots(tmp_path / "state")


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)


def ways(*carriers):
    return Fetching(carriers, deadline=1000.0 + SECONDS)


def bring(slots, *carriers):
    ways(*carriers).bring(TARGET, slots)
    return slots.blob(TARGET.digest).read_bytes()


def starts(way):
    return [have for have, _ in way.calls]


def test_the_first_way_that_works_is_enough(slots, clock):
    first, second = Way("first"), Way("second")
    assert bring(slots, first, second) == DATA
    assert (first.calls, second.calls) == ([(0, 1000.0 + SECONDS / 2)], [])
    assert bring(slots, first) == DATA
    assert len(first.calls) == 1


def test_the_next_way_goes_on_with_all_the_time_there_is(slots, clock):
    first, second = Way("first", until_byte=300), Way("second")
    assert bring(slots, first, second) == DATA
    assert second.calls == [(300, 1000.0 + SECONDS)]


def test_what_one_way_spoiled_another_mends(slots, clock):
    spoiler, honest = Way("first", b"x" * len(DATA), until_byte=300), Way("second")
    assert bring(slots, spoiler, honest) == DATA
    assert starts(honest) == [300, 0]


def test_a_way_that_brings_another_model_is_left_for_the_next(slots, clock):
    liar, honest = Way("first", b"x" * len(DATA)), Way("second")
    assert bring(slots, liar, honest) == DATA
    assert (starts(liar), starts(honest)) == ([0], [0])


def test_when_no_way_works_each_says_why(slots, clock):
    with pytest.raises(Refusal) as e:
        bring(slots, Way("first", until_byte=3), Way("second", until_byte=5, error=ContractError))
    assert str(e.value) == (
        f"model {TARGET.digest}: first: first is out of order; second: second is out of order"
    )
    assert (e.value.retry, e.value.digest, e.value.stage) == (True, None, "fetch")
    with pytest.raises(Refusal, match=r"SHA-256 .* publish the model again") as e:
        bring(slots, Way("only", b"x" * len(DATA)))
    assert (e.value.retry, e.value.digest, e.value.stage) == (True, None, "verify")
    assert not slots.staging(TARGET.digest).exists()


def test_wrong_bytes_are_told_from_none_also_where_another_way_is_closed(slots, clock):
    with pytest.raises(Refusal) as e:
        bring(slots, Way("first", b"x" * len(DATA)), Way("second", until_byte=0))
    assert (e.value.retry, e.value.digest, e.value.stage) == (True, None, "verify")


def test_a_way_that_cannot_bring_it_is_not_asked(slots, clock):
    small, large = Way("small", problem="too large"), Way("large")
    assert bring(slots, small, large) == DATA
    assert (small.calls, large.calls) == ([], [(0, 1000.0 + SECONDS)])


def test_what_no_way_can_bring_is_refused_for_good(slots, clock):
    with pytest.raises(Refusal, match=r"^a: too large; b: empty$") as e:
        bring(slots, Way("a", problem="too large"), Way("b", problem="empty"))
    assert (e.value.retry, e.value.digest, e.value.stage) == (False, TARGET.digest, "fetch")


@pytest.fixture
def disk(slots, tmp_path):
    """Has the slots stand on a disk with bad sectors, which hold these files."""

    def make(fault=None, **files):
        for kind, data in files.items():
            getattr(slots, kind)(TARGET.digest).write_bytes(data)
        recorder = Recorder(tmp_path, fault=fault)
        for kind in files:
            recorder.spoil(str(getattr(slots, kind)(TARGET.digest).relative_to(tmp_path)))
        return recorder.standing()

    return make


@pytest.mark.parametrize("part", [None, DATA[:300], DATA], ids=["no part", "half", "whole"])
def test_a_model_on_a_bad_sector_is_fetched_anew(slots, clock, disk, part):
    way = Way("only")
    with disk(blob=DATA, **({} if part is None else {"staging": part})):
        assert bring(slots, way) == DATA
        calls = len(way.calls)
        assert bring(slots, way) == DATA
    assert len(way.calls) == calls, "what was brought can be read"


def test_a_new_download_that_cannot_be_read_is_fetched_anew_by_the_next_job(slots, clock, disk):
    way = Way("only")
    with disk(staging=b""):
        with pytest.raises(
            Refusal, match=r"cannot be read \(Input/output error\) and was deleted; fetch it again$"
        ) as e:
            bring(slots, way)
        assert (e.value.retry, e.value.digest) == (True, None)
        assert bring(slots, way) == DATA


def test_a_download_that_can_neither_be_read_nor_deleted_is_not_tried_for_ever(slots, clock, disk):
    way = Way("only")
    with disk(Fault(2, errno.EROFS, lasting=True), staging=DATA), pytest.raises(Refusal) as e:
        bring(slots, way)  # the first call opens it to go on
    assert "cannot be deleted either (Read-only file system): check the disk" in str(e.value)
    assert (e.value.retry, e.value.digest, len(way.calls)) == (True, None, 1)


@pytest.mark.parametrize(("code", "kept"), [(errno.EIO, False), (errno.ENOSPC, True)])
def test_what_the_disk_failed_to_write_is_not_gone_on_with(slots, clock, disk, code, kept):
    """After a failed flush the kernel may call the next one good, and the data are in memory only."""
    way = Way("only")
    with disk(Fault(4, code)), pytest.raises(OSError, match=r"."):  # create, write, open to flush, flush
        bring(slots, way)
    assert slots.staging(TARGET.digest).exists() is kept
    assert bring(slots, way) == DATA


def test_metadata_that_is_not_believed_is_asked_of_the_next(clock):
    silent, stale, good = Way("silent", until_byte=0), Way("stale"), Way("good")
    trust = Trust("good")
    ways(silent, stale, good).refresh(trust)
    assert trust.seen == ["stale", "good"]
    assert good.calls == [(7, 1000.0 + SECONDS)]
    with pytest.raises(LinkError, match="silent: silent is out of order; stale: trust metadata is expired"):
        ways(silent, stale).refresh(Trust())
    with pytest.raises(ContractError, match=r"^trust metadata is expired$"):
        ways(stale).refresh(Trust())


# ── the whole child ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def repository(tmp_path):
    repository = Repository.create(tmp_path / "repository")
    repository.enable_auto(MODEL)
    return repository


@pytest.fixture
def broker(monkeypatch):
    broker = MemoryBroker()
    broker.stand_before(monkeypatch)
    return broker


@pytest.fixture
def secured(tmp_path, repository):
    """The repository on a web server, and who signed that one's certificate."""
    authority = Authority(tmp_path / "authority")
    with WebServer(tmp_path / "repository", authority.issue("web")) as server:
        yield server, authority.path


@pytest.fixture
def server(secured):
    return secured[0]


@pytest.fixture
def update(tmp_path, repository, secured, monkeypatch, capsys):
    """Runs a job with both ways, without a probe; returns its result."""
    monkeypatch.setattr(Update, "_probe", lambda self, digest: None)
    server, ca = secured

    def run(message, **changes):
        job = {
            "state_dir": str(tmp_path / "state"),
            "fleet": FLEET,
            "cohort": COHORT,
            "model": MODEL,
            "device": DEVICE,
            "broker": {"host": "127.0.0.1", "port": 1883},
            "web": {"url": server.url, "ca": ca},
            "release": message.hex(),
            "root": str(repository.pinned_root),
            "floor": 0,
            "serving": "",
            "have": [],
            "quarantine": {},
            "budgets": {},
            "probe_address_space_bytes": 1,
            "deadline_seconds": 30.0,
        }
        return Update(Job.read({**job, **changes})).run()

    return run


def offered(repository, tmp_path, **options):
    data = artifact()
    digest = repository.add(put(tmp_path, data), **options).digest
    return data, digest, signed(repository, release(digest))


def installed(tmp_path, digest):
    return Slots(tmp_path / "state").blob(digest).read_bytes()


def test_without_a_broker_everything_comes_over_https(tmp_path, repository, broker, server, update):
    data, digest, message = offered(repository, tmp_path)
    for role in ("root", "timestamp", "targets"):
        repository.rotate(role)
    broker.reachable = False
    assert update(message)["ok"]
    assert installed(tmp_path, digest) == data
    assert f"/targets/auto/{MODEL}/{digest}.onnx" in [asked.path for asked in server.asked]
    server.asked.clear()
    repository.rotate("root")
    assert update(signed(repository, release(None, revision=2)))["ok"]
    asked = [asked.path for asked in server.asked]
    assert asked[:3] == [f"/metadata/{v}.json" for v in ("5.root", "6.root")] + ["/metadata/timestamp.json"]


def test_a_broker_is_enough_for_what_it_has(tmp_path, repository, broker, server, update):
    data, digest, message = offered(repository, tmp_path)
    broker.publish(repository, [digest])
    assert update(message)["ok"]
    assert installed(tmp_path, digest) == data
    assert not server.asked


def test_https_first_leaves_the_broker_alone(tmp_path, repository, broker, server, update):
    data, digest, message = offered(repository, tmp_path)
    broker.publish(repository, [digest])
    assert update(message, prefer=topics.HTTPS)["ok"]
    assert installed(tmp_path, digest) == data
    assert not broker.asked


def test_a_web_server_that_is_down_leaves_the_broker(tmp_path, repository, broker, server, update):
    data, digest, message = offered(repository, tmp_path)
    broker.publish(repository, [digest])
    server.behave = lambda visit: visit.say(404)
    assert update(message, prefer=topics.HTTPS)["ok"]
    assert installed(tmp_path, digest) == data


@pytest.mark.parametrize("why", ["too large", "chunks too large"])
def test_what_the_broker_cannot_carry_comes_over_https(
    tmp_path, repository, broker, server, update, monkeypatch, why
):
    changes = {}
    if why == "too large":
        monkeypatch.setattr(topics, "MAX_BLOB_BYTES", 1000)
    else:
        changes = {"max_chunk_bytes": topics.MIN_CHUNK_BYTES}
    data, digest, message = offered(repository, tmp_path)
    broker.publish(repository, [digest])
    assert update(message, **changes)["ok"]
    assert installed(tmp_path, digest) == data
    assert [asked.path for asked in server.asked] == [f"/targets/auto/{MODEL}/{digest}.onnx"]


def test_a_web_server_that_holds_the_old_metadata_back_is_passed_over(
    tmp_path, repository, broker, server, update
):
    """Freeze and rollback over one way, with the other one honest."""
    _, digest, message = offered(repository, tmp_path)
    broker.publish(repository, [digest])
    old = {path.name: path.read_bytes() for path in (tmp_path / "repository" / "metadata").iterdir()}
    assert update(message)["ok"]
    repository.refresh()
    broker.publish(repository, [digest])
    assert update(signed(repository, release(None, revision=2)))["ok"]

    def stale(visit):
        data = old.get(visit.path.rpartition("/")[2])
        visit.say(200, data) if data else visit.say(404)

    server.behave = stale
    message = signed(repository, release(None, revision=3))
    assert update(message, prefer=topics.HTTPS)["ok"]
    broker.reachable = False
    result = update(signed(repository, release(None, revision=4)), prefer=topics.HTTPS)
    assert (result["ok"], result["stage"], result["retry"]) == (False, "trust", True)
    assert "HTTPS: trust metadata is older than what this device has verified" in result["reason"]
    assert "MQTT: broker 127.0.0.1:1883 cannot be reached" in result["reason"]


def test_a_slow_web_server_leaves_the_broker_its_time(tmp_path, repository, broker, server, update):
    data, digest, message = offered(repository, tmp_path)
    broker.publish(repository, [digest])

    def slow(visit):
        visit.say(200, length=len(visit.data))
        visit.drip(visit.data, 0.05)

    server.behave = slow
    start = time.monotonic()
    assert update(message, prefer=topics.HTTPS, deadline_seconds=1.0)["ok"]
    assert time.monotonic() - start < 2.0
    assert installed(tmp_path, digest) == data


def test_an_empty_target_comes_no_way():
    empty = replace(TARGET, length=0)
    with HttpsCarrier(Web(url="https://localhost/")) as way:
        assert way.problem(empty) == "it is empty"
