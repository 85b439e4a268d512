"""How the process before this one ended, from a small record it kept; no end goes untold, not even a kill.

The record is written at the start, when a limit is passed, and at the end; never on a tick, for flash memory wears. A
process that is killed cannot say so: its record still says that it runs, and what the kernel counted since then tells
why. ``oom_kill`` of the control group is exact while the group lives. systemd and container engines make a new group
for every start, with counters at 0; then those of the group above and of the machine are all there is, which other
processes move too, and the answer says "probably".
"""

import json
import logging
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from edge_runtime.adapters import disk, kernel
from edge_runtime.adapters.kernel import integer, read_text, value_of
from edge_runtime.contract.errors import ContractError, SkiffError
from edge_runtime.contract.fields import Fields

VERSION: Final = 1
STOPPED: Final = "stopped"
FIRST_START: Final = "first start"
POWER_LOST: Final = "power lost or machine restarted"
CRASHES: Final = ("failed", "out of memory", "killed", "over its hard limit")
MAX_RECORD_BYTES: Final = 1 << 16
MAX_REASON: Final = 300

_EVENTS: Final = {1: "memory.oom_control", 2: "memory.events"}
_UNSAVED: Final = ".unsaved"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kills:
    """How often the kernel killed for want of memory in one control group; ``inode`` tells a new group from an old."""

    folder: str
    inode: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the kernel tells about the present: which boot this is, and the kills so far."""

    boot_id: str
    groups: tuple[Kills, ...] = ()
    kills: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one process left behind. ``ended`` is "" while it runs; ``over`` names the limit it was over, if any.

    ``restarts`` counts the starts in a row that followed no clean stop, ``starts`` all of them.
    """

    session: str
    boot_id: str
    pid: int
    start_ticks: int
    starts: int = 1
    restarts: int = 0
    ended: str = ""
    over: str = ""
    rss_bytes: int = 0
    limit_bytes: int = 0
    groups: tuple[Kills, ...] = field(default=())
    kills: int = 0


class LastExit:
    """The record of this process under ``path``, and what the one before it said.

    `before` is one of: ``stopped``, ``failed: …``, ``out of memory (…)``, ``killed, probably out of memory (…)``,
    ``over its hard limit (…), then killed``, ``killed``, ``power lost or machine restarted``, ``first start``,
    ``unknown (…)``. `crashed` tells whether that is an end of the process's own making, or by a kill.

    Nothing here raises: a disk that is full or read-only is logged, and the daemon goes on. ``proc`` and ``sys`` are
    where the kernel shows itself.
    """

    def __init__(self, path: Path, *, proc: Path = kernel.PROC, sys: Path = kernel.SYS) -> None:
        self._path: Final = path
        self._proc: Final = proc
        self._hierarchies: Final = kernel.memory_groups(proc / "self/cgroup", sys / "fs/cgroup")
        record, problem = _read(path)
        self._record: Record | None = None
        self._starts = record.starts if record else 0
        self.before: Final = (
            tell(record, self._machine(), alive=self._alive(record))
            if record
            else f"unknown ({problem})"
            if problem
            else FIRST_START
        )
        self.crashed: Final = self.before.startswith(CRASHES)
        clean = self.before in (STOPPED, FIRST_START)
        self.restarts: Final = 0 if clean else (record.restarts if record else 0) + 1

    @property
    def starts(self) -> int:
        """Starts ever recorded here, this one included once it has begun."""
        return self._starts

    def begin(self, session: str) -> None:
        """Records that this process runs, from now on in place of the one before."""
        machine = self._machine()
        self._starts += 1
        pid = os.getpid()
        self._record = Record(
            session=session,
            boot_id=machine.boot_id,
            pid=pid,
            start_ticks=self._start_ticks(pid),
            starts=self._starts,
            restarts=self.restarts,
            groups=machine.groups,
            kills=machine.kills,
        )
        self._save()

    def note(self, *, over: str, rss_bytes: int, limit_bytes: int) -> None:
        """Records which limit of the resident memory the process is over (``soft``, ``hard`` or ""), and by how much.

        For the rare moments when that changes, and when a child was killed: its death must not be taken for this
        process's, so the counters are read again.
        """
        self._change(over=over, rss_bytes=rss_bytes, limit_bytes=limit_bytes)

    def end(self, reason: str = STOPPED) -> None:
        """Records the end that is about to come: ``stopped``, or ``failed: …`` after an error."""
        self._change(ended=reason.encode("utf-8", "replace").decode()[:MAX_REASON] or STOPPED)

    def failed(self, error: BaseException) -> None:
        """Records that this error ends the process; one that is not ours is named by its type."""
        what = str(error) if isinstance(error, SkiffError) else f"{type(error).__name__}: {error}"
        self.end(f"failed: {what}")

    def _change(self, **fields: Any) -> None:
        if self._record is None:
            return
        machine = self._machine()
        self._record = replace(self._record, groups=machine.groups, kills=machine.kills, **fields)
        self._save()

    def _save(self) -> None:
        record = self._record
        assert record is not None
        try:
            disk.replace_file(self._path, json.dumps({"version": VERSION, **asdict(record)}).encode())
        except OSError as e:
            log.warning("last_exit_unsaved path=%s reason=%s", self._path, e.strerror or e)
            self._set_aside()

    def _set_aside(self) -> None:
        """What is on the disk is no longer true; renaming it takes no space, so that works where writing does not."""
        try:
            self._path.replace(self._path.with_name(self._path.name + _UNSAVED))
        except OSError as e:
            log.warning("last_exit_stale path=%s reason=%s", self._path, e.strerror or e)

    # ── what the kernel says ───────────────────────────────────────────────────────────────────────────

    def _machine(self) -> Machine:
        groups = []
        for hierarchy in self._hierarchies:
            # In version 1 a kill counts in its victim's own group only.
            for group in hierarchy if hierarchy[0].version == 2 else hierarchy[:1]:
                count = value_of(read_text(group.folder / _EVENTS[group.version]), "oom_kill")
                inode = _inode(group.folder)
                if count is not None and count >= 0 and inode:
                    groups.append(Kills(str(group.folder), inode, count))
        return Machine(
            boot_id=read_text(self._proc / "sys/kernel/random/boot_id").strip()[:64],
            groups=tuple(groups),
            kills=max(0, value_of(read_text(self._proc / "vmstat"), "oom_kill") or 0),
        )

    def _alive(self, record: Record) -> bool:
        same = record.start_ticks and self._start_ticks(record.pid) == record.start_ticks
        return bool(same) and record.pid != os.getpid()

    def _start_ticks(self, pid: int) -> int:
        """When a process started, in clock ticks since boot: with it a number names one process and no later one."""
        words = read_text(self._proc / str(pid) / "stat").rpartition(")")[2].split()
        if len(words) < 20 or words[0] in "ZX":
            return 0
        return max(0, integer(words[19]) or 0)


