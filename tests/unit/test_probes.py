"""Readings of the process and its board, from the kernel of this machine and from trees that show another one."""

import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.adapters.kernel import (
    MAX_BYTES,
    integer,
    limit_files,
    memory_groups,
    memory_limit_bytes,
    read_text,
)
from edge_runtime.adapters.probes import (
    PSS_SECONDS,
    TEMPERATURE_SECONDS,
    THROTTLED_NOW,
    THROTTLED_SINCE_BOOT,
    Probes,
)
from edge_runtime.contract.messages import Health

NOW_AND_BEFORE = THROTTLED_NOW | THROTTLED_SINCE_BOOT


class Tree:
    """What another kernel would show, as files below a folder."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        self.put("proc/self/cgroup", "0::/system.slice/skiffd.service\n")

    def put(self, name: str, text: str) -> None:
        path = self.proc.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def cool(self, number: int, kind: str, state: str) -> None:
        self.put(f"sys/class/thermal/cooling_device{number}/type", f"{kind}\n")
        self.put(f"sys/class/thermal/cooling_device{number}/cur_state", f"{state}\n")

    def probes(self, clock=time.monotonic) -> Probes:
        return Probes(proc=self.proc, sys=self.sys, clock=clock)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


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


def test_a_glance_knows_a_peak_that_came_since_the_last_window():
    probes = Probes()
    before = probes.health()
    block = np.ones((before.peak_rss_bytes >> 3) + (20 << 17))  # beyond any peak so far
    during = probes.glance()
    del block
    after = probes.glance()
    assert during.rss_bytes > before.peak_rss_bytes
    assert after.peak_rss_bytes >= during.peak_rss_bytes >= during.rss_bytes
    assert probes.health().peak_rss_bytes >= during.rss_bytes


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
    assert memory_limit_bytes(limit_files(memory_groups(tmp_path / "self", mounts))) == limit


def test_no_control_groups_are_no_limit(tmp_path):
    assert memory_limit_bytes(limit_files(memory_groups(tmp_path / "absent", tmp_path))) is None


# ── this machine ───────────────────────────────────────────────────────────────────────────────────────


def test_the_proportional_share_is_below_the_whole_and_above_nothing():
    probes = Probes()
    block = np.ones(20 << 17)
    health = probes.health()
    assert block.nbytes < health.pss_bytes <= health.rss_bytes + (1 << 20)


def test_page_faults_are_those_of_this_process():
    probes = Probes()
    before = probes.health().minor_faults
    block = np.ones(20 << 17)
    after = probes.health().minor_faults
    assert block.nbytes
    used = resource.getrusage(resource.RUSAGE_SELF)
    assert before < after <= used.ru_minflt
    assert probes.health().major_faults <= used.ru_majflt


def test_a_glance_is_a_part_of_the_whole():
    probes = Probes()
    glance, health = probes.glance(), probes.health()
    assert 0 < glance.uptime_ns <= health.uptime_ns
    assert 0 < glance.cpu_ns <= health.cpu_ns
    assert glance.rss_bytes == pytest.approx(health.rss_bytes, abs=1 << 20)
    assert health.peak_rss_bytes >= glance.peak_rss_bytes >= glance.rss_bytes
    assert (glance.pss_bytes, glance.minor_faults) == (0, 0)


# ── another machine ────────────────────────────────────────────────────────────────────────────────────


def test_everything_is_read_where_the_kernel_shows_it(tree):
    page, ticks = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    started = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000_000 - 100
    fields = ["S", *["0"] * 6, "700", "0", "9", *["0"] * 9, str(started * ticks), *["0"] * 5]
    tree.put("proc/self/stat", f"77 (a ) b 3) {' '.join(fields)}\n")
    tree.put("proc/self/statm", "900 50 20 1 0 80 0\n")
    tree.put("proc/self/status", "Name:\tskiffd\nVmHWM:\t    4321 kB\nVmRSS:\t 1 kB\n")
    tree.put(
        "proc/self/smaps_rollup",
        "55-7f ---p 0 00:00 0 [rollup]\nRss: 1760 kB\nPss: 301 kB\nPss_Dirty: 1 kB\n",
    )
    group = "sys/fs/cgroup/system.slice/skiffd.service"
    tree.put(f"{group}/memory.max", "100000000\n")
    tree.put(
        f"{group}/memory.pressure",
        "some avg10=9.00 avg60=1.25 avg300=0.31 total=5\nfull avg10=0 avg60=7.00\n",
    )
    tree.put("proc/pressure/memory", "some avg10=0.00 avg60=55.00 avg300=0.00 total=0\n")
    tree.put("sys/class/thermal/thermal_zone0/temp", "48312\n")
    tree.put("sys/class/thermal/thermal_zone1/temp", "61000\n")
    tree.put("sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n")
    found = asdict(tree.probes().health())
    assert 99e9 < found.pop("uptime_ns") < 130e9
    assert found.pop("cpu_ns") > 0
    assert found == {
        "rss_bytes": 50 * page,
        "peak_rss_bytes": 4321 * 1024,
        "pss_bytes": 301 * 1024,
        "memory_limit_bytes": 100_000_000,
        "memory_pressure_ppm": 12_500,
        "minor_faults": 700,
        "major_faults": 9,
        "temperature_mc": 61_000,
        "throttled": NOW_AND_BEFORE,
    }


def test_what_is_not_there_is_zero(tmp_path):
    health = Probes(proc=tmp_path / "proc", sys=tmp_path / "sys").health()
    assert health == Health(cpu_ns=health.cpu_ns, uptime_ns=health.uptime_ns)


def test_a_kernel_without_pressure_per_group_tells_that_of_the_machine(tree):
    tree.put("proc/pressure/memory", "some avg10=0.00 avg60=0.05 avg300=0.00 total=0\n")
    assert tree.probes().memory_pressure_ppm() == 500
    tree.put("proc/self/cgroup", "4:memory:/x\n")  # version 1 has no such file
    tree.put("sys/fs/cgroup/memory/x/memory.pressure", "some avg10=0.00 avg60=50.00 avg300=0.00 total=0\n")
    assert tree.probes().memory_pressure_ppm() == 500


@pytest.mark.parametrize("refuse", ["folder", "gone"])
def test_a_sensor_that_cannot_be_read_is_left_out(tree, refuse):
    tree.put("sys/class/thermal/thermal_zone0/temp", "40000\n")
    tree.put("sys/class/thermal/thermal_zone1/temp", "90000\n")
    probes = tree.probes()
    broken = tree.sys / "class/thermal/thermal_zone1/temp"
    broken.unlink()
    if refuse == "folder":
        broken.mkdir()  # opens, and then refuses the read, as a zone does that is off
    assert probes.temperature_mc() == 40_000


@pytest.mark.parametrize(
    ("bits", "throttled"),
    [
        ("0\n", 0),
        ("0x0\n", 0),
        ("4\n", NOW_AND_BEFORE),
        ("1\n", NOW_AND_BEFORE),
        ("80008\n", NOW_AND_BEFORE),
        ("40000\n", THROTTLED_SINCE_BOOT),
        ("0x50000\n", THROTTLED_SINCE_BOOT),
        ("zz\n", 0),
        ("", 0),
    ],
)
@pytest.mark.parametrize("soc", ["soc/soc:firmware", "soc@107c000000/soc@107c000000:firmware"])
def test_the_firmware_of_a_raspberry_pi_is_asked(tree, soc, bits, throttled):
    tree.put(f"sys/devices/platform/{soc}/get_throttled", bits)
    assert tree.probes().throttled() == throttled


def test_what_was_slowed_down_once_stays_known(tree):
    name = "sys/devices/platform/soc/soc:firmware/get_throttled"
    tree.put(name, "0\n")
    probes = tree.probes()
    assert probes.throttled() == 0
    tree.put(name, "4\n")
    assert probes.throttled() == NOW_AND_BEFORE
    tree.put(name, "0\n")  # newer kernels clear the bits for what has occurred
    assert probes.throttled() == THROTTLED_SINCE_BOOT


def test_a_raspberry_pi_without_the_firmware_file_tells_of_its_supply(tree):
    tree.put("sys/class/hwmon/hwmon0/name", "cpu_thermal\n")
    tree.put("sys/class/hwmon/hwmon0/in0_lcrit_alarm", "1\n")
    tree.put("sys/class/hwmon/hwmon1/name", "rpi_volt\n")
    tree.put("sys/class/hwmon/hwmon1/in0_lcrit_alarm", "0\n")
    probes = tree.probes()
    assert probes.throttled() == 0
    tree.put("sys/class/hwmon/hwmon1/in0_lcrit_alarm", "1\n")
    assert probes.throttled() == NOW_AND_BEFORE


def test_a_pc_counts_and_only_new_events_are_now(tree):
    for cpu in (0, 1):
        for what in ("core", "package"):
            tree.put(f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle/{what}_throttle_count", "0\n")
    probes = tree.probes()
    assert probes.throttled() == 0
    tree.put("sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count", "3\n")
    assert probes.throttled() == NOW_AND_BEFORE
    assert probes.throttled() == THROTTLED_SINCE_BOOT
    assert tree.probes().throttled() == THROTTLED_SINCE_BOOT  # a daemon that starts later


@pytest.mark.parametrize(
    ("kind", "slows"),
    [
        ("cpufreq-cpu0", True),
        ("thermal-cpufreq-0", True),
        ("devfreq-17000000.gpu", True),
        ("Processor", True),
        ("cpu-throttle-alert", True),
        ("soc0-throttle-alert", True),
        ("pwm-fan", False),
        ("Fan", False),
        ("LCD", False),
        ("TCC Offset", False),
        ("hot-surface-alert", False),
    ],
)
def test_cooling_that_takes_speed_is_throttling_and_a_fan_is_not(tree, kind, slows):
    tree.cool(0, "cpufreq-cpu0", "0")
    tree.cool(1, kind, "2")
    assert tree.probes().throttled() == (NOW_AND_BEFORE if slows else 0)


def test_an_idle_powerclamp_is_no_throttling(tree):
    tree.cool(0, "cpufreq-cpu0", "-1")
    assert tree.probes().throttled() == 0


def test_a_glance_spares_the_sensors(tree):
    now = [100.0]
    tree.put("sys/class/thermal/thermal_zone0/temp", "40000\n")
    probes = tree.probes(clock=lambda: now[0])
    assert probes.glance().temperature_mc == 40_000
    tree.put("sys/class/thermal/thermal_zone0/temp", "50000\n")
    now[0] += TEMPERATURE_SECONDS - 0.1
    assert probes.glance().temperature_mc == 40_000
    now[0] += 0.1
    assert probes.glance().temperature_mc == 50_000


def test_windows_that_close_every_second_do_not_walk_the_page_tables_each(tree):
    now = [100.0]
    tree.put("proc/self/smaps_rollup", "Pss: 300 kB\n")
    probes = tree.probes(clock=lambda: now[0])
    assert probes.health().pss_bytes == 300 << 10
    tree.put("proc/self/smaps_rollup", "Pss: 400 kB\n")
    now[0] += PSS_SECONDS - 0.1
    assert probes.health().pss_bytes == 300 << 10
    now[0] += 0.1
    assert probes.health().pss_bytes == 400 << 10


GARBAGE = st.one_of(
    st.binary(max_size=64),
    st.sampled_from(
        [
            b"1_0",
            b"-5",
            b"9" * 30,
            b"some avg60=nan",
            b"some avg60=-1",
            b"VmHWM:",
            b"(x) S",
            b"\xff" * 9,
            b"inf",
        ]
    ),
)


@given(content=GARBAGE)
def test_garbage_is_never_an_error_nor_a_figure_out_of_range(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("garbage")
    tree = Tree(root)
    names = [f"proc/self/{name}" for name in ("stat", "statm", "status", "smaps_rollup", "cgroup")]
    names += ["proc/pressure/memory", "sys/class/thermal/thermal_zone0/temp"]
    names += ["sys/devices/platform/soc/soc:firmware/get_throttled"]
    names += ["sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"]
    names += ["sys/fs/cgroup/memory.max", "sys/class/thermal/cooling_device0/cur_state"]
    tree.cool(0, "cpufreq-cpu0", "0")
    for name in names:
        tree.put(name, "")
        (root / name).write_bytes(content)
    health = asdict(tree.probes().health())
    assert all(0 <= value < 1 << 80 for value in health.values()), health
    assert health["memory_pressure_ppm"] <= 1_000_000
    assert health["throttled"] in (0, THROTTLED_SINCE_BOOT, NOW_AND_BEFORE)


def test_an_endless_file_is_read_as_far_as_is_needed():
    assert len(read_text("/dev/zero")) == MAX_BYTES


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert read_text(tmp_path / "pipe") == ""


@pytest.mark.parametrize(
    ("text", "base", "value"),
    [
        (" 12\n", 10, 12),
        ("-3", 10, -3),
        ("0xff", 16, 255),
        ("1_000", 10, None),
        ("\u0661", 10, None),
        ("18446744073709551616", 10, None),
        ("18446744073709551615", 10, 2**64 - 1),
        ("", 10, None),
    ],
)
def test_numbers_are_read_strictly(text, base, value):
    assert integer(text, base) == value
