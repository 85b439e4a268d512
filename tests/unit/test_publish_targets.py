"""What is signed of a model beside its bytes, how large its chunks are, and how it gets back onto a broker."""

import json

import pytest
from typer.testing import CliRunner

from cli import operate
from cli.app import app
from edge_runtime.contract import topics, trust
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.manifest import Budgets, manifest_digest
from edge_runtime.contract.onnx_metadata import read_metadata
from edge_runtime.contract.topics import Topics
from edge_runtime.truststore import TrustStore
from tests.publisher import FLEET, MODEL, artifact, put
from trainer import publish
from trainer.publish import PublishError, Repository


@pytest.fixture
def repository(tmp_path):
    repository = Repository.create(tmp_path / "repository")
    repository.enable_auto(MODEL)
    return repository


def signed_custom(tmp_path):
    folder = tmp_path / "repository" / "metadata"
    newest = max(folder.glob(f"*.auto-{MODEL}.json"), key=lambda path: int(path.name.partition(".")[0]))
    [target] = json.loads(newest.read_bytes())["signed"]["targets"].values()
    return target["custom"]


def test_manifest_budgets_and_chunk_size_are_signed(tmp_path, repository):
    data = artifact(budgets=Budgets(predict_p99_ns=1_000_000, rss_bytes=2_000_000))
    published = repository.add(put(tmp_path, data), chunk_bytes=2048)
    text = read_metadata(data)[0]["skiff.manifest"]
    custom = signed_custom(tmp_path)
    assert custom["manifest"] == manifest_digest(data) == digest_of(text.encode())
    assert custom["budgets"] == {"predict_p99_ns": 1_000_000, "rss_bytes": 2_000_000}
    assert custom["chunk_bytes"] == published.chunk_bytes == 2048
    read = trust.read_target(published.digest, published.path, published.length, custom)
    assert read == trust.Target(
        digest=published.digest,
        path=published.path,
        length=len(data),
        chunk_bytes=2048,
        manifest=manifest_digest(data),
        budgets=Budgets(predict_p99_ns=1_000_000, rss_bytes=2_000_000),
    )
    assert read.chunks == published.chunks == -(-len(data) // 2048)


def chunks_of(repository, digest):
    return [data for topic, data, _ in repository.outgoing(Topics(FLEET), [digest]) if "/blob/" in topic]


def test_adding_again_keeps_the_size_that_was_signed_unless_another_is_asked_for(tmp_path, repository):
    path = put(tmp_path, artifact())
    first = repository.add(path, chunk_bytes=2048)
    before = repository.bundle(1)
    assert repository.add(path) == repository.add(path, chunk_bytes=2048) == first
    assert repository.bundle(1) == before, "nothing was signed"
    created = signed_custom(tmp_path)["created"]
    again = repository.add(path, chunk_bytes=4096)
    assert (again.digest, again.path, again.chunk_bytes) == (first.digest, first.path, 4096)
    assert repository.published() == (again,)
    assert signed_custom(tmp_path) | {"created": created} == {
        **signed_custom(tmp_path),
        "created": created,
        "chunk_bytes": 4096,
    }
    with TrustStore(tmp_path / "device", repository.pinned_root.read_bytes()) as store:
        store.refresh(repository.bundle(1))
        target = store.find(MODEL, first.digest)
        assert target is not None
        assert target.chunk_bytes == 4096
    chunks = chunks_of(repository, first.digest)
    assert {len(data) for data in chunks[:-1]} == {4096}
    assert b"".join(chunks) == path.read_bytes()
    assert [topic for topic, _, _ in repository.withdrawn(Topics(FLEET), again)] == [
        Topics(FLEET).chunk(first.digest, i) for i in range(len(chunks))
    ]


def test_chunks_are_as_devices_look_for_them_whoever_vouches(tmp_path, repository):
    """Devices go by what the targets keys signed, where both roles vouch for a model."""
    path = put(tmp_path, artifact())
    digest = repository.add(path, chunk_bytes=2048).digest
    repository.add(path, role="targets")
    repository.add(path, role="targets", chunk_bytes=4096)
    assert len(chunks_of(repository, digest)[0]) == 4096
    with pytest.raises(PublishError, match="publish it with the role targets to change it"):
        repository.add(path, role="auto", chunk_bytes=1024)
    assert repository.add(path, role="auto").chunk_bytes == 4096
    assert len(chunks_of(repository, digest)[0]) == 4096


def test_chunks_that_were_sent_in_this_size_are_not_sent_again(tmp_path, repository):
    path = put(tmp_path, artifact())
    sent = repository.add(path, chunk_bytes=2048)
    there = [topic for topic, _, _ in repository.outgoing(Topics(FLEET), [sent.digest], sent=[sent])]
    assert there == [Topics(FLEET).packed_trust(1), Topics(FLEET).trust(1)]
    repository.add(path, chunk_bytes=4096)
    again = [data for topic, data, _ in repository.outgoing(Topics(FLEET), [sent.digest], sent=[sent])]
    assert b"".join(again[:-2]) == path.read_bytes()


@pytest.mark.parametrize("size", [0, topics.MIN_CHUNK_BYTES - 1, topics.MAX_CHUNK_BYTES + 1])
def test_chunks_that_no_device_takes_are_refused(tmp_path, repository, size):
    with pytest.raises(PublishError, match=rf"chunks of {size} bytes are outside \[1024, 262144\]"):
        repository.add(put(tmp_path, artifact()), chunk_bytes=size)
    assert repository.published() == ()


def test_a_model_too_large_for_a_broker_is_published_without_chunks(tmp_path, repository, monkeypatch):
    data = artifact()
    monkeypatch.setattr(topics, "MAX_BLOB_BYTES", len(data))
    assert repository.add(put(tmp_path, data)).on_brokers
    monkeypatch.setattr(topics, "MAX_BLOB_BYTES", len(data) - 1)
    [published] = repository.published()
    assert (published.on_brokers, published.chunks) == (False, 0)
    sent = [topic for topic, _, _ in repository.outgoing(Topics(FLEET), [published.digest])]
    assert sent == [Topics(FLEET).packed_trust(1), Topics(FLEET).trust(1)]


def test_a_model_too_large_for_anybody_is_refused_unread(tmp_path, repository, monkeypatch):
    data = artifact()
    monkeypatch.setattr(publish, "MAX_ARTIFACT_BYTES", len(data) - 1)
    monkeypatch.setattr(publish, "check_bytes", None)
    with pytest.raises(PublishError, match=f"{len(data)} bytes; models have {len(data) - 1} at most"):
        repository.add(put(tmp_path, data))


@pytest.mark.parametrize(
    ("custom", "problem"),
    [
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"chunk_bytes": topics.MAX_CHUNK_BYTES + 1}, "chunk_bytes"),
        ({"chunk_bytes": "64"}, "chunk_bytes"),
        ({"manifest": "x"}, "SHA-256"),
        ({"budgets": {"rss_bytes": -1}}, "rss_bytes"),
        ([], "custom"),
    ],
)
def test_a_description_that_is_none_is_refused(custom, problem):
    if custom == []:
        custom = [1]
    with pytest.raises(ContractError, match=problem):
        trust.read_target(Digest("a" * 64), "models/m/a.onnx", 10, custom)


