"""The update child's decisions, with a broker in memory and the real trust store, slots and probe."""

import errno
import fcntl
import io
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import probe as prober
from edge_runtime import updater
from edge_runtime.adapters import sandbox
from edge_runtime.adapters.slots import Slots
from edge_runtime.carriers import mqtt as carrier
from edge_runtime.contract import codec, topics, trust
from edge_runtime.contract.errors import ArtifactError, ContractError, LinkError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.manifest import Budgets
from edge_runtime.contract.messages import Command
from edge_runtime.contract.release import from_payload
from edge_runtime.contract.topics import CHUNK_BYTES, Topics, chunk_count
from edge_runtime.engine import Engine
from edge_runtime.truststore import TrustStore
from edge_runtime.update_job import Job
from edge_runtime.updater import Update
from tests.publisher import (
    COHORT,
    DEVICE,
    FLEET,
    MODEL,
    artifact,
    put,
    release,
    signed,
    with_golden_changed,
)
from tests.support.memory_broker import MemoryBroker
from trainer import publish
from trainer.publish import Repository

BIG = {"trees": 60}
UNKNOWN = Digest("d" * 64)


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
def no_probe(monkeypatch):
    """Takes the trial itself out of tests that are about the way to it."""
    answer = {
        "ok": True,
        "model": MODEL,
        "rss_bytes": 60_000_000,
        "peak_rss_bytes": 70_000_000,
        "predict_p50_ns": 8_000,
        "predict_p99_ns": 20_000,
        "runs": 2000,
        "golden_rows": 64,
        "budgets": {"predict_p99_ns": 0, "rss_bytes": 0},
    }
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: sandbox.Ended(0, json.dumps(answer).encode(), ""))
    return answer


@pytest.fixture
def document(tmp_path, repository):
    return {
        "state_dir": str(tmp_path / "state"),
        "fleet": FLEET,
        "cohort": COHORT,
        "model": MODEL,
        "device": DEVICE,
        "broker": {"host": "127.0.0.1", "port": 1883},
        "release": "",
        "root": str(repository.pinned_root),
        "floor": 0,
        "serving": "",
        "have": [],
        "quarantine": {},
        "budgets": {"predict_p99_ns": 0, "rss_bytes": 0},
        "probe_address_space_bytes": 2_000_000_000,
        "deadline_seconds": 30.0,
    }


@pytest.fixture
def update(document, capsys):
    """Runs one job; returns its result and the phases it went through."""

    def run(message, **changes):
        result = Update(Job.read({**document, "release": message.hex(), **changes})).run()
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return result, [line["progress"] for line in lines]

    return run


def slots(document):
    return Slots(Path(document["state_dir"]))


def add(repository, broker, tmp_path, data, *, role="auto"):
    digest = repository.add(put(tmp_path, data), role=role).digest
    broker.publish(repository, [digest])
    return digest


# ── the way through ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("role", ["auto", "targets"])
def test_a_model_is_fetched_verified_and_probed(repository, broker, tmp_path, update, document, role):
    data = artifact(**BIG)
    digest = add(repository, broker, tmp_path, data, role=role)
    wanted = release(digest)
    result, phases = update(signed(repository, wanted))
    assert phases == ["fetching", "verified", "probed"]
    assert result["ok"], result
    assert (result["action"], result["desired"]) == ("install", digest)
    assert from_payload(bytes.fromhex(result["release"])) == wanted
    assert slots(document).blob(digest).read_bytes() == data
    probe = result["probe"]
    assert probe["golden_rows"] > 0
    assert (probe["incumbent_p99_ns"], probe["incumbent"]) == (0, "none serves")
    assert probe["runs"] >= updater.PROBE_RUNS >= 2000
    assert 20e6 < probe["rss_bytes"] <= probe["peak_rss_bytes"] < 200e6
    assert 0 < probe["predict_p50_ns"] <= probe["predict_p99_ns"] < 50e6


def test_a_release_that_asks_for_nothing_new_fetches_nothing(repository, broker, tmp_path, update):
    digest = add(repository, broker, tmp_path, artifact())
    for message, serving in ((release(digest), digest), (release(None, revision=2), "")):
        broker.asked.clear()
        result, phases = update(signed(repository, message), serving=serving)
        assert (result["ok"], result["action"], result["probe"]) == (True, "keep", None)
        assert phases == []
        assert broker.asked == [Topics(FLEET).packed_trust(1), Topics(FLEET).trust(1)]


