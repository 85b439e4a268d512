"""The recorder writes down what was asked of the disk, and the model tells every state that a crash may leave."""

import errno
import io
import os
import random
import shutil
import tempfile
from itertools import islice
from pathlib import Path

import pytest

from edge_runtime.adapters import disk
from tests.support.crash_model import EXHAUSTIVE, PAGE, SECTOR, Machine, distinct_states, materialise
from tests.support.recorder import (
    Create,
    Fault,
    Link,
    MakeFolder,
    Recorder,
    Remove,
    Rename,
    Sync,
    SyncFolder,
    Truncate,
    Write,
)


@pytest.fixture
def recorder(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    return Recorder(root)


def recorded(recorder, act):
    with recorder.standing():
        act(recorder.root)
    return recorder.changes


def found(changes, after, *, first=(), at_most=2000):
    """The trees that a crash after that many changes may leave."""
    machine = Machine(dict(first), (), {name: -n for n, (name, _) in enumerate(first, 1)})
    for change in changes[:after]:
        machine.apply(change)
    states = islice(machine.now().states(random.Random(0)), at_most)
    return {tuple(sorted(state.files.items())) for state in states}


# ── the recorder ───────────────────────────────────────────────────────────────────────────────────────


def test_a_durable_replacement_is_recorded_call_by_call(recorder):
    changes = recorded(recorder, lambda root: disk.replace_file(root / "a", b"data"))
    node = changes[0].node
    assert changes == [
        Create("a.new", node),
        Write("a.new", node, 0, b"data"),
        Sync("a.new", node),
        Rename("a.new", node, "a"),
        SyncFolder(""),
    ]
    assert recorder.calls == len(changes)


def test_appending_cutting_and_writing_over_have_their_offsets(recorder):
    def act(root):
        path = root / "a"
        for data in (b"12", b"345"):
            with disk.append_to(path) as file:
                file.write(data)
        disk.cut(path, 4)
        with path.open("r+b") as file:
            file.seek(1)
            file.write(b"x")
            file.flush()
            file.truncate(2)
        with path.open("w") as text:
            text.write("y")

    changes = recorded(recorder, act)
    kinds = [type(change) for change in changes]
    assert kinds == [Create, Write, Write, Truncate, Write, Truncate, Truncate, Write]
    assert [c.offset for c in changes if isinstance(c, Write)] == [0, 2, 1, 0]
    assert [c.size for c in changes if isinstance(c, Truncate)] == [4, 2, 0]
    assert found(changes, 4) >= {(("a", b"1234"),)}


def test_what_libraries_write_with_is_recorded(recorder):
    """Temporary files, text files, links, and whole folders that are deleted: what python-tuf does in its folder."""

    def act(root):
        (root / "folder").mkdir()
        with tempfile.NamedTemporaryFile(dir=root / "folder", delete=False) as file:
            file.write(b"1")
        shutil.move(file.name, root / "folder/b")
        (root / "folder/c").write_text("2", encoding="utf-8")
        (root / "folder/d").symlink_to("c")
        (root / "folder/e").touch()
        shutil.rmtree(root / "folder")

    changes = recorded(recorder, act)
    kinds = [type(change) for change in changes]
    assert kinds[:8] == [MakeFolder, Create, Write, Rename, Create, Write, Link, Create]
    assert kinds[8:] == [Remove] * 5
    assert recorder.nodes == {}


def test_nothing_else_is_recorded_and_all_is_given_back(recorder, tmp_path):
    before = (os.open, os.write, io.open, open)

    def act(root):
        (tmp_path / "other").write_bytes(b"x")
        (root / "missing").unlink(missing_ok=True)
        assert (tmp_path / "other").read_bytes() == b"x"

    assert recorded(recorder, act) == []
    assert (os.open, os.write, io.open, open) == before


def test_what_it_cannot_record_it_refuses(recorder):
    (recorder.root / "a").write_bytes(b"x")
    with recorder.standing(), pytest.raises(AssertionError, match=r"os\.link .*teach the recorder"):
        os.link(recorder.root / "a", recorder.root / "b")


@pytest.mark.parametrize("lasting", [False, True])
def test_a_fault_hits_the_call_it_is_meant_for(recorder, lasting):
    recorder.fault = Fault(3, errno.EIO, lasting)
    with recorder.standing():
        with pytest.raises(OSError, match="Input/output error"):
            disk.replace_file(recorder.root / "a", b"data")  # its third call is to flush
        assert [type(change) for change in recorder.changes] == [Create, Write]
        if lasting:
            with pytest.raises(OSError, match="Input/output error"):
                disk.replace_file(recorder.root / "a", b"data")
        else:
            disk.replace_file(recorder.root / "a", b"data")


def test_a_short_write_is_finished_by_who_asked(recorder):
    recorder.fault = Fault(2, code=0)
    changes = recorded(recorder, lambda root: disk.replace_file(root / "a", b"data"))
    assert [c.data for c in changes if isinstance(c, Write)] == [b"da", b"ta"]
    assert recorder.shortened == 1
    assert (recorder.root / "a").read_bytes() == b"data"


# ── the model ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_replaced_file_is_the_old_or_the_new_one_at_every_instant(recorder):
    changes = recorded(recorder, lambda root: disk.replace_file(root / "a", b"new"))
    first = (("a", b"old"),)
    for after in range(len(changes) + 1):
        contents = {dict(files)["a"] for files in found(changes, after, first=first)}
        assert contents == ({b"old"} if after < 4 else {b"old", b"new"} if after == 4 else {b"new"}), after


def test_without_flushing_first_a_rename_may_arrive_before_its_data(recorder):
    changes = recorded(recorder, lambda root: disk.replace_file(root / "a", b"new"))
    hasty = [change for change in changes if not isinstance(change, Sync)]
    contents = {dict(files).get("a") for files in found(hasty, len(hasty), first=(("a", b"old"),))}
    assert contents == {b"new", b"", b"n", b"ne", b"\0\0\0"}


def test_unflushed_names_come_in_any_order():
    changes = [Create("a", 1), Create("b", 2), Remove("a", 1)]
    trees = {tuple(name for name, _ in files) for files in found(changes, 3)}
    assert trees == {(), ("a",), ("b",), ("a", "b")}
    flushed = [*changes[:2], SyncFolder(""), changes[2]]
    assert {tuple(name for name, _ in files) for files in found(flushed, 4)} == {("a", "b"), ("b",)}


def test_a_move_between_folders_is_two_changes():
    machine = Machine({"x/a": b"1"}, ("x", "y"), {"x": 1, "y": 2, "x/a": 3})
    machine.apply(Rename("x/a", 3, "y/a"))
    trees = {tuple(s.files) for s in machine.now().states(random.Random(0))}
    assert trees == {("y/a",), ("x/a",), ("x/a", "y/a"), ()}
    machine.apply(SyncFolder("y"))
    trees = {tuple(sorted(s.files)) for s in machine.now().states(random.Random(0))}
    assert trees == {("y/a",), ("x/a", "y/a")}


def test_what_is_in_a_folder_whose_name_is_lost_is_lost(recorder):
    def act(root):
        (root / "folder").mkdir()
        disk.replace_file(root / "folder/a", b"data")

    changes = recorded(recorder, act)
    assert () in found(changes, len(changes))

    def act_safely(root):
        disk.make_folder(root / "x/y")
        disk.replace_file(root / "x/y/a", b"data")

    safe = Recorder(recorder.root.parent / "safe")
    safe.root.mkdir()
    changes = recorded(safe, act_safely)
    assert found(changes, len(changes)) == {(("x/y/a", b"data"),)}


def test_a_large_write_is_torn_in_every_way():
    data = bytes(range(1, 256)) * 200
    changes = [Create("a", 1), SyncFolder(""), Write("a", 1, 0, data)]
    contents = [dict(files).get("a", b"") for files in found(changes, 3, at_most=500)]
    assert len(contents) > 200
    assert data in contents
    assert b"" in contents
    assert any(0 < len(c) < len(data) and c == data[: len(c)] and len(c) % SECTOR for c in contents), (
        "cut anywhere"
    )
    assert any(len(c) == len(data) and c[:PAGE] == bytes(PAGE) and c[PAGE:] == data[PAGE:] for c in contents)
    for content in contents:
        for begin in range(0, len(content), SECTOR):
            part = content[begin : begin + SECTOR]
            assert part in (data[begin : begin + len(part)], bytes(len(part))), "bytes that nobody wrote"


def test_few_combinations_are_all_tried():
    """Against a model written down in another way: each of the three sectors, and each of the two names, or not."""
    data = b"a" * SECTOR + b"b" * SECTOR + b"c" * 10
    changes = [Create("a", 1), SyncFolder(""), Write("a", 1, 0, data), Create("b", 2), Create("c", 3)]
    expected = set()
    for mask in range(8):
        parts = [data[n * SECTOR : (n + 1) * SECTOR] for n in range(3)]
        whole = b"".join(p if mask >> n & 1 else bytes(len(p)) for n, p in enumerate(parts))
        for names in ({}, {"b": b""}, {"c": b""}, {"b": b"", "c": b""}):
            expected.add(tuple(sorted({"a": whole, **names}.items())))
    assert expected <= found(changes, 5)
    assert len(found(changes, 5)) <= EXHAUSTIVE


def test_states_are_given_once_and_can_be_put_on_a_disk(recorder, tmp_path):
    changes = recorded(recorder, lambda root: disk.replace_file(root / "a", b"data"))
    states = distinct_states(changes, at_most=50)
    assert len({(s.after, tuple(sorted(s.files.items()))) for s in states}) == len(states)
    materialise(states[-1], tmp_path / "again")
    assert {p.name: p.read_bytes() for p in Path(tmp_path / "again").iterdir()} == {"a": b"data"}
