"""Slots: the record and the models survive whatever happens to the power or the disk."""

import json
import os
from itertools import count

import pytest

from edge_runtime.adapters.slots import Slots
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ArtifactError, ContractError
from tests.support.crashes import CrashingDisk, PowerCut

MODELS = {name: name.encode() * 5000 for name in "ABC"}
DIGESTS = {name: ids.digest_of(data) for name, data in MODELS.items()}
A, B, C = (DIGESTS[name] for name in "ABC")


@pytest.fixture
def slots(tmp_path):
    return Slots(tmp_path / "state")


def download(slots, name):
    """What a downloader does: writes the file and does not flush it."""
    handle = os.open(slots.staging(DIGESTS[name]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.write(handle, MODELS[name])
    finally:
        os.close(handle)


def install(slots, name):
    download(slots, name)
    return slots.install(DIGESTS[name])


# ── the record ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_folder_has_no_record(slots):
    assert slots.record() is None
    assert not slots.damage


def test_the_newest_record_is_read(slots, tmp_path):
    for n in range(5):
        slots.write_record({"n": n, "nested": {"list": [1, "två"], "none": None}})
        assert slots.record() == Slots(tmp_path / "state").record()
        assert slots.record()["n"] == n
    assert not slots.damage


def flip(data):
    return data.replace(b'"n":1', b'"n":7')


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda _: b"",
        lambda data: data[: len(data) // 2],
        lambda _: b"\0" * 100,
        lambda _: b"[" * 100_000,
        lambda _: b"{}",
        lambda _: b'{"generation": 9, "record": [], "sha256": "x"}',
        lambda data: data.replace(b'"generation":2', b'"generation":"2"'),
    ],
)
def test_a_damaged_copy_falls_back_to_the_one_before(slots, tmp_path, damage):
    slots.write_record({"n": 0})
    slots.write_record({"n": 1})
    newest = tmp_path / "state" / "record.b.json"
    newest.write_bytes(damage(newest.read_bytes()))
    again = Slots(tmp_path / "state")
    assert again.record() == {"n": 0}
    assert len(again.damage) == 1
    assert str(newest) in again.damage[0]
    again.write_record({"n": 2})  # over the damaged copy
    assert again.record() == {"n": 2}
    assert not again.damage


def test_two_damaged_copies_are_no_record_and_say_so(slots, tmp_path):
    slots.write_record({"n": 0})
    slots.write_record({"n": 1})
    for name in ("record.a.json", "record.b.json"):
        (tmp_path / "state" / name).write_bytes(b"x")
    assert slots.record() is None
    assert len(slots.damage) == 2
    slots.write_record({"n": 2})
    assert slots.record() == {"n": 2}


def test_a_record_with_a_raised_generation_needs_its_checksum(slots, tmp_path):
    slots.write_record({"n": 0})
    path = tmp_path / "state" / "record.a.json"
    document = json.loads(path.read_bytes())
    document["record"]["n"] = 5
    (tmp_path / "state" / "record.b.json").write_text(json.dumps({**document, "generation": 10}))
    assert slots.record() == {"n": 0}


def test_what_json_cannot_hold_is_refused_before_anything_is_written(slots):
    slots.write_record({"n": 0})
    for wrong in ({"n": float("nan")}, {"n": object()}):
        with pytest.raises((ValueError, TypeError)):
            slots.write_record(wrong)
    assert slots.record() == {"n": 0}


# ── models ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_download_becomes_a_model(slots):
    assert not slots.has(A)
    path = install(slots, "A")
    assert path == slots.blob(A)
    assert path.name == f"{A}.onnx"
    assert path.read_bytes() == MODELS["A"]
    assert slots.has(A)
    assert slots.has(A, verify=True)
    assert not slots.staging(A).exists()
    assert slots.install(A) == path  # again, without a download


def test_a_wrong_download_is_deleted_and_named(slots):
    slots.staging(A).write_bytes(MODELS["B"])
    with pytest.raises(ArtifactError, match=f"model {A}: the download has SHA-256 {B} and was deleted"):
        slots.install(A)
    assert not slots.staging(A).exists()
    assert not slots.has(A)
    with pytest.raises(ArtifactError, match="nothing was downloaded"):
        slots.install(A)


def test_a_damaged_model_is_replaced_by_a_new_download(slots):
    install(slots, "A")
    slots.blob(A).write_bytes(b"rotten")
    assert slots.has(A)
    assert not slots.has(A, verify=True)
    with pytest.raises(ArtifactError, match="nothing was downloaded"):
        slots.install(A)
    install(slots, "A")
    assert slots.has(A, verify=True)


def test_a_partial_download_survives_a_restart(slots, tmp_path):
    slots.staging(A).write_bytes(MODELS["A"][:100])
    assert Slots(tmp_path / "state").staging(A).read_bytes() == MODELS["A"][:100]


def test_what_is_not_kept_is_collected(slots, tmp_path):
    for name in "ABC":
        install(slots, name)
    download(slots, "A")
    download(slots, "B")
    (tmp_path / "state" / "blobs" / "notes.onnx").write_text("not ours")
    assert slots.collect({B}) == sorted([A, C])
    assert [slots.has(digest) for digest in (A, B, C)] == [False, True, False]
    assert slots.staging(B).exists()
    assert not slots.staging(A).exists()
    assert (tmp_path / "state" / "blobs" / "notes.onnx").exists()
    assert slots.collect({B}) == []


@pytest.mark.parametrize("name", ["../escape", "x", "", "A" * 64])
def test_a_digest_is_checked_before_it_becomes_a_path(slots, name):
    for path in (slots.blob, slots.staging, slots.has, slots.install):
        with pytest.raises(ContractError, match="not a SHA-256 digest"):
            path(name)


# ── power and disk ─────────────────────────────────────────────────────────────────────────────────────


class Life:
    """A device's life with its slots, and what it was promised on the way."""

    def __init__(self, root):
        self.root = root
        self.recorded: list[dict[str, object]] = []
        self.writing: dict[str, object] | None = None
        self.installed: set[str] = set()

    def record(self, slots, **record):
        self.writing = record
        slots.write_record(record)
        self.recorded.append(record)
        self.writing = None

    def install(self, slots, name):
        download(slots, name)
        slots.install(DIGESTS[name])
        self.installed.add(name)

    def live(self):
        slots = Slots(self.root)
        self.record(slots, n=1, serving=None)
        self.install(slots, "A")
        self.record(slots, n=2, serving="A")
        self.install(slots, "B")
        self.record(slots, n=3, serving="B", previous="A")
        self.install(slots, "C")
        self.record(slots, n=4, serving="C", previous="B")
        self.installed.discard("A")
        slots.collect({B, C})
        self.record(slots, n=5, serving="C", previous=None)

    def check(self):
        """The law, whatever instant the power failed."""
        slots = Slots(self.root)
        found = slots.record()
        allowed = [self.recorded[-1] if self.recorded else None]
        if self.writing is not None:
            allowed.append(self.writing)
        assert found in allowed
        for name in self.installed:
            assert slots.has(DIGESTS[name], verify=True), f"installed model {name} is lost"
        for path in (self.root / "blobs").glob("*.onnx"):
            assert slots.has(ids.digest(path.stem), verify=True), "a torn model under a good name"
        if found is not None:
            for slot in ("serving", "previous"):
                if found.get(slot):
                    assert slots.has(DIGESTS[found[slot]], verify=True), (
                        f"the record names a lost model: {found}"
                    )
        slots.write_record({"n": 99})
        assert slots.record() == Slots(self.root).record() == {"n": 99}
        for name in "ABC":
            install(slots, name)
            assert slots.has(DIGESTS[name], verify=True)


@pytest.mark.parametrize("lose_data", [False, True], ids=["data kept", "data lost"])
@pytest.mark.parametrize("lose_names", [False, True], ids=["names kept", "names lost"])
def test_the_power_fails_before_every_change_of_the_disk(tmp_path, lose_data, lose_names):
    for break_at in count(1):
        root = tmp_path / str(break_at)
        life = Life(root)
        disk = CrashingDisk(root, break_at=break_at)
        with pytest.MonkeyPatch.context() as patch:
            disk.stand_before(patch)
            try:
                life.live()
            except PowerCut:
                lived = False
            else:
                lived = True
        disk.crash(lose_data=lose_data, lose_names=lose_names)
        life.check()
        if lived:
            assert break_at > 40, "the disk saw too few changes for this to mean something"
            return


def test_the_disk_refuses_every_change_once_and_life_goes_on(tmp_path):
    for break_at in count(1):
        root = tmp_path / str(break_at)
        life = Life(root)
        disk = CrashingDisk(root, break_at=break_at, full=True)
        with pytest.MonkeyPatch.context() as patch:
            disk.stand_before(patch)
            try:
                life.live()
            except OSError:
                failed = True
            else:
                failed = False
        life.check()
        if not failed:
            return
