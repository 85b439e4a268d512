"""Stands in front of the calls that change files below one folder: writes down what they do, or refuses one of them.

What is recorded is a list of `Change`s with their data, from which `crash_model` tells what a machine that lost power
would find. It is what the kernel was asked for, not what a file object was: `open` is the standard library's own
pure-Python one meanwhile, which calls the functions of `os`. Native code (SQLite's) goes by unseen; a test compares
the record with what strace saw, so that nothing else does.
"""

import _pyio  # type: ignore[import-not-found] # the standard library's own, which typeshed leaves out
import builtins
import errno
import fcntl
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest

_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_HERE: Final = ""


# ── what can be asked of a file system ─────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Create:
    """A new, empty file; ``node`` is what its name stands for, whatever name that will be."""

    path: str
    node: int


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes at an offset."""

    path: str
    node: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    """The file has this many bytes now: cut off, or filled with zeros."""

    path: str
    node: int
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    """The bytes of a file are durable when this returns."""

    path: str
    node: int


@dataclass(frozen=True, slots=True)
class SyncFolder:
    """The names in a folder are durable when this returns."""

    path: str


@dataclass(frozen=True, slots=True)
class Rename:
    """Another name for a file, in place of what had it."""

    path: str
    node: int
    target: str


@dataclass(frozen=True, slots=True)
class Remove:
    """A name is gone: of a file, or of an empty folder."""

    path: str
    node: int


@dataclass(frozen=True, slots=True)
class MakeFolder:
    """A new, empty folder."""

    path: str
    node: int


@dataclass(frozen=True, slots=True)
class Link:
    """A new symbolic link."""

    path: str
    node: int
    target: str


Change = Create | Write | Truncate | Sync | SyncFolder | Rename | Remove | MakeFolder | Link


@dataclass(frozen=True, slots=True)
class Fault:
    """Call number ``at`` (from 1) does not do what it should, nor, with ``lasting``, does any that changes after it.

    ``code`` is the error it raises. 0 is a short write: half of the bytes, once, and no error. With ``reading`` it is
    the Nth time that a file is opened to be read, by `open`, and no change is refused. With ``sector``, too, that file
    can never be read again, whatever its name; another that takes its place can.
    """

    at: int
    code: int = errno.ENOSPC
    lasting: bool = False
    reading: bool = False
    sector: bool = False

    def hits(self, number: int) -> bool:
        """Whether call ``number`` of its kind is one that fails."""
        return number == self.at or (self.lasting and number > self.at)


@dataclass(slots=True)
class _Open:
    path: str
    node: int
    folder: bool


@dataclass
class Recorder:
    """The changes below ``root`` in order, while `standing`. Paths are relative to it, "" is ``root`` itself.

    ``calls`` counts the calls that a `Fault` can hit: those that change something, and those that flush; ``reads`` the
    files that were opened to be read, ``read`` which they were. ``writes`` has the numbers of those calls that write.
    """

    root: Path
    changes: list[Change] = field(default_factory=list)
    fault: Fault | None = None
    calls: int = 0
    reads: int = 0
    read: list[str] = field(default_factory=list)
    shortened: int = 0
    writes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prefix = f"{self.root}{os.sep}"
        self._handles: dict[int, _Open] = {}
        self._numbers = count(1)
        self._nodes: dict[str, int] = {}
        self._bad: set[int] = set()
        for base, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                self._nodes[self._relative(os.path.join(base, name)) or _HERE] = next(self._numbers)  # noqa: PTH118

    @property
    def nodes(self) -> dict[str, int]:
        """What each name stands for now."""
        return dict(self._nodes)

    def spoil(self, path: str) -> None:
        """From now on this file cannot be read, whatever its name."""
        self._bad.add(self._nodes[path])

    @contextmanager
    def standing(self) -> Iterator["Recorder"]:
        """Takes the place of `os` and `open`; opened and left in the same thread, with no other at work."""
        with pytest.MonkeyPatch.context() as patch:
            for ours in (
                self._open,
                self._write,
                self._fsync,
                self._close,
                self._ftruncate,
                self._truncate,
                self._replace,
                self._unlink,
                self._rmdir,
                self._mkdir,
                self._symlink,
            ):
                self._stand_before(patch, ours.__name__[1:], ours)
            self._stand_before(patch, "rename", self._replace)
            self._stand_before(patch, "remove", self._unlink)
            self._stand_before(patch, "fdatasync", self._fsync)
            for name in ("pwrite", "writev", "pwritev", "link", "sendfile", "copy_file_range"):
                self._forbid(patch, name)
            real = io.open
            for module in (io, builtins):
                patch.setattr(module, "open", lambda *a, **k: self._open_file(real, *a, **k))
            yield self

    @staticmethod
    def _stand_before(patch: pytest.MonkeyPatch, name: str, ours: Callable[..., Any]) -> None:
        real = getattr(os, name)
        patch.setattr(os, name, lambda *a, **k: ours(real, *a, **k))

    def _forbid(self, patch: pytest.MonkeyPatch, name: str) -> None:
        real = getattr(os, name)

        def ours(*args: Any, **options: Any) -> Any:
            mine = any(a in self._handles or self._relative(a) is not None for a in args)
            assert not mine, f"os.{name} below {self.root} is not recorded: teach the recorder"
            return real(*args, **options)

        patch.setattr(os, name, ours)

    def _open_file(
        self, real: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **options: Any
    ) -> Any:
        mine = file in self._handles if isinstance(file, int) else self._relative(file) is not None
        if mine and set(mode) & set("wax+"):
            return _pyio.open(file, mode, *args, **options)
        if mine:
            self._count_read(file)
        return real(file, mode, *args, **options)

    def _count_read(self, file: Any) -> None:
        self.reads += 1
        path = self._handles[file].path if isinstance(file, int) else self._relative(file) or _HERE
        self.read.append(path)
        node, fault = self._nodes.get(path, 0), self.fault
        if fault is not None and fault.reading and fault.hits(self.reads):
            if fault.sector:
                self._bad.add(node)
            raise OSError(fault.code, os.strerror(fault.code), file)
        if node in self._bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), file)

    # ── whose path it is, and whether it may go on ─────────────────────────────────────────────────────

    def _relative(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below ``root``, None when it is not there."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        text = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(text):  # noqa: PTH117 (the cheap way, on a hot path)
            if dir_fd not in self._handles:
                return None
            above = self._handles[dir_fd].path
            return f"{above}/{text}" if above else text
        full = os.path.abspath(text)  # noqa: PTH100 (does not follow links)
        if full == str(self.root):
            return _HERE
        return full.removeprefix(self._prefix) if full.startswith(self._prefix) else None

    def _count(self) -> bool:
        """Counts a call; False when it is to write only a part. Raises what the fault says."""
        self.calls += 1
        fault = self.fault
        if fault is None or fault.reading or not fault.hits(self.calls):
            return True
        if fault.code:
            raise OSError(fault.code, os.strerror(fault.code))
        return False

    def _put(self, change: Change) -> None:
        self.changes.append(change)

    # ── the functions of os ────────────────────────────────────────────────────────────────────────────

    def _open(
        self, real: Callable[..., int], path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        mine = self._relative(path, dir_fd)
        if mine is None:
            return real(path, flags, mode, dir_fd=dir_fd)
        known = mine in self._nodes or mine == _HERE
        if flags & _WRITING:
            self._count()
        handle = real(path, flags, mode, dir_fd=dir_fd)
        if not known:
            self._nodes[mine] = next(self._numbers)
            self._put(Create(mine, self._nodes[mine]))
        elif flags & os.O_TRUNC:
            self._put(Truncate(mine, self._nodes[mine], 0))
        folder = mine == _HERE or os.path.isdir(self.root / mine)  # noqa: PTH112
        self._handles[handle] = _Open(mine, self._nodes.get(mine, 0), folder)
        return handle

    def _write(self, real: Callable[..., int], handle: int, data: Any) -> int:
        mine = self._handles.get(handle)
        if mine is None:
            return real(handle, data)
        whole = bytes(data)
        self.writes.append(self.calls + 1)
        if not self._count() and len(whole) > 1:
            self.shortened += 1
            whole = whole[: len(whole) // 2]
        before = os.fstat(handle).st_size
        appending = bool(_flags(handle) & os.O_APPEND)
        offset = before if appending else os.lseek(handle, 0, os.SEEK_CUR)
        written = real(handle, whole)
        self._put(Write(mine.path, mine.node, offset, whole[:written]))
        return written

    def _fsync(self, real: Callable[..., None], handle: int) -> None:
        mine = self._handles.get(handle)
        if mine is not None:
            self._count()
        real(handle)
        if mine is not None:
            self._put(SyncFolder(mine.path) if mine.folder else Sync(mine.path, mine.node))

    def _close(self, real: Callable[..., None], handle: int) -> None:
        self._handles.pop(handle, None)
        real(handle)

    def _ftruncate(self, real: Callable[..., None], handle: int, length: int) -> None:
        mine = self._handles.get(handle)
        if mine is not None:
            self._count()
        real(handle, length)
        if mine is not None:
            self._put(Truncate(mine.path, mine.node, length))

    def _truncate(self, real: Callable[..., None], path: Any, length: int) -> None:
        if isinstance(path, int):
            self._ftruncate(real, path, length)
            return
        mine = self._relative(path)
        if mine is not None:
            self._count()
        real(path, length)
        if mine is not None:
            self._put(Truncate(mine, self._nodes[mine], length))

    def _replace(self, real: Callable[..., None], source: Any, target: Any, **options: Any) -> None:
        old, new = self._relative(source), self._relative(target)
        assert (old is None) == (new is None), f"{source} to {target}: into or out of {self.root}"
        assert not options, "renaming with dir_fd is not recorded: teach the recorder"
        if old is None or new is None:
            real(source, target)
            return
        self._count()
        assert not os.path.isdir(source) or os.path.islink(source), "folders are not renamed"  # noqa: PTH112, PTH114
        real(source, target)
        node = self._nodes.pop(old)
        self._nodes[new] = node
        self._put(Rename(old, node, new))

    def _unlink(self, real: Callable[..., None], path: Any, *, dir_fd: int | None = None) -> None:
        self._take(real, path, dir_fd)

    def _rmdir(self, real: Callable[..., None], path: Any, *, dir_fd: int | None = None) -> None:
        self._take(real, path, dir_fd)

    def _take(self, real: Callable[..., None], path: Any, dir_fd: int | None) -> None:
        mine = self._relative(path, dir_fd)
        if mine is not None and mine in self._nodes:
            self._count()
        real(path, dir_fd=dir_fd)
        if mine is not None:
            self._put(Remove(mine, self._nodes.pop(mine)))

    def _mkdir(
        self, real: Callable[..., None], path: Any, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> None:
        mine = self._relative(path, dir_fd)
        if mine is not None and mine not in self._nodes:
            self._count()
        real(path, mode, dir_fd=dir_fd)
        if mine is not None:
            self._nodes[mine] = next(self._numbers)
            self._put(MakeFolder(mine, self._nodes[mine]))

    def _symlink(
        self, real: Callable[..., None], source: Any, target: Any, *args: Any, **options: Any
    ) -> None:
        mine = self._relative(target)
        if mine is not None:
            self._count()
        real(source, target, *args, **options)
        if mine is not None:
            self._nodes[mine] = next(self._numbers)
            self._put(Link(mine, self._nodes[mine], os.fsdecode(source)))


def _flags(handle: int) -> int:
    return fcntl.fcntl(handle, fcntl.F_GETFL)
