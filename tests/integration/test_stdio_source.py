"""``app | skiffd | app``: a real process between two pipes."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from edge_runtime.adapters.sources.ndjson import Answer, Refusal
from edge_runtime.adapters.sources.stdio import StdioSource
from tests.support.tiny_models import classifier

WAIT_SECONDS = 30.0
TINY = classifier(labels=("low", "mid", "high"))


@pytest.fixture
def start(tmp_path, repository):
    model = TINY.save(tmp_path)
    started: list[subprocess.Popen[bytes]] = []

    def run(*, stdout=subprocess.PIPE):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.support.serve_stdio", str(model)],
            cwd=repository,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
        started.append(child)
        return child

    yield run
    for child in started:
        child.kill()
        child.wait(WAIT_SECONDS)
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None and not stream.closed:
                stream.close()


def ended(child):
    """What the process saw, once it has ended by itself."""
    assert child.wait(WAIT_SECONDS) == 0
    return json.loads(child.stderr.read().splitlines()[-1])


def test_rows_go_in_and_answers_come_out(start):
    rows = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    labels = [TINY.labels[i] for i in TINY.answer(rows)[0]]
    lines = [json.dumps({"row": row, "id": i, "truth": labels[0]}) for i, row in enumerate(rows.tolist())]
    lines[7:7] = ["", "nonsense", '{"a": 1, "b": 2}', "[" + " " * 5000 + "]"]
    child = start()
    out, _ = child.communicate("\n".join(lines).encode(), timeout=WAIT_SECONDS)  # no newline at the end
    answers = [json.loads(line) for line in out.splitlines()]
    refused = [answer["error"]["reason"] for answer in answers[7:10]]
    assert refused == ["json", "missing", "too_long"]
    del answers[7:10]
    assert [answer["id"] for answer in answers] == list(range(500))
    assert [answer["label"] for answer in answers] == labels
    assert np.allclose([answer["score"] for answer in answers], TINY.answer(rows)[1], atol=1e-6)
    assert {answer["model"] for answer in answers} == {TINY.digest}
    assert child.returncode == 0


def test_the_end_of_the_input_ends_it_with_everything_counted(start):
    child = start()
    child.stdin.write(b'{"row": [1, 2, 3], "truth": "low"}\n[1, 2]\n')
    child.stdin.close()
    seen = ended(child)
    assert (seen["rows"], seen["labelled"], seen["answered"]) == (1, 1, 1)
    assert seen["queued"] >= 1
    assert seen["refused"] == {"width": 1}
    assert not seen["stopped"]


def test_each_answer_comes_before_the_next_row(start):
    child = start()
    for i in range(20):
        child.stdin.write(b'{"row": [%d, 0, 0], "id": %d}\n' % (i, i))
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["id"] == i


def test_a_reader_that_has_gone_ends_it(start):
    child = start()
    child.stdin.write(b"[1, 2, 3]\n")
    child.stdin.flush()
    assert child.stdout.readline()
    child.stdout.close()  # while it waits for rows
    assert ended(child)["answered"] == 1


def test_a_reader_that_goes_in_the_middle_ends_it(start):
    read, write = os.pipe()
    child = start(stdout=write)
    os.close(write)
    done = threading.Thread(target=push, args=(child.stdin, b"[1, 2, 3]\n" * 100_000))
    done.start()
    assert os.read(read, 10)
    os.close(read)
    assert ended(child)["answered"] < 100_000
    done.join(WAIT_SECONDS)


def test_nobody_reading_holds_it_back_and_sigterm_still_ends_it(start):
    child = start()
    child.stdin.write(b"[1, 2, 3]\n")
    child.stdin.flush()
    assert child.stdout.readline()
    os.set_blocking(child.stdin.fileno(), False)
    line = b"[1, 2, 3]\n"
    sent = stalls = 0
    while stalls < 10:  # nothing moves any more for half a second
        try:
            sent += os.write(child.stdin.fileno(), line * 400)
            stalls = 0
        except BlockingIOError:
            stalls += 1
            assert child.poll() is None
            threading.Event().wait(0.05)
    assert sent < 2 << 20  # two pipes of 64 KiB and a chunk, not all that we had
    child.send_signal(signal.SIGTERM)
    seen = ended(child)
    assert seen["stopped"]
    assert 0 < seen["answered"] < sent / len(line)


def push(stream, data):
    try:
        stream.write(data)
        stream.close()
    except BrokenPipeError:
        return


def test_descriptors_that_are_closed_end_it():
    read, write = os.pipe()
    os.close(read)
    try:
        StdioSource(stdin=read, stdout=write).serve(never, threading.Event())
    finally:
        os.close(write)


def test_a_row_that_was_read_when_the_end_came_is_answered(tmp_path):
    rows = tmp_path / "rows.ndjson"
    rows.write_bytes(b"[1]\n[2]\n[3]\n")
    stop = threading.Event()

    def answer(asked):
        assert not isinstance(asked, Refusal)
        if asked.rows == [2]:
            stop.set()
        return Answer(None, np.array(asked.rows, np.float32), "m")

    with rows.open("rb") as stdin, (tmp_path / "answers").open("wb") as stdout:
        StdioSource(stdin=stdin.fileno(), stdout=stdout.fileno()).serve(answer, stop)
    scores = [json.loads(line)["score"] for line in (tmp_path / "answers").read_text().splitlines()]
    assert scores == [[1.0], [2.0]]


def never(_):
    raise AssertionError("there was no row")
