"""What the next process says about the last one: stopped, failed, killed, out of memory, without power."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.adapters import disk, kernel
from edge_runtime.adapters.last_exit import FIRST_START, POWER_LOST, STOPPED, LastExit
from edge_runtime.contract.errors import LinkError
from tests.support.crash_model import Machine, distinct_states, materialise
from tests.support.recorder import Recorder

MB = 1_000_000
SERVICE = "system.slice/skiffd.service"


class Device:
    """A kernel's files below a folder, and the record on this device's disk; `start` is one process after another."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "state"
        self.state.mkdir(parents=True)
        self.path = self.state / "last_exit.json"
        self._made = 0
        self.put("proc/self/cgroup", f"0::/{SERVICE}\n")
        self.boot("first")
        self.kills(machine=0, slice=0, own=0)

    def put(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def boot(self, name: str) -> None:
        self.put("proc/sys/kernel/random/boot_id", f"{name}\n")

    def kills(self, **counts: int) -> None:
        where = {"own": f"{SERVICE}/", "slice": "system.slice/"}
        for name, count in counts.items():
            if name == "machine":
                self.put("proc/vmstat", f"pgfault 5\noom_kill {count}\ndrop_pagecache 0\n")
            else:
                self.put(f"sys/fs/cgroup/{where[name]}memory.events", f"low 0\noom 9\noom_kill {count}\n")

    def new_group(self) -> None:
        """What systemd does between two starts: the group goes, and comes again with its counters at 0."""
        aside = (
            self.root / "gone" / str(self._made)
        )  # not deleted: its inode must not be given to the new one
        aside.parent.mkdir(exist_ok=True)
        (self.root / "sys/fs/cgroup" / SERVICE).rename(aside)
        self._made += 1
        self.kills(own=0)

    def start(self) -> LastExit:
        found = LastExit(self.path, proc=self.root / "proc", sys=self.root / "sys")
        found.begin("5e55104")
        return found

    def before(self) -> str:
        return self.start().before


@pytest.fixture
def device(tmp_path):
    return Device(tmp_path)


def test_the_first_start_is_none_after_an_end(device):
    first = device.start()
    assert (first.before, first.restarts, first.starts) == (FIRST_START, 0, 1)


def test_a_clean_stop_is_told(device):
    device.start().end()
    second = device.start()
    assert (second.before, second.restarts, second.starts) == (STOPPED, 0, 2)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LinkError("the broker refused us"), "failed: the broker refused us"),
        (ZeroDivisionError("division by zero"), "failed: ZeroDivisionError: division by zero"),
        (LinkError("half a pair: \udc80"), "failed: half a pair: ?"),
    ],
)
def test_an_error_is_told_with_its_message(device, error, said):
    device.start().failed(error)
    assert device.before() == said


def test_a_long_message_is_cut(device):
    device.start().failed(LinkError("x" * 10_000))
    assert len(device.before()) == 300


def test_no_word_at_all_is_a_kill(device):
    device.start()
    assert device.before() == "killed"


def test_another_boot_is_no_power(device):
    device.start()
    device.boot("second")
    device.kills(own=7, machine=7)  # counters of another boot prove nothing
    assert device.before() == POWER_LOST


def test_a_clean_stop_before_another_boot_is_a_clean_stop(device):
    device.start().end()
    device.boot("second")
    assert device.before() == STOPPED


def test_the_kernels_kill_is_told_with_what_was_last_seen(device):
    process = device.start()
    process.note(over="soft", rss_bytes=122_300_000, limit_bytes=135 * MB)
    device.kills(own=1, slice=1, machine=1)
    said = "out of memory (the kernel killed it; RSS was last seen at 122.3 MB, limit 135.0 MB)"
    assert device.before() == said


def test_a_kill_without_a_warning_says_that_there_was_none(device):
    device.start()
    device.kills(own=1)
    assert device.before() == "out of memory (the kernel killed it; it had passed no limit of its own before)"


def test_a_kill_by_hand_beyond_the_hard_limit_tells_of_the_limit(device):
    device.start().note(over="hard", rss_bytes=140 * MB, limit_bytes=135 * MB)
    device.kills(slice=3, machine=9)  # others: our own group is still there and counts none
    said = "over its hard limit (RSS was last seen at 140.0 MB, limit 135.0 MB), then killed"
    assert device.before() == said


def test_a_limit_that_is_kept_again_explains_nothing(device):
    process = device.start()
    process.note(over="hard", rss_bytes=140 * MB, limit_bytes=135 * MB)
    process.note(over="", rss_bytes=80 * MB, limit_bytes=135 * MB)
    assert device.before() == "killed"


def test_a_child_that_was_killed_for_memory_is_not_taken_for_the_process(device):
    process = device.start()
    device.kills(own=1, slice=1, machine=1)  # the update child
    process.note(over="", rss_bytes=80 * MB, limit_bytes=0)
    assert device.before() == "killed"


