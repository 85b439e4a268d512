"""What a broker, or the thief of keys below a threshold, can do with the publisher's metadata."""

import json
import tracemalloc
import zlib
from datetime import UTC, datetime, timedelta

import pytest
from tuf.api.metadata import Metadata, TargetFile

from edge_runtime.adapters.slots import Slots
from edge_runtime.contract import ids, trust
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.truststore import TrustStore
from tests.publisher import MODEL, artifact, put, release, signed
from tests.support.attacked import TOPICS, Thief
from tests.support.tuf_repository import TufClient, TufRepository, set_clock
from trainer.publish import Repository

UNKNOWN = Digest("d" * 64)
ONLINE = ("snapshot", "timestamp")
AHEAD = 1 << 40
OLDER = ("trust", "older than what this device has verified before")
MIXED = {
    "targets": ("trust", "older than what this device has verified before, or mixed"),
    "snapshot": ("trust", "older than what this device has verified before, or mixed"),
    "timestamp": ("trust", "there is no 4.snapshot.json"),
}


def later(device, monkeypatch, **span):
    """The device's clock goes on."""
    [stamp] = [data for name, data in device.repository.bundle(1).files if name == "timestamp.json"]
    signed_at = Metadata.from_bytes(stamp).signed.expires - timedelta(days=7)
    set_clock(monkeypatch, signed_at + timedelta(**span))


# ── the broker alone ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.attack("A11")
def test_metadata_from_before_a_revocation_played_back(device):
    digest = device.publish(seed=1)
    before = dict(device.broker.retained)
    device.repository.revoke(digest)
    device.broker.publish(device.repository)
    device.refuses(release(digest, revision=2), "release", "was revoked")
    device.broker.retained.update(before)
    device.refuses(release(digest, revision=3), *OLDER)
    device.follows(seed=2, revision=3)


@pytest.mark.attack("A12")
def test_metadata_held_back_until_it_is_too_old(device, monkeypatch):
    digest = device.add(seed=1)
    later(device, monkeypatch, days=8)
    words = "timestamp.json is expired by this device's clock"
    device.refuses(release(digest, revision=2), "trust", words)
    device.repository._clock = lambda: set_back(device) + timedelta(days=8)
    device.repository.refresh()
    device.follows(seed=1, revision=2)


def set_back(device):
    """When the current timestamp was signed."""
    [stamp] = [data for name, data in device.repository.bundle(1).files if name == "timestamp.json"]
    return Metadata.from_bytes(stamp).signed.expires - timedelta(days=7)


@pytest.mark.attack("A17")
def test_metadata_that_is_a_bomb(device):
    """Deep, wide, or with numbers nobody can hold; none is signed, all are parsed."""
    head = b'{"signatures":[],"signed":'
    bombs = {
        "nested": b"[" * 100_000,
        "nested in the signed part": head + b'{"_type":"timestamp","x":' + b"[" * 100_000,
        "wide": head + b"[" + b"{}," * 40_000 + b"{}]}",
        "a number of 100,000 digits": head + b'{"version":' + b"9" * 100_000 + b"}}",
        "a version beyond every float": head
        + b'{"_type":"timestamp","spec_version":"1.0.31","version":1e999}}',
        "half a surrogate": head + b'"\\ud800"}',
        "not UTF-8": b"\xff" * 1000,
    }
    packed = zlib.compress(bytes(64 << 20))
    for bomb in bombs.values():
        device.tell({"timestamp.json": bomb, "2.root.json": bomb})
        device.refuses(release(UNKNOWN, revision=2), "trust", "trust metadata: ")
    for message in (b"\xdf\xff\xff\xff\xff", b"\x80" * 250_000, b"\x91" * 250_000):
        device.tell_bytes(message)
        device.refuses(release(UNKNOWN, revision=2), "trust", "message is not valid msgpack within the caps")
    device.broker.retained[TOPICS.packed_trust(1)] = packed
    tracemalloc.start()
    try:
        device.refuses(release(UNKNOWN, revision=2), "trust", "packed trust metadata: is cut short")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4e6
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A18")
def test_a_chain_of_roots_that_does_not_end(tmp_path):
    """A job follows so many roots; those on record do not count against the next one, which gets to the end."""
    repo = TufRepository()
    client = TufClient(tmp_path / "trust", repo)
    client.refresh()
    for _ in range(99):
        repo.publish("root")
    repo.rotate("timestamp")
    repo.publish("root", "timestamp")
    with pytest.raises(ContractError, match="timestamp was signed by 0/1 keys"):
        client.refresh()
    assert client.trusted["root"] == 1 + 65
    assert len(client.asked) == 65 + 1
    client.refresh()
    assert client.trusted["root"] == 101


@pytest.mark.attack("A13")
@pytest.mark.parametrize("piece", ["targets", "snapshot", "timestamp"])
def test_pieces_of_two_states_mixed(device, piece):
    """Each is signed, and was current once; together they never were."""
    digest = device.publish(seed=1, role="targets")
    old = device.told
    device.repository.revoke(digest)
    device.broker.publish(device.repository)
    new = device.told
    [before], [after] = ([name for name in files if piece in name] for files in (old, new))
    device.tell({**{n: d for n, d in new.items() if n != after}, after: old[before]})
    device.refuses(release(digest, revision=2), *MIXED[piece])
    device.follows(seed=2, revision=3)


