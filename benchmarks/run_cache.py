"""Finished runs of a long benchmark, kept in a file so that an interrupted one goes on.

A line of JSON holds one run: what was asked, the digest of the sources that answered, the answer. Runs of other
sources are left alone and not used: figures of two engines never meet in one table. Several processes may append to
one file.
"""

import ast
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

Run = dict[str, Any]

TREE: Final = Path(__file__).resolve().parent.parent
_TOLD_EVERY_SECONDS: Final = 60.0


class Cache:
    """The runs in ``path`` that ``digest`` made; without a path they are only remembered.

    Raises ValueError where a line but the last is not what was written.
    """

    def __init__(self, path: Path | None, digest: str) -> None:
        self._path = path
        self._digest = digest
        self._found: dict[str, Run] = {}
        self.others = 0
        """Runs of other sources."""
        if path is not None and path.is_file():
            self._load(path)

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> Run | None:
        """The run that was asked for by ``key``."""
        return self._found.get(key)

    def add(self, key: str, run: Run) -> None:
        """Remembers a run; it is in the file when this returns."""
        self._found[key] = run
        if self._path is None:
            return
        line = json.dumps({"key": key, "sources": self._digest, "run": run}) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:  # one write: lines of several processes do not mix
            file.write(line.encode())

    def _load(self, path: Path) -> None:
        data = path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:  # a run was interrupted while it was written
            with path.open("r+b") as file:
                file.truncate(len(data) - len(torn))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                key, sources, run = entry["key"], entry["sources"], entry["run"]
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(
                    f"{path}, line {number}: not a run ({e}); remove the line, or the file"
                ) from e
            if sources == self._digest:
                self._found[key] = run
            else:
                self.others += 1


def key_of(asked: Mapping[str, Any]) -> str:
    """``asked`` as text, whatever the order of its keys."""
    return json.dumps(asked, sort_keys=True)


def digest_of(modules: Sequence[str], settings: Iterable[object] = (), *, without: Sequence[str] = ()) -> str:
    """The digest of what ``modules`` and all that they import from this tree do, and of ``settings``' texts.

    Comments, docstrings and layout do not count, nor do modules that start with one of ``without``.
    """
    sources: dict[str, str] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in sources or any(name == one or name.startswith(f"{one}.") for one in without):
            continue
        file = _file(name)
        if file is None:
            continue
        tree = _bare(ast.parse(file.read_text(encoding="utf-8")))
        sources[name] = ast.dump(tree)
        todo += _imports(tree)
    text = "\n".join([f"{name} {sources[name]}" for name in sorted(sources)] + [str(one) for one in settings])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file(name: str) -> Path | None:
    """The source of a module of this tree; None for a name that is not a module, or of somebody else's."""
    for path in (TREE.joinpath(*name.split(".")), TREE.joinpath(*name.split("."), "__init__")):
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
    return None


def _imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _bare(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not _text(part)] or [ast.Pass()]
    return tree


def _text(part: ast.stmt) -> bool:
    return (
        isinstance(part, ast.Expr)
        and isinstance(part.value, ast.Constant)
        and isinstance(part.value.value, str)
    )


def perform(
    work: Callable[[Any], Run],
    todo: Mapping[str, Any],
    cache: Cache,
    *,
    workers: int | None = None,
    seconds: float = float("inf"),
) -> list[Run]:
    """The runs of ``todo``, what to give to ``work`` by key, in its order; those of the cache are not made again.

    After ``seconds`` no run is begun, and those that are missing are left out. A run that raises ends all.
    """
    started = time.monotonic()
    missing = [key for key in todo if cache.get(key) is None]
    if missing:
        _tell(f"{len(missing)} of {len(todo)} runs to do")
        workers = workers or os.cpu_count() or 1
        with ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn")) as pool:
            _through(pool, work, [(key, todo[key]) for key in missing], cache, 2 * workers, started, seconds)
    return [run for key in todo if (run := cache.get(key)) is not None]


def _through(  # noqa: PLR0917 (what is done, with what, and until when)
    pool: ProcessPoolExecutor,
    work: Callable[[Any], Run],
    missing: Sequence[tuple[str, Any]],
    cache: Cache,
    ahead: int,
    started: float,
    seconds: float,
) -> None:
    waiting: dict[Future[Run], str] = {}
    left = iter(missing)
    done, told = 0, started
    while True:
        while len(waiting) < ahead and time.monotonic() - started < seconds:
            following = next(left, None)
            if following is None:
                break
            key, asked = following
            waiting[pool.submit(work, asked)] = key
        if not waiting:
            return
        finished = wait(waiting, return_when=FIRST_COMPLETED).done
        for future in sorted(finished, key=lambda future: future.exception() is not None):
            cache.add(waiting.pop(future), future.result())
            done += 1
        if time.monotonic() - told > _TOLD_EVERY_SECONDS:
            told = time.monotonic()
            _tell(f"{done} of {len(missing)} runs, {told - started:.0f} s")


def _tell(what: str) -> None:
    print(f"... {what}", file=sys.stderr)
