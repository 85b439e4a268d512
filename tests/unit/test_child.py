"""The update child's harness, with real processes."""

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edge_runtime.adapters.child import MAX_LINE_BYTES, Child

PATIENCE_SECONDS = 20.0


class Running:
    """A `Child` of a module written for the test, and the lines it has said so far."""

    def __init__(self, module, job, deadline_seconds):
        self.woken = threading.Semaphore(0)
        self.child = Child(module, job, wake=self.woken.release, deadline_seconds=deadline_seconds)

    def line(self):
        assert self.woken.acquire(timeout=PATIENCE_SECONDS), "the child said nothing"
        found = self.child.poll()
        assert found is not None, "woken without a line"
        return found

    def lines(self):
        found = [self.line()]
        while "exit" not in found[-1]:
            found.append(self.line())
        assert self.child.poll() is None
        return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = []

    def start(body, job=None, *, deadline_seconds=PATIENCE_SECONDS):
        (tmp_path / "child_under_test.py").write_text(body)
        started.append(Running("child_under_test", job or {}, deadline_seconds))
        return started[-1]

    yield start
    for running in started:
        running.child.kill()


def ended(pid):
    """Whether a process is dead, or dies soon: its pipes close a moment before it does."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], PATIENCE_SECONDS)[0])
    finally:
        os.close(handle)


def test_the_job_arrives_and_the_lines_come_back_in_order(run):
    job = {"text": "é\n", "numbers": [1, 2.5, None]}
    body = """
import json, sys
job = json.load(sys.stdin)
print(json.dumps({"progress": 1}))
print(json.dumps({"result": job}))
"""
    assert run(body, job).lines() == [{"progress": 1}, {"result": job}, {"exit": 0, "stderr": ""}]


def test_lines_come_while_the_child_runs(run):
    body = """
import sys
print('{"progress": 1}', flush=True)
sys.stdin.read()
import time
time.sleep(60)
"""
    running = run(body)
    assert running.line() == {"progress": 1}
    assert running.child.poll() is None


def test_an_exit_code_and_the_last_words_are_told(run):
    body = """
import sys
for k in range(50):
    print(f"line {k}", file=sys.stderr)
sys.exit(7)
"""
    (end,) = run(body).lines()
    assert end["exit"] == 7
    assert end["stderr"].splitlines() == [f"line {k}" for k in range(30, 50)]


def test_a_crash_is_an_end_like_any_other(run):
    (end,) = run("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)").lines()
    assert end["exit"] == -11


def test_a_module_that_is_not_there(monkeypatch, tmp_path):
    running = Running("no_such_module_anywhere", {}, PATIENCE_SECONDS)
    (end,) = running.lines()
    assert end["exit"] == 1
    assert "no_such_module_anywhere" in end["stderr"]


def test_an_interpreter_that_is_not_there(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    running = Running("child_under_test", {}, PATIENCE_SECONDS)
    (end,) = running.lines()
    assert end["exit"] == -1
    assert "/no/such/python" in end["stderr"]
    running.child.kill()


@pytest.mark.parametrize(
    "line",
    ["hello", "[1, 2]", "17", "'single'", "{", '\\ud800"', "[" * 100_000],
    ids=["text", "list", "number", "quotes", "half", "surrogate", "deep"],
)
def test_a_line_that_is_no_json_object_is_kept_as_an_error(run, line):
    first, end = run(f"print({line!r})\nprint('{{\"ok\": true}}')").lines()
    assert first == {"ok": True}
    assert end["exit"] == 0
    assert end["stderr"].startswith("not a JSON object: ")
    assert len(end["stderr"]) < 300


def test_an_endless_line_does_not_fill_the_memory(run):
    body = f"import sys\nsys.stdout.write('x' * {3 * MAX_LINE_BYTES + 5})\n"
    (end,) = run(body).lines()
    assert end["stderr"].count("not a JSON object") == 4


def test_a_child_that_is_not_done_in_time_is_killed(run):
    running = run(
        "import time\nprint('{\"progress\": 1}', flush=True)\ntime.sleep(600)", deadline_seconds=1.0
    )
    started = time.monotonic()
    first, end = running.lines()
    assert first == {"progress": 1}
    assert end == {"exit": -9, "stderr": "killed: it was not done in 1 s"}
    assert time.monotonic() - started < PATIENCE_SECONDS


def test_a_grandchild_is_killed_with_the_child(run):
    body = """
