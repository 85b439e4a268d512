"""The repository on disk: keys, roles, what leaves for the broker. Crashes are in ``test_store.py``."""

import contextlib
import json
import os
import re
import shutil
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from converters.gate import MAX_ARTIFACT_BYTES
from edge_runtime.contract import bundle, codec, trust
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.topics import BLOB, CHUNK_BYTES, TRUST, Topics
from edge_runtime.truststore import TrustStore
from tests.publisher import FLEET, MODEL, artifact, put
from trainer.keyring import KEYS
from trainer.metadata import MetadataSet
from trainer.outgoing import Collected
from trainer.publish import PublishError, Repository
from trainer.store import SPARE_BYTES


@pytest.fixture
def model(tmp_path):
    return put(tmp_path, artifact())


@pytest.fixture
def repository(tmp_path):
    return Repository.create(tmp_path / "repository")


def move_away(tmp_path, *roles):
    (tmp_path / "safe").mkdir(exist_ok=True)
    for name in (name for role in roles for name in KEYS[role]):
        shutil.move(tmp_path / "repository" / "keys" / f"{name}.json", tmp_path / "safe")


@contextlib.contextmanager
def device(tmp_path, repository):
    """A device that was provisioned with the first root sees what is current; it remembers from visit to visit."""
    with TrustStore(tmp_path / "device", repository.pinned_root.read_bytes()) as store:
        store.refresh(repository.bundle(1))
        yield store


def sees(tmp_path, repository, digest):
    with device(tmp_path, repository) as store:
        return store.find(MODEL, digest) is not None


def test_keys_are_their_owners_alone_and_the_readme_says_which_must_leave(repository, tmp_path):
    keys = tmp_path / "repository" / "keys"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    private = sorted(path.name for path in keys.glob("*.json"))
    assert private == sorted(f"{name}.json" for names in KEYS.values() for name in names)
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys.glob("*.json")} == {0o600}
    readme = (keys / "README.md").read_text()
    offline = [line for line in readme.splitlines() if "**offline**" in line]
    assert ["root-1" in line or "targets-1" in line for line in offline] == [True, True]


def test_thresholds_are_two_of_three_and_two_of_two(repository):
    root = json.loads(repository.pinned_root.read_bytes())["signed"]
    found = {name: (len(role["keyids"]), role["threshold"]) for name, role in root["roles"].items()}
    assert found == {"root": (3, 2), "targets": (2, 2), "snapshot": (1, 1), "timestamp": (1, 1)}
    assert root["consistent_snapshot"] is True


def test_creating_again_opens_what_is_there(repository, tmp_path):
    before = repository.pinned_root.read_bytes()
    assert Repository.create(tmp_path / "repository").pinned_root.read_bytes() == before


def test_opening_nothing_says_what_to_do(tmp_path):
    with pytest.raises(PublishError, match="no repository here; make one with: skiff pki init"):
        Repository(tmp_path / "elsewhere")


def test_lives_are_a_year_offline_and_a_week_online(tmp_path):
    now = datetime(2030, 1, 1, tzinfo=UTC)
    repository = Repository.create(tmp_path / "r", clock=lambda: now)
    lives = {role: (expires - now).days for role, expires in repository.expiries().items()}
    assert lives == {"root": 365, "targets": 365, "timestamp": 7, "snapshot": 7}


def test_outgoing_is_every_chunk_and_then_a_bundle_for_every_root(repository, tmp_path):
    big = artifact(trees=60)
    assert len(big) > 2 * CHUNK_BYTES
    published = repository.add(put(tmp_path, big), role="targets")
    repository.rotate("timestamp")
    sent = list(repository.outgoing(Topics(FLEET), [published.digest]))
    chunks, packed, bundles = sent[:-4], sent[-4::2], sent[-3::2]
    assert [topic for topic, _, _ in chunks] == [
        f"skiff/1/{FLEET}/blob/{published.digest}/{i}" for i in range(len(chunks))
    ]
    assert {len(data) for _, data, _ in chunks[:-1]} == {CHUNK_BYTES}
    assert b"".join(data for _, data, _ in chunks) == big
    assert {delivery for _, _, delivery in chunks} == {BLOB}
    assert [topic for topic, _, _ in bundles] == [f"skiff/1/{FLEET}/tuf/{version}" for version in (1, 2)]
    assert [topic for topic, _, _ in packed] == [f"skiff/1/{FLEET}/tuf/{version}z" for version in (1, 2)]
    assert {delivery for _, _, delivery in [*packed, *bundles]} == {TRUST}
    assert [bundle.unpack(data) for _, data, _ in packed] == [codec.decode(data) for _, data, _ in bundles]
    assert [codec.decode(data) for _, data, _ in bundles] == [repository.bundle(1), repository.bundle(2)]
    assert [topic for topic, _, _ in packed] == [f"skiff/1/{FLEET}/tuf/{version}z" for version in (1, 2)]
    assert [bundle.unpack(data) for _, data, _ in packed] == [repository.bundle(1), repository.bundle(2)]
    assert "2.root.json" in dict(repository.bundle(1).files)
    assert "2.root.json" not in dict(repository.bundle(2).files)
    withdrawn = list(repository.withdrawn(Topics(FLEET), published))
    assert [(t, b"") for t, _, _ in chunks] == [(topic, data) for topic, data, _ in withdrawn]


