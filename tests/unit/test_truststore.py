"""What a device believes, and across restarts. Attacks on it are in ``tests/attack``."""

import random
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.contract import codec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.messages import SignedRelease, TrustBundle
from edge_runtime.contract.release import to_payload
from edge_runtime.truststore import TrustStore
from tests.publisher import MODEL, artifact, director, put, release, signed
from tests.support.tuf_repository import set_clock
from trainer.publish import Repository

DIGEST = Digest("a" * 64)


@pytest.fixture
def repository(tmp_path):
    return Repository.create(tmp_path / "repository")


@pytest.fixture
def see(tmp_path, repository):
    """Lets the device look at a bundle, like a fresh process each time, and ask something."""
    pinned = repository.pinned_root.read_bytes()

    def look(bundle, ask=lambda store: None):
        with TrustStore(tmp_path / "trust", pinned) as store:
            store.refresh(bundle)
            return ask(store)

    return look


def record_files(tmp_path):
    return sorted((path.name, path.stat().st_ino) for path in (tmp_path / "trust").glob("record.*"))


def with_file(bundle, name, data):
    return TrustBundle(root_version=1, files=tuple(sorted({**dict(bundle.files), name: data}.items())))


def test_a_model_is_found_under_its_own_family_only(repository, see, tmp_path):
    path = put(tmp_path, artifact())
    published = repository.add(path, role="targets")
    bundle = repository.bundle(1)
    assert see(bundle, lambda s: s.find(MODEL, published.digest)).length == path.stat().st_size
    assert see(bundle, lambda s: s.find("other", published.digest)) is None
    assert see(bundle, lambda s: s.find(MODEL, DIGEST)) is None


def test_a_target_of_other_bytes_than_its_name_says_is_none(repository, see, tmp_path):
    published = repository.add(put(tmp_path, artifact()), role="targets")

    def find(store, **hashes):
        honest = store._client.get_targetinfo

        def renamed(path):
            target = honest(path)
            if target is not None:
                target.hashes = {**target.hashes, **hashes}
            return target

        store._client.get_targetinfo = renamed
        return store.find(MODEL, published.digest)

    bundle = repository.bundle(1)
    assert see(bundle, find).digest == published.digest
    assert see(bundle, lambda store: find(store, sha256=DIGEST)) is None


def test_a_refused_bundle_still_raises_the_floor_it_proved(repository, see):
    old = repository.bundle(1)
    repository.refresh()
    new = repository.bundle(1)
    without_snapshot = TrustBundle(
        root_version=1, files=tuple((n, d) for n, d in new.files if "snapshot" not in n)
    )
    with pytest.raises(ContractError, match=r"there is no 2\.snapshot\.json"):
        see(without_snapshot)
    with pytest.raises(ContractError, match="older"):
        see(old)
    see(new)


@pytest.fixture
def no_clock(monkeypatch):
    """python-tuf and the trust store both believe it is 1970."""
    set_clock(monkeypatch, datetime(1970, 1, 1, 0, 5, tzinfo=UTC))


def test_a_device_without_a_clock_follows_current_metadata(repository, see, no_clock):
    see(repository.bundle(1))


def test_a_publisher_whose_clock_was_wrong_once_is_believed_again_with_another_timestamp_key(
    tmp_path, no_clock
):
    right = datetime.now(UTC)
    root = tmp_path / "repository"
    repository = Repository.create(root, clock=lambda: right)
    pinned = repository.pinned_root.read_bytes()

    def look():
        with TrustStore(tmp_path / "trust", pinned) as store:
            store.refresh(repository.bundle(1))

    Repository(root, clock=lambda: right + timedelta(days=300)).refresh()
    look()
    repository.refresh()
    with pytest.raises(ContractError, match="clock ran ahead then, replace the timestamp key"):
        look()
    repository.rotate("timestamp")
    look()
    repository.refresh()
    look()


def test_a_pinned_file_that_is_no_root_says_so(tmp_path):
    with pytest.raises(ContractError, match=r"provision 1\.root\.json anew"):
        TrustStore(tmp_path / "trust", b"{}")


