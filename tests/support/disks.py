"""Ways to take a disk away from a process that runs, and to give it back."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL_BYTES = 4096


def may_mount() -> bool:
    """Whether this process may mount file systems (CAP_SYS_ADMIN)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (capabilities,) = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff")]
    return bool(int(capabilities, 16) >> 21 & 1)


@contextmanager
def tmpfs(folder: Path, size: str = "1m") -> Iterator[None]:
    """A real file system of its own, small enough to fill."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """ENOSPC from the file system that ``folder`` is."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(FULL_BYTES))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def no_writing(pid: int) -> Iterator[None]:
    """EFBIG from every write of a process to a file: its disk is broken, or was made read-only under its feet.

    A file system with a file that is open for writing cannot be remounted read-only (mount(8): "busy"); where the
    kernel does it itself, after an error, every write fails like here.
    """
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """EROFS for whatever is opened below ``folder`` from now on; without the right to mount, no right to write."""
    if not may_mount():
        parts = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for part in parts:
            part.chmod(0o500)
        try:
            yield
        finally:
            for part in parts:
                part.chmod(0o700)
        return
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