@pytest.mark.attack("A14")
def test_metadata_that_expired(tmp_path):
    """A device that has seen none yet is given what once was good."""
    repository = TufRepository(datetime.now(UTC) - timedelta(days=31))
    with pytest.raises(ContractError, match=r"is expired by this device's clock \(20.*set the clock"):
        TufClient(tmp_path / "trust", repository).refresh()


@pytest.mark.attack("A15")
def test_metadata_of_another_publisher(device, tmp_path):
    (tmp_path / "other").mkdir()
    other = Repository.create(tmp_path / "other" / "repository")
    other.enable_auto(MODEL)
    digest = other.add(put(tmp_path / "other", artifact(seed=1))).digest
    for _ in range(9):
        other.refresh()
    device.broker.publish(other, [digest])
    message = signed(other, release(digest, revision=2))
    device.refuses(message, "trust", "publish metadata that descends from the pinned root")
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A16")
@pytest.mark.parametrize("damage", [b"", b"{}", b"\0" * 4096])
def test_the_newest_state_played_back_after_a_copy_of_the_record_was_damaged(device, damage):
    """Both copies hold the floor, so that a worn disk takes none along."""
    digest = device.publish(seed=1)
    before = dict(device.broker.retained)
    device.repository.revoke(digest)
    device.broker.publish(device.repository)
    assert device.update(release(None, revision=2))["ok"]
    copies = list((device.state / "trust").glob("record.?.json"))
    newest = max(copies, key=lambda path: json.loads(path.read_bytes())["generation"])
    newest.write_bytes(damage)
    device.broker.retained.update(before)
    device.refuses(release(digest, revision=3), *OLDER)
    newest.write_bytes(damage)
    device.broker.publish(device.repository)
    device.refuses(release(digest, revision=1), "release", "revision 1 is older than 2", floor=0)
    device.follows(seed=2, revision=3)


@pytest.mark.attack("A19")
def test_a_device_without_a_clock_is_given_what_expired(tmp_path, monkeypatch):
    """The publisher kept the timestamp fresh, and let something below it run out."""
    start = datetime(2030, 1, 1, tzinfo=UTC)
    Repository.create(tmp_path / "repository", clock=lambda: start)
    later = Repository(tmp_path / "repository", clock=lambda: start + timedelta(days=400))
    later.refresh()
    set_clock(monkeypatch, start.replace(year=1970))
    with (
        TrustStore(tmp_path / "trust", later.pinned_root.read_bytes()) as store,
        pytest.raises(ContractError, match=r"root\.json is expired"),
    ):
        store.refresh(later.bundle(1))


# ── keys below the threshold, and online keys ──────────────────────────────────────────────────────────


def vouch(path, data):
    """Makes a role vouch for data."""

    def change(targets):
        targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])

    return change


@pytest.mark.attack("A21")
def test_one_of_two_targets_keys_is_stolen(device):
    evil = artifact(seed=7)
    digest = digest_of(evil)
    for stolen in ("targets-1", "targets-2"):
        device.broker.publish(device.repository)
        Thief(device, stolen, *ONLINE).forge("targets", vouch(trust.approved_path(MODEL, digest), evil))
        device.refuses(release(digest, revision=2), "trust", "targets was signed by 1/2 keys")
    device.replace_online_keys()
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A22")
def test_one_of_three_root_keys_is_stolen(device):
    thief = Thief(device, "root-1", *ONLINE)
    keep = thief.signer("root-1").public_key.keyid

    def seize(root):
        for role in root.roles.values():
            role.keyids, role.threshold = [keep], 1

    thief.forge("root", seize)
    device.refuses(release(UNKNOWN, revision=2), "trust", "root was signed by 1/2 keys")
    device.follows(seed=1, revision=2)


@pytest.mark.attack("A23")
def test_the_online_keys_cannot_take_back_a_revocation(device):
    digest = device.publish(seed=1)
    files = dict(device.repository.bundle(1).files)
    [old] = [name for name in files if name.endswith(".targets.json")]
    device.repository.revoke(digest)
    device.broker.publish(device.repository)
    device.refuses(release(digest, revision=2), "release", "was revoked")
    thief = Thief(device, *ONLINE)

    def go_back(snapshot):
        snapshot.meta["targets.json"].version = int(old.partition(".")[0])

    thief.forge("snapshot", go_back)
    forged = device.told
    device.tell({**forged, old: files[old]})
    device.refuses(release(digest, revision=3), *OLDER)
    # His snapshot is as new as the publisher's next: only other keys get past it.
    device.replace_online_keys()
    device.follows(seed=2, revision=3)


