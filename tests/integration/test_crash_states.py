"""A device is started on what a power cut may leave behind; the same at large: ``make crash-states N=20000``.

The tests after the first show that this can fail: with a flush left out, or another order, promises are broken.
"""

import random
import subprocess
import sys
from dataclasses import replace

import pytest

from edge_runtime.adapters import disk
from edge_runtime.adapters.slots import Slots
from edge_runtime.core import lifecycle
from edge_runtime.daemon import Daemon
from tests.support import crash_states
from tests.support.crash_bench import Bench
from tests.support.crash_judge import Judge
from tests.support.crash_states import Explorer, Found
from tests.support.crash_story import Story
from tests.support.recorder import Rename, Sync, SyncFolder

STATES = 2000
EPISODES = {
    "committed",
    "resumed",
    "quarantined",
    "withdrawn",
    "revoked",
    "switched",
    "tampered",
    "tried again",
    "shadowed",
    "disagreed",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench.make(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def story(bench):
    told = Story(bench, bench.folder / "device", seed=0)
    told.live()
    return told


@pytest.fixture
def judge(bench, story, tmp_path):
    return Judge(bench, story.config, tmp_path)


def breaks(life, judge, changes, count):
    """How many states it takes until a promise is broken; 0 when so many break none."""
    found = Explorer(life, judge, random.Random(0), changes).judged(Found(), count, skip=1)
    return next((so_far.states for so_far in found if so_far.bad), 0)


def test_a_device_starts_on_whatever_a_crash_leaves(tmp_path):
    found = crash_states.run(STATES, tmp_path)
    assert found.problems == []
    assert found.states == STATES
    assert found.finished == STATES // crash_states.FINISH_EVERY
    assert found.again > found.finished, "the power failed while devices recovered, too"


def left_out(changes, which):
    return [None if which(change) else change for change in changes]


def swapped(changes, first, second):
    """Each ``first`` that ``second`` follows at once comes after it."""
    found = list(changes)
    for n in range(len(found) - 1):
        if isinstance(found[n], first) and isinstance(found[n + 1], second):
            found[n : n + 2] = found[n + 1], found[n]
    return found


def record_is(change):
    return "record." in change.path


def test_every_flush_is_needed_and_so_is_their_order(story, judge):
    """The calls of the real story, changed as a careless programmer would have made them."""
    assert set(story.told) == EPISODES
    changes = story.life.recorder.changes
    careless = {
        "records are not flushed": left_out(changes, lambda c: isinstance(c, Sync) and record_is(c)),
        "models are not flushed": left_out(changes, lambda c: isinstance(c, Sync) and not record_is(c)),
        "folders of models are not": left_out(changes, lambda c: c == SyncFolder("state/blobs")),
        "the folder of records is not": left_out(changes, lambda c: c == SyncFolder("state")),
        "the folder above is not": left_out(changes, lambda c: c == SyncFolder("")),
        "the folder of trust is not": left_out(changes, lambda c: c == SyncFolder("state/trust")),
        "renamed before flushed": swapped(changes, Sync, Rename),
    }
    assert not breaks(story.life, judge, changes, 50)
    taken = {what: breaks(story.life, judge, changed, 400) for what, changed in careless.items()}
    assert all(taken.values()), taken


def forgets_quarantine(patch):
    real = lifecycle.from_document
    patch.setattr(lifecycle, "from_document", lambda *a: replace(real(*a), quarantine=()))


def forgets_commit(patch):
    real = lifecycle.from_document
    patch.setattr(lifecycle, "from_document", lambda *a: replace(real(*a), trial=None, committed=None))


def collects_all(patch):
    real = Slots.collect
    patch.setattr(Slots, "collect", lambda self, keep: real(self, ()))


def serves_nothing(patch):
    patch.setattr(Daemon, "_serve", lambda self, digest: None)


@pytest.mark.parametrize("forgetful", [forgets_quarantine, forgets_commit, collects_all, serves_nothing])
def test_a_device_that_forgets_is_caught(story, judge, monkeypatch, forgetful):
    forgetful(monkeypatch)
    assert breaks(story.life, judge, story.life.recorder.changes, 400)


@pytest.mark.slow
def test_a_device_that_does_not_flush_is_caught(tmp_path, monkeypatch):
    """The same with the device's own code changed, and a whole run of its own.

    The first state of every instant has all writes in order: only those after these 500 or so tell.
    """
    with monkeypatch.context() as careless:
        careless.setattr(disk, "flush", lambda path: None)
        found = crash_states.run(1000, tmp_path / "careless")
    assert found.bad
    assert crash_states.run(1000, tmp_path / "careful").bad == 0


@pytest.mark.slow
def test_the_command_ends_with_its_figures(repository):
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.crash_states", "300", "--seed", "7"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "states=300 bad=0"