def test_outgoing_refuses_what_is_unknown_or_damaged(repository, model, tmp_path):
    published = repository.add(model, role="targets")
    with pytest.raises(PublishError, match="is not published"):
        list(repository.outgoing(Topics(FLEET), [Digest("0" * 64)]))
    path = tmp_path / "repository" / "targets" / published.path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PublishError, match="damaged"):
        list(repository.outgoing(Topics(FLEET), [published.digest]))


def test_automatic_publishing_is_off_until_the_targets_keys_allow_it(repository, model, tmp_path):
    with pytest.raises(PublishError, match=f"skiff pki init {tmp_path / 'repository'} --auto {MODEL}"):
        repository.add(model)
    assert repository.published() == ()
    repository.enable_auto(MODEL)
    assert repository.auto_models == (MODEL,)
    published = repository.add(model)
    assert published.path == f"auto/{MODEL}/{digest_of(model.read_bytes())}.onnx"
    assert repository.published() == (published,)


def test_automatic_publishing_needs_no_offline_key(repository, model, tmp_path):
    repository.enable_auto(MODEL)
    move_away(tmp_path, "root", "targets", "director")
    published = Repository(tmp_path / "repository").add(model, role="auto")
    assert published.role == "auto"
    assert sees(tmp_path, repository, published.digest)


@pytest.mark.parametrize("leave", [0, 1])
def test_approval_names_the_keys_it_misses(repository, model, tmp_path, leave):
    move_away(tmp_path, "targets")
    for name in KEYS["targets"][:leave]:
        shutil.copy(tmp_path / "safe" / f"{name}.json", tmp_path / "repository" / "keys")
    message = rf"publishing .* needs 2 of the 2 targets keys, and {leave} are in .*targets-1.json and targets-2.json"
    with pytest.raises(PublishError, match=message):
        repository.add(model, role="targets")
    assert repository.published() == ()


def test_a_family_cannot_use_the_delegation_of_another(repository, tmp_path):
    repository.enable_auto(MODEL)
    with pytest.raises(PublishError, match="'other' may not be published"):
        repository.add(put(tmp_path, artifact(name="other")))


def test_disabling_automatic_publishing_withdraws_what_it_published(repository, model, tmp_path):
    repository.enable_auto(MODEL)
    digest = repository.add(model).digest
    assert sees(tmp_path, repository, digest)
    repository.disable_auto(MODEL)
    assert repository.published() == ()
    assert not sees(tmp_path, repository, digest)
    repository.enable_auto(MODEL)
    assert not sees(tmp_path, repository, digest), "the models of before must not come back by themselves"


def test_adding_twice_changes_nothing(repository, model):
    first = repository.add(model, role="targets")
    before = repository.bundle(1)
    assert repository.add(model, role="targets") == first
    assert repository.bundle(1) == before


def test_revoking_withdraws_and_forbids(repository, model, tmp_path):
    digest = repository.add(model, role="targets").digest
    repository.revoke(digest)
    assert repository.published() == ()
    assert repository.revoked == {digest}
    with pytest.raises(PublishError, match="was revoked"):
        repository.add(model, role="targets")
    with device(tmp_path, repository) as store:
        assert store.is_revoked(digest)