def test_damaged_bundles_raise_nothing_but_a_refusal(repository, tmp_path):
    repository.enable_auto(MODEL)
    digest = repository.add(put(tmp_path, artifact()), role="auto").digest
    repository.rotate("timestamp")
    bundle, pinned = repository.bundle(1), repository.pinned_root.read_bytes()
    rng = random.Random(3)
    refused = 0
    for i in range(100):
        name, data = rng.choice(bundle.files)
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 8))):
            damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        cut = bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))])
        with TrustStore(tmp_path / f"trust-{i}", pinned) as store:
            try:
                store.refresh(with_file(bundle, name, cut))
                assert store.find(MODEL, digest)
            except ContractError:
                refused += 1
    # A lost signature of one root key, or an unsigned corner, does no harm.
    assert refused > 85


def test_nothing_is_written_when_nothing_is_new(repository, see, tmp_path):
    see(repository.bundle(1))
    before = record_files(tmp_path)
    see(repository.bundle(1))
    assert record_files(tmp_path) == before
    repository.refresh()
    see(repository.bundle(1))
    assert record_files(tmp_path) != before


def test_a_scratch_folder_left_by_a_kill_does_no_harm(repository, see, tmp_path):
    see(repository.bundle(1))
    scratch = tmp_path / "trust" / "scratch"
    scratch.mkdir()
    (scratch / "timestamp.json").write_text("half a fi")
    (scratch / "root.json").symlink_to("nowhere")
    repository.refresh()
    see(repository.bundle(1))
    assert not scratch.exists()


def test_a_release_needs_the_directors_signature(repository, see):
    document = release(DIGEST)
    payload = to_payload(document)
    keyid, key = director(repository)
    good = key.sign(payload)
    stranger = Ed25519PrivateKey.generate().sign(payload)
    bundle = repository.bundle(1)

    def read(*signatures, of=payload):
        message = SignedRelease(payload=of, signatures=tuple(signatures))
        return see(bundle, lambda store: store.read_release(message))

    assert read((keyid, good)) == document
    assert read((keyid, good), ("0" * 64, stranger)) == document
    for bad in ([], [(keyid, stranger)], [("0" * 64, good)], [(keyid, b"")], [(keyid, good[:-1])]):
        with pytest.raises(ContractError, match="not signed by the director"):
            read(*bad)
    with pytest.raises(ContractError, match="not signed by the director"):
        read((keyid, good), of=payload.replace(b'"revision":1', b'"revision":2'))


def test_a_signed_payload_that_is_no_release_is_refused(repository, see):
    message = codec.decode(signed(repository, b'{"schema": 1}'))
    with pytest.raises(ContractError, match=r"release\.threshold: is missing"):
        see(repository.bundle(1), lambda store: store.read_release(message))


def test_revisions_never_go_back_and_never_change_their_contents(repository, see):
    bundle = repository.bundle(1)

    def accept(revision, candidate=DIGEST, **changes):
        message = codec.decode(signed(repository, release(candidate, revision=revision, **changes)))
        see(bundle, lambda store: store.accept(message))

    accept(5)
    accept(5)
    with pytest.raises(ContractError, match="accepted here with other contents"):
        accept(5, candidate=None)
    with pytest.raises(ContractError, match="revision 4 is older than 5"):
        accept(4)
    accept(1, cohort="other")
    accept(1, model="other")
    accept(6)


def test_a_floor_outlives_the_key_that_signed_after_it(repository, see):
    """Two director keys may sign: what the honest one signed still counts when the other one is replaced."""
    bundle = repository.bundle(1)

    def accept(revision, signer, keys):
        message = codec.decode(signed(repository, release(DIGEST, revision=revision)))

        def ask(store):
            store._signers = lambda _: frozenset({signer})
            store._targets = SimpleNamespace(get_delegated_role=lambda _: SimpleNamespace(keyids=keys))
            return store.accept(message)

        see(bundle, ask)

    accept(5, "honest", ["honest", "stolen"])
    accept(9, "stolen", ["honest", "stolen"])
    with pytest.raises(ContractError, match="revision 6 is older than 9"):
        accept(6, "honest", ["honest", "stolen"])
    with pytest.raises(ContractError, match="revision 4 is older than 5"):
        accept(4, "honest", ["honest", "new"])
    accept(6, "honest", ["honest", "new"])
