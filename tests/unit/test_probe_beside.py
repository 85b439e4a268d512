"""The probe with the model that serves beside the candidate: in turns, within limits, and never to its harm."""

import itertools
import json
import resource
import signal
import time

import numpy as np
import pytest

from edge_runtime import probe as prober
from edge_runtime.adapters import sandbox
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.ids import digest_of
from edge_runtime.core.budget import Budget, beside
from edge_runtime.engine import Engine
from edge_runtime.probe import ProbeJob
from edge_runtime.update_job import Job
from edge_runtime.updater import Update
from tests.publisher import COHORT, DEVICE, FLEET, MODEL, artifact, put

ROOM = 2_000_000_000


def task(tmp_path, candidate, incumbent=None, **changes):
    path = put(tmp_path, incumbent) if incumbent else None
    return {
        "model": str(put(tmp_path, candidate)),
        "digest": digest_of(candidate),
        "incumbent": str(path) if path else "",
        "incumbent_digest": digest_of(incumbent) if incumbent else "",
        "address_space_bytes": ROOM,
        "cpu_seconds": 30,
        "runs": 300,
        **changes,
    }


def ask(document):
    ended = sandbox.run("edge_runtime.probe", document, timeout_seconds=60.0)
    assert ended.code == 0, ended.words
    return json.loads(ended.answer)


def test_both_are_timed(tmp_path):
    alone = ask(task(tmp_path, artifact()))
    both = ask(task(tmp_path, artifact(), artifact(seed=1)))
    assert (alone["incumbent_p99_ns"], alone["incumbent"]) == (0, "none serves")
    assert both["incumbent"] == ""
    assert both["incumbent_p99_ns"] > 0
    assert both["rss_bytes"] <= both["peak_rss_bytes"]


def test_the_memory_is_the_candidates_alone(tmp_path, monkeypatch):
    done = []

    class Loud(Engine):
        def __init__(self, source, **options):
            done.append(str(source))
            super().__init__(source, **options)

    class Memory:
        def rss_bytes(self):
            done.append("rss")
            return 1

        def peak_rss_bytes(self):
            done.append("peak")
            return 2

    monkeypatch.setattr(prober, "Engine", Loud)
    monkeypatch.setattr(prober, "Probes", Memory)
    monkeypatch.setattr(prober, "make_room", lambda: done.append("room"))
    document = task(tmp_path, artifact(), artifact(seed=1), runs=1)
    answer = prober.probe(ProbeJob.read(document))
    assert done == [document["model"], "rss", "peak", "room", document["incumbent"]]
    assert (answer["rss_bytes"], answer["peak_rss_bytes"]) == (1, 2)


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param("gone", marks=pytest.mark.slow),
        "worn",
        pytest.param("another", marks=pytest.mark.slow),
    ],
)
def test_an_incumbent_that_cannot_be_loaded_is_left_out_with_a_word(tmp_path, harm):
    document = task(tmp_path, artifact(), artifact(seed=1))
    path = tmp_path / document["incumbent"]
    if harm == "gone":
        path.unlink()
    elif harm == "worn":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        document["incumbent_digest"] = "0" * 64
    answer = ask(document)
    assert answer["ok"]
    assert answer["incumbent_p99_ns"] == 0
    assert answer["incumbent"].startswith("left out: ")


def test_the_turns_alternate_and_a_burst_weighs_on_both(tmp_path, monkeypatch):
    """The device is ten times slower from the middle on: the candidate is no worse beside the incumbent for it."""
    turns, clock = [], [0]

    class Fake(Engine):
        def __init__(self, name, cost):
            super().__init__(artifact())
            self.name, self.cost = name, cost

        def run(self, rows, **options):
            turns.append(self.name)
            clock[0] += self.cost * (10 if len(turns) > 3000 else 1)
            return super().run(rows, **options)

    monkeypatch.setattr(prober, "_preemptions", lambda: 0)
    monkeypatch.setattr(time, "thread_time_ns", lambda: clock[0])
    times = prober.time_rows([Fake("candidate", 3), Fake("incumbent", 2)], 2000, pause=lambda: None)
    assert [int(t.max()) for t in times] == [30, 20]
    timed = turns[2 * prober.WARM_UP_RUNS :]
    changes = sum(a != b for a, b in itertools.pairwise(timed))
    assert changes >= 2 * 2000 // prober.PART_ROWS - 1
    slow = [int((t > 3).sum()) for t in times]
    assert abs(slow[0] - slow[1]) <= prober.PART_ROWS


