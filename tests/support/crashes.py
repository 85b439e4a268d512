"""A disk that loses power: every change of a folder tree can be the last, and what was not flushed may be lost.

It stands in front of the functions of `os` that change files, below one folder. Flushing a file makes its bytes
durable, flushing a folder makes the names in it durable; all else may or may not survive, and a test tries both. That
is more hostile than any real file system: ext4, for one, would keep most of it.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class PowerCut(BaseException):
    """The machine stopped; not an `Exception`, for no handler runs when the power is gone."""


class CrashingDisk:
    """Counts the changes below ``root`` and breaks at number ``break_at`` (1 is the first; 0 never does).

    ``full`` makes that one call fail with ENOSPC and lets the process live on; else the power is cut before it.
    """

    def __init__(self, root: Path, *, break_at: int, full: bool = False) -> None:
        self.changes = 0
        self._root = root
        self._break_at = break_at
        self._full = full
        self._paths: dict[int, Path] = {}
        self._unflushed: set[Path] = set()
        self._undo: dict[Path, list[Callable[[], None]]] = {}

    def stand_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the place of `os` until ``monkeypatch`` is undone."""
        for name in ("open", "write", "fsync", "close", "replace", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self._wrap(getattr(self, f"_{name}"), getattr(os, name)))

    def crash(self, *, lose_data: bool, lose_names: bool) -> None:
        """Leaves what a machine finds when it comes up again. Call it after ``monkeypatch`` was undone."""
        if lose_data:
            for path in self._unflushed:
                if path.exists():
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if lose_names:
            for undo in self._undo.values():
                for step in reversed(undo):
                    step()

    @staticmethod
    def _wrap(ours: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: ours(real, *args, **kwargs)

    def _mine(self, path: Any) -> Path | None:
        found = Path(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else None
        return found if found is not None and found.is_relative_to(self._root) else None

    def _change(self) -> None:
        self.changes += 1
        if self.changes == self._break_at:
            if self._full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise PowerCut

    def _note(self, folder: Path, undo: Callable[[], None]) -> None:
        self._undo.setdefault(folder, []).append(undo)

    def _open(self, real: Callable[..., int], path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        mine = self._mine(path)
        if mine is None:
            return real(path, flags, *args, **kwargs)
        if flags & _WRITING:
            self._change()
            if not mine.exists():
                self._note(mine.parent, lambda: mine.unlink(missing_ok=True))
            if flags & os.O_TRUNC or not mine.exists():
                self._unflushed.add(mine)
        handle = real(path, flags, *args, **kwargs)
        self._paths[handle] = mine
        return handle

    def _write(self, real: Callable[..., int], handle: int, data: Any) -> int:
        if handle in self._paths:
            self._change()
            self._unflushed.add(self._paths[handle])
        return real(handle, data)

    def _fsync(self, real: Callable[..., None], handle: int) -> None:
        path = self._paths.get(handle)
        if path is None:
            real(handle)
            return
        self._change()
        if path.is_dir():
            self._undo.pop(path, None)
        else:
            self._unflushed.discard(path)

    def _close(self, real: Callable[..., None], handle: int) -> None:
        self._paths.pop(handle, None)
        real(handle)

    def _replace(self, real: Callable[..., None], source: Any, target: Any, **kwargs: Any) -> None:
        old, new = self._mine(source), self._mine(target)
        if old is not None and new is not None:
            self._change()
            before = new.read_bytes() if new.exists() else None

            def undo() -> None:
                old.write_bytes(new.read_bytes())
                if before is None:
                    new.unlink()
                else:
                    new.write_bytes(before)

            self._note(new.parent, undo)
            self._unflushed.discard(new)
            if old in self._unflushed:
                self._unflushed.remove(old)
                self._unflushed.add(new)
        real(source, target, **kwargs)

    def _unlink(self, real: Callable[..., None], path: Any, **kwargs: Any) -> None:
        mine = self._mine(path)
        if mine is not None and mine.exists():
            self._change()
            before = mine.read_bytes()
            self._note(mine.parent, lambda: None if mine.exists() else _restore(mine, before))
        real(path, **kwargs)

    def _mkdir(self, real: Callable[..., None], path: Any, *args: Any, **kwargs: Any) -> None:
        mine = self._mine(path)
        if mine is not None and not mine.exists():
            self._change()
        real(path, *args, **kwargs)


def _restore(path: Path, data: bytes) -> None:
    path.write_bytes(data)
