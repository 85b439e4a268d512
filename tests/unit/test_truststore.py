"""What a device believes, against each attack on an update system, and across restarts."""

import json
import random
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.ngclient._internal import trusted_metadata_set

from edge_runtime.contract import codec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.messages import SignedRelease, TrustBundle
from edge_runtime.contract.release import to_payload
from edge_runtime.truststore import TrustStore
from tests.publisher import MODEL, artifact, director, put, release, signed
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
    assert see(bundle, lambda s: s.find(MODEL, published.digest)) == path.stat().st_size
    assert see(bundle, lambda s: s.find("other", published.digest)) is None
    assert see(bundle, lambda s: s.find(MODEL, DIGEST)) is None


def test_an_older_bundle_is_refused_after_a_newer_one(repository, see, tmp_path):
    old = repository.bundle(1)
    repository.add(put(tmp_path, artifact()), role="targets")
    see(repository.bundle(1))
    with pytest.raises(ContractError, match="older than what this device has verified before"):
        see(old)
    see(repository.bundle(1))


@pytest.mark.parametrize("piece", ["targets", "snapshot", "timestamp"])
def test_pieces_of_two_bundles_are_refused(repository, see, tmp_path, piece):
    digest = repository.add(put(tmp_path, artifact()), role="targets").digest
    old = dict(repository.bundle(1).files)
    repository.revoke(digest)
    new = dict(repository.bundle(1).files)
    if piece == "timestamp":
        mixed = {**new, "timestamp.json": old["timestamp.json"]}
    else:
        mixed = {**new, f"3.{piece}.json": old[f"2.{piece}.json"]}
    with pytest.raises(ContractError):
        see(TrustBundle(root_version=1, files=tuple(mixed.items())))
    see(TrustBundle(root_version=1, files=tuple(new.items())))


def test_a_refused_bundle_still_raises_the_floor_it_proved(repository, see):
    old = repository.bundle(1)
    repository.refresh()
    new = repository.bundle(1)
    without_snapshot = TrustBundle(
        root_version=1, files=tuple((n, d) for n, d in new.files if "snapshot" not in n)
    )
    with pytest.raises(ContractError, match=r"holds no 2\.snapshot\.json"):
        see(without_snapshot)
    with pytest.raises(ContractError, match="older"):
        see(old)
    see(new)


def test_expired_metadata_is_refused_and_the_clock_is_named(tmp_path):
    past = datetime.now(UTC) - timedelta(days=8)
    repository = Repository.create(tmp_path / "repository", clock=lambda: past)
    with (
        TrustStore(tmp_path / "trust", repository.pinned_root.read_bytes()) as store,
        pytest.raises(
            ContractError, match=r"timestamp\.json is expired by this device's clock \(20.*set the clock"
        ),
    ):
        store.refresh(repository.bundle(1))


class _In1970(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime(1970, 1, 1, 0, 5, tzinfo=tz)


@pytest.fixture
def no_clock(monkeypatch):
    """python-tuf and the trust store both believe it is 1970."""

    class Shim:
        datetime = _In1970
        timezone = trusted_metadata_set.datetime.timezone

    monkeypatch.setattr(trusted_metadata_set, "datetime", Shim)
    monkeypatch.setattr("edge_runtime.truststore.time.time", lambda: 300.0)


def test_a_device_without_a_clock_follows_current_metadata(repository, see, no_clock):
    see(repository.bundle(1))


def test_a_device_without_a_clock_refuses_targets_that_expired_before_the_timestamp_was_signed(
    tmp_path, no_clock
):
    start = datetime(2030, 1, 1, tzinfo=UTC)
    Repository.create(tmp_path / "repository", clock=lambda: start)
    later = Repository(tmp_path / "repository", clock=lambda: start + timedelta(days=400))
    later.refresh()
    with (
        TrustStore(tmp_path / "trust", later.pinned_root.read_bytes()) as store,
        pytest.raises(ContractError, match=r"root\.json is expired"),
    ):
        store.refresh(later.bundle(1))


def test_a_publisher_whose_clock_was_wrong_once_is_believed_again(tmp_path, no_clock):
    right = datetime.now(UTC)
    root = tmp_path / "repository"
    repository = Repository.create(root, clock=lambda: right)
    pinned = repository.pinned_root.read_bytes()
    Repository(root, clock=lambda: right + timedelta(days=300)).refresh()
    for _ in range(2):
        with TrustStore(tmp_path / "trust", pinned) as store:
            store.refresh(repository.bundle(1))
        repository.refresh()


def test_metadata_of_another_publisher_is_refused(see, tmp_path):
    other = Repository.create(tmp_path / "other")
    with pytest.raises(ContractError, match="descends from the pinned root"):
        see(other.bundle(1))


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


@pytest.mark.parametrize("damage", [b"", b"{}", b"\0" * 4096])
def test_a_record_that_lost_its_newest_copy_still_remembers(repository, see, tmp_path, damage):
    oldest = repository.bundle(1)
    for _ in range(3):
        repository.refresh()
        see(repository.bundle(1))
    copies = {p: json.loads(p.read_bytes())["generation"] for p in (tmp_path / "trust").glob("record.?.json")}
    newest = max(copies, key=lambda path: copies[path])
    newest.write_bytes(damage)
    with pytest.raises(ContractError, match="older"):
        see(oldest)
    see(repository.bundle(1))


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


def test_online_tuf_keys_cannot_sign_releases(repository, see, tmp_path):
    keys = tmp_path / "repository" / "keys"
    director_file = (keys / "director.json").read_bytes()
    for name in ("snapshot", "timestamp", "builder", "targets-1"):
        (keys / "director.json").write_bytes((keys / f"{name}.json").read_bytes())
        message = codec.decode(signed(repository, release(DIGEST)))
        with pytest.raises(ContractError, match="not signed by the director"):
            see(repository.bundle(1), lambda store, m=message: store.read_release(m))
    (keys / "director.json").write_bytes(director_file)


def test_a_signed_payload_that_is_no_release_is_refused(repository, see):
    message = codec.decode(signed(repository, b'{"schema": 1}'))
    with pytest.raises(ContractError, match=r"release\.threshold: is missing"):
        see(repository.bundle(1), lambda store: store.read_release(message))


def test_revisions_never_go_back_and_never_change_their_contents(repository, see):
    bundle = repository.bundle(1)

    def accept(revision, candidate=DIGEST, **changes):
        document = release(candidate, revision=revision, **changes)
        see(bundle, lambda store: store.accept(document, to_payload(document)))

    accept(5)
    accept(5)
    with pytest.raises(ContractError, match="accepted here with other contents"):
        accept(5, candidate=None)
    with pytest.raises(ContractError, match="revision 4 is older than 5"):
        accept(4)
    accept(1, cohort="other")
    accept(1, model="other")
    accept(6)