def test_a_release_that_was_followed_and_asks_for_nothing_is_answered_without_a_network(
    repository, broker, tmp_path, update, no_probe
):
    digest = add(repository, broker, tmp_path, artifact())
    message = signed(repository, release(digest))
    assert update(message)[0]["action"] == "install"
    broker.reachable = False
    broker.asked.clear()
    result, phases = update(message, serving=digest)
    assert (result["ok"], result["action"], result["desired"], phases) == (True, "keep", digest, [])
    assert from_payload(bytes.fromhex(result["release"])) == release(digest)
    assert update(message, quarantine={digest: 1})[0]["action"] == "skip_quarantined"
    assert not broker.asked
    # Whatever it would change needs to know whether the publisher still stands by it.
    for changes in ({}, {"have": [digest]}):
        refused(update(message, **changes)[0], "trust", "cannot be reached", retry=True)
    other = signed(repository, release(digest, attempt=2))
    refused(update(other, serving=digest)[0], "trust", "cannot be reached", retry=True)


def test_later_updates_ask_for_later_roots_only(repository, broker, update):
    broker.publish(repository)
    assert update(signed(repository, release(None)))[0]["ok"]
    for revision, known in ((2, 1), (3, 3)):
        repository.rotate("root")
        if known == 1:
            repository.rotate("timestamp")
        broker.publish(repository)
        broker.asked.clear()
        assert update(signed(repository, release(None, revision=revision)))[0]["ok"]
        assert broker.asked == [Topics(FLEET).packed_trust(known), Topics(FLEET).trust(known)]


def test_going_back_to_a_model_that_is_here_needs_no_fetch(repository, broker, update):
    broker.publish(repository)
    result, phases = update(signed(repository, release(UNKNOWN)), serving="e" * 64, have=[UNKNOWN])
    assert (result["ok"], result["action"], result["desired"], phases) == (True, "switch", UNKNOWN, [])


def test_a_quarantined_model_is_skipped_until_the_attempt_rises(
    repository, broker, tmp_path, update, no_probe
):
    digest = add(repository, broker, tmp_path, artifact())
    result, phases = update(signed(repository, release(digest)), quarantine={digest: 1})
    assert (result["ok"], result["action"], phases) == (True, "skip_quarantined", [])
    again = release(digest, revision=2, attempt=2)
    result, phases = update(signed(repository, again), quarantine={digest: 1})
    assert (result["ok"], result["action"], phases[-1]) == (True, "install", "probed")


def test_a_model_that_is_installed_already_is_not_fetched_again(
    repository, broker, tmp_path, update, document, no_probe
):
    digest = add(repository, broker, tmp_path, artifact())
    message = signed(repository, release(digest))
    assert update(message)[0]["ok"]
    broker.asked.clear()
    assert update(message)[0]["ok"]
    assert not [topic for topic in broker.asked if "/blob/" in topic]
    slots(document).blob(digest).write_bytes(b"worn out")
    assert update(message)[0]["ok"]
    assert digest_of(slots(document).blob(digest).read_bytes()) == digest


# ── trust and release ──────────────────────────────────────────────────────────────────────────────────


def refused(result, stage, reason, *, retry, digest=""):
    found = (result["ok"], result["stage"], result["retry"], result["digest"])
    assert found == (False, stage, retry, digest), result
    assert reason in result["reason"]


def test_an_unreachable_broker_is_tried_again(repository, broker, update):
    broker.reachable = False
    result, _ = update(signed(repository, release(None)))
    refused(result, "trust", "broker 127.0.0.1:1883 cannot be reached (refused: test)", retry=True)


def test_a_broker_without_trust_metadata_is_tried_again(repository, broker, update):
    result, _ = update(signed(repository, release(None)))
    refused(
        result, "trust", "nothing is retained on skiff/1/fleet-1/tuf/1: publish the repository", retry=True
    )