def tell(record: Record, machine: Machine, *, alive: bool) -> str:
    """How the process that left ``record`` ended, given what the kernel says now; ``alive`` if it still runs."""
    if record.ended:
        return record.ended
    if record.boot_id and machine.boot_id and record.boot_id != machine.boot_id:
        return POWER_LOST
    if alive:
        return f"unknown (process {record.pid} still runs on the same state; stop one of the two)"
    return _tell_of_kill(record, _killed_for_memory(record, machine))


def _tell_of_kill(record: Record, for_memory: str) -> str:
    limit = f", limit {record.limit_bytes / 1e6:.1f} MB" if record.limit_bytes else ""
    seen = f"RSS was last seen at {record.rss_bytes / 1e6:.1f} MB{limit}"
    if not record.rss_bytes:
        seen = "it had passed no limit of its own before"
    if for_memory == "surely":
        return f"out of memory (the kernel killed it; {seen})"
    if for_memory == "probably":
        return f"killed, probably out of memory (the kernel killed a process of this machine for it; {seen})"
    return f"over its hard limit ({seen}), then killed" if record.over == "hard" else "killed"


def _killed_for_memory(record: Record, machine: Machine) -> str:
    """``surely``, ``probably`` or "".

    A kill counts in the group of its victim and in all above, https://docs.kernel.org/admin-guide/cgroup-v2.html, and
    in ``/proc/vmstat``. The innermost group that both know decides; only the process's own one is proof.
    """
    before = {(group.folder, group.inode): group.count for group in record.groups}
    for group in machine.groups:
        known = before.get((group.folder, group.inode))
        if known is None or group.count < known:  # counters only rise: this is another group of that name
            continue
        rose = group.count > known
        if record.groups[0].inode == group.inode and record.groups[0].folder == group.folder:
            return "surely" if rose else ""
        return "probably" if rose else ""
    return "probably" if machine.kills > record.kills else ""


def _inode(folder: Path) -> int:
    try:
        return folder.stat().st_ino
    except OSError:
        return 0


# ── the record on disk ─────────────────────────────────────────────────────────────────────────────────


def _read(path: Path) -> tuple[Record | None, str]:
    """The record, or why it cannot be had: "" when there never was one."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        aside = path.with_name(path.name + _UNSAVED)
        return None, "its record could not be written" if os.path.lexists(aside) else ""
    except OSError as e:
        return None, f"record unreadable: {e.strerror}"
    try:
        return _parse(data), ""
    except (ContractError, ValueError, RecursionError) as e:
        log.warning("last_exit_unreadable path=%s reason=%s", path, e)
        return None, "record unreadable"


def _parse(data: bytes) -> Record:
    if len(data) > MAX_RECORD_BYTES:
        raise ContractError(f"last_exit: longer than {MAX_RECORD_BYTES} bytes")
    f = Fields(json.loads(data), "last_exit")
    f.integer("version", low=1)
    return Record(
        session=f.text("session"),
        boot_id=f.text("boot_id"),
        pid=f.integer("pid", low=1),
        start_ticks=f.integer("start_ticks", low=0),
        starts=f.integer("starts", low=1),
        restarts=f.integer("restarts", low=0),
        ended=f.text("ended", max_length=MAX_REASON),
        over=f.text("over"),
        rss_bytes=f.integer("rss_bytes", low=0),
        limit_bytes=f.integer("limit_bytes", low=0),
        groups=tuple(
            Kills(group.text("folder", max_length=4096), group.integer("inode"), group.integer("count"))
            for group in f.sections("groups")
        ),
        kills=f.integer("kills", low=0),
    )
