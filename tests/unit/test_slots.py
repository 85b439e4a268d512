"""Slots: the record and the models survive whatever happens to the power or the disk."""

import errno
import json
import os
import shutil
from itertools import count
from pathlib import Path

import pytest

from edge_runtime.adapters import disk
from edge_runtime.adapters.slots import Slots
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ArtifactError, ContractError
from tests.support.crash_model import distinct_states, materialise
from tests.support.recorder import Fault, Recorder

MODELS = {name: name.encode() * 5000 for name in "ABC"}
DIGESTS = {name: ids.digest_of(data) for name, data in MODELS.items()}
A, B, C = (DIGESTS[name] for name in "ABC")
NEVER = 1 << 60


@pytest.fixture
def slots(tmp_path):
    return Slots(tmp_path / "state")


def download(slots, name):
    """What a downloader does: writes the file and does not flush it."""
    slots.staging(DIGESTS[name]).unlink(missing_ok=True)
    with disk.append_to(slots.staging(DIGESTS[name])) as staging:
        staging.write(MODELS[name])


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


def test_a_copy_that_cannot_be_read_falls_back_to_the_one_before(slots, tmp_path, monkeypatch):
    slots.write_record({"n": 0})
    slots.write_record({"n": 1})
    newest = tmp_path / "state" / "record.b.json"
    real = Path.read_bytes

    def read_bytes(path):
        if path == newest:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    with monkeypatch.context() as worn:
        worn.setattr(Path, "read_bytes", read_bytes)
        assert slots.record() == {"n": 0}
        assert slots.damage == (f"{newest}: cannot be read (Input/output error)",)
        slots.write_record({"n": 2})  # over the one that cannot be read
    assert slots.record() == {"n": 2}
    assert not slots.damage


def test_a_copy_that_can_be_read_the_second_time_is_read(slots, monkeypatch):
    slots.write_record({"n": 0})
    slots.write_record({"n": 1})
    real, refused = Path.read_bytes, []

    def read_bytes(path):
        if path not in refused:
            refused.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    with monkeypatch.context() as worn:
        worn.setattr(Path, "read_bytes", read_bytes)
        assert slots.record() == {"n": 1}
    assert len(refused) == 2


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


def recorded(slots, tmp_path, **options):
    """The recorder of the folder, with one model as its blob and one as a download."""
    install(slots, "A")
    download(slots, "B")
    return Recorder(tmp_path, **options)


def test_a_model_that_cannot_be_read_is_not_there_until_a_download_takes_its_place(slots, tmp_path):
    recorder = recorded(slots, tmp_path)
    recorder.spoil(f"state/blobs/{A}.onnx")
    with recorder.standing():
        assert slots.has(A)
        assert not slots.has(A, verify=True)
        with pytest.raises(ArtifactError, match="nothing was downloaded"):
            slots.install(A)
        assert slots.blob(A).exists(), "the only copy is not deleted before another one is whole"
        install(slots, "A")
        assert slots.has(A, verify=True)


def test_a_model_that_cannot_be_read_once_is_there(slots, tmp_path):
    recorder = recorded(slots, tmp_path, fault=Fault(1, errno.EIO, reading=True))
    with recorder.standing():
        assert slots.has(A, verify=True)
    assert recorder.reads == 2


def test_a_download_that_cannot_be_read_is_deleted(slots, tmp_path):
    recorder = recorded(slots, tmp_path)
    recorder.spoil(f"state/staging/{B}.part")
    with recorder.standing():
        with pytest.raises(
            ArtifactError, match=r"cannot be read \(Input/output error\) and was deleted; fetch"
        ):
            slots.install(B)
        assert not slots.staging(B).exists()
        install(slots, "B")
    assert slots.has(B, verify=True)


def test_a_download_that_cannot_be_read_once_is_installed(slots, tmp_path):
    recorder = recorded(slots, tmp_path, fault=Fault(1, errno.EIO, reading=True))
    with recorder.standing():
        slots.install(B)
    assert slots.has(B, verify=True)


def test_a_download_that_can_neither_be_read_nor_deleted_says_so(slots, tmp_path):
    recorder = recorded(slots, tmp_path, fault=Fault(1, errno.EROFS))
    recorder.spoil(f"state/staging/{B}.part")
    with (
        recorder.standing(),
        pytest.raises(
            ArtifactError, match=r"cannot be deleted either \(Read-only file system\): check the disk"
        ),
    ):
        slots.install(B)


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
    """A device's life with its slots, and which records and models it was promised, by number of the change."""

    def __init__(self, root, **fault):
        self.root = root / "state"
        self.recorder = Recorder(root, **fault)
        self.recorded: list[tuple[int, int, dict[str, object]]] = []
        self.installed: list[tuple[int, str]] = []
        self.collected = NEVER

    def now(self):
        return len(self.recorder.changes)

    def record(self, slots, **record):
        begun = self.now()
        self.recorded.append((begun, NEVER, record))
        slots.write_record(record)
        self.recorded[-1] = (begun, self.now(), record)

    def install(self, slots, name):
        download(slots, name)
        slots.install(DIGESTS[name])
        self.installed.append((self.now(), name))

    def live(self):
        with self.recorder.standing():
            slots = Slots(self.root)
            self.record(slots, n=1, serving=None)
            self.install(slots, "A")
            self.record(slots, n=2, serving="A")
            self.install(slots, "B")
            self.record(slots, n=3, serving="B", previous="A")
            self.install(slots, "C")
            self.record(slots, n=4, serving="C", previous="B")
            self.collected = self.now()
            slots.collect({B, C})
            self.record(slots, n=5, serving="C", previous=None)

    def check(self, root, after):
        """The law, whatever instant the power failed."""
        slots = Slots(root)
        found = slots.record()
        allowed: list[dict[str, object] | None] = [None]
        for begun, done, record in self.recorded:
            if begun < after:
                allowed = [record] if done <= after else [*allowed, record]
        assert found in allowed
        for at, name in self.installed:
            if at <= after and (name != "A" or after <= self.collected):
                assert slots.has(DIGESTS[name], verify=True), f"installed model {name} is lost"
        for path in (root / "blobs").glob("*.onnx"):
            assert slots.has(ids.digest(path.stem), verify=True), "a torn model under a good name"
        if found is not None:
            for slot in ("serving", "previous"):
                if found.get(slot):
                    assert slots.has(DIGESTS[found[slot]], verify=True), (
                        f"the record names a lost model: {found}"
                    )
        slots.write_record({"n": 99})
        assert slots.record() == Slots(root).record() == {"n": 99}
        for name in "ABC":
            install(slots, name)
            assert slots.has(DIGESTS[name], verify=True)


def test_the_power_fails_after_every_change_of_the_disk(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    life = Life(home)
    life.live()
    states = distinct_states(life.recorder.changes, at_most=12)
    assert len(states) > 150, "the disk saw too few changes for this to mean something"
    for number, state in enumerate(states):
        root = tmp_path / str(number)
        materialise(state, root)
        life.check(root / "state", state.after)
        shutil.rmtree(root)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, 0])
def test_the_disk_refuses_every_call_once_and_life_goes_on(tmp_path, code):
    for at in count(1):
        root = tmp_path / str(at)
        root.mkdir()
        life = Life(root, fault=Fault(at, code))
        said: int | None = 0
        try:
            life.live()
        except OSError as e:
            said = e.errno
        life.check(life.root, life.now())
        if life.recorder.calls < at:
            assert at > 40, "the disk saw too few calls for this to mean something"
            return
        assert said == code
