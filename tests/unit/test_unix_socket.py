"""Unix sockets that listen: what is replaced, what is refused, and what is never deleted."""

import os
import socket
import stat
import subprocess
import sys
from contextlib import closing

import pytest

from edge_runtime.adapters.unix_socket import (
    MAX_PATH_BYTES,
    AbstractListener,
    NoPlaceError,
    UnixListener,
    abstract,
    peer_uid,
)
from edge_runtime.contract.errors import ConfigError
from tests.support.disks import may_mount, read_only


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.sock"


def leave(path):
    """What a killed process leaves at ``path``."""
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(path))
        left.listen()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_permissions_are_as_told_and_the_file_goes_at_the_end(path, mode):
    listener = UnixListener(path, mode=mode)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    listener.close()
    assert not path.exists()


def test_what_a_dead_process_left_is_replaced(path):
    leave(path)
    with closing(socket.socket(socket.AF_UNIX)) as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect(str(path))
        with closing(UnixListener(path)):
            client.connect(str(path))


def test_a_living_listener_is_not_robbed(path):
    with closing(UnixListener(path)):
        with pytest.raises(ConfigError, match="another process listens there; stop it") as caught:
            UnixListener(path)
        assert not isinstance(caught.value, NoPlaceError)
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(path))


def test_a_living_listener_whose_queue_is_full_is_not_robbed(path):
    with closing(UnixListener(path, backlog=0)), closing(socket.socket(socket.AF_UNIX)) as first:
        first.connect(str(path))
        with pytest.raises(ConfigError, match="another process listens there"):
            UnixListener(path)


def test_the_file_of_a_successor_is_left_alone(path):
    first = UnixListener(path)
    path.unlink()
    second = UnixListener(path)
    first.close()
    assert path.exists()
    second.close()
    second.close()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_never_deleted(tmp_path, path, kind):
    (tmp_path / "notes").write_text("precious")
    match kind:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "link":  # also one to a stale socket: the link is not what a dead process left
            leave(tmp_path / "stale")
            path.symlink_to("stale")
    before = path.lstat()
    with pytest.raises(ConfigError, match="something that is no socket; choose another path or remove it"):
        UnixListener(path)
    assert path.lstat() == before


def test_a_path_that_is_too_long_is_refused_and_one_that_just_fits_is_not(tmp_path):
    room = MAX_PATH_BYTES - len(os.fsencode(tmp_path)) - 1
    assert room > 0, "pytest's own folder is too deep for this test"
    UnixListener(tmp_path / ("x" * room)).close()
    with pytest.raises(
        NoPlaceError, match="108 bytes; the path of a Unix socket has at most 107: choose a shorter"
    ):
        UnixListener(tmp_path / ("x" * (room + 1)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone/rows.sock", r"gone/rows\.sock: cannot listen there \(No such file.*\); its folder must exist"),
        ("notes/rows.sock", r"notes/rows\.sock: cannot listen there \(Not a directory\)"),
        ("a\0b", "no path of a file, there is a NUL in it"),
    ],
)
def test_a_path_that_cannot_be_is_refused_and_named(tmp_path, name, message):
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(NoPlaceError, match=message):
        UnixListener(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0 and not may_mount(), reason="root may write anywhere, and not mount")
def test_in_a_folder_that_is_read_only_nothing_is_made_replaced_or_removed(tmp_path, caplog):
    folder = tmp_path / "state"
    folder.mkdir()
    leave(folder / "stale")
    listener = UnixListener(folder / "s")
    with read_only(folder):
        for name in ("stale", "new"):
            with pytest.raises(NoPlaceError, match=r"cannot listen there \(.*\); its folder must exist"):
                UnixListener(folder / name)
        listener.close()
        assert (folder / "s").is_socket()
        assert f"socket_left path={folder / 's'}" in caplog.text
    UnixListener(folder / "s").close()
    UnixListener(folder / "stale").close()


def test_a_bare_name_has_one_owner_and_is_free_again_without_a_trace(tmp_path):
    name = f"skiff-test-{os.getpid()}"
    first = AbstractListener(name)
    with pytest.raises(
        ConfigError, match=f"@{name}: cannot listen there \\(another process listens there\\)"
    ):
        AbstractListener(name)
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(abstract(name))
        served, _ = first.socket.accept()
        with served:
            assert peer_uid(client) == peer_uid(served) == os.geteuid()
    first.close()
    AbstractListener(name).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else")
def test_the_other_side_is_known_by_the_kernels_word(path):
    with closing(UnixListener(path, mode=0o666)) as listener:
        path.parent.chmod(0o755)
        child = (
            "import os, socket, sys; os.chdir(sys.argv[1]); os.setuid(65534);"
            "s = socket.socket(socket.AF_UNIX); s.connect('rows.sock'); s.recv(1)"
        )
        with subprocess.Popen([sys.executable, "-c", child, str(path.parent)]) as process:
            served, _ = listener.socket.accept()
            with served:
                assert peer_uid(served) == 65534
        assert process.returncode == 0
