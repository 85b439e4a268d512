"""Several aggregator processes over one subscription and one pair of stores, on a real broker: killed, and paused."""

import re
import signal
import subprocess
import sys
import time

import pytest

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.records import Selection
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import merge_all
from tests.integration.test_aggregator_service import Site, end
from tests.support.fleet import SPEC, A, window

LEASE_SECONDS = 1.0
ELECTED = re.compile(r"elected process=(\w+) term=(\d+)")


class SharedSite(Site):
    """A fleet whose aggregators share a subscription; each writes a log of its own."""

    def __init__(self, folder, broker, repository):
        super().__init__(folder, broker)
        text = self.path.read_text(encoding="utf-8")
        share = f'share = "aggregators"\nlease_seconds = {LEASE_SECONDS}'
        self.path.write_text(text.replace("[ingest]", f"[ingest]\n{share}"), encoding="utf-8")
        self.repository = repository
        self.processes = []

    def start(self):
        number = len(self.processes)
        with self.log_path(number).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.run_aggregator", str(self.path)],
                stdin=subprocess.DEVNULL,
                stderr=log,
                cwd=self.repository,
            )
        self.processes.append(process)
        self.wait(
            lambda: "connected identity=aggregator" in self.log(number), f"process {number}'s connection"
        )
        return number

    def log_path(self, number):
        return self.folder / f"aggregator-{number}.log"

    def log(self, number):
        return self.log_path(number).read_text(encoding="utf-8")

    def leader(self):
        """The number of the process that was elected last, by the lease's term."""
        terms = [
            (int(term), number)
            for number in range(len(self.processes))
            for _, term in ELECTED.findall(self.log(number))
        ]
        return max(terms, default=(0, None))[1]

    def acked(self):
        return sum(len(device.acked) for device in self.devices)

    def stored(self):
        return {(w.device, w.seq) for w in self.windows(lambda it: tuple(it.windows(Selection())))}


@pytest.fixture
def shared(tmp_path, mosquitto, repository):
    site = SharedSite(tmp_path, mosquitto, repository)
    yield site
    for device in site.devices:
        device.close()
    for process in site.processes:
        if process.poll() is None:
            process.kill()
            process.wait(10.0)


@pytest.mark.parametrize("victim", ["leader", pytest.param("follower", marks=pytest.mark.slow)])
def test_nothing_is_lost_or_counted_twice_when_one_of_two_is_killed(shared, victim):
    names = [f"dev-{i}" for i in range(4)]
    sent = {name: [window(name, seq) for seq in range(1, 101)] for name in names}
    total = sum(map(len, sent.values()))
    shared.start()
    shared.wait(lambda: shared.leader() == 0, "a leader")
    shared.start()
    for name, windows in sent.items():
        shared.device(name).put(windows)
    shared.wait(lambda: shared.acked() >= total // 4, "the first acknowledgements")
    dead, left = (0, 1) if victim == "leader" else (1, 0)
    end(shared.processes[dead], signal.SIGKILL)
    told = {(device.name, seq) for device in shared.devices for seq in device.acked}
    assert told <= shared.stored()
    shared.wait(lambda: shared.acked() == total, "every acknowledgement")
    shared.wait(lambda: shared.leader() == left, "the survivor to lead")
    shared.wait(lambda: len(shared.ledger(Ledger.devices)) == len(names), "every birth")
    late = shared.device("late")
    late.put([window("late", 1)])
    shared.wait(lambda: late.acked and len(shared.ledger(Ledger.devices)) == len(names) + 1, "a late birth")
    assert shared.order("start_rollout", candidate=shared.digest)[0] == "accepted"
    end(shared.processes[left], signal.SIGTERM)
    assert shared.processes[left].returncode == 0
    (merged,) = shared.windows(lambda it: it.profiles(Selection(devices=tuple(map(DeviceId, names)))))
    assert merged == merge_all(SPEC, [w.profile for ws in sent.values() for w in ws], probabilities=True)
    counted = shared.windows(lambda it: it.totals(Selection(digest=A)))
    assert {t.device: t.windows for t in counted} == {**dict.fromkeys(names, 100), "late": 1}
    figures = shared.windows(Windows.figures)
    print(f"{figures.windows} windows stored once, {figures.duplicates_rejected} duplicates rejected")


@pytest.mark.slow
def test_both_processes_take_part(shared):
    shared.start()
    shared.start()
    for i in range(4):
        shared.device(f"dev-{i}").put([window(f"dev-{i}", seq) for seq in range(1, 41)])
    shared.wait(lambda: shared.acked() == 160, "every acknowledgement")
    for process in shared.processes:
        end(process, signal.SIGTERM)
    counts = [sum(map(int, re.findall(r"ingested windows=(\d+)", shared.log(n)))) for n in (0, 1)]
    assert sum(counts) == 160
    assert min(counts) > 0


@pytest.mark.slow
def test_a_leader_that_was_paused_beyond_its_lease_steps_down_and_writes_nothing(shared):
    shared.start()
    shared.wait(lambda: shared.leader() == 0, "a leader")
    shared.start()
    shared.device("dev-0")
    shared.wait(lambda: shared.ledger(Ledger.devices), "a birth")
    shared.processes[0].send_signal(signal.SIGSTOP)
    shared.wait(lambda: shared.leader() == 1, "the other to take over")
    state, name = shared.order("start_rollout", candidate=shared.digest)
    assert state == "accepted"
    shared.wait(lambda: shared.ledger(lambda it: it.rollout(name)).state == "completed", "the rollout's end")
    revision = 3  # canary, everyone, the candidate as the new incumbent
    shared.wait(lambda: shared.devices[0].releases[-1][0].revision == revision, "the last release")
    shared.processes[0].send_signal(signal.SIGCONT)
    shared.wait(lambda: "deposed" in shared.log(0), "the paused process to step down")
    shared.device("dev-1")
    shared.wait(lambda: len(shared.ledger(Ledger.devices)) == 2, "a birth heard by the new leader")
    shared.wait(lambda: shared.devices[1].releases, "the release for a newcomer")
    assert shared.devices[1].releases[0][0].revision == revision
    assert shared.leader() == 1
    began = time.monotonic()
    end(shared.processes[1], signal.SIGTERM)  # lays the lease down
    shared.wait(lambda: shared.leader() == 0, "the first to lead again")
    print(f"taken over {time.monotonic() - began:.2f} s after the leader was told to stop")
    end(shared.processes[0], signal.SIGTERM)
    assert [process.returncode for process in shared.processes] == [0, 0]
