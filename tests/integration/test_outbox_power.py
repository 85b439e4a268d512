"""Power that fails at any step: every accepted record is there exactly once, and the totals are exact."""

import json
import random
import shutil
import subprocess
import sys

import pytest

from edge_runtime.adapters.outbox import Outbox
from edge_runtime.contract.codec import encode
from edge_runtime.core import rollup
from tests.support import history
from tests.support.history import History, event, read_windows, session, total

MAX_BYTES = 6_000


def opened(path):
    return Outbox(path, max_bytes=MAX_BYTES, merge=rollup.merge, choose=rollup.choose)


def everything(outbox):
    """All that must survive."""
    return outbox.pending(1000), outbox.gaps(), outbox.dropped, outbox.size_bytes, len(outbox)


def prepared(path, windows):
    """An outbox with ``windows`` windows of two sessions and an event, closed cleanly; and the windows."""
    made, closed = History(), []
    outbox = opened(path)
    outbox.append(session(1), 1000, history.EVENT_TOPIC, encode(event(1, 1000)))
    for n in range(windows):
        window = made.window(1 + n // 10, n + 1)
        closed.append(window)
        outbox.append(window.session, window.seq, history.TOPIC, encode(window))
    outbox.close()
    return made, closed


def append(window):
    return ["append", window.session, window.seq, history.TOPIC, encode(window).hex()]


def actions(made, closed):
    """What each action does, and whether the windows of it must be there after it."""
    following = [made.window(3, 500 + n) for n in range(3)]
    chatter = [event(3, 600 + n) for n in range(30)]
    return {
        "append": ([append(w) for w in following[:2]], following[:2]),
        "mark_sent": ([["mark_sent", [[closed[0].session, closed[0].seq]]]], []),
        "trim": ([["trim", session(1), [1000]]], []),
        "settle": ([["settle"]], []),
        "events": (
            [["append", e.session, e.seq, history.EVENT_TOPIC, encode(e).hex()] for e in chatter],
            [],
        ),
    }


@pytest.mark.parametrize(
    ("name", "windows"),
    [("append", 3), ("append", 40), ("mark_sent", 5), ("trim", 3), ("settle", 40), ("events", 12)],
    ids=["append", "merge", "mark_sent", "trim", "settle", "drop"],
)
def test_killed_at_any_step_an_outbox_is_as_before_or_as_after(tmp_path, repository, name, windows):
    base = tmp_path / "base"
    made, closed = prepared(base / "outbox.db", windows)
    do, more = actions(made, closed)[name]
    states = []
    whole = tmp_path / "whole"
    shutil.copytree(base, whole)
    outbox = opened(whole / "outbox.db")
    states.append(everything(outbox))
    for step in do:
        match step:
            case "append", of, seq, topic, payload:
                outbox.append(of, seq, topic, bytes.fromhex(payload))
            case "mark_sent", keys:
                outbox.mark_sent([tuple(key) for key in keys])
            case "trim", of, seqs:
                outbox.trim(of, seqs)
            case _:
                outbox.settle(outbox.gaps())
        states.append(everything(outbox))
    outbox.close()
    assert states[0] != states[-1]
    out = tmp_path / "out"
    out.mkdir()
    stride = {"drop": 173, "events": 173}.get(name, 37 if windows < 40 else 61)
    action = json.dumps({"max_bytes": MAX_BYTES, "do": do})
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.outbox_kill", str(base), str(out), action, str(stride)],
        capture_output=True,
        text=True,
        cwd=repository,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 8
    found = set()
    for folder in sorted(out.iterdir(), key=lambda f: int(f.name)):
        outbox = opened(folder / "outbox.db")
        assert outbox.set_aside == outbox.volatile == ""
        state = everything(outbox)
        outbox.close()
        assert state in states, folder.name
        found.add(states.index(state))
        if state[2] == states[0][2]:  # nothing was dropped
            wanted = [*closed, *more[: states.index(state)]]
            assert total(read_windows(r.payload for r in state[0])) == total(wanted)
    assert {0, len(states) - 1} <= found
    print(f"{name}: killed at {done.stdout.strip()} steps")


@pytest.fixture
def logged(tmp_path):
    """An outbox whose log holds all of its history, and (log length, state) after each commit."""
    path = tmp_path / "outbox.db"
    prepared(path, 4)
    outbox = opened(path)
    outbox._database.execute("PRAGMA wal_autocheckpoint = 0")
    log = path.with_name("outbox.db-wal")
    made = History(seed=1)
    commits = [(log.stat().st_size, everything(outbox))]
    for n in range(14):
        window = made.window(2, 100 + n)
        outbox.append(window.session, window.seq, history.TOPIC, encode(window))
        commits.append((log.stat().st_size, everything(outbox)))
        if n == 4:
            first = outbox.pending(1)[0]
            outbox.mark_sent([(first.session, first.seq)])
            commits.append((log.stat().st_size, everything(outbox)))
            outbox.trim(first.session, [first.seq])
            commits.append((log.stat().st_size, everything(outbox)))
    assert any(gap.kind == "merged" for gap in outbox.gaps())
    yield outbox, path, log, commits
    outbox.close()


@pytest.mark.parametrize("tail", [b"", b"\xa5" * 3000])
def test_a_log_cut_anywhere_holds_exactly_what_was_committed_until_then(tmp_path, logged, tail):
    _, path, log, commits = logged
    data, whole = log.read_bytes(), path.read_bytes()
    lengths = [size for size, _ in commits]
    assert lengths == sorted(lengths)
    rng = random.Random(0)
    cuts = {*lengths, *(size - 1 for size in lengths[1:]), *rng.sample(range(32, len(data)), 15)}
    for cut in sorted(cuts):
        copy = tmp_path / f"cut-{cut}" / "outbox.db"
        copy.parent.mkdir()
        copy.write_bytes(whole)
        copy.with_name("outbox.db-wal").write_bytes(data[:cut] + tail)
        wanted = [state for size, state in commits if size <= cut]
        if not wanted:
            continue
        found = opened(copy)
        assert found.set_aside == found.volatile == ""
        assert everything(found) == wanted[-1], cut
        found.close()


def test_a_log_folded_back_by_half_is_folded_back_again(tmp_path, logged):
    outbox, path, log, commits = logged
    before, data = path.read_bytes(), log.read_bytes()
    outbox._database.execute("PRAGMA wal_checkpoint(FULL)")
    after = path.read_bytes()
    pages = len(after) // 4096
    assert before != after
    rng = random.Random(0)
    for n in range(12):
        mixed = b"".join(
            (after if rng.random() < 0.5 else before.ljust(len(after), b"\0"))[4096 * i : 4096 * (i + 1)]
            for i in range(pages)
        )
        copy = tmp_path / f"mixed-{n}" / "outbox.db"
        copy.parent.mkdir()
        copy.write_bytes(mixed)
        copy.with_name("outbox.db-wal").write_bytes(data)
        found = opened(copy)
        assert found.set_aside == found.volatile == ""
        assert everything(found) == commits[-1][1]
        found.close()
