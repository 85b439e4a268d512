"""What a machine may find on its disk when power is back: every state that a record of changes allows. Pure.

The model is that of ALICE (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014) and of bounded black-box
crash testing (Mohan et al., OSDI 2018), taken at its most hostile: POSIX promises nothing that was not flushed.

- Bytes are durable when their file was flushed after them. Others may be there, be absent, or be torn: cut anywhere,
  or there in some blocks of 512 or 4096 bytes, the rest being what was there before, or zeros, the file as long as it
  would have become.
- A name is durable when its folder was flushed after it. Other changes of names may each have happened or not, in any
  order and any combination; only a renaming within one folder is one change, and replaces as one. One from folder to
  folder is two: a link here and a removal there.
- Flushing a file does not flush its name; flushing a folder does not flush the folder's own name in the one above.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice, product
from pathlib import Path
from typing import Final

from tests.support.recorder import (
    Change,
    Create,
    Link,
    MakeFolder,
    Remove,
    Rename,
    Sync,
    SyncFolder,
    Truncate,
    Write,
)

SECTOR, PAGE = 512, 4096
EXHAUSTIVE: Final = 1024
"""Up to so many combinations at one instant are all tried; of more, the regular ones and random ones."""


@dataclass(frozen=True, slots=True)
class State:
    """A tree of files, as it may be found after change number ``after`` (0: before the first)."""

    after: int
    files: Mapping[str, bytes]
    folders: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Named:
    """One change of names: ``gains`` stands for the node from now on, ``loses`` no longer does."""

    folder: str
    node: int
    gains: str = ""
    loses: str = ""


@dataclass(slots=True)
class _File:
    durable: bytes = b""
    pending: list[Write | Truncate] = field(default_factory=list)


class Machine:
    """A disk and what is on its way to it. `apply` one change after the other; `now` is an instant in between.

    Paths for which ``ignore`` holds are left out: nobody may depend on what is there.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        folders: Sequence[str],
        nodes: Mapping[str, int],
        ignore: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._ignore = ignore
        self._names = {path: nodes[path] for path in (*files, *folders)}
        self._folders = {nodes[path] for path in folders}
        self._files = {nodes[path]: _File(data) for path, data in files.items()}
        self._unflushed: list[_Named] = []
        self._after = 0

    def apply(self, change: Change | None) -> bool:
        """Takes the next change; False when it is one to ignore, or None: one that was left out."""
        self._after += 1
        if change is None or self._ignore(change.path):
            return False
        match change:
            case Create():
                self._files[change.node] = _File()
                self._unflushed.append(_Named(_folder(change.path), change.node, gains=change.path))
            case MakeFolder():
                self._folders.add(change.node)
                self._unflushed.append(_Named(_folder(change.path), change.node, gains=change.path))
            case Write() | Truncate():
                self._files[change.node].pending.append(change)
            case Sync():
                file = self._files[change.node]
                file.durable, file.pending = _applied(file.durable, file.pending), []
            case SyncFolder():
                here = [n for n in self._unflushed if n.folder == change.path]
                self._unflushed = [n for n in self._unflushed if n.folder != change.path]
                self._names = _renamed(self._names, here)
            case Rename():
                old, new = _folder(change.path), _folder(change.target)
                if old == new:
                    self._unflushed.append(_Named(old, change.node, change.target, change.path))
                else:
                    self._unflushed.append(_Named(new, change.node, gains=change.target))
                    self._unflushed.append(_Named(old, change.node, loses=change.path))
            case Remove():
                self._unflushed.append(_Named(_folder(change.path), change.node, loses=change.path))
            case Link():
                raise NotImplementedError(f"{change.path}: a start that depends on a symbolic link")
        return True

    def now(self) -> "Instant":
        """What a crash at this instant would find; stays as it is when more changes are applied."""
        return Instant(
            after=self._after,
            names=self._names,
            unflushed=tuple(self._unflushed),
            durable={node: file.durable for node, file in self._files.items()},
            waiting={node: _File(f.durable, list(f.pending)) for node, f in self._files.items() if f.pending},
            folders=frozenset(self._folders),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """Between two changes: what is durable, and what may or may not have come through."""

    after: int
    names: Mapping[str, int]
    unflushed: tuple[_Named, ...]
    durable: Mapping[int, bytes]
    waiting: Mapping[int, _File]
    folders: frozenset[int]

    def states(self, rng: random.Random) -> Iterator[State]:
        """The states that a crash now may leave, the plainest first; some come more than once.

        Ends when all were given; where there are too many for that it goes on with random ones for ever.
        """
        names, files = self.unflushed, self.waiting
        everything = {node: _applied(f.durable, f.pending) for node, f in files.items()}
        nothing: dict[int, bytes] = {}
        yield self._state(names, everything)
        if not names and not files:
            return
        yield self._state((), nothing)
        yield self._state(names, nothing)
        versions = {node: _versions(file) for node, file in files.items()}
        size = 2 ** len(names)
        for found in versions.values():
            size *= len(found)
        if size <= EXHAUSTIVE and all(_few(f) for f in files.values()):
            for subset in _subsets(names):
                for contents in product(*versions.values()):
                    yield self._state(subset, dict(zip(versions, contents, strict=True)))
            return
        for left_out in names:
            yield self._state([n for n in names if n is not left_out], everything)
        for node, found in versions.items():
            for data in found:
                yield self._state(names, {**everything, node: data})
        while True:
            subset = [n for n in names if rng.random() < 0.5]
            yield self._state(subset, {node: _torn(f, rng) for node, f in files.items()})

    def _state(self, changes: Sequence[_Named], data: Mapping[int, bytes]) -> State:
        found = _renamed(self.names, changes)
        folders = {path for path, node in found.items() if node in self.folders}
        reachable = set(found)
        if len(folders) < len(self.folders):  # what is in a folder that is lost is lost, too
            reachable = {path for path in found if all(above in folders for above in _above(path))}
        return State(
            self.after,
            {
                path: data.get(node, self.durable.get(node, b""))
                for path, node in found.items()
                if path in reachable and node not in self.folders
            },
            frozenset(folders & reachable),
        )


def distinct_states(
    changes: Iterable[Change], machine: Machine | None = None, *, at_most: int
) -> list[State]:
    """The states that a crash after any of ``changes`` may leave, at most so many per instant, none twice in one."""
    machine, rng = machine or Machine({}, (), {}), random.Random(0)
    found = []
    for change in (None, *changes):
        if change is None or machine.apply(change):
            seen: dict[object, State] = {}
            for state in islice(machine.now().states(rng), 4 * at_most):
                seen.setdefault((tuple(sorted(state.files.items())), state.folders), state)
            found += list(seen.values())[:at_most]
    return found


def materialise(state: State, root: Path) -> None:
    """Makes ``root`` the folder that a machine finds when it comes up again."""
    root.mkdir()
    for folder in sorted(state.folders):
        (root / folder).mkdir()
    for name, data in state.files.items():
        (root / name).write_bytes(data)


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _above(path: str) -> Iterator[str]:
    while path := _folder(path):
        yield path


def _renamed(names: Mapping[str, int], changes: Sequence[_Named]) -> dict[str, int]:
    found = dict(names)
    for change in changes:
        if change.gains:
            found[change.gains] = change.node
        if change.loses and found.get(change.loses) == change.node:
            del found[change.loses]
    return found


def _subsets(changes: Sequence[_Named]) -> Iterator[Sequence[_Named]]:
    for size in range(len(changes), -1, -1):
        yield from combinations(changes, size)


def _applied(data: bytes, changes: Sequence[Write | Truncate]) -> bytes:
    for change in changes:
        if isinstance(change, Truncate):
            data = data[: change.size].ljust(change.size, b"\0")
        else:
            data = _written(data, change.offset, change.data)
    return data


def _written(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset].ljust(offset, b"\0") + new + data[offset + len(new) :]


def _few(file: _File) -> bool:
    """Whether `_versions` are all there are: one write of few sectors, and no matter at which byte it is cut."""
    return (
        len(file.pending) == 1
        and isinstance(file.pending[0], Write)
        and len(file.pending[0].data) <= 8 * SECTOR
    )


def _versions(file: _File) -> list[bytes]:
    """The regular ways in which what is pending may have come through, each once."""
    found = [_applied(file.durable, file.pending[:n]) for n in range(len(file.pending), -1, -1)]
    last = file.pending[-1]
    if isinstance(last, Write):
        before, size = _applied(file.durable, file.pending[:-1]), len(last.data)
        cuts = range(SECTOR, size, SECTOR) if size <= 8 * SECTOR else (PAGE, size // 2, size - 1)
        for cut in (1, *cuts, size - 1):
            if 0 < cut < size:
                found.append(_written(before, last.offset, last.data[:cut]))
        whole = found[0]
        if size <= 6 * SECTOR:
            places = range(last.offset, last.offset + size, SECTOR)
            for there in product((True, False), repeat=len(places)):
                found.append(
                    _blocks(before, whole, [p for p, t in zip(places, there, strict=True) if not t], SECTOR)
                )
        else:
            found.append(_blocks(before, whole, [last.offset], PAGE))
            found.append(_blocks(before, whole, range(last.offset, len(whole), PAGE), PAGE))
    return list(dict.fromkeys(found))


def _blocks(old: bytes, new: bytes, lost: Sequence[int], size: int) -> bytes:
    """``new`` in which the blocks that begin at ``lost`` did not come through, at its full length."""
    found = bytearray(new)
    for at in lost:
        end = min(at + size, len(new))
        found[at:end] = old[at:end].ljust(end - at, b"\0")
    return bytes(found)


def _torn(file: _File, rng: random.Random) -> bytes:
    """One of the states that the bytes of a file may be in, anything pending being lost or torn."""
    new, old = _applied(file.durable, file.pending), file.durable
    match rng.randrange(4):
        case 0:
            return new
        case 1:
            return _applied(old, [c for c in file.pending if rng.random() < 0.5])
        case 2:
            kept = rng.randint(0, len(file.pending) - 1)
            before, cut = _applied(old, file.pending[:kept]), file.pending[kept]
            if isinstance(cut, Truncate):
                return before
            return _written(before, cut.offset, cut.data[: rng.randint(0, len(cut.data))])
        case _:
            size = rng.choice((SECTOR, PAGE))
            changed = [c for c in file.pending if isinstance(c, Write)]
            places = [
                p for c in changed for p in range(c.offset // size * size, c.offset + len(c.data), size)
            ]
            return _blocks(old, new, [p for p in places if p < len(new) and rng.random() < 0.5], size)
