"""What docs/how-to/feed-rows.md shows works as it is shown."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest

from edge_runtime.adapters.sources.ndjson import Refusal, parse
from edge_runtime.adapters.sources.unix import UnixSource
from edge_runtime.feed import Feed
from edge_runtime.runtime import Runtime
from tests.services import missing_service
from tests.support.tiny_models import classifier

WAIT_SECONDS = 30.0
NAMES = ("sepal_length", "sepal_width", "petal_length", "petal_width")
TINY = classifier(NAMES, ("setosa", "versicolor", "virginica"), missing=NAMES)


@pytest.fixture
def page(repository):
    return (repository / "docs/how-to/feed-rows.md").read_text(encoding="utf-8")


def block(page, language, containing=""):
    found = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    [one] = [text for text in found if containing in text]
    return one


def test_the_shown_requests_are_requests_that_the_model_answers(page):
    runtime = Runtime(TINY.artifact)
    for containing in ("[5.1, 3.5, 1.4, 0.2]\n{", '"truth"'):
        for line in block(page, "json", containing).splitlines():
            asked = parse(line.encode())
            assert asked is not None
            assert not isinstance(asked, Refusal), asked
            runtime.predict(asked.rows)
    assert runtime.rows == 5


def test_the_pipe_works(page, tmp_path, repository):
    program = tmp_path / "skiffd"
    model = TINY.save(tmp_path)
    program.write_text(
        f"#!/bin/sh\ncd {repository}\nexec {sys.executable} -m tests.support.serve_stdio {model}\n"
    )
    program.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", block(page, "sh", "printf")],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_SECONDS,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["id"] for answer in answers] == [None, 2]
    assert all(answer["label"] in TINY.labels and answer["model"] == TINY.digest for answer in answers)


@pytest.mark.parametrize(
    ("language", "program"), [("python", [sys.executable, "-c"]), ("js", ["node", "-e"])]
)
def test_the_clients_work(page, language, program, tmp_path):
    if shutil.which(program[0]) is None:
        missing_service(f"{program[0]} is not installed (Debian: apt-get install nodejs)")
    path = tmp_path / "rows.sock"
    stop = threading.Event()
    feed = Feed(UnixSource(path), stop)
    feed.attach(Runtime(TINY.artifact))
    feed.start()
    try:
        script = block(page, language).replace("/run/skiff/rows.sock", str(path))
        done = subprocess.run(
            [*program, script], capture_output=True, text=True, check=True, timeout=WAIT_SECONDS
        )
    finally:
        stop.set()
        feed.join(WAIT_SECONDS)
    assert done.stdout.strip() in TINY.labels
    assert feed.answered == 1


def test_every_reason_is_explained(page, repository):
    explained = set(re.findall(r"^\| `(\w+)` \| .* \| .* \|$", page, re.MULTILINE))
    given = {"too_long"}
    for name in (
        "schema.py",
        "runtime.py",
        "feed.py",
        "mqtt_source.py",
        "adapters/sources/ndjson.py",
        "adapters/sources/unix.py",
    ):
        text = (repository / "edge_runtime" / name).read_text(encoding="utf-8")
        given |= set(re.findall(r'(?:InputError|Refusal)\(\s*"(\w+)"', text))
    assert len(given) > 10
    assert given <= explained
