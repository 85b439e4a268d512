"""Bytes written by version 1 of the contract: today's code reads them, and writes the same."""

import json

import msgpack
import pytest

from edge_runtime.contract import release
from edge_runtime.contract.codec import _READERS, decode, encode, unpack_counts
from tests.golden import make, values


def kept(name):
    return (make.FOLDER / name).read_bytes()


def inflated(data):
    """The envelope with deflated counts unpacked: another zlib may compress the same counts to other bytes."""
    envelope = msgpack.unpackb(data)
    if "profile" in envelope[6]:
        envelope[6]["profile"]["counts"] = unpack_counts(envelope[6]["profile"]["counts"]).tolist()
    return envelope


def test_every_file_is_one_that_is_written():
    assert {path.name for path in make.FOLDER.iterdir()} == set(make.files())


def test_every_kind_has_golden_bytes():
    kinds = {msgpack.unpackb(kept(f"{name}.msgpack"))[2] for name in values.MESSAGES}
    assert kinds == set(_READERS)


@pytest.mark.parametrize("name", values.MESSAGES)
def test_kept_bytes_are_read(name):
    assert decode(kept(f"{name}.msgpack")) == values.MESSAGES[name]


@pytest.mark.parametrize("name", values.MESSAGES)
def test_the_same_bytes_are_written(name):
    written = encode(values.MESSAGES[name])
    assert inflated(written) == inflated(kept(f"{name}.msgpack"))
    # Beside the deflated counts the encoding leaves no choice: same values in the same order, same bytes.
    assert msgpack.packb(inflated(written)) == msgpack.packb(inflated(kept(f"{name}.msgpack")))
    if not name.startswith("window"):
        assert written == kept(f"{name}.msgpack")


def test_a_release_is_read_and_signed_over_the_same_bytes():
    assert release.from_payload(kept("release.json")) == values.RELEASE
    assert release.to_payload(values.RELEASE) == kept("release.json")


def test_layouts_and_places_in_a_rollout_stay_what_they_are():
    assert make.facts() == json.loads(kept("facts.json"))
