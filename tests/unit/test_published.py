"""What the coordinator takes for published is what the publisher and its devices do."""

import json

import pytest

from aggregator.adapters.published import director_keys, is_published
from edge_runtime.contract.ids import Digest
from tests.publisher import MODEL, artifact, put
from trainer.publish import Repository


@pytest.fixture
def repository(tmp_path):
    return Repository.create(tmp_path / "repository")


@pytest.fixture
def metadata(tmp_path):
    return tmp_path / "repository" / "metadata"


@pytest.fixture
def model(tmp_path):
    return put(tmp_path, artifact())


def test_approved_and_automatic_models_are_published_and_no_others(repository, metadata, model, tmp_path):
    digest = repository.add(model, role="targets").digest
    repository.enable_auto(MODEL)
    automatic = repository.add(put(tmp_path, artifact(seed=1)), role="auto").digest
    assert is_published(metadata, digest) is True
    assert is_published(metadata, automatic) is True
    assert is_published(metadata, Digest("0" * 64)) is False


@pytest.mark.parametrize("how", ["revoked", "retired", "automatic models forbidden"])
def test_what_was_withdrawn_is_published_no_more_though_its_file_stays(
    repository, metadata, model, tmp_path, how
):
    repository.enable_auto(MODEL)
    published = repository.add(model, role="auto")
    assert is_published(metadata, published.digest) is True
    {
        "revoked": lambda: repository.revoke(published.digest),
        "retired": lambda: repository.retire(published.digest),
        "automatic models forbidden": lambda: repository.disable_auto(MODEL),
    }[how]()
    assert (tmp_path / "repository" / "targets" / published.path).exists()
    assert is_published(metadata, published.digest) is False


def test_only_the_metadata_that_the_timestamp_stands_for_counts(repository, metadata, model):
    before = (metadata / "timestamp.json").read_bytes()
    digest = repository.add(model, role="targets").digest
    (metadata / "timestamp.json").write_bytes(before)  # a crash before the last file
    assert is_published(metadata, digest) is False


def test_the_directors_key_is_the_one_that_devices_take_releases_from(repository, metadata):

    def held():
        return frozenset([json.loads(repository.director_key.read_text())["keyid"]])

    first = held()
    assert director_keys(metadata) == first
    repository.rotate("director")
    assert director_keys(metadata) == held() != first
    (metadata / "timestamp.json").write_text("{")
    assert (
        director_keys(metadata) is None
    )  # a halt must not fail for want of a file that devices do not ask for


def test_where_no_repository_is_nothing_is_known(tmp_path):
    assert is_published(tmp_path / "metadata", Digest("0" * 64)) is None
    assert director_keys(tmp_path / "metadata") is None


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"signed": 1}'])
def test_damaged_metadata_publishes_nothing_and_is_logged(repository, metadata, model, caplog, name, content):
    digest = repository.add(model, role="targets").digest
    (metadata / name).write_bytes(content)
    assert is_published(metadata, digest) is False
    assert "metadata_unreadable" in caplog.text


@pytest.mark.parametrize("name", ["2.snapshot.json", "2.targets.json"])
def test_missing_metadata_publishes_nothing_and_is_logged(repository, metadata, model, caplog, name):
    digest = repository.add(model, role="targets").digest
    (metadata / name).unlink()
    assert is_published(metadata, digest) is False
    assert "metadata_unreadable" in caplog.text