@pytest.mark.attack("A24")
def test_the_online_keys_run_ahead_and_new_keys_recover(device):
    Thief(device, *ONLINE).forge("snapshot", lambda snapshot: None, version=AHEAD)
    assert device.update(release(None, revision=2))["ok"]
    for _ in range(3):
        device.repository.refresh()
    device.broker.publish(device.repository)
    device.refuses(release(UNKNOWN, revision=3), *OLDER)
    device.replace_online_keys()
    device.follows(seed=1, revision=3)


@pytest.mark.attack("A25")
def test_the_online_keys_sign_a_time_far_ahead_and_new_keys_recover(device, monkeypatch):
    """All that is honest would have expired long ago, on a device with a clock and on one without."""

    def in_ten_months(signed):
        moment = set_back(device) + timedelta(days=300)
        signed.expires = moment + timedelta(days=7)
        if signed.type == "timestamp":
            signed.unrecognized_fields[trust.TABLE]["signed"] = int(moment.timestamp())

    thief = Thief(device, *ONLINE)
    thief.forge("snapshot", in_ten_months)
    forged = device.told
    md = Metadata.from_bytes(forged["timestamp.json"])
    in_ten_months(md.signed)
    md.sign(thief.signer("timestamp"))
    device.tell({**forged, "timestamp.json": md.to_bytes()})
    assert device.update(release(None, revision=2))["ok"]
    for _ in range(3):
        device.repository.refresh()
    device.broker.publish(device.repository)
    device.refuses(release(UNKNOWN, revision=3), "trust", "replace the timestamp key")
    device.repository.rotate("timestamp")
    device.follows(seed=1, revision=3)


@pytest.mark.attack("A26")
def test_the_time_goes_back_no_further_than_was_ever_signed(tmp_path, monkeypatch):
    """The thief of the online keys dates back what has expired, for a device without a clock that restarts."""
    repo = TufRepository()
    client = TufClient(tmp_path / "trust", repo)
    set_clock(monkeypatch, repo.now.replace(year=1970))
    start = repo.now
    for role in ("root", "targets"):
        repo.roles[role].expires = start + timedelta(days=365)
        repo.publish(role)
    repo.now = start + timedelta(days=50)
    for role in ("snapshot", "timestamp"):
        repo.roles[role].expires = repo.now + timedelta(days=7)
        repo.publish(role)
    client.refresh()
    repo.now = start
    for role in ("snapshot", "timestamp"):
        repo.roles[role].expires = start + timedelta(days=7)
        repo.publish(role)
    for lost in (None, "record.a.json", "record.b.json"):
        if lost:
            (tmp_path / "trust" / lost).write_bytes(b"\0" * 512)
        with pytest.raises(ContractError, match=r"metadata that was signed at .* is known here"):
            client.refresh()


@pytest.mark.attack("A27")
def test_the_builder_key_vouches_for_its_own_families_only(device):
    evil = artifact(seed=7)
    digest = digest_of(evil)
    other = ids.model_name("other")
    thief = Thief(device, "builder", *ONLINE)
    for path in (trust.approved_path(MODEL, digest), trust.auto_path(other, digest)):
        thief.forge(trust.auto_role(MODEL), vouch(path, evil))
        device.refuses(release(digest, revision=2), "release", "is no target of family 'toy'")
    thief.forge(trust.auto_role(MODEL), vouch(trust.auto_path(MODEL, digest), evil))
    device.refuses(release(digest, revision=2), "fetch", "did not arrive")  # in its family its word counts
    device.repository.disable_auto(MODEL)
    device.replace_online_keys()
    device.broker.publish(device.repository)
    device.refuses(release(digest, revision=3), "release", "is no target of family 'toy'")


@pytest.mark.attack("A28")
def test_a_delegated_role_that_expired_is_refused_without_a_clock_too(tmp_path, monkeypatch):
    repo = TufRepository()
    client = TufClient(tmp_path / "trust", repo)
    role = trust.auto_role(MODEL)
    repo.delegate("targets", role, trust.auto_pattern(MODEL), life=timedelta(days=10))
    path = trust.auto_path(MODEL, digest_of(b"old"))
    repo.delegated[role].targets[path] = TargetFile.from_data(path, b"old", ["sha256"])
    repo.publish(role, "targets", "snapshot", "timestamp")
    set_clock(monkeypatch, repo.now.replace(year=1970))
    assert client.find(MODEL, digest_of(b"old")) == len(b"old")
    repo.now += timedelta(days=11)
    repo.publish("snapshot", "timestamp")
    with pytest.raises(ContractError, match=f"{role}.json is expired at"):
        client.find(MODEL, digest_of(b"old"))


@pytest.mark.attack("A29")
def test_a_record_that_names_no_keys_yet_keeps_its_floors(device):
    """Downgrading the record, or coming from an older version, does not let an old release in."""
    assert device.update(release(None, revision=5))["ok"]
    store = device.state / "trust"
    record = Slots(store).record()
    assert record is not None
    old = {name: record[name] for name in ("files", "accepted")}
    for _ in range(2):
        Slots(store).write_record(old)
    device.refuses(release(UNKNOWN, revision=4), "release", "revision 4 is older than 5")
    device.follows(seed=1, revision=6)
