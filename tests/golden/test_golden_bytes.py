"""Bytes written by every minor of version 1 of the contract: today's code reads them all, and writes the newest."""

import json

import msgpack
import pytest

from edge_runtime.contract import release
from edge_runtime.contract.codec import _READERS, MINOR, WINDOW, decode, encode
from edge_runtime.contract.packing import unpack_counts
from tests.golden import make, values

COUNTS = WINDOW.index("counts")
OLDER = (
    (make.MINOR_0, values.MINOR_0, 0),
    (make.MINOR_1, values.MINOR_1, 1),
    (make.MINOR_2, values.MINOR_2, 2),
)
NEW_IN_2 = {8}


def kept(name):
    return (make.FOLDER / name).read_bytes()


def unpacked(data):
    """The envelope with its counts unpacked: another zlib may compress the same counts to other bytes."""
    envelope = msgpack.unpackb(data)
    if envelope[2] == 2:
        envelope[6][COUNTS] = unpack_counts(envelope[6][COUNTS]).tolist()
    return envelope


def test_every_file_is_one_that_is_written():
    assert {path.name for path in make.FOLDER.iterdir()} == set(make.files())
    for folder, names, _ in OLDER:
        assert {f"{name}.msgpack" for name in names} == {path.name for path in folder.glob("*.msgpack")}


def test_every_kind_has_golden_bytes():
    for folder, names, minor in (*OLDER, (make.FOLDER, values.MESSAGES, MINOR)):
        heads = [msgpack.unpackb((folder / f"{name}.msgpack").read_bytes())[:3] for name in names]
        assert {kind for _, _, kind in heads} == set(_READERS) - (NEW_IN_2 if minor < 2 else set())
        assert {(major, found) for major, found, _ in heads} == {(1, minor)}


@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder, names, _ in OLDER for name in names], ids=str
)
def test_what_older_minors_wrote_is_read(folder, name):
    assert decode((folder / f"{name}.msgpack").read_bytes()) == values.MINOR_2[name]


@pytest.mark.parametrize(
    ("folder", "name", "minor"),
    [(folder, name, minor) for folder, names, minor in OLDER if minor > 0 for name in names],
    ids=str,
)
def test_what_older_minors_read_is_written_as_it_was(folder, name, minor):
    """A device or a centre of an older minor meets nothing new but the number, which it does not look at."""
    before = unpacked((folder / f"{name}.msgpack").read_bytes())
    now = unpacked(encode(values.MINOR_2[name]))
    assert (before[1], now[1]) == (minor, MINOR)
    assert before[2:] == now[2:]


def test_minor_2_reads_the_shadow_as_a_state_that_it_knows():
    status = msgpack.unpackb(kept("status-shadow.msgpack"))[6]
    assert [model["state"] for model in status["models"]] == ["probed", "committed"]


@pytest.mark.parametrize("folder", [folder for folder, _, _ in OLDER], ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", ["release.json", "facts.json"])
def test_what_older_minors_signed_and_computed_has_not_changed(folder, name):
    assert (folder / name).read_bytes() == kept(name)


def test_the_schemes_of_counts_that_are_written_all_have_golden_bytes():
    windows = [
        msgpack.unpackb(kept(f"{name}.msgpack")) for name in values.MESSAGES if name.startswith("window")
    ]
    assert {envelope[6][COUNTS][0] for envelope in windows} == {1, 9}


@pytest.mark.parametrize("name", values.MESSAGES)
def test_kept_bytes_are_read(name):
    assert decode(kept(f"{name}.msgpack")) == values.MESSAGES[name]


@pytest.mark.parametrize("name", values.MESSAGES)
def test_the_same_bytes_are_written(name):
    written = encode(values.MESSAGES[name])
    assert unpacked(written) == unpacked(kept(f"{name}.msgpack"))
    # Beside the packed counts the encoding leaves no choice: same values in the same order, same bytes.
    assert msgpack.packb(unpacked(written)) == msgpack.packb(unpacked(kept(f"{name}.msgpack")))
    if not name.startswith("window"):
        assert written == kept(f"{name}.msgpack")


def test_a_release_is_read_and_signed_over_the_same_bytes():
    assert release.from_payload(kept("release.json")) == values.RELEASE
    assert release.to_payload(values.RELEASE) == kept("release.json")
    assert release.from_payload(kept("release-shadow.json")) == values.SHADOWED
    assert release.to_payload(values.SHADOWED) == kept("release-shadow.json")
    assert release.from_payload(kept("release-strict.json")) == values.STRICT
    assert release.to_payload(values.STRICT) == kept("release-strict.json")


def test_layouts_and_places_in_a_rollout_stay_what_they_are():
    assert make.facts() == json.loads(kept("facts.json"))