@pytest.mark.parametrize(
    "payload", [b"garbage", codec.encode(Command(device=DEVICE, name="rebirth", correlation=""))]
)
def test_what_is_no_bundle_is_refused(repository, broker, update, payload):
    broker.retained[Topics(FLEET).trust(1)] = payload
    result, _ = update(signed(repository, release(None)))
    refused(result, "trust", "", retry=True)


def test_a_missing_or_wrong_pinned_root_says_what_to_provision(repository, broker, tmp_path, update):
    broker.publish(repository)
    result, _ = update(signed(repository, release(None)), root=str(tmp_path / "absent.json"))
    refused(result, "trust", "provision 1.root.json there", retry=True)
    other = Repository.create(tmp_path / "other")
    result, _ = update(signed(repository, release(None)), root=str(other.pinned_root))
    refused(result, "trust", "descends from the pinned root", retry=True)


def nothing_fetched(broker):
    return not [topic for topic in broker.asked if "/blob/" in topic]


def test_metadata_that_does_not_come_is_told_from_a_model_that_is_not_published(
    repository, broker, update, monkeypatch
):
    broker.publish(repository)
    message = signed(repository, release(UNKNOWN))
    result, _ = update(message)
    refused(result, "release", "is no target of family 'toy' in the trust metadata", retry=True)
    assert from_payload(bytes.fromhex(result["release"])) == release(UNKNOWN)

    def fail(*_):
        raise LinkError("auto-toy.json: nothing came")

    monkeypatch.setattr(TrustStore, "find", fail)
    refused(update(message)[0], "trust", "nothing came", retry=True)


def test_a_model_too_large_for_mqtt_is_refused_before_anything_is_fetched(
    repository, broker, tmp_path, update, monkeypatch
):
    data = artifact(**BIG)
    monkeypatch.setattr(topics, "MAX_BLOB_BYTES", len(data) - 1)
    digest = add(repository, broker, tmp_path, data)
    result, _ = update(signed(repository, release(digest)))
    refused(result, "fetch", f"a blob of {len(data)} bytes cannot be fetched", retry=False, digest=digest)
    assert "name the repository's https address under [update] url" in result["reason"]
    assert nothing_fetched(broker)
    assert not [topic for topic in broker.retained if "/blob/" in topic]


def test_chunks_larger_than_the_device_takes_are_refused_before_they_are_fetched(
    repository, broker, tmp_path, update
):
    digest = repository.add(put(tmp_path, artifact(**BIG)), chunk_bytes=100_000).digest
    broker.publish(repository, [digest])
    result, _ = update(signed(repository, release(digest)), max_chunk_bytes=99_999)
    refused(
        result, "fetch", "its chunks of 100000 bytes are larger than the 99999", retry=False, digest=digest
    )
    assert nothing_fetched(broker)


def test_a_model_that_declares_more_than_the_device_allows_is_not_fetched(
    repository, broker, tmp_path, update
):
    declared = Budgets(predict_p99_ns=500_000, rss_bytes=150_000_000)
    digest = add(repository, broker, tmp_path, artifact(budgets=declared))
    message = signed(repository, release(digest))
    for budgets, reason in (
        ({"rss_bytes": 149_000_000}, "RSS of 150.0 MB is above the budget of 149.0 MB"),
        ({"predict_p99_ns": 499_000}, "p99 of 500.0 us CPU is above the budget of 499.0 us"),
    ):
        result, phases = update(message, budgets=budgets)
        refused(result, "release", reason, retry=False, digest=digest)
        assert "was not fetched" in result["reason"]
        assert phases == []
    assert nothing_fetched(broker)
    assert update(message, budgets={"rss_bytes": 150_000_000})[0]["ok"]


# ── fetch and verify ───────────────────────────────────────────────────────────────────────────────────


def test_a_missing_chunk_is_tried_again_and_the_transfer_resumes(
    repository, broker, tmp_path, update, document, no_probe
):
    data = artifact(**BIG)
    digest = add(repository, broker, tmp_path, data)
    message = signed(repository, release(digest))
    missing = Topics(FLEET).chunk(digest, 1)
    kept = broker.retained.pop(missing)
    result, phases = update(message)
    refused(result, "fetch", f"chunk 1 of {chunk_count(len(data))} did not arrive in 3 tries", retry=True)
    assert phases == ["fetching"]
    assert slots(document).staging(digest).stat().st_size == CHUNK_BYTES
    broker.retained[missing] = kept
    broker.asked.clear()
    result, _ = update(message)
    assert result["ok"], result
    assert Topics(FLEET).chunk(digest, 0) not in broker.asked
    assert slots(document).blob(digest).read_bytes() == data


