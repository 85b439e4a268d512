"""Names, topics and the signed release's fields: what is accepted, and what the refusal says."""

import json

import pytest

from edge_runtime.contract import ids, release
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.topics import CHUNK_BYTES, Topics, chunk_count
from tests.golden.values import FIRST, RELEASE, SECOND

TOPICS = Topics(ids.fleet_id("demo"))
DEVICE = ids.device_id("dev-1")
MODEL = ids.model_name("watch")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (ids.fleet_id, "f", "F"),
        (ids.device_id, "watch-01", "watch/01"),
        (ids.cohort_id, "main", ""),
        (ids.model_name, "m" * 64, "m" * 65),
        (ids.rollout_id, "r-1", "r_1"),
        (ids.session_id, "0123456789abcdef", "0123456789ABCDEF"),
        (ids.layout_id, "0" * 16, "0" * 15),
        (ids.digest, "0" * 64, "0" * 63 + "g"),
    ],
)
def test_names(check, good, bad):
    assert check(good) == good
    for wrong in (bad, good + "\n", good + "\0", None, 3, good.encode()):
        with pytest.raises(ContractError, match=r"is not a .*it must match"):
            check(wrong)


def test_the_digest_of_bytes():
    assert ids.digest_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_topics():
    assert TOPICS.status(DEVICE) == "skiff/1/demo/d/dev-1/status"
    assert TOPICS.window(DEVICE, MODEL) == "skiff/1/demo/d/dev-1/watch/window"
    assert TOPICS.event(DEVICE) == "skiff/1/demo/d/dev-1/event"
    assert TOPICS.ack(DEVICE) == "skiff/1/demo/d/dev-1/ack"
    assert TOPICS.command(DEVICE) == "skiff/1/demo/d/dev-1/cmd"
    assert TOPICS.release(ids.cohort_id("main"), MODEL) == "skiff/1/demo/release/main/watch"
    assert TOPICS.trust(3) == "skiff/1/demo/tuf/3"
    assert TOPICS.packed_trust(3) == "skiff/1/demo/tuf/3z"
    assert TOPICS.chunk(FIRST, 2) == f"skiff/1/demo/blob/{FIRST}/2"
    assert TOPICS.every("window") == "skiff/1/demo/d/+/+/window"
    assert TOPICS.every("status") == "skiff/1/demo/d/+/status"
    with pytest.raises(ContractError, match="no such family"):
        TOPICS.every("ack")


@pytest.mark.parametrize(
    "topic",
    [
        "skiff/1/demo/d/dev-1/ack",
        "skiff/1/demo/d/dev-1/watch/status",
        "skiff/1/demo/d/dev-1/window",
        "skiff/1/demo/d/dev-1/Watch/window",
        "skiff/1/demo/d/dev-1/a/b/window",
        "skiff/1/demo/d/+/status",
        "skiff/1/demo/d//status",
        "skiff/1/other/d/dev-1/status",
        "dev-1/status",
        "skiff/2/demo/d/dev-1/status",
        "",
    ],
)
def test_a_topic_no_device_writes_has_no_sender(topic):
    with pytest.raises(ContractError):
        TOPICS.sender(topic)


@pytest.mark.parametrize(
    ("length", "chunks"), [(0, 0), (1, 1), (CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2), (10 * CHUNK_BYTES, 10)]
)
def test_chunks(length, chunks):
    assert chunk_count(length) == chunks


def payload(**changes):
    return json.dumps({**json.loads(release.to_payload(RELEASE)), **changes}).encode()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "release: not JSON"),
        (b"\xff", "release: not JSON"),
        (b"[" * 100_000, "release: not JSON"),
        (b"[]", "expected a table"),
        (payload(schema=2), "schema 2 is not 1: update the older side"),
        (payload(threshold=5), r"release\.threshold: expected text"),
        (payload(threshold="-1"), r"release\.threshold: '-1'"),
        (payload(threshold=str(2**64 + 1)), "at most 2\\^64"),
        (payload(revision=0), r"release\.revision: 0 is outside"),
        (payload(candidate="xyz"), "'xyz' is not a SHA-256 digest"),
        (payload(fleet="A"), "'A' is not a fleet name"),
        (payload(attempt=0), r"release\.attempt"),
        (payload(trial={"starts": 0}), r"release\.trial\.starts"),
        (payload(trial={"seconds": 10**400}), r"release\.trial\.seconds"),
        (payload(trial={"seconds": "soon"}), r"release\.trial\.seconds: expected a number"),
    ],
)
def test_a_release_that_breaks_the_contract_is_refused(data, problem):
    with pytest.raises(ContractError, match=problem):
        release.from_payload(data)


def test_a_release_from_a_newer_minor_is_read():
    assert release.from_payload(payload(later="unknown")) == RELEASE


def test_who_runs_what():
    everyone = release.from_payload(payload(threshold=str(release.EVERYONE)))
    nobody = release.from_payload(payload(threshold="0"))
    assert release.desired(everyone, DEVICE) == SECOND
    assert release.desired(nobody, DEVICE) == FIRST
    assert release.desired(release.from_payload(payload(threshold="0", incumbent="")), DEVICE) is None
    assert (
        release.desired(release.from_payload(payload(threshold=str(release.EVERYONE), candidate="")), DEVICE)
        == FIRST
    )