def test_old_metadata_describes_nothing_and_has_chunks_of_64_kib():
    for custom in (None, {}, {"model": "toy", "version": "1", "created": "2026"}):
        found = trust.read_target(Digest("a" * 64), "models/m/a.onnx", 70_000, custom)
        assert (found.chunk_bytes, found.chunks, found.manifest) == (65_536, 2, None)
        assert found.budgets == Budgets()


# ── the command ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs ``skiff publish`` before a broker that takes everything; returns the outcome and what was sent."""
    (tmp_path / "aggregator.toml").write_text(
        f'fleet = "{FLEET}"\nstate_dir = "aggregator"\nregistry = "r"\ndirector_key = "k"\n', encoding="utf-8"
    )
    sent = []

    def send(repository, digests, **_):
        sent.append(tuple(digests))
        return 1000

    monkeypatch.setattr(operate, "send", send)
    where = ["--repository", str(tmp_path / "repository"), "--aggregator", str(tmp_path / "aggregator.toml")]

    def run(*arguments):
        sent.clear()
        return CliRunner().invoke(app, ["publish", *where, *arguments]), sent[:]

    return run


def test_publishing_again_signs_nothing(tmp_path, repository, command):
    digests = {repository.add(put(tmp_path, artifact(seed=seed))).digest for seed in (0, 1)}
    before = {path.name for path in (tmp_path / "repository" / "metadata").iterdir()}
    done, sent = command("--again")
    assert done.exit_code == 0, done.output
    assert "put 2 models there again" in done.output
    assert set(sent[0]) == digests
    assert {path.name for path in (tmp_path / "repository" / "metadata").iterdir()} == before
    done, sent = command("--again", str(tmp_path / "x.onnx"))
    assert done.exit_code != 0
    assert not sent


def test_publishing_again_makes_no_repository(tmp_path, command):
    done, sent = command("--again")
    assert done.exit_code != 0
    assert not sent
    assert not (tmp_path / "repository").exists()


def test_the_chunk_size_is_an_option(tmp_path, repository, command):
    path = put(tmp_path, artifact())
    done, _ = command(str(path), "--role", "auto", "--chunk-kib", "4")
    assert done.exit_code == 0, done.output
    assert signed_custom(tmp_path)["chunk_bytes"] == 4096
    for more, size in ((["--chunk-kib", "2"], 2048), ([], 2048), (["--chunk-kib", "64"], 65536)):
        assert command(str(path), "--role", "auto", *more)[0].exit_code == 0
        assert signed_custom(tmp_path)["chunk_bytes"] == size
    for wrong in ("0", "257"):
        assert command(str(path), "--chunk-kib", wrong)[0].exit_code == 2