def test_a_group_made_anew_leaves_the_one_above_to_judge(device):
    device.start()
    device.new_group()
    device.kills(slice=1, machine=1)
    assert device.before().startswith("killed, probably out of memory (the kernel killed a process of this")
    device.new_group()
    device.kills(machine=5)  # elsewhere on the machine, not in this slice
    assert device.before() == "killed"


def test_a_new_group_may_get_the_number_of_the_old(device):
    device.kills(own=3, slice=3, machine=3)
    device.start()
    device.kills(own=0, slice=4, machine=4)  # counters only rise, so this is not the group that was
    assert "probably out of memory" in device.before()


def test_a_container_sees_only_its_new_group_and_the_machine(device):
    device.put("proc/self/cgroup", "0::/\n")
    device.put("sys/fs/cgroup/memory.events", "oom_kill 0\n")
    device.start()
    (device.root / "keeps_the_inode").mkdir()
    (device.root / "sys/fs/cgroup").rename(device.root / "old")
    device.put("sys/fs/cgroup/memory.events", "oom_kill 0\n")
    device.kills(machine=1)
    assert "probably out of memory" in device.before()


def test_without_control_groups_the_machine_counts(device):
    device.put("proc/self/cgroup", "")
    device.start()
    assert device.before() == "killed"
    device.kills(machine=1)
    assert "probably out of memory" in device.before()


def test_version_1_counts_in_the_group_itself(device):
    device.put("proc/self/cgroup", "4:memory:/a/b\n")
    own, above = "sys/fs/cgroup/memory/a/b/memory.oom_control", "sys/fs/cgroup/memory/a/memory.oom_control"
    for name in (own, above):
        device.put(name, "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    device.start()
    device.put(above, "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert device.before() == "killed"
    device.put(own, "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert device.before().startswith("out of memory")


def test_starts_without_a_clean_stop_add_up_and_a_clean_stop_ends_the_row(device):
    counted = []
    for end in (None, None, "failed: x", STOPPED, None, None):
        process = device.start()
        counted.append((process.starts, process.restarts))
        if end:
            process.end(end)
    assert counted == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (6, 1)]


def test_another_daemon_on_the_same_state_is_told(device):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        ticks = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        device.start()
        record = json.loads(device.path.read_text())
        device.path.write_text(json.dumps({**record, "pid": process.pid, "start_ticks": ticks}))
        device.put(f"proc/{process.pid}/stat", Path(f"/proc/{process.pid}/stat").read_text())
        assert device.before().startswith(f"unknown (process {process.pid} still runs on the same state")
        device.path.write_text(json.dumps({**record, "pid": process.pid, "start_ticks": ticks + 1}))
        assert device.before() == "killed"  # the number was given to another process
    finally:
        process.communicate(b"\n", timeout=10)


# ── a record that is damaged, a disk that refuses ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 100_000, b" " * 70_000, b'{"version": 1e999}'],
)
def test_a_damaged_record_is_unknown_and_the_next_one_is_whole(device, content):
    device.path.write_bytes(content)
    process = device.start()
    assert (process.before, process.restarts) == ("unknown (record unreadable)", 1)
    process.end()
    assert device.before() == STOPPED


def test_a_record_that_is_a_folder_is_unknown(device):
    device.path.mkdir()
    assert device.before() == "unknown (record unreadable: Is a directory)"


@settings(max_examples=50)
@given(
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    kept=st.sampled_from([0.0, 0.3, 0.999, 1.0, 1.0, 1.0]),
)
def test_no_damage_raises(tmp_path_factory, damage, kept):
    device = Device(tmp_path_factory.mktemp("damage"))
    device.start()
    content = bytearray(device.path.read_bytes())
    for place, value in damage:
        content[place % len(content)] = value
    device.path.write_bytes(content[: round(kept * len(content))])
    process = device.start()
    assert process.before
    assert process.restarts >= 0
    process.end()
    assert device.before() == STOPPED


def test_power_may_go_at_any_instant_of_writing(tmp_path):
    device = Device(tmp_path / "device")
    process = device.start()
    found = {path.name: path.read_bytes() for path in device.state.iterdir()}
    recorder = Recorder(device.state)
    nodes = recorder.nodes
    with recorder.standing():
        process.end()
    device.boot("second")
    told: Counter[str] = Counter()
    for state in distinct_states(recorder.changes, Machine(found, (), nodes), at_most=1000):
        shutil.rmtree(device.state)
        materialise(state, device.state)
        before = device.before()
        assert before in (POWER_LOST, STOPPED), state.after
        told[before] += 1
    assert told[POWER_LOST] >= 4
    assert told[STOPPED] >= 2


def test_a_refusal_of_the_disk_is_logged_and_nothing_is_raised(device, monkeypatch, caplog):
    process = device.start()

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(30, os.strerror(30))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(disk, "replace_file", refuse)
        process.end()
    assert "last_exit_unsaved" in caplog.text
    assert "Read-only file system" in caplog.text
    # Renaming still worked, so the next start doesn't read what isn't true any more.
    assert device.before() == "unknown (its record could not be written)"


@pytest.mark.parametrize("kind", ["full", "read_only"])
def test_a_real_disk_that_is_full_or_read_only(device, kind, caplog):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(device.state)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        device.start().end()
        assert device.before() == STOPPED  # and that process is running now, as far as the record says
        if kind == "full":
            free = os.statvfs(device.state).f_bavail * os.statvfs(device.state).f_bsize
            (device.state / "filler").write_bytes(bytes(free))
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(device.state)], check=True)
        with caplog.at_level(logging.WARNING):
            device.start().end()
        assert "last_exit_unsaved" in caplog.text
        if kind == "full":
            assert device.before() == "unknown (its record could not be written)"
            (device.state / "filler").unlink()
            device.start().end()
        else:
            assert "last_exit_stale" in caplog.text
            subprocess.run(["mount", "-o", "remount,rw", str(device.state)], check=True)
            device.start().end()
        assert device.before() == STOPPED
    finally:
        subprocess.run(["umount", str(device.state)], check=True)


