"""Readings of the process, and the control group's memory limit as the kernel shows it."""

import subprocess
import sys
import time

import numpy as np
import pytest

from edge_runtime.adapters.probes import Probes, memory_limit_bytes


def test_memory_follows_what_is_used():
    probes = Probes()
    before = probes.health()
    block = np.ones(50 << 17)  # 50 MB, written to
    during = probes.health()
    assert during.rss_bytes - before.rss_bytes > 40 << 20
    del block
    after = probes.health()
    assert after.rss_bytes < during.rss_bytes - (40 << 20)
    assert after.peak_rss_bytes >= during.rss_bytes - (1 << 20)
    assert before.peak_rss_bytes >= before.rss_bytes > 1 << 20


def test_cpu_time_follows_work_and_not_sleep():
    probes = Probes()
    before = probes.cpu_ns()
    end = time.thread_time_ns() + 20_000_000
    while time.thread_time_ns() < end:
        pass
    assert probes.cpu_ns() - before >= 20_000_000


def test_uptime_is_the_processs_own(repository):
    child = (
        "import time; from edge_runtime.adapters.probes import Probes; start = time.monotonic_ns();"
        "p = Probes(); a = p.uptime_ns(); b = p.uptime_ns(); print(a, b, time.monotonic_ns() - start)"
    )
    begun = time.monotonic_ns()
    done = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, check=True, cwd=repository
    )
    lived = time.monotonic_ns() - begun
    first, second, inside = map(int, done.stdout.split())
    assert 0 <= first <= second
    tick_ns = 20_000_000  # the kernel notes the start of a process in hundredths of a second
    assert second <= lived + tick_ns
    assert second >= inside - tick_ns


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "100\n"}, 100),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "70\n", "memory.max": "90\n"}, 70),
        ("0::/a/b\n", {"c/memory.max": "5\n"}, None),
        ("0::/\n", {"memory.max": "3"}, 3),
        ("4:cpu,memory:/x\n1:cpu:/y\n", {"memory/x/memory.limit_in_bytes": "44\n"}, 44),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("4:memory:/x\n0::/z\n", {"memory/x/memory.limit_in_bytes": "9\n", "z/memory.max": "8\n"}, 8),
        ("0::/a:b\n", {"a:b/memory.max": "6"}, 6),
        ("", {}, None),
    ],
)
def test_the_tightest_limit_of_the_control_group_holds(tmp_path, membership, files, limit):
    mounts = tmp_path / "cgroup"
    for name, text in files.items():
        (mounts / name).parent.mkdir(parents=True, exist_ok=True)
        (mounts / name).write_text(text)
    (tmp_path / "self").write_text(membership)
    assert memory_limit_bytes(tmp_path / "self", mounts) == limit


def test_no_control_groups_are_no_limit(tmp_path):
    assert memory_limit_bytes(tmp_path / "absent", tmp_path) is None
