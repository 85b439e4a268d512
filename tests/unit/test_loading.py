"""What loading a model may do to the process around it: no threads, no reports, no row that waits for numpy."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from edge_runtime import engine as engine_module
from edge_runtime.contract.manifest import read_info
from edge_runtime.contract.profile import Binner
from edge_runtime.engine import Engine, Works, building, counting
from edge_runtime.runtime import Runtime
from edge_runtime.serving import RING_ROWS
from tests.support.tiny_models import classifier

TINY = classifier()
THREADS = """
import os, sys
import numpy
before = len(os.listdir("/proc/self/task"))
from edge_runtime.engine import Engine
Engine(sys.argv[1])
print(os.environ["ORT_DISABLE_TELEMETRY"], len(os.listdir("/proc/self/task")) - before)
"""


def loaded_in_a_process(tmp_path, **chosen):
    path = tmp_path / "model.onnx"
    path.write_bytes(TINY.artifact)
    silent = (
        "ORT_DISABLE_TELEMETRY",
        "ORT_RUNNING_UNIT_TESTS",
        "CI",
    )  # what else keeps ONNX Runtime from reporting
    environment = {name: value for name, value in os.environ.items() if name not in silent} | chosen
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are listed in /proc")
def test_loading_a_model_starts_no_thread_and_so_reports_to_nobody(tmp_path):
    assert loaded_in_a_process(tmp_path) == ["1", "0"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are listed in /proc")
def test_what_the_environment_says_about_telemetry_stands(tmp_path):
    assert loaded_in_a_process(tmp_path, ORT_DISABLE_TELEMETRY="true")[0] == "true"


def predicted(runtime, rows):
    for row in rows:
        runtime.predict(row)


def rows_of(n):
    return np.random.default_rng(7).normal(size=(n, len(TINY.features))).astype(np.float32)


def test_a_full_ring_is_counted_when_the_model_is_loaded():
    runtime = Runtime(TINY.artifact)
    rows = rows_of(RING_ROWS + 2)
    with building:
        predicted(runtime, rows[:-1])
        assert len(runtime._serving.ring) == RING_ROWS + 1
    predicted(runtime, rows[-1:])
    assert runtime._serving.ring == []
    binner = Binner(TINY.reference.spec, probabilities=True)
    engine = Engine(TINY.artifact)
    labels, scores = engine.run(rows)
    assert labels is not None
    binner.observe(rows, labels, scores)
    assert runtime.take_window().profile == binner.take()


def test_a_ring_gets_twice_as_long_at_most_while_a_model_is_loaded():
    runtime = Runtime(TINY.artifact)
    with building:
        predicted(runtime, rows_of(2 * RING_ROWS))
        assert runtime._serving.ring == []
    assert runtime.take_window().rows == 2 * RING_ROWS


def test_it_says_that_it_is_built_and_afterwards_that_it_is_not(monkeypatch):
    said: list[bool] = []

    def noticed(data):
        said.append(bool(building))
        return read_info(data)

    monkeypatch.setattr(engine_module, "read_info", noticed)
    Engine(TINY.artifact)
    assert said == [True]
    assert not building
    monkeypatch.setattr(engine_module, "read_info", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Engine(TINY.artifact)
    assert not building


def test_a_model_is_loaded_when_rows_have_been_counted(monkeypatch):
    order = []
    works = Works(counting)
    began, wanted = threading.Event(), threading.Event()

    def count():
        with counting:
            began.set()
            assert wanted.wait(10)
            order.append("counted")

    def pause(_):
        wanted.set()
        counter.join(10)

    monkeypatch.setattr("edge_runtime.engine.time.sleep", pause)
    counter = threading.Thread(target=count)
    counter.start()
    assert began.wait(10)
    with works:
        order.append("loaded")
    counter.join()
    assert order == ["counted", "loaded"]


def test_rows_that_are_never_done_counting_keep_no_model_from_loading(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("edge_runtime.engine.time.sleep", pauses.append)
    with counting:
        Engine(TINY.artifact)
    assert sum(pauses) == pytest.approx(0.01)