def test_retiring_makes_room_and_can_be_undone(repository, model):
    digest = repository.add(model, role="targets").digest
    announced = repository.retire(digest, dry_run=True)
    assert [published.digest for published in repository.published()] == [digest]
    assert repository.retire(digest) == announced
    assert repository.published() == ()
    assert repository.retire(digest).metadata == ()
    assert repository.add(model, role="targets").digest == digest


@pytest.mark.parametrize("look", [False, True])
def test_a_bundle_is_of_one_moment_whoever_commits_meanwhile(repository, tmp_path, monkeypatch, look):
    other = Repository(tmp_path / "repository")
    reader = Repository(tmp_path / "repository", look=look)
    real = MetadataSet.file_names
    threads: list[threading.Thread] = []

    def names(self, root_version):
        if not threads:  # between what was parsed and what is read now
            threads.append(threading.Thread(target=other.refresh))
            threads[0].start()
            threads[0].join(0.5)
        return real(self, root_version)

    monkeypatch.setattr(MetadataSet, "file_names", names)
    found = dict(reader.bundle(1).files)
    threads[0].join(20)
    timestamp = json.loads(found["timestamp.json"])["signed"]
    version = timestamp["meta"]["snapshot.json"]["version"]
    assert f"{version}.snapshot.json" in found
    with TrustStore(tmp_path / "device", repository.pinned_root.read_bytes()) as store:
        store.refresh_from(found.get)


def test_metadata_that_does_not_belong_together_is_not_given_out(repository, tmp_path, monkeypatch):
    """Somebody who heeds no lock, such as a restore, replaces files while they are read."""
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "repository", other)
    Repository(other).refresh()
    real = Path.read_bytes

    def read(path):
        if path.name == "timestamp.json" and path.parent.parent.name == "repository" and reading:
            path = other / "metadata" / path.name
        return real(path)

    def collecting(folder, names):
        reading.append(1)
        return collect(folder, names)

    reading: list[int] = []
    collect = Collected.read
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(Collected, "read", collecting)
    with pytest.raises(PublishError, match=r"2\.snapshot\.json"):
        repository.bundle(1)


def test_metadata_that_outgrows_a_message_is_refused_before_it_is_written(
    repository, model, tmp_path, monkeypatch
):
    before = repository.bundle(1)
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", len(codec.encode(before)) + 100)
    with pytest.raises(
        PublishError, match=r"1 models does not fit into one message .* retire models .* skiff pki retire"
    ):
        repository.add(model, role="targets")
    assert Repository(tmp_path / "repository").bundle(1) == before


@pytest.mark.parametrize("role", ["targets", "auto"])
def test_the_size_of_the_metadata_stops_no_revocation(repository, tmp_path, monkeypatch, role):
    repository.enable_auto(MODEL)
    models = [put(tmp_path, artifact(seed=seed)) for seed in range(5)]
    size = len(codec.encode(repository.bundle(1)))
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", size + SPARE_BYTES + 2000)
    published, problem = [], ""
    for path in models:
        try:
            published.append(repository.add(path, role=role).digest)
        except PublishError as e:
            problem = str(e)
    assert re.search(r"bytes of .* are kept for revocations.* skiff pki retire", problem)
    assert 2 <= len(published) < 5, "full"
    repository.retire(published.pop())
    published.append(repository.add(models[-1], role=role).digest)
    repository.rotate("timestamp")
    repository.renew()
    strangers = [Digest(f"{number:064x}") for number in range(100)]
    for number, digest in enumerate([*published, *strangers[:3]], 1):
        repository.revoke(digest)
        assert len(repository.revoked) == number
    repository.revoke(*strangers)
    with device(tmp_path, repository) as found:
        assert all(found.is_revoked(digest) for digest in [*published, *strangers])
    repository.retire(*published)
    assert repository.revoked >= set(published), "what is retired stays revoked"


@pytest.mark.attack("A92")
@pytest.mark.parametrize("content", [b"", b"not onnx", None])
def test_what_fails_the_gate_is_not_published(repository, tmp_path, content):
    path = put(tmp_path, artifact()[:-7] if content is None else content)
    with pytest.raises(ArtifactError):
        repository.add(path, role="targets")
    assert repository.published() == ()


