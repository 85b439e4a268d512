"""The recorder against strace: whatever the kernel is asked to change below the folder is in the record, in its order.

But for what is not for it to see: SQLite's files, whose tests are tests/integration/test_outbox_power.py.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import missing_service
from tests.support.crash_traced import Call

CALLS = (
    "?open,?openat,?openat2,?creat,?write,?pwrite64,?writev,?pwritev,?pwritev2,?fsync,?fdatasync,"
    "?sync_file_range,?rename,?renameat,?renameat2,?unlink,?unlinkat,?rmdir,?mkdir,?mkdirat,"
    "?symlink,?symlinkat,?link,?linkat,?truncate,?ftruncate,?fallocate,?copy_file_range,?sendfile,"
    "?splice,?mknod,?mknodat,?mmap"
)
"""Names that one processor has and another has not are optional."""
LINE = re.compile(r"^(?P<pid>\d+) +(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
UNFINISHED = re.compile(r"^(?P<pid>\d+) +(?P<begin>.*) <unfinished \.\.\.>$")
RESUMED = re.compile(r"^(?P<pid>\d+) +<\.\.\. \w+ resumed>(?P<end>.*)$")
HANDLE = re.compile(r"\d+<(?P<path>/[^>]*?)(?: \(deleted\))?>")
NAMED = re.compile(r'(?:(?:AT_FDCWD|\d+)<(?P<folder>/[^>]*)>, )?"(?P<path>[^"]*)"')
NOT_OURS = re.compile(r"^state/(outbox\.db|status\.sock)")


def whole_lines(text: str) -> Iterator[str]:
    begun: dict[str, str] = {}
    for line in text.splitlines():
        if found := UNFINISHED.match(line):
            begun[found["pid"]] = line.removesuffix(" <unfinished ...>")
        elif found := RESUMED.match(line):
            yield begun.pop(found["pid"]) + found["end"]
        else:
            yield line


def traced(text: str, home: Path) -> list[Call]:
    """The changes below ``home`` in what strace wrote with ``-f -y``."""
    calls: list[Call] = []
    names: set[str] = {path.name for path in home.iterdir()} - {"state"}

    def ours(path: str) -> str | None:
        if path == str(home):
            return ""
        below = path.removeprefix(f"{home}/")
        return below if below != path and not NOT_OURS.match(below) else None

    for line in whole_lines(text):
        if str(home) not in line or not (found := LINE.match(line)) or int(found["result"]) < 0:
            continue
        name, arguments = found["name"], found["arguments"]
        handle = HANDLE.match(arguments)
        path = ours(handle["path"]) if handle else None
        named = [
            ours(f"{m['folder']}/{m['path']}" if m["folder"] and not m["path"].startswith("/") else m["path"])
            for m in NAMED.finditer(arguments)
        ]
        match name:
            case "open" | "openat":
                (path,) = named
                if path is None:
                    continue
                if "O_CREAT" in arguments and path not in names:
                    names.add(path)
                    calls.append(("create", path))
                elif "O_TRUNC" in arguments:
                    calls.append(("truncate", path, "0"))
            case "write" if path is not None:
                calls.append(("write", path, found["result"]))
            case "ftruncate" if path is not None:
                calls.append(("truncate", path, arguments.rpartition(", ")[2]))
            case "truncate" if named[0] is not None:
                calls.append(("truncate", named[0], arguments.rpartition(", ")[2]))
            case "fsync" | "fdatasync" if path is not None:
                calls.append(("sync", path))
            case "rename" | "renameat" | "renameat2" if any(p is not None for p in named):
                old, new = (str(p) for p in named)
                names.remove(old)
                names.add(new)
                calls.append(("rename", old, new))
            case "unlink" | "unlinkat" | "rmdir" if named[0] is not None:
                names.remove(named[0])
                calls.append(("remove", named[0]))
            case "mkdir" | "mkdirat" if named[0] is not None:
                names.add(named[0])
                calls.append(("mkdir", named[0]))
            case "symlink" | "symlinkat" if named[1] is not None:
                names.add(named[1])
                calls.append(("symlink", named[1]))
            case "mmap" if path is not None and "MAP_SHARED" in arguments and "PROT_WRITE" in arguments:
                calls.append((name, path))
            case "mmap" | "open" | "openat":
                pass
            case _ if path is not None or any(p is not None for p in named):
                calls.append((name, arguments))  # a way to write that the recorder does not know
    return calls


def without_sqlites(seen: list[Call], recorded: list[Call]) -> list[Call]:
    """SQLite flushes the folder that its files are in. The model counts on no more than our own flushing."""
    found: list[Call] = []
    for entry in seen:
        expected = recorded[len(found)] if len(found) < len(recorded) else None
        if entry == expected or entry != ("sync", "state"):
            found.append(entry)
    return found


@pytest.mark.slow
def test_nothing_is_written_that_is_not_recorded(tmp_path, repository):
    strace = shutil.which("strace")
    if strace is None:
        missing_service("strace is not installed (Debian: apt-get install strace)")
    log, out = tmp_path / "strace.log", tmp_path / "recorded.json"
    ended = subprocess.run(
        [
            *(strace, "-f", "-y", "-s", "0", "--seccomp-bpf", "-o", str(log), "-e", f"trace={CALLS}"),
            *(sys.executable, "-m", "tests.support.crash_traced", str(tmp_path), str(out)),
        ],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    if "PTRACE_TRACEME" in ended.stderr or "Operation not permitted" in ended.stderr:
        missing_service(f"strace may not trace here: {ended.stderr.splitlines()[0]}")
    assert ended.returncode == 0, ended.stderr
    recorded = [tuple(entry) for entry in json.loads(out.read_text(encoding="utf-8"))]
    seen = traced(log.read_text(encoding="utf-8", errors="replace"), tmp_path / "home")
    begin = next(n for n, c in enumerate(seen) if c == recorded[0])
    assert without_sqlites(seen[begin:], recorded) == recorded
    assert len(recorded) > 500