import json, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(json.dumps({"grandchild": other.pid}), flush=True)
time.sleep(600)
"""
    running = run(body)
    pid = running.line()["grandchild"]
    os.kill(pid, 0)  # it runs
    running.child.kill()
    assert running.lines()[-1]["exit"] == -9  # it held the same stdout: the end comes when both are gone
    assert ended(pid)


def test_a_child_and_its_children_end_with_the_daemon_that_is_killed(tmp_path, monkeypatch):
    (tmp_path / "child_under_test.py").write_text("""
import json, subprocess, sys, time
from edge_runtime.adapters.child import end_with_reader
end_with_reader()
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
print(json.dumps({"grandchild": other.pid}), flush=True)
time.sleep(600)
""")
    (tmp_path / "daemon_under_test.py").write_text("""
import threading
from edge_runtime.adapters.child import Child
woken = threading.Semaphore(0)
child = Child("child_under_test", {}, wake=woken.release, deadline_seconds=600.0)
woken.acquire()
print(child._process.pid, child.poll()["grandchild"], flush=True)
woken.acquire()
""")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(Path.cwd()))))
    with subprocess.Popen([sys.executable, "-m", "daemon_under_test"], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        pids = [int(word) for word in daemon.stdout.readline().split()]
        handles = [os.pidfd_open(pid) for pid in pids]
        daemon.kill()
    for handle in handles:
        assert select.select([handle], [], [], PATIENCE_SECONDS)[0], "a process outlived its daemon"
        os.close(handle)


def test_a_grandchild_that_outlives_the_child_is_ended_by_the_deadline(run):
    body = """
import json, os, subprocess, sys
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(json.dumps({"grandchild": other.pid}), flush=True)
os._exit(3)
"""
    running = run(body, deadline_seconds=1.5)
    first, end = running.lines()
    assert end["exit"] == 3
    assert ended(first["grandchild"])


def test_a_child_that_never_reads_its_job_is_no_obstacle(run):
    job = {"padding": "x" * 1_000_000}  # far beyond what a pipe holds
    first, end = run("print('{\"ok\": true}')", job).lines()
    assert first == {"ok": True}
    assert end["exit"] == 0


def test_a_child_that_neither_reads_nor_ends_is_killed_in_time(run):
    job = {"padding": "x" * 1_000_000}
    (end,) = run("import time\ntime.sleep(600)", job, deadline_seconds=1.0).lines()
    assert end["exit"] == -9


def test_a_child_that_talks_much_before_it_reads_is_not_waited_for_in_vain(run):
    job = {"padding": "x" * 1_000_000}
    body = """
import json, sys
for k in range(3000):
    print(json.dumps({"progress": k, "padding": "y" * 100}))
print(json.dumps({"bytes": len(json.load(sys.stdin)["padding"])}))
"""
    found = run(body, job).lines()
    assert found[-2] == {"bytes": 1_000_000}
    assert len(found) == 3002


def test_killing_a_child_that_has_ended_is_harmless(run):
    running = run("")
    running.lines()
    running.child.kill()
    running.child.kill()


def test_a_job_that_is_no_json_is_the_callers_error():
    with pytest.raises(TypeError):
        Child("child_under_test", {"x": object()}, wake=lambda: None, deadline_seconds=1.0)


def test_the_last_line_is_the_end_and_nothing_follows(run):
    assert [json.dumps(line) for line in run("print('{}')").lines()] == ["{}", '{"exit": 0, "stderr": ""}']


def test_a_child_that_gives_way_is_killed_before_its_daemon():
    script = """
from edge_runtime.adapters.child import give_way
give_way()
print(open("/proc/self/oom_score_adj").read())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("1000", "")