@pytest.mark.parametrize("left", [1, CHUNK_BYTES - 1, CHUNK_BYTES + 5, 10 * CHUNK_BYTES])
def test_a_torn_staging_file_is_cut_back_to_whole_chunks(
    repository, broker, tmp_path, update, document, no_probe, left
):
    data = artifact(**BIG)
    digest = add(repository, broker, tmp_path, data)
    padded = data + b"x" * (10 * CHUNK_BYTES)
    slots(document).staging(digest).write_bytes(
        padded[: left // CHUNK_BYTES * CHUNK_BYTES] + b"x" * (left % CHUNK_BYTES)
    )
    result, _ = update(signed(repository, release(digest)))
    assert result["ok"], result


@pytest.mark.parametrize("chunk_bytes", [topics.MIN_CHUNK_BYTES, 100_000, topics.MAX_CHUNK_BYTES])
def test_chunks_have_the_size_that_was_signed(
    repository, broker, tmp_path, update, document, no_probe, monkeypatch, chunk_bytes
):
    data = artifact(**BIG)
    digest = repository.add(put(tmp_path, data), chunk_bytes=chunk_bytes).digest
    broker.publish(repository, [digest])
    slots(document).staging(digest).write_bytes(data[: chunk_bytes + 7])
    broker.asked.clear()
    # Nothing stays away here, and on a busy machine a chunk that is late would be asked for again.
    monkeypatch.setattr(carrier, "CHUNK_SECONDS", 30.0)
    assert update(signed(repository, release(digest)))[0]["ok"]
    assert slots(document).blob(digest).read_bytes() == data
    chunks = [topic for topic in broker.asked if "/blob/" in topic]
    whole = 1 if len(data) > chunk_bytes + 7 else 0
    assert chunks == [
        Topics(FLEET).chunk(digest, i) for i in range(whole, chunk_count(len(data), chunk_bytes))
    ]


def test_a_manifest_that_was_not_signed_is_noticed(
    repository, broker, tmp_path, update, no_probe, monkeypatch
):
    monkeypatch.setattr(publish, "manifest_digest", lambda data: UNKNOWN)
    digest = add(repository, broker, tmp_path, artifact())
    result, phases = update(signed(repository, release(digest)))
    refused(result, "verify", f"and {UNKNOWN} was signed", retry=False, digest=digest)
    assert phases == ["fetching"]


def test_metadata_from_before_manifests_were_signed_is_good(
    repository, broker, tmp_path, update, no_probe, monkeypatch
):
    monkeypatch.setattr(trust, "describe", lambda *_: {})
    digest = add(repository, broker, tmp_path, artifact(**BIG))
    assert update(signed(repository, release(digest)))[0]["ok"]


# ── probe ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.attack("A94")
def test_a_model_that_breaks_its_golden_rows_is_condemned(repository, broker, tmp_path, update):
    digest = add(repository, broker, tmp_path, with_golden_changed(artifact()))
    result, phases = update(signed(repository, release(digest)))
    refused(result, "probe", "golden rows are answered differently", retry=False, digest=digest)
    assert "row 0, off by" in result["reason"]
    assert phases == ["fetching", "verified"]


def test_the_devices_budget_condemns_with_figures(repository, broker, tmp_path, update):
    digest = add(repository, broker, tmp_path, artifact(**BIG))
    budgets = {"predict_p99_ns": 1_000, "rss_bytes": 10_000_000}
    result, _ = update(signed(repository, release(digest)), budgets=budgets)
    refused(result, "probe", "above the budget of 1.0 us; RSS of ", retry=False, digest=digest)
    assert "above the budget of 10.0 MB (median " in result["reason"]
    assert "train a smaller model" in result["reason"]


def test_a_peak_above_what_loading_may_take_condemns(repository, broker, tmp_path, update, no_probe):
    digest = add(repository, broker, tmp_path, artifact())
    message = signed(repository, release(digest))
    result, _ = update(message, load_peak_bytes=69_999_999)
    refused(result, "probe", "RSS of 70.0 MB while it loads is above the 70.0 MB", retry=False, digest=digest)
    assert update(message, load_peak_bytes=70_000_000)[0]["ok"]


@pytest.mark.parametrize(
    ("incumbent_p99_ns", "ok"),
    [(0, False), (8_000, False), (10_000, True), (50_000, True)],
)
def test_a_device_that_is_slow_with_what_serves_does_not_condemn_a_good_model(
    repository, broker, tmp_path, update, no_probe, incumbent_p99_ns, ok
):
    """The candidate's p99 of 20 us is above the budget, and at most twice what the serving model takes here."""
    no_probe["incumbent_p99_ns"] = incumbent_p99_ns
    digest = add(repository, broker, tmp_path, artifact())
    result, _ = update(signed(repository, release(digest)), budgets={"predict_p99_ns": 15_000})
    if ok:
        assert result["ok"]
        assert result["probe"]["incumbent_p99_ns"] == incumbent_p99_ns
        return
    limit = max(15_000, 2 * incumbent_p99_ns) / 1e3
    refused(result, "probe", f"20.0 us CPU is above the budget of {limit} us", retry=False, digest=digest)
    assert ("the serving model's p99 8.0 us" in result["reason"]) == bool(incumbent_p99_ns)


def test_the_publishers_budget_counts_too(repository, broker, tmp_path, update):
    digest = add(repository, broker, tmp_path, artifact(budgets=Budgets(predict_p99_ns=500)))
    result, _ = update(signed(repository, release(digest)), budgets={"predict_p99_ns": 10**9})
    refused(result, "probe", "above the budget of 0.5 us", retry=False, digest=digest)


@pytest.mark.attack("A95")
def test_a_model_that_does_not_fit_into_memory_is_condemned(repository, broker, tmp_path, update):
    digest = add(repository, broker, tmp_path, artifact(**BIG))
    result, _ = update(signed(repository, release(digest)), probe_address_space_bytes=1_000_000)
    refused(result, "probe", "", retry=False, digest=digest)
    assert "memory" in result["reason"] or "address space" in result["reason"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGSEGV, "crashed with SIGSEGV (boom)"),
        (-signal.SIGABRT, "crashed with SIGABRT (boom)"),
        (-signal.SIGXCPU, "more CPU time than allowed"),
    ],
)
def test_a_probe_that_dies_condemns_the_model(repository, broker, tmp_path, update, monkeypatch, code, words):
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: sandbox.Ended(code, b"", "boom"))
    digest = add(repository, broker, tmp_path, artifact())
    result, _ = update(signed(repository, release(digest)))
    refused(result, "probe", words, retry=False, digest=digest)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-signal.SIGKILL, "was killed from outside, as the kernel does when memory runs out (boom)"),
        (1, "ended with code 1 (boom)"),
    ],
)
def test_a_probe_that_the_device_may_have_ended_is_tried_again_and_the_model_named(
    repository, broker, tmp_path, update, monkeypatch, code, words
):
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: sandbox.Ended(code, b"", "boom"))
    digest = add(repository, broker, tmp_path, artifact())
    result, _ = update(signed(repository, release(digest)))
    refused(result, "probe", words, retry=True, digest=digest)
    assert result["release"], "whoever counts must know of which release"