def test_what_cannot_travel_or_be_read_is_refused(repository, tmp_path):
    big = tmp_path / "big.onnx"
    big.touch()
    os.truncate(big, MAX_ARTIFACT_BYTES + 1)
    with pytest.raises(PublishError, match=f"models have {MAX_ARTIFACT_BYTES} at most"):
        repository.add(big, role="targets")
    with pytest.raises(PublishError, match="cannot be read"):
        repository.add(tmp_path / "absent.onnx", role="targets")
    with pytest.raises(PublishError, match="'builder' is not one of auto, targets"):
        repository.add(big, role="builder")


@pytest.mark.attack("A91")
def test_foreign_metadata_is_never_signed_again(repository, model, tmp_path):
    path = tmp_path / "repository" / "metadata" / "1.targets.json"
    document = json.loads(path.read_bytes())
    document["signed"][trust.TABLE]["revoked"] = ["0" * 64]
    path.write_text(json.dumps(document))
    with pytest.raises(PublishError, match="damaged"):
        repository.add(model, role="targets")


def test_a_swapped_key_file_is_noticed(repository, model, tmp_path):
    keys = tmp_path / "repository" / "keys"
    document = json.loads((keys / "snapshot.json").read_bytes())
    document["keyid"] = json.loads((keys / "timestamp.json").read_bytes())["keyid"]
    (keys / "snapshot.json").write_text(json.dumps(document))
    with pytest.raises(PublishError, match="the keyid is not that of the key"):
        repository.add(model, role="targets")


def test_refreshing_extends_the_online_roles_only(tmp_path):
    now = datetime(2030, 1, 1, tzinfo=UTC)
    Repository.create(tmp_path / "repository", clock=lambda: now)
    move_away(tmp_path, "root", "targets", "builder", "director")
    later = Repository(tmp_path / "repository", clock=lambda: now + timedelta(days=5))
    later.refresh()
    lives = {role: (expires - now).days for role, expires in later.expiries().items()}
    assert lives == {"root": 365, "targets": 365, "timestamp": 12, "snapshot": 12}


def test_renewing_extends_everything_and_devices_follow(tmp_path):
    start = datetime.now(UTC)
    repository = Repository.create(tmp_path / "repository")
    repository.enable_auto(MODEL)
    with device(tmp_path, repository):
        pass
    later = Repository(tmp_path / "repository", clock=lambda: start + timedelta(days=300))
    later.renew()
    assert later.root_version == 2
    assert min(later.expiries().values()) > start + timedelta(days=306)
    assert later.expiries()["auto-toy"] > start + timedelta(days=664)
    with device(tmp_path, later) as store:
        assert not store.is_revoked(Digest("0" * 64))


@pytest.mark.parametrize("role", KEYS)
def test_devices_follow_new_keys_and_the_old_ones_are_gone(repository, tmp_path, role):
    repository.enable_auto(MODEL)
    digest = repository.add(put(tmp_path, artifact()), role="auto").digest
    assert sees(tmp_path, repository, digest)
    keys = tmp_path / "repository" / "keys"
    before = {name: (keys / f"{name}.json").read_bytes() for name in KEYS[role]}
    repository.rotate(role)
    repository.rotate(role)
    assert {path.name for path in keys.glob("*.json")} == {
        f"{n}.json" for names in KEYS.values() for n in names
    }
    for name, old in before.items():
        assert (keys / f"{name}.json").read_bytes() != old
        (keys / f"{name}.old.json").write_bytes(old)  # whoever kept them can sign nothing that counts
    assert sees(tmp_path, repository, digest)
    again = Repository(tmp_path / "repository")
    assert sees(tmp_path, again, again.add(put(tmp_path, artifact(seed=1)), role="targets").digest)


def test_rotating_without_the_keys_that_must_sign_makes_no_new_ones(repository, tmp_path):
    move_away(tmp_path, "root", "targets")
    before = sorted((tmp_path / "repository" / "keys").iterdir())
    for role, owner in (("timestamp", "root"), ("director", "targets")):
        with pytest.raises(PublishError, match=f"replacing the {role} keys needs 2 of the . {owner} keys"):
            repository.rotate(role)
    assert sorted((tmp_path / "repository" / "keys").iterdir()) == before


def test_publishers_take_turns(repository, tmp_path):
    models = [put(tmp_path, artifact(seed=seed)) for seed in range(4)]
    others = [Repository(tmp_path / "repository") for _ in models]
    threads = [
        threading.Thread(target=other.add, args=(path,), kwargs={"role": "targets"})
        for other, path in zip(others, models, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {p.digest for p in repository.published()} == {digest_of(path.read_bytes()) for path in models}
