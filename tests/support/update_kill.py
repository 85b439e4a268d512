"""Kills update children: ``python -m tests.support.update_kill PLAN.json``; one JSON line per kill on stdout.

The plan has a ``job`` for the child, ``kills`` to reach, a ``seed``, and what must be there whatever happens. The child
is forked from a process that has everything loaded, so that no kill is spent on imports; from its `main` on it is the
real one, with its own probe, against the real broker. It is killed at a random time after a random one of its
progress lines; every `FINISH_EVERY`-th next one must come to its end, and then its model is taken away again.
"""

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime import updater
from edge_runtime.adapters.slots import Slots
from edge_runtime.contract.ids import Digest, digest, digest_of

STAGES = ("trust", "fetching", "verified", "probed")
"""What the child does since its last line: the broker and trust, chunks, the probe, the answer."""
SHARES = (0.3, 0.4, 0.25, 0.05)
FINISH_EVERY = 25
LONGEST_SECONDS = 60.0


@dataclass
class Child:
    """One run of the child, read line by line."""

    pid: int
    answers: int
    begun: float
    stage: str = "trust"
    result: dict[str, Any] | None = None
    _rest: bytes = b""

    @classmethod
    def start(cls, job: dict[str, Any]) -> "Child":
        """Forks it, with its job on stdin and as the leader of a group of its own."""
        ask, asked = os.pipe()
        answer, answered = os.pipe()
        pid = os.fork()
        if not pid:
            os.setsid()
            for source, target in ((ask, 0), (answered, 1)):
                os.dup2(source, target)
            for handle in (ask, asked, answer, answered):
                os.close(handle)
            sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
            code = 1
            try:
                code = updater.main()
            finally:
                os._exit(code)
        os.close(ask)
        os.close(answered)
        with os.fdopen(asked, "wb") as pipe:
            pipe.write(json.dumps(job).encode())
        return cls(pid, answer, time.monotonic())

    def listen(self, until: float) -> bool:
        """Reads what it says until a time, or until it begins a new stage; False when it has ended."""
        while (left := until - time.monotonic()) > 0:
            if not select.select([self.answers], [], [], left)[0]:
                break
            data = os.read(self.answers, 1 << 20)
            if not data:
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            before = self.stage
            for line in map(json.loads, lines):
                self.stage = line.get("progress", self.stage)
                self.result = line.get("result", self.result)
            if self.stage != before:
                return True
        return True

    def end(self, *, kill: bool) -> int:
        """Its exit code; negative when a signal ended it."""
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.answers)
        return os.waitstatus_to_exitcode(status)


def finish(job: dict[str, Any]) -> dict[str, float]:
    """Lets a child come to its end; how long it was in each stage."""
    child = Child.start(job)
    took: dict[str, float] = {}
    while True:
        stage, since = child.stage, time.monotonic()
        going = child.listen(since + LONGEST_SECONDS)
        took[stage] = time.monotonic() - since
        if not going:
            break
        assert child.stage != stage, f"nothing was heard in {LONGEST_SECONDS:g} s of {stage}"
    assert child.end(kill=False) == 0
    assert child.result is not None
    assert child.result["ok"], child.result
    return took


def check(state: Path, committed: Digest, wanted: Digest) -> dict[str, int]:
    """Fails unless what was committed is whole and no other model is half there; what the kill left lying."""
    slots = Slots(state)
    assert slots.damage == ()
    record = slots.record()
    assert record is not None
    assert record["committed"] == committed
    found = {path.stem for path in (state / "blobs").glob("*.onnx")}
    assert committed in found
    assert found <= {committed, wanted}
    for name in found:
        assert digest_of(slots.blob(digest(name)).read_bytes()) == name
    if (state / "trust").is_dir():
        assert Slots(state / "trust").damage == ()
    staging = slots.staging(wanted)
    return {
        "staged": staging.stat().st_size if staging.exists() else 0,
        "installed": int(wanted in found),
        "scratch": int((state / "trust/scratch").exists()),
    }


def kills(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One kill after the other, each checked."""
    job, state, rng = plan["job"], Path(plan["job"]["state_dir"]), random.Random(plan["seed"])
    committed, wanted = digest(plan["committed"]), digest(plan["wanted"])
    slots, missed = Slots(state), 0

    def begin_anew() -> None:
        check(state, committed, wanted)
        assert slots.has(wanted, verify=True)
        slots.collect([committed])

    took = finish(job)
    begin_anew()
    count = 0
    while count < plan["kills"]:
        stage = rng.choices(STAGES, SHARES)[0]
        child = Child.start(job)
        going = True
        while going and child.stage != stage:
            going = child.listen(time.monotonic() + LONGEST_SECONDS)
        reached, until = child.stage, time.monotonic() + rng.uniform(0.0, took[stage])
        while going and time.monotonic() < until:
            going = child.listen(until)
        if child.end(kill=True) != -signal.SIGKILL:  # it was quicker
            missed += 1
            assert missed < plan["kills"] * 3, "children end before they can be killed"
            begin_anew()
            continue
        count += 1
        left = check(state, committed, wanted)
        yield {"stage": child.stage, "aimed": reached, **left, "missed": missed}
        if left["installed"] and stage != "verified":
            slots.collect([committed])
        if count % FINISH_EVERY == 0:
            finish(job)
            begin_anew()


def main() -> None:
    """See the module."""
    for line in kills(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