def test_a_model_that_the_disk_does_not_give_the_probe_is_tried_again(tmp_path, monkeypatch, capsys):
    unread = OSError(errno.EIO, "Input/output error")
    found = []
    for problem in (unread, OSError(errno.EACCES, "Permission denied")):

        def fail(*_, problem=problem, **__):
            raise ArtifactError("blobs/x.onnx: cannot be read") from problem

        monkeypatch.setattr(prober, "Engine", fail)
        monkeypatch.setattr(prober, "limit", lambda _: None)
        task = {"model": "x", "digest": "0" * 64, "address_space_bytes": 1, "cpu_seconds": 1, "runs": 1}
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(task)))
        assert prober.main() == 0
        found.append(json.loads(capsys.readouterr().out)["unread"])
    assert found == [True, False]


def test_what_the_disk_does_not_give_the_probe_is_not_held_against_the_model_at_once(
    repository, broker, tmp_path, update, monkeypatch
):
    answer = {"ok": False, "reason": "blobs/x.onnx: cannot be read (Input/output error)", "unread": True}
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: sandbox.Ended(0, json.dumps(answer).encode(), ""))
    digest = add(repository, broker, tmp_path, artifact())
    result, _ = update(signed(repository, release(digest)))
    refused(result, "probe", "cannot be read", retry=True, digest=digest)