def test_a_state_folder_that_is_no_folder_does_not_stop_the_daemon(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        process = LastExit(tmp_path / "file" / "last_exit.json")
        process.begin("5e55104")
        process.end()
    assert process.before.startswith("unknown (record unreadable: Not a directory")
    assert "last_exit_unsaved" in caplog.text


# ── real processes, really killed ──────────────────────────────────────────────────────────────────────

CHILD = """
import sys
from pathlib import Path
from edge_runtime.adapters.last_exit import LastExit
if len(sys.argv) > 2:
    (Path(sys.argv[2]) / "cgroup.procs").write_text("0")
process = LastExit(Path(sys.argv[1]))
process.begin("5e55104")
process.note(over="soft", rss_bytes=40_000_000, limit_bytes=45_000_000)
print("begun", flush=True)
if len(sys.argv) > 2:
    kept = [bytearray(b"x" * (1 << 20)) for _ in range(500)]
    print("survived", flush=True)
input()
"""


def child(repository: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        cwd=repository,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_process_that_is_killed_is_told_as_killed(tmp_path, repository):
    path = tmp_path / "last_exit.json"
    process = child(repository, str(path))
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    assert LastExit(path).before.startswith(f"unknown (process {process.pid} still runs")
    process.kill()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    assert LastExit(path).before == "killed"


@pytest.fixture
def small_group():
    """A control group of our own with 64 MB, in either version; needs root and a kernel that lets us."""
    groups = kernel.memory_groups()
    if not groups:
        pytest.skip("no control group accounts memory here")
    version, root = groups[0][0].version, groups[0][-1].folder
    folder = root / f"skiff-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / {1: "memory.limit_in_bytes", 2: "memory.max"}[version]).write_text(str(64 << 20))
    except OSError as e:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no control group can be made here ({e.strerror})")
    yield folder, version
    folder.rmdir()


def test_a_process_that_the_kernel_killed_for_memory_is_told_so(
    tmp_path, repository, small_group, monkeypatch
):
    folder, version = small_group
    path = tmp_path / "last_exit.json"
    process = child(repository, str(path), str(folder))
    output, _ = process.communicate(timeout=60)
    assert output == "begun\n"
    assert process.returncode == -signal.SIGKILL
    # The next process of a service that keeps its group: it sees what the child saw.
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    for name in ("sys", "vmstat"):
        (proc / name).symlink_to(Path("/proc") / name)
    controllers = {1: "4:memory", 2: "0:"}[version]
    (proc / "self/cgroup").write_text(f"{controllers}:/{folder.name}\n")
    said = "out of memory (the kernel killed it; RSS was last seen at 40.0 MB, limit 45.0 MB)"
    assert LastExit(path, proc=proc).before == said
    # One that comes up in another group can't be sure; the machine's own count is all it has.
    assert "probably out of memory" in LastExit(path).before


GROWING = """
import sys
from pathlib import Path
(Path(sys.argv[1]) / "cgroup.procs").write_text("0")
from edge_runtime.adapters.probes import Probes
from edge_runtime.core.budget import Guard, Limits, Shed
probes = Probes()
guard = Guard(Limits(on_hard="shed").within(probes.memory_limit_bytes()))
kept = []
while not any(isinstance(d, Shed) for d in guard.observe(probes.glance(), on_trial=False)):
    kept.append(bytearray(b"x" * (1 << 20)))
print(len(kept), guard.limits.rss_bytes, probes.rss_bytes(), flush=True)
"""


def test_the_guard_acts_before_the_kernel_kills(repository, small_group):
    folder, _ = small_group
    done = subprocess.run(
        [sys.executable, "-c", GROWING, str(folder)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown, hard_bytes, rss_bytes = map(int, done.stdout.split())
    assert hard_bytes == int(0.9 * (64 << 20))
    assert grown > 5
    assert hard_bytes < rss_bytes < hard_bytes + (4 << 20)