def test_the_address_space_of_the_second_is_opened_after_the_first(monkeypatch, tmp_path):
    limits = {resource.RLIMIT_AS: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, (resource.RLIM_INFINITY,) * 2))
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    job = ProbeJob.read(task(tmp_path, artifact(), artifact(seed=1)))
    prober.limit(job)
    assert limits[resource.RLIMIT_AS] == (ROOM, 2 * ROOM)
    assert limits[resource.RLIMIT_CPU] == (60, 61)
    assert limits[resource.RLIMIT_FSIZE] == (prober.MAX_OUTPUT_BYTES,) * 2
    assert limits[resource.RLIMIT_CORE] == (0, 0)
    prober.make_room()
    assert limits[resource.RLIMIT_AS] == (2 * ROOM, 2 * ROOM)
    prober.limit(ProbeJob.read(task(tmp_path, artifact())))
    assert limits[resource.RLIMIT_AS] == (ROOM, ROOM)
    assert limits[resource.RLIMIT_CPU] == (30, 31)


@pytest.mark.parametrize(("wrong_rank", "row"), [(1, 0), (1, 5), (2, 0), (0, None)])
def test_golden_rows_are_asked_all_at_once_and_one_by_one(wrong_rank, row):
    """A graph whose answer depends on the size of the batch."""

    class Fake(Engine):
        asked = 0

        def run(self, rows, **options):
            labels, scores = super().run(rows, **options)
            if rows.ndim == wrong_rank:
                scores[0 if rows.ndim == 2 or self.asked == row else slice(0, 0)] += np.float32(0.01)
            self.asked += rows.ndim == 1
            return labels, scores

    engine = Fake(artifact())
    if row is None:
        assert prober.check_golden(engine) == len(engine.info.golden.rows) > 5
    else:
        with pytest.raises(ArtifactError, match=f"the first is row {row}, off by 0.01"):
            prober.check_golden(engine)


@pytest.mark.parametrize(("code", "tries"), [(-signal.SIGSEGV, 2), (-signal.SIGXCPU, 2), (3, 1)])
def test_what_the_incumbent_may_have_broken_is_tried_without_it(tmp_path, monkeypatch, code, tries):
    asked = []

    def run(module, document, *, timeout_seconds):
        asked.append(document["incumbent_digest"])
        if document["incumbent_digest"]:
            return sandbox.Ended(code, b"", "boom")
        return sandbox.Ended(0, b'{"ok": true}', "")

    monkeypatch.setattr(sandbox, "run", run)
    serving, digest = digest_of(artifact(seed=1)), digest_of(artifact())
    update = Update(
        Job.read(
            {
                "state_dir": str(tmp_path),
                "fleet": FLEET,
                "cohort": COHORT,
                "model": MODEL,
                "device": DEVICE,
                "broker": {"host": "127.0.0.1", "port": 1883},
                "release": "",
                "root": "",
                "floor": 0,
                "serving": serving,
                "have": [],
                "quarantine": {},
                "budgets": {},
                "probe_address_space_bytes": ROOM,
                "deadline_seconds": 30.0,
            }
        )
    )
    update._slots.staging(serving).write_bytes(artifact(seed=1))
    update._slots.install(serving)
    if tries == 2:
        assert update._ask_probe(digest) == {"ok": True}
        assert asked == [serving, ""]
    else:
        with pytest.raises(Exception, match="ended with code 3"):
            update._ask_probe(digest)
        assert asked == [serving]


@pytest.mark.parametrize(
    ("limit", "incumbent", "allowed"), [(100, 0, 100), (100, 49, 100), (100, 80, 160), (0, 80, 0)]
)
def test_a_limit_gives_way_to_twice_what_serves(limit, incumbent, allowed):
    assert beside(Budget(predict_p99_ns=limit, rss_bytes=7), incumbent) == Budget(
        predict_p99_ns=allowed, rss_bytes=7
    )