def test_a_probe_that_cannot_be_started_is_tried_again(repository, broker, tmp_path, update, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(sandbox, "run", fail)
    digest = add(repository, broker, tmp_path, artifact())
    result, _ = update(signed(repository, release(digest)))
    refused(result, "probe", "the probe cannot be started: [Errno 11]", retry=True)


def test_a_probe_without_a_readable_answer_condemns_the_model(
    repository, broker, tmp_path, update, monkeypatch
):
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: sandbox.Ended(0, b"half an ans", ""))
    digest = add(repository, broker, tmp_path, artifact())
    result, _ = update(signed(repository, release(digest)))
    refused(result, "probe", "answer is garbled", retry=False, digest=digest)


def test_a_probe_that_takes_too_long_is_tried_again(repository, broker, tmp_path, update, monkeypatch):
    def late(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(sandbox, "run", late)
    digest = add(repository, broker, tmp_path, artifact())
    result, _ = update(signed(repository, release(digest)))
    refused(result, "probe", "the deadline passed during the probe", retry=True)


def test_an_artifact_that_says_it_is_another_family_is_condemned(
    repository, broker, tmp_path, update, no_probe
):
    no_probe["model"] = "other"
    digest = add(repository, broker, tmp_path, artifact())
    result, _ = update(signed(repository, release(digest)))
    refused(result, "probe", "the artifact says it is 'other', not 'toy'", retry=False, digest=digest)


# ── the process ────────────────────────────────────────────────────────────────────────────────────────


def test_two_updates_of_one_device_do_not_meet(repository, broker, tmp_path, update):
    broker.publish(repository)
    folder = tmp_path / "state" / "trust"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result, _ = update(signed(repository, release(None)))
        refused(result, "trust", "another update of this device is still running", retry=True)
    assert update(signed(repository, release(None)))[0]["ok"]


def test_a_disk_that_refuses_is_tried_again(repository, broker, tmp_path, update):
    broker.publish(repository)
    (tmp_path / "state").write_text("a file where the folder should be")
    result, _ = update(signed(repository, release(None)))
    refused(result, "trust", "check the disk and permissions", retry=True)


def test_the_alarm_ends_whatever_hangs(repository, broker, update, monkeypatch):
    broker.publish(repository)

    def hang(*_):
        threading.Event().wait(30.0)

    monkeypatch.setattr(Update, "_believe", hang)
    result, _ = update(signed(repository, release(None)), deadline_seconds=0.05)
    refused(result, "release", "the deadline of 0.05 s passed in stage 'release'", retry=True)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"port": 0}, "job.broker.port"),
        ({"device": "a/b"}, "device name"),
        ({"floor": -1}, "job.floor"),
        ({"serving": "xyz"}, "SHA-256"),
    ],
)
def test_a_job_that_is_none_names_the_field(document, change, where):
    if "port" in change:
        change = {"broker": {**document["broker"], **change}}
    with pytest.raises(ContractError, match=where):
        Job.read({**document, **change})


def child(module, text):
    return subprocess.run(
        [sys.executable, "-m", module], input=text, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("module", ["edge_runtime.updater", "edge_runtime.probe"])
def test_garbage_on_stdin_is_no_job(module):
    for text in ("", "{", "[]"):
        done = child(module, text)
        assert (done.returncode, done.stdout) == (2, "")
        assert "not a job" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["edge_runtime.updater", "edge_runtime.shadow"])
def test_a_child_goes_before_its_daemon_and_ends_with_it(module):
    """It still waits for its job here: neither is a matter of what it is told."""
    process = subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin:
        try:
            score, deadline = Path(f"/proc/{process.pid}/oom_score_adj"), time.monotonic() + 30.0
            while score.read_text() != "1000\n":
                assert process.poll() is None
                assert time.monotonic() < deadline, "it does not give way"
                time.sleep(0.02)
            process.stdout.close()
            assert process.wait(30.0) == -signal.SIGKILL
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.attack("A96")
def test_the_probe_bounds_its_own_cpu_time(tmp_path):
    data = artifact(**BIG)
    task = {
        "model": str(put(tmp_path, data)),
        "digest": digest_of(data),
        "address_space_bytes": 2_000_000_000,
        "cpu_seconds": 1,
        "runs": 1_000_000,
    }
    ended = sandbox.run("edge_runtime.probe", task, timeout_seconds=30.0)
    assert (ended.code, ended.answer) == (-signal.SIGXCPU, b"")
    with pytest.raises(TimeoutError):
        sandbox.run("edge_runtime.probe", {**task, "cpu_seconds": 60}, timeout_seconds=0.1)


def test_the_probe_refuses_other_bytes_than_were_verified(tmp_path):
    task = {
        "model": str(put(tmp_path, artifact())),
        "digest": "0" * 64,
        "address_space_bytes": 2_000_000_000,
        "cpu_seconds": 10,
        "runs": 1,
    }
    answer = json.loads(sandbox.run("edge_runtime.probe", task, timeout_seconds=30.0).answer)
    assert answer["ok"] is False
    assert "SHA-256" in answer["reason"]


@pytest.mark.parametrize(("every", "rows"), [(0, 40), (4, 40), (1, 160)])
def test_rows_that_the_scheduler_disturbed_are_left_out_of_the_timing(monkeypatch, every, rows):
    """One tick of a fake clock is a good row; a preempted row costs 100, and the one after it 10."""
    state = {"row": 0, "clock": 0, "switches": 0, "since": 9}

    class Fake(Engine):
        def run(self, rows, **options):
            state["row"] += 1
            hit = bool(every) and state["row"] % every == 0
            state["since"] = 0 if hit else state["since"] + 1
            state["switches"] += hit
            state["clock"] += {0: 100, 1: 10}.get(state["since"], 1)
            return super().run(rows, **options)

    monkeypatch.setattr(prober, "_preemptions", lambda: state["switches"])
    monkeypatch.setattr(time, "thread_time_ns", lambda: state["clock"])
    [spent] = prober.time_rows([Fake(artifact())], 40, pause=lambda: None)
    assert len(spent) == rows
    assert set(spent.tolist()) == ({100} if every == 1 else {1})


def test_a_burst_of_others_does_not_outlast_the_pauses(monkeypatch):
    """Rows cost fifty times as much until the burst is over, which takes longer than all rows would at a stretch."""
    state = {"clock": 0, "pauses": 0}

    class Fake(Engine):
        def run(self, rows, **options):
            state["clock"] += 50 if state["pauses"] < 15 else 1
            return super().run(rows, **options)

    def pause():
        state["pauses"] += 1

    monkeypatch.setattr(prober, "_preemptions", lambda: 0)
    monkeypatch.setattr(time, "thread_time_ns", lambda: state["clock"])
    [spent] = prober.time_rows([Fake(artifact())], 2000, pause=pause)
    assert state["pauses"] == len(spent) // prober.PART_ROWS
    assert prober.quietest_ns(spent, 0.99) == 1


@pytest.mark.parametrize(
    ("module", "loads", "never"),
    [
        ("edge_runtime.updater", "tuf", {"onnxruntime", "psutil", "sqlite3", "sklearn", "onnx", "asyncio"}),
        (
            "edge_runtime.probe",
            "onnxruntime",
            {"tuf", "cryptography", "paho", "urllib3", "sqlite3", "asyncio"},
        ),
    ],
)
def test_each_process_loads_only_what_it_needs(module, loads, never):
    script = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert loads in loaded
    assert not loaded & never


def test_what_a_model_needs_shows_in_the_part_that_was_disturbed_least():
    loud = np.full(1900, 90_000, np.int64)
    quiet = np.full(100, 12_000, np.int64)
    quiet[::25] = 15_000
    spent = np.concatenate([loud, quiet])
    assert prober.quietest_ns(spent, 0.5) == 12_000
    assert prober.quietest_ns(spent, 0.99) == 15_000
    assert prober.quietest_ns(loud[:7], 0.99) == 90_000
